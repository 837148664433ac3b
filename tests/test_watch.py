"""Copy guard and trace: what they forbid, what they record, and whom they see."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _watch


@pytest.fixture
def reversed_array() -> np.ndarray:
    return np.arange(6.0)[::-1]


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    gc.collect()  # a context that was copied under a guard may be held by the traceback of an error
    assert not _watch.watching


def test_guard_holds_in_no_child_process_forked_or_spawned(reversed_array):
    with tb.copy_guard("error"):
        pid = os.fork()
        if not pid:
            os._exit(0 if tb.to_torch(reversed_array).tolist() == [5, 4, 3, 2, 1, 0] else 1)
        assert os.waitpid(pid, 0)[1] == 0
        with pytest.raises(tb.CopyRequiredError):
            tb.to_torch(reversed_array)


def test_guard_raises_before_anything_moves(reversed_array):
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError) as caught:
        tb.to_torch(reversed_array)
    assert str(caught.value) == (
        'to_torch: numpy float64 (6,) on cpu would move 48 B, and copy_guard("error") forbids it.\n'
        "  pack   48 B   torch has no negative strides\n"
        "  share   0 B   torch.from_numpy: the same memory\n"
        'Allow it with copy_guard("allow") around this call, or share x, the argument, '
        "as it lies, values in opposite order: to_torch(x[::-1])."
    )
    assert caught.value.plan.bytes_moved == 48


def test_guarded_fill_leaves_out_as_it_was(reversed_array):
    out = torch.zeros(6, dtype=torch.float64)
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array, out=out)
    assert not out.any()


def test_the_callers_line_is_named_where_the_way_to_the_package_goes_up_and_down(tmp_path):
    """As by ``sys.path.insert(0, join(dirname(__file__), ".."))``: then it is in the names of our files, too."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {os.path.join(os.path.dirname(__file__), '..')!r})\n"
        "import numpy as np, tensorbridge as tb\n"
        "with tb.trace() as seen:\n"
        "    tb.to_torch(np.arange(3.0)[::-1])\n"
        "assert '..' in tb.__file__\n"
        "print(seen.events[0].where)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.stdout == f"{script}:4\n", run.stderr


def test_a_guard_that_was_never_opened_says_so_at_its_line():
    with pytest.warns(RuntimeWarning) as told:
        tb.copy_guard("error", min_bytes=8)
        line = sys._getframe().f_lineno - 1
    (warning,) = told
    assert str(warning.message) == (
        "copy_guard('error', min_bytes=8) was never opened, and guarded nothing; open it by a with block"
    )
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_guard_that_the_program_keeps_to_its_end_says_nothing():
    code = "import tensorbridge as tb\nKEPT = tb.copy_guard('error')"
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert "copy_guard" not in run.stderr


def test_a_guard_that_was_opened_or_decorates_ends_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard = tb.copy_guard("error")
        with guard:
            pass
        del guard
        tb.copy_guard("error")(len)
        for wrong in ({"mode": "eror"}, {"mode": "error", "kinds": []}):
            with pytest.raises(ValueError, match="copy_guard"):
                tb.copy_guard(**wrong)
        gc.collect()


def test_guard_lets_shared_conversions_pass():
    with tb.copy_guard("error"):
        assert tb.to_torch(np.zeros(3)).shape == (3,)
        assert tb.to_numpy(torch.zeros(3)).shape == (3,)
        assert tb.to_torch(1.5).item() == 1.5


def test_guard_warns_at_the_callers_line(reversed_array):
    with tb.copy_guard("warn"), pytest.warns(tb.CopyWarning) as caught:
        tb.to_torch(reversed_array)
    assert caught[0].filename == __file__
    assert str(caught[0].message).startswith("to_torch: numpy float64 (6,) on cpu moves 48 B: torch has no negative")


def test_inner_guard_wins_and_the_outer_one_comes_back(reversed_array):
    with tb.copy_guard("error"):
        with tb.copy_guard("allow"):
            tb.to_torch(reversed_array)
        with pytest.raises(tb.CopyRequiredError):
            tb.to_torch(reversed_array)
    tb.to_torch(reversed_array)


