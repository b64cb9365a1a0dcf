"""The states of optimizers, built from a checkpoint where they will be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchload.core.checkpoint import Extent, TensorEntry, entries_in
from torchload.model.shards import is_sharded
from torchload.plan.pairing import copies_of
from torchload.plan.plain import plain
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
    """Build the states in memory of their own, as `torch.optim` has them on the device and in the dtype of a parameter.

    Returns:
        For each what its `load_state_dict` takes. Nothing of the model or the optimizer was touched.

    Raises:
        ValueError: A group holds an object that would have to be built by running code.
        CastOverflowError, CorruptCheckpointError, OSError: As a transfer does.
    """
    wanted: list[tuple[TensorEntry, torch.Tensor]] = []
    built: list[dict[str, Any]] = []
    for plan in plans:
        groups = [plain(group, map_entry) for group in plan.groups]
        of_number = {number: group for group in groups for number in group["params"]}
        state: dict[Any, Any] = {}
        for key, values in plan.state.items():
            if key in of_number:
                parameter = plan.parameters[key]
                place = places.get(id(parameter), (parameter.device, parameter.dtype))
                state[key] = _with_memory(values, "", parameter, place, of_number[key], wanted)
            else:
                state[key] = plain(values, map_entry)
        built.append({"state": state, "param_groups": groups})
    run([copy for entry, memory in wanted for copy in copies_of("optimizer state", entry, memory)])
    return built


def _with_memory(
    value: Any,
    key: str,
    parameter: torch.Tensor,
    place: Place,
    group: Mapping[str, Any],
    wanted: list[tuple[TensorEntry, torch.Tensor]],
) -> Any:
    """A value of one parameter's state, with memory for its tensors; `wanted` gets what is to be read into it."""
    if isinstance(value, TensorEntry):
        device, dtype = _place_of(value, key, place, group)
        if is_sharded(parameter) and value.shape == tuple(parameter.shape):
            memory = torch.empty_like(parameter.detach(), dtype=dtype)
        else:
            memory = allocate([(value.shape, dtype)], device)[0]
        wanted.append((value, memory))
        return memory
    inside = partial(_with_memory, parameter=parameter, place=place, group=group, wanted=wanted)
    if isinstance(value, Mapping):
        return {name: inside(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(inside(inner, key) for inner in value)
    return plain(value, map_entry)


def _place_of(entry: TensorEntry, key: str, place: Place, group: Mapping[str, Any]) -> Place:
    """Where `torch.optim.Optimizer.load_state_dict` puts a tensor of a state, and as what."""
    device, dtype = place
    if key == "step":
        if group.get("capturable") or group.get("fused"):
            return device, torch.float32
        return torch.device("cpu"), entry.dtype
    return device, dtype if dtype.is_floating_point else entry.dtype
