"""The benchmark's own honesty: what it times, in which order, what it concludes, and that every row is what it claims.

No test here looks at how long anything took: speed lives in the benchmark.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tensorbridge._bench import _calls, _command, _cuda, _cuda_batches, _cuda_crossings, _measure, _results, _short
from tensorbridge._bench._measure import Settings, Timing, check, measure, spread
from tensorbridge._bench._results import Result, reaches, verdict
from tensorbridge._bench._rows import FRESH, Case, Goal, Row, Scope, Unavailable, Way, WrongResult, random_array

ROOT = Path(__file__).parent.parent
SHORT = Settings(rounds=9, visits=1, round_s=1e-6, case_s=1.0)


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now

    def spend(self, ns: int, name: str = "") -> str:
        self.now += ns
        self.log.append(name)
        return name


def no_check(way: Way, result: Any) -> None:
    return None


def case_of(clock: Clock, *ways: Way, **more: Any) -> Case:
    return Case(ways, {"spend": clock.spend, **more.pop("names", {})}, more.pop("check", no_check), **more)


# -- The stopwatch


def test_time_is_what_the_clock_says_for_one_call() -> None:
    clock = Clock()
    timings = measure(case_of(clock, Way("a", "spend(100)"), Way("b", "spend(3)")), SHORT, clock=clock)
    assert [set(t.ns) for t in timings] == [{100.0}, {3.0}]


def test_short_call_is_repeated_until_a_round_is_long_enough() -> None:
    clock = Clock()
    timings = measure(case_of(clock, Way("a", "spend(10)"), Way("b", "spend(5000)")), SHORT, clock=clock)
    assert timings[0].calls * 10 >= SHORT.round_s * 1e9 / 2
    assert timings[1].calls == 1


def test_ways_run_in_turn_and_the_first_one_changes() -> None:
    clock = Clock()
    ways = (Way("a", "spend(5000, 'a')"), Way("b", "spend(5000, 'b')"), Way("c", "spend(5000, 'c')"))
    timings = measure(case_of(clock, *ways), SHORT, clock=clock)
    rounds = len(timings[0].ns)
    order = "".join(clock.log)[-3 * rounds :]
    assert [order[i : i + 3] for i in range(0, 3 * rounds, 3)] == (["abc", "bca", "cab"] * rounds)[:rounds]


def test_never_fewer_than_seven_rounds() -> None:
    clock = Clock()
    timings = measure(case_of(clock, Way("a", "spend(10**9)")), SHORT._replace(case_s=0.0), clock=clock)
    assert len(timings[0].ns) == 7


def test_no_more_rounds_than_asked_for() -> None:
    clock = Clock()
    assert len(measure(case_of(clock, Way("a", "spend(5)")), SHORT, clock=clock)[0].ns) == SHORT.rounds


def test_visits_share_the_rounds_and_add_up() -> None:
    clock = Clock()
    case = case_of(clock, Way("a", "spend(5000, 'a')"), Way("b", "spend(5000, 'b')"))
    settings = SHORT._replace(visits=3)
    first = measure(case, settings, clock=clock)
    assert len(first[0].ns) == 3
    clock.log.clear()
    second = measure(case, settings, first, clock=clock)
    assert "".join(clock.log) == "abab" + "baabba", "checked, warmed up, and the turns go on where they were left"
    assert [t.calls for t in second] == [t.calls for t in first]
    assert [t.ns[:3] for t in second] == [t.ns for t in first]
    assert len(measure(case, settings, second, clock=clock)[0].ns) == SHORT.rounds


def test_visits_to_long_rows_make_seven_rounds_at_least() -> None:
    clock = Clock()
    case, settings = case_of(clock, Way("a", "spend(10**9)")), SHORT._replace(case_s=0.0, visits=3)
    timings: list[Timing] = []
    for _ in range(3):
        timings = measure(case, settings, timings, clock=clock)
    assert len(timings[0].ns) == 9


def test_results_that_are_to_be_fresh_stay_alive_for_the_round() -> None:
    clock = Clock()
    alive: list[weakref.ref[Any]] = []
    seen: list[int] = []

    class Block:
        pass

    def make() -> Block:
        clock.now += 100
        seen.append(sum(ref() is not None for ref in alive))
        block = Block()
        alive.append(weakref.ref(block))
        return block

    case = case_of(clock, Way("a", "make()", state=FRESH), names={"make": make}, nbytes=1024)
    timings = measure(case, SHORT, clock=clock)
    assert timings[0].calls > 3
    assert max(seen) >= timings[0].calls - 1
    assert not any(ref() is not None for ref in alive)


def test_what_happens_before_a_round_is_not_timed() -> None:
    clock = Clock()
    way = Way("a", "spend(5000)", before=lambda: clock.spend(10**6))
    assert set(measure(case_of(clock, way), SHORT, clock=clock)[0].ns) == {5000.0}


def test_waiting_for_the_device_is_timed() -> None:
    clock = Clock()
    case = case_of(clock, Way("a", "spend(5000)"), sync=lambda: clock.spend(700))
    assert set(measure(case, SHORT, clock=clock)[0].ns) == {5700.0}


def test_wrong_result_is_found_before_anything_is_timed() -> None:
    clock = Clock()

    def wrong(way: Way, result: Any) -> None:
        raise WrongResult(way.name)

    with pytest.raises(WrongResult, match="a"):
        measure(case_of(clock, Way("a", "spend(5)"), check=wrong), SHORT, clock=clock)
    assert len(clock.log) == 1


def test_last_result_that_was_timed_is_checked_too() -> None:
    clock = Clock()
    seen = []
    case = case_of(clock, Way("a", "spend(5000)", state=FRESH), check=lambda way, result: seen.append(result))
    measure(case, SHORT, clock=clock)
    assert len(seen) == 2


@pytest.mark.parametrize("line", ["spend(5)", "fail()"])
def test_garbage_collector_is_on_again_afterwards(line: str) -> None:
    clock = Clock()
    calls = iter(range(100))

    def fail() -> None:
        clock.now += 5
        if next(calls) > 3:
            raise KeyboardInterrupt

    case = case_of(clock, Way("a", line), names={"fail": fail})
    try:
        measure(case, SHORT, clock=clock)
    except KeyboardInterrupt:
        assert line == "fail()"
    assert gc.isenabled()


def test_range_leaves_out_one_round_in_seven_on_each_side() -> None:
    assert spread([7, 1, 2, 3, 4, 5, 900]) == (2, 7)
    assert spread(range(14)) == (2, 11)


# -- What is concluded


def timed(name: str, *ns: float, role: str = "baseline") -> Timing:
    return Timing(Way(name, f"{name}()", role), 1, ns or (1.0,) * 7)


def result_of(*timings: Timing) -> Result:
    return Result("A1", "row", "cpu", timings=timings)


def test_ratio_is_taken_within_each_round() -> None:
    ours, theirs = timed("tensorbridge", 1, 10, 100), timed("by hand", 2, 20, 200)
    assert verdict(result_of(ours, theirs), Goal("A1", ("by hand",), "cost", 0.6))[2:6] == (0.5, 0.5, 0.5, True)


@pytest.mark.parametrize(
    ("sense", "bound", "value", "met"),
    [
        ("cost", 0.5, 0.5, True),
        ("cost", 0.49, 0.5, False),
        ("speed", 2.0, 2.0, True),
        ("speed", 2.1, 2.0, False),
        ("extra", -50.0, -50.0, True),
        ("extra", -51.0, -50.0, False),
    ],
)
def test_goal_is_met_at_its_bound_and_not_beyond(sense: str, bound: float, value: float, met: bool) -> None:
    found = verdict(result_of(timed("tensorbridge", 50), timed("by hand", 100)), Goal("A1", ("by hand",), sense, bound))
    assert (found.value, found.met) == (value, met)


@pytest.mark.parametrize(("slowest", "against"), [(False, "fast"), (True, "slow")])
def test_goal_against_several_ways_takes_the_fastest_or_the_slowest(slowest: bool, against: str) -> None:
    result = result_of(timed("tensorbridge", 5), timed("fast", 4), timed("slow", 9))
    assert verdict(result, Goal("C2", ("slow", "fast"), "speed", 0.7, slowest=slowest)).theirs == against


def test_limit_is_judged_by_the_same_goal() -> None:
    result = result_of(timed("tensorbridge", 9), timed("by hand", 10), timed("least", 8, role="limit"))
    goal = Goal("A1", ("by hand",), "cost", 0.7)
    found = verdict(result, goal)
    assert found.limit == 0.8
    assert not reaches(goal, found.limit)


# -- The rows

LARGEST = 16 * 1024**2  # bytes a row may need here: enough for one row of every kind


def rows_of(device: str) -> dict[str, Row]:
    questions = [q for q in _command.QUESTIONS if q.device == device]
    return {f"{q.name} · {row.title}": row for q in questions for row in q.rows(Scope(quick=True))}


CPU_ROWS = {name: row for name, row in rows_of("cpu").items() if row.needs <= LARGEST}
CUDA_ROWS = rows_of("cuda")
SMALL_CUDA_ROWS = [name for name, row in CUDA_ROWS.items() if row.needs <= 6 * LARGEST and "upy" not in name.lower()]


def missing_peer(name: str) -> bool:
    peer = name.removeprefix("A3 · ").rpartition(", ")[0]
    return name.startswith("A3") and find_spec(_calls.PEERS[peer][1].partition(".")[0]) is None


@pytest.mark.parametrize("name", CPU_ROWS)
def test_every_row_makes_what_it_claims(name: str) -> None:
    if missing_peer(name):
        with pytest.raises(Unavailable, match="not installed"):
            CPU_ROWS[name].build()
        return
    case = CPU_ROWS[name].build()
    with case.around():
        check(case)
    assert all(way.sample() > 0 for way in case.ways if way.sample is not None)
    assert_goals_name_ways(case)


def assert_goals_name_ways(case: Case) -> None:
    names = [way.name for way in case.ways]
    assert len(set(names)) == len(names)
    assert names[0] == "tensorbridge" or case.ways[0].role in ("bridge", "baseline")
    for goal in case.goals:
        assert {goal.way, *goal.against} <= set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA_ROWS)
def test_every_cuda_row_makes_what_it_claims(name: str) -> None:
    case = CUDA_ROWS[name].build()
    with case.around():
        check(case)
    assert_goals_name_ways(case)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host in the device's place, so that the lines of code for it can be run."""
    import torch

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, other: Event) -> float:
            return 60.0

    pretended: dict[str, Any] = {
        "CUDA": "cpu",
        "SIDE": 16,
        "pinned": torch.zeros,
        "cuda_event": lambda **options: Event(),
        "warmed_up": lambda nbytes: None,
    }
    for module in (_cuda, _cuda_batches, _cuda_crossings):
        for name in pretended.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, pretended[name])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("name", SMALL_CUDA_ROWS)
