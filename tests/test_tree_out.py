"""Trees into `out`: every leaf is checked before the first is written, and each ends with the values of its source."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import frozen, numbers

import tensorbridge as tb
from tensorbridge import _convert, _remember, tree
from tensorbridge._trees import _leaves


@pytest.fixture
def a() -> Any:
    return np.arange(6.0).reshape(2, 3)


@pytest.fixture(autouse=True, params=["decided anew", "known"])
def known(request) -> bool:
    """Every test, with fills of these kinds known from before, and not."""
    _remember._asked.clear()
    if request.param == "known":
        for dtype in ("float32", "float64"):
            for out in (np.zeros((2, 3), dtype), torch.zeros(2, 3, dtype=getattr(torch, dtype))):
                fill = tree.to_numpy if isinstance(out, np.ndarray) else tree.to_torch
                for x in (np.ones((2, 3), "f4"), np.ones((2, 3)), torch.ones(2, 3), torch.ones(2, 3).double()):
                    fill([x], out=[out])
        assert len(_remember._asked) == 4
    return request.param == "known"


@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_out_is_filled_and_returned(to, a):
    make = {"torch": lambda: torch.zeros(2, 3), "numpy": lambda: np.zeros((2, 3), "f4")}[to]
    out = {"x": make(), "l": [make()]}
    result = getattr(tree, f"to_{to}")({"x": a, "l": [a[::-1]]}, out=out)
    assert result is out
    assert np.array_equal(numbers(out["x"]), numbers(a))
    assert np.array_equal(numbers(out["l"][0]), numbers(a[::-1]))


def test_keys_of_out_may_have_another_order(a):
    source = {"x": a, "n": 3, "more": {"y": a + 1, "z": a + 2}}
    out = {"more": {"z": np.zeros((2, 3)), "y": np.zeros((2, 3))}, "x": np.zeros((2, 3))}
    assert tree.plan(source, "numpy", out=out).bytes_moved == 3 * a.nbytes
    assert tree.to_numpy(source, out=out) is out
    assert np.array_equal(out["x"], a)
    assert np.array_equal(out["more"]["y"], a + 1)
    assert np.array_equal(out["more"]["z"], a + 2)
    with pytest.raises(ValueError, match=r"^batch\['more'\]\['y'\]: .*out has shape \(3,\)"):
        tree.to_numpy(source, out={"more": {"z": np.zeros((2, 3)), "y": np.zeros(3)}, "x": np.zeros((2, 3))})


SOURCES: dict[str, Any] = {
    "an array": lambda: np.arange(6.0).reshape(2, 3),
    "another dtype": lambda: np.arange(6, dtype="u1").reshape(2, 3),
    "half precision": lambda: np.arange(6.0).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "in Fortran's order": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "with gaps": lambda: np.arange(12.0).reshape(2, 6)[:, ::2],
    "reversed": lambda: np.arange(6.0).reshape(2, 3)[::-1],
    "big-endian": lambda: np.arange(6.0).reshape(2, 3).astype(">f8"),
    "read-only": lambda: frozen(np.arange(6.0).reshape(2, 3)),
    "empty": lambda: np.zeros((0, 3)),
    "a tensor": lambda: torch.arange(6.0).reshape(2, 3),
    "a transposed tensor": lambda: torch.arange(6.0).reshape(3, 2).T,
    "a view of a tensor": lambda: torch.arange(6.0).reshape(2, 3).numpy(),
    "a conjugate": lambda: torch.arange(6.0).reshape(2, 3).to(torch.complex64).conj().real,
}
OUTS: dict[str, Any] = {
    "float64": lambda shape: np.zeros(shape),
    "float32": lambda shape: np.zeros(shape, "f4"),
    "in Fortran's order": lambda shape: np.zeros(shape, order="F"),
    "with gaps": lambda shape: np.zeros((*shape[:-1], shape[-1] * 2))[..., ::2],
    "on a tensor": lambda shape: torch.zeros(shape, dtype=torch.float64).numpy(),
}


def version(x: Any) -> int | None:
    """How many writes autograd has been told of."""
    tensor = x if isinstance(x, torch.Tensor) else x.base
    return tensor._version if isinstance(tensor, torch.Tensor) else None


@pytest.mark.parametrize("how", OUTS)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_what_is_filled_again_is_filled_as_before(to, name, how):
    written = []
    for _ in range(3):
        source = {"x": SOURCES[name](), "y": [np.float64(3), SOURCES["an array"]()]}
        outs = [OUTS[how](tuple(source["x"].shape)), OUTS[how]((2, 3))]
        first, second = outs if to == "numpy" else tree.to_torch(outs)
        before = version(first), version(second)
        out = {"x": first, "y": [np.float64(3), second]}
        assert getattr(tree, f"to_{to}")(source, out=out) is out
        assert np.array_equal(numbers(first), numbers(source["x"]))
        assert np.array_equal(numbers(second), numbers(source["y"][1]))
        written.append([None if was is None else version(x) - was for x, was in zip((first, second), before)])
    assert written[0] == written[1] == written[2]


def test_a_fill_that_is_known_takes_no_closer_look(known, monkeypatch, a):
    looks = []
    checked = _leaves.checked
    monkeypatch.setattr(_leaves, "checked", lambda *args: looks.append(args) or checked(*args))
    out = {"x": torch.zeros(2, 3), "y": [torch.zeros(2, 3)]}
    for value in (1.0, 2.0):
        tree.to_torch({"x": a, "y": [np.full((2, 3), value)]}, out=out)
        assert out["y"][0].tolist() == [[value] * 3] * 2
    assert len(looks) == (not known)
    with tb.trace() as seen:
        tree.to_torch({"x": a, "y": [a]}, out=out)
    assert len(seen.events) == 2
    assert len(looks) == 1 + (not known)
    tree.to_torch({"x": a, "y": [a]}, dtype="float32", out=out)
    assert len(looks) == 2 + (not known)


def test_a_graph_that_was_joined_once_is_not_joined_unseen():
    for _ in range(3):
        out = [torch.zeros(2, 3)]
        tree.to_torch([torch.ones(2, 3, requires_grad=True) * 2], out=out)
        assert out[0].requires_grad
    with pytest.raises(ValueError, match=r"^batch\[0\]: .*requires grad"):
        tree.to_torch([torch.ones(2, 3)], out=out)


def test_compiled_code_and_forked_processes_are_looked_at_anew(known, monkeypatch, a):
    looks = []
    checked = _leaves.checked
    out = [torch.zeros(2, 3)]
    tree.to_torch([a], out=out)
    monkeypatch.setattr(_leaves, "checked", lambda *args: looks.append(args) or checked(*args))
    with monkeypatch.context() as patch:
        patch.setattr(_leaves, "is_inside", lambda: True)
        tree.to_torch([a], out=out)
    assert len(looks) == 1
    large = np.ones((256, 1024))
    outs = [torch.zeros(256, 1024)]
    for _ in range(2):
        tree.to_torch([large], out=outs)
    assert len(looks) == 2
    monkeypatch.setattr(_convert, "imported_in", -1)  # torch would wait for threads that a fork does not have
    tree.to_torch([large], out=outs)
    assert len(looks) == 3


# -- What is refused is refused before anything is written


def both(second: Any) -> Any:
    """A first leaf that could be filled, and one that makes the difference."""
    return {"first": np.zeros((2, 3)), "second": second}


class Text:
    """Says what it is only when it is opened."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array([["text"] * 3] * 2)


