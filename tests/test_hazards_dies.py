"""Nothing dies: a negative stride, memory that may not be touched, memory that is freed under a view.

What kills a process where the guard is missing runs in a process of its own, many at once: the last line printed names
the one that died. What can be seen by addresses alone is looked at here; nothing reads memory that was freed.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import address, in_a_process

import tensorbridge as tb
from tensorbridge._dtypes import DTYPES

PATHS = [str(Path(found).parent) for found in (__file__, Path(tb.__file__).parent)]
PRELUDE = f"""
import sys; sys.path[:0] = {PATHS}
import array, gc, mmap, ml_dtypes, tempfile
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
import tensorbridge as tb
from _producers import Bare, Of2021, Producer, laid_out
def Has(**attributes): return type("Has", (), attributes)()
"""


def assert_survives(steps: dict[str, str]) -> None:
    """Run each step, which asserts for itself, in one process; say which of them it died in."""
    code = PRELUDE + "".join(f"print({name!r}, flush=True)\n{step}\n" for name, step in steps.items())
    done = in_a_process(code + 'print("the end")')
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["the end"], f"died in {lines[-1:]}, {done.returncode}: {done.stderr[-600:]}"
    assert done.returncode == 0


def test_negative_strides_never_reach_torch():
    """torch 2.13 aborts in `from_dlpack`, from any producer: pytorch#188023, scikit-learn#34307."""
    six = "a = np.arange(6.0)"
    sources = {
        "an array": f"{six}[::-1]",
        "both axes": f"{six}.reshape(2, 3)[::-1, ::-1]",
        "one of two": f"{six}.reshape(2, 3)[:, ::-1]",
        "read-only": f"{six}[::-1]; a.flags.writeable = False",
        "in steps": f"{six}[::-2]",
        "overlapping": "a = np.lib.stride_tricks.sliding_window_view(np.arange(6.0), 3)[::-1]",
        "bfloat16": f"{six}.astype(ml_dtypes.bfloat16)[::-1]",
        "float8": f"{six}.astype(ml_dtypes.float8_e5m2)[::-1]",
        "big-endian": f"{six}.astype('>f8')[::-1]",
        "a view of a tensor": "a = torch.arange(6.0).numpy()[::-1]",
        "a subclass": f"{six}.view(np.matrix)[:, ::-1]",
        "a list": f"{six}[::-1]; a = [a, a]",
        "a memoryview": "a = memoryview(bytearray(6))[::-1]",
        "an array interface": f"{six}[::-1]; a = Has(of=a, __array_interface__=a.__array_interface__)",
        "an array method": f"{six}[::-1]; a = Has(__array__=lambda self, dtype=None, copy=None, a=a: a)",
        "DLPack": "a = Producer(laid_out((2, 3), (-3, -1)))",
        "DLPack without flags": "a = Of2021(laid_out((6,), (-1,)))",
        "DLPack without keywords": "a = Bare(laid_out((2, 3), (3, -1)))",
        "an array behind DLPack": f"{six}[::-1]; a = Has(of=a, __dlpack__=lambda self, **k: self.of.__dlpack__(**k),"
        " __dlpack_device__=lambda self: (1, 0))",
    }
    ways = {
        "plain": "tb.to_torch(a)",
        "shared if it can be": "tb.to_torch(a, share_readonly=True)",
        "copied": "tb.to_torch(a, copy=True)",
        "cast": 'tb.to_torch(a, dtype="float32")',
        "into out": "tb.to_torch(a, out=torch.zeros(tb.describe(a).shape))",
    }
    check = "want = np.asarray(tb.to_numpy(a)).astype('float64'); assert ({way}.double().numpy() == want).all()"
    assert_survives(
        {f"{s}, {w}": f"{source}\n{check.format(way=way)}" for s, source in sources.items() for w, way in ways.items()}
    )


