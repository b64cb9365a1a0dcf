"""Which container of a checkpoint is the weights, where no model says so.

With a model, containers are judged by how they fit it (`choice`). Without one there are only their names: averaged
weights before plain ones of the same network, conventional names before others, and never an optimizer's state. Where
that leaves several, nobody but the caller can know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchload.core.budget import Allowance
from torchload.core.checkpoint import OpaqueTensor, TensorEntry
from torchload.core.wrappers import WRAPPERS
from torchload.errors import AmbiguousCheckpointError, IncompatibleCheckpointError
from torchload.match.choice import standing_in_company
from torchload.match.containers import Leaf, Place, find_places
from torchload.match.tables import Standing, container_standing

__all__ = ["StateDict", "find_state_dict", "is_optimizer_state"]

_LISTED = 20


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """The container that was chosen.

    Attributes:
        key: Its dotted path in the file, empty for the top level.
        container: The container itself.
        leaves: Dotted name inside it → what the file holds there.
        rivals: Paths of other containers that could have been meant.
    """

    key: str
    container: Mapping[Any, Any]
    leaves: dict[str, Leaf]
    rivals: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Candidate:
    """A container among its siblings."""

    place: Place
    label: str
    standing: Standing = Standing.ARBITRARY
    data: frozenset[object] = field(default_factory=frozenset)

    @property
    def key(self) -> str:
        return self.place.path

    @property
    def path(self) -> str:
        return self.place.path

    @property
    def leaves(self) -> dict[str, Leaf]:
        return self.place.leaves


def find_state_dict(root: Any, path: str, key: str | None = None, size_bytes: int = 0) -> StateDict:
    """Find the weights of a checkpoint.

    Args:
        root: The checkpoint's tree.
        path: The checkpoint, for messages.
        key: Dotted path of the container to take; ``""`` takes the whole file; ``None`` looks for it.
        size_bytes: Length of the checkpoint's files, which bounds what its names may cost.

    Returns:
        The container. Tensors in containers inside it count as its own, under dotted names.

        A file that is one bare tensor gives it an empty name.

    Raises:
        AmbiguousCheckpointError: Several containers are equally likely; the message lists them.
        IncompatibleCheckpointError: `key` names nothing, or the file holds no tensors.

    Example:
        >>> import torch
        >>> weight = TensorEntry(torch.float32, (1,), ())
        >>> root = {"epoch": 3, "model": {"fc.weight": weight}, "optimizer": {"state": {0: {"exp_avg": weight}}}}
        >>> find_state_dict(root, "checkpoint.pth").key
        'model'
    """
    if isinstance(root, TensorEntry) and not key:
        return StateDict("", {"": root}, {"": root})
    places = find_places(root, key, Allowance(path, size_bytes))
    if not places:
        raise IncompatibleCheckpointError(f"{path} holds no tensors.", path=path)
    here = places[0]
    if key is not None:
        return StateDict(here.path, here.container, here.leaves)
    by_path = {place.path: place for place in places}
    here = by_path.get("", here)
    rivals: list[str] = []
    while True:
        inner = [
            _Candidate(by_path[inside], label)
            for label in map(str, here.container)
            if (inside := f"{here.path}.{label}" if here.path else label) in by_path
        ]
        chosen = _step_down(here, inner, root, path, rivals)
        if chosen is None:
            return StateDict(here.path, here.container, here.leaves, tuple(rivals))
        here = chosen


def is_optimizer_state(container: Any) -> bool:
    """Whether a container is what `torch.optim.Optimizer.state_dict` returns, whatever it is called."""
    return isinstance(container, Mapping) and "param_groups" in container and "state" in container


def _step_down(here: Place, inner: list[_Candidate], root: Any, path: str, rivals: list[str]) -> Place | None:
    """The container to go on with, or ``None`` where this one is the state dict."""
    likely = _likely(here, inner, root)
    if not likely:
        return None
    best = min(candidate.standing for candidate in likely)
    equals = [candidate for candidate in likely if candidate.standing == best]
    loose = sum(isinstance(value, (TensorEntry, OpaqueTensor)) for value in here.container.values())
    if loose and (here.path or best > Standing.CONVENTIONAL or loose >= len(equals[0].leaves)):
        return None  # tensors of its own beside modules: a nested state dict, or one with an odd buffer
    if len(equals) > 1:
        if here.path and best > Standing.CONVENTIONAL:
            return None  # 'model' with 'encoder' and 'decoder' inside: the modules of one model
        raise _ambiguous(equals, path)
    (chosen,) = equals
    if here.path and best > Standing.CONVENTIONAL and container_standing(here.path.rpartition(".")[2]) < best:
        return None  # 'model' with nothing but 'encoder' inside
    rivals += [candidate.path for candidate in likely if candidate is not chosen]
    return chosen.place


def _likely(here: Place, inner: list[_Candidate], root: Any) -> list[_Candidate]:
    """The containers that could be weights, each set of data once, with what their names are worth here."""
    if is_optimizer_state(here.container):
        return []
    likely: list[_Candidate] = []
    seen: set[frozenset[object]] = set()
    for candidate in inner:
        candidate.standing = container_standing(candidate.label)
        if candidate.standing is Standing.UNLIKELY or is_optimizer_state(candidate.place.container):
            continue
        candidate.data = frozenset(
            leaf.location if isinstance(leaf, TensorEntry) and leaf.boxes else id(leaf)
            for leaf in candidate.leaves.values()
        )
        if candidate.data not in seen:
            seen.add(candidate.data)
            likely.append(candidate)
    for candidate in likely:
        candidate.standing = standing_in_company(candidate, likely, root)
        if candidate.standing is Standing.AVERAGE and not _averages(candidate, likely):
            candidate.standing = Standing.ARBITRARY
    return likely


def _averages(average: _Candidate, siblings: list[_Candidate]) -> bool:
    """Whether averaged weights can stand for the plain ones: alone, or with all the tensors that those have."""
    others = [other for other in siblings if other is not average]
    if not others:
        return True
    ours = _signature(average.leaves)
    return any(_signature(other.leaves) <= ours for other in others)


def _signature(leaves: Mapping[str, Leaf]) -> set[tuple[str, object]]:
    """Names without wrappers, with shapes."""
    return {
        (".".join(part for part in name.split(".") if part not in WRAPPERS), getattr(leaf, "shape", None))
        for name, leaf in leaves.items()
    }


def _ambiguous(equals: list[_Candidate], path: str) -> AmbiguousCheckpointError:
    names = [candidate.path for candidate in equals]
    listing = "\n".join(
        f"    key={name!r}    {len(candidate.leaves):,} tensors" for name, candidate in zip(names[:_LISTED], equals)
    )
    listing += f"\n    and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return AmbiguousCheckpointError(
        f"{path} holds {len(equals)} sets of tensors, and nothing says which are the weights. Nothing was read. Say "
        f"which one is meant, or take all of them with key='':\n{listing}",
        path=path,
        candidates=names,
    )
