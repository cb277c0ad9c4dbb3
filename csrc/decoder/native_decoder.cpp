#include "native_decoder.h"

#include "native_adapter.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

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

namespace {

// Says where each parameter of a model goes. Walked twice over the same calls: the first time to count the bytes.
class Layout {
 public:
  Arena packed, vectors;

  Layout(const ModelDescription& description, const Kernels& kernels, std::vector<NativeModel::Place>& places,
         uint8_t* packed, uint8_t* vectors)
      : packed{packed}, vectors{vectors}, description_(description), kernels_(kernels), places_(places) {
    places_.assign(description.parameters.size(), NativeModel::Place{});
    for (size_t i = 0; i < description.parameters.size(); i++) {
      const Parameter& p = description.parameters[i];
      if (!index_.emplace(std::make_tuple(p.block, p.role, p.bias), i).second)
        throw std::runtime_error("the model's description has a parameter twice");
    }
  }

  bool has(i64 block, Role role, bool bias = false) const { return index_.count({block, role, bias}) > 0; }

  // A parameter of float32, (N,) or (N, K); null where the model has none.
  float* vector(i64 block, Role role, bool bias, i64 N, i64 K = 0, const RowOrder& order = {}) {
    if (!has(block, role, bias)) return nullptr;
    float* at = vectors.take<float>(i64(round_up_to(size_t(N), size_t(kernels_.panel_columns))) * std::max<i64>(K, 1));
    place(block, role, bias) = {nullptr, at, order, N, K, Format::f32, false};
    return at;
  }

  NormWeights norm(i64 block, Role role, i64 N) {
    need(block, role);
    return {vector(block, role, false, N), vector(block, role, true, N)};
  }

  // Weights of (N, K) each, and their biases if there are any, as one matrix of `rows` rows.
  struct Part {
    Role role;
    i64 N;
    RowOrder order;
  };
  void matrix(i64 block, const std::vector<Part>& parts, i64 rows, i64 K, PackedMatrix* m) {
    const bool biased = std::any_of(parts.begin(), parts.end(), [&](const Part& p) { return has(block, p.role, true); });
    float* bias = biased ? vectors.take<float>(i64(round_up_to(size_t(rows), size_t(kernels_.panel_columns)))) : nullptr;
    const Format first = format_of(block, parts[0].role);
    const bool mixed =
        std::any_of(parts.begin(), parts.end(), [&](const Part& p) { return format_of(block, p.role) != first; });
    *m = PackedMatrix{rows, K, 0, {}, bias, 1};
    for (const Part& p : parts) {
      const Format format = format_of(block, p.role);
      // A gate's rows stand between those that it multiplies; others can be in panels of their own.
      if (mixed && (p.order.kind == RowOrder::Kind::gate || !kernels_.share_rows(first, format)))
        throw std::runtime_error(
            "weights that share a matrix (query, key and value; gate and up) can't be in these formats");
      if (mixed || !m->parts) {
        const i64 N = mixed ? p.N : rows;
        m->part[m->parts++] = {format, p.order.first, N, packed.take<uint8_t>(kernels_.packed_bytes(format, N, K))};
      }
      place(block, p.role, false) = {m, nullptr, p.order, p.N, K, format, false};
      if (has(block, p.role, true)) place(block, p.role, true) = {nullptr, bias, p.order, p.N, 0, Format::f32, false};
    }
  }

  void end() const {
    for (const NativeModel::Place& p : places_)
      if (p.N == 0) throw std::runtime_error("the model's description has a parameter that nothing uses");
  }

 private:
  const ModelDescription& description_;
  const Kernels& kernels_;
  std::vector<NativeModel::Place>& places_;
  std::map<std::tuple<i64, Role, bool>, size_t> index_;

  NativeModel::Place& place(i64 block, Role role, bool bias) { return places_[index_.at({block, role, bias})]; }
  Format format_of(i64 block, Role role) const {
    need(block, role);
    return description_.parameters[index_.at({block, role, false})].format;
  }
  void need(i64 block, Role role) const {
    if (!has(block, role))
      throw std::runtime_error("the model's description lacks a parameter of block " + std::to_string(block));
  }
};

void check_shape(const ModelDescription& d) {
  const DecoderShape& s = d.shape;
  constexpr i64 MOST = i64{1} << 28;  // no product of sizes overflows
  for (const i64 size : {s.vocabulary, s.positions, s.width, s.heads, s.key_heads, s.head_dim, s.inner})
    if (size < 1 || size > MOST) throw std::runtime_error("a model's sizes must be positive, and at most 2^28");
  if (s.head_dim > 256) throw std::runtime_error("heads of more than 256 channels are not supported");
  if (s.heads % s.key_heads) throw std::runtime_error("the heads must be a multiple of the key heads");
  if (s.rotary_dim % 2 || s.rotary_dim > s.head_dim || (s.rotary_dim && s.head_dim % 2))
    throw std::runtime_error("channels rotate in pairs, and no more than a head has");
  if (i64(d.inverse_frequencies.size()) != s.rotary_dim / 2)
    throw std::runtime_error("every pair of channels that rotates needs its frequency");
  if (s.blocks < 0 || s.blocks > i64(d.parameters.size()) || i64(d.rotary.size()) != s.blocks ||
      i64(d.windows.size()) != s.blocks)
    throw std::runtime_error("every block needs its parameters, and to know of its rotation and window");
}

}  // namespace

