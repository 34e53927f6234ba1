// A libcuda.so.1 that has one GPU, compiles and runs nothing, and keeps what it was asked to launch. Built and loaded
// by tests/recorded_launches.py, so that Triton's launcher and ours can be compared without a GPU.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *function;
  int count;
  size_t bytes[512];
  unsigned char memory[512][128];
} Record;

enum { RECORDS = 256, FUNCTIONS = 256 };
static Record records[RECORDS];
static int recorded = 0, failure = 0;
static size_t sizes[FUNCTIONS][512];
static int counts[FUNCTIONS], functions = 0;
static int context_is_current = 1;

// For the test.
int launches(void) { return recorded; }
const Record *record(int i) { return &records[i]; }
size_t record_bytes(void) { return sizeof(Record); }
void start(int result_of_launches) { recorded = 0, failure = result_of_launches; }
void set_context(int on) { context_is_current = on; }
void declare(uint64_t function, int count, const size_t *bytes) {
  memcpy(sizes[function], bytes, count * sizeof(size_t));
  counts[function] = count;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuDeviceGet(int *device, int i) { return *device = i, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 232448, 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
Result cuCtxGetCurrent(void **context) { return *context = context_is_current ? (void *)1 : NULL, 0; }
Result cuCtxSetCurrent(void *context) { return context_is_current = 1, 0; }
Result cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = (void *)(uintptr_t)++functions, functions < FUNCTIONS ? 0 : 2;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = 1024, 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { return *count = 1, 0; }
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { return *(uint64_t *)data = pointer, 0; }
Result cuGetErrorString(Result result, const char **text) { return *text = "recorded as failed", 0; }
Result cuFuncGetParamInfo(void *function, size_t i, size_t *offset, size_t *bytes) {
  if ((int)i >= counts[(uintptr_t)function]) return 1;
  return *offset = 0, *bytes = sizes[(uintptr_t)function][i], 0;
}

static Result launch(const unsigned *grid, const unsigned *block, unsigned shared, void *stream, void *function,
                     void **parameters) {
  if (failure) return failure;
  if (recorded == RECORDS) return 2;
  Record *record = &records[recorded++];
  memcpy(record->grid, grid, sizeof record->grid);
  memcpy(record->block, block, sizeof record->block);
  record->shared = shared, record->stream = stream, record->function = function;
  record->count = counts[(uintptr_t)function];
  for (int i = 0; i < record->count; ++i) {
    record->bytes[i] = sizes[(uintptr_t)function][i];
    memcpy(record->memory[i], parameters[i], record->bytes[i]);
  }
  return 0;
}

Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  const unsigned *numbers = config;  // of a CUlaunchConfig: grid, block, bytes of shared memory, and at 32 its stream
  void *stream;
  memcpy(&stream, (const char *)config + 32, sizeof stream);
  return launch(numbers, numbers + 3, numbers[6], stream, function, parameters);
}

Result cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **parameters, void **extra) {
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return launch(grid, block, shared, stream, function, parameters);
}

static void mix(uint64_t *lane, uint64_t value) { *lane = (*lane ^ value) * 1099511628211u; }

// The map is a digest of all that it was asked for, and the address as it is. The bit that Triton clears for tensors of
// less than 128 KiB is set.
Result cuTensorMapEncodeTiled(void *map, int dtype, uint32_t rank, void *address, const uint64_t *dims,
                              const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                              int interleave, int swizzle, int promotion, int fill) {
  uint64_t lanes[16] = {(uintptr_t)address, dtype | 1u << 21, rank, interleave, swizzle, promotion, fill};
  for (uint32_t i = 0; i < rank; ++i) {
    mix(&lanes[7], dims[i]), mix(&lanes[8], box[i]), mix(&lanes[9], element_strides[i]);
    if (i + 1 < rank) mix(&lanes[10], strides[i]);
  }
  return memcpy(map, lanes, sizeof lanes), 0;
}
Result cuTensorMapEncodeIm2col(void *map) { return 2; }
