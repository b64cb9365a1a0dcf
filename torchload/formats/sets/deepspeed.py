"""DeepSpeed folders: the weights of ZeRO 0 to 2 lie in one file, those of ZeRO 3 flat and cut up among all ranks.

``<run>/latest`` names the step's folder. In it, ``mp_rank_00_model_states.pt`` holds the module; under ZeRO 3 each rank
has a file of that kind, in which parameters are empty, and the values are in the optimizer's files, flat and cut up.
Under ZeRO 1 and 2 the optimizer's files hold the float32 originals of the module's weights in a similar way; they
become a container of their own, ``master_fp32``. The optimizer's state is cut up as the weights are, and becomes what
`torch.optim` would have saved, by the names of the parameters.

Source of the layout: what DeepSpeed 0.5 to 0.19 write, and what the ``zero_to_fp32.py`` beside their files does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torchload.core.checkpoint import Checkpoint, Container, TensorEntry
from torchload.core.text import listed, plural
from torchload.errors import (
    GET_IT_AGAIN,
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    TorchLoadError,
)
from torchload.formats.locate import path_inside, pointer_text
from torchload.formats.sets.members import Members, OpenFile
from torchload.formats.sets.zero import ContradictionError, Zero

__all__ = ["MASTER_KEY", "open_folder"]

MASTER_KEY = "master_fp32"

_MODEL_FILE = re.compile(r"mp_rank_(?P<part>\d+)_model_states\.pt")
_RANK_MODEL_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")
_EXPERT_FILE = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_(?:model|optim)_states\.pt")
_LAYER_FILE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")


def open_folder(path: str, open_member: OpenFile) -> Checkpoint:
    """Index a DeepSpeed checkpoint: the folder that was given to ``save_checkpoint``, or one step's inside it.

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
    _refuse_model_parallel(names)
    optimizer_files = _by_rank(names, _OPTIMIZER_FILE)
    rank_files = _by_rank(names, _RANK_MODEL_FILE)
    plain = [name for name in names if _MODEL_FILE.fullmatch(name)]
    if not plain and not rank_files:
        raise CheckpointNotFoundError(
            f"The checkpoint has no model states in {step}, only {listed(sorted(names)) or 'nothing'}. {GET_IT_AGAIN}"
        )
    with Members(open_member) as members:
        ranks = _Ranks(path, step, members)
        if plain:
            return ranks.gathered(plain[0], optimizer_files)
        return ranks.partitioned(rank_files, optimizer_files)


