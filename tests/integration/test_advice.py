"""What errors advise is followed to the letter: then the load must succeed."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchload
from torchload import errors, smart_load, smart_resume, verify_weights

Save = Callable[[Any], Path]


class Net(nn.Module):
    """A body and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)


def refusal(function: Callable[..., Any], *given: Any, **arguments: Any) -> errors.IncompatibleCheckpointError:
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        function(*given, **arguments)
    return caught.value


def followed(error: Exception, *given: Any, **arguments: Any) -> Any:
    """The call that an error advises, with the arguments that it doesn't speak of as they were."""
    calls = re.findall(r"(\w+)\(\.\.\., (.*)\)$", str(error), re.MULTILINE)
    assert len(calls) == 1, str(error)
    [(name, text)] = calls
    return getattr(torchload, name)(*given, **{**arguments, **eval(f"dict({text})")})


def on_meta(classes: int) -> Net:
    with torch.device("meta"):
        return Net(classes)


def test_a_new_head_on_meta_is_built_and_then_skipped(save: Save) -> None:
    old, model = Net(10), on_meta(2)
    error = refusal(smart_load, model, path := save(old.state_dict()))
    assert "isn't in the file" not in str(error)
    assert "not in the file" not in str(error)
    assert "build it on a real device" in str(error)
    model.head = nn.Linear(4, 2)
    followed(error, model, path)
    assert torch.equal(model.body.weight, old.body.weight)
    assert not model.norm.running_mean.is_meta


def test_names_that_no_file_has_are_listed_once(save: Save) -> None:
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__(2)
            self.more = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    old = Net(2)
    with torch.device("meta"):
        model = Deep()
    error = refusal(smart_load, model, path := save(old.state_dict()))
    assert len(str(error).splitlines()) == 8
    assert len(error.missing_keys) == 8
    assert not error.problems
    model.more = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    followed(error, model, path)


@pytest.mark.parametrize(("arguments", "why"), [({"skip": ["head.*"]}, "skipped"), ({"strict": False}, "of another")])
def test_what_stays_on_meta_without_a_value_is_one_line(save: Save, arguments: dict[str, Any], why: str) -> None:
    error = refusal(smart_load, model := on_meta(2), path := save(Net(10).state_dict()), **arguments)
    [problem] = error.problems
    assert problem.startswith("head.{weight, bias} are on the meta device and ")
    assert why in problem
    model.head = nn.Linear(4, 2)  # "Build the model so that these tensors are real"
    if "strict" in arguments:
        with pytest.warns(errors.CheckpointWarning, match="kept initial values"):
            smart_load(model, path, **arguments)
    else:
        smart_load(model, path, **arguments)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_renaming_is_advised_to_a_model_on_meta_as_it_is(save: Save) -> None:
    old = Net(2)
    state = {name.replace("head.", "classifier."): value for name, value in old.state_dict().items()}
    error = refusal(smart_load, on_meta(2), path := save(state))
    rename, _ = re.findall(r"smart_load\(\.\.\., (.*)\)$", str(error), re.MULTILINE)
    smart_load(model := on_meta(2), path, **eval(f"dict({rename})"))
    assert torch.equal(model.head.weight, old.head.weight)


@pytest.mark.parametrize("skip", [["*"], ["body.*", "norm.*", "head.*"]])
@pytest.mark.parametrize("strict", [True, False])
def test_patterns_that_take_all_are_named_as_the_cause(save: Save, skip: list[str], strict: bool) -> None:
    path = save(Net(2).state_dict())
    error = refusal(smart_load, Net(2), path, skip=skip, strict=strict)
    assert "skip= matches all of the model (9 tensors)" in str(error)
    assert "in common" not in str(error)
    smart_load(Net(2), path, skip=skip[1:] or ["head.*"])  # "patterns that match less"
    assert "skip= matches all" in str(refusal(verify_weights, Net(2), path, skip=skip))


def test_patterns_that_take_all_of_the_file_do_not_make_its_names_foreign(save: Save) -> None:
    path = save(Net(2).body.state_dict() | {"body.weight": torch.ones(4, 4)})
    error = refusal(smart_load, Net(2), path, skip=["body.*", "weight", "bias"])
    assert "in common" not in str(error)


def test_a_pattern_without_a_match_is_said_beside_the_advice_that_works(save: Save) -> None:
    path = save(Net(10).state_dict())
    error = refusal(smart_load, Net(2), path, skip=["heads.*"])
    assert "skip=['heads.*'] matches no name of the model or the file: correct it or leave it out." in str(error)
    followed(error, Net(2), path, skip=["heads.*"])
    smart_load(Net(10), path)  # left out, as a file that fits wants it


@pytest.mark.parametrize("argument", [{"rename": {"^heads": "x"}}, {"keep_fp32": ["heads.*"]}])
def test_other_patterns_without_a_match_are_left_out_as_well(save: Save, argument: dict[str, Any]) -> None:
    error = refusal(smart_load, Net(2), path := save(Net(10).state_dict()), **argument)
    assert "correct it or leave it out" in str(error)
    followed(error, Net(2), path)


def test_the_patterns_that_were_given_are_part_of_the_advice(save: Save) -> None:
    path = save({**Net(10).state_dict(), "aux.weight": torch.ones(2), "loss2.weight": torch.ones(2)})
    error = refusal(smart_load, Net(2), path, skip=["loss2.*", "nothing.*"])
    followed(error, Net(2), path)
    assert "nothing" not in str(error)


