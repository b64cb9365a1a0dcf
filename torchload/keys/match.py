"""Reconcile two sets of names: a checkpoint's and a model's.

Names are paths in a tree of modules. A wrapper (DataParallel, torch.compile, FSDP, …) puts one node between a module
and its children, so the two trees are walked side by side, and a wrapper's node is stepped over on either side only
where that is what makes the children agree. Nothing is ever cut out of a name as text: a module that is really called
``module`` is a node like any other.

The walk compares whole sub-trees first, so equal ones cost one comparison of sets; every name is split at most once per
segment. The cost is linear in the total length of the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torchload.keys.tables import RENAMES, WRAPPER_STATE, WRAPPERS

__all__ = ["Alignment", "Names", "align", "names_of", "split"]

Names = dict[str, str]
"""A sub-tree: what is left of each name below its root → the whole name. ``""`` is a tensor at the root itself."""

_LONGEST_NAME = 4096


@dataclass(slots=True)
class Alignment:
    """How the names of two trees correspond.

    Attributes:
        pairs: Model name → checkpoint name.
        outside: Checkpoint names that are not the model's business: top-level siblings that it does not have at all,
            and what wrappers keep for themselves.
        spare: Model names that a wrapper keeps for itself and the checkpoint lacks.
        ambiguous: Model name → checkpoint names that claim it equally well.
        dropped: Wrapper segments that were stepped over, and on which side (``"file"``, ``"model"``), with how often.
        renamed: Checkpoint name → the rule that gave it its model name.
        leftover: Checkpoint name without a counterpart in a module that the model has → what the model would call it.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[tuple[str, str], int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    leftover: dict[str, str] = field(default_factory=dict)


def names_of(names: Iterable[str]) -> Names:
    """The sub-tree of whole names. Names that can't be a path (empty segments, absurd length) are left out.

    Example:
        >>> names_of(["fc.weight", "a..b"])
        {'fc.weight': 'fc.weight'}
    """
    return {name: name for name in names if is_path(name)}


def is_path(name: str) -> bool:
    """Whether a name can be the path of a tensor in a tree of modules."""
    return bool(name) and ".." not in name and name[0] != "." and name[-1] != "." and len(name) <= _LONGEST_NAME


def split(names: Names) -> dict[str, Names]:
    """The children of a sub-tree's root: first segment → sub-tree.

    Example:
        >>> split({"fc.weight": "net.fc.weight", "fc.bias": "net.fc.bias"})
        {'fc': {'weight': 'net.fc.weight', 'bias': 'net.fc.bias'}}
    """
    children: dict[str, Names] = {}
    for rest, name in names.items():
        if rest:
            label, _, below = rest.partition(".")
            if label in children:
                children[label][below] = name
            else:
                children[label] = {below: name}
    return children


def align(source: Names, model: Names, *, lift: Iterable[str] = ()) -> Alignment:
    """Pair the names of a checkpoint's sub-tree with those of a model.

    Args:
        source: The checkpoint's names.
        model: The model's names.
        lift: Labels below the root whose children may stand beside it, as wrappers' may (a file that keeps
            ``model`` and ``generator`` apart although together they are the model).

    Returns:
        The pairs found. Names of the model that are not in `pairs` have no counterpart.

    Example:
        >>> align(names_of(["module.fc._orig_mod.weight"]), names_of(["fc.weight"])).pairs
        {'fc.weight': 'module.fc._orig_mod.weight'}
    """
    result = Alignment()
    _at_root(result, source, model, frozenset(lift))
    return result


def _at_root(result: Alignment, source: Names, model: Names, lift: frozenset[str]) -> None:
    work: list[tuple[Names, Names]] = []
    extra = _pair_children(result, source, model, work, WRAPPERS.keys() | lift)
    # A tensor right at the root would be part of the root module itself, which the model has: that is unexpected.
    result.outside += [name for below in extra.values() for rest, name in below.items() if rest]
    while work:
        ours, theirs = work.pop()
        _pair_children(result, ours, theirs, work, WRAPPERS.keys())


def _pair_children(
    result: Alignment, source: Names, model: Names, work: list[tuple[Names, Names]], liftable: Iterable[str]
) -> dict[str, Names]:
    """Pair two nodes: what is settled goes to `result`, pairs of children to `work`.

    Returns:
        The source's children that have no counterpart.
    """
    if source.keys() == model.keys():
        result.pairs.update((name, source[rest]) for rest, name in model.items())
        return {}
    if "" in source and "" in model:
        result.pairs[model[""]] = source[""]
    ours, theirs = _agree(result, _Chain.below(source), _Chain.below(model))
    extra = {label: ours[label] for label in ours if label not in theirs}
    lacking = {label: theirs[label] for label in theirs if label not in ours}
    work.extend((ours[label], theirs[label]) for label in ours if label in theirs)
    if extra and lacking:
        _lift(result, extra, lacking, work, liftable, "file")
        _lift(result, lacking, extra, work, liftable, "model")
        _rename(result, extra, lacking)
    if extra and theirs:
        here = _root_of(theirs)
        result.leftover.update((name, here + rest) for rest, name in _joined(extra).items())
    return extra


@dataclass(slots=True)
class _Chain:
    """A node and what appears when wrappers right below it are stepped over, one after the other.

    Attributes:
        levels: The children at each depth.
        labels: The wrapper between each level and the next.
        state: The wrappers' own tensors that were passed on the way: (level, label, name).
    """

    levels: list[dict[str, Names]]
    labels: list[str]
    state: list[tuple[int, str, str]]

    @classmethod
    def below(cls, names: Names) -> _Chain:
        chain = cls([split(names)], [], [])
        while True:
            children = chain.levels[-1]
            inner = [label for label, below in children.items() if not (label in WRAPPER_STATE and "" in below)]
            if len(inner) != 1 or inner[0] not in WRAPPERS or "" in children[inner[0]]:
                return chain
            depth = len(chain.labels)
            chain.state += [(depth, label, below[""]) for label, below in children.items() if label != inner[0]]
            chain.labels.append(inner[0])
            chain.levels.append(split(children[inner[0]]))


def _agree(result: Alignment, source: _Chain, model: _Chain) -> tuple[dict[str, Names], dict[str, Names]]:
    """The level of each chain at which the children agree best, as deep as possible."""
    _, i, j = max(
        (len(ours.keys() & theirs.keys()), i, j)
        for i, ours in enumerate(source.levels)
        for j, theirs in enumerate(model.levels)
    )
    # What both sides have above the chosen levels belongs together (the state of the same wrapper), innermost first.
    passed = [(label, name) for depth, label, name in source.state if depth < i]
    for depth, label, name in reversed(model.state):
        if depth < j:
            ours = next((name for kind, name in reversed(passed) if kind == label), None)
            if ours is None:
                result.spare.append(name)
            else:
                result.pairs[name] = ours
                passed.remove((label, ours))
    result.outside += [name for _, name in passed]
    # A wrapper that both sides have was not dropped from either.
    dropped_here, dropped_there = source.labels[:i], model.labels[:j]
    for label in source.labels[:i]:
        if label in dropped_there:
            dropped_there.remove(label)
            dropped_here.remove(label)
    for side, labels in (("file", dropped_here), ("model", dropped_there)):
        for label in labels:
            result.dropped[side, label] = result.dropped.get((side, label), 0) + 1
    return source.levels[i], model.levels[j]


def _lift(
    result: Alignment,
    holders: dict[str, Names],
    wanted: dict[str, Names],
    work: list[tuple[Names, Names]],
    liftable: Iterable[str],
    side: str,
) -> None:
    """Pair children of a wrapper that has siblings with the nodes they are wanted as, if just one offers them."""
    offers: dict[str, list[tuple[str, Names]]] = {}
    for label in [label for label in holders if label in liftable]:
        chain = _Chain.below(holders[label])
        level = max(chain.levels, key=lambda children: len(children.keys() & wanted.keys()))
        for inner in level.keys() & wanted.keys():
            offers.setdefault(inner, []).append((label, level[inner]))
    lifted: set[int] = set()
    for inner, offered in offers.items():
        target = wanted.pop(inner)
        if len(offered) > 1:
            claims = [name for _, names in offered for name in names.values()]
            ours, theirs = (claims, list(target.values())) if side == "file" else (list(target.values()), claims)
            result.ambiguous.update((name, ours) for name in theirs)
            continue
        label, names = offered[0]
        work.append((names, target) if side == "file" else (target, names))
        result.dropped[side, label] = result.dropped.get((side, label), 0) + 1
        lifted.update(map(id, names.values()))
    for label in {label for offered in offers.values() for label, _ in offered}:
        holders[label] = {rest: name for rest, name in holders[label].items() if id(name) not in lifted}


_PLACEHOLDER = r"(?P<p>[^.]+)"


def _rename(result: Alignment, extra: dict[str, Names], lacking: dict[str, Names]) -> None:
    """Pair what is left in one module where a known rule says that two spellings mean the same tensors."""
    ours = _joined(extra)
    theirs = _joined(lacking)
    for rule in RENAMES:
        for here, there in rule.directions():
            pattern = re.compile(re.escape(here[0]).replace(re.escape("{p}"), _PLACEHOLDER))
            for found in [m for name in ours if (m := pattern.fullmatch(name))]:
                parameter = found.groupdict().get("p", "")
                from_names = [name.format(p=parameter) for name in here]
                to_names = [name.format(p=parameter) for name in there]
                if all(name in ours for name in from_names) and all(name in theirs for name in to_names):
                    for from_name, to_name in zip(from_names, to_names):
                        source_name = ours.pop(from_name)
                        result.pairs[theirs.pop(to_name)] = source_name
                        result.renamed[source_name] = rule.what
    remaining = set(ours.values())
    for label, names in extra.items():
        extra[label] = {rest: name for rest, name in names.items() if name in remaining}


def _root_of(children: Mapping[str, Names]) -> str:
    """The path of a node, with its dot, from the names below it."""
    rest, name = next(iter(_joined(dict([next(iter(children.items()))])).items()))
    return name[: len(name) - len(rest)]


def _joined(children: Mapping[str, Names]) -> Names:
    return {
        f"{label}.{rest}" if rest else label: name for label, names in children.items() for rest, name in names.items()
    }
