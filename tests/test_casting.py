"""What NumPy says of a cast is said at the caller's line, as the caller's `errstate` and warning filters want it."""

from __future__ import annotations

import contextlib
import contextvars
import subprocess
import sys
import threading
import warnings
from contextvars import Context, ContextVar
from pathlib import Path

import numpy as np
import pytest
import torch
from races import with_adapters

import tensorbridge as tb
from tensorbridge import _casting, _watch

HUGE = np.array([1e300, 1.0])
OVERFLOW = "overflow encountered in cast"


def out_of_torch():
    return torch.zeros(2)


CASTS = {
    "to_torch": lambda: tb.to_torch(HUGE, dtype="float32"),
    "to_numpy": lambda: tb.to_numpy(HUGE, dtype="float32"),
    "strided": lambda: tb.to_torch(np.array([1e300, 1.0, 2.0])[::2], dtype="float32"),
    "big-endian": lambda: tb.to_torch(HUGE.astype(">f8"), dtype="float32"),
    "bfloat16": lambda: tb.to_torch(HUGE, dtype="bfloat16"),
    "complex": lambda: tb.to_numpy(HUGE * 1j, dtype="complex64"),
    "integers": lambda: tb.to_torch(np.array([70_000]), dtype="float16"),
    "a number": lambda: tb.to_torch(1e300, dtype="float32"),
    "numbers": lambda: tb.to_torch([1e300, 1.0], dtype="float32"),
    "a list of arrays": lambda: tb.to_torch([HUGE, HUGE], dtype="float32"),
    "an array into a tensor": lambda: tb.to_torch(HUGE, out=out_of_torch()),
    "an array into an array": lambda: tb.to_numpy(HUGE, out=np.zeros(2, "float32")),
    "an array into a view of a tensor": lambda: tb.to_numpy(HUGE, out=out_of_torch().numpy()),
    "a number into an array": lambda: tb.to_numpy(1e300, out=np.zeros((), "float32")),
    "a tree": lambda: tb.tree.to_torch({"x": [HUGE]}, dtype="float32"),
    "a tree, into a tree": lambda: tb.tree.to_torch({"x": HUGE}, out={"x": out_of_torch()}),
}


