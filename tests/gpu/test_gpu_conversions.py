"""torch and CuPy over one memory: every dtype and layout, written on one side and read on the other."""

import subprocess
import sys

import numpy as np
import pytest
import table_rows
from test_intercepted import MODES

import tensorbridge as tb
from tensorbridge import _dtypes
from tensorbridge._commands import _matrix

pytestmark = pytest.mark.gpu

# torch's dtypes that CuPy has, by name.
SHARED = [name for name, row in _dtypes.DTYPES.items() if row.torch and row.cupy]


def bits(x):
    """The bytes of an array of any framework, on the host."""
    return np.ascontiguousarray(tb.to_numpy(x)).view(np.uint8)


@pytest.mark.parametrize("dtype", SHARED)
def test_a_tensor_is_shared_with_cupy_in_every_dtype(torch, cupy, dtype):
    t = torch.arange(24, device="cuda").to(getattr(torch, dtype)).reshape(2, 3, 4)
    c = tb.to_cupy(t)
    assert c.data.ptr == t.data_ptr()
    assert (c.shape, tb.describe(c).dtype) == ((2, 3, 4), dtype)
    assert tb.plan(t, "cupy").zero_copy
    assert tb.shares_memory(c, t)
    assert np.array_equal(bits(c), bits(t))


@pytest.mark.parametrize("dtype", SHARED)
def test_a_cupy_array_is_shared_with_torch_in_every_dtype(torch, cupy, dtype):
    c = cupy.arange(24).reshape(2, 3, 4).astype(_dtypes.DTYPES[dtype].numpy)
    t = tb.to_torch(c)
    assert t.data_ptr() == c.data.ptr
    assert t.dtype == getattr(torch, dtype)
    assert tb.plan(c, "torch").zero_copy
    assert np.array_equal(bits(c), bits(t))


@pytest.mark.parametrize("target", _matrix.TARGETS)
@pytest.mark.parametrize("source", _matrix.SOURCES)
def test_table_of_the_readme_says_what_real_arrays_do(torch, cupy, source, target, tmp_path):
    """`torch` and `cupy` are asked for so that the device is there."""
    table_rows.assert_cell_is_true(source, target, tmp_path)


