"""What a save did, as data and as a few readable lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchload.core.public import public
from torchload.core.shown import Shown
from torchload.core.text import format_bytes, format_seconds, plural

__all__ = ["SaveReport"]


@public
@dataclass(frozen=True, slots=True, repr=False)
class SaveReport(Shown):
    """The account of one save. `str()` gives it in a line or two.

    Attributes:
        path: The file or the folder.
        format: What it is: ``"zip checkpoint"``, ``"safetensors"``, ``"torch.distributed.checkpoint folder"``.
        tensors: Number of names in the model's state dict; tied ones count each.
        nbytes: Bytes of all tensor data in the file; tied tensors count once.
        casts: ``("float32", "float16")`` → number of blocks of data that were cast.
        ties: Groups of names that share data in the file.
        beside: What stands beside the weights, by name: states of training, metadata.
        seconds: Time from the call to the return, in seconds.
    """

    path: str
    format: str
    tensors: int
    nbytes: int
    casts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    beside: tuple[str, ...] = ()
    seconds: float = 0.0

    def _headline(self) -> str:
        size = f"{format_bytes(self.nbytes)} in {format_seconds(self.seconds)}"
        return f"{self.path}: {plural(self.tensors, 'tensor')} saved as {self.format} ({size})"

    def _details(self) -> list[tuple[str, str]]:
        lines = [("cast", f"{a} → {b} in {plural(count, 'tensor')}") for (a, b), count in self.casts.items()]
        if self.ties:
            more = f" and {len(self.ties) - 3} more groups" if len(self.ties) > 3 else ""
            lines.append(("tied", f"{', '.join(' = '.join(group) for group in self.ties[:3])}{more}"))
        if self.beside:
            lines.append(("beside", ", ".join(self.beside)))
        return lines
