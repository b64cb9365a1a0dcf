"""Checkpoints written by real frameworks, through the public API: right bit for bit, or refused clearly."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchload import smart_load
from torchload.errors import TorchLoadError

CORPUS = Path(__file__).parents[2] / ".." / "shared" / "corpus"

# Container kinds that are not supported yet, and why: refused clearly until then. One that loads must leave this list.
NOT_YET: dict[str, str] = {}

# Single cases, likewise.
NOT_YET_CASES: dict[str, str] = {}


def load_cases() -> list[Any]:
    if not CORPUS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="the corpus is not here"), id="corpus")]
    manifest = json.loads((CORPUS / "manifest.json").read_text())
    return [pytest.param(case, id=case["name"]) for case in manifest["cases"]]


@pytest.fixture(scope="module")
def corpus_models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus_models", CORPUS / "corpus_models.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str | None:
    """The first thing that differs, or None: names, dtypes, shapes, bits."""
    if found.keys() != wanted.keys():
        return f"names: {sorted(found.keys() ^ wanted.keys())[:4]}"
    for name, want in wanted.items():
        have = found[name]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            return f"{name}: {have.dtype} {tuple(have.shape)} for {want.dtype} {tuple(want.shape)}"
        if not torch.equal(raw_bytes(have), raw_bytes(want)):
            return f"{name}: values"
    return None


@pytest.mark.parametrize("case", load_cases())
def test_corpus(case: dict[str, Any], corpus_models: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some targets use what torch has deprecated since
        model = corpus_models.build(case["target"])
    before = {name: value.clone() for name, value in tensors(model).items()}
    not_yet = NOT_YET_CASES.get(case["name"]) or NOT_YET.get(case["kind"])
    try:
        report = smart_load(model, CORPUS / case["path"], "cpu")
    except TorchLoadError:
        if changed := difference(tensors(model), before):
            pytest.fail(f"a refused load changed the model: {changed}")
        if not_yet:
            pytest.skip(f"not supported yet: {not_yet}")
        if not (case["must_raise"] or case["optional"]):
            raise
        return
    assert not case["must_raise"], "loaded what must be refused"
    wrong = difference(tensors(model), load_file(CORPUS / case["expected"]))
    if wrong is not None:
        # Several sets of weights fit: another one than expected is right where it is the average, and is reported.
        fitting = [
            name
            for name, path in case["expected_alt"].items()
            if difference(tensors(model), load_file(CORPUS / path)) is None
        ]
        assert fitting, wrong
        assert "ema" in fitting[0].lower() or "ambiguous" in case["notes"]
        assert str(report)
    assert not not_yet, "supported now: take it off the list"


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus is not here")
def test_lists_name_only_what_exists() -> None:
    cases = json.loads((CORPUS / "manifest.json").read_text())["cases"]
    assert set(NOT_YET) <= {case["kind"] for case in cases}
    assert set(NOT_YET_CASES) <= {case["name"] for case in cases}
