"""What a tree of many small arrays costs: one call for all of it, against one call a leaf in a comprehension."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from tensorbridge._bench._rows import (
    FRESH,
    REUSED,
    SHARED,
    Case,
    Goal,
    Question,
    Row,
    Scope,
    Way,
    expect,
    random_array,
    same_values,
)

LEAVES = 1000
LEAF = (16, 16)  # float32: 1 KiB


def flat() -> dict[str, Any]:
    return {f"leaf{i}": a for i, a in enumerate(random_array("float32", LEAVES, *LEAF).copy())}


def owned(tree: dict[str, Any]) -> dict[str, Any]:
    """The same values, each leaf with memory of its own."""
    return {key: leaf.copy() for key, leaf in tree.items()}


def nested(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Ten samples, each a dict with a tuple, as a data set hands them out."""
    leaves = list(tree.values())
    return [
        {"image": part[0], "label": i, "boxes": tuple(part[1:50]), "more": {"masks": part[50:]}}
        for i, part in enumerate(leaves[i : i + LEAVES // 10] for i in range(0, LEAVES, LEAVES // 10))
    ]


def few() -> dict[str, Any]:
    return owned(dict(list(flat().items())[:5]))


def leaves_of(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves_of(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves_of(value)]
    return [] if isinstance(tree, int) else [tree]


def tree_check(source: Any, count: int = LEAVES) -> Callable[[Way, Any], None]:
    def check(way: Way, result: Any) -> None:
        import tensorbridge as tb

        pairs = list(zip(leaves_of(source), leaves_of(result), strict=True))
        expect(len(pairs) == count, f"{len(pairs)} leaves")
        expect(all(same_values(a, b) for a, b in pairs), f"{way.name}: other values")
        expect(all(tb.shares_memory(a, b) == (way.state == SHARED) for a, b in pairs), f"{way.name}: not {way.state}")

    return check


def samples(count: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a data set gives a DataLoader: each sample with memory of its own."""
    return [{"image": a.copy(), "label": i} for i, a in enumerate(random_array("float32", count, *shape))]


def batch_check(given: list[dict[str, Any]]) -> Callable[[Way, Any], None]:
    def check(way: Way, result: Any) -> None:
        images = result["image"]
        expect(list(result["label"]) == [sample["label"] for sample in given], f"{way.name}: other labels")
        expect(len(images) == len(given), f"{way.name}: {len(images)} images")
        pairs = zip(images, (sample["image"] for sample in given), strict=True)
        expect(all(same_values(a, b) for a, b in pairs), f"{way.name}: other values")

    return check


def with_modules() -> dict[str, Any]:
    import torch

    import tensorbridge as tb

    default_convert = import_module("torch.utils.data").default_convert
    return {"tree": tb.tree, "tb": tb, "torch": torch, "default_convert": default_convert}


COPIED = Goal("B3", ("torch.tensor, leaf by leaf",), "speed", 2.2)
COPIED_BEST = Goal("B3", ("from_numpy of a copy, leaf by leaf",), "speed", 0.65)
SHARES = Goal("B3", ("from_numpy, leaf by leaf",), "speed", 0.5)


def _rows(scope: Scope) -> list[Row]:
    nbytes = LEAVES * LEAF[0] * LEAF[1] * 4

    def copied() -> Case:
        names = with_modules() | {"x": owned(flat())}
        ways = (
            Way("tensorbridge", "tree.to_torch(x, copy=True)", "bridge", FRESH),
            Way(
                "torch.tensor, leaf by leaf", "{k: torch.tensor(v) for k, v in x.items()}", "baseline", FRESH,
                unlike="it knows that all of it is one flat dict, and that no array comes twice",
            ),
            Way(
                "from_numpy of a copy, leaf by leaf", "{k: torch.from_numpy(v.copy()) for k, v in x.items()}", "limit",
                FRESH,
            ),
        )  # fmt: skip
        return Case(ways, names, tree_check(names["x"]), nbytes, (COPIED, COPIED_BEST))

    def shared() -> Case:
        names = with_modules() | {"x": owned(flat())}
        ways = (
            Way("tensorbridge", "tree.to_torch(x)", "bridge", SHARED),
            Way("torch's default_convert", "default_convert(x)", "baseline", SHARED),
            Way("to_torch, leaf by leaf", "{k: tb.to_torch(v) for k, v in x.items()}", "bridge", SHARED),
            Way("from_numpy, leaf by leaf", "{k: torch.from_numpy(v) for k, v in x.items()}", "limit", SHARED),
        )
        return Case(ways, names, tree_check(names["x"]), 0, (SHARES,))

    def to_numpy() -> Case:
        names = with_modules()
        names["x"] = {k: names["torch"].from_numpy(v) for k, v in owned(flat()).items()}
        ways = (
            Way("tensorbridge", "tree.to_numpy(x)", "bridge", SHARED),
            Way("by hand, leaf by leaf", "{k: v.detach().cpu().numpy() for k, v in x.items()}", "baseline", SHARED),
        )
        return Case(ways, names, tree_check(names["x"]))

    def deep() -> Case:
        names = with_modules() | {"x": nested(owned(flat()))}
        names["tree_map"] = import_module("torch.utils._pytree").tree_map
        names["leaf"] = lambda v: v if isinstance(v, int) else names["torch"].from_numpy(v)
        ways = (
            Way("tensorbridge", "tree.to_torch(x)", "bridge", SHARED),
            Way("torch's tree_map of from_numpy", "tree_map(leaf, x)", "baseline", SHARED),
        )
        return Case(ways, names, tree_check(names["x"]))

    def small() -> Case:
        names = with_modules() | {"x": few()}
        ways = (
            Way("tensorbridge", "tree.to_torch(x)", "bridge", SHARED),
            Way("torch's default_convert", "default_convert(x)", "baseline", SHARED),
            Way("from_numpy, leaf by leaf", "{k: torch.from_numpy(v) for k, v in x.items()}", "limit", SHARED),
        )
        return Case(ways, names, tree_check(names["x"], 5))

    def small_cast() -> Case:
        names = with_modules() | {"x": few()}
        names["casts"] = {"real floating": "float16"}
        ways = (
            Way("tensorbridge", "tree.to_torch(x, dtype=casts)", "bridge", REUSED),
            Way("torch's, leaf by leaf", "{k: torch.from_numpy(v).half() for k, v in x.items()}", "limit", REUSED),
        )
        return Case(ways, names, tree_check({k: v.astype("float16") for k, v in names["x"].items()}, 5))

    def small_filled() -> Case:
        names = with_modules() | {"x": few()}
        names["w"] = {k: names["torch"].empty(v.shape) for k, v in names["x"].items()}
        ways = (
            Way("tensorbridge", "tree.to_torch(x, out=w)", "bridge", REUSED),
            Way(
                "torch's, leaf by leaf", "{k: w[k].copy_(torch.from_numpy(v)) for k, v in x.items()}", "limit", REUSED,
                unlike="it writes some before another is refused, and asks of none whether it overlaps another",
            ),
        )  # fmt: skip
        return Case(ways, names, tree_check(names["x"], 5))

    def collated(count: int, shape: tuple[int, ...]) -> Case:
        names = with_modules() | {"x": samples(count, shape)}
        names["default_collate"] = import_module("torch.utils.data").default_collate
        ways = (
            Way("tensorbridge", "tb.collate(x)", "bridge", REUSED),
            Way("torch's default_collate", "default_collate(x)", "baseline", REUSED),
        )
        return Case(ways, names, batch_check(names["x"]))

    return [
        Row("flat dict, copied to torch", copied),
        Row("flat dict, shared with torch", shared),
        Row("flat dict, shared with NumPy", to_numpy),
        Row("list of dicts with tuples and dicts, shared with torch", deep),
        Row("dict of 5 arrays, shared with torch", small),
        Row("dict of 5 arrays, cast by kind", small_cast),
        Row("dict of 5 arrays, into tensors", small_filled),
        Row("64 samples of (3, 32, 32) and a label, collated", partial(collated, 64, (3, 32, 32))),
        Row("256 samples of (8,) and a label, collated", partial(collated, 256, (8,))),
    ]


QUESTIONS = (
    Question(
        "B3",
        "What does a tree of many small arrays cost?",
        "1000 float32 arrays of 1 KiB (where no other number is said), each with memory of its own. The comprehensions "
        "know that the tree is a flat dict; tree.to_torch finds that out, keeps every container's type, and keeps "
        "shared leaves shared.",
        _rows,
    ),
)
