"""Tensors over a file's pages that hooks are shown, and that some of them keep."""

from __future__ import annotations

from collections import Counter

import torch

from torchload.core.checkpoint import Box, TensorEntry
from torchload.core.in_memory import TensorSource
from torchload.match import Selection
from torchload.transfer import can_map, map_entry, replace_pages

__all__ = ["Borrowed"]


class Borrowed:
    """Reads entries without copying them, until somebody keeps one: then it has memory of its own.

    A page of the file would change when the file does, and be gone when that is cut short.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def __call__(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor over the file's bytes."""
        tensor = map_entry(entry)
        if can_map(entry):
            self._storages.append(tensor.untyped_storage())
        return tensor

    def let_go(self, selection: Selection) -> None:
        """Give memory of its own, at its address, to what is held by others than the selection."""
        leaves = [leaf for leaf in selection.leaves.values() if type(leaf) is TensorEntry]
        sources = {box.extent.source for leaf in leaves for box in leaf.boxes if type(box) is Box}
        expected = Counter(source.address for source in sources if isinstance(source, TensorSource))
        for storage in self._storages:
            if torch._C._storage_Use_Count(storage._cdata) > 1 + expected[storage.data_ptr()]:
                replace_pages(storage.data_ptr(), storage.nbytes())
        self._storages.clear()