def test_lines_of_the_cuda_rows_run_with_the_host_in_the_place_of_the_device(name: str) -> None:
    case = CUDA_ROWS[name].build()
    assert_goals_name_ways(case)
    with case.around():
        for way in case.ways:
            assert way.sample is not None or eval(way.code, dict(case.names)) is not None


def test_unused_watching_is_measured_against_lanes_that_do_not_ask() -> None:
    lanes = _calls.unasked_lanes()
    assert "watching" not in lanes.plain_tensor_to_numpy.__code__.co_names
    assert "_watch" not in compiled_names(lanes.plain_tensor_to_numpy)


def compiled_names(function: Callable[..., Any]) -> set[str]:
    inner = [const for const in function.__code__.co_consts if hasattr(const, "co_names")]
    return {name for code in inner for name in code.co_names}


def test_missing_peer_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "find_spec", lambda name: None)
    question = _calls.PEER_QUESTION
    for row in question.rows(Scope()):
        assert _command.one(question, row, "cpu", SHORT).missing.startswith("not installed (pip install ")


@pytest.mark.parametrize(
    ("device", "why", "said"),
    [
        ("cuda", "no CUDA device: torch sees none", "no CUDA device: torch sees none"),
        ("cpu", "no CUDA device: torch sees none", "no CUDA device: torch sees none"),
        ("cpu", "", "not asked for: --device cuda measures it"),
    ],
)
def test_device_row_that_cannot_be_measured_says_why(
    device: str, why: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_command._machine, "gpu_missing", lambda: why)
    question = _cuda.QUESTIONS[0]
    assert _command.one(question, question.rows(Scope())[0], device, SHORT).missing == said


