"""What came read-only is read-only on the way back too, though torch in between has no flag for it."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _readonly


def frozen(n: int = 4) -> np.ndarray:
    a = np.arange(float(n))
    a.setflags(write=False)
    return a


@pytest.fixture(params=["plain", "traced", "remembered"])
def road(request):
    """The lane; the road that decides, which a trace asks for; the one that is remembered."""
    if request.param == "traced":
        with tb.trace():
            yield {}
    else:
        yield {"writable": None} if request.param == "remembered" else {}


WAYS_BACK = {
    "itself": lambda t: t,
    "a slice": lambda t: t[1:],
    "a row": lambda t: t.view(2, 2)[1],
    "transposed": lambda t: t.view(2, 2).T,
    "other elements": lambda t: t.view(torch.int64),
    "detached": lambda t: t.detach(),
    "through .data": lambda t: t.data,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("way", WAYS_BACK)
def test_memory_shared_on_ones_word_comes_back_read_only(way, road):
    source = frozen()
    t = tb.to_torch(source, share_readonly=True)
    for _ in range(3):
        back = tb.to_numpy(WAYS_BACK[way](t), **road)
        assert np.shares_memory(back, source)
        assert not back.flags.writeable
    assert not tb.describe(WAYS_BACK[way](t)).writable


@pytest.mark.parametrize(
    "convert", [tb.to_torch, lambda a: tb.tree.to_torch({"a": a})["a"]], ids=["alone", "in a tree"]
)
def test_an_alias_of_a_view_of_a_tensor_in_a_graph_comes_back_read_only(convert, road):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    loss = (y**2).sum()
    for _ in range(3):
        alias = convert(tb.to_numpy(y))
        with pytest.raises(ValueError, match="read-only"):
            tb.to_numpy(alias, **road)[:] = 0
        with pytest.raises(ValueError, match="read-only"):
            tb.tree.to_numpy([alias.clone(), alias])[1][:] = 0
        with pytest.raises(ValueError, match="read-only"):
            tb.tree.to_numpy([alias.clone(), alias], copy=False)[1][:] = 0
    loss.backward()
    assert x.grad.tolist() == [8, 16]


def test_batches_of_prefetch_are_as_read_only_as_what_they_were_made_of():
    y = torch.ones(2, requires_grad=True) * 2
    assert [tb.to_numpy(b).flags.writeable for b in tb.prefetch([tb.to_numpy(y), np.ones(2)], device="cpu")] == [
        False,
        True,
    ]


def test_the_tensor_behind_a_read_only_view_is_as_writable_as_ever():
    t = torch.zeros(3)
    alias = tb.to_torch(tb.to_numpy(t, writable=False))
    assert not tb.to_numpy(alias).flags.writeable
    assert tb.to_numpy(t).flags.writeable
    alias += 1  # torch's own writes are counted
    assert t.tolist() == [1, 1, 1]
    with tb.editing(alias) as a:  # and so are these
        a[:] = 5
    assert t.tolist() == [5, 5, 5]


def frozen_view(a):
    view = a[:]
    view.flags.writeable = False
    return view


# Views of a tensor that promise more than the array that lies on it does.
NARROWER = {
    "made read-only": frozen_view,
    "a part of one made read-only": lambda a: frozen_view(a)[1:],
    "broadcast": lambda a: np.broadcast_to(a, (2, 4)),
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a, 2),
    "one window": lambda a: np.lib.stride_tricks.sliding_window_view(a, 2)[1],
    "writable windows": lambda a: np.lib.stride_tricks.sliding_window_view(a, 2, writeable=True),
}


@pytest.mark.parametrize("narrowed", NARROWER)
def test_a_view_that_promises_more_than_the_array_on_the_tensor_is_no_alias_of_it(narrowed):
    t = torch.zeros(4)
    a = NARROWER[narrowed](tb.to_numpy(t))
    for _ in range(3):
        with pytest.raises(tb.CopyRequiredError, match=r"read-only|overlapping"):
            tb.to_torch(a, copy=False)
        for back in (
            tb.to_torch(a),
            tb.tree.to_torch({"a": a})["a"],
            next(tb.prefetch([[a]], device="cpu"))[0],
        ):
            assert not tb.shares_memory(back, t)
            back += 1
            assert t.tolist() == [0, 0, 0, 0]
            assert back.flatten().tolist() == [1.0] * back.numel(), "each element is one"


@pytest.mark.parametrize("narrowed", NARROWER)
def test_on_ones_word_such_a_view_is_an_alias_still(narrowed):
    t = torch.zeros(4)
    a = NARROWER[narrowed](tb.to_numpy(t))
    alias = tb.to_torch(a, share_readonly=True, copy=False)
    assert tb.to_numpy(alias).flags.writeable is False
    with pytest.raises(ValueError, match=r"out is read-only|overlap"):
        tb.to_torch(np.zeros(a.shape, "f4"), out=alias)
    version = t._version
    alias.zero_()
    assert t._version > version


@pytest.mark.parametrize("as_tensor", [False, True])
def test_memory_shared_on_ones_word_is_not_filled(as_tensor, road):
    source = frozen()
    t = tb.to_torch(source, share_readonly=True)
    filling = torch.ones(4, dtype=torch.float64) if as_tensor else np.ones(4)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"to_torch.*: out is read-only"):
            tb.to_torch(filling, out=t)
        with pytest.raises(ValueError, match="out is read-only"):
            tb.tree.to_torch([filling, filling], out=[t.clone(), t])
    assert source.tolist() == [0, 1, 2, 3]


def test_writable_memory_is_a_copy_of_it_and_copies_are_free():
    t = tb.to_torch(frozen(), share_readonly=True)
    assert [str(step.op) for step in tb.plan(t, "numpy").steps] == ["share", "protect"]
    for made in (
        tb.to_numpy(t, writable=True),
        tb.to_numpy(t, copy=True),
        tb.to_numpy(t, dtype="float32"),
        tb.to_numpy(t.clone()),
    ):
        assert made.flags.writeable
        assert not np.shares_memory(made, tb.to_numpy(t))
    with pytest.raises(tb.CopyRequiredError, match="writable=True, and the source is read-only"):
        tb.to_numpy(t, writable=True, copy=False)
    assert tb.to_numpy(tb.to_torch(t, copy=True)).flags.writeable
    assert tb.to_torch(t) is t or not tb.to_numpy(tb.to_torch(t)).flags.writeable


def test_writable_memory_of_what_requires_grad_too_is_a_copy_all_the_same(road):
    """That is shared writable on the caller's word about the graph, which says nothing of who owns the memory."""
    source = frozen()
    t = tb.to_torch(source, share_readonly=True).requires_grad_()
    for _ in range(3):
        made = tb.to_numpy(t, **{**road, "writable": True})
        made[:] = 5
        assert source.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a.T, lambda a: a[1:]], ids=["whole", "transposed", "a part"])
