"""Archives of `torch.export`: ``.pt2`` files, as three generations of torch write them.

=============  ==============================================================================================
torch          where the weights are
=============  ==============================================================================================
2.9 and later  ``data/weights/weight_0``, …: raw bytes, one record per storage; ``<model>_weights_config.json``
               says which tensor is which part of which record. Constants likewise in ``data/constants``
2.8            ``data/weights/<model>.pt`` and ``data/constants/<model>.pt``: files of `torch.save`
up to 2.7      ``serialized_state_dict.pt`` and ``serialized_constants.pt``: the same, at the top
=============  ==============================================================================================

The state dict of a program has its model's parameters and persistent buffers; constants hold the other buffers and the
tensors that the program's text refers to, which no state dict has. So they are kept out of the tree.
"""

from __future__ import annotations

from typing import Any

import torch

from torchload.core.checkpoint import Checkpoint, Container, Extent, OpaqueTensor, TensorEntry
from torchload.errors import CheckpointFormatError, damaged
from torchload.formats.files import open_inside
from torchload.formats.files.zip_directory import ZipDirectory
from torchload.formats.json_text import parse_object
from torchload.formats.pickles.tensors import as_parameter, strided_entry

__all__ = ["open_directory"]

MAX_CONFIG_BYTES = 64 << 20
MAX_DIMENSIONS = 64
MAX_NUMBER = 1 << 63

_WEIGHTS = "data/weights/"
_CONFIG_ENDING = "_weights_config.json"
_OLD_STATE = ("serialized_state_dict.pt", "serialized_state_dict.json")  # the latter, a zip too, until torch 2.1
_STRIDED = 7

# Numbers of dtypes in the archive (torch/_export/serde/schema.py, ScalarType), as far as this torch has them.
_DTYPES: dict[int, torch.dtype] = {
    number: getattr(torch, name)
    for number, name in {
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        6: "float16",
        7: "float32",
        8: "float64",
        9: "complex32",
        10: "complex64",
        11: "complex128",
        12: "bool",
        13: "bfloat16",
        28: "uint16",
        29: "float8_e4m3fn",
        30: "float8_e5m2",
        31: "float8_e4m3fnuz",
        32: "float8_e5m2fnuz",
        33: "float8_e8m0fnu",
        34: "uint32",
        35: "uint64",
    }.items()
    if hasattr(torch, name)
}


def open_directory(directory: ZipDirectory, path: str) -> Checkpoint:
    """Index a program's weights without reading them: a state dict, or model name → state dict where it has several."""
    source, records = directory.source, directory.records
    models: dict[str, Any] = {}
    for old in _OLD_STATE:
        if old in records:
            models["model"] = open_inside(directory.source_of(old), f"{path}/{old}").root
    folder = directory.top + _WEIGHTS
    for name in records:
        model = name.removeprefix(folder)
        if not name.startswith(folder) or "/" in model:
            continue
        if model.endswith(_CONFIG_ENDING):
            models[model.removesuffix(_CONFIG_ENDING)] = _configured(directory, name, folder, path)
        elif model.endswith(".pt") and not model.startswith("weight_"):
            models[model.removesuffix(".pt")] = open_inside(directory.source_of(name), f"{path}/{model}").root
    if not models:
        raise CheckpointFormatError(
            f"{path} is a torch.export archive without weights: they are compiled into its code, or were left out. "
            "Export the model again with torch.export.save.",
            path=path,
            found="torch.export archive",
        )
    root = next(iter(models.values())) if len(models) == 1 else Container(models)
    has_checksums = any(record.crc32 for record in records.values())
    return Checkpoint(path, "torch.export archive", root, (source,), checksums=has_checksums)


def _configured(directory: ZipDirectory, name: str, folder: str, path: str) -> Container:
    """The state dict that a weights config describes."""
    if directory.records[name].size > MAX_CONFIG_BYTES:
        raise damaged(path, f"its {name} has more than {MAX_CONFIG_BYTES >> 20} MiB")
    config = parse_object(directory.read(name), "weights config", path).get("config")
    if not isinstance(config, dict):
        raise damaged(path, f"its {name} has no 'config'")
    state = Container()
    extents: dict[str, Extent] = {}
    for key, payload in config.items():
        file = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(file, str) or folder + file not in directory.records:
            raise damaged(path, f"it has no data for the tensor {key[:200]!r}")
        if payload.get("use_pickle") is True:
            inside = directory.source_of(folder + file)
            state[key] = open_inside(inside, f"{path}/{file}").root
            continue
        if file not in extents:
            extents[file] = directory.extent_of(folder + file)
        state[key] = _tensor(payload, extents[file], key, path)
    return state


def _tensor(payload: dict[str, Any], extent: Extent, key: str, path: str) -> TensorEntry | OpaqueTensor:
    """A tensor as its metadata describes it, checked against its record."""
    meta = payload.get("tensor_meta")
    if not isinstance(meta, dict):
        raise damaged(path, f"the tensor {key[:200]!r} has no metadata")
    shape, strides = _numbers(meta.get("sizes")), _numbers(meta.get("strides"))
    offset = _number(meta.get("storage_offset"))
    if shape is None or strides is None or offset is None or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise damaged(path, f"the tensor {key[:200]!r} has an impossible shape, strides or offset")
    if meta.get("layout") != _STRIDED:
        return OpaqueTensor("a tensor that is not strided", shape)
    number = meta.get("dtype")
    dtype = _DTYPES.get(number) if type(number) is int else None
    if dtype is None:
        return OpaqueTensor(f"a tensor of dtype number {number!r}, which this torch doesn't know", shape)
    try:
        entry = strided_entry(extent, offset * dtype.itemsize, extent.nbytes, dtype, shape, strides)
    except ValueError as error:
        raise damaged(path, f"the tensor {key[:200]!r} {error}") from None
    return as_parameter(entry) if payload.get("is_param") is True else entry


def _numbers(values: object) -> tuple[int, ...] | None:
    numbers = [_number(value) for value in values] if isinstance(values, list) else [None]
    return None if None in numbers else tuple(number for number in numbers if number is not None)


def _number(value: object) -> int | None:
    """``{"as_int": 3}`` as 3; symbolic sizes, which weights never have, as ``None``."""
    number = value.get("as_int") if isinstance(value, dict) else None
    return number if type(number) is int and 0 <= number < MAX_NUMBER else None
