"""Steps that several of the public functions take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchload import hooks
from torchload.errors import IncompatibleCheckpointError
from torchload.index import Checkpoint
from torchload.model.target import Target
from torchload.select import Selection, Wanted, select
from torchload.transfer import map_entry

__all__ = ["select_for"]


def select_for(target: Target, checkpoint: Checkpoint, skipped: Any, strict: bool, **choice: Any) -> Selection:
    """Choose and match; modules with hooks may accept names that no rule knows, so they get a second look."""
    shapes = {name: slot.shape for name, slot in target.by_name.items()}
    shapes.update(dict.fromkeys(target.extra_state))
    ties = {name: slot.name for slot in target.slots if len(slot.names) > 1 for name in slot.names}
    skips = frozenset(name for name in shapes if skipped.match(name)) if skipped else frozenset()
    buffers = frozenset(name for name, slot in target.by_name.items() if not slot.is_parameter)
    transient = {slot.name: slot.shape for slot in target.slots if not slot.persistent}
    wanted = Wanted(shapes, ties, skips, buffers=buffers, transient=transient, skip_pattern=skipped)
    hooked = tuple(item.prefix for item in (*target.pre_hooks, *target.overrides))
    if not hooked:
        return select(checkpoint.root, wanted, path=checkpoint.path, strict=strict, **choice)
    try:
        selection = select(checkpoint.root, wanted, path=checkpoint.path, strict=strict, **choice)
        second = not selection.fits
    except IncompatibleCheckpointError:
        second = True
    if second:
        theirs = replace(wanted, optional=frozenset(name for name in shapes if name.startswith(hooked)))
        selection = select(checkpoint.root, theirs, path=checkpoint.path, strict=strict, **choice)
    selection = hooks.run_pre_hooks(target, selection, map_entry)
    selection.missing, harmless = wanted.lacks(selection.pairs, selection.alignment.spare)
    selection.tolerated = list(dict.fromkeys([*selection.tolerated, *harmless]))
    return selection
