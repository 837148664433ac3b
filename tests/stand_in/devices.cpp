// Devices, contexts and errors.
#include <dlfcn.h>

#include "world.h"

size_t setting(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}

const int DEVICES = int(setting("STAND_IN_DEVICES", 1));
const size_t CAPACITY = setting("STAND_IN_MIB", 8192) << 20;
std::atomic<bool> started{false}, forked{false};
thread_local int current = 0;
thread_local bool context = false;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local cudaError_t last_error = cudaSuccess;

World& world() {
  static World* made = new World;  // never freed: threads of streams outlive main
  return *made;
}

cudaError_t fail(cudaError_t error, const char* where) {
  static const bool loud = setting("STAND_IN_LOG", 0);
  if (loud && error != cudaErrorNotReady) fprintf(stderr, "[stand-in] %s: %s\n", where, cudaGetErrorName(error));
  return last_error = error;
}

#define ERRORS(X)                                                                                    \
  X(cudaSuccess, "no error")                                                                         \
  X(cudaErrorInvalidValue, "invalid argument")                                                       \
  X(cudaErrorMemoryAllocation, "out of memory")                                                      \
  X(cudaErrorInitializationError, "initialization error")                                            \
  X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                         \
  X(cudaErrorInvalidDevice, "invalid device ordinal")                                                \
  X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                       \
  X(cudaErrorIllegalState, "the operation cannot be performed in the present state")                 \
  X(cudaErrorSymbolNotFound, "named symbol not found")                                               \
  X(cudaErrorNotReady, "device not ready")                                                           \
  X(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped") \
  X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region")   \
  X(cudaErrorNotSupported, "operation not supported")                                                \
  X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")           \
  X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")    \
  X(cudaErrorStreamCaptureUnmatched, "operation failed because this capture began on another stream") \
  X(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work")                            \
  X(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream")      \
  X(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream") \
  X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream") \
  X(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread")

extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
#define NAME(e, text) if (error == e) return #e;
  ERRORS(NAME)
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
#define TEXT(e, text) if (error == e) return text;
  ERRORS(TEXT)
  return "unrecognized error code";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* n) {
  // The runtime remembers the number: a forked child is told it as if nothing were lost, and sees it at its next call.
  static std::atomic<int> counted{0};
  if ((*n = counted)) return cudaSuccess;
  if (forked) FAIL(cudaErrorInitializationError);
  const char* seen = getenv("CUDA_VISIBLE_DEVICES");
  if (!DEVICES || (seen && (!*seen || !strcmp(seen, "-1")))) FAIL(cudaErrorNoDevice);
  return *n = counted = DEVICES, cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  ASK
  return *d = current, cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
  ASK
  if (d < 0 || d >= DEVICES) FAIL(cudaErrorInvalidDevice);
  current = d, context = true;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  ASK
  if (d < 0 || d >= DEVICES) FAIL(cudaErrorInvalidDevice);
  *p = {};
  strcpy(p->name, "stand-in, no GPU");
  p->uuid.bytes[0] = char(d + 1), p->pciBusID = d + 1;
  p->totalGlobalMem = CAPACITY;
  p->major = 9, p->minor = 0, p->multiProcessorCount = 4, p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->textureAlignment = 512, p->l2CacheSize = 50 << 20;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->streamPrioritiesSupported = 1;
  p->asyncEngineCount = 3, p->memoryBusWidth = 5120;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int d) {
  static const std::map<int, int> VALUES = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrMultiProcessorCount, 4},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrMemoryPoolsSupported, 1},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
  };
  ASK
  if (d < 0 || d >= DEVICES) FAIL(cudaErrorInvalidDevice);
  auto it = VALUES.find(what);
  return *value = it == VALUES.end() ? 0 : it->second, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int n, int d) { return snprintf(text, n, "0000:%02X:00.0", d + 1), cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { return *can = a != b, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceDisablePeerAccess(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- The driver; a context is the number of its device

static CUcontext context_of(int d) { return CUcontext(uintptr_t(d) + 1); }

CUresult cuInit(unsigned) { return DEVICES ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char** text) { return *text = cudaGetErrorName(cudaError_t(error)), CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = cudaGetErrorString(cudaError_t(error)), CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = context ? context_of(current) : nullptr, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) {
  context = c;
  if (c) current = int(uintptr_t(c)) - 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* d) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  return *d = current, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* d, int n) { return *d = n, n < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }
CUresult cuDeviceGetCount(int* n) { return *n = DEVICES, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { return *flags = 0, *active = started, CUDA_SUCCESS; }
CUresult cuStreamGetCtx(CUstream handle, CUcontext* c) {
  Lock lock(world().m);
  Stream* s = find(handle);
  if (!s) return CUDA_ERROR_INVALID_HANDLE;
  return *c = context_of(s->device), CUDA_SUCCESS;
}

static void* function(const char* name) {
  static void* self = dlopen("libcudart.so.13", RTLD_NOLOAD | RTLD_NOW);
  return dlsym(self, name);
}
CUresult cuGetProcAddress_v2(const char* name, void** f, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
  *f = function(name);
  if (found) *found = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *f = function(name);
  if (found) *found = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (!*f) FAIL(cudaErrorSymbolNotFound);
  return cudaSuccess;
}

}  // extern "C"
