"""Opening: from a path to a `Checkpoint`, the tree of everything a file holds but its tensor data.

What a file is, its bytes decide, never its suffix: `torchload.formats.files` has the table. A folder, an index and a
list of shards come down to single files again. What one ordinary file doesn't need is imported when it is needed.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torchload.core.budget import Budget
from torchload.core.checkpoint import Checkpoint, OpaqueTensor, Record, TensorEntry
from torchload.core.collector import collector_paused
from torchload.core.optimizers import is_optimizer_state
from torchload.core.source import Source
from torchload.errors import AmbiguousCheckpointError, CheckpointNotFoundError, TorchLoadError
from torchload.formats.files import head_of, is_safetensors, is_zip, kind_of, reader
from torchload.formats.locate import folder_around, path_text, source_of_file, source_of_object, status_of

__all__ = ["open_checkpoint"]


_MOST_PARTS = 100  # of a checkpoint without an index that are looked into


def open_checkpoint(path: Any) -> Checkpoint:
    """Open whatever holds weights, without reading them and without running anything it names.

    Args:
        path: A file; a folder that holds a checkpoint; the ``*.index.json`` of a sharded one; a list of shard files;
            a binary file object with ``seek`` and ``read``, which is read from where it stands and left behind what was
            read; or a mapping that is in memory already: a state dict, or a checkpoint's dictionary.

    Raises:
        CheckpointNotFoundError: Nothing is there, or nothing to load in the folder.
        CheckpointFormatError: It is something else; the message says what.
        CorruptCheckpointError: It is truncated, damaged, or made to do harm.
        AmbiguousCheckpointError: The folder holds several checkpoints.
        TypeError: `path` is none of the above.
        OSError: The file can't be read.

    Example:
        >>> import io, torch
        >>> from torchload.formats import open_checkpoint
        >>> file = io.BytesIO()
        >>> torch.save({"weight": torch.zeros(2, 3)}, file)
        >>> file.seek(0)
        0
        >>> with open_checkpoint(file) as checkpoint:
        ...     checkpoint.root["weight"].shape
        (2, 3)
    """
    opening = _Opening()
    with collector_paused():
        if isinstance(path, Mapping):
            from torchload.formats.mapping import open_mapping

            return open_mapping(path)
        if isinstance(path, (list, tuple)):
            from torchload.formats.sets import sharded

            return sharded.open_list([_required_path(part) for part in path], opening.shard)
        text = path_text(path)
        if text is None:
            return opening.object(path)
        if stat.S_ISDIR(status_of(text).st_mode):
            return opening.folder(text)
        return opening.file(text)


class _Opening:
    """The opening of one checkpoint, which may be made of many files.

    Attributes:
        budget: What all of them together may cost.
    """

    __slots__ = ("budget",)

    def __init__(self) -> None:
        self.budget = Budget()

    def object(self, file: Any) -> Checkpoint:
        """Open what follows in a file object, which then stands behind it; where it stood if that fails."""
        source = source_of_object(file)
        position = file.tell()
        try:
            head = head_of(source)
            if is_zip(head):
                source = reader("zip_directory").first_archive(source)
            elif is_safetensors(head):
                source = reader("safetensors").first_file(source)
            checkpoint = self.source(source, source.name)
        except BaseException:
            file.seek(position)
            raise
        file.seek(position + (source.size if checkpoint.end is None else checkpoint.end))
        return checkpoint

    def folder(self, path: str) -> Checkpoint:
        from torchload.formats.sets.members import naming

        with naming(path):
            return self._folder(path)

    def _folder(self, path: str) -> Checkpoint:
        from torchload.formats.sets import folder, sharded

        try:
            choice = folder.choose(path, _is_checkpoint, _holds_weights)
        except AmbiguousCheckpointError as several:
            if not self.are_parts(several.candidates):
                raise
            raise AmbiguousCheckpointError(
                f"{several.message} No name is in two of them: if they are parts of one checkpoint, give the list of "
                "their paths.",
                candidates=several.candidates,
                argument="path",
            ) from None
        except CheckpointNotFoundError as nothing:
            # Files that may hold anything, such as pickles, count where there is nothing else.
            try:
                choice = folder.choose(path, _opens, _holds_weights)
            except CheckpointNotFoundError:
                raise nothing from None
        if choice.opener is not None:
            return choice.opener(path, self)
        if len(choice.files) == 1:
            checkpoint = self.file(choice.files[0])
        else:
            checkpoint = sharded.open_list(list(choice.files), self.shard)
        return replace(checkpoint, path=path, notes=(*choice.notes, *checkpoint.notes))

    def are_parts(self, paths: Sequence[str]) -> bool:
        """Whether files open as one checkpoint, and none has a name that another one has."""
        if len(paths) > _MOST_PARTS:
            return False
        from torchload.formats.sets.members import Members

        members = Members(self.shard)
        try:
            roots = [members.open(path).root for path in paths]
        except (TorchLoadError, PermissionError):
            return False
        finally:
            members.close()
        names = [name for root in roots for name in (root if isinstance(root, dict) else [None] * 2)]
        return len(set(names)) == len(names)

    def __call__(self, path: str) -> Checkpoint:
        """Open a part of a folder: a file, or another folder."""
        return self.folder(path) if stat.S_ISDIR(status_of(path).st_mode) else self.shard(path)

    def file(self, path: str) -> Checkpoint:
        if (folder := folder_around(path)) is not None:
            status_of(path)  # what was named must be there
            return self.folder(folder)
        checkpoint = self.source(source_of_file(path, self.budget), path)
        return replace(checkpoint, whole=partial(_whole_of, path))

    def shard(self, path: str) -> Checkpoint:
        """Open one file of a set, which can't be an index of another set."""
        return self.source(source_of_file(path, self.budget), path, index_allowed=False)

    def source(self, source: Source, path: str, *, index_allowed: bool = True) -> Checkpoint:
        """Open a single file, or the set it is the index of; its source is closed when that fails."""
        try:
            head = head_of(source)
            if (kind := kind_of(head)) is not None:
                return kind.open(source, path)
            if index_allowed and head.lstrip()[:1] == b"{":
                from torchload.formats.sets import sharded

                if sharded.recognizes(head) or path.endswith(".index.json"):
                    checkpoint = sharded.open_index(source, path, self.shard)
                    source.close()
                    return checkpoint
            raise reader("foreign").describe(source, head, path)
        except BaseException:
            source.close()
            raise