@pytest.mark.parametrize("writable", [None, False])
def test_what_lies_overlapping_on_the_tensor_itself_is_an_alias_of_it(view, writable):
    t = torch.zeros(3)
    a = view(tb.to_numpy(t.expand(2, 3), writable=writable))
    alias = tb.to_torch(a, copy=False)
    version = t._version
    alias.detach()[0, 0] = 1
    assert t._version > version
    assert t.sum() == 1


def test_nothing_is_remembered_of_memory_that_is_gone():
    gc.collect()
    before = len(_readonly.marked)
    view = tb.to_torch(frozen(), share_readonly=True)[1:]
    alias = tb.to_torch(tb.to_numpy(torch.zeros(3), writable=False))
    assert len(_readonly.marked) == before + 2
    gc.collect()
    assert not tb.to_numpy(view).flags.writeable, "the storage lives on in a view of it"
    del view, alias
    gc.collect()
    assert len(_readonly.marked) == before


STRANGE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.zeros(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.zeros(3, device="meta"),
    "functional": lambda: torch._to_functional_tensor(torch.zeros(3)),
    "zero": lambda: torch._efficientzerotensor((3,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGE)
def test_what_has_no_memory_is_told_as_ever_while_something_is_remembered(name):
    def said() -> list[str]:
        words = []
        calls = (
            lambda x: tb.to_numpy(x),
            lambda x: tb.to_torch(np.ones(3, "f4"), out=x),
            lambda x: tb.tree.to_numpy([x]),
            lambda x: tb.tree.to_numpy([x], copy=False),
            lambda x: str(tb.plan(x, "numpy")),
            lambda x: tb.editing(x).__enter__(),
        )
        for call in calls:
            try:
                words.append(repr(call(STRANGE[name]())))
            except Exception as error:
                words.append(f"{type(error).__name__}: {error}")
        return words

    before = said()
    t = tb.to_torch(frozen(), share_readonly=True)
    assert said() == before
    assert torch.vmap(lambda x: tb_error(x))(torch.ones(2, 3)).shape == (2, 3)
    del t


def tb_error(x: torch.Tensor) -> torch.Tensor:
    with pytest.raises(tb.UnsupportedArrayError):
        tb.to_numpy(x)
    return x
