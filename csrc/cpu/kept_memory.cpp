#include "kept_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <iterator>
#include <list>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pck {
namespace {

constexpr size_t kSmallest = 128 << 10;  // smaller blocks are kept by the C library's own allocator
constexpr size_t kMost = 64 << 20;       // of all blocks that are kept
constexpr size_t kHugePage = 2 << 20;

// Fresh memory. What is too large to be kept is fresh every time: in huge pages, where the system has
// them on request, its first touch costs a fault every 2 MiB instead of every 4 KiB.
void* fresh(size_t size) {
  void* const data = c10::GetCPUAllocator()->raw_allocate(size);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t past = (address + size) / kHugePage * kHugePage;
  if (first < past) (void)madvise(reinterpret_cast<void*>(first), past - first, MADV_HUGEPAGE);
#endif
  return data;
}

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    Block* block = take(size);
    if (block == nullptr) block = new Block{fresh(size), size};
    return {block->data, block, &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* target, const void* source, size_t size) const override {
    default_copy_data(target, source, size);
  }

  // Never destroyed: tensors may outlive static objects.
  static KeptMemory& only() {
    static KeptMemory& memory = *new KeptMemory;
    return memory;
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };
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

  // Keeps a block, and releases the oldest ones while all together are larger than kMost.
  static void give_back(void* context) {
    auto* const block = static_cast<Block*>(context);
    KeptMemory& memory = only();
    const Lock lock(memory.mutex_, std::try_to_lock);
    if (!lock || block->size > kMost) return release(block);
    memory.kept_.push_back(block);
    memory.bytes_ += block->size;
    while (memory.bytes_ > kMost) {
      memory.bytes_ -= memory.kept_.front()->size;
      release(memory.kept_.front());
      memory.kept_.pop_front();
    }
  }

  static void release(Block* block) {
    c10::GetCPUAllocator()->raw_deallocate(block->data);
    delete block;
  }

  std::mutex mutex_;
  std::list<Block*> kept_;  // the oldest first
  size_t bytes_ = 0;
};

}  // namespace

at::Tensor empty_rows(int64_t rows, int64_t columns) {
  const auto size = static_cast<size_t>(rows * columns) * sizeof(float);
  c10::Allocator* const allocator =
      size < kSmallest ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&KeptMemory::only());
  return at::detail::empty_generic(
      {rows, columns}, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), at::kFloat, std::nullopt);
}

}  // namespace pck
