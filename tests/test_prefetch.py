"""prefetch: in order, bounded, errors at their place; closed, dropped or at exit it leaves no thread behind."""

from __future__ import annotations

import collections
import contextvars
import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_frameworks
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _lease, _prefetch, _prefetch_roads, _streams

SOON = 5.0  # seconds: far more than anything here takes


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    if not set(threading.enumerate()) <= before:
        gc.collect()
    until = time.monotonic() + SOON
    while time.monotonic() < until and not set(threading.enumerate()) <= before:
        time.sleep(0.005)
    assert set(threading.enumerate()) <= before


class Source:
    """Batches, and what is done with them: how many were read, whether it was closed, and by which thread."""

    def __init__(self, count: int, *, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.count, self.fail_at, self.error = count, fail_at, error or ValueError("broken source")
        self.read = 0
        self.closed = threading.Event()
        self.threads: set[str] = set()

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Any:
        self.threads.add(threading.current_thread().name)
        if self.read == self.fail_at:
            raise self.error
        if self.read == self.count:
            raise StopIteration
        self.read += 1
        return {"x": np.full(3, self.read - 1), "name": f"batch {self.read - 1}"}

    def close(self) -> None:
        self.closed.set()


def eventually(condition: Any) -> bool:
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.002)
    return False


def on_host(batches: Any, **options: Any) -> Any:
    return tb.prefetch(batches, device="cpu", **options)


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


def text_at_2(batch: Any) -> Any:
    return {"x": np.array(["text"])} if int(batch["x"][0]) == 2 else batch


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
    "conversion": (lambda: Source(9), text_at_2, tb.UnsupportedArrayError, r"^batch\['x'\]: to_torch.*: numpy <U4"),
    "transform that returns nothing": (lambda: Source(9), nothing_at_2, TypeError, "returned None for batch 2"),
    "transform without an array": (lambda: Source(9), number_at_2, TypeError, "returned int without an array in it"),
    "transform that stops": (lambda: Source(9), stop_at_2, RuntimeError, "transform raised StopIteration for batch 2"),
}


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
        ({"device": "cuda", "to": "numpy"}, ValueError, 'say device="cpu"'),
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


def test_a_forked_process_without_cuda_is_told_at_the_call(monkeypatch):
    monkeypatch.setattr(tb._streams, "forked", lambda: True)
    with pytest.raises(tb.DeviceError, match="forked process"):
        tb.prefetch([np.zeros(3)])


# -- Closing, dropping, hanging, ending


def test_close_stops_the_worker_and_closes_the_source():
    source = Source(1000)
    ready = on_host(source)
    next(ready)
    ready.close()
    assert source.closed.is_set()
    assert list(ready) == []
    assert source.read <= 3
    ready.close()


def test_dropping_the_iterator_closes_the_source():
    source = Source(1000)
    ready = on_host(source)
    next(ready)
    del ready
    assert source.closed.wait(SOON)


def test_iterator_that_was_never_used_is_closed_when_dropped():
    source = Source(1000)
    on_host(source)
    assert source.closed.wait(SOON)


def test_with_block_closes_on_an_error_inside():
    source = Source(1000)
    with pytest.raises(ZeroDivisionError), on_host(source) as ready:
        next(ready)
        _ = 1 / 0
    assert source.closed.is_set()


class Hanging(Source):
    def __init__(self) -> None:
        super().__init__(1000)
        self.answer = threading.Event()

    def __next__(self) -> Any:
        if self.read == 1:
            self.answer.wait()
        return super().__next__()


def test_close_waits_for_a_source_that_hangs_only_so_long(monkeypatch):
    monkeypatch.setattr(_prefetch, "PATIENCE", 0.05)
    source = Hanging()
    ready = on_host(source)
    next(ready)
    began = time.monotonic()
    ready.close()
    assert time.monotonic() - began < SOON
    assert not source.closed.is_set()  # it is in the middle of an answer, and must not be touched
    assert list(ready) == []
    source.answer.set()
    assert source.closed.wait(SOON)


