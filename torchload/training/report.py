"""What `smart_resume` has to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchload.core.public import public
from torchload.plan.report import FilledInPlace, LoadReport

__all__ = ["ResumeReport"]


@public
@dataclass(frozen=True, slots=True, repr=False)
class ResumeReport(FilledInPlace):
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

    def _headline(self) -> str:
        return self.load._headline()

    def _details(self) -> list[tuple[str, str]]:
        at = [f"{name} {value}" for name, value in (("epoch", self.epoch), ("step", self.step)) if value is not None]
        lines = replace(self.load, training=False)._details()  # which is as it should be
        if at:
            lines.append(("at", ", ".join(at)))
        lines += [("resumed", phrase) for phrase in self.restored]
        if self.ema is not None:
            lines.append(("average", f"{self.ema.tensors:,} tensors from {self.ema.key or 'the top level'!r}"))
        return [*lines, *(("note", note) for note in self.notes)]
