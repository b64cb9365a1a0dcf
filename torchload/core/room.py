"""How much memory is left on this machine."""

from __future__ import annotations

__all__ = ["free_host_bytes"]


def free_host_bytes() -> int | None:
    """What the kernel and the container's limit leave, in bytes."""
    available = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit != "max":
            with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
                used = int(file.read())
            with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
                cache = sum(
                    int(line.split()[1]) for line in file if line.startswith(("inactive_file ", "active_file "))
                )
            available.append(int(limit) - used + cache)
    except (OSError, ValueError):
        pass
    return min(available, default=None)
