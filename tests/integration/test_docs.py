"""What the pages say, beyond the code in them (which runs as tests of its own, see the root's conftest.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchload.keys import tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_known_name_is_on_its_page() -> None:
    page = (ROOT / "docs" / "reference" / "names.md").read_text(encoding="utf-8")
    known = [*tables.WRAPPERS, *tables.WRAPPER_STATE, *tables.BENIGN_MISSING, *tables.BENIGN_UNEXPECTED]
    known += sorted(tables._CONVENTIONAL)
    missing = [name for name in known if f"`{name}`" not in page]
    missing += [rename.what for rename in tables.RENAMES if rename.what not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_readme_commands_are_the_ones_that_are_tested() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:\$ )?(python.*(?:quickstart\.py|pytest).*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    assert (ROOT / "docs" / "examples" / "quickstart.py").exists()
    for command in commands:
        assert "pip install" in command
