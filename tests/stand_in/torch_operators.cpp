// torch's kernels cannot run without a GPU. Here its CPU kernels run in their place: on the stream that is current, when its
// turn comes, over the device's memory. Results are allocated by torch's own caching allocator, as ever.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <functional>
#include <regex>

extern "C" void omp_set_num_threads(int);  // of the OpenMP that torch brings; of the thread that calls it

namespace {

using c10::IValue;
using torch::jit::Stack;

void on_stream(std::function<void()> work) {
  auto* kept = new std::function<void()>(std::move(work));  // for good: a captured graph runs it again
  auto error = cudaLaunchHostFunc(
      c10::cuda::getCurrentCUDAStream(),
      [](void* p) {
        omp_set_num_threads(1);  // streams are many, cores few
        (*(std::function<void()>*)p)();
      },
      kept);
  TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

struct Mirror {  // a tensor of the device, for the host
  void* data;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  bool conjugate, negative;

  explicit Mirror(const at::Tensor& t)
      : data(t.numel() ? t.data_ptr() : nullptr), sizes(t.sizes().vec()), strides(t.strides().vec()),
        dtype(t.scalar_type()), conjugate(t.is_conj()), negative(t.is_neg()) {}
  at::Tensor tensor() const {
    if (!data) return at::empty_strided(sizes, strides, at::TensorOptions().dtype(dtype));
    auto t = at::from_blob(data, sizes, strides, [](void*) {}, at::TensorOptions().dtype(dtype));
    if (conjugate) t._set_conj(true);
    if (negative) t._set_neg(true);
    return t;
  }
};

bool on_device(const IValue& v) { return v.isTensor() && v.toTensor().defined() && v.toTensor().is_cuda(); }

using Change = std::function<at::Tensor(const at::Tensor&)>;
IValue changed(const IValue& v, const Change& change, c10::Device device) {
  if (v.isTensor()) return v.toTensor().defined() ? IValue(change(v.toTensor())) : v;
  if (v.isDevice()) return device;
  if (!v.isTensorList()) return v;
  std::vector<at::Tensor> list;
  for (at::Tensor t : v.toTensorVector()) list.push_back(change(t));
  return list;
}

Stack shapes_of(const c10::OperatorHandle& op, const Stack& args) {  // what comes out, without values
  Stack stack;
  Change change = [](const at::Tensor& t) {
    if (t.dim() == 0 && !t.is_cuda()) return t;
    return at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::kMeta));
  };
  for (auto& v : args) stack.push_back(changed(v, change, c10::kMeta));
  c10::InferenceMode mode;
  op.callBoxed(stack);
  return stack;
}

void at_once(const c10::OperatorHandle& op, const Stack& args, c10::Device device, Stack* out) {
  Stack stack;  // the size of the result depends on the values
  for (auto& v : args) stack.push_back(changed(v, [](const at::Tensor& t) { return t.cpu(); }, c10::kCPU));
  op.callBoxed(stack);
  for (auto& v : stack) out->push_back(v.toTensor().to(device));
}

