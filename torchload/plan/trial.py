"""Names that a model's own hooks change: what they would make of a state dict is tried, with tensors without memory.

Hooks know names that no rule knows, and see them as the file has them. So where nothing fits without, each container is
shown to them: load-state-dict pre-hooks, or a copy of a model that loads itself as a whole. The one that fits is then
given to the hooks once more, with its real tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Checkpoint, Container, TensorEntry
from torchload.core.in_memory import entry_of
from torchload.errors import AmbiguousCheckpointError, IncompatibleCheckpointError, TorchLoadError
from torchload.match import Leaf, Place, Selection, Wanted, find_places, select
from torchload.match.names import Alignment
from torchload.match.paths import unwrapped
from torchload.match.rename import Rename, renamed_from
from torchload.match.tables import Standing, container_standing
from torchload.model.target import HookedModule, Target, own_loaders
from torchload.model.unwrapping import wrapped_child
from torchload.plan import custom_loaders, hooks
from torchload.plan.borrowed import Borrowed
from torchload.plan.plain import ReadTensor
from torchload.transfer import map_entry

__all__ = ["select_with_hooks"]

_MOST_CONTAINERS = 50
Respell = Callable[[str], str]


class _Reading(NamedTuple):
    """A container, how its names are spelled for the model, and what those are in the file that `rename` changed."""

    place: Place
    respell: Respell
    original: Mapping[str, str]


def select_with_hooks(target: Target, checkpoint: Checkpoint, wanted: Wanted, strict: bool, **choice: Any) -> Selection:
    """Choose for a model with pre-hooks, or with modules that load themselves: without them, else with their help.

    Args:
        target: The model.
        checkpoint: The checkpoint.
        wanted: What the model wants, hooks aside.
        strict: Whether only a whole fit will do.
        choice: What else `select` takes.
    """
    selection: Selection | None = None
    with contextlib.suppress(IncompatibleCheckpointError, AmbiguousCheckpointError):
        selection = select(checkpoint.root, wanted, strict=strict, **choice)
    is_open = selection is None or not selection.fits
    borrowed = Borrowed()
    if is_open and choice["prefix"] is None:
        found = _through_hooks(target, checkpoint, wanted, choice["key"], choice["rename"], borrowed)
        if found is not None:
            borrowed.let_go(found)
            return _left_to_own_loaders(target, found)
    if selection is None or not selection.fits:
        # A module that loads itself may take another shape (observers of quantization do), but not of packed weights.
        hooked = tuple(item.prefix for item in (*target.pre_hooks, *target.overrides))
        own = tuple(item.prefix for item in target.overrides)
        free = {name for name in target.by_name if own and name.startswith(own)}
        wider = wanted._replace(
            shapes={name: None if name in free else shape for name, shape in wanted.shapes.items()},
            optional=frozenset(name for name in wanted.shapes if name.startswith(hooked)),
        )
        selection = select(checkpoint.root, wider, strict=strict, **choice)
    selection = hooks.run_pre_hooks(target, selection, borrowed)
    borrowed.let_go(selection)
    missing, harmless = wanted.lacks(selection.pairs, selection.alignment.spare)
    ignored = list(dict.fromkeys([*selection.ignored, *harmless]))
    return _left_to_own_loaders(target, replace(selection, missing=missing, ignored=ignored))


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
        elif filled := custom_loaders.filled_by_itself(hooked, slots, selection, map_entry):
            missing = [name for name in selection.missing if name not in filled]
            selection = replace(selection, missing=missing)
    return selection


def _through_hooks(
    target: Target,
    checkpoint: Checkpoint,
    wanted: Wanted,
    key: str | None,
    rename: Rename | None,
    read: ReadTensor,
) -> Selection | None:
    """The container that fits once the model's hooks have seen its names.

    Returns:
        What fits, after the pre-hooks have run; ``None`` if nothing does.

    Raises:
        AmbiguousCheckpointError: Several containers with other data do.
    """
    whole = next((loader for loader in own_loaders(target) if _is_all(loader[0], target)), None)
    found: dict[object, tuple[_Reading, Selection]] = {}
    for reading in _readings(target, checkpoint, wanted, key, rename):
        if whole is not None:
            selection = _claimed(target, reading)
            fits = custom_loaders.would_load(*whole, selection, _without_memory)
        else:
            tried = _through_pre_hooks(target, checkpoint, wanted, reading, _without_memory)
            fits = tried is not None and tried.fits
            selection = tried if tried is not None else _claimed(target, reading)
        if fits:
            leaves = reading.place.leaves.values()
            data = tuple(leaf.location if isinstance(leaf, TensorEntry) else id(leaf) for leaf in leaves)
            found.setdefault(data, (reading, selection))
    if len(found) > 1:
        keys = list(dict.fromkeys(selection.path for _, selection in found.values()))
        raise AmbiguousCheckpointError(
            f"The checkpoint holds {len(keys)} sets of weights that the model's own hooks accept.\n  Say which is "
            "meant:\n" + "\n".join(f"    key={key!r}" for key in keys[:10]),
            candidates=keys,
        )
    for reading, selection in found.values():
        return selection if whole is not None else _through_pre_hooks(target, checkpoint, wanted, reading, read)
    return None


def _is_all(hooked: HookedModule, target: Target) -> bool:
    return all(name.startswith(hooked.prefix) for name in target.names)


def _readings(
    target: Target, checkpoint: Checkpoint, wanted: Wanted, key: str | None, rename: Rename | None
) -> Iterator[_Reading]:
    """Containers with their names as they are, and with the wrappers that the model has in place of the file's."""
    allowance = Allowance(checkpoint.size_bytes)
    try:
        places = find_places(checkpoint.root, key, allowance, wanted.whole)
    except TorchLoadError:
        return
    wrappers, module = "", target.model
    while (attribute := wrapped_child(module)) is not None:
        wrappers, module = f"{wrappers}{attribute}.", module._modules[attribute]  # type: ignore[assignment]

    def rewrapped(name: str) -> str:
        return wrappers + unwrapped(name)

    for place in places[:_MOST_CONTAINERS]:
        if container_standing(*place.segments) is Standing.NOT_WEIGHTS:
            continue
        original: dict[str, str] = {}
        if rename is not None:
            original = renamed_from(rename, place.leaves)
            place = place._replace(leaves={new: place.leaves[old] for new, old in original.items()})
        yield _Reading(place, str, original)
        respelled = {rewrapped(name) for name in place.leaves}
        if len(respelled) == len(place.leaves) and respelled != place.leaves.keys():
            yield _Reading(place, rewrapped, original)


