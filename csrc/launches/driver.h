// What launching needs of the CUDA driver, opened when it is first asked for: the module imports without a driver, and
// is built without CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace walt::launches {

using Result = int;  // CUresult, 0 is success
using Function = void*;
using Stream = void*;

struct Driver {
  Result (*cuCtxGetCurrent)(void** context) = nullptr;
  Result (*cuFuncGetParamInfo)(Function, size_t index, size_t* offset, size_t* size) = nullptr;  // since CUDA 12.4
  Result (*cuGetErrorString)(Result, const char** text) = nullptr;
  Result (*cuLaunchKernel)(Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream, void** parameters,
                           void** extra) = nullptr;
  Result (*cuTensorMapEncodeTiled)(void* map, int dtype, uint32_t rank, void* address, const uint64_t* sizes,
                                   const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                   int interleave, int swizzle, int l2_promotion, int fill) = nullptr;
  bool complete = false;

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

 private:
  Driver() {
#if defined(__linux__)
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (library == nullptr) return;
    complete = find(library, "cuCtxGetCurrent", cuCtxGetCurrent) &&
               find(library, "cuFuncGetParamInfo", cuFuncGetParamInfo) &&
               find(library, "cuGetErrorString", cuGetErrorString) && find(library, "cuLaunchKernel", cuLaunchKernel) &&
               find(library, "cuTensorMapEncodeTiled", cuTensorMapEncodeTiled);
#endif
  }

#if defined(__linux__)
  template <class F>
  static bool find(void* library, const char* name, F*& function) {
    function = reinterpret_cast<F*>(dlsym(library, name));
    return function != nullptr;
  }
#endif
};

}  // namespace walt::launches
