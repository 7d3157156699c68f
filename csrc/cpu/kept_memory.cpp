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
constexpr size_t kMost = 64 << 20;       // of all blocks that are kept
constexpr size_t kHugePage = 2 << 20;

// Fresh memory. What is too large to be kept is fresh every time: in huge pages, where the system has
// them on request, its first touch costs a fault every 2 MiB instead of every 4 KiB. What is kept is
// touched once, and better off in small pages, which lie here and there: rows of 2^n bytes that follow
// each other in physical memory share a few sets of the cache, and a product down their columns takes
// 1.4 times as long.
void* fresh(size_t size) {
  void* const data = ::operator new(size, kAlign);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (size <= kMost) return data;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t past = (address + size) / kHugePage * kHugePage;
  if (first < past) (void)madvise(reinterpret_cast<void*>(first), past - first, MADV_HUGEPAGE);
#endif
  return data;
}

class KeptMemory {
 public:
  struct Block {
    void* data;
    size_t size;
  };

  Block* allocate(size_t size) {
    Block* const block = take(size);
    return block != nullptr ? block : new Block{fresh(size), size};
  }

  // Keeps a block, and releases the oldest ones while all together are larger than kMost.
  void give_back(Block* block) {
    const Lock lock(mutex_, std::try_to_lock);
    if (!lock || block->size > kMost) return release(block);
    kept_.push_back(block);
    bytes_ += block->size;
    while (bytes_ > kMost) {
      bytes_ -= kept_.front()->size;
      release(kept_.front());
      kept_.pop_front();
    }
  }

  // Never destroyed: tensors may outlive static objects.
  static KeptMemory& only() {
    static KeptMemory& memory = *new KeptMemory;
    return memory;
  }

 private:
  // Only ever tried: in a process forked while another thread held the lock, it is never free again.
  using Lock = std::unique_lock<std::mutex>;

  // The smallest block that is large enough and at most twice as large, or null.
  Block* take(size_t size) {
    const Lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if ((*it)->size >= size && (*it)->size <= 2 * size &&
          (best == kept_.end() || (*it)->size < (*best)->size))
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
  KeptMemory::Block* const block = KeptMemory::only().allocate(bytes);
  const auto give_back = [](void*, void* given) {
    KeptMemory::only().give_back(static_cast<KeptMemory::Block*>(given));
  };
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block->data, static_cast<int64_t>(sizes.size()), sizes.data(), contiguous_strides(sizes).data(),
      0, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), -1, &made,
      aoti_torch_layout_strided(), nullptr, 0, give_back, block));
  return Tensor(made);
}

}  // namespace pck
