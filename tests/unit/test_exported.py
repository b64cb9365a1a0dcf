"""Archives of torch.export, as this torch writes them and as older ones did."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.core.checkpoint import OpaqueTensor
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import open_checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 3)
        self.tied = self.head.weight
        self.register_buffer("transient", torch.ones(3), persistent=False)
        self.register_buffer("steps", torch.tensor([7]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs)) @ self.tied + self.transient + self.steps


def meta(shape: list[int], strides: list[int] | None = None, offset: int = 0, **changes: Any) -> dict[str, Any]:
    """A tensor's metadata as the archive has it; float32 where nothing else is said."""
    strides = strides if strides is not None else torch.empty(shape, device="meta").stride()
    return {
        "dtype": 7,
        "sizes": [{"as_int": size} for size in shape],
        "strides": [{"as_int": stride} for stride in strides],
        "storage_offset": {"as_int": offset},
        "layout": 7,
        **changes,
    }


def payload(file: str, tensor_meta: Any, **changes: Any) -> dict[str, Any]:
    return {"path_name": file, "is_param": True, "use_pickle": False, "tensor_meta": tensor_meta, **changes}


def archive(config: Any, *, compression: int = zipfile.ZIP_STORED, **records: bytes) -> io.BytesIO:
    """An archive of torch 2.9 or later with these weights."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("m/archive_format", "pt2")
        out.writestr("m/data/weights/model_weights_config.json", json.dumps({"config": config}))
        for name, content in records.items():
            out.writestr(f"m/data/weights/{name}", content)
    file.seek(0)
    return file


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    model = Net().eval()
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (torch.rand(4, 2),)), path)
    return model, path


def test_the_state_dict_is_the_models(exported: tuple[Net, Path]) -> None:
    model, path = exported
    tree = read_tree(path)
    expected = model.state_dict()
    if len(tree) == 1:  # pragma: no cover - a torch whose archives hold several models
        (tree,) = tree.values()
    assert tree.keys() == expected.keys()
    assert all(same_bits(tree[name], value) for name, value in expected.items())


def test_a_model_is_loaded_from_it(exported: tuple[Net, Path]) -> None:
    model, path = exported
    target = Net()
    smart_load(target, path)
    assert all(same_bits(value, target.state_dict()[name]) for name, value in model.state_dict().items())


def test_tensors_are_parts_of_records() -> None:
    data = torch.arange(12.0).numpy().tobytes()
    config = {
        "whole": payload("weight_0", meta([3, 4])),
        "transposed": payload("weight_0", meta([4, 3], [1, 4])),
        "part": payload("weight_0", meta([2, 2], [4, 1], 5), is_param=False),
        "empty": payload("weight_1", meta([0, 3])),
        "half": payload("weight_0", meta([2], dtype=6)),
    }
    with open_checkpoint(archive(config, weight_0=data, weight_1=b"")) as checkpoint:
        root = checkpoint.root
        assert checkpoint.format == "torch.export archive"
        assert root["whole"].is_parameter
        assert not root["part"].is_parameter
        assert root["whole"].boxes[0].extent is root["part"].boxes[0].extent
        assert root["whole"].boxes[0].extent.crc32
        assert root["half"].dtype == torch.float16
    tree = read_tree(archive(config, weight_0=data, weight_1=b""))
    assert tree["transposed"].tolist() == torch.arange(12.0).reshape(3, 4).T.tolist()
    assert tree["part"].tolist() == [[5, 6], [9, 10]]
    assert tree["empty"].shape == (0, 3)


def test_pickled_tensors_are_opened_in_place() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    config = {"w": payload("weight_0", meta([2, 3]), use_pickle=True)}
    assert same_bits(read_tree(archive(config, weight_0=saved(tensor)))["w"], tensor)


def test_compressed_records_are_read() -> None:
    tensor = torch.arange(6.0)
    config = {"w": payload("weight_0", meta([6])), "v": payload("weight_1", None, use_pickle=True)}
    file = archive(
        config, compression=zipfile.ZIP_DEFLATED, weight_0=tensor.numpy().tobytes(), weight_1=saved(tensor + 1)
    )
    file.seek(0)
    tree = read_tree(file)
    assert same_bits(tree["w"], tensor)
    assert same_bits(tree["v"], tensor + 1)


def test_several_models_are_containers() -> None:
    file = archive({"w": payload("weight_0", meta([1]))}, weight_0=b"\0\0\x80?")
    with zipfile.ZipFile(file, "a") as out:
        config = json.dumps({"config": {"w": payload("weight_0", meta([1]))}})
        out.writestr("m/data/weights/other_weights_config.json", config)
    file.seek(0)
    assert read_tree(file) == {"model": {"w": torch.ones(1)}, "other": {"w": torch.ones(1)}}


@pytest.mark.parametrize("name", ["serialized_state_dict.pt", "serialized_state_dict.json"])
def test_archives_until_torch_2_7_hold_a_file_of_torch_save(name: str) -> None:
    state = Net().state_dict()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("serialized_exported_program.json", "{}")
        out.writestr(name, saved(state))
        out.writestr("serialized_constants.pt", saved({"transient": torch.ones(3)}))
        out.writestr("version", "8.6")
    file.seek(0)
    tree = read_tree(file)
    assert tree.keys() == state.keys()
    assert all(same_bits(tree[name], value) for name, value in state.items())


def test_archives_of_torch_2_8_hold_one_file_per_model() -> None:
    state = Net().state_dict()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("m/archive_format", "pt2")
        out.writestr("m/models/model.json", "{}")
        out.writestr("m/data/weights/model.pt", saved(state))
        out.writestr("m/data/constants/model.pt", saved({"transient": torch.ones(3)}))
    file.seek(0)
    assert read_tree(file).keys() == state.keys()


def test_an_archive_without_weights_is_named() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("m/archive_format", "pt2")
        out.writestr("m/data/aotinductor/model/code.so", b"\x7fELF")
    file.seek(0)
    with pytest.raises(CheckpointFormatError, match="without weights"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"layout": 1}, "not strided"), ({"dtype": 99}, "dtype number 99"), ({"dtype": [7]}, "dtype")],
)
def test_tensors_beyond_this_torch_are_opaque(changes: dict[str, Any], reason: str) -> None:
    with open_checkpoint(archive({"w": payload("weight_0", meta([1], **changes))}, weight_0=b"1234")) as checkpoint:
        assert isinstance(checkpoint.root["w"], OpaqueTensor)
        assert reason in checkpoint.root["w"].reason


HOSTILE: dict[str, Any] = {
    "beyond its record": payload("weight_0", meta([3])),
    "offset beyond": payload("weight_0", meta([1], offset=2)),
    "stride beyond": payload("weight_0", meta([2, 1], [2, 1])),
    "overflow": payload("weight_0", meta([1 << 40, 1 << 40], [0, 0])),
    "negative": payload("weight_0", meta([-1], [1])),
    "huge": payload("weight_0", meta([1 << 70], [1])),
    "symbolic": payload("weight_0", meta([1], sizes=[{"as_expr": "s0"}])),
    "text": payload("weight_0", meta([1], sizes="1")),
    "a boolean": payload("weight_0", meta([1], sizes=[{"as_int": True}])),
    "more strides than sizes": payload("weight_0", meta([1], [1, 1])),
    "100 dimensions": payload("weight_0", meta([1] * 100, [1] * 100)),
    "no metadata": payload("weight_0", None),
    "no such record": payload("weight_9", meta([1])),
    "another folder": payload("../constants/x", meta([1])),
    "no record": payload(None, meta([1])),  # type: ignore[arg-type]
    "no payload": 7,
}


@pytest.mark.parametrize("entry", HOSTILE.values(), ids=HOSTILE)
def test_what_contradicts_itself_is_refused(entry: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        open_checkpoint(archive({"w": entry}, weight_0=b"12345678"))


@pytest.mark.parametrize(
    "config", [b"", b"[]", b"{}", b'{"config": []}', b'{"config": {"w": {}, "w": {}}}', b"[" * 99999]
)
def test_a_config_that_is_none_is_refused(config: bytes) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("m/archive_format", "pt2")
        out.writestr("m/data/weights/model_weights_config.json", config)
    file.seek(0)
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(file)


def test_a_folder_of_one_program_and_other_files_is_the_program(
    exported: tuple[Net, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "model.pt2").write_bytes(exported[1].read_bytes())
    (tmp_path / "README.md").write_text("a model")
    assert "head.weight" in read_tree(tmp_path)
