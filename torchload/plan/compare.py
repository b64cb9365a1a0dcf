"""Does the model hold what the file holds? Tensor by tensor, bit for bit or as cast, in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torchload.core.checkpoint import Box, TensorEntry
from torchload.core.copies import Copy
from torchload.core.public import public
from torchload.model.target import Slot
from torchload.plan.pairing import copies_of
from torchload.transfer import allocate, run
from torchload.transfer.checks import not_seen_equal
from torchload.transfer.overflow import overflows

__all__ = ["Difference", "Pair", "compare", "compare_values"]

_BATCH_BYTES = 16 << 20
_CPU = torch.device("cpu")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@public
@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor of the model that isn't what the file has.

    Attributes:
        name: The model's name for it.
        source: The checkpoint's name.
        count: Number of elements that differ.
        numel: Number of elements in all.
        largest: Largest absolute difference between numbers; 0 where only the bits differ (``0.0`` and ``-0.0``, two
            kinds of NaN), infinity where just one side is infinite.
        nans: Number of elements that are NaN on one side only; they don't enter `largest`.
        reason: Why the values could not be compared (another shape, no values); empty where they were.
    """

    name: str
    source: str
    count: int
    numel: int
    largest: float = 0.0
    nans: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: {self.reason}"
        nans = f", {self.nans:,} are NaN on one side only" if self.nans else ""
        return f"{self.name}: {self.count:,} of {self.numel:,} elements differ, by {self.largest:.3g} at most{nans}"


class Pair(NamedTuple):
    """A tensor of the model and what the file has for it."""

    name: str
    source: str
    slot: Slot
    entry: TensorEntry


class _Piece(NamedTuple):
    """A part of a pair, small enough to be read at once."""

    pair: int
    box: Box
    model: torch.Tensor


@dataclass(slots=True)
class _Tally:
    """What was found in one tensor so far."""

    count: int = 0
    largest: float = 0.0
    nans: int = 0


def compare(pairs: Sequence[Pair]) -> list[Difference]:
    """Compare data of equal shapes, bit for bit; in a bounded amount of memory, however much it is.

    Where the model has another dtype than the file, it has to hold what the file's values become when they are cast to
    it; a finite value that became infinite is a difference all the same.

    Raises:
        CorruptCheckpointError: A source ended too early, or changed while it was read.
        OSError: A device failed.
    """
    tallies: dict[int, _Tally] = {}
    for batch in _batches(pairs, _to_look_at(pairs)):
        stored = allocate([(piece.box.shape, pairs[piece.pair].entry.dtype) for piece in batch], _CPU)
        run([Copy(pairs[piece.pair].name, piece.box, tensor.dtype, tensor) for piece, tensor in zip(batch, stored)])
        for piece, tensor in zip(batch, stored):
            _look(tensor, piece.model.to(_CPU), tallies, piece.pair)
    return [
        Difference(pair.name, pair.source, tally.count, pair.entry.numel, tally.largest, tally.nans)
        for index, tally in tallies.items()
        for pair in (pairs[index],)
    ]


def _to_look_at(pairs: Sequence[Pair]) -> list[int]:
    """Indices of the pairs that a quick look doesn't show to be equal."""
    owners = {
        copy: index for index, pair in enumerate(pairs) for copy in copies_of(pair.name, pair.entry, pair.slot.tensor)
    }
    return sorted({owners[copy] for copy in not_seen_equal(list(owners))})