def _claimed(target: Target, reading: _Reading) -> Selection:
    """A container whose names a model that loads itself is offered."""
    place = reading.place
    spelled = {name: reading.respell(name) for name in place.leaves}
    known = set(target.names)
    alignment = Alignment()
    alignment.leftover.update((source, name) for source, name in spelled.items() if name not in known)
    return Selection(
        key=place.path,
        segments=place.segments,
        container=Container(place.container, _metadata(reading)),
        leaves=place.leaves,
        pairs={name: source for source, name in spelled.items() if name in known},
        alignment=alignment,
        claimed=frozenset(alignment.leftover),
        original=reading.original,
    )


def _metadata(reading: _Reading) -> dict[str, Any]:
    """The container's module versions, spelled as its names."""
    metadata = getattr(reading.place.container, "metadata", None) or {}
    return {reading.respell(f"{path}.").rstrip(".") if path else path: value for path, value in metadata.items()}


def _versions(reading: _Reading) -> Callable[[str], dict[str, Any]]:
    metadata = _metadata(reading)
    return lambda prefix: dict(metadata.get(prefix.rstrip("."), {}))


def _through_pre_hooks(
    target: Target, checkpoint: Checkpoint, wanted: Wanted, reading: _Reading, read: ReadTensor
) -> Selection | None:
    """What is chosen of a container after pre-hooks rewrote it; ``None`` where they refuse, or nothing fits."""
    leaves, place = reading.place.leaves, reading.place
    state = {
        reading.respell(name): read(leaf) if isinstance(leaf, TensorEntry) else leaf for name, leaf in leaves.items()
    }
    known = {id(value): source for value, source in zip(state.values(), leaves)}
    held = list(state.values())  # whose identities are looked at below
    is_trial = read is _without_memory
    put_back = custom_loaders.attribute_restorer([hooked.module for hooked in target.pre_hooks]) if is_trial else None
    try:
        if hooks.call_pre_hooks(target, state, _versions(reading)):
            return None
    except Exception:
        if not is_trial:
            raise
        return None
    finally:
        if put_back is not None:
            put_back()
    rewritten: dict[str, Leaf] = {}
    original: dict[str, str] = {}
    for name, value in state.items():
        if (source := known.get(id(value))) is not None:
            rewritten[name], original[name] = leaves[source], reading.original.get(source, source)
        else:
            rewritten[name] = _computed(value)
    del held
    try:
        selection = select(
            Container(rewritten, _metadata(reading)),
            wanted,
            key="",
            size_bytes=checkpoint.size_bytes,
            read=None if is_trial else read,
            is_trial=is_trial,
        )
    except TorchLoadError:
        return None
    return _at(place, selection, original)


def _computed(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return TensorEntry(value.dtype, tuple(value.shape), ()) if value.is_meta else entry_of(value, hooks.COMPUTED)


def _at(place: Place, selection: Selection, original: Mapping[str, str]) -> Selection:
    changed = {name: source for name, source in original.items() if name != source}
    return replace(selection, key=place.path, segments=place.segments, original=changed)


def _without_memory(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
