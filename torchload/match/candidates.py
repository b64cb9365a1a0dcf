"""Every sub-tree that might be a model's state dict, judged by what it fills and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import tee
from typing import NamedTuple

from torchload.core.budget import Allowance
from torchload.core.wrappers import WRAPPER_STATE
from torchload.match.company import is_copy_of
from torchload.match.containers import Leaf, Place
from torchload.match.leftovers import Leftovers
from torchload.match.names import Alignment, Node, align, tree_of
from torchload.match.paths import joined, last, unwrapped
from torchload.match.rename import Rename, renamed_from
from torchload.match.selection import Selection, Wanted, mismatched
from torchload.match.tables import AVERAGED_WORDS, GENERIC, NEVER_THE_MODELS, container_standing, words_of
from torchload.match.values import Read, is_mask

__all__ = ["Search", "needed_tensors"]

# A part of the model is looked at if it is at least this share of the whole, and a sub-tree that may fill it, if it is
# of the part: to try every part with every sub-tree takes time as the cube of their number.
_SHARE = 1 / 8
_BYTES_PER_LEAF = 16  # what a candidate says of each name of its container


class _View(NamedTuple):
    """The model's names as they are, or below a prefix that the file may lack."""

    added: str
    node: Node


class Search(NamedTuple):
    """What is looked for, and where.

    Attributes:
        places: The containers.
        wanted: The model.
        allowance: What looking may cost.
        read: What reads a few values where names leave a question open; ``None`` if there are none.
        prefix: The prefix that the caller named, or ``None``.
        rename: The caller's renaming, or ``None``.
        masks: Identity of a leaf → whether it is a causal mask, as far as they were looked at.
        guess: Whether to look below prefixes too that nothing but shapes speaks for.
    """

    places: Sequence[Place]
    wanted: Wanted
    allowance: Allowance
    read: Read | None
    prefix: str | None
    rename: Rename | None
    masks: dict[int, bool]
    guess: bool = False

    def candidates(self, least: int, *, parts: bool = False) -> Iterator[Selection]:
        """Every sub-tree of at least `least` tensors that shares names with the model, or some `parts`, judged."""
        views = _model_views(self.wanted, parts)  # each made when it is first come to: as a rule the whole fits
        is_bare = self.wanted.is_bare
        own: dict[tuple[str, ...], Selection] = {}
        for place in self.places:
            if len(place.leaves) >= least and not _is_left_over(place, own):
                views, again = tee(views)
                for candidate in self._in(place, again, least, is_bare=is_bare):
                    if len(self.places) > 1 and self._is_own(candidate):
                        own[place.segments] = candidate
                    yield candidate

    def _is_own(self, candidate: Selection) -> bool:
        """Whether a container has all of the model's names, to the letter: no prefix in it is the model instead."""
        if self.prefix is not None or not candidate.is_exact:
            return False
        return not self.wanted._replace(optional=frozenset()).lacks(candidate.pairs)[0]

    def _in(self, place: Place, views: Iterator[_View], least: int, *, is_bare: bool) -> Iterator[Selection]:
        """The candidates in one container."""
        original: Mapping[str, str] = {}
        leaves = place.leaves
        if self.rename is not None:
            original = renamed_from(self.rename, leaves)
            leaves = {new: leaves[old] for new, old in original.items()}
        views, again = tee(views)
        whole = next(again)
        tree = tree_of(leaves, self.allowance)
        judge = _Judge(self, place, leaves, original)
        if self.prefix is None and "model" in place.inner:  # OpenNMT: 'model' and 'generator' together are the model
            self.allowance.spend(0, _BYTES_PER_LEAF * len(leaves))
            alignment = align(tree, whole.node, lift=("model",))
            if ("file", "model") in alignment.dropped:
                yield judge("", tree, alignment, "")
        searched = len(self.places) > 1  # not chosen by key, which hides what is above
        spare = len(leaves)
        for below, node in _nodes(tree, least, place.inner if self.rename is None else frozenset()):
            if self.prefix is not None and not _is_prefix(below, self.prefix.rstrip(".")):
                continue
            views, again = tee(views)
            for view in again:
                if view.added and last(joined(place.path if searched else "", below)) == last(view.added):
                    continue  # the file has the prefix too: the same pair one level down, seen without its siblings
                if len(node.names) < len(view.node.names) * _SHARE and view is not whole:
                    continue
                if self.prefix is None and not self.guess and not _may_be_meant(tree, below, view, is_bare=is_bare):
                    continue
                alignment = align(node, view.node)
                if alignment.pairs:
                    spelled = alignment.leftover.values()
                    self.allowance.spend(len(spelled), sum(map(len, spelled)) + _BYTES_PER_LEAF * len(leaves))
                    candidate = judge(below, node, alignment, view.added)
                    yield candidate
                    if candidate.fits:
                        spare -= len(candidate.pairs)
                        break
                    if self._is_own(candidate):
                        return
            if spare < least:
                break


def _is_left_over(place: Place, own: Mapping[tuple[str, ...], Selection]) -> bool:
    """Whether a container is what one around it has beside the model's own names, unexpected or left out on purpose."""
    for count in range(len(place.segments) if own else 0):
        if (around := own.get(place.segments[:count])) is not None:
            path, skipped = ".".join(place.segments[count:]), set(around.skipped)
            if not around.fits or all(f"{path}.{name}" in skipped for name in place.leaves):
                return True
    return False


