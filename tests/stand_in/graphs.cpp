// Captures and graphs: the work of a capture is kept and run again, in the order in which it was given.
#include "world.h"

cudaError_t unsafe() {
  cudaError_t error = cudaSuccess;
  for (auto& c : world().captures) {
    bool mine = c->thread == std::this_thread::get_id(), forbidden = false;
    if (thread_mode == cudaStreamCaptureModeGlobal)
      forbidden = c->mode == cudaStreamCaptureModeGlobal || (mine && c->mode == cudaStreamCaptureModeThreadLocal);
    else if (thread_mode == cudaStreamCaptureModeThreadLocal)
      forbidden = mine && c->mode != cudaStreamCaptureModeRelaxed;
    if (forbidden) c->invalid = true, error = cudaErrorStreamCaptureUnsupported;
  }
  return error;
}

static Capture* blocking_capture(Stream* legacy) {  // one that the legacy stream would have to wait for
  for (auto& c : world().captures)
    for (Stream* m : c->members)
      if (m->device == legacy->device && m->blocking()) return c.get();
  return nullptr;
}

cudaError_t legacy_in_capture(Stream* s) {
  Capture* c = s->legacy ? blocking_capture(s) : nullptr;
  if (!c) return cudaSuccess;
  c->invalid = true;
  return cudaErrorStreamCaptureImplicit;
}

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  ENTER
  STREAM(s, handle)
  if (s->legacy) FAIL(cudaErrorStreamCaptureUnsupported);
  if (s->capture) FAIL(cudaErrorIllegalState);
  auto c = std::make_shared<Capture>();
  c->mode = mode, c->origin = s, c->id = ++world().captures_made;
  c->members.insert(s);
  s->capture = c;
  world().captures.insert(c);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  ENTER
  *out = nullptr;
  STREAM(s, handle)
  CaptureP c = s->capture;
  if (!c) FAIL(cudaErrorIllegalState);
  if (c->origin != s) FAIL(cudaErrorStreamCaptureUnmatched);
  if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id())
    FAIL(cudaErrorStreamCaptureWrongThread);
  for (Stream* m : c->members)
    if (world().streams.count(m)) m->capture = nullptr;
  world().captures.erase(c);
  if (c->invalid) FAIL(cudaErrorStreamCaptureInvalidated);
  if (!c->unjoined.empty()) FAIL(cudaErrorStreamCaptureUnjoined);
  *out = (cudaGraph_t)c->graph;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  ENTER
  STREAM(s, handle)
  if (s->legacy && blocking_capture(s)) FAIL(cudaErrorStreamCaptureImplicit);  // and nothing is invalidated
  *status = !s->capture           ? cudaStreamCaptureStatusNone
            : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** before, const cudaGraphEdgeData** edges,
                                     size_t* n) {
  if (cudaError_t error = cudaStreamIsCapturing(handle, status)) return error;
  Lock lock(world().m);
  CaptureP c = find(handle)->capture;
  if (!c) return cudaSuccess;
  if (id) *id = c->id;
  if (graph) *graph = (cudaGraph_t)c->graph;
  if (before) *before = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = (cudaGraphExec_t) new Graph(*(Graph*)graph);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t handle) {
  ENTER
  STREAM(s, handle)
  auto nodes = std::make_shared<std::vector<Work>>(((Graph*)graph)->nodes);
  Work all = [=] {
    for (auto& node : *nodes)
      if (node) node();
  };
  if (cudaError_t error = put(s, all)) FAIL(error);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (Graph*)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete (Graph*)graph, cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* out, size_t* n) {
  size_t all = ((Graph*)graph)->nodes.size();
  for (size_t i = 0; out && i < *n && i < all; i++) out[i] = (cudaGraphNode_t)(i + 1);
  return *n = all, cudaSuccess;
}

}  // extern "C"
