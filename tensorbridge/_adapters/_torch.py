"""torch: detaches, resolves lazy bits, moves between devices; holds no reversed, read-only or byte-swapped memory.

Facts are read here; `_torch_steps` performs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensorbridge import _dtypes, _readonly
from tensorbridge._adapters import _numpy, _torch_cuda, _torch_steps
from tensorbridge._adapters._torch_steps import DTYPES, NAMES
from tensorbridge._array import (
    CPU,
    SMALL,
    ArrayInfo,
    Device,
    Layout,
    Traits,
    layout,
    order_text,
    shape_text,
    size_class,
)
from tensorbridge._cuda import _streams
from tensorbridge._refuse import Obstacle
from tensorbridge._step import Want, bytes_text

DENSE = Layout()
_functorch: Any = torch._C._functorch
_has_storage, _modes = torch._C._has_storage, _torch_steps.modes
_devices: dict[torch.device, Device] = {}


def open(t: Tensor, want: Want) -> tuple[Tensor, Traits, Want]:
    plain = is_plain(t)
    if not plain and _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.unwrap_if_dead(t)  # it outlived its transform: what is left is a plain tensor
    if type(t) in EXACT:
        traits = _traits(t, plain, ask_pinned=_crosses_bus(t, want))
    else:
        with _itself():
            traits = _traits(t, plain, ask_pinned=_crosses_bus(t, want))
            t = t if want.framework == "torch" else t.as_subclass(torch.Tensor)
    return t, traits, want.settled(traits.dtype)


# Inside, a tensor is looked at itself, whatever its subclass answers for torch's functions (``__torch_function__``).
_itself = torch._C.DisableTorchFunctionSubclass


def _crosses_bus(t: Tensor, want: Want) -> bool:
    """The one of CUDA, for which host memory can be page-locked."""
    if want.framework == "cupy":
        return t.is_cpu
    target = CPU if want.framework == "numpy" else want.device
    return want.pin_memory or (target is not None and t.is_cuda != target.is_cuda)


# The keys by which torch dispatches tell at once what `refuse` asks for one by one (functorch's, functional, sparse,
# nested, quantized, mkldnn, meta), and lazy bits. Beside the one of plain memory on the host, these mean nothing here.
_keys, _Key, _Keys = torch._C._dispatch_keys, torch._C.DispatchKey, torch._C.DispatchKeySet
_raw = _Keys.raw_repr
_HOST: int = _Keys(_Key.CPU).raw_repr()
_ASKED = ~sum(_Keys(key).raw_repr() & ~_HOST for key in (_Key.ADInplaceOrView, _Key.AutogradCPU, _Key.AutocastCPU))
EXACT = frozenset({torch.Tensor, torch.nn.Parameter})


def is_plain(t: Tensor) -> bool:
    """Whether this tensor certainly lies on the host, its values in its bytes, and only its dtype can be in the way."""
    return _raw(_keys(t)) & _ASKED == _HOST and type(t) in EXACT and not is_intercepted()


def is_intercepted() -> bool:
    """Whether a mode or a transform answers for torch: a tensor made now may have no memory (fake, functional)."""
    return bool(_modes()) or _functorch.peek_interpreter_stack() is not None


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step that is done outside of the modes and transforms in which it is called: what it makes has memory."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    def run(*arrays: Any) -> Any:
        with temporarily_clear_interpreter_stack(), _disable_current_modes():
            return function(*arrays)

    return run


def device_at(address: int) -> int:
    """The CUDA device that has memory there; negative if none has."""
    ask = outside(_torch_cuda.device_at) if is_intercepted() else _torch_cuda.device_at
    return int(ask(address))


def quick_traits(t: Tensor) -> Traits | None:
    """The traits of a plain tensor on the host, where they are quickly told."""
    if not is_plain(t):
        return None
    told = (t.dtype, t.shape, t.stride(), t.requires_grad)
    seen = _seen.get(told)
    if seen is not None and not _readonly.marked and forward_ad._current_level < 0:
        found, itemsize, span = seen
        held = t.storage_offset() * itemsize + span <= t.untyped_storage().nbytes()
        if held and not t.data_ptr() % itemsize:
            return found
    try:
        made = _traits(t, True, ask_pinned=False) if t.dtype in NAMES else None
    except Obstacle:
        return None
    if made is not None and made.aligned and made.writable and made.graph == t.requires_grad:
        if len(_seen) >= _KEPT:
            _seen.clear()
        itemsize = t.element_size()
        _seen[told] = made, itemsize, itemsize * (_span(t.shape, t.stride()) if t.numel() else 0)
    return made


# By all that the kind of a plain tensor rests on but where it lies: its itemsize, and its bytes from first to last.
_seen: dict[tuple[Any, ...], tuple[Traits, int, int]] = {}
_KEPT = 1024


def _traits(t: Tensor, plain: bool, *, ask_pinned: bool) -> Traits:
    name, device, lazy = NAMES.get(t.dtype), CPU, ""
    if not plain or name is None:
        refuse(t)
        name, device = NAMES[t.dtype], device_of(t)
        lazy = "zero" if t._is_zerotensor() else " ".join(["conj"] * t.is_conj() + ["neg"] * t.is_neg())
    itemsize, count = t.element_size(), t.numel()
    lay, span = (DENSE, count) if t.is_contiguous() else _layout(t.shape, t.stride(), itemsize)
    stored = _has_storage(t)
    if count and stored:
        _check_storage(t, span, itemsize)
    return _of_kind(
        device,
        name,
        lay,
        not (count and stored) or t.data_ptr() % itemsize == 0,
        not (_readonly.marked and _readonly.is_marked(t)),
        t.requires_grad or (forward_ad._current_level >= 0 and _has_tangent(t)),
        lazy,
        device == CPU and not _streams.forked() and t.is_pinned() if ask_pinned else None,
        size_class(count * itemsize, t.dim()),
    )


@lru_cache(maxsize=1024)
def _of_kind(
    device: Device,
    name: str,
    lay: Layout,
    aligned: bool,
    writable: bool,
    graph: bool,
    lazy: str,
    pinned: bool | None,
    size: str,
) -> Traits:
    order, spacing, overlap, _ = lay
    return Traits("torch", device, name, order, spacing, overlap, False, aligned, writable, graph, lazy, pinned, size)


_FACTS = [attrgetter(name) for name in ("dtype", "shape", "requires_grad")]


def like(first: Tensor) -> Callable[[Sequence[Tensor]], bool] | None:
    """A test for tensors that are certainly of the kind and shape of one that was opened; none if that is not plain."""
    plain, count, itemsize = [{first.dtype}, {first.shape}, {False}], first.numel(), first.element_size()

    def alike(ts: Sequence[Tensor]) -> bool:
        if set(map(type, ts)) != {Tensor}:
            return False
        if {raw & _ASKED for raw in set(map(_raw, map(_keys, ts)))} != {_HOST}:
            return False
        if [set(map(fact, ts)) for fact in _FACTS] != plain:  # a nested one has no shape
            return False
        ends = [(t.storage_offset() + count) * itemsize <= t.untyped_storage().nbytes() for t in ts]
        return all(ends) and all(map(Tensor.is_contiguous, ts))

    return alike if forward_ad._current_level < 0 and alike([first]) else None


@lru_cache(maxsize=1024)
def _layout(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[Layout, int]:
    """The layout, and how many elements lie between the first and the last, both included."""
    return layout(tuple(shape), tuple([s * itemsize for s in strides]), itemsize), _span(shape, strides)


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum([(n - 1) * s for n, s in zip(shape, strides, strict=True)])


def _check_storage(t: Tensor, span: int, itemsize: int) -> None:
    """A tensor may claim more than it has, and torch reads on: a failed `resize_` has set the shape already."""
    needs, holds = int(t.storage_offset() + span) * itemsize, int(t.untyped_storage().nbytes())
    if needs > holds and not t._is_zerotensor():
        raise Obstacle(
            "short storage",
            f"{_kind(t, '')} {NAMES[t.dtype]} {shape_text(tuple(t.shape))}",
            f"it needs {bytes_text(needs)} and its storage holds {bytes_text(holds)} "
            "(a resize_ that failed leaves it so, or a storage that was freed)",
        )


def _has_tangent(t: Tensor) -> bool:
    """Whether forward-mode AD, in a dual level, carries a tangent on it, which would be lost like a graph."""
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def device_of(t: Tensor) -> Device:
    device = t.device
    found = _devices.get(device)
    if found is None:
        found = _devices[device] = CPU if device.type == "cpu" else Device(str(device))
    return found


def refuse(t: Tensor) -> None:
    """Raise the Obstacle that stands in this tensor's way, if any."""
    name = ""
    if _functorch.is_functorch_wrapped_tensor(t):
        name = "functional" if _functorch.is_functionaltensor(t) else "functorch"
    elif type(t) not in (torch.Tensor, torch.nn.Parameter):
        name = _subclass_obstacle(t)
    if not name:
        if t.is_nested:
            name = "nested"
        elif t.layout is not torch.strided:
            name = "mkldnn" if t.is_mkldnn else "sparse"
        elif t.is_meta:
            name = "meta"
        elif t.is_quantized:
            name = "quantized"
        elif torch._is_functional_tensor(t):
            name = "functional"
        elif _torch_steps.is_faking():
            name = "fake mode"
        elif t.dtype not in NAMES:
            name = "unknown dtype"
    if name:
        shape = "" if name in ("nested", "uninitialized") else " " + shape_text(tuple(t.shape))
        obstacle = Obstacle(name, f"{_kind(t, name)} {_dtypes.of_torch(t.dtype)}{shape}")
        uncoalesced = name == "sparse" and t.layout is torch.sparse_coo and not t.is_coalesced()
        raise obstacle.cured("Convert x.to_dense(), or x.coalesce().values().") if uncoalesced else obstacle


