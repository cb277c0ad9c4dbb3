// The torch-free core by itself, for machines and builds where torch is not at hand: another processor (in an emulator),
// or a sanitizer. tests/check_core.sh says how.
//
//   core                runs small random models in every precision, prints a few logits of the decoders and the vectors
//                       of the encoder
//   core | core compare with another LLMFAST_CPU_ISA: the second reads the first's and compares
//   core threads        generates and encodes from several threads at once with one model, each with helpers

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

#include "../csrc/decoder/native_adapter.h"
#include "../csrc/decoder/native_decoder.h"
#include "../csrc/decoder/sampling.h"
#include "../csrc/encoder/native_encoder.h"

using namespace llmfast;

namespace {

constexpr Format FORMATS[] = {Format::f32, Format::bf16, Format::i8, Format::i4, Format::q8_0, Format::q4_1, Format::q4_k};
constexpr Format ENCODER_FORMATS[] = {Format::f32, Format::f32_split, Format::bf16, Format::i8};

uint64_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return float(int64_t(state) >> 40) / float(1 << 23);
}

struct Stored {
  std::vector<float> floats;
  std::vector<uint8_t> values, codes[2];
  std::vector<uint16_t> halves[2];
};

std::vector<uint8_t> random_bytes(i64 n) {
  std::vector<uint8_t> bytes(static_cast<size_t>(n));
  for (uint8_t& byte : bytes) byte = uint8_t(128 + 127 * uniform());
  return bytes;
}

// Numbers around a power of two, as a half or a bfloat16: 16 steps of its last places.
std::vector<uint16_t> random_halves(i64 n, uint16_t first) {
  std::vector<uint16_t> halves(static_cast<size_t>(n));
  for (uint16_t& half : halves) half = uint16_t(first + 16 * (1 + uniform()));
  return halves;
}

// A random weight in a precision's own form, its numbers within about 0.3.
WeightSource random_weight(Format format, i64 N, i64 K, Stored& s) {
  const i64 groups = (K + 31) / 32, blocks = (groups + 7) / 8;
  if (format == Format::f32 || format == Format::f32_split || format == Format::bf16) {
    for (i64 i = 0; i < N * K; i++) s.floats.push_back(0.3f * uniform());
    return {Format::f32, s.floats.data(), K, 1, nullptr, nullptr, nullptr, nullptr};
  }
  WeightSource source{format, nullptr, K, 1, nullptr, nullptr, nullptr, nullptr};
  s.values = random_bytes(format == Format::i8 || format == Format::q8_0 ? N * K : N * groups * 16);
  if (format == Format::i8) {
    for (uint8_t& byte : s.values) byte = byte == 0x80 ? 0x81 : byte;  // -128 is none of its numbers
    for (i64 n = 0; n < N; n++) s.floats.push_back(0.002f * (1.5f + uniform()));
    source.scale = s.floats.data();
  } else if (format == Format::i4) {
    s.halves[0] = random_halves(N * groups, 0x3c80);  // bfloat16 from 2^-6
  } else if (format == Format::q8_0) {
    s.halves[0] = random_halves(N * groups, 0x1800);  // float16 from 2^-9
  } else if (format == Format::q4_1) {
    s.halves[0] = random_halves(N * groups, 0x2400), s.halves[1] = random_halves(N * groups, 0xac00);  // 2^-6, -2^-4
  } else {
    s.halves[0] = random_halves(N * blocks, 0x1000), s.halves[1] = random_halves(N * blocks, 0x9400);  // 2^-11, -2^-10
    for (std::vector<uint8_t>& codes : s.codes) codes = random_bytes(N * groups);
    for (std::vector<uint8_t>& codes : s.codes)
      for (uint8_t& code : codes) code &= 63;
    source.scale_code = s.codes[0].data(), source.minimum_code = s.codes[1].data();
  }
  source.values = s.values.data();
  if (!s.halves[0].empty()) source.scale = s.halves[0].data();
  if (!s.halves[1].empty()) source.minimum = s.halves[1].data();
  return source;
}

