// Chooses the instruction set once per process: the best this CPU has, or the one LLMFAST_CPU_ISA names.
//
// To add one: a kernels_<isa>.cpp, its declaration in kernels.h, and a line in `candidates`, best first.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmfast {
namespace {

struct Candidate {
  const char* name;
  bool supported;
  const Kernels& (*table)();
};

#if defined(__x86_64__)
// Linux keeps the tile registers from a process until it asks for them.
bool tile_registers_allowed() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const bool amx = avx512_bf16 && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8");
  const Candidate candidates[] = {{"amx", amx && tile_registers_allowed(), amx_kernels},
                                  {"avx512_bf16", avx512_bf16, avx512_bf16_kernels},
                                  {"avx512", avx512, avx512_kernels},
                                  {"avx2", avx2, avx2_kernels},
                                  {"generic", true, generic_kernels}};
#elif defined(__aarch64__)
  const Candidate candidates[] = {{"neon", true, neon_kernels}, {"generic", true, generic_kernels}};
#else
  const Candidate candidates[] = {{"generic", true, generic_kernels}};
#endif
  const char* wanted = std::getenv("LLMFAST_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  std::string known;
  for (const Candidate& c : candidates) {
    if (!wanted && c.supported) return c.table();
    if (wanted && std::strcmp(wanted, c.name) == 0) {
      if (c.supported) return c.table();
      throw std::runtime_error("LLMFAST_CPU_ISA=" + std::string(wanted) + ": this CPU does not have these instructions");
    }
    known += (known.empty() ? "" : ", ") + std::string(c.name);
  }
  throw std::runtime_error("LLMFAST_CPU_ISA=" + std::string(wanted) + " is not known here; choose one of: " + known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();  // a failed choice throws, and is tried again on the next call
  return chosen;
}

}  // namespace llmfast
