// The CPU backend's operators.
#include <algorithm>

#include "../operators.h"
#include "backend.h"

namespace pck {
namespace {

Tensor empty_rows_like(const Tensor& like, int64_t rows, int64_t columns) {
  PCK_CHECK(like.scalar_type() == ScalarType::Float, "like must be float32, got ", like.scalar_type());
  PCK_CHECK(rows >= 0 && columns >= 0, "rows and columns must be >= 0, got ", rows, " and ", columns);
  return empty_rows(like, {rows, columns});
}

template <class Add>
void visit_operators(Add add) {
  Operators<Cpu>::visit_all(add);
  add("cpu_empty_rows(Tensor like, int rows, int columns) -> Tensor",
      Operator<&empty_rows_like>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
