"""What NumPy and torch do when memory crosses between them: one test per behaviour that the design leans on.

tensorbridge is not imported here. A test that fails says that upstream changed, and that the code which leans on the
behaviour must be looked at. True of torch 2.11 to 2.14 and NumPy 2.4 and 2.5; where they differ, a table says so.
DLPack is in test_facts_dlpack.py, lifetimes in test_facts_memory.py, graphs in test_facts_graph.py, the GPU in
test_facts_gpu.py.
"""

import array
import signal
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import (
    NUMPY,
    TORCH,
    address,
    capsule_name,
    in_a_process,
    read_capsule,
)

# 2.4: RuntimeError; a BufferError from 2.5 on, which has a registry for foreign dtypes (numpy#31256).
NUMPY_REFUSES_A_DTYPE_WITH = RuntimeError if NUMPY < (2, 5) else BufferError


# It dies: in a process of its own.


@pytest.mark.parametrize("capsule", ["a[::-1]", "a[::-1].__dlpack__()", "a.reshape(3, 2)[:, ::-1]"])
def test_torch_from_dlpack_aborts_on_a_negative_stride(capsule):
    """pytorch#188023, scikit-learn#34307; a RuntimeError from 2.14 on (PR #188047). No try can catch the abort."""
    run = in_a_process(f"a = np.arange(6.0)\ntry: torch.from_dlpack({capsule})\nexcept RuntimeError: exit(7)")
    assert run.returncode == (-signal.SIGABRT if TORCH < (2, 14) else 7), run.stderr
    assert TORCH >= (2, 14) or "Storage size calculation overflowed" in run.stderr


def test_torch_from_dlpack_takes_a_negative_stride_that_moves_nowhere_or_is_copied_by_numpy():
    run = in_a_process("""
a = np.arange(6.0).reshape(2, 3)
print(torch.from_dlpack(a[:1, :1][::-1, ::-1]).shape, torch.from_dlpack(a[:0, ::-1]).shape)
print(torch.from_dlpack(a[0, ::-1], copy=True).tolist())""")
    assert run.stdout == "torch.Size([1, 1]) torch.Size([0, 3])\n[2.0, 1.0, 0.0]\n", run.stderr


def test_writing_through_a_tensor_over_a_read_only_memmap_kills_the_process(tmp_path):
    """pytorch#46741"""
    np.zeros(8).tofile(tmp_path / "file")
    run = in_a_process(f"torch.from_numpy(np.memmap({str(tmp_path / 'file')!r}, mode='r')).zero_()")
    assert run.returncode == -signal.SIGSEGV, run.stderr


def test_from_numpy_warns_of_read_only_memory_once_per_process_and_from_dlpack_never():
    run = in_a_process("""
import warnings
a = np.arange(3.0)
a.setflags(write=False)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for share in torch.from_dlpack, torch.from_numpy, torch.from_numpy, torch.as_tensor, torch.asarray:
        assert share(a).data_ptr() == a.ctypes.data
        print(share.__name__, len(seen))""")
    assert run.stdout == "from_dlpack 0\nfrom_numpy 1\nfrom_numpy 1\nas_tensor 1\nasarray 1\n", run.stderr


# It lies.

GUESSES = torch.asarray(memoryview(np.zeros(4, np.int8))).dtype == torch.float32  # a torch without pytorch#188784


@pytest.mark.parametrize("wrap", [lambda a: array.array("i", a.tolist()), memoryview, lambda a: bytearray(a.tobytes())])
def test_torch_asarray_reads_the_bytes_of_a_buffer_as_float32(wrap):
    """pytorch: `asarray` of anything with the buffer protocol that is not an ndarray; JAX and TensorFlow arrays too.

    A torch with pytorch#188784 (2.15 has it, 2.13 has not) reads what the buffer says it holds.
    """
    ints = np.array([1, 2, 3, 4], np.int32)
    told = memoryview(wrap(ints)).format
    expected = np.frombuffer(wrap(ints), np.float32 if GUESSES else told)
    assert torch.equal(torch.asarray(wrap(ints)), torch.from_numpy(expected.copy()))


def test_torch_asarray_flattens_a_buffer():
    assert torch.asarray(memoryview(np.ones((2, 2), np.float16))).shape == ((2,) if GUESSES else (4,))


