/* libcuda.so.1 that does nothing: what Triton asks of NVIDIA's driver succeeds at once.  Counts launches. */
#include <stddef.h>
#include <stdint.h>

typedef int Result;
typedef uint64_t Pointer;

static long launches = 0;
static char context[8]; /* stands for contexts, modules and functions */

long do_nothing_launches(void) { return launches; }

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "no error"; return 0; }
Result cuDeviceGet(int *device, int index) { *device = index; return 0; }

/* An H100's, as far as Triton asks; numbers of CUdevice_attribute. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 75: *value = 9; break;       /* compute capability, major */
  case 76: *value = 0; break;       /* minor */
  case 16: *value = 132; break;     /* multiprocessors */
  case 10: *value = 32; break;      /* threads of a warp */
  case 97: *value = 232448; break;  /* most shared memory of a program that asks for it */
  case 8: *value = 49152; break;    /* and of one that doesn't */
  case 81: *value = 233472; break;  /* shared memory of a multiprocessor */
  default: *value = 65536;          /* clock rates, registers, width of the bus */
  }
  return 0;
}

Result cuCtxGetCurrent(void **current) { *current = context; return 0; }
Result cuCtxSetCurrent(void *current) { return 0; }
Result cuDevicePrimaryCtxRetain(void **retained, int device) { *retained = context; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = context; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = context; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 32; return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuOccupancyMaxActiveClusters(int *number, void *function, void *config) { *number = 1; return 0; }
Result cuTensorMapEncodeTiled() { return 0; }
Result cuTensorMapEncodeIm2col() { return 0; }
Result cuPointerGetAttribute(void *out, int attribute, Pointer pointer) { *(Pointer *)out = pointer; return 0; }

Result cuLaunchKernelEx(void *config, void *function, void **parameters, void **extra) { launches++; return 0; }
Result cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters,
                      void **extra) {
  launches++;
  return 0;
}
