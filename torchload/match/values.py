"""What a few values of a file tell, where names and shapes leave a question open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from torchload.core.budget import Allowance
from torchload.core.checkpoint import TensorEntry
from torchload.match.tables import UNTOUCHED

__all__ = ["Read", "each_once", "hold_same_values", "is_mask", "rows_of", "was_never_updated"]

Read = Callable[[TensorEntry], torch.Tensor]
"""Gives a tensor over the bytes of a file."""

CandidateT = TypeVar("CandidateT")

_PIECE_BYTES = 16 << 20
_MOST_BYTES = 64 << 20  # of a tensor that can only be read as a whole
_ROWS = 5


def each_once(
    candidates: Iterable[CandidateT],
    leaves_of: Callable[[CandidateT], Mapping[str, Any]],
    read: Read | None,
    allowance: Allowance,
) -> list[CandidateT]:
    """The first of each that hold the same values under the same names; without `read`, no two are known to."""
    found: list[tuple[CandidateT, Mapping[str, Any]]] = []
    for candidate in candidates:
        leaves = leaves_of(candidate)
        alike = [known for _, known in found if read is not None and known.keys() == leaves.keys()]
        if read is None or not any(
            hold_same_values(((leaf, known[name]) for name, leaf in leaves.items()), read, allowance) for known in alike
        ):
            found.append((candidate, leaves))
    return [candidate for candidate, _ in found]


def hold_same_values(pairs: Iterable[tuple[Any, Any]], read: Read, allowance: Allowance) -> bool:
    """Whether each two tensors of a file are of one dtype and hold the same bits.

    Checksums that differ, where both have one, say no before anything is read.
    """
    unlike = [(one, other) for one, other in pairs if not _is_same_place(one, other)]
    for one, other in unlike:
        if not (isinstance(one, TensorEntry) and isinstance(other, TensorEntry)):
            return False
        if (one.dtype, one.shape) != (other.dtype, other.shape) or _differ_by_checksum(one, other):
            return False
    return all(_is_equal(one, other, read, allowance) for one, other in unlike)


def _is_same_place(one: Any, other: Any) -> bool:
    if isinstance(one, TensorEntry) and isinstance(other, TensorEntry):
        return one.dtype is other.dtype and one.location == other.location
    return one is other


def _differ_by_checksum(one: TensorEntry, other: TensorEntry) -> bool:
    if len(one.boxes) != 1 or len(other.boxes) != 1:
        return False
    here, there = one.boxes[0], other.boxes[0]
    whole = all(
        box.start == 0 and box.is_contiguous and box.extent.nbytes == one.nbytes and box.extent.crc32
        for box in (here, there)
    )
    return whole and here.extent.big_endian == there.extent.big_endian and here.extent.crc32 != there.extent.crc32


def _is_equal(one: TensorEntry, other: TensorEntry, read: Read, allowance: Allowance) -> bool:
    if one.numel == 0:
        return True
    if one.nbytes > _PIECE_BYTES and len(one.shape) and len(one.boxes) == len(other.boxes) == 1:
        rows = max(1, _PIECE_BYTES * one.shape[0] // one.nbytes)
        return all(
            _is_equal_piece(_narrowed(one, first, rows), _narrowed(other, first, rows), read, allowance)
            for first in range(0, one.shape[0], rows)
        )
    return _is_equal_piece(one, other, read, allowance)


def _is_equal_piece(one: TensorEntry, other: TensorEntry, read: Read, allowance: Allowance) -> bool:
    return _afford(allowance, one.nbytes + other.nbytes) and torch.equal(_bits(read(one)), _bits(read(other)))


def _afford(allowance: Allowance, nbytes: int) -> bool:
    """Whether some data may be looked at; what can't be is left open, so that it is asked about."""
    if allowance.left_bytes < nbytes:
        return False
    allowance.spend(0, nbytes)
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _narrowed(entry: TensorEntry, first: int, count: int) -> TensorEntry:
    """Some rows of a tensor that lies in one box."""
    (box,) = entry.boxes
    count = min(count, entry.shape[0] - first)
    start = box.start + first * box.strides[0] * entry.dtype.itemsize
    return TensorEntry.over(box.extent, entry.dtype, (count, *entry.shape[1:]), box.strides, start)


