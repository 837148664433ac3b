"""Packing: what crossed in a block stands alone. No GPU is needed: the bus is a recorder, the "device" host memory of
torch.
"""

from __future__ import annotations

import io
import weakref
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import numbers

import tensorbridge as tb
from tensorbridge import _convert, _options, tree
from tensorbridge._adapters import adapter_of
from tensorbridge._array import CPU, Device, Traits
from tensorbridge._convert import Case
from tensorbridge._plan import decide
from tensorbridge._step import Want, bind
from tensorbridge._trees import _leaves, _pack
from tensorbridge._trees._leaf import Leaf
from tensorbridge._trees._pack import ALIGN, BLOCK

CUDA0, CUDA1 = Device("cuda:0"), Device("cuda:1")
ON_CUDA = Traits("torch", CUDA0)


class Recorder:
    """A bus that copies into other host memory, and counts."""

    def __init__(self) -> None:
        self.ups: list[int] = []
        self.downs: list[int] = []

    def host_block(self, nbytes: int) -> Any:
        return np.full(nbytes, 0xA5, dtype=np.uint8)

    def up(self, host: Any, device: Device) -> Any:
        self.ups.append(host.nbytes)
        return torch.from_numpy(host).clone()

    def down(self, block: Any, device: Device) -> Any:
        self.downs.append(block.nbytes)
        return block.numpy().copy()


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """One CUDA device that only packed leaves can reach."""
    recorder = Recorder()
    monkeypatch.setattr(_options, "_cuda", lambda framework: (1, 0, ""))
    monkeypatch.setattr(_pack, "bus_for", lambda block: recorder)
    return recorder


# -- Up: through the public function, with a recorder for a bus


def sources() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "f4": rng.random((3, 5)).astype("f4"),
        "f4 too": rng.random((3, 5)).astype("f4"),
        "f4 reversed": rng.random(6).astype("f4")[::-1],
        "f8 scalar": np.array(2.5),
        "i2": np.arange(7, dtype="i2"),
        "bool": np.array([True, False, True]),
        "bf16": np.arange(4, dtype=ml_dtypes.bfloat16),
        "float8": torch.arange(5).to(torch.float8_e4m3fn),
        "tensor": torch.arange(6).reshape(2, 3),
        "bf16 tensor": torch.arange(3, dtype=torch.bfloat16),
        "complex": np.array([1 + 2j, 3]),
        "big-endian": np.arange(4, dtype=">i4"),
        "read-only": np.broadcast_to(np.float32(4), (2, 2)),
        "text": "text",
    }


def test_small_leaves_go_up_in_one_transfer_and_keep_their_values(bus):
    source = sources()
    result = tree.to_torch({"batch": source, "list": [source["f4"]]}, device="cuda:0")
    assert len(bus.ups) == 1
    for name, x in source.items():
        made = result["batch"][name]
        if isinstance(x, str):
            assert made is x
            continue
        assert tuple(made.shape) == tuple(x.shape)
        assert tb.describe(made).dtype == tb.describe(x).dtype.lstrip(">")
        assert np.array_equal(numbers(made), numbers(x)), name
        assert made.data_ptr() % ALIGN == result["batch"]["f4"].data_ptr() % ALIGN
    assert result["list"][0] is result["batch"]["f4"]


def test_plain_arrays_cross_alike_whatever_is_beside_them(bus):
    """All plain and apart, they are decided by kind and shape; beside anything else, one by one."""
    plain = {i: np.full(i % 7 + 2, i % 5, dtype=["f4", "i8", "?"][i % 3]) for i in range(60)}
    for beside in (
        {},
        {"tensor": torch.ones(2)},
        {"view": np.arange(9.0)[1:]},
        {"again": plain[0]},
        {"twin": plain[0][:]},
        {"n": np.ones((2, 1))},
    ):
        made = tree.to_torch(plain | beside, device="cuda:0")
        for name, x in (plain | beside).items():
            assert np.array_equal(numbers(made[name]), numbers(x))
            assert tb.describe(made[name]).dtype == tb.describe(x).dtype
        assert list(made) == list(plain | beside)
        assert made.get("again", made[0]) is made.get("twin", made[0]) is made[0]
    assert bus.ups == [n * ALIGN for n in (60, 61, 61, 60, 60, 61)]


