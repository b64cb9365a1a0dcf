"""What a load did, as data and as a few readable lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from torch import nn

from torchload.core.checkpoint import Shape
from torchload.core.public import public
from torchload.core.shown import Shown
from torchload.core.text import format_bytes, format_seconds, group_names, plural

__all__ = ["FilledInPlace", "LoadReport"]

_IN_PLACE = (
    "This is the report, not the model, which was filled in place: write smart_load(model, path) on a line of its own, "
    "and go on with model."
)

_WORTH_SAYING_BYTES = 1 << 20


class FilledInPlace(Shown):
    """A report that says so where it is taken for the model: after ``model = smart_load(model, path)``."""

    __slots__ = ()

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """No: the model was filled in place."""
        raise TypeError(_IN_PLACE)

    def __getattr__(self, name: str) -> NoReturn:
        hint = f". {_IN_PLACE}" if hasattr(nn.Module, name) else ""
        raise AttributeError(f"a {type(self).__name__} has no {name!r}{hint}", name=name, obj=self)


@public
@dataclass(frozen=True, slots=True, repr=False)
class LoadReport(FilledInPlace):
    """The account of one load. `str()` gives it in a few lines, notebooks show a table; it holds no tensor data.

    Attributes:
        path: The checkpoint as the caller named it.
        model: Class name of the model.
        device: Where the loaded tensors are now: one device, or several joined by ``", "``.
        format: What the file is, such as ``"zip checkpoint"``.
        key: Path of the container that was used, ``""`` for the top level.
        prefix: Prefix of the names that were used inside it, without its last dot; ``""`` for all.
        rivals: Other containers that would have fitted too.
        averaged: Whether averaged (EMA) weights were taken.
        beside: What else the file holds at its top level: name → value for numbers, strings and ``None``, else the name
            of its type.
        rewrites: How names were reconciled, one phrase each.
        tensors: Number of the model's tensors that were filled; tied ones count once.
        total: Number of tensors of the model; tied ones count once.
        nbytes: Bytes of tensor data taken from the file.
        read_bytes: Bytes that were read for it by this process. More than `nbytes` where parts lie so close together in
            the file that it is quicker to read over the gaps, as for row-wise tensor parallelism with short rows; less
            where parameters became views of the file, or other ranks read for this one. What ``verify=True`` reads to
            compare is not in it.
        casts: ``("float32", "float16")`` → number of tensors.
        ties: Groups of the model's names that share one tensor.
        missing_keys: Model names that nothing filled (empty after a strict load).
        unexpected_keys: Checkpoint names inside the model's modules without a place (empty after a strict load).
        mismatched: Model name → (shape in the file, shape in the model), left alone by ``strict=False``.
        skipped: Names left alone because of ``skip``: the model's, then those that only the file has.
        outside: Checkpoint names of the container that are not below the prefix that was taken.
        ignored: Names on either side whose absence or presence is known to be harmless.
        seconds: Time from the call to the return, in seconds.
        training: Whether the model is in training mode.
        notes: Sentences worth reading.
    """

    path: str
    model: str
    device: str
    format: str
    key: str = ""
    prefix: str = ""
    rivals: tuple[str, ...] = ()
    averaged: bool = False
    beside: Mapping[str, object] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    tensors: int = 0
    total: int = 0
    nbytes: int = 0
    read_bytes: int = 0
    casts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    seconds: float = 0.0
    training: bool = False
    notes: tuple[str, ...] = ()

    @property
    def gib_per_second(self) -> float:
        """Bytes loaded per second of the whole call, in GiB/s."""
        return self.nbytes / 2**30 / self.seconds if self.seconds else 0.0

    def _headline(self) -> str:
        count = (
            f"all {plural(self.tensors, 'tensor')}"
            if self.tensors == self.total
            else (f"{self.tensors:,} of {plural(self.total, 'tensor')}")
        )
        speed = f", {self.gib_per_second:.1f} GiB/s" if self.nbytes >= 2**20 else ""
        return (
            f"{self.path} → {self.model} on {self.device}: {count} loaded "
            f"({format_bytes(self.nbytes)} in {format_seconds(self.seconds)}{speed})"
        )

    def _details(self) -> list[tuple[str, str]]:
        lines = [("file", self._file())]
        if self.rewrites:
            lines.append(("names", "; ".join(self.rewrites)))
        if self.read_bytes - self.nbytes > max(self.nbytes // 10, _WORTH_SAYING_BYTES):
            read, needed = format_bytes(self.read_bytes), format_bytes(self.nbytes)
            lines.append(("read", f"{read} for {needed}: over the gaps between parts, which was quicker"))
        for (source, target), count in self.casts.items():
            lines.append(("cast", f"{source} → {target} in {plural(count, 'tensor')}"))
        if self.ties:
            groups = ", ".join(" = ".join(group) for group in self.ties[:3])
            lines.append(("tied", groups + (f" and {len(self.ties) - 3} more groups" if len(self.ties) > 3 else "")))
        lines += [
            (label, _names(names))
            for label, names in (
                ("initial", [*self.missing_keys, *self.mismatched]),
                ("unused", self.unexpected_keys),
                ("skipped", self.skipped),
                ("outside", self.outside),
                ("ignored", self.ignored),
            )
            if names
        ]
        lines += [("note", note) for note in self.notes]
        if self.training:
            lines.append(("note", "the model is in training mode: call model.eval() before inference"))
        return lines

    def _file(self) -> str:
        text = self.format
        path = ".".join(part for part in (self.key, self.prefix) if part)
        if path:
            text += f"; took {path!r}"
        if self.beside:
            beside = [
                f"{name!r} = {value!r}" if isinstance(value, (int, float)) else repr(name)
                for name, value in list(self.beside.items())[:8]
            ]
            more = f", {len(self.beside) - 8} more" if len(self.beside) > 8 else ""
            text += f" (beside it: {', '.join(beside)}{more})"
        return text


def _names(names: list[str] | tuple[str, ...]) -> str:
    groups = group_names(names)
    if len(groups) <= 4:
        return ", ".join(groups)
    tops: dict[str, int] = {}
    for name in names:
        top = name.partition(".")[0]
        tops[top] = tops.get(top, 0) + 1
    if len(tops) <= 6:
        return ", ".join(f"{top}.* ({count:,})" if count > 1 else top for top, count in tops.items())
    return ", ".join(groups[:3]) + f" and {len(names) - 3:,} more"
