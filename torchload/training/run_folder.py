"""The files that lie beside the weights in the folder of a training run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torchload.core.checkpoint import Checkpoint, Container
from torchload.core.ranks import Ranks
from torchload.errors import CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.training.state import COMPANIONS, RANDOM_STATE, RANDOM_STATES

__all__ = ["training_tree"]

_MAX_JSON_BYTES = 256 << 20


def training_tree(checkpoint: Checkpoint, path: Any, stack: ExitStack) -> Any:
    """Where the training state is: in the file itself, or in the files beside the weights of a folder.

    Args:
        checkpoint: The weights, opened.
        path: What they were opened by.
        stack: Closes the files that are opened here.
    """
    folder = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not os.path.isdir(folder):
        return checkpoint.root
    beside: dict[str, Any] = {}
    for what, names in COMPANIONS.items():
        name = next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)
        if name is not None:
            states = [_open_beside(file, stack) for file in _numbered(os.path.join(folder, name))]
            beside[what] = states[0] if len(states) == 1 else states
    ranks = Ranks(together=True)
    for pattern in RANDOM_STATES if ranks.count > 1 else (*RANDOM_STATES, RANDOM_STATE):
        file = os.path.join(folder, pattern.format(rank=ranks.rank))
        if os.path.isfile(file):
            beside["random"] = _open_beside(file, stack)
            break
    return Container(beside) if beside else checkpoint.root


def _numbered(file: str) -> Iterator[str]:
    """A file and those that follow it: accelerate writes optimizer.bin, optimizer_1.bin and so on."""
    stem, suffix = os.path.splitext(file)
    number = 0
    while os.path.isfile(file):
        yield file
        number += 1
        file = f"{stem}_{number}{suffix}"


def _open_beside(file: str, stack: ExitStack) -> Any:
    if not file.endswith(".json"):
        return stack.enter_context(open_checkpoint(file)).root
    if os.path.getsize(file) > _MAX_JSON_BYTES:
        raise CorruptCheckpointError(f"{file} is far too large for what it should hold.", path=file)
    try:
        with open(file, encoding="utf-8") as text:
            return json.load(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{file} is no valid JSON: {error}.", path=file) from error
