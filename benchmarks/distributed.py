"""Several ranks load one model: ``python -m benchmarks.distributed --help``.

For each way of loading: seconds until the last rank is done, bytes that all ranks together took from the device and
read in all, and the peak of private memory that a rank needed beside what it had before. Every sample is a fresh group
of gloo ranks, and what each rank holds afterwards is compared with the file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from benchmarks.cases import Case
from benchmarks.files import prepare
from benchmarks.machine import describe, drop_from_cache, read_into_cache
from benchmarks.models import build_meta, materialize
from benchmarks.worker import anonymous_bytes

__all__ = ["WAYS", "Sample", "main", "sample"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One load by all ranks.

    Attributes:
        seconds: From the common start until the last rank was done.
        device_bytes: What all ranks together took from the device.
        read_bytes: What they asked the system to read; a mapping's pages don't count there.
        peak_bytes: Private memory that the rank that needed most of it needed beside its model.
    """

    seconds: float
    device_bytes: int
    read_bytes: int
    peak_bytes: int


def _torchload(model: nn.Module, paths: dict[str, str]) -> None:
    from torchload import smart_load

    smart_load(model, paths["pth"])


def _torchload_together(model: nn.Module, paths: dict[str, str]) -> None:
    from torchload import smart_load

    smart_load(model, paths["pth"], process_group=dist.group.WORLD)


def _torch_mapped(model: nn.Module, paths: dict[str, str]) -> None:
    model.load_state_dict(torch.load(paths["pth"], mmap=True, weights_only=True))


