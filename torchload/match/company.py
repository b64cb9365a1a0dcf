"""What a set of weights means beside the others of its file: an average, a copy that lags, another network.

Names of roles prove nothing by themselves. What they are used for here is closed: which of two sets *of one network* is
meant. Whether two are of one network is told by what is left of their names without the words for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchload.core.wrappers import WRAPPERS
from torchload.match.containers import as_mapping
from torchload.match.selection import Selection
from torchload.match.tables import (
    AVERAGED_WORDS,
    SWAPPED,
    Standing,
    container_standing,
    words_of,
)

__all__ = ["is_average_of", "is_copy_of", "lags_behind", "standing_in_company"]


# Words that say that something is weights, and not whose.
_NOBODYS = frozenset(
    {
        *("state", "dict", "dicts", "model", "models", "net", "network", "module", "params", "param", "parameters"),
        *("weight", "weights", "sd", "online", "raw", "shadow", "copy", "pytorch", "base", "bare", "current"),
        "backbone",
    }
)
_ALIASES = {"g": "generator", "netg": "generator", "d": "discriminator", "netd": "discriminator"}
_HEADS = frozenset({"projector", "projection_head", "proj_head", "dino_head", "ibot_head"})  # of self-distillation
_DINOS = frozenset({"mlp", "last_layer"})  # inside DINO's, which is called `head`


def standing_in_company(candidate: Selection, others: Sequence[Selection], root: Any) -> Standing:
    """What a name means in its file."""
    for swap in SWAPPED:
        if candidate.segments[:1] in ((swap.average,), (swap.raw,)) and swap.is_in(root):
            inner = container_standing(*candidate.segments[1:])
            return Standing.AVERAGE if candidate.segments[0] == swap.average and inner is Standing.PLAIN else inner
    standing = container_standing(*candidate.segments)
    if standing is not Standing.PLAIN:
        return standing
    if "target_encoder" in candidate.segments and _stands_beside(candidate, "target_encoder", "encoder", root):
        if _stands_beside(candidate, "target_encoder", "predictor", root):
            return Standing.AVERAGE  # I-JEPA, V-JEPA
    if "teacher" in candidate.segments and _is_self_distilled(candidate, others, root):
        return Standing.AVERAGE
    return standing


def is_average_of(average: Selection, raw: Selection, *, only: bool = False) -> bool:
    """Whether an average is of the same network as raw weights; if those are the `only` ones, any name will do."""
    averaged, trained = _subject(average.segments), _subject(raw.segments)
    if "teacher" in averaged:
        averaged = (averaged - {"teacher"}) | {"student"}
    return averaged == trained or (only and not (averaged and trained))


def _subject(segments: Iterable[str]) -> frozenset[str]:
    """The words of a path that say whose weights they are."""
    words = (word for segment in segments if segment not in WRAPPERS for word in words_of(segment))
    return frozenset(
        _ALIASES.get(word, word)
        for word in words
        if word not in AVERAGED_WORDS and word not in _NOBODYS and word != "target" and not word.isdecimal()
    )


def is_copy_of(label: str, other: str) -> bool:
    """Whether one of two names that stand side by side is the average of the other, or a copy that lags behind it.

    Example:
        >>> is_copy_of("net_ema", "net"), is_copy_of("q_net_target", "q_net"), is_copy_of("decoder", "encoder")
        (True, True, False)
    """
    words = words_of(label)
    average = [word for word in words if word not in AVERAGED_WORDS]
    return follows(label, other) or (len(average) < len(words) and average == list(words_of(other)))


_LAGGING = frozenset({"target", "momentum", "slow", "delayed"})
_LEADING = frozenset({"online", "policy", "q", "local"})  # what reinforcement learning calls the network that it trains


def follows(label: str, other: str) -> bool:
    """Whether a network lags behind another, by their names.

    Example:
        >>> follows("encoder_k", "encoder_q"), follows("momentum_encoder", "encoder"), follows("target", "online")
        (True, True, True)
    """
    words, followed_words = words_of(label), words_of(other)
    if "k" in words and tuple("q" if word == "k" else word for word in words) == followed_words:
        return True
    rest = [word for word in words if word not in _LAGGING]
    followed = (list(followed_words), [word for word in followed_words if word not in _LEADING])
    return len(rest) < len(words) and _LAGGING.isdisjoint(followed_words) and rest in followed


def lags_behind(candidate: Selection, other: Selection) -> bool:
    """Whether one of two sets of weights is a copy that follows the other during training."""
    path, other_path = _without_wrappers(candidate), _without_wrappers(other)
    if len(path) != len(other_path):
        return False
    apart = [(here, there) for here, there in zip(path, other_path) if here != there]
    if len(apart) != 1:
        return False
    here, there = apart[0]
    within = candidate.key == other.key  # modules of one state dict, not containers that somebody put side by side
    return follows(here, there) or (within and here == "teacher" and there == "model")


def _stands_beside(candidate: Selection, segment: str, sibling: str, root: Any) -> bool:
    """Whether a file has `sibling` where a candidate's path has `segment`, as a container or as a prefix of names."""
    position = candidate.segments.index(segment)
    inside = len(_key_segments(candidate))
    if position >= inside:
        above = ".".join([*candidate.segments[inside:position], sibling]) + "."
        return any(name.startswith(above) for name in candidate.leaves)
    for name in candidate.segments[:position]:
        root = root[name] if isinstance(root, Mapping) and name in root else None
    return isinstance(root, Mapping) and sibling in root