def test_plain_tensors_cross_alike_whatever_is_beside_them(bus):
    plain = {
        i: torch.full((i % 7 + 2,), i % 5).to([torch.float32, torch.bool, torch.bfloat16][i % 3]) for i in range(60)
    }
    for beside in (
        {},
        {"view": plain[0].view(-1)},
        {"array": np.ones(2)},
        {"grad": torch.ones(3, requires_grad=True) * 2},
    ):
        made = tree.to_torch(plain | beside, device="cuda:0", detach=True)
        for name, x in (plain | beside).items():
            assert np.array_equal(numbers(made[name]), numbers(x))
            assert tb.describe(made[name]).dtype == tb.describe(x).dtype
        assert "view" not in made or made["view"] is made[0]
    assert bus.ups == [60 * ALIGN] * 2 + [61 * ALIGN] * 2


@pytest.mark.parametrize("bad", [np.zeros(2, dtype="M8[s]"), np.zeros(50_000, dtype="M8[s]")])
def test_what_cannot_cross_is_refused_before_the_block_does(bad, bus):
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['bad'\]: "):
        tree.to_torch({**{str(i): np.zeros(3) for i in range(9)}, "bad": bad}, device="cuda:0")
    assert bus.ups == []


@pytest.mark.parametrize("leaf", [np.zeros(3, "f4"), np.zeros(40_000), torch.zeros(3)])
def test_leaf_that_is_alone_takes_the_road_of_an_array_alone(leaf, bus):
    with suppress(RuntimeError, AssertionError):  # which needs a device
        tree.to_torch({"x": leaf, "text": "x"}, device="cuda:0")
    assert bus.ups == []


def test_cast_after_the_bus_is_done_on_each_leaf(bus):
    result = tree.to_torch([np.arange(3, dtype="u1"), np.arange(4, dtype="u1")], device="cuda", dtype="float32")
    assert bus.ups == [2 * ALIGN]
    assert [t.dtype for t in result] == [torch.float32] * 2
    assert result[1].tolist() == [0, 1, 2, 3]


def test_pack_can_be_turned_off(bus):
    leaves = [np.zeros(3, "f4"), np.ones(3, "f4")]
    assert len(tree.plan(leaves, "torch", device="cuda:0").blocks) == 1
    assert tree.plan(leaves, "torch", device="cuda:0", pack=False).blocks == ()
    with suppress(RuntimeError, AssertionError):  # each by itself needs a device
        tree.to_torch(leaves, device="cuda:0", pack=False)
    assert bus.ups == []


def test_tensor_that_crosses_by_itself_is_asked_whether_it_is_pinned(bus, monkeypatch):
    tensors = [torch.zeros(3), torch.ones(3)]
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: t is tensors[1])
    plan = tree.plan(tensors, "torch", device="cuda:0", pack=False)
    assert ["pinned" in str(entry.plan) for entry in plan.leaves] == [False, True]


def test_plan_says_what_packing_adds(bus):
    leaves = {f"k{i}": np.full(64, i, "f4") for i in range(1000)}
    plan = tree.plan(leaves, "torch", device="cuda:0")
    (block,) = plan.blocks
    assert [step.op for step in plan.leaves[0].plan.steps] == ["share", "pack", "to_device"]
    assert plan.bytes_moved == 2 * 256 * 1000
    assert not plan.blocking
    assert str(plan).splitlines()[0] == "1000 arrays -> torch: 512 000 B moved, 1 transfer"
    assert f"into a block of {_pack.bytes_text(block.nbytes)} with 999 more: one transfer" in str(plan)
    with tb.trace() as seen:
        tree.to_torch(leaves, device="cuda:0")
    assert [event.steps for event in seen.events] == [entry.plan.steps for entry in plan.leaves]
    assert seen.totals.by_kind == {"h2h": 256_000, "h2d": 256_000}


def test_guard_against_what_packing_adds_leaves_leaves_alone(bus):
    leaves = [np.zeros(3, "f4"), np.ones(3, "f4")]
    with tb.copy_guard("error", kinds="h2h"):
        assert tree.plan(leaves, "torch", device="cuda:0").blocks == ()
    with tb.copy_guard("error", kinds="d2h"):
        assert len(tree.plan(leaves, "torch", device="cuda:0").blocks) == 1
        tree.to_torch(leaves, device="cuda:0")
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match=r"^batch\[0\]: "):
        tree.to_torch(leaves, device="cuda:0")
    assert len(bus.ups) == 1


