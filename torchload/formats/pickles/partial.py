"""Tensors of which each process holds a part: what `ShardedTensor` and `DTensor` look like in a pickle of one process.

Each becomes an `OpaqueTensor` with its `parts`: one process alone can't fill a tensor, all of them together can (see
`torchload.formats.sets.rank_files`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchload.core.checkpoint import OpaqueTensor, Record, Shape, TensorEntry, record_fields

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Walk

__all__ = ["KNOWN_SUBCLASSES", "one_part"]

MAX_DIMENSIONS = 64


def one_part(kind: str, state: Any, shape: Shape, walk: Walk) -> OpaqueTensor:
    """A tensor of one of the `KNOWN_SUBCLASSES`; without parts where its state is laid out as no known version does."""
    try:
        return KNOWN_SUBCLASSES[kind](state, shape, walk)
    except (TypeError, LookupError, AttributeError):
        return OpaqueTensor("one rank's part of a distributed tensor", shape)


def _sharded_tensor(state: Any, shape: Shape, walk: Walk) -> OpaqueTensor:
    """State of FSDP's `ShardedTensor`: (local shards, metadata, process group, sharding spec, …)."""
    parts: list[tuple[Shape, TensorEntry]] = []
    for shard in walk.allow(state[0]):
        fields = record_fields(shard)
        tensor, metadata = walk.value(fields["tensor"]), record_fields(fields["metadata"])
        origin, size = _shape(metadata["shard_offsets"], walk), _shape(metadata["shard_sizes"], walk)
        if type(tensor) is not TensorEntry or tensor.shape != size or not len(origin) == len(size) == len(shape):
            walk.fail("has a shard that is not where its metadata says")
        parts.append((origin, tensor))
    return OpaqueTensor("one rank's part of a sharded tensor", shape, tuple(parts))


def _dtensor(state: Any, shape: Shape, walk: Walk) -> OpaqueTensor:
    """Attributes of a `DTensor`: its local tensor, and a spec of the mesh and the placements."""
    state = record_fields(Record("", state=state))
    local = walk.value(state["_local_tensor"])
    spec = record_fields(state["_spec"])
    mesh = record_fields(spec["mesh"])
    coordinate, sizes = mesh.get("_coordinate_on_dim"), _mesh_shape(mesh, walk)
    what = "one rank's part of a distributed tensor"
    if type(local) is not TensorEntry or coordinate is None or sizes is None or not _in_order(spec, walk):
        return OpaqueTensor(what, shape)
    placements = walk.value(spec["placements"])
    coordinate = _shape(coordinate, walk)
    if not len(placements) == len(coordinate) == len(sizes):
        return OpaqueTensor(what, shape)
    origin, size = [0] * len(shape), list(shape)
    for placement, position, count in zip(placements, coordinate, sizes):
        kind = placement.name.rpartition(".")[2] if isinstance(placement, Record) else ""
        if kind == "Shard":
            dimension = record_fields(placement)["dim"]
            chunk = -(-size[dimension] // count)
            begin = min(position * chunk, size[dimension])
            origin[dimension] += begin
            size[dimension] = min(chunk, size[dimension] - begin)
        elif kind != "Replicate":  # a partial sum, or strides between the parts
            return OpaqueTensor(what, shape)
    if local.shape != tuple(size):
        walk.fail("has a local part that is not as large as its placement says")
    return OpaqueTensor(what, shape, ((tuple(origin), local),))


def _mesh_shape(mesh: dict[str, Any], walk: Walk) -> Shape | None:
    """Sizes of a recorded device mesh; how they are kept has changed with torch 2.9 and again with 2.13."""
    layout = record_fields(mesh["_layout"]) if isinstance(mesh.get("_layout"), Record) else {}
    if "axes" in layout:
        axes = [record_fields(axis)["shape"] for axis in walk.allow(layout["axes"])]
        return tuple(math.prod(_shape(axis, walk)) for axis in axes)  # an axis of size 1 has the shape ()
    if "shape" in layout:
        sizes = layout["shape"]
        return (sizes,) if type(sizes) is int else _shape(sizes, walk)
    ranks = walk.value(mesh.get("mesh"))
    return ranks.shape if type(ranks) is TensorEntry else None


def _in_order(spec: dict[str, Any], walk: Walk) -> bool:
    """Whether a dimension that is sharded over several mesh dimensions is cut along them one after the other."""
    order = spec.get("shard_order") or ()
    for entry in walk.allow(order):
        if not isinstance(entry, Record) or len(entry.args) != 2:
            return False
        dimensions = _shape(entry.args[1], walk)
        if list(dimensions) != sorted(dimensions):
            return False
    return True


def _shape(value: Any, walk: Walk) -> Shape:
    value = walk.value(value)
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSIONS:
        raise TypeError("offsets or sizes are not a list of numbers")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise TypeError("offsets or sizes are not positive numbers")
    return tuple(value)


# Class of a tensor → function that makes something of the state that was pickled with it.
KNOWN_SUBCLASSES: dict[str, Callable[[Any, Shape, Walk], OpaqueTensor]] = {
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor": _sharded_tensor,
    "torch.distributed.tensor.DTensor": _dtensor,  # torch 2.5 on
    "torch.distributed._tensor.api.DTensor": _dtensor,
    "torch.distributed.tensor._api.DTensor": _dtensor,
}
