// Memory of the devices, page-locked memory, and copies between them.
#include <sys/mman.h>

#include "world.h"

static const bool GUARDED = setting("STAND_IN_GUARD", 1);  // 0: the host may read device memory, and much of it costs less
static int running = 0;
static bool is_open = !GUARDED;

static void set_open(bool open) {
  for (auto& d : world().devices) mprotect(d.memory, CAPACITY, open ? PROT_READ | PROT_WRITE : PROT_NONE);
  is_open = open;
}
void open_memory() {
  running++;
  if (!is_open) set_open(true);
}
void done_with_memory() { running--; }
void shut_memory() {
  if (GUARDED && is_open && !running) set_open(false);
}

void start() {
  static std::once_flag once;
  std::call_once(once, [] {
    for (int d = 0; d < DEVICES; d++) {
      auto want = (void*)(0x600000000000 + uintptr_t(d) * 0x10000000000);
      auto& device = world().devices[d];
      device.memory = (char*)mmap(want, CAPACITY, GUARDED ? PROT_NONE : PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      device.unused[uintptr_t(device.memory)] = CAPACITY;
    }
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    started = true;
  });
}

std::pair<uintptr_t, size_t> Blocks::around(uintptr_t address) const {
  auto it = upper_bound(address);
  if (it == begin()) return {0, 0};
  --it;
  return address < it->first + it->second ? std::pair<uintptr_t, size_t>(*it) : std::pair<uintptr_t, size_t>(0, 0);
}

int device_of(uintptr_t address) {
  for (int d = 0; d < DEVICES; d++) {
    auto first = uintptr_t(world().devices[d].memory);
    if (first && address >= first && address < first + CAPACITY) return d;
  }
  return -1;
}

static bool is_pinned(const void* p) { return world().pinned.around(uintptr_t(p)).second; }

static cudaError_t allocate(void** out, size_t n) {
  auto& d = world().devices[current];
  n = (n + 511) / 512 * 512;
  *out = nullptr;
  if (!n) return cudaSuccess;
  for (auto [at, size] : d.unused)
    if (size >= n) {
      d.unused.erase(at);
      if (size > n) d.unused[at + n] = size - n;
      d.used[at] = n;
      d.bytes += n;
      *out = (void*)at;
      return cudaSuccess;
    }
  return cudaErrorMemoryAllocation;
}

static bool release(uintptr_t p) {
  auto& d = world().devices[device_of(p)];
  auto it = d.used.find(p);
  if (it == d.used.end()) return false;
  size_t n = it->second;
  d.used.erase(it);
  d.bytes -= n;
  madvise((void*)p, n, MADV_DONTNEED);
  auto at = d.unused.emplace(p, n).first, next = std::next(at);
  if (next != d.unused.end() && at->first + at->second == next->first) at->second += next->second, d.unused.erase(next);
  if (at == d.unused.begin()) return true;
  auto before = std::prev(at);
  if (before->first + before->second == at->first) before->second += at->second, d.unused.erase(at);
  return true;
}

// As the documentation of memcpy says ("API synchronization behavior"), at its worst: what may be late is late.
static cudaError_t copy(Lock& lock, void* dst, const void* src, size_t n, cudaMemcpyKind kind, Stream* s, bool sync) {
  if (!n) return cudaSuccess;
  int to = device_of(uintptr_t(dst)), from = device_of(uintptr_t(src));
  bool says_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool says_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault && (says_to != (to >= 0) || says_from != (from >= 0))) return cudaErrorInvalidValue;
  for (auto [p, d] : {std::pair{uintptr_t(dst), to}, std::pair{uintptr_t(src), from}}) {
    if (d < 0) continue;
    auto [at, size] = world().devices[d].used.around(p);
    if (!size || p + n > at + size) return cudaErrorInvalidValue;
  }
  Work run = [=] { memmove(dst, src, n); };
  if (s->capture) {
    if (!sync) return put(s, run);
    s->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  StateP state;
  if (from < 0 && to >= 0 && !is_pinned(src)) {  // staged: the source is free when the call returns
    if (n > 65536 || sync) wait_for(lock, all_of(s));
    auto staged = std::make_shared<std::vector<char>>((const char*)src, (const char*)src + n);
    return put(s, [=] { memcpy(dst, staged->data(), n); });
  }
  if (cudaError_t error = put(s, run, {}, &state)) return error;
  bool ends_on_host = to < 0 && !is_pinned(dst);
  if (!ends_on_host && !(sync && (to < 0 || from < 0))) return cudaSuccess;
  wait_for(lock, {state});
  shut_memory();
  return cudaSuccess;
}

extern "C" {

cudaError_t cudaMalloc(void** p, size_t n) {
  ENTER
  SAFE
  if (cudaError_t error = allocate(p, n)) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  ENTER
  if (!p) return cudaSuccess;
  SAFE
  int d = device_of(uintptr_t(p));
  if (d < 0) FAIL(cudaErrorInvalidValue);
  wait_for_device(lock, d);
  if (!release(uintptr_t(p))) FAIL(cudaErrorInvalidValue);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) {
  ENTER
  if (cudaError_t error = allocate(p, n)) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t s) { return cudaMallocAsync(p, n, s); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  if (device_of(uintptr_t(p)) < 0) FAIL(cudaErrorInvalidValue);
  Work run = [=] {
    Lock lock(world().m);
    release(uintptr_t(p));
  };
  if (cudaError_t error = put(s, run)) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int d) { return *pool = (cudaMemPool_t)(uintptr_t(d) + 1), cudaSuccess; }
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int d) { return cudaDeviceGetDefaultMemPool(pool, d); }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) { return *(uint64_t*)value = 0, cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  ENTER
  *total = CAPACITY, *free = CAPACITY - world().devices[current].bytes;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  ENTER
  SAFE
  size_t whole = (n + 4095) / 4096 * 4096;
  *p = nullptr;
  if (!whole) return cudaSuccess;
  void* made = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) FAIL(cudaErrorMemoryAllocation);
  world().pinned[uintptr_t(made)] = world().pinned_by_us[uintptr_t(made)] = whole;
  *p = made;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  ENTER
  SAFE
  auto it = world().pinned_by_us.find(uintptr_t(p));
  if (it == world().pinned_by_us.end()) FAIL(cudaErrorInvalidValue);
  size_t n = it->second;
  for (int d = 0; d < DEVICES; d++) wait_for_device(lock, d);
  munmap(p, n);
  world().pinned.erase(uintptr_t(p));
  world().pinned_by_us.erase(uintptr_t(p));
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  ENTER
  SAFE
  if (is_pinned(p)) FAIL(cudaErrorHostMemoryAlreadyRegistered);
  world().pinned[uintptr_t(p)] = n;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  ENTER
  SAFE
  if (!world().pinned.erase(uintptr_t(p))) FAIL(cudaErrorHostMemoryNotRegistered);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
  ASK
  *out = {};
  if (!context) FAIL(cudaErrorInvalidValue);  // a thread that has called nothing yet: cupy#3991, triton#3729
  int d = device_of(uintptr_t(p));
  if (d >= 0 && world().devices[d].used.around(uintptr_t(p)).second) {
    out->type = cudaMemoryTypeDevice, out->device = d, out->devicePointer = (void*)p;
  } else if (is_pinned(p)) {
    out->type = cudaMemoryTypeHost, out->device = current, out->devicePointer = out->hostPointer = (void*)p;
  } else {
    out->type = cudaMemoryTypeUnregistered, out->device = cudaInvalidDeviceId, out->hostPointer = (void*)p;
  }
  return cudaSuccess;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr p) {
  Lock lock(world().m);
  int d = device_of(p);
  auto [at, n] = d < 0 ? std::pair<uintptr_t, size_t>(0, 0) : world().devices[d].used.around(p);
  if (!n) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = at;
  if (size) *size = n;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* out, CUpointer_attribute what, CUdeviceptr p) {
  cudaPointerAttributes found;
  cudaPointerGetAttributes(&found, (void*)p);
  if (found.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  if (what != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) return CUDA_ERROR_NOT_SUPPORTED;
  return *(int*)out = found.device, CUDA_SUCCESS;
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t n, cudaMemcpyKind kind, cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  if (cudaError_t error = copy(lock, dst, src, n, kind, s, false)) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* dst, const void* src, size_t n, cudaMemcpyKind kind) {
  ENTER
  SAFE
  if (cudaError_t error = copy(lock, dst, src, n, kind, legacy_of(current), true)) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* dst, int, const void* src, int, size_t n, cudaStream_t s) {
  return cudaMemcpyAsync(dst, src, n, cudaMemcpyDefault, s);
}
cudaError_t cudaMemcpyPeer(void* dst, int, const void* src, int, size_t n) {
  return cudaMemcpy(dst, src, n, cudaMemcpyDefault);
}
cudaError_t cudaMemcpy2DAsync(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t s) {
  for (size_t i = 0; i < height; i++)
    if (cudaError_t error = cudaMemcpyAsync((char*)dst + i * dst_pitch, (const char*)src + i * src_pitch, width, kind, s))
      return error;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  if (n && device_of(uintptr_t(p)) < 0 && !is_pinned(p)) FAIL(cudaErrorInvalidValue);
  if (cudaError_t error = put(s, [=] { memset(p, value, n); })) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t n) { return cudaMemsetAsync(p, value, n, nullptr); }

}  // extern "C"
