"""docs/pipelines.md: its excerpts are in the scripts, all else is a session, and the script that needs nothing but the
test environment runs. (The others run in tests/integrations, the sessions in test_docs.)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pipelines.md").read_text()
EXCERPTS = re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("source", "code"), EXCERPTS)
def test_excerpt_is_in_its_script(source, code):
    assert code in (ROOT / source).read_text()


def test_every_other_block_is_a_session():
    assert PAGE.count("```python\n") == len(EXCERPTS)
    assert PAGE.count("```pycon\n>>> ") == PAGE.count("```pycon\n") >= 8


def test_every_example_is_on_the_page():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert {Path(source).name for source, _ in EXCERPTS} == scripts


def test_training_on_the_digits_runs_and_says_what_moved():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "dataloader_digits.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"accuracy ([\d.]+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy.group(1)) > 0.8
    assert "1517472 bytes moved {'h2h': 1517472}" in done.stdout