def warned(call):
    """What `call` warned of, and at which line."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [(str(w.message), w.category, w.filename, w.lineno) for w in seen]


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_warns_at_the_callers_line(name):
    call = CASTS[name]
    here = call.__code__.co_firstlineno
    assert warned(call) == [("overflow encountered in cast", RuntimeWarning, __file__, here)]


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_obeys_the_callers_errstate(name):
    call = CASTS[name]
    with np.errstate(over="ignore"):
        assert warned(call) == []
    with np.errstate(over="raise"), pytest.raises(FloatingPointError, match=r"^overflow encountered in cast$"):
        call()
    with np.errstate(invalid="raise"):  # which is not what this is
        assert len(warned(call)) == 1


FLOATS = np.array([1e30, 1.0], "float32")
HALVES = {
    "to_numpy": lambda: tb.to_numpy(FLOATS, dtype="float16"),
    "to_torch": lambda: tb.to_torch(FLOATS, dtype="float16"),
    "transposed": lambda: tb.to_torch(np.asfortranarray(np.ones((300, 300), "float32") * 1e30), dtype="float16"),
    "into an array": lambda: tb.to_numpy(FLOATS, out=np.zeros(2, "float16")),
    "into a tensor": lambda: tb.to_torch(FLOATS, out=torch.zeros(2, dtype=torch.float16)),
    "a tree": lambda: tb.tree.to_numpy({"x": FLOATS}, dtype="float16"),
    "a tree into a tree": lambda: tb.tree.to_torch({"x": FLOATS}, out={"x": torch.zeros(2, dtype=torch.float16)}),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_is_cast_by_numpy_where_the_caller_wants_to_hear_of_overflow(name):
    """By default torch casts, where it is loaded, and says nothing."""
    call = HALVES[name]
    called = []
    for _ in range(2):  # decided, and remembered
        assert warned(call) == []
        called.clear()
        with np.errstate(over="raise"), pytest.raises(FloatingPointError, match=r"^overflow encountered in cast$"):
            call()
        with np.errstate(over="call", call=lambda *said: called.append(said)):
            call()
        assert called
        with np.errstate(over="ignore"):
            assert warned(call) == []
        with np.errstate(divide="raise"):
            assert warned(call) == []


def test_underflow_is_told_too_where_it_is_asked_for():
    tiny = np.array([1e-7], "float32")
    assert tb.to_numpy(tiny, dtype="float16") > 0
    with np.errstate(under="raise"), pytest.raises(FloatingPointError, match="underflow"):
        tb.to_numpy(tiny, dtype="float16")
    with np.errstate(under="warn"):
        assert [text for text, *_ in warned(lambda: tb.to_numpy(tiny, dtype="float16"))] == [
            "underflow encountered in cast"
        ]


def test_the_plan_says_who_casts():
    def kernels(dtype):
        return [step.by for step in tb.plan(FLOATS, "numpy", dtype=dtype).steps if step.kind]

    assert kernels("float16") == kernels("bfloat16") == ["torch"]
    with np.errstate(over="raise"):
        assert kernels("float16") == ["numpy"]
        assert kernels("bfloat16") == ["torch"]  # of which NumPy has nothing to say either
        assert np.array([3.4e38], "float32").astype("bfloat16").astype("float32") == np.inf


def test_under_a_guard_and_a_trace_it_is_the_callers_line_too():
    with tb.copy_guard("allow"), tb.trace():
        seen = warned(CASTS["to_torch"])
    assert [place for *_, place in seen] == [CASTS["to_torch"].__code__.co_firstlineno]


def test_nan_is_told_as_invalid_and_two_things_are_told_apart():
    assert [text for text, *_ in warned(lambda: tb.to_torch(np.array([np.nan]), dtype="int32"))] == [
        "invalid value encountered in cast"
    ]
    signalling = np.array([0x7FF0000000000001], "uint64").view("float64")
    both = np.concatenate([signalling, HUGE])
    with np.errstate(all="warn"):
        texts = [text for text, *_ in warned(lambda: tb.to_numpy(both, dtype="float32"))]
        plain = [text for text, *_ in warned(lambda: both.astype("float32"))]
    assert sorted(texts) == sorted(plain)
    assert len(texts) == 2


def test_every_caller_is_warned_once():
    """As a script is, whose filters are Python's own: each line once."""
    code = """
import numpy as np, tensorbridge as tb
def a(): return tb.to_torch(np.array([1e300]), dtype="float32")
def b(): return tb.to_torch(np.array([2e300]), dtype="float32")
for _ in range(2):
    a(); b()
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert lines == [f"<string>:{n}: RuntimeWarning: overflow encountered in cast" for n in (3, 4)]


def test_a_filter_that_makes_errors_of_warnings_does():
    out, before = torch.zeros(2), torch.zeros(2)._version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (CASTS["to_torch"], lambda: tb.to_torch(HUGE, out=out)):
            with pytest.raises(RuntimeWarning, match=r"^overflow encountered in cast$"):
                call()
    assert out[0].isinf()
    assert out._version > before  # written all the same, as NumPy does: autograd is told


@pytest.mark.parametrize("out", [torch.zeros(2), torch.zeros(2).numpy()], ids=["tensor", "view"])
def test_a_cast_that_raises_when_it_has_written_is_counted(out):
    tensor = out if isinstance(out, torch.Tensor) else out.base
    before = tensor._version
    convert = tb.to_torch if out is tensor else tb.to_numpy
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        convert(HUGE, out=out)
    assert tensor._version > before


def test_the_callers_own_call_and_log_are_called_by_numpy():
    class Log(list):
        def write(self, text):
            self.append(text)

    called, log = [], Log()
    with np.errstate(over="call", call=lambda *said: called.append(said)):
        tb.to_torch(HUGE, dtype="float32")
        made = [*called]
        called.clear()
        HUGE.astype("float32")
    assert made == called != []
    with np.errstate(over="log", call=log):
        assert warned(lambda: tb.to_torch(HUGE, dtype="float32")) == []
    assert log == ["Warning: overflow encountered in cast\n"]


def test_no_state_of_numpy_or_of_warnings_is_left_changed():
    modes, call, filters = np.geterr(), np.geterrcall(), list(warnings.filters)
    for cast in CASTS.values():
        warned(cast)
    assert (np.geterr(), np.geterrcall(), warnings.filters) == (modes, call, filters)


def test_a_transform_of_prefetch_is_warned_at_its_own_line():
    made = []

    def batches():
        for _ in range(3):
            yield {"x": HUGE}

    def cast(batch):
        return tb.tree.to_numpy(batch, dtype="float32")  # cast here

    lines = Path(__file__).read_text().splitlines()
    here = next(n for n, line in enumerate(lines, 1) if line.endswith("# cast here"))
    seen = warned(lambda: made.extend(tb.prefetch(batches(), device="cpu", transform=cast)))
    assert [(path, line) for _, _, path, line in seen] == [(__file__, here)] * 3
    assert len(made) == 3


def test_prefetch_takes_the_errstate_of_its_caller():
    with np.errstate(over="ignore"):
        ready = tb.prefetch([HUGE], device="cpu", transform=lambda x: tb.to_numpy(x, dtype="float32"))
    assert warned(lambda: list(ready)) == []


def test_what_a_worker_warns_of_is_told_once_a_line_of_each_file():
    text = "overflow encountered in cast, as two scripts may say"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for where in ("one.py:7", "two.py:7", "one.py:7"):
            context = contextvars.copy_context()
            context.run(_watch.called_from.set, where)
            worker = threading.Thread(target=context.run, args=(_watch.warn, text, RuntimeWarning))
            worker.start()
            worker.join()
    assert [(w.filename, w.lineno) for w in seen] == [("one.py", 7), ("two.py", 7)]


def test_threads_keep_their_own_errstate():
    failures = []
    gate = threading.Barrier(4)

    def run(mode):
        with np.errstate(over=mode):
            gate.wait()
            for _ in range(200):
                try:
                    tb.to_torch(HUGE, dtype="float32")
                    if mode == "raise":
                        failures.append(mode)
                except FloatingPointError:
                    if mode != "raise":
                        failures.append(mode)

    threads = [threading.Thread(target=run, args=(mode,)) for mode in ("raise", "ignore", "raise", "ignore")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_cast_is_done_in_the_callers_own_context():
    mine = ContextVar("mine", default="nobody's")
    mine.set("the caller's")
    seen = []

    def cast(a):
        seen.append(mine.get())
        return a.astype("float32")

    assert [text for text, *_ in warned(lambda: _casting.with_warnings(cast, "float64", "float32")(HUGE))] == [OVERFLOW]
    assert seen == ["the caller's"]


def test_a_numpy_that_keeps_its_errstate_elsewhere_is_told_by_its_errstate(monkeypatch):
    monkeypatch.setattr(_casting, "copy_context", Context)  # nothing is found
    monkeypatch.setattr(_casting, "_idle", [])
    for _ in range(2):
        assert [text for text, *_ in warned(CASTS["to_torch"])] == [OVERFLOW]
    assert [listener.variable for listener in _casting._idle] == [None]


def test_an_interrupt_as_a_cast_begins_leaves_the_callers_errstate():
    """As a signal handler may raise it at any line."""
    lines = []

    def interrupt(frame, event, argument):
        if frame.f_code.co_filename == _casting.__file__:
            lines.append(frame.f_lineno)
            if len(lines) == at:
                raise KeyboardInterrupt
        return interrupt

    at = 0
    while not lines or at <= len(lines):
        at, lines[:] = at + 1, []
        sys.settrace(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            tb.to_numpy(np.zeros(3), dtype="float32")
        sys.settrace(None)
        assert np.geterr()["over"] == "warn", f"line {lines[-1]}"
    assert at > 5


def test_this_numpy_keeps_it_in_a_context_variable():
    assert isinstance(_casting._Listener().variable, ContextVar)


def test_a_cast_that_fails_says_nothing_in_the_next():
    def cast(a):
        made = a.astype("float32")
        if a is HUGE:
            raise MemoryError
        return made

    tell = _casting.with_warnings(cast, "float64", "float32")
    with pytest.raises(MemoryError):
        tell(HUGE)
    assert warned(lambda: tell(np.ones(2))) == []


def test_a_cast_on_its_way_to_a_device_warns_at_the_callers_line(monkeypatch):
    for _ in with_adapters(monkeypatch):
        seen = warned(lambda: tb.to_cupy(HUGE, dtype="float32"))
        assert [(text, path) for text, _, path, _ in seen] == [("overflow encountered in cast", __file__)]


QUIET = [("uint8", "float32"), ("int64", "int8"), ("bool", "float16"), ("float32", "float32"), (">f8", "float64")]


@pytest.mark.parametrize(("source", "wanted"), QUIET)
def test_a_cast_that_cannot_fail_asks_nothing_of_numpy(source, wanted, monkeypatch):
    monkeypatch.setattr(_casting, "_idle", None)
    assert tb.to_numpy(np.ones(3, source), dtype=wanted, copy=True).tolist() == [1, 1, 1]


@pytest.mark.parametrize("target", ["dtype", "out"])
def test_a_float_that_no_integer_is_is_told_at_the_callers_line(target):
    options = {"dtype": "int32"} if target == "dtype" else {"out": np.zeros(2, "int32")}
    with pytest.warns(RuntimeWarning, match="invalid value") as said:
        tb.to_numpy(np.array([np.nan, 1.0]), **options)
    assert {warning.filename for warning in said} == {__file__}
