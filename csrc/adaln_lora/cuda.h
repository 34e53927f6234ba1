// The adaln kernels on a GPU: the parameters of params.h (`threads` is not used), and where to run. A call checks its
// arguments, launches and returns; it never waits for the device.
#pragma once

#include "adaln_lora/params.h"
#include "common/cuda_call.h"

namespace walt::cuda::adaln_lora {

void adaln_forward(const AdalnForwardParams&, const CudaCall&);
void adaln_backward(const AdalnBackwardParams&, const CudaCall&);
void lora_forward(const LoraForwardParams&, const CudaCall&);
void lora_backward(const LoraBackwardParams&, const CudaCall&);

// Bytes of workspace that the call will need on a GPU of so many multiprocessors.
int64_t adaln_backward_workspace(const AdalnBackwardParams&, int processors);
int64_t lora_backward_workspace(const LoraBackwardParams&, int processors);

}  // namespace walt::cuda::adaln_lora
