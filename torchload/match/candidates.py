"""Every sub-tree that might be a model's state dict, judged by what it fills and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Shape
from torchload.core.wrappers import WRAPPER_STATE, WRAPPERS
from torchload.match.containers import Leaf, Place, shape_of
from torchload.match.names import Alignment, Node, align, tree_of
from torchload.match.paths import joined, last
from torchload.match.rename import Rename, renamer
from torchload.match.selection import Selection, Wanted
from torchload.match.tables import BENIGN_UNEXPECTED, Standing, container_standing

__all__ = ["find_candidates", "needed_tensors"]

# A part of the model is looked at if it is at least this share of the whole, and a sub-tree that may fill it, if it is
# of the part: to try every part with every sub-tree takes time as the cube of their number.
_SHARE = 1 / 8
_BYTES_PER_LEAF = 16  # what a candidate says of each name of its container


def find_candidates(
    places: Sequence[Place],
    wanted: Wanted,
    prefix: str | None,
    rename: Rename | None,
    least: int,
    strict: bool,
    allowance: Allowance,
) -> Iterator[Selection]:
    """Every sub-tree with at least `least` tensors that shares names with the model, judged."""
    views = _model_views(wanted, strict)
    searched = len(places) > 1  # not chosen by key, which hides what is above
    for place in places:
        if len(place.leaves) < least:
            continue
        leaves = renamer(rename, place.leaves) if rename is not None else place.leaves
        tree = tree_of(leaves, allowance)
        if prefix is None and "model" in place.inner:  # OpenNMT: 'model' and 'generator' together are the model
            allowance.spend(0, _BYTES_PER_LEAF * len(leaves))
            alignment = align(tree, views[0][1], lift=("model",))
            if ("file", "model") in alignment.dropped:
                yield _judge(place, "", leaves, tree, alignment, wanted, "")
        spare = len(leaves)
        for below, node in _nodes(tree, least, place.inner if rename is None else frozenset()):
            if prefix is not None and not _is_prefix(below, prefix.rstrip(".")):
                continue
            for added, view in views:
                if added and last(joined(place.path if searched else "", below)) == last(added):
                    continue  # the file has the prefix too: the same pair one level down, seen without its siblings
                if len(node.names) < len(view.names) * _SHARE and view is not views[0][1]:
                    continue
                alignment = align(node, view)
                if alignment.pairs:
                    spelled = alignment.leftover.values()
                    allowance.spend(len(spelled), sum(map(len, spelled)) + _BYTES_PER_LEAF * len(leaves))
                    candidate = _judge(place, below, leaves, node, alignment, wanted, added)
                    yield candidate
                    if candidate.fits:
                        spare -= len(candidate.pairs)
                        break
            if spare < least:
                break


def _nodes(tree: Node, least: int, own_places: frozenset[str]) -> Iterator[tuple[str, Node]]:
    """A container's names and every dotted prefix among them with at least `least` names below it."""
    todo: list[tuple[str, Node]] = [("", tree)]
    for path, node in todo:
        yield path, node
        for label, inner in node.children.items():
            if len(inner.names) >= least and not (inner.is_tensor and len(inner.names) == 1):
                if path or label not in own_places:
                    todo.append((f"{path}.{label}" if path else label, inner))


def _model_views(wanted: Wanted, strict: bool) -> list[tuple[str, Node]]:
    """The model's names, whole and below a prefix that all of them share (the file may lack it).

    A name outside the prefix counts as below it if it is tied to one there (GPT-2's ``lm_head`` beside
    ``transformer``), or need not be filled.
    """
    node = tree_of(name for name in wanted.shapes if name not in wanted.skipped)
    views = [("", node)]
    path = ""
    while (label := _only_child(node, wanted)) is not None:
        node = node.children[label]
        path = joined(path, label)
        views.append((path, node))
    if not strict:  # a part of the model may be what the file has: a base model without its head
        least = max(2, len(node.names) * _SHARE)
        views += [(joined(path, label), inner) for label, inner in node.children.items() if len(inner.names) >= least]
    return views


def _only_child(node: Node, wanted: Wanted) -> str | None:
    """The child below which everything lies that has to be filled, if there is one."""
    if not node.children:
        return None
    label, child = max(node.children.items(), key=lambda item: len(item[1].names))
    if child.is_tensor or len(child.names) == 1 < len(node.names):
        return None
    outside = len(node.names) - len(child.names)
    if outside:
        if outside > len(wanted.ties) + len(wanted.buffers) + len(wanted.optional):
            return None
        inside = set(child.names.values())
        missing, _ = wanted.lacks({name: name for name in inside})
        if not set(missing).isdisjoint(node.names.values()):
            return None
    return label


def _judge(
    place: Place,
    prefix: str,
    leaves: dict[str, Leaf],
    node: Node,
    alignment: Alignment,
    wanted: Wanted,
    added: str,
) -> Selection:
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    for name, shape in wanted.shapes.items():
        if name in alignment.pairs:
            found = shape_of(leaves[alignment.pairs[name]])
            if shape is not None and found is not None and shape != found and not (shape == () and found == (1,)):
                mismatched[name] = (found, shape)
    missing, tolerated = wanted.lacks(alignment.pairs, alignment.spare)
    used = set(alignment.pairs.values())
    elsewhere = set(alignment.outside)
    unexpected: list[str] = []
    outside: list[str] = []
    transient: dict[str, str] = {}
    skipped = [name for name in wanted.shapes if name in wanted.skipped]
    inside = set(node.names.values())
    for name, leaf in leaves.items():
        if name in used:
            continue
        here = alignment.leftover.get(name, name)
        if wanted.skips(here) or wanted.skips(name):
            if here not in wanted.skipped:
                skipped.append(name)
        elif name not in inside or name in elsewhere:
            outside.append(name)
        elif here in wanted.transient and wanted.transient[here] == getattr(leaf, "shape", None):
            transient[here] = name
            tolerated.append(name)
        elif (row := BENIGN_UNEXPECTED.get(last(name))) and row.covers(name, getattr(leaf, "shape", None)):
            tolerated.append(name)
        else:
            unexpected.append(name)
    return Selection(
        key=place.path,
        prefix=prefix,
        container=place.container,
        leaves=leaves,
        pairs=alignment.pairs,
        missing=missing,
        mismatched=mismatched,
        unexpected=unexpected,
        outside=outside,
        tolerated=tolerated,
        alignment=alignment,
        standing=_standing(place.path, prefix),
        crossed=not prefix and any(side == "file" and label in place.inner for side, label in alignment.dropped),
        skipped=skipped,
        transient=transient,
        added=added,
    )


def needed_tensors(wanted: Wanted) -> int:
    """How many tensors a candidate must have at least to fill the model."""
    needed = {
        wanted.ties.get(name, name)
        for name in wanted.shapes
        if name not in wanted.skipped
        and name not in wanted.optional
        and not wanted.may_lack(name)
        and last(name) not in WRAPPER_STATE
    }
    return len(needed) or 1


def _is_prefix(below: str, prefix: str) -> bool:
    """Whether a path in the file is the prefix that the caller gave, wrappers aside."""
    return below == prefix or [part for part in below.split(".") if part not in WRAPPERS] == prefix.split(".")


def _standing(key: str, prefix: str) -> Standing:
    path = joined(key, prefix)
    standings = [container_standing(segment) for segment in path.split(".")] if path else []
    worst = max(standings, default=Standing.CONVENTIONAL)
    if worst <= Standing.CONVENTIONAL and Standing.AVERAGE in standings:
        return Standing.AVERAGE
    return max(worst, Standing.CONVENTIONAL)
