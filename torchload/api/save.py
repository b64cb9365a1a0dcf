"""`smart_save`: a model's weights, without its wrappers, and whatever else a run goes on from, written as a whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchload.core.public import public
from torchload.core.ranks import Ranks, attempt
from torchload.model.unwrapping import unwrapped_state
from torchload.plan.arguments import with_hints
from torchload.writing.formats import format_of
from torchload.writing.plan import Casting, SavePlan, make_save_plan
from torchload.writing.report import SaveReport
from torchload.writing.run_state import run_state

if TYPE_CHECKING:
    from torchload.writing.folder import FolderPlan

__all__ = ["smart_save"]

_Optimizer = torch.optim.Optimizer


@public
@with_hints
def smart_save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    keep_fp32: Iterable[str] = (),
    optimizer: _Optimizer | Sequence[_Optimizer] | Mapping[str, _Optimizer] | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    ema: Any = None,
    extra: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    distributed: bool = True,
) -> SaveReport:
    """Save a model's weights so that anything can load them, or a training run so that `smart_resume` goes on with it.

    The names are those of the bare model: `DataParallel`, `DistributedDataParallel`, `torch.compile`, FSDP and
    activation checkpointing leave no trace, at any depth. The file appears as a whole or not at all; one that was there
    is replaced only when the new one is on the disk. Nothing is changed, and another thread may train on meanwhile:
    each tensor is then as it was at some moment of the save.

    Args:
        model: What to save: on any device, wrapped or not.
        path: The file to write. Its suffix decides: ``.safetensors``, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` for the
            format of `torch.save`, with a checksum for every record. A name without a suffix is a folder of
            `torch.distributed.checkpoint`, in which each rank stores its own parts of sharded tensors.
        dtype: Floating dtype to cast the model's floating tensors to, in the file only, one piece at a time.
        keep_fp32: Globs of names that are stored in float32 instead, such as ``["*.norm*"]``.
        optimizer: An optimizer, or several in a list or under names, whose state goes to ``optimizer_state_dict``.
        scheduler: A scheduler, or several likewise: ``scheduler_state_dict``.
        scaler: A `torch.amp.GradScaler`: ``scaler_state_dict``.
        ema: What keeps averaged weights, as in `smart_resume`: ``ema_state_dict``.
        extra: What else is to be stored, by name, such as ``{"epoch": 3}``: plain data and tensors.
        metadata: As `extra`; in safetensors, which has room for text only, text → text.
        distributed: Where a process group is initialised, every rank has to call this: the first one writes, the others
            wait, and an error on one is raised on all; sharded tensors are put together, one at a time. ``False`` lets
            this process save on its own, as under ``if rank == 0:``.

    Returns:
        What was written; the same on every rank. A file with anything beside the weights holds
        ``{"state_dict": …, "optimizer_state_dict": …, …}``, otherwise the bare state dict.

    Raises:
        ValueError: The suffix is none of these, or there is something that the file can't hold (tensors without
            values, sparse ones, objects, …); the message lists all of it.
        CastOverflowError: A finite value would become infinite in the new dtype.
        OSError: The folder isn't there, the disk is full, or the device failed. What was there before is unchanged.

    Example:
        >>> from torchload import read_state_dict, smart_resume, smart_save
        >>> model = torch.nn.DataParallel(torch.nn.Linear(3, 2))
        >>> report = smart_save(model, "linear.safetensors", dtype=torch.bfloat16)
        >>> report.tensors, report.nbytes
        (2, 16)
        >>> sorted(read_state_dict("linear.safetensors"))
        ['bias', 'weight']
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> report = smart_save(model, "last.pth", optimizer=optimizer, extra={"epoch": 3})
        >>> smart_resume(model, "last.pth", optimizer).epoch
        3
    """
    started = time.perf_counter()
    ranks = Ranks(together=distributed)

    def decide() -> SavePlan | FolderPlan:
        _check_arguments(model, path, dtype, keep_fp32, extra, metadata)
        state = unwrapped_state(model)
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema}
        beside = run_state(model, state, extra={**(metadata or {}), **(extra or {})}, **parts)
        name, casting = os.fspath(path), Casting(dtype, tuple(keep_fp32))
        kind = format_of(name)
        if kind is not None:
            return make_save_plan(state, beside, kind, name, casting, ranks)
        from torchload.writing.folder import make_folder_plan  # with all of torch.distributed.checkpoint

        return make_folder_plan(state, beside, name, casting, ranks)

    error, plan = attempt(decide)
    ranks.agree(error, plan.digest if plan is not None else None)
    assert plan is not None
    return plan.write(ranks, started)


def _check_arguments(
    model: object, path: object, dtype: object, keep_fp32: object, extra: object, metadata: object
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    if not isinstance(os.fspath(path) if isinstance(path, os.PathLike) else path, str):
        raise TypeError(f"path is the name of the file to write, not {type(path).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None or a floating-point torch.dtype, not {dtype!r}")
    if isinstance(keep_fp32, str):
        raise TypeError(f"keep_fp32 is a list of globs: keep_fp32=[{keep_fp32!r}]")
    if not all(isinstance(names, Mapping) for names in (extra or {}, metadata or {})):
        raise TypeError('extra and metadata are dictionaries, such as {"epoch": 3}')