NativeModel::NativeModel(ModelDescription description) : kernels_(llmfast::kernels()), description_(std::move(description)) {
  check_shape(description_);
  const DecoderShape& s = description_.shape;
  static_cast<DecoderShape&>(model_) = s;
  blocks_.resize(size_t(s.blocks));
  model_.block = blocks_.data();
  model_.inverse_frequencies = description_.inverse_frequencies.data();

  for (int pass = 0; pass < 2; pass++) {
    Layout l(description_, kernels_, places_, packed_.data(), vectors_.data());
    const i64 C = s.width, queries = s.query_channels(), keys = s.key_channels();
    for (i64 i = 0; i < s.blocks; i++) {
      DecoderBlock& b = blocks_[size_t(i)];
      const auto heads = [&](i64 first) { return RowOrder{RowOrder::Kind::pairs, first, s.head_dim, s.rotary_dim}; };
      const auto rows = [](RowOrder::Kind kind, i64 first = 0) { return RowOrder{kind, first, 0, 0}; };
      b.rotary = s.rotary_dim && description_.rotary[size_t(i)];
      b.window = description_.windows[size_t(i)];
      b.attention_norm = l.norm(i, Role::attention_norm, C);
      b.query_norm = l.vector(i, Role::query_norm, false, s.head_dim, 0, heads(0));
      b.key_norm = l.vector(i, Role::key_norm, false, s.head_dim, 0, heads(0));
      model_.norms_heads |= l.has(i, Role::query_norm) || l.has(i, Role::key_norm);
      if (l.has(i, Role::query_key_value) && b.rotary) throw std::runtime_error("a fused projection can't be rotated");
      std::vector<Layout::Part> parts{{Role::query_key_value, s.projected_channels(), {}}};
      if (!l.has(i, Role::query_key_value))
        parts = {{Role::query, queries, heads(0)},
                 {Role::key, keys, heads(queries)},
                 {Role::value, keys, rows(RowOrder::Kind::as_given, queries + keys)}};
      l.matrix(i, parts, s.projected_channels(), C, &b.query_key_value);
      l.matrix(i, {{Role::attention_out, C, {}}}, C, queries, &b.attention_out);
      b.mlp_norm = l.norm(i, Role::mlp_norm, C);
      parts = {{Role::mlp_in, s.inner, {}}};
      if (s.gated)
        parts = {{Role::gate, s.inner, rows(RowOrder::Kind::gate)}, {Role::up, s.inner, rows(RowOrder::Kind::up)}};
      l.matrix(i, parts, kernels_.mlp_in_rows(s), C, &b.mlp_in);
      l.matrix(i, {{Role::mlp_out, C, {}}}, C, s.inner, &b.mlp_out);
    }
    model_.position_embedding = l.vector(-1, Role::position_embedding, false, s.positions, C);
    if (l.has(-1, Role::embedding_norm)) {
      model_.token_rows = l.vector(-1, Role::token_embedding, false, s.vocabulary, C);
      model_.type_embedding = l.vector(-1, Role::type_embedding, false, C);
      model_.embedding_norm = l.norm(-1, Role::embedding_norm, C);
    } else {
      model_.final_norm = l.norm(-1, Role::final_norm, C);
      l.matrix(-1, {{Role::token_embedding, s.vocabulary, {}}}, s.vocabulary, C, &model_.token_embedding);
      model_.head = model_.token_embedding;
      if (l.has(-1, Role::head)) l.matrix(-1, {{Role::head, s.vocabulary, {}}}, s.vocabulary, C, &model_.head);
    }
    l.end();
    if (!pass) {
      packed_ = Memory(l.packed.used, true);
      vectors_ = Memory(l.vectors.used, false);
    }
  }
  // Activations are rounded twice where once costs most. That is the head, whose error goes straight into the logits (and
  // which costs nothing where only the last position has any). With a scale for a whole row it is also the two products
  // whose input no norm has evened out; with one for 32 channels the projections of a block's input, where a large channel
  // takes the bits of 31 others. SmolLM2 as Q4_1 has a KL of 0.0030 on WikiText-2 with one term everywhere, 0.0014 so.
  const auto refine = [](PackedMatrix& m, bool (*format)(Format)) { m.terms = format(m.part[0].format) ? 2 : 1; };
  const auto whole_rows = [](Format f) { return f == Format::i8; };
  const auto as_stored = [](Format f) { return f == Format::q8_0 || f == Format::q4_1 || f == Format::q4_k; };
  refine(model_.head, [](Format f) { return f != Format::f32 && f != Format::bf16 && f != Format::i4; });
  for (DecoderBlock& b : blocks_) {
    refine(b.query_key_value, as_stored);
    refine(b.attention_out, whole_rows);
    refine(b.mlp_out, whole_rows);
  }
}

