// Before the source of a kernel of CuPy's: what nvcc knows by itself.
#pragma once
#include <time.h>
#include <ucontext.h>

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // blocks run one after the other, in one thread
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __CUDACC_RTC__
#define __CUDA_ARCH__ 900
#include <vector_functions.h>
#include <vector_types.h>
#undef __CUDACC_RTC__

using Work = std::function<void()>;
static thread_local dim3 gridDim(1), blockDim(1);
static thread_local uint3 blockIdx{0, 0, 0}, threadIdx{0, 0, 0};

static inline unsigned long long now() {  // ns
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
using std::signbit;

// ---- Threads of a block that wait for each other

struct Turn {
  ucontext_t at;
  std::unique_ptr<char[]> stack;
  uint3 index;
  bool done = false;
};
static thread_local ucontext_t between;
static thread_local Turn* turn = nullptr;
static thread_local const Work* thread_body;

static inline void __syncthreads() { swapcontext(&turn->at, &between); }
static void whole_thread() {
  (*thread_body)();
  turn->done = true;
  swapcontext(&turn->at, &between);
}
template <class F> static void each_thread(dim3 block, F f) {
  for (unsigned z = 0; z < block.z; z++)
    for (unsigned y = 0; y < block.y; y++)
      for (unsigned x = 0; x < block.x; x++) f(uint3{x, y, z});
}
static inline void run_block(dim3 block, const Work& body) {
#ifdef BARRIERS
  const size_t STACK = 65536;
  std::vector<Turn> turns(block.x * block.y * block.z);
  size_t n = 0;
  thread_body = &body;
  each_thread(block, [&](uint3 index) {
    Turn& t = turns[n++];
    t.index = index;
    t.stack.reset(new char[STACK]);
    getcontext(&t.at);
    t.at.uc_stack.ss_sp = t.stack.get(), t.at.uc_stack.ss_size = STACK;
    makecontext(&t.at, whole_thread, 0);
  });
  for (bool more = true; more;) {
    more = false;
    for (Turn& t : turns) {
      if (t.done) continue;
      turn = &t, threadIdx = t.index;
      swapcontext(&between, &t.at);
      more |= !t.done;
    }
  }
#else
  each_thread(block, [&](uint3 index) {
    threadIdx = index;
    body();
  });
#endif
}