def test_torch_as_tensor_reads_a_buffer_by_element_and_refuses_two_axes():
    ints = array.array("i", [1, 2])
    assert torch.as_tensor(ints).tolist() == torch.as_tensor(memoryview(ints)).tolist() == [1, 2]
    assert address(torch.as_tensor(ints)) != ints.buffer_info()[0]
    with pytest.raises(ValueError, match="could not determine the shape"):
        torch.as_tensor(memoryview(np.ones((2, 2))))


@pytest.mark.parametrize("read", [np.from_dlpack, torch.from_dlpack])
def test_dlpack_drops_the_negative_bit(read):
    """`Tensor.__dlpack__` asks for conj, not for neg (pytorch PR #145000, review)."""
    imag = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    assert imag.is_neg()
    assert imag.tolist() == [-2.0, -4.0]
    assert read(imag).tolist() == [2.0, 4.0]
    assert read(imag.resolve_neg()).tolist() == [-2.0, -4.0]


def test_numpy_refuses_lazy_bits_and_dlpack_only_the_conjugate():
    z = torch.tensor([1 + 2j])
    for lazy in z.conj(), z.conj().imag:
        with pytest.raises(RuntimeError, match="bit set"):
            lazy.numpy()
    with pytest.raises(BufferError, match="conjugate bit"):
        z.conj().__dlpack__()


def test_the_old_to_dlpack_checks_nothing():
    """thinc, kornia, jax2torch and DGL call it."""
    to_dlpack = torch.utils.dlpack.to_dlpack
    assert torch.from_dlpack(to_dlpack(torch.tensor([1 + 2j]).conj())).tolist() == [1 + 2j]
    assert capsule_name(to_dlpack(torch.ones(1, requires_grad=True))) == "dltensor"


def test_resolving_bits_that_are_not_set_returns_the_tensor_itself():
    t = torch.ones(2, dtype=torch.complex64)
    assert t.resolve_conj() is t
    assert t.resolve_neg() is t


def test_a_zero_tensor_has_no_data_and_dlpack_exports_it_all_the_same():
    zero = torch._efficientzerotensor(3)
    assert zero._is_zerotensor()
    assert zero.data_ptr() == 0
    assert zero.detach()._is_zerotensor()
    assert zero.contiguous()._is_zerotensor()
    assert not zero.clone()._is_zerotensor()
    with pytest.raises(RuntimeError, match="ZeroTensor"):
        zero.numpy()
    assert read_capsule(zero.__dlpack__()).data is None
    assert zero.numpy(force=True).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("share", [torch.from_numpy, torch.from_dlpack, torch.as_tensor])
def test_the_mask_of_a_masked_array_is_lost(share):
    assert share(np.ma.masked_array([1.0, 2.0], mask=[False, True])).tolist() == [1.0, 2.0]


def test_array_with_a_copy_keyword_does_not_reach_torch():
    """`Tensor.__array__` takes no `copy`: NumPy warns, copies for True, and refuses for False what it would share."""
    t = torch.ones(2)
    assert address(np.asarray(t)) == address(np.asarray(t, copy=None)) == address(t)
    with pytest.warns(DeprecationWarning, match="copy keyword"):
        assert address(np.asarray(t, copy=True)) != address(t)
    with pytest.warns(DeprecationWarning, match="copy keyword"), pytest.raises(ValueError, match="avoid copy"):
        np.asarray(t, copy=False)


def test_numpy_says_true_to_array_and_believes_it_and_says_nothing_where_a_copy_is_allowed():
    """An export with copy=True is fresh by the object's word; `np.asanyarray` leaves the keyword out."""

    class Listens:
        def __init__(self):
            self.heard, self.memory = [], np.zeros(3)

        def __array__(self, dtype=None, **words):
            self.heard.append(words)
            return self.memory

    x = Listens()
    assert address(np.array(x, copy=True, subok=True)) == address(np.asanyarray(x)) == address(x.memory)
    assert x.heard == [{"copy": True}, {}]


# It is refused, or taken.

RECORD = np.dtype([("byte", "u1"), ("real", "<f4")])  # the stride of "real" is 5 bytes

