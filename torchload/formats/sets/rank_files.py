"""Sets of files that each hold what one process had: FSDP's sharded state dicts, Megatron-LM folders, Meta's Llama.

What can be put together is what says itself where it belongs: sharded tensors carry their place in the whole. A plain
tensor of a tensor-parallel run does not, and is refused with what to do instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torchload.core.checkpoint import Checkpoint, Container, OpaqueTensor, Shape, TensorEntry
from torchload.core.text import listed
from torchload.errors import (
    GET_IT_AGAIN,
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from torchload.formats.locate import pointer_text
from torchload.formats.sets.members import Members, OpenFile, may_be_same
from torchload.formats.sets.tiling import MisfitError, assemble

__all__ = ["is_megatron", "is_rank_set", "is_single_part", "open_megatron", "open_part", "open_rank_set"]

MAX_DEPTH = 100
MAX_VALUES = 1_000_000

_WEIGHTS_SUFFIX = re.compile(r".+\.(?:pt|pth|bin|ckpt)")
_RANK_FILE = re.compile(r"(?P<before>(?:.*[_.-])?rank[_-]?)(?P<rank>\d{1,6})(?P<after>\.(?:pt|pth|bin|ckpt))")
_LLAMA_FILE = re.compile(r"(?P<before>consolidated\.)(?P<rank>\d{2})(?P<after>\.pth)")
_NOT_MODEL = re.compile(r"(?:optim|opt_|optimizer|extra_state|rng|random|scheduler|loader|dataloader).*")
_MEGATRON_POINTER = "latest_checkpointed_iteration.txt"
_MEGATRON_RANK = re.compile(r"mp_rank_\d\d(?:_\d{3}){0,2}")
_MEGATRON_FILES = ("model_optim_rng.pt", "model_rng.pt")
_PART_FOLDER = re.compile(r"pytorch_model_fsdp_\d+")  # accelerate's, and so transformers'


# --- one file per rank ---


def is_rank_set(names: Iterable[str]) -> bool:
    """Whether the weights of a folder are a set of files that differ in the number of a rank.

    Example:
        >>> is_rank_set(["rank0.pt", "rank1.pt", "readme.md"]), is_rank_set(["rank0.pt", "best.pt"])
        (True, False)
    """
    return _rank_set(names) is not None


def _rank_set(names: Iterable[str]) -> dict[int, str] | None:
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if not _WEIGHTS_SUFFIX.fullmatch(name) or _NOT_MODEL.fullmatch(name):
            continue
        match = _RANK_FILE.fullmatch(name) or _LLAMA_FILE.fullmatch(name)
        if match is None:
            return None
        sets.setdefault((match["before"], match["after"]), {})[int(match["rank"])] = name
    if len(sets) != 1:
        return None
    (files,) = sets.values()
    return files if len(files) > 1 else None


def open_rank_set(path: str, open_member: OpenFile) -> Checkpoint:
    """Put together the files of all ranks of a job that saved sharded tensors.

    Returns:
        The first rank's tree, in which every sharded tensor is one entry of all ranks' parts.

    Raises:
        CheckpointNotFoundError: A rank's file is missing.
        AmbiguousCheckpointError: The files hold plain tensors, which don't say where they belong.
        CheckpointFormatError: So do these, and what they are is known.
        CorruptCheckpointError: The parts do not make up the tensors.
    """
    files = _rank_set(os.listdir(path)) or {}
    missing = sorted(set(range(max(files, default=0) + 1)) - files.keys())
    if missing:
        raise CheckpointNotFoundError(
            f"The checkpoint lacks the files of ranks {listed([*map(str, missing)])}. Copy them into the folder."
        )
    with Members(open_member) as members:
        merger = _Merger()
        root = merger.merge([members.open(os.path.join(path, files[rank])).root for rank in sorted(files)])
        if all("flat_param" in name for name in merger.joined):  # FSDP's local state: flat parameters, or none at all
            raise _refuse_plain(path, sorted(files.values()))
        return members.joined(path, f"sharded tensors in {len(files)} rank files", root)


class _Merger:
    """Joins the trees of all ranks, which are alike.

    Attributes:
        joined: Names of the tensors that were put together.
    """

    def __init__(self) -> None:
        self.joined: list[str] = []
        self.merged: dict[tuple[int, ...], Any] = {}  # by identity: what occurs twice is merged once

    def merge(self, trees: Sequence[Any], name: str = "", depth: int = 0) -> Any:
        """The tree of the first rank with its sharded tensors completed from the others."""
        if not isinstance(trees[0], (Container, OpaqueTensor, TensorEntry)):
            return trees[0]
        identity = tuple(map(id, trees))
        if identity not in self.merged:
            if depth > MAX_DEPTH or len(self.merged) > MAX_VALUES:
                raise CorruptCheckpointError(f"The checkpoint is nested too deeply at {name[:200]!r}.")
            self.merged[identity] = self.merge_new(trees, name, depth)
        return self.merged[identity]

    def merge_new(self, trees: Sequence[Any], name: str, depth: int) -> Any:
        """`merge`, for values that were not met before."""
        first = trees[0]
        if any(isinstance(tree, OpaqueTensor) and tree.parts for tree in trees):
            return self.join(name, trees)
        if isinstance(first, Container) and all(isinstance(tree, Container) for tree in trees):
            return Container(
                {
                    key: self.merge([tree[key] for tree in trees if key in tree], f"{name}.{key}", depth + 1)
                    for key in dict.fromkeys(key for tree in trees for key in tree)
                },
                metadata=first.metadata,
                origin=first.origin,
            )
        if isinstance(first, TensorEntry) and not all(may_be_same(first, tree) for tree in trees[1:]):
            return OpaqueTensor("a tensor that differs from rank to rank", first.shape)
        return first

    def join(self, name: str, values: Sequence[Any]) -> TensorEntry:
        """One tensor of the parts that each rank has."""
        shape: Shape | None = getattr(values[0], "shape", None)
        try:
            if shape is None:
                raise MisfitError("their shape isn't known")
            if any(not isinstance(value, OpaqueTensor) or value.shape != shape for value in values):
                raise MisfitError("the ranks disagree about its shape")
            entry = assemble((part for value in values for part in value.parts), shape)
        except MisfitError as error:
            raise CorruptCheckpointError(
                f"The checkpoint's rank files have parts of {name.lstrip('.')[:200]!r} that make no tensor: {error}; "
                "are all ranks here?"
            ) from None
        self.joined.append(name)
        return entry


def _refuse_plain(path: str, names: Sequence[str]) -> CheckpointFormatError | AmbiguousCheckpointError:
    what = (
        f"The checkpoint consists of the files of {len(names)} ranks ({listed(names)}), whose tensors don't say which "
        "part of the whole they are."
    )
    if _LLAMA_FILE.fullmatch(names[0]):
        return CheckpointFormatError(
            f"{what} They are the tensor-parallel parts of a Llama as Meta publishes it; convert them with "
            "transformers' convert_llama_weights_to_hf.py, or download the converted model.",
            found="tensor-parallel Llama",
        )
    return AmbiguousCheckpointError(
        f"{what} If each holds the same, give the path of one. If each holds its part of a tensor- or "
        "pipeline-parallel model, or FSDP's local (flat) state, gather the model in the job that saved it, with "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True.",
        candidates=[os.path.join(path, name) for name in names],
        argument="path",
    )


# --- folders around ---


def is_megatron(names: Iterable[str]) -> bool:
    """Whether a folder is one of Megatron-LM's, by what lies in it."""
    return any(name == _MEGATRON_POINTER or _MEGATRON_RANK.fullmatch(name) for name in names)


