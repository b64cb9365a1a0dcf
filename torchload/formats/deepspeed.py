"""DeepSpeed folders: the weights of ZeRO 0 to 2 lie in one file, those of ZeRO 3 flat and cut up among all ranks.

``<run>/latest`` names the step's folder. In it, ``mp_rank_00_model_states.pt`` holds the module; under ZeRO 3 each rank
has a file of that kind, in which parameters are empty, and the values are in the optimizer's files: each rank's
``fp32_flat_groups`` are its parts of all parameters, flattened, one after the other. Under ZeRO 1 and 2 the optimizer's
files hold the float32 originals of the module's weights in a similar way; they become a container of their own,
``master_fp32``.

Source of the layout: what DeepSpeed 0.5 to 0.19 write, and what the ``zero_to_fp32.py`` beside their files does.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NoReturn

from torchload.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    TorchLoadError,
)
from torchload.formats.locate import path_inside, pointer_text
from torchload.formats.tiling import regions_of_run
from torchload.index import Box, Checkpoint, Container, Record, Shape, TensorEntry, contiguous_strides, record_fields
from torchload.source import Source

__all__ = ["MASTER_KEY", "open_folder"]

MASTER_KEY = "master_fp32"
MAX_DIMENSIONS = 16  # of a parameter

_MODEL_FILE = re.compile(r"mp_rank_(?P<part>\d+)_model_states\.pt")
_RANK_MODEL_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")
_EXPERT_FILE = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_(?:model|optim)_states\.pt")
_LAYER_FILE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")

OpenFile = Callable[[str], Checkpoint]


def open_folder(path: str, open_file: OpenFile) -> Checkpoint:
    """Index a DeepSpeed checkpoint.

    Args:
        path: The folder that was given to ``save_checkpoint``, or one step's folder inside it.
        open_file: Opens one file.

    Returns:
        The first rank's tree, in which ``module`` is complete whatever the ZeRO stage.

    Raises:
        CheckpointNotFoundError: Files of ranks are missing; the message lists them.
        CheckpointFormatError: It was saved under tensor, pipeline or expert parallelism.
        CorruptCheckpointError: The files contradict each other.
        AmbiguousCheckpointError: There are several steps and no ``latest``.
    """
    step = _step_folder(path)
    names = os.listdir(step)
    _refuse_model_parallel(path, names)
    optimizer_files = _by_rank(names, _OPTIMIZER_FILE)
    rank_files = _by_rank(names, _RANK_MODEL_FILE)
    plain = [name for name in names if _MODEL_FILE.fullmatch(name)]
    if not plain and not rank_files:
        raise CheckpointNotFoundError(
            f"{step} holds no model states, only {', '.join(sorted(names)[:8]) or 'nothing'}. Copy the folder again.",
            path=path,
        )
    ranks = _Ranks(path, step, open_file)
    try:
        if plain:
            return ranks.gathered(plain[0], optimizer_files)
        return ranks.partitioned(rank_files, optimizer_files)
    except BaseException:
        ranks.close()
        raise


class _Ranks:
    """The files of one step, as they are opened."""

    def __init__(self, path: str, step: str, open_file: OpenFile) -> None:
        self.path = path
        self.step = step
        self.open_file = open_file
        self.opened: list[Checkpoint] = []

    def gathered(self, model_file: str, optimizer_files: Mapping[int, str]) -> Checkpoint:
        """ZeRO 0, 1 and 2: every rank had the whole module."""
        first = self.open(model_file)
        root = first.root
        module = self.container(root, "module")
        notes: list[str] = []
        if optimizer_files:
            before = len(self.opened)
            try:
                states = [self.open(name).root for name in self.complete(optimizer_files)]
                root[MASTER_KEY] = self.consolidated([root], states, module)
                if any(entry.dtype is not root[MASTER_KEY][name].dtype for name, entry in _weights(root, module)):
                    notes.append(f"float32 originals of the weights are in the optimizer's files: key={MASTER_KEY!r}")
            except TorchLoadError as error:  # the module itself is there, whatever these files are
                for checkpoint in self.opened[before:]:
                    checkpoint.close()
                del self.opened[before:]
                notes.append(f"the optimizer's float32 weights can't be used: {error}")
        return self.checkpoint(first, notes)

    def partitioned(self, model_files: Mapping[int, str], optimizer_files: Mapping[int, str]) -> Checkpoint:
        """ZeRO 3: every rank has a part of each parameter, in the files of its optimizer."""
        if not optimizer_files:
            raise CheckpointNotFoundError(
                f"{self.step} holds no *_optim_states.pt files. Under ZeRO 3 the weights are in them, and the model "
                "states hold empty placeholders. Copy them into the folder.",
                path=self.path,
            )
        own, *others = self.complete(model_files)
        first = self.open(own)
        root = first.root
        module = self.container(root, "module")
        models = [root]
        if root.get("frozen_param_shapes"):  # the only values that lie in the others
            models += [self.open(name).root for name in others]
        states = [self.open(name).root for name in self.complete(optimizer_files)]
        root["module"] = self.consolidated(models, states, module)
        return self.checkpoint(first, [f"put together from the float32 parts of {len(states)} ranks"])

    def consolidated(self, models: Sequence[Any], states: Sequence[Any], module: Container) -> Container:
        """The module's state dict with its parameters as the optimizer's files hold them."""
        states = [self.container(state, "optimizer_state_dict") for state in states]
        self.check_count(states)
        groups = models[0].get("param_shapes")
        groups = [groups] if isinstance(groups, dict) else groups
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            self.refuse("its model states lack 'param_shapes'")
        if "fp32_flat_groups" in states[0]:
            found = self.stage3(models, states, groups)
        elif "single_partition_of_fp32_groups" in states[0]:
            found = self.stage2(models[0], states, groups)
        else:
            self.refuse("its optimizer's files have no float32 weights where any known version keeps them")
        self.add_rest(models[0], module, found)
        ordered = {name: found.pop(name) for name in module if name in found}
        return Container({**ordered, **found}, metadata=module.metadata)

    def stage3(self, models: Sequence[Any], states: Sequence[Any], groups: list[Any]) -> dict[str, Any]:
        """Each rank has an equal part of each parameter, the last ones padded."""
        vectors = [self.vector(state["fp32_flat_groups"]) for state in states]
        found: dict[str, Any] = {}
        position = 0
        for name, shape in self.shapes(groups):
            found[name] = self.spread(name, shape, [(vector, position) for vector in vectors])
            position += -(-math.prod(shape) // len(vectors))
        if any(vector.size != position for vector in vectors):
            self.refuse(f"its ranks hold {vectors[0].size} elements each where the parameters need {position}")
        frozen = models[0].get("frozen_param_shapes")
        for name, shape in self.shapes([frozen] if isinstance(frozen, dict) and frozen else []):
            parts = [(model.get("frozen_param_fragments") or {}).get(name) for model in models]
            if all(isinstance(part, TensorEntry) for part in parts):
                found[name] = self.spread(name, shape, [(self.vector([part]), 0) for part in parts])
        return found

    def stage2(self, model: Any, states: Sequence[Any], groups: list[Any]) -> dict[str, Any]:
        """The parameters of a group lie one after the other, and the ranks have equal parts of that."""
        partitions = [state["single_partition_of_fp32_groups"] for state in states]
        if not all(isinstance(parts, list) and len(parts) == len(groups) for parts in partitions):
            self.refuse("its optimizer's files have another number of parameter groups than its model states")
        found: dict[str, Any] = {}
        for number, group in enumerate(groups):
            vectors = [self.vector([parts[number]]) for parts in partitions]
            mappings = [_slices(state, number) for state in states]
            if all(mapping is not None for mapping in mappings):
                self.by_slices(group, vectors, mappings, found)
            else:
                self.by_order(group, vectors, found)
        frozen = model.get("frozen_param_fragments")
        if isinstance(frozen, dict):
            found.update((name, entry) for name, entry in frozen.items() if isinstance(entry, TensorEntry))
        return found

    def by_slices(self, group: Any, vectors: Sequence[_Vector], mappings: Sequence[Any], found: dict[str, Any]) -> None:
        """Each rank says which part of which parameter it has, and where."""
        for name, shape in self.shapes([group]):
            numel = math.prod(shape)
            boxes: list[Box] = []
            first = 0
            for vector, mapping in zip(vectors, mappings):
                address = record_fields(mapping[name]) if isinstance(mapping.get(name), Record) else None
                if address is None:
                    continue
                start, count = address.get("start"), address.get("numel")
                if type(start) is not int or type(count) is not int or not 0 <= count <= numel - first:
                    self.refuse(f"the parts of {name!r} don't make up its shape {list(shape)}")
                boxes += self.boxes(name, vector, start, shape, first, count)
                first += count
            if first != numel:
                self.refuse(f"{name!r} has {numel} elements, but the ranks hold {first}")
            found[name] = TensorEntry(vectors[0].dtype, shape, tuple(boxes))

    def by_order(self, group: Any, vectors: Sequence[_Vector], found: dict[str, Any]) -> None:
        """Older versions: the parameters follow one another, and only the end of the group is padded."""
        whole = self.vector([part for vector in vectors for part in vector.parts])
        position = 0
        for name, shape in self.shapes([group]):
            numel = math.prod(shape)
            found[name] = TensorEntry(whole.dtype, shape, tuple(self.boxes(name, whole, position, shape, 0, numel)))
            position += numel
        alignment = 2 * len(vectors)
        if -(-position // alignment) != -(-whole.size // alignment):
            self.refuse(f"its ranks hold {whole.size} elements of a group where the parameters need {position}")

    def spread(self, name: str, shape: Shape, places: Sequence[tuple[_Vector, int]]) -> TensorEntry:
        """A parameter of which each rank has the same number of elements, at its place."""
        numel = math.prod(shape)
        each = -(-numel // len(places))
        boxes: list[Box] = []
        for rank, (vector, position) in enumerate(places):
            count = min(each, numel - rank * each)
            if count > 0:
                boxes += self.boxes(name, vector, position, shape, rank * each, count)
        return TensorEntry(places[0][0].dtype, shape, tuple(boxes))

    def boxes(self, name: str, vector: _Vector, position: int, shape: Shape, first: int, count: int) -> Iterator[Box]:
        if position < 0 or position + count > vector.size:
            self.refuse(f"{name!r} of shape {list(shape)} does not lie inside what the ranks hold")
        return vector.boxes(position, shape, first, count)

    def add_rest(self, model: Any, module: Container, found: dict[str, Any]) -> None:
        """Buffers, which are never partitioned, and names that share another's data."""
        buffers = model.get("buffer_names")
        for name in buffers if isinstance(buffers, (list, tuple)) else ():
            if type(name) is str and isinstance(module.get(name), TensorEntry):
                found.setdefault(name, module[name])
        shared = model.get("shared_params")
        pairs = shared.items() if isinstance(shared, dict) else shared if isinstance(shared, list) else ()
        for pair in pairs:
            if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(name) is str for name in pair):
                alias, name = pair
                if name in found:
                    found.setdefault(alias, found[name])

    # --- checks ---

    def shapes(self, groups: Sequence[Any]) -> Iterator[tuple[str, Shape]]:
        seen: set[str] = set()
        for group in groups:
            for name, shape in group.items():
                good = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
                if type(name) is not str or not good or len(shape) > MAX_DIMENSIONS or math.prod(shape) >= 1 << 62:
                    self.refuse(f"the shape of {str(name)[:200]!r} is none")
                if name in seen:
                    self.refuse(f"{name[:200]!r} is in two groups")
                seen.add(name)
                yield name, shape

    def vector(self, parts: Any) -> _Vector:
        if not isinstance(parts, list) or not parts:
            self.refuse("its optimizer's files lack the float32 weights")
        for part in parts:
            if not isinstance(part, TensorEntry) or len(part.shape) != 1 or part.dtype is not parts[0].dtype:
                self.refuse("its optimizer's float32 weights are not flat tensors of one dtype")
            if part.numel and (len(part.boxes) != 1 or not part.boxes[0].is_contiguous):
                self.refuse("its optimizer's float32 weights are not contiguous")
        return _Vector(parts)

    def check_count(self, states: Sequence[Any]) -> None:
        count = states[0].get("partition_count")
        counts = count if isinstance(count, list) else [count]
        expected = max((number for number in counts if type(number) is int), default=len(states))
        if expected != len(states):
            raise CheckpointNotFoundError(
                f"{expected} ranks saved {self.step}, and the optimizer's files of {len(states)} are there. Copy the "
                "others into the folder.",
                path=self.path,
            )

    def complete(self, files: Mapping[int, str]) -> list[str]:
        """The files in the order of their ranks, of which none may be missing."""
        missing = sorted(set(range(max(files) + 1)) - files.keys()) if max(files) < 1 << 20 else [-1]
        if missing:
            name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{missing[0]}", next(iter(files.values())))
            more = f" and those of {len(missing) - 1} more ranks" if len(missing) > 1 else ""
            raise CheckpointNotFoundError(f"{self.step} lacks {name}{more}. Copy them into the folder.", path=self.path)
        return [files[rank] for rank in sorted(files)]

    def container(self, tree: Any, key: str) -> Container:
        value = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(value, Container):
            self.refuse(f"one of its files has no {key!r}")
        return value

    def refuse(self, problem: str) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self.step} can't be put together: {problem}. If its training was not interrupted while it saved, run "
            f"'python zero_to_fp32.py . output' in {self.path} (DeepSpeed puts the script there) and load 'output'.",
            path=self.path,
        )

    # --- files ---

    def open(self, name: str) -> Checkpoint:
        """Open one file of the step; it must hold a mapping."""
        checkpoint = self.open_file(os.path.join(self.step, name))
        self.opened.append(checkpoint)
        if not isinstance(checkpoint.root, Container):
            self.refuse(f"{name} holds no mapping")
        return checkpoint

    def checkpoint(self, first: Checkpoint, notes: Sequence[str]) -> Checkpoint:
        sources: list[Source] = [source for checkpoint in self.opened for source in checkpoint.sources]
        count = f"{len(self.opened)} file" + ("s" if len(self.opened) != 1 else "")
        return replace(
            first,
            path=self.path,
            format=f"DeepSpeed folder ({count})",
            sources=tuple(sources),
            checksums=all(checkpoint.checksums for checkpoint in self.opened),
            notes=(*first.notes, *notes),
        )

    def close(self) -> None:
        for checkpoint in self.opened:
            checkpoint.close()


