"""What the pages say, beyond the code in them (which runs as tests of its own, see `tests/examples.py`)."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.examples import NothingRaised, run_example
from torchload import smart_load
from torchload.core import wrappers
from torchload.match import tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_known_name_is_on_its_page() -> None:
    page = (ROOT / "docs" / "reference" / "names.md").read_text(encoding="utf-8")
    known = [*wrappers.WRAPPERS, *wrappers.WRAPPER_STATE, *tables.BENIGN_MISSING, *tables.BENIGN_UNEXPECTED]
    known += sorted(tables._CONVENTIONAL)
    missing = [name for name in known if f"`{name}`" not in page]
    missing += [rename.what for rename in tables.RENAMES if rename.what not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_set_up_is_the_same_on_every_page_that_folds_it() -> None:
    code = (ROOT / "docs" / "examples" / "set_up.py").read_text(encoding="utf-8")
    shown = {
        str(page.relative_to(ROOT)): block
        for page in PAGES
        for block in re.findall(
            r"<summary>Set-up[^\n]*\n\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        )
    }
    assert len(shown) > 10
    assert [page for page, block in shown.items() if block != code] == []


def test_an_example_that_promises_an_error_has_to_raise_it() -> None:
    with pytest.raises(NothingRaised, match="line 2"):
        run_example("def fine(): pass\ntry:\n    fine()\nexcept Exception:\n    pass", "page.md", {})
    run_example("try:\n    raise ValueError\nexcept ValueError:\n    pass", "page.md", {})
    run_example("try:\n    pass\nexcept ValueError:\n    pass\nelse:\n    pass", "page.md", {})


def test_readme_commands_are_the_ones_that_are_tested() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:\$ )?(python.*(?:quickstart\.py|pytest).*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    assert (ROOT / "docs" / "examples" / "quickstart.py").exists()
    for command in commands:
        assert "pip install" in command


def test_readme_report_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(model\.pth → .*?)```", readme, flags=re.DOTALL)
    assert shown
    monkeypatch.chdir(tmp_path)
    saved = nn.DataParallel(nn.Linear(3, 2))
    training = {"state_dict": saved.state_dict(), "optimizer": {}, "epoch": 37, "args": Namespace()}
    torch.save(training, "model.pth")
    printed = str(smart_load(nn.Linear(3, 2), "model.pth", "cpu", dtype=torch.float16))

    def without_figures(report: str) -> list[str]:
        headline, *details = report.strip().splitlines()
        headline = re.sub(r"→ \w+ on", "→ … on", headline)
        headline = re.sub(r"[\d.]+ (tensors|[KM]?i?B|ms|s)\b", r"… \1", headline)
        headline = re.sub(r"\(.*\)", "(…)", headline)
        return [headline, *(re.sub(r"in \d+ tensors", "in … tensors", line) for line in details)]

    assert without_figures(shown[1]) == without_figures(printed)