VIEWS = {
    "whole": lambda x: x,
    "slice": lambda x: x[1:],
    "strided": lambda x: x[:, ::2],
    "transposed": lambda x: x.T,
    "row": lambda x: x[2],
    "length-1 axes": lambda x: x[None, :, :1],
    "0-d": lambda x: x[1, 1],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_layout_is_shared_both_ways_and_writes_are_seen(torch, cupy, name):
    t = VIEWS[name](torch.arange(12.0, device="cuda").reshape(3, 4))
    c = tb.to_cupy(t)
    assert np.array_equal(cupy.asnumpy(c), t.cpu().numpy())
    c += 100
    torch.cuda.synchronize()
    back = tb.to_torch(c)
    assert torch.equal(back, t)
    back -= 50
    torch.cuda.synchronize()
    assert np.array_equal(cupy.asnumpy(c), t.cpu().numpy())
    assert name == "empty" or back.data_ptr() == t.data_ptr()


def test_a_reversed_array_is_packed_once_and_not_fatal(torch, cupy):
    c = cupy.arange(6.0)[::-1]
    assert [s.op for s in tb.plan(c, "torch").steps if s.kind] == ["pack"]
    assert tb.to_torch(c).tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(tb.CopyRequiredError):
        tb.to_torch(c, copy=False)


def test_lazy_bits_are_resolved_and_a_graph_is_copied(torch, cupy):
    z = torch.tensor([1 + 2j, 3 - 4j], device="cuda")
    assert cupy.asnumpy(tb.to_cupy(z.conj())).tolist() == [1 - 2j, 3 + 4j]
    assert cupy.asnumpy(tb.to_cupy(z.conj().imag)).tolist() == [-2, 4]
    w = torch.ones(3, device="cuda", requires_grad=True)
    c = tb.to_cupy(w)
    assert not tb.shares_memory(c, w)
    assert tb.shares_memory(tb.to_cupy(w, share_readonly=True), w)
    with pytest.raises(tb.GraphError):
        tb.to_cupy(w, detach=False)


def test_float8_is_refused_by_name_with_a_cast_that_works(torch, cupy):
    t = torch.ones(4, device="cuda").to(torch.float8_e4m3fn)
    with pytest.raises(tb.UnsupportedArrayError, match="float16"):
        tb.to_cupy(t)
    assert cupy.asnumpy(tb.to_cupy(t, dtype="float16")).tolist() == [1] * 4


def test_copies_keep_their_order_and_share_nothing(torch, cupy):
    t = torch.zeros(2, 3, 4, 5, device="cuda").contiguous(memory_format=torch.channels_last)
    c = tb.to_cupy(t, copy=True)
    assert not tb.shares_memory(c, t)
    assert c.strides == tuple(4 * s for s in t.stride())
    back = tb.to_torch(c, copy=True)
    assert not tb.shares_memory(back, c)
    assert back.stride() == t.stride()


def test_out_on_the_device_is_filled_from_either_side(torch, cupy):
    t, c = torch.arange(6.0, device="cuda"), cupy.zeros(6, cupy.float32)
    assert tb.to_cupy(t, out=c) is c
    assert cupy.asnumpy(c).tolist() == [0, 1, 2, 3, 4, 5]
    half = torch.zeros(6, dtype=torch.float16, device="cuda")
    tb.to_torch(c, out=half)
    assert half.tolist() == [0, 1, 2, 3, 4, 5]
    tb.to_cupy(np.arange(6.0)[::-1], out=c)
    assert cupy.asnumpy(c).tolist() == [5, 4, 3, 2, 1, 0]


def test_lists_are_stacked_where_they_are(torch, cupy):
    parts = [torch.arange(6.0, device="cuda").reshape(2, 3) + i for i in range(2)]
    expected = np.stack([tb.to_numpy(part) for part in parts])
    for made, wanted in ((tb.to_torch(parts), torch.Tensor), (tb.to_cupy(parts), cupy.ndarray)):
        assert isinstance(made, wanted)
        assert tb.describe(made).device == "cuda:0"
        assert np.array_equal(tb.to_numpy(made), expected)
    assert np.array_equal(tb.to_numpy(parts), expected)
    assert np.array_equal(tb.to_numpy(tb.to_torch([tb.to_cupy(part) for part in parts])), expected)


@pytest.mark.parametrize("casts", ["float64", {"real floating": "float64", "integral": "float64"}])
def test_tensors_of_several_dtypes_are_cast_as_they_are_stacked(torch, casts):
    parts = [torch.arange(6, device="cuda").to(dtype) for dtype in (torch.float32, torch.int16, torch.float16)]
    made = tb.to_torch(parts, dtype=casts)
    assert (made.device, made.dtype) == (parts[0].device, torch.float64)
    assert np.array_equal(tb.to_numpy(made), np.stack([np.arange(6.0)] * 3))
    plan = tb.plan(parts, "torch", dtype=casts)
    assert [(step.op, step.kind) for step in plan.steps if step.kind] == [("stack", "d2d")]
    marked = [torch.tensor([1 + 2j], device="cuda").conj(), torch.tensor([3j], device="cuda").conj().imag]
    assert tb.to_torch(marked, dtype="complex128").tolist() == [[1 - 2j], [-3]]
    with pytest.raises(tb.UnsupportedArrayError, match="different dtypes: float32, float64"):
        tb.to_cupy([tb.to_cupy(parts[0]), tb.to_cupy(parts[0]).astype("float64")], dtype="float32")


def test_a_description_names_the_device_and_the_stream(torch, cupy):
    stream = torch.cuda.Stream()
    with tb.use_stream(stream):
        for x in (torch.ones(3, device="cuda"), cupy.ones(3)):
            info = tb.describe(x)
            assert (info.device, info.stream) == ("cuda:0", stream.cuda_stream)


def test_views_share_memory_only_where_they_overlap(torch, cupy):
    t = torch.zeros(10, device="cuda")
    c = tb.to_cupy(t)
    assert tb.shares_memory(c[::2], t)
    assert not tb.shares_memory(c[::2], t[1::2])
    assert not tb.shares_memory(c, torch.zeros(10))


def test_results_stay_valid_when_their_source_is_gone(torch, cupy):
    c = tb.to_cupy(torch.full((1 << 16,), 3.0, device="cuda"))
    t = tb.to_torch(cupy.full(1 << 16, 4.0, cupy.float32))
    noise = [torch.zeros(1 << 16, device="cuda") for _ in range(8)] + [cupy.zeros(1 << 16) for _ in range(8)]
    assert float(c.min()) == 3.0
    assert t.min().item() == 4.0
    assert len(noise) == 16


def test_torch_functions_work_on_what_came_from_cupy_and_autograd_too(torch, cupy):
    t = tb.to_torch(cupy.arange(3, dtype=cupy.float32)).requires_grad_()
    (t * t).sum().backward()
    assert t.grad.tolist() == [0, 2, 4]


def test_both_devices_names_mean_the_same(torch, cupy):
    a = np.zeros(3)
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0), cupy.cuda.Device(0)):
        assert tb.describe(tb.to_torch(a, device=device)).device == "cuda:0"
        assert tb.describe(tb.to_cupy(a, device=device)).device == "cuda:0"


