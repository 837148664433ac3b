"""The copy engine: torch's kernels where they are better, and never at the price of other values."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _convert, _dtypes, _engine
from tensorbridge._array import HUGE, Traits
from tensorbridge._plan import decide
from tensorbridge._step import HERE, Want

FLOATS = [name for name in _dtypes.DTYPES if "float" in name and _dtypes.exists_in(name, "torch")]
LOADED = HERE._replace(torch=True)


TORCHS = [
    (source, wanted)
    for source in FLOATS
    for wanted in FLOATS
    if _engine.kernel(Traits("numpy", dtype=source, size="medium"), wanted, "C", LOADED).by == "torch"
]


@pytest.mark.parametrize(("source", "wanted"), TORCHS)
def test_values_of_a_cast_do_not_depend_on_whether_torch_is_loaded(source, wanted):
    """Where torch's kernel is chosen, it gives what NumPy's gives, out of range and between two values too."""
    rng = np.random.default_rng(0)
    wide = np.concatenate(
        [
            rng.standard_normal(50_000) * 100,
            [0.0, -0.0, np.inf, -np.inf, np.nan, 1e9, -1e9, 448, 449, 65504, 65520, 1e-8],
        ]
    )
    with np.errstate(all="ignore"):
        a = wide.astype(_dtypes.DTYPES[source].numpy)
        by_numpy = a.astype(_dtypes.DTYPES[wanted].numpy).astype("float64")
        by_torch = tb.to_numpy(a, dtype=wanted).astype("float64")
    np.testing.assert_array_equal(by_torch, by_numpy)


def test_half_precision_is_cast_by_torch_where_it_is_loaded():
    half = Traits("numpy", dtype="float32")
    assert torch
    assert _engine.kernel(half, "float16", "C", LOADED).by == "torch"
    assert _engine.kernel(half, "float16", "C", HERE).by == "numpy"
    assert _engine.kernel(half, "float16", "C", LOADED._replace(worker=True)).by == "numpy"
    assert _engine.kernel(half._replace(dtype="float64"), "float16", "C", LOADED).by == "numpy"


SMALL_INTEGERS = ["bool", "uint8", "int8", "int16"]


@pytest.mark.parametrize("source", SMALL_INTEGERS)
def test_small_integers_become_halves_by_torch_with_the_values_of_numpy(source):
    a = np.resize(np.arange(-(2**15), 2**15).astype(source), 2**17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_numpy = a.astype("float16")  # no value is too big, of which NumPy would warn, and torch would not
    assert "by torch" in str(tb.plan(a, "torch", dtype="float16"))
    np.testing.assert_array_equal(tb.to_numpy(tb.to_torch(a, dtype="float16")), by_numpy)
    np.testing.assert_array_equal(tb.to_numpy(a, dtype="float16"), by_numpy)
    assert "by torch" not in str(tb.plan(a[:9], "torch", dtype="float16"))  # its call costs more than these elements


def test_integers_that_float16_cannot_hold_are_cast_by_numpy_which_warns_of_them():
    assert "by torch" not in str(tb.plan(np.zeros(2**17, "int32"), "torch", dtype="float16"))
    with pytest.warns(RuntimeWarning, match="overflow"):
        tb.to_torch(np.full(2**17, 70000, "int32"), dtype="float16")


def test_plain_copies_stay_with_numpy_and_large_transposes_go_to_torch():
    plain = Traits("numpy", size="large")
    assert _engine.kernel(plain, "float32", "C", LOADED).by == "numpy"
    assert _engine.kernel(plain, "float32", "F", LOADED).by == "torch"
    assert _engine.kernel(plain._replace(size="small"), "float32", "F", LOADED).by == "numpy"


SHARING = LOADED._replace(threads=True)


def test_threads_share_huge_copies_and_nothing_else():
    huge = Traits("numpy", size="huge")
    assert _engine.kernel(huge, "float32", "C", SHARING) == ("torch", "its threads share a copy of this size")
    assert _engine.kernel(huge, "float32", "C", LOADED).by == "numpy"
    assert _engine.kernel(huge, "float32", "C", SHARING._replace(worker=True)).by == "numpy"
    assert _engine.kernel(huge._replace(size="large"), "float32", "C", SHARING).by == "numpy"
    assert _engine.kernel(huge, "float64", "C", SHARING).by == "numpy"  # a cast: NumPy warns of what it loses
    tensor = huge._replace(framework="torch")
    assert _engine.of_tensor(tensor, "float32", "C", SHARING).by == "torch"
    assert _engine.of_tensor(tensor, "float32", "C", HERE).by == "numpy"
    assert _engine.in_numpy_pages(tensor, "float32", "torch")


HUGE_COPIES: dict[str, Any] = {
    "array, copied": (lambda: tb.to_torch(HELD, copy=True), lambda: tb.plan(HELD, "torch", copy=True)),
    "array, into a tensor": (lambda: tb.to_torch(HELD, out=INTO), lambda: tb.plan(HELD, "torch", out=INTO)),
    "tensor, copied": (lambda: tb.to_numpy(INTO, copy=True), lambda: tb.plan(INTO, "numpy", copy=True)),
    "tensor, into an array": (lambda: tb.to_numpy(INTO, out=HELD), lambda: tb.plan(INTO, "numpy", out=HELD)),
    "tree, copied": (lambda: tb.tree.to_torch([HELD], copy=True)[0], lambda: tb.tree.plan([HELD], "torch", copy=True)),
    "tree, into a tree": (
        lambda: tb.tree.to_torch([HELD], out=[INTO])[0],
        lambda: tb.tree.plan([HELD], "torch", out=[INTO]),
    ),
}
HELD, INTO = np.zeros(HUGE // 8), torch.zeros(HUGE // 8, dtype=torch.float64)
SAID = "; by torch: its threads share a copy of this size"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", HUGE_COPIES)
def test_a_huge_copy_is_done_as_planned_by_whoever_asks(name, two_threads, monkeypatch):
    convert, plan = HUGE_COPIES[name]
    source = INTO if name.startswith("tensor") else HELD
    done: list[str] = []
    perform = _convert.perform

    def seen(recipe: Any, handle: Any, out: Any) -> Any:
        done.extend(step.by for step in recipe.decision.steps if step.kind)
        return perform(recipe, handle, out)

    monkeypatch.setattr(_convert, "perform", seen)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    busy, waiting = 1, 0
    monkeypatch.setattr(_convert, "_busy_cores", lambda: busy)
    monkeypatch.setattr(_convert, "_waiting_workers", lambda: waiting)

    def by() -> str:
        done.clear()
        source[0] += 1
        result = convert()
        assert float(result[0]) == float(source[0])
        return done[0] if done else "numpy"

    assert SAID in str(plan())
    assert [by(), by()] == ["torch", "torch"]
    with ThreadPoolExecutor(1) as pool:  # the caller is at work meanwhile, and needs the cores
        assert pool.submit(by).result() == "numpy"
        assert SAID not in pool.submit(lambda: str(plan())).result()
    assert by() == "torch"
    busy = 2  # another process holds a core
    assert [by(), by()] == ["numpy", "numpy"]
    assert SAID not in str(plan())
    waiting = 1  # it is torch's own thread, which has just done something else
    assert [by(), by()] == ["torch", "torch"]
    busy, waiting = 1, 0
    torch.set_num_threads(1)
    assert by() == "numpy"
    assert SAID not in str(plan())


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="only Linux says how many threads are running")
def test_the_cores_that_are_busy_are_counted_at_this_moment():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        seen = 0
        for _ in range(200):
            seen = max(seen, _convert._busy_cores())
            if seen > 1:
                break
            time.sleep(0.01)
        other.kill()
    assert seen >= 2


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="only Linux says what each thread does")
def test_a_thread_of_python_is_at_work_and_does_not_wait_for_the_copy():
    ending = threading.Event()

    def spin():
        while not ending.is_set():
            pass

    worker = threading.Thread(target=spin)
    worker.start()
    try:
        time.sleep(0.3)  # torch's own threads have stopped to spin by now
        assert {_convert._waiting_workers() for _ in range(20)} == {0}
    finally:
        ending.set()
        worker.join()


@pytest.mark.parametrize("threads", [0, 1, 7, 8, 9, 64, 200])
@pytest.mark.parametrize("spinning", [True, False])
def test_of_many_threads_a_few_are_asked(threads, spinning, monkeypatch):
    asked: list[str] = []

    def told(path: str) -> bytes:
        asked.append(path)
        return b"17 (pt_main) thr) " + (b"R" if spinning else b"S") + b" 1 17"

    monkeypatch.setattr(
        os, "listdir", lambda _: [str(threading.get_native_id()), *map(str, range(10**9, 10**9 + threads))]
    )
    monkeypatch.setattr(_convert, "_told", told)
    assert _convert._waiting_workers() == threads * spinning
    assert len(set(asked)) == len(asked) <= 8


def test_where_nothing_says_what_is_busy_it_is_this_thread_alone(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert _convert._busy_cores() == 1


MEDIUM = 100_000
PLAIN_COPIES = {
    "array, copied": lambda: tb.plan(np.zeros(MEDIUM), "torch", copy=True),
    "tensor, copied": lambda: tb.plan(torch.zeros(MEDIUM), "numpy", copy=True),
    "array, into a tensor": lambda: tb.plan(np.zeros(MEDIUM), "torch", out=torch.zeros(MEDIUM, dtype=torch.float64)),
    "tensor, into an array": lambda: tb.plan(torch.zeros(MEDIUM), "numpy", out=np.zeros(MEDIUM, "float32")),
}


@pytest.mark.parametrize("name", PLAIN_COPIES)
def test_plain_copies_from_64_kib_on_use_one_thread_whichever_side_they_start_from(name):
    moving = [step for step in PLAIN_COPIES[name]().steps if step.kind]
    assert [step.by for step in moving] == ["numpy"]


@pytest.mark.parametrize("count", [100, 50_000, 600_000])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float8_e4m3fn"])
def test_out_gives_the_values_that_dtype_gives(wanted, count):
    between = np.random.default_rng(1).standard_normal(count)
    for source, convert in ((between, tb.to_torch), (torch.from_numpy(between), tb.to_numpy)):
        cast = convert(source, dtype=wanted)
        out = cast.clone() if isinstance(cast, torch.Tensor) else cast.copy()
        out[:] = 0
        filled = convert(source, out=out)
        assert tb.to_numpy(filled).tobytes() == tb.to_numpy(cast).tobytes()


@pytest.mark.parametrize("wanted", ["float16", "int32"])
@pytest.mark.parametrize("count", [100, 50_000, 600_000])
def test_cast_of_a_tensor_has_torch_values_whatever_its_size(wanted, count):
    t = torch.from_numpy(np.random.default_rng(1).standard_normal(count) * 1000)
    assert torch.equal(torch.from_numpy(tb.to_numpy(t, dtype=wanted)), t.to(getattr(torch, wanted)))


def test_large_tensor_is_transposed_by_torch():
    tensor = Traits("torch", size="large")
    assert _engine.of_tensor(tensor, "float32", "F", HERE).by == "torch"
    assert _engine.of_tensor(tensor, "float32", "C", HERE).by == "numpy"
    assert _engine.of_tensor(tensor, "int32", "C", HERE._replace(worker=True)).by == "torch"
    assert _engine.of_tensor(tensor, "float32", "C", HERE._replace(worker=True)).by == "numpy"


@pytest.mark.parametrize(("graph", "said"), [(False, "in pieces: "), (True, "in pieces, unless autograd records it: ")])
def test_plan_in_a_forked_process_says_what_may_stay_whole(graph, said):
    tensor = Traits("torch", size="large", graph=graph)
    (step, *_) = decide(tensor, Want("torch", dtype="float64", detach=False), HERE._replace(worker=True)).steps
    assert (step.by, step.why) == (
        "torch in pieces",
        f"dtype=float64 was asked for; {said}torch's threads have not survived the fork",
    )


def test_plan_of_a_fill_says_whose_kernel_and_why():
    half = torch.zeros(3, dtype=torch.float16)
    fill = tb.plan(np.zeros(3, "float32"), "torch", out=half).steps[-1]
    assert fill.why == "into the caller's array, `out`; by torch: its half-precision casts are vectorised"


def test_a_cast_has_the_values_of_the_framework_that_holds_the_source():
    """Where their rules differ: beyond the range of a float8, and in how often they round on the way to float16."""
    beyond, between = np.array([500.0], "float32"), np.array([1 + 2**-11 + 2**-40])
    for a, wanted in ((beyond, "float8_e4m3fn"), (between, "float16")):
        t = torch.from_numpy(a)
        by_numpy = a.astype(_dtypes.DTYPES[wanted].numpy).astype("float64")
        by_torch = t.to(getattr(torch, wanted)).double()
        if wanted == "float16":  # beyond a float8's range older releases of torch say nan, as ml_dtypes does
            assert by_numpy != by_torch.numpy()
        for convert in (tb.to_numpy, tb.to_torch):
            from_numpy, from_torch = convert(a, dtype=wanted), convert(t, dtype=wanted)
            np.testing.assert_array_equal(tb.to_numpy(from_numpy).astype("float64"), by_numpy)
            np.testing.assert_array_equal(tb.to_numpy(from_torch).astype("float64"), by_torch.numpy())


def test_a_cast_of_an_array_has_the_values_of_numpy_in_whatever_order_out_lies():
    between, beyond, huge = (np.full((200, 300), x) for x in (1 + 2**-11 + 2**-40, 500.0, 1e300))
    for a, wanted in ((between, np.float16), (beyond.astype("float32"), ml_dtypes.float8_e4m3fn), (huge, np.float32)):
        for convert, new in ((tb.to_numpy, np.empty), (tb.tree.to_numpy, np.empty), (tb.to_torch, empty_tensor)):
            with pytest.warns(RuntimeWarning, match="overflow") if a is huge else contextlib.nullcontext():
                out = convert(a, out=new((300, 200), wanted).T)
            expected = np.inf if a is huge else a.astype(wanted).astype("float64")
            np.testing.assert_array_equal(tb.to_numpy(out).astype("float64"), expected)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        tb.to_numpy(huge, out=np.empty((300, 200), "float32").T)
    images = np.zeros((2, 224, 224, 3), "uint8").transpose(0, 3, 1, 2)
    assert tb.plan(images, "torch", out=torch.empty(images.shape)).steps[-1].by == "torch"  # which keeps every value


def empty_tensor(shape, dtype):
    return tb.to_torch(np.empty(shape, dtype))


LAZY = """
import multiprocessing
import ml_dtypes
import numpy as np
import torch

