"""Run a function on a few gloo ranks."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

RANKS = 2
PATIENCE = timedelta(seconds=20)  # for a rank that failed


def _enter(rank: int, work: Callable[[int, Path], Any], folder: str, count: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", count)
    distributed.init_process_group("gloo", rank=rank, world_size=count, store=store, timeout=PATIENCE)
    try:
        outcome = work(rank, Path(folder))
    except BaseException:  # noqa: BLE001 - shown by the test that started this process
        outcome = {"failed": traceback.format_exc()}
    torch.save(outcome, f"{folder}/outcome{rank}.part")
    os.rename(f"{folder}/outcome{rank}.part", f"{folder}/outcome{rank}")
    # Together, for those who still read; and without destructors: gloo's threads race them, which at times aborts the
    # process, and in torch 2.4 `destroy_process_group` may wait for ever.
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not all(map(os.path.exists, (f"{folder}/outcome{other}" for other in range(count)))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    os._exit(0)


def on_ranks(work: Callable[[int, Path], Any], folder: Path, count: int = RANKS) -> list[Any]:
    """What a function of (rank, folder) returns on each rank."""
    torch.multiprocessing.spawn(_enter, (work, str(folder), count), nprocs=count)
    outcomes = [torch.load(folder / f"outcome{rank}", weights_only=False) for rank in range(count)]
    failures = [outcome["failed"] for outcome in outcomes if isinstance(outcome, dict) and "failed" in outcome]
    assert not failures, "\n".join(failures)
    return outcomes


on_two_ranks = on_ranks
