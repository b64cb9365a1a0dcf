"""Replicas read together: each rank takes its share of the bytes from the file, and the others' from the others.

The network between ranks is faster than the storage that they share, as a rule, and each byte leaves that once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from torchload.core.copies import Copy
from torchload.core.ranks import Ranks
from torchload.core.source import Source
from torchload.transfer.engine import Progress, note_writes, run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Replicas", "read_together", "shares"]

_EXCHANGED_BYTES = 64 << 20
"""All ranks together send so much at a time: each holds as much of scratch memory, and `_SMALL_BYTES` for each rank."""
_SMALL_BYTES = 64 << 10
"""Less than this isn't cut."""
_ALIGNMENT_BYTES = 16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Replicas:
    """The ranks that load the same tensors; this process alone, where there is no group.

    They meet at fixed points of a load. A rank that fails in between says so where the others meet next, and all raise
    what it raised: so nobody waits for a rank that has left. As a context manager it is entered before anything that
    may fail.

    Attributes:
        count: How many ranks there are.
        rank: Which of them this is.
        device: Where data must be to be sent.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None:
            _check(group)
        self._ranks = Ranks(together=group is not None, group=group)
        self.count, self.rank = self._ranks.count, self._ranks.rank
        self.device = torch.device("cpu")
        self._is_over = self.count == 1

    def meet(self, said: Any = None, *, error: BaseException | None = None, last: bool = False) -> list[Any]:
        """Go on when all ranks are here, and none has failed.

        Args:
            said: What this rank has to say; small.
            error: What happened to it.
            last: Whether this rank needs nobody from here on.

        Returns:
            What each rank has said.

        Raises:
            BaseException: What a rank raised.
            TorchLoadError: A rank isn't there any more.
        """
        try:
            answers = self._ranks.gather(error, said)
        except BaseException:
            self._is_over = True
            raise
        self._is_over |= last
        return answers

    def global_rank(self, rank: int) -> int:
        """What a rank of the group is among all ranks."""
        return self._ranks.global_rank(rank)

    def send_from(self, kinds: set[str]) -> None:
        """Choose where data is sent from, knowing on which kinds of devices it is on any rank."""
        group = self._ranks.group
        supported = [device.type for device in group._device_types]
        kind = _kind_to_send_from(kinds, supported, torch.distributed.get_backend(group))
        module: Any = getattr(torch, kind, None)
        index = module.current_device() if kind != "cpu" and hasattr(module, "current_device") else None
        self.device = torch.device(kind) if index is None else torch.device(kind, index)

    def exchange(self, everyones: list[torch.Tensor], mine: torch.Tensor) -> None:
        """Send `mine`, and receive what every rank sends; raises a TorchLoadError if one isn't there any more."""
        try:
            self._ranks.exchange(everyones, mine)
        except BaseException:
            self._is_over = True
            raise

    def __enter__(self) -> Replicas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._is_over:
            with contextlib.suppress(BaseException):  # it is on its way already
                self.meet(error=error)


def _kind_to_send_from(kinds: set[str], supported: Sequence[str], backend: str) -> str:
    """Where data is sent from: where it is, if the group can send from there without help of the host.

    Example:
        >>> _kind_to_send_from({"cuda"}, ["cuda"], "nccl"), _kind_to_send_from({"cuda"}, ["cpu", "cuda"], "gloo")
        ('cuda', 'cpu')
        >>> _kind_to_send_from({"cuda", "cpu"}, ["cpu", "cuda"], "cpu:gloo,cuda:nccl")
        'cpu'
    """
    if len(kinds) == 1 and kinds <= set(supported) and backend != "gloo":
        return next(iter(kinds))
    return "cpu" if "cpu" in supported else supported[0]


def _check(group: Any) -> None:
    distributed: Any = torch.distributed
    if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not one of process_group=: only its members call smart_load with it")
    if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise TypeError(
            "process_group is a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD, not "
            f"{type(group).__name__}"
        )


