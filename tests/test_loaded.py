"""A framework is used as soon as it is there: not while another thread imports it, and not where it is forbidden."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

import tensorbridge as tb
from tensorbridge._cuda import _streams

CALLS = {
    "to_torch": "tb.to_torch(a)",
    "to_numpy": "tb.to_numpy(np.ones(9_000_000), copy=True)",
    "to_numpy, half": 'tb.to_numpy(np.ones(3, "float32"), dtype="float16")',
    "plan": 'tb.plan(a, "torch")',
    "describe": "tb.describe(a)",
    "shares_memory": "tb.shares_memory(a, a)",
    "tree.to_torch": 'tb.tree.to_torch({"a": a})',
    "tree.to_numpy": 'tb.tree.to_numpy({"a": a}, dtype="float32")',
    "collate": "tb.collate([a, a])",
    "prefetch": 'list(tb.prefetch([a], device="cpu"))',
    "prefetch to NumPy": 'list(tb.prefetch([a], to="numpy"))',
    "to_numpy_async": "tb.to_numpy_async(a).result()",
    "info": "str(tb.info())",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("call", CALLS)
def test_another_thread_may_be_importing_torch(call):
    code = f"""
import sys, threading, time
import numpy as np, tensorbridge as tb
a = np.ones(3)
other = threading.Thread(target=lambda: __import__("torch"))
other.start()
while "torch" not in sys.modules:
    time.sleep(0.001)
assert sys.modules["torch"].__spec__._initializing
{CALLS[call]}
other.join()
{CALLS[call]}
print("done")
"""
    assert run(code) == "done\n"


def test_the_first_calls_may_come_from_many_threads():
    code = f"""
import threading
import numpy as np, tensorbridge as tb
a, failed = np.ones(3), []
calls = {[call for name, call in CALLS.items() if name != "prefetch"]!r}
start = threading.Barrier(len(calls))
def work(call):
    start.wait()
    try:
        eval(call)
    except Exception as error:
        failed.append((call, repr(error)))
threads = [threading.Thread(target=work, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failed)
"""
    assert run(code) == "[]\n"


@pytest.mark.parametrize(
    "call", ["to_numpy", "to_numpy, half", "tree.to_numpy", "describe", "prefetch to NumPy", "info"]
)
def test_the_import_of_torch_may_be_forbidden(call):
    """``sys.modules["torch"] = None`` is how a missing package is pretended."""
    code = f"""
import sys
sys.modules["torch"] = sys.modules["cupy"] = None
import numpy as np, tensorbridge as tb
a = np.ones(3)
{CALLS[call]}
try:
    tb.to_torch(a)
except tb.MissingFrameworkError:
    print("done")
"""
    assert run(code) == "done\n"


@pytest.mark.parametrize("name", ["torch.utils._pytree", "optree.registry"])
def test_registries_of_containers_may_be_half_imported(monkeypatch, name):
    half = ModuleType(name)
    half.__spec__ = ModuleSpec(name, None)
    half.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, name, half)

    class Other:
        pass

    other = Other()
    assert tb.tree.to_numpy({"x": np.ones(3), "other": other})["other"] is other


def test_a_stream_is_identified_while_torch_is_imported(monkeypatch):
    half = ModuleType("torch")
    half.__spec__ = ModuleSpec("torch", None)
    half.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, "torch", half)
    with pytest.raises(TypeError, match="is no CUDA stream"):
        _streams.identify("no stream")


@pytest.mark.parametrize("start", ["tb.prefetch(source(), device='cpu')", "tb.prefetch(source(), to='numpy')"])
def test_the_thread_of_prefetch_imports_none_of_our_modules(start):
    """A worker that is forked meanwhile would find the lock of that import shut for good."""
    code = f"""
import sys, threading
import numpy as np, torch, tensorbridge as tb
begin = threading.Event()
def source():
    begin.wait()
    yield {{"x": np.ones(3), "y": torch.ones(3), "z": memoryview(bytearray(4)), "n": 1.5, "l": [np.ones(2)] * 2}}
ready = {start}
before = set(sys.modules)
begin.set()
list(ready)
print(sorted(name for name in set(sys.modules) - before if name.startswith("tensorbridge")))
"""
    assert run(code) == "[]\n"
