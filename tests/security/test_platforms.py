"""Where the system lacks what makes loading fast, it still loads: each call removed by itself, then all together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.security._machine import in_child

SCRIPT = """
import ctypes, mmap, os, sys
{missing}
import torch
from torchload import inspect_checkpoint, read_state_dict, smart_load, smart_save

folder = sys.argv[1]
for name in ("zip.pth", "legacy.pth"):
    expected = torch.load(os.path.join(folder, name), weights_only=True)
    for options in ({{}}, {{"verify": True}}, {{"mmap": True, "dtype": torch.float32}}, {{"dtype": torch.float16}}):
        model = torch.nn.Sequential(torch.nn.Linear(1024, 1200), torch.nn.Linear(1200, 1024), torch.nn.BatchNorm1d(8))
        model = model.double() if options.get("mmap") else model
        smart_load(model, os.path.join(folder, name), **options)
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key].to(value.dtype)), (name, options, key)
    with open(os.path.join(folder, name), "rb") as file:
        assert len(read_state_dict(file)) == len(expected)
        assert not file.read()
smart_save(model, os.path.join(folder, "saved.pth"))
assert inspect_checkpoint(os.path.join(folder, "saved.pth"))
print("loaded")
"""

NO_C_LIBRARY = """
class Nothing:
    def __init__(self, *arguments, **options): raise OSError("no such library")
ctypes.CDLL = Nothing
"""
WINDOWS_MAPPINGS = "del mmap.MAP_ANONYMOUS, mmap.MAP_ANON, mmap.MAP_PRIVATE, mmap.PROT_READ, mmap.PROT_WRITE"
MISSING = {
    "preadv, as macOS before 11": "del os.preadv",
    "preadv and pread": "del os.preadv, os.pread",
    "huge pages, O_DIRECT, posix_fadvise": "del mmap.MADV_HUGEPAGE\ndel os.O_DIRECT\ndel os.posix_fadvise",
    "anonymous mappings": "del mmap.MAP_ANONYMOUS, mmap.MAP_ANON",
    "private mappings": WINDOWS_MAPPINGS,
    "flags": "del os.O_CLOEXEC, os.O_NONBLOCK",
    "sched_getaffinity and fork": "del os.sched_getaffinity, os.fork, os.register_at_fork",
    "calls into the C library": NO_C_LIBRARY,
    "Linux": "sys.platform = 'darwin'",
}
MISSING["all of it, as Windows"] = f"""{NO_C_LIBRARY}
sys.platform = 'win32'
del os.preadv, os.pread, os.O_CLOEXEC, os.O_NONBLOCK, os.O_DIRECT
del os.sched_getaffinity, os.posix_fadvise, os.register_at_fork
del mmap.MADV_HUGEPAGE
{WINDOWS_MAPPINGS}
"""
QUICK = ("preadv and pread", "all of it, as Windows")


@pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in QUICK else pytest.mark.slow) for what in MISSING]
)
def test_loads_without(what: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1200), torch.nn.Linear(1200, 1024), torch.nn.BatchNorm1d(8))
    for name in ("zip.pth", "legacy.pth"):
        torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=name == "zip.pth")
    script = SCRIPT.format(missing=f"import torch  # needs some of it\n{MISSING[what]}")
    assert in_child(script, str(tmp_path)) == "loaded\n"