def test_row_that_needs_more_memory_than_there_is_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_command._machine, "available_bytes", lambda: 1024**3)
    row = Row("large", lambda: pytest.fail("built"), needs=1024**3)
    missing = _command.one(_calls.PEER_QUESTION, row, "cpu", SHORT).missing
    assert missing == "needs 1 GiB of memory, and 1 GiB are free"


def failing(error: Exception) -> Row:
    def build() -> Any:
        raise error

    return Row("one", build)


def test_what_the_driver_refuses_costs_a_row_and_not_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_command, "no_device", lambda question, device: "")
    of_cuda = _cuda.QUESTIONS[0]
    result = _command.one(of_cuda, failing(RuntimeError("CUDA error: unspecified\nmore")), "cuda", SHORT)
    assert (result.missing, result.wrong) == ("RuntimeError: CUDA error: unspecified", True)
    result = _command.one(of_cuda, failing(MemoryError("none left")), "cuda", SHORT)
    assert (result.missing, result.wrong) == ("out of memory: none left", False)
    with pytest.raises(RuntimeError, match="ours"):
        _command.one(_calls.PEER_QUESTION, failing(RuntimeError("ours")), "cpu", SHORT)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "bool", "int64"])
def test_random_data_is_of_the_dtype_and_not_constant(dtype: str) -> None:
    a = random_array(dtype, 64)
    assert str(a.dtype) == dtype
    assert len({x.tobytes() for x in a}) > 1


