from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from tests.trees import tree, wanted
from torchload.core.checkpoint import Container, Record
from torchload.errors import AmbiguousCheckpointError, CorruptCheckpointError, IncompatibleCheckpointError
from torchload.match import select
from torchload.match.rename import renamed_from
from torchload.match.tables import BENIGN_MISSING, BENIGN_UNEXPECTED


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)


def fresh():
    return {name: value.clone() for name, value in Net().state_dict().items()}


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def choose(value, model=None, **options):
    return select(tree(value), wanted(model or Net()), **options)


CONTAINERS = [
    "state_dict", "model", "model_state_dict", "module", "net", "network_weights", "model_state", "net_dict",
    "params", "generator", "weight", "anything",
]  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_found_under_any_name(name):
    found = choose({name: fresh(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 3)}}}, "epoch": 3})
    assert found.fits
    assert found.key == name
    assert found.prefix == ""


def test_nested_and_in_sequences():
    assert choose({"state": {"model": fresh()}}).key == "state.model"
    assert choose((fresh(), 7)).key == "0"
    assert choose([{"a": 1}, {"model": fresh()}]).key == "1.model"


def test_inside_objects_whose_classes_are_gone():
    learner = Record("fastai.learner.Learner", state={"model": tree(fresh()), "opt": Record("fastai.Adam"), "lr": 0.1})
    assert select(learner, wanted(Net())).key == "model"
    assert select(Container({"trainer": learner}), wanted(Net())).key == "trainer.model"


def test_a_maze_of_containers_without_tensors_costs_nothing():
    maze = Container({"lr": 0.1})
    for _ in range(60):
        maze = Container({"a": maze, "b": maze})
    assert select(Container({"config": maze, "model": tree(fresh())}), wanted(Net())).key == "model"


def test_nested_dictionaries_of_tensors_are_one_state_dict():
    state = fresh()
    nested: dict = {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        at = nested
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = value
    found = choose({"weights": nested})
    assert found.fits
    assert found.key == "weights"


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        ("model", "ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("params", "params_ema"),
        ("g", "g_ema"),
        ("model", "swa_model"),
        ("net", "ema_0.9999"),
        ("generator", "g_ema"),
    ],
)
def test_averaged_weights_are_preferred_and_said(plain, average):
    found = choose({plain: fresh(), average: fresh()})
    assert found.key == average
    assert found.averaged
    assert found.rivals == (plain,)
    assert choose({plain: fresh(), average: fresh()}, key=plain).key == plain


def test_averaged_weights_beside_the_model_in_one_state_dict():
    state = {**prefixed(fresh(), "online_model."), **prefixed(fresh(), "ema_model."), "step": torch.tensor(3)}
    found = choose(state)
    assert (found.key, found.prefix) == ("", "ema_model")


def test_mmengine_swaps_so_its_ema_container_holds_the_raw_weights():
    value = {"state_dict": fresh(), "ema_state_dict": prefixed(fresh(), "module."), "message_hub": {}, "meta": {}}
    assert choose(value).key == "state_dict"


@pytest.mark.parametrize(
    ("meant", "lagging"),
    [
        ("q_net", "q_net_target"),
        ("critic", "critic_target"),
        ("actor", "target_actor"),
        ("online_encoder", "target_encoder"),
    ],
)
def test_a_target_network_is_not_the_one_that_is_meant(meant, lagging):
    found = choose({meant: fresh(), lagging: fresh()})
    assert (found.key, found.rivals) == (meant, (lagging,))
    assert choose({**prefixed(fresh(), f"{meant}."), **prefixed(fresh(), f"{lagging}.")}).prefix == meant


def test_an_average_inside_a_callback_is_not_taken():
    value = {"state_dict": fresh(), "callbacks": {"SWA": {"average_model_state": fresh()}}}
    assert choose(value).key == "state_dict"


def test_a_conventional_name_beats_an_arbitrary_one():
    state = {**prefixed(fresh(), "model."), **prefixed(fresh(), "teacher.")}
    assert set(choose({"state_dict": state}).pairs.values()) == set(prefixed(fresh(), "model."))


@pytest.mark.parametrize("names", [("student", "teacher2"), ("a", "b"), ("model", "net")])
def test_two_of_equal_standing_are_ambiguous(names):
    with pytest.raises(AmbiguousCheckpointError) as caught:
        choose({name: fresh() for name in names})
    assert set(caught.value.candidates) == set(names)
    assert caught.value.argument == "key"
    assert all(f"key={name!r}" in str(caught.value) for name in names)


def test_two_prefixes_of_equal_standing_are_ambiguous():
    with pytest.raises(AmbiguousCheckpointError) as caught:
        choose({**prefixed(fresh(), "left."), **prefixed(fresh(), "right.")})
    assert set(caught.value.candidates) == {"left.", "right."}
    assert caught.value.argument == "prefix"


