"""What the benchmark writes and says: the report, the file, the comparison, and how it ends."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensorbridge._bench import _command, _compare, _machine, _plots, _report, _results
from tensorbridge._bench._measure import Settings, Timing
from tensorbridge._bench._results import Result, Run
from tensorbridge._bench._rows import Case, Goal, Question, Row, Scope, Unavailable, Way, WrongResult

ROOT = Path(__file__).parent.parent
MACHINE = {"CPU": "Some CPU", "cores": "2 of 2 usable", "GPU": "no CUDA device", "torch": "2", "NumPy": "2"}
SETTINGS = {**Settings()._asdict(), "quick": False, "command": "`python -m tensorbridge bench`"}


def timed(name: str, ns: float, role: str = "baseline", scatter: float = 0.01) -> Timing:
    return Timing(Way(name, f"{name.replace(' ', '_')}(x)", role), 10, tuple(ns * (1 + scatter * i) for i in range(7)))


def row(ours: float, theirs: float, *, title: str = "row", bound: float = 0.85, scatter: float = 0.01) -> Result:
    timings = (
        timed("tensorbridge", ours, "bridge", scatter),
        timed("by hand", theirs),
        timed("limit", 0.5 * theirs, "limit"),
    )
    return Result("A1", title, "cpu", 64, timings=timings, goals=(Goal("A1", ("by hand",), "cost", bound),))


def run_of(*results: Result, **more: Any) -> Run:
    return Run(more.pop("machine", MACHINE), SETTINGS, results, **more)


QUESTION = Question("A1", "What does it cost?", "About it.", lambda scope: [])


def text_of(run: Run) -> str:
    return _report.report(run, [QUESTION], ["a-plot"])


# -- The report


def test_report_opens_with_what_it_does_not_show() -> None:
    headings = [line for line in text_of(run_of(row(80, 100))).splitlines() if line.startswith("## ")]
    assert headings[0] == "## What this report does not show"


def test_goal_stands_beside_what_was_measured_and_the_limit() -> None:
    table = _report.goals_table(run_of(row(80, 100)))
    assert "at most 0.85x the time of `by hand`" in table
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[3:6]] == ["0.80x", "yes", "0.50x"]


def test_missed_goal_is_listed_with_what_stands_in_the_way() -> None:
    text = text_of(run_of(row(90, 100, title="mine"), row(90, 100, title="the limit's", bound=0.4), row(80, 100)))
    below = text.split("### Rows below a goal")[1].split("## ")[0]
    assert "A1 · mine " in below
    assert "tensorbridge's own work" in below
    assert "the limit does not reach it either" in below
    assert "A1 · row " not in below


def test_other_line_that_misses_the_goal_too_is_named_as_what_stands_in_the_way() -> None:
    def three(another: float) -> Result:
        mine = row(50, 100, title=f"beside {another}", bound=0.2)
        return mine._replace(timings=(*mine.timings[:2], timed("the limit", 10, "limit"), timed("another", another)))

    below = text_of(run_of(three(48), three(15))).split("### Rows below a goal")[1].split("## ")[0]
    said = {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in below.splitlines() if "beside" in line}
    assert said["A1 · beside 48"] == "nobody is faster here: `another` takes as long"
    assert said["A1 · beside 15"] == "tensorbridge's own work"


def test_all_goals_met_leaves_nothing_to_list() -> None:
    assert "Rows below a goal" not in text_of(run_of(row(80, 100)))


def test_row_that_was_not_measured_says_why() -> None:
    text = text_of(run_of(row(80, 100), Result("A1", "peer", "cpu", missing="not installed (pip install peer)")))
    assert "| peer | not installed (pip install peer) |" in text


def test_question_without_any_row_measured_says_so_among_the_goals() -> None:
    assert "not measured: no CUDA device" in _report.goals_table(
        run_of(Result("C1", "16 MiB", "cuda", missing="no CUDA device"))
    )


def test_failed_row_is_told_at_the_top() -> None:
    text = text_of(run_of(Result("A1", "row", "cpu", missing="WrongResult: other values", wrong=True)))
    assert text.index("WrongResult: other values") < text.index("## What this report does not show")


def test_every_table_has_as_many_cells_in_each_line() -> None:
    blocks = text_of(run_of(row(80, 100), row(95, 100, title="a | b"))).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("| ")]
    assert len(tables) >= 5
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, lines[0]


def test_every_line_of_code_is_in_the_report() -> None:
    text = text_of(run_of(row(80, 100)))
    assert all(f"`{t.way.code}`" in text for t in row(80, 100).timings)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0.4, "0 ns"),
        (620, "620 ns"),
        (999.7, "1.00 µs"),
        (1234, "1.23 µs"),
        (56789, "56.8 µs"),
        (7e8, "700 ms"),
        (2e9, "2.00 s"),
    ],
)
def test_times_are_given_with_three_digits(ns: float, text: str) -> None:
    assert _report.duration(ns) == text


# -- Plots


def test_plots_are_drawn_as_svg_and_png(tmp_path: Path) -> None:
    drawn = _plots.draw(run_of(row(80, 100), row(120, 100, title="slower")), tmp_path)
    assert drawn == ["ratio-to-the-line-by-hand"]
    assert (tmp_path / f"{drawn[0]}.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert (tmp_path / f"{drawn[0]}.png").read_bytes().startswith(b"\x89PNG")


def test_report_says_that_plots_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_plots, "find_spec", lambda name: None)
    _command.write(run_of(row(80, 100)), tmp_path, [QUESTION])
    assert "Not drawn: matplotlib is not installed" in (tmp_path / "report.md").read_text(encoding="utf-8")


# -- The file


def test_results_come_back_from_the_file_as_they_were(tmp_path: Path) -> None:
    run = run_of(
        row(80, 100, scatter=0.125), Result("A3", "peer", "cpu", missing="not installed"), stopped="stopped by Ctrl-C"
    )
    _results.dump(run, tmp_path / "results.json")
    again = _results.load(tmp_path / "results.json")
    assert again._replace(results=()) == run._replace(results=())
    assert [r._replace(timings=()) for r in again.results] == [r._replace(timings=()) for r in run.results]
    for ours, theirs in zip(again.results[0].timings, run.results[0].timings, strict=True):
        assert (ours.way, ours.calls, ours.ns) == (theirs.way, theirs.calls, pytest.approx(theirs.ns, rel=1e-4))


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 999}', "\x00"])
def test_file_of_something_else_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"old\.json"):
        _results.load(path)


# -- The comparison


def test_change_beyond_the_scatter_is_told() -> None:
    text = _compare.compare(run_of(row(80, 100)), run_of(row(160, 100)), "old.json")
    assert "0.80x to 1.60x" in text
    assert "slower" in text
    assert "1 of 1 lines of tensorbridge changed" in text


def test_faster_is_told_as_faster() -> None:
    assert "faster" in _compare.compare(run_of(row(160, 100)), run_of(row(80, 100)), "old.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (row(80, 100), row(84, 100)),
        (row(80, 100, scatter=0.2), row(110, 100, scatter=0.2)),
        (row(80, 100), row(240, 300)),
        (row(80, 100), row(80, 40)),
    ],
    ids=["less than a tenth", "within the rounds", "the whole machine is slower", "the other line is faster"],
)
def test_change_that_means_nothing_is_not_told(old: Result, new: Result) -> None:
    assert "0 of 1 lines of tensorbridge changed" in _compare.compare(run_of(old), run_of(new), "old.json")


def test_another_machine_is_compared_by_ratio_alone() -> None:
    other = {**MACHINE, "CPU": "Another"}
    text = _compare.compare(run_of(row(80, 100)), run_of(row(20, 10), machine=other), "old.json")
    assert "another machine" in text
    assert "slower" in text


def test_rows_measured_in_one_run_alone_are_counted() -> None:
    text = _compare.compare(run_of(row(80, 100, title="gone")), run_of(row(80, 100, title="new")), "old.json")
    assert "1 rows measured there alone: A1 · gone" in text
    assert "1 rows measured here alone: A1 · new" in text


# -- The command


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two made-up rows, with rounds of a microsecond."""
    monkeypatch.setattr(_command, "QUICK", Settings(9, 3, 1e-6, 0.001))
    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(),))


