"""Find the sub-tree of a checkpoint that is a model's state dict.

A candidate is a container of the tree (`state_dict`, `model.ema`, …) or a dotted prefix inside one (`backbone.`),
which is the same thing one level down. Candidates are judged by how well their names and shapes fit the model; what
they are called decides only between candidates that fit equally.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torchload.errors import AmbiguousCheckpointError, CorruptCheckpointError, IncompatibleCheckpointError
from torchload.index import OpaqueTensor, Record, Shape, TensorEntry, record_fields
from torchload.keys.match import Alignment, Node, align, is_path, tree_of
from torchload.keys.rewrite import Rename, renamer
from torchload.keys.tables import (
    BENIGN_MISSING,
    BENIGN_UNEXPECTED,
    WRAPPER_STATE,
    WRAPPERS,
    Standing,
    container_standing,
)

__all__ = ["Leaf", "Selection", "Wanted", "as_mapping", "find_places", "select"]

Leaf = TensorEntry | OpaqueTensor | Any
_DEEPEST = 64  # containers inside each other, within one state dict
_EXPANSION = 8  # how often, on average, a tensor may be reached by different paths
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model, as far as choosing is concerned.

    Attributes:
        shapes: Every name of the model's state dict → its shape, or ``None`` where any value will do (extra state, lazy
            parameters).
        ties: Name → representative of the names that share its storage; names that share none are absent.
        skipped: Names that the caller wants left alone.
        optional: Names that may stay as they are without a word (state that only torch's own hooks fill).
        buffers: Names of buffers, as against parameters.
        transient: Non-persistent buffers → shape. No checkpoint need have them; older ones, and TorchScript, do.
        skip_pattern: What `skipped` was derived from, for the checkpoint's names.
    """

    shapes: Mapping[str, Shape | None]
    ties: Mapping[str, str] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    transient: Mapping[str, Shape | None] = field(default_factory=dict)
    skip_pattern: re.Pattern[str] | None = None

    def may_lack(self, name: str) -> bool:
        """Whether it is known to be harmless if nothing fills a name."""
        return name in self.buffers and (row := BENIGN_MISSING.get(_last(name))) is not None and row.covers(name, None)

    def lacks(self, pairs: Mapping[str, str], spare: Iterable[str] = ()) -> tuple[list[str], list[str]]:
        """What is left unfilled by `pairs`: the names that matter, and those that are known to be harmless."""
        filled = {self.ties.get(name, name) for name in pairs}
        passed = {*spare, *self.skipped, *self.optional}
        lacking = [
            name
            for name in self.shapes
            if name not in pairs and name not in passed and self.ties.get(name, name) not in filled
        ]
        return [name for name in lacking if not self.may_lack(name)], [name for name in lacking if self.may_lack(name)]

    def skips(self, name: str) -> bool:
        """Whether the caller wants a name, of either side, left alone."""
        return self.skip_pattern is not None and self.skip_pattern.match(name) is not None