MARKS = [{"dino_loss": {}}, {"ibot_loss": {}}, {"args": {"momentum_teacher": 0.996}}, {"cfg": {"ema_decay": 0.99}}]


@pytest.mark.parametrize("mark", MARKS)
def test_a_teacher_is_an_average_where_something_says_that_it_is_one(mark):
    both = {"student": prefixed(fresh(), "module."), "teacher": fresh()}
    assert choose({**both, **mark}).key == "teacher"
    with pytest.raises(AmbiguousCheckpointError) as caught:
        choose(both)
    assert set(caught.value.candidates) == {"student", "teacher"}
    for key in caught.value.candidates:
        assert choose(both, key=key).key == key


@pytest.mark.parametrize("head", ["head.mlp.0.weight", "head.last_layer.weight_g", "projector.0.weight"])
def test_a_projection_head_below_both_is_such_a_mark(head):
    state = {**prefixed(fresh(), "student.module.backbone."), **prefixed(fresh(), "teacher.backbone.")}
    with pytest.raises(AmbiguousCheckpointError):
        choose({"model": state})
    heads = {f"student.module.{head}": torch.zeros(2), f"teacher.{head}": torch.zeros(2)}
    found = choose({"model": {**state, **heads}})
    assert (found.prefix, found.averaged) == ("teacher.backbone", True)
    with pytest.raises(AmbiguousCheckpointError):  # a student of another make
        choose({"model": {**state, f"student.{head}": torch.zeros(2)}})


def test_a_target_encoder_is_an_average_beside_a_predictor():
    jepa = {"encoder": fresh(), "predictor": {"w": torch.zeros(2)}, "target_encoder": fresh()}
    assert choose(jepa).key == "target_encoder"
    del jepa["predictor"]
    assert choose(jepa).key == "encoder"


def test_the_same_data_under_two_names_is_no_ambiguity():
    state = fresh()
    assert choose({"a": state, "b": dict(state)}).fits


def test_the_whole_set_is_taken_before_a_sub_tree():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()
            self.body = nn.Linear(1, 1)

    state = Outer().state_dict()
    assert choose({"state_dict": state}, Outer()).prefix == ""
    inner = choose({"state_dict": state}, Net())
    assert inner.fits
    assert set(inner.outside) == {"body.weight", "body.bias"}


def test_lightning_model_beside_criterion():
    found = choose({"state_dict": {**prefixed(fresh(), "net."), "criterion.weight": torch.ones(3)}})
    assert (found.key, found.prefix, found.outside) == ("state_dict", "net", ["criterion.weight"])


def test_a_prefix_that_only_the_model_has():
    wrapper = nn.ModuleDict({"backbone": Net()})
    found = choose(fresh(), wrapper)
    assert found.fits
    assert found.added == "backbone"


def test_a_prefix_that_both_have_hides_no_leftover():
    wrapper = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    state = {**wrapper.state_dict(), "body.2.weight": torch.zeros(2, 2)}
    for value in (state, {"model": state}, {"body": {name[5:]: v for name, v in state.items()}}):
        found = choose(value, wrapper)
        assert not found.fits
        assert [name[-8:] for name in found.unexpected] == ["2.weight"]


def test_a_container_of_the_prefixs_name_hides_no_leftover_either():
    wrapper = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})})
    inner = {name[9:]: value for name, value in wrapper.state_dict().items()}
    assert choose({"backbone": inner, "epoch": 1}, wrapper).fits
    more = {**inner, "extra.weight": torch.zeros(2)}
    assert choose({"backbone": more, "epoch": 1}, wrapper).unexpected == ["backbone.extra.weight"]


def test_opennmt_keeps_parts_of_one_model_apart():
    model = nn.ModuleDict({"encoder": Net(), "decoder": Net(), "generator": nn.Linear(2, 2)})
    state = model.state_dict()
    value = {
        "model": {name: v for name, v in state.items() if not name.startswith("generator")},
        "generator": {name[10:]: v for name, v in state.items() if name.startswith("generator")},
        "optim": {},
    }
    assert choose(value, model).fits


def test_a_partial_fit_is_returned_with_what_it_lacks_never_as_a_fit():
    state = fresh()
    del state["head.bias"]
    found = choose({"model": state, "optimizer": {}})
    assert not found.fits
    assert found.key == "model"
    assert found.missing == ["head.bias"]


def test_shapes_decide_between_equal_names():
    other = {name: torch.zeros([*value.shape, 2]) for name, value in fresh().items()}
    assert choose({"a": other, "b": fresh()}).key == "b"


def test_a_missing_batch_counter_is_ignored_and_listed():
    state = fresh()
    del state["body.1.num_batches_tracked"]
    found = choose(state)
    assert found.fits
    assert found.ignored == ["body.1.num_batches_tracked"]


