"""What is never converted, and the call that works instead. Pure, like _plan, whose rules it opens and closes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorbridge import _dtypes
from tensorbridge._array import CPU, MOST_AXES, Traits
from tensorbridge._errors import DeviceError, GraphError, UnsupportedArrayError
from tensorbridge._step import Here, Refusal, Step, Want

if TYPE_CHECKING:
    from collections.abc import Sequence


class Obstacle(Exception):
    """Raised while an array is described: one of OBSTACLES stands in the way of every conversion.

    `what` names the array, `detail` completes the reason where the table cannot know it. "{framework}" in a cure stands
    for the one that was asked for.
    """

    def __init__(self, name: str, what: str, detail: str = "") -> None:
        super().__init__(name, what, detail)
        self.name, self.refusal, self.what = name, OBSTACLES[name], what
        self.why = detail or self.refusal.why

    def cured(self, cure: str) -> Obstacle:
        """The same obstacle with a cure of its own."""
        self.refusal = self.refusal._replace(cure=cure)
        return self


def _unsupported(why: str, cure: str) -> Refusal:
    return Refusal(UnsupportedArrayError, why, cure)


CALLED = {"numpy": "NumPy", "torch": "torch", "cupy": "CuPy"}
_OWN_MEANING = "its elements are not numbers that every framework has"

# What an adapter may find in an array's way, and what to do about it.
OBSTACLES: dict[str, Refusal] = {
    # torch
    "sparse": _unsupported("a sparse tensor has no strided memory to share", "Convert x.to_dense(), or x.values()."),
    "nested": _unsupported(
        "a nested tensor has rows of different lengths",
        "Convert x.to_padded_tensor(0.0), x.values(), or each tensor of x.unbind().",
    ),
    "mkldnn": _unsupported("an mkldnn tensor has a layout private to oneDNN", "Convert x.to_dense()."),
    "quantized": _unsupported(
        "a quantized tensor means its integers times a scale",
        "Convert x.dequantize(), or x.int_repr() for the integers.",
    ),
    "meta": _unsupported(
        "a meta tensor has a shape but no data", "Make one that has, and fill it: torch.zeros_like(x, device='cpu')."
    ),
    "fake": _unsupported(
        "a fake tensor has a shape but no data", "Convert outside FakeTensorMode, torch.export or tracing."
    ),
    "fake mode": _unsupported(
        "inside FakeTensorMode torch computes shapes and no values",
        "Convert outside FakeTensorMode, torch.export or tracing.",
    ),
    "uninitialized": _unsupported(
        "a lazy module has not given it a shape yet", "Run a forward pass of its module first."
    ),
    "short storage": _unsupported(
        "",
        "Convert what is there, torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()), or have it filled again.",
    ),
    "functional": _unsupported(
        "a tensor inside functionalization has no memory of its own", "Convert outside the functionalized function."
    ),
    "functorch": _unsupported(
        "inside torch.func.vmap, grad and the like a tensor has no memory of its own",
        "Convert outside the transformed function.",
    ),
    "distributed": _unsupported(
        "a DTensor is spread over processes", "Convert x.to_local() for this process's part, or x.full_tensor()."
    ),
    "intercepting": _unsupported(
        "this tensor subclass intercepts every operation (__torch_dispatch__); its memory need not be its value",
        "Convert the plain tensor that it holds.",
    ),
    # NumPy
    "masked": _unsupported(
        "the mask of a masked array would be lost",
        "Convert x.filled(value) and x.mask, or x.data if masked values are fine.",
    ),
    "masked tensor": _unsupported(
        "the mask of a masked tensor would be lost", "Convert x.get_data() and x.get_mask()."
    ),
    "unit": _unsupported("its unit would be lost", ""),
    "structured": _unsupported(
        "a structured dtype has several fields",
        "Convert one field, x['name'], or the tree {n: x[n] for n in x.dtype.names}.",
    ),
    "object": _unsupported(
        "object elements are Python references, not numbers",
        'Convert x.astype("float64"), after dealing with None and text.',
    ),
    "string": _unsupported(
        "text is not a number",
        "Encode it first, once for the whole data set: np.unique(x, return_inverse=True)[1] gives codes.",
    ),
    "datetime": _unsupported(
        "dates and durations are numbers with a unit, and only plain numbers are converted",
        'Convert x.view("int64") and keep the unit beside it.',
    ),
    "void": _unsupported("raw bytes (a void dtype) have no number type", 'Say what they are: x.view("uint8").'),
    "missing": _unsupported("", ""),
    "unknown dtype": _unsupported(_OWN_MEANING, "Cast it where it was made."),
    # lists, Python
    "ragged": _unsupported("", "Pad the parts to one shape, or keep the list and use tensorbridge.tree."),
    "mixed list": _unsupported("", "Bring the parts to the host first, by to_numpy of each."),
    "missing number": _unsupported("None is no number", 'Say float("nan") for what is missing, or leave it out.'),
    "container": _unsupported(
        "a container is not one array", "Convert every leaf: tensorbridge.tree.to_{framework}(x)."
    ),
    "queue": _unsupported(
        "a container is not one array",
        "Convert list(x), or every array in it: tensorbridge.tree.to_{framework}(x).",
    ),
    "text": _unsupported("text is not an array", "Encode it as numbers first."),
    "big integer": _unsupported(
        "a Python integer is int64 here, and this one does not fit",
        'Say dtype="float64".',
    ),
    "not an array": _unsupported(
        "it is no array of NumPy, torch or CuPy, and has no __dlpack__, array interface, buffer or __array__",
        "Give an array, a number or a list of them; of an object that holds an array, that array.",
    ),
    "pointer": _unsupported(
        "a pointer does not say how many elements lie there", "Convert np.ctypeslib.as_array(x, shape)."
    ),
    "synchronized": _unsupported(
        "it guards its memory by a lock, and gives no array",
        "Convert x.get_obj(), the same memory; hold the lock, with x.get_lock(), while it is read or written.",
    ),
    "stand-in": _unsupported(
        "it answers to every name, as a mock or a value that is being traced does, and holds no data",
        "Give the array that it stands for; of a value that is being traced, convert outside the tracing.",
    ),
    "lazy": _unsupported("a LazyFrame is a query that has not run yet", "Convert x.collect()."),
    "scipy": _unsupported("a sparse array has no strided memory to share", "Convert x.toarray()."),
    "null dataset": _unsupported(
        "a null dataset of HDF5 holds no elements",
        "Leave it out, or let an array without elements stand for it: numpy.empty(0, x.dtype).",
    ),
    "rows": _unsupported("the rows of a column of a dataset are read when they are asked for", "Convert x[:]."),
    "dataset": _unsupported(
        "a dataset is a table that is read when it is asked for",
        'Convert its columns: tensorbridge.tree.to_{framework}(x.with_format("arrow")[:]).',
    ),
    "range": _unsupported("a range is not an array", "Convert list(x)."),
    "set": _unsupported("the elements of a set have no order", "Convert list(x), or each element."),
    "empty list": _unsupported("an empty list has no dtype", 'Say which: numpy.empty(0, dtype="float32").'),
}


def cure_rows(first: object, stack: str) -> str:
    """What to do with Python objects of which the first is an array or a list."""
    if not isinstance(first, (list, tuple)) and not getattr(first, "shape", ()):
        return ""
    return f"Convert {stack} if its rows are of one length, or pad them first."


def plain_dict(nested: bool) -> tuple[str, str]:
    """The call that makes a plain dict of a mapping, `nested` of mappings in it too; and what that call means."""
    if not nested:
        return "dict(x)", ""
    meaning = "{key: plain(x[key]) for key in x} if isinstance(x, collections.abc.Mapping) else x"
    return "plain(x)", f", plain = lambda x: {meaning}"


# Elements that a kind of device does not have, where torch raises a TypeError when it is asked for them.
_LACKING = {"mps": frozenset({"float64", "complex128"})}
_CURE_DTYPE = {
    "float64": "float32",
    "complex128": "complex64",
    "complex32": "complex64",
    "longdouble": "float64",
    "clongdouble": "complex128",
    "int4": "int8",
    "int2": "int8",
    "uint4": "uint8",
    "uint2": "uint8",
}


def before(traits: Traits, want: Want, here: Here) -> Refusal | None:
    """What can be refused from the kind of the array and the wish alone."""
    leaving_torch = want.framework != "torch"
    if traits.graph and leaving_torch and not want.detach:
        shared = want.framework == "numpy" and traits.device == CPU
        return Refusal(
            GraphError,
            f"a {CALLED[want.framework]} array cannot carry the autograd graph{{grad_fn}}, and detach=False keeps it",
            f"Leave detach=False out to get {'a read-only view of ' * shared}the values, or stay in torch.",
        )
    if traits.size == "beyond" and leaving_torch:
        return _unsupported(
            f"a {CALLED[want.framework]} array has at most {MOST_AXES} axes and 2**63 - 1 bytes",
            "Flatten it first, x.flatten(), or convert a part of it.",
        )
    source = traits.dtype.lstrip(">")
    wanted = want.dtype or source
    if not _dtypes.exists_in(wanted, want.framework):
        cure = _CURE_DTYPE.get(wanted, "float16" if wanted.startswith("float8") else "float32")
        if wanted == "float4_e2m1fn_x2":
            return _unsupported(
                f"{want.framework} has no {wanted}", "Convert x.view(torch.uint8), two elements a byte."
            )
        return Refusal(UnsupportedArrayError, f"{want.framework} has no {wanted}", f'Use dtype="{cure}"', cure)
    if _dtypes.is_complex(source) and not _dtypes.is_complex(wanted):
        cure = "numpy.real(x), or numpy.abs(x)" if traits.framework == "numpy list" else "x.real, or abs(x)"
        return _unsupported(f"{source} to {wanted} would drop the imaginary part", f"Convert {cure}.")
    sides = {holder(traits, want, here), want.framework}
    if source != wanted and not any(_dtypes.can_cast(side, source, wanted) for side in sides):
        who = f"{CALLED[sides.pop()]} cannot" if len(sides) == 1 else "neither side can"
        via = "complex64" if _dtypes.is_complex(source) else "float32"
        cure = f'Cast in two calls: to_{want.framework}(to_{want.framework}(x, dtype="{via}"), dtype="{wanted}").'
        if source == "float4_e2m1fn_x2":
            cure = "Convert x.view(torch.uint8), two elements a byte."
        elif wanted == "float4_e2m1fn_x2":
            cure = "Pack two elements a byte, as uint8, and view the tensor: t.view(torch.float4_e2m1fn_x2)."
        return _unsupported(f"{who} cast {source} to {wanted}", cure)
    target = want.device or traits.device
    if want.framework == "torch" and wanted in _LACKING.get(target.type, ()):
        cure = _CURE_DTYPE[wanted]
        return Refusal(UnsupportedArrayError, f"{target.type} devices have no {wanted}", f'Use dtype="{cure}"', cure)
    if "cuda" in (target.type, traits.device.type) and here.forked:
        return FORKED
    if here.per_thread:
        return Refusal(
            DeviceError,
            "CuPy's current stream is the per-thread default stream; no other thread can name it, so the memory could "
            "not be kept until the work on it is done",
            "Make a stream of your own current, with tensorbridge.use_stream.",
        )
    if want.non_blocking and traits.device != CPU and (target == CPU or want.framework == "numpy"):
        return Refusal(
            ValueError,
            "non_blocking=True off the device hands out memory that is not filled yet",
            "Leave it out, or use to_numpy_async, which cannot be read too early.",
        )
    if want.non_blocking and target != traits.device and (target.is_other or traits.device.is_other):
        return Refusal(
            ValueError,
            "non_blocking=True is CUDA's: on other devices nobody tells when the source has been read",
            "Leave it out.",
        )
    if want.pin_memory and target != CPU:
        return Refusal(
            ValueError,
            f"pinned memory is host memory, and the result is on {target}",
            'Say device="cpu" too, or leave pin_memory out.',
        )
    return None


def holder(traits: Traits, want: Want, here: Here) -> str:
    """The framework in which the steps begin; host memory of any other library is seen as a NumPy array."""
    name = traits.framework.removesuffix(" list")
    if name in ("numpy", "torch", "cupy"):
        return name
    if traits.device == CPU:
        return "numpy"
    if traits.spacing == "reversed" or not traits.writable or askew(traits):
        return "cupy"  # torch aborts on negative strides, refuses memory marked read-only, and cannot pack by bytes
    return want.framework if want.framework != "numpy" else here.gpu


def askew(traits: Traits) -> bool:
    """Whether elements lie at addresses that are no multiple of their size: on a device a kernel that reads one faults,
    which ends the CUDA context of the process.
    """
    return traits.spacing == "odd" or not traits.aligned


def after(traits: Traits, steps: Sequence[Step], here: Here) -> Refusal | None:
    """What can be refused only when the steps are known: work that a CUDA graph capture would not survive."""
    if not here.capturing:
        return None
    on_device = traits.device.is_cuda or any(step.after.device.is_cuda or step.op == "pin" for step in steps)
    # Nobody knows which stream the work of a foreign producer is on.
    foreign = any(step.op in ("import", "export") and step.after.device.is_cuda for step in steps)
    if on_device and (not here.same_stream or foreign or any(step.kind for step in steps)):
        return CAPTURING
    return None


FORKED = Refusal(
    DeviceError,
    "CUDA cannot be used in a forked process",
    "Start workers with the spawn method, or convert in the main process (tensorbridge.prefetch does).",
)
CAPTURING = Refusal(
    DeviceError,
    "a CUDA graph is being captured, and only a zero-copy crossing on the capturing stream may happen then",
    "Make the capturing stream current in both libraries, with tensorbridge.use_stream, and copy outside.",
)
