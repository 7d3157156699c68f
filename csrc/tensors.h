// Tensors, threads and operators of PyTorch, by its stable ABI: what is compiled against one version of
// torch runs with any from TORCH_TARGET_VERSION (setup.py) on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace pck {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::ostream& operator<<(std::ostream& stream, const Sizes& sizes) {
  stream << '[';
  for (size_t i = 0; i < sizes.size(); ++i) stream << (i == 0 ? "" : ", ") << sizes[i];
  return stream << ']';
}

inline std::ostream& operator<<(std::ostream& stream, const Device& device) {
  const char* const type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device";
  stream << type;
  return device.has_index() ? stream << ':' << device.index() : stream;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());  // Python's ValueError
}

// The parts of the message are computed only if it is needed.
#define PCK_CHECK(holds, ...)               \
  do {                                      \
    if (!(holds)) ::pck::fail(__VA_ARGS__); \
  } while (false)

// A contiguous tensor of these sizes on the device of `like`, not initialised.
template <class T>
Tensor empty(const Tensor& like, Sizes sizes) {
  int32_t dtype = aoti_torch_dtype<T>();
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                                          static_cast<int64_t>(sizes.size()), &dtype,
                                                          nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

// body(first, past) for parts of [0, count) of at least `grain`, on PyTorch's threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  struct Call {
    const Body& body;
    std::atomic_flag failed{};
    std::exception_ptr error{};  // of the first part that threw: no exception passes through C
  } call{body};
  const auto part = [](int64_t first, int64_t past, void* context) {
    Call& call = *static_cast<Call*>(context);
    try {
      call.body(first, past);
    } catch (...) {
      if (!call.failed.test_and_set()) call.error = std::current_exception();
    }
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, part, &call));
  if (call.error) std::rethrow_exception(call.error);
}

// A str that an operator is given, which is released here: torch's own conversion to std::string leaks
// one a call, as of 2.13.
inline std::string taken(StringHandle given) {
  const char* text = nullptr;
  size_t length = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(given, &text));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(given, &length));
  std::string copy(text, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(given));
  return copy;
}

template <class T>
T&& taken(T& given) {
  return static_cast<T&&>(given);
}

template <class T>
using Boxed = std::conditional_t<std::is_same_v<T, const std::string&>, StringHandle, T>;

// An operator's function, called with what torch gives.
template <auto function>
struct Operator;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  static Result call(Boxed<Arguments>... given) { return function(taken(given)...); }
  static void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
    TORCH_BOX (&call)(stack, arguments, results);
  }
};

// Registers the operators that `visit` hands to add(schema, Operator<function>::boxed), for tensors
// on one kind of device.
#define PCK_OPERATORS(device, visit)                                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(pc_kernels, library) {                            \
    visit([&](const std::string& schema, auto) { library.def(schema.c_str()); }); \
  }                                                                               \
  STABLE_TORCH_LIBRARY_IMPL(pc_kernels, device, library) {                        \
    visit([&](const std::string& schema, auto boxed) {                            \
      library.impl(schema.substr(0, schema.find('(')).c_str(), boxed);            \
    });                                                                           \
  }

}  // namespace pck