void by_the_host(const c10::OperatorHandle& op, Stack* stack) {
  auto& arguments = op.schema().arguments();
  size_t n = arguments.size();
  Stack args(stack->end() - n, stack->end());
  stack->erase(stack->end() - n, stack->end());

  c10::Device device(c10::kCUDA, c10::cuda::current_device());
  for (auto& v : args)
    if (on_device(v)) device = v.toTensor().device();
  c10::cuda::CUDAGuard guard(device);

  bool in_place = false;
  for (auto& a : arguments) in_place |= a.alias_info() && a.alias_info()->isWrite();
  if (arguments.back().is_out()) {
    auto out = args.back().toTensor();
    auto sizes = shapes_of(op, args)[0].toTensor().sizes().vec();
    if (out.sizes() != sizes) out.resize_(sizes);
  }

  std::vector<std::function<IValue()>> host;
  for (auto& v : args) {
    Change no_copy = [](const at::Tensor& t) { return t.is_cuda() ? t : t.clone(); };
    IValue kept = changed(v, no_copy, c10::kCPU);
    if (on_device(kept)) {
      Mirror mirror(kept.toTensor());
      host.push_back([mirror] { return IValue(mirror.tensor()); });
    } else if (kept.isTensorList()) {
      std::vector<Mirror> mirrors;
      for (at::Tensor t : kept.toTensorVector()) mirrors.emplace_back(t);
      host.push_back([mirrors] {
        std::vector<at::Tensor> list;
        for (auto& m : mirrors) list.push_back(m.tensor());
        return IValue(list);
      });
    } else {
      host.push_back([kept] { return kept; });
    }
  }
  auto run = [op, host] {
    Stack stack;
    for (auto& make : host) stack.push_back(make());
    op.callBoxed(stack);
    return stack;
  };

  if (in_place) {
    on_stream([run] {
      c10::InferenceMode mode;
      run();
    });
    for (size_t i = 0; i < n; i++)
      if (arguments[i].alias_info() && arguments[i].alias_info()->isWrite()) return stack->push_back(args[i]);
  }
  Stack shapes;
  try {
    shapes = shapes_of(op, args);
  } catch (const c10::Error&) {
    return at_once(op, args, device, stack);
  }
  std::vector<Mirror> results;
  for (auto& v : shapes) {
    auto t = v.toTensor();
    auto made = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
    results.emplace_back(made);
    stack->push_back(made);
  }
  on_stream([run, results] {
    c10::InferenceMode mode;
    Stack stack = run();
    for (size_t i = 0; i < results.size(); i++) results[i].tensor().copy_(stack[i].toTensor());
  });
}

// Copies within a device that are more than a memcpy.
at::Tensor& copy(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  bool plain = self.is_non_overlapping_and_dense() && self.sizes() == src.sizes() && self.strides() == src.strides() &&
               self.dtype() == src.dtype() && self.is_conj() == src.is_conj() && self.is_neg() == src.is_neg();
  bool within = self.is_cuda() && src.is_cuda() && self.device() == src.device();
  if (!within || plain || !self.numel()) return at::native::copy_(self, src, non_blocking);
  c10::cuda::CUDAGuard guard(self.device());
  Mirror to(self), from(src.expand(self.sizes()));
  on_stream([=] {
    c10::InferenceMode mode;
    to.tensor().copy_(from.tensor());
  });
  return self;
}

bool elementary(const c10::OperatorHandle& op) {  // tensors in, tensors out, and no views
  static const std::regex kept(
      "aten::(empty|copy_|set_|resize|_?pin|is_|record_stream|_local_scalar|masked_select|nonzero|_to_copy|clone|contiguous|"
      "_copy_from|as_strided|view|_reshape|_fused|_?cudnn|_foreach|_amp|_cuda|_assert|equal|.*(sparse|nested|quantized|coalesce|"
      "memory_format)).*");
  auto& schema = op.schema();
  if (std::regex_match(schema.name(), kept) || schema.returns().empty()) return false;
  bool tensors = false;
  for (auto& a : schema.arguments()) {
    if (a.type()->str().find("Tensor?[") != std::string::npos) return false;
    tensors |= a.type()->isSubtypeOf(*c10::TensorType::get()) || a.type()->isSubtypeOf(*c10::ListType::ofTensors());
  }
  for (auto& r : schema.returns()) {
    if (!r.type()->isSubtypeOf(*c10::TensorType::get())) return false;
    if (r.alias_info() && !r.alias_info()->isWrite()) return false;
  }
  return tensors;
}

}  // namespace

TORCH_LIBRARY(stand_in, m) {
  m.def("take_over", [] {
    auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    auto& dispatcher = c10::Dispatcher::singleton();
    for (auto& name : dispatcher.getAllOpNames()) {
      auto op = dispatcher.findSchema(name);
      if (!op || name.name.rfind("aten::", 0) != 0 || !elementary(*op)) continue;
      if (!op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
      auto full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
      library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&by_the_host>());
    }
    library->impl("copy_", copy);
    library->impl("equal", [](const at::Tensor& a, const at::Tensor& b) { return a.cpu().equal(b.cpu()); });
    library->impl("nonzero", [](const at::Tensor& t) { return t.cpu().nonzero().to(t.device()); });
    library->impl("masked_select", [](const at::Tensor& t, const at::Tensor& mask) {
      return t.cpu().masked_select(mask.cpu()).to(t.device());
    });
  });
}
