"""What an error says: grouped, short, with a way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchload import errors, smart_load
from torchload.core.text import group_names, plural


def test_names_of_one_module_are_joined():
    names = ["layer3.weight", "layer3.bias", "fc.weight", "scale"]
    assert group_names(names) == ["layer3.{weight, bias}", "fc.weight", "scale"]
    assert group_names([]) == []


def test_counts_agree_with_their_nouns():
    assert [plural(n, "tensor") for n in (0, 1, 2, 12_345)] == ["0 tensors", "1 tensor", "2 tensors", "12,345 tensors"]


def explain(tmp_path, change, model=None):
    model = model or nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])
    state = change(dict(model.state_dict()))
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_load(model, tmp_path / "x.pth")
    return str(caught.value).replace(str(tmp_path / "x.pth"), "x.pth").splitlines()


def test_a_missing_module(tmp_path):
    lines = explain(tmp_path, lambda state: {k: v for k, v in state.items() if not k.startswith("7.")})
    assert lines == [
        "x.pth does not fit this Sequential. Nothing was loaded; the model is unchanged.",
        "  2 tensors of the model are not in the file",
        "    7.{weight, bias}",
        "  78 of 80 tensors fit.",
        "  For a part that is meant to be new: smart_load(..., skip=['7.*'])",
    ]


def test_long_lists_are_cut(tmp_path):
    lines = explain(tmp_path, lambda state: {k: v for k, v in state.items() if int(k.split(".")[0]) < 20})
    assert "    … and 13 more lines like these" in lines
    assert len(lines) < 14


@pytest.mark.parametrize(
    ("leftovers", "globs"),
    [
        (["3.lora_a", "5.lora_a", "3.lora_b"], ["*.lora_a", "*.lora_b"]),
        (["40.weight", "40.bias"], ["40.*"]),
        (["3.inner.weight"], ["3.inner.*"]),
    ],
)
def test_leftovers_and_the_way_out(tmp_path, leftovers, globs):
    model = nn.ModuleDict({"body": nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])})
    leftovers = ["body." + name for name in leftovers]
    globs = [glob if glob[0] == "*" else "body." + glob for glob in globs]
    lines = explain(tmp_path, lambda state: {**state, **dict.fromkeys(leftovers, torch.zeros(2))}, model)
    assert lines[-1] == f"  To leave these out: smart_load(..., skip={globs})"
    smart_load(model, tmp_path / "x.pth", skip=globs)


@pytest.mark.parametrize(("gone", "globs"), [(["3.bias"], ["3.bias"]), (["3.bias", "3.weight"], ["3.*"])])
def test_missing_tensors_and_the_way_out_that_leaves_the_rest(tmp_path, gone, globs):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    lines = explain(tmp_path, lambda state: {k: v for k, v in state.items() if k not in gone}, model)
    assert lines[-1] == f"  For a part that is meant to be new: smart_load(..., skip={globs})"
    assert smart_load(model, tmp_path / "x.pth", skip=globs).tensors == 8 - len(gone)


def test_spelling(tmp_path):
    lines = explain(tmp_path, lambda state: {k.replace("weight", "wieght"): v for k, v in state.items()})
    assert any("did you mean" in line for line in lines)


def test_a_renamed_head_is_recognised_by_its_shape(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "fc": nn.Linear(3, 7)})
    lines = explain(tmp_path, lambda state: {k.replace("fc.", "classifier."): v for k, v in state.items()}, model)
    assert "    fc.weight    did you mean classifier.weight, which the file has?" in lines
    assert r"rename={r'^classifier\.': 'fc.'}" in lines[-2]
    smart_load(model, tmp_path / "x.pth", rename={r"^classifier\.": "fc."})


def test_shapes_alone_bring_no_advice_about_spelling(tmp_path):
    lines = explain(tmp_path, lambda state: {k: torch.zeros([*v.shape, 1]) for k, v in state.items()})
    assert not any("rename" in line for line in lines)
    assert lines[2].startswith("    0.{weight, bias}    file")


def test_the_place_that_was_looked_at_is_named(tmp_path):
    lines = explain(tmp_path, lambda state: {"epoch": 1, "net": {k: v for k, v in state.items() if k != "0.bias"}})
    assert lines[0].startswith("x.pth does not fit this Sequential (looked at 'net').")
