// Kernels. CuPy's were compiled for the host (cupy_kernels.py): a module is a shared library. torch's are machine code of a
// GPU in its binary, and cannot run (torch_operators.cpp has what runs in their place), but for the one that sleeps.
#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include "world.h"

static std::map<const void*, std::string>& registered() {
  static auto* made = new std::map<const void*, std::string>;
  return *made;
}

struct Call {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Call> calls;  // of a <<<...>>>, between its two halves

extern "C" {

void** __cudaRegisterFatBinary(void*) { return (void**)new int; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  registered()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  calls.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Call& call = calls.back();
  *grid = call.grid, *block = call.block, *shared = call.shared, *(void**)stream = call.stream;
  calls.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) { return *kernel = (cudaKernel_t)f, cudaSuccess; }

cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void** params, size_t, cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  const std::string& name = registered()[f];
  if (name.find("spin_kernel") == std::string::npos) {
    fprintf(stderr, "[stand-in] a kernel that cannot run here: %.300s\n", name.c_str());
    FAIL(cudaErrorNotSupported);
  }
  auto cycles = *(int64_t*)params[0];  // of torch.cuda._sleep: a nanosecond each
  if (cudaError_t error = put(s, [=] { std::this_thread::sleep_for(std::chrono::nanoseconds(cycles)); })) FAIL(error);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** params, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel((const void*)kernel, grid, block, params, shared, s);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  *out = {};
  out->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { return *n = 2, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  return *n = 2, cudaSuccess;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  auto header = (const Elf64_Ehdr*)image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  size_t n = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
  char name[] = "/tmp/stand-in-XXXXXX";
  int file = mkstemp(name);
  for (size_t at = 0; at < n;) {
    ssize_t written = write(file, (const char*)image + at, n - at);
    if (written < 0) return CUDA_ERROR_FILE_NOT_FOUND;
    at += written;
  }
  close(file);
  *module = (CUmodule)dlopen(name, RTLD_NOW | RTLD_LOCAL);
  unlink(name);
  return *module ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  *f = (CUfunction)dlsym(module, (std::string("stand_in_") + name).c_str());
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute what, CUfunction) {
  return *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                        CUstream handle, void** params, void**) {
  if (forked) return CUDA_ERROR_NOT_INITIALIZED;
  start();
  unsigned dims[] = {gx, gy, gz, bx, by, bz};
  std::shared_ptr<Work> run(((Work * (*)(const unsigned*, void**)) f)(dims, params));  // has copies of the parameters
  Lock lock(world().m);
  Stream* s = find(handle);
  if (!s || s->device != current) return CUDA_ERROR_INVALID_HANDLE;
  return CUresult(put(s, [run] { (*run)(); }));
}

}  // extern "C"
