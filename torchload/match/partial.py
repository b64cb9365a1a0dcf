"""What `strict=False` leaves aside so that no layer is half old and half new, and what it must not excuse."""

from __future__ import annotations

import re
from dataclasses import replace

from torchload.match.selection import Selection, Wanted

__all__ = ["held_back", "transposed"]

_RECURRENT = r".*(_l\d+(?:_reverse)?)"


def held_back(selection: Selection, wanted: Wanted) -> Selection:
    """The selection without what belongs to the layer of a tensor that has another shape.

    A layer is what a module without children has; of a recurrent module, each of its layers; of the root, only if it is
    a layer and nothing else.
    """
    if not selection.mismatched:
        return selection
    parents = {name.rpartition(".")[0] for name in wanted.shapes}
    is_one_layer = parents == {""} and wanted.is_bare
    with_children = {parent.rpartition(".")[0] for parent in parents if parent}
    broken = {
        layer
        for name in selection.mismatched
        if (layer := _layer(name, with_children, is_one_layer=is_one_layer)) is not None
    }
    kept = [
        name
        for name in selection.pairs
        if name not in selection.mismatched and _layer(name, with_children, is_one_layer=is_one_layer) in broken
    ]
    if not kept:
        return selection
    unused = [selection.pairs[name] for name in kept]
    return replace(
        selection,
        pairs={name: source for name, source in selection.pairs.items() if name not in kept},
        missing=[name for name in wanted.shapes if name in {*selection.missing, *kept}],
        unexpected=[*selection.unexpected, *unused],
        notes=(
            *selection.notes,
            f"left out, because a tensor of the same layer has another shape: {', '.join(kept[:4])}",
        ),
    )


def _layer(name: str, with_children: set[str], *, is_one_layer: bool) -> tuple[str, str] | None:
    """The layer that a tensor belongs to; ``None`` if it stands for itself."""
    parent, _, leaf = name.rpartition(".")
    if is_one_layer:
        return "", ""
    if not parent or parent in with_children or leaf.isdecimal():
        return None
    recurrent = re.fullmatch(_RECURRENT, leaf)
    return parent, recurrent[1] if recurrent else ""


def transposed(selection: Selection) -> list[str]:
    """Names of matrices that the file has the other way round; their square siblings would load transposed."""
    return [
        name
        for name, (in_file, in_model) in selection.mismatched.items()
        if len(in_file) >= 2
        and len(in_file) == len(in_model)
        and in_file != in_model
        and in_file[:2] == in_model[1::-1]
        and in_file[2:] == in_model[2:]
    ]