// A small model of GPT-2's block, and one with the Llama family's switches: grouped heads whose width is not a vector's,
// norms of heads, rotation of a part of them, a block without, a window, a gated MLP, biases here and there, an untied head.
// Beside q4_k the third of the projections is in q8_0: a matrix of two formats.
ModelDescription describe(bool llama, Format format) {
  const Format value = format == Format::q4_k ? Format::q8_0 : format;
  ModelDescription d;
  DecoderShape& s = d.shape;
  s = {};
  s.vocabulary = 101, s.positions = 300, s.width = 48, s.blocks = 2, s.heads = s.key_heads = 3, s.head_dim = 16,
  s.inner = 100;
  s.norm = Norm::layer, s.norm_epsilon = 1e-5f, s.activation = Activation::gelu_tanh;
  s.attention_scale = 0.25f, s.embedding_multiplier = s.residual_multiplier = s.logits_divisor = s.rotary_factor = 1.0f;
  d.rotary = {false, false}, d.windows = {0, 0};
  std::vector<Role> weights{Role::attention_norm, Role::query_key_value, Role::attention_out,
                            Role::mlp_norm,       Role::mlp_in,          Role::mlp_out};
  std::vector<Role> biases = weights;
  std::vector<Role> outside{Role::token_embedding, Role::position_embedding, Role::final_norm};
  if (llama) {
    s.heads = 6, s.key_heads = 2, s.head_dim = 10, s.rotary_dim = 6;
    s.norm = Norm::rms, s.activation = Activation::silu, s.gated = true;
    s.embedding_multiplier = 2.0f, s.residual_multiplier = 0.5f, s.logits_divisor = 3.0f, s.rotary_factor = 1.2f;
    d.inverse_frequencies = {1.0f, 0.1f, 0.01f}, d.rotary = {true, false}, d.windows = {20, 0};
    weights = {Role::attention_norm, Role::query,    Role::key,  Role::value, Role::query_norm, Role::key_norm,
               Role::attention_out,  Role::mlp_norm, Role::gate, Role::up,    Role::mlp_out};
    biases = {Role::query, Role::value, Role::up};
    outside = {Role::token_embedding, Role::head, Role::final_norm};
  }
  for (i64 block = 0; block < s.blocks; block++) {
    for (const Role role : weights) d.parameters.push_back({block, role, false, role == Role::value ? value : format});
    for (const Role role : biases) d.parameters.push_back({block, role, true, Format::f32});
  }
  for (const Role role : outside) d.parameters.push_back({-1, role, false, format});
  if (!llama) d.parameters.push_back({-1, Role::final_norm, true, Format::f32});
  return d;
}

// A small encoder, whose width and heads are no multiple of a vector's.
ModelDescription describe_encoder(Format format) {
  ModelDescription d;
  DecoderShape& s = d.shape;
  s = {};
  s.vocabulary = 50, s.positions = 300, s.width = 42, s.blocks = 2, s.heads = s.key_heads = 3, s.head_dim = 14, s.inner = 70;
  s.norm = Norm::layer, s.norm_epsilon = 1e-5f, s.activation = Activation::gelu_erf;
  s.attention_scale = 0.25f, s.embedding_multiplier = s.residual_multiplier = s.logits_divisor = s.rotary_factor = 1.0f;
  d.rotary = {false, false}, d.windows = {0, 0};
  for (const bool bias : {false, true}) {
    for (i64 block = 0; block < s.blocks; block++) {
      for (const Role role : {Role::query, Role::key, Role::value, Role::attention_out, Role::mlp_in, Role::mlp_out})
        d.parameters.push_back({block, role, bias, bias ? Format::f32 : format});
      for (const Role role : {Role::attention_norm, Role::mlp_norm})
        d.parameters.push_back({block, role, bias, Format::f32});
    }
    d.parameters.push_back({-1, Role::embedding_norm, bias, Format::f32});
  }
  for (const Role role : {Role::token_embedding, Role::position_embedding, Role::type_embedding})
    d.parameters.push_back({-1, role, false, Format::f32});
  return d;
}

