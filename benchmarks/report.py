"""Medians and ratios of a run, as a table for the terminal, as JSON and as Markdown."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS

__all__ = ["OURS", "Row", "main_ceiling", "markdown", "rows_of", "summary", "table", "write_docs"]

OURS = "torchload"
GIB, MIB = 1 << 30, 1 << 20
BEGIN, END = "<!-- results on {}: begin -->", "<!-- results on {}: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant in one case, summed up.

    Attributes:
        name: The contestant.
        is_ceiling: Whether it is a limit of the machine.
        mapped: Whether the weights may be views of the file.
        samples: Number of timed samples.
        seconds: Median until every page of every tensor had been touched; ``None`` where it failed.
        spread: Fastest and slowest sample in seconds.
        load_seconds: Median until the call returned.
        forward_seconds: Median until the first forward pass was done; ``None`` for a ceiling.
        rate: Bytes of tensor data per second, by `seconds`.
        of_ceiling: The main ceiling's time by this one's; ``None`` without a ceiling.
        slower: This one's time by torchload's; ``None`` without torchload.
        extra_bytes: Peak anonymous memory above the model's own; ``None`` if not measured.
        gpu_extra_bytes: Peak of torch's GPU memory above the model's own; ``None`` without a GPU.
        error: What went wrong, or ``None``.
    """

    name: str
    is_ceiling: bool
    mapped: bool
    samples: int
    seconds: float | None
    spread: tuple[float, float] | None
    load_seconds: float | None
    forward_seconds: float | None
    rate: float | None
    of_ceiling: float | None
    slower: float | None
    extra_bytes: int | None
    gpu_extra_bytes: int | None
    error: str | None


def rows_of(measured: dict[str, Any]) -> list[Row]:
    """The contestants of one measured case: ceilings first, then by time."""
    entries = measured["entries"]
    times = {entry["name"]: _median(entry, "touch", "load") for entry in entries if "error" not in entry}
    main = times.get(main_ceiling(measured) or "")
    ours = times.get(OURS)
    rows = []
    for entry in entries:
        seconds = times.get(entry["name"])
        every = [sample.get("touch", sample["load"]) for sample in entry["samples"]]
        rows.append(
            Row(
                name=entry["name"],
                is_ceiling=entry["kind"] == "ceiling",
                mapped=entry.get("mapped", False),
                samples=len(every),
                seconds=seconds,
                spread=(min(every), max(every)) if seconds and every else None,
                load_seconds=_median(entry, "load") if seconds else None,
                forward_seconds=_median(entry, "forward") if seconds else None,
                rate=measured["file"]["nbytes"] / seconds if seconds else None,
                of_ceiling=main / seconds if main and seconds else None,
                slower=seconds / ours if ours and seconds else None,
                extra_bytes=entry.get("memory", {}).get("extra_bytes"),
                gpu_extra_bytes=entry.get("memory", {}).get("gpu_extra_bytes"),
                error=entry.get("error"),
            )
        )
    return sorted(rows, key=lambda row: (not row.is_ceiling, row.seconds is None, row.seconds or 0.0))


def main_ceiling(measured: dict[str, Any]) -> str | None:
    """Name of the ceiling that ratios are taken to: the fastest of the main ones."""
    timed = {
        entry["name"]: _median(entry, "load") or math.inf
        for entry in measured["entries"]
        if entry.get("main") and "error" not in entry
    }
    return min(timed, key=timed.__getitem__, default=None)


def table(run: dict[str, Any]) -> str:
    """The whole run for a terminal."""
    lines = [_machine(run["environment"]), ""]
    for measured in run["cases"]:
        lines += [_title(measured), *_columns([_HEAD, *(_cells(row) for row in rows_of(measured))]), ""]
    lines += _columns([_SUMMARY_HEAD, *summary(run)])
    lines += ["", _imports(run), *(f"skipped: {name} ({reason})" for name, reason in run["skipped"].items())]
    return "\n".join(lines).rstrip() + "\n"


def markdown(run: dict[str, Any], charts: list[str]) -> str:
    """The whole run for the documentation."""
    lines = [_machine(run["environment"]), "", *_grid([_SUMMARY_HEAD, *summary(run)]), "", _imports(run), ""]
    lines += [f"![{Path(chart).stem}]({chart})\n" for chart in charts]
    for measured in run["cases"]:
        lines += [f"### {_title(measured)}", "", *_grid([_HEAD, *(_cells(row) for row in rows_of(measured))]), ""]
    if run["skipped"]:
        lines += ["Skipped: " + ", ".join(f"{name} ({reason})" for name, reason in run["skipped"].items()) + ".", ""]
    return "\n".join(lines)


def write_docs(page: Path, run: dict[str, Any], charts: list[str], machine: str) -> None:
    """Replace what stands between the two markers of a machine on a Markdown page."""
    begin, end = BEGIN.format(machine), END.format(machine)
    text = page.read_text()
    if begin not in text or end not in text:
        raise SystemExit(
            f"{page} has no place for the results of {machine!r}: put these lines there: {begin} and {end}"
        )
    before, rest = text.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{markdown(run, charts)}\n{end}{after}")


