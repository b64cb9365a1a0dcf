"""Writes the small checkpoints in this folder in formats that torch no longer writes.

    python -m tests.data.generate

==========================  ===========================================================================================
file                        what it is
==========================  ===========================================================================================
tar_state_dict.pth          torch 0.1: a tar archive of a state dict with views, a tie and an expanded tensor
tar_module.pth              torch 0.1: a whole module in it, its class's source text beside it
legacy_python2.pth          torch 0.2 under Python 2: names are byte strings, a storage is a part of another one
torchscript_1_5.pt          torch 1.5: the source text has no list of buffers
exported_2_7.pt2            torch 2.7: the weights are a file of torch.save within a zip archive
==========================  ===========================================================================================

Those releases don't run any more, so the layouts are written out here: the tar archive after the branch of
``torch.load`` that still reads it, the others by changing what the present torch writes. Each holds `weights()`.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).parent


class Net(nn.Module):
    """A model of every kind of tensor that a state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs))


def weights() -> dict[str, torch.Tensor]:
    """The state dict that every file holds: known numbers."""
    model = Net()
    for number, value in enumerate(model.state_dict().values()):
        value.copy_(torch.arange(value.numel()).reshape(value.shape) + 100 * number)
    return OrderedDict(model.state_dict())


def model() -> Net:
    """The model with those weights."""
    made = Net()
    made.load_state_dict(weights())
    return made


def _storage(tensor: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # storages with a dtype are deprecated
        return tensor.storage()


class _TarPickler(pickle.Pickler):
    """Tensors and storages become keys, classes of modules come with their source text."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, 2)
        self.tensors: dict[str, torch.Tensor] = {}
        self.storages: dict[str, Any] = {}
        self.classes: set[type] = set()

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, nn.Module) and value not in self.classes:
            self.classes.add(value)
            return value, "model.py", f"class {value.__name__}(Module): ..."
        if isinstance(value, torch.storage.TypedStorage):
            return self.storage_key(value)
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            key = str(value.data_ptr() * 8 + len(self.tensors) + 1)
            same = [known for known, tensor in self.tensors.items() if tensor is value]
            self.tensors.setdefault(same[0] if same else key, value)
            return same[0] if same else key
        return None

    def storage_key(self, storage: Any) -> str:
        key = str(storage._cdata)
        self.storages.setdefault(key, storage)
        return key

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):  # data; then requires_grad, volatile, hooks
            return nn.Parameter, (value.data,), (True, False, OrderedDict())
        return NotImplemented


def tar_bytes(value: Any, views: tuple[tuple[str, str, int, int], ...] = ()) -> bytes:
    """`value` as torch 0.1 saved it."""
    objects = io.BytesIO()
    pickler = _TarPickler(objects)
    pickler.dump(value)
    tensors = io.BytesIO()
    pickle.dump(len(pickler.tensors), tensors, 2)
    for key, tensor in pickler.tensors.items():
        storage_key = pickler.storage_key(_storage(tensor))
        pickle.dump((int(key), int(storage_key), torch.FloatTensor), tensors, 2)
        shape, strides = tensor.shape, tensor.stride()
        tensors.write(struct.pack("<ii", len(shape), 0))
        tensors.write(struct.pack(f"<{2 * len(shape) + 1}q", *shape, *strides, tensor.storage_offset()))
    storages = io.BytesIO()
    pickle.dump(len(pickler.storages), storages, 2)
    for key, storage in pickler.storages.items():
        kind = getattr(torch, storage._pickle_storage_type())
        pickle.dump((int(key), "cpu", kind), storages, 2)
        data = bytes(storage.untyped())
        storages.write(struct.pack("<q", storage.size()) + data)
    pickle.dump(list(views), storages, 2)
    system = pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2)
    members = {"sys_info": system, "pickle": objects, "tensors": tensors, "storages": storages}
    return packed({name: part if isinstance(part, bytes) else part.getvalue() for name, part in members.items()})


def packed(members: dict[str, bytes], **options: Any) -> bytes:
    """A tar archive; with pax headers, as a time with fractions of a second needs one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 0.5  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _python2() -> bytes:
    """A legacy file whose texts are byte strings, and whose first weight lies in a part of a storage."""
    state = weights()
    names = [name for name in state if not name.endswith("num_batches_tracked")]  # torch 0.4.1 brought that
    data = torch.cat([state[name].reshape(-1) for name in names])

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    code = b"\x80\x02ccollections\nOrderedDict\n]("  # there, its entries came as a list of pairs
    offset = 0
    for name in names:
        value = state[name]
        dims = b"".join(b"K" + bytes([size]) for size in value.shape)
        strides = b"".join(b"K" + bytes([stride]) for stride in value.stride())
        view = b"(" + text(f"view {name}") + b"K" + bytes([offset]) + b"K" + bytes([value.numel()]) + b"t"
        code += b"](" + text(name) + b"ctorch._utils\n_rebuild_tensor\n("
        code += b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("root") + text("cuda:3")
        code += b"K" + bytes([data.numel()]) + view + b"tQ"
        code += b"K\x00(" + dims + b"t(" + strides + b"ttRe"
        offset += value.numel()
    code += b"e\x85R."
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    keys = b"\x80\x02]" + text("root") + b"a."
    return b"".join(head) + code + keys + struct.pack("<q", data.numel()) + data.numpy().tobytes()


def _torchscript() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script(model())
        before, after = io.BytesIO(), io.BytesIO()
        torch.jit.save(scripted, before)
    with zipfile.ZipFile(before) as old, zipfile.ZipFile(after, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(".py"):
                lines = content.split(b"\n")
                content = b"\n".join(line for line in lines if b"__buffers__" not in line)
            if not name.endswith((".debug_pkl", "byteorder", "serialization_id")):
                new.writestr(zipfile.ZipInfo(name), content)
    return after.getvalue()


def _exported() -> bytes:
    state, after = io.BytesIO(), io.BytesIO()
    torch.save(weights(), state)
    with zipfile.ZipFile(after, "w") as archive:
        for name, content in (
            ("serialized_exported_program.json", b"{}"),
            ("serialized_state_dict.pt", state.getvalue()),
            ("version", b"8.6"),
        ):
            archive.writestr(zipfile.ZipInfo(name), content)
    return after.getvalue()


def main() -> None:
    """Write every file."""
    state: dict[str, Any] = weights()
    base = torch.arange(12.0).reshape(3, 4)
    state["view"], state["tie"], state["expanded"] = base[1:, ::2], state["head.weight"], base[0, :1].expand(5)
    files = {
        "tar_state_dict.pth": tar_bytes(state),
        "tar_module.pth": tar_bytes(model()),
        "legacy_python2.pth": _python2(),
        "torchscript_1_5.pt": _torchscript(),
        "exported_2_7.pt2": _exported(),
    }
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    from tests.data import generate

    generate.main()  # so that the pickled class is tests.data.generate.Net, not __main__.Net
