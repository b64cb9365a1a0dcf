"""A folder of `torch.distributed.checkpoint`, written by torch's own writer: each rank stores its own parts."""

from __future__ import annotations

import inspect
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from torchload.core.ranks import Ranks, attempt
from torchload.core.text import short_dtype
from torchload.errors import CastOverflowError
from torchload.formats.sets.distributed import METADATA_NAME
from torchload.model.shards import local_region
from torchload.model.unwrapping import State
from torchload.transfer.overflow import largest_finite, overflows
from torchload.writing.blocks import WEIGHTS, joined, spoiled
from torchload.writing.plan import Casting, refuse, taken_apart
from torchload.writing.replacing import replacing_folder
from torchload.writing.report import SaveReport
from torchload.writing.run_state import optimizer_by_name

__all__ = ["FolderPlan", "make_folder_plan"]

_FORMAT = "torch.distributed.checkpoint folder"
_DATA_NAME = re.compile(r"__\d+_\d+\.distcp")


@dataclass(frozen=True, slots=True, eq=False)
class FolderPlan:
    """What this rank will write into a folder, checked."""

    path: str
    tree: Mapping[str, Any]
    counted: SaveReport
    digest: str

    def write(self, ranks: Ranks, started: float) -> SaveReport:
        """Let each rank write its part; the folder takes its name when all have."""
        with ExitStack() as stack:
            place = partial(stack.enter_context, replacing_folder(self.path, _is_part_of_one))
            error, temporary = attempt(place) if ranks.is_writer else (None, None)
            temporary = ranks.share(error, temporary)
            error, _ = attempt(partial(_save, self.tree, temporary, alone=ranks.count == 1))
            ranks.agree(error, None)
            error, _ = attempt(stack.close)
        result: SaveReport = ranks.share(error, replace(self.counted, seconds=time.perf_counter() - started))
        return result


def make_folder_plan(state: State, beside: Mapping[str, Any], path: str, casting: Casting, ranks: Ranks) -> FolderPlan:
    """Decide what this rank stores, and raise everything that stands against it at once, as `make_save_plan` does."""
    weights, others, extra, loose, problems = taken_apart(state, beside, ranks)
    refuse(path, problems)
    casts: Counter[tuple[str, str]] = Counter()
    entries, found = {}, []
    for name, tensor in weights.items():
        try:
            entries[name] = _cast(name, tensor, casting, casts)
        except CastOverflowError as error:
            found.append(error)
    if found:
        raise joined(found)
    extra = {name: optimizer_by_name(value) if name.startswith("optimizer") else value for name, value in extra.items()}
    tree = {WEIGHTS: {**entries, **others}, **extra} if extra else {**entries, **others}
    distinct = {id(tensor): tensor for tensor in (*entries.values(), *(tensor for _, tensor in loose.values()))}
    nbytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in distinct.values())
    counted = SaveReport(path, _FORMAT, len(weights), nbytes, casts, beside=tuple(extra))
    return FolderPlan(path, tree, counted, path)


def _is_part_of_one(name: str) -> bool:
    return METADATA_NAME.fullmatch(name) is not None or _DATA_NAME.fullmatch(name) is not None


def _cast(name: str, tensor: torch.Tensor, casting: Casting, casts: Counter[tuple[str, str]]) -> torch.Tensor:
    """A weight in the dtype that it has in the file; torch's writer casts nothing."""
    dtype = casting.of([name], tensor.dtype)
    if dtype is tensor.dtype:
        return tensor
    casts[short_dtype(tensor.dtype), short_dtype(dtype)] += 1
    data = tensor.detach().to(dtype)
    here, there = local_region(tensor)[0], local_region(data)[0]
    if overflows(here.contiguous(), there.contiguous()):
        raise spoiled(tensor.dtype, dtype, {name: largest_finite(here)})
    return data


def _save(tree: Mapping[str, Any], folder: str, *, alone: bool) -> None:
    import torch.distributed.checkpoint

    checkpoint: Any = torch.distributed.checkpoint
    writer = checkpoint.FileSystemWriter(folder)
    if not alone:
        checkpoint.save(dict(tree), storage_writer=writer)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # uninitialized, which is meant
        if "no_dist" in inspect.signature(checkpoint.save).parameters:
            checkpoint.save(dict(tree), storage_writer=writer, no_dist=True)
        else:  # the same before torch 2.8
            warnings.simplefilter("ignore", FutureWarning)
            checkpoint.save_state_dict(dict(tree), writer, no_dist=True)
