"""Arrays of a kind that was converted before take the road that was decided then, and no other array does."""

from __future__ import annotations

import os
from inspect import unwrap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import ARRAYS, attempt, looks, numbers
from torch._subclasses.fake_tensor import FakeTensorMode

import tensorbridge as tb
from tensorbridge import _convert, _dtypes, _remember

# torch says once a process that complex32 is experimental; nothing else may warn.
silent = pytest.mark.filterwarnings("error", "ignore:ComplexHalf support is experimental")

CONVERT = {"numpy": tb.to_numpy, "torch": tb.to_torch}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "numpy": {
        "as it is": {},
        "copied": {"copy": True},
        "forbidden": {"copy": False},
        "cast": {"dtype": "float32"},
        "cast by torch's name": {"dtype": torch.bfloat16},
        "cast by NumPy's name": {"dtype": np.dtype("int16")},
        "writable": {"writable": True},
        "read-only": {"writable": False, "copy": None},
        "kept in the graph": {"detach": False},
    },
    "torch": {
        "as it is": {},
        "copied": {"copy": True},
        "forbidden": {"copy": False},
        "cast": {"dtype": "float32"},
        "cast to a type": {"dtype": int},
        "on the host": {"device": "cpu"},
        "on torch's host": {"device": torch.device("cpu")},
        "on my word": {"share_readonly": True},
        "out of the graph": {"detach": True},
    },
}


@pytest.fixture(autouse=True)
def nothing_remembered():
    for _ in range(2):
        tb.to_torch([1.0])  # torch is there from here on
    _remember._asked.clear()
    yield
    _remember._asked.clear()


def remembered() -> list[_convert.Recipe]:
    return [recipe for recipes in _remember._asked.values() if recipes is not None for recipe in recipes.values()]


@silent
@pytest.mark.parametrize(("target", "how"), [(target, how) for target in OPTIONS for how in OPTIONS[target]])
def test_second_conversion_gives_what_the_full_road_gives(target, how):
    """All arrays in one go, twice: each finds what the others left behind."""
    options, convert, again = OPTIONS[target][how], unwrap(CONVERT[target]), CONVERT[target].__wrapped__
    for _ in range(2):
        for name in ARRAYS:
            array = ARRAYS[name]()
            full, refusal = attempt(lambda array=array: convert(array, **options))
            result, refused = attempt(lambda array=array: again(array, **options))
            assert (name, str(refusal)) == (name, str(refused))
            if refusal is None:
                assert (name, looks(result)) == (name, looks(full))
                assert np.array_equal(numbers(result), numbers(full)), name
                if not name.startswith("python"):
                    assert tb.shares_memory(array, result) == tb.shares_memory(array, full), name
    assert remembered()


def test_a_kind_is_decided_once(monkeypatch):
    made: list[Any] = []
    opened, convert = _convert.opened, _remember.remembering(unwrap(tb.to_numpy))
    for array in (np.ones(3), np.zeros(30), torch.ones(3), torch.zeros(4, 5)):
        convert(array, dtype="float32")
    monkeypatch.setattr(_convert, "opened", lambda x, want: (made.append(x), opened(x, want))[1])
    assert convert(np.full(7, 2.0), dtype="float32").tolist() == [2.0] * 7
    assert convert(torch.full((2,), 3.0), dtype="float32").tolist() == [3.0] * 2
    assert not made
    convert(torch.ones(3, dtype=torch.float64), dtype="float32")
    assert made


def test_the_address_of_a_complex_array_is_looked_at_every_time():
    words = np.zeros(18, "float32")
    halves = {words[i:][:16].ctypes.data % 8: words[i:][:16].view("complex64") for i in (0, 1)}  # torch reads 8 at once
    for _ in range(2):
        assert tb.shares_memory(tb.to_torch(halves[0], share_readonly=True), words)
        assert not tb.shares_memory(tb.to_torch(halves[4], share_readonly=True), words)


OUTS = {
    "of its kind": lambda a: np.zeros(a.shape, a.dtype),
    "in Fortran's order": lambda a: np.zeros(a.shape, a.dtype, order="F"),
    "of another dtype": lambda a: np.zeros(a.shape, "complex128"),
    "of another shape": lambda a: np.zeros((*a.shape, 1), a.dtype),
    "read-only": lambda a: np.broadcast_to(a.dtype.type(0), a.shape),
    "reversed": lambda a: np.zeros(a.shape, a.dtype)[::-1],
    "itself": lambda a: a,
    "half of it": lambda a: np.concatenate([a, a]),
}