class _Vector:
    """Flat tensors that follow one another.

    Attributes:
        parts: Them; each contiguous, all of one dtype.
        dtype: Theirs.
        size: Number of elements of all.
    """

    def __init__(self, parts: Sequence[TensorEntry]) -> None:
        self.parts = parts
        self.dtype = parts[0].dtype
        self.ends = list(accumulate(part.numel for part in parts))
        self.size = self.ends[-1]

    def boxes(self, position: int, shape: Shape, first: int, count: int) -> Iterator[Box]:
        """Elements `position` … of the vector as elements `first` … of a flattened tensor, `count` of them."""
        itemsize = self.dtype.itemsize
        while count:
            index = bisect_right(self.ends, position)
            amount = min(count, self.ends[index] - position)
            (box,) = self.parts[index].boxes
            start = box.start + (position - self.ends[index] + self.parts[index].numel) * itemsize
            for region in regions_of_run(shape, first, amount):
                yield Box(box.extent, start, region.shape, contiguous_strides(region.shape), region.origin)
                start += math.prod(region.shape) * itemsize
            position, first, count = position + amount, first + amount, count - amount


def _slices(state: Any, number: int) -> Any:
    """Parameter name → where a rank has its part of it, for one group; ``None`` in files before DeepSpeed 0.7."""
    mappings = state.get("param_slice_mappings")
    if not isinstance(mappings, list) or number >= len(mappings) or not isinstance(mappings[number], dict):
        return None
    return mappings[number]


