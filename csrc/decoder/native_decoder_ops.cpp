// The native decoder's operators. Models and decoders are known to Python by a number, which llmfast/inference/decoders/native.py
// keeps and frees: classes of their own are not part of torch's stable ABI.

#include <algorithm>
#include <unordered_map>

#include "native_adapter.h"
#include "native_decoder.h"
#include "sampling.h"
#include "../tensors.h"

namespace llmfast {
namespace {

template <class T>
class Registry {
 public:
  int64_t add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_[++last_] = std::move(object);
    return last_;
  }
  std::shared_ptr<T> get(int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    check(found != objects_.end(), "there is no native object ", number, ": it was freed, or belongs to another process");
    return found->second;
  }
  void remove(int64_t number) {
    std::shared_ptr<T> last;  // destroyed after the lock is released
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    if (found == objects_.end()) return;
    last = std::move(found->second);
    objects_.erase(found);
  }

 private:
  std::mutex mutex_;
  int64_t last_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
};

// Never destroyed: a helper thread may outlive the statics of this library.
Registry<NativeModel>& models() {
  static auto* registry = new Registry<NativeModel>;
  return *registry;
}
Registry<NativeDecoder>& decoders() {
  static auto* registry = new Registry<NativeDecoder>;
  return *registry;
}

Registry<const NativeAdapter>& adapters() {
  static auto* registry = new Registry<const NativeAdapter>;
  return *registry;
}

Format format_of(int64_t code) {
  check(code >= 0 && code <= int64_t(Format::f32_split), "format is ", code, ", expected 0 to ", int64_t(Format::f32_split),
        " (decoder.h)");
  return static_cast<Format>(code);
}

// The roles of parameters, in the order of `enum class Role`.
constexpr const char* ROLES[] = {"token_embedding",
                                 "position_embedding",
                                 "type_embedding",
                                 "embedding_norm",
                                 "attention_norm",
                                 "query_key_value",
                                 "query",
                                 "key",
                                 "value",
                                 "query_norm",
                                 "key_norm",
                                 "attention_out",
                                 "mlp_norm",
                                 "mlp_in",
                                 "gate",
                                 "up",
                                 "mlp_out",
                                 "final_norm",
                                 "head"};

Role role_of(const std::string& name) {
  const auto found = std::find(std::begin(ROLES), std::end(ROLES), name);
  check(found != std::end(ROLES), "a parameter's role is '", name, "', which this decoder does not know");
  return static_cast<Role>(found - std::begin(ROLES));
}

Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu_erf;
  check(name == "silu", "activation is '", name, "', expected 'gelu_tanh', 'gelu' or 'silu'");
  return Activation::silu;
}

// What a weight's parts are, as llmfast/quantization/encodings.py tells its formats apart.
Format source_format(ScalarType values, const MaybeTensor& scale, const MaybeTensor& scale_code) {
  if (values == ScalarType::Float) return Format::f32;
  if (values == ScalarType::BFloat16) return Format::bf16;
  check(values == ScalarType::Char || values == ScalarType::Byte,
        "a weight must be float32, bfloat16, int8 or uint8 (nibbles)");
  check(scale.has_value(), "a quantised weight needs its scale");
  const bool half = scale->scalar_type() == ScalarType::Half;
  if (values == ScalarType::Char) return half ? Format::q8_0 : Format::i8;
  return !half ? Format::i4 : scale_code ? Format::q4_k : Format::q4_1;
}

}  // namespace

int64_t native_model(std::vector<int64_t> sizes, std::vector<double> numbers, std::string norm, std::string activation,
                     bool gated, std::vector<double> inverse_frequencies, std::vector<int64_t> rotary,
                     std::vector<int64_t> windows, std::vector<int64_t> blocks, std::vector<std::string> roles,
                     std::vector<int64_t> biases, std::vector<int64_t> formats) {
  check(sizes.size() == 8, "sizes are (vocabulary, positions, width, blocks, heads, key heads, head dim, inner), got ",
        sizes.size(), " numbers");
  check(numbers.size() == 6,
        "numbers are (norm epsilon, attention scale, embedding multiplier, residual multiplier, logits divisor, rotary "
        "factor), "
        "got ",
        numbers.size());
  check(norm == "layer" || norm == "rms", "norm is '", norm, "', expected 'layer' or 'rms'");
  check(roles.size() == blocks.size() && biases.size() == blocks.size() && formats.size() == blocks.size(),
        "every parameter needs its block, its role, whether it is a bias, and its format");
  ModelDescription d;
  DecoderShape& s = d.shape;
  s = {};
  i64* const size[] = {&s.vocabulary, &s.positions, &s.width, &s.blocks, &s.heads, &s.key_heads, &s.head_dim, &s.inner};
  for (size_t i = 0; i < sizes.size(); i++) *size[i] = sizes[i];
  float* const number[] = {&s.norm_epsilon,        &s.attention_scale, &s.embedding_multiplier,
                           &s.residual_multiplier, &s.logits_divisor,  &s.rotary_factor};
  for (size_t i = 0; i < numbers.size(); i++) *number[i] = float(numbers[i]);
  s.norm = norm == "rms" ? Norm::rms : Norm::layer;
  s.activation = activation_of(activation);
  s.gated = gated;
  s.rotary_dim = 2 * i64(inverse_frequencies.size());
  d.inverse_frequencies.assign(inverse_frequencies.begin(), inverse_frequencies.end());
  d.rotary.assign(rotary.begin(), rotary.end());
  d.windows = std::move(windows);
  for (size_t i = 0; i < blocks.size(); i++)
    d.parameters.push_back({blocks[i], role_of(roles[i]), biases[i] != 0, format_of(formats[i])});
  return models().add(std::make_shared<NativeModel>(std::move(d)));
}

