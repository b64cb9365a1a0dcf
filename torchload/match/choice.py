"""Take one of the candidates, or say what keeps each from being taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from torchload.core.budget import Allowance
from torchload.core.checkpoint import TensorEntry
from torchload.errors import AmbiguousCheckpointError, IncompatibleCheckpointError
from torchload.match.candidates import find_candidates, needed_tensors
from torchload.match.containers import Leaf, Place, find_places
from torchload.match.names import is_path
from torchload.match.paths import joined
from torchload.match.rename import Rename
from torchload.match.selection import Selection, Wanted
from torchload.match.tables import Standing

__all__ = ["Candidate", "select", "standing_in_company"]

_MOST_CANDIDATES = 5_000
_LISTED = 20  # of many candidates
_SHOWN = 200  # characters of a name


def select(
    root: Any,
    wanted: Wanted,
    *,
    path: str,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    size_bytes: int = 0,
) -> Selection:
    """Choose the part of a checkpoint that belongs to a model.

    Args:
        root: The checkpoint's tree.
        wanted: The model.
        path: The checkpoint, for messages.
        key: Dotted path of the container to use; ``None`` searches all of them.
        prefix: Prefix of the names to use; ``None`` searches all of them.
        rename: Applied to the names of each container before anything else (see `renamer`).
        strict: Whether only a whole fit will do. Otherwise the candidate that fills most is chosen.
        size_bytes: Length of the checkpoint's files, which bounds what its names may cost.

    Returns:
        The candidate that fits; or, if none does, the best one with what it lacks, for the planner to report.

    Raises:
        AmbiguousCheckpointError: Several candidates of equal standing fit and hold different data.
        IncompatibleCheckpointError: `key` or `prefix` names nothing, or the file holds no tensors.
        CorruptCheckpointError: Its names are out of all proportion to the file.
    """
    allowance = Allowance(path, size_bytes)
    places = find_places(root, key, allowance, wanted.whole)
    if strict:
        candidates = find_candidates(places, wanted, prefix, rename, needed_tensors(wanted), strict, allowance)
        if fitting := _at_most(_MOST_CANDIDATES, (candidate for candidate in candidates if candidate.fits), path):
            return _best(fitting, root, path, strict)
    partial = find_candidates(places, wanted, prefix, rename, 1, False, allowance)
    if not strict:
        if likely := _at_most(_MOST_CANDIDATES, _fullest(partial), path):
            return _best(likely, root, path, strict)
    elif nearest := max(partial, key=_nearness, default=None):
        return nearest
    raise _nothing(places, wanted, prefix, path)


def _nearness(candidate: Selection) -> tuple[Any, ...]:
    return _filled(candidate), not candidate.crossed, -len(candidate.unexpected), -candidate.standing


def _filled(candidate: Selection) -> int:
    return len(candidate.pairs) - len(candidate.mismatched)


def _fullest(candidates: Iterable[Selection]) -> Iterator[Selection]:
    """Those that fit, or fill as much as any before them: no others are ever taken, nor mentioned."""
    most = 0
    for candidate in candidates:
        most = max(most, _filled(candidate))
        if candidate.fits or _filled(candidate) == most:
            yield candidate


def _at_most(count: int, candidates: Iterable[Selection], path: str) -> list[Selection]:
    """A list of candidates, if they aren't absurdly many."""
    found = list(islice(candidates, count + 1))
    if len(found) > count:
        raise _ambiguous(found, path)
    return found