def test_a_guard_that_ends_takes_away_its_own_and_not_an_outer_one_like_it(reversed_array):
    with tb.copy_guard("error"), tb.copy_guard("allow"):
        with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError):
            tb.to_torch(reversed_array)
        tb.to_torch(reversed_array)


def test_min_bytes_lets_smaller_moves_pass(reversed_array):
    with tb.copy_guard("error", min_bytes=49):
        tb.to_torch(reversed_array)
    with tb.copy_guard("error", min_bytes=48), pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array)


def test_kinds_select_the_moves_that_count(reversed_array):
    with tb.copy_guard("error", kinds=["h2d", "d2h"]):
        tb.to_torch(reversed_array)
    with tb.copy_guard("error", kinds="h2h"), pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array)


@pytest.mark.parametrize("options", [{"min_bytes": -1}, {"kinds": ["up"]}, {"kinds": []}])
def test_senseless_guard_is_refused_at_once(options):
    with pytest.raises(ValueError, match="copy_guard"):
        tb.copy_guard("error", **options)


def test_unknown_mode_is_refused_at_once():
    with pytest.raises(ValueError, match='choose "error", "warn" or "allow"'):
        tb.copy_guard("strict")
    with pytest.raises(TypeError, match="as an int"):
        tb.copy_guard("error", min_bytes=1.5)
    with pytest.raises(ValueError, match="did you mean 'error'"):
        tb.copy_guard("errors")
    with pytest.raises(ValueError, match="guards nothing; leave kinds out for all"):
        tb.copy_guard("error", kinds=())


def test_guards_and_traces_say_what_they_are(reversed_array):
    with tb.copy_guard("error") as guard:
        assert repr(guard) == "copy_guard('error')"
    with tb.copy_guard("warn", min_bytes=3, kinds=["h2d", "d2h"]) as guard:
        pass
    assert repr(guard) == "copy_guard('warn', min_bytes=3, kinds=['d2h', 'h2d'])"
    with tb.trace() as seen:
        tb.to_torch(reversed_array)
        tb.to_numpy(1.0)
    assert repr(seen) == "<Trace: 2 conversions, 1 of them shared, 48 B moved; report() is the table>"
    assert repr(tb.trace()) == "<trace: open it by a with block>"


def test_a_trace_can_be_opened_again_and_begins_anew():
    block = tb.trace()
    for _ in range(2):
        with block as seen:
            tb.to_numpy(1.0)
        assert len(seen.events) == 1
    with block as outer, block as inner:
        tb.to_numpy(1.0)
    assert len(outer.events) == len(inner.events) == 1


def test_a_trace_is_no_decorator_for_nobody_would_see_what_it_records():
    with pytest.raises(TypeError) as raised:

        @tb.trace()
        def load():
            return tb.to_numpy(1.0)

    assert str(raised.value) == (
        "trace() is no decorator: the function would not get what it yields.\n"
        "Open it inside: with tensorbridge.trace() as seen:"
    )


def test_guard_decorates_a_function(reversed_array):
    @tb.copy_guard("error")
    def load():
        return tb.to_torch(reversed_array)

    for _ in range(2):
        with pytest.raises(tb.CopyRequiredError):
            load()
    tb.to_torch(reversed_array)


of_their_own = pytest.mark.skipif(
    bool(getattr(sys.flags, "thread_inherit_context", 0)), reason="here threads start with a copy of the context"
)


@of_their_own
def test_guard_does_not_reach_another_thread(reversed_array):
    done = []
    with tb.copy_guard("error"):
        thread = threading.Thread(target=lambda: done.append(tb.to_torch(reversed_array)))
        thread.start()
        thread.join()
    assert len(done) == 1