def test_copy_false_counts_the_bus(bus):
    with pytest.raises(tb.CopyRequiredError, match=r"^batch\[0\]: to_torch\(device='cuda:0', copy=False\)"):
        tree.to_torch([np.zeros(3)] * 2, device="cuda:0", copy=False)


# -- A packed tensor stands alone


@pytest.fixture
def packed(bus):
    return tree.to_torch([np.full((4, 4), i, "f4") for i in range(3)], device="cuda:0")


def split_views() -> list[torch.Tensor]:
    return list(torch.arange(3.0).repeat_interleave(16).split(16))


def backward_through_neighbour(leaves: list[torch.Tensor]) -> torch.Tensor:
    weight = torch.ones(leaves[1].shape, requires_grad=True)
    loss = (weight * leaves[1]).sum()
    leaves[0].add_(100)
    loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_write_on_one_leaf_does_not_disturb_the_backward_of_its_neighbour(packed):
    assert torch.equal(backward_through_neighbour(packed), torch.ones(4, 4))
    assert packed[0][0, 0] == 100
    assert packed[1][0, 0] == 1


def test_views_that_share_a_version_counter_would_disturb_it():
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_through_neighbour(split_views())


@pytest.mark.parametrize("below", [True, False])
def test_packed_tensor_has_its_own_counter_and_no_base(below, bus, monkeypatch):
    """By torch's dispatch below autograd, and by `Tensor.data` where a torch does not offer that."""
    if not below:
        monkeypatch.delattr(torch._C, "_AutoDispatchBelowADInplaceOrView")
    packed = tree.to_torch([*(np.full((4, 4), i, "f4") for i in range(3)), np.zeros(2)], device="cuda:0")
    packed[0].zero_()
    packed[3].zero_()
    assert [t._version for t in packed] == [1, 0, 0, 1]
    assert all(t._base is None and t.is_leaf and t.is_contiguous() for t in packed)
    assert packed[1].requires_grad_().requires_grad
    assert not packed[2].requires_grad


def test_packed_tensor_lies_in_the_blocks_storage_so_that_record_stream_guards_it(packed):
    storages = {t.untyped_storage()._cdata for t in packed}
    assert len(storages) == 1
    assert packed[0].untyped_storage().resizable()
    assert packed[0].untyped_storage().nbytes() == 3 * ALIGN


def saved(t: torch.Tensor) -> int:
    buffer = io.BytesIO()
    torch.save(t, buffer)
    return buffer.tell()


def test_saving_a_packed_tensor_writes_its_block_which_is_capped(bus):
    up = tree.to_torch([np.zeros(2000, "f4") for _ in range(1200)], device="cuda:0")
    assert len(bus.ups) == 3
    assert max(t.untyped_storage().nbytes() for t in up) <= BLOCK
    assert saved(up[0]) <= BLOCK + 4096
    assert saved(up[0].clone()) <= 8000 + 4096


def test_block_dies_with_its_last_leaf(packed):
    gone = weakref.ref(packed[0].untyped_storage())
    last = packed.pop()
    packed.clear()
    assert gone() is not None
    del last
    assert gone() is None


# -- Down: leaves that say they are on a device, and a recorder


def down(tensors: list[torch.Tensor], want: Want) -> list[Any]:
    adapter = adapter_of(torch.Tensor)
    leaves = []
    for i, t in enumerate(tensors):
        traits = adapter.open(t, Want("torch"))[1]._replace(device=CUDA0)
        decision = decide(traits, want)
        assert decision.refusal is None
        recipe = _convert.Recipe(decision, _convert.compiled(decision.steps, traits, want), True)
        leaves.append(Leaf(i, t, Case(adapter, traits, want, recipe)))
    results: list[Any] = [None] * len(tensors)
    for block in _leaves.blocks_of(leaves):
        _leaves._cross(block, leaves, results)
    return results


