"""Globs over names, as `skip` and `keep_fp32` take them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from torchload.match.paths import unwrapped

__all__ = ["Globs"]


class Globs:
    """Globs over whole names, and over those without the segments of wrappers.

    Attributes:
        patterns: The globs.
    """

    __slots__ = ("_expression", "patterns")

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)
        translated = "|".join(map(fnmatch.translate, self.patterns))
        self._expression = re.compile(translated) if self.patterns else None

    def match(self, name: str) -> bool:
        """Whether one of them matches a name as it is.

        Example:
            >>> Globs(["fc.*", "*.bias"]).match("fc.weight"), Globs(["fc.*"]).match("module.fc.weight")
            (True, False)
        """
        return self._expression is not None and self._expression.match(name) is not None

    def match_in_file(self, name: str) -> bool:
        """Whether one of them matches a name of a file, which may have been wrapped when it was saved.

        Example:
            >>> Globs(["fc.*"]).match_in_file("module.fc.weight")
            True
        """
        if self._expression is None:
            return False
        return self.match(name) or self.match(unwrapped(name))

    def of(self, bare: Mapping[str, str]) -> frozenset[str]:
        """Those names of a model that they match; `bare` has each without the wrappers that are really there."""
        if self._expression is None:
            return frozenset()
        return frozenset(name for name, plain in bare.items() if self.match(name) or self.match(plain))