def _nodes(tree: Node, least: int, own_places: frozenset[str]) -> Iterator[tuple[str, Node]]:
    """A container's names and every dotted prefix among them with at least `least` names below it."""
    todo: list[tuple[str, Node]] = [("", tree)]
    for path, node in todo:
        yield path, node
        for label, inner in node.children.items():
            if len(inner.names) >= least and not (inner.is_tensor and len(inner.names) == 1):
                if path or label not in own_places:
                    todo.append((f"{path}.{label}" if path else label, inner))


def _may_be_meant(tree: Node, below: str, view: _View, *, is_bare: bool) -> bool:
    """Whether a prefix of the file may stand for one of the model, or for none, although nobody says so.

    Two names that each say something (``ctx_encoder``, ``question_encoder``) are not the same part of a model. Nor is a
    part that happens to have the shapes of a model whose names say nothing, unless there is nothing beside it.
    """
    if not below:
        return True
    specific = [segment for segment in below.split(".") if not _is_generic(segment)]
    if view.added:
        if specific and not all(_is_generic(segment) for segment in view.added.split(".")):
            return False
        return _is_alone(tree, below)
    return not (specific and is_bare) or _is_alone(tree, below)


def _is_generic(segment: str) -> bool:
    """Whether a segment says nothing of what is below it, but perhaps that it is an average or the running weights."""
    if segment in GENERIC:
        return True
    words = [word for word in words_of(segment) if word not in AVERAGED_WORDS and word != "online"]
    return not words or "_".join(words) in GENERIC


def _is_alone(tree: Node, below: str) -> bool:
    """Whether a prefix is that of every name, but for what no model has and for copies of what is below it."""
    node = tree
    for label in below.split("."):
        for sibling in node.children:
            if sibling != label and sibling not in NEVER_THE_MODELS and sibling not in WRAPPER_STATE:
                if not is_copy_of(sibling, label):
                    return False
        node = node.children[label]
    return True


def _model_views(wanted: Wanted, parts: bool) -> Iterator[_View]:
    """The model's names, whole and below a prefix that all of them share (the file may lack it).

    A name outside the prefix counts as below it if it is tied to one there (GPT-2's ``lm_head`` beside
    ``transformer``), or need not be filled.
    """
    node = Node({name: name for name in wanted.shapes if name not in wanted.skipped})
    yield _View("", node)
    path = ""
    while (label := _only_child(node, wanted)) is not None:
        node = node.children[label]
        path = joined(path, label)
        yield _View(path, node)
    if parts:  # a part of the model may be what the file has: a base model without its head
        least = max(2, len(node.names) * _SHARE)
        for label, inner in node.children.items():
            if len(inner.names) >= least:
                yield _View(joined(path, label), inner)


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


class _Judge(NamedTuple):
    """Says of sub-trees of one container what they fill and what they leave."""

    search: Search
    place: Place
    leaves: dict[str, Leaf]
    original: Mapping[str, str]

    def __call__(self, prefix: str, node: Node, alignment: Alignment, added: str) -> Selection:
        wanted = self.search.wanted
        pairs, leaves = alignment.pairs, self.leaves
        if wanted.views:
            pairs, leaves = wanted.seen(pairs, leaves)
        missing, harmless = wanted.lacks(pairs, alignment.spare)
        leftovers = Leftovers(self.leaves, node, prefix, alignment, wanted, self._is_mask, self.original).sorted()
        segments = (*self.place.segments, *(prefix.split(".") if prefix else ()))
        return Selection(
            key=self.place.path,
            prefix=prefix,
            segments=segments,
            container=self.place.container,
            leaves=leaves,
            pairs=pairs,
            missing=missing,
            mismatched=mismatched(wanted.shapes, pairs, leaves),
            unexpected=leftovers.unexpected,
            outside=leftovers.outside,
            ignored=[*harmless, *leftovers.ignored],
            constants=leftovers.constants,
            alignment=alignment,
            standing=container_standing(*segments),
            crossed=not prefix
            and any(side == "file" and label in self.place.inner for side, label in alignment.dropped),
            skipped=[*(name for name in wanted.shapes if name in wanted.skipped), *leftovers.skipped],
            transient=leftovers.transient,
            added=added,
            original=self.original,
        )

    def _is_mask(self, leaf: Leaf) -> bool:
        """Whether a leaf is a causal mask; each is looked at once, however many candidates leave it."""
        masks, read = self.search.masks, self.search.read
        if read is not None and id(leaf) not in masks:
            masks[id(leaf)] = is_mask(leaf, read, self.search.allowance)
        return masks.get(id(leaf), False)


def needed_tensors(wanted: Wanted) -> int:
    """How many tensors a candidate must have at least to fill the model."""
    missing, _ = wanted.lacks({})
    ends = tuple(WRAPPER_STATE)
    needed = {wanted.ties.get(name, name) for name in missing if not name.endswith(ends) and name not in wanted.views}
    return len(needed) or 1


def _is_prefix(below: str, prefix: str) -> bool:
    """Whether a path in the file is the prefix that the caller gave, wrappers aside."""
    return below == prefix or (prefix != "" and unwrapped(below) == prefix)
