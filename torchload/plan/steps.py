"""Steps that several of the public functions take."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Checkpoint, TensorEntry
from torchload.errors import AmbiguousCheckpointError, IncompatibleCheckpointError, TorchLoadError
from torchload.match import Selection, Wanted, find_places, select
from torchload.match.globs import Globs
from torchload.match.names import Alignment
from torchload.match.partial import held_back
from torchload.match.paths import last
from torchload.match.rename import renamed_from
from torchload.match.tables import Standing, container_standing
from torchload.match.values import Read
from torchload.model.target import Target, own_loaders
from torchload.model.unwrapping import bare_names
from torchload.plan import hooks
from torchload.transfer import map_entry

__all__ = ["select_for"]


def select_for(target: Target, checkpoint: Checkpoint, skip: Globs, strict: bool, **choice: Any) -> Selection:
    """Choose and match; modules with hooks may accept names that no rule knows, so they get a second look."""
    wanted = _wanted(target, skip)
    selection = _chosen(target, checkpoint, wanted, strict, **choice)
    if not strict:
        selection = held_back(selection, wanted)

    def attempt(more: Sequence[str], rename: Mapping[str, str] | None) -> bool:
        """Whether the file would fit with these arguments beside those that the caller gave."""
        different = {**choice, **({"rename": rename} if rename else {}), "is_trial": True}
        try:
            wider = _wanted(target, Globs([*skip.patterns, *more]))
            return _chosen(target, checkpoint, wider, True, **different).fits
        except TorchLoadError:
            return False

    return selection if selection.fits else replace(selection, attempt=attempt)


def _wanted(target: Target, skip: Globs) -> Wanted:
    shapes = {name: slot.shape for name, slot in target.by_name.items()}
    shapes.update(target.own_state)
    shapes.update(dict.fromkeys(target.extra_state))
    return Wanted(
        shapes,
        ties={name: slot.name for slot in target.slots if len(slot.names) > 1 for name in slot.names},
        skipped=skip.of(bare_names(target.model, shapes)) if skip.patterns else frozenset(),
        buffers=frozenset(name for name, slot in target.by_name.items() if not slot.is_parameter),
        whole=frozenset(map(last, target.own_state)),
        transient={slot.name: slot.shape for slot in target.slots if not slot.persistent},
        skip=skip,
    )


def _chosen(target: Target, checkpoint: Checkpoint, wanted: Wanted, strict: bool, **choice: Any) -> Selection:
    """What is chosen, after every hook had its say."""
    if not wanted.shapes:
        return _nothing_wanted(checkpoint, choice["key"], wanted)
    choice.update(path=checkpoint.path, size_bytes=checkpoint.size_bytes, read=map_entry)
    hooked = tuple(item.prefix for item in (*target.pre_hooks, *target.overrides))
    if not hooked:
        return select(checkpoint.root, wanted, strict=strict, **choice)
    selection: Selection | None = None
    with contextlib.suppress(IncompatibleCheckpointError, AmbiguousCheckpointError):
        selection = select(checkpoint.root, wanted, strict=strict, **choice)
    if selection is None or not selection.fits:
        # A module that loads itself may take another shape (observers of quantization do), but not of packed weights.
        own = tuple(item.prefix for item in target.overrides)
        free = {name for name in target.by_name if own and name.startswith(own)}
        theirs = replace(
            wanted,
            shapes={name: None if name in free else shape for name, shape in wanted.shapes.items()},
            optional=frozenset(name for name in wanted.shapes if name.startswith(hooked)),
        )
        if "" in hooked and (whole := _taken_as_a_whole(target, checkpoint, wanted, choice)) is not None:
            selection = whole
        else:
            selection = select(checkpoint.root, theirs, strict=strict, **choice)
    return _as_hooks_leave_it(target, wanted, selection, map_entry)


def _as_hooks_leave_it(target: Target, wanted: Wanted, selection: Selection, read: Read) -> Selection:
    selection = hooks.run_pre_hooks(target, selection, read)
    missing, harmless = wanted.lacks(selection.pairs, selection.alignment.spare)
    ignored = list(dict.fromkeys([*selection.ignored, *harmless]))
    return _left_to_own_loaders(target, replace(selection, missing=missing, ignored=ignored))


def _taken_as_a_whole(
    target: Target, checkpoint: Checkpoint, wanted: Wanted, choice: Mapping[str, Any]
) -> Selection | None:
    """The one container that the model's own hooks turn into what it needs, tried on tensors without data."""
    if choice.get("prefix") is not None:
        return None
    allowance = Allowance(checkpoint.path, checkpoint.size_bytes)
    found: list[Selection] = []
    for place in find_places(checkpoint.root, choice.get("key"), allowance):
        if container_standing(*place.segments) is Standing.NOT_WEIGHTS:
            continue
        original = renamed_from(rename, place.leaves) if (rename := choice.get("rename")) is not None else {}
        leaves = {new: place.leaves[old] for new, old in original.items()} if original else place.leaves
        pairs = {name: name for name in wanted.shapes if name in leaves}
        leftover = {name: name for name in leaves if name not in pairs}
        offer = Selection(
            key=place.path,
            prefix="",
            segments=place.segments,
            container=place.container,
            leaves=leaves,
            pairs=pairs,
            missing=[name for name in wanted.shapes if name not in pairs],
            mismatched={},
            unexpected=list(leftover),
            outside=[],
            ignored=[],
            alignment=Alignment(leftover=leftover),
            original=original,
        )
        try:
            turned = _as_hooks_leave_it(target, wanted, offer, _without_data)
            fills = all(
                hooks.filled_by_itself(hooked, slots, offer, _without_data).issuperset(offer.missing)
                for hooked, slots in own_loaders(target)
                if not hooked.prefix
            )
        except TorchLoadError:
            continue
        if turned.fits and fills:
            found.append(offer)
    return found[0] if len(found) == 1 else None


def _without_data(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _nothing_wanted(checkpoint: Checkpoint, key: str | None, wanted: Wanted) -> Selection:
    """For a model without any state, what the file has is unexpected, and nothing is what it should have."""
    places = find_places(checkpoint.root, key, Allowance(checkpoint.path, checkpoint.size_bytes))
    leaves = places[0].leaves if places else {}
    skipped = [name for name in leaves if wanted.skips(name)]
    return Selection(
        key=places[0].path if places else "",
        prefix="",
        segments=(),
        container=places[0].container if places else {},
        leaves=leaves,
        pairs={},
        missing=[],
        mismatched={},
        unexpected=[name for name in leaves if not wanted.skips(name)],
        outside=[],
        ignored=[],
        alignment=Alignment(),
        skipped=skipped,
    )


def _left_to_own_loaders(target: Target, selection: Selection) -> Selection:
    """What a module that loads itself lacks, it alone knows: what it is offered beside its names may stand for them."""
    for hooked, slots in own_loaders(target):
        leftover = {
            source
            for source in selection.unexpected
            if selection.alignment.leftover.get(source, source).startswith(hooked.prefix)
        }
        if leftover:
            selection = replace(
                selection,
                unexpected=[source for source in selection.unexpected if source not in leftover],
                missing=[name for name in selection.missing if not name.startswith(hooked.prefix)],
                claimed=selection.claimed | leftover,
            )
        elif filled := hooks.filled_by_itself(hooked, slots, selection, map_entry):
            missing = [name for name in selection.missing if name not in filled]
            selection = replace(selection, missing=missing)
    return selection
