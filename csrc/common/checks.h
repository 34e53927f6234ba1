// Checks at the boundary of csrc. Python validates what users pass; these guard against a caller that hands over
// views which do not fit together, because past this point an error is a wild address.
#pragma once

#include <stdexcept>
#include <string>

#include "common/tensor_view.h"

namespace walt {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::boolean: return "bool";
  }
  return "unknown";
}

// `dims` lists the expected sizes; -1 accepts any.
template <class... Dims>
void require_view(const TensorView& view, const char* name, DType dtype, Dims... dims) {
  const int64_t expected[] = {static_cast<int64_t>(dims)...};
  constexpr int rank = sizeof...(dims);
  std::string problem;
  if (view.rank != rank) {
    problem = "rank " + std::to_string(view.rank) + ", expected " + std::to_string(rank);
  } else if (view.dtype != dtype) {
    problem = std::string("dtype ") + dtype_name(view.dtype) + ", expected " + dtype_name(dtype);
  } else {
    for (int i = 0; i < rank && problem.empty(); ++i) {
      if (expected[i] >= 0 && view.shape[i] != expected[i]) {
        problem = "size " + std::to_string(view.shape[i]) + " in dimension " + std::to_string(i) + ", expected " +
                  std::to_string(expected[i]);
      }
    }
  }
  if (!problem.empty()) throw std::invalid_argument(std::string(name) + " has " + problem);
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::bfloat16: return f(bfloat16{});
    case DType::float16: return f(float16{});
    case DType::boolean: break;
  }
  throw std::invalid_argument(std::string("no kernel for dtype ") + dtype_name(dtype));
}

}  // namespace walt
