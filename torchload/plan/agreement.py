"""Whether ranks that want to read together mean the same: the same bytes of the same file, for the same places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from torchload.core.checkpoint import Extent
from torchload.core.source import Source
from torchload.core.text import plural
from torchload.errors import IncompatibleCheckpointError
from torchload.model.shards import local_region
from torchload.plan.plan import LoadPlan
from torchload.transfer import Replicas

__all__ = ["agree_on"]


def agree_on(plan: LoadPlan, replicas: Replicas, path: str) -> None:
    """Go on only if all ranks have planned the same load.

    Raises:
        IncompatibleCheckpointError: They read different files, or nothing tells whether they do; or they hold different
            parts of the model, or load it in different ways.
        BaseException: What another rank raised before it came here.
    """
    if replicas.count == 1:
        return
    kinds = {item.device.type for item in plan.assignments}
    answers = replicas.meet((path, _files(plan), _digest(plan), kinds))
    names = [replicas.global_rank(rank) for rank in range(replicas.count)]
    _compare_plans(answers, names)
    _compare_files(answers, names)
    replicas.send_from(set().union(*(kinds for *_, kinds in answers)))


def _files(plan: LoadPlan) -> list[tuple[str, Any]]:
    """What tells the files that data comes from apart from others, on any machine, and where in them it lies."""
    files: dict[Source, tuple[int, list[Extent]]] = {}
    places: list[object] = []
    for entry in (*(item.entry for item in plan.assignments), *plan.given):
        for box in entry.boxes:
            number, extents = files.setdefault(box.extent.source, (len(files), []))
            extents.append(box.extent)
            places.append((number, box.extent.offset + box.start, box.shape, box.strides, box.origin, entry.dtype))
    return [*(_identity(source, extents) for source, (_, extents) in files.items()), ("places", _sum(places))]


def _identity(source: Source, extents: Sequence[Extent]) -> tuple[str, Any]:
    """What tells a file from others: its checksums, or else its size and when it was last changed."""
    if all(extent.crc32 is not None for extent in extents if extent.nbytes):
        return "checksums", _sum((extent.offset, extent.nbytes, extent.crc32) for extent in extents)
    identity = getattr(source, "identity", None)
    return ("nothing", None) if identity is None else ("size and time", identity[2:])


def _digest(plan: LoadPlan) -> bytes:
    """All that decides where bytes go, and whether ranks send them to each other, in short."""
    return _sum(
        [
            (plan.verify, len(plan.given)),
            *(
                (item.name, item.dtype, item.way.name, item.slot.shape and local_region(item.slot.tensor)[1])
                for item in plan.assignments
            ),
        ]
    )


def _sum(values: Iterable[object]) -> bytes:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.digest()


def _compare_files(answers: Sequence[Any], names: Sequence[int]) -> None:
    known = [files for _, files, _, _ in answers]
    if any(kind == "nothing" for files in known for kind, _ in files):
        raise IncompatibleCheckpointError(
            "The checkpoint is no file on a disk, and records no checksums: nothing tells whether all ranks of "
            "process_group= read the same. Give the file's path, or load without process_group=."
        )
    other = next((rank for rank, files in enumerate(known) if files != known[0]), None)
    if other is not None:
        raise IncompatibleCheckpointError(
            f"The ranks of process_group= don't read the same file: {_described(answers[0], names[0])}, "
            f"{_described(answers[other], names[other])}. Give all of them the same file (a copy that keeps its time, "
            "as cp -p makes it, counts as the same), or load without process_group=."
        )


def _described(answer: Any, rank: int) -> str:
    path, files, _, _ = answer
    details = [
        f"{size:,} bytes of {datetime.fromtimestamp(changed / 1e9, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
        for kind, (size, changed) in (file for file in files if file[0] == "size and time")
    ]
    more = f" and {plural(len(details) - 1, 'more file')}" if len(details) > 1 else ""
    return f"rank {rank} has {path}" + (f" ({details[0]}{more})" if details else " (by its checksums)")


def _compare_plans(answers: Sequence[Any], names: Sequence[int]) -> None:
    digests = [digest for _, _, digest, _ in answers]
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise IncompatibleCheckpointError(
            f"Ranks {names[0]} and {names[other]} of process_group= load different tensors, different parts of them, "
            "into different dtypes, in another order, or in another way (device=, atomic=, verify=): only replicas can "
            "read together. Of a sharded model, those are the ranks of the mesh dimension that replicates: "
            'process_group=mesh.get_group("replicate"); without process_group= each rank reads just its own part.'
        )
