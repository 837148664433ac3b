// Streams and events: a thread each, and what it has done.
#include "world.h"

static void work(Stream* s) {
  static const size_t jitter = setting("STAND_IN_JITTER", 0);  // microseconds at most before each piece of work
  World& w = world();
  Lock lock(w.m);
  while (true) {
    s->given.wait(lock, [&] { return !s->queue.empty() || s->closing; });
    if (s->queue.empty()) break;
    Task task = std::move(s->queue.front());
    s->queue.pop_front();
    wait_for(lock, task.after);
    if (task.run) {
      open_memory();
      lock.unlock();
      if (jitter) std::this_thread::sleep_for(std::chrono::microseconds(rand() % jitter));
      task.run();
      task.run = nullptr;
      lock.lock();
      done_with_memory();
    }
    task.state->at = Clock::now();
    task.state->done = true;
    w.done.notify_all();
  }
  lock.unlock();
  delete s;
}

Stream* make_stream(int device, unsigned flags, bool legacy) {
  Stream* s = new Stream;
  s->device = device, s->flags = flags, s->legacy = legacy;
  s->last->done = true;
  world().streams.insert(s);
  std::thread(work, s).detach();
  return s;
}

Stream* legacy_of(int device) {
  Stream*& s = world().devices[device].legacy;
  return s ? s : s = make_stream(device, 0, true);
}

Stream* find(cudaStream_t handle) {
  thread_local std::map<int, Stream*> per_thread;
  switch (uintptr_t(handle)) {
    case 0: case 1: return legacy_of(current);
    case 2: {
      Stream*& s = per_thread[current];
      return s ? s : s = make_stream(current, 0, false);
    }
  }
  Stream* s = (Stream*)handle;
  return world().streams.count(s) ? s : nullptr;
}

void wait_for(Lock& lock, std::vector<StateP> states) {
  world().done.wait(lock, [&] {
    for (auto& s : states)
      if (!s->done) return false;
    return true;
  });
}

void wait_for_device(Lock& lock, int device) {
  std::vector<StateP> all;
  for (Stream* s : world().streams)
    if (s->device == device && !s->capture) all.push_back(s->last);
  wait_for(lock, all);
}

std::vector<StateP> all_of(Stream* s) {
  std::vector<StateP> all{s->last};
  if (s->legacy)
    for (Stream* o : world().streams)
      if (o->device == s->device && o->blocking()) all.push_back(o->last);
  return all;
}

cudaError_t put(Stream* s, Work run, std::vector<StateP> after, StateP* state) {
  if (cudaError_t error = legacy_in_capture(s)) return error;
  if (s->capture) {
    if (s->capture->invalid) return cudaErrorStreamCaptureInvalidated;
    s->capture->graph->nodes.push_back(run);
    if (s != s->capture->origin) s->capture->unjoined.insert(s);
    return cudaSuccess;
  }
  if (s->legacy) {  // behind everything on blocking streams, and they behind it
    for (auto& x : all_of(s)) after.push_back(x);
  } else if (Stream* legacy = world().devices[s->device].legacy; legacy && s->blocking()) {
    after.push_back(legacy->last);
  }
  s->last = std::make_shared<State>();
  if (state) *state = s->last;
  s->queue.push_back({std::move(after), std::move(run), s->last});
  s->given.notify_one();
  return cudaSuccess;
}

static cudaError_t captured(Stream* s) {  // what cannot be asked of a stream that is captured
  if (!s->capture) return cudaSuccess;
  s->capture->invalid = true;
  return cudaErrorStreamCaptureUnsupported;
}

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  ENTER
  SAFE
  Stream* s = make_stream(current, flags, false);
  s->priority = priority;
  *out = (cudaStream_t)s;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  if (uintptr_t(handle) <= 2) FAIL(cudaErrorInvalidResourceHandle);
  world().streams.erase(s);
  s->closing = true;  // its thread does what is queued, and deletes it
  s->given.notify_one();
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  ENTER
  STREAM(s, handle)
  return *priority = s->priority, cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  ENTER
  STREAM(s, handle)
  return *flags = s->flags, cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  if (cudaError_t error = captured(s)) FAIL(error);
  SAFE
  if (cudaError_t error = legacy_in_capture(s)) FAIL(error);
  wait_for(lock, all_of(s));
  shut_memory();
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  if (cudaError_t error = captured(s)) FAIL(error);
  SAFE
  for (auto& x : all_of(s)) if (!x->done) FAIL(cudaErrorNotReady);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ENTER
  SAFE
  wait_for_device(lock, current);
  shut_memory();
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t f, void* data) {
  ENTER
  STREAM(s, handle)
  if (cudaError_t error = put(s, [=] { f(data); })) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t f, void* data, unsigned) {
  ENTER
  STREAM(s, handle)
  if (cudaError_t error = put(s, [=] { f(handle, cudaSuccess, data); })) FAIL(error);
  return cudaSuccess;
}

