"""What a plan has to ask or to tell beyond names, shapes and dtypes: problems that refuse it, warnings that don't."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Checkpoint
from torchload.core.text import group_names, plural
from torchload.match import Selection
from torchload.match.globs import Globs
from torchload.match.partial import transposed
from torchload.match.rename import Rename
from torchload.model.target import Target
from torchload.model.unwrapping import bare_names
from torchload.plan.constants import differing_constants
from torchload.plan.options import Options
from torchload.plan.promises import unkept_globs, unkept_rules
from torchload.plan.quantized import float8_sources, quantized_problem

__all__ = ["Doubts", "unkept"]

_LISTED = 8


def unkept(
    target: Target, selection: Selection, skip: Globs, keep_fp32: Sequence[str] = (), rename: Rename | None = None
) -> tuple[list[str], list[str]]:
    """What to say of the caller's patterns that match nothing: problems and warnings."""
    problems: list[str] = []
    warnings: list[str] = []
    if not (skip.patterns or keep_fp32 or rename):
        return problems, warnings
    ours = [*bare_names(target.model, target.names).items()]
    model_names = [name for pair in ours for name in pair]
    original = [selection.original.get(name, name) for name in selection.leaves]
    spelled = [*selection.leaves, *original, *selection.alignment.leftover.values()]
    found = [
        unkept_globs("skip", skip.patterns, [*model_names, *spelled]),
        unkept_globs("keep_fp32", keep_fp32, model_names),
        unkept_rules(rename, original),
    ]
    for problem, more in found:
        problems += [problem] if problem else []
        warnings += more
    return problems, warnings


class Doubts:
    """Everything of the kind about one selection.

    Attributes:
        problems: What refuses the load, one sentence each.
        warnings: What a careful person would want to know of it.
    """

    def __init__(self, target: Target, checkpoint: Checkpoint, selection: Selection, options: Options) -> None:
        self._target, self._checkpoint, self._selection, self._options = target, checkpoint, selection, options
        self.problems, self.warnings = unkept(target, selection, options.skip, options.keep_fp32, options.rename)
        self._look_at_quantized()
        if turned := [name for name in transposed(selection) if name not in selection.aliases]:
            self.problems.append(
                f"{_listed(turned)}: the file has the matrix the other way round. Square ones beside it would be "
                "loaded transposed; transpose them all first"
            )
        self.problems += self._unproved_aliases()
        if not options.strict:
            self._look_at_parts()
        self.warnings += differing_constants(target, selection, Allowance(checkpoint.size_bytes))

    def _look_at_quantized(self) -> None:
        if (problem := quantized_problem(self._target, self._selection, self._checkpoint)) is not None:
            self.problems.append(problem)
        elif self._options.dtype != "auto" and (plain := float8_sources(self._target, self._selection)):
            self.warnings.append(
                f"{plural(len(plain), 'tensor')} of the file {'is' if len(plain) == 1 else 'are'} 8-bit floats, and no "
                f"scale for them was found: cast as they are ({_listed(plain)})"
            )

    def _unproved_aliases(self) -> Iterator[str]:
        """What shared memory in another shape when it was saved: only a model that shares it so tells how."""
        for name, kept in self._selection.aliases.items():
            if (slot := self._target.by_name.get(name)) is not None and slot.tensor.is_meta:
                what = "build the model on a real device, where its own tensors share memory so"
            elif self._options.strict:
                what = "make it a view of that in the model, as it was when saved, or save with torch.save"
            else:
                continue
            yield (
                f"{name} is in the file only as another name of {kept!r}, with which it shared memory in another "
                f"shape; the file doesn't say which part of it. To load it, {what}"
            )

    def _look_at_parts(self) -> None:
        """What `strict=False` leaves as it is."""
        selection = self._selection
        if parts := list(_left_as_it_is(selection)):
            self.warnings.append(f"loaded in part (strict=False): {'; '.join(parts)}")
        if selection.averaged:
            self.warnings.append(f"took averaged weights, {selection.path!r}; key= chooses others")


def _left_as_it_is(selection: Selection) -> Iterator[str]:
    if kept := [*selection.missing, *selection.mismatched]:
        yield f"{plural(len(kept), 'tensor')} of the model kept initial values: {_listed(kept)}"
    if unused := selection.unexpected:
        yield f"{plural(len(unused), 'tensor')} of the file went unused: {_listed(unused)}"


def _listed(names: Sequence[str]) -> str:
    groups = group_names(names)
    return ", ".join(groups[:_LISTED]) + (f" and {len(groups) - _LISTED} more" if len(groups) > _LISTED else "")
