"""Failing I/O by real means: the C library's own calls fail, and another process changes the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security._machine import in_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes what Linux has")

# Stands between the process and the C library: for files called *.weights, every read fails in the way of $FAILING.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int calls;

static int is_ours(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path);
    return size > 8 && !memcmp(path + size - 8, ".weights", 8);
}

static ssize_t failing(const char *name, int descriptor, const struct iovec *places, int count, off_t offset) {
    static ssize_t (*original)(int, const struct iovec *, int, off_t);
    if (!original) original = dlsym(RTLD_NEXT, "preadv64");
    const char *how = getenv("FAILING");
    if (!how || !is_ours(descriptor)) return original(descriptor, places, count, offset);
    int number = __sync_fetch_and_add(&calls, 1);
    int after = atoi(getenv("AFTER"));
    if (!strcmp(how, "EIO") && number >= after) { errno = EIO; return -1; }
    if (!strcmp(how, "EINTR") && number % 2 == 0) { errno = EINTR; return -1; }
    if (!strcmp(how, "end") && number >= after) return 0;
    if (!strcmp(how, "short")) {
        struct iovec first = places[0];
        if (first.iov_len > 4093) first.iov_len = 4093;
        return original(descriptor, &first, 1, offset);
    }
    return original(descriptor, places, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *iov, int n, off_t at) { return failing("preadv64", fd, iov, n, at); }
ssize_t preadv(int fd, const struct iovec *iov, int n, off_t at) { return failing("preadv", fd, iov, n, at); }
ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t at, int f) { return failing("preadv2", fd, iov, n, at); }
ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off_t at, int f) { return failing("v2", fd, iov, n, at); }
"""

SCRIPT = """
import os, sys
import torch
from tests.threads import python_threads
from torchload import smart_load
from torchload.errors import TorchLoadError

path, how, atomic = sys.argv[1], sys.argv[2], sys.argv[3] == "atomic"

def build():
    return torch.nn.Sequential(torch.nn.Linear(1024, 1100), torch.nn.Linear(1100, 64), torch.nn.BatchNorm1d(64))

expected = {name: tensor.clone() for name, tensor in build().state_dict().items()}
torch.save(expected, path)
descriptors = os.listdir("/proc/self/fd")
outcomes = set()
for after in range(0, 40, 3):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    os.environ.update(FAILING=how, AFTER=str(after))
    try:
        smart_load(model, path, atomic=atomic)
        outcome, written = "loaded", ()
    except (OSError, TorchLoadError) as error:
        outcome, written = type(error).__name__, getattr(error, "written", ())
    finally:
        del os.environ["FAILING"]
    outcomes.add(outcome)
    now = model.state_dict()
    if outcome == "loaded":
        assert all(torch.equal(now[name], expected[name]) for name in now)
    else:
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed <= set(written), (changed, written)
        assert not (atomic and (changed or written))
assert python_threads() == 1
assert len(os.listdir("/proc/self/fd")) == len(descriptors)
print(sorted(outcomes))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(folder / "shim.c"), "-ldl"], check=False
    )
    if made.returncode:
        pytest.skip("the C compiler makes no shared libraries")
    return str(library)


@pytest.mark.parametrize("atomic", ["in place", "atomic"])
@pytest.mark.parametrize(
    ("how", "outcomes"),
    [
        ("EIO", "['OSError']"),
        ("end", "['CorruptCheckpointError']"),
        ("short", "['loaded']"),
        ("EINTR", "['loaded']"),
    ],
)
def test_reads_that_fail_in_the_c_library(
    how: str, outcomes: str, atomic: str, shim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", shim)
    assert in_child(SCRIPT, str(tmp_path / "model.weights"), how, atomic) == f"{outcomes}\n"


CHANGED = """
import os, random, subprocess, sys, time
import torch
from torchload import smart_load
from torchload.errors import CorruptCheckpointError

path, chooser = sys.argv[1], random.Random(0)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
torch.save(model.state_dict(), path)
content, outcomes = open(path, "rb").read(), set()
harm = subprocess.Popen(
    [sys.executable, "-c", '''
import os, sys
for line in sys.stdin:
    os.truncate(sys.argv[1], int(line))
    print("done", flush=True)
''', path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
for attempt in range(60):
    with open(path, "r+b") as file:
        file.write(content)
    def interfere(done, total, at=chooser.random()):
        if done >= at * total and not harm_done:
            harm_done.append(1)
            print(chooser.randrange(len(content)), file=harm.stdin, flush=True)
            harm.stdout.readline()
    harm_done = []
    try:
        smart_load(model, path, atomic=attempt % 2 == 0, progress=interfere)
        outcomes.add("loaded")
    except CorruptCheckpointError:
        outcomes.add("refused")
harm.stdin.close()
harm.wait()
print(sorted(outcomes))
"""


def test_another_process_that_truncates_the_file_meanwhile(tmp_path: Path) -> None:
    """At random moments of 60 loads: what is loaded then was whole, and nothing ends by a signal."""
    assert "refused" in in_child(CHANGED, str(tmp_path / "model.pth"))
    assert os.path.exists(tmp_path / "model.pth")
