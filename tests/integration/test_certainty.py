"""What is proved is loaded, what isn't is asked, and what an error proposes loads."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.certainty import loads
from tests.versions import register_pre_hook
from torchload import errors, read_state_dict, smart_load, smart_resume, verify_weights
from torchload.core.wrappers import WRAPPER_CLASSES, WRAPPERS


class Net(nn.Module):
    """A network whose names say what they are, with whatever else somebody put beside them."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4, 4)
        for name, module in more.items():
            self.add_module(name, module)


def mlp() -> nn.Sequential:
    """A network whose names say nothing."""
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def changed(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
    }


def below(prefix, state):
    return {f"{prefix}.{name}": value for name, value in state.items()}


def assert_holds(model, state):
    own = model.state_dict()
    for name, value in state.items():
        if name in own:
            assert torch.equal(own[name], value.to(own[name].dtype)), name


def assert_loads(model, path, state, **arguments):
    """It loads these values, without a warning."""
    report = loads(model, path, **arguments)
    assert_holds(model, state)
    return report


def arguments_in(message):
    """The arguments that a message proposes, one dictionary for each proposal."""
    found = re.findall(r"smart_load\(\.\.\., (skip|rename)=(.*)\)$", message, flags=re.MULTILINE)
    return [{name: ast.literal_eval(value)} for name, value in found]