REFUSED: dict[str, Any] = {
    "shape": (lambda a: both(a), lambda a: both(np.zeros(3)), r"^batch\['second'\]: .*out has shape \(3,\)"),
    "read-only": (lambda a: both(a), lambda a: both(frozen(np.zeros((2, 3)))), r"^batch\['second'\]: .*read-only"),
    "another framework": (lambda a: both(a), lambda a: both(torch.zeros(2, 3)), r"^batch\['second'\]: .*not an array"),
    "its own source": (lambda a: both(a), lambda a: both(a), r"^batch\['second'\]: .*shares memory with the source"),
    "elements that overlap": (
        lambda a: both(a),
        lambda a: both(np.lib.stride_tricks.as_strided(np.zeros(9), (2, 3), (8, 8))),
        r"^batch\['second'\]: .*overlaps itself",
    ),
    "text": (
        lambda a: both(np.array([["t"] * 3] * 2)),
        lambda a: both(np.zeros((2, 3))),
        r"another tree: it has batch\['second'\], which is text in the source$",
    ),
    "text in disguise": (lambda a: both(Text()), lambda a: both(np.zeros((2, 3))), r"^batch\['second'\]: .*text"),
    "complex": (lambda a: both(a * 1j), lambda a: both(np.zeros((2, 3))), r"^batch\['second'\]: .*imaginary"),
    "a graph": (
        lambda a: both(torch.ones(2, 3, requires_grad=True)),
        lambda a: both(np.zeros((2, 3))),
        r"^batch\['second'\]: .*graph",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_written_where_one_leaf_is_refused(name, a):
    make, make_out, text = REFUSED[name]
    source, out = make(a), make_out(a)
    source["first"] = np.ones((2, 3))
    with pytest.raises((ValueError, TypeError, tb.BridgeError), match=text) as refused:
        tree.to_numpy(source, out=out, detach=False)
    assert not out["first"].any()
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(type(refused.value)) as planned:
        tree.plan(source, "numpy", out=out, detach=False)
    assert str(planned.value) == str(refused.value)


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (lambda: torch.zeros(2, 3, requires_grad=True), "requires grad"),
        (lambda: torch.zeros(1).expand(2, 3), "overlaps itself"),
        (lambda: torch.zeros(3, 2), "out has shape"),
    ],
)
def test_no_tensor_is_written_where_one_is_refused(second, text, a):
    out = {"first": torch.zeros(2, 3), "second": second()}
    with pytest.raises(ValueError, match=rf"^batch\['second'\]: .*{text}"):
        tree.to_torch({"first": a, "second": a}, out=out)
    assert not out["first"].any()
    assert out["first"]._version == 0


