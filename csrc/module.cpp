// The native module: what it was built for, views of tensors, and what every op adds in its bind.cpp. A kernel call
// takes views and numbers, releases the GIL, and writes into memory its caller allocated.
#include <string>
#include <vector>

#include "common/bind.h"
#include "common/checks.h"
#include "common/isa.h"
#include "common/scratch_pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace walt {
bool tiles_in_use();  // what kernels at level avx512 ask, see amx.h
}
namespace py = pybind11;
using walt::TensorView;

bool walt::tiles_in_use() { return current_isa().load(std::memory_order_relaxed) == Isa::amx; }

namespace {

walt::DType parse_dtype(const std::string& name) {
  for (walt::DType dtype : {walt::DType::float32, walt::DType::float64, walt::DType::bfloat16, walt::DType::float16,
                            walt::DType::boolean}) {
    if (name == walt::dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("dtype " + name + " is not one of float32, float64, bfloat16, float16, bool");
}

TensorView make_view(uintptr_t address, const std::string& dtype, const std::vector<int64_t>& shape,
                     const std::vector<int64_t>& stride) {
  walt::require(shape.size() == stride.size(), "shape and stride differ in length");
  walt::require(!shape.empty() && shape.size() <= walt::kMaxRank, "a view has 1 to 8 dimensions");
  TensorView view;
  view.data = reinterpret_cast<void*>(address);
  view.dtype = parse_dtype(dtype);
  view.rank = static_cast<int>(shape.size());
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = shape[i];
    view.stride[i] = stride[i];
  }
  return view;
}

py::dict build_info() {
  py::dict info;
  std::vector<std::string> compiled, runnable;
  for (walt::Isa isa : walt::kIsas) {
    if (!walt::isa_compiled(isa)) continue;
    compiled.emplace_back(walt::isa_name(isa));
    if (walt::isa_runs_here(isa)) runnable.emplace_back(walt::isa_name(isa));
  }
  info["isa_compiled"] = compiled;
  info["isa_runnable"] = runnable;
  info["isa"] = walt::isa_name(walt::current_isa());
  info["compiler"] = WALT_COMPILER;
  info["openmp"] = static_cast<bool>(WALT_OPENMP);
  info["cuda_architectures"] = std::vector<std::string>{WALT_CUDA_ARCHITECTURES};
  return info;
}

void set_isa(const std::string& name) {
  for (walt::Isa isa : walt::kIsas) {
    if (name != walt::isa_name(isa)) continue;
    walt::require(walt::isa_compiled(isa), "isa: this level was not compiled");
    walt::require(walt::isa_runs_here(isa), "isa: this processor cannot run this level");
    walt::current_isa() = isa;
    return;
  }
  throw std::invalid_argument("isa " + name + " is not one of baseline, avx2, avx512, amx");
}

// The shared object that OpenMP calls of this module resolve to; torch's own when torch was imported first.
std::string openmp_library() {
#if defined(_OPENMP) && defined(__linux__)
  Dl_info info;
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (symbol != nullptr && dladdr(symbol, &info) != 0) return info.dli_fname;
#endif
  return "";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of walt_kernels: tensors as addresses, sizes and strides; outputs in the caller's memory.";
  m.def("build_info", &build_info);
  m.def("set_isa", &set_isa, py::arg("isa"));
  m.def("openmp_library", &openmp_library);
  m.def("free_scratch", &walt::ScratchPool::clear);

  py::class_<TensorView>(m, "TensorView")
      .def(py::init(&make_view), py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("stride"));

  for (auto add : walt::Binding::all()) add(m);
}
