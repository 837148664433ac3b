"""What a session on a card says of its tests, from the log that they leave: also where a process ended in one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOG = """\
tests/gpu/test_gpu_order.py::test_a PASSED                                [ 10%]
tests/gpu/test_gpu_order.py::test_b[a forked worker] FAILED               [ 20%]
tests/gpu/test_gpu_order.py::test_b[{'data': (1, False)}] something printed
PASSED                                                                    [ 30%]
tests/gpu/test_gpu_order.py::test_c ERROR                                 [ 40%]
0.50s call     tests/gpu/test_gpu_order.py::test_a
2.00s setup    tests/gpu/test_gpu_order.py::test_b[a forked worker]
FAILED tests/gpu/test_gpu_order.py::test_b[a forked worker] - assert 1 == 2
ERROR tests/gpu/test_gpu_order.py::test_c - RuntimeError: no - or so
tests/gpu/test_gpu_order.py::test_hangs Timeout (0:01:00)!
Thread 0x00007f1949dffb80 (most recent call first):
"""


@pytest.fixture
def summary():
    spec = importlib.util.spec_from_file_location("gpu_summary", ROOT / "benchmarks" / "gpu_summary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_that_has_begun_has_an_outcome_or_is_lost(summary):
    names = ["test_a", "test_b[a forked worker]", "test_b[{'data': (1, False)}]", "test_c", "test_hangs"]
    found = summary.outcomes(LOG)
    assert list(found) == [f"tests/gpu/test_gpu_order.py::{name}" for name in names]
    assert list(found.values()) == ["PASSED", "FAILED", "PASSED", "ERROR", "LOST"]


def test_a_later_run_of_a_test_does_not_hide_that_it_failed(summary):
    again = LOG + "tests/gpu/test_gpu_order.py::test_c PASSED [ 10%]\n"
    assert summary.outcomes(again)["tests/gpu/test_gpu_order.py::test_c"] == "ERROR"


@pytest.mark.parametrize(
    ("last", "ended"),
    [
        ("", False),
        ("======================== 1 failed, 2 passed in 0.75s =========================\n", True),
        ("================== 3 passed, 1 skipped in 83.10s (0:01:23) ===================\n", True),
        ("=========================== short test summary info ============================\n", False),
    ],
)
def test_a_test_that_hangs_is_told_from_one_that_fails_by_the_end_of_the_log(summary, last, ended):
    """Both end the process with status 1: the stacks of the one are shown by faulthandler, which exits so."""
    assert summary.ended(LOG + last) is ended
    assert not summary.ended(LOG + last + LOG)


def test_the_page_counts_and_gives_reasons(summary):
    lines = summary.page(LOG).splitlines()
    assert lines[0] == "tests: 2 passed, 1 lost, 1 failed, 1 error"
    assert "  FAILED tests/gpu/test_gpu_order.py::test_b[a forked worker]: assert 1 == 2" in lines
    assert "  ERROR tests/gpu/test_gpu_order.py::test_c: RuntimeError: no - or so" in lines
    assert "  LOST tests/gpu/test_gpu_order.py::test_hangs: " in lines
    assert (
        lines[lines.index("the slowest:") + 1] == "  2.00 s setup tests/gpu/test_gpu_order.py::test_b[a forked worker]"
    )


def test_each_fact_has_the_answer_of_its_probe(summary):
    table = "| assumed | by | probe | state |\n| b is so | x | *order* `test_b` | not run |\n| d | x | `test_d` | |\n"
    told = summary.facts(LOG, table).splitlines()
    assert told[0].split() == ["1", "failed,", "1", "passed", "test_b"]
    assert told[1].strip() == "b is so"
    assert told[2].split() == ["not", "run", "test_d"]


SESSION = (ROOT / "benchmarks" / "gpu_session.sh").read_text(encoding="utf-8")
MARKED = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]


def test_every_module_with_tests_for_a_device_is_in_the_session():
    missing = [path.name for path in MARKED if path.name != Path(__file__).name and path.name not in SESSION]
    assert missing == []


def test_every_probe_that_the_facts_name_is_a_test_of_the_session(summary):
    tests = "".join(path.read_text(encoding="utf-8") for path in MARKED)
    table = (ROOT / "docs" / "gpu-facts.md").read_text(encoding="utf-8")
    probes = [line.split()[-1] for line in summary.facts("", table).splitlines() if line.startswith("not run")]
    assert len(probes) > 30
    assert [probe for probe in probes if f"def {probe}(" not in tests] == []


# What a GPU machine has beside torch and CuPy is pytest and hypothesis.
ABSENT = ["PIL", "matplotlib", "sklearn", "scipy", "pandas"]


def test_tests_for_a_device_are_found_where_nothing_else_is_installed():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    assert "tests/gpu/test_gpu_lifetime.py::" in run.stdout
