"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import compileall
import fnmatch
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torchload
from benchmarks.arms import ALWAYS, ARMS, Arm
from benchmarks.cases import Case, list_cases
from benchmarks.charts import write_charts
from benchmarks.machine import describe, peer_version
from benchmarks.measure import Settings, measure_case
from benchmarks.report import table, write_docs


def main(arguments: list[str] | None = None) -> int:
    """Measure, or render what was measured before; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.render:
        run = json.loads(options.render.read_text())
    else:
        cases = _choose_cases(options)
        if options.list:
            print("\n".join(case.name for case in cases))
            return 0
        if not cases:
            print("no such case; --list names them", file=sys.stderr)
            return 2
        run = _measure(cases, options)
    print(table(run))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run, indent=1) + "\n")
    if options.out:
        write_charts(run, options.out)
    if options.write_docs:
        folder = options.write_docs.parent / "benchmarks" / options.machine
        charts = write_charts(run, folder)
        names = [f"benchmarks/{options.machine}/{chart.name}" for chart in charts]
        write_docs(options.write_docs, run, names, options.machine)
    return 0


def _measure(cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    compileall.compile_dir(str(Path(torchload.__file__).parent), quiet=1)  # as pip does for those it installs
    arms, skipped = _choose_arms(options.peers)
    settings = Settings(
        options.device, options.samples, options.data, options.timeout, options.patience, options.memory
    )
    run: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": describe([arm.distribution for arm in arms], _existing(options.data)),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "skipped": skipped,
        "cases": [],
    }
    del run["settings"]["folder"]  # says nothing to a reader
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {case.name}", file=sys.stderr)
        run["cases"].append(measure_case(case, arms, settings, lambda text: print(text, file=sys.stderr)))
        if options.json:  # a long run that is interrupted leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(run, indent=1) + "\n")
    return run


def _choose_cases(options: argparse.Namespace) -> list[Case]:
    size = options.size if options.size is not None else 0.25 if options.quick else 2.5
    cases = list_cases(int(size * (1 << 30)), cold=options.cold, quick=options.quick, full=options.full)
    patterns = [pattern.strip() for pattern in options.cases.split(",") if pattern.strip()]
    return [case for case in cases if any(fnmatch.fnmatch(case.name, f"{pattern}*") for pattern in patterns)]


def _choose_arms(peers: str) -> tuple[list[Arm], dict[str, str]]:
    """The arms to run, and the packages left out with the reason."""
    known = {arm.distribution for arm in ARMS.values()}
    wanted = known if peers == "all" else {*ALWAYS, *(peer.strip() for peer in peers.split(",") if peer != "none")}
    if unknown := wanted - known:
        raise SystemExit(f"unknown peers: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    # torchload runs from the working tree, installed or not.
    absent = {name for name in wanted if name not in ALWAYS and peer_version(name) is None}
    skipped = {name: "not installed" if name in absent else "not asked for" for name in known - wanted | absent}
    chosen = [arm for arm in ARMS.values() if arm.distribution in wanted - absent]
    return chosen, dict(sorted(skipped.items()))


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast do checkpoints load?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the weights must arrive")
    parser.add_argument("--cold", action="store_true", help="the cold-cache cases instead of the warm ones")
    parser.add_argument("--quick", action="store_true", help="a few minutes: smaller, and only the most telling cases")
    parser.add_argument("--full", action="store_true", help="also 200,000 tensors")
    parser.add_argument("--cases", default="*", help="comma-separated beginnings or globs of case names: big,many/flat")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--peers", default="all", help="all, none (torch alone), or packages: safetensors,accelerate")
    parser.add_argument("--samples", type=int, default=5, help="timed samples of every arm (default %(default)s)")
    parser.add_argument("--size", type=float, metavar="GIB", help="the big model's float32 size (default 2.5)")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="limit for one sample")
    parser.add_argument("--patience", type=float, default=8, metavar="S", help="a slower arm is sampled once only")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="don't measure peak memory")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(tempfile.gettempdir()) / "torchload-benchmarks",
        help="where the checkpoints are made and kept",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the charts as SVG")
    parser.add_argument(
        "--write-docs", type=Path, metavar="PAGE", help="put tables and charts into a Markdown page: docs/benchmarks.md"
    )
    parser.add_argument("--machine", default="this", help="what the page calls the machine: epyc, xeon")
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="measure nothing; show a JSON file of an earlier run"
    )
    return parser


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        raise SystemExit("The benchmarks read /proc and the page cache, as Linux has them.")
    raise SystemExit(main())
