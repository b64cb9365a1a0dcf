"""What the environment may override: how many threads, and whether the page cache is passed by."""

from __future__ import annotations

import os
import warnings

__all__ = ["direct_io", "thread_count"]

THREADS = "TORCHLOAD_THREADS"
DIRECT_IO = "TORCHLOAD_DIRECT_IO"
_WORDS = {"": None, "auto": None, "1": True, "always": True, "0": False, "never": False}


def thread_count() -> int | None:
    """``TORCHLOAD_THREADS``: how many threads may work; ``None`` to choose by what there is to do."""
    text = os.environ.get(THREADS, "")
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    if text:
        _pass_over(THREADS, text, "a positive number")
    return None


def direct_io() -> bool | None:
    """``TORCHLOAD_DIRECT_IO``: whether to read past the page cache; ``None`` to choose by what is in there."""
    text = os.environ.get(DIRECT_IO, "")
    if text not in _WORDS:
        _pass_over(DIRECT_IO, text, "0, 1 or auto")
    return _WORDS.get(text)


def _pass_over(name: str, text: str, wanted: str) -> None:
    # Not an error: by now a load is under way, and it can do without.
    warnings.warn(f"the environment variable {name} is {text!r}, not {wanted}; it is ignored", stacklevel=3)