std::shared_ptr<NativeModel> random_model(const ModelDescription& description, int threads) {
  state = 1;
  auto model = std::make_shared<NativeModel>(description);
  for (i64 i = 0; i < model->parameters(); i++) {
    const NativeModel::Place& place = model->place(i);
    Stored stored;
    const i64 K = place.K ? place.K : 1;
    model->give(i, random_weight(place.format, place.N, K, stored), team_threads(threads));
  }
  return model;
}

// Beside all matrices of the blocks, of a rank that is no multiple of what ranks are taken by.
std::shared_ptr<const NativeAdapter> random_adapter(const NativeModel& model, const ModelDescription& description) {
  constexpr i64 RANK = 5;
  std::vector<int64_t> parameters;
  std::vector<float> a, b;
  for (i64 i = 0; i < model.parameters(); i++) {
    const NativeModel::Place& place = model.place(i);
    if (description.parameters[size_t(i)].block < 0 || !place.matrix) continue;
    parameters.push_back(i);
    for (i64 j = 0; j < RANK * place.K; j++) a.push_back(0.3f * uniform());
    for (i64 j = 0; j < RANK * place.N; j++) b.push_back(0.1f * uniform());
  }
  const bool rounded = description.parameters[1].format != Format::f32;
  return std::make_shared<NativeAdapter>(model, parameters, RANK, 0.5f, a.data(), i64(a.size()), b.data(), i64(b.size()),
                                         rounded);
}

// Logits after two prompts, a few tokens, a block of tokens whose end is taken back, and others in their place.
std::vector<float> generate(std::shared_ptr<const NativeModel> model, CacheType cache, int threads,
                            std::shared_ptr<const NativeAdapter> adapter = nullptr) {
  NativeDecoder decoder(std::move(model), 2, 300, 290, cache);
  decoder.adapt({nullptr, std::move(adapter)});
  std::vector<int64_t> ids;
  for (int i = 0; i < 283; i++) ids.push_back(i * 7 % 101);
  std::vector<float> logits(2 * 101);
  int64_t best[16];
  decoder.step(ids.data(), {{0, 0, 270, 0}, {1, 0, 13, 0}}, false, 101, threads, logits.data(), best);
  for (int step = 0; step < 6; step++) {
    decoder.step(best, {{1, 13 + step, 1, 0}, {0, 270 + step, 1, 0}}, false, 101, threads, logits.data(), best);
    best[0] = (best[0] + sample({logits.data(), 101, 0.8, 10, 0.9, 0.01, 0.5, nullptr})) * 0 + step;
    best[1] = 2 * step;
  }
  decoder.step(ids.data(), {{0, 276, 9, 0}}, true, 101, threads, nullptr, best);
  for (int step = 0; step < 4; step++) {
    const int64_t next[2] = {step, 3 * step + 1};
    decoder.step(next, {{0, 279 + step, 1, 0}, {1, 19 + step, 1, 0}}, false, 101, threads, logits.data(), best);
  }
  return logits;
}

// Texts of four groups, which several threads take as wholes or share (encoder_step.inl), pooled in every way.
std::vector<float> encode_texts(const NativeModel& model, int threads) {
  const std::vector<i64> lengths{290, 200, 97, 40, 17, 16, 3, 1, 1, 130};
  i64 count = 0;
  for (const i64 length : lengths) count += length;
  std::vector<int64_t> ids;
  for (i64 i = 0; i < count; i++) ids.push_back(i * 7 % 50);
  std::vector<float> vectors;
  for (const Pooling pooling : {Pooling::mean, Pooling::first, Pooling::last}) {
    std::vector<float> out(lengths.size() * 42);
    encode(model, ids.data(), count, lengths, pooling, threads, out.data());
    vectors.insert(vectors.end(), out.begin(), out.end());
  }
  return vectors;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * 4);
}

