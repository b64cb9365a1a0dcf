"""Steps that several of the public functions take."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from torchload import hooks
from torchload.errors import IncompatibleCheckpointError
from torchload.index import Checkpoint
from torchload.select import Selection, Wanted, select
from torchload.target import Target
from torchload.transfer import map_entry

__all__ = ["collector_paused", "select_for"]


def select_for(target: Target, checkpoint: Checkpoint, skipped: Any, strict: bool, **choice: Any) -> Selection:
    """Choose and match; modules with hooks may accept names that no rule knows, so they get a second look."""
    shapes = {name: slot.shape for name, slot in target.by_name.items()}
    shapes.update(dict.fromkeys(target.extra_state))
    ties = {name: slot.name for slot in target.slots if len(slot.names) > 1 for name in slot.names}
    left_alone = frozenset(name for name in shapes if skipped.match(name)) if skipped else frozenset()
    wanted = Wanted(shapes, ties, left_alone, skip_pattern=skipped)
    hooked = tuple(item.prefix for item in (*target.pre_hooks, *target.overrides))
    try:
        selection = select(checkpoint.root, wanted, path=checkpoint.path, strict=strict, **choice)
    except IncompatibleCheckpointError:
        if not hooked:
            raise
        selection = None
    if hooked:
        if selection is None or not selection.fits:
            theirs = frozenset(name for name in shapes if name.startswith(hooked))
            wanted = Wanted(shapes, ties, left_alone, theirs, skipped)
            selection = select(checkpoint.root, wanted, path=checkpoint.path, strict=strict, **choice)
            selection.missing = [name for name in shapes if name not in selection.pairs and name not in left_alone]
        selection = hooks.run_pre_hooks(target, selection, map_entry)
    assert selection is not None
    return selection


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Planning makes many objects and no garbage; collections in between would take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
