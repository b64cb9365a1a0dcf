"""The words of an error: what does not fit, grouped so that it can be read, and what to do about it.

Advice is tried before it is printed: an argument that doesn't make the file fit is worse than none.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from torchload.core.checkpoint import Shape
from torchload.core.text import group_names, plural, printable
from torchload.errors import IncompatibleCheckpointError
from torchload.match import Selection
from torchload.model.target import Target
from torchload.plan.advice import Advice, likeness
from torchload.plan.quantized import is_scale

__all__ = ["incompatible"]

_MOST_LINES = 8
_MOST_CHARACTERS = 240  # of a line
_MOST_IN_ALL = 2_900


def incompatible(
    target: Target, selection: Selection, problems: Sequence[str], slips: Sequence[str] = (), whole: str | None = None
) -> IncompatibleCheckpointError:
    """The error that says everything that keeps a checkpoint from fitting a model.

    Args:
        target: The model.
        selection: What was chosen for it, and what that lacks.
        problems: What stands against it even if all names and shapes fit.
        slips: What is wrong with the caller's patterns, each with what to do about it.
        whole: What to give instead of this file, if it is one part of several.
    """
    model = type(target.model).__name__
    where = f" (looked at {selection.path!r})" if selection.path else ""
    held_back = {*selection.missing} & {*selection.unexpected}  # with the rest of their layer, which doesn't fit
    missing = [name for name in selection.missing if name not in held_back]
    unexpected = [selection.original.get(name, name) for name in selection.unexpected if name not in held_back]
    advice = Advice(target, selection)
    near = _near(target, selection, advice.renamed) if selection.missing else {}
    what = (
        "does not fit"
        if selection.pairs or selection.skipped or not target.names
        else "has not one name in common with"
    )
    lines = [f"The checkpoint {what} this {model}{where}."]
    if selection.mismatched:
        lines.append(f"  {plural(len(selection.mismatched), 'tensor')} {_have(selection.mismatched)} another shape")
        lines += _shapes(selection.mismatched)
    if missing:
        lines.append(f"  {plural(len(missing), 'tensor')} of the model {_is(missing)} not in the file")
        lines += _listing(missing, near)
    if unexpected:
        count = plural(len(unexpected), "tensor")
        lines.append(f"  {count} of the file {_have(unexpected)} no place in the model")
        lines += _listing(unexpected)
    lines += [f"  {problem}" for problem in _cut_problems([*problems, *slips])]
    lines += [f"  {sentence}" for sentence in likeness(missing, unexpected)]
    fitting = sum(name not in selection.mismatched and not _stands_in(name, problems) for name in selection.pairs)
    lines.append(f"  {fitting:,} of {plural(len(target.names), 'tensor')} fit.")
    if whole and missing:
        lines.append(f"  {whole}")
    elif not problems and not any(map(is_scale, unexpected)):
        lines += advice.lines()
    return IncompatibleCheckpointError(
        _bounded(lines),
        missing_keys=selection.missing,
        unexpected_keys=unexpected,
        mismatched=selection.mismatched,
        problems=[*problems, *slips],
    )


def _stands_in(name: str, problems: Sequence[str]) -> bool:
    """Whether one of the problems is that of this tensor."""
    return any(problem.startswith((f"{name} ", f"{name}:")) for problem in problems)


def _cut_problems(problems: Sequence[str]) -> list[str]:
    shown = list(problems[:_MOST_LINES])
    return [*shown, f"and {len(problems) - _MOST_LINES:,} more like these"] if len(problems) > _MOST_LINES else shown


def _bounded(lines: list[str]) -> str:
    """The lines as a message that can still be read, however long the names are."""
    first, *rest = (printable(line, None) for line in lines)  # names in them may have line breaks
    keeps = ("(..., ", " parts: give ")  # what is to be copied
    rest = [
        line
        if len(line) <= _MOST_CHARACTERS or any(words in line for words in keeps)
        else f"{line[:_MOST_CHARACTERS]}…"
        for line in rest
    ]
    while sum(map(len, rest)) + len(rest) > _MOST_IN_ALL:
        listed = [index for index, line in enumerate(rest) if line.startswith("    ")]
        if not listed:
            break
        del rest[listed[len(listed) // 2]]
    return "\n".join([first, *rest])


def _near(target: Target, selection: Selection, renamed: Mapping[str, str]) -> dict[str, str]:
    """Missing name → what the file calls it, as the renaming that mends it says, or as its spelling and shape do."""
    near = {name: renamed[name] for name in selection.missing if name in renamed}
    leftovers = [*selection.unexpected, *selection.outside]
    if near or len(selection.missing) * len(leftovers) > 20_000:
        return near
    for name in selection.missing[: 4 * _MOST_LINES]:
        shape = target.by_name[name].shape if name in target.by_name else None
        alike = [
            other
            for other in leftovers
            if other != name and getattr(selection.leaves.get(other), "shape", None) == shape
        ]
        if close := difflib.get_close_matches(name, alike, n=1, cutoff=0.75):
            near[name] = selection.original.get(close[0], close[0])
    claims = Counter(near.values())
    return {name: other for name, other in near.items() if claims[other] == 1}


def _listing(names: Sequence[str], near: dict[str, str] | None = None) -> list[str]:
    near = near or {}
    plain = group_names(name for name in names if name not in near)
    hinted = [
        f"{printable(name, None)}    did you mean {printable(near[name])}, which the file has?"
        for name in names
        if name in near
    ]
    return _cut([f"    {line}" for line in [*hinted, *plain]])


def _shapes(mismatched: dict[str, tuple[Shape, Shape]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in mismatched:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    lines = []
    for names in groups.values():
        (label,) = group_names(names)
        in_file = ", ".join(str(mismatched[name][0]) for name in names)
        in_model = ", ".join(str(mismatched[name][1]) for name in names)
        lines.append(f"    {label}    file {in_file}    model {in_model}")
    return _cut(lines)


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[: _MOST_LINES - 1], f"    … and {len(lines) - _MOST_LINES + 1:,} more lines like these"]


def _have(things: Sequence[str] | dict[str, tuple[Shape, Shape]]) -> str:
    return "has" if len(things) == 1 else "have"


def _is(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"
