"""prefetch over loaders that have a state of their own: persistent workers, Accelerate's."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources import on_host
from torch.utils.data import DataLoader, Dataset

import tensorbridge as tb
from tensorbridge._background import _worker

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class OneIterator:
    """As a DataLoader with persistent workers: each loop gets the same iterator, reset, for one reader at a time."""

    persistent_workers = True

    def __init__(self, slow: float = 0.02) -> None:
        self.slow = slow
        self.lock = threading.Lock()
        self.reading, self.mixed = threading.Event(), False

    def __iter__(self) -> Iterator[Any]:
        self.mixed |= self.lock.locked()
        self.number = 0
        return self._reader()

    def _reader(self) -> Iterator[Any]:
        return iter(self.read, None)

    def read(self) -> Any:
        if not self.lock.acquire(blocking=False):
            self.mixed = True
            return None
        try:
            self.reading.set()
            time.sleep(self.slow)
            self.number += 1
            return None if self.number > 8 else {"x": np.full(2, self.number)}
        finally:
            self.lock.release()


def numbers(batches: Any) -> list[int]:
    return [int(batch["x"][0]) for batch in batches]


def first(batches: Any) -> None:
    for _ in batches:
        break


def fails(batches: Any) -> None:
    try:
        for _ in batches:
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def closed(batches: Any) -> None:
    with batches as ready:
        next(ready)


@pytest.mark.parametrize("leave", [first, fails, closed])
@pytest.mark.parametrize("then", ["prefetch", "plain"])
def test_a_loop_that_was_left_is_out_of_the_loader_before_the_next_begins(leave, then, monkeypatch):
    monkeypatch.setattr(_worker, "PATIENCE", 0.001)
    loader = OneIterator()
    for _ in range(3):
        leave(on_host(loader))
        assert numbers(on_host(loader) if then == "prefetch" else loader) == [*range(1, 9)]
    assert not loader.mixed


def test_a_loop_that_is_kept_from_ending_is_ended_by_the_next():
    loader = OneIterator()
    kept = on_host(loader)  # as a traceback does, in a notebook
    next(kept)
    assert numbers(on_host(loader)) == [*range(1, 9)]
    assert not loader.mixed
    with pytest.raises(RuntimeError, match=r"^prefetch: a later prefetch reads this loader, whose persistent workers"):
        list(kept)
    kept.close()


def test_batches_that_were_read_to_the_end_are_still_given_out():
    loader = OneIterator(0)
    kept = on_host(loader, depth=20)
    kept._worker.join()
    assert numbers(on_host(loader)) == [*range(1, 9)]
    assert numbers(kept) == [*range(1, 9)]


def test_a_collector_in_another_thread_does_not_wait_for_the_reader():
    loader = OneIterator(0.3)
    holder = [on_host(loader)]
    worker = holder[0]._worker
    assert loader.reading.wait(5)
    collector = threading.Thread(target=holder.clear)
    collector.start()
    collector.join()
    assert worker.is_alive()
    assert numbers(on_host(loader)) == [*range(1, 9)]
    assert not loader.mixed


def test_loops_over_other_loaders_do_not_wait():
    slow, other = OneIterator(0.3), OneIterator(0)
    kept = on_host(slow)
    assert numbers(on_host(other)) == [*range(1, 9)]
    assert kept._worker.is_alive()
    kept.close()


def test_a_transform_may_begin_the_loader_again():
    loader = OneIterator(0)
    seen = []

    def again(batch: Any) -> Any:
        if not seen:
            seen.append(True)
            on_host(loader).close()
        return batch

    assert numbers(on_host(loader, transform=again))[0] == 1


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> Any:
        time.sleep(0.002)
        return {"x": np.zeros(3, "float32"), "y": i}


def test_persistent_workers_serve_the_next_epoch_after_a_break():
    loader = DataLoader(Rows(), 4, num_workers=1, persistent_workers=True, collate_fn=tb.collate)
    for epoch in range(4):
        for i, _ in enumerate(on_host(loader)):
            if i == epoch:
                break
        batches = on_host(loader) if epoch % 2 else loader
        assert [y for batch in batches for y in batch["y"].tolist()] == [*range(32)]


class Prepared(list[Any]):
    """As what `Accelerator.prepare` makes of a DataLoader."""

    gradient_state: Any = object()
    end_of_dataloader = False


def test_a_loader_that_tells_accelerate_of_its_last_batch_is_refused():
    batches = Prepared([{"x": torch.ones(2)}])
    text = (
        r"^prefetch: batches is Prepared, a loader that Accelerate has prepared\. It tells accumulate\(\) and "
        r"gather_for_metrics\(\) when the last batch is read, which here is too early: gradients would be lost\. "
        r"Iterate it as it is; it moves its batches itself\.$"
    )
    with pytest.raises(ValueError, match=text):
        tb.prefetch(batches, device="cpu")


def test_what_a_loader_collates_in_the_thread_is_told_at_the_line_of_prefetch():
    """With no workers torch's loader calls `collate` itself, and no line of the caller's is on the thread's stack."""
    loader = DataLoader([np.zeros(3), np.ones(3)], batch_size=2, collate_fn=tb.collate)
    with tb.trace() as seen, warnings.catch_warnings(record=True) as said, tb.copy_guard("warn"):
        warnings.simplefilter("always")
        list(tb.prefetch(loader, device="cpu"))  # here
    lines = Path(__file__).read_text().splitlines()
    here = next(n for n, line in enumerate(lines, 1) if line.endswith("# here"))
    assert {event.where for event in seen.events} == {f"{__file__}:{here}"}
    assert {(w.filename, w.lineno) for w in said} == {(__file__, here)}


@pytest.mark.parametrize("end", [list, lambda ready: ready.close()], ids=["read", "closed"])
def test_a_second_loop_over_what_is_used_up_is_warned_of_where_the_source_has_more(end):
    """As if it were a loader: it would train on nothing, and nobody would see."""
    ready = tb.prefetch([np.zeros(3)] * 2, device="cpu")
    assert iter(ready) is ready
    end(ready)
    text = r"prefetch: this iterator is used up and gives no batch; call prefetch\(list\) again for another loop$"
    with pytest.warns(UserWarning, match=text) as seen:
        assert list(ready) == []
    assert [w.filename for w in seen] == [__file__]


def test_no_other_loop_over_what_prefetch_returns_is_warned_of():
    once = tb.prefetch((np.zeros(3) for _ in range(2)), device="cpu")  # a generator has no more
    left = tb.prefetch([np.zeros(3)] * 3, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(once)) == 2
        assert list(once) == []
        for _ in left:
            break
        assert len(list(left)) == 2
