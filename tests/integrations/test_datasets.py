"""Hugging Face datasets: the recipes of docs/pipelines.md, and what its own formatter changes without being asked."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tensorbridge as tb
from tensorbridge import tree

FEATURES = datasets.Features(
    {
        "image": datasets.Array2D((2, 3), "uint8"),
        "embedding": datasets.Sequence(datasets.Value("float32"), length=3),
        "tokens": datasets.Sequence(datasets.Value("int32")),
        "label": datasets.Value("int16"),
        "good": datasets.Value("bool"),
    }
)


@pytest.fixture
def dataset() -> Any:
    rows = range(6)
    return datasets.Dataset.from_dict(
        {
            "image": [np.full((2, 3), i, "u1") for i in rows],
            "embedding": [[i / 2] * 3 for i in rows],
            "tokens": [[i, i + 1] for i in rows],
            "label": list(rows),
            "good": [i % 2 == 0 for i in rows],
        },
        features=FEATURES,
    )


DTYPES = {
    "image": torch.uint8,
    "embedding": torch.float32,
    "tokens": torch.int32,
    "label": torch.int16,
    "good": torch.bool,
}


def assert_rows(batch: Any, rows: list[int]) -> None:
    assert {name: t.dtype for name, t in batch.items()} == DTYPES
    assert batch["image"].tolist() == [[[i] * 3] * 2 for i in rows]
    assert batch["embedding"].tolist() == [[i / 2] * 3 for i in rows]
    assert batch["tokens"].tolist() == [[i, i + 1] for i in rows]
    assert batch["label"].tolist() == rows
    assert batch["good"].tolist() == [i % 2 == 0 for i in rows]


def test_arrow_format_keeps_every_dtype(dataset):
    assert_rows(tree.to_torch(dataset.with_format("arrow")[1:4]), [1, 2, 3])


def test_numbers_of_the_arrow_format_are_shared(dataset):
    table = dataset.with_format("arrow")[:]
    shared = tree.plan(table, "torch", share_readonly=True)
    assert [leaf.plan.zero_copy for leaf in shared.leaves] == [True, True, True, True, False]
    assert tree.plan(table, "numpy").leaves[0].plan.zero_copy


def test_its_numpy_formatter_changes_dtypes_which_is_why_the_recipe_is_arrow(dataset):
    assert dataset.with_format("numpy")[0]["image"].dtype == np.int64


def batch_of(rows: Any) -> Any:
    """A transform gets a dict of lists of Python objects."""
    return {"label": tb.to_torch(rows["label"], dtype="int16"), "image": tb.to_torch(rows["image"], dtype="uint8")}


@pytest.mark.parametrize("how", ["with_transform", "set_transform"])
def test_transform_gives_tensors(dataset, how):
    made = getattr(dataset, how)(batch_of) or dataset
    batch = made[2:4]
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].tolist() == [[[i] * 3] * 2 for i in (2, 3)]
    assert made[1]["label"] == 1


def test_batches_are_prefetched(dataset):
    made = list(tb.prefetch(dataset.with_format("arrow").iter(batch_size=4), device="cpu"))
    assert_rows(made[0], [0, 1, 2, 3])
    assert_rows(made[1], [4, 5])


def test_streamed_batches_are_prefetched(dataset):
    stream = dataset.to_iterable_dataset(num_shards=2).with_format("arrow")
    made = list(tb.prefetch(stream.iter(batch_size=3), device="cpu"))
    assert_rows(made[1], [3, 4, 5])


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_collated_by_a_dataloader(dataset, workers):
    rows = dataset.with_format("numpy", columns=["embedding", "label"])
    loader = DataLoader(rows, batch_size=3, num_workers=workers, collate_fn=tb.collate)
    made = list(loader)
    assert [batch["embedding"].tolist() for batch in made] == [[[i / 2] * 3 for i in r] for r in ((0, 1, 2), (3, 4, 5))]
    assert made[0]["label"].tolist() == [0, 1, 2]


def test_missing_values_are_refused_by_column(dataset):
    holes = datasets.Dataset.from_dict({"x": [1.0, None, 2.0], "y": [1, 2, 3]})
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['x'\]: .*1 missing value"):
        tree.to_torch(holes.with_format("arrow")[:])


def test_ragged_rows_are_refused_by_column():
    ragged = datasets.Dataset.from_dict({"tokens": [[1, 2], [3]]})
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['tokens'\]: .*1 to 2 elements.*\n.*Pad"):
        tree.to_torch(ragged.with_format("arrow")[:])


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_a_column_says_how_it_is_read_at_once(dataset, format):
    x = dataset.with_format(format)["label"]
    for convert in (tb.to_numpy, tb.to_torch, lambda x: tb.to_torch([x])):
        with pytest.raises(tb.UnsupportedArrayError, match=r"Column cannot be converted: .*\nConvert x\[:\]\.$"):
            convert(x)
    assert tb.to_torch(x[:]).tolist() == list(range(6))
    with pytest.raises(tb.UnsupportedArrayError, match=r"^tree.to_torch: Column is not a contain.*\nConvert x\[:\]\.$"):
        tree.to_torch(x)


def test_a_dataset_says_how_it_is_a_tree(dataset):
    x = dataset
    with pytest.raises(
        tb.UnsupportedArrayError, match=r"^tree.to_torch: Dataset is not a container .*\nConvert its columns: "
    ) as e:
        tree.to_torch(x)
    call = str(e.value).rpartition("columns: ")[2].removesuffix(".")
    assert eval(call, {"x": x, "tensorbridge": tb})["label"].tolist() == list(range(6))


def test_a_dataset_says_how_its_columns_are_converted(dataset):
    with pytest.raises(tb.UnsupportedArrayError, match="Dataset cannot be converted") as caught:
        tb.to_torch(dataset)
    cure = str(caught.value).partition("\nConvert its columns: ")[2].removesuffix(".")
    assert_rows(eval(cure, {"tensorbridge": tb, "x": dataset}), list(range(6)))


def test_lazy_rows_of_map_stay_what_they_are(dataset):
    kinds: list[Any] = []

    def function(row: Any) -> Any:
        made = tree.to_torch(row)
        kinds.append((type(made) is type(row), type(made["embedding"])))
        return {}

    dataset.with_format("numpy", columns=["embedding"]).map(function)
    assert kinds == [(True, torch.Tensor)] * 6