def summary(run: dict[str, Any]) -> list[list[str]]:
    """One line for each case: torchload against the ceiling, the fastest peer, and torch's plain recipe."""
    lines = []
    for measured in run["cases"]:
        rows = {row.name: row for row in rows_of(measured)}
        ours = rows.get(OURS)
        if ours is None or ours.seconds is None:
            lines.append([measured["case"]["name"], ours.error if ours and ours.error else "—", "", "", "", ""])
            continue
        peers = [row for row in rows.values() if not row.is_ceiling and row.seconds and not row.name.startswith(OURS)]
        best = min(peers, key=lambda row: row.seconds or 0.0, default=None)
        eager = min((row for row in peers if not row.mapped), key=lambda row: row.seconds or 0.0, default=None)
        plain = next((row for row in peers if row.name.startswith("torch.load +")), None)
        named = [f"{_number(row.slower)} × {row.name}" for row in dict.fromkeys((best, eager)) if row]
        lines.append(
            [
                measured["case"]["name"],
                _seconds(ours.seconds),
                _percent(ours.of_ceiling),
                ", ".join(named) or "—",
                f"{_number(plain.slower)} ×" if plain else "—",
                _extra(ours),
            ]
        )
    return lines


_HEAD = [
    "",
    "until touched",
    "fastest–slowest",
    "call alone",
    "first forward",
    "GiB/s",
    "of ceiling",
    "× torchload",
    "extra MiB",
]
_SUMMARY_HEAD = ["case", OURS, "of ceiling", "fastest peer (and fastest that copies)", "torch.load", "extra MiB"]


def _cells(row: Row) -> list[str]:
    name = ("▔ " if row.is_ceiling else "") + row.name + (" (may map)" if row.mapped else "")
    if row.seconds is None or row.spread is None:
        return [name, row.error or "no sample", *[""] * 7]
    return [
        name + (f" ({row.samples} sample)" if row.samples == 1 else ""),
        _seconds(row.seconds),
        f"{_seconds(row.spread[0])}–{_seconds(row.spread[1])}",
        _seconds(row.load_seconds),
        _seconds(row.forward_seconds),
        _number(row.rate / GIB if row.rate else None),
        _percent(row.of_ceiling),
        _number(row.slower),
        _extra(row),
    ]


def _median(entry: dict[str, Any], *keys: str) -> float | None:
    """Median of the first of the keys that the samples have."""
    for key in keys:
        values = [sample[key] for sample in entry["samples"] if key in sample]
        if values:
            return statistics.median(values)
    return None


def _title(measured: dict[str, Any]) -> str:
    case, file = measured["case"], measured["file"]
    cast = f", {case['file_dtype']} → {case['model_dtype']}" if case["file_dtype"] != case["model_dtype"] else ""
    return f"{case['name']}: {file['tensors']:,} tensors, {file['nbytes'] / MIB:,.1f} MiB{cast}"


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    gpu = f", {environment['gpu']}" if environment.get("gpu") else ""
    caches = ", ".join(f"{name} {size}" for name, size in environment.get("caches", {}).items())
    return (
        f"{environment['processor']}, {environment['cores']} cores{caches and f' ({caches})'}, "
        f"{environment['memory_gib']} GiB{gpu}; "
        f"{environment['system']}, {environment['file_system']}; Python {environment['python']}; "
        f"torchload at {environment['torchload_commit']}; {versions}; "
        f"load average at the start {environment['load_average_at_start'][0]}"
    )


def _imports(run: dict[str, Any]) -> str:
    """What the contestants' modules take to import, beside torch's."""
    seconds: dict[str, list[float]] = {}
    for measured in run["cases"]:
        for entry in measured["entries"]:
            if (arm := ARMS.get(entry["name"])) is not None and arm.modules:
                seconds.setdefault(arm.distribution, []).extend(sample["import"] for sample in entry["samples"])
    medians = sorted((statistics.median(samples), name) for name, samples in seconds.items() if samples)
    return "Imported before the clock starts: " + ", ".join(f"{name} {_seconds(time)}" for time, name in medians) + "."


def _columns(rows: list[list[str]]) -> list[str]:
    """Aligned text; an error takes the rest of its line."""
    complete = [row for row in rows if any(row[2:])]
    widths = [max(len(row[at]) for row in complete) for at in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        if not any(row[2:]):
            lines.append(f"  {row[0]:<{widths[0]}}  {row[1]}")
            continue
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([f"  {row[0]:<{widths[0]}}", *cells]))
    return lines


def _grid(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def _seconds(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _extra(row: Row) -> str:
    gpu = f" + {_mebibytes(row.gpu_extra_bytes)} GPU" if row.gpu_extra_bytes is not None else ""
    return _mebibytes(row.extra_bytes) + gpu


def _mebibytes(value: int | None) -> str:
    return "—" if value is None else f"{max(value, 0) / MIB:,.0f}"
