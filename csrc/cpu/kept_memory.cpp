#include "kept_memory.h"

#include <cstdint>
#include <list>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Of torch 2.11 and later: null with 2.10, whose stable ABI has no tensors of memory that is not its
// own.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout,
    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace pck {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr size_t kSmallest = 128 << 10;  // smaller blocks are kept by the C library's own allocator
constexpr size_t kLarge = 64 << 20;  // larger ones are in huge pages, and the kernel's for the asking
constexpr size_t kMost = 256 << 20;  // of all others that are kept: what a sweep allows itself
constexpr size_t kMostLarge = size_t{4} << 30;  // and of all large ones
constexpr size_t kHugePage = 2 << 20;

struct Block {
  void* data;
  size_t size;

  bool is_large() const { return size > kLarge; }
};

// Tells the kernel about the huge pages that lie inside a large block.
bool advise(const Block& block, int advice) {
#if defined(__linux__)
  const uintptr_t address = reinterpret_cast<uintptr_t>(block.data);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t past = (address + block.size) / kHugePage * kHugePage;
  return madvise(reinterpret_cast<void*>(first), past - first, advice) == 0;
#else
  return false;
#endif
}

// Large blocks: in huge pages, where the system has them on request, the first touch costs a fault
// every 2 MiB instead of every 4 KiB. Smaller ones are better off in small pages, which lie here and
// there: rows of 2^n bytes that follow each other in physical memory share a few sets of the cache, and
// a product down their columns takes 1.4 times as long.
Block* fresh(size_t size) {
  Block* const block = new Block{::operator new(size, kAlign), size};
#if defined(MADV_HUGEPAGE)
  if (block->is_large()) advise(*block, MADV_HUGEPAGE);
#endif
  return block;
}

// A large block that is kept may be taken by the kernel when it is short of memory; until then its
// pages stay, and using them again costs nothing.
bool offer(const Block& block) {
#if defined(MADV_FREE)
  return advise(block, MADV_FREE);
#else
  return false;
#endif
}

class KeptMemory {
 public:
  Block* allocate(size_t size) {
    Block* const block = take(size);
    return block != nullptr ? block : fresh(size);
  }

  // Keeps a block, and releases the oldest ones while all together are larger than `most`.
  void give_back(Block* block) {
    const Lock lock(mutex_, std::try_to_lock);
    if (!lock || block->size > most_ || (block->is_large() && !offer(*block))) return release(block);
    kept_.push_back(block);
    bytes_ += block->size;
    while (bytes_ > most_) {
      bytes_ -= kept_.front()->size;
      release(kept_.front());
      kept_.pop_front();
    }
  }

  // Large blocks, and the others, are kept apart. Never destroyed: tensors may outlive static objects.
  static KeptMemory& of(size_t size) {
    static KeptMemory &others = *new KeptMemory(kMost), &large = *new KeptMemory(kMostLarge);
    return size > kLarge ? large : others;
  }

 private:
  explicit KeptMemory(size_t most) : most_(most) {}

  // Only ever tried: in a process forked while another thread held the lock, it is never free again.
  using Lock = std::unique_lock<std::mutex>;

  // The smallest block that is large enough and at most twice as large, of equal ones the last that was
  // given back; or null.
  Block* take(size_t size) {
    const Lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if ((*it)->size >= size && (*it)->size <= 2 * size &&
          (best == kept_.end() || (*it)->size <= (*best)->size))
        best = it;
    if (best == kept_.end()) return nullptr;
    Block* const block = *best;
    bytes_ -= block->size;
    kept_.erase(best);
    return block;
  }

  static void release(Block* block) {
    ::operator delete(block->data, kAlign);
    delete block;
  }

  std::mutex mutex_;
  const size_t most_;
  std::list<Block*> kept_;  // the oldest first
  size_t bytes_ = 0;
};

std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return strides;
}

}  // namespace

Tensor empty_rows(const Tensor& like, Sizes sizes) {
  size_t bytes = sizeof(float);
  bool overflow = false;
  for (const int64_t size : sizes) overflow |= __builtin_mul_overflow(bytes, size, &bytes);
  if (overflow || bytes < kSmallest || torch_from_blob == nullptr) return empty<float>(like, sizes);
  Block* const block = KeptMemory::of(bytes).allocate(bytes);
  const auto give_back = [](void*, void* given) {
    Block* const block = static_cast<Block*>(given);
    KeptMemory::of(block->size).give_back(block);
  };
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block->data, static_cast<int64_t>(sizes.size()), sizes.data(), contiguous_strides(sizes).data(),
      0, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), -1, &made,
      aoti_torch_layout_strided(), nullptr, 0, give_back, block));
  return Tensor(made);
}

}  // namespace pck
