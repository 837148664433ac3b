"""editing() a tensor on a device: a host copy, written back at the end; rehearsed on the CPU, run where a GPU is."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from tensorbridge._autograd import _editing
from tensorbridge._autograd._editing import editing
from tensorbridge._cuda import _streams
from tensorbridge._errors import DeviceError, GraphError

STALE = "modified by an inplace operation"


def graph_that_saved(y):
    """A loss whose backward needs the values of y."""
    return (y**2).sum()


@pytest.fixture
def elsewhere(monkeypatch):
    """Send CPU tensors down the road of a device: a host copy on entry, written back on exit."""
    monkeypatch.setattr(_editing, "on_host", lambda tensor: False)


@pytest.fixture
def cuda():
    return torch.device("cuda")


def assert_device_road(device):
    t = torch.zeros(4, 2, device=device)[::2].to(torch.bfloat16).T
    with editing(t) as a:
        a[0] = 1
        assert t.float().sum().item() == 0  # not before the end
    assert t.float().tolist() == [[1, 1], [0, 0]]
    assert not a.flags.writeable
    part = torch.zeros(3, 4, device=device)
    with editing(part[:, 1]) as a:
        a[:] = [1, 2, 3]
    assert part.sum(0).tolist() == [0, 6, 0, 0]


def test_a_device_tensor_is_written_back_when_the_block_ends(elsewhere):
    assert_device_road("cpu")


@pytest.mark.gpu
def test_a_cuda_tensor_is_written_back_when_the_block_ends(cuda):
    assert_device_road(cuda)


def test_nothing_is_written_back_after_an_exception_and_gradients_stay_right(elsewhere):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    z = graph_that_saved(x)
    with pytest.raises(KeyError), editing(x) as a:
        a[:] = 0
        raise KeyError
    assert x.tolist() == [1, 2]
    assert not a.flags.writeable
    z.backward()  # nothing changed, so there is nothing to refuse
    assert x.grad.tolist() == [2, 4]


def test_the_write_back_is_seen_by_autograd(elsewhere):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    z = graph_that_saved(x)
    with editing(x) as a:
        a[:] = 0
    assert x.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match=STALE):
        z.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_the_write_back_reaches_an_inference_tensor(elsewhere, inside):
    with torch.inference_mode():
        t = torch.zeros(3)
    with torch.inference_mode(inside), editing(t) as a:
        a[:] = 1
    assert t.tolist() == [1, 1, 1]


def test_nested_editing_of_one_device_tensor_shares_one_host_copy(elsewhere):
    t = torch.zeros(3)
    with editing(t) as outer:
        outer[0] = 1
        with editing(t) as inner:
            assert inner[0] == 1
            inner[1] = 2
        assert t.tolist() == [1, 2, 0]
        assert outer[1] == 2
        outer[2] = 3
    assert t.tolist() == [1, 2, 3]
    assert not _editing._open_copies


def test_two_aliases_with_their_own_counters_share_one_host_copy_and_both_counters_move(elsewhere):
    t = torch.zeros(3)
    alias = t.data
    before = t._version, alias._version
    with editing(alias) as outer:
        with editing(t) as inner:
            inner[0] = 1
        outer[1] = 2
    assert t.tolist() == [1, 2, 0]
    assert t._version > before[0]
    assert alias._version > before[1]


def test_a_change_on_the_device_meanwhile_is_not_undone_in_silence(elsewhere):
    t = torch.zeros(3)
    with pytest.raises(GraphError, match="changed"), editing(t) as a:
        a[0] = 1
        t.add_(5)
    assert t.tolist() == [5, 5, 5]
    assert not _editing._open_copies


def test_host_copies_open_in_two_threads_close_one_at_a_time(elsewhere):
    t = torch.zeros(2)
    inside, done = threading.Event(), threading.Event()

    def other():
        with editing(t) as b:
            b[1] = 2
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with editing(t) as a:
        thread.start()
        inside.wait(10)
        a[0] = 1
    done.set()
    thread.join()
    assert t.tolist() == [1, 2]
    assert not _editing._open_copies


def test_while_a_cuda_graph_is_captured_a_device_tensor_is_refused(elsewhere, monkeypatch):
    t = torch.zeros(3)
    refuse, capturing = _editing._refuse_moment, [True]
    like_cuda = SimpleNamespace(
        device=torch.device("cuda", 0), layout=torch.strided, is_nested=False, dtype=torch.float32, shape=(3,)
    )
    monkeypatch.setattr(_streams, "capturing", lambda: capturing[0])
    monkeypatch.setattr(_editing, "_refuse_moment", lambda torch, tensor: refuse(torch, like_cuda))
    with pytest.raises(DeviceError, match="captur"):
        editing(t)
    capturing[0] = False
    block = editing(t)
    with pytest.raises(DeviceError, match="captur"), block as a:
        a[0] = 1
        capturing[0] = True  # a capture began inside the block
    assert t[0] == 0


@pytest.mark.gpu
def test_editing_inside_a_cuda_graph_capture_is_refused_and_the_capture_survives(cuda):
    t, graph = torch.zeros(3, device=cuda), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        with pytest.raises(DeviceError, match="captur"):
            editing(t)
        t.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert t.tolist() == [1, 1, 1]


def test_in_a_forked_process_a_cuda_tensor_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("CUDA was asked"))
    like_cuda = SimpleNamespace(
        device=torch.device("cuda", 0), layout=torch.strided, is_nested=False, dtype=torch.float32, shape=(3,)
    )
    with pytest.raises(DeviceError, match="spawn"):
        _editing._refuse_moment(torch, like_cuda)


LEFT_OPEN = """
import contextlib, sys
import torch, tensorbridge as tb
from tensorbridge._autograd import _editing

def edits(t):
    with tb.editing(t) as a:
        yield a

if sys.argv[1] == "copy":
    _editing.on_host = lambda tensor: False
t = torch.zeros(3)
contextlib.left_open = edits(t)  # ended after the names of tensorbridge are gone
next(contextlib.left_open)
"""


@pytest.mark.parametrize("road", ["host", "copy"])
def test_a_block_that_is_open_when_the_interpreter_ends_is_closed_in_silence(road):
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN, road], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_block_that_the_garbage_collector_ends_does_not_wait_for_its_own_thread(elsewhere, monkeypatch):
    def suspended():
        with editing(torch.zeros(2)):
            yield

    class Collecting(_editing._HostCopy):
        def __init__(self, alias):
            del cycle[:]  # as the collector, which may strike here
            super().__init__(alias)

    cycle = [suspended()]
    next(cycle[0])
    monkeypatch.setattr(_editing, "_HostCopy", Collecting)

    def edit():
        with editing(torch.zeros(3)) as a:
            a[:] = 1

    thread = threading.Thread(target=edit, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert not _editing._open_copies
