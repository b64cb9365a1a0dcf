"""Progress of a transfer: a bar, a callback, or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["progress_reporter"]

Reporter = Callable[[int, int], None]


@contextlib.contextmanager
def progress_reporter(progress: bool | Reporter, title: str) -> Iterator[Reporter | None]:
    """What the transfer calls with (bytes done, bytes in all); ``None`` if nobody wants to know.

    Args:
        progress: ``True`` for a bar (needs `tqdm`; without it nothing is drawn), or a callable of one's own.
        title: What the bar is labelled with.
    """
    if callable(progress):
        yield progress
        return
    bar_class = _tqdm() if progress else None
    if bar_class is None:
        yield None
        return
    with bar_class(desc=os.path.basename(title), unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def report(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        yield report


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
