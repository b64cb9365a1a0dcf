"""The globals that torchload knows the meaning of, and what their calls amount to.

`KNOWN_CALLS` is the closed table: qualified name → function that turns a recorded call into a `TensorEntry`, an
`OpaqueTensor` or a plain value. A function may return `AS_RECORD` for a call that it can't make anything of; then the
call stays a `Record`, as all calls of unknown globals do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchload.core.checkpoint import Box, Extent, OpaqueTensor, Shape, TensorEntry, box_end_bytes, contiguous_strides
from torchload.formats.pickles import arrays
from torchload.formats.pickles.lazy import resolved
from torchload.formats.pickles.partial import KNOWN_SUBCLASSES, one_part
from torchload.formats.pickles.quantized import INTEGERS, quantized
from torchload.formats.pickles.standins import AS_RECORD, Call, SetStandIn, StandInType, Storage

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Layout, Walk

__all__ = ["KNOWN_CALLS", "KNOWN_MAPPINGS", "KNOWN_VALUES", "STORAGE_DTYPES", "strided_entry"]

MAX_DIMENSIONS = 64
MAX_BYTES = 1 << 63
MAX_LAYOUTS = 4096  # that are remembered
_INT = frozenset((int,))


# Every dtype that torch can name, as far as this torch has it.
_DTYPE_NAMES = (
    "bool uint8 int8 int16 short int32 int int64 long uint16 uint32 uint64 "
    "float16 half bfloat16 float32 float float64 double complex32 chalf complex64 cfloat complex128 cdouble "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 "
    "qint8 quint8 qint32 quint4x2 quint2x4 bits8 bits16 bits1x8 bits2x4 bits4x2"
).split()
_DTYPES = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}
KNOWN_VALUES: dict[str, Any] = {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}

# Names of typed storages, without "Storage", and their dtypes.
_LEGACY_STORAGES: dict[str, str] = dict(
    pair.split("=")
    for pair in (
        "Double=float64 Float=float32 Half=float16 BFloat16=bfloat16 Long=int64 Int=int32 Short=int16 Char=int8 "
        "Byte=uint8 Bool=bool ComplexDouble=complex128 ComplexFloat=complex64 QUInt8=quint8 QInt8=qint8 QInt32=qint32 "
        "QUInt4x2=quint4x2 QUInt2x4=quint2x4"
    ).split()
)
# Qualified name of a storage class → its dtype; an untyped storage counts bytes.
STORAGE_DTYPES: dict[str, torch.dtype | None] = {
    f"torch.{name}": None
    for name in ("UntypedStorage", "storage.UntypedStorage", "storage._UntypedStorage", "cuda.UntypedStorage")
} | {
    f"{module}.{name}Storage": _DTYPES[dtype]
    for name, dtype in _LEGACY_STORAGES.items()
    if dtype in _DTYPES
    for module in ("torch", "torch.cuda", "torch.storage")
}

KNOWN_MAPPINGS = frozenset(
    "collections.OrderedDict collections.defaultdict collections.Counter builtins.dict __builtin__.dict".split()
)


def _strided_tensor(
    walk: Walk, storage: Any, dtype: torch.dtype | None, offset: Any, shape: Any, strides: Any
) -> TensorEntry | OpaqueTensor:
    """A tensor over a storage, checked against it in integers that can't overflow; without `dtype` in the storage's."""
    if isinstance(storage, Call):
        storage = _storage_over(walk.value(storage))
    if type(storage) is not Storage:
        walk.fail("has no storage")
    shape = shape if type(shape) is tuple else walk.value(shape)
    strides = strides if type(strides) is tuple else walk.value(strides)
    shape, strides, origin, numel, last = _layout(walk, shape, strides)
    if type(offset) is not int or not 0 <= offset < MAX_BYTES:
        walk.fail(f"begins at element {_short(offset)} of its storage")
    dtype = dtype or storage.dtype or torch.uint8
    if numel == 0:
        return TensorEntry(dtype, shape, ())
    itemsize = dtype.itemsize
    view = storage.view
    first, available = (0, storage.nbytes) if view is None else (view[0] * itemsize, view[1] * itemsize)
    if (offset + last + 1) * itemsize > available or numel * itemsize >= MAX_BYTES:
        walk.fail(
            f"of shape {_short(shape)} and strides {_short(strides)} at element {offset} "
            f"does not lie inside its storage of {available} bytes"
        )
    if dtype in INTEGERS:
        return OpaqueTensor("a quantized tensor without its quantizer", shape)
    box = Box(storage.extent or walk.extent(storage), first + offset * itemsize, shape, strides, origin)
    return TensorEntry(dtype, shape, (box,))


def _layout(walk: Walk, shape: Any, strides: Any) -> Layout:
    """What a shape and strides amount to, checked once for all tensors that share them.

    Where 20,000 matrices share one, the walk through their pickle takes 64 ms instead of 96, and they share its tuples.
    """
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        walk.fail("has a shape and strides that don't belong together")
    numbers = shape + strides
    if not _INT.issuperset(map(type, numbers)):  # before they are hashed: True is equal to 1
        walk.fail(f"has an impossible shape {_short(shape)} or strides {_short(strides)}")
    layout = walk.layouts.get(numbers)
    if layout is None:
        if not all(0 <= number < MAX_BYTES for number in numbers):
            walk.fail(f"has an impossible shape {_short(shape)} or strides {_short(strides)}")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides))
        layout = (shape, strides, (0,) * len(shape), math.prod(shape), last)
        if len(walk.layouts) < MAX_LAYOUTS:
            walk.layouts[numbers] = layout
    return layout


def strided_entry(
    extent: Extent, start: int, end: int, dtype: torch.dtype, shape: Shape, strides: Shape
) -> TensorEntry:
    """A tensor over bytes `start` to `end` of an extent, checked in integers that can't overflow; none is negative.

    Raises:
        ValueError: It doesn't lie there; what it does instead is a clause.
    """
    if 0 in shape:
        return TensorEntry(dtype, shape, ())
    needed = box_end_bytes(start, shape, strides, dtype.itemsize)
    if needed > end:
        raise ValueError(f"of shape {_short(shape)} needs {needed} bytes of its storage, which has {end}")
    if math.prod(shape) * dtype.itemsize >= MAX_BYTES:
        raise ValueError(f"of shape {_short(shape)} is too large to exist")
    return TensorEntry.over(extent, dtype, shape, strides, start)


def _storage_over(vector: Any) -> Any:
    """A storage that a nested stream holds, as `_nested_storage` left it."""
    if type(vector) is not TensorEntry or len(vector.shape) != 1:
        return None
    storage = Storage(object, vector.dtype, "", vector.shape[0])
    if vector.boxes:
        storage.extent = vector.boxes[0].extent
    return storage


def _nested_storage(call: Call, walk: Walk) -> Any:
    """``torch.storage._load_from_bytes(data)``: how tensors are pickled without `torch.save`."""
    from torchload.formats.files import legacy

    extent = walk.extent_of_bytes(call.args[0], big_endian=False)
    if extent is None:
        return AS_RECORD
    walk.charge(20 + extent.nbytes // 16)
    return legacy.open(extent.source.slice(extent.offset, extent.nbytes), walk.name).root


def _short(value: object) -> str:
    """A value of any size, for a message."""
    if type(value) is tuple:
        return "(" + ", ".join(_short(item) for item in value[:8]) + (", …)" if len(value) > 8 else ")")
    if type(value) is int:
        return str(value) if abs(value) < 1 << 128 else "a huge number"
    return f"<{type(value).__name__}>"


def _shape_or_none(walk: Walk, value: Any) -> Shape | None:
    value = walk.value(value)
    if type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(type(size) is int for size in value):
        return value
    return None


def _tensor(call: Call, walk: Walk) -> Any:
    args = call.args
    storage, offset, shape, strides = args[:4]
    tensor = _strided_tensor(walk, storage, None, offset, shape, strides)
    return resolved(walk, tensor, args[6]) if len(args) > 6 else tensor


def _tensor_with_dtype(call: Call, walk: Walk) -> Any:
    storage, offset, shape, strides, _, _, dtype, *rest = call.args
    if type(dtype) is not torch.dtype:
        walk.fail("has a dtype that this version of torch doesn't know")
    tensor = _strided_tensor(walk, storage, dtype, offset, shape, strides)
    return resolved(walk, tensor, rest[0]) if rest else tensor


def as_parameter(entry: Any) -> Any:
    """The same tensor as a parameter."""
    if type(entry) is TensorEntry and not entry.is_parameter:
        return TensorEntry(entry.dtype, entry.shape, entry.boxes, True)
    return entry


def _parameter(call: Call, walk: Walk) -> Any:
    # Before torch 0.1.11 the tensor was the first of five parts of a state.
    is_oldest = not call.args and type(call.state) is tuple and len(call.state) == 5
    entry = as_parameter(walk.value(call.state[0] if is_oldest else call.args[0]))
    return entry if type(entry) in (TensorEntry, OpaqueTensor) else AS_RECORD


def _from_type(call: Call, walk: Walk) -> Any:
    """``_rebuild_from_type_v2(function, type, args, state)``: a tensor with attributes, or of a subclass."""
    function, kind, args = call.args[:3]
    if not isinstance(function, StandInType) or not issubclass(function, Call) or type(args) is not tuple:
        return OpaqueTensor(f"a {kind.qualified[:200]}" if isinstance(kind, StandInType) else "a tensor of a subclass")
    value = walk.value(function(*args[:16]))
    if isinstance(kind, StandInType):
        if kind.qualified in _PARAMETERS:
            value = as_parameter(value)
        elif kind.qualified in KNOWN_SUBCLASSES and type(value) is OpaqueTensor and value.shape is not None:
            value = one_part(kind.qualified, call.args[3], value.shape, walk)
    return value if type(value) in (TensorEntry, OpaqueTensor) else AS_RECORD


def _sparse(call: Call, walk: Walk) -> Any:
    layout, data = call.args[:2]
    name = walk.value(layout)
    kind = name.removeprefix("torch.sparse_").upper() if type(name) is str and len(name) < 40 else "COO"
    shape = _shape_or_none(walk, data[2 if kind == "COO" else 3]) if type(data) is tuple and len(data) > 2 else None
    return OpaqueTensor(f"a sparse {kind} tensor", shape)


def _quantized(call: Call, walk: Walk) -> Any:
    """``_rebuild_qtensor(storage, offset, shape, strides, (scheme, scale, zero point), requires_grad, hooks)``."""
    storage, offset, shape, strides, quantizer = call.args[:5]
    if type(storage) is not Storage or storage.dtype not in INTEGERS:
        return OpaqueTensor("a quantized tensor", _shape_or_none(walk, shape))
    shape, strides = walk.value(shape), walk.value(strides)
    integers, packed = INTEGERS[storage.dtype]
    if packed == 1:
        data = _strided_tensor(walk, storage, integers, offset, shape, strides)
    elif shape and offset == 0 and strides == contiguous_strides(shape):
        rows, columns = math.prod(shape[:-1]), shape[-1]
        data = _strided_tensor(walk, storage, integers, 0, (rows * -(-columns // packed),), (1,))
    else:
        return OpaqueTensor("a quantized tensor of less than a byte per element, in an odd layout", shape)
    return quantized(walk, storage.dtype, shape, data, quantizer)


def _opaque(reason: str, shape_index: int | None = None) -> Callable[[Call, Walk], Any]:
    def convert(call: Call, walk: Walk) -> Any:
        return OpaqueTensor(reason, None if shape_index is None else _shape_or_none(walk, call.args[shape_index]))

    return convert


def _oldest(call: Call, walk: Walk) -> Any:
    """``torch.FloatTensor()`` with the state (storage, offset, shape, strides): how torch 0.1.11 wrote tensors."""
    if call.args or type(call.state) is not tuple or len(call.state) != 4:
        return AS_RECORD
    storage, offset, shape, strides = call.state
    return _strided_tensor(walk, storage, None, offset, walk.value(shape), walk.value(strides))


def _from_array(call: Call, walk: Walk) -> Any:
    """``_rebuild_device_tensor_from_numpy(array, dtype, device, requires_grad)``: how XLA and others save."""
    # bfloat16 is saved as the float32 array that holds the same values.
    entry = walk.value(call.args[0])
    return entry if type(entry) is TensorEntry else AS_RECORD


def _size(call: Call, walk: Walk) -> Any:
    shape = walk.value(call.args[0]) if call.args else ()
    if type(shape) is list and len(shape) <= MAX_DIMENSIONS:
        shape = tuple(shape)
    is_shape = type(shape) is tuple and len(shape) <= MAX_DIMENSIONS and all(type(size) is int for size in shape)
    return shape if is_shape else AS_RECORD


def _device(call: Call, walk: Walk) -> Any:
    kind = call.args[0] if call.args else None
    index = call.args[1] if len(call.args) > 1 else None
    if type(kind) is not str or len(kind) > 64:
        return AS_RECORD
    return f"{kind}:{index}" if type(index) is int and 0 <= index < 1 << 32 else kind


def _first_text(call: Call, walk: Walk) -> Any:
    text = walk.value(call.args[0]) if call.args else None
    return text if type(text) is str else AS_RECORD


def _first(call: Call, walk: Walk) -> Any:
    return walk.value(call.args[0])


def _set(call: Call, walk: Walk) -> Any:
    elements = SetStandIn(walk.allow(call.args[0]) if call.args else ())
    elements.frozen = call.qualified.endswith("frozenset")
    return walk.value(elements)


def _complex(call: Call, walk: Walk) -> Any:
    real, imaginary = call.args
    return complex(real, imaginary) if type(real) is float and type(imaginary) is float else AS_RECORD


_PARAMETERS = frozenset(("torch.nn.parameter.Parameter", "torch.nn.Parameter"))

# Converter → the names of the functions whose calls it reads.
_CONVERTERS: dict[Callable[[Call, Walk], Any], str] = {
    _tensor: "torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2",
    _tensor_with_dtype: "torch._utils._rebuild_tensor_v3",
    _parameter: "torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state "
    "torch.nn.parameter.Parameter",
    _from_type: "torch._tensor._rebuild_from_type torch._tensor._rebuild_from_type_v2 torch.tensor._rebuild_from_type",
    _sparse: "torch._utils._rebuild_sparse_tensor torch._utils._rebuild_sparse_csr_tensor",
    _quantized: "torch._utils._rebuild_qtensor",
    _opaque("a nested tensor"): "torch._utils._rebuild_nested_tensor",
    _opaque("a meta tensor, which has no data", 1): "torch._utils._rebuild_meta_tensor_no_storage",
    _opaque("a tensor subclass that wraps others", 2): "torch._utils._rebuild_wrapper_subclass",
    _opaque("an uninitialized parameter"): "torch.nn.parameter.UninitializedParameter",
    _opaque("an uninitialized buffer"): "torch.nn.parameter.UninitializedBuffer",
    _from_array: "torch._utils._rebuild_device_tensor_from_numpy torch._utils._rebuild_xla_tensor",
    _nested_storage: "torch.storage._load_from_bytes",
    _size: "torch.Size",
    _device: "torch.device",
    _first_text: "torch.serialization._get_layout torch.torch_version.TorchVersion",
    _first: "torch.autograd.variable.Variable torch.jit._pickle.build_tensorlist torch.jit._pickle.build_intlist "
    "torch.jit._pickle.build_doublelist torch.jit._pickle.build_boollist torch.jit._pickle.restore_type_tag",
    _set: "builtins.set __builtin__.set builtins.frozenset __builtin__.frozenset",
    _complex: "builtins.complex __builtin__.complex",
    _oldest: "torch.Tensor",
}
KNOWN_CALLS: dict[str, Callable[[Call, Walk], Any]] = {
    **{name: convert for convert, names in _CONVERTERS.items() for name in names.split()},
    **{f"{module}.{name}Tensor": _oldest for name in _LEGACY_STORAGES for module in ("torch", "torch.cuda")},
    **arrays.KNOWN_CALLS,
}
