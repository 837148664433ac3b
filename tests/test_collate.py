"""collate: samples of any framework become one batch of tensors, made once; in worker processes too."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import Dlpack, Interface, frozen, numbers
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset

import tensorbridge as tb
from tensorbridge._trees import _collate


class Sample(typing.NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Step:
    obs: Any
    reward: float


# -- What comes out

LEAVES: dict[str, Any] = {
    "array": lambda i: np.full((2, 3), i, "f4"),
    "integers": lambda i: np.full(2, i, "u1"),
    "zero-d": lambda i: np.array(i),
    "read-only": lambda i: frozen(np.full(3, float(i))),
    "broadcast": lambda i: np.broadcast_to(np.float32(i), (2, 2)),
    "reversed": lambda i: np.arange(float(i), i + 3)[::-1],
    "fortran": lambda i: np.asfortranarray(np.arange(6.0).reshape(2, 3) + i),
    "big-endian": lambda i: np.full(3, i, ">i4"),
    "bfloat16": lambda i: np.full(3, i, ml_dtypes.bfloat16),
    "float8": lambda i: torch.full((3,), float(i)).to(torch.float8_e5m2),
    "uint16": lambda i: np.full(3, i, "u2"),
    "bool": lambda i: np.array([True, i % 2 == 0]),
    "complex": lambda i: np.array([i + 1j]),
    "conjugate": lambda i: torch.tensor([i + 1j]).conj(),
    "tensor": lambda i: torch.full((2,), i),
    "transposed tensor": lambda i: torch.arange(6.0).reshape(2, 3).T + i,
    "dlpack": lambda i: Dlpack(np.full(3, float(i))),
    "array interface": lambda i: Interface(np.full(3, float(i))),
    "buffer": lambda i: array.array("f", [i, 2]),
    "empty": lambda i: np.zeros((0, 3)),
    "empty rows": lambda i: np.zeros((2, 0)),
    "memory map": lambda i: np.full((2, 3), i, "f4").view(np.memmap),
    "float8 of NumPy": lambda i: np.full(3, i, ml_dtypes.float8_e4m3fn),
    "bfloat16, reversed": lambda i: np.arange(float(i), i + 3).astype(ml_dtypes.bfloat16)[::-1],
    "zero-d bfloat16": lambda i: np.array(i, ml_dtypes.bfloat16),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LEAVES)
def test_arrays_are_stacked_with_their_dtype_into_memory_of_their_own(name):
    samples = [LEAVES[name](i) for i in range(4)]
    before = [numbers(x).copy() for x in samples]
    batch = tb.collate(samples)
    assert isinstance(batch, torch.Tensor)
    assert batch.shape == (4, *np.shape(numbers(samples[0])))
    assert tb.describe(batch).dtype == tb.describe(samples[0]).dtype.lstrip(">")
    assert np.array_equal(numbers(batch), np.stack(before))
    assert batch.is_contiguous()
    if batch.dtype == torch.float32:
        batch.fill_(-1)  # what a trainer may do; read-only samples stay as they are
        assert all(np.array_equal(numbers(x), b) for x, b in zip(samples, before, strict=True))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2, 3], torch.int64),
        ([1.0, 2.5], torch.float64),
        ([True, False], torch.bool),
        ([1j, 2.0 + 0j], torch.complex128),
        ([2**53 + 1, -(2**63)], torch.int64),
        ([1, np.int64(2)], torch.int64),
        ([np.float64(1), 2.5], torch.float64),
        ([np.uint64(2**63 + 1), np.uint64(1)], torch.uint64),
        ([np.ulonglong(1), np.ulonglong(2)], torch.uint64),
    ],
)
def test_numbers_become_a_tensor(values, dtype):
    batch = tb.collate([{"y": value} for value in values])
    assert batch["y"].dtype == dtype
    assert batch["y"].tolist() == values


def test_numpy_numbers_keep_their_dtype():
    assert tb.collate([np.float32(1), np.float32(2)]).dtype == torch.float32


@pytest.mark.parametrize(
    "values", [["a", "b"], [b"a", b"b"], [None, None], [{1}, {2}], [torch.Size([2]), torch.Size([3])]]
)
def test_what_is_neither_array_nor_number_is_a_list(values):
    assert tb.collate([{"v": value, "x": np.zeros(1)} for value in values])["v"] == values


def test_containers_are_those_of_the_samples():
    samples = [
        {
            "pair": Sample(np.full(2, i), [i, (np.ones(1), "s")]),
            "step": Step(torch.zeros(3), i / 2),
            "ordered": collections.OrderedDict(b=i, a=np.zeros(1)),
        }
        for i in range(3)
    ]
    batch = tb.collate(samples)
    assert type(batch["pair"]) is Sample
    assert batch["pair"].x.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch["pair"].y[0].tolist() == [0, 1, 2]
    assert batch["pair"].y[1][1] == ["s"] * 3
    assert isinstance(batch["step"], Step)
    assert batch["step"].reward.tolist() == [0, 0.5, 1]
    assert list(batch["ordered"]) == ["b", "a"]
    assert samples[1]["pair"].y[0] == 1


def test_keys_in_another_order_are_the_same_structure():
    batch = tb.collate([{"x": 1, "y": np.zeros(1)}, {"y": np.ones(1), "x": 2}])
    assert batch["x"].tolist() == [1, 2]
    assert batch["y"].tolist() == [[0], [1]]


def test_it_gives_what_torch_gives_where_torch_can():
    samples = [{"x": np.full((2, 2), i, "f4"), "y": i, "t": (torch.ones(2), 0.5), "s": "a"} for i in range(3)]
    mine, torchs = tb.collate(samples), torch.utils.data.default_collate(samples)
    assert torch.equal(mine["x"], torchs["x"])
    assert torch.equal(mine["y"], torchs["y"])
    assert torch.equal(mine["t"][0], torchs["t"][0])
    assert mine["t"][1].dtype == torchs["t"][1].dtype
    assert mine["s"] == torchs["s"]


@pytest.mark.parametrize("name", LEAVES)
def test_batch_is_the_same_while_a_trace_looks_on(name):
    check_batches_of(name, look_on=True)


@pytest.mark.parametrize("name", LEAVES)
def test_batch_is_the_same_where_every_sample_is_converted_by_itself(name, monkeypatch):
    check_batches_of(name, patch=monkeypatch)


def check_batches_of(name, *, look_on=False, patch=None):
    samples = [LEAVES[name](i) for i in range(4)]
    made = tb.collate(samples)
    for road in ("_plain_arrays", "_plain_tensors") if patch else ():
        patch.setattr(_collate, road, lambda values: None)
    with tb.trace() if look_on else contextlib.nullcontext():
        slow = tb.collate(samples)
    assert (made.dtype, made.stride()) == (slow.dtype, slow.stride())
    assert np.array_equal(numbers(made), numbers(slow))


@pytest.mark.parametrize("place", ["list", "dict", "tuple"])
def test_one_container_at_two_places_of_one_sample_is_like_two(place):
    make = {"list": lambda x, y: [x, y], "dict": lambda x, y: {"a": x, "b": y}, "tuple": lambda x, y: (x, y)}[place]
    twice = [np.zeros(1)]
    batch = tb.collate([make(twice, twice), make([np.ones(1)], [np.full(1, 2.0)])])
    found = list(batch.values()) if place == "dict" else list(batch)
    assert [pair[0].tolist() for pair in found] == [[[0], [1]], [[0], [2]]]


def test_plain_dicts_are_matched_by_their_keys_however_these_are_written():
    batch = tb.collate([{KEYS[0]: 1, KEYS[1]: 2}, {KEYS[1]: 4, KEYS[0]: 3}])
    assert [column.tolist() for column in batch.values()] == [[1, 3], [2, 4]]


def test_a_defaultdict_without_a_key_is_not_given_one():
    samples = [collections.defaultdict(int, x=1), collections.defaultdict(int, y=1)]
    with pytest.raises(tb.UnsupportedArrayError, match="sample 1 has no"):
        tb.collate(samples)
    assert list(samples[1]) == ["y"]


def test_containers_of_two_types_are_alike_if_their_names_are():
    batch = tb.collate([{"x": [1, 2]}, collections.OrderedDict(x=(3, 4))])
    assert [column.tolist() for column in batch["x"]] == [[1, 3], [2, 4]]


def test_large_batch_of_read_only_and_transposed_samples_is_memory_of_its_own():
    samples = [frozen(np.full((512, 300), float(i))) for i in range(2)] + [np.full((300, 512), 2.0).T]
    batch = tb.collate(samples)
    batch[:, 0, 0].neg_()
    assert batch.is_contiguous()
    assert batch[:, 1, 1].tolist() == [0, 1, 2]
    assert [x[0, 0] for x in samples] == [0, 1, 2]


LARGE_SAMPLES = {
    "arrays": lambda i: np.full((600, 1000), float(i)),
    "big-endian": lambda i: np.full((600, 1000), float(i), ">f8"),
    "tensors": lambda i: torch.full((600, 1000), float(i)),
    "tensors, bfloat16": lambda i: torch.full((600, 2000), float(i), dtype=torch.bfloat16),
    "tensors, complex": lambda i: torch.full((600, 1000), complex(i, 1)),
    "tensors, booleans": lambda i: torch.full((2400, 1000), bool(i)),
    "tensors, views": lambda i: torch.full((601, 1000), float(i))[1:],
    "tensors, transposed": lambda i: torch.full((600, 1000), float(i)).T,
    "tensors, conjugate": lambda i: torch.full((600, 1000), complex(i, 1)).conj(),
}


@pytest.mark.parametrize("name", LARGE_SAMPLES)
@pytest.mark.parametrize("watched", [False, True])
def test_large_batch_lies_in_the_huge_pages_of_numpy(name, watched):
    samples = [LARGE_SAMPLES[name](i) for i in range(4)]
    with tb.trace() if watched else contextlib.nullcontext():
        batch = tb.collate(samples)
    assert not batch.untyped_storage().resizable()
    assert batch.is_contiguous()
    assert torch.equal(batch, torch.stack([tb.to_torch(sample, copy=True) for sample in samples]))
    assert not any(tb.shares_memory(batch, sample) for sample in samples)
    batch.zero_()


def test_large_batch_of_tensors_in_a_graph_keeps_it():
    samples = [torch.ones(600, 1000, requires_grad=True) for _ in range(4)]
    tb.collate(samples).sum().backward()
    assert all(torch.equal(t.grad, torch.ones(600, 1000)) for t in samples)


def test_views_of_one_tensor_are_stacked():
    whole = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(tb.collate(list(whole)), whole)


def test_zeros_that_have_no_memory_get_some():
    batch = tb.collate([torch._efficientzerotensor(3)] * 2)
    assert batch.data_ptr()
    assert tb.to_numpy(batch).tolist() == [[0, 0, 0]] * 2


def test_graph_is_kept_in_the_main_process():
    samples = [torch.ones(2, requires_grad=True) for _ in range(3)]
    tb.collate(samples).sum().backward()
    with tb.trace():
        tb.collate(samples).sum().backward()
    assert all(torch.equal(t.grad, torch.full((2,), 2.0)) for t in samples)


# -- What is refused


def cyclic() -> Any:
    x: Any = []
    x.append(x)
    return x


class Key:
    def __repr__(self) -> str:
        return "key"


KEYS = Key(), Key()


def unheld() -> Any:
    """A tensor whose memory has been given back, as FSDP does it."""
    x = torch.ones(2)
    x.untyped_storage().resize_(0)
    return x


def shortened(view: Any) -> Any:
    """A view of 4 elements on a storage that has room for 4, and not for these."""
    x = view(torch.ones(8))
    x.untyped_storage().resize_(16)
    return x


REFUSED: dict[str, Any] = {
    "shape": (
        [{"x": np.zeros(3)}, {"x": np.zeros(3)}, {"x": np.zeros(4)}],
        r"^collate: batch\['x'\]: sample 0 has shape \(3,\), sample 2 has \(4,\)\.\nPad",
    ),
    "dtype": ([[np.zeros(3)], [np.zeros(3, "f4")]], r"batch\[0\]: sample 0 has dtype float64, sample 1 has float32"),
    "missing": ([{"x": 1, "y": 2}, {"x": 1}], r"sample 1 has no batch\['y'\]"),
    "more": ([{"x": 1}, {"x": 1, "y": 2}], r"sample 1 has batch\['y'\], and sample 0 has not"),
    "length": ([[1, 2], [1, 2, 3]], r"sample 1 has batch\[2\].*\n.*pad lists"),
    "array and none": ([{"x": np.zeros(1)}, {"x": None}], r"batch\['x'\]: sample 0 has ndarray, sample 1 NoneType"),
    "number and text": ([{"x": 1}, {"x": "1"}], r"batch\['x'\]: sample 0 has int, sample 1 str"),
    "text array": (
        [{"x": np.zeros(1)}, {"x": np.array(["a"])}],
        r"^collate: batch\['x'\]: sample 1: numpy <U1 \(1,\) cannot be converted: text is not a number\.\n"
        r"Encode it first, once for the whole data set: .* gives codes\. Do so where the dataset is made\.$",
    ),
    "dtype that torch lacks": (
        [np.zeros(2, "longdouble")] * 2,
        r"^collate: batch: sample 0: numpy longdouble .* torch has no longdouble\.\n"
        r'Use tensorbridge\.to_torch\(x, dtype="float64"\): a copy of 16 B\. Do so in the dataset',
    ),
    "big integer": (
        [{"x": 2**70}, {"x": 1}],
        r"^collate: batch\['x'\]: list of 2 numbers, item .* does not fit\.\n"
        r'Use tensorbridge\.to_torch\(x, dtype="float64"\)\. Do so in the dataset',
    ),
    "int and float": (
        [{"y": 2**53 + 1}, {"y": 2}, {"y": 0.5}],
        r"^collate: batch\['y'\]: sample 0 has int, sample 2 float: a batch has one dtype\.\nCast them to one dtype",
    ),
    "unsigned and signed": ([np.uint64(2**63 + 1), np.int64(1)], r"batch: sample 0 has uint64, sample 1 int64: a "),
    "bool and int": ([[True], [2]], r"batch\[0\]: sample 0 has bool, sample 1 int"),
    "int and narrow int": ([1, np.int32(2)], r"batch: sample 0 has int, sample 1 int32"),
    "number and 0-d array": ([1, np.array(1)], r"batch: sample 0 has int, sample 1 ndarray"),
    "list and number": ([{"x": [1]}, {"x": 1}], r"batch\['x'\]: sample 0 has list, sample 1 int"),
    "same count, other keys": ([{"x": 1}, {"y": 1}], r"sample 1 has no batch\['x'\]"),
    "fields": ([collections.OrderedDict(x=1), collections.OrderedDict(y=1)], r"sample 1 has no batch\['x'\]"),
    "keys that are written alike": (
        [{KEYS[0]: 1, KEYS[1]: 2}, {KEYS[1]: 2, KEYS[0]: 1, "more": 3}],
        r"sample 1 has batch\['more'\], and sample 0 has not",
    ),
    "keys that are written alike, in another order": (
        [collections.OrderedDict({KEYS[0]: 1, KEYS[1]: 2}), collections.OrderedDict({KEYS[1]: 2, KEYS[0]: 1})],
        r"^collate: batch has two keys that are written alike.* in sample 1\.\nGive all samples one order",
    ),
    "one more key that is written alike": ([{KEYS[0]: 1}, {KEYS[0]: 1, KEYS[1]: 2}], r"two keys that are written"),
    "one key less that is written alike": ([{KEYS[0]: 1, KEYS[1]: 2}, {KEYS[0]: 1}], r"two keys that are written"),
    "dict and dataclass": ([{"x": 1}, types.SimpleNamespace(x=1)], r"sample 1 has no batch\['x'\]"),
    "tuple and namedtuple": ([(1, 2), Sample(1, 2)], r"sample 1 has no batch\[0\]"),
    "cycle": ([cyclic(), cyclic()], r"^collate: sample 0: batch\[0\] is batch again"),
    "storage that was freed": (
        [torch.ones(2), unheld()],
        r"^collate: batch: sample 1: torch float32 \(2,\) .* its storage holds 0 B",
    ),
    "storage that ends among the elements": ([shortened(lambda x: x[::2])] * 2, r"needs 28 B and its storage holds 16"),
    "storage that ends before a view": ([shortened(lambda x: x[4:])] * 2, r"needs 32 B and its storage holds 16"),
    "tensors of two dtypes": ([torch.ones(2), torch.ones(2, dtype=torch.int32)], r"sample 1 has int32"),
    "tensors of two shapes": ([torch.ones(2), torch.ones(3)], r"sample 1 has \(3,\)"),
    "mask": ([np.ma.MaskedArray([1, 2])] * 2, r"^collate: batch: sample 0: masked numpy .* mask .* would be lost"),
    "mask beside an array": ([np.ones(2), np.ma.MaskedArray([1.0, 2])], r"^collate: batch: sample 1: masked numpy"),
    "meta": ([torch.ones(2, device="meta")] * 2, r"^collate: batch: sample 0: .*meta"),
    "functional": ([torch._to_functional_tensor(torch.ones(2))] * 2, r"^collate: batch: sample 0: .*functional"),
    "sparse": ([torch.eye(2).to_sparse()] * 2, r"^collate: batch: sample 0: .*sparse"),
}  # fmt: skip


def test_the_cure_for_labels_of_text_gives_one_mapping_to_all_samples():
    samples = [{"label": np.array(name)} for name in ("dog", "cat", "dog")]
    with pytest.raises(tb.UnsupportedArrayError, match=r"whole data set: np\.unique\(x, return_inverse=True\)\[1\] "):
        tb.collate(samples)
    codes = np.unique([sample["label"] for sample in samples], return_inverse=True)[1]
    assert tb.collate([{"label": code} for code in codes])["label"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", REFUSED)
def test_samples_that_are_not_alike_are_refused_by_name(name):
    samples, text = REFUSED[name]
    with pytest.raises(tb.UnsupportedArrayError, match=text):
        tb.collate(samples)


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="no samples"):
        tb.collate([])


@pytest.mark.parametrize("samples", [3, None, {"x": 1}, "text", (x for x in [1])], ids=lambda x: type(x).__name__)
def test_what_is_no_sequence_of_samples_is_refused(samples):
    with pytest.raises(TypeError, match=rf"^collate: samples is {type(samples).__name__}, .*batch_size=None"):
        tb.collate(samples)


class Gone:
    """A producer that cannot export any more."""

    def __dlpack_device__(self) -> Any:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("gone")


def test_producer_that_fails_is_named_by_sample():
    with pytest.raises(tb.ProducerError, match=r"^collate: batch\[0\]: sample 1: Gone failed to export.*gone$"):
        tb.collate([[np.zeros(1)], [Gone()]])


def test_the_line_that_asks_a_loader_for_a_batch_is_the_one_that_is_named():
    loader = torch.utils.data.DataLoader([{"x": np.zeros(3)}] * 2, batch_size=2, collate_fn=tb.collate)
    with tb.trace() as seen:
        list(loader)
    assert {event.where.rpartition(":")[0] for event in seen.events} == {__file__}


@pytest.mark.parametrize("samples", [[1, 2], [True, False], [np.float32(1), np.float32(2)]], ids=repr)
def test_trace_and_guard_see_numbers_stacked(samples):
    with tb.trace() as seen:
        made = tb.collate(samples)
    assert seen.totals.nbytes == made.nbytes
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=r"^collate: batch: "):
        tb.collate(samples)


class Reads:
    """Counts how often its array is asked for."""

    def __init__(self, a: Any) -> None:
        self.a, self.reads = a, 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        self.reads += 1
        return self.a


def test_arrays_of_all_the_axes_that_numpy_has_are_refused_in_our_words():
    with pytest.raises(tb.UnsupportedArrayError, match="64 axes"):
        tb.to_numpy(tb.collate([np.ones((1,) * 64)] * 2))


def test_trace_and_guard_see_the_copy():
    """Every element is copied once, read-only or not, reversed or not; as when nobody looks on."""
    for samples in ([frozen(np.zeros(3)), np.ones(3)], [np.ones(3), np.ones(3)[::-1]]):
        with tb.trace() as seen:
            tb.collate(samples)
        assert [[step.op for step in event.steps] for event in seen.events] == [["stack", "share"]]
        assert (seen.totals.nbytes, seen.events[0].source) == (48, "numpy list float64 (2, 3) on cpu")
        with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=r"^collate: batch: numpy list .* 48 B"):
            tb.collate(samples)
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=r"^collate: batch: torch list .* 24 B"):
        tb.collate([torch.zeros(3), torch.zeros(3)])
    for samples in ([torch.ones(4, 4).t()] * 3, [Reads(np.ones(3))] * 3, [np.ones(3)] * 3):
        with tb.copy_guard("warn"), pytest.warns(tb.CopyWarning) as told:
            tb.collate(samples)
        assert len(told) == 1
    reads = [Reads(np.ones(3)) for _ in range(3)]
    with tb.trace():
        tb.collate(reads)
    assert [x.reads for x in reads] == [1, 1, 1]
    swapped = np.ones(3, ">f4")
    with (
        tb.copy_guard("error", min_bytes=24),
        pytest.raises(tb.CopyRequiredError, match=r"^collate: batch: torch list"),
    ):
        tb.collate([swapped, swapped])
    with (
        tb.copy_guard("error"),
        pytest.raises(tb.UnsupportedArrayError, match=r"sample 0 has shape \(3,\), sample 1 has \(2,\)"),
    ):
        tb.collate([np.zeros(3), np.zeros(2)])


# -- In worker processes


def run_until_it_fails(loader: Any) -> None:
    """To the end of a loader; where it fails, torch would wait five seconds for each worker to see it is not needed."""
    batches = iter(loader)
    try:
        list(batches)
    finally:
        for worker, queue in zip(getattr(batches, "_workers", ()), getattr(batches, "_index_queues", ()), strict=True):
            batches._workers_done_event.set()
            queue.put(None)
            worker.join(10)  # if it does not end, the loader ends it


class Digits(Dataset):  # type: ignore[type-arg]
    """Everything that a dataset may hold; `broken` names what is wrong with sample 5."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        bad = self.broken if i == 5 else ""
        x = np.full((2, 3), i, "f4")
        x.setflags(write=False)
        if bad == "exit":
            import os

            os._exit(3)
        return {
            "x": np.zeros(3, "f4") if bad == "shape" else x,
            "t": torch.full((2,), i, dtype=torch.bfloat16),
            "y": i,
            "name": str(i),
            "w": torch.ones(1, requires_grad=True) if self.broken == "graph" else torch.ones(1),
            "none": np.zeros((0, 2)),
        }


