"""Which container of a checkpoint is the weights, where no model says so.

With a model, containers are judged by how they fit it (`choice`). Without one there are only their names and what they
hold: an average before the raw weights of the same network, one of two equal sets, never an optimizer's state. A usual
name before an odd one of another layout is a guess, and told. Where that leaves several, only the caller can know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchload.core.budget import Allowance
from torchload.core.checkpoint import TensorEntry, is_tensor
from torchload.core.optimizers import is_optimizer_state
from torchload.errors import AmbiguousCheckpointError, IncompatibleCheckpointError
from torchload.match.company import is_average_of, lags_behind, standing_in_company
from torchload.match.containers import Leaf, Place, find_places
from torchload.match.paths import unwrapped
from torchload.match.selection import Selection
from torchload.match.tables import NEVER_THE_MODELS, UNTOUCHED, USUAL_CONTAINERS, Standing
from torchload.match.values import Read, each_once, was_never_updated

__all__ = ["StateDict", "find_state_dict"]

_LISTED = 10


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """The container that was chosen.

    Attributes:
        key: Its dotted path in the file, empty for the top level.
        container: The container itself.
        leaves: Dotted name inside it → what the file holds there.
        rivals: Paths of other containers that could have been meant.
        is_guess: Whether nothing but its name speaks for it and against those.
    """

    key: str
    container: Mapping[Any, Any]
    leaves: dict[str, Leaf]
    rivals: tuple[str, ...] = ()
    is_guess: bool = False


def find_state_dict(root: Any, key: str | None = None, size_bytes: int = 0, read: Read | None = None) -> StateDict:
    """Find the weights of a checkpoint, or what is at a dotted path, a container or a tensor; ``""`` is the whole file.

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
        >>> find_state_dict(root).key
        'model'
    """
    if isinstance(root, TensorEntry) and not key:
        return StateDict("", {"": root}, {"": root})
    allowance = Allowance(size_bytes)
    places = find_places(root, None, allowance)
    if not places:
        raise IncompatibleCheckpointError("The checkpoint holds no tensors.")
    here = places[0]
    if key is not None:
        if key in here.leaves and all(place.path != key for place in places):
            alone = {key.rpartition(".")[2]: here.leaves[key]}
            return StateDict(key, alone, alone)
        [here] = find_places(root, key, allowance)
        return StateDict(here.path, here.container, here.leaves)
    descent = _Descent(root, places, allowance, read)
    here = descent.by_segments.get((), here)
    while (below := descent.step_down(here)) is not None:
        here = below
    return StateDict(here.path, here.container, here.leaves, tuple(descent.rivals), descent.is_guess)


class _Descent:
    """The way from a file's root down to its weights."""

    def __init__(self, root: Any, places: list[Place], allowance: Allowance, read: Read | None) -> None:
        self._root = root
        self._allowance = allowance
        self._read = read
        self.by_segments = {place.segments: place for place in places}
        self.rivals: list[str] = []
        self.is_guess = False

    def step_down(self, here: Place) -> Place | None:
        """The container to go on with, or ``None`` where this one is the state dict."""
        likely = self._likely(here)
        if not likely:
            return None
        left = self._by_company(likely)
        usual = [candidate for candidate in left if _is_usual(candidate)]
        first = (usual or left)[0]
        loose = sum(is_tensor(value) for value in here.container.values())
        if loose and (here.path or not usual or loose >= len(first.leaves)):
            return None  # tensors of its own beside modules: a nested state dict, or one with an odd buffer
        if here.path and not usual and (len(left) > 1 or here.segments[-1].lower() in USUAL_CONTAINERS):
            return None  # 'model' with 'encoder' and 'decoder' inside: the modules of one model
        if len(left) > 1 and (len(usual) != 1 or any(_alike(first, other) for other in left if other is not first)):
            raise _ambiguous(left)
        self.is_guess |= len(left) > 1
        self.rivals += [candidate.key for candidate in likely if candidate is not first]
        return self.by_segments[first.segments]

    def _likely(self, here: Place) -> list[Selection]:
        """The containers that could be weights, each set of data once, with what their names mean here."""
        if is_optimizer_state(here.container):
            return []
        likely: list[Selection] = []
        seen: set[frozenset[object]] = set()
        for label in map(str, here.container):
            place = self.by_segments.get((*here.segments, label))
            if place is None or label in NEVER_THE_MODELS or is_optimizer_state(place.container):
                continue
            data = frozenset(
                leaf.location if isinstance(leaf, TensorEntry) and leaf.boxes else id(leaf)
                for leaf in place.leaves.values()
            )
            if data not in seen:
                seen.add(data)
                likely.append(Selection(place.path, place.segments, place.container, place.leaves))
        standings = [standing_in_company(candidate, likely, self._root) for candidate in likely]
        return [
            replace(candidate, standing=standing)
            for candidate, standing in zip(likely, standings)
            if standing is not Standing.NOT_WEIGHTS
        ]

    def _by_company(self, likely: list[Selection]) -> list[Selection]:
        """Without copies that lag, raw weights that have a whole average, averages that aren't whole, and equals."""
        left = [candidate for candidate in likely if not any(lags_behind(candidate, other) for other in likely)]
        raw = [candidate for candidate in left if not candidate.averaged]
        averages = [
            candidate for candidate in left if candidate.averaged and (not raw or self._stands_for_raw(candidate, raw))
        ]
        only = len(raw) == 1
        raw = [
            one
            for one in raw
            if not any(is_average_of(average, one, only=only) and _covers(average, one) for average in averages)
        ]
        kept = [one for one in left if one in averages or one in raw]
        return each_once(kept, lambda candidate: candidate.leaves, self._read, self._allowance)

    def _stands_for_raw(self, average: Selection, raw: list[Selection]) -> bool:
        """Whether averaged weights have all the tensors that some raw ones have, and were ever updated."""
        if self._read is not None and was_never_updated(average.container, self._read):
            return False
        return any(_covers(average, one) for one in raw)


def _is_usual(candidate: Selection) -> bool:
    """Whether it is called as containers of weights are."""
    return candidate.averaged or candidate.segments[-1].lower() in USUAL_CONTAINERS


def _covers(average: Selection, raw: Selection) -> bool:
    return _signature(raw.leaves) <= _signature(average.leaves)


def _alike(one: Selection, other: Selection) -> bool:
    """Whether two containers have one layout, so that either could be the weights of one model."""
    return _signature(one.leaves) == _signature(other.leaves)


def _signature(leaves: Mapping[str, Leaf]) -> set[tuple[str, object]]:
    """Names without wrappers, with shapes; without what averages keep beside the weights."""
    bare = ((unwrapped(name), getattr(leaf, "shape", None)) for name, leaf in leaves.items())
    return {(name, shape) for name, shape in bare if name not in UNTOUCHED}


def _ambiguous(equals: list[Selection]) -> AmbiguousCheckpointError:
    names = [candidate.key for candidate in equals]
    listing = "\n".join(
        f"    key={name!r}    {len(candidate.leaves):,} tensors" for name, candidate in zip(names[:_LISTED], equals)
    )
    listing += f"\n    and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return AmbiguousCheckpointError(
        f"The checkpoint holds {len(equals)} sets of tensors, and nothing says which are the weights.\n  Say which one "
        f"is meant, or take all of them with key='':\n{listing}",
        candidates=names,
    )
