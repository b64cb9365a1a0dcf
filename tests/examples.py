"""Runs every example of the README, the docs and the docstrings as a test. pytest loads it: see `addopts`.

A page runs as a reader copies it: in an empty folder, with no name but those that it defines. Docstrings may use the
names and the file of `docs/examples/set_up.py`, which is also what the pages' set-up shows.
"""

from __future__ import annotations

import ast
import os
import re
import resource
import sys
import tempfile
from doctest import ELLIPSIS
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest._code import Traceback
from sybil import Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator, pad
from sybil.integration.pytest import SybilItem
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

ROOT = Path(__file__).parents[1]
SET_UP = ROOT / "docs" / "examples" / "set_up.py"


class NothingRaised(BaseException):
    """An example shows what an error says, and there was none. No handler for an `Exception` takes it."""


class _RaisingTry(ast.NodeTransformer):
    def visit_Try(self, node: ast.Try) -> ast.Try:
        self.generic_visit(node)
        if node.handlers and not node.orelse:
            node.body += ast.parse(f"raise NothingRaised('nothing in the try block of line {node.lineno} raised')").body
            ast.fix_missing_locations(ast.copy_location(node.body[-1], node))
        return node


def run_example(source: str, path: str, namespace: dict[str, Any]) -> None:
    """Run code in which each `try` without an `else` has to raise: otherwise it would prove nothing."""
    __tracebackhide__ = True
    code = compile(_RaisingTry().visit(ast.parse(source, path)), path, "exec", dont_inherit=True)
    namespace["NothingRaised"] = NothingRaised
    exec(code, namespace)


def record_prints(script: str, path: str, namespace: dict[str, Any] | None = None) -> tuple[list[str], dict[str, str]]:
    """Run a script; returns all that it prints, and what each line of it that prints did so last."""
    lines = script.splitlines()
    printed: list[str] = []
    by_line: dict[str, str] = {}

    def remember(*values: object) -> None:
        text = " ".join(map(str, values))
        printed.append(text)
        by_line[lines[sys._getframe(1).f_lineno - 1].strip()] = text

    names = {} if namespace is None else namespace
    names.update(print=remember, __name__="page")
    run_example(script, path, names)
    return printed, by_line


def without_figures(report: str) -> str:
    """A report without times, speeds and sizes of files, which differ between runs and between versions of torch."""
    report = re.sub(r"\d[\d.,]*( of \d[\d.,]*)? (ms|s|µs|GiB/s|bytes)\b", r"… \2", report)
    return "\n".join(line.rstrip() for line in report.strip().splitlines())


class _Evaluator(PythonEvaluator):
    def __call__(self, example: Example) -> None:
        __tracebackhide__ = True
        run_example(pad(example.parsed, example.line + example.parsed.line_offset), example.path, example.namespace)


class _PageParser(PythonCodeBlockParser):
    def __init__(self) -> None:
        super().__init__(doctest_optionflags=ELLIPSIS)
        self.codeblock_parser = CodeBlockParser("python", _Evaluator())


def enter_folder(namespace: dict[str, Any]) -> None:
    """Go to an empty folder."""
    folder = tempfile.TemporaryDirectory()
    namespace["_folder"] = (folder, Path.cwd(), resource.getrlimit(resource.RLIMIT_DATA))
    os.chdir(folder.name)
    torch.manual_seed(0)


def set_the_stage(namespace: dict[str, Any]) -> None:
    """Go to a folder that holds the set-up's checkpoint, and define its names."""
    enter_folder(namespace)
    exec(compile(SET_UP.read_text(encoding="utf-8"), str(SET_UP), "exec"), namespace)


def leave_folder(namespace: dict[str, Any]) -> None:
    """Go back, and remove the folder."""
    folder, before, limits = namespace.pop("_folder")
    resource.setrlimit(resource.RLIMIT_DATA, limits)  # an example that failed may have left its own
    os.chdir(before)
    folder.cleanup()


pages = Sybil(
    parsers=[_PageParser(), SkipParser()],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=enter_folder,
    teardown=leave_folder,
)
docstrings = Sybil(
    parsers=[DocTestParser(ELLIPSIS)],
    path=str(ROOT / "torchload"),
    patterns=["*.py"],
    document_types={".py": PythonDocStringDocument},
    setup=set_the_stage,
    teardown=leave_folder,
)
pytest_collect_file = (pages + docstrings).pytest()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A failure outside the example's own code, such as a file left open, keeps its whole traceback."""
    narrow = getattr(item, "_traceback_filter", None)
    if not isinstance(item, SybilItem) or narrow is None:
        return

    def narrow_where_possible(failure: pytest.ExceptionInfo[BaseException]) -> Traceback:
        try:
            return narrow(failure)
        except IndexError:
            return failure.traceback

    item._traceback_filter = narrow_where_possible


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a page goes to one process as a whole: its examples build on each other."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
