"""`smart_save`: a model's weights, without its wrappers, written once and as a whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from torchload.core.ranks import Ranks
from torchload.model.unwrapping import unwrapped_state
from torchload.writing.formats import format_of
from torchload.writing.plan import Casting, SavePlan, make_save_plan
from torchload.writing.replacing import replacing
from torchload.writing.report import SaveReport

__all__ = ["smart_save"]


def smart_save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    keep_fp32: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    distributed: bool = True,
) -> SaveReport:
    """Save a model's weights so that anything can load them.

    The names are those of the bare model: `DataParallel`, `DistributedDataParallel`, `torch.compile`, FSDP and
    activation checkpointing leave no trace, at any depth. The file appears as a whole or not at all; one that was there
    is replaced only when the new one is on the disk. The model is not changed.

    Args:
        model: What to save: on any device, wrapped or not.
        path: The file to write. Its suffix decides: ``.safetensors``, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` for the
            format of `torch.save`, with a checksum for every record.
        dtype: Floating dtype to cast floating tensors to, in the file only, one piece at a time.
        keep_fp32: Globs of names that are stored in float32 instead, such as ``["*.norm*"]``.
        metadata: What to store beside the weights. In safetensors text → text. Otherwise any plain data; the file then
            holds ``{"state_dict": …, **metadata}`` instead of the bare state dict.
        distributed: Where a process group is initialised, every rank has to call this: the first one writes, the others
            wait, and an error on one is raised on all; sharded tensors are put together, one at a time. ``False`` lets
            this process save on its own, as under ``if rank == 0:``.

    Returns:
        What was written; the same on every rank.

    Raises:
        ValueError: The suffix is none of these, or the model holds something that the file can't (tensors without
            values, sparse ones, …); the message lists all of it.
        CastOverflowError: A finite value would become infinite in the new dtype.
        OSError: The folder isn't there, the disk is full, or the device failed. What was there before is unchanged.

    Example:
        >>> from torchload import read_state_dict, smart_save
        >>> model = torch.nn.DataParallel(torch.nn.Linear(3, 2))
        >>> report = smart_save(model, "linear.safetensors", dtype=torch.bfloat16)
        >>> report.tensors, report.nbytes
        (2, 16)
        >>> sorted(read_state_dict("linear.safetensors"))
        ['bias', 'weight']
    """
    started = time.perf_counter()
    ranks = Ranks(together=distributed)
    error: BaseException | None = None
    plan: SavePlan | None = None
    try:
        _check_arguments(model, dtype, keep_fp32)
        kind = format_of(path)
        casting = Casting(dtype, tuple(keep_fp32))
        plan = make_save_plan(unwrapped_state(model), kind, os.fspath(path), casting, metadata, ranks)
    except Exception as problem:  # noqa: BLE001 - raised by `agree`, on all ranks
        error = problem
    ranks.agree(error, plan.digest if plan is not None else None)
    assert plan is not None
    report = None
    if ranks.is_writer:
        try:
            with replacing(plan.path) as file:
                plan.kind.write(file, plan.content)
            report = plan.report(time.perf_counter() - started)
        except BaseException as problem:  # noqa: BLE001 - raised by `share`: the others wait, whatever happened
            error = problem
    plan.gathering.finish()
    result: SaveReport = ranks.share(error, report)
    return result


def _check_arguments(model: object, dtype: object, keep_fp32: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None or a floating-point torch.dtype, not {dtype!r}")
    if isinstance(keep_fp32, str):
        raise TypeError(f"keep_fp32 is a list of globs: keep_fp32=[{keep_fp32!r}]")
