"""What a session on a card came to, read from the log of its tests (pytest -v), which may end in the middle of one.

python3 benchmarks/gpu_summary.py seen tests.txt     the tests that have begun, one a line
python3 benchmarks/gpu_summary.py ended tests.txt    whether pytest came to its end, as an exit status
python3 benchmarks/gpu_summary.py page OUT           into OUT/summary.txt and OUT/facts.txt
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

BEGUN = re.compile(r"^(tests/\S+\.py::\w+(?:\[.*?\])?)(?=\s|$)(.*)")
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
LOST = "LOST"  # the process ended in the test, or its time was up
WORST = ["PASSED", "SKIPPED", LOST, "FAILED", "ERROR"]


def outcomes(log: str) -> dict[str, str]:
    """By test; what a test printed may stand between its name and its outcome."""
    found: dict[str, str] = {}
    for line in log.splitlines():
        if begun := BEGUN.match(line):
            name, rest = begun.groups()
            outcome = OUTCOME.search(rest)
            made = outcome[1] if outcome else LOST
            found[name] = max(made, found.get(name, made), key=WORST.index)
        elif found and (outcome := re.match(r"(PASSED|FAILED|ERROR|SKIPPED)\b +\[", line)):
            name = next(reversed(found))
            found[name] = outcome[1] if found[name] == LOST else found[name]
    return found


def ended(log: str) -> bool:
    """Whether the last process said how many passed and failed, as pytest does at its end."""
    return re.search(r"^=+ .* in [\d.]+s.* =+$", log.rstrip().rpartition("\n")[2]) is not None


def page(log: str) -> str:
    found = outcomes(log)
    why = dict(re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.*?) - (.+)$", log, re.M))
    counts = Counter(found.values())
    lines = ["tests: " + (", ".join(f"{counts[o]} {o.lower()}" for o in WORST if counts[o]) or "none ran")]
    lines += [f"  {outcome} {name}: {why.get(name, '')}" for name, outcome in found.items() if outcome != "PASSED"]
    slow = re.findall(r"^\s*([\d.]+)s (call|setup|teardown) +(\S.*)$", log, re.M)
    lines += ["", "the slowest:"]
    lines += [f"  {s} s {what} {name}" for s, what, name in sorted(slow, key=lambda each: -float(each[0]))[:8]]
    return "\n".join(lines)


def facts(log: str, table: str) -> str:
    """The rows of the table of facts that name a probe, with its outcome."""
    found, lines = outcomes(log), []
    for row in table.splitlines():
        for probe in re.findall(r"`(test_\w+)`", row):
            of = Counter(o for name, o in found.items() if re.search(rf"::{probe}(\[|$)", name))
            said = ", ".join(f"{n} {outcome.lower()}" for outcome, n in of.items()) or "not run"
            lines.append(f"{said:<10} {probe}\n           {row.split('|')[1].strip()}")
    return "\n".join(lines) + "\n"


def main(command: str, where: str) -> None:
    if command == "seen":
        print(*outcomes(Path(where).read_text(errors="replace")), sep="\n")
        return
    if command == "ended":
        sys.exit(not ended(Path(where).read_text(errors="replace")))
    out = Path(where)
    log = (out / "tests.txt").read_text(errors="replace")
    with (out / "summary.txt").open("a") as summary:
        print("", page(log), sep="\n", file=summary)
    table = Path(__file__).parent.parent / "docs" / "gpu-facts.md"
    (out / "facts.txt").write_text(facts(log, table.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
