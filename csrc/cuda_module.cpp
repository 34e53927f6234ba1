// The Python names of the CUDA kernels, in a file of its own: `_C` has them where it was built with nvcc, and tests
// bind the same functions compiled for the CPU (WALT_EMULATE_CUDA).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "adaln_lora/cuda.h"
#include "common/checks.h"

namespace py = pybind11;

namespace walt {
namespace {

// The tensors of a call, in the order of the fields of its parameters; None is null.
using Views = std::vector<const TensorView*>;

template <class Params>
void fill(Params& params, const Views& views, std::initializer_list<TensorView Params::*> fields) {
  require(views.size() == fields.size(), "wrong number of tensors");
  size_t i = 0;
  for (TensorView Params::* field : fields) {
    if (views[i] != nullptr) params.*field = *views[i];
    ++i;
  }
}

AdalnForwardParams forward_params(const Views& views, double eps) {
  using P = AdalnForwardParams;
  P params;
  params.eps = eps;
  fill(params, views, {&P::x, &P::branch, &P::gate, &P::shift, &P::scale, &P::x_new, &P::h, &P::mean, &P::rstd});
  return params;
}

AdalnBackwardParams backward_params(const Views& views) {
  using P = AdalnBackwardParams;
  P params;
  fill(params, views,
       {&P::grad_x_new, &P::grad_h, &P::x, &P::branch, &P::gate, &P::scale, &P::mean, &P::rstd, &P::grad_x,
        &P::grad_branch, &P::grad_gate, &P::grad_shift, &P::grad_scale});
  return params;
}

LoraForwardParams lora_forward_params(const Views& views) {
  using P = LoraForwardParams;
  P params;
  fill(params, views, {&P::cond, &P::base, &P::down, &P::up, &P::hidden, &P::out});
  return params;
}

LoraBackwardParams lora_backward_params(const Views& views) {
  using P = LoraBackwardParams;
  P params;
  fill(params, views,
       {&P::grad, &P::hidden, &P::cond, &P::down, &P::up, &P::grad_cond, &P::grad_base, &P::grad_down, &P::grad_up});
  return params;
}

CudaCall make_call(uintptr_t stream, int processors, uintptr_t workspace, int64_t workspace_bytes) {
  require(processors > 0, "processors must be at least 1");
  return {reinterpret_cast<void*>(stream), processors, reinterpret_cast<void*>(workspace), workspace_bytes};
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<CudaCall>(m, "CudaCall", py::module_local())
      .def(py::init(&make_call), py::kw_only(), py::arg("stream"), py::arg("processors"), py::arg("workspace"),
           py::arg("workspace_bytes"));

  // A call that needs memory beside its tensors has a twin that tells how many bytes.
  m.def(
      "cuda_adaln_forward",
      [](const Views& views, const CudaCall& call, double eps) {
        cuda::adaln_lora::adaln_forward(forward_params(views, eps), call);
      },
      py::arg("views"), py::arg("call"), py::kw_only(), py::arg("eps"), no_gil);
  m.def(
      "cuda_adaln_backward_workspace",
      [](const Views& views, int processors) {
        return cuda::adaln_lora::adaln_backward_workspace(backward_params(views), processors);
      },
      py::arg("views"), py::arg("processors"));
  m.def(
      "cuda_adaln_backward",
      [](const Views& views, const CudaCall& call) { cuda::adaln_lora::adaln_backward(backward_params(views), call); },
      py::arg("views"), py::arg("call"), no_gil);
  m.def(
      "cuda_adaln_lora_forward",
      [](const Views& views, const CudaCall& call) {
        cuda::adaln_lora::lora_forward(lora_forward_params(views), call);
      },
      py::arg("views"), py::arg("call"), no_gil);
  m.def(
      "cuda_adaln_lora_backward_workspace",
      [](const Views& views, int) { return cuda::adaln_lora::lora_backward_workspace(lora_backward_params(views)); },
      py::arg("views"), py::arg("processors"));
  m.def(
      "cuda_adaln_lora_backward",
      [](const Views& views, const CudaCall& call) {
        cuda::adaln_lora::lora_backward(lora_backward_params(views), call);
      },
      py::arg("views"), py::arg("call"), no_gil);
}

}  // namespace walt

#ifdef WALT_EMULATE_CUDA
PYBIND11_MODULE(_emulated, m) { walt::bind_cuda(m); }
#endif
