"""The order of the samples, each in a fresh process, with a time limit and the memory it takes."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm, applicable
from benchmarks.cases import Case
from benchmarks.ceilings import CEILINGS
from benchmarks.files import CheckpointFile, prepare
from benchmarks.worker import anonymous_bytes

__all__ = ["Settings", "measure_case", "run_sample"]

ROOT = Path(__file__).resolve().parents[1]
MEMORY_INTERVAL_S = 0.0003


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        samples: Timed samples of every arm.
        folder: Where the checkpoints are kept.
        timeout_s: A sample that takes longer is stopped and reported as such.
        patience_s: An arm whose sample takes longer is sampled once only.
        memory: Whether every arm runs once more, untimed, to see its peak memory.
    """

    device: str
    samples: int
    folder: Path
    timeout_s: float
    patience_s: float
    memory: bool


def measure_case(case: Case, arms: list[Arm], settings: Settings, say: Callable[[str], object]) -> dict[str, Any]:
    """All samples of one case.

    Arms take turns: each repetition runs every one of them once, starting one further on, so that what changes on the
    machine meanwhile (and what one leaves behind for the next) is spread over all.

    Returns:
        The case, its file, and for each contestant its samples or what went wrong: what the JSON file holds.
    """
    file = prepare(case, settings.folder)
    entries = [
        {"name": ceiling.name, "kind": "ceiling", "main": ceiling.main, "samples": []}
        for ceiling in CEILINGS.values()
        if case.ceilings and ceiling.applies(case, settings.device)
    ]
    requests = {entry["name"]: _request(case, file, settings, ceiling=entry["name"]) for entry in entries}
    for arm in arms:
        if not applicable(arm, case, settings.device):
            continue
        own = file if arm.variant is None else prepare(case, settings.folder, arm.variant)
        requests[arm.name] = _request(case, own, settings, arm=arm.name)
        entries.append(
            {"name": arm.name, "kind": "arm", "mapped": arm.mapped and settings.device == "cpu", "samples": []}
        )

    if settings.memory:
        for entry in entries:
            if entry["kind"] == "arm":
                entry["memory"] = _memory_sample(case, requests[entry["name"]], settings)
                _note_error(entry, entry["memory"], file)
    for repetition in range(settings.samples):
        first = repetition % max(len(entries), 1)
        for entry in entries[first:] + entries[:first]:
            if "error" in entry or entry.get("slow"):
                continue
            sample = run_sample(requests[entry["name"]], settings.timeout_s)
            _note_error(entry, sample, file)
            if "load" in sample:
                entry["samples"].append(sample)
                entry["slow"] = sample["load"] > settings.patience_s
        say(f"  {case.name}: {repetition + 1} of {settings.samples}")
    return {"case": asdict(case), "file": asdict(file), "entries": entries}


def run_sample(request: dict[str, Any], timeout_s: float, *, watch_memory: bool = False) -> dict[str, Any]:
    """Run the request in a fresh process.

    Args:
        request: What `worker.run` takes.
        timeout_s: The process is killed after so many seconds.
        watch_memory: Look at its memory all the time between its marks, which takes time from it on a small machine.

    Returns:
        The worker's result, with ``peak_anonymous`` in bytes where memory was watched; or only an ``error``.
    """
    receiving, sending = os.pipe()
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(request), str(sending)]
    with tempfile.TemporaryFile() as complaints, os.fdopen(receiving, "rb", buffering=0) as channel:
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[sending], stdout=subprocess.DEVNULL, stderr=complaints)
        os.close(sending)
        try:
            text, peak = _listen(channel, process.pid, timeout_s, watch_memory=watch_memory)
        except TimeoutError:
            return {"error": f"not done after {timeout_s:.0f} s"}
        finally:
            process.kill()
            process.wait()
        lines = text.decode().splitlines()
        if not lines or not lines[-1].startswith("{"):
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            return {"error": f"the process ended with {process.returncode}: {''.join(last)}"}
    return json.loads(lines[-1]) | ({"peak_anonymous": peak} if watch_memory else {})


def _listen(channel: Any, process: int, timeout_s: float, *, watch_memory: bool) -> tuple[bytes, int]:
    """What the process writes until it closes the channel, and the most memory seen between its marks."""
    text, peak = b"", 0
    deadline = time.monotonic() + timeout_s
    while True:
        loading = watch_memory and text.startswith(b"start\n") and b"end\n" not in text
        ready, _, _ = select.select([channel], [], [], MEMORY_INTERVAL_S if loading else 1.0)
        if loading:
            peak = max(peak, anonymous_bytes(process))
        if ready:
            part = channel.read(1 << 16)
            text += part
            if not part:
                return text, peak
        if time.monotonic() > deadline:
            raise TimeoutError


def _memory_sample(case: Case, request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    sample = run_sample(request, settings.timeout_s, watch_memory=True)
    if "load" not in sample:
        return sample
    own = sample["model_bytes"] if case.into == "meta" and settings.device == "cpu" else 0
    extra = sample["peak_anonymous"] - sample["anonymous_before"] - own
    keys = ("checksum", "model_bytes", "anonymous_before", "peak_anonymous", "peak_resident", "gpu_peak", "gpu_growth")
    gpu_extra = sample["gpu_peak"] - sample["model_bytes"] if settings.device == "cuda" else None
    return {"extra_bytes": extra, "gpu_extra_bytes": gpu_extra} | {key: sample[key] for key in keys}


def _note_error(entry: dict[str, Any], sample: dict[str, Any], file: CheckpointFile) -> None:
    if "error" in sample:
        entry["error"] = sample["error"]
    elif entry["kind"] == "arm" and sample["checksum"] != file.expected:
        entry["error"] = f"wrong data: the model's checksum is {sample['checksum']}, not {file.expected}"


def _request(case: Case, file: CheckpointFile, settings: Settings, **who: str) -> dict[str, Any]:
    device = "cuda:0" if settings.device == "cuda" else "cpu"
    return {"case": asdict(case), "path": file.path, "device": device, **who}
