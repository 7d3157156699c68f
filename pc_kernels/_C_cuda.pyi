"""The CUDA extension: csrc/cuda/bindings.cpp."""

architectures: str
"""What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST."""
cuda_version: int
"""Of the toolkit that compiled them, 13000 for 13.0."""