def open_megatron(path: str, open_member: OpenFile) -> Checkpoint:
    """Open a Megatron-LM folder, if one rank had the whole model, or if it was saved in the distributed format.

    Raises:
        CheckpointFormatError: Several ranks hold parts of the model.
        CheckpointNotFoundError: The iteration or its files are missing.
    """
    names = os.listdir(path)
    if _MEGATRON_POINTER in names:
        return open_member(_iteration_folder(path))
    ranks = sorted(filter(_MEGATRON_RANK.fullmatch, names))
    if len(ranks) > 1:
        raise CheckpointFormatError(
            f"The checkpoint is a Megatron checkpoint folder of {len(ranks)} tensor- or pipeline-parallel ranks "
            f"({ranks[0]}, {ranks[1]}, …). Only Megatron-LM knows how their parts make up the model. In it, run "
            "'python tools/checkpoint/convert.py --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1', "
            "or save with --ckpt-format torch_dist, which is read here as it is.",
            found="Megatron checkpoint folder",
        )
    inside = os.path.join(path, ranks[0])
    found = [name for name in _MEGATRON_FILES if os.path.exists(os.path.join(inside, name))]
    if not found:
        raise CheckpointNotFoundError(
            f"The checkpoint has none of {', '.join(_MEGATRON_FILES)} in {inside}. {GET_IT_AGAIN}"
        )
    return replace(open_member(os.path.join(inside, found[0])), path=path)


def _iteration_folder(path: str) -> str:
    text = pointer_text(os.path.join(path, _MEGATRON_POINTER))
    folder = f"iter_{int(text):07d}" if text.isascii() and text.isdigit() and len(text) < 20 else "release"
    if folder == "release" and text != "release":
        raise CorruptCheckpointError(
            f"The checkpoint is a Megatron checkpoint folder, but its {_MEGATRON_POINTER} names {text[:80]!r}, not "
            "an iteration.",
            found="Megatron checkpoint folder",
        )
    if not os.path.isdir(os.path.join(path, folder)):
        raise CheckpointNotFoundError(
            f"The checkpoint's {_MEGATRON_POINTER} names the iteration {text}, but there is no folder {folder}. Copy "
            "it, or give another one."
        )
    if os.path.exists(os.path.join(path, folder, _MEGATRON_POINTER)):
        raise CorruptCheckpointError(f"The checkpoint's {_MEGATRON_POINTER} leads to a folder with another such file.")
    return os.path.join(path, folder)


def is_single_part(names: Iterable[str]) -> bool:
    """Whether the model lies in a folder of its own inside this one, as accelerate saves it under FSDP."""
    return any(map(_PART_FOLDER.fullmatch, names))


def open_part(path: str, open_member: OpenFile) -> Checkpoint:
    """Open the model's own folder inside a folder of training states.

    Raises:
        AmbiguousCheckpointError: There are several models.
    """
    parts = sorted(filter(_PART_FOLDER.fullmatch, os.listdir(path)))
    if len(parts) > 1:
        raise AmbiguousCheckpointError(
            f"The checkpoint holds {len(parts)} models: {listed(parts)}. Give the path of the one you mean, such as "
            f"{os.path.join(path, parts[0])}.",
            candidates=[os.path.join(path, part) for part in parts],
            argument="path",
        )
    if is_single_part(os.listdir(os.path.join(path, parts[0]))):
        raise CorruptCheckpointError("The checkpoint is a folder of models inside a folder of models.")
    return replace(open_member(os.path.join(path, parts[0])), path=path)
