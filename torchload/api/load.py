"""The public functions. Each is a walk through the five stages: open, select, match, plan, transfer."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from torchload.core.checkpoint import Checkpoint, Extent, Record, TensorEntry
from torchload.core.collector import with_collector_paused
from torchload.core.progress import progress_reporter
from torchload.formats import open_checkpoint  # the commonest one: imported before its first use
from torchload.formats.files import archives, torch_zip  # the commonest one: imported before its first use
from torchload.match import Selection
from torchload.match.rename import Rename
from torchload.model.placement import DeviceSpec, Placement
from torchload.model.target import Target, describe_model
from torchload.plan import hooks
from torchload.plan.execute import carry_out, compare_landed, compare_ties, extents_of, extents_to_check_first
from torchload.plan.explain import group_names, plural, short_dtype
from torchload.plan.plan import DtypeSpec, LoadPlan, Options, glob_matcher, make_plan
from torchload.plan.report import LoadReport, format_bytes
from torchload.plan.steps import select_for
from torchload.transfer import verify_extents

__all__ = ["smart_load"]

_PRELOADED = (archives, torch_zip)  # keeps the import above from being called unused

_log = logging.getLogger("torchload")


@with_collector_paused
def smart_load(
    model: nn.Module,
    path: Any,
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
    progress: bool | Callable[[int, int], None] = False,
) -> LoadReport:
    """Load a checkpoint's weights into a model, in place.

    The checkpoint may come from any number of GPUs, carry the prefixes of any wrapper, lie in any container beside
    anything else, and name classes that don't exist here; nothing that it names is imported or called. Everything that
    can be checked is checked before the first byte moves: if the load is refused, the model is bit for bit as it was.

    Args:
        model: The model to fill: plain, wrapped, on any device, wholly or partly on the meta device. Its parameters
            stay the same objects, so optimizers, hooks and ties survive.
        path: A checkpoint file, a folder that holds one, the index of a sharded one, a list of shards, or a binary file
            object.
        device: ``None`` keeps each tensor on its parameter's device (meta goes to the CPU); a device, string or index
            moves the model; ``"auto"`` takes the device with the most free memory; a mapping ``{module-prefix:
            device}`` places parts. Where the checkpoint was saved never matters.
        dtype: ``None`` keeps each parameter's dtype and casts the checkpoint to it; a floating dtype casts floating
            parameters and buffers; ``"auto"`` takes the checkpoint's. Integer and bool tensors never change.
        keep_fp32: Globs of names that stay float32, such as ``["*.norm*"]``.
        strict: Whether every tensor of the model must be filled and every checkpoint tensor in the model's own modules
            used. ``False`` loads what fits and warns of what keeps its initial values.
        key: Which container of the file to use, such as ``"ema"`` or ``"state.model"``. Found by itself as a rule.
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
    check_arguments(model, dtype, skip, keep_fp32, atomic)
    placement = Placement(device)
    with open_checkpoint(path) as checkpoint:
        options = Options(placement, dtype, tuple(keep_fp32), strict, atomic is not False, checkpoint.path)
        target = describe_model(model)
        skipped = glob_matcher(skip)
        selection = select_for(target, checkpoint, skipped, strict, key=key, prefix=prefix, rename=rename)
        plan = make_plan(target, selection, options)
        if verify:
            verify_extents(extents_to_check_first(plan, mmap=mmap))
        compare_ties(plan, checkpoint.path)

        def finish() -> None:
            if verify:
                compare_landed(plan, checkpoint.path, mmap=mmap)
            hooks.run_post_hooks(target, selection.missing, selection.unexpected)

        with progress_reporter(progress, checkpoint.path) as report_progress:
            guard = None if isinstance(atomic, bool) else atomic
            nbytes = carry_out(
                plan,
                target,
                selection,
                report_progress,
                mmap=mmap,
                verify=verify,
                atomic=options.atomic,
                guard=guard,
                finish=finish,
            )
        notes = tuple(notes_of(checkpoint, selection, plan, verify))
        report = report_of(target, checkpoint, selection, plan, nbytes, notes, time.perf_counter() - started)
    _tell(report, strict)
    return report


