#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace pck {

const RowKernels& row_kernels() {
  static const RowKernels& chosen = []() -> const RowKernels& {
    std::vector<const RowKernels*> usable{&kBaselineRows};
#if defined(PCK_X86_CLONES)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) usable.push_back(&kAvx2Rows);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      usable.push_back(&kAvx512Rows);
#endif
    const char* const wanted = std::getenv("PC_KERNELS_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return *usable.back();
    std::string names;
    for (const RowKernels* kernels : usable) {
      if (std::strcmp(kernels->name, wanted) == 0) return *kernels;
      names += std::string(names.empty() ? "" : ", ") + kernels->name;
    }
    throw std::runtime_error("PC_KERNELS_CPU_ISA=" + std::string(wanted) +
                             " is not one that this processor and build have: " + names);
  }();
  return chosen;
}

}  // namespace pck
