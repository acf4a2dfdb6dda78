"""Numbers as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best, two figures or more: `0.4 s`, `52 s`, `7.1 min`, `43 min`, `4.3 h`, `2.1 days`."""
    units = ((1.0, "s", 99.5), (60.0, "min", 99.5), (3600.0, "h", 47.95), (86400.0, "days", float("inf")))
    size, unit, _ = next(each for each in units if seconds / each[0] < each[2])
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 9.95 or unit in ("h", "days") else f"{value:.0f} {unit}"


def folded(numbers: list[int]) -> str:
    """Ascending whole numbers, neighbours as ranges: `0 to 18`, `0, 2 to 4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"