@pytest.mark.parametrize("target", CONVERT)
@pytest.mark.parametrize("source", ["array", "transposed", "tensor"])
def test_second_fill_fills_what_the_full_road_fills(source, target):
    def filled(convert: Any, kind: str) -> Any:
        a = np.arange(1.0, 7.0, dtype="float32").reshape(2, 3)
        a = a.T if source == "transposed" else a
        out = OUTS[kind](a)
        if kind == "half of it":
            a, out = out[:2], out[1:3]
        if target == "torch":
            if kind in ("read-only", "reversed"):
                return "no such tensor"
            out = torch.from_numpy(out)
        x = torch.from_numpy(a) if source == "tensor" else a
        written = out._version if target == "torch" else 0
        result, refusal = attempt(lambda: convert(x, out=out))
        if refusal is not None:
            return str(refusal)
        assert result is out
        return looks(out), numbers(out).tolist(), (out._version if target == "torch" else 1) > written

    for _ in range(2):
        for kind in OUTS:
            assert (kind, filled(CONVERT[target].__wrapped__, kind)) == (kind, filled(unwrap(CONVERT[target]), kind))


@pytest.mark.parametrize("order", [1, -1], ids=["source strided", "out strided"])
def test_gaps_in_one_that_the_other_lies_in_are_seen(order):
    line = np.arange(12.0)
    for _ in range(2):
        a, out = [np.zeros(12)[::2], np.zeros(6)][::order]
        tb.to_numpy(a, out=out)
    a, out = [line[::2], line[6:]][::order]
    with pytest.raises(ValueError, match="shares memory with the source"):
        tb.to_numpy(a, out=out)
    assert line.tolist() == list(range(12))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_in_our_words_on_either_side():
    rows = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(tb.UnsupportedArrayError, match="rows of different lengths"):
        tb.to_numpy(rows, out=np.zeros(2))
    with pytest.raises(ValueError, match="rows of different lengths"):
        tb.to_torch(np.zeros(2), out=rows)


def test_an_inference_tensor_is_not_filled_outside_its_mode():
    a = np.ones((2, 2), "float32").T
    for _ in range(2):
        tb.to_torch(a, out=torch.zeros(2, 2))
    with torch.inference_mode():
        frozen = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="inference tensor"):
        tb.to_torch(a, out=frozen)


def test_what_equals_true_is_no_flag_still():
    for _ in range(2):
        tb.to_numpy(np.ones(3), copy=True)
        for strange in (1, 1.0, np.True_):
            with pytest.raises(TypeError, match=r"copy is True, False or None"):
                tb.to_numpy(np.ones(3), copy=strange)


def test_options_that_cannot_be_a_key_are_answered_as_ever():
    for _ in range(2):
        with pytest.raises(TypeError, match=r"dtype=\['float32'\]"):
            tb.to_numpy(np.ones(3), dtype=["float32"])
        with pytest.raises(TypeError, match="unexpected keyword argument 'dtypes'"):
            tb.to_numpy(np.ones(3), dtypes="float32")
        with pytest.raises(TypeError, match="native byte order"):
            tb.to_numpy(np.ones(3, "float32"), dtype=np.dtype(">f4"))


def test_a_guard_and_a_trace_see_what_is_remembered():
    a = np.ones(3)
    for _ in range(2):
        tb.to_torch(a, dtype="float32")
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError):
        tb.to_torch(a, dtype="float32")
    with tb.trace() as seen:
        tb.to_torch(a, dtype="float32")
    assert seen.totals.nbytes == 12


def test_a_forked_process_decides_anew_where_torch_would_start_threads(monkeypatch):
    a = np.ones(100_000, "float32")
    convert = _remember.remembering(unwrap(tb.to_torch))
    for _ in range(2):
        assert convert(a, dtype="float16").dtype == torch.float16
    monkeypatch.setattr(_convert, "imported_in", os.getpid() + 1)
    seen: list[Any] = []
    decided = _convert.recipe_for

    def recipe_for(traits: Any, want: Any, here: Any) -> Any:
        seen.append(here.worker)
        return decided(traits, want, here)

    monkeypatch.setattr(_convert, "recipe_for", recipe_for)
    convert(a, dtype="float16")
    assert seen == [torch.get_num_threads() > 1]


def test_a_tensor_inside_a_mode_that_computes_no_values_is_refused_all_the_same():
    t = torch.ones(3)
    for _ in range(2):
        tb.to_numpy(t, dtype="float64")
    with FakeTensorMode(), pytest.raises(tb.UnsupportedArrayError, match="inside FakeTensorMode"):
        tb.to_numpy(t, dtype="float64")


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cuda:0"}, {"pin_memory": True}], ids=str)
def test_what_leaves_the_host_is_not_remembered(options):
    words = ("torch", *options.items())
    _remember._remember(words, options, tb.plan(np.ones(3), "numpy").target)
    assert _remember._asked[words] is None
    assert not remembered()


