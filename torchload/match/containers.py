"""The containers of a checkpoint's tree, and the tensors below each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torchload.core.budget import Allowance
from torchload.core.checkpoint import OpaqueTensor, Record, Shape, TensorEntry, record_fields
from torchload.core.text import listed
from torchload.errors import IncompatibleCheckpointError
from torchload.match.paths import last

__all__ = ["Leaf", "Place", "as_mapping", "find_places", "shape_of"]

Leaf = TensorEntry | OpaqueTensor | Any
_DEEPEST = 64  # containers inside each other, within one state dict
_EXTRA_STATE = "_extra_state"
_LISTED = 10  # of many names
_SHOWN = 200  # characters of a name
_OTHER_CHARACTERS = 20  # of a name that is a number, or something rarer: formats keep those short


class Place(NamedTuple):
    """A container and where it stands: the names on the way to it, and the same as one dotted path."""

    path: str
    segments: tuple[str, ...]
    container: Mapping[Any, Any]
    leaves: dict[str, Leaf]
    inner: frozenset[str]  # names of nested containers, which are places of their own


_LOOKED_THROUGH = 1 << 16  # items of a list at a time
_HOLDERS = (TensorEntry, OpaqueTensor, Record, Mapping, list, tuple)
_PLAIN = frozenset((int, float, str, bool, bytes, type(None)))


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """What a value of the tree holds by name: its entries, its positions, an object's attributes; else ``None``.

    An object of a class of mappings has entries, whatever the class is called.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, Record):
        return value.entries or record_fields(value) or _positions(value)
    return None


# Fields of tuples of tensors. Of other namedtuples a file has the values alone: only their code says what they are.
_FIELDS = {"torch.nn.utils.rnn.PackedSequence": ("data", "batch_sizes", "sorted_indices", "unsorted_indices")}


def _positions(record: Record) -> Mapping[Any, Any]:
    """What an object was made of, where that is tensors and nothing else, as a namedtuple of them is."""
    made_of = record.args if record.state is None and not record.items else ()
    if len(made_of) == 2 and made_of[1] == {} and isinstance(made_of[0], tuple):
        made_of = made_of[0]  # what torch's operators return, such as `torch.return_types.max`
    if not all(part is None or isinstance(part, (TensorEntry, OpaqueTensor)) for part in made_of):
        return {}
    fields = _FIELDS.get(record.name, ())
    return dict(zip(fields, made_of)) if len(fields) == len(made_of) else dict(enumerate(made_of))


def shape_of(leaf: Leaf) -> Shape | None:
    """The shape of a tensor, or of the first of several that are kept as one; ``None`` for anything else."""
    return getattr(leaf[0] if isinstance(leaf, tuple) and leaf else leaf, "shape", None)


def find_places(root: Any, key: str | None, allowance: Allowance, whole: frozenset[str] = frozenset()) -> list[Place]:
    """Every container that holds tensors at any depth, outermost first, each once however often it is referred to.

    Args:
        root: The checkpoint's tree.
        key: Path of the one container to find; ``None`` for all.
        allowance: What the names may cost.
        whole: Last segments of names under which any value counts as a tensor does, unless it is a mapping.

    Raises:
        IncompatibleCheckpointError: There is no container `key`.
        CorruptCheckpointError: The containers expand to far too many names.
    """
    containers = _Search(whole, allowance).containers(root)
    found: list[Place] = []
    for segments, inside in containers.values():
        if leaves := _flatten(inside, containers, allowance, whole):
            inner = frozenset(str(name) for name, value in inside.items() if id(value) in containers)
            found.append(Place(".".join(segments), segments, inside, leaves, inner))
    if key is None:
        return found
    chosen = [place for place in found if place.path == key]
    if not chosen:
        here = "none; its tensors are at the top (key='')" if found else "no containers with tensors"
        known = listed([repr(place.path) for place in found if place.path], _LISTED) or here
        raise IncompatibleCheckpointError(
            f"The checkpoint has no container {key[:_SHOWN]!r} that holds tensors. It has: {known}."
        )
    return chosen


_Known = tuple[tuple[str, ...], Mapping[Any, Any]]
"""A container: the names on the way to it, and what it holds."""


