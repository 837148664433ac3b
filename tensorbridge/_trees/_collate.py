"""collate: samples into a batch, for `torch.utils.data.DataLoader`: one allocation a leaf, one copy of every element.

In a worker process the batch is made in shared memory, so that it goes to the main process without another copy, as
torch's own collate function does it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from tensorbridge import _api, _convert, _dtypes, _lanes, _options, _watch
from tensorbridge._adapters import _foreign, is_scalar, named
from tensorbridge._adapters._numbers import base_of
from tensorbridge._array import HUGE, LARGE, MOST_AXES, shape_text
from tensorbridge._cuda import _stream_order, _streams
from tensorbridge._eager import eager
from tensorbridge._errors import BridgeError, GraphError, UnsupportedArrayError
from tensorbridge._trees import _tables
from tensorbridge._trees._containers import (
    ARRAY,
    DICT,
    Kind,
    at,
    check_known,
    is_by_class,
    kind_of,
    rebuilt,
    sequence_open,
)

if TYPE_CHECKING:
    from torch import Tensor


@eager
def collate(samples: Sequence[Any]) -> Any:
    """Return a batch: the tree of the samples, with the arrays at each place stacked into one tensor.

    Parameters
    ----------
    samples : sequence of trees of arrays, all of one structure
        Arrays of any framework, numbers, and anything else: for each place in the tree one of these, with one shape
        and dtype. Numbers too: a Python bool is bool, an int int64, a float float64, a complex complex128.

    Returns
    -------
    tree of torch.Tensor, shape ``(len(samples), *s)``
        Containers as in the first sample. Arrays and numbers become tensors, which share no memory with the samples
        and keep their dtype; what is neither is a list, in order. A tensor of 4 MiB and more lies in NumPy's memory,
        which is faster: its storage cannot be resized (in a graph, it is torch's).

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
    Every element is copied once; twice where torch cannot hold the samples as they are (swapped bytes). In a worker
    process the batch lies in shared memory. Samples that are NumPy arrays, dense tensors or numbers cost a fraction of
    a microsecond each, others a few.

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
    check_known(samples[0], "torch", "collate")
    _convert.open_lanes()
    return _batched([*samples], None)


class _Where(NamedTuple):
    """A place in the tree of the first sample: a child of `node`, which lies `above`."""

    above: _Where | None
    node: Any
    name: Callable[[], str]


def _path(where: _Where | None) -> str:
    names: list[str] = []
    while where is not None:
        names.append(where.name())
        where = where.above
    return "batch" + "".join(reversed(names))


def _batched(values: list[Any], where: _Where | None) -> Any:
    """One place of the tree, over all samples: what is decided is decided once, not for every sample."""
    first, cls = values[0], type(values[0])
    alike = len(set(map(type, values))) == 1
    kind = kind_of(first)
    if isinstance(kind, Kind):
        return _container(values, kind, where, alike)
    scalars = is_scalar(cls)
    if not (alike and is_by_class(cls)):
        for number, value in enumerate(values):
            if kind_of(value) is not kind or is_scalar(type(value)) is not scalars:
                _refuse_mixed(values, number, where)
    if kind is ARRAY:
        return _arrays(values, where)
    return _numbers(values, where, alike) if scalars else values


def _refuse_mixed(values: list[Any], number: int, where: _Where | None) -> NoReturn:
    what = f"sample 0 has {type(values[0]).__name__}, sample {number} {type(values[number]).__name__}"
    cure = "Make them one kind: arrays, numbers, or neither."
    raise UnsupportedArrayError(f"collate: {_path(where)}: {what}.\n{cure}")


# -- Containers


def _container(values: list[Any], kind: Kind, where: _Where | None, alike: bool) -> Any:
    first = values[0]
    _check_endless(first, where)
    columns, keys = _columns(values, kind, alike) or _columns_by_name(values, kind, where)
    if kind.exotic and not columns:
        return first
    places = (_Where(where, first, partial(kind.name, first, keys, i)) for i in range(len(columns)))
    children = [_batched(column, place) for column, place in zip(columns, places, strict=True)]
    around = None if where is None else where.node
    return rebuilt(kind, first, keys, children, lambda: f"collate: {_path(where)}", around)


def _check_endless(first: Any, where: _Where | None) -> None:
    above = where
    while above is not None:
        if above.node is first:
            text = f"{_path(where)} is {_path(above.above)} again: a tree that contains itself has no end"
            raise UnsupportedArrayError(f"collate: sample 0: {text}.\nTake the cycle out first.")
        above = above.above


def _columns(values: list[Any], kind: Kind, alike: bool) -> tuple[list[list[Any]], Any] | None:
    """The children at each place, and their keys, of plain dicts, or sequences of one type, that are alike."""
    if not alike or not (kind is DICT or kind.open is sequence_open) or len(set(map(len, values))) > 1:
        return None
    if kind is not DICT:
        return [list(column) for column in zip(*values, strict=True)], None
    keys = list(values[0])
    try:
        return [[value[key] for value in values] for key in keys], keys
    except KeyError:
        return None


def _columns_by_name(values: list[Any], kind: Kind, where: _Where | None) -> tuple[list[list[Any]], Any]:
    """The children of containers of any type: those with one name belong together."""
    columns: list[list[Any]] = []
    place: dict[str, int] = {}
    keys: Any = None
    for number, value in enumerate(values):
        how = kind_of(value)
        if not isinstance(how, Kind):
            _refuse_mixed(values, number, where)
        try:
            children, its = how.open(value)
        except UnsupportedArrayError as error:
            error.args = (f"collate: {_path(where)}: sample {number}: {error}",)
            raise
        if not number:
            place = {kind.name(value, its, i): i for i in range(len(children))}
            columns, keys, size = [[child] for child in children], its, len(children)
            by_position = type(its) is list or kind.name is at
            continue
        same = by_position and type(value) is type(values[0]) and len(children) == size
        if same and its == keys:
            for column, child in zip(columns, children, strict=True):
                column.append(child)
            continue
        named = {how.name(value, its, i): child for i, child in enumerate(children)}
        lacks = next((name for name in place if name not in named), None)
        has = next((name for name in named if name not in place), None)
        if lacks or has:
            path = _path(where)
            how_not = f"has no {path}{lacks}" if lacks else f"has {path}{has}, and sample 0 has not"
            cure = "Give all samples one structure, and pad lists to one length."
            raise UnsupportedArrayError(f"collate: the samples are not alike: sample {number} {how_not}.\n{cure}")
        if len(named) < len(children) or len(place) < len(columns):
            text = f"{_path(where)} has two keys that are written alike, and not the same keys in sample {number}"
            raise UnsupportedArrayError(f"collate: {text}.\nGive all samples one order of keys.")
        for name, i in place.items():
            columns[i].append(named[name])
    return columns, keys


# -- Numbers


def _numbers(values: list[Any], where: _Where | None, alike: bool) -> Tensor:
    if not alike:
        dtypes = [_dtype_of_number(value) for value in values]
        odd = next((i for i, dtype in enumerate(dtypes) if dtype != dtypes[0]), None)
        if odd is not None:
            text = f"sample 0 has {type(values[0]).__name__}, sample {odd} {type(values[odd]).__name__}"
            cure = "Cast them to one dtype, in the dataset or in a function around collate."
            raise UnsupportedArrayError(f"collate: {_path(where)}: {text}: a batch has one dtype.\n{cure}")
    numbers = None if _watch.watching else _plain_numbers(values)
    if numbers is None:
        numbers = _converted(values, f"collate: {_path(where)}")
    return _empty(tuple(numbers.shape), numbers.dtype).copy_(numbers) if _in_worker() else numbers


def _dtype_of_number(x: Any) -> Any:
    return x.dtype if isinstance(x, np.generic) else np.dtype(_dtypes.OF_PYTHON[base_of(x)])


def _plain_numbers(values: list[Any]) -> Tensor | None:
    """Numbers of one dtype, if NumPy and torch hold them as they are."""
    dtype = _dtype_of_number(values[0])
    if dtype not in _lanes._plain_numpy:
        return None
    try:
        return _lanes._from_numpy(np.array(values, dtype))  # type: ignore[no-any-return]
    except (OverflowError, ValueError, TypeError):  # an int that is too big; C's unsigned long long
        return None


# -- Arrays


def _arrays(values: list[Any], where: _Where | None) -> Tensor:
    asked = f"collate: {_path(where)}"
    ours = set(map(type, values)) <= _ARRAYS and not _lanes._intercepted()
    if _watch.watching:
        if ours and _dtype_of_all(values) is not None:
            plan = _api.plan(values, "torch")
            return _watch.perform(plan, asked, lambda: _plain_arrays(values))  # type: ignore[no-any-return]
    elif not _lanes._intercepted():
        made = _plain_arrays(values) if ours else _plain_tensors(values)
        if made is not None:
            return made
    tensors = [_converted(value, f"{asked}: sample {number}") for number, value in enumerate(values)]
    _check_alike(tensors, asked)
    if _in_worker() and any(t.requires_grad for t in tensors):
        why = "a sample requires grad, and a graph cannot go to another process"
        raise GraphError(f"{asked}: {why}.\nReturn x.detach().")
    if _watch.watching:
        made = _watch.perform(_api.plan(tensors, "torch"), asked, lambda: _stack(tensors))
    else:
        made = _stack(tensors)
    for x, t in zip(values, tensors, strict=True):
        if t.is_cuda and not isinstance(x, type(t)):
            stream = _foreign.stream_named(x)
            if stream is not None:  # it waits until the sample was read: the sample's owner may write next
                _stream_order.link(_streams.current("torch", t.get_device()), stream, t.get_device())
    return made


_ARRAYS = frozenset({np.ndarray, np.memmap})


def _dtype_of_all(arrays: list[Any]) -> Any:
    """torch's, of arrays of one shape and dtype; None where there is none, or NumPy has no axis left for a batch."""
    shape, dtype = arrays[0].shape, arrays[0].dtype
    if len(shape) >= MOST_AXES or any(a.shape != shape or (a.dtype is not dtype and a.dtype != dtype) for a in arrays):
        return None
    return named("torch").DTYPES.get(_dtypes.of_numpy(dtype))  # type: ignore[attr-defined]


def _plain_arrays(values: list[Any]) -> Tensor | None:
    """Arrays of one shape and dtype are written into the batch by one call of NumPy, whatever their strides are."""
    wanted, first = _dtype_of_all(values), values[0]
    if wanted is None:  # swapped bytes; or to be refused by name
        return None
    torch: Any = named("torch")
    shape = first.shape
    out = _empty((len(values), *shape), wanted)
    into = torch.borrowed(out)
    if shape and first.size:
        np.concatenate(values, out=into.reshape(-1, *shape[1:]))
    else:
        np.stack(values, out=into)
    return out


def _plain_tensors(values: list[Any]) -> Tensor | None:
    """Dense tensors on the host, of one shape and dtype; what else torch can stack shows in the result."""
    tensor = _lanes._Tensor
    if _lanes._forward_ad._current_level >= 0 or set(map(type, values)) != {tensor}:
        return None
    if not values[0].is_cpu or (_in_worker() and any(t.requires_grad for t in values)):
        return None
    if len(set(map(attrgetter("dtype"), values))) > 1:
        return None
    torch: Any = sys.modules["torch"]
    try:
        if not all(map(tensor.is_contiguous, values)):
            return None
        if any(map(tensor.storage_offset, values)):
            if not all(map(_lanes.is_held, values)):
                return None
        elif min(map(torch.UntypedStorage.nbytes, map(tensor.untyped_storage, values))) < values[0].nbytes:
            return None
        nbytes = len(values) * values[0].nbytes
        lost = _convert.has_lost_threads()
        if lost or (nbytes >= LARGE and not (_in_worker() or (nbytes >= HUGE and _convert.has_threads()))):
            batch = _without_threads(values)
            if lost or batch is not None:
                return batch
        made: Any = _stack(values) if nbytes >= LARGE or _in_worker() else torch.stack(values)
        return made if made.is_cpu and (made.data_ptr() or not made.numel()) else None
    except RuntimeError:  # not of one shape; sparse; inside torch.func: the full road says what
        return None


def _without_threads(tensors: list[Tensor]) -> Tensor | None:
    """By NumPy: at this size torch would use threads, which wait for any core that is busy."""
    adapter: Any = named("torch")
    seen = [None if t.requires_grad else adapter.dense(t) for t in tensors]
    return None if any(a is None for a in seen) else _plain_arrays(seen)


def _converted(value: Any, asked: str) -> Tensor:
    """A tensor that nobody writes to. Errors speak of `collate`, and of what can be done before it."""
    try:
        return _api.to_torch(value, share_readonly=True)
    except BridgeError as error:
        text = str(error).removeprefix("to_torch(share_readonly=True): ")
        if isinstance(error, UnsupportedArrayError):
            text = re.sub(r'\n(?:Use|Say) (dtype="\w+")', r"\nUse tensorbridge.to_torch(x, \1)", text)
            batchwise = "whole data set" not in text  # codes that are made batch by batch mean something else in each
            where = "in the dataset, or in a function around collate" if batchwise else "where the dataset is made"
            text += f" Do so {where}." if "\n" in text else ""
        error.args = (f"{asked}: {text}",)
        raise


def _stack(tensors: list[Tensor]) -> Tensor:
    torch: Any = sys.modules["torch"]
    adapter: Any = named("torch")
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not tensors[0].is_cpu or _lanes._forward_ad._current_level >= 0 or recorded:
        return adapter.stacked(tensors)  # type: ignore[no-any-return]
    out = _empty((len(tensors), *tensors[0].shape), tensors[0].dtype)
    stack = adapter.stacked_in_pieces if _convert.has_lost_threads() else adapter.stacked
    return stack(tensors, out)  # type: ignore[no-any-return]


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
    """Memory for a batch on the host, whatever torch's default device: shared where it goes to another process, and
    NumPy's where it is large, which asks the kernel for huge pages.
    """
    torch: Any = sys.modules["torch"]
    nbytes = math.prod(shape) * dtype.itemsize
    if _in_worker():
        storage = torch.UntypedStorage._new_shared(nbytes, device="cpu")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[no-any-return]
    if nbytes >= LARGE:
        return torch.from_numpy(np.empty(nbytes, np.uint8)).view(dtype).view(shape)  # type: ignore[no-any-return]
    return torch.empty(shape, dtype=dtype, device="cpu")  # type: ignore[no-any-return]
