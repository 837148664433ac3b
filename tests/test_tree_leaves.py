"""Trees: leaves are converted as they are alone, and the same memory stays one."""

from __future__ import annotations

import array
import collections
import itertools
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from arrays import ARRAYS, numbers
from torch.autograd import forward_ad

import tensorbridge as tb
from tensorbridge import tree
from tensorbridge._adapters import adapter_of
from tensorbridge._step import Want
from tensorbridge._trees import _leaf


@pytest.fixture
def a() -> Any:
    return np.arange(6.0).reshape(2, 3)


# -- Leaves are converted as they are alone


def outcome(convert: Any) -> Any:
    try:
        return convert()
    except (tb.BridgeError, ValueError) as error:
        return error


def sibling(x: Any) -> Any:
    """A plain array of the dtype of `x`: what is decided for it must not be taken for `x`."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufcV":
        return np.ones(6, dtype=x.dtype.newbyteorder("="))
    if isinstance(x, torch.Tensor) and x.dtype is not torch.float4_e2m1fn_x2:
        return torch.ones(6).to(x.dtype)
    return np.ones(6)


def described(x: Any) -> Any:
    return tb.describe(x)._replace(address=0) if not isinstance(x, Exception) else type(x)


OPTIONS: list[dict[str, Any]] = [{}, {"copy": True}, {"copy": False}, {"dtype": "float32"}]
LEAVES = [n for n in ARRAYS if not n.startswith("python-") and n not in ("foreign-bytes", "foreign-bytearray")]


@pytest.mark.filterwarnings("error", "ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", LEAVES)
def test_leaf_becomes_what_it_becomes_alone(name, to):
    x = ARRAYS[name]()
    convert, in_tree = {"torch": (tb.to_torch, tree.to_torch), "numpy": (tb.to_numpy, tree.to_numpy)}[to]
    for options in OPTIONS[:2] if "large" in name else OPTIONS:
        alone = outcome(lambda options=options: convert(x, **options))
        leaf = outcome(lambda options=options: in_tree({"x": x, "n": 1}, **options)["x"])
        if not isinstance(outcome(lambda options=options: convert(sibling(x), **options)), Exception):
            beside = outcome(lambda options=options: in_tree([sibling(x), sibling(x), x], **options)[2])
            assert described(beside) == described(leaf), options
            assert isinstance(leaf, Exception) or np.array_equal(numbers(beside), numbers(leaf), equal_nan=True)
        assert described(leaf) == described(alone), options
        if isinstance(alone, Exception):
            assert str(leaf) == f"batch['x']: {alone}"
        else:
            assert np.array_equal(numbers(leaf), numbers(alone), equal_nan=True), options
            assert tb.shares_memory(leaf, x) == tb.shares_memory(alone, x), options


ALL_OF_ONE_KIND: dict[str, Any] = {
    "read-only": ("torch", {}, lambda i: np.frombuffer(bytes([i] * 8)).copy()),
    "read-only in Fortran order": ("torch", {}, lambda i: np.full((2, 3), i, order="F")),
    "read-only, without elements": ("torch", {}, lambda i: np.zeros((0, i))),
    "tensors, copied": ("numpy", {"copy": True}, lambda i: torch.full((3,), float(i))),
    "transposed tensors, copied": ("numpy", {"copy": True}, lambda i: torch.full((2, 3), float(i)).T),
    "tensors that require grad, copied": (
        "numpy",
        {"copy": True},
        lambda i: torch.full((3,), i + 0.5, requires_grad=True),
    ),
    "conjugates, copied": ("numpy", {"copy": True}, lambda i: torch.full((3,), i + 1j).conj()),
    "bfloat16, copied": ("numpy", {"copy": True}, lambda i: torch.full((3,), i, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", ALL_OF_ONE_KIND)
def test_leaves_of_one_kind_become_what_each_becomes_alone(name, twice):
    """Lanes are for trees of one kind: what they give is what the function for one array gives."""
    to, options, make = ALL_OF_ONE_KIND[name]
    leaves = [make(i) for i in range(4)]
    for leaf in leaves:
        if name.startswith("read-only"):
            leaf.setflags(write=False)
    leaves += leaves[:2] if twice else []
    convert = {"torch": (tree.to_torch, tb.to_torch), "numpy": (tree.to_numpy, tb.to_numpy)}[to]
    made = convert[0](leaves, **options)
    for leaf, result in zip(leaves, made, strict=True):
        alone = convert[1](leaf, **options)
        found, wanted = tb.describe(result), tb.describe(alone)
        assert (found.dtype, found.strides, found.writable, found.order) == (
            wanted.dtype,
            wanted.strides,
            wanted.writable,
            wanted.order,
        )
        assert np.array_equal(numbers(result), numbers(leaf))
        assert not tb.shares_memory(result, leaf)
    if twice:
        assert made[4] is made[0]


def test_read_only_array_and_a_view_of_it_become_one_tensor():
    whole = np.zeros(3)
    whole.setflags(write=False)
    first, second = tree.to_torch([whole, whole[:]])
    assert first.data_ptr() == second.data_ptr()


def test_arrays_that_are_decided_alike_are_alike():
    tree.to_torch(np.zeros(1))  # tensors are known from the first conversion on
    kinds: dict[Any, dict[Any, str]] = collections.defaultdict(dict)
    for name in LEAVES:
        x = ARRAYS[name]()
        for one in (x, sibling(x)) if isinstance(x, (np.ndarray, torch.Tensor)) else ():
            key = _leaf.key_of(one)
            if key is not None:
                kinds[type(one), key][adapter_of(type(one)).open(one, Want("numpy"))[1]] = name
    assert {kind for kind, _ in kinds} == {np.ndarray, torch.Tensor}
    assert [found for found in kinds.values() if len(found) > 1] == []


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first tangent
def test_tensor_with_a_tangent_is_what_it_is_alone():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        for options in ({}, {"dtype": "float32"}):
            alone = tb.to_numpy(dual, **options)
            beside = tree.to_numpy([torch.ones(2), torch.ones(2), dual], **options)[2]
            assert described(beside) == described(alone)
            assert not beside.flags.writeable


def test_view_of_a_tensor_comes_back_as_its_alias_beside_plain_arrays_too():
    t = torch.zeros(6, dtype=torch.float64)
    for options in ({}, {"dtype": "float64"}):
        tree.to_torch([np.ones(6), np.ones(6), t.numpy()], **options)[2].add_(1)
    assert t._version == 2


def test_part_of_a_view_of_a_tensor_comes_back_as_an_alias_beside_plain_arrays_too():
    t = torch.zeros(6, dtype=torch.float64)
    for options in ({}, {"dtype": "float64"}):
        tree.to_torch([np.ones(5), np.ones(5), t.numpy()[1:]], **options)[2].add_(1)
    assert t._version == 2


def test_read_only_arrays_are_shared_on_ones_word_and_copied_without_it(a):
    a, other = a + 0, a + 1  # which own their memory
    for x in (a, other):
        x.setflags(write=False)
    for word in (True, False):
        result = tree.to_torch({"x": a, "y": other}, share_readonly=word)
        assert [tb.shares_memory(result["x"], a), tb.shares_memory(result["y"], other)] == [word, word]


WITHOUT_MEMORY = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(2).to_mkldnn(),
    "meta": lambda: torch.ones(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
@pytest.mark.parametrize("options", [{}, {"copy": True}, {"copy": False}, {"dtype": "float64"}], ids=str)
def test_tensor_without_memory_of_its_own_is_refused_by_name(options, name):
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\[1\]: to_numpy.* cannot be converted: an? "):
        tree.to_numpy([torch.ones(2), WITHOUT_MEMORY[name]()], **options)


class Copying:
    """An array that is copied whenever it is looked at: nobody knows its address."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if copy is False:
            raise ValueError("it is stored otherwise")
        return np.array(self.values)


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": "float32"}], ids=str)
def test_arrays_without_an_address_are_not_the_same(options):
    for convert in (tree.to_numpy, tree.to_torch):
        x, y = convert([Copying(1, 2), Copying(3, 4)], **options)
        assert (x.tolist(), y.tolist()) == ([1, 2], [3, 4])