def test_advice_is_spelled_as_the_call_that_was_made(save: Save) -> None:
    path = save({"model": Net(10).state_dict(), "epoch": 3})
    report = followed(refusal(smart_resume, Net(2), path), Net(2), path)
    assert report.epoch == 3
    assert "smart_resume(..., skip=['head.*'])" in str(refusal(smart_resume, Net(2), path))
    assert "smart_load(..., skip=['head.*'])" in str(refusal(smart_load, Net(2), path))


def test_extra_state_that_refuses_is_skipped_in_smart_resume_too(save: Save) -> None:
    class Picky(nn.Linear):
        version = 1

        def get_extra_state(self) -> int:
            return self.version

        def set_extra_state(self, state: int) -> None:
            if state != self.version:
                raise RuntimeError(f"not {state}")

    newer = Picky(2, 2)
    newer.version = 2
    error = refusal(smart_resume, Picky(2, 2), path := save(newer.state_dict()))
    [advice] = re.findall(r"smart_resume\(\.\.\., (.*?)\)", str(error))
    smart_resume(Picky(2, 2), path, **eval(f"dict({advice})"))


# --- one part of several ---


def stored(folder: Path, names: str, state: dict[str, torch.Tensor]) -> list[Path]:
    """The state in three files, by number."""
    folder.mkdir(exist_ok=True)
    paths = [folder / names.format(number) for number in (1, 2, 3)]
    keys = list(state)
    for path, part in zip(paths, (keys[:2], keys[2:6], keys[6:])):
        tensors = {name: state[name] for name in part}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return paths


def given_instead(error: Exception) -> Any:
    [text] = re.findall(r"This file is one of 3 parts: give (.*)$", str(error), re.MULTILINE)
    return eval(text, {"glob": glob})


NUMBERED = ["model-{:05}-of-00003.safetensors", "pytorch_model-{:05}-of-00003.bin"]


@pytest.mark.parametrize("names", NUMBERED)
@pytest.mark.parametrize("has_index", [True, False])
def test_one_part_of_a_set_is_told_what_to_give(tmp_path: Path, names: str, has_index: bool) -> None:
    old = Net(2)
    paths = stored(tmp_path / "set", names, old.state_dict())
    if has_index:
        weight_map = {name: path.name for path in paths for name in torchload.read_state_dict(path)}
        (tmp_path / "set" / f"{paths[0].stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in paths:
        error = refusal(smart_load, Net(2), path)
        assert "skip=" not in str(error)
        smart_load(model := Net(2), given_instead(error))
        assert torch.equal(model.head.weight, old.head.weight)
    with pytest.warns(errors.CheckpointWarning, match="kept initial values.*This file is one of 3 parts: give "):
        smart_load(Net(2), paths[0], strict=False)


def test_an_index_tells_of_parts_whose_names_do_not(tmp_path: Path) -> None:
    paths = stored(tmp_path / "set", "weights{}.safetensors", Net(2).state_dict())
    assert "one of" not in str(refusal(smart_load, Net(2), paths[1]))
    weight_map = {name: path.name for path in paths for name in torchload.read_state_dict(path)}
    (tmp_path / "set" / "weights.index.json").write_text(json.dumps(weight_map))
    smart_load(Net(2), given_instead(refusal(smart_load, Net(2), paths[1])))


@pytest.mark.parametrize("other", ["other.safetensors", "model.safetensors"])
def test_parts_in_a_folder_with_others_are_listed(tmp_path: Path, other: str) -> None:
    paths = stored(tmp_path / "set", NUMBERED[0], Net(2).state_dict())
    save_file(Net(3).state_dict(), tmp_path / "set" / other)
    advised = given_instead(refusal(smart_load, Net(2), paths[0]))
    assert sorted(advised) == list(map(str, paths))
    smart_load(Net(2), advised)


def test_a_part_whose_others_are_not_there(tmp_path: Path) -> None:
    paths = stored(tmp_path / "there", NUMBERED[0], Net(2).state_dict())
    (tmp_path / "here").mkdir()
    alone = paths[0].rename(tmp_path / "here" / paths[0].name)
    error = refusal(smart_load, Net(2), alone)
    assert "one of 3 parts, of which 2 are not beside it: download all of them into one folder" in str(error)
    for path in paths[1:]:
        path.rename(alone.parent / path.name)
    smart_load(Net(2), alone.parent)


def test_a_set_that_begins_at_zero(tmp_path: Path) -> None:
    paths = stored(tmp_path / "set", NUMBERED[0], Net(2).state_dict())
    moved = [path.rename(path.with_name(f"model-0000{place}-of-00003.safetensors")) for place, path in enumerate(paths)]
    for path in moved:
        smart_load(Net(2), given_instead(refusal(smart_load, Net(2), path)))


def test_a_part_that_holds_all_that_the_model_has_is_no_part_to_speak_of(tmp_path: Path) -> None:
    paths = stored(tmp_path / "set", NUMBERED[0], Net(2).state_dict())
    smart_load(nn.ModuleDict({"body": nn.Linear(4, 4)}), paths[0])
    assert "one of" not in str(refusal(smart_load, nn.ModuleDict({"body": nn.Linear(3, 4, bias=False)}), paths[0]))
