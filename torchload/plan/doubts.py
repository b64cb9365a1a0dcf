"""What a plan has to ask or to tell beyond names, shapes and dtypes: problems that refuse it, warnings that don't."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Checkpoint
from torchload.core.text import listing, plural
from torchload.match import Selection
from torchload.match.globs import Globs
from torchload.match.partial import transposed
from torchload.match.rename import Rename
from torchload.model.target import Target
from torchload.plan.constants import differing_constants
from torchload.plan.options import Options
from torchload.plan.promises import unkept_globs, unkept_rules
from torchload.plan.quantized import float8_sources, quantized_problem

__all__ = ["doubts_about", "unkept"]


def unkept(
    target: Target, selection: Selection, skip: Globs, keep_fp32: Sequence[str] = (), rename: Rename | None = None
) -> tuple[list[str], list[str]]:
    """What to say of the caller's patterns that match nothing: problems and warnings."""
    problems: list[str] = []
    warnings: list[str] = []
    if not (skip.patterns or keep_fp32 or rename):
        return problems, warnings
    bare = [*target.bare(target.names).items()]
    model_names = [name for pair in bare for name in pair]
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


def doubts_about(
    target: Target, checkpoint: Checkpoint, selection: Selection, options: Options
) -> tuple[list[str], list[str]]:
    """Everything of the kind: what refuses the load, one sentence each, and what is worth a warning."""
    problems: list[str] = []
    warnings: list[str] = []
    if (problem := quantized_problem(target, selection, checkpoint)) is not None:
        problems.append(problem)
    elif options.dtype != "auto" and (plain := float8_sources(target, selection)):
        warnings.append(
            f"{plural(len(plain), 'tensor')} of the file {'is' if len(plain) == 1 else 'are'} 8-bit floats, with no "
            f"scale beside them: the numbers are cast as they are ({listing(plain)})"
        )
    if turned := [name for name in transposed(selection) if name not in selection.aliases]:
        problems.append(
            f"{listing(turned)}: the file has the matrix the other way round (rows and columns exchanged). Square "
            "matrices beside it would be loaded transposed; transpose all of them first"
        )
    problems += _unproved_aliases(target, selection, strict=options.strict)
    if not options.strict and (parts := list(_left_as_it_is(selection))):
        whole = checkpoint.whole() if selection.missing else None
        warnings.append(f"loaded in part (strict=False): {'; '.join([*parts, *filter(None, [whole])])}")
    if not options.strict and selection.averaged:
        warnings.append(f"took averaged weights, {selection.path!r}; key= chooses others")
    warnings += differing_constants(target, selection, Allowance(checkpoint.size_bytes))
    return problems, warnings


def _unproved_aliases(target: Target, selection: Selection, *, strict: bool) -> Iterator[str]:
    """What shared memory in another shape when it was saved: only a model that shares it so tells how."""
    for name, kept in selection.aliases.items():
        if (slot := target.by_name.get(name)) is not None and slot.tensor.is_meta:
            what = "build the model on a real device, where its own tensors share memory so"
        elif strict:
            what = "make it a view of that in the model, as it was when saved, or save with torch.save"
        else:
            continue
        yield (
            f"{name} is in the file only as another name of {kept!r}, with which it shared memory in another shape; "
            f"the file doesn't say which part of it. To load it, {what}"
        )


def _left_as_it_is(selection: Selection) -> Iterator[str]:
    if kept := [*selection.missing, *selection.mismatched]:
        yield f"{plural(len(kept), 'tensor')} of the model kept initial values: {listing(kept)}"
    if unused := selection.unexpected:
        yield f"{plural(len(unused), 'tensor')} of the file went unused: {listing(unused)}"
