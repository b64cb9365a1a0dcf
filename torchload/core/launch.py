"""What is known of the processes that were started together with this one, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["has_siblings", "local_rank"]

_LAUNCHERS = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate, deepspeed
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),  # MVAPICH
    ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),  # Cray
    ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
"""Variables that hold a process's number on its machine, and how many there are. The innermost launcher comes first:
one that is itself started by another, as torchrun is by srun, starts the processes that count."""


def local_rank() -> int | None:
    """This process's number among the ranks on its machine; ``None`` where nothing tells that it has one.

    Where no launcher says so (`torch.multiprocessing.spawn`), the rank in the default process group stands for it: on
    one machine it is the same, and on several like ones it differs by a multiple of what each of them holds.
    """
    for rank, _ in _launched():
        if rank is not None:
            return rank
    group = _default_group()
    return None if group is None else int(group.get_rank())


def has_siblings() -> bool:
    """Whether several processes were most likely started together on this machine, to do the same.

    What a launcher says of this machine decides. If none does, several ranks anywhere, or a process that Python's
    `multiprocessing` started, are taken for a sign.
    """
    for _, count in _launched():
        if count is not None:
            return count > 1
    group = _default_group()
    if group is not None and group.get_world_size() > 1:
        return True
    if any((_number(size) or 1) > 1 for size in ("WORLD_SIZE", "PMI_SIZE")):
        return True
    return _is_child()


def _launched() -> Iterator[tuple[int | None, int | None]]:
    """What each launcher tells of this process: its number on this machine, and how many there are.

    A launcher of one process tells nothing of those that this one starts in turn, though they inherit its variables:
    one task on each node, which spawns a process for each GPU.
    """
    told = [(_number(rank), _number(size)) for rank, size in _LAUNCHERS]
    if "SLURM_STEP_ID" in os.environ:
        told.append((_number("SLURM_LOCALID"), _slurm_tasks_here()))
    return ((rank, count) for rank, count in told if not (count == 1 and _is_child()))


def _is_child() -> bool:
    return multiprocessing.parent_process() is not None


def _slurm_tasks_here() -> int | None:
    """How many tasks ``srun`` started on this node, which it tells for all nodes at once: ``4(x2),3``."""
    node = _number("SLURM_NODEID")
    if node is None:
        return None
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return None


def _default_group() -> Any:
    """`torch.distributed`, where its default process group is up."""
    distributed: Any = torch.distributed
    return distributed if distributed.is_available() and distributed.is_initialized() else None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None