@of_their_own
def test_guard_reaches_a_thread_of_asyncio_and_none_of_an_executor(reversed_array):
    async def main():
        with tb.copy_guard("error"):
            with pytest.raises(tb.CopyRequiredError):
                await asyncio.to_thread(tb.to_torch, reversed_array)
            await asyncio.get_running_loop().run_in_executor(None, tb.to_torch, reversed_array)

    asyncio.run(main())


def test_guard_holds_for_its_own_async_task_and_those_started_in_it(reversed_array):
    async def convert():
        return tb.to_torch(reversed_array)

    async def guarded():
        with tb.copy_guard("error"):
            await asyncio.sleep(0)
            with pytest.raises(tb.CopyRequiredError):
                await asyncio.create_task(convert())

    async def free(times):
        for _ in range(times):
            await asyncio.sleep(0)
            assert (await convert()).shape == (6,)

    async def both():
        await asyncio.gather(guarded(), free(5))

    asyncio.run(both())


def test_a_copied_context_is_under_its_guard_whoever_else_has_one_open(reversed_array):
    """`prefetch` runs its worker so: in a copy of the caller's context, which may outlive the block."""
    with tb.copy_guard("error"):
        context = contextvars.copy_context()
    with pytest.raises(tb.CopyRequiredError):
        context.run(tb.to_torch, reversed_array)
    with tb.trace(), pytest.raises(tb.CopyRequiredError):
        context.run(tb.to_torch, reversed_array)
    assert _watch.watching
    del context


