"""The caller's own renaming of a checkpoint's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torchload.errors import AmbiguousCheckpointError

__all__ = ["Rename", "renamed_from"]

Rename = Mapping[str, str] | Callable[[str], "str | None"]
"""Regular expression → replacement (applied in order, each with `re.sub`), or a callable; ``None`` drops the name."""


def renamed_from(rename: Rename, names: Iterable[str]) -> dict[str, str]:
    r"""New name → old name, in the same order, without what was dropped.

    Raises:
        AmbiguousCheckpointError: Two names would become one.

    Example:
        >>> renamed_from({r"^net\.": "backbone."}, ["net.fc.weight"])
        {'backbone.fc.weight': 'net.fc.weight'}
    """
    function = rename if callable(rename) else _substitution(rename)
    came_from: dict[str, str] = {}
    for name in names:
        new = function(name)
        if new is None:
            continue
        if new in came_from:
            raise AmbiguousCheckpointError(
                f"rename gives {came_from[new]!r} and {name!r} the same name {new!r}. Make the rule more specific.",
                candidates=(came_from[new], name),
                argument="rename",
            )
        came_from[new] = name
    return came_from


def _substitution(table: Mapping[str, str]) -> Callable[[str], str]:
    rules = [(re.compile(pattern), replacement) for pattern, replacement in table.items()]

    def substitute(name: str) -> str:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        return name

    return substitute
