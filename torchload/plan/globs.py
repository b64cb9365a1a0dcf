"""Globs over names, as `skip` and `keep_fp32` take them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

__all__ = ["glob_matcher"]


def glob_matcher(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """One regular expression for several globs over whole names; ``None`` for none.

    Example:
        >>> bool(glob_matcher(["fc.*", "*.bias"]).match("fc.weight"))
        True
    """
    translated = [fnmatch.translate(pattern) for pattern in patterns]
    return re.compile("|".join(translated)) if translated else None
