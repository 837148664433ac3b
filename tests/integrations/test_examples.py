"""The example pipelines run as they stand, and say how many bytes they moved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SAID = {
    "arrow_to_torch.py": [
        "whole table, shared: 100000 bytes moved",
        "stream, copied: 1900000 bytes moved {'h2h': 1900000}",
    ],
    "datasets_to_torch.py": [
        "in batches: 66560 bytes moved",
        "'image': torch.uint8",
        "with_transform: 4224 bytes moved",
    ],
    "jax_beside_torch.py": ["as copies: 139264 bytes moved {'h2h': 139264}", "shared: 0 bytes moved"],
}


@pytest.mark.parametrize("name", SAID)
def test_example_runs_and_says_what_moved(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in SAID[name]), done.stdout
