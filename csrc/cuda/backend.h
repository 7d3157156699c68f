// How the CUDA backend runs a stage: launched on the current stream. Nothing here waits for the device,
// so that a CUDA graph can capture it; memory is PyTorch's own.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../formulas.h"
#include "../tensors.h"
#include "stages.h"

namespace pck {

struct Cuda {
  static constexpr const char* name = "cuda";
  static constexpr DeviceType device = DeviceType::CUDA;
  using Relaxations = GridRelaxations;
  using Steps = GridRelaxations;

  static Tensor empty_rows(const Tensor& like, Sizes sizes) { return empty<float>(like, sizes); }

  // Over the rows of x.
  template <class Stage>
  static void run(const Tensor& x, const Stage& stage) {
    run(x, x.size(0), x.size(1), stage);
  }

  template <class Stage>
  static void run_rows(const Tensor& x, const RowSizes& sizes, const Stage& stage) {
    run(x, sizes.rows, sizes.most, stage);
  }

  // Over so many rows of so many values, on the device of x. The workspace goes back to PyTorch's
  // allocator, which hands it out again in stream order.
  template <class Stage>
  static void run(const Tensor& x, int64_t rows, int64_t count, const Stage& stage) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    cuda::Launch launch;
    STD_CUDA_CHECK(cuda::plan_launch(rows, count, cuda::Needs(stage), &launch));
    const Tensor workspace = empty<uint8_t>(x, {launch.workspace_bytes});
    launch.workspace = workspace.mutable_data_ptr();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    launch.stream = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cuda::run(launch, stage));
  }
};

}  // namespace pck