class _Ranks:
    """The files of one step, as they are opened."""

    def __init__(self, path: str, step: str, members: Members) -> None:
        self.path = path
        self.step = step
        self.members = members

    def gathered(self, model_file: str, optimizer_files: Mapping[int, str]) -> Checkpoint:
        """ZeRO 0, 1 and 2: every rank had the whole module."""
        root = self.open(model_file)
        module = self.container(root, "module")
        notes: list[str] = []
        if optimizer_files:
            try:
                masters = root[MASTER_KEY] = self.consolidated([root], optimizer_files, module, notes)
                weights = [name for name in masters if isinstance(module.get(name), TensorEntry)]
                if any(module[name].dtype is not masters[name].dtype for name in weights):
                    notes.append(f"float32 originals of the weights are in the optimizer's files: key={MASTER_KEY!r}")
            except TorchLoadError as error:  # the module itself is there, whatever these files are
                self.members.close(1)
                notes.append(f"the optimizer's float32 weights and state can't be used: {error}")
        return self.checkpoint(root, notes)

    def partitioned(self, model_files: Mapping[int, str], optimizer_files: Mapping[int, str]) -> Checkpoint:
        """ZeRO 3: every rank has a part of each parameter, in the files of its optimizer."""
        if not optimizer_files:
            raise CheckpointNotFoundError(
                "The checkpoint lacks its *_optim_states.pt files. Under ZeRO 3 the weights are in them, and the model "
                f"states hold empty placeholders. Copy them into {self.step}."
            )
        own, *others = self.complete(model_files)
        root = self.open(own)
        module = self.container(root, "module")
        models = [root]
        if root.get("frozen_param_shapes"):  # the only values that lie in the others
            models += [self.open(name) for name in others]
        notes = [f"put together from the float32 parts of {len(optimizer_files)} ranks"]
        root["module"] = self.consolidated(models, optimizer_files, module, notes)
        return self.checkpoint(root, notes)

    def consolidated(
        self, models: Sequence[Any], optimizer_files: Mapping[int, str], module: Container, notes: list[str]
    ) -> Container:
        """The module's state dict with its parameters as the optimizer's files hold them.

        What `torch.optim` would have saved becomes the first model states' ``optimizer``, unless they have one or it is
        of no known form.
        """
        files = [self.open(name) for name in self.complete(optimizer_files)]
        states = [self.container(file, "optimizer_state_dict") for file in files]
        self.check_count(states)
        try:
            zero = Zero(models[0].get("param_shapes"), states)
            found = {**zero.weights(), **zero.frozen(models)}
        except ContradictionError as contradiction:
            self.refuse(str(contradiction))
        if models[0].get("optimizer") is None:
            try:
                models[0]["optimizer"] = zero.optimizer()
            except ContradictionError as contradiction:
                notes.append(f"the optimizer's state can't be put together: {contradiction}")
        self.add_rest(models[0], module, found)
        ordered = {name: found.pop(name) for name in module if name in found}
        return Container({**ordered, **found}, metadata=module.metadata)

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

    def check_count(self, states: Sequence[Any]) -> None:
        count = states[0].get("partition_count")
        counts = count if isinstance(count, list) else [count]
        expected = max((number for number in counts if type(number) is int), default=len(states))
        if expected != len(states):
            raise CheckpointNotFoundError(
                f"The checkpoint was saved by {expected} ranks, and the optimizer's files of {len(states)} are there. "
                f"Copy the others into {self.step}."
            )

    def complete(self, files: Mapping[int, str]) -> list[str]:
        """The files in the order of their ranks, of which none may be missing."""
        missing = sorted(set(range(max(files) + 1)) - files.keys()) if max(files) < 1 << 20 else [-1]
        if missing:
            name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{missing[0]}", next(iter(files.values())))
            more = f" and those of {len(missing) - 1} more ranks" if len(missing) > 1 else ""
            raise CheckpointNotFoundError(f"The checkpoint lacks {name}{more}. Copy them into {self.step}.")
        return [files[rank] for rank in sorted(files)]

    def container(self, tree: Any, key: str) -> Container:
        value = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(value, Container):
            self.refuse(f"one of its files has no {key!r}")
        return value

    def refuse(self, problem: str) -> NoReturn:
        raise CorruptCheckpointError(
            f"The checkpoint can't be put together: {problem}. If its training was not interrupted while it saved, run "
            f"'python zero_to_fp32.py . output' in {self.path} (DeepSpeed puts the script there) and load 'output'."
        )

    # --- files ---

    def open(self, name: str) -> Container:
        """Open one file of the step; it must hold a mapping."""
        root = self.members.open(os.path.join(self.step, name)).root
        if not isinstance(root, Container):
            self.refuse(f"{name} holds no mapping")
        return root

    def checkpoint(self, root: Container, notes: Sequence[str]) -> Checkpoint:
        return self.members.joined(
            self.path, f"DeepSpeed folder ({plural(len(self.members.opened), 'file')})", root, notes
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
                f"The checkpoint's 'latest' names {pointer!r}, which is not there. Copy that folder, or give the "
                "path of another step."
            )
        return step
    steps = sorted(name for name in names if re.fullmatch(r"global_step\d+", name))
    if len(steps) > 1:
        raise AmbiguousCheckpointError(
            f"The checkpoint has {len(steps)} steps and no file 'latest': {listed(steps)}. Give the path of the one "
            f"you mean, such as {os.path.join(path, steps[-1])}.",
            candidates=[os.path.join(path, step) for step in steps],
            argument="path",
        )
    return os.path.join(path, steps[0]) if steps else path


def _refuse_model_parallel(names: Sequence[str]) -> None:
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
        f"The checkpoint was saved {kind}. Only the training code knows how the parts make up the model: gather the "
        "model there and save its state_dict(), or use the converter of the framework that trained it "
        "(Megatron-DeepSpeed: tools/convert_checkpoint/deepspeed_to_transformers.py).",
        found="DeepSpeed folder of a model-parallel run",
    )