STRANGE = {
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "zero": lambda: torch._efficientzerotensor((3,)),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.ones(3, device="meta"),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "a subclass": lambda: torch.ones(3).as_subclass(type("Sub", (torch.Tensor,), {})),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", STRANGE)
def test_the_keys_of_dispatch_tell_what_is_no_plain_tensor(name):
    assert not _convert.adapter_of(torch.Tensor).is_plain(STRANGE[name]())


def test_the_keys_of_dispatch_tell_a_transform_from_a_plain_tensor():
    is_plain = _convert.adapter_of(torch.Tensor).is_plain
    seen: list[bool] = []

    def see(x: Any) -> Any:
        seen.append(is_plain(x))
        return x.sum()

    torch.func.vmap(see)(torch.ones(2, 3))
    torch.func.grad(see)(torch.ones(3))
    torch.func.functionalize(see)(torch.ones(3))
    assert seen == [False] * 3


def test_the_keys_of_dispatch_find_nothing_strange_in_ordinary_tensors():
    is_plain = _convert.adapter_of(torch.Tensor).is_plain
    x = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        inferred = torch.ones(3)
    for t in (x, x * 2, x.detach(), inferred, torch.nn.Parameter(torch.ones(3)), torch.ones(3, 4).T, torch.ones(0)):
        assert is_plain(t)
    for name, row in _dtypes.DTYPES.items():
        if row.torch and hasattr(torch, row.torch):
            assert is_plain(torch.zeros(2, dtype=getattr(torch, row.torch))), name


def misaligned() -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(17), "float32", 4, offset=1))


def short() -> torch.Tensor:
    t = torch.ones(4)
    t.untyped_storage().resize_(8)
    return t


def short_of_its_offset() -> torch.Tensor:
    t = torch.ones(12)[8:]
    t.untyped_storage().resize_(40)
    return t


def gapped() -> torch.Tensor:
    return torch.ones(8)[::2]


# Of one dtype and shape, and for the most part of the same strides as a plain one.
TWINS = {
    "misaligned": misaligned,
    "short": short,
    "short of its offset": short_of_its_offset,
    "gapped": gapped,
    "in a graph": lambda: torch.ones(4, requires_grad=True) * 2,
    "of another dtype": lambda: torch.ones(4, dtype=torch.int32),
    "read-only": lambda: tb.to_torch(np.frombuffer(bytes(16), "float32"), share_readonly=True),
    "on our word": lambda: tb.to_torch(np.frombuffer(bytes(16), "float32"), share_readonly=True)[:],
}


def outright(t: torch.Tensor) -> Any:
    adapter: Any = _convert.adapter_of(torch.Tensor)
    try:
        return adapter._traits(t, True, ask_pinned=False)
    except adapter.Obstacle:
        return None


@pytest.mark.parametrize("first", ["plain", "twin"])
@pytest.mark.parametrize("name", TWINS)
def test_a_tensor_that_looks_like_one_that_was_seen_is_still_looked_at(name, first):
    adapter: Any = _convert.adapter_of(torch.Tensor)
    adapter._seen.clear()
    pair = [torch.ones(4), TWINS[name]()]
    for t in pair if first == "plain" else pair[::-1]:
        for _ in range(2):
            assert adapter.quick_traits(t) == outright(t)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # which torch uses for that itself
@pytest.mark.parametrize("first", ["plain", "twin"])
def test_a_tensor_that_looks_like_one_that_was_seen_may_carry_a_tangent(first):
    adapter: Any = _convert.adapter_of(torch.Tensor)
    adapter._seen.clear()
    with torch.autograd.forward_ad.dual_level():
        pair = [torch.ones(4), torch.autograd.forward_ad.make_dual(torch.ones(4), torch.ones(4))]
        for t in pair if first == "plain" else pair[::-1]:
            for _ in range(2):
                assert adapter.quick_traits(t) == outright(t)
        assert adapter.quick_traits(pair[1]).graph
    assert not adapter.quick_traits(torch.ones(4)).graph


def test_an_empty_tensor_needs_no_storage():
    adapter: Any = _convert.adapter_of(torch.Tensor)
    adapter._seen.clear()
    for _ in range(2):
        assert adapter.quick_traits(torch.ones(0, 3)).size == "empty"
    assert len(adapter._seen) == 1


