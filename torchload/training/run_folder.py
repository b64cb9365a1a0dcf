"""What lies beside the weights in the folder of a training run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import count, takewhile
from typing import Any

from torchload.core.checkpoint import Checkpoint, Container
from torchload.core.ranks import Ranks
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats import open_checkpoint
from torchload.training.state import COMPANIONS, NUMBERED, RANDOM_STATE, RANDOM_STATES, find_training_state

__all__ = ["lies_beside", "training_tree"]

_MAX_JSON_BYTES = 256 << 20

# How accelerate and transformers' Trainer name the weights of a run's models; the first has no number, or 0.
_MODEL_OF_RUN = re.compile(
    r"pytorch_model_fsdp_(\d{1,4})|(?:model|pytorch_model|pytorch_model_fsdp)(?:_(\d{1,4}))?\.(?:safetensors|bin)"
)


def training_tree(checkpoint: Checkpoint, path: Any, stack: ExitStack) -> Any:
    """Where the training state is: in the file itself, or in what lies beside the weights in a folder."""
    folder, number = _run_of(path)
    if number is not None and find_training_state(checkpoint.root).optimizers:
        return checkpoint.root
    beside: dict[str, Any] = {}
    for what in COMPANIONS if folder else ():
        states = [_open_beside(file, what, stack) for file in _files_of(folder, what, number)]
        if states:
            beside[what] = states[0] if len(states) == 1 else states
    ranks = Ranks(together=True)
    for pattern in RANDOM_STATES if ranks.count > 1 else (*RANDOM_STATES, RANDOM_STATE):
        file = os.path.join(folder, pattern.format(rank=ranks.rank))
        if folder and os.path.isfile(file):
            beside["random"] = _open_beside(file, "random", stack)
            break
    return Container(beside) if beside else checkpoint.root


def _run_of(path: Any) -> tuple[str, int | None]:
    """The folder of a run, and which of its models a path means; ``("", None)`` where the path is no run's.

    Example:
        >>> _run_of("run/pytorch_model_fsdp_1"), _run_of("run/model.safetensors"), _run_of("run/epoch_2.pth")
        (('run', 1), ('run', 0), ('', None))
    """
    if not isinstance(path, (str, os.PathLike)):
        return "", None
    folder, name = os.path.split(os.path.normpath(os.fspath(path)))
    if match := _MODEL_OF_RUN.fullmatch(name):
        return folder or ".", int(match[1] or match[2] or 0)
    return (os.fspath(path), None) if os.path.isdir(path) else ("", None)


def lies_beside(path: Any, what: str) -> str | None:
    """What to do about a part that was not found, where it seems to lie beside the weights; else ``None``."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    here = os.path.realpath(path)
    folder = os.path.dirname(here)
    if (name := _companion(folder, what)) and os.path.basename(here) != name:
        with suppress(TorchLoadError, OSError), open_checkpoint(folder) as whole:
            if all(os.path.realpath(source.name).startswith(here) for source in whole.sources):  # the same weights
                return f"{name} lies beside it, so give the folder: {folder}"
        return (
            f"{name} lies beside it, and nothing says whether it belongs to these weights. If it does, open both and "
            f"give them together: smart_resume(model, {{'model': weights, '{what}': state}}, ...)"
        )
    if os.path.isdir(here):
        names = sorted(name for name in os.listdir(here) if what[:5] in name.lower())
        if names:
            return f"{', '.join(names[:3])} in the folder may hold it, in a form that isn't read here"
    return None


def _companion(folder: str, what: str) -> str | None:
    """The name under which a part lies in a folder."""
    return next((name for name in COMPANIONS.get(what, ()) if os.path.exists(os.path.join(folder, name))), None)


def _files_of(folder: str, what: str, number: int | None) -> list[str]:
    """Where a part of one model of a run is, or that of all: optimizer.bin, optimizer_1.bin and so on."""
    if (name := _companion(folder, what)) is None:
        return []
    stem, suffix = os.path.splitext(os.path.join(folder, name))
    stem = stem.removesuffix("_0")
    numbered = (os.path.join(folder, name) if index == 0 else f"{stem}_{index}{suffix}" for index in count())
    files = list(takewhile(os.path.exists, numbered))
    if number is None or what not in NUMBERED:
        return files
    return files[number : number + 1]


def _open_beside(file: str, what: str, stack: ExitStack) -> Any:
    if not file.endswith(".json"):
        root = stack.enter_context(open_checkpoint(file)).root
        # Folders of accelerate have it under its name.
        return root[what] if isinstance(root, Mapping) and root.keys() == {what} else root
    if os.path.getsize(file) > _MAX_JSON_BYTES:
        raise CorruptCheckpointError(f"{file} is far too large for what it should hold.", path=file)
    try:
        with open(file, encoding="utf-8") as text:
            return json.load(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{file} is no valid JSON: {error}.", path=file) from error
