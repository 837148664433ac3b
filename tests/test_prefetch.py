"""prefetch: batches in order, bounded, errors at their place, shared with the source or not."""

from __future__ import annotations

import collections
import copy
import pickle
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sources import SOON, Source, eventually, on_host

import tensorbridge as tb

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

# -- What comes out


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_batches_come_converted_in_order(to, depth):
    source = Source(20)
    made = list(on_host(source, to=to, depth=depth))
    kind = {"torch": torch.Tensor, "numpy": np.ndarray}[to]
    assert [int(batch["x"][0]) for batch in made] == list(range(20))
    assert all(isinstance(batch["x"], kind) and batch["name"].startswith("batch") for batch in made)
    assert source.closed.is_set()
    assert threading.current_thread().name not in source.threads


ITERABLES: dict[str, Any] = {
    "empty": (0, list),
    "list": (3, lambda: [np.zeros(2)] * 3),
    "tuple": (1, lambda: ({"x": np.zeros(2)},)),
    "generator": (4, lambda: (np.full(2, i) for i in range(4))),
    "array": (3, lambda: np.zeros((3, 2))),
}


@pytest.mark.parametrize("name", ITERABLES)
def test_any_iterable_will_do(name):
    count, make = ITERABLES[name]
    assert len(list(on_host(make()))) == count


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(2)] * 4)


def test_it_is_as_long_as_its_source_however_much_was_read():
    loader = torch.utils.data.DataLoader(list(range(10)), batch_size=4)
    for source, length in ((loader, 3), ([np.zeros(2)] * 2, 2), ([], 0)):
        ready = on_host(source)
        assert len(ready) == length
        assert len(list(ready)) == len(ready) == length
        assert ready, "an iterator is true, though it may be empty"


def test_without_a_length_of_its_source_it_has_none():
    ready = on_host(np.zeros(2) for _ in range(2))
    with pytest.raises(TypeError, match=r"^object of type 'Prefetch' has no len\(\): the source has none$"):
        len(ready)
    assert ready
    assert len(list(ready)) == 2
    ready = on_host(torch.utils.data.DataLoader(Unsized(), batch_size=2))
    with pytest.raises(TypeError, match="'Unsized' has no len"):
        len(ready)
    assert len(list(ready)) == 2


