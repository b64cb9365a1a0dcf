"""`read_state_dict`: the weights of a file, where there is no model to load them into."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchload.core.checkpoint import Copies, OpaqueTensor, Record, TensorEntry, contiguous_strides, is_tensor
from torchload.core.collector import collector_paused
from torchload.core.public import CheckpointLike, public
from torchload.core.quantized import quantized_tensor
from torchload.core.sharing import Layout, Run, shared_runs
from torchload.core.text import listed, listing, printable
from torchload.errors import Boundary, CastOverflowError, IncompatibleCheckpointError
from torchload.formats import open_checkpoint
from torchload.match import Leaf, as_mapping
from torchload.match.state_dicts import StateDict, find_state_dict
from torchload.model.placement import check_room, resolve_device
from torchload.plan.arguments import check_choice, with_hints
from torchload.plan.dtypes import final_dtype
from torchload.plan.pairing import copies_of
from torchload.transfer import allocate, map_entries, map_entry, run
from torchload.transfer.overflow import does_not_fit

__all__ = ["read_state_dict"]

_CPU = torch.device("cpu")
_log = logging.getLogger("torchload")


@public
@with_hints
def read_state_dict(
    path: CheckpointLike,
    device: torch.device | str | int = "cpu",
    *,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    mmap: bool = False,
) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint: a safe and fast `torch.load` for code that has no model at hand.

    Only the weights are read, not the optimizer beside them, and nothing that the file names is imported or called.

    Where there are several containers, an average (EMA) comes before the raw weights of the same network if it has all
    of their tensors. A usual name such as ``"state_dict"`` comes before odd ones of another layout, with a warning.
    Anything else is a question.

    Args:
        path: A checkpoint file, a folder that holds one, the index of a sharded one, a list of shards, a binary file
            object, or a mapping that is in memory already: a state dict, or a checkpoint's dictionary around one.
        device: Where the tensors go: a device, a string, an index, or ``"auto"``. Where they were saved never matters.
        dtype: Floating dtype to cast floating tensors to; ``None`` keeps each tensor's own.
        key: Dotted path of the container to read, such as ``"ema"`` or ``"optimizer.state"``, or of one tensor; ``""``
            is the whole file.
        mmap: On the CPU, tensors become private views of the file: no copy, memory shared between processes. What can't
            be mapped, such as a tensor that is cast, is read.

    Returns:
        Name → tensor, with the names of the file, in its order. Tensors that share memory in the file share it here.
        Quantized tensors are quantized here too; of a pair that modules pack together, each has a name of its own.
        The module versions that `torch.nn.Module.load_state_dict` looks for come along in ``_metadata``.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        CheckpointFormatError: The file is no checkpoint; the message says what it is.
        CorruptCheckpointError: It is truncated, damaged, or made to do harm.
        AmbiguousCheckpointError: Nothing tells which of several containers is meant; the message lists them.
        IncompatibleCheckpointError: `key` names nothing, or a tensor is of a kind that can't be read (sparse, …).
        CastOverflowError: A finite value would become infinite in the new dtype.
        DeviceError: The device isn't there, or has too little memory.

    Example:
        >>> from torchload import read_state_dict
        >>> weights = read_state_dict("model.pth", dtype=torch.bfloat16)
        >>> weights["module.fc.weight"].dtype, weights["module.fc.weight"].shape
        (torch.bfloat16, torch.Size([4, 16]))
    """
    wanted: Any = dtype
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise TypeError(f"dtype must be None or a floating-point torch.dtype, not {dtype!r}")
    check_choice(key, None, None)
    spec: Any = device
    if spec is None or isinstance(spec, Mapping):
        raise TypeError("device must be one device: 'auto', a torch.device, a string or an index")
    place = resolve_device(device)
    with Boundary() as boundary, open_checkpoint(path) as checkpoint:
        boundary.path = checkpoint.path
        checkpoint.confirm()
        with collector_paused():
            chosen = find_state_dict(checkpoint.root, key, checkpoint.size_bytes, map_entry)
            entries = _tensors(chosen)
        rivals = listed([repr(rival) for rival in chosen.rivals])
        if chosen.is_guess:
            text = f"read {chosen.key!r}, a usual name for weights; it may be that {rivals} is meant: key= chooses"
            boundary.warn([text])
        elif chosen.rivals:
            _log.info("%s: read %r; beside it are %s", printable(checkpoint.path, None), chosen.key, rivals)
        tensors = _read(entries, place, dtype, mmap=mmap)
        tensors.update((name, tensor.to(place)) for name, tensor in _quantized(chosen.leaves))
    result: Any = OrderedDict((name, tensors[name]) for name in chosen.leaves if name in tensors)
    if (versions := getattr(chosen.container, "metadata", None)) is not None:
        result._metadata = OrderedDict(versions)
    return result  # type: ignore[no-any-return]