@dataclass(slots=True)
class Selection:
    """The chosen sub-tree and how its names correspond to the model's.

    Attributes:
        key: Path of the container in the file, dotted; empty for the root.
        prefix: Dotted prefix inside that container; empty if the whole of it is meant.
        container: The container itself.
        leaves: Every name inside the container (after `rename`) → what it holds.
        pairs: Model name → name in `leaves`.
        missing: Model names that nothing fills.
        mismatched: Model name → (shape in the file, shape in the model).
        unexpected: Names inside modules that the model has, without a place in it.
        outside: Names of the container that are not this model's business.
        tolerated: Differences known to be harmless: names of either side.
        rivals: Paths of other candidates that would have fitted as well.
        crossed: Whether names were taken out of a container inside this one, which is a candidate of its own.
        skipped: Names that the caller wanted left alone: the model's, then those that only the file has.
        transient: Non-persistent buffer of the model → name in `leaves`, where the file has it all the same.
        added: Prefix that all of the model's names have and the file's lack.
        alignment: The matcher's account.
        standing: How strongly the path speaks for these weights.
    """

    key: str
    prefix: str
    container: Mapping[Any, Any]
    leaves: dict[str, Leaf]
    pairs: dict[str, str]
    missing: list[str]
    mismatched: dict[str, tuple[Shape, Shape]]
    unexpected: list[str]
    outside: list[str]
    tolerated: list[str]
    alignment: Alignment
    standing: Standing = Standing.CONVENTIONAL
    crossed: bool = False
    skipped: list[str] = field(default_factory=list)
    transient: dict[str, str] = field(default_factory=dict)
    added: str = ""
    rivals: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Container and prefix as one dotted path."""
        return _joined(self.key, self.prefix)

    @property
    def averaged(self) -> bool:
        """Whether these are averaged (EMA, SWA) weights, by their name."""
        return self.standing is Standing.AVERAGE

    @property
    def fills(self) -> bool:
        """Whether the model is filled wholly, with the right shapes."""
        return not self.missing and not self.mismatched

    @property
    def fits(self) -> bool:
        """Whether a strict load may take it."""
        return self.fills and not self.unexpected and not self.alignment.ambiguous


def select(
    root: Any,
    wanted: Wanted,
    *,
    path: str,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    strict: bool = True,
) -> Selection:
    """Choose the part of a checkpoint that belongs to a model.

    Args:
        root: The checkpoint's tree.
        wanted: The model.
        path: The checkpoint, for messages.
        key: Dotted path of the container to use; ``None`` searches all of them.
        prefix: Prefix of the names to use; ``None`` searches all of them.
        rename: Applied to the names of each container before anything else (see `renamer`).
        strict: Whether only a whole fit will do. Otherwise the candidate that fills most is chosen.

    Returns:
        The candidate that fits; or, if none does, the best one with what it lacks, for the planner to report.

    Raises:
        AmbiguousCheckpointError: Several candidates of equal standing fit and hold different data.
        IncompatibleCheckpointError: `key` or `prefix` names nothing, or the file holds no tensors.
    """
    places = find_places(root, key, path)
    if strict:
        candidates = _candidates(places, wanted, prefix, rename, _needed(wanted), strict)
        if fitting := [candidate for candidate in candidates if candidate.fits]:
            return _best(fitting, root, path, strict)
    partial = list(_candidates(places, wanted, prefix, rename, 1, strict=False))
    if not partial:
        raise _nothing(places, wanted, prefix, path)
    if not strict:
        return _best(partial, root, path, strict)
    return max(
        partial, key=lambda c: (len(c.pairs) - len(c.mismatched), not c.crossed, -len(c.unexpected), -c.standing)
    )


# --- the containers of a tree ---


@dataclass(frozen=True, slots=True)
class Place:
    """A container and where it stands."""

    path: str
    container: Mapping[Any, Any]
    leaves: dict[str, Leaf]
    inner: frozenset[str]  # names of nested containers, which are places of their own


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """What a value of the tree holds by name: its entries, its positions, an object's attributes; else ``None``."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, Record):
        return record_fields(value)
    return None


def find_places(root: Any, key: str | None, path: str) -> list[Place]:
    """Every container that holds tensors at any depth, outermost first, each once however often it is referred to."""
    containers = _containers(root)
    leaves_in_all = sum(_is_leaf(name, value) for _, inside in containers.values() for name, value in inside.items())
    found: list[Place] = []
    for here, inside in containers.values():
        if leaves := _flatten(inside, containers, _EXPANSION * leaves_in_all + 1000, path):
            inner = frozenset(str(name) for name, value in inside.items() if id(value) in containers)
            found.append(Place(here, inside, leaves, inner))
    if key is None:
        return found
    chosen = [place for place in found if place.path == key]
    if not chosen:
        known = ", ".join(repr(place.path) for place in found if place.path) or "no containers with tensors"
        raise IncompatibleCheckpointError(
            f"{path} has no container {key!r} that holds tensors. It has: {known}.", path=path
        )
    return chosen


def _containers(root: Any) -> dict[int, tuple[str, Mapping[Any, Any]]]:
    """All containers of a tree below which tensors are: identity → (dotted path, what it holds), outermost first."""
    top = as_mapping(root)
    if top is None:
        return {}
    known: dict[int, tuple[str, Mapping[Any, Any]]] = {id(root): ("", top)}
    above: dict[int, list[int]] = {id(root): []}
    holding: list[int] = []
    todo = [(id(root), "", top)]
    for identity, here, inside in todo:
        has_leaves = False
        for name, value in inside.items():
            if _is_leaf(name, value):
                has_leaves = True
            elif (below := as_mapping(value)) is not None:
                if id(value) not in known:
                    known[id(value)] = (f"{here}.{name}" if here else str(name), below)
                    above[id(value)] = []
                    todo.append((id(value), *known[id(value)]))
                above[id(value)].append(identity)
        if has_leaves:
            holding.append(identity)
    for identity in holding:  # grows upwards from where tensors are
        holding.extend(parent for parent in above.pop(identity, ()) if parent in above)
    held = set(holding)
    return {identity: place for identity, place in known.items() if identity in held}


def _is_leaf(name: Any, value: Any) -> bool:
    return isinstance(value, (TensorEntry, OpaqueTensor)) or (type(name) is str and name.endswith(_EXTRA_STATE))


