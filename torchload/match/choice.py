"""Take one of the candidates, or say what keeps each from being taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from typing import Any

from torchload.core.budget import Allowance
from torchload.core.checkpoint import TensorEntry
from torchload.core.text import listed, printable
from torchload.errors import AmbiguousCheckpointError, IncompatibleCheckpointError, TorchLoadError
from torchload.match.candidates import Search, needed_tensors
from torchload.match.company import is_average_of, lags_behind, standing_in_company
from torchload.match.containers import Place, find_places
from torchload.match.names import is_path
from torchload.match.rename import Rename
from torchload.match.selection import Selection, Wanted
from torchload.match.tables import Standing, container_standing
from torchload.match.values import Read, each_once, was_never_updated

__all__ = ["select"]

_MOST_CANDIDATES = 5_000
_MOST_COMPARED = 200
_LISTED = 10  # of many candidates
_SHOWN = 200  # characters of a name
_MASTERS = "master_fp32"  # what DeepSpeed's optimizers keep beside the weights of a model


def select(
    root: Any,
    wanted: Wanted,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    size_bytes: int = 0,
    read: Read | None = None,
    is_trial: bool = False,
) -> Selection:
    """Choose the part of a checkpoint that belongs to a model.

    Args:
        root: The checkpoint's tree.
        wanted: The model.
        key: Dotted path of the container to use, or of a prefix in one; ``None`` searches all of them.
        prefix: Prefix of the names to use; ``None`` searches all of them.
        rename: Applied to the names of each container before anything else (see `renamed_from`).
        strict: Whether only a whole fit will do. Otherwise the candidate that fills most is chosen, but never one that
            fills less than a whole fit.
        size_bytes: Length of the checkpoint's files, which bounds what its names may cost.
        read: What reads the few values that certainty needs: rival sets are compared, masks are told by them. Without
            it, rivals are never equal.
        is_trial: Whether this is an attempt with an argument that an error would propose, which proposes none itself.

    Returns:
        The candidate that fits; or, if none does, the best one with what it lacks, for the planner to report.

    Raises:
        AmbiguousCheckpointError: Several candidates of equal standing fit and hold different data.
        IncompatibleCheckpointError: `key` or `prefix` names nothing, or the file holds no tensors.
        CorruptCheckpointError: Its names are out of all proportion to the file.
    """
    allowance = Allowance(size_bytes)
    places, prefix = _places_for(root, key, prefix, allowance, wanted)
    search = Search(places, wanted, allowance, read, prefix, rename, masks={})
    choice = _Choice(root, search, key, size_bytes, is_trial=is_trial)
    whole = (candidate for candidate in search.candidates(needed_tensors(wanted)) if candidate.fits)
    if fitting := choice.likely(whole):
        return choice.best(fitting)
    guesses = search._replace(guess=True).candidates(needed_tensors(wanted))
    if found := _distinct(choice.likely(candidate for candidate in guesses if candidate.fits)):
        raise choice.unproved(found)
    partial = search.candidates(1, parts=True)
    if not strict:
        if likely := choice.likely(_fullest(partial)):
            return choice.best(likely)
    elif nearest := _nearest(choice.meant(partial)):
        return nearest
    raise _nothing(places, wanted, prefix, is_renamed=rename is not None)


def _places_for(
    root: Any, key: str | None, prefix: str | None, allowance: Allowance, wanted: Wanted
) -> tuple[list[Place], str | None]:
    """The containers to look into, and the prefix in them; a key may lead on into the names of a container."""
    if key is None or prefix is not None:
        return find_places(root, key, allowance, wanted.whole), prefix
    places = find_places(root, None, allowance, wanted.whole)
    if exact := [place for place in places if place.path == key]:
        return exact, prefix
    for place in sorted(places, key=lambda place: len(place.path), reverse=True):
        inner = key[len(place.path) + 1 :] if place.path else key
        if key.startswith(f"{place.path}." if place.path else "") and inner:
            if any(name.startswith(f"{inner}.") for name in place.leaves):
                return [place], inner
    return find_places(root, key, allowance, wanted.whole), prefix  # says what there is


_OWN_NAMES = 4  # what fills a quarter of the best under the model's own names is nearer than the best


def _nearest(candidates: Iterable[Selection]) -> Selection | None:
    """Of what doesn't fit, what to speak of: the model's own names, if the file has some, else what fills most."""
    best: Selection | None = None
    own: Selection | None = None
    for candidate in candidates:
        if best is None or _nearness(candidate) > _nearness(best):
            best = candidate
        if not (candidate.prefix or candidate.added) and (own is None or _nearness(candidate) > _nearness(own)):
            own = candidate
    if best is None or own is None or _filled(own) * _OWN_NAMES < _filled(best):
        return best
    return own


def _nearness(candidate: Selection) -> tuple[Any, ...]:
    """Sort key of what doesn't fit: what is filled, and then the whole of a container before a part of it."""
    return _filled(candidate), not candidate.crossed, not candidate.prefix, -len(candidate.unexpected)


