"""report.md: what was measured, for a person. It opens with what it does not show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from tensorbridge._bench._measure import Timing, spread
from tensorbridge._bench._results import Result, Run, Verdict, compared, reaches, verdict, verdicts
from tensorbridge._bench._rows import Goal, Question

HIDDEN = """\
* **Your program.** Each line is called in a tight loop on one array, so code and small arrays are in the caches. The
  first call for a kind of array also makes the decision that later calls look up; that call is not in these figures.
* **Other machines, and this one under another load.** Ratios travel better than nanoseconds; neither travels far.
  Copies by two or more torch threads are fast on idle cores, and can be many times slower when another process holds
  one: look at the load below.
* **What changes from run to run.** The range beside a figure is that of the rounds of this run, from all visits to the
  row, without the lowest and the highest seventh. A difference below 10 % is none.
* **Equal promises.** The rows do the same work, not under the same promises: most other lines hand out a writable view
  of a tensor that requires grad, or refuse what has no exact partner.
* **The first touch of memory that a virtual machine's host has yet to find.** It can cost 30 times a page fault. Here
  fresh memory is new to the process, but the machine has had it before.
* **Peak memory, energy, several processes at once, memory of another NUMA node.** Nothing here measures them."""


def report(run: Run, questions: Sequence[Question], plots: Sequence[str], plots_missing: str = "") -> str:
    """The whole report. `plots` are file names without their ending, next to the report."""
    parts = [
        "# What array conversions cost on this machine",
        _opening(run),
        "## What this report does not show\n\n" + HIDDEN,
        "## The machine\n\n" + table(("", ""), [(k, str(v)) for k, v in run.machine.items()]),
        "## Goals\n\n" + goals_table(run),
        below(run),
        _plots(plots, plots_missing),
        *(_section(question, run) for question in questions),
        _method(run),
        _details(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(run: Run) -> str:
    timed = sum(not r.missing for r in run.results)
    text = (
        f"{timed} rows, {sum(len(r.timings) for r in run.results)} lines of code, each timed on its own and checked: "
        "that it shared or copied what it claims, and that the values are right. Written by "
        "`python -m tensorbridge bench`; everything in it is in `results.json` too."
    )
    if run.stopped:
        text += f"\n\n**This report is not complete: {run.stopped}.**"
    wrong = [r for r in run.results if r.wrong]
    if wrong:
        lines = "\n".join(f"* {r.key}: {r.missing}" for r in wrong)
        text += f"\n\n**{len(wrong)} rows failed, which is an error in the program that was measured:**\n\n{lines}"
    return text


# -- Goals

CALLED = {
    "A1": "a shared to_numpy",
    "A2": "a shared to_torch",
    "A3": "other libraries",
    "A4": "an unused guard or trace",
    "B1": "large copies",
    "B2": "another layout or dtype",
    "B3": "a tree of small arrays",
    "C1": "into page-locked memory",
    "C2": "device to ordinary memory",
    "C3": "ordinary memory to device",
    "C4": "a tree across the bus",
    "C5": "between torch and CuPy",
    "C6": "prefetch",
    "D1": "the import",
    "floor": "every copy",
}
FLOOR_ASKED = "at least 0.95x the speed of the better of NumPy and torch"


def asked(goal: Goal) -> str:
    if goal.name == "floor":
        return FLOOR_ASKED
    against = " and ".join(f"`{name}`" for name in goal.against)
    which = "the slower of " if goal.slowest else "the faster of " if len(goal.against) > 1 else ""
    if goal.sense == "extra":
        return f"at most {duration(goal.bound)} more than {which}{against}"
    most = "at most" if goal.sense == "cost" else "at least"
    what = "time" if goal.sense == "cost" else "speed"
    stretch = "" if goal.stretch is None else f" (stretch: {goal.stretch:g}x)"
    return f"{most} {goal.bound:g}x the {what} of {which}{against}{stretch}"


def figure(goal: Goal, value: float) -> str:
    return f"{value:+.0f} ns" if goal.sense == "extra" else f"{value:.2f}x"


def measured(v: Verdict) -> str:
    low, high = (figure(v.goal, end).split()[0].removesuffix("x") for end in (v.low, v.high))
    return f"{figure(v.goal, v.value)} ({low} to {high})"


def goals_table(run: Run) -> str:
    """One line for each thing that is asked: the worst and the best row, and how many of them keep it."""
    lines = []
    asked_for: dict[tuple[Any, ...], list[Verdict]] = {}
    for _, v in verdicts(run):
        asked_for.setdefault(_goal_key(v.goal), []).append(v)
    for found in asked_for.values():
        goal = found[0].goal
        values = sorted((v.value for v in found), reverse=goal.sense != "speed")
        met = sum(v.met for v in found)
        verdict_text = "yes" if met == len(found) else f"**no**: missed on {len(found) - met} of {len(found)} rows"
        limits = [v.limit for v in found if v.limit is not None]
        span = " to ".join(dict.fromkeys(figure(goal, value) for value in (values[0], values[-1])))
        lines.append((goal.name, asked(goal), span, verdict_text, figure(goal, median(limits)) if limits else ""))
    for name in dict.fromkeys(r.question for r in run.results):
        rows = [r for r in run.results if r.question == name]
        if name[0] in "ABCD" and name[1:].isdigit() and all(r.missing for r in rows):
            why = "; ".join(dict.fromkeys(r.missing.partition(" (")[0] for r in rows))
            lines.append((name, "", f"not measured: {why}", "", ""))
    lines = [(f"{line[0]}: {CALLED[line[0]]}", *line[1:]) for line in sorted(lines, key=lambda line: line[0])]
    head = ("goal", "asked of tensorbridge", "measured: worst row to best", "met", "the limit in its place")
    note = (
        "A figure is the median over rounds of the ratio within a round. The last column is what the limit of the row "
        "would score: the least that the memory, the link or the framework itself asks for the same work."
    )
    return table(head, lines) + "\n\n" + note


def _goal_key(goal: Goal) -> tuple[Any, ...]:
    return (goal.name,) if goal.name == "floor" else (goal.name, goal.sense, goal.against, goal.bound)


def below(run: Run) -> str:
    """Every row that misses a goal, and what stands in its way."""
    missed = sorted(((r, v) for r, v in verdicts(run) if not v.met), key=lambda pair: pair[1].goal.name)
    if not missed:
        return ""
    lines = []
    for result, v in missed:
        extra = median(result.timing(v.goal.way).ns) - median(result.timing(v.theirs).ns)
        row = result.key if v.goal.way == "tensorbridge" else f"{result.key}: {v.goal.way}"
        bound = f"{'at least' if v.goal.sense == 'speed' else 'at most'} {figure(v.goal, v.goal.bound)}"
        limit = "" if v.limit is None else figure(v.goal, v.limit)
        way_out = _way_out(v, result.timing(v.theirs).way.unlike) or _peer(result, v) or "tensorbridge's own work"
        lines.append((v.goal.name, row, v.theirs, bound, measured(v), duration(extra, sign=True), limit, way_out))
    head = ("goal", "row", "against", "asked", "measured", "difference", "the limit", "what stands in the way")
    return "### Rows below a goal\n\n" + table(head, lines)


def _way_out(v: Verdict, unlike: str) -> str:
    if v.limit is not None and not reaches(v.goal, v.limit):
        return "the limit does not reach it either"
    if v.low <= v.goal.bound <= v.high:
        return "nothing: its rounds scatter across it"
    if v.kept is not None and not reaches(v.goal, v.kept):
        return f"{unlike}; a line that keeps these promises, and is for this one case, reaches {figure(v.goal, v.kept)}"
    return unlike


def _peer(result: Result, v: Verdict) -> str:
    """The fastest of the other lines, where it misses the goal as well and ours is as fast."""
    others = [t for t in result.timings if t.way.role == "baseline" and t.way.name != v.theirs]
    beats = {"speed": v.goal.bound > 1, "cost": v.goal.bound < 1}.get(v.goal.sense, False)
    if not others or not beats:
        return ""
    best, ours, theirs = min(others, key=lambda t: median(t.ns)), result.timing(v.goal.way), result.timing(v.theirs)
    late = reaches(v.goal, median(compared(v.goal.sense, best, theirs))) or median(compared("cost", ours, best)) > 1.05
    return "" if late else f"nobody is faster here: `{best.way.name}` takes as long"


# -- Tables, one a question


def _section(question: Question, run: Run) -> str:
    rows = [r for r in run.results if r.question == question.name]
    if not rows:
        return ""
    parts = [f"## {question.name}: {question.title}", question.about]
    if all(r.missing for r in rows) and len({r.missing for r in rows}) == 1:
        parts.append(f"{len(rows)} rows, not measured: **{rows[0].missing}**")
        return "\n\n".join(parts)
    timed = [r for r in rows if not r.missing]
    parts += [_pivot(group) for group in _alike(timed)]
    missing = [r for r in rows if r.missing]
    if missing:
        parts.append(table(("row", "not measured"), [(r.title, r.missing) for r in missing]))
    return "\n\n".join(parts)


def _alike(results: list[Result]) -> list[list[Result]]:
    """Rows that fit one table: the ways of each are among those of its first row."""
    groups: list[list[Result]] = []
    for result in results:
        names = {t.way.name for t in result.timings}
        for group in groups:
            if names <= {t.way.name for t in group[0].timings}:
                group.append(result)
                break
        else:
            groups.append([result])
    return groups


def _pivot(results: list[Result]) -> str:
    """One line a row, one column a way, one more for each thing that is asked of the rows."""
    ways = [t.way.name for t in results[0].timings if len(results[0].timings) <= MOST or _is_told(t)]
    goals = list(dict.fromkeys(_asked_of(goal) for result in results for goal in result.goals))
    head = ("row", *ways, *(_column(goal) for goal in goals))
    lines = []
    for result in results:
        times = {t.way.name: duration(median(t.ns)) for t in result.timings}
        cells = [times.get(name, "") for name in ways]
        found = {_asked_of(goal): verdict(result, goal) for goal in result.goals}
        cells += [_cell(found.get(key)) for key in goals]
        lines.append((result.title, *cells))
    return table(head, lines)


MOST = 7  # columns; where there are more ways, the engines' own are left to the last table


def _is_told(t: Timing) -> bool:
    return t.way.role == "bridge" or "by hand" in t.way.name


def _asked_of(goal: Goal) -> tuple[str, tuple[str, ...], str, str]:
    return goal.name, goal.against, goal.sense, goal.way


def _column(key: tuple[str, tuple[str, ...], str, str]) -> str:
    name, against, sense, way = key
    who = "the best by hand" if name == "floor" else " / ".join(against)
    what = {"cost": "time over", "speed": "speed over", "extra": "more than"}[sense]
    return f"{name}: {'' if way == 'tensorbridge' else way + ', '}{what} {who}"


def _cell(v: Verdict | None) -> str:
    if v is None:
        return ""
    return measured(v) if v.met else f"**{measured(v)}, asked {v.goal.bound:g}**"


def _plots(plots: Sequence[str], missing: str) -> str:
    if missing:
        return f"## Plots\n\nNot drawn: {missing}."
    if not plots:
        return ""
    return "## Plots\n\n" + "\n\n".join(f"![{p.replace('-', ' ')}]({p}.png)\n\n[{p}.svg]({p}.svg)" for p in plots)


def _method(run: Run) -> str:
    s = {"visits": 1, **run.settings}  # of a file written before there were visits
    return f"""## How it was measured