def two_rows(second: Any = None) -> Question:
    def build() -> Case:
        ways = (Way("tensorbridge", "len(x)", "bridge"), Way("by hand", "x.__len__()"))
        return Case(ways, {"x": [1]}, lambda way, result: None, goals=(Goal("A1", ("by hand",), "cost", 0.85),))

    return Question("A1", "?", "", lambda scope: [Row("first", build), Row("second", second or build)])


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    _command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.usefixtures("short")
def test_run_writes_report_results_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _command.main(arguments("--quick", "--out", str(tmp_path / "new" / "folder"))) == 0
    out = tmp_path / "new" / "folder"
    names = {path.name for path in out.iterdir()}
    assert {"report.md", "results.json", "ratio-to-the-line-by-hand.svg", "ratio-to-the-line-by-hand.png"} <= names
    run = _results.load(out / "results.json")
    assert [len(result.timings) for result in run.results] == [2, 2]
    assert {"CPU", "cores", "transparent huge pages", "torch threads", "GPU"} <= run.machine.keys()
    assert "rows" in capsys.readouterr().err


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_of_a_device_that_was_asked_for_and_is_not_there_are_told_at_the_end(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_machine, "gpu_missing", lambda: "no CUDA device: torch sees none")
    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(), two_rows()._replace(name="C1", device="cuda")))
    assert _command.main(arguments("--quick", "--device", device, "--out", str(tmp_path))) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    told = "bench: 2 rows of the CUDA device were not measured: no CUDA device: torch sees none (2)"
    assert (last == told) == (device == "cuda")


