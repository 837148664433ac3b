"""The rules of the judgement, one by one: one `if`, one step, one reason. `_plan` has the order of asking.

A rule looks at `steps.now`, the array that the steps so far have made of the source, and adds what it has to. A step
that moves bytes has a kind ("h2h", "h2d", "d2h", "d2d") and says why. Pure: imports no framework.
"""

from __future__ import annotations

from typing import Any

from tensorbridge import _dtypes, _engine, _refuse, _roads
from tensorbridge._array import CPU, ON_A_TENSOR, Device, Traits
from tensorbridge._refuse import CALLED
from tensorbridge._step import COLUMNS, EXPORTED, IN_PLACE, MOVING, PROTOCOLS, Here, Op, Step, Want

OF_OUT = ("order", "spacing", "loose", "aligned", "lazy")  # what filling leaves as it is


class Steps(list[Step]):
    """The steps so far, and the array that they have made of the source: `now`."""

    def __init__(self, traits: Traits) -> None:
        self.giver, self.now = traits.framework, traits
        self.fresh = False  # the memory is nobody else's
        self.frozen = not traits.writable  # its owner does not offer it for writing, whatever the array at hand can say

    def then(self, op: str, why: str, *, by: str = "", cure: str = "", **changes: Any) -> None:
        before, after = self.now, self.now._replace(**changes)
        kind = ""
        if op in MOVING:
            self.fresh = True
            if op != Op.EXPORT:  # its layout is the producer's choice
                after = after._replace(
                    spacing="dense", overlap=False, loose=False, aligned=True, writable=True, lazy="", origin="",
                    pinned=changes.get("pinned"),
                )  # fmt: skip
            if op == Op.FILL:
                after = after._replace(**{field: changes[field] for field in OF_OUT})
            if before.size != "empty":
                kind = _side(before) + "2" + _side(after)
        self.append(Step(op, why, 0, kind, after, by, cure))
        self.now = after


def _side(traits: Traits) -> str:
    return "h" if traits.device == CPU else "d"


def make_array(steps: Steps, want: Want, here: Here) -> None:
    """What is not an array yet becomes one."""
    traits, then = steps.now, steps.then
    if traits.framework.endswith(" list"):
        holder = traits.framework.removesuffix(" list")
        native = traits.dtype.lstrip(">")
        why = f"the list becomes one array, by {holder}{traits.origin}"
        then(Op.STACK, why, framework=holder, by=holder, dtype=native)
    if traits.framework in COLUMNS:
        then(Op.STACK, traits.origin, framework="numpy", by="numpy")
    if traits.framework == "python scalar":
        native = want.dtype if want.dtype and _dtypes.can_cast("numpy", traits.dtype, want.dtype) else traits.dtype
        then(Op.WRAP, "a scalar becomes a 0-d array", framework="numpy", dtype=native)
        steps.fresh = True
    if traits.framework in PROTOCOLS:
        reader = _refuse.holder(traits, want, here)
        can_say = traits.writable or reader != "numpy"  # torch and CuPy arrays have no read-only flag
        if traits.origin in EXPORTED:
            then(Op.EXPORT, EXPORTED[traits.origin], framework=reader, writable=can_say, origin="")
            steps.fresh = traits.writable and not traits.overlap
        else:
            then(Op.IMPORT, _IMPORT_WHY[traits.framework], framework=reader, writable=can_say)


def leave_graph(steps: Steps, want: Want, dtype: str) -> None:
    now, then = steps.now, steps.then
    if now.graph and want.framework != "torch":
        why = f"a {CALLED[want.framework]} array has no place for the autograd graph"
        then(Op.DETACH, why + "{grad_fn}", graph=False)
    elif now.graph and want.detach:
        then(Op.DETACH, "detach=True{grad_fn}", graph=False)
    elif now.graph and not _dtypes.is_differentiable(dtype):
        then(Op.DETACH, f"{dtype} has no gradients, so it ends the autograd graph{{grad_fn}}", graph=False)
    elif want.framework != "torch" and now.framework == "torch" and now.device != CPU:
        then(Op.DETACH, "an alias is shared, so that set_ and .data of the tensor cannot free the memory")


