"""Which checkpoint is in a folder.

Names that libraries agree on come first (`_CONVENTIONS`), then kinds of folders that are one checkpoint as a whole
(`_WHOLE_FOLDERS`), then a numbered set without its index, then the only file that is a checkpoint by its content.
Everything else is an error that lists what is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torchload.core.checkpoint import Checkpoint
from torchload.core.text import listed, printable
from torchload.errors import AmbiguousCheckpointError, CheckpointFormatError, CheckpointNotFoundError
from torchload.formats.locate import UNFINISHED_SUFFIXES
from torchload.formats.sets import rank_files
from torchload.formats.sets.members import OpenMember

__all__ = ["Choice", "choose", "parts_by_name"]

_MAX_ENTRIES = 20_000  # directory entries looked at

# Each row names the same weights, the preferred file first, as transformers, diffusers, peft and open_clip write them.
_CONVENTIONS: tuple[tuple[str, ...], ...] = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.bin.index.json",
    ),
    ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
)

_RUN_OF_ACCELERATE = "random_states_0.pkl"  # where it lies, model_1.safetensors is another model of the same run

# States of training that lie beside the weights and are never meant: accelerate, transformers, DeepSpeed, TensorBoard.
_NOT_WEIGHTS = re.compile(
    r"""(?: (?:optimizer|scheduler|lr_scheduler|scaler|sampler|dl_state_dict)(?:_\d+)?\.(?:bin|pt|pth|safetensors)
        | rng_state(?:_\d+)?\.pth
        | random_states_\d+\.pkl
        | custom_checkpoint_\d+\.pkl
        | training_args\.bin
        | .*_optim_states\.pt
        | events\.out\.tfevents\..*
    )""",
    re.VERBOSE,
)

# Never opened to look for weights: text and other things that lie beside models.
_TEXT_SUFFIX = re.compile(
    r"\.(?:cfg|csv|html|ipynb|jinja|jpe?g|jsonl?|log|md|png|py|sh|toml|tsv|txt|ya?ml)", re.IGNORECASE
)

# model-00001-of-00004.safetensors, shard-00000-model-00001-of-00002.safetensors
_NUMBERED = re.compile(r"(?:shard-\d+-)?(?P<stem>.*?)(?P<number>\d{2,6})-of-(?P<total>\d{2,6})(?P<suffix>\..+)")


_MOST_OPENED = 20  # files that are opened to see whether they hold weights


Opener = Callable[[str, OpenMember], Checkpoint]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to open of a folder.

    Attributes:
        files: Paths; several are the shards of one checkpoint.
        notes: Sentences about why, and what was left aside.
        opener: Where the folder is one checkpoint as a whole, what opens it: called with its path and a function that
            opens a file or a folder inside.
    """

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    opener: Opener | None = None


@dataclass(frozen=True, slots=True)
class _WholeFolder:
    """A kind of folder that is one checkpoint: how its names tell, and what opens it or what to do instead."""

    found: str
    recognizes: Callable[[frozenset[str]], bool]
    advice: str = ""
    opener: Opener | None = None


def _any_match(pattern: str) -> Callable[[frozenset[str]], bool]:
    return lambda names: any(re.fullmatch(pattern, name) for name in names)


def _open_distributed(path: str, open_member: OpenMember) -> Checkpoint:
    from torchload.formats.sets import distributed

    return distributed.open_folder(path, open_member)


def _open_deepspeed(path: str, open_member: OpenMember) -> Checkpoint:
    from torchload.formats.sets import deepspeed

    return deepspeed.open_folder(path, open_member)


_CONVERT = "Its weights belong to another framework; convert the model to PyTorch first."