// ---- Events

#define EVENT(name, handle)          \
  Event* name = (Event*)handle;      \
  if (!world().events.count(name)) FAIL(cudaErrorInvalidResourceHandle);

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  ENTER
  Event* event = new Event;
  event->device = current;
  world().events.insert(event);
  *out = (cudaEvent_t)event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  ENTER
  EVENT(event, handle)
  world().events.erase(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned) {
  ENTER
  EVENT(event, handle)
  STREAM(s, on)
  if (s->device != event->device) FAIL(cudaErrorInvalidResourceHandle);
  if (s->capture) {
    if (s->capture->invalid) FAIL(cudaErrorStreamCaptureInvalidated);
    event->capture = s->capture, event->captured_on = s, event->state = nullptr;
    return cudaSuccess;
  }
  StateP state;
  if (cudaError_t error = put(s, nullptr, {}, &state)) FAIL(error);
  event->state = state, event->capture = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) { return cudaEventRecordWithFlags(event, s, 0); }
cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t handle, unsigned) {
  ENTER
  EVENT(event, handle)
  STREAM(s, waiting)
  if (CaptureP capture = event->capture) {  // the stream joins the capture, or the capture's origin takes a branch back
    if (!world().captures.count(capture)) FAIL(cudaErrorStreamCaptureInvalidated);
    if (s->capture && s->capture != capture) FAIL(cudaErrorStreamCaptureIsolation);
    if (s->legacy) FAIL(cudaErrorStreamCaptureImplicit);
    s->capture = capture;
    capture->members.insert(s);
    capture->unjoined.erase(event->captured_on);
    if (s != capture->origin) capture->unjoined.insert(s);
    return cudaSuccess;
  }
  if (!event->state) return cudaSuccess;
  if (s->capture) {
    s->capture->invalid = true;
    FAIL(cudaErrorStreamCaptureIsolation);
  }
  if (cudaError_t error = put(s, nullptr, {event->state})) FAIL(error);
  return cudaSuccess;
}
static cudaError_t captured(Event* event) {
  if (!event->capture) return cudaSuccess;
  event->capture->invalid = true;
  return cudaErrorCapturedEvent;
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  ENTER
  EVENT(event, handle)
  if (cudaError_t error = captured(event)) FAIL(error);
  SAFE
  if (event->state && !event->state->done) FAIL(cudaErrorNotReady);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  ENTER
  EVENT(event, handle)
  if (cudaError_t error = captured(event)) FAIL(error);
  SAFE
  if (event->state) wait_for(lock, {event->state});
  shut_memory();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t then) {
  ENTER
  EVENT(a, first)
  EVENT(b, then)
  if (!a->state || !b->state) FAIL(cudaErrorInvalidResourceHandle);
  if (!a->state->done || !b->state->done) FAIL(cudaErrorNotReady);
  *ms = std::chrono::duration<float, std::milli>(b->state->at - a->state->at).count();
  return cudaSuccess;
}

// CuPy's wheel has a copy of the runtime in it, and so a last error of its own: what it asks of events that are not ready
// does not show where torch looks for errors.
static cudaError_t aside(cudaError_t error, cudaError_t before) {
  cudaGetLastError();
  if (before) fail(before, __func__);
  return error;
}
cudaError_t cupy_cudaEventQuery(cudaEvent_t event) {
  cudaError_t before = cudaPeekAtLastError();
  return aside(cudaEventQuery(event), before);
}
cudaError_t cupy_cudaStreamQuery(cudaStream_t s) {
  cudaError_t before = cudaPeekAtLastError();
  return aside(cudaStreamQuery(s), before);
}

}  // extern "C"
