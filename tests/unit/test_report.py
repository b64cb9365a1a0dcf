from __future__ import annotations

import dataclasses
import pickle
from html import escape

import pytest
import torch
from torch import nn

from torchload import smart_load, smart_resume, smart_save, verify_weights
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


def test_the_report_is_not_taken_for_the_model(tmp_path):
    model = nn.Linear(2, 2)
    smart_save(model, tmp_path / "x.pth", extra={"epoch": 3})
    for taken in (smart_load(model, tmp_path / "x.pth"), smart_resume(model, tmp_path / "x.pth")):
        with pytest.raises(TypeError, match="filled in place"):
            taken(torch.ones(2))
        with pytest.raises(AttributeError, match="has no 'eval'.*filled in place"):
            taken.eval()
        with pytest.raises(AttributeError, match="has no 'tensor'$"):
            _ = taken.tensor


ODD = "a|b<script>*x*\n\x1b[31m`c`"


def test_reports_show_one_line_and_notebooks_a_table(tmp_path):
    model = nn.Linear(2, 2)
    path = tmp_path / "x.pth"
    saved = smart_save(model, path, dtype=torch.bfloat16, extra={ODD: 3, "epoch": 1})
    loaded = smart_load(model, path)
    resumed = smart_resume(model, path)
    model.weight.data[0, 0] = 7
    for shown, words in (
        (saved, ["2 tensors saved", "float32 → bfloat16 in 2 tensors", "epoch"]),
        (loaded, ["all 2 tensors loaded", "took 'state_dict'", "training mode"]),
        (resumed, ["all 2 tensors loaded", "epoch 1"]),
        (verify_weights(model, path), ["1 of 2 tensors differ", "weight"]),
    ):
        line, html, markdown = repr(shown), shown._repr_html_(), shown._repr_markdown_()
        assert line.startswith(f"<{type(shown).__name__} {path}")
        assert words[0] in line
        assert line.isprintable()
        assert html.count("<table>") == 1
        assert html.count("<tr>") == len(shown._details())
        for word in words:
            assert escape(word) in html
            assert word.replace("_", "\\_") in markdown
        assert markdown.isprintable() or set(filter(lambda c: not c.isprintable(), markdown)) == {"\n"}
        assert markdown.count("\n") == 3 + len(shown._details())
        assert "<script" not in html + markdown.replace("\\<", "")
        assert "\x1b" not in html
        assert all(line.count("|") - line.count("\\|") == 3 for line in markdown.splitlines()[4:])


def test_a_lone_tensor_beside_the_weights_is_listed(tmp_path):
    weights = nn.Linear(3, 2).state_dict()
    torch.save({"state_dict": weights, "mean": torch.ones(3), "epoch": 3}, tmp_path / "m.pth")
    assert smart_load(nn.Linear(3, 2), tmp_path / "m.pth").beside == {"mean": "Tensor", "epoch": 3}
    torch.save({**weights, "mean": torch.ones(3)}, tmp_path / "m.pth")
    assert smart_load(nn.Linear(3, 2), tmp_path / "m.pth", skip=["mean"]).beside == {}
