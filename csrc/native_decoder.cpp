#include "native_decoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

namespace llmfast {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up_to(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Hands out aligned pieces of one block, whose size is counted in a first pass over the same calls.
struct Arena {
  uint8_t* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(i64 count) {
    T* at = reinterpret_cast<T*>(base + used);
    used += round_up_to(size_t(count) * sizeof(T), 64);
    return base ? at : nullptr;
  }
};

}  // namespace

Memory::Memory(size_t bytes, bool dense) : bytes_(bytes) {
  if (bytes == 0) return;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(data);
#ifdef MADV_HUGEPAGE
  if (dense && bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

NativeModel::NativeModel(const NativeShape& s, const std::vector<Format>& formats)
    : kernels_(llmfast::kernels()), layers_(size_t(s.layers)) {
  if (s.vocabulary < 1 || s.positions < 1 || s.width < 1 || s.layers < 0 || s.heads < 1 || s.inner < 1 || s.width % s.heads)
    throw std::runtime_error("a model's sizes must be positive, and its width a multiple of its heads");
  if (s.width / s.heads > 256) throw std::runtime_error("heads of more than 256 channels are not supported");
  if (i64(formats.size()) != 4 * s.layers + (s.tied ? 1 : 2))
    throw std::runtime_error("a format is needed for each of the model's matrices");
  model_ = DecoderModel{s.vocabulary, s.positions, s.width, s.layers, s.heads, s.inner, s.activation, s.layer_norm_epsilon,
                        nullptr, {}, {}, {}, layers_.data()};

  const i64 columns = kernels_.panel_columns;
  for (int pass = 0; pass < 2; pass++) {  // the first counts the bytes
    Arena packed{packed_.data()}, vectors{vectors_.data()};
    const auto vector = [&](const std::string& name, i64 n) {
      float* at = vectors.take<float>(i64(round_up_to(size_t(n), size_t(columns))));
      if (pass) places_[name] = Place{nullptr, at, n, 0, false};
      return at;
    };
    const auto matrix = [&](const std::string& name, Format format, i64 N, i64 K, const float* bias, PackedMatrix* m) {
      uint8_t* panels = packed.take<uint8_t>(kernels_.packed_bytes(format, N, K));
      *m = PackedMatrix{format, N, K, panels, bias, 1};
      if (pass) places_[name] = Place{m, nullptr, N, K, false};
    };
    size_t next = 0;
    for (i64 i = 0; i < s.layers; i++) {
      const std::string at = "transformer.h." + std::to_string(i) + ".";
      DecoderLayer& l = layers_[size_t(i)];
      const auto linear = [&](const std::string& name, i64 N, i64 K, PackedMatrix* m) {
        const float* bias = vector(at + name + ".bias", N);
        matrix(at + name + ".weight", formats[next++], N, K, bias, m);
      };
      l.ln_1 = {vector(at + "ln_1.weight", s.width), vector(at + "ln_1.bias", s.width)};
      linear("attn.c_attn", 3 * s.width, s.width, &l.qkv);
      linear("attn.c_proj", s.width, s.width, &l.attention_out);
      l.ln_2 = {vector(at + "ln_2.weight", s.width), vector(at + "ln_2.bias", s.width)};
      linear("mlp.c_fc", s.inner, s.width, &l.mlp_in);
      linear("mlp.c_proj", s.width, s.inner, &l.mlp_out);
    }
    model_.ln_f = {vector("transformer.ln_f.weight", s.width), vector("transformer.ln_f.bias", s.width)};
    model_.position_embedding = vector("transformer.wpe.weight", s.positions * s.width);
    if (pass) places_["transformer.wpe.weight"].N = s.positions, places_["transformer.wpe.weight"].K = s.width;
    matrix("transformer.wte.weight", formats[next++], s.vocabulary, s.width, nullptr, &model_.token_embedding);
    if (!s.tied) matrix("lm_head.weight", formats[next++], s.vocabulary, s.width, nullptr, &model_.head);
    if (!pass) {
      packed_ = Memory(packed.used, true);
      vectors_ = Memory(vectors.used, false);
    }
  }
  if (s.tied) model_.head = model_.token_embedding;
  // Rounding to 8 bits costs most in the head, whose error goes straight into the logits (and which costs nothing where
  // only the last position has any), and in the two products whose input no LayerNorm has evened out.
  const auto refine = [](PackedMatrix& m) { m.terms = m.format == Format::i8 ? 2 : 1; };
  refine(model_.head);
  for (DecoderLayer& l : layers_) refine(l.attention_out), refine(l.mlp_out);
}

NativeModel::Place& NativeModel::place(const std::string& name) {
  const auto found = places_.find(name);
  if (found == places_.end()) throw std::runtime_error("the model has no weight " + name);
  return found->second;
}

void NativeModel::give(const std::string& name, const WeightSource& source, const Threads& threads) {
  Place& p = place(name);
  if (p.matrix) {
    const WeightSource::Type type = source.type;
    const Format format = p.matrix->format;
    const bool fits = format == Format::i8   ? type == WeightSource::Type::i8
                      : format == Format::i4 ? type == WeightSource::Type::i4
                                             : type == WeightSource::Type::f32 || type == WeightSource::Type::bf16;
    if (!fits) throw std::runtime_error(name + " is given in another form than the model was made for");
    kernels_.pack_weight(*p.matrix, source, threads);
  } else {
    const i64 columns = p.K ? p.K : 1;
    for (i64 n = 0; n < p.N; n++)
      for (i64 k = 0; k < columns; k++) {
        const i64 at = n * source.row + k * source.col;
        if (source.type == WeightSource::Type::f32) {
          p.vector[n * columns + k] = static_cast<const float*>(source.values)[at];
        } else if (source.type == WeightSource::Type::bf16) {
          const uint32_t bits = uint32_t{static_cast<const bfloat16*>(source.values)[at].bits} << 16;
          std::memcpy(&p.vector[n * columns + k], &bits, 4);
        } else {
          throw std::runtime_error(name + " can't be quantised");
        }
      }
  }
  p.given = true;
}

const DecoderModel& NativeModel::ready() const {
  for (const auto& [name, place] : places_)
    if (!place.given) throw std::runtime_error("the weight " + name + " is missing");
  return model_;
}

namespace {

constexpr size_t kJobWords = sizeof(StepJob) / 8, kSegmentWords = sizeof(Segment) / 8;
static_assert(sizeof(StepJob) % 8 == 0 && sizeof(Segment) % 8 == 0, "both are copied by words");

}  // namespace

Bulletin::Bulletin(i64 most_segments) : words_(kJobWords + size_t(std::max<i64>(most_segments, 0)) * kSegmentWords) {}

void Bulletin::write(const StepJob& job, const std::vector<Segment>& segments) {
  const auto put = [&](size_t at, const void* from, size_t words) {
    for (size_t i = 0; i < words; i++) {
      uint64_t word;
      std::memcpy(&word, static_cast<const uint8_t*>(from) + 8 * i, 8);
      words_[at + i].store(word, std::memory_order_release);
    }
  };
  const uint64_t before = serial_.load(std::memory_order_relaxed);
  serial_.store(before + 1, std::memory_order_relaxed);  // seen by all who see one of the words
  put(0, &job, kJobWords);
  put(kJobWords, segments.data(), segments.size() * kSegmentWords);
  serial_.store(before + 2, std::memory_order_release);
}

bool Bulletin::read(StepJob& job, std::vector<Segment>& segments) const {
  const auto get = [&](size_t at, void* to, size_t words) {
    for (size_t i = 0; i < words; i++) {
      const uint64_t word = words_[at + i].load(std::memory_order_acquire);
      std::memcpy(static_cast<uint8_t*>(to) + 8 * i, &word, 8);
    }
  };
  const uint64_t before = serial_.load(std::memory_order_acquire);
  if (before % 2) return false;
  get(0, &job, kJobWords);
  const i64 most = i64((words_.size() - kJobWords) / kSegmentWords);
  segments.resize(size_t(std::max<i64>(0, std::min(job.segments, most))));  // half a job may say anything
  get(kJobWords, segments.data(), segments.size() * kSegmentWords);
  return serial_.load(std::memory_order_relaxed) == before;
}

NativeDecoder::NativeDecoder(std::shared_ptr<const NativeModel> model, i64 batch, i64 capacity, i64 most_rows, CacheType cache_type)
    : model_(std::move(model)), bulletin_(batch), ends_(size_t(std::max<i64>(batch, 0))) {
  const DecoderModel& m = model_->ready();
  const Kernels& k = model_->kernels();
  if (batch < 1 || capacity < 1 || most_rows < 1) throw std::runtime_error("batch, capacity and rows must be positive");
  if (capacity > m.positions) throw std::runtime_error("the capacity exceeds the model's context");
  State& s = state_;
  s.owner = this;
  s.help = help;
  s.model = &m;
  s.cache_type = cache_type;
  s.batch = batch;
  s.capacity = capacity;
  s.most_rows = most_rows;
  const i64 D = m.width / m.heads;
  const i64 row = cache_type == CacheType::f32 ? 4 * D : cache_type == CacheType::bf16 ? 2 * D : D + 4;
  for (int pass = 0; pass < 2; pass++) {
    Arena cache{cache_.data()}, scratch{scratch_.data()};
    s.keys = cache.take<uint8_t>(m.layers * batch * m.heads * capacity * row);
    s.values = cache.take<uint8_t>(m.layers * batch * m.heads * capacity * row);
    s.x = scratch.take<float>(most_rows * m.width);
    s.q = scratch.take<float>(most_rows * m.width);
    s.attended = scratch.take<float>(most_rows * m.width);
    s.inner = scratch.take<float>(most_rows * std::max(m.inner, 2 * m.width));
    s.partials = scratch.take<float>(k.decoder_partial_floats(s));
    s.prepared = scratch.take<uint8_t>(most_rows * k.decoder_row_bytes(m));
    s.best = scratch.take<BestLogit>(most_rows * ((m.vocabulary + k.panel_columns - 1) / k.panel_columns));
    s.ids = scratch.take<i64>(most_rows);
    s.owners = scratch.take<uint64_t>(k.decoder_chunks(s));
    if (!pass) {
      cache_ = Memory(cache.used, true);
      scratch_ = Memory(scratch.used, false);
    }
  }
}

NativeDecoder::~NativeDecoder() { Team::instance().wait_until_left(&state_); }

void NativeDecoder::help(TeamJob* job, int worker) {
  State& state = *static_cast<State*>(job);
  NativeDecoder& self = *state.owner;
  thread_local std::vector<Segment> segments;
  StepJob todo;
  while (!self.bulletin_.read(todo, segments)) team_yield();
  uint64_t last;
  self.model_->kernels().decoder_step(state, todo, segments.data(), worker, &last);
}

void NativeDecoder::step(const int64_t* ids, std::vector<Segment> segments, bool all_rows, i64 vocabulary, int threads,
                         float* logits, int64_t* best) {
  std::unique_lock<std::mutex> lock(in_use_, std::try_to_lock);
  if (!lock) throw std::runtime_error("this decoder is in use by another thread");
  const DecoderModel& m = *state_.model;
  i64 rows = 0;
  std::vector<bool> taken(size_t(state_.batch));
  for (Segment& s : segments) {
    if (s.slot < 0 || s.slot >= state_.batch || taken[size_t(s.slot)])
      throw std::runtime_error("every segment needs a slot of its own, below the batch size");
    taken[size_t(s.slot)] = true;
    if (s.start < 0 || s.count < 1 || s.count > state_.capacity || s.start > state_.capacity - s.count)
      throw std::runtime_error("a segment does not fit the cache of " + std::to_string(state_.capacity) + " tokens");
    s.row = rows;
    rows += s.count;
  }
  if (segments.empty() || rows > state_.most_rows)
    throw std::runtime_error("a step takes 1 to " + std::to_string(state_.most_rows) + " tokens");
  for (i64 i = 0; i < rows; i++)
    if (ids[i] < 0 || ids[i] >= m.vocabulary)
      throw std::runtime_error("token id " + std::to_string(ids[i]) + " is not in the vocabulary of " + std::to_string(m.vocabulary));
  threads = std::max(1, std::min(threads, MOST_THREADS));

  Team& team = Team::instance();
  bool goes_back = false;
  for (const Segment& s : segments) {
    goes_back |= s.start < ends_[size_t(s.slot)];
    ends_[size_t(s.slot)] = s.start + s.count;
  }
  // A helper may be late: it still reads keys and values of an earlier step, which must not be overwritten before it left.
  if (goes_back) team.wait_until_left(&state_);

  std::copy_n(ids, rows, state_.ids);
  const i64 count = i64(segments.size()), outputs = all_rows ? rows : count;
  const StepJob job{next_phase_, threads, rows, count, outputs, all_rows, std::min(vocabulary, m.vocabulary), logits};
  bulletin_.write(job, segments);

  const bool helped = team.begin(&state_, threads - 1);
  model_->kernels().decoder_step(state_, job, segments.data(), 0, &next_phase_);
  if (helped) team.end();

  if (!best) return;
  const i64 panels = (m.vocabulary + model_->kernels().panel_columns - 1) / model_->kernels().panel_columns;
  for (i64 i = 0; i < outputs; i++) {
    BestLogit top{-INFINITY, 0};
    for (i64 p = 0; p < panels; p++)
      if (const BestLogit& b = state_.best[i * panels + p]; b.value > top.value) top = b;
    best[i] = top.index;
  }
}

}  // namespace llmfast