@pytest.mark.parametrize("name", ["complex128", "complex64"])
def test_a_misaligned_element_that_is_read_many_times_is_left_to_numpy_or_copied_by_its_parts(name):
    """torch 2.13 faults on it in `clone`, `copy_` and `stack`: NumPy aligns complex numbers by their parts, torch as a
    whole.
    """
    itemsize = np.dtype(name).itemsize
    make = f"""
store = np.zeros({itemsize} * 80, "u1")
start = -store.ctypes.data % {itemsize} + {itemsize} // 2
a = store[start : start + {itemsize} * 64].view({name!r})
a[:] = np.arange(64) - 2j
x = torch.from_numpy(a)[:, None].expand(64, 8)
assert x.data_ptr() % {itemsize}
wanted = np.repeat(a, 8).reshape(64, 8)
g = x.detach().requires_grad_()
filled = torch.empty(64, 8, dtype=torch.{name})
"""
    ways = {
        "copied to torch": "tb.to_torch(x, copy=True)",
        "copied to numpy": "tb.to_numpy(x, copy=True)",
        "writable": "tb.to_numpy(x, writable=True)",
        "into a tensor": "tb.to_torch(x, out=filled)",
        "into an array": f"tb.to_numpy(x, out=np.empty((64, 8), {name!r}))",
        "into a tensor of another width": f"tb.to_torch(x, out=torch.empty(64, 8, dtype=torch.{OTHER_WIDTH[name]}))",
        "cast": f"tb.to_torch(x, dtype={OTHER_WIDTH[name]!r})",
        "in a tree": "tb.tree.to_torch([x], copy=True)[0]",
        "shared": "tb.to_numpy(x)",
        "in a list": "tb.to_torch([x, x])[1]",
        "in a list to numpy": "tb.to_numpy([x, x])[1]",
        "in a list of two dtypes": "tb.to_torch([torch.zeros(64, 8), x], dtype='complex128')[1]",
        "in a list in a graph": "tb.to_torch([x, g])[1].detach()",
        "collated": "tb.collate([x, x])[1]",
        "collated in a graph": "tb.collate([{'a': g}, {'a': g}])['a'][1].detach()",
        "in a graph": "tb.to_torch(g, copy=True).detach()",
        "in a graph into a tensor": "tb.to_torch(g, out=filled).detach()",
    }
    ways = {way: f"assert np.array_equal(np.asarray({call}), wanted)" for way, call in ways.items()}
    ways["backward"] = """
hooked = x.detach().requires_grad_()
made = [tb.to_torch(hooked, copy=True), tb.collate([hooked, x])[0], tb.to_torch(hooked, out=filled.detach().clone())]
for one in made:
    (grad,) = torch.autograd.grad(one.real.sum() + 2 * one.imag.sum(), hooked)
    assert torch.equal(grad, torch.full_like(grad, 1 + 2j))
"""
    assert_survives({way: make + code for way, code in ways.items()})


@pytest.mark.parametrize("index", ["3", "3:4", "3:4, None"])
def test_one_misaligned_complex_number_is_copied(index):
    """To torch 2.13 its axes have stride 0, as broadcast ones have, and it faults there in the same way."""
    make = f"""
store = np.zeros(16 * 9, "u1")
start = -store.ctypes.data % 16 + 8
a = store[start : start + 16 * 8].view("complex128")
a[:] = np.arange(8) - 2j
x, wanted = torch.from_numpy(a)[{index}], a[{index}].copy()
assert x.data_ptr() % 16 == 8
g = x.detach().requires_grad_()
"""
    ways = {
        "copied": "tb.to_torch(x, copy=True)",
        "copied to numpy": "tb.to_numpy(x, copy=True)",
        "cast": "tb.to_torch(x, dtype='complex64')",
        "into a tensor": "tb.to_torch(x, out=torch.empty(x.shape, dtype=x.dtype))",
        "into a tensor of another width": "tb.to_torch(x, out=torch.empty(x.shape, dtype=torch.complex64))",
        "into an array": "tb.to_numpy(x, out=np.empty(x.shape, complex))",
        "in a tree": "tb.tree.to_torch([x], copy=True)[0]",
        "in a tree again": "[tb.tree.to_torch([x], copy=True) for _ in range(3)][2][0]",
        "in a list": "tb.to_torch([x, x])[1]",
        "in a list of two dtypes": "tb.to_torch([torch.zeros(x.shape), x], dtype='complex128')[1]",
        "collated": "tb.collate([x, x])[1]",
        "in a graph": "tb.to_torch(g, copy=True).detach()",
        "in a graph into a tensor": "tb.to_torch(g, out=torch.empty(x.shape, dtype=x.dtype)).detach()",
        "in a list in a graph": "tb.to_torch([x, g])[1].detach()",
    }
    assert_survives({way: f"{make}assert np.array_equal({call}, wanted)" for way, call in ways.items()})


OTHER_WIDTH = {"complex128": "complex64", "complex64": "complex128"}


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_a_misaligned_real_number_that_is_read_many_times_stays_in_its_graph(name):
    """torch reads it wherever it lies; it has no parts."""
    t = torch.frombuffer(bytearray(65), dtype=getattr(torch, name), offset=1, count=4)
    x = t[:1].expand(9).requires_grad_()
    assert x.data_ptr() % x.element_size()
    for made in (tb.to_torch(x, copy=True), tb.to_torch(x, out=torch.ones(9, dtype=x.dtype)), tb.to_torch([x, x])[1]):
        (grad,) = torch.autograd.grad(made.sum(), x)
        assert torch.equal(made, torch.zeros(9, dtype=x.dtype))
        assert torch.equal(grad, torch.ones(9, dtype=x.dtype))


