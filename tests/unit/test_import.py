"""What `import torchload` costs and touches: nothing but itself and small parts of the standard library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_nothing_heavy() -> None:
    added = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import torchload\n"
        "torchload.smart_load\n"  # public names arrive at their first use
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert "torchload" in added
    third_party = [name for name in added if name != "torchload" and name not in sys.stdlib_module_names]
    assert third_party == []
    assert not {"asyncio", "http", "multiprocessing", "tarfile", "unittest", "urllib", "xml"} & set(added)


def test_no_further_part_of_torch_is_imported() -> None:
    added = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import torchload\n"
        "torchload.smart_load\n"  # public names arrive at their first use
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith('torch.')))"
    ).split()
    assert added == []


def test_import_has_no_side_effects() -> None:
    out = run(
        "import gc, logging, os, threading, torch\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            threading.active_count(), os.getcwd(), dict(os.environ), logging.getLogger().handlers,\n"
        "            torch.random.get_rng_state().sum().item(), torch.cuda.is_initialized(), gc.isenabled())\n"
        "before = state()\n"
        "import torchload\n"
        "torchload.smart_load\n"
        "assert state() == before\n"
        "assert logging.getLogger('torchload').level == logging.NOTSET"
    )
    assert out == ""


def test_loading_alone_imports_neither_training_nor_writing(tmp_path: Path) -> None:
    loaded = run(
        "import sys, torch\n"
        f"path = {str(tmp_path / 'model.pth')!r}\n"
        "saved = torch.nn.DataParallel(torch.nn.Linear(3, 2))\n"
        "torch.save({'state_dict': saved.state_dict(), 'optimizer': {}, 'epoch': 37}, path)\n"
        "from torchload import smart_load\n"
        "smart_load(torch.nn.Linear(3, 2), path, verify=True)\n"
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'torchload'))"
    ).split()
    assert "torchload.api.load" in loaded
    others = ("torchload.training", "torchload.writing")
    assert [name for name in loaded if name.startswith(others)] == []
    assert [name for name in loaded if name.startswith("torchload.api.")] == ["torchload.api.load"]


def test_a_plain_load_imports_nothing_that_only_others_need(tmp_path: Path) -> None:
    loaded = run(
        "import sys, torch\n"
        f"path = {str(tmp_path / 'model.pth')!r}\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))\n"
        "torch.save(model.state_dict(), path)\n"
        "from torchload import smart_load\n"
        "smart_load(model, path)\n"
        "print(*(name.removeprefix('torchload.') for name in sys.modules if name.startswith('torchload.')))"
    ).split()
    assert "api.load" in loaded
    rare = {
        *("core.crc32", "core.quantized", "core.sharing"),
        *("formats.json_text", "formats.mapping", "formats.sets.sharded", "match.state_dicts", "model.unwrapping"),
        *("plan.advice", "plan.explain"),  # the words of an error
        *("plan.borrowed", "plan.custom_loaders", "plan.hooks", "plan.plain", "plan.trial"),  # what a few modules have
        *("plan.compare", "plan.twins", "transfer.checks", "transfer.checksums"),  # verify=True
        *("transfer.cuda", "transfer.ring"),
    }
    assert rare.isdisjoint(loaded), rare.intersection(loaded)
    readers = {name for name in loaded if name.startswith("formats.files.")}
    assert readers == {f"formats.files.{name}" for name in ("archives", "torch_zip", "zip_directory", "zip_headers")}
    assert all((ROOT / "torchload" / name.replace(".", "/")).with_suffix(".py").exists() for name in rare)


def test_every_module_imports_alone() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "torchload").rglob("*.py"))
    ]
    assert "torchload.errors" in modules
    # One process: each module's own imports are made anew after the package is forgotten.
    run(
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    for known in [m for m in sys.modules if m.partition('.')[0] == 'torchload']:\n"
        "        del sys.modules[known]\n"
        "    importlib.import_module(name)"
    )


def test_what_post_hooks_need_is_imported_while_the_model_is_as_it_was(tmp_path: Path) -> None:
    """An import that fails (memory, an interrupt) must not come between the bytes and the hooks."""
    code = """
import sys
import torch
from torchload import smart_load

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name == "torchload.plan.hooks":
            raise MemoryError

model = torch.nn.Linear(20, 20)
model.register_load_state_dict_post_hook(lambda module, keys: None)
before = model.weight.detach().clone()
torch.save(torch.nn.Linear(20, 20).state_dict(), sys.argv[1])
sys.meta_path.insert(0, Refusing())
try:
    smart_load(model, sys.argv[1])
except MemoryError:
    print(torch.equal(model.weight, before))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "x.pth")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["True"]
