// The CUDA backend's operators: one launch on the current stream. Nothing here waits for the device, so
// that a CUDA graph can capture it; memory is PyTorch's own.
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"
#include "stages.h"

namespace pck {
namespace {

struct Cuda {
  static constexpr const char* name = "cuda";
  static constexpr DeviceType device = DeviceType::CUDA;
  using Relaxations = GridRelaxations;

  static Tensor empty_like(const Tensor& x) { return empty<float>(x, x.sizes()); }

  // The workspace goes back to PyTorch's allocator, which hands it out again in stream order.
  template <class Stage>
  static void run(const Tensor& x, const Stage& stage) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    cuda::Launch launch;
    STD_CUDA_CHECK(cuda::plan_launch(x.size(0), x.size(1), cuda::Needs(stage), &launch));
    const Tensor workspace = empty<uint8_t>(x, {launch.workspace_bytes});
    launch.workspace = workspace.mutable_data_ptr();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    launch.stream = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cuda::run(launch, stage));
  }
};

template <class Add>
void visit_operators(Add add) {
  Operators<Cuda>::visit_all(add);
}

PCK_OPERATORS(CUDA, visit_operators)

}  // namespace
}  // namespace pck