def test_what_is_packed_for_a_device_does_not_fault():
    """The step before the bus is done here without a device."""
    step = """
from tensorbridge._adapters import performer
store = np.zeros(16 * 80, "u1")
start = -store.ctypes.data % 16 + 8
x = torch.from_numpy(store[start : start + 16 * 64].view("complex128"))[:, None].expand(64, 8)
share, pack, _ = tb.plan(x, "torch", device="cuda:0").steps
packed = performer(pack, share.after, None)(x)
assert packed.is_contiguous() and torch.equal(packed, torch.zeros(64, 8, dtype=torch.complex128))
"""
    assert_survives({"packed": step})


def test_torchs_threads_do_not_share_a_copy_that_faults():
    make = """
from tensorbridge import _convert
_convert.has_threads = lambda: True  # as on a machine with idle cores
store = np.zeros(16 * 80, "u1")
start = -store.ctypes.data % 16 + 8
a = store[start : start + 16 * 64].view("complex128")
a[:] = np.arange(64) - 2j
x = torch.from_numpy(a)[:, None].expand(64, 1 << 14)
"""
    ways = {
        "copied to torch": "tb.to_torch(x, copy=True)",
        "copied to numpy": "tb.to_numpy(x, copy=True)",
        "into a tensor": "tb.to_torch(x, out=torch.empty(64, 1 << 14, dtype=torch.complex128))",
        "into an array": "tb.to_numpy(x, out=np.empty((64, 1 << 14), 'complex128'))",
        "in a tree": "tb.tree.to_torch([x], copy=True)[0]",
    }
    assert_survives({way: f"{make}assert np.array_equal(np.asarray({call})[:, 5], a)" for way, call in ways.items()})


def test_read_only_pages_are_not_written_and_lent_pages_are_not_unmapped():
    """A write to a page mapped for reading, or a read of one that is gone, is SIGSEGV: pytorch#46741, numpy#18294."""
    folder = "folder = Path(tempfile.mkdtemp()); np.arange(4.0).tofile(folder / 'a')"
    mapping = "file = open(folder / 'a', 'rb'); m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)"
    refuses = "try: {act}\nexcept (BufferError, ValueError): pass\nelse: raise AssertionError('freed under the view')"
    write = "t.fill_(7); assert (t == 7).all()"
    assert_survives(
        {
            "files": folder,
            "memmap": f"m = np.memmap(folder / 'a', mode='r'); t = tb.to_torch(m); {write}",
            "view of a memmap": f"t = tb.to_torch(np.asarray(m)[1:]); {write}",
            "memmap in a list": f"t = tb.to_torch([m, m]); {write}",
            "memmap that is dropped": "t = tb.to_torch(np.memmap(folder / 'a', mode='c')); gc.collect(); t.fill_(7)",
            "mmap": f"{mapping}\nt = tb.to_torch(m); {write}",
            "mmap closed": "v = tb.to_numpy(m)\n" + refuses.format(act="m.close()") + "\nassert v.sum() >= 0",
            "mmap dropped": "v = tb.to_numpy(mmap.mmap(-1, 4096)); gc.collect(); v[:] = 1; assert v.sum() == 4096",
            "mmap to torch, dropped": "t = tb.to_torch(mmap.mmap(-1, 4096)); gc.collect(); t.fill_(1)",
            "the file's data": "assert (np.fromfile(folder / 'a') == np.arange(4.0)).all()",
            "bytes": f"b = b'abcd' * 9; t = tb.to_torch(b); {write}; assert b == b'abcd' * 9",
            "bytes through NumPy": f"t = tb.to_torch(np.frombuffer(b, 'uint8')); {write}; assert b == b'abcd' * 9",
            "bytearray grown": "b = bytearray(64); t = tb.to_torch(b)\n"
            + refuses.format(act="b.extend(bytes(1 << 20))")
            + "\nt.fill_(1); assert b == bytes([1]) * 64",
            "array grown": "b = array.array('d', [0] * 64); v = tb.to_numpy(b)\n"
            + refuses.format(act="b.extend([0] * 4096)")
            + "\nv[:] = 1; assert b[63] == 1",
            "array resized": "b = np.zeros(64); t = tb.to_torch(b)\n"
            + refuses.format(act="b.resize(1 << 20)")
            + "\nt.fill_(1); assert b[63] == 1",
            "shared memory collected": "s = SharedMemory(create=True, size=64); s.unlink(); t = tb.to_torch(s.buf)\n"
            + refuses.format(act="s.close()")
            + "\nt.fill_(1); assert t.sum() == 64; del t; gc.collect(); s.close()",
            "memoryview released": "b = bytearray(64); v = memoryview(b); t = tb.to_torch(v); v.release(); t.fill_(1)",
        }
    )