def rows_of(entry: TensorEntry, read: Read, allowance: Allowance) -> tuple[list[int], torch.Tensor] | None:
    """A few rows of a tensor: all of them if they are few, else the first, the last and some between.

    Returns:
        Their numbers, and the rows one after the other in the first dimension; ``None`` if the tensor is too large to
        be read for their sake.
    """
    if not entry.shape or entry.nbytes <= 1 << 16 or len(entry.boxes) != 1:
        if entry.nbytes > _MOST_BYTES or not entry.boxes or not _afford(allowance, entry.nbytes):
            return None
        whole = read(entry)
        return list(range(entry.shape[0] if entry.shape else 1)), whole if entry.shape else whole.reshape(1)
    last = entry.shape[0] - 1
    numbers = sorted({last * part // (_ROWS - 1) for part in range(_ROWS)})
    nbytes = entry.nbytes // entry.shape[0] * len(numbers)
    if nbytes > _MOST_BYTES or not _afford(allowance, nbytes):
        return None
    return numbers, torch.cat([read(_narrowed(entry, number, 1)) for number in numbers])


def is_mask(entry: Any, read: Read, allowance: Allowance) -> bool:
    """Whether a tensor is a causal mask, told by its values: square, 0 and 1 or 0 and -inf, what comes later left out.

    A window of limited length is a mask too, as is one that marks what is left out rather than what is kept; and so are
    Swin's, one for each window, of 0 and -100.
    """
    if not isinstance(entry, TensorEntry) or len(entry.shape) < 2 or len(entry.boxes) != 1:
        return False
    if len(entry.shape) == 3 and entry.shape[1] == entry.shape[2] and entry.shape[0] > 1:
        return (found := rows_of(entry, read, allowance)) is not None and _masks_windows(found[1])
    size = entry.shape[-1]
    if entry.shape[-2] != size or size < 2 or any(one != 1 for one in entry.shape[:-2]):
        return False
    box = entry.boxes[0]
    square = TensorEntry.over(box.extent, entry.dtype, (size, size), box.strides[-2:], box.start)
    found = rows_of(square, read, allowance)
    if found is None:
        return False
    numbers, rows = found
    values = rows.to(torch.float64)
    row, column = torch.tensor(numbers).unsqueeze(1), torch.arange(size).unsqueeze(0)
    later, here = column > row, column == row
    if bool((values[here.expand_as(values)] == 0).all()):
        # What is left out is marked, by 1 or by a number that means minus infinity.
        marks = values[later]
        below = values[column < row]
        return bool(below.eq(0).all()) and bool((marks == 1).all() or (marks <= -1e4).all())
    kept = values == 1
    if not bool((kept | (values == 0)).all() and kept[here].all()) or bool(kept[later].any()):
        return False
    # A window: nothing is kept before something that isn't. More than the position itself is, or it were an identity.
    gaps = kept[:, 1:] < kept[:, :-1]
    return bool(kept[-1].sum() > 1) and not bool((gaps & (column[:, 1:] <= row)).any())


def _masks_windows(windows: torch.Tensor) -> bool:
    """Whether each of some squares says, with 0 and -100, which positions of a window belong together."""
    values = windows.to(torch.float64)
    is_apart = values == -100
    diagonal = values.diagonal(dim1=1, dim2=2)
    return bool((is_apart | (values == 0)).all() and not diagonal.any() and is_apart.any()) and torch.equal(
        values, values.transpose(1, 2)
    )


def was_never_updated(container: Mapping[Any, Any], read: Read) -> str | None:
    """The counter by which an average shows that it still is what training began with; ``None`` if none does."""
    for name in UNTOUCHED:
        value = container.get(name)
        if isinstance(value, TensorEntry) and value.numel == 1 and value.boxes:
            value = read(value).item()
        if isinstance(value, (bool, int, float)) and value == 0:
            return name
    return None
