// A device that torch knows and nobody else does, for the tests: "other:0" and "other:1", in host memory that only its
// own copy can find. As on Apple's GPU, a data pointer is a handle: it leads nowhere (reading it ends the process), and
// the handles of two storages lie closer together than their bytes would. What it cannot compute, the CPU does.

#include <sys/mman.h>

#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex DEVICES = 2;
thread_local c10::DeviceIndex current = 0;

// -- Memory: a handle stands for a block of host memory.

std::mutex lock;
std::unordered_map<void*, char*> blocks;
std::vector<std::string> copies;  // "h2d", "d2h", "d2d", with "async" behind it where it was asked for

void release(void* handle) {
  std::lock_guard<std::mutex> held(lock);
  auto found = blocks.find(handle);
  if (found != blocks.end()) {
    std::free(found->second);
    blocks.erase(found);
  }
}

struct Memory final : c10::Allocator {
  static constexpr size_t ROOM = size_t(1) << 30, APART = 64;
  char* next = static_cast<char*>(mmap(nullptr, ROOM, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));

  c10::DataPtr allocate(size_t nbytes) override {
    std::lock_guard<std::mutex> held(lock);
    void* handle = nullptr;
    if (nbytes) {
      handle = next += APART;
      blocks[handle] = static_cast<char*>(std::calloc(nbytes, 1));
    }
    return {handle, handle, &release, c10::Device(KIND, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "no raw copies of handles"); }
};
Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {KIND, current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < DEVICES, "no such device: ", device);
    current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
};

// -- The few operations that a device has to have

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The elements where they really are, as a tensor of the host.
at::Tensor seen(const at::Tensor& t) {
  if (t.device().type() != KIND || !t.numel()) {
    return t.device().type() == KIND ? at::empty(t.sizes(), t.options().device(at::kCPU)) : t;
  }
  std::lock_guard<std::mutex> held(lock);
  char* start = blocks.at(t.storage().data_ptr().get()) + t.storage_offset() * t.itemsize();
  auto host = at::from_blob(start, t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
  host._set_conj(t.is_conj());
  host._set_neg(t.is_neg());
  return host;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  for (const auto& t : {self, source}) {  // one device does not know of another's memory
    TORCH_CHECK(t.device().type() == KIND || t.is_cpu(), "other devices cannot be reached from this one");
  }
  std::string kind = {source.is_cpu() ? 'h' : 'd', '2', self.is_cpu() ? 'h' : 'd'};
  {
    std::lock_guard<std::mutex> held(lock);
    copies.push_back(non_blocking ? kind + " async" : kind);
  }
  auto to = seen(self);
  if (self.is_cpu() && !source.is_cpu() && self.strides() == source.strides() && self.numel() > 1 &&
      !source.is_non_overlapping_and_dense()) {  // as Apple's up to torch 2.13: one block, whatever lies between
    std::memcpy(self.data_ptr(), seen(source).contiguous().data_ptr(), self.nbytes());
    return self;
  }
  auto from = seen(source);
  if (!self.is_cpu()) {  // as Apple's: the bit is not seen; whether it is that of the target, nobody has tried
    to._set_neg(false);
    if (!source.is_cpu()) from._set_neg(false);
  }
  to.copy_(from);
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& self, bool non_blocking) {
  auto to = self;
  return copy_(to, source, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& self) {
  return copy_from(source, self, false);
}

at::Tensor& set_(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* t = self.unsafeGetTensorImpl();
  t->set_storage_keep_dtype(storage);
  t->set_storage_offset(offset);
  t->set_sizes_and_strides(size, stride);
  return self;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", set_);
  m.impl("view", at::native::view);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(KIND, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) { Guard().setDevice({KIND, static_cast<c10::DeviceIndex>(index)}); });
  m.def("device_count", [] { return static_cast<int>(DEVICES); });
  m.def("copies", [] {
    std::lock_guard<std::mutex> held(lock);
    return std::exchange(copies, {});
  });
}
