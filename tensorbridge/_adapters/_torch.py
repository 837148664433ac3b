"""torch: detaches, resolves lazy bits, moves between devices; holds no reversed, read-only or byte-swapped memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensorbridge import _dtypes, _engine, _streams
from tensorbridge._adapters import _numpy, _torch_cuda
from tensorbridge._array import CPU, ArrayInfo, Device, Layout, Traits, layout, order_text, shape_text, size_class
from tensorbridge._refuse import Obstacle
from tensorbridge._step import Op, Step, Want, bytes_text

DENSE = Layout()
_functorch: Any = torch._C._functorch
_modes, _FAKE = torch._C._len_torch_dispatch_stack, torch._C._TorchDispatchModeKey.FAKE
_devices: dict[torch.device, Device] = {}
_DTYPE: dict[str, Any] = {
    name: getattr(torch, row.torch) for name, row in _dtypes.DTYPES.items() if row.torch and hasattr(torch, row.torch)
}
_NAME: dict[torch.dtype, str] = {dtype: name for name, dtype in _DTYPE.items()}
_CARRIER: dict[str, Any] = {
    name: getattr(torch, _dtypes.DTYPES[name].carrier) for name in _DTYPE if _dtypes.DTYPES[name].carrier
}


def open(t: Tensor, want: Want) -> tuple[Tensor, Traits]:
    plain = is_plain(t)
    if not plain and _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.unwrap_if_dead(t)  # it outlived its transform: what is left is a plain tensor
    return t, _traits(t, plain, ask_pinned=_crosses_bus(t, want))


def _crosses_bus(t: Tensor, want: Want) -> bool:
    target = CPU if want.framework == "numpy" else want.device
    return want.pin_memory or (target is not None and t.is_cpu != (target == CPU))


# The keys by which torch dispatches tell at once what `refuse` asks for one by one (functorch's, functional, sparse,
# nested, quantized, mkldnn, meta), and lazy bits. Beside the one of plain memory on the host, these mean nothing here.
_keys, _Key, _Keys = torch._C._dispatch_keys, torch._C.DispatchKey, torch._C.DispatchKeySet
_HOST: int = _Keys(_Key.CPU).raw_repr()
_ASKED = ~sum(_Keys(key).raw_repr() & ~_HOST for key in (_Key.ADInplaceOrView, _Key.AutogradCPU, _Key.AutocastCPU))
EXACT = frozenset({torch.Tensor, torch.nn.Parameter})


def is_plain(t: Tensor) -> bool:
    """Whether this tensor certainly lies on the host, its values in its bytes, and only its dtype can be in the way."""
    return _keys(t).raw_repr() & _ASKED == _HOST and type(t) in EXACT and not _modes()


def kind(t: Tensor) -> Traits | None:
    """The traits of a plain tensor on the host, where they are quickly told."""
    try:
        return _traits(t, True, ask_pinned=False) if t.dtype in _NAME and is_plain(t) else None
    except Obstacle:
        return None


def _traits(t: Tensor, plain: bool, *, ask_pinned: bool) -> Traits:
    name, device, lazy = _NAME.get(t.dtype), CPU, ""
    if not plain or name is None:
        refuse(t)
        name, device = _NAME[t.dtype], device_of(t)
        lazy = "zero" if t._is_zerotensor() else " ".join(["conj"] * t.is_conj() + ["neg"] * t.is_neg())
    itemsize, count, dense = t.element_size(), t.numel(), t.is_contiguous()
    lay = DENSE if dense else layout(tuple(t.shape), tuple([s * itemsize for s in t.stride()]), itemsize)
    if count:
        _check_storage(t, count if dense else _span(t), itemsize)
    return _of_kind(
        device,
        name,
        lay,
        not count or t.data_ptr() % itemsize == 0,
        t.requires_grad or (forward_ad._current_level >= 0 and _has_tangent(t)),
        lazy,
        device == CPU and not _streams.forked() and t.is_pinned() if ask_pinned else None,
        size_class(count * itemsize, t.dim()),
    )


@lru_cache(maxsize=1024)
def _of_kind(
    device: Device, name: str, lay: Layout, aligned: bool, graph: bool, lazy: str, pinned: bool | None, size: str
) -> Traits:
    order, spacing, overlap, _ = lay
    return Traits("torch", device, name, order, spacing, overlap, False, aligned, True, graph, lazy, pinned, size)


_FACTS = [attrgetter(name) for name in ("dtype", "shape", "requires_grad")]


def like(first: Tensor) -> Callable[[Sequence[Tensor]], bool] | None:
    """A test for tensors that are certainly of the kind and shape of one that was opened; none if that is not plain."""
    plain, count, itemsize = [{first.dtype}, {first.shape}, {False}], first.numel(), first.element_size()

    def alike(ts: Sequence[Tensor]) -> bool:
        if set(map(type, ts)) != {Tensor} or [set(map(fact, ts)) for fact in _FACTS] != plain:
            return False
        if {raw & _ASKED for raw in set(map(_Keys.raw_repr, map(_keys, ts)))} != {_HOST}:
            return False
        ends = [(t.storage_offset() + count) * itemsize <= t.untyped_storage().nbytes() for t in ts]
        return all(ends) and all(map(Tensor.is_contiguous, ts))

    return alike if forward_ad._current_level < 0 and alike([first]) else None


def _span(t: Tensor) -> int:
    """How many elements lie between the first and the last, both included."""
    return 1 + sum([(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)])


def _check_storage(t: Tensor, span: int, itemsize: int) -> None:
    """A tensor may claim more than it has, and torch reads on: a failed `resize_` has set the shape already."""
    needs, holds = int(t.storage_offset() + span) * itemsize, int(t.untyped_storage().nbytes())
    if needs > holds and not t._is_zerotensor():
        raise Obstacle(
            "short storage",
            f"{_kind(t, '')} {_NAME[t.dtype]} {shape_text(tuple(t.shape))}",
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
        if device.type not in ("cpu", "cuda"):
            raise Obstacle(
                "elsewhere", f"{_kind(t, '')} {_dtypes.of_torch(t.dtype)} {shape_text(tuple(t.shape))} on {device}"
            )
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
        elif _modes() and torch._C._get_dispatch_mode(_FAKE) is not None:
            name = "fake mode"
        elif t.dtype not in _NAME:
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
    dispatch = type(t).__torch_dispatch__
    return "" if dispatch is torch._C._disabled_torch_dispatch_impl else "intercepting"


def describe(t: Tensor, traits: Traits) -> ArrayInfo:
    itemsize = t.element_size()
    shape, node = tuple(t.shape), t.grad_fn
    return ArrayInfo(
        "torch",
        traits.device,
        traits.dtype,
        shape,
        tuple(s * itemsize for s in t.stride()),
        t.numel() * itemsize,
        order_text(traits.order, traits.spacing),
        True,
        t.requires_grad,
        None if node is None else type(node).__name__,
        traits.lazy,
        traits.pinned,
        _streams.current("torch", traits.device.index) if traits.device.type == "cuda" else None,
        t.data_ptr(),
        traits.overlap,
    )


def performer(step: Step, before: Traits, want: Want) -> Callable[[Any], Any]:
    op, after = step.op, step.after
    packed = torch.contiguous_format if before.overlap else torch.preserve_format
    if op == Op.SHARE:
        if before.framework == "torch" and after.framework == "numpy":
            return _to_numpy(before.dtype)
        if before.framework == "numpy":
            return _alias if before.origin == "tensor" else _from_numpy(before)
        return _torch_cuda.from_cupy(before) if before.framework == "cupy" else _same
    if op == Op.FILL:
        return _filler(before, step, want)
    if op in (Op.CAST, Op.COPY) and before.framework == "numpy":
        return _array_copied(before, after)
    if op in (Op.CAST, Op.COPY) and before.device == CPU and _engine.wants_numpy_pages(before, after.dtype):
        return _into_numpy_pages(before, after, step.by)
    if op == Op.CAST:
        dtype = _DTYPE[after.dtype]
        return lambda t: t.to(dtype, memory_format=packed)
    if op in (Op.COPY, Op.PACK):
        return lambda t: t.clone(memory_format=packed)
    if op == Op.TO_DEVICE:
        return _torch_cuda.to_device(before, step, want)
    if op == Op.TO_HOST:
        return _torch_cuda.to_host(before, step)
    if op == Op.ORDER:
        return _torch_cuda.ordered(before)
    if op == Op.STACK:
        return lambda parts: parts.stacked(torch.stack)
    return {
        Op.DETACH: lambda t: t.detach(),
        Op.RESOLVE: lambda t: t.clone() if before.lazy == "zero" else t.resolve_conj().resolve_neg(),
        Op.PIN: lambda t: torch.empty_like(t, pin_memory=True).copy_(t),  # pin_memory() returns a pinned one as it is
    }[op]


def _same(t: Tensor) -> Tensor:
    return t


def _to_numpy(name: str) -> Callable[[Tensor], Any]:
    """`Tensor.numpy` views an alias, whose storage then refuses to be resized: the view cannot dangle."""
    carrier, dtype = _CARRIER.get(name), _dtypes.DTYPES[name].numpy
    if carrier is None:
        return lambda t: t.numpy()
    return lambda t: t.view(carrier).numpy().view(dtype)


def _from_numpy(before: Traits) -> Callable[[Any], Tensor]:
    dtype = _DTYPE[before.dtype]
    row = _dtypes.DTYPES[before.dtype]
    plain = np.dtype(row.carrier) if row.carrier else row.numpy
    own = not row.carrier

    def share(a: Any) -> Tensor:
        if not before.writable:
            a = _numpy.writable_view(a)
        if a.dtype.char != plain.char:  # type: ignore[union-attr]
            a = a.view(plain)
        t = torch.from_numpy(a)
        return t if own else t.view(dtype)

    return share


def _alias(a: Any) -> Tensor:
    """The tensor behind a NumPy view of it: the same memory and the same version counter."""
    base: Tensor = _numpy.owner_of(a)
    dtype = _DTYPE[_dtypes.of_numpy(a.dtype)]
    if base.dtype != dtype:
        base = base.view(dtype) if base.element_size() == a.itemsize else _reread(base, dtype)
    itemsize = a.itemsize
    offset = (a.__array_interface__["data"][0] - base.untyped_storage().data_ptr()) // itemsize
    # A length-1 axis may carry any stride; as_strided wants none that is negative.
    strides = tuple(max(s, 0) // itemsize for s in a.strides)
    if (a.shape, strides, offset) == (base.shape, base.stride(), base.storage_offset()) and not base.requires_grad:
        return base.detach()
    return base.as_strided(a.shape, strides, offset)


def _reread(t: Tensor, dtype: torch.dtype) -> Tensor:
    """All of the storage as elements of another width, by views, which share the version counter."""
    flat = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).view(torch.uint8)
    return flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _array_copied(before: Traits, after: Traits) -> Callable[[Any], Any]:
    """A NumPy array copied by torch's kernel into memory that NumPy allocates."""
    share, view = _from_numpy(before), _from_numpy(after)
    dtype = _dtypes.DTYPES[after.dtype].numpy
    order: Any = "C" if before.overlap else "K"

    def copy(a: Any) -> Any:
        fresh = np.empty_like(a, dtype=dtype, order=order, subok=False)
        view(fresh).copy_(share(a))
        return fresh

    return copy