def _weights(root: Any, module: Container) -> Iterator[tuple[str, TensorEntry]]:
    return (
        (name, entry) for name, entry in module.items() if isinstance(entry, TensorEntry) and name in root[MASTER_KEY]
    )


def _by_rank(names: Sequence[str], pattern: re.Pattern[str]) -> dict[int, str]:
    return {int(match["rank"]): name for name in names if (match := pattern.fullmatch(name))}


def _step_folder(path: str) -> str:
    """The folder of one step: what ``latest`` names, or the only one."""
    names = os.listdir(path)
    if "latest" in names:
        pointer = pointer_text(os.path.join(path, "latest"))
        step = path_inside(pointer, path, path)
        if not os.path.isdir(step):
            raise CheckpointNotFoundError(
                f"{path}/latest names {pointer!r}, which is not there. Copy that folder, or give another step's.",
                path=path,
            )
        return step
    steps = sorted(name for name in names if re.fullmatch(r"global_step\d+", name))
    if len(steps) > 1:
        raise AmbiguousCheckpointError(
            f"{path} holds {len(steps)} steps and no file 'latest': {', '.join(steps[:12])}. Give the path of the one "
            f"you mean, such as {os.path.join(path, steps[-1])}.",
            path=path,
            candidates=[os.path.join(path, step) for step in steps],
            argument="path",
        )
    return os.path.join(path, steps[0]) if steps else path


def _refuse_model_parallel(path: str, names: Sequence[str]) -> None:
    patterns = (_MODEL_FILE, _RANK_MODEL_FILE, _OPTIMIZER_FILE)
    parts = {int(match["part"]) for name in names for pattern in patterns if (match := pattern.fullmatch(name))}
    if len(parts) > 1:
        kind = f"under tensor or pipeline parallelism, on {len(parts)} model-parallel ranks"
    elif any(map(_EXPERT_FILE.fullmatch, names)):
        kind = "under expert parallelism, each rank with experts of its own"
    elif any(map(_LAYER_FILE.fullmatch, names)):
        kind = "under pipeline parallelism, each layer in a file of its own"
    else:
        return
    raise CheckpointFormatError(
        f"{path} was saved {kind}. How the parts make up the model only the training code knows: gather the model "
        "there and save its state_dict(), or use the converter of the framework that trained it (Megatron-DeepSpeed: "
        "tools/convert_checkpoint/deepspeed_to_transformers.py).",
        path=path,
        found="DeepSpeed folder of a model-parallel run",
    )
