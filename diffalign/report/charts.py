"""Charts as SVG for pages: their colours are the page's, every point says its numbers, and a screen reader gets a title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42  # of the axes
COLOURS = 8  # that the page has: --c0, --c1, ...
DASHES = ("", "7 4", "2 4", "9 3 2 3")  # so that lines are told apart without colour


@dataclass(frozen=True)
class Line:
    """Points (x, y) of one colour with a band from `low` to `high`; notes: what is said at each point; number: which colour; faint: a thin
    line without points, behind others."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    notes: Sequence[str]
    number: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with an interval beside its label; none where its ends are None."""

    label: str
    value: float
    low: float | None
    high: float | None
    strong: bool = False


class _Scale:
    """Numbers to places between two ends, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, ticks: int) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = min(values), max(values)
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room
        self.start, self.end = start, end
        whole = all(value == int(value) for value in values)
        found = (
            [low] if low == high else MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
        )
        self.ticks = [float(tick) for tick in found if self.low <= tick <= self.high]

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def said(value: float) -> str:
    """A tick."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.6g}"


def colour(number: int) -> str:
    """Of the page."""
    return f"var(--c{number % COLOURS})"


def lines(parts: Sequence[Line], title: str, below: str) -> str:
    """Lines with bands over a common axis."""
    across = _Scale([v for part in parts for v in part.x], LEFT, WIDTH - RIGHT, 5)
    up = _Scale([v for part in parts for v in (*part.low, *part.high, *part.y)], HEIGHT - BOTTOM, TOP, 5)
    body = [_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 6, below, "middle")]
    for tick in up.ticks:
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick)}" y2="{up(tick)}" stroke="var(--line)"/>')
        body.append(_text(LEFT - 6, up(tick) + 4, said(tick), "end"))
    for tick in across.ticks:
        body.append(_text(across(tick), HEIGHT - BOTTOM + 18, said(tick), "middle"))
    for part in parts:
        if part.faint:
            way = " ".join(f"{across(x)},{up(y)}" for x, y in zip(part.x, part.y, strict=True))
            body.append(f'<polyline points="{way}" fill="none" stroke="{colour(part.number)}" opacity=".35"/>')
    for part in (parts := [part for part in parts if not part.faint]):
        there = [(across(x), up(a), up(b)) for x, a, b in zip(part.x, part.low, part.high, strict=True)]
        edge = [f"{x},{b}" for x, _, b in there] + [f"{x},{a}" for x, a, _ in reversed(there)]
        # One point's band would be a line that nobody sees.
        seen = f'stroke="{colour(part.number)}" stroke-width="2" opacity=".5"' if len(there) == 1 else 'opacity=".15"'
        body.append(f'<polygon points="{" ".join(edge)}" fill="{colour(part.number)}" {seen}/>')
    for part in parts:
        points = [(across(x), up(y)) for x, y in zip(part.x, part.y, strict=True)]
        way, dash = " ".join(f"{x},{y}" for x, y in points), DASHES[part.number % len(DASHES)]
        drawn = f'fill="none" stroke="{colour(part.number)}" stroke-width="2" stroke-dasharray="{dash}"'
        body.append(f'<polyline points="{way}" {drawn}/>')
        for (x, y), note in zip(points, part.notes, strict=True):
            told = f"<title>{escape(f'{part.label}: {note}')}</title>"
            body.append(f'<g class="point">{told}<circle cx="{x}" cy="{y}" r="9" fill="transparent"/>')
            body.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour(part.number)}"/></g>')
    return _svg(body, title, HEIGHT)


def forest(parts: Sequence[Bar], title: str, below: str, nothing: float | None = 0.0) -> str:
    """Values with their intervals, one below another, and where nothing is; None: nowhere."""
    row, height = 40, 40 * len(parts) + BOTTOM
    ends = [v for part in parts for v in (part.value, part.low, part.high, nothing) if v is not None]
    across = _Scale(ends, 12, WIDTH - 12, 5)
    body = [_text(WIDTH / 2, height - 6, below, "middle")]
    if nothing is not None:
        at = f'x1="{across(nothing)}" x2="{across(nothing)}" y1="4" y2="{height - BOTTOM}"'
        body.append(f'<line {at} stroke="var(--quiet)" stroke-dasharray="3 3"/>')
    body += [_text(across(tick), height - BOTTOM + 18, said(tick), "middle") for tick in across.ticks]
    for number, part in enumerate(parts):
        y, stroke = number * row + 28, "var(--text)" if part.strong else "var(--quiet)"
        body.append(_text(12, y - 10, part.label, "start", bold=part.strong))
        if part.low is not None and part.high is not None:
            shape = f'x1="{across(part.low)}" x2="{across(part.high)}" y1="{y}" y2="{y}"'
            body.append(f'<line {shape} stroke="{stroke}" stroke-width="2"/>')
        body.append(f'<circle cx="{across(part.value)}" cy="{y}" r="4" fill="{stroke}"/>')
    return _svg(body, title, height)


def spark(values: Sequence[float]) -> str:
    """A line without axes, as wide as a word; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    low, high, last = min(values), max(values), len(values) - 1
    up = [14 - 12 * (value - low) / ((high - low) or 1.0) for value in values]
    way = " ".join(f"{1 + 78 * k / last:.1f},{y:.1f}" for k, y in enumerate(up))
    drawn = f'<polyline points="{way}" fill="none" stroke="{colour(0)}" stroke-width="1.5"/>'
    return f'<svg class="spark" viewBox="0 0 80 16" aria-hidden="true" xmlns="http://www.w3.org/2000/svg">{drawn}</svg>'


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _svg(body: Sequence[str], title: str, height: int) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join([head, f'<g font-size="13" fill="var(--quiet)">{body[0]}', *body[1:], "</g></svg>"])
