"""Tensors that are a private view of the file: nothing is copied until it is written to.

Processes that map the same file share its pages. A file that is truncated under a mapping kills the process that
touches what is gone (SIGBUS), so files that others may rewrite in place should be read, not mapped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch

from torchload.core.checkpoint import Box, TensorEntry, box_end_bytes
from torchload.core.copies import Copy
from torchload.core.room import free_host_bytes
from torchload.core.source import Source
from torchload.transfer.arena import allocate
from torchload.transfer.engine import check_unchanged, run
from torchload.transfer.memory import NO_RESERVE, POPULATE_READ, address_of, advise
from torchload.transfer.pieces import needs_swap

__all__ = ["can_map", "map_entries", "map_entry", "read_entries"]

_SURELY_FITS_BYTES = 64 << 20  # it isn't worth while to ask
_CPU = torch.device("cpu")


def map_entry(entry: TensorEntry) -> torch.Tensor:
    """One entry as a tensor on the CPU; see `map_entries`, which maps each file only once for many."""
    return map_entries([entry])[0]


def map_entries(entries: Sequence[TensorEntry]) -> list[torch.Tensor]:
    """Entries as tensors on the CPU: views of private, copy-on-write mappings where possible, else copies.

    Copied is what can't be mapped: data in memory, in several boxes, in the other byte order, or not aligned to its own
    element size; and what another of the entries maps already, so that no two tensors share memory. Pages are mapped in
    at once rather than one fault at a time, where memory has room for all of them.

    Returns:
        The tensors, in the order of the entries, with the entries' shapes and dtypes, and their strides where mapped.
        A mapping lives as long as any of its tensors.

    Raises:
        CorruptCheckpointError: A file was changed since it was opened.
        OSError: A device failed.
    """
    tensors: list[torch.Tensor | None] = [None] * len(entries)
    populate = _has_room(entries)
    with torch.inference_mode(False):
        for source, indices in _mappable(entries).items():
            check_unchanged([source])
            for index, tensor in _map(source, [(index, entries[index]) for index in indices], populate):
                tensors[index] = tensor
    rest = [index for index, tensor in enumerate(tensors) if tensor is None]
    read = read_entries([entries[index] for index in rest]) if rest else []
    for index, tensor in zip(rest, read, strict=True):
        tensors[index] = tensor
    return [tensor for tensor in tensors if tensor is not None]


def _has_room(entries: Sequence[TensorEntry]) -> bool:
    """Whether all pages can stay in memory; where not, the last ones would push the first ones out."""
    nbytes = sum(entry.nbytes for entry in entries)
    return nbytes < _SURELY_FITS_BYTES or nbytes < (free_host_bytes() or nbytes + 1)


def can_map(entry: TensorEntry) -> bool:
    """Whether an entry's data lies in a file as it would in memory."""
    if len(entry.boxes) != 1 or 0 in entry.shape or not hasattr(mmap, "MAP_PRIVATE"):
        return False
    extent = entry.boxes[0].extent
    is_aligned = (extent.source.base + _first_byte(entry)) % entry.dtype.itemsize == 0
    return extent.source.fd is not None and is_aligned and not needs_swap(extent, entry.dtype)


def read_entries(entries: Sequence[TensorEntry]) -> list[torch.Tensor]:
    """Entries as contiguous tensors in fresh memory on the CPU; raises like `run`."""
    tensors = allocate([(entry.shape, entry.dtype) for entry in entries], _CPU)
    run(
        [
            Copy(f"tensor {index}", box, entry.dtype, _region(tensor, box))
            for index, (entry, tensor) in enumerate(zip(entries, tensors, strict=True))
            for box in entry.boxes
        ]
    )
    return tensors


def _region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dimension, (first, count) in enumerate(zip(box.origin, box.shape, strict=True)):
        if count != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, first, count)
    return tensor


def _mappable(entries: Sequence[TensorEntry]) -> dict[Source, list[int]]:
    """Indices of the entries that can be mapped, by source, in the order of the file and without overlap."""
    found: dict[Source, list[int]] = {}
    for index, entry in enumerate(entries):
        if can_map(entry):
            found.setdefault(entry.boxes[0].extent.source, []).append(index)
    for source, indices in found.items():
        indices.sort(key=lambda index: _first_byte(entries[index]))
        apart: list[int] = []
        end = 0
        for index in indices:
            if _first_byte(entries[index]) >= end:
                apart.append(index)
                end = _last_byte(entries[index])
        found[source] = apart
    return found


def _map(
    source: Source, members: Sequence[tuple[int, TensorEntry]], populate: bool
) -> Iterable[tuple[int, torch.Tensor]]:
    """Views of one mapping that spans all members, with their indices; nothing if the system refuses."""
    if source.fd is None:
        return
    first = source.base + _first_byte(members[0][1])
    last = source.base + max(_last_byte(entry) for _, entry in members)
    start = first - first % mmap.ALLOCATIONGRANULARITY
    # Nothing is reserved for copies that most likely are never made.
    flags = mmap.MAP_PRIVATE | NO_RESERVE
    try:
        mapping = mmap.mmap(source.fd, last - start, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    except (OSError, ValueError):
        return
    address = address_of(mapping)
    # `torch.frombuffer` keeps what it is given alive, but only the memoryview keeps the mapping from being closed.
    view = memoryview(mapping)
    for index, entry in members:
        offset = source.base + _first_byte(entry) - start
        nbytes = _last_byte(entry) - _first_byte(entry)
        if populate:
            advise(address + offset, nbytes, POPULATE_READ)
        flat = torch.frombuffer(view, dtype=entry.dtype, count=nbytes // entry.dtype.itemsize, offset=offset)
        yield index, flat.as_strided_(entry.shape, entry.boxes[0].strides)


def _first_byte(entry: TensorEntry) -> int:
    box = entry.boxes[0]
    return box.extent.offset + box.start


def _last_byte(entry: TensorEntry) -> int:
    """Position just past the entry's data in its source."""
    box = entry.boxes[0]
    return box.extent.offset + box_end_bytes(box.start, box.shape, box.strides, entry.dtype.itemsize)