class ByInterface:
    def __init__(self, c):
        self.c = c

    @property
    def __cuda_array_interface__(self):
        return self.c.__cuda_array_interface__


class ByCapsule:
    def __init__(self, c):
        self.c = c

    def __dlpack__(self, **options):
        return self.c.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.c.__dlpack_device__()


LENT = {"interface": ByInterface, "dlpack": ByCapsule}


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": "float64"}, {"device": "cpu"}], ids=str)
@pytest.mark.parametrize("protocol", LENT)
@pytest.mark.parametrize("mode", MODES)
def test_foreign_memory_becomes_a_tensor_outside_of_the_modes_that_answer_for_torch(
    torch, cupy, mode, protocol, options
):
    """Inside of them a tensor is made that has no memory, or its copy is refused with words of torch's own."""
    c = cupy.arange(1, 7, dtype=cupy.float32)
    t = MODES[mode](lambda: tb.to_torch(LENT[protocol](c), **options))
    assert type(t) is torch.Tensor
    assert t.tolist() == [1, 2, 3, 4, 5, 6]
    assert (t.device.type == "cuda" and t.data_ptr() == c.data.ptr) == (not options)


def test_inside_a_transform_the_device_of_an_array_interface_is_told_without_cupy_too(gpu):
    code = """
import sys, torch, tensorbridge as tb
made, t = [], torch.arange(1.0, 4.0, device="cuda")
class Shown:
    __cuda_array_interface__ = t.__cuda_array_interface__
def function(x):
    made.append(tb.to_torch(Shown()))
    return x.sum()
torch.func.grad(function)(torch.ones(3))
print(made[0].data_ptr() == t.data_ptr(), "cupy" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert run.stdout.split() == ["True", "False"], run.stderr


@pytest.mark.parametrize("call", ["tb.to_numpy_async(Lent()).result()", "next(tb.prefetch([Lent()], device='cpu'))"])
def test_a_producer_that_asks_the_driver_is_read_by_a_thread_that_has_not_called_cuda_yet(gpu, call):
    """Without a context the driver knows no address, and `__dlpack_device__` of a CuPy array asks it about one."""
    code = f"""
import cupy, torch, tensorbridge as tb
c = cupy.arange(3.0)
class Lent:
    def __dlpack__(self, **options): return c.__dlpack__(**options)
    def __dlpack_device__(self): return c.__dlpack_device__()
print({call}.tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert run.stdout == "[0.0, 1.0, 2.0]\n", run.stderr