# -- Axes of length 1, whose stride means nothing: `torch.from_numpy` refuses, and `np.ascontiguousarray` leaves it so.


def laid(a, stride):
    return np.ndarray((1, 2), a.dtype, a.reshape(-1).view("uint8"), 0, (stride, a.itemsize))


ANY_STRIDE = {
    "negative": lambda a: a[:1, ::-1][:, :2].reshape(1, 2)[::-1],
    "negative, both": lambda a: a[::-1, ::-1][:1, :1],
    "odd": lambda a: laid(a, 3),
    "odd and negative": lambda a: laid(a, -5),
    "huge": lambda a: laid(a, 2**40),
    "last": lambda a: a[:, :1][:, ::-1],
    "in the middle": lambda a: a[:, None, :][:, ::-1],
    "empty": lambda a: a[:0, ::-1],
    "empty in the middle": lambda a: a[::-1, 1:1],
}
EVERY = [name for name, row in DTYPES.items() if row.numpy is not None and row.torch and name != "complex32"]


def matrix(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.array([[1, 1, 2], [2, 1, 1]]).astype("float32").astype(dtype)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("stride", ANY_STRIDE)
def test_a_stride_that_means_nothing_does_not_stand_in_the_way(stride, dtype):
    a = ANY_STRIDE[stride](matrix(dtype))
    takes_more = stride == "negative"  # its other axis is reversed in earnest
    t = tb.to_torch(a, copy=None if takes_more else False)
    assert t.to(torch.complex64).tolist() == a.astype("complex64").tolist()
    assert takes_more or not a.size or address(t) == address(a)
    assert tb.to_torch(a, copy=True).shape == tb.to_torch(a).shape == a.shape


@pytest.mark.parametrize("dtype", EVERY)
def test_a_read_only_array_of_length_1_axes_is_shared_on_request(dtype):
    a = matrix(dtype)[::-1][:1]
    a.flags.writeable = False
    assert address(tb.to_torch(a, share_readonly=True, copy=False)) == address(a)
    copied = tb.to_torch(a)
    assert address(copied) != address(a)
    assert not a.flags.writeable


# -- A storage is freed or moved under a NumPy view.

TENSORS = {
    "plain": lambda t: t,
    "a view": lambda t: t[2:7],
    "strided": lambda t: t[::2],
    "0-d": lambda t: t[3],
    "bfloat16": lambda t: t.view(torch.bfloat16),
    "float8": lambda t: t.view(torch.float8_e4m3fn),
    "complex": lambda t: t.view(torch.complex64),
    "requires grad": lambda t: t.detach().requires_grad_(),
    "bfloat16, requires grad": lambda t: t.view(torch.bfloat16).detach().requires_grad_(),
    "a parameter": torch.nn.Parameter,
    "one element wide": lambda t: t[:1],
}
EXPORTS = {
    "as it is": {},
    "read-only": {"writable": False},
    "writable": {"writable": True},
    "shared or nothing": {"copy": False},
}


def assign_data(t):
    t.data = torch.zeros(64)


ACTS = {  # what is done, and whether it must be refused to leave the memory where it is
    "resize_": (lambda t: t.resize_(4096), True),
    "storage to nothing, as FSDP does": (lambda t: t.untyped_storage().resize_(0), True),
    "storage to more": (lambda t: t.untyped_storage().resize_(1 << 16), True),
    "set_": (lambda t: t.set_(torch.zeros(64)), False),
    ".data =": (assign_data, False),
    "unsqueeze_": (lambda t: t.unsqueeze_(0), False),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("kind", TENSORS)
def test_no_act_on_the_tensor_frees_the_memory_under_its_numpy_view(kind, export, act):
    """`np.from_dlpack(t)` dangles after all but the last."""
    does, has_to_be_refused = ACTS[act]
    whole = torch.arange(64.0)
    storage, start = weakref.ref(whole.untyped_storage()), whole.data_ptr()
    t = TENSORS[kind](whole)
    a = tb.to_numpy(t, **EXPORTS[export])
    assert start <= address(a) < start + 256
    if has_to_be_refused:
        with pytest.raises(RuntimeError, match="not resizable"):
            does(whole)
    else:
        does(whole)
    del t, whole
    assert storage() is not None
    assert storage().data_ptr() == start


@pytest.mark.parametrize("export", EXPORTS)
def test_a_module_that_moves_to_another_dtype_leaves_the_view_of_its_weight_alone(export):
    module = torch.nn.Linear(4, 4)
    before = module.weight.detach().clone()
    a = tb.to_numpy(module.weight, **EXPORTS[export])
    module.to(torch.float64)
    gc.collect()
    assert (a == before.numpy()).all()


def test_an_out_that_has_to_grow_is_refused_while_a_view_lies_over_it():
    t = torch.zeros(4)
    a = tb.to_numpy(t)
    with pytest.warns(UserWarning, match="resized"), pytest.raises(RuntimeError, match="not resizable"):
        torch.add(torch.ones(64), 1, out=t)
    assert a.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", TENSORS)
def test_the_view_outlives_the_tensor(kind):
    t = TENSORS[kind](torch.ones(64))
    storage = weakref.ref(t.untyped_storage())
    values = t.detach().clone()
    a = tb.to_numpy(t)
    del t
    assert storage() is not None
    again = tb.to_torch(a, copy=True)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)) if a.ndim else again == values
    del a
    assert storage() is None


