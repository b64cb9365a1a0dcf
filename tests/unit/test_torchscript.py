"""TorchScript archives: the state dict that torch.jit.load would give, with nothing loaded."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import nn

from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.core.source import MemorySource
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.formats.files.zip_directory import read_directory

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit warns about itself


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((2,), 3.0))
        self.register_buffer("transient", torch.full((2,), 4.0), persistent=False)
        self.plain = torch.full((2,), 5.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) * self.scale + self.plain + self.transient


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Inner(), nn.Sequential(Inner(), nn.BatchNorm1d(2)))
        self.conv = nn.Conv1d(2, 2, 1, bias=False)
        self.gain = nn.Parameter(torch.rand(2))
        self.norm = nn.LayerNorm(2, elementwise_affine=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mixed = self.conv(self.blocks(inputs)[:, :, None])[:, :, 0]
        return self.norm(mixed * self.gain)


class Shared(nn.Module):
    """A child under two names, and a parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.weight = nn.Parameter(torch.rand(2))
        self.alias = self.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs)) * self.weight * self.alias


class Optionals(nn.Module):
    # torch.jit wants types here, not the text that `from __future__ import annotations` makes of them.
    __annotations__ = {"given": Optional[torch.Tensor], "absent": Optional[torch.Tensor]}  # noqa: UP045

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("given", torch.ones(2))
        self.register_buffer("absent", None)
        self.weight = nn.Parameter(torch.rand(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        given = self.given
        return inputs * self.weight if given is None else inputs * self.weight * given


def script(model: nn.Module) -> Any:
    return torch.jit.script(model)


def trace(model: nn.Module) -> Any:
    return torch.jit.trace(model.eval(), torch.rand(3, 2))


def archive(scripted: Any) -> bytes:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    return file.getvalue()


def repacked(data: bytes, change: Callable[[str, bytes], bytes | None]) -> io.BytesIO:
    """The archive with some records changed, or left out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            content = change(name, before.read(name))
            if content is not None:
                after.writestr(name, content)
    file.seek(0)
    return file


@pytest.mark.parametrize("convert", [script, trace])
@pytest.mark.parametrize("half", [False, True])
def test_the_state_dict_is_the_one_torch_gives(convert: Callable[[nn.Module], Any], half: bool) -> None:
    scripted = convert(Net())
    if half:
        scripted = scripted.half()
    data = archive(scripted)
    expected = torch.jit.load(io.BytesIO(data)).state_dict()
    tree = read_tree(io.BytesIO(data))
    assert list(tree) == list(expected)
    assert all(same_bits(tree[name], value) for name, value in expected.items())
    assert not any(name.endswith("plain") for name in tree)


def test_shared_modules_and_parameters_stay_tied() -> None:
    data = archive(script(Shared()))
    expected = torch.jit.load(io.BytesIO(data)).state_dict()
    with open_checkpoint(io.BytesIO(data)) as checkpoint:
        root = checkpoint.root
        assert list(root) == list(expected)
        assert root["first.weight"].location == root["second.weight"].location
        assert root["weight"].location == root["alias"].location


def test_parameters_and_buffers_are_told_apart() -> None:
    with open_checkpoint(io.BytesIO(archive(script(Net())))) as checkpoint:
        assert checkpoint.format == "TorchScript archive"
        assert checkpoint.root["gain"].is_parameter
        assert not checkpoint.root["blocks.0.scale"].is_parameter


def test_an_optional_buffer_is_there_although_torch_overlooks_it() -> None:
    model = Optionals()
    data = archive(script(model))
    assert "given" not in torch.jit.load(io.BytesIO(data)).state_dict()
    assert read_tree(io.BytesIO(data)).keys() == model.state_dict().keys()


def test_a_model_of_ordinary_python_is_loaded_from_it() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    target = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    smart_load(target, io.BytesIO(archive(script(model))))
    assert all(same_bits(value, target.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_that_are_no_identifiers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("with space", nn.Parameter(torch.ones(1)))
            self.register_buffer("0", torch.ones(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs

    data = archive(torch.jit.trace(Odd(), torch.ones(1)))
    assert set(read_tree(io.BytesIO(data))) == {"with space", "0"}


def test_archives_before_torch_1_6_have_no_list_of_buffers() -> None:
    def without_list(name: str, content: bytes) -> bytes:
        lines = content.split(b"\n") if name.endswith(".py") else []
        return b"\n".join(line for line in lines if b"__buffers__" not in line) if lines else content

    model = nn.BatchNorm1d(2)
    data = archive(script(model))
    assert list(read_tree(repacked(data, without_list))) == list(model.state_dict())


def test_modules_without_tensors_need_no_code() -> None:
    def only_linear(name: str, content: bytes) -> bytes | None:
        return content if not name.endswith(".py") or "linear" in name else None

    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    assert list(read_tree(repacked(archive(script(model)), only_linear))) == list(model.state_dict())


def test_code_that_is_missing_is_an_error() -> None:
    data = archive(script(nn.Linear(1, 2)))
    with pytest.raises(CorruptCheckpointError, match="its code doesn't say"):
        open_checkpoint(repacked(data, lambda name, content: None if name.endswith(".py") else content))


def test_endless_code_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchload.formats.files import torchscript

    monkeypatch.setattr(torchscript, "MAX_CODE_BYTES", 10)
    with pytest.raises(CheckpointFormatError, match="of code, which is not read"):
        open_checkpoint(io.BytesIO(archive(script(nn.Linear(1, 2)))))


def test_an_archive_without_a_module_is_named() -> None:
    file = io.BytesIO()
    torch.save([1, 2], file)
    other = io.BytesIO()
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(other, "w") as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
        after.writestr("archive/constants.pkl", b"\x80\x02).")
    other.seek(0)
    with pytest.raises(CheckpointFormatError, match="without a module"):
        open_checkpoint(other)


def test_the_pickle_and_the_code_are_checked_against_their_checksums() -> None:
    data = archive(script(Net()))
    records = read_directory(MemorySource(data)).records
    for name, record in records.items():
        if name.endswith(("data.pkl", ".py")) and record.size:
            damaged = bytearray(data)
            damaged[record.offset + record.stored_size // 2] ^= 4
            with pytest.raises(CorruptCheckpointError):
                open_checkpoint(io.BytesIO(damaged))