void native_model_give(int64_t model, int64_t parameter, const Tensor& values, const MaybeTensor& scale,
                       const MaybeTensor& minimum, const MaybeTensor& scale_code, const MaybeTensor& minimum_code,
                       int64_t threads) {
  const auto m = models().get(model);
  check(parameter >= 0 && parameter < m->parameters(), "the model has no parameter ", parameter);
  const NativeModel::Place& place = m->place(parameter);
  check(values.is_cpu(), "weights must be on the CPU");
  const i64 groups = (place.K + 31) / 32, blocks = (groups + 7) / 8;
  WeightSource source{};
  source.values = values.const_data_ptr();
  source.format = source_format(values.scalar_type(), scale, scale_code);
  const auto part = [&](const char* name, const MaybeTensor& t, ScalarType type, i64 columns) -> const void* {
    check(t.has_value() == (columns > 0), "a weight ", columns > 0 ? "lacks its " : "of this format has no ", name);
    if (!t) return nullptr;
    check(t->is_cpu() && t->is_contiguous() && t->scalar_type() == type && t->numel() == place.N * columns, "a weight's ",
          name, " has shape ", shape(*t), ", or is not contiguous, of its format's dtype and on the CPU");
    return t->const_data_ptr();
  };
  const Format f = source.format;
  const bool coded = f == Format::q4_k, floats = f == Format::f32 || f == Format::bf16, whole_row = f == Format::i8;
  source.scale = part("scale", scale,
                      whole_row         ? ScalarType::Float
                      : f == Format::i4 ? ScalarType::BFloat16
                                        : ScalarType::Half,
                      floats      ? 0
                      : whole_row ? 1
                      : coded     ? blocks
                                  : groups);
  source.minimum = part("minimum", minimum, ScalarType::Half, coded ? blocks : f == Format::q4_1 ? groups : 0);
  source.scale_code = static_cast<const uint8_t*>(part("scale_code", scale_code, ScalarType::Byte, coded ? groups : 0));
  source.minimum_code =
      static_cast<const uint8_t*>(part("minimum_code", minimum_code, ScalarType::Byte, coded ? groups : 0));
  check(floats || whole_row || values.is_contiguous(), "a weight in groups must be contiguous");
  const i64 columns = values.scalar_type() == ScalarType::Byte ? groups * 16 : place.K;
  const bool fits = place.K == 0 ? values.dim() == 1 && values.size(0) == place.N
                                 : values.dim() == 2 && values.size(0) == place.N && values.size(1) == columns;
  check(fits, "a weight has shape ", shape(values), ", expected (", place.N, place.K ? ", " + std::to_string(columns) : ",",
        ")");
  source.row = values.stride(0);
  source.col = place.K == 0 ? 0 : values.stride(1);
  m->give(parameter, source, team_threads(int(threads)));
}

int64_t native_model_bytes(int64_t model) { return int64_t(models().get(model)->bytes()); }
void native_model_free(int64_t model) { models().remove(model); }
std::shared_ptr<const NativeModel> native_model_of(int64_t number) { return models().get(number); }

int64_t native_decoder(int64_t model, int64_t batch, int64_t capacity, int64_t most_rows, std::string cache_type) {
  const bool f32 = cache_type == "fp32", bf16 = cache_type == "bf16";
  check(f32 || bf16 || cache_type == "int8", "cache_type is '", cache_type, "', expected 'fp32', 'bf16' or 'int8'");
  const CacheType type = f32 ? CacheType::f32 : bf16 ? CacheType::bf16 : CacheType::i8;
  return decoders().add(std::make_shared<NativeDecoder>(models().get(model), batch, capacity, most_rows, type));
}