def test_the_kinds_that_are_kept_are_not_many(monkeypatch):
    adapter: Any = _convert.adapter_of(torch.Tensor)
    adapter._seen.clear()
    monkeypatch.setattr(adapter, "_KEPT", 3)
    for n in range(10):
        adapter.quick_traits(torch.ones(n))
    assert len(adapter._seen) <= 3


# -- Trees whose leaves are of kinds that were decided before


TREES = {
    "casts": (lambda: {"a": np.arange(4.0), "b": np.arange(4), "c": np.ones(4, "f4")}, {"dtype": "float32"}),
    "casts of one dtype": (lambda: {"a": np.arange(4.0), "b": np.arange(4)}, {"dtype": {"float64": "float32"}}),
    "reversed": (lambda: [np.arange(4.0)[::-1], np.arange(6.0)[::-2]], {}),
    "read-only": (lambda: [frozen(np.arange(4.0)), frozen(np.arange(3))[1:]], {}),
    "views of tensors": (lambda: [torch.arange(4.0).numpy(), torch.ones(3, dtype=torch.int16).numpy()[1:]], {}),
    "big-endian": (lambda: [np.arange(4, dtype=">f8"), np.arange(4, dtype=">i2")], {}),
    "tensors": (lambda: [torch.arange(4.0), torch.arange(4.0, requires_grad=True)], {"dtype": "float64"}),
    "bfloat16": (lambda: [np.arange(4).astype(ml_dtypes.bfloat16), torch.ones(2, dtype=torch.bfloat16)], {}),
}


def frozen(a: Any) -> Any:
    a.setflags(False)
    return a


@pytest.mark.parametrize("convert", [tb.tree.to_torch, tb.tree.to_numpy], ids=["torch", "numpy"])
@pytest.mark.parametrize("copy", [None, True])
@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_converted_again_as_it_was_decided(name, copy, convert):
    """Three times alike, and each as under a trace, where every leaf is decided anew."""
    make, options = TREES[name]
    for _ in range(3):
        source = make()
        with tb.trace():
            want = convert(source, copy=copy, **options)
        made = convert(source, copy=copy, **options)
        pairs = zip(*(t.values() if isinstance(t, dict) else t for t in (made, want, source)), strict=True)
        for x, decided, leaf in pairs:
            told, wanted = tb.describe(x), tb.describe(decided)
            assert (told.dtype, told.strides, told.writable, told.requires_grad) == (
                (wanted.dtype, wanted.strides, wanted.writable, wanted.requires_grad)
            )
            assert tb.shares_memory(x, leaf) == tb.shares_memory(decided, leaf)
            assert x.tolist() == decided.tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda a: [a, a],
        lambda a: [a, a[:]],
        lambda a: [a, torch.from_numpy(a)],
        lambda a: [torch.from_numpy(a), torch.from_numpy(a)],
        lambda a: [a[1:], a[1:]],
        lambda a: [a[::-1], a[::-1]],
    ],
    ids=["an object twice", "its view", "a tensor over it", "two tensors", "two views", "two reversed"],
)
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"copy": True}, {"dtype": {"float64": "float32"}}], ids=str)
def test_the_same_memory_stays_one_in_a_tree_of_known_kinds(make, options):
    for _ in range(3):
        apart = tb.tree.to_torch([make(np.arange(4.0))[0], make(np.arange(4.0))[1]], **options)
        assert not tb.shares_memory(*apart)
        assert tb.shares_memory(*tb.tree.to_torch(make(np.arange(4.0)), **options))


def test_a_leaf_that_fails_in_a_tree_of_known_kinds_does_so_each_time():
    for _ in range(2):
        tb.tree.to_torch({"x": np.ones(2), "y": np.ones(2)}, dtype="float16")
    with np.errstate(over="raise"):
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                tb.tree.to_torch({"x": np.ones(2), "y": np.full(2, 1e30)}, dtype="float16")
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['y'\]: to_torch"):
        tb.tree.to_torch({"x": np.ones(2), "y": torch.ones(2).to_sparse()}, dtype="float16")


def test_a_guard_and_a_trace_see_leaves_of_known_kinds():
    source = {"a": np.arange(4.0), "b": np.arange(4)}
    for _ in range(2):
        tb.tree.to_torch(source, dtype="float32")
    with tb.trace() as seen:
        tb.tree.to_torch(source, dtype="float32")
    assert [event.nbytes for event in seen.events] == [16, 16]
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=r"^batch\['a'\]"):
        tb.tree.to_torch(source, dtype="float32")