void NativeModel::give(i64 parameter, const WeightSource& source, const Threads& threads) {
  Place& p = place(parameter);
  if (p.matrix) {
    if (!kernels_.packs(p.format, source))
      throw std::runtime_error("a weight is given in another form than the model was made for");
    kernels_.pack_weight(*p.matrix, p.order, p.N, source, threads);
  } else {
    const i64 columns = p.K ? p.K : 1;
    for (i64 n = 0; n < p.N; n++) {
      float* to = p.vector + kernels_.packed_row(p.order, n) * columns;
      for (i64 k = 0; k < columns; k++) {
        const i64 at = n * source.row + k * source.col;
        if (source.format == Format::f32) {
          to[k] = static_cast<const float*>(source.values)[at];
        } else if (source.format == Format::bf16) {
          const uint32_t bits = uint32_t{static_cast<const bfloat16*>(source.values)[at].bits} << 16;
          std::memcpy(&to[k], &bits, 4);
        } else {
          throw std::runtime_error("a norm, a bias or an embedding of positions can't be quantised");
        }
      }
    }
  }
  p.given = true;
}

const DecoderModel& NativeModel::ready() const {
  for (const Place& p : places_)
    if (!p.given) throw std::runtime_error("the model still lacks weights");
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

NativeDecoder::NativeDecoder(std::shared_ptr<const NativeModel> model, i64 batch, i64 capacity, i64 most_rows,
                             CacheType cache_type)
    : model_(std::move(model)), bulletin_(batch), ends_(size_t(std::max<i64>(batch, 0))) {
  const DecoderModel& m = model_->ready();
  const Kernels& k = model_->kernels();
  if (batch < 1 || capacity < 1 || most_rows < 1) throw std::runtime_error("batch, capacity and rows must be positive");
  if (m.token_rows) throw std::runtime_error("the model is an encoder, not a decoder");
  if (capacity > m.positions) throw std::runtime_error("the capacity exceeds the model's context");
  State& s = state_;
  s.owner = this;
  s.help = help;
  s.model = &m;
  s.cache_type = cache_type;
  s.batch = batch;
  s.capacity = capacity;
  s.most_rows = most_rows;
  const i64 D = m.head_dim;
  const i64 row = cache_type == CacheType::f32 ? 4 * D : cache_type == CacheType::bf16 ? 2 * D : D + 4;
  for (int pass = 0; pass < 2; pass++) {
    Arena cache{cache_.data()}, scratch{scratch_.data()};
    s.keys = cache.take<uint8_t>(m.blocks * batch * m.key_heads * capacity * row);
    s.values = cache.take<uint8_t>(m.blocks * batch * m.key_heads * capacity * row);
    s.x = scratch.take<float>(most_rows * m.width);
    s.q = scratch.take<float>(most_rows * m.query_channels());
    s.attended = scratch.take<float>(most_rows * m.query_channels());
    s.inner = scratch.take<float>(most_rows * std::max(m.inner, m.projected_channels()));
    s.rotations = scratch.take<float>(most_rows * 2 * m.rotary_dim);
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

void NativeDecoder::adapt(std::vector<std::shared_ptr<const NativeAdapter>> adapters) {
  std::unique_lock<std::mutex> lock(in_use_, std::try_to_lock);
  if (!lock) throw std::runtime_error("this decoder is in use by another thread");
  if (i64(adapters.size()) != state_.batch) throw std::runtime_error("every sequence needs an adapter, or none");
  std::vector<const DecoderAdapter*> of_slots;
  i64 width = 0;
  for (const auto& adapter : adapters) {
    if (adapter && &adapter->model() != state_.model) throw std::runtime_error("an adapter is for another model");
    of_slots.push_back(adapter ? &adapter->ready() : nullptr);
    if (adapter) width = std::max(width, adapter->ready().most_rank);
  }
  Team::instance().wait_until_left(&state_);  // a helper that is late still computes with those that go
  adapters_ = std::move(adapters);
  of_slots_ = std::move(of_slots);
  narrow_ = Memory(size_t(state_.most_rows * width) * 4, false);
  state_.adapters = width ? of_slots_.data() : nullptr;
  state_.narrow_width = width;
  state_.narrow = reinterpret_cast<float*>(narrow_.data());
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
      throw std::runtime_error("token id " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                               std::to_string(m.vocabulary));
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
