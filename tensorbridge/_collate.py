"""collate: samples into a batch, for `torch.utils.data.DataLoader`: one allocation a leaf, one copy of every element.

In a worker process the batch is made in shared memory, so that it goes to the main process without another copy, as
torch's own collate function does it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensorbridge import _api, _dtypes, _options, _tables, _watch
from tensorbridge._adapters import is_scalar
from tensorbridge._array import shape_text
from tensorbridge._containers import Flat, Frame, flatten, is_array
from tensorbridge._eager import eager, mark
from tensorbridge._errors import BridgeError, GraphError, UnsupportedArrayError

if TYPE_CHECKING:
    from torch import Tensor


@eager
def collate(samples: Sequence[Any]) -> Any:
    """Return a batch: the tree of the samples, with the arrays at each place stacked into one tensor.

    Parameters
    ----------
    samples : sequence of trees of arrays, all of one structure
        Arrays of any framework, numbers, and anything else: for each place in the tree one of these, with one shape
        and dtype.

    Returns
    -------
    tree of torch.Tensor, shape ``(len(samples), *s)``
        Containers as in the first sample. Arrays and numbers become tensors, which share no memory with the samples
        and keep their dtype (a Python int is int64, a float float64); what is neither is a list, in order.

    Raises
    ------
    UnsupportedArrayError
        The samples differ in structure, shape, dtype or device; the message names the leaf and the sample.
    GraphError
        In a worker process, a sample requires grad: a graph cannot go to another process.
    ValueError, TypeError
        There are no samples; one sample was given instead of several.

    Cost
    ----
    Every element is copied once; twice where torch cannot hold the samples as they are (negative strides, swapped
    bytes). In a worker process the batch lies in shared memory.

    Examples
    --------
    >>> import numpy as np
    >>> batch = collate([{"x": np.zeros(2), "y": 0, "name": "a"}, {"x": np.ones(2), "y": 1, "name": "b"}])
    >>> batch["x"].shape, batch["y"], batch["name"]
    (torch.Size([2, 2]), tensor([0, 1]), ['a', 'b'])
    """
    _options.require("torch", "collate")
    if _tables.is_one_batch(samples) or not hasattr(samples, "__len__"):
        text = f"collate: samples is {type(samples).__name__}, which is no sequence of samples"
        raise TypeError(f"{text}; a DataLoader with batch_size=None gives one sample at a time, and needs no collate")
    if not len(samples):
        raise ValueError("collate: there are no samples")
    first, *others = [_flat(sample, number) for number, sample in enumerate(samples)]
    paths = first.paths()
    columns = zip(first.leaves, *(_aligned(first, flat, paths, i) for i, flat in enumerate(others, 1)), strict=True)
    results = [_stacked(list(values), f"collate: {path}") for path, values in zip(paths, columns, strict=True)]
    return first.built(results)


def _flat(sample: Any, number: int) -> Flat:
    try:
        return flatten(sample, everything=True)
    except UnsupportedArrayError as error:
        error.args = (f"collate: sample {number}: {error}",)
        raise


def _aligned(first: Flat, other: Flat, paths: list[str], number: int) -> list[Any]:
    """The leaves of a sample in the order of the first sample's, which has the same ones."""
    if [_shape_of(frame) for frame in first.frames] == [_shape_of(frame) for frame in other.frames]:
        return other.leaves
    leaves = dict(zip(other.paths(), other.leaves, strict=True))
    lacks = next((path for path in paths if path not in leaves), None)
    has = next((path for path in leaves if path not in set(paths)), None)
    if lacks or has:
        how = f"sample {number} has no {lacks}" if lacks else f"sample {number} has {has}, and sample 0 has not"
        cure = "Give all samples one structure, and pad lists to one length."
        raise UnsupportedArrayError(f"collate: the samples are not alike: {how}.\n{cure}")
    return [leaves[path] for path in paths]


def _shape_of(frame: Frame) -> tuple[Any, ...]:
    keys = frame.keys if isinstance(frame.keys, list) else None
    return type(frame.node), keys, frame.size, frame.where, frame.inner


def _stacked(values: list[Any], asked: str) -> Any:
    """One place of the tree, over all samples."""
    kinds = [_kind(value) for value in values]
    if len(set(kinds)) > 1:
        odd = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        what = f"sample 0 has {type(values[0]).__name__}, sample {odd} {type(values[odd]).__name__}"
        raise UnsupportedArrayError(f"{asked}: {what}.\nMake them one kind: arrays, numbers, or neither.")
    if kinds[0] == "other":
        return values
    if kinds[0] == "number":
        numbers = _converted(values, asked)
        return _empty(tuple(numbers.shape), numbers.dtype).copy_(numbers) if _in_worker() else numbers
    tensors = [_converted(value, f"{asked}: sample {number}") for number, value in enumerate(values)]
    _check_alike(tensors, asked)
    if _in_worker() and any(t.requires_grad for t in tensors):
        why = "a sample requires grad, and a graph cannot go to another process"
        raise GraphError(f"{asked}: {why}.\nReturn x.detach().")
    if not _watch.watching:
        return _stack(tensors)
    return _watch.perform(_api.plan(tensors, "torch"), asked, lambda: _stack(tensors))


def _converted(value: Any, asked: str) -> Tensor:
    """A tensor that nobody writes to. Errors speak of `collate`, and of what can be done before it."""
    try:
        return _api.to_torch(value, share_readonly=True)
    except BridgeError as error:
        text = str(error).removeprefix("to_torch(share_readonly=True): ")
        if isinstance(error, UnsupportedArrayError):
            text = re.sub(r"\nUse (dtype=[^:]+)", r"\nUse tensorbridge.to_torch(x, \1)", text)
            text += " Do so in the dataset, or in a function around collate." if "\n" in text else ""
        error.args = (f"{asked}: {text}",)
        raise


def _kind(value: Any) -> str:
    if is_array(value):
        return "array"
    return "number" if is_scalar(type(value)) else "other"


def _stack(tensors: list[Tensor]) -> Tensor:
    torch: Any = sys.modules["torch"]
    if not tensors[0].is_cpu or any(t.requires_grad for t in tensors):
        return torch.stack(tensors)  # type: ignore[no-any-return]
    out = _empty((len(tensors), *tensors[0].shape), tensors[0].dtype)
    return torch.stack(tensors, out=out)  # type: ignore[no-any-return]


_ALIKE: dict[str, tuple[Callable[[Any], str], str]] = {
    "shape": (lambda t: shape_text(tuple(t.shape)), "Pad the samples to one shape"),
    "dtype": (lambda t: _dtypes.of_torch(t.dtype), "Cast them to one dtype"),
    "device": (lambda t: str(t.device), "Bring them to one device"),
}


def _check_alike(tensors: list[Tensor], asked: str) -> None:
    for what, (read, cure) in _ALIKE.items():
        found = [read(t) for t in tensors]
        odd = next((i for i, value in enumerate(found) if value != found[0]), None)
        if odd is not None:
            text = f"sample 0 has {what} {found[0]}, sample {odd} has {found[odd]}"
            raise UnsupportedArrayError(f"{asked}: {text}.\n{cure}, in the dataset or in a function around collate.")


def _in_worker() -> bool:
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def _empty(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Memory for a batch: shared where it goes to another process."""
    torch: Any = sys.modules["torch"]
    if not _in_worker():
        return torch.empty(shape, dtype=dtype)  # type: ignore[no-any-return]
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[no-any-return]


mark()  # torch may be there already