def _tensors(chosen: StateDict) -> dict[str, TensorEntry]:
    """The tensors of the container; what isn't one (extra state, counters) is left out."""
    opaque = {
        name: leaf.reason
        for name, leaf in chosen.leaves.items()
        if isinstance(leaf, OpaqueTensor) and leaf.quantized is None
    }
    if opaque:
        raise IncompatibleCheckpointError(
            f"The checkpoint holds tensors that can't be read as dense ones ({', '.join(sorted(set(opaque.values())))}"
            f"): {listing(opaque)}.",
            problems=[f"{name} is {reason}" for name, reason in opaque.items()],
        )
    if lost := _lost(chosen.container):
        raise IncompatibleCheckpointError(
            f"The checkpoint holds tensors inside objects, where torchload can't tell what they are: {listing(lost)}.",
            problems=[f"{name} is an object of {kind} that holds tensors" for name, kind in lost.items()],
        )
    return {name: leaf for name, leaf in chosen.leaves.items() if isinstance(leaf, TensorEntry)}


def _lost(container: Mapping[Any, Any]) -> dict[str, str]:
    """Dotted names of objects that hold tensors in no way that has names → their classes."""
    lost: dict[str, str] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", container)]
    for name, value in todo:  # grows while it runs
        if id(value) in seen:
            continue
        seen.add(id(value))
        inside = as_mapping(value)
        if isinstance(value, Record) and not inside and any(map(is_tensor, _parts(value))):
            lost[name] = value.name
        for key, inner in (inside or {}).items():
            if isinstance(inner, (Mapping, Record)):
                todo.append((f"{name}.{key}" if name else str(key), inner))
    return lost


def _parts(record: Record) -> Iterator[Any]:
    """What a recorded object was made of, and what is directly inside that."""
    for part in (*record.args, *record.items, record.state):
        yield part
        if isinstance(part, (list, tuple)):
            yield from part


def _quantized(leaves: Mapping[str, Leaf]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, leaf in leaves.items():
        if isinstance(leaf, OpaqueTensor) and leaf.quantized is not None and leaf.shape is not None:
            yield name, quantized_tensor(leaf.shape, leaf.quantized, lambda entry: map_entry(entry).clone())


def _read(
    entries: dict[str, TensorEntry], device: torch.device, dtype: torch.dtype | None, *, mmap: bool
) -> dict[str, torch.Tensor]:
    """Read every stretch of data once, and show each tensor as a view of it."""
    names = list(entries)
    layouts = [_layout(entry) for entry in entries.values()]
    runs = shared_runs(layouts)
    sources = [_source(entries[names[item.members[0]]], item) for item in runs]
    dtypes = [final_dtype(source.dtype, dtype) for source in sources]
    mapped: dict[int, torch.Tensor] = {}
    if mmap and device == _CPU:
        keep = [index for index, source in enumerate(sources) if dtypes[index] is source.dtype]
        mapped = dict(zip(keep, map_entries([sources[index] for index in keep])))
    read = [index for index in range(len(runs)) if index not in mapped]
    filled = Copies()
    for index in read:
        filled.add(sources[index])
    requests = [(sources[index].shape, dtypes[index]) for index in read]
    check_room({device: sum(sources[index].numel * dtypes[index].itemsize for index in read)})
    memory = {**mapped, **dict(zip(read, allocate(requests, device)))}
    first_names = [names[item.members[0]] for item in runs]
    try:
        run([copy for index in read for copy in copies_of(first_names[index], sources[index], memory[index])])
    except CastOverflowError as error:
        advice = "Read it in a wider dtype (bfloat16), or without dtype=."
        source, target = getattr(torch, error.source_dtype), getattr(torch, error.target_dtype)
        raise does_not_fit(error.tensor, error.largest, source, target, advice) from error
    tensors: dict[str, torch.Tensor] = {}
    for index, item in enumerate(runs):
        whole = memory[index]
        if len(item.members) == 1 and whole.shape == layouts[item.members[0]].shape:
            tensors[names[item.members[0]]] = whole
            continue
        for member, offset in zip(item.members, item.offsets):
            layout = layouts[member]
            tensors[names[member]] = whole.as_strided(layout.shape, layout.strides, offset + whole.storage_offset())
    return {name: tensors[name] for name in names}


def _layout(entry: TensorEntry) -> Layout:
    if len(entry.boxes) == 1 and entry.boxes[0].shape == entry.shape:
        box = entry.boxes[0]
        memory = (id(box.extent.source), box.extent.offset)
        return Layout(memory, box.start, entry.dtype, entry.shape, box.strides)
    # In several boxes it has no memory of its own in the file; another name for the same boxes is the same tensor.
    return Layout(entry.location, 0, entry.dtype, entry.shape, contiguous_strides(entry.shape))


def _source(entry: TensorEntry, item: Run) -> TensorEntry:
    """What is read for a run: the stretch that its tensors lie in, or the one tensor as it is."""
    box = entry.boxes[0] if len(entry.boxes) == 1 else None
    if box is None or not item.is_flat or (len(item.members) == 1 and box.is_contiguous):
        return entry
    return TensorEntry.over(box.extent, entry.dtype, (item.numel,), start=item.start_bytes)