@pytest.mark.parametrize("last", sorted(BENIGN_UNEXPECTED))
def test_every_benign_leftover_is_ignored_in_its_shape_only(last):
    row = BENIGN_UNEXPECTED[last]
    name = f"body.{last}"
    shape = [3 if size is None else size for size in row.shape or ()]
    found = choose({**fresh(), name: torch.zeros(shape)})
    assert found.fits
    assert found.ignored == [name]
    if row.shape is not None:
        assert choose({**fresh(), name: torch.zeros([*shape, 2])}).unexpected == [name]


@pytest.mark.parametrize("last", sorted(BENIGN_MISSING))
def test_a_constant_buffer_may_be_missing_and_a_parameter_of_its_name_may_not(last):
    model = Net()
    state = fresh()
    model.body.register_buffer(last, torch.zeros(2))
    assert choose(state, model).ignored == [f"body.{last}"]
    assert choose(state, model).fits
    other = Net()
    other.body.register_parameter(last, nn.Parameter(torch.zeros(2)))
    assert choose(state, other).missing == [f"body.{last}"]


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.h = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class WithHead(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.transformer = Base()
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.ties = {}
        if tied:
            self.lm_head.weight = self.transformer.wte.weight
            self.ties = dict.fromkeys(["transformer.wte.weight", "lm_head.weight"], "transformer.wte.weight")


def test_a_base_model_fills_one_whose_head_is_tied_to_it():
    model = WithHead(tied=True)
    found = select(tree(Base().state_dict()), wanted(model, ties=model.ties))
    assert found.fits
    assert found.added == "transformer"


def test_a_base_model_does_not_fill_one_with_a_head_of_its_own_unless_it_is_skipped():
    model = WithHead(tied=False)
    assert choose(Base().state_dict(), model).missing == ["lm_head.weight"]
    found = select(tree(Base().state_dict()), wanted(model, skipped=frozenset({"lm_head.weight"})))
    assert found.fits
    assert choose(Base().state_dict(), model, strict=False).pairs["transformer.h.1.bias"] == "h.1.bias"


def test_a_base_model_takes_its_part_of_a_larger_one():
    found = choose(WithHead(tied=False).state_dict(), Base())
    assert (found.prefix, found.outside) == ("transformer", ["lm_head.weight"])


def test_index_buffers_of_older_versions_are_ignored_and_listed():
    found = choose({**fresh(), "body.position_ids": torch.arange(3)})
    assert found.fits
    assert found.ignored == ["body.position_ids"]


def test_key_and_prefix_choose():
    value = {"a": fresh(), "b": {"c": {**prefixed(fresh(), "x."), **prefixed(fresh(), "y.")}}}
    assert choose(value, key="a").key == "a"
    assert choose(value, key="b.c", prefix="y.").prefix == "y"
    wrapped = {**prefixed(fresh(), "module.x."), **prefixed(fresh(), "module.y.")}
    assert choose(wrapped, prefix="y.").prefix == "module.y"
    assert choose(wrapped, prefix="module.y.").prefix == "module.y"
    assert choose(value, prefix="x").path == "b.c.x"


def test_a_key_or_prefix_that_is_not_there_says_what_is():
    with pytest.raises(IncompatibleCheckpointError, match="'ema'.*'model'"):
        choose({"model": fresh()}, key="ema")
    with pytest.raises(IncompatibleCheckpointError, match=r"'nose\.'.*\n.*body, head"):
        choose(fresh(), prefix="nose.")


def test_rename_by_pattern_and_by_function():
    state = {name.replace("head", "classifier"): value for name, value in fresh().items()}
    assert choose({"model": state}, rename={r"^classifier\.": "head."}).fits
    assert choose({"model": state}, rename=lambda name: name.replace("classifier", "head")).fits
    extra = {**fresh(), "body.junk": torch.zeros(1)}
    assert choose(extra, rename=lambda name: None if "junk" in name else name).fits


def test_a_rename_that_makes_two_names_one_is_refused():
    with pytest.raises(AmbiguousCheckpointError, match="same name"):
        renamed_from({"a|b": "c"}, ["a", "b"])


def test_nothing_in_common_and_no_tensors_at_all():
    with pytest.raises(IncompatibleCheckpointError, match="not one name in common"):
        choose({"model": {"x.y": torch.zeros(2)}})
    with pytest.raises(IncompatibleCheckpointError, match="holds no tensors"):
        choose({"epoch": 3})
    with pytest.raises(IncompatibleCheckpointError, match="holds no tensors"):
        choose(7)


def test_a_tree_that_refers_to_itself_ends():
    value = Container({"model": tree(fresh())})
    value["self"] = value
    assert select(value, wanted(Net())).key == "model"


def test_repeated_references_are_not_expanded():
    value = tree(fresh())
    for _ in range(40):
        value = Container({"a": value, "b": value})
    with pytest.raises(CorruptCheckpointError, match="Refused"):
        select(value, wanted(Net()))


def test_metadata_stays_with_its_container():
    state = OrderedDict(fresh())
    state._metadata = {"": {"version": 1}}
    assert choose({"model": state}).container.metadata == {"": {"version": 1}}
