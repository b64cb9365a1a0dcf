"""The quickstart runs as a newcomer runs it, and shows what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quickstart() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "docs" / "examples" / "quickstart.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = done.stdout
    assert "Unsupported" in out.partition("# smart_load")[0]
    assert out.count("checkpoint.pth →") == 3
    assert "float32 → float16" in out
    assert str(ROOT) not in out
    assert tempfile.gettempdir() not in out
    exact, same, half = (float(number) for number in re.findall(r"difference of the outputs (\S+),", out))
    assert exact == same == 0
    assert 0 < half < 0.1
    assert all(float(percent) > 95 for percent in re.findall(r"accuracy ([\d.]+)%", out))
