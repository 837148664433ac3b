"""Options: what the caller wrote, in canonical form, and checked against each other before anything happens."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, TypedDict

from tensorbridge import _dtypes
from tensorbridge import _words as words
from tensorbridge._adapters import adapter_of
from tensorbridge._array import CPU, ArrayInfo, Device, Traits
from tensorbridge._cuda import _streams
from tensorbridge._errors import INSTALL, DeviceError, MissingFrameworkError, nearest
from tensorbridge._loaded import array_class, loaded
from tensorbridge._memory import infos_share
from tensorbridge._refuse import CALLED, FORKED, Obstacle
from tensorbridge._step import Want, usual

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:
    Unpack = dict  # what reads hints there finds a type

if TYPE_CHECKING:
    from typing import Protocol, TypeAlias

    import numpy as np

    # The types of torch and CuPy by what they have: where one is not installed, it would make all the others unknown.
    class _TorchDtype(Protocol):
        @property
        def is_floating_point(self) -> bool: ...

    class _TorchDevice(Protocol):
        @property
        def type(self) -> str: ...
        @property
        def index(self) -> int: ...

    class _CupyDevice(Protocol):
        @property
        def id(self) -> int: ...

    class _HasDtype(Protocol):
        @property
        def dtype(self) -> np.dtype[Any]: ...

    class _HasNumpyDtype(Protocol):
        @property
        def __numpy_dtype__(self) -> np.dtype[Any]: ...

    _Number: TypeAlias = type[bool] | type[int] | type[float] | type[complex]
    _OfNumpy: TypeAlias = tuple[Any, ...] | list[Any] | _HasDtype | _HasNumpyDtype  # as in its own DTypeLike
    # Without NumPy's own: one that is not of the expected type must find no overload of `to_numpy` to fall through to.
    UntypedDtype: TypeAlias = str | _Number | _TorchDtype | Mapping[Any, Any] | _OfNumpy
    DtypeLike: TypeAlias = type[Any] | np.dtype[Any] | UntypedDtype
    DeviceLike: TypeAlias = str | int | _TorchDevice | _CupyDevice
else:
    UntypedDtype = DtypeLike = DeviceLike = Any  # where hints are read: torch is not imported for one


class PlanOptions(TypedDict, total=False):
    """Those of all conversions. Which of them one has, is asked when it is planned."""

    device: DeviceLike | None
    dtype: DtypeLike | None
    copy: bool | None
    writable: bool | None
    share_readonly: bool
    detach: bool
    pin_memory: bool
    non_blocking: bool
    out: Any


_OR_NONE = frozenset({"copy", "writable"})  # flags that may be None


def want(
    framework: str, call: str = "", *, device: Any = None, dtype: Any = None, out: Any = None, **flags: Any
) -> Want:
    """What the caller wrote, in canonical form; what was left out is as usual. `call` is what was called."""
    for name, value in flags.items():
        if value is not False and value is not True and not (value is None and name in _OR_NONE):
            allowed = "True, False or None" if name in _OR_NONE else "True or False"
            raise TypeError(f"{call or f'to_{framework}'}({name}={value!r}): {name} is {allowed}")
    where = None if device is None else device_named(device, framework)
    if where is not None:
        _check_place(call or f"to_{framework}", framework, where, flags)
    if isinstance(dtype, Mapping):
        flags["casts"] = _dtypes.parse_casts(dtype)
    elif dtype is not None:
        flags["dtype"] = _dtypes.parse(dtype)
    if "detach" not in flags:
        flags["detach"] = usual(framework).detach
    found = Want(framework, where, **flags)
    return found if out is None else with_out(found, out)


def _check_place(call: str, framework: str, where: Device, flags: Mapping[str, Any]) -> None:
    if where == CPU and framework == "cupy":
        raise ValueError(f'{call}(device="cpu"): CuPy arrays live on CUDA devices; use to_numpy for the host')
    if where != CPU and flags.get("pin_memory"):
        staged = ", transfers are staged through pinned memory already" if where.is_cuda else ""
        text = f"{call}(pin_memory=True, device={str(where)!r}): pinned memory is host memory"
        raise ValueError(f"{text}; leave pin_memory out{staged}")


def check_target(call: str, to: Any) -> None:
    if not isinstance(to, str) or to not in CALLED:
        name = getattr(to, "__name__", to)  # a module or a function where its name is wanted: the likeliest mistake
        shown = repr(to) if name is to else f"<{type(to).__name__} {name}>"
        raise ValueError(f'{call}(to={shown}): choose "numpy", "torch" or "cupy"{nearest(name, CALLED)}')


def of_plan(
    call: str, functions: Mapping[str, Callable[..., Any]], to: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a plan, and the defaults of the others: those of the function that would be called."""
    check_target(call, to)
    known = {p.name: p.default for p in signature(functions[to]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    unknown = next((name for name in options if name not in known), None)
    if unknown is None:
        return {**known, **options}
    function = call.replace("plan", f"to_{to}")
    text = f"{call}(to={to!r}): {function} has no option {unknown!r}; it has {', '.join(known)}"
    raise TypeError(text + nearest(unknown, known))


def device_named(device: Any, framework: str) -> Device:
    """A caller's `device` by name; one without an index stays open until the array is known."""
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        if type(device).__module__.startswith("cupy") and hasattr(device, "id"):
            return Device(f"cuda:{device.id}")
        if type(device).__module__ == "torch" and hasattr(device, "type"):
            device = str(device)
        else:
            raise TypeError(f"device={device!r}: give a name, a CUDA index, torch.device or cupy.cuda.Device")
    name = f"cuda:{device}" if isinstance(device, int) else device
    kind = name.partition(":")[0]
    known = kind in ("cpu", "cuda") or (framework == "torch" and _is_kind_of_torch(kind))
    if not (known and re.fullmatch("[a-z0-9_]+(:(0|[1-9][0-9]*))?", name)):
        hint = _device_hint(kind, framework) if isinstance(device, str) else ""
        others = ', "mps"' if framework == "torch" else ""
        raise ValueError(f'device={device!r}: choose "cpu", "cuda", "cuda:0"{others} ... or a CUDA index from 0{hint}')
    return CPU if kind == "cpu" else Device(name)


_KINDS_OF_TORCH = ("mps", "xpu", "hpu", "mtia", "xla")  # where torch is not loaded, for a plan; else it is asked


def _is_kind_of_torch(kind: str) -> bool:
    """Whether torch has devices of this kind, beside the host and CUDA; on "meta" nothing has a value."""
    torch = loaded("torch")
    if torch is None:
        return kind in _KINDS_OF_TORCH
    try:
        return bool(torch.device(kind).type == kind != "meta")
    except RuntimeError:
        return False


def _device_hint(kind: str, framework: str) -> str:
    if framework == "torch" and kind == "meta":
        return "; a tensor on it has no values: torch.empty(x.shape, device='meta') makes one"
    return nearest("cuda" if kind == "gpu" else kind, ("cpu", "cuda", *_KINDS_OF_TORCH * (framework == "torch")))


def placed(want: Want, traits: Traits, *, planning: bool = False) -> Want:
    """`device` with its index, which exists (a plan is also made for a device that does not)."""
    device = want.device
    if device is None and want.framework == "cupy" and not traits.device.is_cuda:
        device = Device("cuda")
    if device is None or device == CPU:
        if want.pin_memory and _streams.forked():
            raise DeviceError(
                f"{words.call(want)}: pinned memory is CUDA's, and CUDA cannot be used in a forked process.\n"
                "Pin in the main process, as DataLoader(pin_memory=True) does, or start workers with the spawn method."
            )
        if want.pin_memory and not planning and not sys.modules["torch"].cuda.is_available():
            raise DeviceError(
                f"{words.call(want)}: pinned memory needs a CUDA device, and torch sees none here.\nLeave it out."
            )
        return want
    kind = device.type
    if device.is_cuda and _streams.forked():  # the driver would see no device here
        raise DeviceError(f"{words.call(want)}: {FORKED.why}.\n{FORKED.cure}")
    if device.is_other and _is_forked(kind):
        raise DeviceError(f"{words.call(want)}: {kind} cannot be used in a forked process.\n{FORKED.cure}")
    count, current, why = _cuda(want.framework) if device.is_cuda else _others(kind)
    if device == kind:
        inherits = traits.device.type == kind
        device = traits.device if inherits else Device(f"{kind}:{current}")
    if device.index >= count and not planning:
        name = kind.upper() if device.is_cuda else kind
        seen = f"{count} {name} device{'s' * (count != 1)}" if count else f"no usable {name} device"
        if device.is_cuda:
            cure = "Check CUDA_VISIBLE_DEVICES and the driver"
        elif count:
            cure = "Give a lower index"
        elif hasattr(loaded("torch"), kind):
            cure = f"This build of torch, or this machine, has no {kind}"
        else:
            cure = "Import the package that adds it to torch"
        raise DeviceError(
            f"{words.call(want)}: {device} does not exist: {want.framework} sees {seen} here{why}.\n"
            f"{cure}; plan() shows the steps without a device."
        )
    return want._replace(device=device)


def _is_forked(kind: str) -> bool:
    """Whether torch has used devices of this kind before this process was forked; its Apple's and Intel's tell."""
    return bool(getattr(getattr(loaded("torch"), kind, None), "_is_in_bad_fork", lambda: False)())


def _others(kind: str) -> tuple[int, int, str]:
    """The same of a kind of device that torch alone knows: asked of its module, torch.mps ..., where it has one."""
    torch: Any = loaded("torch")
    module: Any = getattr(torch, kind, None)
    if hasattr(module, "is_available") and hasattr(module, "device_count"):
        count = module.device_count() if module.is_available() else 0
        started = getattr(module, "is_initialized", lambda: True)  # XPU starts when it is asked for its current device
        return count, module.current_device() if count and hasattr(module, "current_device") and started() else 0, ""
    if torch is None:
        return 0, 0, ""
    try:
        torch.empty(0, device=kind)  # torch_xla brings no such module
    except (RuntimeError, AssertionError, ImportError):
        return 0, 0, ""
    return sys.maxsize, 0, ""  # how many, torch alone knows


def _cuda(framework: str) -> tuple[int, int, str]:
    """How many CUDA devices `framework` sees, which is current, and why there are none."""
    module = loaded(framework)
    if module is None:
        return 0, 0, ""
    if framework == "torch":
        count = module.cuda.device_count() if module.cuda.is_available() else 0
        if count and module.cuda.is_initialized():
            return count, module.cuda.current_device(), ""
        started = count and _streams.usable("cupy")  # CuPy alone has used CUDA yet, and torch need not start it here
        return count, sys.modules["cupy"].cuda.runtime.getDevice() if started else 0, ""
    try:
        return module.cuda.runtime.getDeviceCount(), module.cuda.runtime.getDevice(), ""
    except module.cuda.runtime.CUDARuntimeError as error:
        return 0, 0, f" ({error})"


def require(framework: str, call: str = "") -> Any:
    """The module of a framework that the caller asked for; waited for where another thread is importing it."""
    found = loaded(framework)
    if found is not None:
        return found
    try:
        return import_module(framework)
    except ImportError as error:
        text = f"{call or f'to_{framework}'}: {framework} cannot be imported: {error}"
        raise MissingFrameworkError(f"{text}.\n{INSTALL[framework]}") from error


def with_out(want: Want, out: Any) -> Want:
    call = f"to_{want.framework}(out=...)"
    if not isinstance(out, array_class(want.framework)):
        raise TypeError(f"{call}: out is {type(out).__name__}, not an array of {want.framework}")
    try:
        _, traits, _ = adapter_of(type(out)).open(out, Want("numpy"))
    except Obstacle as obstacle:
        raise ValueError(f"{call}: out is {obstacle.what}: {obstacle.why}") from None
    if want.copy is False:
        raise ValueError(f"{call}: filling out moves bytes, which copy=False forbids; leave copy out")
    if want.pin_memory:
        raise ValueError(f"{call}: out has its memory already; leave pin_memory out")
    name = traits.dtype.lstrip(">")
    if want.dtype not in (None, name) or want.casts is not None:
        raise ValueError(f"{call}: out is {name}, and dtype={want.casts or want.dtype} was asked for; leave dtype out")
    if want.device is not None and want.device not in (traits.device, traits.device.type):
        raise ValueError(
            f"{call}: out is on {traits.device}, and device={str(want.device)!r} was asked for; leave device out"
        )
    if not traits.writable or traits.graph or traits.overlap or traits.lazy == "zero" or _is_frozen(out):
        raise ValueError(f"{call}: {_why_not_filled(traits, want)}")
    return want._replace(dtype=name, device=None if want.framework == "numpy" else traits.device, out=traits)


def _why_not_filled(out: Traits, want: Want) -> str:
    if not out.writable:
        return "out is read-only"
    if out.graph:
        wanted = "" if want.detach else ", and say detach=True where the source's graph is not wanted in it"
        return f"out requires grad; fill out.detach(){wanted}"
    if out.overlap:
        return "out overlaps itself: two of its elements are one"
    if out.lazy == "zero":
        return "out is a zero tensor, which has no memory; fill out.clone()"
    return "out is an inference tensor, which torch writes only inside inference_mode; fill out.clone()"


def _is_frozen(out: Any) -> bool:
    torch = loaded("torch")
    if torch is None or not isinstance(out, torch.Tensor):
        return False
    return bool(out.is_inference() and not torch.is_inference_mode_enabled())


def check_out(source: ArrayInfo, target: ArrayInfo, want: Want) -> None:
    call = f"to_{want.framework}(out=...)"
    if source.shape != target.shape:
        raise ValueError(f"{call}: out has shape {target.shape}, the source {source.shape}")
    if infos_share(source, target):
        raise ValueError(f"{call}: out shares memory with the source")
