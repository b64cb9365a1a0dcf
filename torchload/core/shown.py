"""How a report shows itself: a few lines as text, one in a debugger, a table in a notebook."""

from __future__ import annotations

import re

from torchload.core.text import printable

__all__ = ["Shown"]

_LABEL_WIDTH = 7
_MARKDOWN = r"([\\`*_{}\[\]<>|~#])"
_MOST_CHARACTERS = 2_000  # of one text; a path or a list of names may be long


class Shown:
    """A report: one line that says it all, and labelled lines with details.

    Example:
        >>> class Report(Shown):
        ...     def _headline(self):
        ...         return "model.pth: 2 tensors"
        ...
        ...     def _details(self):
        ...         return [("cast", "float32 → float16")]
        >>> print(Report())
        model.pth: 2 tensors
          cast    float32 → float16
        >>> Report()
        <Report model.pth: 2 tensors>
        >>> print(Report()._repr_markdown_())
        **model.pth: 2 tensors**
        <BLANKLINE>
        | | |
        |---|---|
        | cast | float32 → float16 |
    """

    __slots__ = ()

    def _headline(self) -> str:
        raise NotImplementedError

    def _details(self) -> list[tuple[str, str]]:
        """Pairs of a label and a text."""
        raise NotImplementedError

    def __str__(self) -> str:
        lines = (f"  {label:<{_LABEL_WIDTH}} {text}" for label, text in self._details())
        return "\n".join(printable(line, None) for line in (self._headline(), *lines))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {printable(self._headline(), _MOST_CHARACTERS)}>"

    def _repr_html_(self) -> str:
        """A table for notebooks. Everything that comes from a file is escaped."""
        from html import escape  # 1.4 ms of the first load for what hardly any load shows

        rows = "".join(
            f"<tr><td>{escape(label)}</td><td>{escape(printable(text, _MOST_CHARACTERS))}</td></tr>"
            for label, text in self._details()
        )
        return f"<p><b>{escape(printable(self._headline(), _MOST_CHARACTERS))}</b></p><table>{rows}</table>"

    def _repr_markdown_(self) -> str:
        """The same for what shows markdown."""
        rows = "".join(f"\n| {label} | {_escaped(text)} |" for label, text in self._details())
        return f"**{_escaped(self._headline())}**\n\n| | |\n|---|---|{rows}"


def _escaped(text: str) -> str:
    return re.sub(_MARKDOWN, r"\\\1", printable(text, _MOST_CHARACTERS))
