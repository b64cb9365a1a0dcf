"""The words of an error: what does not fit, grouped so that it can be read, and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torchload.core.checkpoint import Shape
from torchload.core.text import group_names, plural, printable
from torchload.errors import IncompatibleCheckpointError
from torchload.match import Selection
from torchload.model.target import Target

__all__ = ["incompatible"]

_MOST_LINES = 8


def incompatible(
    target: Target, selection: Selection, problems: Sequence[str], path: str
) -> IncompatibleCheckpointError:
    """The error that says everything that keeps a checkpoint from fitting a model."""
    model = type(target.model).__name__
    where = f" (looked at {selection.path!r})" if selection.path else ""
    near: dict[str, str] = {}
    lines = [f"{path} does not fit this {model}{where}. Nothing was loaded; the model is unchanged."]
    if selection.mismatched:
        lines.append(f"  {plural(len(selection.mismatched), 'tensor')} {_have(selection.mismatched)} another shape")
        lines += _shapes(selection.mismatched)
    if selection.missing:
        count = plural(len(selection.missing), "tensor")
        lines.append(f"  {count} of the model {_is(selection.missing)} not in the file")
        near = _near(target, selection)
        lines += _listing(selection.missing, near)
    if selection.unexpected:
        count = plural(len(selection.unexpected), "tensor")
        lines.append(f"  {count} of the file {_have(selection.unexpected)} no place in the model")
        lines += _listing(selection.unexpected)
    lines += [f"  {problem}" for problem in problems]
    fitting = len(selection.pairs) - len(selection.mismatched)
    lines.append(f"  {fitting:,} of {plural(len(target.names), 'tensor')} fit.")
    lines += _advice(target, selection, near, problems)
    return IncompatibleCheckpointError(
        "\n".join(lines),
        path=path,
        missing_keys=selection.missing,
        unexpected_keys=selection.unexpected,
        mismatched=selection.mismatched,
        problems=problems,
    )


def _advice(target: Target, selection: Selection, near: dict[str, str], problems: Sequence[str]) -> list[str]:
    lacking = [*selection.mismatched, *selection.missing]
    if problems or not (lacking or selection.unexpected):
        return []
    if not lacking:
        surplus = [selection.alignment.leftover.get(name, name) for name in selection.unexpected]
        return [f"  To leave these out: smart_load(..., skip={_globs(surplus, target.names)})"]
    fitting = [name for name in selection.pairs if name not in selection.mismatched]
    globs = _globs(lacking, fitting)
    advice = []
    if near:
        advice.append(f"  If that is the same part under another name: smart_load(..., rename={_renaming(near)})")
    if len(globs) <= _MOST_GLOBS and len(lacking) <= len(fitting):
        advice.append(f"  For a part that is meant to be new: smart_load(..., skip={globs})")
    return advice


def _renaming(near: dict[str, str]) -> str:
    """The `rename` that turns leftovers of the file into the names that the model misses."""
    rules: dict[str, str] = {}
    for name, source in near.items():
        ours, theirs = name.split("."), source.split(".")
        while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
            ours.pop()
            theirs.pop()
        rules[r"\b" + re.escape(theirs[-1]) + r"\b"] = ours[-1]
    return "{" + ", ".join(f"r'{pattern}': '{new}'" for pattern, new in list(rules.items())[:_MOST_GLOBS]) + "}"


_MOST_GLOBS = 4


def _globs(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Globs that match all of `names` and none of `others`, as few as a look at the paths gives."""
    taken = {name[:end] for name in others for end in _ends(name)}
    leaves = {name.rpartition(".")[2] for name in others}
    globs: dict[str, None] = {}
    for name in names:
        free = next((name[:end] for end in _ends(name) if name[:end] not in taken), name)
        leaf = name.rpartition(".")[2]
        if free != name:
            globs[f"{free}.*"] = None
        elif leaf not in leaves and "." in name:
            globs[f"*.{leaf}"] = None
        else:
            globs[name] = None
    return list(globs)


def _ends(name: str) -> list[int]:
    """Where the paths end that lead to a name: at each dot, and at its own end."""
    return [*(position for position, character in enumerate(name) if character == "."), len(name)]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _near(target: Target, selection: Selection) -> dict[str, str]:
    """Missing name → a leftover of the file that looks like it, or is the only one of its shape and last segment."""
    leftovers = [*selection.unexpected, *selection.outside]
    if len(selection.missing) * len(leftovers) > 20_000:
        return {}
    by_form: dict[tuple[str, object], list[str]] = {}
    for name in leftovers:
        form = name.rpartition(".")[2], getattr(selection.leaves.get(name), "shape", None)
        by_form.setdefault(form, []).append(name)
    near = {}
    for name in selection.missing[: 4 * _MOST_LINES]:
        shape = target.by_name[name].shape if name in target.by_name else None
        same = by_form.get((name.rpartition(".")[2], shape), [])
        if close := difflib.get_close_matches(name, leftovers, n=1, cutoff=0.75) or (same if len(same) == 1 else []):
            near[name] = close[0]
    return near


def _listing(names: Sequence[str], near: dict[str, str] | None = None) -> list[str]:
    near = near or {}
    plain = group_names(name for name in names if name not in near)
    hinted = [f"{name}    did you mean {printable(near[name])}, which the file has?" for name in names if name in near]
    return _cut([f"    {line}" for line in [*hinted, *plain]])


def _shapes(mismatched: dict[str, tuple[Shape, Shape]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in mismatched:
        groups.setdefault(_parent(name), []).append(name)
    lines = []
    for names in groups.values():
        (label,) = group_names(names)
        ours = ", ".join(str(mismatched[name][0]) for name in names)
        theirs = ", ".join(str(mismatched[name][1]) for name in names)
        lines.append(f"    {label}    file {ours}    model {theirs}")
    return _cut(lines)


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[: _MOST_LINES - 1], f"    … and {len(lines) - _MOST_LINES + 1:,} more lines like these"]


def _have(things: Sequence[str] | dict[str, tuple[Shape, Shape]]) -> str:
    return "has" if len(things) == 1 else "have"


def _is(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"