def test_an_infinite_source_is_not_read_to_its_end():
    def forever() -> Iterator[Any]:
        number = 0
        while True:
            yield np.full(2, number)
            number += 1

    with on_host(forever()) as ready:
        assert [int(next(ready)[0]) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_transform_runs_before_the_conversion_and_in_the_thread():
    seen: list[Any] = []

    def transform(batch: Any) -> Any:
        seen.append((type(batch["x"]), threading.current_thread().name))
        return batch["x"] * 2, batch["name"]

    made = list(on_host(Source(3), transform=transform))
    assert [pair[0].tolist() for pair in made] == [[0, 0, 0], [2, 2, 2], [4, 4, 4]]
    assert {kind for kind, _ in seen} == {np.ndarray}
    assert threading.current_thread().name not in {name for _, name in seen}


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_batches_ahead(depth):
    source = Source(50)
    ready = on_host(source, depth=depth)
    for taken in range(1, 6):
        assert eventually(lambda taken=taken: source.read == taken - 1 + depth)
        time.sleep(0.01)
        assert source.read == taken - 1 + depth
        next(ready)
    ready.close()


def test_reading_overlaps_with_the_consumer():
    together = threading.Barrier(2, timeout=SOON)

    def source() -> Iterator[Any]:
        yield np.zeros(1)
        together.wait()  # passes only if the consumer is at work on the first batch meanwhile
        yield np.ones(1)

    ready = on_host(source())
    next(ready)
    together.wait()
    assert int(next(ready)[0]) == 1
    assert list(ready) == []


# -- Errors arrive at their place


def failing_transform(batch: Any) -> Any:
    if int(batch["x"][0]) == 2:
        raise KeyError("broken transform")
    return batch


def dates_at_2(batch: Any) -> Any:
    return {"x": np.array(["2026-01-01"], dtype="M8[D]")} if int(batch["x"][0]) == 2 else batch


def nothing_at_2(batch: Any) -> Any:
    return None if int(batch["x"][0]) == 2 else batch


def number_at_2(batch: Any) -> Any:
    return 3 if int(batch["x"][0]) == 2 else batch


def stop_at_2(batch: Any) -> Any:
    if int(batch["x"][0]) == 2:
        raise StopIteration
    return batch


FAILURES: dict[str, Any] = {
    "source": (lambda: Source(9, fail_at=2), None, ValueError, "broken source"),
    "source, by no ordinary exception": (lambda: Source(9, fail_at=2, error=SystemExit(3)), None, SystemExit, "3"),
    "transform": (lambda: Source(9), failing_transform, KeyError, "broken transform"),
    "conversion": (lambda: Source(9), dates_at_2, tb.UnsupportedArrayError, r"^batch\['x'\]: to_torch.*: numpy date"),
    "transform that returns nothing": (lambda: Source(9), nothing_at_2, TypeError, "returned None for batch 2"),
    "transform without an array": (lambda: Source(9), number_at_2, TypeError, "returned int without an array in it"),
    "transform that stops": (lambda: Source(9), stop_at_2, RuntimeError, "transform raised StopIteration for batch 2"),
}


def test_a_transform_of_batches_without_arrays_may_give_none():
    ready = tb.prefetch([["a", "b"], ["c"]], device="cpu", transform=lambda names: [name.upper() for name in names])
    assert list(ready) == [["A", "B"], ["C"]]
    with pytest.raises(TypeError, match=r"^prefetch: transform returned None for batch 0"):
        next(tb.prefetch([["a"]], device="cpu", transform=lambda names: None))


@pytest.mark.parametrize("name", FAILURES)
def test_error_arrives_at_its_place_with_its_traceback(name):
    make, transform, error, text = FAILURES[name]
    source = make()
    ready = on_host(source, transform=transform, depth=5)
    assert [int(next(ready)["x"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(error, match=text) as caught:
        next(ready)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "_read" in names
    assert {"source": "__next__", "transform": "failing_transform"}.get(name, "_read") in names
    assert list(ready) == []
    assert source.closed.is_set()


@pytest.mark.parametrize("who", ["source", "transform"])
def test_worker_that_asks_for_its_own_batches_is_an_error_not_a_deadlock(who):
    started = threading.Event()

    def ask(batch: Any) -> Any:
        started.wait(SOON)
        return next(ready)

    def source() -> Iterator[Any]:
        yield ask(None)

    ready = on_host(source()) if who == "source" else on_host(Source(3), transform=ask)
    started.set()
    with pytest.raises(RuntimeError, match=r"^prefetch: its own source or transform asks for the next batch.*itself"):
        next(ready)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_iterator_cannot_be_copied_or_pickled(how):
    with on_host(Source(3)) as ready:
        with pytest.raises(TypeError, match=r"^prefetch: .* cannot be copied or pickled: .*; call prefetch where"):
            how(ready)
        assert next(ready)["x"].tolist() == [0, 0, 0]


def test_operation_in_place_reaches_the_source_unless_batches_are_copied():
    source = np.ones(3)
    next(on_host([source], copy=True)).mul_(2)
    assert source.tolist() == [1, 1, 1]
    next(on_host([source])).mul_(2)
    assert source.tolist() == [2, 2, 2]


def test_generator_that_fails_has_run_its_cleanup():
    cleaned: list[str] = []

    def source() -> Iterator[Any]:
        try:
            yield np.zeros(1)
            raise OSError("disk gone")
        finally:
            cleaned.append("done")

    ready = on_host(source())
    next(ready)
    with pytest.raises(OSError, match="disk gone"):
        next(ready)
    assert cleaned == ["done"]


def test_error_of_closing_the_source_is_raised_by_close():
    class Stubborn(Source):
        def close(self) -> None:
            raise OSError("cannot close")

    ready = on_host(Stubborn(9))
    next(ready)
    with pytest.raises(OSError, match="cannot close"):
        ready.close()
    ready.close()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"depth": 0}, ValueError, "at least 1"),
        ({"depth": 2.0}, TypeError, "as an int"),
        ({"depth": True}, TypeError, "as an int"),
        ({"to": "jax"}, ValueError, 'choose "numpy"'),
        ({"transform": 3}, TypeError, "a callable or None"),
        ({"device": "cuda", "to": "numpy"}, ValueError, "on the host; leave device out"),
        ({"device": "tpu"}, ValueError, "choose"),
        ({"device": "cpu", "to": "cupy"}, (ValueError, tb.MissingFrameworkError), "^prefetch"),
        ({"copy": 1}, TypeError, r"^prefetch\(copy=1\): copy is True, False or None"),
        ({"copy": 1, "to": "numpy"}, TypeError, r"^prefetch\(copy=1\)"),
    ],
)
def test_options_that_make_no_sense_are_errors_at_the_call(options, error, text):
    source = Source(3)
    with pytest.raises(error, match=text):
        tb.prefetch(source, **{"device": "cpu"} | options)
    assert source.read == 0


