"""`python -m tensorbridge demo`: the handwritten digits of scikit-learn, from NumPy through torch and back."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import tensorbridge as tb
from tensorbridge._step import bytes_text

SIZES = (64, 4 << 10, 256 << 10, 16 << 20, 128 << 20)  # bytes
EPOCHS = 60


def main() -> int:
    packages = {"torch": "torch", "sklearn": "scikit-learn"}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    digits()
    copy_against_share()
    return 0


def digits() -> None:
    import torch
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels / 16.0
    print(f"1797 handwritten digits of 8 x 8 pixels, {pixels.dtype}, {bytes_text(pixels.nbytes)}, in NumPy.\n")
    with tb.trace() as seen:
        show("The pixels go to torch", pixels, "torch")
        x = tb.to_torch(pixels)
        y = tb.to_torch(labels)
        assert tb.shares_memory(x, pixels)

        torch.manual_seed(0)
        shuffled = torch.randperm(len(x))
        train, test = shuffled[:1400], shuffled[1400:]
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for epoch in range(EPOCHS):
            loss = torch.nn.functional.cross_entropy(model(x[train]), y[train])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress(f"training: epoch {epoch + 1} of {EPOCHS}, loss {loss.item():.3f}")
        progress("")

        logits = model(x[test])
        show("The outputs come back to NumPy, with the graph still on them", logits, "numpy")
        scores = tb.to_numpy(logits)
        assert not scores.flags.writeable
        try:
            scores[0] = 0
        except ValueError as error:
            print(f"Writing into them would corrupt the gradients, so NumPy refuses: ValueError: {error}\n")
        predicted = scores.argmax(axis=1)
        expected = tb.to_numpy(y[test])
        if importlib.util.find_spec("cupy") and torch.cuda.is_available():
            show("The outputs go to CuPy", logits, "cupy")
            tb.to_cupy(logits)
        else:
            print("There is no GPU here; on one, the outputs would go to CuPy so:")
            show("", logits, "cupy")
        show("A mirror image of the digits cannot be shared, and the plan says why", pixels[:, ::-1], "torch")
        tb.to_torch(pixels[:, ::-1])
    totals = seen.totals
    print(seen.report(), end="\n\n")
    print(f"Accuracy on {len(test)} digits it has not seen: {np.mean(predicted == expected):.1%}.")
    print(f"Bytes moved by {totals.conversions} conversions: {bytes_text(totals.nbytes)}.\n")


def show(what: str, x: Any, to: Any) -> None:
    if what:
        print(f"{what}: tb.plan(x, {to!r})")
    print("  " + str(tb.plan(x, to)).replace("\n", "\n  "), end="\n\n")


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and text.split()[2] in ("1", str(EPOCHS)):
        print(text, file=sys.stderr, flush=True)


def copy_against_share() -> None:
    import torch

    print("What a copy costs against shared memory on this machine: the median of one call, in microseconds.\n")
    columns: dict[str, Callable[[Any, Any], Any]] = {
        "tb.to_torch(a)": lambda a, t: tb.to_torch(a),
        "torch.as_tensor(a)": lambda a, t: torch.as_tensor(a),
        "tb.to_torch(a, copy=True)": lambda a, t: tb.to_torch(a, copy=True),
        "torch.tensor(a)": lambda a, t: torch.tensor(a),
        "tb.to_numpy(t)": lambda a, t: tb.to_numpy(t),
        "t.detach().cpu().numpy()": lambda a, t: t.detach().cpu().numpy(),
    }
    print("  ".join([f"{'bytes':>12}", *columns]))
    for nbytes in SIZES:
        progress(f"timing: size {bytes_text(nbytes)}")
        np.ones(5 * nbytes, "uint8")  # as much as the copies need: a virtual machine may first be given it by its host
        a = np.random.default_rng(0).random(nbytes // 8)
        t = torch.rand(nbytes // 8, dtype=torch.float64)
        times = measured({name: partial(way, a, t) for name, way in columns.items()}, nbytes)
        progress("")
        cells = [f"{times[name] * 1e6:.1f}".rjust(len(name)) for name in columns]
        print("  ".join([f"{bytes_text(nbytes):>12}", *cells]))
    print(
        "\nShared crossings cost the same at every size. `python -m tensorbridge bench` measures all of it with care."
    )


def measured(ways: dict[str, Callable[[], Any]], nbytes: int) -> dict[str, float]:
    """Median seconds of a call, ways interleaved; what each made last is kept, so that fresh memory is really fresh."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    kept: dict[str, Any] = {}
    for _ in range(9):
        for name, way in ways.items():
            copies = name.startswith(("torch.tensor", "tb.to_torch(a, copy"))
            calls = max(1, min(200, (1 << 20) // nbytes)) if copies else 200
            began = time.perf_counter()
            for _ in range(calls):
                kept[name] = way()
            samples[name].append((time.perf_counter() - began) / calls)
    return {name: sorted(taken)[len(taken) // 2] for name, taken in samples.items()}