def test_arrays_without_an_address_do_not_fill_one_out():
    out = np.zeros(2)
    with pytest.raises(ValueError, match=r"out shares memory with out of batch\[0\]"):
        tree.to_numpy([Copying(1, 2), Copying(3, 4)], out=[out, out])
    assert not out.any()


def test_staying_in_torch_gives_back_each_tensor_itself():
    t = torch.arange(6.0)
    view, parameter = t.view(6), torch.nn.Parameter(t)
    result = tree.to_torch([t, view, parameter, t])
    assert all(x is y for x, y in zip(result, [t, view, parameter, t], strict=True))


def test_lists_inside_trees_are_containers_and_numbers_stay_numbers():
    assert tree.to_torch({"labels": [0, 1, 2]}) == {"labels": [0, 1, 2]}


# -- The same memory stays one


def two(base: Any, first: Any, second: Any) -> Any:
    return first(base), second(base)


def same(x: Any) -> Any:
    return x


def six() -> Any:
    return np.arange(6.0)


ONE: dict[str, Any] = {
    "one array": lambda: two(six(), same, same),
    "an array and its view": lambda: two(six(), same, lambda a: a[:]),
    "two views": lambda: two(np.arange(12.0), lambda a: a[2:8], lambda a: a[2:8]),
    "one reversed view": lambda: two(six()[::-1], same, same),
    "two reversed views": lambda: two(six(), lambda a: a[::-1], lambda a: a[::-1]),
    "two read-only views": lambda: two(six(), *[lambda a: np.broadcast_to(a, (2, 6))] * 2),
    "an array and a tensor over it": lambda: two(six(), same, torch.from_numpy),
    "a view and a tensor over it": lambda: two(six(), lambda a: a[1:], lambda a: torch.from_numpy(a)[1:]),
    "one tensor": lambda: two(torch.arange(6.0), same, same),
    "a tensor and its view": lambda: two(torch.arange(6.0), same, lambda t: t.view(6)),
    "a tensor and an array over it": lambda: two(torch.arange(6.0), same, lambda t: t.numpy()),
    "two aliases of a tensor": lambda: two(torch.arange(6.0), torch.Tensor.detach, torch.Tensor.detach),
    "one parameter": lambda: two(torch.nn.Parameter(torch.ones(3)), same, same),
    "parameters tied by their data": lambda: two(torch.ones(3), torch.nn.Parameter, torch.nn.Parameter),
    "two buffers": lambda: two(array.array("d", [1, 2]), memoryview, memoryview),
}


