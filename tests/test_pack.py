"""Packing: which leaves cross together is decided from their steps, and as few blocks as may be are made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorbridge._array import CPU, SMALL, Device, Traits
from tensorbridge._plan import decide
from tensorbridge._step import Want
from tensorbridge._trees import _pack
from tensorbridge._trees._pack import ALIGN, BLOCK, Route

CUDA0, CUDA1 = Device("cuda:0"), Device("cuda:1")
UP = Want("torch", CUDA0, detach=False)
ROUTE = Route(0, "h2d", "", "torch", CUDA0, "float32")


def group(count: int, first: int = 0, nbytes: int = 4096, **changes: Any) -> _pack.Group:
    return ROUTE._replace(**changes), (nbytes // 4,), list(range(first, first + count))


HOST = Traits("numpy")
ON_CUDA = Traits("torch", CUDA0)
CASES: dict[str, tuple[Traits, Want, bool]] = {
    "array up": (HOST, UP, True),
    "array up to CuPy": (HOST, Want("cupy", CUDA0), True),
    "tensor up": (HOST._replace(framework="torch"), UP, True),
    "pinned tensor up": (HOST._replace(framework="torch", pinned=True), UP, True),
    "read-only array up": (HOST._replace(writable=False), UP, True),
    "reversed array, packed on the way": (HOST._replace(spacing="reversed"), UP, True),
    "swapped bytes, swapped on the way": (HOST._replace(dtype=">float32"), UP, True),
    "bfloat16": (HOST._replace(dtype="bfloat16"), UP, True),
    "cast before the bus": (HOST._replace(dtype="float64"), UP._replace(dtype="float16"), True),
    "cast after the bus": (HOST._replace(dtype="uint8"), UP._replace(dtype="float32"), True),
    "up in a graph": (HOST._replace(framework="torch", graph=True), UP, False),
    "up out of a graph": (HOST._replace(framework="torch", graph=True), UP._replace(detach=True), True),
    "up with a conjugate bit": (HOST._replace(framework="torch", dtype="complex64", lazy="conj"), UP, False),
    "up, Fortran order": (HOST._replace(order="F"), UP, False),
    "up, too large": (HOST._replace(size="medium"), UP, False),
    "up, empty": (HOST._replace(size="empty"), UP, False),
    "up, of a dtype that NumPy lacks": (HOST._replace(framework="torch", dtype="float4_e2m1fn_x2"), UP, False),
    "up into out": (HOST, UP._replace(out=ON_CUDA, dtype="float32"), False),
    "tensor down to NumPy": (ON_CUDA, Want("numpy"), True),
    "tensor down": (ON_CUDA, Want("torch", CPU), True),
    "tensor in a graph down to NumPy": (ON_CUDA._replace(graph=True), Want("numpy"), True),
    "tensor in a graph down": (ON_CUDA._replace(graph=True), Want("torch", CPU, detach=False), False),
    "strided tensor down": (ON_CUDA._replace(spacing="strided"), Want("numpy"), True),
    "CuPy array down": (Traits("cupy", CUDA0), Want("numpy"), True),
    "down into pinned memory": (ON_CUDA, Want("torch", CPU, pin_memory=True), False),
    "stays on the host": (HOST, Want("torch"), False),
    "stays on the device": (ON_CUDA, Want("torch", copy=True), False),
    "to another device": (ON_CUDA, Want("torch", CUDA1), False),
}


@pytest.mark.parametrize("name", CASES)
def test_who_may_cross_in_a_block(name):
    traits, want, expected = CASES[name]
    decision = decide(traits, want)
    assert decision.refusal is None
    found = _pack.route(traits, decision.steps)
    assert (found is not None) == expected
    if found is not None:
        step = decision.steps[found.step]
        assert step.kind == found.kind
        assert found.device == CUDA0
        assert found.receiver == step.after.framework


def test_blocks_are_by_route():
    changes: list[dict[str, Any]] = [
        {},
        {"device": CUDA1},
        {"receiver": "cupy"},
        {"kind": "d2h", "giver": "torch"},
        {"kind": "d2h", "giver": "cupy", "receiver": "numpy"},
    ]
    groups = [group(2, 10 * i, nbytes, **change) for nbytes in (4096, 8) for i, change in enumerate(changes)]
    found = _pack.blocks(groups)
    assert [block.members for block in found] == [[10 * i, 10 * i + 1] * 2 for i in range(5)]


def test_one_leaf_crosses_by_itself():
    assert _pack.blocks([group(1), group(1, device=CUDA1)]) == []
    assert _pack.blocks([]) == []


def test_thousand_pages_cross_in_one_block():
    (block,) = _pack.blocks([group(1000)])
    assert len(block.members) == 1000
    assert block.nbytes == 4096 * 1000 <= BLOCK


def test_no_block_is_larger_than_the_cap():
    found = _pack.blocks([group(200, nbytes=SMALL - 4)])
    assert len(found) == 4
    assert all(block.nbytes <= BLOCK for block in found)
    assert sorted(i for block in found for i in block.members) == list(range(200))


routes = st.builds(
    lambda kind, receiver, dtype: ROUTE._replace(kind=kind, receiver=receiver, dtype=dtype),
    st.sampled_from(["h2d", "d2h"]),
    st.sampled_from(["torch", "cupy"]),
    st.sampled_from(["bool", "int16", "float32", "complex128", "bfloat16"]),
)
shapes = st.lists(st.integers(1, 20), max_size=3).map(tuple)
ITEMSIZE = {"bool": 1, "int16": 2, "float32": 4, "complex128": 16, "bfloat16": 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(routes, shapes, st.integers(1, 300)), max_size=12))
def test_runs_lie_apart_aligned_and_in_equal_steps(kinds):
    groups, leaves = [], []
    for route, shape, count in kinds:
        groups.append((route, shape, list(range(len(leaves), len(leaves) + count))))
        leaves += [(route, shape)] * count
    found = _pack.blocks(groups)
    packed = [i for block in found for i in block.members]
    assert len(packed) == len(set(packed))
    for way in {route.way for route, _ in leaves}:
        assert sum(leaves[i][0].way == way for i in set(range(len(leaves))) - set(packed)) <= 1
    for block in found:
        assert len(block.members) > 1
        assert block.nbytes <= BLOCK
        assert len({leaves[i][0].way for i in block.members}) == 1
        end = 0
        for run in block.runs:
            assert run.offset >= end
            assert run.offset % ALIGN == run.step % ALIGN == 0
            assert {leaves[i] for i in run.leaves} == {(run.route, run.shape)}
            assert run.nbytes == int(np.prod(run.shape)) * ITEMSIZE[run.route.dtype] <= run.step
            end = run.offset + run.step * len(run.leaves)
        assert end <= block.nbytes
