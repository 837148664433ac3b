"""Arrow tables to torch: what is shared, what is copied and why, and a stream of record batches converted ahead.

Run: python examples/arrow_to_torch.py (needs pyarrow)
"""

import numpy as np
import pyarrow as pa

import tensorbridge as tb

rng = np.random.default_rng(0)
table = pa.table(
    {
        "features": pa.FixedSizeListArray.from_arrays(rng.random(4 * 100_000, dtype=np.float32), 4),
        "label": rng.integers(0, 10, 100_000, dtype=np.int16),
        "seen": rng.random(100_000) < 0.5,
    }
)


def whole_table():
    """Arrow memory is immutable, and a tensor cannot be: numbers are copied, unless you say that nobody will write."""
    print(tb.tree.plan(table, "torch", share_readonly=True))
    columns = tb.tree.to_torch(table, share_readonly=True)
    return {name: (tuple(t.shape), t.dtype) for name, t in columns.items()}


def stream_of_batches():
    """Every batch is converted by a thread while the one before is used."""
    mean, rows = 0.0, 0
    for batch in tb.prefetch(table.to_batches(max_chunksize=10_000), device="cpu", depth=2):
        mean += batch["features"].mean(dim=1).sum().item()
        rows += len(batch["label"])
    return mean / rows


if __name__ == "__main__":
    with tb.trace() as seen:
        print(whole_table())
    print(f"whole table, shared: {seen.totals.nbytes} bytes moved (truths are single bits in Arrow)\n")
    with tb.trace() as seen:
        print(f"mean {stream_of_batches():.3f}")
    print(f"stream, copied: {seen.totals.nbytes} bytes moved {seen.totals.by_kind}")