@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", ONE)
def test_same_memory_is_copied_once(name, to):
    first, second = ONE[name]()
    result = getattr(tree, f"to_{to}")({"x": first, "y": [second]}, copy=True)
    assert result["x"] is result["y"][0]
    assert not tb.shares_memory(result["x"], first)


@pytest.mark.parametrize("name", ONE)
def test_same_memory_shared_is_still_one(name):
    first, second = ONE[name]()
    assert tb.shares_memory(*tree.to_torch([first, second], share_readonly=True))
    assert tb.shares_memory(*tree.to_numpy([first, second]))


@pytest.mark.parametrize("to", [tree.to_torch, tree.to_numpy])
@pytest.mark.parametrize("name", [name for name in ONE if name.startswith("one ")])
def test_one_object_becomes_one_object(name, to):
    first, second = ONE[name]()
    made = to([first, np.zeros(1), torch.zeros(1), second])
    assert made[0] is made[3]


def test_lazy_views_of_one_tensor_are_resolved_once():
    z = torch.tensor([1 + 2j, 3j])
    made = tree.to_numpy([z.conj(), z.conj()])
    assert made[0] is made[1]
    assert made[0].tolist() == [1 - 2j, -3j]


def test_state_dict_of_tied_weights_stays_tied():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    result = tree.to_numpy(model.state_dict(), copy=True)
    assert result["0.weight"] is result["1.weight"]


@pytest.mark.parametrize("watched", [False, True])
def test_what_is_shared_has_a_like_for_each_object(watched):
    base, nothing = np.arange(4.0), np.empty((0, 3))
    leaves = [base[:], base[:], base, base, nothing, np.empty((0, 3)), nothing]
    with tb.trace() if watched else nullcontext():
        result = tree.to_torch(leaves)
    for i, j in itertools.combinations(range(len(leaves)), 2):
        assert (result[i] is result[j]) == (leaves[i] is leaves[j])
    assert all(tb.shares_memory(t, base) for t in result[:4])


DIFFERENT: dict[str, Any] = {
    "shape": lambda: two(six(), same, lambda a: a.reshape(2, 3)),
    "length": lambda: two(six(), same, lambda a: a[:3]),
    "dtype": lambda: two(six(), same, lambda a: a.view("int64")),
    "dtype and length": lambda: two(six(), same, lambda a: a.view("int32")),
    "strides": lambda: two(np.arange(9.0).reshape(3, 3), same, lambda a: a.T),
    "strides of tensors": lambda: two(torch.arange(9.0).reshape(3, 3), same, lambda t: t.T),
    "conjugate bit": lambda: two(torch.tensor([1 + 2j]), same, torch.Tensor.conj),
    "negative bit": lambda: two(torch.tensor([1 + 2j]).conj().imag, same, torch._neg_view),
    "requires grad": lambda: two(torch.ones(3, requires_grad=True), same, torch.Tensor.detach),
    "node": lambda: two(torch.ones(3, requires_grad=True) * 2, same, lambda t: t.view(3)),
    "node of a view": lambda: two(torch.ones(6, requires_grad=True) * 2, lambda t: t[::2], lambda t: t[::2]),
    "writable": lambda: two(six(), same, lambda a: np.broadcast_to(a, a.shape)),
    "memory": lambda: (np.zeros(3), np.zeros(3)),
    "memory of tensors": lambda: (torch.zeros(3), torch.zeros(3)),
    "dtype of nothing": lambda: (np.zeros(0), np.zeros(0, "f4")),
}