def make_native(steps: Steps, want: Want, here: Here, wanted: str, crossing: bool) -> None:
    """A cast on the side where fewer bytes cross, or on the one that knows it; native byte order."""
    giver, receiver, source = steps.now.framework, want.framework, steps.now.dtype.lstrip(">")
    if source != wanted and _dtypes.can_cast(giver, source, wanted):
        narrow = narrows(steps.now, wanted)
        late = (crossing and not narrow) or _is_cast_shared(steps.now, receiver, wanted, here)
        if not (late and _dtypes.can_cast(receiver, source, wanted)):
            if late and leaves(steps.now, CPU) and steps.now.device.is_other:
                to_host(steps, want)  # where torch has all dtypes
            said = _bus_said("before", source, wanted) if crossing and narrow else ""
            copy(steps, Op.CAST, f"dtype={wanted} was asked for{said}", here, dtype=wanted, cure=f"keep {source}")
    if steps.now.dtype.startswith(">") and (receiver != "numpy" or want.dtype):
        why = f"{receiver} has native byte order only" if receiver != "numpy" else f"dtype={wanted} is native"
        cure = "swap once where the data is read: x.astype(x.dtype.newbyteorder('='))"
        steps.then(Op.BYTESWAP, why, dtype=source, cure=cure)


def narrows(now: Traits, wanted: str) -> bool:
    """Whether a cast comes before the bus: fewer bytes cross. A device that only torch knows need not have every dtype,
    so that there a cast has to gain something (int64 to float64, which Apple's GPU has not, gains nothing), and is of
    no dtype that few devices have.
    """
    saved = _dtypes.itemsize(now.dtype) - _dtypes.itemsize(wanted)
    if now.device.is_other:
        return saved > 0 and not wanted.startswith(("float8", "float4"))
    return saved >= 0


def _is_cast_shared(now: Traits, receiver: str, wanted: str, here: Here) -> bool:
    """Whether torch casts what it is to receive: it shares the array first, and makes a tensor at once."""
    if (now.framework, receiver) != ("numpy", "torch") or not torch_holds(now) or is_alias(now, receiver):
        return False
    return _engine.kernel(now, wanted, now.order, here).by == "torch"


def cast_late(steps: Steps, wanted: str, source: str, here: Here, *, bus: str) -> None:
    """A cast on the receiving side, "before" the bus, "after" it, or where there is none."""
    said = _bus_said(bus, source, wanted) if bus else _engine.kernel(steps.now, wanted, steps.now.order, here).said
    why = f"dtype={wanted} was asked for{said}"
    copy(steps, Op.CAST, why, here, dtype=wanted, cure=f"keep {source}")


def _bus_said(side: str, source: str, wanted: str) -> str:
    """Where a cast stands beside the bus, and that fewer bytes cross, where they do."""
    saved = _dtypes.itemsize(source) - _dtypes.itemsize(wanted)
    fewer = saved > 0 if side == "before" else saved < 0
    return f", {side} the bus{': fewer bytes cross' * fewer}"


def resolve(steps: Steps) -> None:
    steps.then(Op.RESOLVE, f"the {_LAZY[steps.now.lazy]} is only a mark on the tensor: its bytes say otherwise")


def share_on_host(steps: Steps) -> None:
    """A tensor on the host, seen as a NumPy array."""
    steps.then(Op.SHARE, share_why("torch", "numpy"), framework="numpy", origin="tensor", pinned=None)


