"""Trees and loops of batches across the bus. Run only with ``--device cuda``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tensorbridge._bench._cuda import CUDA, cuda_event, pinned, rows_over, warmed_up
from tensorbridge._bench._rows import (
    FRESH,
    MIB,
    NONE,
    POOL,
    Case,
    Goal,
    Question,
    Row,
    Way,
    expect,
    random_array,
    same_values,
)
from tensorbridge._bench._trees import leaves_of

# -- C4: a tree across the bus

LEAVES, LEAF = 1000, 1024  # float32: 4 KiB


def _tree_case(to_device: bool) -> Case:
    import torch

    import tensorbridge as tb

    warmed_up(16 * MIB)
    block = random_array("float32", LEAVES, LEAF)
    host = {f"leaf{i}": row.copy() for i, row in enumerate(block)}
    x = host if to_device else {k: torch.from_numpy(v).to(CUDA) for k, v in host.items()}
    b = torch.from_numpy(block)
    names = {"tree": tb.tree, "tb": tb, "torch": torch, "cuda": CUDA, "x": x, "b": b if to_device else b.to(CUDA)}

    def pinned_loop(tree: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for key, leaf in tree.items():
            made[key] = pinned(LEAF).copy_(leaf, non_blocking=True)
        torch.cuda.synchronize()
        return {key: leaf.numpy() for key, leaf in made.items()}

    names["pinned_loop"] = pinned_loop
    if to_device:
        ways = (
            Way("tensorbridge", "tree.to_torch(x, device=cuda)", "bridge", POOL),
            Way("one call a leaf", "{k: torch.from_numpy(v).to(cuda) for k, v in x.items()}", "baseline", POOL),
            Way(
                "pinned, without waiting",
                "{k: torch.from_numpy(v).pin_memory().to(cuda, non_blocking=True) for k, v in x.items()}",
                "baseline", POOL,
            ),
            Way("1000 views of one block", "dict(zip(x, b.to(cuda).unbind()))", "limit", POOL),
        )  # fmt: skip
    else:
        ways = (
            Way("tensorbridge", "tree.to_numpy(x)", "bridge", FRESH),
            Way("one call a leaf", "{k: v.cpu().numpy() for k, v in x.items()}", "baseline", FRESH),
            Way("pinned, without waiting", "pinned_loop(x)", "baseline", FRESH),
            Way("1000 views of one block", "dict(zip(x, b.cpu().numpy()))", "limit", FRESH),
        )

    def check(way: Way, result: Any) -> None:
        torch.cuda.synchronize()
        pairs = list(zip(leaves_of(host), leaves_of(result), strict=True))
        expect(len(pairs) == LEAVES, f"{len(pairs)} leaves")
        expect(all(same_values(a, b) for a, b in pairs), f"{way.name}: other values")

    goals = (Goal("C4", ("one call a leaf",), "speed", 8.0, 10.0),)
    return Case(ways, names, check, block.nbytes, goals, torch.cuda.synchronize)


# -- C6: a loop over batches

BATCHES = 12
SIDE = 2048  # of the matrices whose product is the work


def _loop(nbytes: int) -> Case:
    import torch

    import tensorbridge as tb

    warmed_up(nbytes)
    batches = [random_array("float32", nbytes // 4) + i for i in range(BATCHES)]
    names = {
        "torch": torch, "prefetch": tb.prefetch, "batches": batches, "cuda": CUDA,
        "loader": torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=True),  # type: ignore[arg-type]
        "resident": [torch.from_numpy(batch).to(CUDA) for batch in batches[:2]] * (BATCHES // 2),
        "pinned": [pinned(nbytes // 4) for _ in range(2)] * (BATCHES // 2), "d": torch.empty(nbytes // 4, device=CUDA),
        "computed": computed, "work": _work(0.003),
    }  # fmt: skip
    ways = (
        Way("tensorbridge", "computed(prefetch(batches, device=cuda), work)", "bridge", POOL),
        Way("serial loop", "computed((torch.from_numpy(a).to(cuda) for a in batches), work)", "baseline", POOL),
        Way("DataLoader", "computed((t.to(cuda, non_blocking=True) for t in loader), work)", "baseline", POOL),
        Way("compute alone", "computed(resident, work)", "limit", NONE),
        Way("transfer alone", "[d.copy_(p, non_blocking=True) for p in pinned]", "limit", NONE),
    )

    def check(way: Way, result: Any) -> None:
        if way.state == POOL:
            expect(same_values(result, batches[-1]), f"{way.name}: other values in the last batch")

    goals = (Goal("C6", ("compute alone", "transfer alone"), "speed", 0.9, slowest=True),)
    return Case(ways, names, check, nbytes * BATCHES, goals, torch.cuda.synchronize)


def computed(batches: Any, work: Callable[[Any], None]) -> Any:
    """Work on each batch; returns the last one."""
    for batch in batches:
        work(batch)
    return batch


def _work(seconds: float) -> Callable[[Any], None]:
    """Work for the device that takes about `seconds`, and reads the batch."""
    import torch

    a = torch.rand(SIDE, SIDE, device=CUDA)
    begin, end = (cuda_event(enable_timing=True) for _ in range(2))
    for event in (begin, begin, end):  # the first turn warms up
        event.record()
        for _ in range(20):
            a @ a
    end.synchronize()
    times = max(1, round(seconds * 1e3 / (begin.elapsed_time(end) / 20)))

    def work(batch: Any) -> None:
        batch.sum()
        for _ in range(times):
            a @ a

    return work


QUESTIONS = (
    Question(
        "C4",
        "What does a tree of 1000 arrays of 4 KiB cost across the bus?",
        "One call for the tree, one call a leaf, and a loop over page-locked leaves that waits once.",
        lambda scope: [
            Row("host to device", partial(_tree_case, True)),
            Row("device to host", partial(_tree_case, False)),
        ],
        "cuda",
    ),
    Question(
        "C6",
        "Does prefetch hide the transfer behind the work?",
        f"A loop over {BATCHES} batches in ordinary memory, 3 ms of work each; all of it until the device is idle.",
        rows_over(_loop, 16 * MIB, 64 * MIB),
        "cuda",
    ),
)
