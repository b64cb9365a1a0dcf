"""How ZeRO cuts up parameters, and how its parts make them again: the weights, and the state of the optimizer.

Each rank's flat tensors hold its share of all parameters, one tensor for each *number*: a group of the optimizer under
ZeRO 1 and 2, a part of one (a subgroup) under ZeRO 3. Under ZeRO 3 a share is an equal part of each parameter; under
ZeRO 1 and 2 the parameters of a group lie one after the other, and a share is an equal part of that. The optimizer
knows only the flat tensors, and its state is of their shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from torchload.core.checkpoint import Box, Container, Record, Shape, TensorEntry, record_fields
from torchload.formats.sets.tiling import FlatVector

__all__ = ["ContradictionError", "Zero"]

MAX_DIMENSIONS = 16  # of a parameter
MAX_GROUPS = 100_000  # of the optimizer; under ZeRO 3, parts of them
MAX_KEYS = 32  # of the optimizer's state of a parameter; real ones have up to six

# Where a rank keeps its float32 weights, and beside them the optimizer's own state dict.
STAGE_3 = ("fp32_flat_groups", "optimizer_state_dict")
STAGE_2 = ("single_partition_of_fp32_groups", "base_optimizer_state")


class ContradictionError(Exception):
    """The ranks' parts don't make up what they should."""


class Zero:
    """The parts that the ranks hold.

    Args:
        shapes: Of the parameters as the model states have them: for each number, name → shape; or one such mapping.
        states: The optimizer's state of each rank.

    Raises:
        ContradictionError: It is none that a known version of DeepSpeed writes.
    """

    def __init__(self, shapes: Any, states: Sequence[Container]) -> None:
        groups = [shapes] if isinstance(shapes, dict) else shapes
        if isinstance(groups, list) and len(groups) > MAX_GROUPS:
            _refuse(f"it has {len(groups):,} parameter groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            _refuse("its model states lack 'param_shapes'")
        if STAGE_3[0] not in states[0] and STAGE_2[0] not in states[0]:
            _refuse("its optimizer's files have no float32 weights in any place that is known")
        self.groups: list[dict[str, Shape]] = groups
        self.states = states
        self.is_stage3 = STAGE_3[0] in states[0]
        self.weights_key, self.optimizer_key = STAGE_3 if self.is_stage3 else STAGE_2

    def weights(self) -> dict[str, TensorEntry]:
        """The parameters in float32, by name."""
        return self.whole([state.get(self.weights_key) for state in self.states])

    def frozen(self, models: Sequence[Any]) -> dict[str, TensorEntry]:
        """Parameters that are not trained, by name: in the model states (under ZeRO 3 of all ranks, cut up as well)."""
        fragments = [model.get("frozen_param_fragments") or {} for model in models]
        if not self.is_stage3:
            entries = fragments[0].items() if isinstance(fragments[0], dict) else ()
            return {name: entry for name, entry in entries if isinstance(entry, TensorEntry)}
        shapes = models[0].get("frozen_param_shapes")
        found: dict[str, TensorEntry] = {}
        for name, shape in _shapes([shapes] if isinstance(shapes, dict) and shapes else []):
            parts = [fragment.get(name) for fragment in fragments]
            if all(isinstance(part, TensorEntry) for part in parts):
                found[name] = _spread(name, shape, [(_vector([part]), 0) for part in parts])
        return found

    def optimizer(self) -> Container:
        """What `torch.optim` would have saved without ZeRO, by the names of the parameters."""
        bases = [self._base(state) for state in self.states]
        settings = bases[0]["param_groups"]
        lists = [group.get("params") for group in settings]
        numbers = [number for part in lists for number in (part if isinstance(part, list) else [None])]
        if numbers != [*range(len(self.groups))] or len(self.groups) != len(self.states[0][self.weights_key]):
            _refuse(f"it has other parameter groups than the {len(self.groups)} of the model states")
        if not bases[0]["state"]:
            state: dict[str, dict[str, Any]] = {}
        else:
            state = {name: {} for name, _ in _shapes(self.groups)}
            for key, whole in self._values([base["state"] for base in bases]):
                for name, value in whole.items():
                    state[name][key] = value
        return Container(
            {
                "state": Container({name: Container(values) for name, values in state.items()}),
                "param_groups": [
                    Container({**group, "params": [name for number in group["params"] for name in self.groups[number]]})
                    for group in settings
                ],
            }
        )

    def _base(self, state: Container) -> Container:
        base = state.get(self.optimizer_key)
        if isinstance(base, list):
            _refuse("it was saved with 'elastic_checkpoint', which leaves out the optimizer's settings")
        if not isinstance(base, Container):
            _refuse("it is nothing that an optimizer saves")
        groups = base.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            _refuse("it is of no optimizer of torch.optim's kind")
        if not isinstance(base.get("state"), dict):
            _refuse("it lacks 'state'")
        return base

    def _values(self, states: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """For each kind of value in the optimizer's state: its values by name of parameter."""
        numbers = range(len(self.groups))
        if any(not isinstance(state.get(number), dict) for state in states for number in numbers):
            _refuse("its state lacks groups")
        keys = states[0][0].keys()
        if len(keys) > MAX_KEYS or any(state[number].keys() != keys for state in states for number in numbers):
            _refuse("its groups or ranks have states of different kinds")
        for key in keys:
            flats = [[state[number][key] for number in numbers] for state in states]
            if all(isinstance(flat, TensorEntry) and flat.shape for flat in flats[0]):
                self._check_sizes(str(key), flats)
                yield key, self.whole(flats)
            elif any(isinstance(flat, TensorEntry) and flat.shape for flat in flats[0]):
                _refuse(f"{key!r} is a tensor for some of its groups only")
            else:  # such as the number of steps: all parameters of a group have it in common
                yield key, {name: flats[0][number] for number in numbers for name in self.groups[number]}

    def _check_sizes(self, key: str, flats: Sequence[Sequence[Any]]) -> None:
        """There is one value for each element of the rank's share, which may be padded."""
        for state, parts in zip(self.states, flats):
            weights, paddings = state[self.weights_key], state.get("group_paddings")
            for number, part in enumerate(parts):
                more = part.numel - weights[number].numel if isinstance(part, TensorEntry) else -1
                padding = paddings[number] if isinstance(paddings, list) and number < len(paddings) else 0
                if more not in (0, padding):
                    _refuse(f"{key!r} of its state has not one value for each element of the parameters")

    def whole(self, flats: Sequence[Any]) -> dict[str, TensorEntry]:
        """Tensors by name of parameter, out of each rank's flat tensors."""
        if self.is_stage3:
            return self._from_parameters(flats)
        if not all(isinstance(parts, list) and len(parts) == len(self.groups) for parts in flats):
            _refuse("its optimizer's files have another number of parameter groups than its model states")
        found: dict[str, TensorEntry] = {}
        for number, group in enumerate(self.groups):
            vectors = [_vector([parts[number]]) for parts in flats]
            mappings = [_slices(state, number) for state in self.states]
            if all(mapping is not None for mapping in mappings):
                _from_slices(group, vectors, mappings, found)
            else:
                _from_order(group, vectors, found)
        return found

    def _from_parameters(self, flats: Sequence[Any]) -> dict[str, TensorEntry]:
        """Each rank has an equal part of each parameter, the last ones padded."""
        vectors = [_vector(parts) for parts in flats]
        found: dict[str, TensorEntry] = {}
        position = 0
        for name, shape in _shapes(self.groups):
            found[name] = _spread(name, shape, [(vector, position) for vector in vectors])
            position += -(-math.prod(shape) // len(vectors))
        if any(vector.size != position for vector in vectors):
            _refuse(f"its ranks hold {vectors[0].size} elements each where the parameters need {position}")
        return found


def _from_slices(
    group: Any, vectors: Sequence[FlatVector], mappings: Sequence[Any], found: dict[str, TensorEntry]
) -> None:
    """Each rank says which part of which parameter it has, and where."""
    left = [vector.size for vector in vectors]
    for name, shape in _shapes([group]):
        numel = math.prod(shape)
        boxes: list[Box] = []
        first = 0
        for rank, (vector, mapping) in enumerate(zip(vectors, mappings)):
            address = record_fields(mapping[name]) if isinstance(mapping.get(name), Record) else None
            if address is None:
                continue
            start, count = address.get("start"), address.get("numel")
            if type(start) is not int or type(count) is not int or not 0 <= count <= numel - first:
                _refuse(f"the parts of {name!r} don't make up its shape {list(shape)}")
            left[rank] -= count
            if left[rank] < 0:
                _refuse(f"its parameters need more elements than the {vector.size} that a rank holds")
            boxes += _boxes(name, vector, start, shape, first, count)
            first += count
        if first != numel:
            _refuse(f"{name!r} has {numel} elements, but the ranks hold {first}")
        found[name] = TensorEntry(vectors[0].dtype, shape, tuple(boxes))


def _from_order(group: Any, vectors: Sequence[FlatVector], found: dict[str, TensorEntry]) -> None:
    """Older versions: the parameters follow one another, and only the end of the group is padded."""
    whole = _vector([part for vector in vectors for part in vector.parts])
    position = 0
    for name, shape in _shapes([group]):
        numel = math.prod(shape)
        found[name] = TensorEntry(whole.dtype, shape, tuple(_boxes(name, whole, position, shape, 0, numel)))
        position += numel
    alignment = 2 * len(vectors)
    if -(-position // alignment) != -(-whole.size // alignment):
        _refuse(f"its ranks hold {whole.size} elements of a group where the parameters need {position}")


def _spread(name: str, shape: Shape, places: Sequence[tuple[FlatVector, int]]) -> TensorEntry:
    """A parameter of which each rank has the same number of elements, at its place."""
    numel = math.prod(shape)
    each = -(-numel // len(places))
    boxes: list[Box] = []
    for rank, (vector, position) in enumerate(places):
        count = min(each, numel - rank * each)
        if count > 0:
            boxes += _boxes(name, vector, position, shape, rank * each, count)
    return TensorEntry(places[0][0].dtype, shape, tuple(boxes))


def _boxes(name: str, vector: FlatVector, position: int, shape: Shape, first: int, count: int) -> Iterator[Box]:
    if position < 0 or position + count > vector.size:
        _refuse(f"{name!r} of shape {list(shape)} does not lie inside what the ranks hold")
    return vector.boxes(position, shape, first, count)


def _shapes(groups: Sequence[Mapping[Any, Any]]) -> Iterator[tuple[str, Shape]]:
    seen: set[str] = set()
    for group in groups:
        for name, shape in group.items():
            good = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
            if type(name) is not str or not good or len(shape) > MAX_DIMENSIONS or math.prod(shape) >= 1 << 62:
                _refuse(f"the shape of {str(name)[:200]!r} is malformed")
            if name in seen:
                _refuse(f"{name[:200]!r} is in two groups")
            seen.add(name)
            yield name, shape


def _vector(parts: Any) -> FlatVector:
    if not isinstance(parts, list) or not parts:
        _refuse("its optimizer's files lack the float32 weights")
    for part in parts:
        if not isinstance(part, TensorEntry) or len(part.shape) != 1 or part.dtype is not parts[0].dtype:
            _refuse("its optimizer's float32 weights are not flat tensors of one dtype")
        if part.numel and (len(part.boxes) != 1 or not part.boxes[0].is_contiguous):
            _refuse("its optimizer's float32 weights are not contiguous")
    return FlatVector(parts)


def _slices(state: Any, number: int) -> Any:
    """Parameter name → where a rank has its part of it, for one group; ``None`` in files before DeepSpeed 0.7."""
    mappings = state.get("param_slice_mappings")
    if not isinstance(mappings, list) or number >= len(mappings) or not isinstance(mappings[number], dict):
        return None
    return mappings[number]


def _refuse(problem: str) -> NoReturn:
    raise ContradictionError(problem)
