"""prefetch: closed, dropped or at exit it leaves no thread behind; the worker is in the caller's context."""

from __future__ import annotations

import contextvars
import gc
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources import SOON, Source, eventually, on_host

import tensorbridge as tb
from tensorbridge._background import _worker

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

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
    monkeypatch.setattr(_worker, "PATIENCE", 0.05)
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
        batches = [np.arange(3)[::-1]]
        list(tb.prefetch(batches, to="numpy", device="cpu", copy=True, transform=transform))  # for the worker
    lines = [line_of("# in the transform"), line_of("# for the worker")]
    assert [event.where for event in seen.events] == lines
    assert [f"{w.filename}:{w.lineno}" for w in warned] == lines


def test_numpy_is_on_the_host_and_another_device_is_refused():
    for device in ("cpu", None):
        assert [type(batch) for batch in tb.prefetch([torch.ones(2)], to="numpy", device=device)] == [np.ndarray]
    for device in ("cuda", "cuda:1", 0):
        text = f'prefetch(to="numpy", device={device!r}): NumPy arrays are on the host; leave device out'
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            tb.prefetch([np.ones(2)], to="numpy", device=device)


def test_without_a_device_numpy_is_on_the_host():
    assert [type(batch) for batch in tb.prefetch([torch.ones(2)], to="numpy")] == [np.ndarray]


def test_a_guard_warns_once_of_equal_batches_as_python_does_of_a_line():
    with warnings.catch_warnings(record=True) as warned, tb.copy_guard("warn"):
        warnings.simplefilter("default")
        list(on_host([np.arange(3)[::-1] for _ in range(4)]))
    assert [w.category for w in warned] == [tb.CopyWarning]


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


def test_a_batch_that_one_consumer_has_taken_is_not_lost_where_another_comes_to_the_end():
    state = _worker.State(2)
    shelf = state.ready

    class Interrupted:
        """Between the look at the shelf and what follows, another consumer finds the end, and closes."""

        put, get_nowait = shelf.put, shelf.get_nowait

        def get(self) -> Any:
            item = shelf.get()
            state.close()
            return item

    state.put(_worker.Batch("the last"))
    state.ready = Interrupted()
    assert state.take().value == "the last"
    assert state.take() is None


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


def test_threads_may_begin_loops_over_one_loader_at_the_same_time():
    class Loader(list):
        persistent_workers = True

    failed = []
    loader = Loader([np.zeros(2)])

    def loop():
        try:
            for _ in range(50):
                with tb.prefetch(Loader(loader), device="cpu") as ready:
                    list(ready)
        except RuntimeError as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=loop) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed


def test_a_thread_that_cannot_be_started_is_an_error_and_nothing_else(monkeypatch):
    def none(thread):
        raise RuntimeError("can't start new thread")

    unheard = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    monkeypatch.setattr(_worker.Worker, "start", none)
    said = ""
    try:
        on_host(Source(3))
    except RuntimeError as error:
        said = str(error)
    gc.collect()  # the iterator is gone with the traceback
    assert said == "can't start new thread"
    assert unheard == []


@pytest.mark.parametrize("to", ["pytorch", np, ["torch"]])
def test_a_target_that_is_none_is_told_as_by_plan(to):
    with pytest.raises(ValueError, match=re.escape('choose "numpy", "torch" or "cupy"')) as told:
        tb.prefetch([np.zeros(2)], to=to)
    with pytest.raises(ValueError) as planned:
        tb.plan(np.zeros(2), to)
    assert str(told.value).removeprefix("prefetch") == str(planned.value).removeprefix("plan")


def test_an_interrupt_while_a_batch_is_waited_for_costs_none_and_no_room():
    """It does not wake the wait: it strikes when the batch has just been taken, which is given out by the next call."""
    code = """
    import _thread, signal, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put into the background
    import numpy as np
    import tensorbridge as tb

    def source():
        for i in range(8):
            time.sleep(0.2 if i % 2 else 0.0)
            yield np.full(2, i)

    got, interrupts = [], 0
    batches = tb.prefetch(source(), device="cpu", depth=2)
    while True:
        timer = threading.Timer(0.1, _thread.interrupt_main)
        timer.start()
        try:
            got.append(int(next(batches)[0]))
            timer.cancel()
            timer.join()
        except StopIteration:
            timer.cancel()
            break
        except KeyboardInterrupt:
            interrupts += 1
    print(got, interrupts > 2)
    """
    assert run(code).stdout == "[0, 1, 2, 3, 4, 5, 6, 7] True\n"


def test_an_interrupt_while_a_loop_that_was_left_is_waited_for_is_not_lost():
    """Python drops what a finalizer raises."""
    code = """
    import _thread, signal, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put into the background
    import numpy as np, tensorbridge as tb

    def source():
        yield np.ones(3)
        threading.Timer(0.2, _thread.interrupt_main).start()
        time.sleep(5)

    def loop():
        for batch in tb.prefetch(source(), device="cpu"):
            time.sleep(0.1)
            break

    try:
        loop()
        time.sleep(5)
    except KeyboardInterrupt:
        print("interrupted")
    """
    assert run(code).stdout == "interrupted\n"


def test_a_thread_that_has_the_number_of_the_finished_worker_may_ask_for_batches():
    ready = tb.prefetch([np.ones(2)] * 2, device="cpu", depth=3)
    ready._worker.join()
    ready._worker._ident = threading.get_ident()  # as the system gives it out again
    assert len(list(ready)) == 2


def test_what_a_source_raises_at_its_end_does_not_hide_why_a_batch_failed():
    def source():
        try:
            yield np.ones(3)
        finally:
            raise OSError("at the end")

    def transform(batch):
        raise ValueError("of the batch")

    with pytest.raises(OSError, match="at the end") as error:
        list(tb.prefetch(source(), device="cpu", transform=transform))
    assert isinstance(error.value.__context__, ValueError)