def assert_refused(make, path, kind=errors.IncompatibleCheckpointError, **arguments):
    """It is refused with the model unchanged, and each argument that the message proposes loads."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        smart_load(model, path, **arguments)
    assert_holds(model, before)
    message = str(caught.value)
    assert len(message) < 3_000 + len(str(path))
    proposals = arguments_in(message)
    if isinstance(caught.value, errors.AmbiguousCheckpointError):
        shown = re.findall(r"^    (key|prefix)='(.*)'", message, flags=re.MULTILINE)
        assert shown
        proposals = [{name: value} for name, value in shown]
    for proposal in proposals:
        smart_load(make(), path, **{**arguments, **proposal})
    return caught.value, proposals


# --- strictness ---

EXTRA = {
    "fc3": nn.Linear(4, 4),
    "bn1": nn.BatchNorm2d(4),
    "Att5": nn.Linear(2, 2),
    "norm": nn.LayerNorm(4),
    "classifier": nn.Linear(4, 2),
    "actor": nn.Linear(3, 1),
}


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("where", ["", "model", "module", "net.backbone"])
def test_an_extra_layer_is_unexpected_wherever_the_network_stands(save, name, where):
    state = changed(Net(**{name: EXTRA[name]}), 1)
    path = save({"state_dict": below(where, state) if where else state})
    error, proposals = assert_refused(Net, path)
    assert {key.removeprefix(f"{where}.").split(".")[0] for key in error.unexpected_keys} == {name}
    assert proposals == [{"skip": [f"{name}.*"]}] or proposals == [{"skip": [f"*{name}.*"]}]
    assert not verify_weights(Net(), path)
    loaded = Net()
    smart_load(loaded, path, **proposals[0])
    assert_holds(loaded, state)
    assert verify_weights(loaded, path, **proposals[0])


NEVER = ["criterion", "loss_fn", "metrics", "aux_classifier", "aux1", "AuxLogits", "auxiliary_head", "train_state"]


@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_the_models_is_ignored_and_listed(save, name):
    state = changed(Net(**{name: nn.Linear(2, 2)}), 1)
    report = assert_loads(Net(), save(state), state)
    assert set(report.ignored) == {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize("name", ["lossless", "criterion2", "aux3", "my_metrics"])
def test_names_that_only_look_like_those_are_unexpected(save, name):
    assert_refused(Net, save(changed(Net(**{name: nn.Linear(2, 2)}), 1)))


@pytest.mark.parametrize("prefix", ["backbone", "encoder", "model.encoder", "student.backbone"])
def test_a_backbone_is_found_by_its_prefix_and_the_head_beside_it_is_outside(save, prefix):
    state = changed(Net(), 1)
    report = assert_loads(Net(), save({**below(prefix, state), "head.weight": torch.ones(2)}), state)
    assert (report.prefix, report.outside) == (prefix, ("head.weight",))


def test_momentum_contrast_into_a_model_with_its_fc_and_without(save):
    state = changed(Net(fc=nn.Linear(4, 2)), 1)
    path = save(
        {"state_dict": {**below("encoder_q", state), **below("encoder_k", changed(Net(fc=nn.Linear(4, 2)), 2))}}
    )
    assert assert_loads(Net(fc=nn.Linear(4, 2)), path, state).prefix == "encoder_q"
    error, _ = assert_refused(Net, path)
    assert {name.split(".")[1] for name in error.unexpected_keys} == {"fc"}


def test_profilers_buffers_and_format_markers(save):
    state = changed(Net(), 1)
    more = {"total_ops": torch.zeros(1), "fc1.total_params": torch.zeros(1), "encoder.version": torch.tensor([3.0])}
    assert_loads(Net(), save({**state, **more}), state)


# --- masks and constants ---


class Attention(nn.Module):
    def __init__(self, bias=None, name="bias"):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        if bias is not None:
            self.register_buffer(name, bias)


def tril(size, dtype=torch.float32):
    return torch.ones(size, size).tril().to(dtype)


MASKS = {
    "gpt2": tril(6, torch.uint8)[None, None],
    "gpt2 bool": tril(6, torch.bool)[None, None],
    "nanogpt": tril(6)[None, None],
    "tril": tril(6),
    "clip": torch.full((6, 6), float("-inf")).triu(1),
    "minus ten thousand": torch.full((6, 6), -1e4).triu(1),
    "what is left out": torch.ones(6, 6).triu(1).bool(),
    "window": tril(6) - torch.ones(6, 6).tril(-3),
    "long": tril(300)[None, None],
    "swin": torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).sub(1).mul(100).expand(3, 6, 6).clone(),
}
NO_MASKS = {
    "learned": torch.randn(1, 1, 6, 6),
    "identity": torch.eye(6),
    "ones": torch.ones(6, 6),
    "zeros": torch.zeros(6, 6),
    "several heads": tril(6).expand(4, 6, 6).clone(),
    "not square": torch.ones(6, 7).tril(),
}


@pytest.mark.parametrize("name", ["bias", "mask", "anything"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_causal_mask_is_told_by_its_values(save, mask, name):
    state = nn.ModuleDict({"attn": Attention(MASKS[mask], name)}).state_dict()
    assert_loads(nn.ModuleDict({"attn": Attention()}), save(state), state)


@pytest.mark.parametrize("mask", NO_MASKS)
def test_what_is_no_mask_is_unexpected_whatever_it_is_called(save, mask):
    state = nn.ModuleDict({"attn": Attention(NO_MASKS[mask])}).state_dict()
    assert_refused(lambda: nn.ModuleDict({"attn": Attention()}), save(state))


# --- choosing ---

RIVALS = [
    ("actor", "critic"),
    ("G", "F"),
    ("generator", "discriminator"),
    ("model", "best_model"),
    ("base_model", "finetuned"),
    ("student", "teacher"),
    ("state_dict", "best_state_dict"),
    ("params", "best_params"),
]


@pytest.mark.parametrize("make", [mlp, Net])
@pytest.mark.parametrize("names", RIVALS)
def test_rivals_are_asked_about_whatever_they_are_called(save, names, make):
    path = save({name: changed(make(), seed) for seed, name in enumerate(names)})
    error, proposals = assert_refused(make, path, errors.AmbiguousCheckpointError)
    assert set(error.candidates) == set(names) == {proposal["key"] for proposal in proposals}
    for seed, name in enumerate(names):
        assert_loads(model := make(), path, changed(model, seed), key=name)


@pytest.mark.parametrize("names", RIVALS)
def test_rivals_that_hold_the_same_are_one(save, names):
    state = changed(Net(), 1)
    path = save({name: {key: value.clone() for key, value in state.items()} for name in names})
    assert_loads(Net(), path, state)


@pytest.mark.parametrize("names", [("actor", "critic"), ("student", "teacher"), ("left", "right")])
@pytest.mark.parametrize("make", [mlp, Net])
def test_rivals_inside_one_state_dict(save, names, make):
    states = [changed(make(), seed) for seed in (1, 2)]
    path = save({"state_dict": {**below(names[0], states[0]), **below(names[1], states[1])}, "epoch": 3})
    error, _ = assert_refused(make, path, errors.AmbiguousCheckpointError)
    for candidate in error.candidates:
        smart_load(make(), path, **{error.argument: candidate})
    for name, state in zip(names, states):
        assert_loads(make(), path, state, key=f"state_dict.{name}")


def test_a_long_list_of_rivals_is_cut(save):
    error, proposals = assert_refused(
        mlp, save({f"fold{seed}": changed(mlp(), seed) for seed in range(25)}), errors.AmbiguousCheckpointError
    )
    assert len(error.candidates) == 25
    assert len(proposals) == 10


AVERAGES = [
    ("model", "ema"), ("g", "g_ema"), ("generator", "g_ema"), ("params", "params_ema"), ("model", "model_ema"),
    ("state_dict", "state_dict_ema"), ("net", "ema_0.9999"), ("model", "ema_state_dict"), ("net_g", "net_g_ema"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "average"), AVERAGES)
def test_the_average_of_the_same_network(save, raw, average):
    states = [changed(mlp(), seed) for seed in (1, 2)]
    path = save({raw: states[0], average: states[1]})
    report = assert_loads(mlp(), path, states[1])
    assert (report.averaged, report.rivals) == (True, (raw,))
    assert_loads(mlp(), path, states[0], key=raw)


def test_one_networks_average_beside_an_unrelated_one_of_the_same_layout(save):
    states = {name: changed(mlp(), seed) for seed, name in enumerate(("G", "G_ema", "D"))}
    error, _ = assert_refused(mlp, save(states), errors.AmbiguousCheckpointError)
    assert set(error.candidates) == {"G_ema", "D"}


@pytest.mark.parametrize("updates", [0, 5])
def test_an_average_that_was_never_updated_is_what_training_began_with(save, updates):
    model = mlp()
    average = AveragedModel(model)
    for _ in range(updates):
        average.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    path = save({"model": model.state_dict(), "swa_model": average.state_dict()})
    report = assert_loads(mlp(), path, (average.module if updates else model).state_dict())
    assert any("never updated" in note for note in report.notes) == (not updates)
    assert_loads(mlp(), save({"swa_model": average.state_dict()}), average.module.state_dict())  # alone it is taken


def ema_pytorch(online, average, initted=True):
    counters = {"initted": torch.tensor(initted), "step": torch.tensor(9)}
    return {**below("online_model", online), **below("ema_model", average), **counters}


def test_the_layout_of_ema_pytorch(save):
    raw, average = changed(mlp(), 1), changed(mlp(), 2)
    assert_loads(mlp(), save({"model": raw, "opt": {}, "ema": ema_pytorch(raw, average)}), average)
    assert_loads(mlp(), save({"model": raw, "opt": {}, "ema": ema_pytorch(raw, average, initted=False)}), raw)
    assert_loads(mlp(), save(ema_pytorch(raw, average)), average)


SWAPS = [
    ("ema_state_dict", {"message_hub": {}}, {}),
    ("ema_state_dict", {"meta": {"mmengine_version": "0.10.7"}}, {}),
    ("ema_state_dict", {}, {"steps": torch.tensor(16)}),
    ("current_model_state", {"averaging_state": {"n_averaged": torch.tensor(3)}}, {}),
]


@pytest.mark.parametrize(("raw", "marks", "counter"), SWAPS)
def test_frameworks_that_swap_are_told_by_any_of_their_marks(save, raw, marks, counter):
    states = [changed(mlp(), seed) for seed in (1, 2)]
    path = save({"state_dict": states[0], raw: {**counter, **states[1]}, **marks, "epoch": 1})
    assert assert_loads(mlp(), path, states[0]).averaged
    assert all(torch.equal(value, states[0][name]) for name, value in read_state_dict(path).items())
    model = mlp()
    assert not smart_resume(model, path).load.averaged
    assert_holds(model, states[1])


def test_an_average_without_buffers_is_named(save):
    state = changed(Net(), 1)
    average = {name: value + 1 for name, value in state.items() if "running" not in name and "num" not in name}
    report = assert_loads(Net(), save({"model": state, "ema": average}), state)
    assert any("'ema' lacks buffers" in note and "bn.running_mean" in note for note in report.notes)


@pytest.mark.parametrize("mangle", [lambda name: "ema_" + name.replace(".", "_"), lambda name: f"net_ema.{name}"])
def test_copies_of_an_average_beside_the_models_own_names(save, mangle):
    state = changed(Net(), 1)
    copies = {mangle(name): value + 1 for name, value in state.items()}
    report = assert_loads(Net(), save({"state_dict": {**state, **copies}}), state)
    assert set(report.ignored) == set(copies)
    strange = {**copies, mangle("conv1.weight"): torch.zeros(7)}  # not the model's shape
    assert_refused(Net, save({"state_dict": {**state, **strange}}))


def test_latent_diffusions_average_has_no_dots(save):
    class Diffusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"diffusion_model": Net()})
            self.first_stage_model = nn.Linear(2, 2)

    state = changed(Diffusion(), 1)
    unet = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    copies = {f"model_ema.{name.replace('.', '')}": value for name, value in unet.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(4)}
    assert_loads(Diffusion(), save({"state_dict": {**state, **copies, **counters}}), state)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("beside", ["target", "teacher", "module", "model", "b"])
def test_another_set_below_a_prefix_is_never_taken_before_the_models_own_names(save, beside, nested):
    own, other = changed(Net(), 1), changed(Net(), 2)
    path = save({**own, **({beside: other} if nested else below(beside, other))})
    _, proposals = assert_refused(Net, path)
    assert proposals == [{"skip": [f"{beside}.*"]}]
    assert_loads(Net(), path, own, **proposals[0])
    assert_loads(Net(), path, other, key=beside)


def test_nor_is_it_taken_because_one_of_those_has_another_shape(save):
    own, other = changed(Net(), 1), changed(Net(), 2)
    own["fc1.weight"] = torch.rand(7, 4)
    path = save({**own, **below("other", other)})
    error, _ = assert_refused(Net, path)
    assert error.mismatched.keys() == {"fc1.weight"}
    assert_loads(Net(), path, other, key="other")


def test_a_stray_name_of_a_model_with_hooks_hides_no_prefix(save):
    make = lambda: nn.ModuleDict({"fc": nn.Linear(2, 2), "out": Upgraded()})  # noqa: E731
    state = changed(make(), 1)
    model = make()
    model._register_load_state_dict_pre_hook(lambda *given: None)
    assert_loads(model, save({**below("model", state), "fc.weight": torch.rand(2, 2)}), state)


@pytest.mark.parametrize(
    "settings", [{"use_ema": False}, {"model_ema": False, "model_ema_decay": 0.9998}, {"ema_decay": None}]
)
def test_a_teacher_is_no_average_because_a_setting_that_is_off_speaks_of_averages(save, settings):
    student, teacher = changed(Net(), 1), changed(Net(), 2)
    assert_refused(
        Net, save({"student": student, "teacher": teacher, "args": settings}), errors.AmbiguousCheckpointError
    )
    on = dict.fromkeys(settings, 0.99)
    assert_loads(Net(), save({"student": student, "teacher": teacher, "args": on}), teacher)


def test_names_that_are_the_models_to_the_letter_come_first(save):
    make = lambda: nn.ModuleDict({"net": Net()})  # noqa: E731
    state = changed(make(), 1)
    average = {name.replace("net.", "net_ema."): value + 1 for name, value in state.items()}
    report = assert_loads(make(), save({"state_dict": {**average, **state}}), state)
    assert set(report.ignored) == set(average)


@pytest.mark.parametrize(
    "name", ["grad_avg", "exp_avg", "exp_avg_sq", "grads", "momentum_buffer", "optimizer", "optim"]
)
def test_what_belongs_to_training_is_no_candidate_unless_it_is_named(save, name):
    state, zeros = changed(mlp(), 1), {key: value * 0 for key, value in mlp().state_dict().items()}
    assert_loads(mlp(), save({"model": state, name: zeros}), state)
    path = save({name: zeros, "step": 3})
    assert_refused(mlp, path)
    assert_loads(mlp(), path, zeros, key=name)


def test_whole_words_count(save):
    state = changed(Net(), 1)
    assert_loads(Net(), save({"momentum_backbone": state}), state)


@pytest.mark.parametrize(
    ("meant", "lagging"),
    [
        ("q_net", "q_net_target"),
        ("online_network", "target_network"),
        ("policy_net", "target_net"),
        ("q_network", "target_network"),
        ("encoder", "momentum_encoder"),
        ("encoder_q", "encoder_k"),
    ],
)
@pytest.mark.parametrize("make", [mlp, Net])
def test_copies_that_lag(save, meant, lagging, make):
    states = [changed(make(), seed) for seed in (1, 2)]
    path = save({"policy": {**below(lagging, states[1]), **below(meant, states[0])}})
    assert_loads(make(), path, states[0])


def test_a_teacher_inside_the_module_that_has_the_model(save):
    state = changed(Net(), 1)
    path = save(
        {"state_dict": {**below("model", state), **below("teacher", changed(Net(), 2)), "criterion.w": torch.ones(1)}}
    )
    assert_loads(Net(), path, state)


def question(name):
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})


def test_two_prefixes_that_say_something_are_not_exchanged(save):
    state = changed(question("ctx_encoder"), 1)
    path = save(state)
    _, proposals = assert_refused(lambda: question("question_encoder"), path, errors.AmbiguousCheckpointError)
    assert proposals == [{"prefix": "ctx_encoder."}]
    assert_loads(question("ctx_encoder"), path, state)


@pytest.mark.parametrize(("file", "model"), [("model", "resnet"), ("resnet", "backbone"), ("net", "model")])
def test_a_generic_prefix_is(save, file, model):
    state = changed(question(file), 1)
    loaded = question(model)
    assert_loads(loaded, save({"state_dict": state, "epoch": 1}), {})
    assert_holds(loaded, {name.replace(f"{file}.", f"{model}."): value for name, value in state.items()})
    assert_refused(lambda: question(model), save({**state, "head.weight": torch.ones(2)}), errors.TorchLoadError)


@pytest.mark.parametrize("strict", [True, False])
def test_a_shape_alone_never_decides(save, strict):
    state = {**below("encoder", nn.Linear(16, 16).state_dict()), **below("proj", nn.Linear(16, 10).state_dict())}
    path = save(state)
    _, proposals = assert_refused(lambda: nn.Linear(16, 10), path, errors.AmbiguousCheckpointError, strict=strict)
    assert proposals == [{"prefix": "proj."}]
    assert_loads(nn.Linear(16, 10), save(below("proj", nn.Linear(16, 10).state_dict())), {})  # all there is
    with pytest.raises(errors.TorchLoadError):
        smart_load(nn.ModuleDict({"fc": nn.Linear(16, 10)}), save(state), strict=strict)


def test_a_key_is_taken_as_a_report_prints_it(save):
    states = [changed(mlp(), seed) for seed in (1, 2)]
    path = save({"state_dict": {**below("net", states[0]), **below("ema_net", states[1])}})
    (rival,) = assert_loads(mlp(), path, states[1]).rivals
    assert rival == "state_dict.net"
    assert_loads(mlp(), path, states[0], key=rival)
    assert_loads(mlp(), path, states[1], key="state_dict.ema_net")


def test_resuming_takes_the_running_weights(save):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    running, best = changed(model, 1), changed(model, 2)
    path = save({"model": running, "best_model": best, "optimizer": optimizer.state_dict()})
    smart_resume(model, path, optimizer)
    assert_holds(model, running)
    assert_refused(Net, path, errors.AmbiguousCheckpointError)
    with pytest.raises(errors.AmbiguousCheckpointError):
        read_state_dict(path)


def test_reading_without_a_model_asks_or_tells(save):
    with pytest.raises(errors.AmbiguousCheckpointError):
        read_state_dict(save({"generator": changed(mlp(), 1), "discriminator": changed(Net(), 2)}))
    same = changed(mlp(), 1)
    assert len(read_state_dict(save({"model": same, "best": {name: t.clone() for name, t in same.items()}}))) == 4
    path = save({"state_dict": changed(mlp(), 1), "statistics": {"mean": torch.ones(3)}})
    with pytest.warns(errors.CheckpointWarning, match="'statistics'"):
        assert len(read_state_dict(path)) == 4


# --- advice ---


class Renamed(nn.Module):
    def __init__(self, stage="layer", head="fc"):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        for index in range(1, 5):
            self.add_module(f"{stage}{index}", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        self.add_module(head, nn.Linear(4, 2))


@pytest.mark.parametrize("wrap", ["{}", "module.{}"])
def test_renamed_stages_are_mended_by_one_rename(save, wrap):
    state = changed(Renamed("stage", "head"), 1)
    path = save({wrap.format(name): value for name, value in state.items()})
    _, proposals = assert_refused(Renamed, path)
    (rename,) = [proposal["rename"] for proposal in proposals if "rename" in proposal]
    loaded = Renamed()
    smart_load(loaded, path, rename=rename)
    assert_holds(loaded, {name.replace("stage", "layer").replace("head.", "fc."): t for name, t in state.items()})


def tree(**children):
    return nn.ModuleDict(children)


def line(bias=True):
    return nn.Linear(4, 4, bias=bias)


SHUFFLED = {
    "fused conv and norm": (
        lambda: tree(a=tree(conv=nn.Conv2d(4, 4, 1))),
        lambda: tree(a=tree(conv=nn.Conv2d(4, 4, 1, bias=False), bn=nn.BatchNorm2d(4))),
        False,
    ),
    "base_layer": (lambda: tree(q=line(), k=line()), lambda: tree(q=tree(base_layer=line()), k=line()), True),
    "without base_layer": (lambda: tree(q=tree(base_layer=line()), k=line()), lambda: tree(q=line(), k=line()), True),
    "stages": (
        lambda: tree(stem=line(), stages=nn.Sequential(line(), line())),
        lambda: tree(stem=line(), stages_0=line(), stages_1=line()),
        True,
    ),
    "a level more": (
        lambda: tree(visual=line(), transformer=line(), ln=nn.LayerNorm(4)),
        lambda: tree(visual=line(), text=tree(transformer=line(), ln=nn.LayerNorm(4))),
        True,
    ),
    "a level less": (
        lambda: tree(visual=line(), text=tree(transformer=line(), ln=nn.LayerNorm(4))),
        lambda: tree(visual=line(), transformer=line(), ln=nn.LayerNorm(4)),
        True,
    ),
    "two that look alike": (
        lambda: tree(stem=line(), a=line(), b=line()),
        lambda: tree(stem=line(), c=line(), d=line()),
        False,
    ),
}


@pytest.mark.parametrize("case", SHUFFLED)
def test_a_rename_is_proposed_only_where_it_loads(save, case):
    saved, model, has_rename = SHUFFLED[case]
    _, proposals = assert_refused(model, save(saved().state_dict()))
    assert any("rename" in proposal for proposal in proposals) == has_rename


def test_what_has_not_one_name_in_common_is_explained_as_well(save):
    make = lambda of: nn.ModuleDict({f"{of}{number}": Net() for number in range(12)})  # noqa: E731
    state = changed(make("block"), 1)
    error, proposals = assert_refused(lambda: make("stage"), save({"model": state, "epoch": 1}))
    assert "not one name in common" in str(error)
    assert proposals == [{"rename": {r"^block(\d+)\.": r"stage\1."}}]

    fused = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
    split = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "v")})})
    error, _ = assert_refused(lambda: split, save(fused.state_dict()))
    assert "fused" in str(error)


def test_no_renaming_is_proposed_that_ends_in_quantized_weights(save):
    state = {name.replace("fc1", "old"): value for name, value in changed(Net(), 1).items()}
    assert assert_refused(Net, save(state))[1]
    state["old.weight"] = state["old.weight"].to(torch.int8)
    assert not [one for one in assert_refused(Net, save(state))[1] if "rename" in one]


def test_packed_weights_are_quantized_though_no_name_is_the_models(save):
    packed = {"_packed_params._packed_params.0": torch.ones(2, 2, dtype=torch.int8), "scale": torch.ones(())}
    error, proposals = assert_refused(
        lambda: nn.ModuleDict({"fc": nn.Linear(2, 2)}), save({**below("fc", packed), "fc.zero_point": torch.zeros(())})
    )
    assert "torch.ao's quantized modules" in str(error)
    assert not proposals


def test_kinds_of_the_same_weights_are_named(save):
    fused = tree(h=tree(qkv=nn.Linear(4, 12)), stem=line())
    split = tree(h=tree(q_proj=line(), k_proj=line(), v_proj=line()), stem=line())
    error, _ = assert_refused(lambda: fused, save(split.state_dict()))
    assert "h.q_proj.weight, split; the model has h.qkv.weight, fused" in str(error)
    error, _ = assert_refused(lambda: split, save(fused.state_dict()))
    assert "h.qkv.weight, fused; the model has h.q_proj.weight, split" in str(error)


def test_names_with_glob_characters_are_escaped(save):
    state = {**changed(Net(), 1), "it's [0].weight": torch.ones(2), "it's [0].bias": torch.ones(2)}
    _, proposals = assert_refused(Net, save(state))
    assert proposals == [{"skip": ["it's [[]0].*"]}]


def test_what_a_rename_left_over_is_named_as_in_the_file(save):
    state = {**below("old", changed(Net(), 1)), "old.junk.weight": torch.ones(2)}
    error, proposals = assert_refused(Net, save(state), rename={"^old": "new"})
    assert error.unexpected_keys == ["old.junk.weight"]
    assert "old.junk.weight" in str(error)
    assert proposals


def test_messages_stay_short_whatever_is_in_the_file(save):
    long = "x" * 300
    state = {f"{long}{index}.weight": torch.ones(1) for index in range(400)}
    error, _ = assert_refused(Net, save({**changed(Net(), 1), **state}))
    assert len(error.unexpected_keys) == 400


def test_a_model_without_tensors_and_a_file_with_some(save):
    error, _ = assert_refused(lambda: nn.ReLU(), save({"a.weight": torch.ones(2)}))
    assert "has , …" not in str(error)


def test_a_file_with_an_optimizers_state_alone_is_no_rival_in_a_folder(tmp_path):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    state = changed(model, 1)
    torch.save(state, tmp_path / "net.pth")
    torch.save(optimizer.state_dict(), tmp_path / "adam.pth")
    assert_loads(Net(), tmp_path, state)


def test_modules_that_upgrade_old_names_themselves_are_asked_first(save):
    class Pyramid(nn.Module):
        _version = 2

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
            self.layer = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            for old in [name for name in state_dict if name.count(".") == prefix.count(".") + 2]:
                part, index, leaf = old.removeprefix(prefix).split(".")
                state_dict[f"{prefix}{part}.{index}.0.{leaf}"] = state_dict.pop(old)
            super()._load_from_state_dict(state_dict, prefix, *rest)

    state = changed(Pyramid(), 1)
    old = {name.replace(".0.0.", ".0."): value for name, value in state.items()}
    for content in (old, {"model": old, "epoch": 3}):
        for strict in (True, False):
            assert_loads(Pyramid(), save(content), state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("content", [lambda state: state, lambda state: {"state_dict": state, "optimizer": {}}])
def test_hooks_that_rename_are_seen_before_the_container_is_chosen(save, strict, content):
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.fc = nn.Linear(4, 2)
            register_pre_hook(self, self.rename)

        @staticmethod
        def rename(module, state_dict, prefix, *rest):
            for name in [name for name in state_dict if name.startswith(f"{prefix}encoder.")]:
                state_dict[name.replace("encoder.", "backbone.")] = state_dict.pop(name)

    state = changed(Hooked(), 1)
    old = {name.replace("backbone.", "encoder."): value for name, value in state.items()}
    assert_loads(Hooked(), save(content(old)), state, strict=strict)


def test_stacked_experts_and_adapters_are_named(save):
    separate = tree(experts=nn.ModuleList([tree(w1=line(False)), tree(w1=line(False))]), stem=line())

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = line()
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.ones(2, 4, 4))

    error, _ = assert_refused(Stacked, save(separate.state_dict()))
    assert "experts one by one (experts.0.w1.weight), the model has them stacked (experts.gate_up_proj)" in str(error)
    error, _ = assert_refused(lambda: separate, save(Stacked().state_dict()))
    assert "experts stacked (experts.gate_up_proj), the model one by one (experts.0.w1.weight)" in str(error)
    adapted = tree(q=tree(base_layer=line(), lora_A=line()), stem=line())
    error, _ = assert_refused(lambda: tree(q=line(), stem=line()), save(adapted.state_dict()))
    assert "The file has adapters around its layers (q.base_layer.weight)" in str(error)


@pytest.mark.parametrize("cls", sorted(WRAPPER_CLASSES))
def test_every_wrapper_class_is_one_of_a_segment(cls):
    assert WRAPPER_CLASSES[cls] in WRAPPERS
    assert "." in cls


# --- arguments and corners ---


def test_a_matrix_that_lies_the_other_way_round_is_named_strict_or_not(save):
    make = lambda: nn.ModuleDict({"up": nn.Linear(4, 6), "square": nn.Linear(6, 6)})  # noqa: E731
    state = changed(make(), 1)
    path = save({**state, "up.weight": state["up.weight"].T.contiguous()})
    for strict in (True, False):
        error, proposals = assert_refused(make, path, strict=strict)
        assert "the other way round" in str(error)
        assert not proposals  # a square one beside it would be loaded transposed
        assert "not in the file" not in str(error)
        assert "no place in the model" not in str(error)


def test_a_promise_to_skip_is_kept_by_verify_weights_too(save):
    model = Net()
    path = save(changed(model, 1))
    smart_load(model, path)
    with pytest.raises(errors.IncompatibleCheckpointError, match="matches no name of the model or the file"):
        verify_weights(model, path, skip=["fv1.*"])
    with pytest.raises(errors.IncompatibleCheckpointError, match="matches no name of the file"):
        verify_weights(model, path, rename={r"^layer\.": ""})
    with pytest.warns(errors.CheckpointWarning, match="'head.\\*', which matches no name"):
        assert verify_weights(model, path, skip=["fc1.*", "head.*"]).ok


@pytest.mark.parametrize("nested", [True, False])
def test_a_name_too_long_to_be_shown_is_no_advice(save, nested):
    first, second = changed(Net(), 1), changed(Net(), 2)
    one, other = "a" * 300, "b" * 300
    path = save({one: first, other: second} if nested else {**below(one, first), **below(other, second)})
    with pytest.raises(errors.AmbiguousCheckpointError) as caught:
        smart_load(Net(), path)
    assert caught.value.candidates == ((one, other) if nested else (f"{one}.", f"{other}."))
    assert not re.search(r"^    (key|prefix)=", str(caught.value), flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["skip", "keep_fp32", "device"])
def test_a_wrong_type_names_the_argument(save, name):
    with pytest.raises(TypeError, match=f"^{name} "):
        smart_load(Net(), save(changed(Net(), 1)), **{name: {0: "cpu"} if name == "device" else 3})


def test_one_name_of_the_file_is_proposed_for_one_of_the_model(save):
    make = lambda *names: nn.ModuleDict({name: nn.Linear(4, 4) for name in names})  # noqa: E731
    error, proposals = assert_refused(lambda: make("a", "b", "d"), save(make("x", "y", "d").state_dict()))
    assert not proposals
    assert "did you mean" not in str(error)


def test_the_best_weights_are_asked_about_where_an_optimizer_lies_beside_them_alone(save):
    """The optimizer's state goes with the running weights, which the file may not have."""
    state = changed(Net(), 1)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = save({"best_model": state, "optimizer": {"state": {}, "param_groups": []}})
    with pytest.raises(errors.AmbiguousCheckpointError, match="key='best_model'"):
        smart_resume(model, path)
    assert_holds(model, before)
    smart_resume(model, path, key="best_model")
    assert_holds(model, state)


