// Memory of large results and of a chunk's rows: kept when their tensors die, for the next ones. Fresh
// memory costs a page fault every 4 KiB when it is first touched, a tenth of the loss and a third of
// the rank stage at m = 1024, and allocators give blocks this large back to the system at once.
#pragma once

#include "../tensors.h"

namespace pck {

// A contiguous float32 tensor of these sizes on the CPU, not initialised. A large one cannot be resized
// to more, being of memory that is not PyTorch's.
Tensor empty_rows(const Tensor& like, Sizes sizes);

}  // namespace pck