def keep_promises(steps: Steps, want: Want, here: Here, guarded: bool, source: str) -> None:
    """A copy, where one was asked for, or where the receiver could write what must not be written."""
    now, receiver = steps.now, want.framework
    frozen = _why_frozen(steps, guarded)
    on_your_word = guarded and now.writable and not now.overlap
    as_given = now.origin == "tensor" and is_alias(now, receiver)  # the tensor behind it is out there already
    if want.copy:
        copy(steps, Op.COPY, "copy=True: fresh memory", here)
    elif here.compiled and "numpy" in (now.framework, receiver):
        why = "compiled code takes an array for a tensor of its own, and may write to it unseen"
        copy(steps, Op.COPY, why, here, cure="convert in a function marked torch.compiler.disable")
    elif frozen and receiver == "numpy" and want.writable and not on_your_word:
        copy(steps, Op.COPY, f"writable=True, and {frozen}", here, cure="take a read-only view with writable=None")
    elif frozen and receiver not in ("numpy", source) and not (as_given or want.share_readonly):
        promise = f"{frozen}: {CALLED[receiver]} cannot keep that promise"
        copy(steps, Op.COPY, promise, here, cure=_cure_readonly(now))


def copy(steps: Steps, op: str, why: str, here: Here, *, cure: str = "", **changes: Any) -> None:
    """A copy on the giving side, by the kernel that is best at it."""
    now = steps.now
    choice = _engine.Kernel(now.framework)
    if now.device == CPU and not now.graph:
        dtype = changes.get("dtype", now.dtype)
        if now.framework == "numpy" and torch_holds(now) and _dtypes.exists_in(dtype, "torch"):
            choice = _engine.kernel(now, dtype, now.order, here)
        elif now.framework == "torch" and _engine.numpy_may_copy(now, dtype):
            choice = _engine.of_tensor(now, dtype, now.order, here)
    steps.then(op, why + choice.said, by=choice.by, cure=cure, **changes)


def to_device(steps: Steps, receiver: str, where: Device, pinned: bool, cure: str = "") -> None:
    """One block over the bus, or to another device; torch packs a peer copy and a graph's on its own."""
    if steps.now.spacing != "dense" and (steps.now.device == CPU or receiver == "cupy") and not steps.now.graph:
        by_numpy = _engine.faults(steps.now) and _engine.numpy_may_copy(steps.now, steps.now.dtype)
        by = "numpy" if by_numpy else steps.now.framework
        steps.then(Op.PACK, "packed first, so that one block crosses the bus", by=by)
        pinned = False
    origin, road = steps.now.device, _roads.Road(_roads.PLAIN)
    if origin == CPU:
        road = _roads.up(steps.now, where, pinned=pinned)
    why = f"{'the host' if origin == CPU else origin} to {where}{road.why}"
    steps.then(Op.TO_DEVICE, why, by=road.by, cure=cure, framework=receiver, device=where, pinned=None)


def to_host(steps: Steps, want: Want, *, pinned: bool = False) -> None:
    """One block over the bus to the host, where every device can be reached from."""
    if steps.now.spacing != "dense":
        steps.then(Op.PACK, "packed on the device, so that one block crosses the bus")
    road, giver, device = _roads.down(steps.now, pinned=pinned), steps.now.framework, steps.now.device
    on_device = "to_torch or to_cupy" if device.is_cuda else "to_torch"
    cures = {"numpy": f"stay on the device with {on_device}", "torch": "leave device= out"}
    steps.then(
        Op.TO_HOST, f"{device} to the host{road.why}", by=road.by, cure=cures.get(want.framework, ""),
        framework="numpy" if giver == "cupy" else giver, device=CPU, pinned=road.by == _roads.PINNED or None,
    )  # fmt: skip


def leaves(now: Traits, where: Device) -> bool:
    """Whether a device is left for the host, or by way of the host: one kind of device does not reach another."""
    return now.device != CPU and now.device.type != where.type


