"""docs/api.md is what the signatures and docstrings give, and its links lead somewhere. (Its sessions: test_docs.)"""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import tensorbridge as tb

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"


@pytest.fixture
def api_page() -> Any:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_docstrings_give(api_page):
    assert PAGE.read_text(encoding="utf-8") == api_page.page(), "run: python docs/api_page.py"


@pytest.mark.parametrize("home", [tb.to_torch, tb.tree.plan, tb.copy_guard, tb.GraphError, tb.Trace.save, tb.Plan])
def test_a_docstring_that_changed_makes_the_page_stale(api_page, monkeypatch, home):
    before = api_page.page()
    monkeypatch.setattr(home, "__doc__", f"Changed.\n\n{inspect.getdoc(home)}")
    assert api_page.page() != before


def test_a_default_that_changed_is_in_the_signature_and_in_the_table(api_page, monkeypatch):
    monkeypatch.setitem(inspect.unwrap(tb.to_torch).__kwdefaults__, "detach", None)
    text = api_page.page()
    assert "share_readonly=False, detach=None" in text
    assert re.search(r"^\| `detach` \|.* `None` \|", text, re.MULTILINE)


def test_a_public_name_without_a_place_is_not_passed_over(api_page, monkeypatch):
    monkeypatch.setattr(tb, "__all__", [*tb.__all__, "to_jax"])
    with pytest.raises(LookupError, match="to_jax"):
        api_page.page()


def test_check_says_that_the_page_is_stale_and_leaves_it(api_page, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(api_page, "PAGE", tmp_path / "api.md")
    assert api_page.main(check=True) == 1
    assert not (tmp_path / "api.md").exists()
    assert api_page.main(check=False) == 0
    assert api_page.main(check=True) == 0
    assert (tmp_path / "api.md").read_bytes() == PAGE.read_bytes()
    assert capsys.readouterr().out.splitlines()[0] == "not what the docstrings give: api.md"


def test_links_within_the_page_lead_to_its_headings():
    text = PAGE.read_text(encoding="utf-8")
    headings = [re.sub(r"[^\w -]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    anchors = [heading.replace(" ", "-") for heading in headings]
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(set(anchors)) == len(anchors)  # GitHub would number the second
    assert links <= set(anchors)
    assert len(links) > 40


def test_every_option_of_the_conversions_is_in_the_table(api_page):
    has = {p.name for name in ("to_numpy", "to_torch", "to_cupy") for p in parameters(name) if p.kind is p.KEYWORD_ONLY}
    assert has == set(api_page.OPTIONS)


def parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(tb, name)).parameters.values())