@pytest.mark.usefixtures("short")
def test_old_results_are_compared_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _command.main(arguments("--quick", "--out", str(tmp_path)))
    _command.main(arguments("--quick", "--out", str(tmp_path), "--compare", str(tmp_path / "results.json")))
    assert "lines of tensorbridge changed by more than" in capsys.readouterr().out


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "bad",
    [["--out", "{tmp}/file/folder"], ["--compare", "{tmp}/none.json"], ["--compare", "{tmp}/file"], ["--only", "Z9"]],
    ids=["out cannot be written", "compare is not there", "compare is something else", "no such question"],
)
def test_what_cannot_work_is_an_error_before_any_measuring(
    bad: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(_command, "measured", lambda *args: pytest.fail("measured"))
    words = ["--out", str(tmp_path / "out"), *(word.format(tmp=tmp_path) for word in bad)]
    assert _command.main(arguments(*words)) == 2
    assert capsys.readouterr().err.startswith("bench: ")


@pytest.mark.usefixtures("short")
def test_ctrl_c_leaves_a_valid_partial_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Case:
        raise KeyboardInterrupt

    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(interrupted),))
    assert _command.main(arguments("--quick", "--out", str(tmp_path))) == 130
    run = _results.load(tmp_path / "results.json")
    assert [result.title for result in run.results] == ["first"]
    assert run.stopped == "stopped by Ctrl-C after 1 of 2 rows"
    assert [len(t.ns) for t in run.results[0].timings] == [3, 3]
    assert "**This report is not complete: stopped by Ctrl-C after 1 of 2 rows.**" in (
        tmp_path / "report.md"
    ).read_text(encoding="utf-8")


def nth_visit(number: int, error: BaseException) -> Any:
    """A row that meets an error on one of its visits."""
    visits = iter(range(1, 4))

    def build() -> Case:
        if next(visits) == number:
            raise error
        return Case((Way("tensorbridge", "len(x)", "bridge"),), {"x": [1]}, lambda way, result: None)

    return build


@pytest.mark.usefixtures("short")
def test_ctrl_c_on_a_later_visit_keeps_the_rounds_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(nth_visit(2, KeyboardInterrupt())),))
    assert _command.main(arguments("--quick", "--out", str(tmp_path))) == 130
    run = _results.load(tmp_path / "results.json")
    assert run.stopped == "stopped by Ctrl-C after 3 of 6 visits to rows"
    assert [len(result.timings[0].ns) for result in run.results] == [6, 3]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("error", "rounds", "missing", "code"),
    [
        (WrongResult("other values"), 0, "WrongResult: other values", 1),
        (MemoryError("no room"), 6, "", 0),
        (Unavailable("gone"), 6, "", 0),
    ],
    ids=["a wrong result ends a row", "no memory leaves the other visits", "so does what is not there any more"],
)
def test_a_row_that_fails_on_a_later_visit(
    error: Exception, rounds: int, missing: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(nth_visit(2, error)),))
    assert _command.main(arguments("--quick", "--out", str(tmp_path))) == code
    second = _results.load(tmp_path / "results.json").results[1]
    assert (sum(len(t.ns) for t in second.timings), second.missing) == (rounds, missing)


def test_rows_are_visited_by_turns_and_what_changes_the_process_last() -> None:
    def named(name: str, **more: Any) -> Question:
        return Question(name, "?", "", lambda scope: [Row("row", lambda: pytest.fail("built"))], **more)

    asked = [named("peers", last=True), named("A"), named("cold", once=True), named("B")]
    turns = _command.scheduled(asked, Scope(), Settings(rounds=21, visits=3))
    assert [question.name for question, _, _ in turns] == ["A", "cold", *"BABAB", *["peers"] * 3]
    assert {question.name: part.visits for question, _, part in turns} == {"A": 3, "cold": 1, "B": 3, "peers": 3}


def test_what_happens_once_in_a_process_is_measured_once() -> None:
    once, last = ([q.name for q in _command.QUESTIONS if getattr(q, field)] for field in ("once", "last"))
    assert (once, last) == (["pinned"], ["A3"])


