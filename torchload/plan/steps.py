"""Choosing for a model, with the second look that its own hooks and loaders get; several public functions take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Checkpoint
from torchload.core.text import plural
from torchload.errors import IncompatibleCheckpointError, TorchLoadError
from torchload.match import Place, Selection, Wanted, find_places, select
from torchload.match.globs import Globs
from torchload.match.partial import held_back
from torchload.match.paths import last
from torchload.match.tables import Standing, container_standing
from torchload.model.target import Target
from torchload.plan.quantized import quantized_problem
from torchload.transfer import map_entry

__all__ = ["select_for"]


def select_for(target: Target, checkpoint: Checkpoint, skip: Globs, strict: bool, **choice: Any) -> Selection:
    """Choose and match; modules with hooks may accept names that no rule knows, so they get a second look."""
    wanted = _wanted(target, skip)
    if wanted.shapes and wanted.skipped.issuperset(wanted.shapes):
        raise IncompatibleCheckpointError(
            f"skip= matches all of the model ({plural(len(wanted.shapes), 'tensor')}), so that nothing "
            "is left to load. Give patterns that match less."
        )

    def attempt(more: Sequence[str], rename: Mapping[str, str] | None) -> bool:
        """Whether the file would fit with these arguments beside those that the caller gave."""
        different = {**choice, **({"rename": rename} if rename else {}), "is_trial": True}
        try:
            wider = _wanted(target, Globs([*skip.patterns, *more]))
            found = _chosen(target, checkpoint, wider, True, **different)
            return found.fits and quantized_problem(target, found) is None
        except TorchLoadError:
            return False

    try:
        selection = _chosen(target, checkpoint, wanted, strict, **choice)
    except IncompatibleCheckpointError as error:
        nothing = error.unexpected_keys and choice.get("prefix") is None and choice.get("rename") is None
        unmatched = _unmatched(checkpoint, choice.get("key"), wanted) if nothing else None
        if unmatched is None:
            raise
        from torchload.plan.explain import incompatible

        problem = quantized_problem(target, unmatched)
        problems = [problem] if problem else []
        advisable = _advisable(unmatched, skip, attempt)
        raise incompatible(target, advisable, problems, whole=checkpoint.whole()) from None
    if not strict:
        selection = held_back(selection, wanted)
    if selection.fits:
        return selection
    return replace(_advisable(selection, skip, attempt), aliases=_aliases(selection, checkpoint.metadata))


def _advisable(selection: Selection, skip: Globs, attempt: Callable[..., bool]) -> Selection:
    """A selection that knows what advice needs."""
    kept = [glob for glob in skip.patterns if any(map(Globs([glob]).match_in_file, selection.skipped))]
    return replace(selection, attempt=attempt, globs=tuple(kept))


def _aliases(selection: Selection, metadata: Mapping[str, str]) -> dict[str, str]:
    """Names of another shape that safetensors lists as others of a tensor which it kept: dropped → kept."""
    sources = {name: selection.pairs[name] for name in selection.mismatched if name in selection.pairs}
    originals = {name: selection.original.get(source, source) for name, source in sources.items()}
    return {name: metadata[source] for name, source in originals.items() if source in metadata}


def _wanted(target: Target, skip: Globs) -> Wanted:
    shapes = {name: slot.shape for name, slot in target.by_name.items()}
    shapes.update(target.own_state)
    shapes.update(dict.fromkeys(target.extra_state))
    return Wanted(
        shapes,
        ties={name: slot.name for slot in target.slots if len(slot.names) > 1 for name in slot.names},
        skipped=skip.of(target.bare(shapes)) if skip.patterns else frozenset(),
        buffers=frozenset(name for name, slot in target.by_name.items() if not slot.is_parameter),
        whole=frozenset(map(last, target.own_state)),
        transient={slot.name: slot.shape for slot in target.slots if not slot.persistent},
        skip=skip,
        views=target.views,
    )


def _chosen(target: Target, checkpoint: Checkpoint, wanted: Wanted, strict: bool, **choice: Any) -> Selection:
    """What is chosen, after every hook had its say."""
    if not wanted.shapes:
        return _nothing_wanted(checkpoint, choice["key"], wanted)
    choice.update(size_bytes=checkpoint.size_bytes, read=map_entry)
    if not (target.pre_hooks or target.overrides):
        return select(checkpoint.root, wanted, strict=strict, **choice)
    from torchload.plan.trial import select_with_hooks  # most models have none

    return select_with_hooks(target, checkpoint, wanted, strict, **choice)


def _nothing_wanted(checkpoint: Checkpoint, key: str | None, wanted: Wanted) -> Selection:
    """For a model without any state, what the file has is unexpected, and nothing is what it should have."""
    places = find_places(checkpoint.root, key, Allowance(checkpoint.size_bytes))
    return _unpaired(places[0] if places else Place("", (), {}, {}, frozenset()), wanted)


def _unmatched(checkpoint: Checkpoint, key: str | None, wanted: Wanted) -> Selection | None:
    """The largest container of weights as what has no name in common with a model, to say what would mend it."""
    places = find_places(checkpoint.root, None, Allowance(checkpoint.size_bytes))
    likely = [
        place
        for place in places
        if key in (None, place.path) and container_standing(*place.segments) is not Standing.NOT_WEIGHTS
    ]
    # Of those with the same tensors the innermost: the root has them below the name of the container.
    largest = max(likely, key=lambda place: (len(place.leaves), len(place.segments)), default=None)
    return None if largest is None else replace(_unpaired(largest, wanted), missing=list(wanted.shapes))


def _unpaired(place: Place, wanted: Wanted) -> Selection:
    return Selection(
        key=place.path,
        segments=place.segments,
        container=place.container,
        leaves=place.leaves,
        unexpected=[name for name in place.leaves if not wanted.skips(name)],
        skipped=[name for name in place.leaves if wanted.skips(name)],
    )
