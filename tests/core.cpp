// The torch-free core by itself, for machines and builds where torch is not at hand: another processor (in an emulator),
// or a sanitizer. tests/check_core.sh says how.
//
//   core                runs a small random model in every precision and prints a few of its logits
//   core | core compare with another LLMFAST_CPU_ISA: the second reads the first's and compares
//   core threads        generates from several threads at once with one model, each with helpers

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/native_decoder.h"
#include "../csrc/sampling.h"

using namespace llmfast;

namespace {

uint64_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return float(int64_t(state) >> 40) / float(1 << 23);
}

struct Stored {
  std::vector<float> floats, scale32;
  std::vector<int8_t> bytes;
  std::vector<uint8_t> nibbles;
  std::vector<uint16_t> scale16;
};

// A random weight in a precision's own form.
WeightSource random_weight(Format format, i64 N, i64 K, Stored& s) {
  const i64 groups = (K + 31) / 32;
  switch (format) {
    case Format::i8:
      for (i64 i = 0; i < N * K; i++) s.bytes.push_back(int8_t(127 * uniform()));
      for (i64 n = 0; n < N; n++) s.scale32.push_back(0.002f * (1.5f + uniform()));
      return {WeightSource::Type::i8, s.bytes.data(), K, 1, s.scale32.data()};
    case Format::i4:
      for (i64 i = 0; i < N * groups * 16; i++) s.nibbles.push_back(uint8_t(128 + 127 * uniform()));
      for (i64 i = 0; i < N * groups; i++) s.scale16.push_back(uint16_t(0x3c80 + 16 * (1 + uniform())));
      return {WeightSource::Type::i4, s.nibbles.data(), groups * 16, 1, s.scale16.data()};
    default:
      for (i64 i = 0; i < N * K; i++) s.floats.push_back(0.3f * uniform());
      return {WeightSource::Type::f32, s.floats.data(), K, 1, nullptr};
  }
}

std::shared_ptr<NativeModel> random_model(Format format, int threads) {
  const NativeShape shape{101, 300, 48, 2, 3, 100, Activation::gelu_tanh, 1e-5f, true};
  state = 1;
  auto model = std::make_shared<NativeModel>(shape, std::vector<Format>(9, format));
  std::vector<std::string> names{"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"};
  for (int layer = 0; layer < 2; layer++)
    for (const char* part : {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.weight", "attn.c_attn.bias",
                             "attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
                             "mlp.c_proj.bias"})
      names.push_back("transformer.h." + std::to_string(layer) + "." + part);
  for (const std::string& name : names) {
    const NativeModel::Place& place = model->place(name);
    Stored stored;
    const i64 K = place.K ? place.K : 1;
    model->give(name, random_weight(place.matrix ? format : Format::f32, place.N, K, stored), team_threads(threads));
  }
  return model;
}

// Logits after two prompts, a few tokens, a block of tokens whose end is taken back, and others in their place.
std::vector<float> generate(std::shared_ptr<const NativeModel> model, CacheType cache, int threads) {
  NativeDecoder decoder(std::move(model), 2, 300, 290, cache);
  std::vector<int64_t> ids;
  for (int i = 0; i < 283; i++) ids.push_back(i * 7 % 101);
  std::vector<float> logits(2 * 101);
  int64_t best[16];
  decoder.step(ids.data(), {{0, 0, 270, 0}, {1, 0, 13, 0}}, false, 101, threads, logits.data(), best);
  for (int step = 0; step < 6; step++) {
    decoder.step(best, {{1, 13 + step, 1, 0}, {0, 270 + step, 1, 0}}, false, 101, threads, logits.data(), best);
    best[0] = (best[0] + sample({logits.data(), 101, 0.8, 10, 0.9, 0.01, 0.5})) * 0 + step;
    best[1] = 2 * step;
  }
  decoder.step(ids.data(), {{0, 276, 9, 0}}, true, 101, threads, nullptr, best);
  for (int step = 0; step < 4; step++) {
    const int64_t next[2] = {step, 3 * step + 1};
    decoder.step(next, {{0, 279 + step, 1, 0}, {1, 19 + step, 1, 0}}, false, 101, threads, logits.data(), best);
  }
  return logits;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * 4);
}

// The activation does not wait for a bias: without one, the bits are those of a bias of zeros.
bool activates_without_bias() {
  std::vector<float> logits[2];
  for (const bool without : {false, true}) {
    const auto model = random_model(Format::f32, 1);
    for (int layer = 0; layer < 2; layer++) {
      const std::string name = "transformer.h." + std::to_string(layer) + ".mlp.c_fc.bias";
      std::fill_n(model->place(name).vector, model->place(name).N, 0.0f);
      if (without) const_cast<DecoderLayer&>(model->ready().layer[layer]).mlp_in.bias = nullptr;
    }
    logits[without] = generate(model, CacheType::f32, 2);
  }
  return same_bits(logits[0], logits[1]);
}

int threads_at_once() {
  for (const Format format : {Format::f32, Format::bf16, Format::i8, Format::i4})
    for (const CacheType cache : {CacheType::f32, CacheType::bf16, CacheType::i8}) {
      const auto model = random_model(format, 3);
      const std::vector<float> expected = generate(model, cache, 1);
      std::atomic<int> wrong{0};
      std::vector<std::thread> threads;
      for (int i = 0; i < 3; i++)
        threads.emplace_back([&, i] {
          for (int turn = 0; turn < 3; turn++) wrong += !same_bits(generate(model, cache, 2 + i), expected);
        });
      for (std::thread& thread : threads) thread.join();
      if (wrong) {
        std::fprintf(stderr, "several threads at once change the logits\n");
        return 1;
      }
    }
  std::printf("%s: threads at once get the logits of one\n", kernels().name);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "threads")) return threads_at_once();
  if (!activates_without_bias()) {
    std::fprintf(stderr, "a product without a bias loses its activation\n");
    return 1;
  }
  std::vector<float> all;
  for (const Format format : {Format::f32, Format::bf16, Format::i8, Format::i4})
    for (const CacheType cache : {CacheType::f32, CacheType::bf16, CacheType::i8}) {
      const std::vector<float> one = generate(random_model(format, 1), cache, 1);
      if (!same_bits(one, generate(random_model(format, 4), cache, 4))) {
        std::fprintf(stderr, "the number of threads changes the logits\n");
        return 1;
      }
      all.insert(all.end(), one.begin(), one.end());
    }
  if (argc == 1) {
    for (const float value : all) std::printf("%.9g\n", double(value));
    return 0;
  }
  double largest = 0;
  for (const float value : all) {
    float other;
    if (std::scanf("%f", &other) != 1) return 1;
    largest = std::fmax(largest, std::fabs(double(value) - double(other)));
  }
  std::printf("%s: the largest difference of logits is %.2g\n", kernels().name, largest);
  return largest < 0.1 ? 0 : 1;
}
