"""Questions that reading could not settle, answered on a card in half a minute: one line each, and nothing asserted.

    PYTHONPATH=. python3 benchmarks/gpu_probes.py

What a broken answer would leave behind in the process is asked in one of its own. The answers belong into
docs/gpu-facts.md, and what they contradict into the code. The figures are for tuning; goals are measured by the bench.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers the names of its dtypes)
import numpy as np

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as in tests/conftest.py: fewer streams share a queue
sys.path.append(str(Path(__file__).parent.parent / "tests" / "gpu"))
MIB = 1 << 20


def in_a_process(code: str) -> str:
    run = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, timeout=40, check=False)
    last = run.stderr.strip().splitlines()[-1:] if run.returncode else []
    return " | ".join(
        [*run.stdout.split("\n")[:-1], *([f"ended with {run.returncode}"] if run.returncode else []), *last]
    )


def addresses(torch: Any, cupy: Any) -> str:
    def of(address: int) -> tuple[int, int]:
        found = cupy.cuda.runtime.pointerGetAttributes(address)
        return found.type, found.device

    device, pinned, plain = cupy.zeros(100), torch.zeros(100, pin_memory=True), np.zeros(100)
    places = {
        "device": device.data.ptr + 8,
        "pinned": pinned.data_ptr() + 8,
        "plain": plain.ctypes.data,
        "none": 1 << 40,
    }
    return ", ".join(f"{name} {of(address)}" for name, address in places.items())


def streams(torch: Any, cupy: Any) -> str:
    zero = torch.cuda.ExternalStream(0).cuda_stream  # that of 1 raises when it is asked
    with cupy.cuda.Stream(non_blocking=True) as stream:
        current = torch.cuda.current_stream().cuda_stream
        return f"ExternalStream(0) {zero:#x}; CuPy's {stream.ptr:#x} leaves torch's {current:#x}"


CHILD = """
import os, torch, cupy
p = torch.ones(3, pin_memory=True); torch.ones(3, device="cuda"); cupy.zeros(3)
pid = os.fork()
if not pid:
    for name, ask in (("bad fork", torch.cuda._is_in_bad_fork), ("available", torch.cuda.is_available),
                      ("devices", torch.cuda.device_count), ("pinned", p.is_pinned),
                      ("CuPy's devices", cupy.cuda.runtime.getDeviceCount),
                      ("CuPy's device", cupy.cuda.runtime.getDevice)):
        try: print(name, ask(), flush=True)
        except Exception as error: print(name, type(error).__name__, str(error).splitlines()[0], flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""

# The first call that a thread makes: what the driver answers while the thread has no context of the device.
THREAD = """
import threading, torch, cupy
c, p = cupy.zeros(3), torch.ones(3, pin_memory=True)
for name, ask in (("__dlpack_device__", c.__dlpack_device__), ("is_pinned", p.is_pinned),
                  ("attributes", lambda: cupy.cuda.runtime.pointerGetAttributes(c.data.ptr).type)):
    def told():
        try: print(name, ask(), flush=True)
        except Exception as error: print(name, type(error).__name__, str(error).splitlines()[0], flush=True)
    thread = threading.Thread(target=told)
    thread.start(); thread.join()
"""

# What asking costs a process that has imported CuPy, and uses no device.
CONTEXT = """
import cupy
cupy.cuda.runtime.getDeviceCount()
def current():
    try: return cupy.cuda.driver.ctxGetCurrent()
    except Exception as error: return f"{type(error).__name__} {error}"
print("before", current(), flush=True)
cupy.cuda.runtime.getDevice(); print("getDevice", current(), flush=True)
cupy.cuda.get_current_stream().is_capturing(); print("is_capturing", current(), flush=True)
"""

# Whether a thread that has said it is none of a capture's may ask about events while one is under way in "global" mode.
EXCHANGED = """
import ctypes, threading, torch
x, event = torch.zeros(1024, device="cuda"), torch.cuda.Event()
x += 1; event.record(); torch.cuda.synchronize()
told = []
def other(exchange):
    if exchange:
        mode = ctypes.c_int(1)  # thread local
        told.append(ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    event.query()
for exchange in (True, False):
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            x += 1
            thread = threading.Thread(target=other, args=(exchange,))
            thread.start(); thread.join()
        graph.replay(); torch.cuda.synchronize()
        print("exchanged" if exchange else "plain", "whole", told, flush=True)
    except RuntimeError as error:
        print("exchanged" if exchange else "plain", "broken:", str(error).splitlines()[0], told, flush=True)
"""

CAPTURED = """
import torch, cupy
c, x = cupy.zeros(1024, cupy.float32), torch.zeros(1024, device="cuda")
x += 1; torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    torch.zeros(3).is_pinned()
    x += 1
graph.replay(); torch.cuda.synchronize()
print("survives", x[0].item() == 2)
"""

DESTROYED = """
import torch, cupy
s = cupy.cuda.Stream(non_blocking=True)
t = torch.ones(1 << 20, device="cuda")
t.record_stream(torch.cuda.ExternalStream(s.ptr))
del s
del t
torch.empty(1 << 20, device="cuda"); torch.cuda.synchronize()
print("unnoticed")
"""


QUEUES = """
import sys; sys.path.append({tests!r})
import torch
from holding import Gate
gate, streams = Gate(), [torch.cuda.Stream() for _ in range(32)]
print(sum(not gate.apart(streams[0], other) for other in streams[1:]), "of 31 wait behind a held stream")
"""


def queues(torch: Any, cupy: Any) -> str:
    """Streams that share a queue of the hardware: what waits in one holds up the other."""
    told = []
    for connections in ("8", "32"):
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
        told.append(f"{connections} connections: {in_a_process(QUEUES.format(tests=sys.path[-1]))}")
    return "; ".join(told)


def beside_a_held_stream(torch: Any, cupy: Any) -> str:
    """How long calls take on other streams while one is held for 300 ms: what waits for it takes as long."""
    from holding import Gate

    gate, held = Gate(), torch.cuda.Stream()
    kernel = cupy.RawKernel('extern "C" __global__ void k(int* p) { p[0] = 1; }', "k")
    kernel.compile()
    block, one = cupy.zeros(1, cupy.int32), np.zeros(1, "i4")
    calls: dict[str, Callable[[], Any]] = {
        "cudaHostAlloc": lambda: torch.empty(48 * MIB, dtype=torch.uint8, pin_memory=True),
        "cudaMalloc": lambda: cupy.cuda.runtime.malloc(48 * MIB),
        "a first kernel": lambda: kernel((1,), (1,), (block,)),
        "cudaEventCreate": lambda: cupy.cuda.Event(),
        "pointerGetAttributes": lambda: cupy.cuda.runtime.pointerGetAttributes(block.data.ptr),
        "pageable copy up": lambda: cupy.cuda.runtime.memcpyAsync(block.data.ptr, one.ctypes.data, 4, 1, 0),
    }
    told = []
    with cupy.cuda.Stream(non_blocking=True):
        for name, call in calls.items():
            with gate.shut():
                gate.put_on(held)

                timer = threading.Timer(0.3, gate.open)
                timer.start()
                begun = time.perf_counter()
                call()
                told.append(f"{name} {1e3 * (time.perf_counter() - begun):.1f} ms")
                timer.cancel()  # it would open the next gate
                gate.open()
    return ", ".join(told)


def pieces(torch: Any, cupy: Any) -> str:
    """What the parts of a crossing cost the host, in ns."""
    import tensorbridge as tb
    from tensorbridge._cuda import _lease, _stream_order, _streams

    t, c = torch.ones(16, device="cuda"), cupy.ones(16, cupy.float32)
    stream, event = torch.cuda.default_stream(), cupy.cuda.Event(disable_timing=True)
    memory = cupy.cuda.UnownedMemory(t.data_ptr(), 64, t, 0)
    pointer, one = cupy.cuda.MemoryPointer(memory, 0), np.dtype("f4")
    parts: dict[str, Callable[[], Any]] = {
        "to_cupy": lambda: tb.to_cupy(t), "cupy.from_dlpack": lambda: cupy.from_dlpack(t),
        "to_torch": lambda: tb.to_torch(c), "torch.from_dlpack": lambda: torch.from_dlpack(c),
        "torch's stream": lambda: _streams.current("torch", 0), "CuPy's stream": lambda: _streams.current("cupy", 0),
        "capturing": _streams.capturing, "settle": _lease.settle, "detach": t.detach,
        "record_stream": lambda: t.record_stream(stream), "resizable": lambda: t.untyped_storage().resizable(),
        "UnownedMemory": lambda: cupy.cuda.UnownedMemory(t.data_ptr(), 64, t, 0),
        "MemoryPointer": lambda: cupy.cuda.MemoryPointer(memory, 0),
        "cupy.ndarray": lambda: cupy.ndarray((16,), one, pointer),
        "__dlpack__": lambda: c.__dlpack__(stream=-1, max_version=(1, 0)),
        "import": lambda: torch.utils.dlpack.from_dlpack(c.__dlpack__(stream=-1, max_version=(1, 0))),
        "mark": lambda: _stream_order.mark(1, 0), "mark passed": lambda: _stream_order.mark(1, 0).passed(),
        "eventRecord": lambda: cupy.cuda.runtime.eventRecord(event.ptr, 1),
        "CuPy's Device block": lambda: cupy.cuda.Device(0).__enter__().__exit__(),
    }  # fmt: skip
    told = []
    for name, part in parts.items():
        try:
            part()
            best = min(timeit.repeat(part, number=500, repeat=5)) / 500
            told.append(f"{name} {1e9 * best:.0f}")
        except Exception as error:  # a figure less
            told.append(f"{name}: {type(error).__name__} {error}")
        torch.cuda.synchronize()
        _lease.settle()
    return ", ".join(told)


def ring(torch: Any, cupy: Any) -> str:
    """GB/s of 256 MiB through rings of other shapes, by as many threads: down into fresh memory, and up."""
    from tensorbridge._cuda import _copiers, _staging

    nbytes = 256 * MIB
    link, block = _staging.link_of("torch", 0), torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    source, told = np.ones(nbytes, np.uint8), []
    for count, size, threads in ((4, 8, 8), (4, 8, 4), (4, 8, 16), (8, 4, 8), (4, 16, 8), (8, 16, 16), (2, 32, 8)):
        _copiers.THREADS, _copiers._threads = threads, None
        shape = _staging.Ring(_staging.pinned_empty, count, size * MIB)
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            _staging.fill_host(link, block, np.empty(nbytes, np.uint8), through=shape)
            between = time.perf_counter()
            _staging.fill_device(link, block, source, through=shape)
            torch.cuda.synchronize()
            times.append((between - begun, time.perf_counter() - between))
        down, up = (min(each) for each in zip(*times[1:], strict=True))
        told.append(
            f"{count} x {size} MiB, {threads} threads: {nbytes / down / 1e9:.1f} down {nbytes / up / 1e9:.1f} up"
        )
    return "; ".join(told)


QUESTIONS: dict[str, Callable[[Any, Any], str]] = {
    "what the driver says of addresses (type, device)": addresses,
    "streams": streams,
    "what the parts of a crossing cost, ns": pieces,
    "the ring in other shapes": ring,
    "calls beside a stream that is held for 300 ms": beside_a_held_stream,
    "streams that share a queue": queues,
    "a forked child": lambda torch, cupy: in_a_process(CHILD),
    "the first call of a thread": lambda torch, cupy: in_a_process(THREAD),
    "what makes a context": lambda torch, cupy: in_a_process(CONTEXT),
    "an event is asked for beside a capture in global mode": lambda torch, cupy: in_a_process(EXCHANGED),
    "is_pinned in a capture": lambda torch, cupy: in_a_process(CAPTURED),
    "an event recorded on a CuPy stream that was destroyed": lambda torch, cupy: in_a_process(DESTROYED),
    "bfloat16 in CuPy": lambda torch, cupy: str(cupy.arange(3).astype("bfloat16").get()),
    "numpy.from_dlpack of a CUDA tensor": lambda torch, cupy: str(
        np.from_dlpack(torch.ones(3, device="cuda"), device="cpu")
    ),
}


def main() -> None:
    import cupy
    import torch

    torch.cuda.init()
    only = sys.argv[1:]
    for question, answer in QUESTIONS.items():
        if only and not any(word in question for word in only):
            continue
        begun = time.perf_counter()
        try:
            told = answer(torch, cupy)
        except Exception as error:  # a question without an answer; the next one is asked
            told = f"NO ANSWER: {type(error).__name__}: {error}"
        print(f"- {question}: {told}  [{time.perf_counter() - begun:.1f} s]", flush=True)
    os._exit(0)  # whatever was broken above, the answers are out


if __name__ == "__main__":
    main()