NO_BATCHES: dict[str, Any] = {
    "a number": (lambda: 3, r"^prefetch: batches is int, which cannot be iterated.*DataLoader"),
    "nothing": (lambda: None, r"^prefetch: batches is NoneType, which cannot be iterated"),
    "one batch": (lambda: {"x": np.zeros(3)}, r"^prefetch: batches is dict, .*keys.*\[batch\]"),
    "one batch of another class": (lambda: collections.UserDict(x=np.zeros(3)), r"^prefetch: batches is UserDict, "),
    "text": (lambda: "data/train", r"^prefetch: batches is str"),
    "a number in an array": (lambda: np.array(3), r"^prefetch: batches is ndarray, which cannot be iterated"),
}


@pytest.mark.parametrize("name", NO_BATCHES)
def test_what_is_not_an_iterable_of_batches_is_an_error_at_the_call(name):
    make, text = NO_BATCHES[name]
    with pytest.raises(TypeError, match=text):
        on_host(make())


def test_error_of_making_an_iterator_is_that_of_the_source():
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            raise TypeError("no file is open")

    with pytest.raises(TypeError, match="no file is open"):
        on_host(Broken())


# -- Shared with the source, or not


def refilled() -> Iterator[Any]:
    """One buffer, filled again and again: what a camera, a file reader or a simulation does."""
    buffer = np.zeros(3)
    for i in range(6):
        buffer.fill(i)
        yield {"x": buffer, "t": torch.from_numpy(buffer)}


@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_copy_keeps_batches_apart_from_a_buffer_that_is_filled_again(to):
    batches = list(on_host(refilled(), to=to, depth=6, copy=True))
    assert [[int(x[0]) for x in batch.values()] for batch in batches] == [[i, i] for i in range(6)]
    shared = list(on_host(refilled(), to=to, depth=6))
    assert [int(batch["x"][0]) for batch in shared] == [5] * 6  # as the docstring says: they are one memory


def test_copy_false_refuses_at_the_batch_that_would_be_copied():
    ready = on_host([np.arange(3), np.arange(3)[::-1]], copy=False)
    assert next(ready).tolist() == [0, 1, 2]
    with pytest.raises(tb.CopyRequiredError, match=r"^batch: to_torch\(.*copy=False\)"):
        next(ready)


def test_missing_device_is_an_error_at_the_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = Source(3)
    with pytest.raises(tb.DeviceError, match="sees no usable CUDA device"):
        tb.prefetch(source)
    assert source.read == 0


def test_it_says_what_it_is():
    batches = tb.prefetch([np.zeros(3)], device="cpu")
    assert repr(batches) == "<tensorbridge.Prefetch of list>"
    list(batches)
    assert repr(batches) == "<tensorbridge.Prefetch of list, used up>"


@pytest.mark.parametrize(("there", "said"), [(None, "cpu"), (torch.device("mps"), "mps")])
def test_where_the_default_is_not_there_one_that_is_is_named(monkeypatch, there, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    with pytest.raises(tb.DeviceError) as refused:
        tb.prefetch([np.zeros(3)])
    assert str(refused.value).startswith("prefetch(device='cuda'): cuda:0 does not exist")
    assert str(refused.value).splitlines()[2:] == [f'That is where prefetch goes by default: give device="{said}".']
    with pytest.raises(tb.DeviceError) as refused:
        tb.prefetch([np.zeros(3)], device="cuda")
    assert len(str(refused.value).splitlines()) == 2


def test_a_forked_process_without_cuda_is_told_at_the_call(monkeypatch):
    monkeypatch.setattr(tb._cuda._streams, "forked", lambda: True)
    with pytest.raises(tb.DeviceError, match="forked process"):
        tb.prefetch([np.zeros(3)])


@pytest.mark.parametrize("mode", [torch.autocast("cpu"), torch.inference_mode(), torch.no_grad(), torch.device("meta")])
def test_of_the_callers_modes_the_grad_mode_alone_is_in_force_in_the_thread(mode):
    grad: list[bool] = []
    seen: list[Any] = []

    def look(batch: Any) -> Any:
        grad.append(torch.is_grad_enabled())
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.empty(1).device.type))
        return batch

    with mode:
        wanted = torch.is_grad_enabled()
        list(on_host([np.zeros(1)], transform=look))
    assert grad == [wanted]
    assert seen == [(False, False, "cpu")]