class _Search:
    """One walk through a tree that finds the containers below which tensors are."""

    def __init__(self, whole: frozenset[str], allowance: Allowance) -> None:
        self._whole = whole
        self._allowance = allowance
        self._known: dict[int, _Known] = {}
        self._above: dict[int, list[int]] = {}
        self._barren: set[int] = set()

    def containers(self, root: Any) -> dict[int, _Known]:
        """All such containers of a tree, by identity, outermost first."""
        top = _below(root, self._allowance)
        if top is None:
            return {}
        todo = [self._note(root, (), top)]
        holding: list[int] = []
        for identity in todo:
            segments, inside = self._known[identity]
            has_leaves = False
            for name, value in inside.items():
                if type(value) is TensorEntry or _is_leaf(name, value, self._whole):
                    has_leaves = True
                    continue
                if id(value) not in self._known and (found := self._enter(value, segments, name)):
                    todo.append(found)
                if id(value) in self._known:
                    self._above[id(value)].append(identity)
            if has_leaves:
                holding.append(identity)
        return self._held(holding)

    def _note(self, value: Any, segments: tuple[str, ...], inside: Mapping[Any, Any]) -> int:
        self._known[id(value)] = (segments, inside)
        self._above[id(value)] = []
        return id(value)

    def _enter(self, value: Any, above: tuple[str, ...], name: Any) -> int | None:
        """The identity of a container that is met for the first time; ``None`` for what leads nowhere."""
        if id(value) in self._barren:
            return None
        below = _below(value, self._allowance)
        if not below:
            if below is not None:
                self._barren.add(id(value))
            return None
        segments = (*above, str(name))
        self._allowance.spend(1, sum(map(len, segments)) + len(segments))
        return self._note(value, segments, below)

    def _held(self, holding: list[int]) -> dict[int, _Known]:
        """Those with tensors of their own, and all above them."""
        for identity in holding:  # grows upwards from where tensors are
            holding.extend(parent for parent in self._above.pop(identity, ()) if parent in self._above)
        held = set(holding)
        return {identity: place for identity, place in self._known.items() if identity in held}


def _below(value: Any, allowance: Allowance) -> Mapping[Any, Any] | None:
    """`as_mapping`, but of a list (of a million losses, perhaps) only what may be or hold tensors."""
    if not isinstance(value, (list, tuple)):
        return as_mapping(value)
    found: dict[int, Any] = {}
    for start in range(0, len(value), _LOOKED_THROUGH) if _holds_any(value) else ():
        part = value[start : start + _LOOKED_THROUGH]
        # What is there many times is looked into once.
        holders = {identity for identity, inner in dict(zip(map(id, part), part)).items() if _may_hold(inner)}
        if holders:
            found.update((index, inner) for index, inner in enumerate(part, start) if id(inner) in holders)
    allowance.spend(len(found), 0)
    return found


def _may_hold(value: Any) -> bool:
    """Whether a value may be or hold tensors."""
    return _holds_any(value) if isinstance(value, (list, tuple)) else isinstance(value, _HOLDERS)


def _holds_any(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether one of them may be or hold tensors; as fast as Python walks a list, for it may be very long."""
    return not _PLAIN.issuperset(map(type, values)) and any(
        issubclass(kind, _HOLDERS) for kind in set(map(type, values))
    )


def _is_leaf(name: Any, value: Any, whole: frozenset[str]) -> bool:
    if isinstance(value, (TensorEntry, OpaqueTensor)):
        return True
    if type(name) is not str:
        return False
    return name.endswith(_EXTRA_STATE) or (bool(whole) and last(name) in whole and not isinstance(value, Mapping))


def _characters(names: Iterable[Any]) -> tuple[int, int]:
    """How long names are all together, and the longest."""
    try:
        return sum(map(len, names)), max(map(len, names), default=0)
    except TypeError:  # not all of them are text
        lengths = [len(name) if isinstance(name, str) else _OTHER_CHARACTERS for name in names]
        return sum(lengths), max(lengths)


_Above = tuple[int, Any] | None
"""Identities of the containers on the way up, the nearest first: (identity, those above it)."""


def _is_above(identity: int, above: _Above) -> bool:
    """Whether a container holds itself, or is too deep to be looked into."""
    for _ in range(_DEEPEST):
        if above is None:
            return False
        here, above = above
        if here == identity:
            return True
    return True


def _is_same(known: Leaf, value: Leaf) -> bool:
    """Whether two leaves of one name are the same data; what isn't a tensor is taken where it stands nearest."""
    if isinstance(known, TensorEntry) and isinstance(value, TensorEntry):
        return (known.dtype, known.shape, known.location) == (value.dtype, value.shape, value.location)
    return not isinstance(known, (TensorEntry, OpaqueTensor))


def _flatten(
    container: Mapping[Any, Any],
    containers: Mapping[int, _Known],
    allowance: Allowance,
    whole: frozenset[str],
) -> dict[str, Leaf]:
    """All tensors under a container by dotted name, in the file's order.

    A name that stands for two tensors (``{"a.b": …, "a": {"b": …}}``, ``{0: …, "0": …}``) can't be read as either.

    Raises:
        CorruptCheckpointError: There would be more.
    """
    leaves: dict[str, Leaf] = {}
    deeper: list[tuple[str, Mapping[Any, Any], _Above]] = [("", container, None)]
    for prefix, inside, above in deeper:
        characters, longest = _characters(inside)
        allowance.spend(len(inside), len(inside) * len(prefix) + characters)
        allowance.check(max(len(inside), len(leaves)), len(prefix) + longest)
        for name, value in inside.items():
            if type(value) is TensorEntry or _is_leaf(name, value, whole):
                full = name if not prefix and type(name) is str else f"{prefix}{name}"
                if (known := leaves.setdefault(full, value)) is not value and not _is_same(known, value):
                    leaves[full] = OpaqueTensor("one name of two tensors", shape_of(known))
            elif id(value) in containers and not _is_above(id(value), above):
                deeper.append((f"{prefix}{name}.", containers[id(value)][1], (id(value), above)))
        allowance.check(len(leaves), 0)
    return leaves