* One process. The ways of a row run in interleaved rounds, and their order rotates from round to round. Up to
  {s["rounds"]} rounds, at least 7; a round repeats a call until it takes about {s["round_s"] * 1e3:g} ms.
* A row is visited {s["visits"]} times in a run, each time after all other rows and with new arrays, for a machine
  changes its pace and an array its place. Rows of other libraries come last, for importing those changes the process.
* A ratio is taken within each round, between neighbours in time; the figure is the median of them.
* The warm-up is apart. Python's garbage collector is off while the clock runs. The time of a call that makes a fresh
  result leaves out freeing it; the time of a call that shares leaves it in, as in a loop.
* "fresh": every result of a round is kept alive, and blocks of 128 KiB and more come from the kernel, as early in a
  program. "dropped" and "reused": each result is dropped at once, and blocks up to 32 MiB come from the allocator's own
  free memory, as later in a program. (glibc is told so; other C libraries decide for themselves.) "warm" and "pinned":
  written over memory in use, ordinary or page-locked. "pool": device memory from the framework's pool.
* Random data; every way's result is compared with the source, bit for bit, before the clock runs.
* {s["command"]}"""


def _details(run: Run) -> str:
    """Every line of code with its times: what the tables above are made of."""
    lines = []
    for result in run.results:
        for t in result.timings:
            low, high = spread(t.ns)
            lines.append(
                (
                    result.key,
                    f"`{t.way.code}`",
                    t.way.state,
                    duration(median(t.ns)),
                    duration(min(t.ns)),
                    f"{duration(low)} to {duration(high)}",
                    rate(result, t),
                    f"{len(t.ns)} x {t.calls}",
                )
            )
    head = ("row", "code", "result", "median", "least", "range of the rounds", "rate", "rounds x calls")
    inner = table(head, lines)
    summary = f"<summary>{len(lines)} lines of code and their times</summary>"
    return f"## Every line\n\n<details>{summary}\n\n{inner}\n\n</details>"


def rate(result: Result, t: Timing) -> str:
    if not result.nbytes or t.way.state in ("", "shared"):
        return ""
    return f"{result.nbytes / median(t.ns):.3g} GB/s"


# -- Words


def duration(ns: float, *, sign: bool = False) -> str:
    mark = ("+" if ns >= 0 else "-") if sign else ("-" if ns < 0 else "")
    size = abs(ns)
    for unit, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if size >= unit * 0.9995:
            return f"{mark}{_three(size / unit)} {name}"
    return f"{mark}{size:.0f} ns"


def _three(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as text."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (tuple(head), *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * max(width, 3) for width in widths]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in (lines[0], rule, *lines[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
