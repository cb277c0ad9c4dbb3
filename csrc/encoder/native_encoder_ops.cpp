// The native encoder's operator; models are made and given their weights as the decoder's are (native_decoder_ops.cpp).

#include "../tensors.h"
#include "native_encoder.h"

namespace llmfast {

Tensor native_encode(int64_t model, const Tensor& ids, std::vector<int64_t> lengths, std::string pooling, int64_t threads) {
  const auto m = native_model_of(model);
  check(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && ids.is_contiguous(),
        "ids must be a contiguous one-dimensional int64 tensor on the CPU");
  check(pooling == "mean" || pooling == "first" || pooling == "last", "pooling is '", pooling,
        "', expected 'mean', 'first' or 'last'");
  const Pooling kind = pooling == "mean" ? Pooling::mean : pooling == "first" ? Pooling::first : Pooling::last;
  const Tensor out = allocate({int64_t(lengths.size()), m->ready().width}, ScalarType::Float);
  encode(*m, static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel(), lengths, kind, int(threads),
         writable_float(out));
  return out;
}

}  // namespace llmfast
