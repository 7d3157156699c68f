// The CUDA backend's operators: one launch on the current stream. Nothing here waits for the device, so
// that a CUDA graph can capture it; memory is PyTorch's own.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../operators.h"
#include "stages.h"

namespace pck {
namespace {

struct Cuda {
  static constexpr const char* name = "cuda";
  static constexpr c10::DeviceType device = at::kCUDA;

  static Tensor empty_like(const Tensor& x) { return at::empty_like(x); }

  // The workspace goes back to PyTorch's allocator, which hands it out again in stream order.
  template <class Stage>
  static void run(const Tensor& x, const Stage& stage) {
    const c10::cuda::CUDAGuard guard(x.device());
    cuda::Launch launch;
    C10_CUDA_CHECK(cuda::plan_launch(x.size(0), x.size(1), cuda::Needs(stage), &launch));
    const Tensor workspace = at::empty({launch.workspace_bytes}, x.options().dtype(at::kByte));
    launch.workspace = workspace.data_ptr();
    launch.stream = c10::cuda::getCurrentCUDAStream().stream();
    C10_CUDA_CHECK(cuda::run(launch, stage));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(pc_kernels, library) {
  Operators<Cuda>::define(library);
}

}  // namespace pck
