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
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from torchload.core.budget import LONGEST_NAME, Allowance
from torchload.core.wrappers import WRAPPER_STATE, WRAPPERS
from torchload.match.tables import RENAMES, Respelling

__all__ = ["Alignment", "Node", "align", "is_path", "tree_of"]


class Node:
    """A sub-tree of names.

    Attributes:
        names: What is left of each name below the node → the whole name. ``""`` is a tensor at the node itself.
    """

    __slots__ = ("_allowance", "_chain", "_children", "names")

    def __init__(self, names: dict[str, str], allowance: Allowance | None = None) -> None:
        """A node whose children are made when they are looked at, for which a stranger's names may cost so much."""
        self.names = names
        self._allowance = allowance
        self._children: dict[str, Node] | None = None
        self._chain: _Chain | None = None

    @property
    def children(self) -> dict[str, Node]:
        """First segment → sub-tree; split once.

        Example:
            >>> tree_of(["fc.weight", "fc.bias"]).children["fc"].names
            {'weight': 'fc.weight', 'bias': 'fc.bias'}
        """
        if self._children is None:
            if self._allowance is not None:
                self._allowance.spend(len(self.names), sum(map(len, self.names)))
            parts: dict[str, dict[str, str]] = {}
            for rest, name in self.names.items():
                if rest:
                    label, _, below = rest.partition(".")
                    if label in parts:
                        parts[label][below] = name
                    else:
                        parts[label] = {below: name}
            if self._allowance is not None:
                self._allowance.spend(2 * len(parts), 0)  # a node takes as much as two names
            self._children = {label: Node(names, self._allowance) for label, names in parts.items()}
        return self._children

    def without(self, names: Collection[str]) -> Node:
        """The node without some names."""
        return Node({rest: name for rest, name in self.names.items() if name not in names}, self._allowance)

    @property
    def chain(self) -> _Chain:
        """The node with the wrappers right below it stepped over, one after the other; found once."""
        if self._chain is None:
            self._chain = _Chain(self)
        return self._chain

    @property
    def is_tensor(self) -> bool:
        """Whether a tensor has the node's own name."""
        return "" in self.names


class Alignment:
    """How the names of two trees correspond.

    Attributes:
        pairs: Model name → checkpoint name.
        wrapper_state: Checkpoint names that wrappers keep for themselves.
        spare: Model names that a wrapper keeps for itself and the checkpoint lacks.
        ambiguous: Model name → checkpoint names that claim it equally well.
        dropped: Wrapper segments that were stepped over, and on which side (``"file"``, ``"model"``), with how often.
        renamed: Checkpoint name → the rule that gave it its model name.
        leftover: Checkpoint name without a counterpart → what the model would call it.
    """

    __slots__ = ("ambiguous", "dropped", "leftover", "pairs", "renamed", "spare", "wrapper_state")

    def __init__(self) -> None:
        self.pairs: dict[str, str] = {}
        self.wrapper_state: list[str] = []
        self.spare: list[str] = []
        self.ambiguous: dict[str, list[str]] = {}
        self.dropped: dict[tuple[str, str], int] = {}
        self.renamed: dict[str, str] = {}
        self.leftover: dict[str, str] = {}


def tree_of(names: Iterable[str], allowance: Allowance | None = None) -> Node:
    """The tree of whole names. Names that can't be a path (empty segments, absurd length) are left out.

    Example:
        >>> tree_of(["fc.weight", "a..b"]).names
        {'fc.weight': 'fc.weight'}
    """
    return Node({name: name for name in names if is_path(name)}, allowance)


def is_path(name: str) -> bool:
    """Whether a name can be the path of a tensor in a tree of modules."""
    return bool(name) and ".." not in name and name[0] != "." and name[-1] != "." and len(name) <= LONGEST_NAME


def align(source: Node, model: Node, *, lift: Iterable[str] = ()) -> Alignment:
    """Pair the names of a checkpoint's sub-tree with those of a model.

    Args:
        source: The checkpoint's names.
        model: The model's names.
        lift: Labels below the root whose children may stand beside it, as wrappers' may (a file that keeps
            ``model`` and ``generator`` apart although together they are the model).

    Example:
        >>> align(tree_of(["module.fc._orig_mod.weight"]), tree_of(["fc.weight"])).pairs
        {'fc.weight': 'module.fc._orig_mod.weight'}
    """
    result = Alignment()
    _at_root(result, source, model, frozenset(lift))
    return result


