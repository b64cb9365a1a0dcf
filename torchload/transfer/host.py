"""Jobs on the host: read straight into place, or through scratch memory that stays in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from torchload.transfer.arena import allocate
from torchload.transfer.lease import LeasedFile
from torchload.transfer.memory import cached_bytes, memory_at, move, move_much
from torchload.transfer.overflow import SQUARABLE, OverflowFoundError, limit_of, overflows, surely_fit
from torchload.transfer.pieces import CAST, GAP_BYTES, RAW, STAGED_BYTES, Job, Piece, needs_swap
from torchload.transfer.reader import Reader

if TYPE_CHECKING:
    from torchload.transfer.checksums import Arrivals

__all__ = ["HostWorker", "decode"]

_PACKED_BYTES = 1 << 20
"""Small casts are packed together up to this size, on either side."""
_PACKABLE_BYTES = 64 << 10
_LENT_BYTES = 256 << 10
"""From this size on pages are read where they lie."""
_MUCH_BYTES = 64 << 10
"""From this size on other threads may run while bytes are moved."""
_ALIGNMENT_BYTES = 4096
"""What is aligned in the file stays aligned in scratch: elements are seen in their own dtype, blocks read directly."""

_CPU = torch.device("cpu")


class HostWorker:
    """Does jobs whose bytes pass through this machine's memory, whatever the device they end up on.

    Holds scratch memory: one worker for each thread.
    """

    def __init__(self, reader: Reader, arrivals: Arrivals | None = None) -> None:
        """Ready to work.

        Args:
            reader: Fetches the data.
            arrivals: Sums it, if it is to be checked.
        """
        self._reader = reader
        self._arrivals = arrivals
        self._scratch: torch.Tensor | None = None
        self._packer: _Packer | None = None
        self._pages: LeasedFile | None = None
        self._pages_of: int | None = None  # descriptor: jobs come file by file
        self._gaps = torch.empty(GAP_BYTES, dtype=torch.uint8, device="cpu")

    def __call__(self, job: Job) -> int:
        """Read a job's bytes and put its pieces into place.

        Returns:
            Number of bytes read.

        Raises:
            OverflowFoundError: A cast turned a finite value infinite.
        """
        if job.is_direct:
            piece = job.pieces[0]
            memory = memory_at(piece.target.data_ptr() + piece.skip_bytes, piece.nbytes)
            self._reader.readinto(job.source, job.offset, memory)
        elif not (job.can_scatter and self._scatter(job)) and not self._place_from_pages(job):
            in_blocks = _is_large_cast(job) and not self._reader.is_direct(job.source)
            self._place(job, None if in_blocks else self._fetch(job))
        if self._arrivals is not None and job.device.type == "cpu":
            for piece in job.pieces:
                if piece.kind == RAW:  # where it ended up
                    self._arrivals.add(piece, memory_at(piece.target.data_ptr() + piece.skip_bytes, piece.nbytes))
        return job.nbytes

    def close(self) -> None:
        """Let go of pages and their file, in the thread that used them: a load may have more files than may be open."""
        if self._pages is not None:
            self._pages.unmap()
            self._pages.close()

    def _scatter(self, job: Job) -> bool:
        """Let the kernel put a job's pieces into place, and what lies between them aside, if it can."""
        gaps = self._gaps.data_ptr()
        places: list[int] = []
        position = job.offset
        for _, _, offset, nbytes, target, _, _, _ in job.pieces:
            if offset != position:
                places += (gaps, offset - position)
            places += (target.data_ptr(), nbytes)
            position = offset + nbytes
        return self._reader.scatter(job.source, job.offset, job.nbytes, places)

    def _fetch(self, job: Job, skip_bytes: int = 0, nbytes: int | None = None) -> torch.Tensor:
        """A job's bytes, or some of them, uint8, to be used before the next are fetched."""
        offset, nbytes = job.offset + skip_bytes, job.nbytes if nbytes is None else nbytes
        shift = (job.source.base + offset) % _ALIGNMENT_BYTES
        data = self._scratch_of(shift + nbytes)[shift : shift + nbytes]
        self._reader.readinto(job.source, offset, memory_at(data.data_ptr(), nbytes))
        return data

    def _place_from_pages(self, job: Job) -> bool:
        """Put a job's pieces into place straight from the page cache, if that can be done."""
        if job.nbytes < _LENT_BYTES or job.source.fd is None:
            return False
        if job.source.fd != self._pages_of:
            self.close()
            self._pages_of, self._pages = job.source.fd, self._reader.pages(job.source)
        if self._pages is None or (data := self._pages.borrow(job.source.base + job.offset, job.nbytes)) is None:
            return False
        try:
            self._place(job, data)
        finally:
            self._pages.give_back()
        return True

    def _cast(self, job: Job, data: torch.Tensor | None) -> None:
        """Cast one large piece in blocks: each is looked at for overflow while it is in the core's own cache.

        Where nothing is looked at, one block is 10 % faster.

        Args:
            job: The piece's.
            data: Its bytes; without them each block is read just before, which is 10 to 15 % faster than all at once
                (Xeons).
        """
        [piece] = job.pieces
        dtype, skip = piece.copy.dtype, 0
        limit = limit_of(dtype, piece.target.dtype)
        at_once = data is not None and _is_aligned(data, dtype) and limit is None and self._arrivals is None
        step = job.nbytes if at_once else cached_bytes()
        sums_squares = limit is not None and dtype in SQUARABLE
        squares: list[torch.Tensor] = []
        targets = piece.target.reshape(-1).split(step // dtype.itemsize)
        for target, values in zip(targets, self._blocks(job, data, step), strict=True):
            target.copy_(values)
            if sums_squares:
                squares.append(torch.dot(values, values))
            elif limit is not None and overflows(values, target):
                raise OverflowFoundError(piece.copy)
            if self._arrivals is not None:  # as it was read
                self._arrivals.add(piece, memory_at(values.data_ptr(), values.nbytes), skip)
                skip += values.nbytes
        if limit is not None and not surely_fit(squares, limit):
            for target, values in zip(targets, self._blocks(job, data, step), strict=True):
                if overflows(values, target):
                    raise OverflowFoundError(piece.copy)

    def _blocks(self, job: Job, data: torch.Tensor | None, step: int) -> Iterable[torch.Tensor]:
        """A large cast's values, from so many bytes each; to be used before the next are taken."""
        dtype = job.pieces[0].copy.dtype
        if data is not None and _is_aligned(data, dtype):
            values: Sequence[torch.Tensor] = data.view(dtype).split(step // dtype.itemsize)
            return values
        return (
            _aligned(self._fetch(job, skip, nbytes) if data is None else data[skip : skip + nbytes], dtype).view(dtype)
            for skip in range(0, job.nbytes, step)
            for nbytes in [min(step, job.nbytes - skip)]
        )

    def _place(self, job: Job, data: torch.Tensor | None) -> None:
        if data is None or _is_large_cast(job):
            self._cast(job, data)
            return
        on_cpu = job.device.type == "cpu"
        base = data.data_ptr() - job.offset
        packer = None
        for piece in job.pieces:
            _, kind, offset, nbytes, target, skip_bytes, _, _ = piece
            if kind == RAW and on_cpu:
                (move if nbytes < _MUCH_BYTES else move_much)(target.data_ptr() + skip_bytes, base + offset, nbytes)
            elif kind == CAST and nbytes <= _PACKABLE_BYTES:
                if packer is None:
                    packer = self._packer = self._packer or _Packer()
                packer.add(piece, base + offset)
            else:
                _put(piece, decode(piece, data[offset - job.offset :][:nbytes]))
            if self._arrivals is not None and kind != RAW and on_cpu:  # as it was read
                self._arrivals.add(piece, memory_at(base + offset, nbytes))
        if packer is not None:
            packer.flush()

    def _scratch_of(self, nbytes: int) -> torch.Tensor:
        if self._scratch is None or self._scratch.numel() < nbytes:
            self._scratch = None  # before the next is made
            [self._scratch] = allocate([((max(nbytes, STAGED_BYTES + _ALIGNMENT_BYTES),), torch.uint8)], _CPU)
        return self._scratch


class _Packer:
    """Casts many small tensors at once: their bytes are moved together, cast in one go, and moved out.

    Of 256 elements each, from float32 to float16: 2.1 µs for each tensor instead of 9.0.
    """

    def __init__(self) -> None:
        request = ((_PACKED_BYTES,), torch.uint8)
        self._sources, self._results = allocate([request, request], _CPU)
        self._source_address, self._result_address = self._sources.data_ptr(), self._results.data_ptr()
        self._pieces: list[Piece] = []
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None
        self._count = 0

    def add(self, piece: Piece, address: int) -> None:
        """Take over a piece's bytes, which lie at `address`."""
        dtypes = (piece.copy.dtype, piece.target.dtype)
        count = piece.nbytes // dtypes[0].itemsize
        widest = max(dtypes[0].itemsize, dtypes[1].itemsize)
        if dtypes != self._dtypes or (self._count + count) * widest > _PACKED_BYTES:
            self.flush()
            self._dtypes = dtypes
        move(self._source_address + self._count * dtypes[0].itemsize, address, piece.nbytes)
        self._pieces.append(piece)
        self._count += count

    def flush(self) -> None:
        """Cast what was taken over and move it out."""
        if self._dtypes is None or not self._pieces:
            return
        source_dtype, result_dtype = self._dtypes
        source = self._sources[: self._count * source_dtype.itemsize].view(source_dtype)
        result = self._results[: self._count * result_dtype.itemsize].view(result_dtype)
        result.copy_(source)
        suspicious = overflows(source, result)
        address, first = self._result_address, 0
        for piece in self._pieces:
            count = piece.nbytes // source_dtype.itemsize
            if suspicious and overflows(source[first : first + count], result[first : first + count]):
                raise OverflowFoundError(piece.copy)
            nbytes = count * result_dtype.itemsize
            move(piece.target.data_ptr(), address, nbytes)
            address, first = address + nbytes, first + count
        self._pieces.clear()
        self._dtypes, self._count = None, 0


def decode(piece: Piece, data: torch.Tensor) -> torch.Tensor:
    """A piece's bytes as a tensor of its dtype and shape (of a `RAW` one in one row): a view where possible."""
    dtype = piece.copy.dtype
    data = _aligned(data, dtype)
    if needs_swap(piece.copy.box.extent, dtype):
        width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        data = data.view(-1, width).flip(1).view(-1)
    values = data.view(dtype)
    return values if piece.kind == RAW else values.as_strided(piece.shape, piece.strides, values.storage_offset())


def _is_large_cast(job: Job) -> bool:
    return len(job.pieces) == 1 and job.pieces[0].kind == CAST and job.nbytes > _PACKABLE_BYTES


def _is_aligned(data: torch.Tensor, dtype: torch.dtype) -> bool:
    return not (data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize)


def _aligned(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes where elements of a dtype may lie."""
    return data if _is_aligned(data, dtype) else data.clone()


def _put(piece: Piece, values: torch.Tensor) -> None:
    """Write decoded values into a piece's target, cast on the way."""
    target = piece.target
    if piece.kind == RAW:
        first = piece.skip_bytes // target.element_size()
        target.as_strided((target.numel(),), (1,))[first : first + values.numel()].copy_(values)
    elif target.is_cpu:
        target.copy_(values)
        if overflows(values, target):
            raise OverflowFoundError(piece.copy)
    else:
        result = values.to(target.dtype)
        if overflows(values, result):
            raise OverflowFoundError(piece.copy)
        target.copy_(result)
