"""`smart_resume`: put model, optimizer, scheduler and the rest back to where training stopped, all of it or nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from torchload.core.collector import collector_paused
from torchload.core.public import CheckpointLike, public
from torchload.errors import Boundary
from torchload.formats import open_checkpoint
from torchload.match.globs import Globs
from torchload.match.rename import Rename
from torchload.model.placement import DeviceSpec, Placement
from torchload.plan.arguments import check_arguments, check_choice, with_hints
from torchload.plan.dtypes import DtypeSpec
from torchload.training.report import ResumeReport
from torchload.training.resumption import Resumption
from torchload.training.run_folder import training_tree

__all__ = ["smart_resume"]

_log = logging.getLogger("torchload")


@public
@with_hints
def smart_resume(
    model: nn.Module,
    path: CheckpointLike,
    optimizer: torch.optim.Optimizer
    | Sequence[torch.optim.Optimizer]
    | Mapping[str, torch.optim.Optimizer]
    | None = None,
    scheduler: Any = None,
    device: DeviceSpec = None,
    *,
    scaler: Any = None,
    ema: Any = None,
    dtype: DtypeSpec = None,
    strict: bool = True,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    skip: Iterable[str] = (),
    verify: bool = False,
    rng: bool = True,
) -> ResumeReport:
    """Restore the whole state of a training run from a checkpoint, so that it goes on as if never interrupted.

    The parts are found by the names that frameworks give them: the plain recipe with ``model_state_dict`` and
    ``optimizer_state_dict``, Lightning, mmengine, timm, nanoGPT, ultralytics, fvcore and detectron2, Composer, folders
    of accelerate and of transformers' Trainer, and others. As in `smart_load`, nothing in the file is run, and
    everything is checked before anything changes. If any part fails, all are as they were.

    Args:
        model: The model. It gets the raw weights, not their average: training goes on from those.
        path: A checkpoint file, or a folder with the parts side by side.
        optimizer: An optimizer over the model's parameters, or several: in a list as the file has them, or under the
            names that it gives them. Their state comes to the device and dtype of each parameter.
        scheduler: A learning-rate scheduler, or several likewise: anything with ``state_dict`` and
            ``load_state_dict``.
        device: As in `smart_load`.
        scaler: A `torch.amp.GradScaler`.
        ema: What receives the averaged weights: a module (`torch.optim.swa_utils.AveragedModel`, a copy of the model),
            an object that has one as ``module`` or ``ema``, or one with ``load_state_dict``.
        dtype: As in `smart_load`.
        strict: Whether everything asked for must be in the file. ``False`` restores what is there, with a note of what
            isn't; a state that is there and doesn't fit is an error all the same.
        key: As in `smart_load`, for the model's weights.
        prefix: As in `smart_load`, for the model's weights.
        rename: As in `smart_load`, for the model's and the averaged weights.
        skip: As in `smart_load`, for the model's and the averaged weights.
        verify: As in `smart_load`: checks what the file records of its data first.
        rng: Whether random number generators (python's, numpy's, torch's, those of CUDA devices) go on where they
            stopped, if the file holds their states and, where there are several processes, says which is whose.

    Returns:
        Where training stands, and what was done.

    Raises:
        IncompatibleCheckpointError: A part is missing or does not fit. The message says all that stands against it.
        TorchLoadError: Everything else that `smart_load` raises.

    Example:
        >>> from torchload import smart_resume
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> report = smart_resume(model, "model.pth", optimizer)
        >>> report.epoch, report.values["args"]
        (37, {'lr': 0.001})
        >>> len(optimizer.state) == len(list(model.parameters()))
        True
    """
    check_arguments(model, dtype, skip, (), False)
    check_choice(key, prefix, rename, strict)
    left_changed: list[str] = []
    unchanged = "Nothing was restored; everything is as it was."
    with Boundary(lambda: left_changed, unchanged, "smart_resume") as boundary, ExitStack() as stack:
        with collector_paused():
            checkpoint = stack.enter_context(open_checkpoint(path))
            boundary.path = checkpoint.path
            checkpoint.confirm()
            resumption = Resumption(
                checkpoint, path, training_tree(checkpoint, path, stack), strict, Placement(device), dtype, left_changed
            )
            matcher = Globs(skip)
            resumption.plan_model(model, matcher, key, prefix, rename)
            resumption.plan_average(ema, matcher, rename)
            resumption.plan_rest(optimizer, scheduler, scaler)
            if rng:
                resumption.plan_random_states()
            resumption.check()
        boundary.warn(dict.fromkeys(resumption.warnings()))
        if verify:
            resumption.verify()
        resumption.carry_out()
        report = resumption.report()
    with contextlib.suppress(Exception):  # a filter or handler of the caller's; everything is restored
        _log.info("%s", report)
    return report