def _at_root(result: Alignment, source: Node, model: Node, lift: frozenset[str]) -> None:
    work: list[tuple[Node, Node]] = []
    liftable = WRAPPERS.keys() | lift
    if source.names.keys() != model.names.keys() and not _may_agree(source, model, liftable):
        return
    extra, in_model = _pair_children(result, source, model, work, liftable)
    if not work and not result.pairs:
        return  # nothing in common: not the same module, and no use in naming what it lacks
    _note_leftover(result, extra, in_model)
    while work:
        pair = work.pop()
        _note_leftover(result, *_pair_children(result, *pair, work, WRAPPERS.keys()))


def _may_agree(source: Node, model: Node, liftable: Collection[str]) -> bool:
    """Whether a look at the labels leaves a chance: most pairs of sub-trees have nothing to do with each other."""
    if source.is_tensor and model.is_tensor:
        return True
    in_file, in_model = source.chain, model.chain
    return (
        any(here.keys() & there.keys() for here in in_file.levels for there in in_model.levels)
        or any(here.keys() & liftable for here in (*in_file.levels, *in_model.levels))
        or (in_file.has_tensors and in_model.has_tensors)
    )


def _note_leftover(result: Alignment, extra: dict[str, Node], in_model: dict[str, Node]) -> None:
    here = _path_of(in_model) if in_model else ""
    result.leftover.update((name, here + local) for local, name in _joined(extra).items())


def _pair_children(
    result: Alignment, source: Node, model: Node, work: list[tuple[Node, Node]], liftable: Collection[str]
) -> tuple[dict[str, Node], dict[str, Node]]:
    """Pair two nodes: what is settled goes to `result`, pairs of children to `work`.

    Returns:
        The source's children that have no counterpart, and the model's children among which they lack one.
    """
    if source.names.keys() == model.names.keys():
        result.pairs.update({name: source.names[rest] for rest, name in model.names.items()})
        return {}, {}
    if source.is_tensor and model.is_tensor:
        result.pairs[model.names[""]] = source.names[""]
    if source.names.keys() <= model.names.keys() or source.names.keys() >= model.names.keys():
        # Names that are the model's to the letter are never others.
        in_file, in_model = (
            _without_state(result.wrapper_state, source, model),
            _without_state(result.spare, model, source),
        )
    else:
        in_file, in_model = _agree(result, source.chain, model.chain)
    extra = {label: in_file[label] for label in in_file if label not in in_model}
    lacking = {label: in_model[label] for label in in_model if label not in in_file}
    work.extend((in_file[label], in_model[label]) for label in in_file if label in in_model)
    if extra and lacking:
        _lift(result, extra, lacking, work, liftable, "file")
        _lift(result, lacking, extra, work, liftable, "model")
        _rename(result, extra, lacking)
    return extra, in_model


def _without_state(state: list[str], node: Node, other: Node) -> dict[str, Node]:
    """A node's children, without what a wrapper keeps beside what it holds and the other side lacks: to `state`."""
    children = node.children
    if WRAPPER_STATE.keys().isdisjoint(children):
        return children
    own = {label: name for depth, label, name in node.chain.state if depth == 0 and label not in other.children}
    state.extend(own.values())
    return {label: child for label, child in children.items() if label not in own}


class _Chain:
    """A node and what appears when wrappers right below it are stepped over, one after the other.

    Attributes:
        levels: The children at each depth.
        labels: The wrapper between each level and the next.
        state: The wrappers' own tensors that were passed on the way: (level, label, name).
        has_tensors: Whether the innermost level has tensors of its own, which a rule may know by other names.
    """

    __slots__ = ("has_tensors", "labels", "levels", "state")

    def __init__(self, node: Node) -> None:
        self.levels = [node.children]
        self.labels: list[str] = []
        self.state: list[tuple[int, str, str]] = []
        while True:
            children = self.levels[-1]
            inner = [label for label, child in children.items() if not (label in WRAPPER_STATE and child.is_tensor)]
            if len(inner) != 1 or inner[0] not in WRAPPERS or children[inner[0]].is_tensor:
                break
            depth = len(self.labels)
            self.state += [(depth, label, child.names[""]) for label, child in children.items() if label != inner[0]]
            self.labels.append(inner[0])
            self.levels.append(children[inner[0]].children)
        self.has_tensors = any(child.is_tensor or label == _PARAMETRIZED for label, child in children.items())