REFUSED_BY_FROM_NUMPY = {
    "negative stride": (lambda: np.arange(3.0)[::-1], ValueError, "negative"),
    "negative stride of a size-1 axis": (lambda: np.arange(3.0)[:1][::-1], ValueError, "negative"),
    "negative stride of an empty array": (lambda: np.ones((2, 3))[:0, ::-1], ValueError, "negative"),
    "odd stride": (lambda: np.zeros(3, RECORD)["real"], ValueError, "not a multiple"),
    "odd stride of a size-1 axis": (lambda: np.zeros(1, RECORD)["real"], ValueError, "not a multiple"),
    "odd stride of an empty array": (lambda: np.zeros(3, RECORD)["real"][:0], ValueError, "not a multiple"),
    "big-endian": (lambda: np.arange(3, dtype=">f4"), ValueError, "byte order"),
    "big-endian and empty": (lambda: np.zeros(0, ">f4"), ValueError, "byte order"),
    "bfloat16": (lambda: np.zeros(2, ml_dtypes.bfloat16), TypeError, "bfloat16"),
    "float8": (lambda: np.zeros(2, ml_dtypes.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    "longdouble": (lambda: np.zeros(2, np.longdouble), TypeError, "longdouble"),
    "unsigned long long": (lambda: np.zeros(2, np.ulonglong), TypeError, "ulonglong"),
    "string": (lambda: np.array(["a"]), TypeError, "str_"),
    "object": (lambda: np.array([None]), TypeError, "object_"),
    "structured": (lambda: np.zeros(1, RECORD), TypeError, "void"),
    "datetime": (lambda: np.zeros(1, "M8[s]"), TypeError, "datetime64"),
    "scalar": (lambda: np.float32(1), TypeError, "expected np.ndarray"),
}

TAKEN_BY_FROM_NUMPY = {
    "unaligned": lambda: np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32),
    "one byte, big-endian": lambda: np.arange(3, dtype=">u1"),
    "zero strides": lambda: np.lib.stride_tricks.as_strided(np.arange(3.0), (2, 3), (0, 8)),
    "gaps": lambda: np.ones((4, 6))[::2, ::3],
    "long long": lambda: np.zeros(2, np.longlong),
    "uint16": lambda: np.zeros(2, np.uint16),
    "0-d": lambda: np.array(1.0),
}


@pytest.mark.parametrize("name", REFUSED_BY_FROM_NUMPY)
def test_from_numpy_refuses(name):
    make, error, words = REFUSED_BY_FROM_NUMPY[name]
    with pytest.raises(error, match=words):
        torch.from_numpy(make())


@pytest.mark.parametrize("name", TAKEN_BY_FROM_NUMPY)
def test_from_numpy_shares(name):
    a = TAKEN_BY_FROM_NUMPY[name]()
    t = torch.from_numpy(a)
    assert address(t) == address(a)
    assert t.shape == a.shape
    assert tuple(s * t.itemsize for s in t.stride()) == a.strides


def test_ulonglong_is_refused_though_it_equals_uint64():
    """torch looks at the type number, so a table keyed by dtype does not see it; a view does away with it."""
    a = np.zeros(2, np.ulonglong)
    assert a.dtype == np.dtype(np.uint64)
    assert hash(a.dtype) == hash(np.dtype(np.uint64))
    assert address(torch.from_numpy(a.view(np.uint64))) == address(a)
    assert torch.from_dlpack(a).dtype == torch.uint64


def test_ascontiguousarray_leaves_the_stride_of_a_size_1_axis():
    reversed_one = np.arange(3.0)[:1][::-1]
    assert np.ascontiguousarray(reversed_one) is reversed_one
    assert reversed_one.strides == (-8,)


# dtypes that NumPy does not have: bfloat16 and the float8 family (pytorch#90574, #101781, #109873).

ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
LAYOUTS = {
    "contiguous": lambda t: t,
    "strided": lambda t: t[::2],
    "F": lambda t: t.reshape(2, 2).t(),
    "0-d": lambda t: t[1],
    "expanded": lambda t: t[:1].expand(3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ML_DTYPES)
def test_ml_dtypes_cross_both_ways_as_views_of_integers(name, layout):
    theirs, ours = getattr(torch, name), np.dtype(getattr(ml_dtypes, name))
    integers = {1: "uint8", 2: "uint16"}[ours.itemsize]
    t = LAYOUTS[layout](torch.tensor([1.0, 2.0, 0.5, 4.0]).to(theirs))
    a = t.view(getattr(torch, integers)).numpy().view(ours)
    assert address(a) == address(t)
    assert a.astype(np.float32).tolist() == t.float().tolist()
    back = torch.from_numpy(a.view(integers)).view(theirs)
    assert address(back) == address(t)
    assert back.stride() == t.stride()
    assert back.float().tolist() == t.float().tolist()


@pytest.mark.parametrize("name", ML_DTYPES)
def test_no_protocol_of_numpy_carries_ml_dtypes(name):
    a = np.zeros(2, getattr(ml_dtypes, name))
    with pytest.raises(ValueError, match="cannot include dtype"):
        memoryview(a)
    assert a.__array_interface__["typestr"] == ("<f1" if name == "float8_e5m2" else f"<V{a.itemsize}")
    with pytest.raises(BufferError):
        a.__dlpack__(max_version=(1, 0))
    with pytest.raises(TypeError, match="unsupported ScalarType"):
        torch.zeros(2, dtype=getattr(torch, name)).numpy()
    with pytest.raises(NUMPY_REFUSES_A_DTYPE_WITH, match="Unsupported dtype"):
        np.from_dlpack(torch.zeros(2, dtype=getattr(torch, name)))


def test_complex32_crosses_as_pairs_of_halves():
    t = torch.view_as_complex(torch.ones(2, 2, dtype=torch.float16))
    with pytest.raises(TypeError, match="ComplexHalf"):
        t.numpy()
    assert address(torch.view_as_real(t).numpy()) == address(t)


# NumPy itself.

K_COPIES = {  # strides of the array, strides of its copy in memory order "K": both in elements
    "reversed": (lambda: np.arange(6.0)[::-1], (-1,), (1,)),
    "reversed twice": (lambda: np.ones((2, 3))[::-1, ::-1], (-3, -1), (3, 1)),
    "F and reversed": (lambda: np.ones((3, 2)).T[:, ::-1], (1, -2), (1, 2)),
    "channels last": (lambda: np.ones((2, 4, 4, 3)).transpose(0, 3, 1, 2), (48, 1, 12, 3), (48, 1, 12, 3)),
    "gaps": (lambda: np.ones((4, 6))[::2, ::2], (12, 2), (3, 1)),
    "broadcast": (lambda: np.broadcast_to(np.arange(3.0), (2, 3)), (0, 1), (1, 2)),  # the repeated axis is innermost
}


@pytest.mark.parametrize("name", K_COPIES)
def test_numpy_copies_in_memory_order_and_makes_reversed_axes_forward(name):
    make, before, after = K_COPIES[name]
    a = make()
    assert tuple(s // 8 for s in a.strides) == before
    for copy in a.copy("K"), np.array(a), np.copy(a), np.empty_like(a), a.astype(np.int64):
        assert tuple(s // 8 for s in copy.strides) == after


def test_torch_clones_in_memory_order_but_an_expanded_tensor_in_c_order():
    assert torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last).clone().stride() == (48, 1, 12, 3)
    assert torch.ones(4, 6)[::2, ::2].t().clone().stride() == (1, 3)
    assert torch.ones(3).expand(2, 3).clone().stride() == (3, 1)


def test_shares_memory_reads_addresses_and_no_element_and_gives_up_at_its_bound():
    """In a process of its own: nothing is mapped at these addresses."""
    run = in_a_process(
        imports="numpy as np",
        code="""
class Memory:
    def __init__(self, data, shape, strides):
        self.__array_interface__ = dict(data=(data, False), shape=shape, strides=strides, typestr="|u1", version=3)

def at(*memory):
    return np.asarray(Memory(*memory))

even, odd = at(4096, (5,), (2,)), at(4097, (5,), (2,))
print(np.shares_memory(even, odd), np.may_share_memory(even, odd), np.shares_memory(even, at(4098, (9,), (1,))))
hard = at(4096, (9, 9, 9), (303, 309, 321)), at(4100, (9, 9, 9), (505, 515, 535))
try:
    np.shares_memory(*hard, max_work=1)
except np.exceptions.TooHardError:
    print("too hard", np.shares_memory(*hard))""",
    )
    assert run.stdout == "False True True\ntoo hard True\n", run.stderr


def test_a_copy_on_write_memmap_is_writable_and_leaves_the_file(tmp_path):
    np.arange(4.0).tofile(tmp_path / "file")
    a = np.memmap(tmp_path / "file", mode="c", dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(a).zero_()
    assert a.tolist() == [0.0] * 4
    assert np.fromfile(tmp_path / "file").tolist() == [0.0, 1.0, 2.0, 3.0]