@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_in_anything_that_decides_stays_two(name, to):
    first, second = DIFFERENT[name]()
    for copy in (True, None):
        result = getattr(tree, f"to_{to}")([first, second], copy=copy)
        assert result[0] is not result[1]
        for made, source in zip(result, (first, second), strict=True):
            assert np.array_equal(numbers(made), numbers(source))
            assert tb.describe(made).shape == tb.describe(source).shape


def test_many_views_of_one_block_are_told_apart_and_twins_kept():
    block = np.arange(100.0).reshape(20, 5)
    leaves = {i: block[i % 10] for i in range(20)}
    for copy in (None, True):
        result = tree.to_torch(leaves, copy=copy)
        assert all(tb.shares_memory(result[i], result[i + 10]) for i in range(10))
        assert len({t.data_ptr() for t in result.values()}) == 10
        assert all(np.array_equal(t.numpy(), leaves[i]) for i, t in result.items())


ODD_ONES = {
    "none": lambda x: x,
    "another dtype": lambda x: x.astype("int16"),
    "a dtype of two names": lambda x: x.astype(np.ulonglong),
    "one that torch lacks": lambda x: x.astype(np.longdouble),
    "F order": lambda x: np.asfortranarray(x),
    "read-only": lambda x: protected(x.copy()),
    "four MiB": lambda x: np.ones((1024, 1024), "f4"),
    "nothing in it": lambda x: np.empty((0, 3), "f4"),
}


def protected(x: Any) -> Any:
    x.setflags(write=False)
    return x


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", ODD_ONES)
def test_copies_of_many_arrays_are_those_of_each(name, place, count):
    arrays = [np.random.default_rng(i).random((2, 3)).astype("f4") for i in range(count)]
    arrays[place] = ODD_ONES[name](arrays[place])
    try:
        alone = [tb.to_torch(a, copy=True) for a in arrays]
    except tb.UnsupportedArrayError:
        with pytest.raises(tb.UnsupportedArrayError, match="longdouble"):
            tree.to_torch(arrays, copy=True)
        return
    for source, made, expected in zip(arrays, tree.to_torch(arrays, copy=True), alone, strict=True):
        assert (made.dtype, made.shape, made.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(made, expected)
        assert not tb.shares_memory(source, made)


def test_copies_of_many_arrays_keep_twins_one():
    arrays = [np.full(3, float(i)) for i in range(40)]
    made = tree.to_torch([*arrays, arrays[7]], copy=True)
    assert made[40] is made[7]
    assert len({t.data_ptr() for t in made}) == 40


def test_container_that_occurs_twice_occurs_twice_in_the_result(a):
    inner = {"w": a}
    result = tree.to_torch([inner, inner, (inner,)])
    assert result[0] is result[1] is result[2][0]


def test_doubling_containers_are_walked_once(a):
    top: Any = [a]
    for _ in range(60):
        top = [top, top]
    assert isinstance(tree.to_torch(top), list)


# -- Nested tensors, whose parts differ in length: they have no shape, and look dense


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("options", [{}, {"copy": False}, {"copy": True}, {"dtype": "float64"}], ids=str)
def test_nested_tensor_beside_a_plain_one_is_refused_as_it_is_alone(options):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for convert in (tree.to_numpy, tree.to_torch, tb.to_torch, tb.to_numpy):
        with pytest.raises(tb.UnsupportedArrayError, match="nested"):
            convert([torch.ones(2), nested], **options)
    with pytest.raises(tb.UnsupportedArrayError, match="nested"):
        next(tb.prefetch([[torch.ones(2), nested]], device="cpu"))


@pytest.mark.parametrize("copy", [None, True])
def test_an_empty_array_that_comes_twice_has_one_result(copy):
    e = np.zeros(4)[:0]
    for _ in range(2):
        made = tb.tree.to_torch([e, np.zeros(3)[1:], e], copy=copy)
        assert made[0] is made[2]
