"""`python -m tensorbridge bench`: check what can fail, measure row by row, write what there is, even when stopped."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from tensorbridge._bench import (
    _calls,
    _changes,
    _compare,
    _copies,
    _cuda,
    _cuda_batches,
    _cuda_crossings,
    _loops,
    _machine,
    _plots,
    _promises,
    _report,
    _results,
    _sizes,
    _trees,
)
from tensorbridge._bench._measure import QUICK, Settings, measure
from tensorbridge._bench._results import Result, Run
from tensorbridge._bench._rows import Question, Row, Scope, Unavailable, WrongResult, bytes_name
from tensorbridge._bench._short import short
from tensorbridge._errors import BridgeError

QUESTIONS: tuple[Question, ...] = (
    *_calls.QUESTIONS,
    *_promises.QUESTIONS,
    *_sizes.QUESTIONS,
    *_copies.QUESTIONS,
    *_changes.QUESTIONS,
    *_trees.QUESTIONS,
    *_loops.QUESTIONS,
    *_cuda_crossings.QUESTIONS,
    *_cuda_batches.QUESTIONS,
    *_cuda.QUESTIONS,  # gibibytes: last, where a session on a card may run out of time
    _calls.PEER_QUESTION,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer sizes and shorter rounds: about two minutes")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), metavar="DIR", help="default: ./bench-report")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the rows of a CUDA device too")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="say what changed since an earlier results.json"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these questions alone, as A1 B2 C")


def main(args: argparse.Namespace) -> int:
    """0; 1 if a row failed its own check; 2 if nothing could be measured; 130 after Ctrl-C, with a partial report."""
    old = None
    try:
        writable(args.out)
        if args.compare is not None:
            old = _results.load(args.compare)
        asked = chosen(args.only)
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if find_spec("torch") is None:
        print("bench: torch is not installed, and every row needs it: pip install torch", file=sys.stderr)
        return 2
    if _plots.missing():
        print(f"bench: there will be no plots: {_plots.missing()}", file=sys.stderr)
    settings = QUICK if args.quick else Settings()
    progress = Progress(sys.stderr)
    run, stop = measured(asked, Scope(args.quick), args.device, settings, progress)
    progress.end()
    if stop is not None:
        print(f"bench: {run.stopped}; writing what there is", file=sys.stderr)
    write(run, args.out, asked)
    if text := short(run):
        print(text, end="\n\n")
    print(
        f"{args.out / 'report.md'}: {sum(not r.missing for r in run.results)} rows"
        + (f"; {run.stopped}" if run.stopped else "")
    )
    if args.device == "cuda" and (text := not_measured(run)):
        print(f"bench: {text}", file=sys.stderr)
    if old is not None:
        print(_compare.compare(old, run, str(args.compare)))
    if stop is None:
        return 1 if any(r.wrong for r in run.results) else 0
    if isinstance(stop, KeyboardInterrupt):
        return 130
    raise stop


def not_measured(run: Run) -> str:
    """Which rows of a device are missing that was asked for, and why; empty if none are."""
    why = Counter(r.missing for r in run.results if r.device != "cpu" and r.missing and not r.wrong)
    rows = f"{why.total()} row{'s' * (why.total() != 1)} of the CUDA device were not measured"
    return f"{rows}: {'; '.join(f'{reason} ({count})' for reason, count in why.most_common())}" if why else ""


def writable(out: Path) -> None:
    """Raises OSError, with the reason, where a report could not be written after minutes of measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror}") from error


def chosen(only: Sequence[str] | None) -> tuple[Question, ...]:
    if not only:
        return QUESTIONS
    unknown = [name for name in only if not any(q.name.startswith(name) for q in QUESTIONS)]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose from {', '.join(q.name for q in QUESTIONS)}")
    return tuple(q for q in QUESTIONS if any(q.name.startswith(name) for name in only))


