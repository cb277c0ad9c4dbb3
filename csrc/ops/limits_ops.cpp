// The limits of the machine for `benchmarks/limits.py`, which takes the time: checks for limits.inl.

#include "../tensors.h"

namespace llmfast {

int64_t limit_read(const Tensor& memory) {
  check(memory.is_cpu() && memory.is_contiguous() && memory.scalar_type() == ScalarType::Byte,
        "memory must be contiguous uint8 on the CPU");
  const i64 bytes = memory.numel();
  check(bytes > 0 && bytes % LIMIT_READ_CHUNK == 0, "memory has ", bytes, " bytes, expected a multiple of ",
        LIMIT_READ_CHUNK);
  return int64_t(kernels().limit_read(pointer(memory), bytes, torch_threads(bytes)));
}

int64_t limit_arithmetic(std::string kind, int64_t tasks, int64_t rounds) {
  check(kind == "fp32" || kind == "bf16" || kind == "int8", "kind is '", kind, "', expected 'fp32', 'bf16' or 'int8'");
  check(tasks > 0 && rounds > 0, "tasks and rounds must be positive, got ", tasks, " and ", rounds);
  const LimitKind known = kind == "fp32" ? LimitKind::f32 : kind == "bf16" ? LimitKind::bf16 : LimitKind::i8;
  return kernels().limit_arithmetic(known, tasks, rounds, torch_threads(tasks * rounds * LIMIT_CHAINS));
}

}  // namespace llmfast
