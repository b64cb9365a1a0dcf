"""The charts, as SVG written by hand: no plotting library, small files, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.cases import FORMATS
from benchmarks.report import OURS, Row, main_ceiling, rows_of

__all__ = ["write_charts"]

WIDTH, LABELS, RIGHT = 900, 330, 130
BAR, GAP = 16, 6
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 14px } .small { font-size: 11px; fill: #57606a }
.ours { fill: #0969da } .peer { fill: #9aa7b5 } .mapped { fill: #d0d7de }
.ceiling { stroke: #cf222e; stroke-dasharray: 4 3 }
.grid { stroke: #d0d7de } .line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .ours { fill: #4493f8 } .peer { fill: #656c76 }
  .mapped { fill: #3d444d } .ceiling { stroke: #f85149 } .grid { stroke: #3d444d }
}
</style>"""
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#57606a", "#0a7ea4", "#a40e26", "#6e7781")


def write_charts(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write one file of bars for each family of cases, and one of lines for each series.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    single = [measured for measured in run["cases"] if measured["case"]["series"] is None]
    drawings = {
        family: _bars(list(group)) for family, group in groupby(single, lambda measured: _family(measured["case"]))
    }
    for series, kind in product(("tensors", "bytes"), FORMATS):
        points = [
            measured
            for measured in run["cases"]
            if (measured["case"]["series"], measured["case"]["file_format"]) == (series, kind)
        ]
        if len(points) > 1:
            drawings[f"cost-by-{series}-{kind}"] = _lines(points, series, kind)
    files = []
    for name, drawing in drawings.items():
        files.append(folder / f"{run['settings']['device']}-{name}.svg")
        files[-1].write_text(drawing)
    return files


def _family(case: dict[str, Any]) -> str:
    return case["name"].split("/")[0]


# ---------------------------------------------------------------------------------------------------------------- bars


def _bars(family: list[dict[str, Any]]) -> str:
    """A panel of bars for each case: what each contestant moves in a second, and the ceiling as a line across."""
    parts: list[str] = []
    top = 10.0
    for measured in family:
        panel, height = _panel(measured, top)
        parts += panel
        top += height + 18
    return _svg(top, parts)


def _panel(measured: dict[str, Any], top: float) -> tuple[list[str], float]:
    rows = rows_of(measured)
    bars = [row for row in rows if not row.is_ceiling]
    amount, unit = _amount(measured)
    # A mapped file may be "ready" at any speed; it must not set the scale.
    scale_rows = [row for row in rows if row.seconds and not row.mapped] or [row for row in rows if row.seconds]
    largest = max((amount / row.seconds for row in scale_rows if row.seconds), default=1.0) * 1.05
    span = WIDTH - LABELS - RIGHT
    parts = [f'<text class="title" x="10" y="{top + 14:.0f}">{escape(measured["case"]["name"])} — {unit}</text>']
    y = top + 26
    first = y
    for row in bars:
        parts.append(f'<text x="{LABELS - 8}" y="{y + 12:.0f}" text-anchor="end">{escape(row.name)}</text>')
        if row.seconds is None:
            parts.append(f'<text class="small" x="{LABELS}" y="{y + 12:.0f}">{escape(row.error or "")[:70]}</text>')
        else:
            rate = amount / row.seconds
            length = min(rate / largest, 1.0) * span
            length = max(length, 1.0)
            value = _short(rate) + (" (may map)" if row.mapped else "")
            parts.append(
                f'<rect class="{_class(row)}" x="{LABELS}" y="{y:.0f}" width="{length:.1f}" height="{BAR}"/>'
                f'<text x="{LABELS + length + 6:.1f}" y="{y + 12:.0f}">{value}</text>'
            )
        y += BAR + GAP
    main = main_ceiling(measured)
    ceiling = next((row for row in rows if row.name == main and row.seconds), None)
    if ceiling is not None and ceiling.seconds:
        x = LABELS + min(amount / ceiling.seconds / largest, 1.0) * span
        parts.append(f'<line class="ceiling" x1="{x:.1f}" x2="{x:.1f}" y1="{first - 4:.0f}" y2="{y:.0f}"/>')
        label = f"{ceiling.name}: {_short(amount / ceiling.seconds)}"
        parts.append(f'<text class="small" x="{x:.1f}" y="{y + 10:.0f}" text-anchor="end">{escape(label)}</text>')
        y += 14
    return parts, y - top


def _amount(measured: dict[str, Any]) -> tuple[float, str]:
    """What a second is divided into, and its name."""
    if measured["case"]["model"].startswith("layer"):
        return measured["file"]["tensors"] / 1000, "thousand tensors per second"
    return measured["file"]["nbytes"] / (1 << 30), "GiB/s"


def _class(row: Row) -> str:
    if row.name == OURS:
        return "ours"
    return "mapped" if row.mapped else "peer"


# --------------------------------------------------------------------------------------------------------------- lines


def _lines(points: list[dict[str, Any]], series: str, kind: str) -> str:
    """Seconds against size, both logarithmic: a straight line at 45 degrees is a cost in proportion."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for measured in points:
        size = measured["file"]["tensors"] if series == "tensors" else measured["file"]["nbytes"] / (1 << 20)
        for row in rows_of(measured):
            if row.seconds and not row.is_ceiling:
                curves.setdefault(row.name, []).append((size, row.seconds))
    if not curves:
        return _svg(20, [])
    height, left, right, top, bottom = 420, 70, 300, 30, 50
    x_axis = _Axis([x for curve in curves.values() for x, _ in curve], left, WIDTH - right)
    y_axis = _Axis([y for curve in curves.values() for _, y in curve], height - bottom, top)
    unit = "tensors" if series == "tensors" else "MiB"
    parts = [f'<text class="title" x="10" y="18">seconds until touched, by {unit}, .{kind}</text>']
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(
            f'<text class="small" x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{value:,g}</text>'
        )
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="small" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g} s</text>')
    ordered = sorted(curves, key=lambda name: (name != OURS, curves[name][-1][1]))
    for number, name in enumerate(ordered):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in sorted(curves[name])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = top + 14 + number * 20
        parts.append(f'<circle cx="{WIDTH - right + 20}" cy="{y - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - right + 32}" y="{y}">{escape(name)}</text>')
    return _svg(max(height, top + 24 + 20 * len(ordered)), parts)


class _Axis:
    """A logarithmic axis over whole decades, from one place in the drawing to another."""

    def __init__(self, values: Iterable[float], begin: float, end: float) -> None:
        values = list(values)
        self.low = math.floor(math.log10(min(values)))
        self.high = max(math.ceil(math.log10(max(values))), self.low + 1)
        self.begin, self.end = begin, end

    def place(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)

    def ticks(self) -> list[float]:
        return [10.0**power for power in range(self.low, self.high + 1)]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _svg(height: float, parts: list[str]) -> str:
    body = "\n".join([STYLE, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}">\n{body}\n</svg>\n'
    )