TENSORS = {
    "float32": lambda: torch.rand(3, 5),
    "float32 again": lambda: torch.rand(3, 5),
    "float64": lambda: torch.rand(7, dtype=torch.float64),
    "zero-d": lambda: torch.tensor(3.0),
    "bool": lambda: torch.tensor([True, False]),
    "bfloat16": lambda: torch.rand(5).to(torch.bfloat16),
    "float8": lambda: torch.rand(5).to(torch.float8_e5m2),
    "uint16": lambda: torch.arange(5).to(torch.uint16),
    "uint64": lambda: torch.arange(5).to(torch.uint64),
    "complex": lambda: torch.rand(3, dtype=torch.complex64),
    "strided": lambda: torch.rand(6, 4)[::2],
    "in a graph": lambda: torch.rand(3, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.rand(2)),
}
DOWN = {
    "numpy": Want("numpy"),
    "numpy, read-only": Want("numpy", writable=False),
    "torch": Want("torch", CPU, detach=True),
    "float64": Want("numpy", dtype="float64"),
}


@pytest.mark.parametrize("name", DOWN)
def test_small_leaves_come_down_in_one_transfer_and_own_their_memory(name, bus):
    want = DOWN[name]
    tensors = [make() for make in TENSORS.values() if name != "float64" or make().dtype in (torch.float32, torch.bool)]
    results = down(tensors, want)
    assert len(bus.downs) == 1
    for t, result in zip(tensors, results, strict=True):
        wide = t.detach().to(torch.float64) if want.dtype else t
        assert np.array_equal(numbers(result), numbers(wide))
        assert tb.describe(result).dtype == tb.describe(wide).dtype
        assert tuple(result.shape) == tuple(t.shape)
        if want.framework == "numpy":
            assert isinstance(result, np.ndarray)
            assert result.flags.writeable == (want.writable is None)
            owner = result
            while owner.base is not None:
                owner = owner.base
            assert owner.nbytes <= max(result.nbytes, 8)
        else:
            assert result.untyped_storage().nbytes() == result.nbytes
            assert saved(result) < 4096


def test_plan_of_a_leaf_that_comes_down_says_every_move():
    steps = decide(ON_CUDA, Want("numpy")).steps
    info = tb.describe(torch.zeros(8))._replace(device=CUDA0)
    route = _pack.route(ON_CUDA, steps)
    (block,) = _pack.blocks([(route, (8,), [0, 1])])
    plan = _pack.planned(bind(steps, info, Want("numpy")), block)
    assert [(s.op, s.kind, s.nbytes) for s in plan.steps if s.kind] == [
        ("pack", "d2d", 32),
        ("to_host", "d2h", 32),
        ("copy", "h2h", 32),
    ]
    assert plan.bytes_moved == 96
    assert plan.blocking


# -- On a device


@pytest.mark.gpu
@pytest.mark.parametrize("to", ["torch", "cupy"])
def test_thousand_leaves_go_up_and_come_back(to):
    leaves = {f"k{i}": np.random.default_rng(i).random(512) for i in range(1000)} | {"text": "text"}
    there = getattr(tree, f"to_{to}")(leaves, device="cuda")
    back = tree.to_numpy(there)
    for name, x in leaves.items():
        assert back[name] is x if name == "text" else np.array_equal(back[name], x)
    assert len(tree.plan(there, "numpy").blocks) == 1


@pytest.mark.gpu
def test_every_dtype_goes_up_and_comes_back():
    source = sources()
    back = tree.to_numpy(tree.to_torch(source, device="cuda"))
    for name, x in source.items():
        assert back[name] is x if name == "text" else np.array_equal(numbers(back[name]), numbers(x)), name


@pytest.mark.gpu
def test_packed_leaves_are_kept_for_streams_they_are_used_on():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        leaves = tree.to_torch([np.full(1024, i, "f4") for i in range(8)], device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    address = leaves[0].untyped_storage().data_ptr()
    sum(t.sum() for t in leaves)  # the kernels are loaded
    torch.cuda._sleep(2_000_000_000)
    total = sum(t.sum() for t in leaves)
    tb.used_on(leaves[0], torch.cuda.current_stream())
    nbytes = leaves[0].untyped_storage().nbytes()
    del leaves
    with torch.cuda.stream(side):
        other = torch.full((nbytes,), 255, dtype=torch.uint8, device="cuda")
    assert other.data_ptr() != address
    assert total.item() == sum(range(8)) * 1024
