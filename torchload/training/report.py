"""What `smart_resume` has to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchload.core.text import printable
from torchload.plan.report import LoadReport

__all__ = ["ResumeReport"]


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """The account of a resumption. `str()` gives it in a few lines; it holds no tensor data.

    Attributes:
        load: The account of the model's weights.
        ema: The account of the averaged weights, where they were asked for.
        epoch: The epoch that the file names, as it stands there: whether it is the last one that was finished or the
            next one to begin is the convention of the script that wrote it.
        step: The step that the file names, likewise.
        values: Everything else at the file's top level that is plain data: name → numbers, strings, lists, dicts, and
            the attributes of objects such as an `argparse.Namespace`.
        restored: What was restored beside the weights, one phrase each.
        notes: Sentences worth reading.
    """

    load: LoadReport
    ema: LoadReport | None = None
    epoch: int | None = None
    step: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    restored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        at = [f"{name} {value}" for name, value in (("epoch", self.epoch), ("step", self.step)) if value is not None]
        lines = [str(replace(self.load, training=False))]  # which is as it should be
        if at:
            lines.append(f"  at      {', '.join(at)}")
        lines += [f"  resumed {phrase}" for phrase in self.restored]
        if self.ema is not None:
            lines.append(f"  average {self.ema.tensors:,} tensors from {self.ema.key or 'the top level'!r}")
        lines += [f"  note    {note}" for note in self.notes]
        return "\n".join([lines[0], *map(printable, lines[1:])])