def shared(batch: Any) -> dict[str, bool]:
    return {name: t.is_shared() for name, t in batch.items() if isinstance(t, torch.Tensor) and t.numel()}


HOW = [(0, None), (2, "fork"), (2, "spawn")]


@pytest.mark.parametrize(("workers", "start"), HOW)
def test_it_is_a_collate_function(workers, start):
    loader = DataLoader(Digits(), 4, num_workers=workers, multiprocessing_context=start, collate_fn=tb.collate)
    batches = list(loader)
    assert [batch["y"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batches[1]["x"].tolist() == [[[float(i)] * 3] * 2 for i in range(4, 8)]
    assert batches[0]["t"].dtype == torch.bfloat16
    assert batches[0]["name"] == ["0", "1", "2", "3"]
    assert batches[0]["none"].shape == (4, 0, 2)
    assert shared(batches[0]) == dict.fromkeys(["x", "t", "y", "w"], workers > 0)
    batches[0]["x"].add_(1)
    assert batches[0]["x"][0, 0, 0] == 1


class InWorker:
    """A collate function that says where the batch was made."""

    def __call__(self, samples: Any) -> Any:
        batch = tb.collate(samples)
        return {"made shared": all(shared(batch).values()), "x": batch["x"]}


def test_batch_is_made_in_shared_memory_not_moved_there():
    (batch,) = DataLoader(Digits(), 8, num_workers=1, multiprocessing_context="fork", collate_fn=InWorker())
    assert batch["made shared"]


@pytest.mark.parametrize(("workers", "start"), HOW[:2])
def test_error_in_a_worker_names_the_leaf(workers, start):
    loader = DataLoader(Digits("shape"), 4, num_workers=workers, multiprocessing_context=start, collate_fn=tb.collate)
    with pytest.raises(
        tb.UnsupportedArrayError, match=r"batch\['x'\]: sample 0 has shape \(2, 3\), sample 1 has \(3,\)"
    ):
        run_until_it_fails(loader)


def test_graph_cannot_go_to_another_process():
    loader = DataLoader(  # without the guard, the batch never comes
        Digits("graph"), 4, num_workers=1, multiprocessing_context="fork", collate_fn=tb.collate, timeout=20
    )
    with pytest.raises(tb.GraphError, match=r"batch\['w'\]: a sample requires grad.*\n.*detach"):
        run_until_it_fails(loader)


def test_worker_that_dies_is_an_error_of_the_loader_through_prefetch_too():
    loader = DataLoader(Digits("exit"), 4, num_workers=1, multiprocessing_context="fork", collate_fn=tb.collate)
    # torch tells the main thread by a signal, so the error may come before a batch that is ready.
    with pytest.raises(RuntimeError, match="exited unexpectedly"), tb.prefetch(loader, device="cpu") as ready:
        list(ready)


def test_conversion_to_cuda_in_a_forked_worker_is_a_device_error(monkeypatch):
    """CUDA in use in the parent of a forked worker is what torch reports, here by a stand-in."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr("tensorbridge._options._cuda", lambda framework: (1, 0, ""))
    with pytest.raises(
        tb.DeviceError, match=r"^batch\['x'\]: .*CUDA cannot be used in a forked process.*\nStart workers"
    ):
        tb.tree.to_torch({"x": np.zeros(3)}, device="cuda")


@pytest.mark.gpu
def test_conversion_to_cuda_in_a_real_forked_worker_is_a_device_error():
    code = """
        import numpy as np, torch, tensorbridge as tb
        from torch.utils.data import DataLoader
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 2
            def __getitem__(self, i): return tb.tree.to_torch({"x": np.zeros(3)}, device="cuda")
        torch.zeros(1, device="cuda")
        try:
            list(DataLoader(Data(), num_workers=1, multiprocessing_context="fork"))
        except tb.DeviceError as error:
            print("forked process" in str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.gpu
def test_device_samples_are_stacked_on_the_device():
    batch = tb.collate([{"x": torch.full((2,), i, device="cuda")} for i in range(3)])
    assert batch["x"].is_cuda
    assert batch["x"].tolist() == [[0, 0], [1, 1], [2, 2]]


# -- Where torch makes no memory


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def functional_mode():
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    return FunctionalTensorMode()


@pytest.mark.parametrize("mode", [fake_mode, functional_mode])
@pytest.mark.parametrize("stack", [tb.collate, tb.to_torch, tb.tree.to_torch])
def test_arrays_become_what_the_mode_makes_of_them_as_in_to_torch(stack, mode):
    with mode():
        made = tb.to_torch(np.zeros(3))
        result = stack([np.zeros(3), np.ones(3)])
        assert type(made) is not torch.Tensor
        assert type(result[0]) is type(made)
        assert result[0] is not result[1]
        assert result[0].shape == (3,)


def test_real_tensors_are_refused_by_name_in_fake_mode():
    x = torch.zeros(3)
    with fake_mode(), pytest.raises(tb.UnsupportedArrayError, match=r"collate: batch: sample 0: .*FakeTensorMode"):
        tb.collate([x, x])


@pytest.mark.parametrize("values", [["2020", "2021"], ["NaT", "2021"]])
@pytest.mark.parametrize("kind", ["M8[s]", "m8[s]"])
def test_dates_are_refused_with_a_cure_that_works_as_arrays_of_them_are(kind, values):
    dates = np.array([value if kind[0] == "M" or value == "NaT" else 3 for value in values], kind)
    for values, path in ((list(dates), "batch['t']"), ([dates] * 2, "batch['t']: sample 0")):
        samples = [{"t": value} for value in values]
        with pytest.raises(tb.UnsupportedArrayError) as error:
            tb.collate(samples)
        text, cure = str(error.value).splitlines()
        assert text.startswith(f"collate: {path}: ")
        assert "dates and durations are numbers with a unit" in text
        call = cure.partition("Convert ")[2].partition(" and keep the unit beside it")[0]
        assert cure.endswith(" Do so in the dataset, or in a function around collate.")
        batch = tb.collate([{"t": eval(call, {"np": np, "x": sample["t"]})} for sample in samples])
        assert batch["t"].dtype == torch.int64


def test_a_list_of_dates_is_told_as_dates():
    with pytest.raises(tb.UnsupportedArrayError) as error:
        tb.to_torch([np.datetime64("2020"), np.datetime64("2021")])
    cure = str(error.value).partition("\nConvert ")[2].partition(" and keep the unit")[0]
    assert eval(cure, {"np": np, "x": [np.datetime64("2020"), np.datetime64("2021")]}).tolist() == [50, 51]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # which torch uses for that itself
def test_tangents_of_forward_differentiation_are_stacked_with_their_values():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.full((2,), 3.0))
        for samples in ([dual, dual], [torch.ones(2), dual]):
            primal, tangent = forward_ad.unpack_dual(tb.collate(samples))
            assert primal.tolist() == [[1, 1], [1, 1]]
            assert tangent[-1].tolist() == [3, 3]
