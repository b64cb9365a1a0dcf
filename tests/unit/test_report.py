from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from torchload import smart_load
from torchload.core.text import format_bytes
from torchload.plan.report import LoadReport


def report(**changes):
    values = {
        "path": "model.pth",
        "model": "ResNet",
        "device": "cuda:0",
        "format": "zip checkpoint",
        "tensors": 320,
        "total": 320,
        "nbytes": 102_550_000,
        "seconds": 0.012,
    }
    return LoadReport(**{**values, **changes})


def test_the_headline_says_what_where_how_much_and_how_fast():
    assert str(report()).splitlines() == [
        "model.pth → ResNet on cuda:0: all 320 tensors loaded (97.8 MiB in 12 ms, 8.0 GiB/s)",
        "  file    zip checkpoint",
    ]


def test_each_detail_has_its_line():
    text = str(
        report(
            key="state_dict",
            prefix="backbone",
            beside={"optimizer": "Container", "epoch": 37, "args": "argparse.Namespace"},
            rewrites=("removed 'module.' from every name",),
            casts={("float32", "float16"): 267},
            ties=(("embed.weight", "head.weight"),),
            tensors=318,
            missing_keys=["fc.weight", "fc.bias"],
            unexpected_keys=["old.scale"],
            skipped=("aux.weight",),
            outside=("loss.weight",),
            ignored=("bn.num_batches_tracked",),
            notes=("a remark",),
            training=True,
        )
    )
    assert text.splitlines()[1:] == [
        "  file    zip checkpoint; took 'state_dict.backbone' (beside it: 'optimizer', 'epoch' = 37, 'args')",
        "  names   removed 'module.' from every name",
        "  cast    float32 → float16 in 267 tensors",
        "  tied    embed.weight = head.weight",
        "  initial fc.{weight, bias}",
        "  unused  old.scale",
        "  skipped aux.weight",
        "  outside loss.weight",
        "  ignored bn.num_batches_tracked",
        "  note    a remark",
        "  note    the model is in training mode: call model.eval() before inference",
    ]
    assert "318 of 320 tensors loaded" in text


def test_many_names_stay_a_few_words():
    many = [f"decoder.layers.{i}.{leaf}" for i in range(50) for leaf in ("weight", "bias")]
    line = next(line for line in str(report(outside=tuple(many))).splitlines() if "outside" in line)
    assert line == "  outside decoder.* (100)"
    spread = tuple(f"part{i}.weight" for i in range(30))
    line = next(line for line in str(report(outside=spread)).splitlines() if "outside" in line)
    assert line.endswith("and 27 more")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes_are_written_for_people(count, text):
    assert format_bytes(count) == text


def test_it_is_frozen_pickles_and_holds_no_tensor(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({"w": model.state_dict(), "lr": torch.ones(3)}, tmp_path / "x.pth")
    done = smart_load(model, tmp_path / "x.pth")
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.tensors = 0
    again = pickle.loads(pickle.dumps(done))
    assert again == done
    assert done.gib_per_second > 0
    for field in dataclasses.fields(done):
        assert not isinstance(getattr(done, field.name), torch.Tensor)