def _into_numpy_pages(before: Traits, after: Traits, by: str) -> Callable[[Tensor], Tensor]:
    """A tensor copied into memory that NumPy allocates, in huge pages where torch would take small ones."""
    view = _from_numpy(after._replace(framework="numpy"))
    own: Any = _dtypes.DTYPES[before.dtype].numpy
    carrier, dtype = _CARRIER.get(before.dtype), _dtypes.DTYPES[after.dtype].numpy
    order: Any = "C" if before.overlap else "K"

    def copy(t: Tensor) -> Tensor:
        # By DLPack: Tensor.numpy would make the storage of the source refuse to be resized for good.
        source = np.from_dlpack(t.detach() if carrier is None else t.view(carrier)).view(own)
        fresh = np.empty_like(source, dtype=dtype, order=order)
        if by == "numpy":
            np.copyto(fresh, source, casting="unsafe")
            return view(fresh)
        return view(fresh).copy_(t)

    return copy


def counted(fill: Callable[..., Any]) -> Callable[..., Any]:
    """Fill a NumPy view of a tensor, and let autograd know."""

    def filled(x: Any, out: Any) -> Any:
        result = fill(x, out)
        torch.autograd.graph.increment_version(_numpy.owner_of(out))
        return result

    return filled


def _filler(before: Traits, step: Step, want: Want) -> Callable[..., Any]:
    """Write into `out`, on whichever side it is."""
    if step.by == "numpy":

        def by_numpy(x: Any, out: Any) -> Any:
            np.copyto(borrowed(out), borrowed(x), casting="unsafe")
            if want.framework == "torch":
                torch.autograd.graph.increment_version(out)  # NumPy's writes are not seen by autograd
            return out

        return by_numpy
    share = _from_numpy(before) if before.framework == "numpy" else _same
    fill: Any = _torch_cuda.filler(before, want) or Tensor.copy_
    if want.framework == "numpy":
        assert want.out is not None
        view = _from_numpy(want.out)

        def into_numpy(x: Any, out: Any) -> Any:
            fill(view(out), share(x))
            return out

        return into_numpy

    def into_torch(x: Any, out: Tensor) -> Tensor:
        fill(out, share(x))
        return out

    return into_torch


