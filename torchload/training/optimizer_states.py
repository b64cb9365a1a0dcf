"""The states of optimizers, built from a checkpoint where they will be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchload.core.checkpoint import Extent, TensorEntry, entries_in
from torchload.core.copies import Copy
from torchload.model.shards import is_sharded
from torchload.plan.hooks import plain
from torchload.plan.pairing import copies_of
from torchload.training.optimizers import OptimizerPlan
from torchload.transfer import allocate, map_entry, run

__all__ = ["Place", "extents_in", "read_states"]

Place = tuple[torch.device, torch.dtype]


def extents_in(plans: Sequence[OptimizerPlan]) -> list[Extent]:
    """The runs of bytes that the states are in."""
    states = [values for plan in plans for values in plan.state.values() if isinstance(values, Mapping)]
    entries = [entry for values in states for entry in entries_in(list(values.values()))]
    return [box.extent for entry in entries for box in entry.boxes]


def read_states(plans: Sequence[OptimizerPlan], places: Mapping[int, Place]) -> list[dict[str, Any]]:
    """Build the states in memory of their own, in the dtypes and on the devices that `torch.optim` gives them.

    Args:
        plans: Whose states.
        places: Identity of a parameter → the device and the dtype that it will have.

    Returns:
        For each what its `load_state_dict` takes. Nothing of the model or the optimizer was touched.

    Raises:
        ValueError: A group holds an object that would have to be built by running code.
        CastOverflowError, CorruptCheckpointError, OSError: As a transfer does.
    """
    reading = _Reading()
    built: list[dict[str, Any]] = []
    for plan in plans:
        groups = [plain(group, map_entry) for group in plan.groups]
        of_number = {number: group for group in groups for number in group["params"]}
        state: dict[Any, Any] = {}
        for key, values in plan.state.items():
            if key in of_number:
                parameter = plan.parameters[key]
                place = places.get(id(parameter), (parameter.device, parameter.dtype))
                state[key] = reading.value(values, "", parameter, place, of_number[key])
            else:
                state[key] = plain(values, map_entry)
        built.append({"state": state, "param_groups": groups})
    reading.run()
    return built


@dataclass(slots=True)
class _Reading:
    """Tensors that are to be read, all at once."""

    wanted: list[tuple[TensorEntry, torch.Tensor]] = field(default_factory=list)

    def value(self, value: Any, key: str, parameter: torch.Tensor, place: Place, group: Mapping[str, Any]) -> Any:
        """A value of one parameter's state, with memory for its tensors."""
        if isinstance(value, TensorEntry):
            device, dtype = _place_of(value, key, place, group)
            if is_sharded(parameter) and value.shape == tuple(parameter.shape):
                memory = torch.empty_like(parameter.detach(), dtype=dtype)
            else:
                memory = allocate([(value.shape, dtype)], device)[0]
            self.wanted.append((value, memory))
            return memory
        if isinstance(value, Mapping):
            return {name: self.value(inner, str(name), parameter, place, group) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(inner, key, parameter, place, group) for inner in value)
        return plain(value, map_entry)

    def run(self) -> None:
        """Read them."""
        run(list(self._copies()))

    def _copies(self) -> Iterator[Copy]:
        for entry, memory in self.wanted:
            yield from copies_of("optimizer state", entry, memory)


def _place_of(entry: TensorEntry, key: str, place: Place, group: Mapping[str, Any]) -> Place:
    """Where `torch.optim.Optimizer.load_state_dict` puts a tensor of a state, and as what."""
    device, dtype = place
    if key == "step":
        if group.get("capturable") or group.get("fused"):
            return device, torch.float32
        return torch.device("cpu"), entry.dtype
    return device, dtype if dtype.is_floating_point else entry.dtype
