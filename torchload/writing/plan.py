"""What a save writes, decided and checked before the file is begun."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchload.core.checkpoint import contiguous_strides
from torchload.core.ranks import Ranks, attempt
from torchload.core.sharing import Layout, layout_of, shared_runs
from torchload.core.text import listing, printable, short_dtype
from torchload.errors import CastOverflowError
from torchload.match.globs import Globs
from torchload.model.elsewhere import is_placeholder
from torchload.model.shards import is_hollow, is_sharded
from torchload.model.unwrapping import State
from torchload.plan.dtypes import final_dtype
from torchload.writing.blocks import Block, Content, StoredTensor, joined, overflows_in
from torchload.writing.formats import FileFormat
from torchload.writing.plain import PlainCopy
from torchload.writing.replacing import replacing
from torchload.writing.report import SaveReport

__all__ = ["Casting", "SavePlan", "make_save_plan", "refuse", "taken_apart"]


class Casting:
    """Which dtype a tensor has in the file."""

    def __init__(self, dtype: torch.dtype | None, keep_fp32: tuple[str, ...]) -> None:
        self._dtype = dtype
        self._keep_fp32 = Globs(keep_fp32)

    def of(self, names: Sequence[str], now: torch.dtype) -> torch.dtype:
        """The dtype in the file of a tensor that has these names and this dtype."""
        keeps = any(map(self._keep_fp32.match, names))
        return final_dtype(now, self._dtype, keeps_fp32=keeps)


class _Gathering:
    """Sharded tensors, which all ranks have to put together in the same order."""

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()

    def fetch(self) -> torch.Tensor:
        """The next one, whole."""
        whole: torch.Tensor = self.waiting.popleft().full_tensor()
        return whole

    def finish(self) -> None:
        """Take part in all that are left, for the sake of the other ranks."""
        with torch.no_grad():
            while self.waiting:
                self.fetch()


@dataclass(frozen=True, slots=True, eq=False)
class SavePlan:
    """What will be written into a file, checked."""

    path: str
    kind: FileFormat
    content: Content
    gathering: _Gathering
    casts: Mapping[tuple[str, str], int]
    digest: str

    def write(self, ranks: Ranks, started: float) -> SaveReport:
        """Let the first rank write it, and all know what came of it."""
        error, written = attempt(partial(self._write, started)) if ranks.is_writer else (None, None)
        self.gathering.finish()
        result: SaveReport = ranks.share(error, written)
        return result

    def _write(self, started: float) -> SaveReport:
        try:
            with replacing(self.path) as file:
                self.kind.write(file, self.content)
        except CastOverflowError as first:
            blocks = [self.content.blocks[index] for index in self.kind.order(self.content)]
            position = next(index for index, block in enumerate(blocks) if block.name == first.tensor)
            raise joined([first, *overflows_in(blocks[position + 1 :])]) from None
        names: dict[StoredTensor, list[str]] = {}
        for name, stored in self.content.tensors.items():
            names.setdefault(stored, []).append(name)
        return SaveReport(
            path=self.path,
            format=self.kind.name,
            tensors=len(self.content.tensors),
            nbytes=self.content.nbytes,
            casts=self.casts,
            ties=tuple(tuple(group) for group in names.values() if len(group) > 1),
            beside=tuple(self.content.beside),
            seconds=time.perf_counter() - started,
        )


def make_save_plan(
    state: State, beside: Mapping[str, Any], kind: FileFormat, path: str, casting: Casting, ranks: Ranks
) -> SavePlan:
    """Decide what is stored how, and raise everything that stands against it at once."""
    weights, others, extra, loose, problems = taken_apart(state, beside, ranks)
    content = Content(others=others, versions=state.versions, beside=extra)
    gathering = _Gathering()
    casts: Mapping[tuple[str, str], int] = {}
    if not problems:
        casts = _fill(content, weights, list(loose.values()), kind, casting, gathering)
        problems = kind.check(content) if kind.check is not None else []
        in_order = (content.blocks[index].sharded for index in kind.order(content))
        gathering.waiting += [sharded for sharded in in_order if sharded is not None]
    refuse(path, problems)
    # Gathered state dicts are whole on one rank only.
    what = (
        ()
        if state.is_gathered
        else [(name, tuple(tensor.shape)) for name, tensor in [*weights.items(), *loose.values()]]
    )
    digest = hashlib.sha256(repr((path, what)).encode()).hexdigest()
    return SavePlan(path, kind, content, gathering, casts, digest)


Loose = dict[int, tuple[str, torch.Tensor]]


def taken_apart(
    state: State, beside: Mapping[str, Any], ranks: Ranks
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any], Loose, list[str]]:
    """What is to be stored, by kind.

    Returns:
        The state dict's tensors, by name; its other values; what stands beside it; the tensors in those two, by
        identity, each with a name for messages; and what stands against storing them.
    """
    weights = {name: value for name, value in state.entries.items() if isinstance(value, torch.Tensor)}
    plain = PlainCopy()
    others = {name: plain.of(value, name) for name, value in state.entries.items() if name not in weights}
    extra = {name: plain.of(value, name) for name, value in beside.items()}
    problems = [*plain.problems, *_unsavable([*weights.items(), *plain.tensors.values()], ranks)]
    return weights, others, extra, plain.tensors, problems


def refuse(path: str, problems: Sequence[str]) -> None:
    """Raise what stands against a save, if anything does."""
    if problems:
        shown = "".join(f"\n  {printable(problem, None)}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{printable(path, None)} was not written, because it can't hold this as it is:{shown}{more}")


def _unsavable(tensors: Sequence[tuple[str, torch.Tensor]], ranks: Ranks) -> list[str]:
    """Why tensors can't be saved, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for name, tensor in tensors:
        if (reason := _why_not(tensor, ranks)) is not None:
            reasons.setdefault(reason, []).append(name)
    return [f"{reason}: {listing(names)}" for reason, names in reasons.items()]


