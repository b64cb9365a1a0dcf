"""What is built for an index: a wheel with the library alone, and an sdist with all that its tests need."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from torchload import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--directory", str(folder)], cwd=ROOT, check=True)
    return folder


def test_the_wheel_holds_the_library_and_its_licence(built: Path) -> None:
    with zipfile.ZipFile(built / f"torchload-{__version__}-py3-none-any.whl") as wheel:
        names = wheel.namelist()
        description = email.message_from_bytes(
            wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
    assert "torchload/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"torchload", f"torchload-{__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert description["License-Expression"] == "BSD-3-Clause"
    assert description["Author"] == "the torchload authors"
    classifiers = description.get_all("Classifier") or []
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


def test_the_long_description_leads_nowhere_that_an_index_lacks(built: Path) -> None:
    with zipfile.ZipFile(built / f"torchload-{__version__}-py3-none-any.whl") as wheel:
        text = wheel.read(f"torchload-{__version__}.dist-info/METADATA").decode().partition("\n\n")[2]
    assert text.startswith("# torchload")
    assert "smart_load(model" in text
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
    assert "KeyError: 'state_dict'" in text


def test_the_sdist_has_what_its_tests_need(built: Path) -> None:
    with tarfile.open(built / f"torchload-{__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "torchload", "tests", "docs", "benchmarks", "README.md", "LICENSE", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("not a clone of the repository")
    assert set(tracked.stdout.split()) <= names