def test_guard_refuses_a_fill_before_anything_is_written(a):
    out = {"small": np.zeros(1), "large": np.zeros((2, 3))}
    with tb.copy_guard("error", min_bytes=40), pytest.raises(tb.CopyRequiredError, match=r"^batch\['large'\]: "):
        tree.to_numpy({"small": np.ones(1), "large": a}, out=out)
    assert out["small"] == 0


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ({"y": torch.zeros(2, 3)}, r"another tree: it has batch\['y'\]"),
        ({}, r"another tree: it lacks batch\['x'\]"),
        ({"x": 3, "n": torch.zeros(2, 3)}, r"another tree: it has batch\['n'\]"),
        ({"n": torch.zeros(2, 3), "x": 3}, r"another tree: it has batch\['n'\]"),
        ({"x": [torch.zeros(2, 3)]}, r"another tree: it has batch\['x'\]\[0\]"),
    ],
)
def test_out_of_another_structure_is_refused(out, text, a):
    for fill in (tree.to_torch, lambda x, out: tree.plan(x, "torch", out=out)):
        with pytest.raises(ValueError, match=text):
            fill({"x": a, "n": 3} if "n" in out else {"x": a}, out=out)


@pytest.mark.parametrize("value", [np.float64(1.5), 2, True, np.int8(3), np.True_])
def test_a_number_where_out_has_an_array_is_said_to_be_one(value, a):
    out = {"x": torch.zeros(2, 3), "reward": torch.zeros(())}
    with pytest.raises(ValueError) as told:
        tree.to_torch({"x": a, "reward": value}, out=out)
    assert str(told.value) == (
        f"tree.to_torch(out=...): out is another tree: it has batch['reward'], which is {type(value).__name__} in the "
        "source: numbers are left as they are, give numpy.asarray(x) there"
    )
    assert not out["x"].any()
    tree.to_torch({"x": a, "reward": np.asarray(value)}, out=out)
    assert out["reward"] == value


def test_names_of_fields_say_what_belongs_together(a):
    Here, There = namedtuple("Here", "x y"), namedtuple("There", "y x")
    out = There(np.zeros((2, 3)), np.zeros((2, 3)))
    tree.to_numpy(Here(a, a + 1), out=out)
    assert (out.x.tolist(), out.y.tolist()) == (a.tolist(), (a + 1).tolist())


# -- Memory that is given twice