def test_share_memory_moves_the_storage_which_can_be_seen_and_avoided():
    """pytorch#51849, open since 2021: nothing can prevent it. DataLoader workers and queues do it too."""
    t = torch.arange(4.0)
    moved, kept = tb.to_numpy(t), tb.to_numpy(t, copy=True)
    assert tb.shares_memory(t, moved)
    t.share_memory_()
    assert not tb.shares_memory(t, moved)
    assert kept.tolist() == [0, 1, 2, 3]
    assert tb.shares_memory(t, tb.to_numpy(t))


def test_a_tensor_over_an_array_keeps_it_and_cannot_be_resized():
    a = np.arange(4.0)
    alive = weakref.ref(a)
    t = tb.to_torch(a)
    with pytest.raises(RuntimeError, match="not resizable"):
        t.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="referenc"):
        a.resize(64)
    del a
    gc.collect()
    assert alive() is not None
    assert t.tolist() == [0, 1, 2, 3]
    del t
    gc.collect()
    assert alive() is None


# -- Lists that never end


def test_a_list_that_contains_itself_is_refused():
    once, twice, deeper = [], [], []
    once.append(once)
    twice.extend([twice, twice])
    deeper.append([[deeper]])
    for endless in (once, twice, deeper):
        with pytest.raises(tb.UnsupportedArrayError, match=r"^to_torch: a list that contains itself"):
            tb.to_torch(endless)


@pytest.mark.parametrize("depth", [64, 65, 5000])
def test_lists_deeper_than_an_array_can_be_are_refused(depth):
    nested: list = [1.5]
    for _ in range(depth - 1):
        nested = [nested]
    if depth <= 64:
        assert tb.to_torch(nested).shape == (1,) * depth
    else:
        assert depth > sys.getrecursionlimit() or depth < 1000
        with pytest.raises(tb.UnsupportedArrayError, match="65 axes or more"):
            tb.to_torch(nested)


def test_a_list_of_arrays_has_one_axis_more_than_they():
    with pytest.raises(tb.UnsupportedArrayError, match="65 axes or more"):
        tb.to_numpy([np.ones((1,) * 64)])
    assert tb.to_torch([torch.ones((1,) * 64)]).dim() == 65


# -- Subclasses of arrays. NumPy 2.4: `np.stack` of two matrices writes beyond its memory, and glibc ends the process.

MATRICES = {
    "two matrices": "assert tb.to_torch([np.matrix([[1.0]])] * 2).shape == (2, 1, 1)",
    "a row and a row": "assert tb.to_numpy([np.matrix([[1.0, 2.0]])] * 2).tolist() == [[[1, 2]], [[1, 2]]]",
    "in lists": "assert tb.to_torch([[np.matrix([[1.0]])], [np.matrix([[2.0]])]]).flatten().tolist() == [1, 2]",
    "collated": "assert tb.collate([np.matrix([[1.0]])] * 2).shape == (2, 1, 1)",
    "with a cast": 'assert tb.to_torch([np.matrix([[1.0]])] * 2, dtype="float16").shape == (2, 1, 1)',
    "and all of it freed": "gc.collect()",
}


def test_matrices_in_a_list_are_stacked_as_plain_arrays():
    assert_survives({"imports": "import numpy as np", **MATRICES})
