"""Which device each tensor goes to, and whether that device is there and has room."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from torchload.core.launch import has_siblings, local_rank
from torchload.core.public import public
from torchload.core.room import free_host_bytes
from torchload.errors import DeviceError

__all__ = ["DeviceSpec", "Placement", "available_devices", "best_device", "check_room", "resolve_device"]

DeviceSpec = torch.device | str | int | Mapping[str, "torch.device | str | int"] | None


class Placement:
    """The caller's wish, resolved: name of a tensor and where it is now → where it shall be.

    Args:
        spec: ``None`` leaves tensors where they are (meta goes to the CPU); a device moves everything; a mapping
            ``{module-prefix: device}`` places parts, the longest prefix that fits wins, ``""`` stands for the rest.

    Raises:
        DeviceError: A device that isn't there.
        TypeError: Something that is no device.
    """

    def __init__(self, spec: DeviceSpec) -> None:
        self._everywhere: torch.device | None = None
        self._by_prefix: dict[str, torch.device] = {}
        if isinstance(spec, Mapping):
            names: list[object] = list(spec)
            if odd := [name for name in names if not isinstance(name, str)]:
                raise TypeError(f"device as a mapping has names of modules as keys, such as 'encoder', not {odd[0]!r}")
            self._by_prefix = {prefix.rstrip("."): resolve_device(device) for prefix, device in spec.items()}
        elif spec is not None:
            self._everywhere = resolve_device(spec)

    def unused_prefixes(self, names: Any) -> list[str]:
        """Prefixes of the mapping under which the model has nothing: a typing error, most likely."""
        return [
            prefix
            for prefix in self._by_prefix
            if prefix and not any(name == prefix or name.startswith(prefix + ".") for name in names)
        ]

    @property
    def leaves_all(self) -> bool:
        """Whether every tensor stays on the device that it is on."""
        return self._everywhere is None and not self._by_prefix

    def of(self, name: str, now: torch.device) -> torch.device:
        """Where the tensor of this name goes, given where it is now."""
        if self._everywhere is not None:
            return self._everywhere
        if self._by_prefix:
            part = name
            while True:
                if part in self._by_prefix:
                    return self._by_prefix[part]
                if not part:
                    break
                part = part.rpartition(".")[0]
        return now if now.type != "meta" else torch.device("cpu")


def resolve_device(device: torch.device | str | int) -> torch.device:
    """A device that exists here, with its index.

    Raises:
        DeviceError: It isn't there; the message says what is.
        TypeError: Not a device at all.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if isinstance(device, str) and device == "auto":
        return best_device()
    known: Any = device
    if isinstance(known, bool) or not isinstance(known, (torch.device, str, int)):
        raise TypeError(
            f"device must be None, 'auto', a torch.device, a string, an index or a mapping, not {type(device).__name__}"
        )
    if isinstance(device, int):
        kind = _accelerators()[0] if _accelerators() else "cuda"
        device = f"{kind}:{device}"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(
            f"{device!r} names no device that torch knows. Here are: {', '.join(available_devices())}.",
            device=str(device),
            available=available_devices(),
        ) from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type == "meta":
        raise DeviceError(
            "device='meta' has no memory to load into. Name a real device, or None to leave tensors where they are.",
            device="meta",
            available=available_devices(),
        )
    count = _count(wanted.type)
    index: int | None = wanted.index
    if index is None:  # what torch itself would take
        index = _current(wanted.type) if count else 0
    if index >= count:
        here = available_devices()
        raise DeviceError(
            f"device {str(wanted)!r} isn't there: {_missing_reason(wanted.type, count)}. Here are: {', '.join(here)}.",
            device=str(wanted),
            available=here,
        )
    return torch.device(wanted.type, index)


@public
def best_device() -> torch.device:
    """The accelerator with the most free memory, else the CPU. This is what ``device="auto"`` uses.

    Where several ranks share a machine (torchrun, srun, mpirun, `torch.multiprocessing.spawn` with a process group),
    each has an accelerator of its own: that of its local rank. ``CUDA_VISIBLE_DEVICES`` and its like are honoured,
    since only visible devices are counted.

    Returns:
        A device with its index, such as ``device(type='cuda', index=1)``, or ``device(type='cpu')``.

    Example:
        >>> best_device().type in ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "mtia")
        True
    """
    found = [torch.device(kind, index) for kind in _accelerators() for index in range(_count(kind))]
    rank = local_rank()
    if found and rank is not None and has_siblings():  # all of them would see the same free memory
        return found[rank % len(found)]
    return max(found, key=lambda device: free_bytes(device) or 0, default=torch.device("cpu"))


def available_devices() -> tuple[str, ...]:
    """The devices of this process, as strings, the CPU first."""
    return ("cpu", *(f"{kind}:{index}" for kind in _accelerators() for index in range(_count(kind))))


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device, in bytes; ``None`` where it can't be known."""
    if device.type == "cpu":
        return free_host_bytes()
    module: Any = getattr(torch, device.type, None)
    try:
        free, _ = module.mem_get_info(device)
        # What the caching allocator holds without using it can be allocated as well.
        return int(free) + int(module.memory_reserved(device)) - int(module.memory_allocated(device))
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def check_room(need_bytes: Mapping[torch.device, int]) -> None:
    """Refuse up front what can't fit: the fresh memory of each device, in bytes.

    Raises:
        DeviceError: A device has less free memory than that.
    """
    for device, need in need_bytes.items():
        free = free_bytes(device) if need else None
        if free is not None and need > free:
            raise DeviceError(
                f"The checkpoint needs {need / 2**30:.2f} GiB on {device}, where {free / 2**30:.2f} GiB are free. Free "
                "memory there, take a smaller dtype=, or spread the model with device={prefix: device}.",
                device=str(device),
                available=available_devices(),
            )


def _accelerators() -> list[str]:
    return [kind for kind in ("cuda", "xpu", "mps", "npu", "hpu", "mtia") if _count(kind)]


def _count(kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module: Any = getattr(torch, kind, None)
    try:
        return int(module.device_count()) if module.is_available() else 0
    except (AttributeError, RuntimeError):
        return 0


def _current(kind: str) -> int:
    module: Any = getattr(torch, kind, None)
    return int(module.current_device()) if hasattr(module, "current_device") else 0


def _missing_reason(kind: str, count: int) -> str:
    if count:
        return f"this process sees {count} {kind} device{'s' if count > 1 else ''}"
    if kind == "cuda" and not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA"
    if kind == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides all of them"
    return f"this process sees no {kind} device"