int64_t native_adapter(int64_t model, std::vector<int64_t> parameters, int64_t rank, double scale, const Tensor& a,
                       const Tensor& b, bool rounded) {
  for (const Tensor* t : {&a, &b})
    check(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->is_contiguous(),
          "an adapter's numbers must be a contiguous one-dimensional float32 tensor on the CPU, got ", shape(*t));
  return adapters().add(std::make_shared<const NativeAdapter>(
      *models().get(model), parameters, rank, float(scale), static_cast<const float*>(a.const_data_ptr()), a.numel(),
      static_cast<const float*>(b.const_data_ptr()), b.numel(), rounded));
}
int64_t native_adapter_bytes(int64_t adapter) { return int64_t(adapters().get(adapter)->bytes()); }
void native_adapter_free(int64_t adapter) { adapters().remove(adapter); }

void native_decoder_adapt(int64_t decoder, std::vector<int64_t> numbers) {
  std::vector<std::shared_ptr<const NativeAdapter>> chosen;
  for (const int64_t number : numbers) chosen.push_back(number ? adapters().get(number) : nullptr);
  decoders().get(decoder)->adapt(std::move(chosen));
}

Tensor native_step(int64_t decoder, const Tensor& ids, std::vector<int64_t> segments, bool all_rows, int64_t vocabulary,
                   int64_t threads, const MaybeTensor& logits) {
  const auto d = decoders().get(decoder);
  check(segments.size() % 3 == 0, "segments are (slot, start, count) each, got ", segments.size(), " numbers");
  check(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && ids.is_contiguous(),
        "ids must be a contiguous one-dimensional int64 tensor on the CPU");
  std::vector<Segment> all;
  i64 rows = 0;
  for (size_t i = 0; i < segments.size(); i += 3) {
    all.push_back({segments[i], segments[i + 1], segments[i + 2], 0});
    check(segments[i + 2] >= 1 && segments[i + 2] <= ids.numel(), "a segment of ", segments[i + 2], " tokens");
    rows += segments[i + 2];
  }
  check(rows == ids.numel(), "the segments have ", rows, " tokens, ids ", ids.numel());
  const i64 outputs = all_rows ? rows : i64(all.size());
  float* out = nullptr;
  if (logits) {
    check(logits->is_cpu() && logits->scalar_type() == ScalarType::Float && logits->is_contiguous() && logits->dim() == 2 &&
              logits->size(0) == outputs && logits->size(1) == d->width(),
          "logits has shape ", shape(*logits), ", expected a contiguous float32 (", outputs, ", ", d->width(), ")");
    out = static_cast<float*>(logits->mutable_data_ptr());
  }
  const Tensor best = allocate({outputs}, ScalarType::Long);
  d->step(static_cast<const int64_t*>(ids.const_data_ptr()), std::move(all), all_rows, vocabulary, int(threads), out,
          static_cast<int64_t*>(best.mutable_data_ptr()));
  return best;
}

int64_t native_decoder_bytes(int64_t decoder) { return int64_t(decoders().get(decoder)->cache_bytes()); }
void native_decoder_free(int64_t decoder) { decoders().remove(decoder); }

Tensor sample(const Tensor& logits, int64_t vocabulary, double temperature, int64_t top_k, double top_p, double min_p,
              const MaybeTensor& uniform, const MaybeTensor& masks) {
  check(logits.is_cpu() && logits.scalar_type() == ScalarType::Float && logits.dim() == 2 && logits.is_contiguous(),
        "logits must be a contiguous float32 (B, V) on the CPU, got ", shape(logits));
  const i64 rows = logits.size(0), V = logits.size(1), words = (vocabulary + 31) / 32;
  check(vocabulary >= 1 && vocabulary <= V, "vocabulary is ", vocabulary, ", expected 1 to ", V);
  check(temperature >= 0, "temperature is ", temperature, ", expected a number of at least 0");
  check(uniform.has_value() == (temperature > 0), "numbers to draw with are for a temperature above 0, and needed there");
  if (uniform)
    check(uniform->is_cpu() && uniform->scalar_type() == ScalarType::Double && uniform->dim() == 1 &&
              uniform->size(0) == rows && uniform->is_contiguous(),
          "uniform has shape ", shape(*uniform), ", expected a float64 (", rows, ",) on the CPU");
  if (masks)
    check(masks->is_cpu() && masks->scalar_type() == ScalarType::Int && masks->dim() == 2 && masks->size(0) == rows &&
              masks->size(1) >= words && masks->is_contiguous(),
          "masks has shape ", shape(*masks), ", expected an int32 (", rows, ", at least ", words, ") on the CPU");
  const Tensor tokens = allocate({rows}, ScalarType::Long);
  for (i64 r = 0; r < rows; r++)
    static_cast<int64_t*>(tokens.mutable_data_ptr())[r] =
        sample({static_cast<const float*>(logits.const_data_ptr()) + r * V, vocabulary, temperature, top_k, top_p, min_p,
                uniform ? static_cast<const double*>(uniform->const_data_ptr())[r] : 0,
                masks ? static_cast<const int32_t*>(masks->const_data_ptr()) + r * masks->size(1) : nullptr});
  return tokens;
}

}  // namespace llmfast
