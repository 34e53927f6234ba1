// The kernels of cuda.h as functions of the module.
#include "adaln_lora/arguments.h"
#include "adaln_lora/cuda.h"

namespace walt {
namespace {

// A call that needs memory beside its tensors has a twin that tells how many bytes.
const Binding binding([](py::module_& m) {
  using namespace cuda::adaln_lora;
  define<CudaCall>(m, "cuda_adaln_forward", adaln_forward_arguments(), adaln_forward);
  define<int>(m, "cuda_adaln_backward_workspace", adaln_backward_arguments(), adaln_backward_workspace);
  define<CudaCall>(m, "cuda_adaln_backward", adaln_backward_arguments(), adaln_backward);
  define<CudaCall>(m, "cuda_adaln_lora_forward", lora_forward_arguments(), lora_forward);
  define<int>(m, "cuda_adaln_lora_backward_workspace", lora_backward_arguments(), lora_backward_workspace);
  define<CudaCall>(m, "cuda_adaln_lora_backward", lora_backward_arguments(), lora_backward);
});

}  // namespace
}  // namespace walt
