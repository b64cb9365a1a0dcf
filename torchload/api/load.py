"""`smart_load`: a walk through the five stages: open, select, match, plan, transfer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from torch import nn

from torchload.core.collector import collector_paused
from torchload.core.progress import progress_reporter
from torchload.core.public import CheckpointLike, public
from torchload.errors import Boundary
from torchload.formats import open_checkpoint  # the commonest one: imported before its first use
from torchload.formats.files import archives, torch_zip  # the commonest one: imported before its first use
from torchload.match.globs import Globs
from torchload.match.rename import Rename
from torchload.model.placement import DeviceSpec, Placement
from torchload.model.target import describe_model
from torchload.plan.acceptance import Acceptance
from torchload.plan.account import report_of
from torchload.plan.agreement import agree_on
from torchload.plan.arguments import check_arguments, check_choice, with_hints
from torchload.plan.dtypes import DtypeSpec
from torchload.plan.execute import Changes, carry_out
from torchload.plan.options import Options
from torchload.plan.planner import make_plan
from torchload.plan.report import LoadReport
from torchload.plan.steps import select_for
from torchload.transfer import Replicas, read_together

__all__ = ["smart_load"]

_PRELOADED = (archives, torch_zip)  # keeps the import above from being called unused

_log = logging.getLogger("torchload")


@public
@with_hints
def smart_load(
    model: nn.Module,
    path: CheckpointLike,
    device: DeviceSpec = None,
    *,
    dtype: DtypeSpec = None,
    keep_fp32: Iterable[str] = (),
    strict: bool = True,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    skip: Iterable[str] = (),
    verify: bool = False,
    atomic: bool | AbstractContextManager[object] = False,
    mmap: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> LoadReport:
    """Load a checkpoint's weights into a model, in place.

    The checkpoint may come from any number of GPUs, carry the prefixes of any wrapper, lie in any container beside
    anything else, and name classes that don't exist here; nothing that it names is imported or called. Everything that
    can be checked is checked before the first byte moves: if the load is refused, the model is bit for bit as it was.

    Args:
        model: The model to fill: plain, wrapped, on any device, wholly or partly on the meta device. Its parameters
            stay the same objects, so optimizers, hooks and ties survive.
        path: A checkpoint file, a folder that holds one, the index of a sharded one, a list of shards, a binary file
            object, or a mapping that is in memory already: a state dict, or a checkpoint's dictionary around one.
        device: ``None`` keeps each tensor on its parameter's device (meta goes to the CPU); a device, string or index
            moves the model; ``"auto"`` takes the device with the most free memory; a mapping ``{module-prefix:
            device}`` places parts. Where the checkpoint was saved never matters.
        dtype: ``None`` keeps each parameter's dtype and casts the checkpoint to it; a floating dtype casts floating
            parameters and buffers; ``"auto"`` takes the checkpoint's. Integer and bool tensors never change.
        keep_fp32: Globs of names that stay float32, such as ``["*.norm*"]``.
        strict: Whether every tensor of the model must be filled, and every name of the part of the file that was taken
            used. ``False`` loads what fits, layer by layer, and warns of what keeps its initial values.
        key: Which container of the file to use, such as ``"ema"`` or ``"state.model"``, as reports print it. Found by
            itself as a rule; where several fit and hold different values, an error lists them.
        prefix: Which sub-tree of names to use, such as ``"backbone."``. Found by itself as a rule.
        rename: A mapping of regular expression → replacement, or a callable that returns the new name (``None`` drops
            it).
        skip: Globs of names to leave alone on either side, such as a head that is replaced: ``["fc.*"]``.
        verify: Also check the checksums that the file records for its data, before anything of the model is changed,
            and compare what landed with the file.
        atomic: Stage everything in fresh memory, then swap: whatever fails leaves the model as it was, and other
            threads may go on using it. A lock that these take for each forward pass may be given instead of ``True``:
            it is held for the swap alone, so that no pass sees old and new weights side by side.
        mmap: Parameters on the CPU become private views of the file: no copy, memory shared between processes.
        process_group: Replicas on shared or slow storage read together: each rank of this group reads its share of the
            bytes, and has the rest from the others. All of them must call, with the same file and models that hold the
            same parts; if one can't go on, all raise what it raises. Not with ``mmap=True``; with ``verify=True`` each
            rank reads everything.
        progress: ``True`` draws a bar where `tqdm` is installed; a callable receives ``(bytes_done, bytes_total)``.

    Returns:
        What was done; print it.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        CheckpointFormatError: The file is no checkpoint; the message says what it is.
        CorruptCheckpointError: It is truncated, damaged, or made to do harm.
        AmbiguousCheckpointError: Several parts of it fit equally well; the message lists them.
        IncompatibleCheckpointError: It does not fit the model; the message says all that stands against it.
        CastOverflowError: A finite value would become infinite in the new dtype.
        DeviceError: The device isn't there, or has too little memory.

    Example:
        >>> import torch
        >>> from torchload import smart_load
        >>> model = torch.nn.DataParallel(torch.nn.Linear(3, 2))
        >>> torch.save({"epoch": 5, "state_dict": model.state_dict()}, "checkpoint.pth")
        >>> plain = torch.nn.Linear(3, 2)
        >>> report = smart_load(plain, "checkpoint.pth", "cpu")
        >>> report.tensors, report.key, report.beside["epoch"]
        (2, 'state_dict', 5)
        >>> torch.equal(plain.weight, model.module.weight)
        True
    """
    started = time.perf_counter()
    changes = Changes()
    with Boundary(changes.names) as boundary, ExitStack() as stack:
        replicas = stack.enter_context(Replicas(process_group))
        check_arguments(model, dtype, skip, keep_fp32, atomic)
        check_choice(key, prefix, rename, strict)
        if mmap and process_group is not None:
            raise ValueError(
                "mmap=True reads nothing that the ranks of process_group= could share: give only one of the two"
            )
        wishes = Options(
            Placement(device), dtype, tuple(keep_fp32), strict, atomic is not False, mmap, verify, Globs(skip), rename
        )
        checkpoint = stack.enter_context(open_checkpoint(path))
        boundary.path = checkpoint.path
        checkpoint.confirm()
        with collector_paused():
            target = describe_model(model)
            choice = {"key": key, "prefix": prefix, "rename": rename}
            selection = select_for(target, checkpoint, wishes.skip, strict, **choice)
            plan = make_plan(target, checkpoint, selection, wishes)
        boundary.warn(plan.warnings)
        if verify:
            from torchload.transfer.checks import verify_extents

            verify_extents(plan.extents_to_check_first)
        agree_on(plan, replicas, checkpoint.path)
        acceptance = Acceptance(target, selection, plan, wishes, replicas)
        moved = carry_out(
            plan,
            target,
            selection,
            progress=progress_reporter(progress, checkpoint.path),
            guard=None if isinstance(atomic, bool) else atomic,
            finish=acceptance.ask,
            move=partial(read_together, replicas),
            changes=changes,
        )
        selection, seconds = acceptance.selection, time.perf_counter() - started
        report = report_of(target, checkpoint, selection, plan, moved, seconds, verify=verify)
        with contextlib.suppress(Exception):  # a filter or handler of the caller's
            _log.info("%s", report)
        return report