@pytest.mark.parametrize("overlap", [0, 3])
def test_one_memory_cannot_hold_two_leaves(overlap, a):
    block = np.zeros(12)
    out = {"x": block[:6], "y": block[overlap : 6 + overlap]}
    with pytest.raises(
        ValueError, match=r"^batch\['y'\]: to_numpy\(out=\.\.\.\): out shares memory with out of batch\['x'\]"
    ):
        tree.to_numpy({"x": np.ones(6), "y": np.ones(6) * 2}, out=out)
    assert not block.any()


def test_gaps_of_a_source_in_which_another_is_written_are_seen():
    for _ in range(2):  # both are filled, and known
        tree.to_numpy([np.ones(12)[::2], np.ones(6)], out=[np.zeros(6), np.zeros(6)])
    block = np.ones(12)
    with pytest.raises(ValueError, match=r"^batch\[1\]: .*out shares memory with batch\[0\], which is read"):
        tree.to_numpy([block[::2], np.zeros(5)], out=[np.zeros(6), block[6:11]])
    assert block.all()


def test_out_that_is_the_source_of_another_leaf_is_refused():
    """Filled in order, the second would get what the first has just been given."""
    x, y = np.ones(4), np.full(4, 2.0)
    with pytest.raises(ValueError, match=r"^batch\['[xy]'\]: .*out shares memory with batch\['[xy]'\], which is read"):
        tree.to_numpy({"x": x, "y": y}, out={"x": y, "y": x})
    assert (x.tolist(), y.tolist()) == ([1] * 4, [2] * 4)
    t = torch.ones(4)
    with pytest.raises(ValueError, match=r"^batch\[1\]: .*out shares memory with batch\[0\]"):
        tree.to_numpy([t, np.zeros(4)], out=[np.zeros(4), t.numpy()])


def test_parts_of_one_block_that_do_not_meet_are_filled():
    block = np.zeros((4, 3))
    out = {"x": block[:, 0], "y": block[:, 1], "z": block[::2, 2]}
    tree.to_numpy({"x": torch.ones(4), "y": np.full(4, 2), "z": block[1::2, 2] + 3}, out=out)
    assert block.tolist() == [[1, 2, 3], [1, 2, 0], [1, 2, 3], [1, 2, 0]]


def test_one_source_fills_each_out_that_is_given_for_it(a):
    out = {"x": np.zeros((2, 3)), "y": np.zeros((2, 3), "f4")}
    tree.to_numpy({"x": a, "y": a}, out=out)
    assert out["x"].tolist() == out["y"].tolist() == a.tolist()


def test_tied_sources_into_tied_outs_are_filled_once():
    """A copy of a state with tied weights is an `out` for the next one."""
    weight = torch.ones(3)
    state = {"w": weight, "tied": weight.view(3), "b": torch.zeros(2)}
    out = tree.to_numpy(state, copy=True)
    assert out["w"] is out["tied"]
    weight.fill_(5)
    with tb.trace() as seen:
        assert tree.to_numpy(state, out=out) is out
    assert out["w"].tolist() == [5, 5, 5]
    plan = tree.plan(state, "numpy", out=out)
    assert [leaf.same_as for leaf in plan.leaves] == ["", "batch['w']", ""]
    assert seen.totals.nbytes == plan.bytes_moved == 20


def test_many_leaves_are_checked_in_no_time():
    block = np.zeros((2000, 8))
    source = {i: np.full(8, i) for i in range(2000)}
    tree.to_numpy(source, out=dict(enumerate(block)))
    assert np.array_equal(block, np.repeat(np.arange(2000.0), 8).reshape(2000, 8))


def test_plan_of_a_fill_says_so(a):
    plan = tree.plan({"x": a}, "torch", out={"x": torch.zeros(2, 3)})
    assert [step.op for step in plan.leaves[0].plan.steps] == ["fill"]
    assert plan.bytes_moved == 24


class Key:
    def __repr__(self) -> str:
        return "key"


def test_out_whose_keys_are_written_alike_in_another_order_is_refused():
    """Which of the two is meant for which cannot be told."""
    first, second = Key(), Key()
    outs = [np.zeros(2) for _ in range(3)]
    with pytest.raises(ValueError, match="out is another tree: its order differs"):
        tree.to_numpy(
            {first: np.ones(2), second: np.full(2, 2.0), "x": np.zeros(2)},
            out={"x": outs[0], first: outs[1], second: outs[2]},
        )
    assert not np.array(outs).any()