@pytest.mark.usefixtures("short")
def test_unexpected_error_is_raised_after_the_rows_until_then_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Case:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(broken),))
    with pytest.raises(ZeroDivisionError):
        _command.main(arguments("--quick", "--out", str(tmp_path)))
    assert "ZeroDivisionError in A1 · second: a bug" in json.loads((tmp_path / "results.json").read_text())["stopped"]


@pytest.mark.usefixtures("short")
def test_row_with_a_wrong_result_fails_the_run_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> Case:
        raise WrongResult("other values")

    monkeypatch.setattr(_command, "QUESTIONS", (two_rows(wrong),))
    assert _command.main(arguments("--quick", "--out", str(tmp_path))) == 1
    assert [(r.missing, r.wrong) for r in _results.load(tmp_path / "results.json").results] == [
        ("", False),
        ("WrongResult: other values", True),
    ]


def test_only_chooses_questions_by_the_beginning_of_their_names() -> None:
    assert [q.name for q in _command.chosen(["B", "D1"])] == ["D1", "B1", "B2", "B3"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_redraws_one_line_on_a_terminal() -> None:
    stream = Terminal()
    progress = _command.Progress(stream, clock=iter([0.0, 0.0, 30.0]).__next__)
    progress.show(0, 8, "A1 first")
    progress.show(4, 8, "A1 fifth")
    progress.end()
    assert "\n" not in stream.getvalue()
    assert "[############............] 4/8   30 s left  A1 fifth" in stream.getvalue()


def test_progress_prints_a_line_a_tenth_elsewhere() -> None:
    stream = io.StringIO()
    progress = _command.Progress(stream)
    for number in range(100):
        progress.show(number, 100, "row")
    assert len(stream.getvalue().splitlines()) == 10


def test_machine_names_what_a_reader_compares() -> None:
    facts = _machine.machine()
    assert {"CPU", "cores", "memory", "transparent huge pages", "NUMA nodes", "load before", "Python"} <= facts.keys()
    assert all(str(value) for value in facts.values())


@pytest.mark.parametrize(
    ("said", "link"),
    [
        ("580.95, 5, 5, 16, 16", "gen 5 x16 now, gen 5 x16 at most"),
        ("unknown", "unknown"),  # no nvidia-smi, and a card that the system shows no folder of
    ],
)
def test_link_of_the_card_is_what_its_driver_says_or_unknown(monkeypatch, said, link) -> None:
    props = SimpleNamespace(total_memory=80 * 1024**3)
    torch = SimpleNamespace(
        cuda=SimpleNamespace(get_device_properties=lambda index: props), version=SimpleNamespace(cuda="13.0")
    )
    monkeypatch.setattr(_machine, "_said", lambda command: said)
    facts = _machine._gpu(torch)
    assert (facts["PCIe link"], facts["driver"]) == (link, said.split(", ")[0])


# -- The figures in the pages


@pytest.fixture
def figures() -> Any:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_in_the_pages_are_those_of_the_results(figures: Any) -> None:
    run = figures.results_of(figures.MACHINE)
    for page in figures.PAGES:
        text = page.read_text(encoding="utf-8")
        assert figures.filled(text, run) == text, f"{page.name}: run python benchmarks/figures.py"


def test_page_on_cost_takes_its_figures_from_the_results(figures: Any) -> None:
    assert len(figures.MARK.findall((ROOT / "docs" / "cost.md").read_text(encoding="utf-8"))) > 20


@pytest.mark.parametrize(
    ("mark", "written"),
    [
        ("time: A1 · row | by hand", "103 ns"),
        ("ratio: A1 · row | by hand | tensorbridge", "1.2"),
        ("rate: A1 · row | by hand", "0.62 GB/s"),
        ("fact: CPU", "Some CPU"),
    ],
)
def test_figure_is_written_between_its_comments(mark: str, written: str, figures: Any) -> None:
    run = run_of(row(80, 100))
    assert figures.filled(f"a <!-- {mark} -->old<!-- end --> b", run) == f"a <!-- {mark} -->{written}<!-- end --> b"


@pytest.mark.parametrize("mark", ["time: A1 · other | by hand", "time: A1 · row | other", "rate: A3 · peer | by hand"])
def test_figure_without_a_measurement_is_refused(mark: str, figures: Any) -> None:
    run = run_of(row(80, 100), Result("A3", "peer", "cpu", missing="not installed"))
    with pytest.raises(LookupError):
        figures.filled(f"<!-- {mark} --><!-- end -->", run)


def test_what_a_faster_line_leaves_out_stands_in_the_way() -> None:
    fast = row(90, 100)
    theirs = [t._replace(way=t.way._replace(unlike="it counts no write")) for t in fast.timings]
    text = text_of(run_of(fast._replace(timings=tuple(theirs))))
    assert "it counts no write" in text.split("### Rows below a goal")[1].split("## ")[0]
