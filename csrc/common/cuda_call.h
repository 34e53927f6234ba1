// How a caller tells the CUDA kernels where to run. Needs no CUDA header.
#pragma once

#include <cstdint>

namespace walt {

// A stream (cudaStream_t) of the current device, the number of that device's multiprocessors, and memory that lives
// until the stream has passed the call.
struct CudaCall {
  void* stream = nullptr;
  int processors = 1;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

}  // namespace walt