def work(_):
    import tensorbridge as tb  # in the child alone, as a library does that needs it there
    halves = tb.to_torch(np.ones(1 << 21, "float32"), dtype="float16")
    plan = tb.plan(np.ones(1 << 24, "float32"), "torch", copy=True)
    return float(halves.numpy().sum(dtype="float64")), plan.steps[0].by

torch.set_num_threads(2)
(torch.ones(1 << 22) + 1).sum()  # the threads are there
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(*pool.apply_async(work, (0,)).get(timeout=30))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_that_imports_us_first_has_no_threads_either():
    run = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout == f"{float(1 << 21)} numpy\n", run.stderr[-1500:]


FORKED = """
import os
import numpy as np
import torch
torch.set_num_threads(2)
(torch.ones(1 << 22) + 1).sum()
pid = os.fork()
if not pid:
    import tensorbridge as tb  # as a server does that loads its application, and then forks
    tb.to_torch(np.ones(1 << 21, "float32"), dtype="float16")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux says whether a process was forked")
def test_a_process_forked_by_anybody_that_imports_us_first_has_no_threads_either():
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout == "0\n", run.stderr[-1500:]


def test_a_process_that_was_not_forked_has_its_own_threads():
    assert not _convert._was_forked()
    assert _convert.imported_in == os.getpid()


CASTS = """
import multiprocessing
import ml_dtypes
import numpy as np
import tensorbridge as tb
import torch

