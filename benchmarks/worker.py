"""One sample, in a process of its own: ``python -m benchmarks.worker REQUEST DESCRIPTOR``.

The request is JSON. What happens is written to the descriptor, a line each: ``start`` just before the load, ``end``
when the weights are there, then the result as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import ARMS, Arm, Job
from benchmarks.cases import Case
from benchmarks.ceilings import CEILINGS, Work
from benchmarks.files import checksum
from benchmarks.machine import drop_from_cache, have_free_memory_ready, read_into_cache
from benchmarks.models import build_meta, materialize, named_tensors

__all__ = ["run"]


def run(request: dict[str, Any], mark: Callable[[str], object]) -> dict[str, Any]:
    """Set up, load, use the model once, and say what it cost and what arrived.

    Args:
        request: ``case`` (the fields of a `Case`), ``arm`` or ``ceiling`` (a name), ``path``, ``device``.
        mark: Called with ``"start"`` and ``"end"``.

    Returns:
        Seconds: ``import``, then from one common start ``load`` (the call returned), ``touch`` (one byte of every page
        of every tensor was read, which is when a mapped file becomes memory) and ``forward`` (a first forward pass
        is done). ``checksum`` of the model, ``anonymous_before`` in bytes; on a GPU ``gpu_peak``, the most that torch
        allocated, and ``gpu_growth``, what the device has less of afterwards, whoever allocated it.
    """
    case, device = Case(**request["case"]), torch.device(request["device"])
    arm = ARMS.get(request.get("arm", ""))
    started = time.perf_counter()
    for module in arm.modules if arm else ():
        importlib.import_module(module)
    result: dict[str, Any] = {"import": time.perf_counter() - started}

    model = build_meta(case.model, case.amount, getattr(torch, case.model_dtype))
    if case.into == "existing":
        materialize(model, device)
    example = model.example(device, getattr(torch, case.model_dtype))
    job = Job(model, request["path"], device, case)
    work = _arm_work(arm, job) if arm else CEILINGS[request["ceiling"]].prepare(job)

    have_free_memory_ready(os.stat(request["path"]).st_size)
    result["resident_before"] = _set_cache(case, request["path"])
    gc.collect()
    _prepare_memory(device)
    result["anonymous_before"] = anonymous_bytes()
    free_before = _free_gpu_bytes(device)
    mark("start")
    started = time.perf_counter()
    filled = work()
    _wait(device)
    result["load"] = time.perf_counter() - started
    touch(filled)
    result["touch"] = time.perf_counter() - started
    mark("end")
    result["gpu_peak"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    result["gpu_growth"] = free_before - _free_gpu_bytes(device)
    if arm:
        started = time.perf_counter() - result["touch"]  # the clock goes on where it stopped
        with torch.inference_mode():
            model(example)
        _wait(device)
        result["forward"] = time.perf_counter() - started
        result["checksum"] = checksum(named_tensors(model))
        result["model_bytes"] = sum(tensor.nbytes for _, tensor in named_tensors(model))
    result["peak_resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _arm_work(arm: Arm, job: Job) -> Work:
    def work() -> list[Tensor]:
        arm.run(job)
        return [tensor.detach() for _, tensor in named_tensors(job.model)]

    return work


def touch(tensors: Sequence[Tensor]) -> int:
    """Read one byte of every page of every tensor, if they are on the CPU; returns their sum."""
    return sum(_touch_tensor(tensor) for tensor in tensors) if tensors and tensors[0].device.type == "cpu" else 0


def _touch_tensor(tensor: Tensor) -> int:
    nbytes, address = tensor.nbytes, tensor.data_ptr()
    if nbytes > 64 * mmap.PAGESIZE:
        return int(tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum())
    # For small tensors three torch calls would cost more than the pages.
    total = _BYTE_AT(address + nbytes - 1).value if nbytes else 0
    for position in range(address, address + nbytes, mmap.PAGESIZE):
        total += _BYTE_AT(position).value
    return total


_BYTE_AT = ctypes.c_ubyte.from_address


def anonymous_bytes(process: int | str = "self") -> int:
    """Private memory of a process that is present (RssAnon) or swapped out, in bytes; page cache doesn't count."""
    with open(f"/proc/{process}/status", "rb") as file:
        fields = [line.split() for line in file if line.startswith((b"RssAnon", b"VmSwap"))]
    return sum(int(kilobytes) for _, kilobytes, _ in fields) * 1024


def _set_cache(case: Case, path: str) -> float:
    if case.cold:
        fraction = drop_from_cache(path)
        if fraction > 0.001:
            raise RuntimeError(f"{fraction:.1%} of the file stays in the page cache: this is no cold sample")
        return fraction
    fraction = read_into_cache(path)
    if fraction < 0.999:
        raise RuntimeError(f"only {fraction:.1%} of the file is in the page cache: this is no warm sample")
    return fraction


def _prepare_memory(device: torch.device) -> None:
    # Memory that the setup left in malloc's lists would otherwise hide what the load allocates.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if device.type == "cuda":
        torch.cuda.init()
        torch.ones(1, device=device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)


def _free_gpu_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Run the request on the command line; errors are results too."""
    channel = os.fdopen(int(sys.argv[2]), "w", buffering=1)
    try:
        result = run(json.loads(sys.argv[1]), lambda word: channel.write(word + "\n"))
    except BaseException as error:  # noqa: BLE001 - whatever a contestant raises is its result
        text = str(error).strip()
        result = {"error": f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"}
    channel.write(json.dumps(result) + "\n")
    channel.flush()
    os._exit(0)  # no time for destructors of contestants


if __name__ == "__main__":
    main()