def _kind(t: Tensor, name: str) -> str:
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return type(t).__name__
    if name == "sparse":
        name = str(t.layout).removeprefix("torch.")
    return "torch" if name in ("", "fake mode") else f"torch {name}"


def _subclass_obstacle(t: Tensor) -> str:
    for module, attribute, name in (
        ("torch._subclasses.fake_tensor", "FakeTensor", "fake"),
        ("torch._subclasses.functional_tensor", "FunctionalTensor", "functional"),
        ("torch.distributed.tensor", "DTensor", "distributed"),
        ("torch.masked.maskedtensor.core", "MaskedTensor", "masked tensor"),
        ("torch.nn.parameter", "UninitializedTensorMixin", "uninitialized"),
    ):
        cls = getattr(sys.modules.get(module), attribute, None)
        if cls is not None and isinstance(t, cls):
            return name
    if t.is_nested:
        return "nested"
    return "intercepting" if intercepts(t) else ""


def intercepts(t: Tensor) -> bool:
    """Whether a subclass answers every operation itself, so that its memory need not be its value."""
    return type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def describe(t: Tensor, traits: Traits) -> ArrayInfo:
    if type(t) not in EXACT:
        with _itself():
            return _described(t, traits)
    return _described(t, traits)


def _described(t: Tensor, traits: Traits) -> ArrayInfo:
    itemsize = t.element_size()
    shape, node, device = tuple(t.shape), t.grad_fn, traits.device
    stored = _has_storage(t)  # what torch computes when it is asked for (torch_xla's) has none
    return ArrayInfo(
        "torch",
        device,
        traits.dtype,
        shape,
        tuple(s * itemsize for s in t.stride()),
        t.numel() * itemsize,
        order_text(traits.order, traits.spacing),
        traits.writable,
        t.requires_grad,
        None if node is None else type(node).__name__,
        traits.lazy,
        traits.pinned,
        _streams.current("torch", device.index) if device.is_cuda else None,
        t.data_ptr() if stored else 0,
        traits.overlap,
        0 if device.has_addresses or not stored else t.untyped_storage().data_ptr(),
    )


