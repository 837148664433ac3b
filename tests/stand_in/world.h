// What a CUDA device is made of here: streams are threads, events are states, device memory is memory that the host may not
// read. One mutex guards everything.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties  // a name that the headers give to a newer function

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using Clock = std::chrono::steady_clock;
using Work = std::function<void()>;
using Lock = std::unique_lock<std::mutex>;

size_t setting(const char* name, size_t otherwise);
extern const int DEVICES;      // STAND_IN_DEVICES: how many there are
extern const size_t CAPACITY;  // STAND_IN_MIB: the memory of each

// ---- What is queued

struct State {  // of a piece of work
  bool done = false;
  Clock::time_point at;
};
using StateP = std::shared_ptr<State>;

struct Task {
  std::vector<StateP> after;
  Work run;
  StateP state;
};

struct Graph {
  std::vector<Work> nodes;  // in the order of the calls, which is an order that every graph allows
};

struct Stream;
struct Capture {
  Graph* graph = new Graph;
  cudaStreamCaptureMode mode;
  Stream* origin;
  unsigned long long id;
  std::set<Stream*> members, unjoined;
  bool invalid = false;
  std::thread::id thread = std::this_thread::get_id();
};
using CaptureP = std::shared_ptr<Capture>;

struct Stream {
  int device;
  unsigned flags;
  int priority = 0;
  bool legacy = false, closing = false;
  std::deque<Task> queue;
  std::condition_variable given;
  StateP last = std::make_shared<State>();
  CaptureP capture;
  bool blocking() const { return !(flags & cudaStreamNonBlocking) && !legacy; }
};

struct Event {
  int device;
  StateP state;  // none: never recorded, or in a capture
  CaptureP capture;
  Stream* captured_on = nullptr;
};

struct Blocks : std::map<uintptr_t, size_t> {  // sizes by address
  std::pair<uintptr_t, size_t> around(uintptr_t address) const;
};

struct Device {
  char* memory = nullptr;
  Blocks used, unused;
  size_t bytes = 0;
  Stream* legacy = nullptr;
};

struct World {
  std::mutex m;
  std::condition_variable done;  // something is
  std::vector<Device> devices = std::vector<Device>(DEVICES);
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::set<CaptureP> captures;
  Blocks pinned, pinned_by_us;
  unsigned long long captures_made = 0;
};

World& world();
extern std::atomic<bool> started, forked;
extern thread_local int current;  // device
extern thread_local bool context;
extern thread_local cudaStreamCaptureMode thread_mode;

void start();
cudaError_t fail(cudaError_t error, const char* where);
#define FAIL(error) return fail(error, __func__)
#define ASK                                                       \
  if (forked) FAIL(cudaErrorInitializationError);                 \
  if (!DEVICES) FAIL(cudaErrorNoDevice);                          \
  start();                                                        \
  Lock lock(world().m);
#define ENTER  /* most calls give the thread the context of its device, which it does not have before the first of them */ \
  ASK                                                             \
  context = true;

// ---- Streams; all of these with the lock held

Stream* make_stream(int device, unsigned flags, bool legacy);
Stream* legacy_of(int device);
Stream* find(cudaStream_t handle);        // nullptr: there is no such stream
std::vector<StateP> all_of(Stream* s);    // what whoever synchronizes with it waits for
void wait_for(Lock& lock, std::vector<StateP> states);
void wait_for_device(Lock& lock, int device);
cudaError_t put(Stream* s, Work run, std::vector<StateP> after = {}, StateP* state = nullptr);
#define STREAM(name, handle)  \
  Stream* name = find(handle); \
  if (!name) FAIL(cudaErrorInvalidResourceHandle);

// ---- Captures: what the calls that are "potentially unsafe" while somebody captures ask first

cudaError_t unsafe();
cudaError_t legacy_in_capture(Stream* s);
#define SAFE \
  if (cudaError_t error = unsafe()) FAIL(error);

// ---- Memory

int device_of(uintptr_t address);  // -1: no device's
void open_memory();                // what runs on a stream may touch it; counted
void done_with_memory();
void shut_memory();                // when the host has waited: to do so after each piece of work would cost too much
