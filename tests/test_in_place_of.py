"""README's table of lines that people write and of ours: each pair is run, and what is different is seen."""

import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import tensorbridge as tb

README = Path(__file__).parents[1] / "README.md"


def rows() -> list[tuple[str, str]]:
    table = README.read_text(encoding="utf-8").split("| now | here | what is different |")[1].split("\n\n")[0]
    return [(cells[1].strip(), cells[2].strip()) for cells in (line.split("|") for line in table.splitlines()[2:])]


def run(line: str, **names: Any) -> Any:
    """Run a line of the table, as it stands there."""
    return eval(line.strip("`"), {"tb": tb, "torch": torch, "np": np, **names})


def to_numpy(now: str, here: str) -> None:
    t = torch.ones(3, requires_grad=True)
    by_hand, ours = run(now, t=t), run(here, t=t)
    assert np.array_equal(by_hand, ours)
    assert by_hand.flags.writeable
    assert not ours.flags.writeable
    assert run(here, t=t.detach()).flags.writeable
    for dtype in (torch.bfloat16, torch.float8_e5m2):
        with pytest.raises(TypeError):
            run(now, t=t.detach().to(dtype))
        assert run(here, t=t.detach().to(dtype)).dtype == getattr(ml_dtypes, str(dtype).removeprefix("torch."))


def to_torch(now: str, here: str) -> None:
    a = np.arange(3.0)
    for line in now.split(", "):
        assert run(line, a=a).tolist() == run(here, a=a).tolist()
        assert tb.shares_memory(a, run(line, a=a))
        for refused in (a[::-1], a.astype(">f8")):
            with pytest.raises((ValueError, TypeError)):
                run(line, a=refused)
        with warnings.catch_warnings(record=True) as told:  # torch tells it once a process
            warnings.simplefilter("always")
            read_only = a[:]
            read_only.flags.writeable = False
            assert tb.shares_memory(read_only, run(line, a=read_only))
        assert len(told) <= 1
    assert tb.shares_memory(a, run(here, a=a))
    for copied in (a[::-1], a.astype(">f8"), read_only):
        assert run(here, a=copied).tolist() == copied.tolist()
        assert not tb.shares_memory(copied, run(here, a=copied))


def copied(now: str, here: str) -> None:
    a = np.arange(3.0)
    assert torch.equal(run(now, a=a), run(here, a=a))
    assert not tb.shares_memory(a, run(here, a=a))
    assert (run(now, a=[1.5]).dtype, run(here, a=[1.5]).dtype) == (torch.float32, torch.float64)


def whole_batches(now: str, here: str) -> None:
    a = np.ones(3)
    made = run(here, batch={"x": a, "deep": [{"again": a}]})
    assert made["x"] is made["deep"][0]["again"]
    assert tb.shares_memory(made["x"], a)


def by_kind(now: str, here: str) -> None:
    batch = {"x": np.ones(2), "label": np.arange(2), "mask": np.array([True, False])}
    dtypes = [x.dtype for x in run(here, batch=batch).values()]
    assert dtypes == [torch.float32, torch.int64, torch.bool]


def collated(now: str, here: str) -> None:
    default_collate = torch.utils.data.default_collate
    samples = [{"x": np.ones(2), "y": i} for i in range(3)]
    theirs, ours = default_collate(samples), run(here)(samples)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    with pytest.raises(tb.UnsupportedArrayError, match=r"batch\['x'\]: sample 0 has shape \(2,\), sample 1 has \(3,\)"):
        run(here)([{"x": np.ones(2)}, {"x": torch.ones(3)}])


HELD: dict[tuple[str, str], Any] = {
    ("`t.detach().cpu().numpy()`", "`tb.to_numpy(t)`"): to_numpy,
    ("`torch.from_numpy(a)`, `torch.as_tensor(a)`", "`tb.to_torch(a)`"): lambda now, here: to_torch(
        now.replace("`", ""), here
    ),
    ("`torch.tensor(a)`", "`tb.to_torch(a, copy=True)`"): copied,
    ("`{k: torch.as_tensor(v) ...}` by hand", "`tb.tree.to_torch(batch)`"): whole_batches,
    (
        "`.float()` of some of a batch",
        '`tb.tree.to_torch(batch, dtype={"real floating": "float32"})`',
    ): by_kind,
    ("`default_collate`", "`tb.collate`"): collated,
}
# Rows whose difference needs a device: tests/gpu has what they say.
ON_A_DEVICE = {
    ('`torch.from_numpy(a).to("cuda")`', '`tb.to_torch(a, device="cuda")`'),
    ("`DataLoader(pin_memory=True)`, `.to(device, non_blocking=True)`", "`tb.prefetch(loader)`"),
    ('`cupy.asarray(t)`, `torch.as_tensor(c, device="cuda")`', "`tb.to_cupy(t)`, `tb.to_torch(c)`"),
}


def test_every_row_is_held():
    assert set(rows()) == HELD.keys() | ON_A_DEVICE


@pytest.mark.parametrize("row", HELD, ids=lambda row: row[1])
def test_what_the_row_says(row):
    HELD[row](*row)
