from __future__ import annotations

import pytest

from torchload.core.wrappers import WRAPPERS
from torchload.match.names import align, tree_of
from torchload.match.tables import RENAMES


def pairs(source, model, **options):
    return align(tree_of(source), tree_of(model), **options).pairs


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_every_wrapper_of_the_table_is_reconciled_at_the_root_and_inside_on_either_side(wrapper):
    plain = ["a.b.weight", "a.b.bias", "c.weight"]
    root = [f"{wrapper}.{name}" for name in plain]
    inside = [name.replace("a.", f"a.{wrapper}.") for name in plain]
    for wrapped in (root, inside):
        assert pairs(wrapped, plain) == dict(zip(plain, wrapped))
        assert pairs(plain, wrapped) == dict(zip(wrapped, plain))


@pytest.mark.parametrize(
    ("source", "model"),
    [
        (["module.module.0.w", "module.module.2.w"], ["module.0.w", "module.2.w"]),  # a child called module, under DDP
        (["submodule.w", "module_.w"], ["submodule.w", "module_.w"]),
        (["module.w", "w"], ["module.w", "w"]),
        (["module.module.w", "module.w"], ["module.w", "w"]),
        (["_orig_mod.module.w"], ["w"]),
        (["module._orig_mod.w"], ["w"]),
        (["features.module.0.w", "head.w"], ["features.0.w", "head.w"]),
        (["module.a.w", "c.w"], ["a.w", "c.w"]),  # a wrapper around a part that was not a module of its own
        (["n_averaged", "module.w"], ["n_averaged", "module._orig_mod.w"]),
    ],
)
def test_names_are_matched_in_their_order(source, model):
    assert pairs(source, model) == dict(zip(model, source))


def test_a_wrappers_own_state_is_nobodys_business():
    found = align(tree_of(["n_averaged", "module.fc.w"]), tree_of(["fc.w"]))
    assert found.pairs == {"fc.w": "module.fc.w"}
    assert found.wrapper_state == ["n_averaged"]
    there = align(tree_of(["fc.w"]), tree_of(["n_averaged", "module.fc.w"]))
    assert there.pairs == {"module.fc.w": "fc.w"}
    assert there.spare == ["n_averaged"]


@pytest.mark.parametrize("above", ["", "_orig_mod.", "encoder.", "module."])
def test_a_wrappers_own_state_is_nobodys_business_where_both_sides_have_a_wrapper(above):
    averaged, parallel = [f"{above}n_averaged", f"{above}module.fc.w"], [f"{above}module.fc.w"]
    found = align(tree_of([*averaged, "head.w"]), tree_of([*parallel, "head.w"]))
    assert found.pairs == {name: name for name in [*parallel, "head.w"]}
    assert found.wrapper_state == averaged[: bool(above)]  # at the root it isn't alone with a wrapper
    found = align(tree_of(averaged), tree_of(parallel))
    assert (found.wrapper_state, found.leftover) == (averaged[:1], {})
    there = align(tree_of(parallel), tree_of(averaged))
    assert (there.spare, there.pairs) == (averaged[:1], {parallel[0]: parallel[0]})


def test_two_wrappers_that_offer_the_same_name_are_ambiguous_not_chosen():
    found = align(tree_of(["module.a.w", "_orig_mod.a.w", "b.w"]), tree_of(["a.w", "b.w"]))
    assert found.pairs == {"b.w": "b.w"}
    assert sorted(found.ambiguous["a.w"]) == ["_orig_mod.a.w", "module.a.w"]


def test_siblings_at_the_root_are_leftovers_as_those_within_a_module_are():
    found = align(tree_of(["loss.w", "layers.0.w", "layers.1.w"]), tree_of(["layers.0.w"]))
    assert found.leftover == {"loss.w": "loss.w", "layers.1.w": "layers.1.w"}


def test_a_further_layer_of_a_sequence_is_a_leftover_even_at_the_root():
    found = align(tree_of(["0.w", "1.w", "2.w"]), tree_of(["0.w", "1.w"]))
    assert found.leftover == {"2.w": "2.w"}


def test_leftovers_carry_the_name_the_model_would_use():
    found = align(tree_of(["module.a.x", "module.a.lora"]), tree_of(["a.x"]))
    assert found.leftover == {"module.a.lora": "a.lora"}


@pytest.mark.parametrize("rule", RENAMES, ids=lambda rule: rule.what)
def test_both_spellings_of_a_rule_map_onto_each_other(rule):
    old = [f"conv.{name.format(p='weight')}" for name in rule.old]
    new = [f"conv.{name.format(p='weight')}" for name in rule.new]
    beside = ["conv.other", "fc.weight"]
    for source, model in ((old, new), (new, old)):
        found = align(tree_of([*source, *beside]), tree_of([*model, *beside]))
        assert found.pairs == dict(zip([*model, *beside], [*source, *beside]))
        assert set(found.renamed.values()) == {rule.what}


@pytest.mark.parametrize(
    ("source", "model"),
    [
        (["p.parametrizations.weight.original", "p.parametrizations.weight.0.base"], ["p.weight"]),  # orthogonal
        (["p.weight_orig", "p.weight_mask"], ["p.weight"]),  # pruning
        (["p.parametrizations.weight.original0"], ["p.weight_g", "p.weight_v"]),  # half of a weight_norm
        (["p.gamma"], ["p.weight", "p.bias"]),
        (["encoder.weight"], ["decoder.weight"]),
        (["a.b.weight"], ["b.weight"]),
        (["modulex.w"], ["w"]),
    ],
)
def test_what_only_looks_alike_never_matches(source, model):
    assert pairs(source, model) == {}


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "x" * 5000])
def test_names_that_are_no_paths_take_no_part(name):
    assert tree_of([name, "ok"]).names == {"ok": "ok"}


def test_very_deep_names_are_no_problem():
    deep = ".".join(["m"] * 1500)
    wrapped = ".".join(["module"] * 500) + "." + "w"
    assert pairs([deep + ".x", wrapped], [deep + ".x", "w"])[deep + ".x"] == deep + ".x"
