"""Writes into the pages of `docs/fix` and the README what their scripts print now: `python docs/renew_reports.py`.

For whoever changes a report or an error: the tests compare what the pages show with what is printed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.examples import record_prints, without_figures  # noqa: E402 - it is found through the line above


def renew(page: Path) -> str:
    """The page's text with each output after a `>>>` line replaced where it says something else."""
    text = page.read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _, by_line = record_prints(script, str(page))
        finally:
            os.chdir(before)

    def output(found: re.Match[str]) -> str:
        printed = by_line.get(found[1].strip())
        if printed is None or not found[2] or without_figures(printed) == without_figures(found[2]):
            return found[0]
        return f">>> {found[1]}\n{printed}\n"

    return re.sub(r"^>>> (.*)\n((?:(?!>>>|\.\.\.|```).*\n)*)", output, text, flags=re.MULTILINE)


def sessions(text: str) -> list[str]:
    """The blocks of a page that show what is typed and printed."""
    return re.findall(r"```pycon\n.*?```", text, re.DOTALL)


if __name__ == "__main__":
    for shown in [ROOT / "README.md", *sorted((ROOT / "docs" / "fix").glob("*.md"))]:
        if shown.stem != "index":
            shown.write_text(renew(shown), encoding="utf-8")
    front, readme = ROOT / "docs" / "index.md", (ROOT / "README.md").read_text(encoding="utf-8")
    text = front.read_text(encoding="utf-8")
    front.write_text(text.replace(sessions(text)[0], sessions(readme)[1]), encoding="utf-8")
