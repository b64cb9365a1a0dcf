"""The benchmark suite measures what it says: right files, right data, honest caches. Nothing here looks at a time."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the suite is not part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks import distributed, files, machine, report, worker  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.arms import ARMS, Arm, applicable  # noqa: E402
from benchmarks.cases import Case, list_cases  # noqa: E402
from benchmarks.ceilings import CEILINGS  # noqa: E402
from benchmarks.measure import run_sample  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and the page cache")

MIB = 1 << 20
CASES = [
    Case(f"{into}-{dtype}-{kind}", model, amount, into, kind, model_dtype=dtype, ceilings=True)
    for model, amount, into, dtype in (
        ("transformer", MIB, "existing", "float32"),
        ("transformer", MIB, "existing", "float16"),
        ("transformer", MIB, "meta", "float32"),
        ("tiny", 0, "existing", "float32"),
        ("layer-tree", 240, "existing", "float32"),
    )
    for kind in ("pth", "safetensors")
]
PLAIN = [arm for arm in ARMS.values() if arm.distribution in {"torchload", "torch", "safetensors"}]


def installed(arm: Arm) -> bool:
    return all(importlib.util.find_spec(module.split(".")[0]) for module in arm.modules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.name}")
def test_every_arm_delivers_the_files_data(case: Case, folder: Path) -> None:
    file = files.prepare(case, folder)
    arms = [arm for arm in PLAIN if applicable(arm, case, "cpu") and installed(arm)]
    assert arms
    for arm in arms:
        marks: list[str] = []
        request = {"case": case_fields(case), "arm": arm.name, "path": file.path, "device": "cpu"}
        result = worker.run(request, marks.append)
        assert result["checksum"] == file.expected, arm.name
        assert marks == ["start", "end"]
        assert 0 <= result["load"] <= result["touch"] <= result["forward"]


def test_the_ceilings_run(folder: Path) -> None:
    cold = Case("cold", "transformer", MIB, cold=True, ceilings=True)
    ran = set()
    for case in [*CASES[:6], cold]:
        file = files.prepare(case, folder)
        for ceiling in CEILINGS.values():
            if not ceiling.applies(case, "cpu") or "O_DIRECT" in ceiling.name:  # refused by some file systems
                continue
            model = worker.build_meta(case.model, case.amount, torch.float32)
            if case.into == "existing":
                worker.materialize(model, torch.device("cpu"))
            ceiling.prepare(worker.Job(model, file.path, torch.device("cpu"), case))()
            ran.add(ceiling.name)
    assert {"memcpy, 2 threads", "memcpy into huge pages, 2 threads", "cast from memory by torch"} < ran


def test_a_checksum_sees_one_changed_bit_and_no_order() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}
    whole = files.checksum(tensors.items())
    assert files.checksum(reversed(tensors.items())) == whole
    assert files.checksum([("a", tensors["a"].t().contiguous().t()), ("b", tensors["b"])]) == whole
    for name, other in (("a", tensors["a"].view(3, 2)), ("b", tensors["b"] + 1), ("b", tensors["b"].int())):
        assert files.checksum((tensors | {name: other}).items()) != whole


def test_files_are_made_once_and_are_the_same_everywhere(tmp_path: Path) -> None:
    case = Case("x", "layers", 20, file_format="safetensors")
    first = files.prepare(case, tmp_path / "one")
    second = files.prepare(case, tmp_path / "two")
    assert Path(first.path).read_bytes() == Path(second.path).read_bytes()
    changed = os.stat(first.path).st_mtime_ns
    assert files.prepare(case, tmp_path / "one") == first
    assert os.stat(first.path).st_mtime_ns == changed


def test_residency_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(MIB))
    assert machine.read_into_cache(str(path)) == 1.0
    assert 0.0 <= machine.drop_from_cache(str(path)) <= 1.0  # a file system in memory keeps everything
    assert machine.read_into_cache(str(path)) == 1.0


@pytest.mark.slow
def test_a_failing_or_slow_process_is_a_result(folder: Path) -> None:
    case = CASES[0]
    request = {"case": case_fields(case), "arm": "torch.load + load_state_dict", "device": "cpu"}
    missing = run_sample(request | {"path": str(folder / "missing.pth")}, 60)
    assert missing["error"].startswith("FileNotFoundError")
    assert run_sample(request | {"path": files.prepare(case, folder).path}, 0.01) == {"error": "not done after 0 s"}


@pytest.mark.slow
def test_peak_memory_is_seen(folder: Path) -> None:
    case = Case("x", "transformer", 64 * MIB)
    file = files.prepare(case, folder)
    request = {"case": case_fields(case), "arm": "torch.load + load_state_dict", "path": file.path, "device": "cpu"}
    sample = run_sample(request, 60, watch_memory=True)
    # The whole state dict stands beside the model: it is the arm whose memory is known.
    assert sample["peak_anonymous"] - sample["anonymous_before"] > file.nbytes / 2


def test_case_names_are_unique_and_each_has_a_contestant() -> None:
    for options in ({}, {"quick": True}, {"cold": True}, {"full": True}):
        cases = list_cases(2 << 30, **options)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert applicable(ARMS[report.OURS], case, "cpu")


@pytest.mark.slow
def test_the_command_writes_table_json_charts_and_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    begin, end = report.BEGIN.format("mine"), report.END.format("mine")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    outputs = ["--json", f"{tmp_path}/run.json", "--out", f"{tmp_path}/charts"]
    command = [sys.executable, "-m", "benchmarks", "--quick", "--samples", "1", "--peers", "none"]
    command += ["--cases", "tiny/existing/pth", "--no-memory", "--data", f"{tmp_path}/data", *outputs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert [measured["case"]["name"] for measured in run["cases"]] == ["tiny/existing/pth"]
    assert run["environment"]["torch"] == torch.__version__
    for measured in run["cases"]:
        arms = [entry for entry in measured["entries"] if entry["kind"] == "arm"]
        assert {"torchload", "torch.load + load_state_dict"} <= {entry["name"] for entry in arms}
        for entry in arms:
            assert [sample["checksum"] for sample in entry["samples"]] == [measured["file"]["expected"]], entry
            assert entry["name"] in done.stdout
    drawings = sorted((tmp_path / "charts").glob("*.svg"))
    assert [drawing.name for drawing in drawings] == ["cpu-tiny.svg"]
    for drawing in drawings:
        assert ET.parse(drawing).getroot().tag.endswith("svg")

    assert main(["--render", f"{tmp_path}/run.json", "--write-docs", str(page), "--machine", "mine"]) == 0
    assert "torchload" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| tiny/existing/pth |" in text
    assert "![cpu-tiny](benchmarks/mine/cpu-tiny.svg)" in text
    assert (tmp_path / "benchmarks" / "mine" / "cpu-tiny.svg").exists()
    with pytest.raises(SystemExit, match=r"no place for the results of 'other'.*results on other: begin"):
        main(["--render", f"{tmp_path}/run.json", "--write-docs", str(page), "--machine", "other"])
    assert page.read_text() == text


def case_fields(case: Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in Case.__slots__}


def test_several_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("FSDP2 came with torch 2.6")
    options = "--ranks 2 --size 0.02 --samples 1 --cache warm --only torchload".split()
    assert distributed.main([*options, "--data", str(folder), "--json", str(folder / "ranks.json")]) == 0
    run = json.loads((folder / "ranks.json").read_text())
    reads = {(case["kind"], case["way"]): case["samples"][0]["read_bytes"] for case in run["cases"]}
    assert reads["replicas", "torchload"] >= 2 * run["file_bytes"]
    assert reads["replicas", "torchload, process_group="] < 2 * run["file_bytes"]
    assert reads["fsdp", "torchload"] < 2 * run["file_bytes"]
    assert capsys.readouterr().out.count("| warm |") == 3
