"""Two results side by side: what became faster or slower by more than the rounds of either run scatter."""

from __future__ import annotations

from statistics import median

from tensorbridge._bench._measure import Timing, spread
from tensorbridge._bench._report import duration
from tensorbridge._bench._results import Result, Run, compared

LEAST = 0.10  # smaller differences also come from where the system puts an array in this process


def compare(old: Run, new: Run, old_name: str) -> str:
    """A text for the terminal: one line for each of our lines of code that changed, and a count of the others."""
    before = {r.key: r for r in old.results}
    after = {r.key: r for r in new.results}
    same_machine = all(old.machine.get(k) == new.machine.get(k) for k in ("CPU", "cores", "GPU"))
    lines = [("row", "way", "before", "now", "ratio to the line by hand", "verdict")]
    steady = 0
    for key in before.keys() & after.keys():
        if before[key].missing or after[key].missing:
            continue
        for was, now in _pairs(before[key], after[key]):
            ratios = _by_hand(before[key], was), _by_hand(after[key], now)
            verdict = _verdict(was, now, ratios, same_machine)
            if not verdict:
                steady += 1
                continue
            text = (
                ""
                if ratios[0] is None or ratios[1] is None
                else f"{median(ratios[0]):.2f}x to {median(ratios[1]):.2f}x"
            )
            lines.append((key, now.way.name, duration(median(was.ns)), duration(median(now.ns)), text, verdict))
    lines[1:] = sorted(lines[1:], key=lambda line: (line[-1], line[0]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    said = [f"Compared with {old_name}:"]
    if not same_machine:
        said.append("  another machine, so only the ratio to the line by hand is judged, not the time")
    said += ["", *rows, ""] if len(rows) > 1 else [""]
    said.append(
        f"{len(rows) - 1} of {len(rows) - 1 + steady} lines of tensorbridge changed by more than their rounds scatter."
    )
    said += _only(before, after, "measured there alone") + _only(after, before, "measured here alone")
    return "\n".join(said)


def _pairs(before: Result, after: Result) -> list[tuple[Timing, Timing]]:
    now = {t.way.name: t for t in after.ours()}
    return [(t, now[t.way.name]) for t in before.ours() if t.way.name in now]


def _by_hand(result: Result, ours: Timing) -> list[float] | None:
    """Our time over the first other way of the same kind, round by round."""
    others = [t for t in result.timings if t.way.role != "bridge"]
    alike = [t for t in others if t.way.state == ours.way.state] or others
    return compared("cost", ours, alike[0]) if alike else None


def _verdict(
    was: Timing, now: Timing, ratios: tuple[list[float] | None, list[float] | None], same_machine: bool
) -> str:
    """On one machine, what both the time and the ratio say: load moves times alone, and the other line moves ratios."""
    time = _moved(was.ns, now.ns)
    if ratios[0] is None or ratios[1] is None:
        return time if same_machine else ""
    ratio = _moved(ratios[0], ratios[1])
    return ratio if not same_machine or ratio == time else ""


def _moved(was: tuple[float, ...] | list[float], now: tuple[float, ...] | list[float]) -> str:
    if abs(median(now) / median(was) - 1) < LEAST:
        return ""
    (low_was, high_was), (low, high) = spread(was), spread(now)
    return "slower" if low > high_was else "faster" if high < low_was else ""


def _only(here: dict[str, Result], there: dict[str, Result], what: str) -> list[str]:
    timed = {key for key, r in there.items() if not r.missing}
    keys = [key for key, r in here.items() if not r.missing and key not in timed]
    return [f"{len(keys)} rows {what}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"] if keys else []