def _agree(result: Alignment, source: _Chain, model: _Chain) -> tuple[dict[str, Node], dict[str, Node]]:
    """The level of each chain at which the children agree best, as deep as possible."""
    _, i, j = max(
        (len(in_file.keys() & in_model.keys()), i, j)
        for i, in_file in enumerate(source.levels)
        for j, in_model in enumerate(model.levels)
    )
    # What both sides have above the chosen levels belongs together (the state of the same wrapper), innermost first.
    passed = [(label, name) for depth, label, name in source.state if depth < i]
    for depth, label, name in reversed(model.state):
        if depth < j:
            in_file = next((name for kind, name in reversed(passed) if kind == label), None)
            if in_file is None:
                result.spare.append(name)
            else:
                result.pairs[name] = in_file
                passed.remove((label, in_file))
    result.wrapper_state += [name for _, name in passed]
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
    holders: dict[str, Node],
    wanted: dict[str, Node],
    work: list[tuple[Node, Node]],
    liftable: Collection[str],
    side: str,
) -> None:
    """Pair children of a wrapper that has siblings with the nodes they are wanted as, if just one offers them."""
    offers: dict[str, list[tuple[str, Node]]] = {}
    for label in [label for label in holders if label in liftable]:
        chain = holders[label].chain
        level = max(chain.levels, key=lambda children: len(children.keys() & wanted.keys()))
        for inner in level.keys() & wanted.keys():
            offers.setdefault(inner, []).append((label, level[inner]))
    lifted: set[str] = set()
    for inner, offered in offers.items():
        target = wanted.pop(inner)
        if len(offered) > 1:
            claims = [name for _, node in offered for name in node.names.values()]
            aims = list(target.names.values())
            in_file, in_model = (claims, aims) if side == "file" else (aims, claims)
            result.ambiguous.update((name, in_file) for name in in_model)
            continue
        label, node = offered[0]
        work.append((node, target) if side == "file" else (target, node))
        result.dropped[side, label] = result.dropped.get((side, label), 0) + 1
        lifted.update(node.names.values())
    for label in {label for offered in offers.values() for label, _ in offered}:
        holders[label] = holders[label].without(lifted)


_PARAMETRIZED = "parametrizations"


@lru_cache(maxsize=1)
def _spellings() -> list[tuple[Respelling, tuple[str, ...], tuple[str, ...], re.Pattern[str]]]:
    """Each rule, both ways, with what finds its first name; made when names are first left over on both sides."""
    return [
        (rule, here, there, re.compile(re.escape(here[0]).replace(re.escape("{p}"), r"(?P<p>[^.]+)")))
        for rule in RENAMES
        for here, there in rule.directions()
    ]


def _rename(result: Alignment, extra: dict[str, Node], lacking: dict[str, Node]) -> None:
    """Pair what is left in one module where a known rule says that two spellings mean the same tensors."""
    in_file, in_model = _own_tensors(extra), _own_tensors(lacking)
    if not (in_file and in_model):
        return
    renamed: set[str] = set()
    for rule, here, there, pattern in _spellings():
        for found in list(filter(None, map(pattern.fullmatch, in_file))):
            parameter = found.groupdict().get("p", "")
            from_names = [name.format(p=parameter) for name in here]
            to_names = [name.format(p=parameter) for name in there]
            if all(name in in_file for name in from_names) and all(name in in_model for name in to_names):
                for from_name, to_name in zip(from_names, to_names):
                    name = in_file.pop(from_name)
                    result.pairs[in_model.pop(to_name)] = name
                    result.renamed[name] = rule.what
                    renamed.add(name)
    if renamed:
        for label in [label for label in extra if label == _PARAMETRIZED or extra[label].is_tensor]:
            extra[label] = extra[label].without(renamed)


def _own_tensors(children: Mapping[str, Node]) -> dict[str, str]:
    """The tensors of a module itself, its parametrized ones among them, by their name in it."""
    return _joined({label: node for label, node in children.items() if node.is_tensor or label == _PARAMETRIZED})


def _path_of(children: Mapping[str, Node]) -> str:
    """The path of a node, with its dot, told by any name below it."""
    label, node = next(iter(children.items()))
    rest, name = next(iter(node.names.items()))
    return name[: len(name) - len(label) - (len(rest) + 1 if rest else 0)]


def _joined(children: Mapping[str, Node]) -> dict[str, str]:
    return {
        f"{label}.{rest}" if rest else label: name
        for label, node in children.items()
        for rest, name in node.names.items()
    }
