// Scratch memory: 64-byte aligned blocks, kept by each thread for its next call.
//
// A thread keeps a few blocks of at most 16 MiB each; larger ones go straight back to the system.

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace llmfast {
namespace {

constexpr size_t kHeader = 64;  // holds the block's size, and keeps what follows aligned
constexpr size_t kKeepAtMost = size_t{16} << 20;
constexpr int kSlots = 8;

struct Cache {
  void* blocks[kSlots] = {};
  ~Cache() {
    for (void* block : blocks) std::free(block);
  }
};
thread_local Cache cache;

size_t& size_of(void* block) { return *static_cast<size_t*>(block); }

}  // namespace

void* scratch_take(size_t bytes) {
  void** best = nullptr;  // the smallest kept block that is large enough
  for (void*& block : cache.blocks)
    if (block && size_of(block) >= bytes && (!best || size_of(block) < size_of(*best))) best = &block;
  void* block = nullptr;
  if (best) {
    block = *best;
    *best = nullptr;
  } else {
    bytes = (bytes + 4095) / 4096 * 4096;
    if (posix_memalign(&block, kHeader, bytes + kHeader) != 0) throw std::bad_alloc();
    size_of(block) = bytes;
  }
  return static_cast<char*>(block) + kHeader;
}

void scratch_give(void* memory) {
  void* block = static_cast<char*>(memory) - kHeader;
  if (size_of(block) <= kKeepAtMost) {
    void** smallest = &cache.blocks[0];
    for (void*& slot : cache.blocks) {
      if (!slot) {
        slot = block;
        return;
      }
      if (size_of(slot) < size_of(*smallest)) smallest = &slot;
    }
    if (size_of(*smallest) < size_of(block)) {
      void* old = *smallest;
      *smallest = block;
      block = old;
    }
  }
  std::free(block);
}

}  // namespace llmfast