def compare_values(name: str, source: str, file: object, model: object) -> Difference | None:
    """Compare two values in memory: tensors, quantized ones among them, containers of such, or anything with ``==``.

    Objects that compare by identity are compared by their attributes.
    """
    if type(file) is type(model) and type(model).__eq__ is object.__eq__:
        file, model = dict(getattr(file, "__dict__", {})), dict(getattr(model, "__dict__", {}))
    if isinstance(file, (list, tuple)) and isinstance(model, (list, tuple)) and len(file) == len(model):
        file, model = dict(enumerate(file)), dict(enumerate(model))
    if isinstance(file, Mapping) and isinstance(model, Mapping) and file.keys() == model.keys():
        parts = (compare_values(name, source, file[key], model[key]) for key in file)
        return next((part for part in parts if part is not None), None)
    if not (isinstance(file, torch.Tensor) and isinstance(model, torch.Tensor)):
        same = type(file) is type(model) and _is_equal(file, model)
        reason = f"{_brief(file)} in the file, {_brief(model)} here"
        return None if same else Difference(name, source, 1, 1, reason=reason)
    numel = file.numel()
    if (file.dtype, file.shape) != (model.dtype, model.shape):
        reason = f"{file.dtype} {tuple(file.shape)} in the file, {model.dtype} {tuple(model.shape)} here"
        return Difference(name, source, numel, numel, reason=reason)
    if file.is_quantized:  # the numbers that they stand for: another scale is another weight
        file, model = file.dequantize(), model.dequantize()
    tallies: dict[int, _Tally] = {}
    _look(file.to(_CPU), model.to(_CPU), tallies, 0)
    if (tally := tallies.get(0)) is None:
        return None
    return Difference(name, source, tally.count, numel, tally.largest, tally.nans)


def _is_equal(one: Any, other: Any) -> bool:
    """Whether ``==`` says so, of all elements where it answers for each (numpy's arrays do)."""
    answer = one == other
    return bool(answer.all() if hasattr(answer, "all") else answer)


def _brief(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _batches(pairs: Sequence[Pair], indices: Iterable[int]) -> Iterator[list[_Piece]]:
    """The data of some pairs in pieces, as many together as are worth one read."""
    batch: list[_Piece] = []
    nbytes = 0
    for index in indices:
        name, _, slot, entry = pairs[index]
        limit = _BATCH_BYTES // max(entry.dtype.itemsize, slot.tensor.dtype.itemsize)
        for copy in copies_of(name, entry, slot.tensor):
            for box, view in _split(copy.box, copy.target, entry.dtype.itemsize, limit):
                batch.append(_Piece(index, box, view))
                nbytes += view.numel() * entry.dtype.itemsize
                if nbytes >= _BATCH_BYTES:
                    yield batch
                    batch, nbytes = [], 0
    if batch:
        yield batch


def _split(box: Box, view: torch.Tensor, itemsize: int, limit: int) -> Iterator[tuple[Box, torch.Tensor]]:
    """A box and the view that it belongs to, in parts of at most `limit` elements."""
    numel = math.prod(box.shape)
    if numel <= limit:
        if numel:
            yield box, view
        return
    dimension = next(index for index, size in enumerate(box.shape) if size > 1)
    size = box.shape[dimension]
    rows = max(limit * size // numel, 1)
    for first in range(0, size, rows):
        count = min(rows, size - first)
        part = box.narrow(dimension, first, count, itemsize)
        yield from _split(part, view.narrow(dimension, first, count), itemsize, limit)


def _look(file: torch.Tensor, model: torch.Tensor, tallies: dict[int, _Tally], index: int) -> None:
    """Compare one piece and note what differs."""
    wanted = file.to(model.dtype)
    became_infinite = overflows(file, wanted)
    if torch.equal(_bits(wanted), _bits(model)) and not became_infinite:
        return
    differs = _bits(wanted) != _bits(model)
    left, right = _numbers(file if became_infinite else wanted), _numbers(model)
    if file.dtype is not model.dtype:
        differs &= ~(left.isnan() & right.isnan())  # a cast may change what kind of NaN it is
    if became_infinite:
        differs |= left.isfinite() & right.isinf()
    left, right = left[differs], right[differs]
    one_nan = left.isnan() != right.isnan()
    apart = (left - right).abs()
    numbers = apart[~apart.isnan()]
    count = int(differs.reshape(*model.shape, -1).any(-1).sum()) if model.dtype.is_complex else int(differs.sum())
    if not count:
        return
    tally = tallies.setdefault(index, _Tally())
    tally.count += count
    tally.nans += int(one_nan.sum())
    tally.largest = max(tally.largest, float(numbers.max()) if numbers.numel() else 0.0)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers; two for a complex one."""
    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as float64; two for a complex one."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).to(torch.float64)
