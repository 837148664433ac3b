"""JAX beside torch: a JAX function inside a torch pipeline, and back, with the bytes that cross.

JAX arrays are immutable: torch gets a copy, or shares on your word that nobody writes. Run: python
examples/jax_beside_torch.py (needs jax)
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import torch

import tensorbridge as tb


@jax.jit
def features(batch):
    x = batch["x"]
    return {"x": (x - x.mean()) / x.std(), "y": batch["y"]}


if __name__ == "__main__":
    torch.manual_seed(0)
    batches = [{"x": torch.randn(256, 16), "y": torch.arange(256, dtype=torch.int32)} for _ in range(8)]

    def through_jax(batch):
        return features({name: jnp.asarray(a) for name, a in tb.tree.to_numpy(batch).items()})

    with tb.trace() as seen:
        for batch in tb.prefetch(batches, device="cpu", transform=through_jax):
            batch["x"].mul_(2)  # a copy: JAX's own array is untouched
    print(f"to torch, as copies: {seen.totals.nbytes} bytes moved {seen.totals.by_kind}")

    made = through_jax(batches[0])
    with tb.trace() as seen:
        shared = tb.tree.to_torch(made, share_readonly=True)
    assert tb.shares_memory(shared["x"], made["x"])
    print(f"to torch, shared: {seen.totals.nbytes} bytes moved, mean {shared['x'].mean():.3f}")
    print(tb.tree.plan(made, "torch"))
