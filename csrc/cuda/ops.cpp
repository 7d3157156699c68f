// The CUDA backend's operators that every compiled backend has.
#include "../operators.h"
#include "backend.h"

namespace pck {
namespace {

template <class Add>
void visit_operators(Add add) {
  Operators<Cuda>::visit_all(add);
}

PCK_OPERATORS(CUDA, visit_operators)

}  // namespace
}  // namespace pck
