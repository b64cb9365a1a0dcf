"""Weights that a file keeps as integers or 8-bit floats, of which only a scale makes numbers: said, never guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from torchload.core.checkpoint import Checkpoint, TensorEntry
from torchload.core.text import plural, short_dtype
from torchload.match import Selection, as_mapping
from torchload.match.paths import joined, last
from torchload.model.target import Target

__all__ = ["float8_sources", "is_scale", "quantized_problem"]

# Last segments of what stands beside quantized weights → (what the file is, what reads it).
_SCALES: dict[str, tuple[str, str]] = {
    "weight_scale": ("8-bit weights with scales", "vLLM, or transformers with compressed-tensors"),
    "weight_scale_inv": ("8-bit floats with a scale for each block, as DeepSeek's", "transformers, or vLLM"),
    "scale_inv": ("8-bit floats with scales", "transformer_engine"),
    "scale_weight": ("8-bit floats with scales, as ComfyUI's", "ComfyUI"),
    "SCB": ("bitsandbytes' 8-bit integers", "transformers with bitsandbytes"),
    "weight_format": ("bitsandbytes' 8-bit integers", "transformers with bitsandbytes"),
    "absmax": ("bitsandbytes' 4-bit weights", "transformers with bitsandbytes"),
    "quant_map": ("bitsandbytes' 4-bit weights", "transformers with bitsandbytes"),
    "nested_absmax": ("bitsandbytes' 4-bit weights", "transformers with bitsandbytes"),
    "bitsandbytes__nf4": ("bitsandbytes' 4-bit weights", "transformers with bitsandbytes"),
    "bitsandbytes__fp4": ("bitsandbytes' 4-bit weights", "transformers with bitsandbytes"),
    "quant_state": ("bitsandbytes' 4-bit weights", "transformers with bitsandbytes"),
    "qweight": ("GPTQ's or AWQ's packed integers", "transformers with gptqmodel or autoawq, or vLLM"),
    "qzeros": ("GPTQ's or AWQ's packed integers", "transformers with gptqmodel or autoawq, or vLLM"),
    "weight_packed": ("packed integers", "vLLM, or transformers with compressed-tensors"),
    "_packed_params": ("torch.ao's quantized modules", "a model converted as it was when saved"),
    "zero_point": ("integers with a scale and a zero point", "a model converted as it was when saved"),
    "weight_zero_point": ("integers with scales and zero points", "vLLM, or transformers with compressed-tensors"),
}
_MAYBE = frozenset({"scale", "scales", "scaling_factor"})  # scales where the weight is quantized, else anything
_FLOAT8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
_ORDINARY = frozenset(
    {None, torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.complex32, torch.complex64, torch.complex128}
)
_CONFIG_BYTES = 4 << 20


def is_scale(name: str) -> bool:
    """Whether a name is that of a scale, or of what else only quantized weights have beside them.

    Example:
        >>> is_scale("fc.weight_scale"), is_scale("fc.weight")
        (True, False)
    """
    return last(name) in _SCALES or last(name) in _MAYBE


def float8_sources(target: Target, selection: Selection) -> list[str]:
    """What of the file is 8-bit floats, for places of the model that aren't."""
    return [source for _, source, dtype in _suspects(target, selection) if dtype.is_floating_point]


def _suspects(target: Target, selection: Selection) -> list[tuple[str, str, torch.dtype]]:
    """(model name, checkpoint name, dtype in the file) of integers and 8-bit floats, for places of wider floats."""
    leaves, slots = selection.leaves, target.by_name
    odd = [pair for pair in selection.pairs.items() if getattr(leaves[pair[1]], "dtype", None) not in _ORDINARY]
    return [
        (name, source, leaf.dtype)
        for name, source in odd
        if isinstance(leaf := leaves[source], TensorEntry)
        and (slot := slots.get(name)) is not None
        and slot.tensor.dtype.is_floating_point
        and not (leaf.dtype in _FLOAT8 and slot.tensor.dtype in _FLOAT8)
    ]


def quantized_problem(target: Target, selection: Selection, checkpoint: Checkpoint | None = None) -> str | None:
    """What stands against loading quantized weights as if they were numbers; ``None`` if there are none."""
    packed = [name for name in selection.unexpected if not _PACKED.isdisjoint(name.split("."))]
    suspects = _suspects(target, selection)
    if not suspects and not packed:
        return None
    has_float8 = any(dtype.is_floating_point for *_, dtype in suspects)
    elsewhere = _elsewhere(checkpoint, selection) if checkpoint is not None and has_float8 else None
    found: dict[str, str] = {}
    own = set(target.names)
    for name, source, dtype in suspects:
        is_integer = not dtype.is_floating_point
        if (is_integer and not target.by_name[name].is_parameter) or _beside(name, own):
            continue  # a buffer of numbers, or a model with scales of its own
        scale = _beside(source, selection.leaves)
        if is_integer or scale or elsewhere:
            found[source] = scale or ""
    if not found and not packed:
        return None
    scale = next(filter(None, found.values()), packed[0] if packed else "")
    known = next((segment for segment in reversed(scale.split(".")) if segment in _SCALES), "")
    what, reader = _SCALES.get(known, ("quantized weights", "what wrote it"))
    told = f" (beside {scale!r})" if scale else f" ({elsewhere})" if elsewhere else ""
    first = next(iter(found), packed[0] if packed else "")
    leaf = selection.leaves[first]
    kept = f", such as {first!r} ({short_dtype(leaf.dtype)})" if isinstance(leaf, TensorEntry) else ""
    return (
        f"the file holds {what}{told}: {plural(len(found) or len(packed), 'tensor')}{kept}. Without their scales they "
        f"are other numbers; dequantize them first ({reader} reads them)"
    )


_PACKED = frozenset({"qweight", "absmax", "quant_map", "weight_packed", "_packed_params", "SCB"})


def _beside(name: str, names: Container[str]) -> str | None:
    """A scale that stands beside a weight: in its module, or below its own name."""
    module = name.rpartition(".")[0]
    for scale in (*_SCALES, *_MAYBE):
        for candidate in (joined(module, scale), f"{name}.{scale}", f"{name}_{scale}"):
            if candidate in names:
                return candidate
    return None


def _elsewhere(checkpoint: Checkpoint, selection: Selection) -> str | None:
    """Where beside the chosen weights something says that they are quantized: a phrase, or ``None``."""
    for name, text in checkpoint.metadata.items():
        if "quant" in name.lower() or "quantization" in str(text)[:_CONFIG_BYTES].lower():
            return f"the header's {name!r} says so"
    top = as_mapping(checkpoint.root) or {}
    for name, value in top.items():
        is_other = str(name) != (selection.segments[0] if selection.segments else "")
        if is_other and as_mapping(value) and any(word in str(name).lower() for word in ("scale", "quant")):
            return f"{str(name)!r} stands beside the weights"
    return _config_says(checkpoint.path)


def _config_says(path: Any) -> str | None:
    """Whether the ``config.json`` beside a file, or in a folder, has settings of a quantization."""
    try:
        place = Path(os.fspath(path))
        if not place.exists():
            return None  # something in memory, or a file object
        config = (place if place.is_dir() else place.parent) / "config.json"
        if not config.is_file() or config.stat().st_size > _CONFIG_BYTES:
            return None
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    has = isinstance(settings, dict) and (settings.get("quantization_config") or settings.get("compression_config"))
    return f"{config.name} has a quantization_config" if has else None