def _whole_of(path: str) -> str | None:
    """What to give instead of a file that is one part of several, by an index beside it or by its name."""
    from torchload.formats.sets import folder

    around, name = os.path.split(path)
    try:
        beside = sorted(os.listdir(around or "."))
    except OSError:
        return None
    parts, give, index = folder.parts_by_name(name, beside), around or ".", None
    for other in beside:
        if other.endswith(".index.json") and name in (listed := _listed_in(os.path.join(around, other))):
            parts, give = listed, (index := os.path.join(around, other))
    if len(parts) < 2:
        return None
    if missing := set(parts).difference(beside):
        be = "is" if len(missing) == 1 else "are"
        return (
            f"This file is one of {len(parts)} parts, of which {len(missing)} {be} not beside it: download all of them "
            "into one folder, and give that folder."
        )
    if index is None and not _opens_with(give, name):  # a folder that holds other checkpoints as well
        differing = ("?" if len({*column}) > 1 else glob.escape(column[0]) for column in zip(*parts))
        give = os.path.join(glob.escape(around), "".join(differing))
        return f"This file is one of {len(parts)} parts: give glob.glob({give!r})"
    return f"This file is one of {len(parts)} parts: give {give!r}"


def _opens_with(folder: str, name: str) -> bool:
    """Whether a folder opens as a checkpoint that has a file as one of its parts."""
    try:
        with open_checkpoint(folder) as whole:
            return name in {os.path.basename(source.name) for source in whole.sources}
    except (TorchLoadError, OSError):
        return False


def _listed_in(index: str) -> list[str]:
    """The files that an index names; none if it can't be read."""
    from torchload.formats.sets import sharded

    try:
        source = source_of_file(index)
        try:
            return sharded.files_of(source, index)
        finally:
            source.close()
    except (TorchLoadError, OSError):
        return []


def _is_checkpoint(path: str) -> bool:
    """Whether a file is of a format in the table, sound or damaged."""
    try:
        source = source_of_file(path)
    except (TorchLoadError, PermissionError):
        return False
    try:
        kind = kind_of(head_of(source))
        return kind is not None and kind.is_meant(source)
    except (TorchLoadError, PermissionError):
        return False
    finally:
        source.close()


def _opens(path: str) -> bool:
    """Whether a file turns out to hold a checkpoint when it is opened."""
    try:
        _Opening().shard(path).close()
    except (TorchLoadError, PermissionError):
        return False
    return True


def _holds_weights(path: str) -> bool:
    """Whether a file holds anything but an optimizer's state; what can't be opened is not judged."""
    try:
        with _Opening().shard(path) as checkpoint:
            root = checkpoint.root
    except (TorchLoadError, PermissionError):
        return True
    if is_optimizer_state(root) or not isinstance(root, Mapping):
        return not is_optimizer_state(root)
    # {"optimizer": its state, "epoch": 3}
    holders = [
        value for value in root.values() if isinstance(value, (TensorEntry, OpaqueTensor, Record, Mapping, list))
    ]
    return not holders or not all(map(is_optimizer_state, holders))


def _required_path(part: object) -> str:
    text = path_text(part)
    if text is None:
        raise TypeError(f"a list of shards holds paths, not {type(part).__name__}")
    return os.fspath(text)
