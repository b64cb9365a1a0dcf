"""Words and numbers as people read them, and names from files as a terminal may show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

__all__ = [
    "as_glob",
    "format_bytes",
    "format_seconds",
    "group_names",
    "listed",
    "listing",
    "plural",
    "printable",
    "printable_lines",
    "quoted",
    "short_dtype",
]


def printable(text: str, limit: int | None = 120) -> str:
    r"""Text that may come from a file, as one line of at most `limit` characters that does nothing to a terminal.

    Control characters, line breaks, and what changes the direction of writing are spelled out, as `repr` does.

    Example:
        >>> print(printable("fc\x1b[2K\nweight"), printable("weight", 4))
        fc\x1b[2K\nweight wei…
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "replace").decode()
        for character in text
    )


def printable_lines(text: str) -> str:
    """`printable`, but lines stay lines."""
    return text if text.isprintable() else "\n".join(printable(line, None) for line in text.split("\n"))


def quoted(error: Exception) -> str:
    r"""What code that isn't ours said, in one line: it may hold names from a file.

    An error whose cause this one stays is printed as well, so its own text is spelled out too.

    Example:
        >>> quoted(RuntimeError("Unexpected key(s):\n\t'fc.weight'"))
        "Unexpected key(s): 'fc.weight'"
    """
    text = printable(" ".join(str(error).split()), None)
    error.args = tuple(printable_lines(part) if isinstance(part, str) else part for part in error.args)
    return text


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


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in one line, cut off where there are many.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name, 200) for name in names[:most]) + more


def group_names(names: Iterable[str]) -> list[str]:
    """Join the tensors of one module, so that many names stay readable.

    Example:
        >>> group_names(["fc.weight", "fc.bias", "conv.weight"])
        ['fc.{weight, bias}', 'conv.weight']
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = printable(name, None).rpartition(".")
        modules.setdefault(module, []).append(leaf)
    lines = []
    for module, leaves in modules.items():
        dot = f"{module}." if module else ""
        lines.append(f"{dot}{leaves[0]}" if len(leaves) == 1 else f"{dot}{{{', '.join(leaves)}}}")
    return lines


def as_glob(name: str) -> str:
    """A name as a glob that matches it alone.

    Example:
        >>> as_glob("it's [0]")
        "it's [[]0]"
    """
    return re.sub(r"([*?[])", r"[\1]", name)


def listing(names: Iterable[str], most: int = 8) -> str:
    """Names on one line: grouped, and cut where there are many.

    Example:
        >>> listing(["fc.weight", "fc.bias", "conv.weight", "out"], 2)
        'fc.{weight, bias}, conv.weight and 1 more'
    """
    groups = group_names(names)
    return ", ".join(groups[:most]) + (f" and {len(groups) - most:,} more" if len(groups) > most else "")


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
