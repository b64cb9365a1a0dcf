"""Constants that both the file and the model have: the model computes its own, and a difference is worth a warning."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchload.core.budget import Allowance
from torchload.core.checkpoint import TensorEntry
from torchload.match import Selection
from torchload.match.paths import last
from torchload.match.values import rows_of
from torchload.model.target import Slot, Target
from torchload.transfer import map_entry

__all__ = ["differing_constants"]

_UNITS = 8  # in the last place: what two spellings of one formula may differ by
_COUNTERS = frozenset({"num_batches_tracked", "n_averaged", "total_ops", "total_params"})
_SHOWN = 4  # values


def differing_constants(target: Target, selection: Selection, allowance: Allowance) -> Iterator[str]:
    """A sentence for each constant of the file that is not the model's.

    Compared are a few rows, after rounding to the coarser of the two dtypes. What the model has no constant of that
    last name and shape for is not compared, nor what is on the meta device.
    """
    own = _own_constants(target)
    told: set[str] = set()
    for here, source in selection.transient.items():
        slot = next((slot for slot in own.get(last(here), []) if here in slot.names), None)
        if slot is not None and (difference := _difference(selection.leaves[source], [slot], allowance)):
            yield _kept(source, difference)
    for source in selection.constants:
        if last(source) in told:
            continue  # one layer speaks for the others
        if difference := _difference(selection.leaves[source], own.get(last(source), []), allowance):
            told.add(last(source))
            yield _kept(source, difference)


def _kept(source: str, difference: str) -> str:
    return f"{source} in the file is not what the model computes: {difference}. The model's value is kept"


def _own_constants(target: Target) -> dict[str, list[Slot]]:
    """The model's buffers by last name."""
    own: dict[str, list[Slot]] = {}
    for slot in target.slots:
        if not slot.is_parameter and not slot.tensor.is_meta and slot.shape is not None:
            if (name := last(slot.name)) not in _COUNTERS:
                own.setdefault(name, []).append(slot)
    return own


def _difference(leaf: object, slots: list[Slot], allowance: Allowance) -> str | None:
    """Both values, where none of the model's constants is the file's."""
    slots = [slot for slot in slots if isinstance(leaf, TensorEntry) and slot.shape == leaf.shape]
    if not isinstance(leaf, TensorEntry) or not slots or not leaf.numel:
        return None
    found = rows_of(leaf, map_entry, allowance)
    if found is None:
        return None
    numbers, rows = found
    constants = [_rows(slot.tensor, numbers) for slot in slots]
    if any(_is_same(rows, own) for own in constants):
        return None
    return f"file {_brief(rows)}, model {_brief(constants[0])}"


def _rows(tensor: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor[numbers] if tensor.dim() else tensor.reshape(1)).cpu()


def _is_same(file: torch.Tensor, model: torch.Tensor) -> bool:
    if not (file.dtype.is_floating_point and model.dtype.is_floating_point):
        return torch.equal(file.to(torch.float64), model.to(torch.float64))
    coarser = max((file.dtype, model.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    left, right = (side.to(coarser).to(torch.float64) for side in (file, model))
    apart = (left - right).abs()
    near = apart <= _UNITS * torch.finfo(coarser).eps * torch.maximum(left.abs(), right.abs())
    return bool((near | (left == right)).all())


def _brief(rows: torch.Tensor) -> str:
    values = rows.reshape(-1)
    shown = ", ".join(f"{float(value):.6g}" for value in values[:_SHOWN])
    return f"[{shown}{', …' if values.numel() > _SHOWN else ''}]"