FLOATS = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 2, 500)) * 500)
STRIDED = FLOATS.transpose(0, 2)[1:, :, ::2]
BYTES = torch.arange(40_000).to(torch.uint8)  # fewer bytes than a medium array, and more elements than one thread takes
SHAPED = [FLOATS, STRIDED, FLOATS[:, :1].expand(300, 3, 500), FLOATS.flatten()[:, None], BYTES]
SHAPED.append(torch.full((1, 1 << 20), 1e4))

WEIGHT = torch.nn.Parameter(torch.rand(1 << 17))
CONJUGATE = torch.complex(WEIGHT, -WEIGHT).detach().requires_grad_().conj()
DEEP = torch.rand(1 << 17).reshape((1,) * 70 + (1 << 17,))

def work(_):
    made = [tb.to_numpy(CONJUGATE), tb.to_numpy([WEIGHT, WEIGHT]), tb.to_numpy(tb.to_torch(DEEP, copy=True).flatten())]
    with torch.no_grad():
        out = torch.empty(1 << 17)
        made += [tb.to_torch(WEIGHT, copy=True), tb.to_torch(WEIGHT, dtype="float16"), tb.to_torch(WEIGHT, out=out)]
        made += [tb.collate([WEIGHT, WEIGHT]), tb.tree.to_torch({"w": WEIGHT}, copy=True)["w"]]
        assert not any(t.requires_grad for t in made[3:])
    made = [tb.to_numpy(x) for x in made]
    for t in SHAPED:
        for name in ("float16", "float8_e4m3fn"):
            out = torch.empty(t.shape, dtype=getattr(torch, name))
            seen = np.empty_like(tb.to_numpy(out))
            made += [tb.to_numpy(t, dtype=name), tb.to_numpy(tb.to_torch(t, dtype=name))]
            made += [tb.to_numpy(tb.to_torch(t, out=out)), tb.to_numpy(t, out=seen)]
        alike = torch.empty_like(t)
        made += [tb.to_numpy(tb.to_torch(t, copy=True)), tb.to_numpy(tb.to_torch(t, out=alike))]
        made += [tb.to_numpy([t, t]), tb.to_numpy(tb.collate([t, t]))]
    made += [tb.to_numpy(MARKED), tb.to_numpy([MARKED, FLOATS], dtype="complex64")]
    made.append(tb.to_numpy([MARKED.imag, SINGLE], dtype="float16"))
    made += [tb.to_numpy(t) for t in tb.tree.to_torch({"a": BYTES, "b": FLOATS}, dtype="float16").values()]
    return [(x.strides, x.tobytes()) for x in made], str(tb.plan(FLOATS, "numpy", dtype="float16"))