def target_device(traits: Traits, want: Want) -> Device:
    if want.framework == "numpy":
        return CPU
    if want.device is not None:
        return want.device
    return traits.device if want.framework == "torch" or traits.device.is_cuda else Device("cuda:0")


def make_holdable(steps: Steps) -> None:
    """Layouts that torch refuses are packed, once."""
    now, then = steps.now, steps.then
    if now.spacing == "reversed":
        frozen = "" if now.writable else ", share_readonly=True"
        cure = f"share x, the argument, as it lies, values in opposite order: to_torch({{reversed}}{frozen})"
        then(Op.PACK, "torch has no negative strides", cure=cure)
    elif now.spacing == "odd":
        then(Op.PACK, "torch strides are whole elements", cure="keep the column in an array of its own")
    elif not now.aligned:
        then(Op.PACK, "torch's kernels want aligned elements", cure="start the buffer at a multiple of the item size")
    elif now.loose:
        then(Op.RESTRIDE, "strides of axes of length 1 mean nothing, and torch refuses them", loose=False)


def _why_frozen(steps: Steps, guarded: bool) -> str:
    """Why this memory must not be written through the result, if so."""
    if steps.frozen:
        return "the memory map is read-only" if steps.now.origin == "memmap" else "the source is read-only"
    if steps.now.overlap:
        return "one write would change many elements of an overlapping array"
    if guarded:
        return "the tensor requires grad, and a write would change what backward needs without an error"
    return ""


def is_alias(now: Traits, receiver: str) -> bool:
    """A NumPy view of a tensor goes back to torch as an alias of that tensor, with its version counter."""
    held = now.spacing in ("dense", "strided") and _dtypes.exists_in(now.dtype, "torch")
    return now.framework == "numpy" and now.origin in ON_A_TENSOR and receiver == "torch" and held


def share(steps: Steps, receiver: str, here: Here) -> None:
    order(steps, receiver, here)
    now, then = steps.now, steps.then
    if now.framework == receiver:
        then(Op.SHARE, f"the same {'tensor' if receiver == 'torch' else 'array'}")
    elif is_alias(now, receiver):
        then(Op.SHARE, "an alias of the tensor behind the array", framework="torch", origin="", loose=False)
    else:
        origin = "tensor" if receiver == "numpy" else ""
        writable = now.writable or receiver != "torch"  # a tensor is known to be read-only; an array is made so last
        why = share_why(now.framework, receiver)
        captured = here.capturing and now.device != CPU
        why += "; nothing is recorded while a graph is captured" if captured else ""
        by = _roads.CAPTURED if captured else ""
        then(Op.SHARE, why, by=by, framework=receiver, origin=origin, loose=False, writable=writable)


def order(steps: Steps, receiver: str, here: Here) -> None:
    giver = steps.now.framework
    if giver != receiver and steps.now.device != CPU and not here.same_stream:
        steps.then(Op.ORDER, f"{receiver}'s stream waits for {giver}'s, by an event; the host does not")


def order_back(steps: Steps) -> None:
    """What is copied of lent memory is read before the giver's stream goes on: it may write there next."""
    ordered = next((i for i, step in enumerate(steps) if step.op == Op.ORDER), len(steps))
    if any(step.kind for step in steps[ordered:]):
        why = f"{steps[ordered].why}; and back, when the copy has been made"
        steps[ordered] = steps[ordered]._replace(by=_roads.BOTH_WAYS, why=why)
    foreign = bool(steps) and steps[0].op == Op.IMPORT and steps[0].after.device.is_cuda
    kinds = {step.kind for step in steps} - {""}
    if foreign and kinds and "d2h" not in kinds:  # what comes to the host has been waited for
        steps[0] = steps[0]._replace(by=_roads.BOTH_WAYS)


