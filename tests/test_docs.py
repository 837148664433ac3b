"""The pages are run: their sessions as doctests, their tables and pictures against what the code gives today."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tensorbridge._commands import _why_detach

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_sessions_on_the_page_give_what_it_prints(page):
    failed, _ = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize(
    ("name", "runs"), [("result-runs", _why_detach.result_runs), ("input-runs", _why_detach.input_runs)]
)
def test_tables_of_runs_are_what_the_runs_give(name, runs):
    page = (ROOT / "docs" / "why-detach.md").read_text()
    written = page.split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0]
    assert written == _why_detach.table(runs()) + "\n"


def test_picture_of_the_graph_is_current(tmp_path):
    _why_detach.figure(tmp_path / "why-detach.svg")
    assert (tmp_path / "why-detach.svg").read_text() == (ROOT / "docs" / "why-detach.svg").read_text()


def test_runs_show_a_wrong_gradient_only_where_nobody_is_asked():
    wrong = [run.write for run in _why_detach.result_runs() + _why_detach.input_runs() if "wrong" in run.outcome]
    assert wrong == [
        "`y.detach().numpy()[:] = 0`",
        "`with torch.no_grad(): y.numpy()[:] = 0`",
        "`batch.numpy()[:] = 0`",
    ]


def test_every_guarantee_names_a_test_that_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(test_[a-zA-Z_0-9]+)`", page)
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^ *def (test_[a-zA-Z_0-9]+)\(", sources, re.MULTILINE))
    assert len(named) > 40
    assert [name for name in named if name not in there] == []