def _flatten(
    container: Mapping[Any, Any], containers: Mapping[int, tuple[str, Mapping[Any, Any]]], most: int, path: str
) -> dict[str, Leaf]:
    """All tensors under a container by dotted name, in the file's order.

    A name that would stand twice (``{"a.b": …, "a": {"b": …}}``) is kept once, as it stands nearest to the root.

    Args:
        container: Where to begin.
        containers: Those worth descending into, by identity.
        most: How many names the expansion may have: a small file can refer to the same container over and over.
        path: The checkpoint, for the message.

    Raises:
        CorruptCheckpointError: There would be more.
    """
    leaves: dict[str, Leaf] = {}
    deeper: list[tuple[str, Mapping[Any, Any], frozenset[int]]] = [("", container, frozenset())]
    for prefix, inside, above in deeper:
        for name, value in inside.items():
            if _is_leaf(name, value):
                leaves.setdefault(f"{prefix}{name}", value)
            elif id(value) in containers and id(value) not in above and len(above) < _DEEPEST:
                deeper.append((f"{prefix}{name}.", containers[id(value)][1], above | {id(value)}))
        if len(leaves) + len(deeper) > most + len(inside):
            raise CorruptCheckpointError(
                f"{path} refers to the same containers so often that they expand to over {most:,} tensors. Refused.",
                path=path,
            )
    return leaves


# --- candidates ---


def _candidates(
    places: Sequence[Place],
    wanted: Wanted,
    prefix: str | None,
    rename: Rename | None,
    least: int,
    strict: bool,
) -> Iterator[Selection]:
    """Every sub-tree with at least `least` tensors that shares names with the model, judged."""
    views = _model_views(wanted, strict)
    searched = len(places) > 1  # not chosen by key, which hides what is above
    for place in places:
        if len(place.leaves) < least:
            continue
        leaves = renamer(rename, place.leaves) if rename is not None else place.leaves
        tree = tree_of(leaves)
        if prefix is None and "model" in place.inner:  # OpenNMT: 'model' and 'generator' together are the model
            alignment = align(tree, views[0][1], lift=("model",))
            if ("file", "model") in alignment.dropped:
                yield _judge(place, "", leaves, tree, alignment, wanted, "")
        spare = len(leaves)
        for below, node in _nodes(tree, least, place.inner if rename is None else frozenset()):
            if prefix is not None and not _is_prefix(below, prefix.rstrip(".")):
                continue
            for added, view in views:
                if added and _last(_joined(place.path if searched else "", below)) == _last(added):
                    continue  # the file has the prefix too: the same pair one level down, seen without its siblings
                alignment = align(node, view)
                if alignment.pairs:
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
        path = _joined(path, label)
        views.append((path, node))
    if not strict:  # a part of the model may be what the file has: a base model without its head
        views += [(_joined(path, label), inner) for label, inner in node.children.items() if len(inner.names) > 1]
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
            found = getattr(leaves[alignment.pairs[name]], "shape", None)
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
        elif (row := BENIGN_UNEXPECTED.get(_last(name))) and row.covers(name, getattr(leaf, "shape", None)):
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


def _needed(wanted: Wanted) -> int:
    """How many tensors a candidate must have at least to fill the model."""
    needed = {
        wanted.ties.get(name, name)
        for name in wanted.shapes
        if name not in wanted.skipped
        and name not in wanted.optional
        and not wanted.may_lack(name)
        and _last(name) not in WRAPPER_STATE
    }
    return len(needed) or 1


def _is_prefix(below: str, prefix: str) -> bool:
    """Whether a path in the file is the prefix that the caller gave, wrappers aside."""
    return below == prefix or [part for part in below.split(".") if part not in WRAPPERS] == prefix.split(".")


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# --- the choice ---