def read_together(
    replicas: Replicas,
    copies: Sequence[Copy],
    *,
    check: bool = False,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> int:
    """Carry out copies that are the same on every rank; like `run`, which does all of it where data is to be checked.

    Returns:
        Number of bytes that this rank read.

    Raises:
        BaseException: As `run` does, on any of the ranks.
    """
    if check or replicas.count == 1 or not copies:
        return run(copies, check=check, progress=progress, notes=notes)
    with torch.inference_mode():
        parts = shares(copies, replicas.count)
    own = parts[replicas.rank]
    total = sum(map(_file_bytes, copies))
    read_bytes = run(own, progress=_within(progress, 0, total), notes=notes)
    written = own
    try:
        replicas.meet()
        written = list(copies)
        with torch.inference_mode():
            failure = _exchange(replicas, parts, _within(progress, sum(map(_file_bytes, own)), total))
        replicas.meet(error=failure)
    except BaseException as error:
        error.written = tuple(dict.fromkeys(copy.name for copy in written))  # type: ignore[attr-defined]
        raise
    note_writes(copies)
    if notes is not None and (note := f"{replicas.count} ranks read together, each its share") not in notes:
        notes.append(note)
    return read_bytes


def shares(copies: Sequence[Copy], count: int) -> list[list[Copy]]:
    """Deal copies out among ranks: to each a stretch of the file, all of about the same size.

    The same copies give the same shares on every rank. Tensors are cut where a share ends.
    """
    order: dict[Source, int] = {}
    some = [copy for copy in copies if _file_bytes(copy)]
    for copy in some:
        order.setdefault(copy.box.extent.source, len(order))

    def position(copy: Copy) -> tuple[int, int]:
        return order[copy.box.extent.source], copy.box.extent.offset + copy.box.start

    total = sum(map(_file_bytes, some))
    hands = list(_deal(sorted(some, key=position), _file_bytes, max(1, -(-total // count))))
    return hands + [[] for _ in range(count - len(hands))]


def _within(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part, as that of the whole."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _exchange(replicas: Replicas, parts: Sequence[Sequence[Copy]], progress: Progress | None) -> Exception | None:
    """Send this rank's part, and receive the others', a bounded amount at a time; `progress` hears of those.

    Returns:
        What went wrong here, if anything did: the others, who can't know, are kept company to the end.
    """
    largest = max(sum(map(_sent_bytes, part)) for part in parts)
    limit = min(largest, max(_EXCHANGED_BYTES // replicas.count, _SMALL_BYTES))
    batches = [_deal(part, _sent_bytes, limit) for part in parts]
    done = 0
    failure: Exception | None = None
    width = limit + _SMALL_BYTES
    with torch.inference_mode(False):  # gloo's threads, before torch 2.5, may not write to inference tensors
        mine = torch.empty(width, dtype=torch.uint8, device=replicas.device)
        room = torch.empty(width * replicas.count, dtype=torch.uint8, device=replicas.device)
    for batch in zip_longest(*batches, fillvalue=()):
        used = max(sum(map(_sent_bytes, part)) for part in batch)
        everyones = list(room[: used * replicas.count].view(replicas.count, used).unbind())
        try:
            for copy, place in _places(batch[replicas.rank], mine):
                place.copy_(_bits(copy.target))
        except Exception as error:  # noqa: BLE001 - returned
            failure = failure or error
        replicas.exchange(everyones, mine[:used])
        try:
            for rank, (part, received) in enumerate(zip(batch, everyones, strict=True)):
                for copy, place in _places(part, received) if rank != replicas.rank else ():
                    _bits(copy.target).copy_(place)
                    done += _file_bytes(copy)
            if progress is not None:
                progress(done, done)
        except Exception as error:  # noqa: BLE001 - returned
            failure = failure or error
    return failure


def _places(part: Sequence[Copy], memory: torch.Tensor) -> Iterator[tuple[Copy, torch.Tensor]]:
    """Where in what is sent each tensor lies: in row-major order, one after the other."""
    offset = 0
    for copy in part:
        target = _bits(copy.target)
        yield (
            copy,
            memory[offset : offset + target.numel() * target.element_size()].view(target.dtype).view(target.shape),
        )
        offset += _sent_bytes(copy)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as integers of its width, which no copy changes, where there are such."""
    dtype = _INTEGERS.get(tensor.element_size())
    return tensor if dtype is None or tensor.is_neg() or tensor.is_conj() else tensor.view(dtype)


def _file_bytes(copy: Copy) -> int:
    return math.prod(copy.box.shape) * copy.dtype.itemsize


def _sent_bytes(copy: Copy) -> int:
    """What a tensor takes of what is sent, up to where the next one may begin."""
    return -(-math.prod(copy.box.shape) * copy.target.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _deal(copies: Sequence[Copy], size_of: Callable[[Copy], int], limit: int) -> Iterator[list[Copy]]:
    """Deal copies out in hands of `limit` bytes, or a little more; the last may be smaller."""
    stack = list(reversed(copies))
    hand: list[Copy] = []
    room = limit
    while stack:
        copy = stack.pop()
        size = size_of(copy)
        if size > max(room, _SMALL_BYTES):
            stack.extend(reversed(_halves(copy, room, size)))
            continue
        hand.append(copy)
        room -= size
        if room <= 0:
            yield hand
            hand, room = [], limit
    if hand:
        yield hand


def _halves(copy: Copy, room: int, size: int) -> tuple[Copy, Copy]:
    """A copy in two, of which the first takes about `room` of `size` bytes, or is a single row."""
    box = copy.box
    dimension = next(index for index, count in enumerate(box.shape) if count > 1)
    rows = box.shape[dimension]
    cut = min(max(room * rows // size, 1), rows - 1)
    halves = []
    for first, count in ((0, cut), (cut, rows - cut)):
        part = box.narrow(dimension, first, count, copy.dtype.itemsize)
        halves.append(Copy(copy.name, part, copy.dtype, copy.target.narrow(dimension, first, count)))
    return halves[0], halves[1]