def test_a_key_that_names_nothing_in_a_file_without_containers(save):
    path = save(changed(Net(), 1))
    with pytest.raises(errors.IncompatibleCheckpointError, match="its tensors are at the top") as caught:
        smart_load(Net(), path, key="state_dict")
    assert "key=''" in str(caught.value)
    smart_load(Net(), path, key="")


def test_a_file_with_an_optimizers_state_under_a_name_is_no_rival_in_a_folder(tmp_path):
    state, model = changed(Net(), 1), Net()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    torch.save(state, tmp_path / "weights.pth")
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "run.pth")
    assert_loads(Net(), tmp_path, state)
    torch.save({"optimizer": optimizer.state_dict(), "model": changed(Net(), 2)}, tmp_path / "run.pth")
    with pytest.raises(errors.AmbiguousCheckpointError, match=r"run\.pth"):
        smart_load(Net(), tmp_path)


class Upgraded(nn.Module):
    """A network that renames what older files call its layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self._register_load_state_dict_pre_hook(self._upgrade)

    @staticmethod
    def _upgrade(state, *rest):
        for name in [name for name in state if "old." in name]:
            state[name.replace("old.", "fc.")] = state.pop(name)


def test_what_hooks_accept_is_listed_once(save):
    first, second = (
        {name.replace("fc", "old"): value for name, value in changed(Upgraded(), n).items()} for n in (1, 2)
    )
    path = save({"model": first, "model_ema": second})
    with pytest.raises(errors.AmbiguousCheckpointError) as caught:
        smart_load(Upgraded(), path)
    assert sorted(caught.value.candidates) == ["model", "model_ema"]
    for key, state in (("model", first), ("model_ema", second)):
        model = Upgraded()
        smart_load(model, path, key=key)
        assert torch.equal(model.fc.weight, state["old.weight"])


def test_a_renaming_that_leaves_nothing_is_what_is_blamed(save):
    with pytest.raises(
        errors.IncompatibleCheckpointError, match="not one name in common with this model after rename="
    ):
        smart_load(Net(), save(changed(Net(), 1)), rename=lambda name: None)