def _filled(candidate: Selection) -> int:
    return len(candidate.pairs) - len(candidate.mismatched)


def _fullest(candidates: Iterable[Selection]) -> Iterator[Selection]:
    """Those that fit, or fill as much as any before them: no others are ever taken, nor mentioned."""
    most = 0
    for candidate in candidates:
        most = max(most, _filled(candidate))
        if candidate.fits or _filled(candidate) == most:
            yield candidate


class _Choice:
    """One choice among candidates: first by what they are, then by what they hold."""

    def __init__(self, root: Any, search: Search, key: str | None, size_bytes: int, *, is_trial: bool) -> None:
        self._root = root
        self._search = search
        self._key = key
        self._size_bytes = size_bytes
        self._is_trial = is_trial
        self._reading = Allowance(size_bytes)  # of its own: names have to be looked at all the same
        self._notes: list[str] = []

    def meant(self, candidates: Iterable[Selection]) -> Iterator[Selection]:
        """Those that can be meant: nothing inside an optimizer or the like is, unless the caller names it."""
        for candidate in candidates:
            if candidate.standing is not Standing.NOT_WEIGHTS or self._is_named:
                yield candidate

    @property
    def _is_named(self) -> bool:
        return self._key is not None or self._search.prefix is not None

    def likely(self, candidates: Iterable[Selection]) -> list[Selection]:
        """A list of them, if they aren't absurdly many."""
        found = list(islice(self.meant(candidates), _MOST_CANDIDATES + 1))
        if len(found) > _MOST_CANDIDATES:
            raise self._ambiguous(found)
        return found

    def best(self, likely: list[Selection]) -> Selection:
        """The one that is meant.

        Raises:
            AmbiguousCheckpointError: Several of them may be.
        """
        if not any(candidate.fits for candidate in likely):
            most = max(map(_filled, likely))
            likely = [candidate for candidate in likely if _filled(candidate) == most]
        distinct = _distinct(likely)
        if len(distinct) > _MOST_COMPARED:
            raise self._ambiguous(distinct)
        left = everyone = [
            replace(candidate, standing=standing_in_company(candidate, distinct, self._root)) for candidate in distinct
        ]
        for rule in (self._as_named, self._whole, self._not_lagging, self._exact, self._average, self._not_equal):
            if len(left) > 1:
                left = rule(left)
        if len(left) > 1:
            raise self._ambiguous(left)
        chosen = left[0]
        rivals = [other.path for other in everyone if other.fits and other.path != chosen.path]
        self._notes += self._incomplete_averages(chosen)
        return replace(chosen, rivals=tuple(dict.fromkeys(rivals)), notes=tuple(self._notes))

    # --- the rules, in their order ---

    def _as_named(self, left: list[Selection]) -> list[Selection]:
        """The whole of a container that the caller names, rather than a part of it."""
        whole = [candidate for candidate in left if not candidate.prefix]
        return whole if self._key is not None and whole else left

    def _whole(self, left: list[Selection]) -> list[Selection]:
        """Without those whose every tensor another one takes too, and more: a part of it that looks like the whole."""
        used = [set(candidate.pairs.values()) for candidate in left]
        return [
            candidate
            for candidate, taken in zip(left, used)
            if not any(
                candidate.key == other.key and candidate is not other and taken < others
                for other, others in zip(left, used)
            )
        ]

    def _not_lagging(self, left: list[Selection]) -> list[Selection]:
        """Without copies that lag behind a network beside them, and without an optimizer's masters beside weights."""
        weights = [candidate for candidate in left if candidate.segments[:1] != (_MASTERS,)] or left
        return [
            candidate
            for candidate in weights
            if candidate.averaged or not any(lags_behind(candidate, other) for other in weights)
        ]

    def _exact(self, left: list[Selection]) -> list[Selection]:
        """Without what has to be renamed in a container where other names are the model's to the letter."""
        exact = {candidate.key for candidate in left if candidate.is_exact}
        return [candidate for candidate in left if candidate.is_exact or candidate.key not in exact]

    def _average(self, left: list[Selection]) -> list[Selection]:
        """Averages before the raw weights of the same network, and raw weights before an average that began nowhere."""
        raw = [candidate for candidate in left if not candidate.averaged]
        averages: list[Selection] = []
        for candidate in left:
            if not candidate.averaged:
                continue
            if raw and (counter := self._never_updated(candidate)):
                self._notes.append(
                    f"the average {candidate.path!r} was never updated ({counter} is 0): took the raw weights"
                )
            else:
                averages.append(candidate)
        if not averages:
            return raw
        unrelated = [one for one in raw if not any(is_average_of(average, one) for average in averages)]
        if unrelated and len(self._not_equal(raw)) == 1:  # nothing else that a name without a subject could mean
            unrelated = [one for one in raw if not any(is_average_of(average, one, only=True) for average in averages)]
        return [*averages, *unrelated]

    def _never_updated(self, average: Selection) -> str | None:
        """The counter that says so; it stands in the average's container, or in one that holds it."""
        if self._search.read is None:
            return None
        above = [self._root, *(place.container for place in self._search.places if _is_above(place, average))]
        counters = (was_never_updated(holder, self._search.read) for holder in (average.container, *reversed(above)))
        return next(filter(None, counters), None)

    def _not_equal(self, left: list[Selection]) -> list[Selection]:
        """Each set of values once."""
        return each_once(left, lambda candidate: candidate.filled, self._search.read, self._reading)

    def _incomplete_averages(self, chosen: Selection) -> Iterator[str]:
        """What to say of averages that only lack buffers: somebody may have meant one of them."""
        if chosen.averaged or self._is_named:
            return
        for place in self._search.places:
            if container_standing(*place.segments) is not Standing.AVERAGE:
                continue
            for candidate in self._search._replace(places=[place]).candidates(max(1, len(place.leaves) // 2)):
                buffers = self._search.wanted.buffers
                if not candidate.mismatched and candidate.missing and buffers.issuperset(candidate.missing):
                    lacking = listed(candidate.missing, 3)
                    yield f"the average {candidate.path!r} lacks buffers of the model ({lacking}): took the raw weights"
                    break

    # --- asking ---

    def unproved(self, found: list[Selection]) -> AmbiguousCheckpointError:
        """The question where nothing but shapes speaks for some part of the file."""
        if len(found) == 1:
            what = "a part with the shapes of this model, but under another name: nothing says that it is the one meant"
        else:
            what = f"{len(found):,} parts with the shapes of this model, and nothing says which of them is meant"
        return self._asked(found, what, "If it is")

    def _ambiguous(self, equals: list[Selection]) -> AmbiguousCheckpointError:
        what = f"{len(equals):,} sets of weights that fit this model equally well"
        return self._asked(equals, what, "Say which is meant")

    def _asked(self, equals: list[Selection], what: str, request: str) -> AmbiguousCheckpointError:
        containers = len({candidate.key for candidate in equals}) > 1 or not all(one.prefix for one in equals)
        argument = "key" if containers else "prefix"
        names = [candidate.path if containers else f"{candidate.prefix}." for candidate in equals]
        short = [(name, one) for name, one in zip(names[:_LISTED], equals) if len(name) <= _SHOWN]
        tried = [name for name, one in short if self._works({argument: name}, one)]
        listing = "\n".join(f"    {argument}={name!r}" for name in tried)
        listing += f"\n    and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
        return AmbiguousCheckpointError(
            f"The checkpoint holds {what}.\n  {request}:\n{listing}",
            candidates=names,
            argument=argument,
        )

    def _works(self, argument: dict[str, str], meant: Selection) -> bool:
        """Whether an argument that is about to be proposed chooses what it should."""
        search = self._search
        if self._is_trial:
            return True
        try:
            found = select(
                self._root,
                search.wanted,
                rename=search.rename,
                size_bytes=self._size_bytes,
                read=search.read,
                is_trial=True,
                key=argument.get("key", self._key),
                prefix=argument.get("prefix", search.prefix),
            )
        except TorchLoadError:
            return False
        return _data(found) == _data(meant)


def _is_above(place: Place, candidate: Selection) -> bool:
    return place.segments == candidate.segments[: len(place.segments)]


def _distinct(fitting: list[Selection]) -> list[Selection]:
    """Those that hold the very same data once: as it is reached most plainly."""
    if len(fitting) < 2:
        return fitting
    distinct: dict[tuple[object, ...], Selection] = {}
    for candidate in fitting:
        data = _data(candidate)
        known = distinct.get(data)
        if known is None or _plainness(candidate) < _plainness(known):
            distinct[data] = candidate
    return list(distinct.values())


def _data(candidate: Selection) -> tuple[object, ...]:
    """Identity of the data that a candidate would load, whatever it is called."""
    leaves = (leaf for _, leaf in sorted(candidate.filled.items(), key=itemgetter(0)))
    return tuple(leaf.location if isinstance(leaf, TensorEntry) else id(leaf) for leaf in leaves)


def _plainness(candidate: Selection) -> tuple[Any, ...]:
    """Sort key of ways to the same data: a plain fit, with little left, by a short path."""
    left = len(candidate.outside) + len(candidate.ignored)
    return not candidate.fits, candidate.standing, candidate.crossed, left, len(candidate.path)


def _nothing(
    places: Sequence[Place], wanted: Wanted, prefix: str | None, *, is_renamed: bool
) -> IncompatibleCheckpointError:
    if not places:
        return IncompatibleCheckpointError("The checkpoint holds no tensors.", missing_keys=wanted.shapes)
    largest = max(places, key=lambda place: len(place.leaves))
    if prefix is not None:
        tops = sorted({name.partition(".")[0][:_SHOWN] for place in places for name in place.leaves})
        what = f"no names under the prefix {prefix!r} that this model has"
        hint = f"Its names begin with: {listed(tops, _LISTED)}."
    else:
        what = "not one name in common with this model" + (" after rename=" if is_renamed else "")
        in_file, in_model = (
            ", ".join([*(printable(name, _SHOWN) for name in islice(names, 4)), "…"])
            for names in (largest.leaves, wanted.shapes)
        )
        hint = f"The file has {in_file}; the model has {in_model if wanted.shapes else 'no tensors'}"
    return IncompatibleCheckpointError(
        f"The checkpoint has {what}.\n  {hint}",
        missing_keys=wanted.shapes,
        unexpected_keys=[name for name in largest.leaves if is_path(name)],
    )
