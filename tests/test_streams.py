"""Which stream is current, how one waits for another, and what a capture allows: on a recorded fake of CUDA."""

import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import fake_frameworks
import pytest

import tensorbridge as tb
from tensorbridge import DeviceError
from tensorbridge._cuda import _stream_order, _streams

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def machine(monkeypatch):
    yield from fake_frameworks.installed(monkeypatch, devices=2)


@pytest.fixture
def torch(machine):
    return machine.torch


@pytest.fixture
def cupy(machine):
    return machine.cupy


def currents(machine, index=0):
    return machine.current["torch"][index], machine.current["cupy"][index]


# What a stream is


class CudaCoreStream:
    """As cuda.core has it: the protocol, and a device with an id."""

    def __init__(self, handle, index):
        self.handle, self.device = handle, type("Device", (), {"device_id": index})()

    def __cuda_stream__(self):
        return 0, self.handle


class Handle:
    """What older releases of cuda.core answer with."""

    def __int__(self):
        return 0x78


class OlderCudaCoreStream:
    def __cuda_stream__(self):
        return 0, Handle()


class OnlyTheProtocol:
    def __cuda_stream__(self):
        return 0, 0x77


STREAMS = {
    "a torch stream": (lambda m: m.torch.cuda.Stream(1, 0x50), (0x50, 1)),
    "torch's default stream": (lambda m: m.torch.cuda.default_stream(1), (1, 1)),
    "a CuPy stream": (lambda m: m.cupy.cuda.Stream(number=0x60, device_id=1), (0x60, 1)),
    "CuPy's null stream, on the current device": (lambda m: m.cupy.cuda.Stream.null, (1, 0)),
    "a cuda.core stream": (lambda m: CudaCoreStream(0x70, 1), (0x70, 1)),
    "anything with the protocol, on the current device": (lambda m: OnlyTheProtocol(), (0x77, 0)),
    "a stream whose handle is an object": (lambda m: OlderCudaCoreStream(), (0x78, 0)),
    "a raw handle": (lambda m: 0x90, (0x90, 0)),
    "0": (lambda m: 0, (1, 0)),
    "1": (lambda m: 1, (1, 0)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_identified_by_its_raw_handle_and_its_device(machine, name):
    make, expected = STREAMS[name]
    stream = make(machine)
    assert _streams.identify(stream) == expected


@pytest.mark.parametrize(
    ("stream", "error"),
    [(None, TypeError), (True, TypeError), ("cuda", TypeError), (2.0, TypeError), (2, ValueError), (-1, ValueError)],
)
@pytest.mark.parametrize("call", [lambda s: tb.use_stream(s).__enter__(), _streams.identify], ids=["use", "identify"])
def test_what_is_no_stream_or_the_per_thread_default_is_refused_and_nothing_changes(machine, call, stream, error):
    before = currents(machine)
    with pytest.raises(error):
        call(stream)
    assert currents(machine) == before
    assert _streams._held == {}


def test_the_default_stream_is_never_built_from_its_number(machine):
    """The fake's ExternalStream refuses 0 and 1, as the real one misunderstands them."""
    assert _streams.wrapped("torch", 1, 0).cuda_stream == 0
    assert _streams.wrapped("cupy", 1, 0) is machine.cupy.cuda.Stream.null


def test_a_stream_is_wrapped_once(machine):
    assert _streams.wrapped("torch", 0x50, 1) is _streams.wrapped("torch", 0x50, 1)
    assert _streams.wrapped("torch", 0x50, 1).device_index == 1


# use_stream


@pytest.mark.parametrize("name", STREAMS)
def test_use_stream_makes_one_stream_current_in_both_and_puts_everything_back(machine, name):
    make, (number, index) = STREAMS[name]
    stream = make(machine)
    before = currents(machine, 0), currents(machine, 1)
    with tb.use_stream(stream) as given:
        assert given is stream
        assert machine.device == index
        assert currents(machine, index) == (number, number)
        assert _streams.same(index)
    assert machine.device == 0
    assert (currents(machine, 0), currents(machine, 1)) == before


def test_use_stream_puts_everything_back_after_an_error_and_nests(machine, torch):
    one, two = torch.cuda.Stream(0), torch.cuda.Stream(1)
    with pytest.raises(ZeroDivisionError), tb.use_stream(one):
        with tb.use_stream(two):
            assert machine.device == 1
        assert (machine.device, currents(machine, 0)) == (0, (one.cuda_stream, one.cuda_stream))
        raise ZeroDivisionError
    assert currents(machine, 0) == currents(machine, 1) == (1, 1)
    assert machine.device == 0


def test_use_stream_leaves_the_streams_of_other_devices_alone_whichever_device_is_current_at_its_end(machine, torch):
    machine.current["torch"][1] = machine.current["cupy"][1] = 0x700
    with tb.use_stream(torch.cuda.Stream(0)):
        machine.device = 1
    assert currents(machine, 0) == (1, 1)
    assert currents(machine, 1) == (0x700, 0x700)


def test_a_cupy_stream_that_was_made_current_by_use_is_current_again_afterwards(machine, cupy):
    """CuPy's own ``with stream`` would go back to the stream before that one (cupy#7866)."""
    mine = cupy.cuda.Stream()
    mine.use()
    with tb.use_stream(cupy.cuda.Stream()):
        assert currents(machine)[1] != mine.ptr
    assert cupy.cuda.get_current_stream() is mine


def test_a_stream_once_used_is_never_destroyed(machine, cupy):
    stream = cupy.cuda.Stream()
    key = (0, stream.ptr)
    with tb.use_stream(stream):
        pass
    del stream
    assert key not in machine.destroyed


def test_use_stream_is_current_again_after_a_with_block_of_cupys_inside(machine, cupy):
    """CuPy's blocks know each other only: after one, a stream made current by `.use()` is forgotten (cupy#7866)."""
    mine = cupy.cuda.Stream(non_blocking=True)
    mine.use()
    with tb.use_stream(0x500):
        with cupy.cuda.Stream(non_blocking=True):
            pass
        assert cupy.cuda.get_current_stream().ptr == 0x500
        with tb.use_stream(0x600), cupy.cuda.Stream(non_blocking=True):
            pass
        assert cupy.cuda.get_current_stream().ptr == 0x500
    assert cupy.cuda.get_current_stream() is mine


@pytest.mark.parametrize("without", ["torch", "cupy"])
def test_use_stream_works_with_one_of_the_two(monkeypatch, without):
    for machine in fake_frameworks.installed(monkeypatch, without=[without]):
        with tb.use_stream(0x50):
            assert sorted(currents(machine)) == [1, 0x50]
        assert currents(machine) == (1, 1)


def test_use_stream_without_a_device_says_so(monkeypatch):
    for machine in fake_frameworks.installed(monkeypatch, devices=0):
        machine.torch.cuda.is_available = lambda: False
        with pytest.raises(DeviceError, match="no usable CUDA device"):
            tb.use_stream(0x50).__enter__()


# Order


def test_streams_that_are_one_by_raw_handle_need_no_event(machine):
    with tb.use_stream(0x50):
        machine.calls.clear()
        _stream_order.order("torch", "cupy", 0)
    assert machine.calls == []


@pytest.mark.parametrize(("giver", "receiver"), [("torch", "cupy"), ("cupy", "torch")])
def test_different_streams_are_ordered_by_one_event_and_the_host_waits_for_nothing(machine, giver, receiver):
    machine.current[giver][1] = 0x50
    _stream_order.order(giver, receiver, 1)
    _stream_order.order(giver, receiver, 1)
    once = [("record", 0x50), ("wait", 1)]
    assert [call for call in machine.calls if call[0] != "cupy.Event"] == once + once
    assert machine.names().count("cupy.Event") == 1, "one event is kept per thread and device"
    assert machine.device == 0


def test_each_thread_orders_by_an_event_of_its_own(machine):
    machine.current["torch"][0] = 0x50
    _stream_order.link(0x50, 0x60, 0)
    thread = threading.Thread(target=_stream_order.link, args=(0x50, 0x60, 0))
    thread.start()
    thread.join()
    assert machine.names().count("cupy.Event") == 2


def test_without_cupy_torch_orders(monkeypatch):
    for machine in fake_frameworks.installed(monkeypatch, without=["cupy"]):
        _stream_order.wait("torch", 0x60, 0)
        assert machine.calls == [("torch.Event",), ("record", 0x60), ("wait", 1)]


def test_the_consumer_starts_after_the_held_producer(machine):
    done = []
    machine.current["torch"][0], machine.current["cupy"][0] = 0x50, 0x60
    with machine.hold(0, 0x50):
        machine.kernel(0, 0x50, lambda: done.append("producer"))
        _stream_order.order("torch", "cupy", 0)
        machine.kernel(0, 0x60, lambda: done.append("consumer"))
        machine.run()
        assert done == []
    assert done == ["producer", "consumer"]


def test_the_race_is_there_without_an_order(machine):
    """The negative control of the test above."""
    done = []
    with machine.hold(0, 0x50):
        machine.kernel(0, 0x50, lambda: done.append("producer"))
        machine.kernel(0, 0x60, lambda: done.append("consumer"))
        machine.run()
    assert done == ["consumer", "producer"]


def test_a_stream_on_another_device_waits_too(machine):
    _stream_order.link(0x50, 0x60, 0, 1)
    assert [call for call in machine.calls if call[0] in ("record", "wait")] == [("record", 0x50), ("wait", 0x60)]
    _stream_order.link(1, 1, 0, 1)
    assert machine.calls[-2:] == [("record", 1), ("wait", 1)], "two devices have two default streams"


def test_a_mark_passes_when_the_work_before_it_is_done_and_not_before(machine):
    machine.kernel(0, 0x50, lambda: None)
    mark = _stream_order.mark(0x50, 0)
    assert not mark.passed()
    mark.synchronize()
    assert mark.passed()


def test_a_device_has_one_side_stream_whoever_asks_first(machine):
    found = []
    threads = [threading.Thread(target=lambda: found.append(_streams.side_stream(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(stream) for stream in found}) == 1
    assert _streams.identify(found[0])[1] == 1
    assert _streams.side_stream(0) is not found[0]


# Capture


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_a_capture_on_either_current_stream_is_seen(machine, framework):
    assert not _streams.capturing()
    machine.current[framework][0] = 0x50
    machine.capturing.add((0, 0x50))
    assert _streams.capturing()
    assert _streams.capturing_on(0x50, 0)
    assert not _streams.capturing_on(0x60, 0)
    assert set(machine.names()) == {"is_capturing"}, "asking records nothing and queries nothing"


def test_a_capture_that_forbids_even_to_ask_the_default_stream_counts_as_one(machine):
    machine.capturing.add((0, 0x50))
    machine.blocking_capture = True
    assert _streams.capturing()


def test_an_error_that_has_nothing_to_do_with_a_capture_is_not_taken_for_one(machine, torch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_current_stream_capturing = lost
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _streams.capturing()


def test_nothing_is_asked_of_cupy_where_it_sees_no_device(monkeypatch):
    for machine in fake_frameworks.installed(monkeypatch, devices=0):
        machine.torch.cuda.is_initialized = lambda: False
        assert not _streams.capturing()
        assert machine.calls == []


# Forks


def test_a_fork_after_cupy_used_cuda_is_known_even_where_torch_did_not(machine, cupy, monkeypatch):
    monkeypatch.setattr(_streams, "_cupy_in_parent", False)
    monkeypatch.setattr(_streams, "in_child", False)
    assert _streams.usable("cupy")
    _streams._after_fork()  # what the child does first
    assert _streams.forked(), "to ask how many devices there are starts the driver"


def test_a_fork_after_cupy_used_cuda_by_itself_is_known_by_what_the_driver_says(machine, cupy, monkeypatch):
    """The runtime goes on to tell how many devices there are: it remembers."""
    monkeypatch.setattr(_streams, "_cupy_in_parent", False)
    monkeypatch.setattr(_streams, "in_child", True)
    assert not _streams.forked(), "CUDA works: the parent had not used it"

    def broken():
        raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorInitializationError")

    _streams._usable.clear()
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", broken)
    assert cupy.cuda.runtime.getDeviceCount()
    assert _streams.forked()
    assert not _streams.usable("cupy")


def test_the_hook_runs_in_a_real_child():
    code = "import os, tensorbridge._cuda._streams as s; s._usable.add('cupy'); pid = os.fork()\n"
    code += "if not pid: os._exit(40 + s._cupy_in_parent + 2 * len(s._usable))\n"
    code += "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), s._cupy_in_parent)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert run.stdout.split() == ["41", "False"], run.stderr


@pytest.fixture
def forked(machine, monkeypatch):
    """A forked child whose parent used CUDA: torch refuses to start, and the driver answers nothing."""

    def broken(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    cuda = machine.torch.cuda
    monkeypatch.setattr(cuda, "_is_in_bad_fork", lambda: True)
    for name in ("init", "current_device", "is_current_stream_capturing", "get_device_name"):
        monkeypatch.setattr(cuda, name, broken, raising=False)
    return machine


def test_in_a_forked_child_what_needs_cuda_says_so_in_our_words(forked):
    t = forked.torch.full((3,), 1.0)
    for call in (
        lambda: tb.use_stream(0x50).__enter__(),
        lambda: tb.use_stream(forked.torch.cuda.Stream(0, 0x50)).__enter__(),
        lambda: tb.used_on(t, 0x50),
        lambda: tb.used_on(t, forked.torch.cuda.Stream(0, 0x50)),
        _streams.current_device,
    ):
        with pytest.raises(tb.DeviceError, match="CUDA cannot be used in a forked process"):
            call()
    assert forked.calls == []


def test_the_event_of_a_thread_outlives_it_and_serves_the_next_of_its_number(machine):
    """A forked child drops what its parent's other threads held, and CuPy cannot destroy an event there."""
    kept = []

    def work():
        _stream_order.link(0x50, 0x60, 0)
        kept.extend(weakref.ref(event) for event in _stream_order._events.values())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert kept[0]() is not None


def test_in_a_forked_child_a_stream_can_still_be_named_for_a_description(forked):
    assert _streams.current("torch", 0) == _streams.LEGACY_DEFAULT


def test_in_a_forked_child_info_asks_no_device(forked):
    found = tb.info()
    assert (found.devices, found.pools) == ((), ())


# The picture


def test_the_picture_in_the_documentation_is_what_its_script_draws():
    script = [sys.executable, DOCS / "streams_picture.py", "-"]
    drawn = subprocess.run(script, capture_output=True, text=True, check=True)
    assert drawn.stdout == (DOCS / "streams.svg").read_text(), "run: python docs/streams_picture.py"
    assert "streams.svg" in (DOCS / "streams.md").read_text()


# The list of facts


def test_every_probe_that_the_list_of_facts_names_exists_and_every_probe_is_in_the_list():
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "gpu-facts.md").read_text()))
    files = [*(ROOT / "tests" / "gpu").glob("test_*.py"), ROOT / "tests" / "test_facts_gpu.py"]
    written = {file.name: set(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)) for file in files}
    assert named <= set().union(*written.values())
    assert written["test_gpu_facts.py"] | written["test_facts_gpu.py"] <= named