def _why_not(tensor: Any, ranks: Ranks) -> str | None:
    if is_lazy(tensor):
        return "not initialised yet (run the model once, lazy modules take their shapes from the first input)"
    if tensor.is_meta:
        return "on the meta device, so without values (load or initialise the model first)"
    if is_placeholder(tensor):
        return "partitioned by DeepSpeed, a placeholder (its engine's save_checkpoint writes it)"
    if is_sharded(tensor):
        is_whole = ranks.count > 1 or tensor.device_mesh.size() == 1
        return None if is_whole else "sharded over several ranks, which must save together"
    if tensor.layout is not torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')}, not dense"
    if tensor.is_quantized:
        return "quantized (dequantize() makes it plain)"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"a {type(tensor).__name__}, which is no plain tensor"
    if is_hollow(tensor):
        return f"a {type(tensor).__name__} without memory, so without values"
    return None


def _fill(
    content: Content,
    weights: Mapping[str, torch.Tensor],
    loose: Sequence[tuple[str, torch.Tensor]],
    kind: FileFormat,
    casting: Casting,
    gathering: _Gathering,
) -> Counter[tuple[str, str]]:
    """Turn tensors into blocks; those that share memory share a block. Gives the casts and their number."""
    casts: Counter[tuple[str, str]] = Counter()
    names = [*weights, *(name for name, _ in loose)]
    values = [*weights.values(), *(tensor for _, tensor in loose)]
    stored: dict[int, StoredTensor] = {}
    layouts = [_layout(tensor, kind) for tensor in values]
    for run in shared_runs(layouts):
        members = [names[index] for index in run.members]
        first = values[run.members[0]]
        # States of training keep their precision; so does what shares memory with them.
        dtype = casting.of(members, first.dtype) if run.members[-1] < len(weights) else first.dtype
        if dtype is not first.dtype:
            casts[short_dtype(first.dtype), short_dtype(dtype)] += 1
        as_it_lies = run.is_flat and kind.keeps_views
        for index, offset in zip(run.members, run.offsets):
            shape = tuple(values[index].shape)
            strides = layouts[index].strides if as_it_lies else contiguous_strides(shape)
            stored[index] = StoredTensor(len(content.blocks), offset, shape, strides)
        if is_sharded(first):
            block = Block(members[0], first.numel(), dtype, gathering.fetch, first)
        elif as_it_lies:
            fetch = partial(first.as_strided, (run.numel,), (1,), run.start_bytes // first.dtype.itemsize)
            block = Block(members[0], run.numel, dtype, fetch)
        else:
            block = Block(members[0], first.numel(), dtype, first.detach)
        content.blocks.append(block)
    content.tensors = {name: stored[index] for index, name in enumerate(weights)}
    content.loose = {id(tensor): stored[len(weights) + index] for index, (_, tensor) in enumerate(loose)}
    return casts


def _layout(tensor: torch.Tensor, kind: FileFormat) -> Layout:
    if is_sharded(tensor):
        shape = tuple(tensor.shape)
        return Layout(("sharded", id(tensor)), 0, tensor.dtype, shape, contiguous_strides(shape))
    layout = layout_of(tensor)
    # Without views only what is the very same tensor stays together.
    return layout if kind.keeps_views else layout._replace(memory=layout)
