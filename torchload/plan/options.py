"""What the caller asked for."""

from __future__ import annotations

from typing import NamedTuple

from torchload.match.globs import Globs
from torchload.match.rename import Rename
from torchload.model.placement import Placement
from torchload.plan.dtypes import DtypeSpec

__all__ = ["Options"]


_NO_GLOBS = Globs()


class Options(NamedTuple):
    """What the caller asked for, checked and ready for planning.

    Attributes:
        placement: Where tensors go.
        dtype: Floating dtype to cast to, ``"auto"`` for the checkpoint's, ``None`` for the model's own.
        keep_fp32: Globs of names that stay float32.
        strict: Whether anything missing, mismatched or unexpected is an error.
        atomic: Whether everything is staged in fresh memory first.
        mmap: Whether tensors on the CPU may become private views of the file.
        verify: Whether data is compared with what the file records, and with what landed.
        skip: Globs of names that are left alone.
        rename: What was done to the file's names.
    """

    placement: Placement
    dtype: DtypeSpec
    keep_fp32: tuple[str, ...]
    strict: bool
    atomic: bool
    mmap: bool = False
    verify: bool = False
    skip: Globs = _NO_GLOBS
    rename: Rename | None = None
