// Owners of what decoder.h describes: a model's packed weights, and the state of some sequences generated with it.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "decoder.h"

namespace llmfast {

// Memory straight from the system, zero until written, and not resident before. `dense` asks for huge pages.
class Memory {
 public:
  Memory() = default;
  Memory(size_t bytes, bool dense);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory(Memory&& other) noexcept { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// What a block or the whole of a model can have, each with a weight and perhaps a bias. The first two of the block's
// projections of its input are one or three weights in one matrix, and so are the gate and what it multiplies.
enum class Role {
  token_embedding,
  position_embedding,
  type_embedding,
  embedding_norm,
  attention_norm,
  query_key_value,
  query,
  key,
  value,
  query_norm,
  key_norm,
  attention_out,
  mlp_norm,
  mlp_in,
  gate,
  up,
  mlp_out,
  final_norm,
  head
};

// A model's parameter: what it is for, and in which format it is kept if it is a matrix.
struct Parameter {
  i64 block;  // -1: outside the blocks
  Role role;
  bool bias;
  Format format;
};

struct ModelDescription {
  DecoderShape shape;
  std::vector<float> inverse_frequencies;  // (rotary_dim / 2,)
  std::vector<bool> rotary;                // of each block
  std::vector<i64> windows;                // of each block, 0: none
  std::vector<Parameter> parameters;
};

// Weights, given one at a time, packed for this CPU, and never changed afterwards.
class NativeModel {
 public:
  explicit NativeModel(ModelDescription description);

  // Where a parameter goes: its shape is (N, K), or (N,) with K = 0.
  struct Place {
    PackedMatrix* matrix;  // or
    float* vector;
    RowOrder order;
    i64 N, K;
    Format format;
    bool given;
  };
  Place& place(i64 parameter) { return places_.at(size_t(parameter)); }
  const Place& place(i64 parameter) const { return places_.at(size_t(parameter)); }
  i64 parameters() const { return i64(places_.size()); }
  void give(i64 parameter, const WeightSource& source, const Threads& threads);

  // Throws where a weight is still missing.
  const DecoderModel& ready() const;
  const Kernels& kernels() const { return kernels_; }
  size_t bytes() const { return packed_.bytes() + vectors_.bytes(); }

 private:
  const Kernels& kernels_;
  const ModelDescription description_;
  DecoderModel model_{};
  std::vector<DecoderBlock> blocks_;
  std::vector<Place> places_;  // of description_.parameters
  Memory packed_, vectors_;
};

// The model that Python knows by a number (native_decoder_ops.cpp).
std::shared_ptr<const NativeModel> native_model_of(int64_t number);

// What one thread at a time writes and others copy: all of one step or nothing (a sequence lock). Its words are atomic,
// so that a copy taken while they change is merely thrown away.
class Bulletin {
 public:
  explicit Bulletin(i64 most_segments);
  void write(const StepJob& job, const std::vector<Segment>& segments);
  bool read(StepJob& job, std::vector<Segment>& segments) const;  // false while it is being written

 private:
  std::atomic<uint64_t> serial_{0};  // odd while it is being written
  std::vector<std::atomic<uint64_t>> words_;
};

class NativeAdapter;

// The state of `batch` sequences of up to `capacity` tokens. One caller at a time.
class NativeDecoder {
 public:
  NativeDecoder(std::shared_ptr<const NativeModel> model, i64 batch, i64 capacity, i64 most_rows, CacheType cache_type);
  ~NativeDecoder();
  NativeDecoder(const NativeDecoder&) = delete;

  // Runs the new tokens `ids` of all segments (their rows one after another). Writes logits, (outputs, V) or null, and
  // the index of the largest logit of each output below `vocabulary`.
  void step(const int64_t* ids, std::vector<Segment> segments, bool all_rows, i64 vocabulary, int threads, float* logits,
            int64_t* best);

  // From now on each slot's sequence runs with its adapter, or with none (null). They must be of this decoder's model.
  void adapt(std::vector<std::shared_ptr<const NativeAdapter>> adapters);

  i64 width() const { return model_->ready().vocabulary; }
  i64 most_rows() const { return state_.most_rows; }
  size_t cache_bytes() const { return cache_.bytes(); }

 private:
  static void help(TeamJob* job, int worker);

  std::shared_ptr<const NativeModel> model_;
  // Helpers get the state from the team, and what to do from the bulletin.
  struct State : DecoderState {
    NativeDecoder* owner;
  } state_{};
  Memory cache_, scratch_, narrow_;
  std::vector<std::shared_ptr<const NativeAdapter>> adapters_;
  std::vector<const DecoderAdapter*> of_slots_;
  std::mutex in_use_;
  Bulletin bulletin_;
  std::vector<i64> ends_;  // of each slot: the tokens its last step left in the cache
  uint64_t next_phase_ = 1;
};

}  // namespace llmfast