def test_a_block_may_end_in_the_garbage_collector_while_another_begins():
    code = """
import faulthandler, gc
import tensorbridge as tb
faulthandler.dump_traceback_later(30, exit=True)

class Cycle:
    pass

def suspended():
    with tb.trace(), tb.copy_guard("error"):
        yield

for threshold in range(1, 9):  # to have the collector at every place
    gc.set_threshold(threshold)
    for _ in range(200):
        cycle = Cycle()
        cycle.me, cycle.block = cycle, suspended()
        next(cycle.block)
        del cycle
        with tb.trace(), tb.copy_guard("allow"):
            pass
gc.collect()
print(len(tb._watch.watching))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "0\n", run.stderr


def test_a_trace_that_is_left_without_having_been_entered_says_so():
    text = r"^trace\(\): left without having been entered"
    with pytest.raises(RuntimeError, match=text), contextlib.ExitStack() as stack:
        stack.push(tb.trace())


def test_a_trace_of_the_parent_records_nothing_in_a_forked_child():
    with tb.trace() as seen:
        pid = os.fork()
        if not pid:
            tb.to_torch(np.zeros(3))
            os._exit(len(seen.events) + bool(_watch.watching))
        assert os.waitpid(pid, 0)[1] == 0


def test_a_task_started_inside_a_block_stays_guarded_when_the_block_has_ended(reversed_array):
    async def task(ended):
        await ended.wait()
        with pytest.raises(tb.CopyRequiredError):
            tb.to_torch(reversed_array)

    async def main():
        ended = asyncio.Event()
        with tb.copy_guard("error"):
            started = asyncio.create_task(task(ended))
            await asyncio.sleep(0)
        ended.set()
        tb.to_torch(reversed_array)
        await started

    asyncio.run(main())


def test_a_guard_that_was_never_entered_cannot_be_left(reversed_array):
    guard = tb.copy_guard("error")
    mistake = contextlib.ExitStack()
    mistake.push(guard)  # enter_context is meant
    with pytest.raises(RuntimeError, match=r"^copy_guard\('error'\): left without having been entered"):
        mistake.close()
    with guard:
        pass
    with pytest.raises(RuntimeError, match="left without having been entered"):
        guard.__exit__(None, None, None)
    with tb.trace() as seen:
        tb.to_torch(reversed_array)
    assert seen.totals.conversions == 1
    with guard, pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array)


def test_a_guard_of_a_generator_that_another_thread_ends_holds_nowhere_any_more(reversed_array):
    generator = guarded("error")
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    tb.to_torch(reversed_array)
    with tb.trace():
        tb.to_torch(reversed_array)


def test_no_warning_filter_is_touched():
    before = list(warnings.filters)
    with tb.copy_guard("warn"), tb.trace():
        tb.to_torch(np.zeros(3))
    assert warnings.filters == before


# -- trace


def test_trace_records_what_the_plan_says(reversed_array):
    plan = tb.plan(reversed_array, "torch")
    with tb.trace() as seen:
        tb.to_torch(reversed_array)
    (event,) = seen.events
    assert event.steps == plan.steps
    assert (event.source, event.target) == ("numpy float64 (6,) on cpu", "torch float64 on cpu")
    assert (event.nbytes, event.kind, event.thread) == (48, "h2h", "MainThread")
    assert event.where.startswith(__file__ + ":")
    assert event.seconds > 0


def test_trace_sees_conversions_that_a_fast_lane_would_take():
    with tb.trace() as seen:
        tb.to_torch(np.zeros(3))
        tb.to_numpy(torch.zeros(3))
    assert [event.nbytes for event in seen.events] == [0, 0]


def test_failed_conversion_is_no_event(reversed_array):
    with tb.trace() as seen, pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array, copy=False)
    with tb.trace() as guarded, tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array)
    assert seen.events == guarded.events == []


def test_traces_nest_and_see_every_thread(reversed_array):
    with tb.trace() as outer:
        tb.to_torch(reversed_array)
        with tb.trace() as inner:
            thread = threading.Thread(target=tb.to_torch, args=(reversed_array,), name="loader")
            thread.start()
            thread.join()
    assert [event.thread for event in outer.events] == ["MainThread", "loader"]
    assert [event.thread for event in inner.events] == ["loader"]


def test_trace_is_safe_with_many_threads(reversed_array):
    def work():
        for _ in range(200):
            tb.to_torch(reversed_array)

    with tb.trace() as seen:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen.totals.conversions == 800
    assert seen.totals.nbytes == seen.totals.by_kind["h2h"] == 800 * 48


def test_report_groups_by_call_site_and_sorts_by_bytes(reversed_array):
    with tb.trace() as seen:
        for _ in range(3):
            tb.to_torch(np.zeros(3))
        tb.to_torch(reversed_array)
    lines = seen.report().splitlines()
    assert lines[0].split() == ["bytes", "calls", "ms", "where", "crossing", "because"]
    assert lines[1].split()[:3] == ["48", "B", "1"]
    assert lines[1].endswith("numpy -> torch  pack: torch has no negative strides")
    assert lines[2].split()[:3] == ["0", "B", "3"]
    assert "4 conversions, 3 of them shared; 48 B moved (h2h 48 B)" in lines[3]
    assert "child processes are not seen" in lines[4]


def test_report_says_how_many_calls_of_one_line_shared(reversed_array):
    with tb.trace() as seen:
        for a in (np.zeros(3), reversed_array, np.zeros(3)):
            tb.to_torch(a)
    assert seen.report().splitlines()[1].endswith("2 of 3 shared; pack: torch has no negative strides")


def test_empty_report_says_so():
    with tb.trace() as seen:
        pass
    assert seen.report().startswith("No conversion was performed.")


def test_saved_trace_is_chrome_trace_json(tmp_path, reversed_array):
    with tb.trace() as seen:
        tb.to_torch(reversed_array)
    seen.save(tmp_path / "trace.json")
    name, event = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert name["ph"] == "M"
    assert (event["ph"], event["cat"], event["args"]["bytes"]) == ("X", "h2h", 48)
    assert event["tid"] == name["tid"]
    assert event["dur"] > 0
    assert event["args"]["steps"][0] == "pack 48 B: torch has no negative strides"


def test_a_trace_can_be_saved_while_other_threads_add_to_it(tmp_path, reversed_array):
    class Growing(list):
        def __iter__(self):
            yield from super().__iter__()
            self.append(self[-1]._replace(thread=f"thread {len(self)}"))

    with tb.trace() as seen:
        tb.to_torch(reversed_array)
    seen.events = Growing(seen.events)
    seen.save(tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 2


def test_unwritable_path_is_an_error_and_the_events_are_kept(tmp_path, reversed_array):
    with tb.trace() as seen:
        tb.to_torch(reversed_array)
    with pytest.raises(OSError, match="its 1 events are kept"):
        seen.save(tmp_path / "no" / "such" / "folder.json")
    assert len(seen.events) == 1


def test_guard_refuses_to_decorate_what_it_could_not_guard():
    async def coroutine():
        return None

    def generator():
        yield

    for function in (coroutine, generator):
        with pytest.raises(TypeError, match="with block inside"):
            tb.copy_guard("error")(function)
    with pytest.raises(TypeError, match="only the making of Sample, not its methods; decorate those"):
        tb.copy_guard("error")(type("Sample", (), {}))


def test_what_a_prefetch_worker_does_is_told_of_the_line_that_started_it(reversed_array):
    with tb.trace() as seen, tb.copy_guard("warn"), pytest.warns(tb.CopyWarning) as caught:
        batches = tb.prefetch([{"x": reversed_array}], device="cpu")
        line = "test_watch.py:" + str(line_before())
        list(batches)
    assert seen.events[0].where.startswith(__file__)
    assert seen.events[0].where.endswith(line)
    assert caught[0].filename == __file__


def line_before():
    """The line before the one that calls this."""
    import sys

    return sys._getframe(1).f_lineno - 1


def test_one_guard_object_serves_threads_and_tasks_at_once():
    guard, inside = tb.copy_guard("error"), threading.Barrier(2, timeout=10)
    after: list[bool] = []

    def work() -> None:
        with guard:
            inside.wait()  # both are open
            with pytest.raises(tb.CopyRequiredError):
                tb.to_torch(np.zeros(3)[::-1])
            inside.wait()
        after.append(tb.to_torch(np.zeros(3)[::-1]).tolist() == [0, 0, 0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert after == [True, True]

    async def task() -> None:
        with guard:
            await asyncio.sleep(0)
            with guard, tb.copy_guard("allow"):
                tb.to_torch(np.zeros(3)[::-1])
                await asyncio.sleep(0)
            with pytest.raises(tb.CopyRequiredError):
                tb.to_torch(np.zeros(3)[::-1])
        tb.to_torch(np.zeros(3)[::-1])

    async def both() -> None:
        await asyncio.gather(task(), task())

    asyncio.run(both())
    assert not _watch.watching


def guarded(mode):
    with tb.copy_guard(mode):
        yield


def test_a_guard_that_ends_out_of_turn_ends_itself_and_no_other(reversed_array):
    inner = guarded("error")
    with tb.copy_guard("allow"):
        next(inner)
    with pytest.raises(tb.CopyRequiredError):
        tb.to_torch(reversed_array)
    inner.close()
    outer = guarded("error")
    next(outer)
    with tb.copy_guard("allow"):
        outer.close()
        tb.to_torch(reversed_array)
    tb.to_torch(reversed_array)


def test_a_report_is_given_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    with tb.trace() as seen:
        tb.to_torch(np.zeros(3))
    gone.rmdir()
    assert "numpy -> torch" in seen.report()


def test_a_block_is_left_while_another_thread_leaves_one_of_the_same_guard(monkeypatch, reversed_array):
    """As threads meet without the GIL: the other leaves in the middle of the look for one's own block."""

    class Met(_watch._Opened):
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            if leaving:
                leaving.pop()()
            return self is other

    monkeypatch.setattr(_watch, "_Opened", Met)
    guard = tb.copy_guard("error")
    first, last = contextvars.copy_context(), contextvars.copy_context()
    leaving = [lambda: first.run(guard.__exit__)]
    first.run(guard.__enter__)
    with guard:
        last.run(guard.__enter__)
    for one in leaving:
        one()
    tb.to_torch(reversed_array)
    with pytest.raises(tb.CopyRequiredError):
        last.run(tb.to_torch, reversed_array)
    last.run(guard.__exit__)
