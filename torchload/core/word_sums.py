"""Sums of words that tell whether data is what it was: an eighth of the time that a CRC-32 takes."""

from __future__ import annotations

import threading

import torch

__all__ = ["WordSums"]

_ROW_BYTES = 4096
_WORDS = _ROW_BYTES // 8
_HALF = 4
_BLOCK_BYTES = 1 << 20
"""What is summed one way is still in the cache when it is summed the other way."""


class WordSums:
    """What a run of bytes adds up to, as 64-bit words, modulo 2**64.

    They lie in rows of 4 KiB. Words are summed along each row, and down each column; there those that begin four bytes
    later, so that no bit is the highest one in both: two flips of that would cancel, and so would much that is lost of
    what is nothing but high bits, as a float64 of 2.0 is. Damage is missed that leaves every row and every column as it
    was: at least four words that changed alike, two by two. Parts may be added in any order, wherever data is cut.

    Example:
        >>> data = memoryview(bytearray(range(256)) * 100)
        >>> whole, parts = WordSums(len(data)), WordSums(len(data))
        >>> whole.add(data, 0)
        >>> parts.add(data[5001:], 5001)
        >>> parts.add(data[:5001], 0)
        >>> whole.same_as(parts)
        True
    """

    __slots__ = ("_columns", "_lock", "_memory", "_rows")

    def __init__(self, nbytes: int) -> None:
        """Nothing was added yet, of so many bytes."""
        # Made and compared by Python: this runs outside of the threads that work, where an operator on so many numbers
        # may want OpenMP's threads, for which the child of a process that has used them waits for ever.
        self._memory = bytearray(8 * (_WORDS - 1 - (-nbytes // _ROW_BYTES)))
        sums = torch.frombuffer(self._memory, dtype=torch.int64)
        self._columns, self._rows = sums[: _WORDS - 1], sums[_WORDS - 1 :]
        self._lock = threading.Lock()

    def add(self, memory: memoryview, position: int) -> None:
        """Add the bytes that begin at a position; may be called from several threads, in one autograd mode."""
        row, before = divmod(position, _ROW_BYTES)
        start, nbytes = 0, len(memory)
        while start < nbytes:
            whole = 0 if before else min((nbytes - start) // _ROW_BYTES * _ROW_BYTES, _BLOCK_BYTES)
            if whole:
                part = memory[start : start + whole]
                self._add_rows(row, part)
            else:
                part = memory[start : start + _ROW_BYTES - before]
                self._add_rows(row, memoryview((bytearray(before) + part).ljust(_ROW_BYTES, b"\0")))
            row, before, start = row + max(whole // _ROW_BYTES, 1), 0, start + len(part)

    def same_as(self, other: WordSums) -> bool:
        """Whether the same was added to both."""
        return self._memory == other._memory

    def _add_rows(self, row: int, memory: memoryview) -> None:
        count = len(memory) // _ROW_BYTES
        words = torch.frombuffer(memory, dtype=torch.int64).view(count, _WORDS)
        later = torch.frombuffer(memory[_HALF:-_HALF], dtype=torch.int64)
        rows, columns = words.sum(1), later.as_strided((count, _WORDS - 1), (_WORDS, 1)).sum(0)
        with self._lock:
            self._rows[row : row + count] += rows
            self._columns += columns