// The activation does not wait for a bias: without one, the bits are those of a bias of zeros.
bool activates_without_bias() {
  std::vector<float> logits[2];
  for (const bool without : {false, true}) {
    ModelDescription description = describe(false, Format::f32);
    auto& parameters = description.parameters;
    const auto of_mlp_in = [](const Parameter& p) { return p.role == Role::mlp_in && p.bias; };
    // The last that get their weights, so that the others are the same either way.
    const auto first =
        std::stable_partition(parameters.begin(), parameters.end(), [&](const Parameter& p) { return !of_mlp_in(p); });
    if (without) parameters.erase(first, parameters.end());
    const auto model = random_model(description, 1);
    for (i64 i = 0; i < model->parameters(); i++)
      if (of_mlp_in(parameters[size_t(i)])) std::fill_n(model->place(i).vector, model->place(i).N, 0.0f);
    logits[without] = generate(model, CacheType::f32, 2);
  }
  return same_bits(logits[0], logits[1]);
}

// Whether `run(threads)` gives the bits of one thread where several call it at once.
template <class Run>
bool the_same_at_once(const Run& run) {
  const std::vector<float> expected = run(1);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; i++)
    threads.emplace_back([&, i] {
      for (int turn = 0; turn < 3; turn++) wrong += !same_bits(run(2 + 2 * i), expected);
    });
  for (std::thread& thread : threads) thread.join();
  return !wrong;
}

int threads_at_once() {
  bool same = true;
  for (const bool llama : {false, true})
    for (const Format format : FORMATS) {
      const auto model = random_model(describe(llama, format), 3);
      for (const CacheType cache : {CacheType::f32, CacheType::bf16, CacheType::i8})
        same &= the_same_at_once([&](int threads) { return generate(model, cache, threads); });
      const auto adapter = random_adapter(*model, describe(llama, format));
      same &= the_same_at_once([&](int threads) { return generate(model, CacheType::f32, threads, adapter); });
    }
  for (const Format format : ENCODER_FORMATS) {
    const auto model = random_model(describe_encoder(format), 3);
    same &= the_same_at_once([&](int threads) { return encode_texts(*model, threads); });
  }
  if (same)
    std::printf("%s: threads at once get the logits and vectors of one\n", kernels().name);
  else
    std::fprintf(stderr, "several threads at once change the logits or vectors\n");
  return same ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "threads")) return threads_at_once();
  if (!activates_without_bias()) {
    std::fprintf(stderr, "a product without a bias loses its activation\n");
    return 1;
  }
  std::vector<float> all;
  for (const bool llama : {false, true})
    for (const Format format : FORMATS)
      for (const bool adapted : {false, true})
        for (const CacheType cache : {CacheType::f32, CacheType::bf16, CacheType::i8}) {
          const ModelDescription description = describe(llama, format);
          const auto logits = [&](int threads) {
            const auto model = random_model(description, threads);
            return generate(model, cache, threads, adapted ? random_adapter(*model, description) : nullptr);
          };
          const std::vector<float> one = logits(1);
          if (!same_bits(one, logits(4))) {
            std::fprintf(stderr, "the number of threads changes the logits\n");
            return 1;
          }
          all.insert(all.end(), one.begin(), one.end());
        }
  for (const Format format : ENCODER_FORMATS) {
    const std::vector<float> one = encode_texts(*random_model(describe_encoder(format), 1), 1);
    const auto again = random_model(describe_encoder(format), 4);
    for (const int threads : {3, 6})
      if (!same_bits(one, encode_texts(*again, threads))) {
        std::fprintf(stderr, "the number of threads changes the vectors\n");
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
  std::printf("%s: the largest difference is %.2g\n", kernels().name, largest);
  return largest < 0.1 ? 0 : 1;
}
