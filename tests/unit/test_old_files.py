"""The stored files of formats that no torch writes any more (see tests/data/generate.py)."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from tests.data import generate
from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.formats import open_checkpoint

FILES = {
    "tar_module.pth": "tar checkpoint (torch 0.1)",
    "legacy_python2.pth": "legacy checkpoint (torch < 1.6)",
    "torchscript_1_5.pt": "TorchScript archive",
    "exported_2_7.pt2": "torch.export archive",
}


@pytest.mark.parametrize("name", FILES)
def test_a_model_is_loaded_from_it(name: str) -> None:
    path = generate.FOLDER / name
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == FILES[name]
    model = generate.Net()
    smart_load(model, path)
    state = generate.weights()
    if name == "legacy_python2.pth":
        state["body.1.num_batches_tracked"] = torch.tensor(0)  # there was no such buffer yet
    assert all(same_bits(value, model.state_dict()[key]) for key, value in state.items())


def test_a_state_dict_with_views_is_what_torch_reads() -> None:
    path = generate.FOLDER / "tar_state_dict.pth"
    expected = torch.load(path, weights_only=False)
    tree = read_tree(path)
    assert tree.keys() == expected.keys()
    assert all(same_bits(tree[name], value) for name, value in expected.items())


def test_every_file_has_a_test() -> None:
    stored = {path.name for path in generate.FOLDER.iterdir() if path.suffix in {".pth", ".pt", ".pt2"}}
    assert stored == {*FILES, "tar_state_dict.pth"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_generator_still_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    generate.main()
    for name in FILES:
        tree = read_tree(io.BytesIO((tmp_path / name).read_bytes()))
        assert generate.weights().keys() - tree.keys() <= {"body.1.num_batches_tracked"}
