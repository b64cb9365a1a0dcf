"""The pages of `docs/fix`: torch says what a page's title says, and the report shown is the one that is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.examples import without_figures

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "fix"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.stem != "index")
NO_MESSAGE = {"accuracy-drops-strict-false", "gpu-0-fills-up", "half-precision-inf-nan"}  # a symptom is their title
NEEDS_GPU = {"gpu-0-fills-up", "invalid-device-ordinal"}  # for what torch does; what torchload does needs none
NEEDS_NO_GPU = {"deserialize-cuda-device"}


_RUN = """
import json, sys
from tests.examples import record_prints
with open(sys.argv[1], encoding="utf-8") as script:
    recorded = record_prints(script.read(), sys.argv[1])
print(json.dumps(recorded))
"""


@cache
def _printed(page: Path) -> tuple[str, dict[str, str]]:
    """What a page's script prints, as one line of words, and what each of its lines prints.

    It runs in an empty folder and a fresh process: where other tests ran before, what they free meanwhile would be
    room to a page that takes the process's memory for full.
    """
    (script,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.py")
        file.write_text(script, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        run = subprocess.run(
            [sys.executable, "-c", _RUN, str(file)], cwd=folder, env=environment, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr
    printed, by_line = json.loads(run.stdout.splitlines()[-1])
    return " ".join("\n".join(printed).split()), by_line


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.gpu if page.stem in NEEDS_GPU else ()) for page in PAGES],
    ids=lambda page: page.stem,
)  # fmt: skip
def test_torch_fails_as_the_title_says(page: Path) -> None:
    if page.stem in NEEDS_NO_GPU and torch.cuda.is_available():
        pytest.skip("torch fails only where there is no GPU")
    printed, _ = _printed(page)
    title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    if page.stem in NO_MESSAGE:
        return  # the script asserts the symptom
    parts = re.split(r" … | or ", title)
    assert [part for part in parts if part not in printed] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_page_shows_is_what_the_script_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    steps = {line.strip() for line in script.splitlines()}
    _, by_line = _printed(page)
    reports = 0
    for session in re.findall(r"```pycon\n(.*?)```", text, re.DOTALL):
        for prompt, output in re.findall(r"^((?:>>>|\.\.\.) .*\n)((?:(?!>>>|\.\.\.).*\n)*)", session, re.MULTILINE):
            line = prompt[4:].strip()
            assert line in steps
            if output:
                assert without_figures(output) == without_figures(by_line[line])
                reports += "smart_load" in line
    assert reports or page.stem in {"invalid-load-key", "failed-finding-central-directory"}


def test_every_page_is_on_the_list() -> None:
    listed = re.findall(r"\]\(([\w-]+)\.md\)", (FOLDER / "index.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [page.stem for page in PAGES]