def borrowed(t: Any) -> Any:
    """A NumPy view for the moment: `Tensor.numpy` would make the storage refuse to be resized for good."""
    if not isinstance(t, Tensor):
        return t
    row, itemsize = _dtypes.DTYPES[_NAME[t.dtype]], t.element_size()
    if not t.numel():
        return np.empty(tuple(t.shape), row.numpy)
    strides = tuple(s * itemsize for s in t.stride())
    carrier = np.dtype(row.carrier or row.numpy)
    return np.asarray(_numpy.Memory(t.data_ptr(), tuple(t.shape), strides, carrier.str, False, t)).view(row.numpy)


imported, plain_from_cupy = _torch_cuda.imported, _torch_cuda.plain_from_cupy

# -- What the fast lanes ask for


COMMON, DTYPES, HOST = torch.float32, _DTYPE, frozenset({"cpu", torch.device("cpu")})
PLAIN = frozenset(dtype for name, dtype in _DTYPE.items() if _dtypes.crosses_plainly(name))
# Not the complex ones, whose alignment has to be asked.
PLAIN_NUMPY = frozenset(_dtypes.DTYPES[_NAME[dtype]].numpy for dtype in PLAIN if not dtype.is_complex)
from_numpy, increment_version = torch.from_numpy, torch.autograd.graph.increment_version
