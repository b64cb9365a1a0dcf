"""Draws the folders of torchload and who imports whom, from the code itself: `python docs/draw_house.py`.

The docs build runs it, and a test says when the drawing no longer matches the code.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "explanation" / "house.svg"

# What each folder is for; the order is that in which data passes through the stages.
ROLES = {
    "errors": "what can go wrong",
    "core": "the vocabulary",
    "formats": "1 open",
    "match": "2 select, 3 match",
    "model": "places to fill",
    "transfer": "5 transfer",
    "plan": "4 plan",
    "training": "for resuming",
    "writing": "for saving",
    "api": "one file per function",
}
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW = 760, 150, 46, 96
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #24292f; text-anchor: middle }
.name { font-weight: 600 } .role { font-size: 12px; fill: #57606a }
.box { fill: #f6f8fa; stroke: #8c959f } .stage { fill: #ddf4ff; stroke: #0969da }
.arrow { stroke: #8c959f; fill: none } .head { fill: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .role { fill: #9198a1 }
  .box { fill: #151b23; stroke: #656c76 } .stage { fill: #0c2d4d; stroke: #4493f8 }
  .arrow { stroke: #656c76 } .head { fill: #656c76 }
}
</style>"""


def imports() -> dict[str, set[str]]:
    """Folder, or module at the top, → the others that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "torchload").rglob("*.py")):
        home = path.relative_to(ROOT / "torchload").parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.module == "torchload":
                names = [f"torchload.{alias.name}" for alias in node.names]
            for name in names:
                package, _, rest = name.partition(".")
                other = rest.partition(".")[0]
                if package == "torchload" and other and other != home:
                    found[home].add(other)
    found["errors"].discard("core")  # for printable text alone, as the contracts in pyproject.toml say
    return found


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """How many steps of imports lie below each; 0 imports nothing of the rest."""
    level: dict[str, int] = {}

    def of(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"imports run in a circle: {' → '.join([*above, name])}")
        if name not in level:
            level[name] = 1 + max((of(other, (*above, name)) for other in edges.get(name, ())), default=-1)
        return level[name]

    for name in ROLES:
        of(name)
    return level


def direct(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The edges that are no shortcut of others: with those drawn, the rest can be seen."""

    def reachable(start: str) -> set[str]:
        below = set(edges.get(start, ()))
        return below.union(*(reachable(other) for other in below)) if below else below

    return {
        (above, below)
        for above, others in edges.items()
        for below in others
        if not any(below in reachable(other) for other in others)
    }


def draw() -> str:
    edges = imports()
    if unknown := set(edges) - set(ROLES):
        raise ValueError(f"say in ROLES what {sorted(unknown)} is for")
    level = levels(edges)
    rows: dict[int, list[str]] = defaultdict(list)
    for name in ROLES:
        rows[level[name]].append(name)
    height = ROW * len(rows) - (ROW - BOX_HEIGHT) + 20
    shown = sorted(direct(edges))
    place: dict[str, tuple[float, float]] = {}
    for number, row in sorted(rows.items()):
        for index, name in enumerate(row):
            x = WIDTH * (index + 0.5) / len(row)
            below = [place[other][0] for above, other in shown if above == name]
            if len(row) == 1 and below:  # what is alone in its row stands over what it imports
                x = sum(below) / len(below)
            place[name] = (x, height - 10 - BOX_HEIGHT - ROW * number)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'role="img" aria-label="The folders of torchload, each above those that it imports">'
        ),
        STYLE,
        (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
        ),
    ]
    for above, below in shown:
        (x1, y1), (x2, y2) = place[above], place[below]
        parts.append(
            f'<path class="arrow" marker-end="url(#head)" d="M{x1:.0f} {y1 + BOX_HEIGHT:.0f} L{x2:.0f} {y2 - 2:.0f}"/>'
        )
    for name, (x, y) in place.items():
        kind = "stage" if ROLES[name][0].isdigit() else "box"
        parts += [
            (
                f'<rect class="{kind}" x="{x - BOX_WIDTH / 2:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" '
                f'height="{BOX_HEIGHT}" rx="6"/>'
            ),
            f'<text class="name" x="{x:.0f}" y="{y + 19:.0f}">{escape(name)}</text>',
            f'<text class="role" x="{x:.0f}" y="{y + 37:.0f}">{escape(ROLES[name])}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