class Candidate(Protocol):
    """What may be meant, as far as its name and its company tell."""

    standing: Standing

    @property
    def key(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def leaves(self) -> Mapping[str, Leaf]: ...


def _standing(key: str, prefix: str) -> Standing:
    path = _joined(key, prefix)
    standings = [container_standing(segment) for segment in path.split(".")] if path else []
    worst = max(standings, default=Standing.CONVENTIONAL)
    if worst <= Standing.CONVENTIONAL and Standing.AVERAGE in standings:
        return Standing.AVERAGE
    return max(worst, Standing.CONVENTIONAL)


def _best(fitting: list[Selection], root: Any, path: str, strict: bool) -> Selection:
    """The strongest of several candidates that fit; those that hold the very same data count once."""
    distinct: dict[tuple[object, ...], Selection] = {}
    for candidate in fitting:
        data = _data(candidate) if len(fitting) > 1 else ()
        known = distinct.get(data)
        if known is None or _rank(candidate, strict) < _rank(known, strict):
            distinct[data] = candidate
    for candidate in distinct.values():
        candidate.standing = standing_in_company(candidate, distinct.values(), root)
    ranked = sorted(distinct.values(), key=lambda candidate: _rank(candidate, strict))
    first = ranked[0]
    equals = [candidate for candidate in ranked if _rank(candidate, strict)[:2] == _rank(first, strict)[:2]]
    if len(equals) > 1:
        raise _ambiguous(equals, path)
    rivals = [candidate.path or "the top level" for candidate in ranked[1:] if candidate.fits]
    first.rivals = tuple(dict.fromkeys(rivals))
    return first


def _data(candidate: Selection) -> tuple[object, ...]:
    """Identity of the data that a candidate would load, whatever it is called."""
    leaves = [candidate.leaves[source] for _, source in sorted(candidate.pairs.items())]
    return tuple(leaf.location if isinstance(leaf, TensorEntry) else id(leaf) for leaf in leaves)


def _rank(candidate: Selection, strict: bool) -> tuple[Any, ...]:
    """Sort key: what decides, then what merely orders equals (a plain fit, a short path)."""
    filled = 0 if strict else -(len(candidate.pairs) - len(candidate.mismatched))
    left = len(candidate.outside) + len(candidate.tolerated)
    return filled, candidate.standing, candidate.crossed, left, len(candidate.path)


def standing_in_company(candidate: Candidate, others: Iterable[Candidate], root: Any) -> Standing:
    """What a name means depends on what stands beside it."""
    top = root if isinstance(root, Mapping) else {}
    if candidate.key == "ema_state_dict" and "message_hub" in top:
        return Standing.ARBITRARY  # mmengine's EMAHook swaps when it saves: these are the raw weights
    teacher = _network(candidate, "teacher")
    if teacher is not None:
        # Self-distillation (DINO, iBOT, mean teacher): two copies of one network, of which the teacher is the average.
        # A student of another make, or a teacher alone, says nothing of the kind.
        if any(_network(other, "student") == teacher for other in others):
            return Standing.AVERAGE
    return candidate.standing


def _network(candidate: Candidate, name: str) -> dict[str, object] | None:
    """Names and shapes of all that stands below the segment `name` of a candidate's path, without wrappers."""
    segments = candidate.path.split(".")
    if name not in segments:
        return None
    above = _joined(*segments[: segments.index(name) + 1]) + "."
    full = ((_joined(candidate.key, leaf), value) for leaf, value in candidate.leaves.items())
    return {
        leaf.removeprefix(above).removeprefix("module."): getattr(value, "shape", None)
        for leaf, value in full
        if leaf.startswith(above)
    }


def _ambiguous(equals: list[Selection], path: str) -> AmbiguousCheckpointError:
    containers = len({candidate.key for candidate in equals}) > 1
    argument = "key" if containers else "prefix"
    names = [candidate.key if containers else f"{candidate.prefix}." for candidate in equals]
    listing = "\n".join(f"    {argument}={name!r}" for name in names)
    return AmbiguousCheckpointError(
        f"{path} holds {len(equals)} sets of weights that fit this model equally well. Nothing was loaded. "
        f"Say which one is meant:\n{listing}",
        path=path,
        candidates=names,
        argument=argument,
    )


def _nothing(places: Sequence[Place], wanted: Wanted, prefix: str | None, path: str) -> IncompatibleCheckpointError:
    if not places:
        return IncompatibleCheckpointError(
            f"{path} holds no tensors. Nothing was loaded; the model is unchanged.",
            path=path,
            missing_keys=wanted.shapes,
        )
    largest = max(places, key=lambda place: len(place.leaves))
    if prefix is not None:
        tops = sorted({name.partition(".")[0] for place in places for name in place.leaves})
        what = f"no names under the prefix {prefix!r} that this model has"
        hint = f"Its names begin with: {', '.join(tops[:12])}{', …' if len(tops) > 12 else ''}."
    else:
        what = "not one name in common with this model"
        theirs, ours = list(largest.leaves)[:4], list(wanted.shapes)[:4]
        hint = f"The file has {', '.join(theirs)}, …; the model has {', '.join(ours)}, …"
    return IncompatibleCheckpointError(
        f"{path} has {what}. Nothing was loaded; the model is unchanged.\n  {hint}",
        path=path,
        missing_keys=wanted.shapes,
        unexpected_keys=[name for name in largest.leaves if is_path(name)],
    )
