// The pybind11 table: the only file of csrc that knows Python. A kernel call takes views and numbers, releases the GIL,
// and writes into memory its caller allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "adaln_lora/params.h"
#include "causal_conv3d/params.h"
#include "common/checks.h"
#include "window_attention/params.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;
using walt::TensorView;

namespace walt {
void bind_cuda(py::module_&);  // cuda_module.cpp
}

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

// None arrives as a null pointer and becomes an undefined view.
TensorView optional(const TensorView* view) { return view == nullptr ? TensorView{} : *view; }

py::dict build_info() {
  py::dict info;
  std::vector<std::string> compiled, runnable;
  for (walt::Isa isa : {walt::Isa::baseline, walt::Isa::avx2, walt::Isa::avx512}) {
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
  for (walt::Isa isa : {walt::Isa::baseline, walt::Isa::avx2, walt::Isa::avx512}) {
    if (name != walt::isa_name(isa)) continue;
    walt::require(walt::isa_compiled(isa), "isa: this level was not compiled");
    walt::require(walt::isa_runs_here(isa), "isa: this processor cannot run this level");
    walt::current_isa() = isa;
    return;
  }
  throw std::invalid_argument("isa " + name + " is not one of baseline, avx2, avx512");
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

walt::WindowAttentionParams attention_params(const TensorView& q, const TensorView& k, const TensorView& v,
                                             const std::array<int64_t, 3>& window, const TensorView* bias_table,
                                             const TensorView* image, const TensorView* q_norm,
                                             const TensorView* k_norm, double norm_eps, const TensorView* context_k,
                                             const TensorView* context_v, const TensorView* context_mask, double scale,
                                             const TensorView& lse, int threads) {
  walt::WindowAttentionParams params;
  params.q = q;
  params.k = k;
  params.v = v;
  params.bias_table = optional(bias_table);
  params.image = optional(image);
  params.q_norm = optional(q_norm);
  params.k_norm = optional(k_norm);
  params.context_k = optional(context_k);
  params.context_v = optional(context_v);
  params.context_mask = optional(context_mask);
  params.lse = lse;
  for (int axis = 0; axis < 3; ++axis) params.window[axis] = window[static_cast<size_t>(axis)];
  params.norm_eps = norm_eps;
  params.scale = scale;
  params.threads = threads;
  return params;
}

walt::ConvOptions conv_options(const std::array<int64_t, 3>& stride, const std::array<int64_t, 3>& dilation,
                               const std::array<int64_t, 4>& padding, const std::string& time_padding,
                               const std::string& space_padding, int64_t groups, int threads) {
  walt::ConvOptions options{stride, dilation, padding, {}, {}, groups, threads};
  for (int64_t i : stride) walt::require(i >= 1, "stride must be at least 1");
  for (int64_t i : dilation) walt::require(i >= 1, "dilation must be at least 1");
  for (int64_t i : padding) walt::require(i >= 0, "padding must be at least 0");
  walt::require(groups >= 1, "groups must be at least 1");
  walt::require(time_padding == "zeros" || time_padding == "first_frame", "time_padding must be zeros or first_frame");
  walt::require(space_padding == "zeros" || space_padding == "replicate" || space_padding == "reflect",
                "space_padding must be zeros, replicate or reflect");
  if (time_padding == "first_frame") options.time_padding = walt::TimePadding::first_frame;
  if (space_padding == "replicate") options.space_padding = walt::SpacePadding::replicate;
  if (space_padding == "reflect") options.space_padding = walt::SpacePadding::reflect;
  return options;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of walt_kernels: addresses, sizes and strides in; numbers out.";
  m.def("build_info", &build_info);
  m.def("set_isa", &set_isa, py::arg("isa"));
  m.def("openmp_library", &openmp_library);

  py::class_<TensorView>(m, "TensorView")
      .def(py::init(&make_view), py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("stride"));

  const py::call_guard<py::gil_scoped_release> no_gil;

  // ---- adaln_lora ---------------------------------------------------------------------------------------------------
  m.def(
      "adaln_forward",
      [](const TensorView& x, const TensorView* branch, const TensorView* gate, const TensorView* shift,
         const TensorView* scale, const TensorView* x_new, const TensorView* h, const TensorView* mean,
         const TensorView* rstd, double eps, int threads) {
        const walt::AdalnForwardParams params{x,
                                              optional(branch),
                                              optional(gate),
                                              optional(shift),
                                              optional(scale),
                                              optional(x_new),
                                              optional(h),
                                              optional(mean),
                                              optional(rstd),
                                              eps,
                                              threads};
        WALT_KERNEL(adaln_lora::adaln_forward)(params);
      },
      py::arg("x"), py::arg("branch"), py::arg("gate"), py::arg("shift"), py::arg("scale"), py::arg("x_new"),
      py::arg("h"), py::arg("mean"), py::arg("rstd"), py::kw_only(), py::arg("eps"), py::arg("threads"), no_gil);
  m.def(
      "adaln_backward",
      [](const TensorView* grad_x_new, const TensorView* grad_h, const TensorView* x, const TensorView* branch,
         const TensorView* gate, const TensorView* scale, const TensorView* mean, const TensorView* rstd,
         const TensorView* grad_x, const TensorView* grad_branch, const TensorView* grad_gate,
         const TensorView* grad_shift, const TensorView* grad_scale, int threads) {
        const walt::AdalnBackwardParams params{
            optional(grad_x_new), optional(grad_h),     optional(x),          optional(branch), optional(gate),
            optional(scale),      optional(mean),       optional(rstd),       optional(grad_x), optional(grad_branch),
            optional(grad_gate),  optional(grad_shift), optional(grad_scale), threads};
        WALT_KERNEL(adaln_lora::adaln_backward)(params);
      },
      py::arg("grad_x_new"), py::arg("grad_h"), py::arg("x"), py::arg("branch"), py::arg("gate"), py::arg("scale"),
      py::arg("mean"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_branch"), py::arg("grad_gate"),
      py::arg("grad_shift"), py::arg("grad_scale"), py::kw_only(), py::arg("threads"), no_gil);
  m.def(
      "adaln_lora_forward",
      [](const TensorView& cond, const TensorView& base, const TensorView& down, const TensorView& up,
         const TensorView& hidden, const TensorView& out, int threads) {
        const walt::LoraForwardParams params{cond, base, down, up, hidden, out, threads};
        WALT_KERNEL(adaln_lora::lora_forward)(params);
      },
      py::arg("cond"), py::arg("base"), py::arg("down"), py::arg("up"), py::arg("hidden"), py::arg("out"),
      py::kw_only(), py::arg("threads"), no_gil);
  m.def(
      "adaln_lora_backward",
      [](const TensorView& grad, const TensorView& hidden, const TensorView& cond, const TensorView& down,
         const TensorView& up, const TensorView& grad_cond, const TensorView& grad_base, const TensorView& grad_down,
         const TensorView& grad_up, int threads) {
        const walt::LoraBackwardParams params{grad,      hidden,    cond,      down,    up,
                                              grad_cond, grad_base, grad_down, grad_up, threads};
        WALT_KERNEL(adaln_lora::lora_backward)(params);
      },
      py::arg("grad"), py::arg("hidden"), py::arg("cond"), py::arg("down"), py::arg("up"), py::arg("grad_cond"),
      py::arg("grad_base"), py::arg("grad_down"), py::arg("grad_up"), py::kw_only(), py::arg("threads"), no_gil);

  // ---- window_attention -------------------------------------------------------------------------------------------
  m.def(
      "window_attention",
      [](const TensorView& q, const TensorView& k, const TensorView& v, const std::array<int64_t, 3>& window,
         const TensorView* bias_table, const TensorView* image, const TensorView* q_norm, const TensorView* k_norm,
         double norm_eps, const TensorView* context_k, const TensorView* context_v, const TensorView* context_mask,
         double scale, const TensorView& out, const TensorView& lse, int threads) {
        auto params = attention_params(q, k, v, window, bias_table, image, q_norm, k_norm, norm_eps, context_k,
                                       context_v, context_mask, scale, lse, threads);
        params.out = out;
        WALT_KERNEL(window_attention::forward)(params);
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("window"), py::arg("bias_table"),
      py::arg("image"), py::arg("q_norm"), py::arg("k_norm"), py::arg("norm_eps"), py::arg("context_k"),
      py::arg("context_v"), py::arg("context_mask"), py::arg("scale"), py::arg("out"), py::arg("lse"),
      py::arg("threads"), no_gil);

  m.def(
      "window_attention_backward",
      [](const TensorView& q, const TensorView& k, const TensorView& v, const std::array<int64_t, 3>& window,
         const TensorView* bias_table, const TensorView* image, const TensorView* q_norm, const TensorView* k_norm,
         double norm_eps, const TensorView* context_k, const TensorView* context_v, const TensorView* context_mask,
         double scale, const TensorView& lse, const TensorView& grad_out, const TensorView* grad_q,
         const TensorView* grad_k, const TensorView* grad_v, const TensorView* grad_bias_table,
         const TensorView* grad_q_norm, const TensorView* grad_k_norm, const TensorView* grad_context_k,
         const TensorView* grad_context_v, int threads) {
        const walt::WindowAttentionBackwardParams params{
            attention_params(q, k, v, window, bias_table, image, q_norm, k_norm, norm_eps, context_k, context_v,
                             context_mask, scale, lse, threads),
            grad_out,
            optional(grad_q),
            optional(grad_k),
            optional(grad_v),
            optional(grad_bias_table),
            optional(grad_q_norm),
            optional(grad_k_norm),
            optional(grad_context_k),
            optional(grad_context_v)};
        WALT_KERNEL(window_attention::backward)(params);
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("window"), py::arg("bias_table"),
      py::arg("image"), py::arg("q_norm"), py::arg("k_norm"), py::arg("norm_eps"), py::arg("context_k"),
      py::arg("context_v"), py::arg("context_mask"), py::arg("scale"), py::arg("lse"), py::arg("grad_out"),
      py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_bias_table"), py::arg("grad_q_norm"),
      py::arg("grad_k_norm"), py::arg("grad_context_k"), py::arg("grad_context_v"), py::arg("threads"), no_gil);

  py::class_<walt::ConvOptions>(m, "ConvOptions")
      .def(py::init(&conv_options), py::kw_only(), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
           py::arg("time_padding"), py::arg("space_padding"), py::arg("groups"), py::arg("threads"));
  m.def(
      "causal_conv3d",
      [](const TensorView& x, const TensorView& weight, const TensorView* bias, const TensorView* history,
         const TensorView& y, const walt::ConvOptions& options) {
        const walt::ConvForwardParams params{x, weight, optional(bias), optional(history), y, options};
        WALT_KERNEL(causal_conv3d::forward)(params);
      },
      py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("history").none(true), py::arg("y"),
      py::arg("options"), no_gil);
  m.def(
      "causal_conv3d_backward_data",
      [](const TensorView& grad_y, const TensorView& weight, const TensorView& grad_x, const TensorView* grad_history,
         bool has_history, const walt::ConvOptions& options) {
        const walt::ConvBackwardDataParams params{grad_y, weight, grad_x, optional(grad_history), has_history, options};
        WALT_KERNEL(causal_conv3d::backward_data)(params);
      },
      py::arg("grad_y"), py::arg("weight"), py::arg("grad_x"), py::arg("grad_history").none(true),
      py::arg("has_history"), py::arg("options"), no_gil);
  m.def(
      "causal_conv3d_backward_weight",
      [](const TensorView& grad_y, const TensorView& x, const TensorView* history, const TensorView* grad_weight,
         const TensorView* grad_bias, const std::array<int64_t, 3>& kernel, const walt::ConvOptions& options) {
        const walt::ConvBackwardWeightParams params{
            grad_y, x, optional(history), optional(grad_weight), optional(grad_bias), kernel, options};
        WALT_KERNEL(causal_conv3d::backward_weight)(params);
      },
      py::arg("grad_y"), py::arg("x"), py::arg("history").none(true), py::arg("grad_weight").none(true),
      py::arg("grad_bias").none(true), py::arg("kernel"), py::arg("options"), no_gil);

#ifdef WALT_CUDA
  walt::bind_cuda(m);
#endif
}
