"""What the pages say, beyond the code in them (which runs as tests of its own, see `tests/examples.py`)."""

from __future__ import annotations

import pickle
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import torchload
from tests.examples import NothingRaised, pages, record_prints, run_example, without_figures
from torchload.core import wrappers
from torchload.match import tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_known_name_is_on_its_page() -> None:
    page = (ROOT / "docs" / "reference" / "names.md").read_text(encoding="utf-8")
    known = [*wrappers.WRAPPERS, *wrappers.WRAPPER_STATE, *tables.BENIGN_MISSING, *tables.BENIGN_UNEXPECTED]
    known += [*tables.NEVER_THE_MODELS, *tables.GENERIC, *tables.NOT_WEIGHTS, *sorted(tables.USUAL_CONTAINERS)]
    known += [*tables.UNTOUCHED, *sorted(tables.AVERAGED_WORDS)]
    known += [name for swap in tables.SWAPPED for name in (swap.average, swap.raw, *swap.marks)]
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


def test_readme_shows_what_its_script_and_torch_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    before, after = re.findall(r"```pycon\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    _, by_line = record_prints(script, "README.md", names)
    imported, prompt, report = after.split("\n", 2)
    assert imported.removeprefix(">>> ") in script
    assert without_figures(report) == without_figures(by_line[prompt.removeprefix(">>> ")])

    assert after in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")

    with pytest.raises(pickle.UnpicklingError) as refused:
        torch.load("model.pth", weights_only=True)
    with pytest.raises(RuntimeError) as failed:
        names["model"].load_state_dict(torch.load("model.pth", weights_only=False)["model"])
    said = " ".join(f"{refused.value} {failed.value}".split())
    shown = [line.partition("Error: ")[2] or line for line in before.splitlines() if not line.startswith(">>>")]
    parts = [part.strip() for line in shown for part in line.split("…") if part.strip()]
    assert len(parts) >= 4
    assert [part for part in parts if part not in said] == []


def test_readme_and_the_index_of_errors_have_the_same_list() -> None:
    def rows(page: str) -> list[str]:
        text = (ROOT / page).read_text(encoding="utf-8").replace("](docs/fix/", "](")
        return [line for line in text.splitlines() if re.match(r"\| \[.*\]\([\w-]+\.md\) \|", line)]

    assert rows("README.md") == rows("docs/fix/index.md") != []


def test_the_drawing_of_the_house_is_the_codes_own() -> None:
    house = runpy.run_path(str(ROOT / "docs" / "draw_house.py"))
    drawn = (ROOT / "docs" / "explanation" / "house.svg").read_text(encoding="utf-8")
    assert drawn == house["draw"](), "imports have changed: run `python docs/draw_house.py`"
    assert "core" in house["imports"]()["plan"]


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. auto\w+:: (\w+)", page, re.MULTILINE)
    elsewhere = {"__version__", "errors"}  # the latter has a page of its own
    assert sorted(shown) == sorted(set(torchload.__all__) - elsewhere)


def test_every_error_has_its_cause_and_its_cure() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(torchload.errors.__all__)
    for name, text in sections.items():
        assert "**Cause:**" in text
        assert "**Cure:**" in text
        assert re.search(rf"^\.\. auto\w+:: {name}$", text, re.MULTILINE)


def test_every_page_with_an_example_is_collected() -> None:
    with_examples = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]
    assert ROOT / "docs" / "tutorial.md" in with_examples
    assert [page for page in with_examples if not pages.should_parse(page)] == []