def measured(
    questions: Sequence[Question], scope: Scope, device: str, settings: Settings, progress: Progress
) -> tuple[Run, BaseException | None]:
    """The run, and what stopped it early, if anything did. Everything that was timed until then is in it."""
    facts = _machine.machine()
    facts["peers"] = _calls.peer_versions() or "none installed"
    turns = scheduled(questions, scope, settings)
    results: dict[tuple[str, str], Result] = {}
    stop: BaseException | None = None
    begun = time.monotonic()
    try:
        for number, (question, row, part) in enumerate(turns):
            progress.show(number, len(turns), f"{question.name} {row.title}")
            key = question.name, row.title
            results[key] = one(question, row, device, part, results.get(key))
    except BaseException as error:  # whatever it is: the rows until here are written before it goes on its way
        stop = error
    facts["load after"] = _machine.load_now()
    facts["measured"] = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, in {time.monotonic() - begun:.0f} s"
    told = {
        **settings._asdict(),
        "quick": scope.quick,
        "command": "`python -m tensorbridge bench" + (" --quick`" if scope.quick else "`"),
    }
    rows = len(dict.fromkeys((question.name, row.title) for question, row, _ in turns))
    done = (len(results), rows, "rows") if len(results) < rows else (number, len(turns), "visits to rows")
    at = "after {} of {} {}".format(*done)
    return Run(facts, told, tuple(results.values()), stopped(stop, at, question, row)), stop


def scheduled(questions: Sequence[Question], scope: Scope, settings: Settings) -> list[tuple[Question, Row, Settings]]:
    """All rows, and all again: the visits to one row lie as far apart as they can."""
    rows = [(question, row) for question in questions for row in question.rows(scope)]
    whole = settings._replace(visits=1)
    return [
        (question, row, whole if question.once else settings)
        for last in (False, True)
        for visit in range(settings.visits)
        for question, row in rows
        if question.last == last and not (question.once and visit)
    ]


def stopped(stop: BaseException | None, at: str, question: Question, row: Row) -> str:
    if stop is None:
        return ""
    if isinstance(stop, KeyboardInterrupt):
        return f"stopped by Ctrl-C {at}"
    return f"stopped {at}, by {type(stop).__name__} in {question.name} · {row.title}: {stop}"


def one(question: Question, row: Row, device: str, settings: Settings, before: Result | None = None) -> Result:
    """One visit to a row, or why there is none. Errors of the program measured are rows; others are the caller's."""
    result = before or Result(question.name, row.title, question.device)
    if result.missing:
        return result
    missing = no_device(question, device)
    free = _machine.available_bytes()
    if not missing and row.needs > 0.8 * free:
        missing = f"needs {bytes_name(row.needs)} of memory, and {bytes_name(free)} are free"
    if not missing:
        try:
            case = row.build()
            timings = measure(case, settings, result.timings)
        except Unavailable as reason:
            missing = str(reason)
        except (WrongResult, BridgeError) as error:
            return _wrong(result, f"{type(error).__name__}: {error}")
        except (MemoryError, RuntimeError) as error:  # torch's own of the device is a RuntimeError
            first = str(error).partition("\n")[0]
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                missing = f"out of memory: {first}"
            elif question.device == "cpu":
                raise
            else:
                return _wrong(result, f"{type(error).__name__}: {first}")  # the driver's: one row is lost
    if missing:
        return result if result.timings else result._replace(missing=missing)  # an earlier visit had the memory
    return result._replace(nbytes=case.nbytes, timings=tuple(timings), goals=case.goals)


def _wrong(result: Result, why: str) -> Result:
    return result._replace(missing=why, wrong=True, timings=())


def no_device(question: Question, device: str) -> str:
    if question.device == "cpu":
        return ""
    return _machine.gpu_missing() or ("" if device == "cuda" else "not asked for: --device cuda measures it")


def write(run: Run, out: Path, questions: Sequence[Question]) -> None:
    _results.dump(run, out / "results.json")
    missing = _plots.missing()
    plots = [] if missing else _plots.draw(run, out)
    (out / "report.md").write_text(_report.report(run, questions, plots, missing), encoding="utf-8")


class Progress:
    """A bar that redraws itself on a terminal; elsewhere a line for each tenth of the way."""

    WIDTH = 24

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._begun = stream, clock, clock()
        self._live = stream.isatty()
        self._tenth = -1

    def show(self, done: int, total: int, what: str) -> None:
        spent = self._clock() - self._begun
        left = f"{spent / done * (total - done):.0f} s left" if done > 2 else ""
        if self._live:
            full = self.WIDTH * done // total
            bar = "#" * full + "." * (self.WIDTH - full)
            self._stream.write(f"\r\x1b[K[{bar}] {done}/{total} {left:>11}  {what[:70]}")
            self._stream.flush()
        elif 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            print(f"bench: {done}/{total} visits to rows {left}  {what}", file=self._stream)

    def end(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