performer, counted, borrowed = _torch_steps.performer, _torch_steps.counted, _torch_steps.borrowed
imported, plain_from_cupy = _torch_cuda.imported, _torch_cuda.plain_from_cupy

# -- What the fast lanes ask for


IN_NUMPY, modes = _torch_steps.IN_NUMPY, _modes
stacked, stacked_in_pieces = _torch_steps.stacked, _torch_steps.stacked_in_pieces
COMMON, HOST = torch.float32, frozenset({"cpu", torch.device("cpu")})
PLAIN = frozenset(dtype for name, dtype in DTYPES.items() if _dtypes.crosses_plainly(name))
# Not the complex ones, whose alignment has to be asked.
PLAIN_NUMPY = frozenset(_dtypes.DTYPES[NAMES[dtype]].numpy for dtype in PLAIN if not dtype.is_complex)
from_numpy, increment_version = torch.from_numpy, torch.autograd.graph.increment_version


def in_place(t: Tensor, *, small: bool = True) -> Any:
    """A NumPy view, for as long as `t` is held, of a tensor whose elements certainly lie, all of them, as they are and
    each alone, in memory on the host: in C's order, or `small` ones however they lie. None where these few questions do
    not tell.
    """
    if _raw(_keys(t)) & _ASKED != _HOST or _modes() or forward_ad._current_level >= 0:
        return None
    try:
        if t.is_contiguous():
            if t.storage_offset() * t.element_size() + t.nbytes > t.untyped_storage().nbytes():
                return None
            return np.ndarray(t.shape, _torch_steps.IN_NUMPY[t.dtype], _numpy.bytes_at(t.data_ptr()))
        if not small or t.nbytes >= SMALL:
            return None
        shape, steps, itemsize = t.shape, t.stride(), t.element_size()
        strides = tuple([s * itemsize for s in steps])
        held = (t.storage_offset() + _span(shape, steps)) * itemsize <= t.untyped_storage().nbytes()
        if not held or layout(shape, strides, itemsize).overlap:
            return None
        return np.ndarray(shape, _torch_steps.IN_NUMPY[t.dtype], _numpy.bytes_at(t.data_ptr()), 0, strides)
    except (ValueError, OverflowError):  # more axes than NumPy has, or a stride that no int64 holds in bytes
        return None


dense: Callable[[Tensor], Any] = partial(in_place, small=False)
