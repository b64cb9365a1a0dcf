"""What lies beside the weights in the folder of a training run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torchload.core.checkpoint import Checkpoint, Container
from torchload.core.ranks import Ranks
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats import open_checkpoint
from torchload.training.state import COMPANIONS, RANDOM_STATE, RANDOM_STATES

__all__ = ["lies_beside", "training_tree"]

_MAX_JSON_BYTES = 256 << 20


def training_tree(checkpoint: Checkpoint, path: Any, stack: ExitStack) -> Any:
    """Where the training state is: in the file itself, or in what lies beside the weights in a folder.

    Args:
        checkpoint: The weights, opened.
        path: What they were opened by.
        stack: Closes what is opened here.
    """
    folder = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not os.path.isdir(folder):
        return checkpoint.root
    beside: dict[str, Any] = {}
    for what in COMPANIONS:
        if name := _companion(folder, what):
            states = [_open_beside(each, what, stack) for each in _numbered(os.path.join(folder, name))]
            beside[what] = states[0] if len(states) == 1 else states
    ranks = Ranks(together=True)
    for pattern in RANDOM_STATES if ranks.count > 1 else (*RANDOM_STATES, RANDOM_STATE):
        file = os.path.join(folder, pattern.format(rank=ranks.rank))
        if os.path.isfile(file):
            beside["random"] = _open_beside(file, "random", stack)
            break
    return Container(beside) if beside else checkpoint.root


def lies_beside(path: Any, what: str) -> str | None:
    """What to do about a part that was not found, where it seems to lie beside the weights; else ``None``.

    Args:
        path: What the weights were opened by.
        what: Which part: ``"optimizer"``, ``"scheduler"``, ``"scaler"``.
    """
    if not isinstance(path, (str, os.PathLike)):
        return None
    here = os.path.realpath(path)
    folder = os.path.dirname(here)
    if (name := _companion(folder, what)) and os.path.basename(here) != name:
        with suppress(TorchLoadError, OSError), open_checkpoint(folder) as whole:
            if all(os.path.realpath(source.name).startswith(here) for source in whole.sources):  # the same weights
                return f"{name} lies beside it, so give the folder: {folder}"
    if os.path.isdir(here):
        names = sorted(name for name in os.listdir(here) if what[:5] in name.lower())
        if names:
            return f"{', '.join(names[:3])} in the folder may hold it, in a form that isn't read here"
    return None


def _companion(folder: str, what: str) -> str | None:
    """The name under which a part lies in a folder."""
    return next((name for name in COMPANIONS.get(what, ()) if os.path.exists(os.path.join(folder, name))), None)


def _numbered(path: str) -> Iterator[str]:
    """A file or folder and those that follow: accelerate writes optimizer.bin, optimizer_1.bin; optimizer_0, _1."""
    stem, suffix = os.path.splitext(path)
    stem = stem.removesuffix("_0")
    number = 0
    while os.path.exists(path):
        yield path
        number += 1
        path = f"{stem}_{number}{suffix}"


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
