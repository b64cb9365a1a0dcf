"""Words and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["format_bytes", "format_seconds", "group_names", "plural", "printable", "short_dtype"]


def short_dtype(dtype: torch.dtype) -> str:
    """The dtype without torch's name before it.

    Example:
        >>> short_dtype(torch.float16)
        'float16'
    """
    return str(dtype).removeprefix("torch.")


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> plural(1, "tensor"), plural(1200, "tensor")
        ('1 tensor', '1,200 tensors')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def group_names(names: Iterable[str]) -> list[str]:
    """Join the tensors of one module, so that many names stay readable.

    Example:
        >>> group_names(["fc.weight", "fc.bias", "conv.weight"])
        ['fc.{weight, bias}', 'conv.weight']
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    lines = []
    for module, leaves in modules.items():
        dot = f"{module}." if module else ""
        lines.append(f"{dot}{leaves[0]}" if len(leaves) == 1 else f"{dot}{{{', '.join(leaves)}}}")
    return lines


def printable(text: str, limit: int = 120) -> str:
    r"""Text from a file, without control characters that would reach a terminal, and cut where it is endless.

    Example:
        >>> printable("fc\x1b[31m")
        'fc\\x1b[31m'
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "replace").decode()
        for character in cut
    )


def format_bytes(count: int) -> str:
    """A number of bytes for people, in binary units.

    Example:
        >>> format_bytes(102_550_000)
        '97.8 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> format_seconds(0.0123)
        '12 ms'
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