def test_consumer_that_waits_is_woken_by_close():
    source = Hanging()
    ready = on_host(source)
    next(ready)
    ended: list[Any] = []
    consumer = threading.Thread(target=lambda: ended.append(list(ready)))
    consumer.start()
    time.sleep(0.02)
    source.answer.set()
    ready.close()
    consumer.join(SOON)
    assert not consumer.is_alive()


def test_batches_are_not_kept_after_they_were_taken():
    """Not even while the worker waits for the next one."""
    gone: list[Any] = []
    answer = threading.Event()

    def source() -> Iterator[Any]:
        a = np.zeros(3)
        gone.append(weakref.ref(a))
        yield a
        del a
        answer.wait(SOON)
        yield np.ones(3)

    ready = on_host(source())
    assert next(ready).sum() == 0
    assert eventually(lambda: gone[0]() is None)
    answer.set()
    assert len(list(ready)) == 1


def test_batches_that_nobody_took_are_dropped_by_close():
    gone: list[Any] = []

    def source() -> Iterator[Any]:
        for _ in range(9):
            a = np.zeros(3)
            gone.append(weakref.ref(a))
            yield a
            del a

    ready = on_host(source(), depth=3)
    assert eventually(lambda: ready._state.ready.qsize() == 3)
    ready.close()
    assert all(reference() is None for reference in gone)
    assert list(ready) == []


