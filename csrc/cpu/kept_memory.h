// Memory of large results and of a chunk's rows: kept when their tensors die, for the next ones. Fresh
// memory costs a page fault every 4 KiB when it is first touched, a tenth of the loss and a third of
// the rank stage at m = 1024, and allocators give blocks this large back to the system at once.
#pragma once

#include <ATen/core/Tensor.h>

namespace pck {

// A float32 matrix, not initialised.
at::Tensor empty_rows(int64_t rows, int64_t columns);

}  // namespace pck
