// The kernels of params.h as functions of the module.
#include "adaln_lora/arguments.h"

namespace walt {
namespace {

template <class P, class Kernel>
void define_cpu(py::module_& m, const char* name, Arguments<P> arguments, Kernel kernel) {
  define(m, name, arguments.required({{"threads", &P::threads}}), kernel);
}

const Binding binding([](py::module_& m) {
  define_cpu(m, "adaln_forward", adaln_forward_arguments(), WALT_KERNEL(adaln_lora::adaln_forward));
  define_cpu(m, "adaln_backward", adaln_backward_arguments(), WALT_KERNEL(adaln_lora::adaln_backward));
  define_cpu(m, "adaln_lora_forward", lora_forward_arguments(), WALT_KERNEL(adaln_lora::lora_forward));
  define_cpu(m, "adaln_lora_backward", lora_backward_arguments(), WALT_KERNEL(adaln_lora::lora_backward));
});

}  // namespace
}  // namespace walt