MARKED, SINGLE = torch.complex(FLOATS, -FLOATS).conj(), FLOATS.float()
torch.set_num_threads(2)
(torch.ones(1 << 22) + 1).sum()  # the threads are there
here = work(0)
with multiprocessing.get_context("fork").Pool(1) as pool:
    there = pool.apply_async(work, (0,)).get(timeout=30)
print(here[0] == there[0], len(here[0]))
print(there[1].splitlines()[-2])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_casts_tensors_to_the_same_values_without_threads():
    run = subprocess.run([sys.executable, "-c", CASTS], capture_output=True, text=True, check=False, timeout=60)
    same, step = run.stdout.splitlines() or [run.stderr[-1500:], ""]
    assert same == "True 85"
    assert step.endswith("   dtype=float16 was asked for; in pieces: torch's threads have not survived the fork")


@pytest.mark.parametrize("size", [100, 1 << 16, 1 << 21])
def test_fresh_memory_of_numpy_s_cannot_be_resized_as_documented(size):
    """`to_torch(copy=True)`: of an array always, of a tensor from the size on where NumPy copies it."""
    assert not tb.to_torch(np.zeros(size, "float32"), copy=True).untyped_storage().resizable()
    assert tb.to_torch(torch.zeros(size), copy=True).untyped_storage().resizable() == (size == 100)