_WHOLE_FOLDERS: tuple[_WholeFolder, ...] = (
    _WholeFolder(
        "torch.distributed.checkpoint folder",
        _any_match(r"(?:__\d+)?\.metadata|__\d+_\d+\.distcp"),
        opener=_open_distributed,
    ),
    _WholeFolder(
        "DeepSpeed universal checkpoint",
        lambda names: bool(
            ("zero" in names and _any_match(r"mp_rank_\d+_model_states\.pt")(names))
            or ("latest_universal" in names and not _any_match(r"global_step\d+")(names))
        ),
        "DeepSpeed's ds_to_universal.py made it from a folder global_stepN: give that one, or go on with DeepSpeed "
        "itself and load_universal_checkpoint.",
    ),
    _WholeFolder(
        "DeepSpeed checkpoint folder",
        lambda names: bool(
            ("latest" in names and _any_match(r"global_step\d+|zero_to_fp32\.py|checkpoint")(names))
            or _any_match(r"(?:bf16_)?(?:zero_pp_rank_\d+_)?mp_rank_\d+_(?:model|optim)_states\.pt")(names)
        ),
        opener=_open_deepspeed,
    ),
    _WholeFolder("Megatron checkpoint folder", rank_files.is_megatron, opener=rank_files.open_megatron),
    _WholeFolder("folder of an FSDP training state", rank_files.is_single_part, opener=rank_files.open_part),
    _WholeFolder("set of rank files", rank_files.is_rank_set, opener=rank_files.open_rank_set),
    _WholeFolder(
        "torchsnapshot folder",
        lambda names: ".snapshot_metadata" in names,
        "Restore it with torchsnapshot.Snapshot(path).restore(...) where it was made, and save the model's state dict "
        "with torch.save.",
    ),
    _WholeFolder(
        "zip checkpoint that was unpacked",
        lambda names: "data.pkl" in names and bool({"data", "version", "byteorder"} & names),
        "Pack it again without compression: in the folder above, run 'zip -0 -r model.pth' with the folder's name.",
    ),
    _WholeFolder(
        "TensorFlow SavedModel",
        lambda names: bool({"saved_model.pb", "saved_model.pbtxt"} & names),
        _CONVERT,
    ),
    _WholeFolder(
        "TensorFlow checkpoint",
        lambda names: "checkpoint" in names and _any_match(r".+\.index")(names),
        _CONVERT,
    ),
    _WholeFolder(
        "Orbax (JAX) checkpoint",
        lambda names: bool({"_CHECKPOINT_METADATA", "manifest.ocdbt"} & names),
        _CONVERT,
    ),
)


def choose(path: str, is_checkpoint: Callable[[str], bool], holds_weights: Callable[[str], bool]) -> Choice:
    """Pick the file, or the files, that are a folder's checkpoint by their content; of several, those with weights.

    Raises:
        CheckpointNotFoundError: There is none; the message says what is there.
        CheckpointFormatError: The folder as a whole is a checkpoint of a kind that isn't read here.
        AmbiguousCheckpointError: There are several.
    """
    files, folders = _entries(path)
    if choice := _conventional(path, files):
        return choice
    names = frozenset(files | folders)
    for kind in _WHOLE_FOLDERS:
        if not kind.recognizes(names):
            continue
        if kind.opener is not None:
            return Choice((), opener=kind.opener)
        raise CheckpointFormatError(
            f"The checkpoint is a {kind.found}, which is not read here. {kind.advice}", found=kind.found
        )
    indexes = sorted(name for name in files if re.fullmatch(r".+\.index(?:\.\w+)?\.json", name))
    if indexes:
        return _only(path, [(name,) for name in indexes])
    candidates = sorted(
        name
        for name in files
        if not _NOT_WEIGHTS.fullmatch(name)
        and not _TEXT_SUFFIX.fullmatch(os.path.splitext(name)[1])
        and not name.endswith(UNFINISHED_SUFFIXES)
    )
    found = [name for name in candidates if is_checkpoint(os.path.join(path, name))]
    if not found:
        raise CheckpointNotFoundError(_nothing_found(path, files, folders))
    groups = _one_per_model(found)
    if 1 < len(groups) <= _MOST_OPENED:
        groups = [group for group in groups if len(group) > 1 or holds_weights(os.path.join(path, group[0]))] or groups
    return _only(path, groups)


def _entries(path: str) -> tuple[set[str], set[str]]:
    files: set[str] = set()
    folders: set[str] = set()
    with os.scandir(path) as entries:
        for entry, _ in zip(entries, range(_MAX_ENTRIES)):
            (folders if _is_folder(entry) else files).add(entry.name)
    return files, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself, or to where nobody may look
        return False


def _conventional(path: str, files: set[str]) -> Choice | None:
    rows = [[name for name in row if name in files] for row in _CONVENTIONS]
    rows = [row for row in rows if row]
    if not rows:
        return None
    if len(rows) > 1:
        raise _ambiguous(path, [(row[0],) for row in rows])
    (taken, *others), *_ = rows
    if _RUN_OF_ACCELERATE in files:
        stem, suffix = map(re.escape, os.path.splitext(taken))
        if more := sorted(name for name in files if re.fullmatch(rf"{stem}_\d+{suffix}", name)):
            raise _ambiguous(path, [(taken,), *((name,) for name in more)])
    notes = [f"took {taken} of the folder"]
    if others:
        notes.append(f"left aside {', '.join(others)}: the same weights in another form")
    return Choice((os.path.join(path, taken),), tuple(notes))