def protect(steps: Steps, want: Want, guarded: bool) -> None:
    frozen = "" if steps.fresh else _why_frozen(steps, guarded)
    if not steps.now.writable:
        return
    own = steps.giver.startswith("torch") and want.out is None  # else the array may be the caller's
    by, origin = (IN_PLACE, steps.now.origin) if own else ("", narrowed(steps.now))
    if want.writable is False:
        steps.then(Op.PROTECT, "writable=False: a read-only view", by=by, writable=False, origin=origin)
    elif want.writable is None and frozen:
        steps.then(Op.PROTECT, f"a read-only view: {frozen}", by=by, writable=False, origin=origin)
    elif frozen and guarded:
        word = "; writable on your word, and autograd does not see a write (tensorbridge.editing tells it)"
        steps[-1] = steps[-1]._replace(why=steps[-1].why + word)


def narrowed(now: Traits) -> str:
    """The origin of a read-only view of an array that may be the caller's own."""
    return "narrowed" if now.origin == "tensor" else now.origin


def numpy_fills(now: Traits, out: Traits) -> bool:
    """Whether NumPy can write these elements into `out`, whatever the layout of both."""
    name, wanted = now.dtype.lstrip(">"), out.dtype.lstrip(">")
    if now.device != CPU or out.device != CPU or now.lazy or out.lazy or now.graph:
        return False
    return _dtypes.exists_in(name, "numpy") and (name == wanted or _dtypes.can_cast("numpy", name, wanted))


def filling(now: Traits, out: Traits, receiver: str, here: Here) -> _engine.Kernel:
    """Whose kernel writes into `out`: where the engine has the choice, the one that a fresh copy would get."""
    if ("numpy" not in (now.framework, receiver) and not _engine.faults(now)) or not numpy_fills(now, out):
        return _engine.Kernel("torch" if "torch" in (now.framework, receiver) else receiver)
    holds = now.framework == "torch" or (torch_holds(now) and (receiver == "torch" or torch_holds(out)))
    return _engine.into(now, out, here) if holds else _engine.NUMPY


def make_fillable(steps: Steps, filler: str, out: Traits) -> None:
    """What the framework that fills `out` cannot do itself is done before: real values, elements that it knows."""
    name, wanted = steps.now.dtype.lstrip(">"), out.dtype.lstrip(">")
    if not _dtypes.exists_in(name, filler) or (name != wanted and not _dtypes.can_cast(filler, name, wanted)):
        steps.then(Op.CAST, f"{CALLED[filler]} cannot make {wanted} of {name}", dtype=wanted)
    if steps.now.lazy and filler != "torch":
        resolve(steps)


def torch_holds(traits: Traits) -> bool:
    """Whether torch can view a NumPy array of this kind as it is."""
    return (
        traits.spacing in ("dense", "strided")
        and traits.aligned
        and not traits.loose
        and not traits.dtype.startswith(">")
        and _dtypes.exists_in(traits.dtype, "torch")
    )


_LAZY = {"conj": "conjugate", "neg": "negative", "conj neg": "conjugate and negative", "zero": "zero"}


_IMPORT_WHY = {
    "dlpack": "__dlpack__: the producer's memory",
    "cuda_array_interface": "__cuda_array_interface__: the producer's memory",
    "array_interface": "__array_interface__: the producer's memory",
    "buffer": "the buffer protocol: the exporter's memory, held until released",
    "__array__": "__array__(): the object decides whether this is its memory or a copy",
}


def share_why(giver: str, receiver: str) -> str:
    ways = {
        ("numpy", "torch"): "torch.from_numpy: the same memory",
        ("torch", "numpy"): "Tensor.numpy of an alias: the same memory",
        ("torch", "cupy"): "CuPy array at the tensor's address: the same memory",
        ("cupy", "torch"): "DLPack: the same memory",
    }
    return ways[giver, receiver]


def _cure_readonly(now: Traits) -> str:
    if now.origin == "memmap":
        return 'open the file with mode="c" (np.load: mmap_mode="c"): writable pages, at no cost'
    return "share_readonly=True if nothing will write to the result"
