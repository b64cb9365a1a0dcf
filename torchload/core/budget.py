"""What looking through a file's names may cost: so much as its size accounts for, however often it repeats itself."""

from __future__ import annotations

from torchload.errors import CorruptCheckpointError

__all__ = ["LONGEST_NAME", "Allowance"]

LONGEST_NAME = 4096
"""Characters of the path of a tensor."""

# A name that is spelled out takes about this much beyond its characters: a string and its place in a mapping.
_NAME_BYTES = 150
_BASE_BYTES = 112 << 20
_BASE_NAMES = 100_000
# A tensor takes some 300 bytes of any file besides its data.
_BYTES_PER_NAME = 256


class Allowance:
    """The memory and the time that names may take in one search, which ends with an error when it is used up.

    Attributes:
        path: The checkpoint, for messages.
        left_bytes: What may still be spent.
        most_names: How many names one container may have, those of containers inside it included.
    """

    __slots__ = ("left_bytes", "most_names", "path")

    def __init__(self, path: str, size_bytes: int) -> None:
        """Ready to be spent.

        Args:
            path: The checkpoint, for messages.
            size_bytes: Length of its files.
        """
        self.path = path
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
                f"{self.path} has so many names, so long or so often within one another, that looking through them "
                "would take memory out of all proportion to the file. Refused.",
                path=self.path,
            )

    def check(self, names: int, longest: int) -> None:
        """Look at how many names a container has, and at the length of the longest.

        Raises:
            CorruptCheckpointError: They are more than `most_names`, or it is longer than any name is.
        """
        if longest > LONGEST_NAME:
            raise CorruptCheckpointError(
                f"{self.path} has a name of {longest:,} characters; at most {LONGEST_NAME:,} are read. Refused.",
                path=self.path,
            )
        if names > self.most_names:
            raise CorruptCheckpointError(
                f"{self.path} has a container of more than {self.most_names:,} names, tensors among them, which a file "
                "of its size has no use for. Refused.",
                path=self.path,
            )
