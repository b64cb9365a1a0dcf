"""The machine: which part of a file is in its page cache, and a record of what was measured on."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = [
    "anonymous_memory",
    "describe",
    "drop_from_cache",
    "have_free_memory_ready",
    "peer_version",
    "read_into_cache",
    "resident_fraction",
    "usable_cores",
]

CHUNK_BYTES = 8 << 20
_PASSES = 5


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_fraction(path: str) -> float:
    """How much of the file is in the page cache, from 0 to 1, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if not nbytes:
            return 1.0
        # A private writable map, because ctypes takes the address of no other; nothing is written.
        with mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
            pages = -(-nbytes // mmap.PAGESIZE)
            present = (ctypes.c_ubyte * pages)()
            anchor = ctypes.c_char.from_buffer(view)
            status = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(nbytes), present)
            del anchor
    if status:
        raise OSError(ctypes.get_errno(), "mincore failed", path)
    return bytes(present).translate(_LOWEST_BIT).count(1) / pages


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def drop_from_cache(path: str) -> float:
    """Drop the file from the page cache; returns the fraction that stayed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return resident_fraction(path)


def read_into_cache(path: str) -> float:
    """Read the file until all of it is in the page cache, a few times at most; returns the fraction that is there.

    Once isn't always enough: some kernels give up pages of idle files even while memory is free.
    """
    buffer = bytearray(CHUNK_BYTES)
    fraction = resident_fraction(path)
    for _ in range(_PASSES):
        if fraction == 1.0:
            break
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        fraction = resident_fraction(path)
    return fraction


def anonymous_memory(nbytes: int, *, filled: bool) -> mmap.mmap:
    """Private memory that asks for huge pages; present from the start where `filled`."""
    region = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    if filled:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(region)), 1, max(nbytes, 1))
    return region


def have_free_memory_ready(nbytes: int) -> None:
    """Take so much memory, touch it, and give it back to the system, at most half of what is free.

    A virtual machine's host may take away memory that lies idle for seconds. To get it back costs many times more than
    a page fault, and whoever comes first would pay for all.
    """
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    anonymous_memory(min(nbytes, free_bytes // 2), filled=True).close()


def peer_version(distribution: str) -> str | None:
    """Installed version of a package, or ``None`` where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(distributions: Iterable[str], folder: Path) -> dict[str, object]:
    """What was measured on: processor, memory, kernel, file system, and the version of every contestant."""
    record: dict[str, object] = {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(folder),
        "transparent_huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torchload_commit": _commit(),
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: peer_version(name) for name in sorted(set(distributions))},
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def _caches() -> dict[str, str]:
    """Sizes of the first core's data caches, as the kernel names them: ``{"L2": "2048K"}``."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size, kind = (_text(str(folder / name)) for name in ("level", "size", "type"))
        if level and size and kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _commit() -> str | None:
    """Commit of the working tree, with a plus sign where it was changed since."""
    root = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _file_system(folder: Path) -> str | None:
    """Type of the file system that holds the folder: its longest mount point in the mount table."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    where = str(folder.resolve())
    holding = [(len(point), kind) for point, kind in mounts if where.startswith(point.rstrip("/") + "/")]
    return max(holding)[1] if holding else None


def _field(path: str, name: str) -> str | None:
    lines = (_text(path) or "").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