def _set_state_dict(model: nn.Module, paths: dict[str, str], *, broadcast: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    reads = not broadcast or dist.get_rank() == 0
    state = torch.load(paths["pth"], mmap=True, weights_only=True) if reads else {}
    set_model_state_dict(model, state, options=options)


def _broadcast(model: nn.Module, paths: dict[str, str]) -> None:
    _set_state_dict(model, paths, broadcast=True)


def _every_rank(model: nn.Module, paths: dict[str, str]) -> None:
    _set_state_dict(model, paths, broadcast=False)


def _dcp(model: nn.Module, paths: dict[str, str]) -> None:
    import torch.distributed.checkpoint as dcp

    state = model.state_dict()
    dcp.load(state, checkpoint_id=paths["dcp"])


WAYS: dict[str, dict[str, Callable[[nn.Module, dict[str, str]], None]]] = {
    "replicas": {
        "torchload": _torchload,
        "torchload, process_group=": _torchload_together,
        "torch.load(mmap=True)": _torch_mapped,
        "set_model_state_dict, broadcast": _broadcast,
        "torch.distributed.checkpoint": _dcp,
    },
    "fsdp": {
        "torchload": _torchload,
        "torch.load(mmap=True), set_model_state_dict": _every_rank,
        "set_model_state_dict, broadcast": _broadcast,
        "torch.distributed.checkpoint": _dcp,
    },
}
"""Kind of model → name → the load, by every rank."""


_MODULES = {"torchload": "torchload.api.load"}
"""What to import before the clock starts."""


def _files(size_bytes: int, folder: Path) -> dict[str, str]:
    """The same weights as one file and as a folder of torch's distributed checkpoints."""
    import torch.distributed.checkpoint as dcp

    path = prepare(Case("distributed", "transformer", size_bytes), folder).path
    target = folder / f"transformer-{size_bytes}.dcp"
    if not (target / ".metadata").exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this is one process
            dcp.save(torch.load(path, mmap=True, weights_only=True), checkpoint_id=target, no_dist=True)
    return {"pth": path, "dcp": str(target)}


def _set_caches(paths: dict[str, str], *, cold: bool) -> None:
    folder = Path(paths["dcp"])
    for path in (paths["pth"], *(str(file) for file in folder.iterdir())):
        if os.path.getsize(path):
            (drop_from_cache if cold else read_into_cache)(path)


def _build(kind: str, size_bytes: int) -> nn.Module:
    model = build_meta("transformer", size_bytes, torch.float32)
    if kind == "replicas":
        materialize(model, torch.device("cpu"))
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")  # every buffer of it is in the file


@contextmanager
def _watched() -> Iterator[list[int]]:
    """The most private memory that this process has meanwhile, and what it had before."""
    seen = [anonymous_bytes(), 0]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            seen[1] = max(seen[1], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield seen
    is_over.set()
    watcher.join()
    seen[1] = max(seen[1], anonymous_bytes())


def _counted() -> tuple[int, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    counters = dict(line.split(": ") for line in lines)
    return int(counters["read_bytes"]), int(counters["rchar"])


def _rank(rank: int, ranks: int, kind: str, way: str, size_bytes: int, paths: dict[str, str], folder: str) -> None:
    os.environ["USE_LIBUV"] = "0"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=timedelta(seconds=300))
    model = _build(kind, size_bytes)
    with torch.no_grad():
        for value in model.state_dict().values():
            (value.to_local() if hasattr(value, "to_local") else value).zero_()
    load = WAYS[kind][way]
    importlib.import_module(_MODULES.get(way.partition(",")[0], "torch.distributed.checkpoint.state_dict"))
    dist.barrier()
    before = _counted()
    with _watched() as seen:
        started = time.perf_counter()
        load(model, paths)
        dist.barrier()
        seconds = time.perf_counter() - started
    device_bytes, read_bytes = (now - then for now, then in zip(_counted(), before))
    result = {
        "seconds": seconds,
        "device_bytes": device_bytes,
        "read_bytes": read_bytes,
        "peak_bytes": seen[1] - seen[0],
    }
    want = torch.load(paths["pth"], mmap=True, weights_only=True)
    for name, value in model.state_dict().items():
        held = value.full_tensor() if hasattr(value, "full_tensor") else value
        if not torch.equal(held, want[name]):
            result["error"] = f"{name} does not hold the file's values"
    Path(folder, f"rank{rank}").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo's threads and torch's destructors race at the end of a process


def sample(kind: str, way: str, ranks: int, size_bytes: int, folder: Path, *, cold: bool) -> Sample:
    """Let fresh ranks load once.

    Args:
        kind, way: What to do, of `WAYS`.
        ranks: How many there are.
        size_bytes: Of the model, in float32.
        folder: Where the files are kept.
        cold: Whether they are dropped from the page cache first, or read into it.

    Raises:
        RuntimeError: A rank doesn't hold what is in the file.
    """
    paths = _files(size_bytes, folder)
    _set_caches(paths, cold=cold)
    with tempfile.TemporaryDirectory() as scratch:
        multiprocessing.spawn(_rank, (ranks, kind, way, size_bytes, paths, scratch), nprocs=ranks)
        results = [json.loads(Path(scratch, f"rank{rank}").read_text()) for rank in range(ranks)]
    if wrong := [result["error"] for result in results if "error" in result]:
        raise RuntimeError(f"{way}: {wrong[0]}")
    return Sample(
        max(result["seconds"] for result in results),
        sum(result["device_bytes"] for result in results),
        sum(result["read_bytes"] for result in results),
        max(result["peak_bytes"] for result in results),
    )


def table(run: dict[str, Any]) -> str:
    """A run as Markdown: medians."""
    lines = [
        "| model | ranks | cache | | seconds | from the device | read | peak memory of a rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in run["cases"]:
        middle = {key: statistics.median(one[key] for one in case["samples"]) for key in case["samples"][0]}
        size = run["file_bytes"]
        lines.append(
            f"| {case['kind']} | {case['ranks']} | {'cold' if case['cold'] else 'warm'} | {case['way']} "
            f"| {middle['seconds']:.2f} | {middle['device_bytes'] / size:.2f} × | {middle['read_bytes'] / size:.2f} × "
            f"| {middle['peak_bytes'] / MIB:,.0f} MiB |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--ranks", default="2,4", help="how many, comma-separated (default %(default)s)")
    parser.add_argument("--size", type=float, default=1.0, metavar="GIB", help="the model (default %(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="of each (default %(default)s)")
    parser.add_argument("--only", default="", help="part of the names of the ways to measure")
    parser.add_argument("--cache", choices=("both", "warm", "cold"), default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "torchload-benchmarks")
    options = parser.parse_args(arguments)
    size_bytes = int(options.size * (1 << 30))
    paths = _files(size_bytes, options.data)
    run: dict[str, Any] = {
        "environment": describe(["torch"], options.data),
        "file_bytes": os.path.getsize(paths["pth"]),
    }
    cases: list[dict[str, Any]] = [
        {"kind": kind, "ranks": ranks, "cold": cold, "way": way, "samples": []}
        for kind, ways in WAYS.items()
        for ranks in map(int, options.ranks.split(","))
        for cold in {"both": (False, True), "warm": (False,), "cold": (True,)}[options.cache]
        for way in ways
        if options.only in way
    ]
    for number in range(options.samples):  # in turn, so that what changes on the machine is spread over all
        for case in cases[number:] + cases[:number]:
            print(f"{number + 1}/{options.samples} {case['kind']} {case['ranks']} {case['way']}", file=sys.stderr)
            one = sample(case["kind"], case["way"], case["ranks"], size_bytes, options.data, cold=case["cold"])
            case["samples"].append(asdict(one))
    run["cases"] = cases
    print(table(run))
    if options.json:
        options.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