def check_arguments(model: nn.Module, dtype: Any, skip: Any, keep_fp32: Any, atomic: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    if dtype not in (None, "auto") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None, 'auto' or a floating-point torch.dtype, not {dtype!r}")
    for name, globs in (("skip", skip), ("keep_fp32", keep_fp32)):
        if isinstance(globs, str):
            raise TypeError(f"{name} is a list of globs: {name}=[{globs!r}]")
    if not isinstance(atomic, (bool, AbstractContextManager)):
        raise TypeError(f"atomic is a bool or a lock, not {type(atomic).__name__}")


# --- the account ---


def report_of(
    target: Target,
    checkpoint: Checkpoint,
    selection: Selection,
    plan: LoadPlan,
    nbytes: int,
    notes: tuple[str, ...],
    seconds: float,
) -> LoadReport:
    filled = [slot for slot in target.slots if slot.persistent]
    devices = dict.fromkeys(slot.tensor.device for slot in filled)
    own = [name for name in target.own_state if name in selection.pairs]
    lacking = {*selection.missing, *selection.skipped}
    loaded = sum(item.slot.persistent for item in plan.assignments)
    loaded += sum(slot.persistent and lacking.isdisjoint(slot.names) for _, slots in plan.own_loaders for slot in slots)
    return LoadReport(
        path=checkpoint.path,
        model=type(target.model).__name__,
        device=", ".join(map(str, devices)) or "no device",
        format=checkpoint.format,
        key=selection.key,
        prefix=selection.prefix,
        rivals=selection.rivals,
        averaged=selection.averaged,
        beside=_beside(checkpoint.root, selection),
        rewrites=tuple(_rewrites(selection)),
        tensors=loaded + len(own),
        total=len(filled) + len(target.own_state),
        nbytes=nbytes,
        casts={(short_dtype(a), short_dtype(b)): count for (a, b), count in plan.casts.items()},
        ties=tuple(tuple(slot.names) for slot in filled if len(slot.names) > 1),
        missing_keys=selection.missing,
        unexpected_keys=selection.unexpected,
        mismatched=selection.mismatched,
        skipped=tuple(selection.skipped),
        outside=tuple(selection.outside),
        tolerated=tuple(selection.tolerated),
        seconds=seconds,
        training=target.model.training,
        notes=notes,
    )


def _beside(root: Any, selection: Selection) -> dict[str, object]:
    """The other entries of the file's top level, as small values or the names of their types."""
    if not isinstance(root, Mapping):
        return {}
    top = selection.key.split(".")[0]
    beside: dict[str, object] = {}
    for name, value in root.items():
        if isinstance(value, TensorEntry) or str(name) == top:
            continue
        small = value is None or isinstance(value, float) or (isinstance(value, str) and len(value) <= 200)
        small = small or (isinstance(value, int) and abs(value) < 1 << 64)  # Python refuses to print the hugest
        beside[str(name)] = value if small else value.name if isinstance(value, Record) else type(value).__name__
    return beside


def _rewrites(selection: Selection) -> Iterator[str]:
    """How names were reconciled, in words."""
    total = len(selection.pairs)
    for side, label in selection.alignment.dropped:
        segment = f".{label}."
        if side == "file":
            count = sum(segment in f".{source}" for source in selection.pairs.values())
            yield f"removed {label + '.'!r} from {'every name' if count >= total else plural(count, 'name')}"
        else:
            count = sum(segment in f".{name}" for name in selection.pairs)
            yield f"added {label + '.'!r} to {'every name' if count >= total else plural(count, 'name')}"
    if selection.added:
        yield f"added {selection.added + '.'!r} to every name"
    for rule in dict.fromkeys(selection.alignment.renamed.values()):
        count = sum(kind == rule for kind in selection.alignment.renamed.values())
        yield f"renamed {plural(count, 'tensor')} ({rule})"


def notes_of(checkpoint: Checkpoint, selection: Selection, plan: LoadPlan, verify: bool) -> Iterator[str]:
    yield from checkpoint.notes
    if verify:
        yield from _unverified(extents_of(plan))
    rivals = ", ".join(repr(rival) for rival in selection.rivals)
    if selection.averaged and rivals:
        yield f"took the averaged weights; {rivals} would fit too (key= chooses)"
    elif rivals:
        yield f"{rivals} would fit too (key= or prefix= chooses)"
    yield from plan.notes


def _unverified(extents: list[Extent]) -> Iterator[str]:
    """What `verify` can't promise: data that changed on its way to this file shows only in a checksum."""
    lacking = [extent for extent in extents if extent.crc32 is None and extent.nbytes]
    if lacking:
        part = (
            "its data"
            if len(lacking) == len(extents)
            else f"{format_bytes(sum(e.nbytes for e in lacking))} of its data"
        )
        yield f"the file records no checksums for {part}: damage that keeps its size can't be told from other weights"


def _tell(report: LoadReport, strict: bool) -> None:
    _log.info("%s", report)
    kept = [*report.missing_keys, *report.mismatched]
    if not strict and (kept or report.unexpected_keys):
        parts = []
        if kept:
            names = group_names(kept)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(
                f"{plural(len(kept), 'tensor')} of the model kept initial values: {', '.join(names[:8])}{more}"
            )
        if report.unexpected_keys:
            names = group_names(report.unexpected_keys)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(
                f"{plural(len(report.unexpected_keys), 'tensor')} of the file went unused: {', '.join(names[:8])}{more}"
            )
        warnings.warn(f"{report.path} was loaded in part (strict=False). {'; '.join(parts)}", stacklevel=4)