def test_a_run_in_short_is_of_the_rows_that_were_measured() -> None:
    run = _results.load(ROOT / "benchmarks" / "results" / "intel-xeon-2-cores" / "results.json")
    lines = _short.short(run).splitlines()
    assert lines[0].split() == ["tensorbridge", "by", "hand", "ours", "/", "by", "hand", "the", "line", "by", "hand"]
    assert [line.partition("  ")[0] for line in lines[1:]] == [
        words.format("64 MiB").replace("`", "") for words, *_ in _short.HEADLINE
    ]
    as_tensor = next(line for line in lines if line.startswith("array to torch, shared"))
    assert as_tensor.endswith("x  torch.as_tensor(a)")
    timed = next(r for r in run.results if r.key == "B2 · float32 to float16, 64 MiB")
    sizes = [timed._replace(title=f"float32 to float16, {n} MiB", nbytes=n << 20) for n in (1, 16)]
    assert _short.short(run._replace(results=tuple(sizes))).splitlines()[1].startswith("16 MiB float32 to float16  ")
    none = tuple(r._replace(missing="no device", timings=()) for r in run.results)
    assert _short.short(run._replace(results=none)) == ""


def test_suites_run_with_timing_off() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_suite_asks_its_question() -> None:
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert path.read_text(encoding="utf-8").startswith('"""Question: '), path.name


def test_settings_of_a_quick_run_are_short() -> None:
    assert _measure.QUICK.rounds >= _measure.FEWEST
    assert _measure.QUICK.case_s < Settings().case_s
    assert find_spec("tensorbridge._bench") is not None