class Candidate(Protocol):
    """What may be meant, as far as its name and its company tell."""

    standing: Standing

    @property
    def key(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def leaves(self) -> Mapping[str, Leaf]: ...


def _best(fitting: list[Selection], root: Any, path: str, strict: bool) -> Selection:
    """The strongest of several candidates that fit; those that hold the very same data count once."""
    distinct: dict[tuple[object, ...], Selection] = {}
    for candidate in fitting:
        data = _data(candidate) if len(fitting) > 1 else ()
        known = distinct.get(data)
        if known is None or _rank(candidate, strict) < _rank(known, strict):
            distinct[data] = candidate
    for candidate in distinct.values():
        candidate.standing = standing_in_company(candidate, distinct.values(), root)
    ranked = sorted(distinct.values(), key=lambda candidate: _rank(candidate, strict))
    first = ranked[0]
    equals = [candidate for candidate in ranked if _rank(candidate, strict)[:2] == _rank(first, strict)[:2]]
    if len(equals) > 1:
        raise _ambiguous(equals, path)
    rivals = [candidate.path or "the top level" for candidate in ranked[1:] if candidate.fits]
    first.rivals = tuple(dict.fromkeys(rivals))
    return first


def _data(candidate: Selection) -> tuple[object, ...]:
    """Identity of the data that a candidate would load, whatever it is called."""
    leaves = [candidate.leaves[source] for _, source in sorted(candidate.pairs.items())]
    return tuple(leaf.location if isinstance(leaf, TensorEntry) else id(leaf) for leaf in leaves)


def _rank(candidate: Selection, strict: bool) -> tuple[Any, ...]:
    """Sort key: what decides, then what merely orders equals (a plain fit, a short path)."""
    filled = 0 if strict else -_filled(candidate)
    left = len(candidate.outside) + len(candidate.tolerated)
    return filled, candidate.standing, candidate.crossed, left, len(candidate.path)


def standing_in_company(candidate: Candidate, others: Iterable[Candidate], root: Any) -> Standing:
    """What a name means depends on what stands beside it."""
    top = root if isinstance(root, Mapping) else {}
    if candidate.key == "ema_state_dict" and "message_hub" in top:
        return Standing.ARBITRARY  # mmengine's EMAHook swaps when it saves: these are the raw weights
    if "target_encoder" in candidate.path and any("online_encoder" in other.path for other in others):
        return Standing.UNLIKELY  # BYOL goes on with the online network
    teacher = _network(candidate, "teacher")
    if teacher is not None:
        # Self-distillation (DINO, iBOT, mean teacher): two copies of one network, of which the teacher is the average.
        # A student of another make, or a teacher alone, says nothing of the kind.
        if any(_network(other, "student") == teacher for other in others):
            return Standing.AVERAGE
    return candidate.standing


def _network(candidate: Candidate, name: str) -> dict[str, object] | None:
    """Names and shapes of all that stands below the segment `name` of a candidate's path, without wrappers."""
    segments = candidate.path.split(".")
    if name not in segments:
        return None
    above = joined(*segments[: segments.index(name) + 1]) + "."
    full = ((joined(candidate.key, leaf), value) for leaf, value in candidate.leaves.items())
    return {
        leaf.removeprefix(above).removeprefix("module."): getattr(value, "shape", None)
        for leaf, value in full
        if leaf.startswith(above)
    }


def _ambiguous(equals: list[Selection], path: str) -> AmbiguousCheckpointError:
    containers = len({candidate.key for candidate in equals}) > 1
    argument = "key" if containers else "prefix"
    names = [candidate.key if containers else f"{candidate.prefix}." for candidate in equals]
    listing = "\n".join(f"    {argument}={name!r}" for name in names[:_LISTED])
    listing += f"\n    and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return AmbiguousCheckpointError(
        f"{path} holds {len(equals)} sets of weights that fit this model equally well. Nothing was loaded. "
        f"Say which one is meant:\n{listing}",
        path=path,
        candidates=names,
        argument=argument,
    )


def _nothing(places: Sequence[Place], wanted: Wanted, prefix: str | None, path: str) -> IncompatibleCheckpointError:
    if not places:
        return IncompatibleCheckpointError(
            f"{path} holds no tensors. Nothing was loaded; the model is unchanged.",
            path=path,
            missing_keys=wanted.shapes,
        )
    largest = max(places, key=lambda place: len(place.leaves))
    if prefix is not None:
        tops = sorted({name.partition(".")[0][:_SHOWN] for place in places for name in place.leaves})
        what = f"no names under the prefix {prefix!r} that this model has"
        hint = f"Its names begin with: {', '.join(tops[:12])}{', …' if len(tops) > 12 else ''}."
    else:
        what = "not one name in common with this model"
        theirs, ours = [name[:_SHOWN] for name in list(largest.leaves)[:4]], list(wanted.shapes)[:4]
        hint = f"The file has {', '.join(theirs)}, …; the model has {', '.join(ours)}, …"
    return IncompatibleCheckpointError(
        f"{path} has {what}. Nothing was loaded; the model is unchanged.\n  {hint}",
        path=path,
        missing_keys=wanted.shapes,
        unexpected_keys=[name for name in largest.leaves if is_path(name)],
    )
