// What all CUDA kernels take, bound for `_C` where it is built with nvcc, and for the module in which tests run the
// same kernels compiled for the CPU (WALT_EMULATE_CUDA).
#include "common/bind.h"
#include "common/checks.h"
#include "common/cuda_call.h"

namespace walt {
namespace {

const Binding binding([](py::module_& m) {
  using C = CudaCall;
  const auto arguments = Arguments<C>()
                             .required({{"stream", &C::stream}, {"processors", &C::processors}})
                             .required({{"workspace", &C::workspace}, {"workspace_bytes", &C::workspace_bytes}});
  py::class_<C>(m, "CudaCall", py::module_local()).def(py::init([=](const py::kwargs& kwargs) {
    const C call = arguments.read("CudaCall", kwargs);
    require(call.processors > 0, "processors must be at least 1");
    return call;
  }));
});

}  // namespace
}  // namespace walt

#ifdef WALT_EMULATE_CUDA
PYBIND11_MODULE(_emulated, m) {
  for (auto add : walt::Binding::all()) add(m);
}
#endif
