"""What untrusted input may cost: so much as its size accounts for, however often it repeats itself.

`Budget` is what one load may spend on building what its files describe, `Allowance` what one search through their names
may. Both have a base that covers every small file, and grow with the files.
"""

from __future__ import annotations

from torchload.errors import CorruptCheckpointError, refused

__all__ = ["LONGEST_NAME", "Allowance", "Budget"]

LONGEST_NAME = 4096
"""Characters of the path of a tensor."""

# What objects may take in memory: a base, and some bytes for each byte of the files.
_BASE_OBJECT_BYTES = 176 << 20
_OBJECT_BYTES_PER_BYTE = 8
# What is done again although a file has it once, such as copying a collection that several calls refer to.
_BASE_STEPS = 1_000_000
_BYTES_PER_STEP = 8

# A name that is spelled out takes about this much beyond its characters: a string and its place in a mapping.
_NAME_BYTES = 150
_BASE_BYTES = 112 << 20
_BASE_NAMES = 100_000
# A tensor takes some 300 bytes of any file besides its data.
_BYTES_PER_NAME = 256


class Budget:
    """What one load may spend, in all its files, archives within archives and streams within streams together.

    Every `Source` carries the budget of its load, and hands it to its parts.

    Attributes:
        left_bytes: Memory that may still be taken for objects, and for data that has to be unpacked.
        left_steps: Items that may still be copied or looked at again.

    Example:
        >>> budget = Budget()
        >>> budget.add_file(1_000_000)
        >>> budget.spend(100_000_000, "model.pth")
        >>> budget.spend(100_000_000, "model.pth")
        Traceback (most recent call last):
        torchload.errors.CorruptCheckpointError: model.pth would take more memory than ...
    """

    __slots__ = ("left_bytes", "left_steps")

    def __init__(self) -> None:
        self.left_bytes = _BASE_OBJECT_BYTES
        self.left_steps = _BASE_STEPS

    def add_file(self, size_bytes: int) -> None:
        """Grow with a file that belongs to the load."""
        self.left_bytes += _OBJECT_BYTES_PER_BYTE * size_bytes
        self.left_steps += size_bytes // _BYTES_PER_STEP

    def spend(self, nbytes: int, name: str) -> None:
        """Account for memory, before it is taken for what messages call `name`.

        Raises:
            CorruptCheckpointError: It is more than the files account for.
        """
        self.left_bytes -= nbytes
        if self.left_bytes < 0:
            raise refused(name, "would take more memory than a checkpoint of its size can need")

    def step(self, count: int, name: str) -> None:
        """Account for work that is repeated; arguments and errors as `spend`."""
        self.left_steps -= count
        if self.left_steps < 0:
            raise refused(name, "repeats a list or dict more often than a checkpoint of its size can need")


class Allowance:
    """The memory and the time that names may take in one search, which ends with an error when it is used up.

    Attributes:
        left_bytes: What may still be spent.
        most_names: How many names one container may have, those of containers inside it included.
    """

    __slots__ = ("left_bytes", "most_names")

    def __init__(self, size_bytes: int) -> None:
        """Ready to be spent, for files of this length in all."""
        self.left_bytes = _BASE_BYTES + 4 * size_bytes
        self.most_names = _BASE_NAMES + size_bytes // _BYTES_PER_NAME

    def spend(self, names: int, characters: int) -> None:
        """Account for names that are spelled out, with their length in all.

        Raises:
            CorruptCheckpointError: It is more than the file's size accounts for.
        """
        self.left_bytes -= names * _NAME_BYTES + characters
        if self.left_bytes < 0:
            raise CorruptCheckpointError(
                "The checkpoint has so many names, so long or so often within one another, that looking through them "
                "would take memory out of all proportion to the file. Refused."
            )

    def check(self, names: int, longest: int) -> None:
        """Look at how many names a container has, and at the length of the longest.

        Raises:
            CorruptCheckpointError: They are more than `most_names`, or it is longer than any name is.
        """
        if longest > LONGEST_NAME:
            raise CorruptCheckpointError(
                f"The checkpoint has a name of {longest:,} characters; at most {LONGEST_NAME:,} are read. Refused."
            )
        if names > self.most_names:
            raise CorruptCheckpointError(
                f"The checkpoint has a container of more than {self.most_names:,} names, tensors among them, which a "
                "file of its size has no use for. Refused."
            )