def _key_segments(candidate: Selection) -> tuple[str, ...]:
    """The part of a candidate's path that leads to its container."""
    for count in range(len(candidate.segments) + 1):
        if ".".join(candidate.segments[:count]) == candidate.key:
            return candidate.segments[:count]
    return ()


# --- self-distillation ---


def _is_self_distilled(candidate: Selection, others: Sequence[Selection], root: Any) -> bool:
    """Whether a teacher is the average of the student beside it (DINO, iBOT, mean teacher), and not another network.

    A teacher that was trained before says nothing of the kind, even if it is of the student's make.
    """
    name = tuple("student" if segment == "teacher" else segment for segment in _without_wrappers(candidate))
    student = next((other for other in others if _without_wrappers(other) == name), None)
    if student is None:
        return False
    if _has_mark(root):
        return True
    return all(
        _has_projection_head(_all_below(side, role)) for side, role in ((candidate, "teacher"), (student, "student"))
    )


def _without_wrappers(candidate: Selection) -> tuple[str, ...]:
    return tuple(name for name in candidate.segments if name not in WRAPPERS)


def _has_mark(root: Any) -> bool:
    """Whether something at a file's top level, or a setting that is on, says that a teacher is an average."""
    top = as_mapping(root) or {}
    if any(_is_mark(str(name)) for name in top):
        return True
    for settings in (as_mapping(value) or {} for name, value in top.items() if str(name) in _SETTINGS):
        marks = [value for name, value in settings.items() if _is_mark(str(name))]
        if any(marks) and not any(value is False for value in marks):  # `model_ema=False` beside `model_ema_decay`
            return True
    return False


_SETTINGS = frozenset({"args", "cfg", "config", "hyper_parameters", "hparams", "opt", "options"})


def _is_mark(name: str) -> bool:
    words = words_of(name)
    return (words[:1] in (("dino",), ("ibot",))) or "ema" in words or "momentum_teacher" in name


def _has_projection_head(names: Iterable[str]) -> bool:
    """Whether a network ends in the head that self-distillation compares, rather than in a classifier."""
    segments = [set(name.split(".")) for name in names]
    return any(not _HEADS.isdisjoint(parts) or ("head" in parts and not _DINOS.isdisjoint(parts)) for parts in segments)


def _all_below(candidate: Selection, role: str) -> Iterable[str]:
    """Every name below the segment `role` of a candidate's path."""
    inside = _key_segments(candidate)
    if role in inside:
        yield from candidate.leaves
        return
    above = ".".join(candidate.segments[len(inside) : candidate.segments.index(role) + 1]) + "."
    yield from (name for name in candidate.leaves if name.startswith(above))
