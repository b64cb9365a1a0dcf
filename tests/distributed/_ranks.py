"""Run a function on a few gloo ranks."""

from __future__ import annotations

import os
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
    torch.save(outcome, f"{folder}/outcome{rank}")
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads and torch's destructors race at the end of a process, which at times aborts it


def on_ranks(work: Callable[[int, Path], Any], folder: Path, count: int = RANKS) -> list[Any]:
    """What a function of (rank, folder) returns on each rank."""
    torch.multiprocessing.spawn(_enter, (work, str(folder), count), nprocs=count)
    outcomes = [torch.load(folder / f"outcome{rank}", weights_only=False) for rank in range(count)]
    failures = [outcome["failed"] for outcome in outcomes if isinstance(outcome, dict) and "failed" in outcome]
    assert not failures, "\n".join(failures)
    return outcomes


on_two_ranks = on_ranks
