"""Gives the package's long description: the README, without what leads nowhere outside of the repository.

Hatchling calls this when it builds. Links to files become their text, and pictures that are files go.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def for_index(readme: str) -> str:
    """The README with links and pictures that are absolute, and no others, nor what is nothing without those."""
    readme = re.sub(r"<!-- not on an index: begin -->.*?<!-- not on an index: end -->\n", "", readme, flags=re.DOTALL)
    relative = r"\((?!https?://|mailto:|#)[^)]*\)"
    readme = re.sub(rf"!\[[^\]]*\]{relative}\n*", "", readme)
    return re.sub(rf"\[([^\]]+)\]{relative}", r"\1", readme)


class ReadmeForIndex(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_index(readme)}
