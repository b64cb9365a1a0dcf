"""Patterns of the caller that match nothing: a typo, as a rule."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["unkept_globs", "unkept_rules"]

_NEAR = 3


def unkept_globs(argument: str, patterns: Iterable[str], names: Iterable[str]) -> tuple[str | None, list[str]]:
    """What to say of globs that match no name.

    Returns:
        An error if none of them matches anything, and else a warning for each that doesn't.

    Example:
        >>> unkept_globs("skip", ["fv.*"], ["fc.weight", "body.weight"])[0]
        "skip=['fv.*'] matches no name of the model or the file: correct it or leave it out. Near it: 'fc.weight'"
        >>> unkept_globs("skip", ["fc.*"], ["fc.weight"])
        (None, [])
    """
    known = list(dict.fromkeys(names))
    return _unkept(argument, list(patterns), known, [fnmatch.translate(pattern) for pattern in patterns], re.match)


def unkept_rules(rename: Any, names: Iterable[str]) -> tuple[str | None, list[str]]:
    """The same of the rules of a `rename` table; a callable promises nothing."""
    if not isinstance(rename, Mapping):
        return None, []
    return _unkept("rename", list(rename), list(names), list(rename), re.search)


def _unkept(
    argument: str, patterns: list[str], names: list[str], expressions: list[str], matches: Any
) -> tuple[str | None, list[str]]:
    compiled = [re.compile(expression) for expression in expressions]
    idle = [pattern for pattern, one in zip(patterns, compiled) if not any(matches(one, name) for name in names)]
    if not idle:
        return None, []
    where = "of the file" if argument == "rename" else "of the model" if argument == "keep_fp32" else ""
    where = where or "of the model or the file"
    if len(idle) == len(patterns):
        shown = ", ".join(map(repr, idle[:_NEAR])) + (", …" if len(idle) > _NEAR else "")
        return f"{argument}=[{shown}] matches no name {where}: correct it or leave it out.{_near(idle[0], names)}", []
    return None, [
        f"{argument}= has {pattern!r}, which matches no name {where}.{_near(pattern, names)}" for pattern in idle
    ]


def _near(pattern: str, names: list[str]) -> str:
    """Names that look like what a pattern was meant for."""
    plain = re.sub(r"[*?\[\]^$\\()]", "", pattern).strip(".")
    count = plain.count(".") + 1
    parts = {".".join(name.split(".")[:count]): name for name in reversed(names[:5_000])}
    close = difflib.get_close_matches(plain, parts, n=_NEAR, cutoff=0.5) if plain else []
    return f" Near it: {', '.join(repr(parts[part]) for part in close)}" if close else ""
