// As much of CUDA as csrc/cuda uses, on the CPU: a block's threads are real threads, and as many blocks
// as a test wants run side by side. For tests alone; ThreadSanitizer sees the races that a GPU would
// have.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PCK_DYNAMIC_SHARED(name) unsigned char* const name = shim::team->shared

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned count = 1) : x(count) {}
};

inline thread_local dim3 threadIdx{0}, blockIdx{0}, blockDim, gridDim;

namespace shim {

// What a device has; tests make it small.
struct Device {
  int shared_bytes = 232448;
  int processors = 3;
  int threads = 16;
  int side_by_side = 1;  // blocks that run at a time
};
inline Device device;
inline std::atomic<int> launches = 0;
inline std::atomic<int> fence = 0;
inline int latest_limit = 0;  // of dynamic shared memory that a kernel was given

inline constexpr int kFill = 0x7f;  // memory nobody wrote: 3.4e38, or a far index

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void arrive_and_wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// The threads of a block and what they share.
struct Team {
  Team(int threads, size_t bytes)
      : everyone(threads),
        words{std::vector<unsigned>(threads), std::vector<unsigned>(threads)},
        memory(bytes / sizeof(float4) + 1),
        shared(reinterpret_cast<unsigned char*>(memory.data())) {
    for (int first = 0; first < threads; first += PCK_WARP_SIZE)
      warps.push_back(std::make_unique<Barrier>(PCK_WARP_SIZE));
  }
  Barrier everyone;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<unsigned> words[2];  // for shuffles, which take turns between the two
  std::vector<float4> memory;
  unsigned char* const shared;
};
inline thread_local Team* team = nullptr;
inline thread_local int turn = 0;

// Every lane tells its word; returns what the warp's lanes told.
inline const unsigned* tell(unsigned word) {
  turn = 1 - turn;
  const unsigned warp = threadIdx.x / PCK_WARP_SIZE;
  team->words[turn][threadIdx.x] = word;
  team->warps[warp]->arrive_and_wait();
  return team->words[turn].data() + warp * PCK_WARP_SIZE;
}

inline unsigned lane() {
  return threadIdx.x % PCK_WARP_SIZE;
}

}  // namespace shim

inline void __syncthreads() {
  shim::team->everyone.arrive_and_wait();
}

inline unsigned __shfl_xor_sync(unsigned, unsigned word, int mask) {
  return shim::tell(word)[shim::lane() ^ static_cast<unsigned>(mask)];
}

inline unsigned __shfl_up_sync(unsigned, unsigned word, int distance) {
  const unsigned* const told = shim::tell(word);
  const unsigned up = static_cast<unsigned>(distance);
  return shim::lane() < up ? word : told[shim::lane() - up];
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const unsigned* const told = shim::tell(vote);
  unsigned ballot = 0;
  for (int l = 0; l < PCK_WARP_SIZE; ++l) ballot |= told[l] << l;
  return ballot;
}

// Who passes it after another sees what that one has written: fences are in one order for all.
inline void __threadfence() {
  shim::fence.fetch_add(1, std::memory_order_acq_rel);
}

[[noreturn]] inline void __trap() {
  std::abort();
}

inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline int atomicMax(int* address, int value) {
  int before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(address, &before, value, true, __ATOMIC_RELAXED,
                                                        __ATOMIC_RELAXED)) {
  }
  return before;
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected,
                                    unsigned long long value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < before) {
    const unsigned long long seen = atomicCAS(address, before, value);
    if (seen == before) break;
    before = seen;
  }
  return before;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const shim::Device& device = shim::device;
  *value = attribute == cudaDevAttrMultiProcessorCount                ? device.processors
           : attribute == cudaDevAttrMaxThreadsPerBlock               ? device.threads
           : attribute == cudaDevAttrReservedSharedMemoryPerBlock     ? 1024
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? device.shared_bytes + 1024
                                                                      : device.shared_bytes;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  shim::latest_limit = bytes;
  return bytes <= shim::device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = config->blockDim.x;
  if (threads == 0 || threads % PCK_WARP_SIZE != 0 || config->gridDim.x == 0)
    return cudaErrorInvalidValue;
  ++shim::launches;
  const size_t bytes = config->dynamicSmemBytes;
  const auto run = [&](shim::Team& team, unsigned first, unsigned thread) {
    shim::team = &team;
    threadIdx.x = thread;
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    for (unsigned block = first; block < config->gridDim.x; block += shim::device.side_by_side) {
      blockIdx.x = block;
      if (thread == 0) std::memset(team.shared, shim::kFill, bytes);
      __syncthreads();
      kernel(arguments...);
      __syncthreads();
    }
  };
  std::vector<std::unique_ptr<shim::Team>> teams;
  std::vector<std::thread> everyone;
  for (int first = 0; first < shim::device.side_by_side; ++first) {
    teams.push_back(std::make_unique<shim::Team>(static_cast<int>(threads), bytes));
    for (unsigned thread = 0; thread < threads; ++thread)
      everyone.emplace_back(run, std::ref(*teams.back()), first, thread);
  }
  for (std::thread& one : everyone) one.join();
  return cudaSuccess;
}
