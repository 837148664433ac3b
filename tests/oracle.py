"""What must come out of a conversion, said from the frameworks' rules and not from the planner's.

Sources: the docstrings of `to_numpy`, `to_torch` and `to_cupy`, and what NumPy, PyTorch and CuPy document about the
memory that their arrays can stand on:

* `torch.from_numpy`: no negative strides, strides of whole elements, native byte order, no read-only flag to keep.
* `cupy.ndarray`: device memory, any strides, native byte order, no read-only flag to keep.
* `numpy.ndarray`: host memory, anything that has a dtype.
* DLPack: a capsule may say that its memory is a copy made for this call (DLPACK_FLAG_BITMASK_IS_COPIED). NumPy's
  `__array__`: a `ValueError` for copy=False says that only a copy can be had. Memory that nothing else refers to was
  made for this call. Such memory is nobody else's, and has cost one pass before anything is done with it.

The oracle does not know steps. It says which errors are right, whether the result stands on the memory of the source,
how often the bus is crossed and with how wide elements, between how many passes over the data are needed, and what the
result is. A range of passes stands where a framework may fold two into one call.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from tensorbridge import (
    CopyRequiredError,
    Device,
    DeviceError,
    GraphError,
    Traits,
    UnsupportedArrayError,
)
from tensorbridge._step import Here, Want

CPU = Device("cpu")

# Which framework has which elements, and how wide they are: by the frameworks' own documentation of their dtypes.
COMMON = {
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16, "bfloat16": 2,
}  # fmt: skip
FLOAT8_SHARED = {f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
ML_DTYPES = FLOAT8_SHARED | {
    "bfloat16": 2, "float8_e3m4": 1, "float8_e4m3": 1, "float8_e4m3b11fnuz": 1, "float4_e2m1fn": 1, "float6_e2m3fn": 1,
    "float6_e3m2fn": 1, "int4": 1, "uint4": 1, "int2": 1, "uint2": 1, "complex32": 4,
}  # fmt: skip
ML_DTYPES = {name: width for name, width in ML_DTYPES.items() if hasattr(ml_dtypes, name)}  # the newest came in 0.6
LONG = {name: np.dtype(name).itemsize for name in ("longdouble", "clongdouble")}
TORCH_ONLY = {"complex32": 4, "float4_e2m1fn_x2": 1}
HAS = {
    "numpy": COMMON | ML_DTYPES | LONG,
    "torch": COMMON | FLOAT8_SHARED | TORCH_ONLY,
    "cupy": COMMON,
}
WIDTH = HAS["numpy"] | HAS["torch"]
COMPLEX = {"complex32", "complex64", "complex128", "clongdouble"}
# What Metal has no number for, and torch refuses on "mps" (pytorch/pytorch#79019).
LACKS = {"mps": {"float64", "complex128"}}
DIFFERENTIABLE = {name for name in HAS["torch"] if name.startswith(("float", "bfloat", "complex"))}

HOST_PROTOCOLS = {"dlpack", "array_interface", "buffer", "__array__"}


class Verdict(NamedTuple):
    errors: frozenset[type[Exception]]  # one of them must come; empty: the conversion works
    shares: bool = False  # the result stands on the source's memory
    passes: tuple[int, int] = (0, 0)  # times that all elements are written: at least, at most
    crossings: int = 0  # of the bus between host and device
    hops: int = 0  # from one CUDA device to another
    bus_width: int | None = None  # bytes an element while it crosses
    writable: bool = True
    dtypes: frozenset[str] = frozenset()  # of the result
    device: Device = CPU
    graph: bool = False
    pinned: bool = False  # page-locked, for sure
    ordered: bool | None = None  # an order between streams is made; None: not the oracle's business


def refused(*errors: type[Exception]) -> Verdict:
    return Verdict(frozenset(errors))


def expect(traits: Traits, want: Want, here: Here) -> Verdict:
    holder = holder_of(traits, want, here)
    source, native = traits.dtype.lstrip(">"), not traits.dtype.startswith(">")
    target = want.dtype or source
    where = place(traits, want)
    # torch copies between the host and any device, and between devices of one kind; CuPy has CUDA's alone.
    kinds = traits.device.type, where.type
    crossings = 0 if kinds[0] == kinds[1] else sum(kind != "cpu" for kind in kinds)
    crosses = bool(crossings)
    hops = not crosses and traits.device != where
    staying = want.framework == holder
    cast = target != source

    errors: set[type[Exception]] = set()
    is_list, is_scalar = traits.framework.endswith((" list", "column", "table")), traits.framework == "python scalar"
    if want.framework != "torch" and traits.graph and not want.detach:
        errors.add(GraphError)
    if not can_become(holder, source, want.framework, target):
        errors.add(UnsupportedArrayError)
    if want.framework == "torch" and target in LACKS.get(where.type, ()):
        errors.add(UnsupportedArrayError)
    if want.non_blocking and traits.device != CPU and where == CPU:
        errors.add(ValueError)
    if want.non_blocking and traits.device != where and not set(kinds) <= {"cpu", "cuda"}:
        errors.add(ValueError)  # such a device has no stream of ours on which the source could be kept
    if want.pin_memory and where != CPU:
        errors.add(ValueError)
    if here.forked and "cuda" in kinds:
        errors.add(DeviceError)

    if is_scalar and casts("numpy", source, target):
        source, cast = target, False  # a number is no memory yet: it becomes an element of the dtype asked for
    swapped = not native and (want.framework != "numpy" or want.dtype is not None)
    resolves = bool(traits.lazy) and want.framework != "torch"
    fits = staying or is_alias(traits) or layout_fits(traits, want.framework)
    # No kernel may touch such elements on a device: they are made whole before anything else. A caller's own are his.
    askew = traits.device != CPU and holder == "cupy" and (traits.spacing == "odd" or not traits.aligned)
    askew = askew and traits.framework != want.framework
    pins = want.pin_memory and traits.pinned is not True
    # A scalar is wrapped as fresh memory, which no step has to make again.
    exported = traits.origin in ("copied", "made")
    own = exported and traits.writable and not traits.overlap  # by the copy that the producer made
    fresh = want.copy is True and not is_list and not is_scalar and not own
    kept = (keeps_promises(traits, want, holder) and not is_strange(holder, want, here)) or is_scalar or is_list or own
    reasons = [cast, swapped, is_list, resolves, not fits, pins, fresh, not kept, want.out is not None, crosses, hops]
    reasons.append(askew)
    moves = any(reasons)
    # Apple's copies do not see that mark (pytorch#184403), so that it is made true there before anything is copied.
    unseen = moves and "neg" in traits.lazy and kinds[0] not in ("cpu", "cuda") and not resolves
    # torch's copy_ across CUDA's bus packs into a temporary, which is true by then, and marks it again (Copy.cu).
    twice = want.out is not None and traits.lazy not in ("", "zero") and "cuda" in kinds and crosses and not resolves
    if here.capturing and "cuda" in kinds and moves and traits.size != "empty":
        errors.add(DeviceError)
    switches = {holder, want.framework} == {"torch", "cupy"} and kinds == ("cuda", "cuda")
    if here.capturing and switches and not here.same_stream:
        errors.add(DeviceError)
    if here.capturing and traits.device != CPU and traits.framework in ("dlpack", "cuda_array_interface"):
        errors.add(DeviceError)  # nobody knows the stream of a foreign producer's work
    if not errors and want.copy is False and (moves or exported) and traits.size != "empty":
        errors.add(CopyRequiredError)
    if errors:
        return Verdict(frozenset(errors))

    low = high = int(moves)
    if crosses or hops:
        # A transfer neither casts nor swaps; layouts and lazy bits it may or may not settle on the way. Only torch's
        # copy_ into `out` may do all in one call.
        high += (cast or swapped) + is_list + resolves + (traits.spacing != "dense") + (not traits.aligned)
        high += traits.overlap + (swapped and cast) + pins + (want.out is not None) + (not kept)
        low, high = low + twice, high + twice
        low += (cast or swapped) and want.out is None
        low, high = low + (crossings > 1), high + (crossings > 1)
    elif want.out is not None or pins or (is_list and cast):
        high = min(1 + is_list + cast + swapped + resolves + (not fits), 2 + is_list)
    elif cast and not casts(holder, source, target):
        high += resolves or swapped or not fits  # what the receiver is to cast, it must be able to hold
    high += askew + unseen
    low, high = low + exported, high + exported
    shares = not moves and not is_scalar and not exported
    return Verdict(
        frozenset(),
        shares=shares,
        passes=(int(low), int(high)),
        crossings=crossings,
        hops=int(hops),
        bus_width=bus_width(traits.device, holder, source, want.framework, target) if crosses else None,
        writable=is_writable(traits, want, shares or not (moves or is_scalar or own)),
        dtypes=frozenset({target, traits.dtype} if want.framework == "numpy" and not want.dtype else {target}),
        device=where,
        graph=want.framework == "torch" and traits.graph and not want.detach and target in DIFFERENTIABLE,
        pinned=want.pin_memory,
        ordered=None if not switches else not here.same_stream,
    )  # fmt: skip


def holder_of(traits: Traits, want: Want, here: Here) -> str:
    """Who holds the memory. NumPy sees everybody's host memory; a device's is read by whoever is to have it.

    On a device torch cannot read negative or odd strides, nor memory marked read-only; CuPy can. Neither's kernels can
    read elements at odd addresses; CuPy can be shown them as bytes.
    """
    name = traits.framework.removesuffix(" list")
    if name in ("numpy", "torch", "cupy"):
        return name
    if traits.device == CPU:
        return "numpy"
    if traits.spacing in ("reversed", "odd") or not traits.writable or not traits.aligned:
        return "cupy"
    return here.gpu if want.framework == "numpy" else want.framework


def place(traits: Traits, want: Want) -> Device:
    if want.framework == "numpy":
        return CPU
    return want.device or traits.device


def can_become(holder: str, source: str, framework: str, target: str) -> bool:
    """Whether one side or the other has both dtypes, so that it can cast, and the receiver has the target."""
    if target not in HAS[framework]:
        return False
    if source in COMPLEX and target not in COMPLEX:  # both frameworks warn that the imaginary part is lost
        return False
    return source == target or casts(holder, source, target) or casts(framework, source, target)


def casts(framework: str, source: str, target: str) -> bool:
    if source not in HAS[framework] or target not in HAS[framework]:
        return False
    if framework == "torch":
        return "float4_e2m1fn_x2" not in (source, target)  # packed: torch stores it, and computes nothing with it
    # ml_dtypes casts to and from what NumPy and the array API have; between its own types it has few casts.
    return source not in ML_DTYPES or target not in ML_DTYPES or small_casts(source, target)


def small_casts(source: str, target: str) -> bool:
    """Casts between two ml_dtypes types that NumPy was given: asked of NumPy by trying, as no page lists them."""
    ones = np.ones(1, getattr(ml_dtypes, source))
    try:
        ones.astype(getattr(ml_dtypes, target))
    except TypeError:
        return False
    return True


def layout_fits(traits: Traits, framework: str) -> bool:
    if framework == "torch":
        return traits.spacing in ("dense", "strided") and traits.aligned
    return True


def keeps_promises(traits: Traits, want: Want, holder: str) -> bool:
    """Sharing on the same device writes through nothing that must not be written."""
    if place(traits, want) != traits.device:
        return True
    if want.framework == "numpy":
        return not (want.writable is True and (traits.overlap or not traits.writable))
    if want.framework == traits.framework or want.share_readonly:
        return True
    if want.framework == "torch" and traits.origin == "tensor" and is_alias(traits):
        return True  # what the tensor gave is given back; a view that promises more than that keeps its promise
    return traits.writable and not traits.overlap and not traits.graph


def is_alias(traits: Traits) -> bool:
    """Whether the tensor behind a NumPy view can itself be seen so: `as_strided` takes whole steps forward."""
    on_a_tensor = traits.origin in ("tensor", "narrowed")
    return on_a_tensor and traits.spacing in ("dense", "strided") and traits.dtype in HAS["torch"]


def is_strange(holder: str, want: Want, here: Here) -> bool:
    """torch.compile treats an array as a tensor that no other memory belongs to, so none may."""
    return here.compiled and "numpy" in (holder, want.framework)


def is_writable(traits: Traits, want: Want, bound: bool) -> bool:
    if want.framework == "torch" and want.out is None:  # it cannot say so, but what came read-only is known to be
        return not bound or traits.writable or traits.device != CPU
    if want.framework != "numpy":
        return True
    if want.writable is not None or want.out is not None:
        return want.writable is not False
    return not bound or (traits.writable and not traits.overlap and not traits.graph)


def bus_width(device: Device, holder: str, source: str, framework: str, target: str) -> int:
    """The narrower of the two dtypes, where the side before the bus, or the one behind it, can make or take it."""
    if source == target:
        return WIDTH[source]
    # What comes from a device that only torch knows is a tensor on the host first. Few of them have the small floats.
    other = device.type not in ("cpu", "cuda")
    after = casts(framework, source, target) or other
    if other and target.startswith(("float8", "float4")):
        return WIDTH[source]
    widths = [WIDTH[source]] if after else []
    from_host = device == CPU and framework == "torch" and casts("torch", source, target)  # torch is on the host too
    if casts(holder, source, target) or from_host:
        widths.append(WIDTH[target])
    return min(widths)
