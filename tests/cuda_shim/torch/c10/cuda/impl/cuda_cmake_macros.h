// The one header that a CPU build of torch lacks, so that csrc/cuda/ops.cpp can be checked against it.
#pragma once
