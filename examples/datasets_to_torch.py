"""Hugging Face datasets to torch: its Arrow format, so that every dtype stays what the dataset says it is.

Run: python examples/datasets_to_torch.py (needs datasets)
"""

import datasets
import numpy as np
import torch

import tensorbridge as tb

features = datasets.Features(
    {
        "image": datasets.Array2D((8, 8), "uint8"),
        "tokens": datasets.Sequence(datasets.Value("int32")),
        "y": datasets.Value("int16"),
    }
)
rows = 512
rng = np.random.default_rng(0)
dataset = datasets.Dataset.from_dict(
    {
        "image": rng.integers(0, 255, (rows, 8, 8), dtype=np.uint8),
        "tokens": rng.integers(0, 1000, (rows, 16), dtype=np.int32).tolist(),
        "y": rng.integers(0, 10, rows),
    },
    features=features,
)


def in_batches():
    """For training: batches of Arrow tables, converted ahead."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    total = 0
    for batch in tb.prefetch(dataset.with_format("arrow").iter(batch_size=64), device=device):
        total += batch["image"].sum(dtype=torch.int64)
    return {name: t.dtype for name, t in batch.items()}, int(total)


def transform(rows):
    """For a dataset that is indexed: a transform gets lists of Python objects, whose dtypes are to be said again."""
    return {"tokens": tb.to_torch(rows["tokens"], dtype="int32"), "y": tb.to_torch(rows["y"], dtype="int16")}


if __name__ == "__main__":
    with tb.trace() as seen:
        dtypes, total = in_batches()
    print(dtypes, total)
    print(f"in batches: {seen.totals.nbytes} bytes moved {seen.totals.by_kind}")
    with tb.trace() as seen:
        batch = dataset.with_transform(transform)[:64]
    print({name: (tuple(t.shape), t.dtype) for name, t in batch.items()})
    print(f"with_transform: {seen.totals.nbytes} bytes moved {seen.totals.by_kind}")