def run(code: str, *, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("source", ["endless()", "hanging()"])
def test_interpreter_ends_with_an_open_iterator(source):
    done = run(f"""
        import itertools, threading, time
        import numpy as np, tensorbridge as tb
        def endless():
            try:
                for i in itertools.count():
                    yield np.full(4, i)
            finally:
                print("closed", flush=True)
        def hanging():
            yield np.zeros(4)
            time.sleep(60)
        ready = tb.prefetch({source}, device="cpu")
        next(ready)
        print("end", flush=True)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["end", "closed"] if source == "endless()" else ["end"])
    assert done.stderr == ""


def test_interpreter_waits_until_the_source_is_gone():
    """A DataLoader ends its processes when its last reference goes: a thread killed at that aborts the process."""
    done = run("""
        import time
        import numpy as np, tensorbridge as tb
        class Loader:
            def __iter__(self):
                return self
            def __next__(self):
                return np.zeros(4)
            def __del__(self):
                time.sleep(0.3)
                print("gone", flush=True)
        ready = tb.prefetch(Loader(), device="cpu")
        next(ready)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gone\n", "")


def test_iterator_taken_into_a_forked_child_says_so():
    done = run("""
        import os, sys
        import numpy as np, tensorbridge as tb
        ready = tb.prefetch([np.zeros(2)] * 9, device="cpu")
        next(ready)
        child = os.fork()
        if child == 0:
            try:
                next(ready)
            except RuntimeError as error:
                os._exit(7 if "after the fork" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        print(len(list(ready)))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8"


# -- The caller's context


def test_guard_of_the_caller_holds_in_the_worker_even_after_its_block():
    reversed_batches = [{"x": np.arange(3)}, {"x": np.arange(3)[::-1]}]
    with tb.copy_guard("error"):
        ready = on_host(reversed_batches)
    assert next(ready)["x"].tolist() == [0, 1, 2]
    with pytest.raises(tb.CopyRequiredError, match=r"^batch\['x'\]: .*copy_guard"):
        next(ready)
    assert [batch["x"].tolist() for batch in on_host(reversed_batches)] == [[0, 1, 2], [2, 1, 0]]


def test_trace_sees_the_worker():
    with tb.trace() as seen:
        list(on_host([{"x": np.arange(3)[::-1]}] * 4))
    assert [event.nbytes for event in seen.events] == [24] * 4
    assert {event.thread for event in seen.events} != {threading.current_thread().name}


def line_of(text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(i for i, line in enumerate(lines, 1) if line.strip().endswith(text))}"


def test_trace_and_warning_name_the_line_that_asked_for_each_conversion():
    """The worker's own conversions: the line that called prefetch. The transform's: a line of the transform."""

    def transform(batch: Any) -> Any:
        return tb.to_torch(batch)  # in the transform

    with tb.trace() as seen, tb.copy_guard("warn"), pytest.warns(tb.CopyWarning) as warned:
        list(on_host([np.arange(3)[::-1]], to="numpy", copy=True, transform=transform))
    lines = [line_of("# in the transform"), line_of('device="cpu", **options)')]
    assert [event.where for event in seen.events] == lines
    assert [f"{w.filename}:{w.lineno}" for w in warned] == lines


def test_context_variables_are_those_of_the_caller():
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    found: list[str] = []
    list(on_host([np.zeros(1)], transform=lambda batch: (found.append(variable.get()), batch)[1]))
    assert found == ["mine"]


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_that_of_the_caller(enabled):
    weight = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        (made,) = on_host([torch.ones(2)], transform=lambda batch: batch * weight)
    assert made.requires_grad == enabled


def test_many_consumers_share_the_batches():
    ready = on_host(Source(200), depth=3)
    found: list[int] = []

    def consume() -> None:
        found.extend(int(batch["x"][0]) for batch in ready)

    threads = [threading.Thread(target=consume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert sorted(found) == list(range(200))


class Squares(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return {"x": np.full(2, i), "y": i * i}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_is_a_source(workers):
    loader = torch.utils.data.DataLoader(Squares(), batch_size=4, num_workers=workers, collate_fn=tb.collate)
    made = list(on_host(loader))
    assert [batch["y"].tolist() for batch in made] == [[0, 1, 4, 9], [16, 25, 36, 49]]


# -- On a device: what is called, against a record


def test_batch_is_handed_over_to_the_stream_that_asks(monkeypatch):
    """Worker: read on the side stream, marked there. Consumer: waits for that mark, keeps the memory for its stream."""
    calls: list[Any] = []
    streams = {"side": 100, "mine": 7}

    def used_on(array: Any, stream: Any) -> None:
        calls.append(("used_on", array, stream))
        raise ValueError("memory of another library: nobody here knows its owner, and it is handed over as it is")

    class Mark:
        def __init__(self, place: int) -> None:
            self.place = place

        def holds_back(self, number: int, index: int) -> None:
            calls.append(("wait", self.place, number))

    monkeypatch.setattr(_streams, "side_stream", lambda index: "side")
    monkeypatch.setattr(_streams, "identify", lambda stream: (streams[stream], 0))
    monkeypatch.setattr(_streams, "current", lambda framework, index: 7)
    monkeypatch.setattr(_streams, "link", lambda *a: calls.append(("link", *a)))
    monkeypatch.setattr(_streams, "use_stream", lambda stream: calls.append(("use", stream)) or tb.copy_guard("allow"))
    monkeypatch.setattr(_streams, "mark", lambda number, index: calls.append(("mark", number)) or Mark(len(calls)))
    monkeypatch.setattr(_lease, "used_on", used_on)
    monkeypatch.setattr(_lease, "keep", lambda array, number, index: calls.append(("keep", array, number)))
    monkeypatch.setattr(_prefetch_roads.Cuda, "on_device", lambda road, batch: [type(batch).__name__])
    monkeypatch.setattr(_prefetch_roads, "_current_stream", lambda framework, index: "mine")
    monkeypatch.setattr(_prefetch_roads._leaves, "converted", lambda batch, want: calls.append("convert") or (batch,))
    monkeypatch.setattr(_prefetch, "road_for", lambda want: _prefetch_roads.Cuda("torch", 0))
    ready = on_host([[1]])
    assert next(ready) == ([1],)
    assert list(ready) == []
    assert calls == [
        ("link", 7, 100, 0),
        ("use", "side"),
        "convert",
        ("keep", "list", 100),
        ("keep", "list", 100),
        ("mark", 100),
        ("wait", 6, 7),  # for the mark that was the sixth call
        ("used_on", "tuple", "mine"),
    ]


@pytest.fixture
def machine(monkeypatch):
    for machine in fake_frameworks.installed(monkeypatch, without=["torch"]):
        machine.patience = SOON
        yield machine


@pytest.mark.parametrize("waits", [True, False])
def test_work_of_the_consumer_waits_for_its_batch_on_a_device(waits, machine, monkeypatch):
    """The transfer has not begun when the batch is taken. Without the wait, a read on another stream is too early."""
    if not waits:
        monkeypatch.setattr(_streams.Mark, "holds_back", lambda mark, number, index: None)
    mine, side = 0x50, _streams.side_stream(0).ptr
    machine.current["cupy"][0] = mine
    seen: list[Any] = []
    with machine.hold(0, side):
        ready = tb.prefetch([{"x": np.ones(3, "f4"), "y": np.ones(2, "f4")}], to="cupy")
        batch = next(ready)
        machine.kernel(0, mine, lambda: seen.append(batch["x"].array().tolist()))
        machine.run()
        assert seen == ([] if waits else [[0, 0, 0]])
    assert seen == [[1, 1, 1] if waits else [0, 0, 0]]
    assert list(ready) == []


def test_batches_that_were_on_the_device_are_let_go_once_they_were_read(machine):
    gone: list[Any] = []

    def source() -> Iterator[Any]:
        for i in range(20):
            a = machine.cupy.full((3,), float(i))
            gone.append(weakref.ref(a))
            yield a
            del a
            machine.run()  # what was queued for the batch before is done

    for batch in tb.prefetch(source(), to="cupy"):
        del batch
    kept = [reference() is not None for reference in gone]
    assert kept[:-2] == [False] * 18


def test_batch_that_is_no_tree_before_its_transform_goes_to_a_device_too(machine):
    strange: Any = [np.ones(3, "f4")]
    strange.append(strange)
    (made,) = tb.prefetch([strange], to="cupy", transform=lambda batch: batch[0])
    machine.run()
    assert made.array().tolist() == [1, 1, 1]
    with pytest.raises(tb.UnsupportedArrayError, match="contains itself"):
        list(tb.prefetch([strange], to="cupy"))


@pytest.mark.gpu
@pytest.mark.parametrize("to", ["torch", "cupy"])
def test_batches_arrive_on_the_device_in_order(to):
    rng = np.random.default_rng(0)
    batches = [{"x": rng.random((512, 1024), "f4"), "small": rng.random(7), "n": i} for i in range(12)]
    for i, batch in enumerate(tb.prefetch(batches, to=to)):
        assert batch["n"] == i
        assert np.array_equal(tb.to_numpy(batch["x"]), batches[i]["x"])
        assert np.array_equal(tb.to_numpy(batch["small"]), batches[i]["small"])


@pytest.mark.gpu
def test_source_may_reuse_its_memory():
    buffer = np.empty((1024, 1024), "f4")

    def source() -> Iterator[Any]:
        for i in range(20):
            buffer.fill(i)
            yield buffer

    sums = [batch.double().sum() for batch in tb.prefetch(source(), depth=3)]
    assert [s.item() for s in sums] == [i * 1024 * 1024.0 for i in range(20)]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_consumer_on_a_side_stream_sees_finished_batches_and_keeps_their_memory(pinned):
    """The consumer's stream is held busy, so that its reads are late; batches are dropped at once."""
    source = [torch.full((1024, 1024), float(i)) for i in range(10)]
    if pinned:
        source = [t.pin_memory() for t in source]
    side = torch.cuda.Stream()
    sums = []
    with torch.cuda.stream(side):
        for batch in tb.prefetch(source, depth=2):
            torch.cuda._sleep(20_000_000)
            sums.append(batch.double().sum())
            del batch
    side.synchronize()
    assert [s.item() for s in sums] == [i * 1024 * 1024.0 for i in range(10)]


@pytest.mark.gpu
def test_current_stream_and_device_are_left_as_they_were():
    before = torch.cuda.current_stream(), torch.cuda.current_device()
    list(tb.prefetch([torch.zeros(1000)] * 5))
    assert (torch.cuda.current_stream(), torch.cuda.current_device()) == before


@pytest.mark.gpu
def test_tensors_already_on_the_device_pass_through_ordered():
    source = [torch.full((1 << 20,), float(i), device="cuda") for i in range(6)]
    made = [batch.sum().item() for batch in tb.prefetch(source, transform=lambda t: t + 1)]
    assert made == [(i + 1) * float(1 << 20) for i in range(6)]
