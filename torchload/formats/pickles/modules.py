"""Whole pickled modules: the state dict that a recorded `nn.Module` would have.

`torch.save(model)` pickles every module as an object whose ``__dict__`` holds ``_parameters``, ``_buffers`` and
``_modules``. Those three, and the names of the buffers that are not persistent, are all that a state dict is made of;
the class need not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchload.core.checkpoint import Container, OpaqueTensor, Record, TensorEntry, record_fields

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Walk

__all__ = ["flatten_module", "module_fields"]

MAX_MODULE_DEPTH = 200
MODULE_COST = 10  # what visiting a module once more counts, in items that are copied
MAX_NAME_LENGTH = 4096  # characters of a dotted name

# Quantized modules, which are pickled in a form of their own when whole; their state dicts are ordinary ones.
_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.quantized.")
_PACKED = "a packed weight of a quantized module that was pickled as a whole (save its state_dict() instead)"

# Classes whose objects are pickled as a call with the wrapped module → the name under which they hold it.
_WRAPPED_BY_CALL = {"torch._dynamo.eval_frame.OptimizedModule": "_orig_mod"}


def module_fields(record: Record) -> dict[str, Any] | None:
    """The attributes of a record that is a module, else ``None``."""
    fields = record_fields(record)
    if not fields and record.args and record.name in _WRAPPED_BY_CALL:
        return {"_parameters": {}, "_modules": {_WRAPPED_BY_CALL[record.name]: record.args[0]}}
    if "_modules" in fields and "_parameters" in fields:
        if isinstance(fields["_modules"], dict) and isinstance(fields["_parameters"], dict):
            return fields
    return None


def flatten_module(walk: Walk, module: Record, container: Container) -> None:
    """Fill `container` with the state dict of `module`, in torch's order.

    Parameters come before buffers and both before the children's; absent ones (``None``) and buffers that are not
    persistent are left out. A tensor that several names share is the same entry under each of them.
    """
    metadata: dict[str, Any] = {}
    # (module, prefix, identities of the modules around it); the last first, so that children keep their order.
    pending: list[tuple[Record, str, tuple[int, ...]]] = [(module, "", ())]
    while pending:
        record, prefix, around = pending.pop()
        if id(record) in around or len(around) > MAX_MODULE_DEPTH or len(prefix) > MAX_NAME_LENGTH:
            walk.fail("is a module that contains itself, or is nested too deeply")
        fields = module_fields(record)
        if fields is None:
            if record.name.startswith(_QUANTIZED):
                container[f"{prefix}weight"] = OpaqueTensor(_PACKED)
            continue
        walk.charge(MODULE_COST)
        if type(fields.get("_version")) is int:
            metadata[prefix[:-1]] = {"version": fields["_version"]}
        _own_tensors(walk, fields, prefix, container)
        inside = (*around, id(record))
        children = [
            (child, f"{prefix}{name}.", inside)
            for name, item in walk.allow(fields["_modules"]).items()
            if type(name) is str and isinstance(child := walk.unflattened(item), Record)
        ]
        pending.extend(reversed(children))
    container.metadata = metadata or None


def _own_tensors(walk: Walk, fields: dict[str, Any], prefix: str, container: Container) -> None:
    buffers = fields.get("_buffers")
    transient = fields.get("_non_persistent_buffers_set")
    transient = walk.value(transient) if transient is not None else ()
    if isinstance(packed := fields.get("_packed_params"), Record) and packed.name == "torch.ScriptObject":
        container[f"{prefix}_packed_params"] = OpaqueTensor(_PACKED)
    for tensors in (fields["_parameters"], buffers if isinstance(buffers, dict) else {}):
        is_buffer = tensors is buffers
        for name, tensor in walk.allow(tensors).items():
            if tensor is None or type(name) is not str or (is_buffer and name in transient):
                continue
            walk.key = prefix + name
            entry = walk.value(tensor)
            if type(entry) in (TensorEntry, OpaqueTensor):
                container[prefix + name] = entry