def _one_per_model(names: list[str]) -> list[tuple[str, ...]]:
    """Groups what belongs together: the files of a numbered set, and one model in two formats (safetensors is kept)."""
    numbered: dict[tuple[str, str, str], list[str]] = {}
    single: dict[str, list[str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            numbered.setdefault((match["stem"], match["total"], match["suffix"]), []).append(name)
        else:
            single.setdefault(os.path.splitext(name)[0], []).append(name)
    groups = []
    for (stem, total, suffix), members in numbered.items():
        _check_complete(f"{stem}NNN-of-{total}{suffix}", int(total), members)
        groups.append(tuple(members))
    for members in single.values():
        preferred = [name for name in members if name.endswith(".safetensors")]
        groups.extend((name,) for name in preferred[:1] or members)
    return groups


def parts_by_name(name: str, beside: Collection[str] = ()) -> list[str]:
    """The names of all files of a numbered set that a file belongs to by its name; some begin at zero.

    Example:
        >>> parts_by_name("model-00001-of-00002.bin"), parts_by_name("model.bin")
        (['model-00001-of-00002.bin', 'model-00002-of-00002.bin'], [])
    """
    match = _NUMBERED.fullmatch(name)
    if match is None or int(match["total"]) > _MAX_ENTRIES:
        return []
    begin, end = match.span("number")
    names = [f"{name[:begin]}{number:0{end - begin}}{name[end:]}" for number in range(int(match["total"]) + 1)]
    return names[:-1] if names[0] in (name, *beside) else names[1:]


def _check_complete(pattern: str, total: int, members: list[str]) -> None:
    present = {int(match["number"]) for name in members if (match := _NUMBERED.fullmatch(name))}
    first = 0 if 0 in present else 1
    missing = total - len(present & set(range(first, first + min(total, _MAX_ENTRIES))))
    if missing > 0:
        raise CheckpointNotFoundError(
            f"{missing} of {total} shards are missing: of {pattern} only {len(present)} "
            f"{'is' if len(present) == 1 else 'are'} there. Download the rest into the same folder."
        )


def _only(path: str, groups: list[tuple[str, ...]]) -> Choice:
    if len(groups) > 1:
        raise _ambiguous(path, groups)
    (group,) = groups
    note = f"took {group[0]} of the folder" if len(group) == 1 else f"took {len(group)} shards without an index"
    return Choice(tuple(os.path.join(path, name) for name in group), (note,))


def _ambiguous(path: str, groups: list[tuple[str, ...]]) -> AmbiguousCheckpointError:
    names = [printable(group[0]) + (f" (and {len(group) - 1} more shards)" if group[1:] else "") for group in groups]
    return AmbiguousCheckpointError(
        f"The checkpoint holds {len(groups)} checkpoints: {listed(names, 12)}. Give the path of the one you mean, such "
        f"as {printable(os.path.join(path, groups[0][0]), None)}.",
        candidates=[os.path.join(path, group[0]) for group in groups],
        argument="path",
    )


def _nothing_found(path: str, files: set[str], folders: set[str]) -> str:
    if not files and not folders:
        return "The checkpoint is an empty folder."
    if "snapshots" in folders:
        revisions = [
            os.path.join(path, "snapshots", name) for name in sorted(os.listdir(os.path.join(path, "snapshots")))
        ]
        return (
            f"The checkpoint is a download cache; the models are one level down: {listed(revisions, 4) or 'none yet'}."
        )
    unfinished = sorted(name for name in files if name.endswith(UNFINISHED_SUFFIXES))
    if unfinished:
        return f"The checkpoint holds no complete checkpoint: the download of {unfinished[0]} has not finished."
    parts = []
    states = sorted(name for name in files if _NOT_WEIGHTS.fullmatch(name))
    others = sorted(files - set(states))
    if others:
        parts.append("the files " + listed(others))
    if states:
        parts.append(f"training states ({listed(states)}), which are not weights")
    if folders:
        parts.append("the folders " + listed(sorted(folders)))
    advice = " Give the path of the folder that holds the weights." if folders else ""
    return f"The checkpoint holds no checkpoint, only {' and '.join(parts)}.{advice}"
