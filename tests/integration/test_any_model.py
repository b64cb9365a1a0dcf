"""smart_load leaves in any module what its own `load_state_dict` would have put there."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import prune

from tests.law import assert_equal_bits, identities, randomise, same_bits, snapshot
from tests.versions import register_pre_hook
from torchload import smart_load

Build = Callable[[], nn.Module]

# Every stateful class of torch.nn, small.
STATEFUL: dict[str, Build] = {
    "AdaptiveLogSoftmaxWithLoss": lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8]),
    "BCELoss": lambda: nn.BCELoss(weight=torch.ones(3)),
    "BCEWithLogitsLoss": lambda: nn.BCEWithLogitsLoss(weight=torch.ones(3), pos_weight=torch.ones(3)),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3, affine=False),
    "BatchNorm3d": lambda: nn.BatchNorm3d(3, track_running_stats=False),
    "Bilinear": lambda: nn.Bilinear(2, 3, 4),
    "Conv1d": lambda: nn.Conv1d(2, 4, 3),
    "Conv2d": lambda: nn.Conv2d(2, 4, 3, bias=False),
    "Conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3), groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(2, 4, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 4, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 4, 1),
    "CrossEntropyLoss": lambda: nn.CrossEntropyLoss(weight=torch.ones(3)),
    "Embedding": lambda: nn.Embedding(5, 3, padding_idx=0),
    "EmbeddingBag": lambda: nn.EmbeddingBag(5, 3),
    "GRU": lambda: nn.GRU(2, 3, num_layers=2, bidirectional=True),
    "GRUCell": lambda: nn.GRUCell(2, 3),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3, affine=True),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "InstanceNorm3d": lambda: nn.InstanceNorm3d(3, affine=True, track_running_stats=True),
    "LSTM": lambda: nn.LSTM(2, 3, proj_size=2),
    "LSTMCell": lambda: nn.LSTMCell(2, 3),
    "LayerNorm": lambda: nn.LayerNorm((2, 3)),
    "Linear": lambda: nn.Linear(3, 2),
    "MultiLabelSoftMarginLoss": lambda: nn.MultiLabelSoftMarginLoss(weight=torch.ones(3)),
    "MultiMarginLoss": lambda: nn.MultiMarginLoss(weight=torch.ones(3)),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
    "NLLLoss": lambda: nn.NLLLoss(weight=torch.ones(3)),
    "PReLU": lambda: nn.PReLU(3),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "RNN": lambda: nn.RNN(2, 3),
    "RNNBase": lambda: nn.RNNBase("GRU", 2, 3),
    "RNNCell": lambda: nn.RNNCell(2, 3),
    "RNNCellBase": lambda: nn.RNNCellBase(2, 3, bias=True, num_chunks=4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "Transformer": lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
    "TransformerDecoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 2),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(4, 2, 8),
    "TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "LinearCrossEntropyLoss": lambda: nn.LinearCrossEntropyLoss(3, 4),  # torch 2.13
    # containers
    "Sequential": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)),
    "ModuleList": lambda: nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)]),
    "ModuleDict": lambda: nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.Linear(2, 3)}),
    "ParameterList": lambda: nn.ParameterList([torch.zeros(2), torch.zeros(3, 1)]),
    "ParameterDict": lambda: nn.ParameterDict({"model": torch.zeros(2), "scale": torch.zeros(())}),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
}
NOT_STATEFUL = {
    "Container", "Module", "NLLLoss2d", "Threshold", "CrossMapLRN2d", "LocalResponseNorm", "Fold", "Unfold", "Flatten",
    "Unflatten", "ChannelShuffle", "PixelShuffle", "PixelUnshuffle",
}  # fmt: skip
NOT_STATEFUL_KINDS = ("Pool1d", "Pool2d", "Pool3d", "Pad1d", "Pad2d", "Pad3d", "Unpool1d", "Unpool2d", "Unpool3d")

LAZY: dict[str, tuple[Build, Build]] = {
    "LazyLinear": (lambda: nn.LazyLinear(2), lambda: nn.Linear(3, 2)),
    "LazyConv1d": (lambda: nn.LazyConv1d(4, 3), lambda: nn.Conv1d(2, 4, 3)),
    "LazyConv2d": (lambda: nn.LazyConv2d(4, 3), lambda: nn.Conv2d(2, 4, 3)),
    "LazyConv3d": (lambda: nn.LazyConv3d(4, 1), lambda: nn.Conv3d(2, 4, 1)),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(4, 3), lambda: nn.ConvTranspose1d(2, 4, 3)),
    "LazyConvTranspose2d": (lambda: nn.LazyConvTranspose2d(4, 3), lambda: nn.ConvTranspose2d(2, 4, 3)),
    "LazyConvTranspose3d": (lambda: nn.LazyConvTranspose3d(4, 1), lambda: nn.ConvTranspose3d(2, 4, 1)),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, lambda: nn.BatchNorm1d(3)),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, lambda: nn.BatchNorm2d(3)),
    "LazyBatchNorm3d": (nn.LazyBatchNorm3d, lambda: nn.BatchNorm3d(3)),
    "LazyInstanceNorm1d": (
        lambda: nn.LazyInstanceNorm1d(affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    ),
    "LazyInstanceNorm2d": (
        lambda: nn.LazyInstanceNorm2d(affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    ),
    "LazyInstanceNorm3d": (
        lambda: nn.LazyInstanceNorm3d(affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm3d(3, affine=True, track_running_stats=True),
    ),
}
HERE = [name for name in STATEFUL if hasattr(nn, name)]


def build(name: str, seed: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the transformer's, about nested tensors
        return randomise(STATEFUL[name](), seed)


def save(model: nn.Module, path: Path) -> None:
    """As a zip checkpoint or as safetensors, by the suffix; the latter drops names of ties, as it does."""
    if path.suffix == ".safetensors":
        save_model(model, str(path))
    else:
        torch.save(model.state_dict(), path)


def test_every_class_of_torch_nn_is_accounted_for():
    known = {*STATEFUL, *LAZY, *NOT_STATEFUL}
    unknown = []
    for name, cls in vars(nn).items():
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)) or name in known:
            continue
        if name.endswith(NOT_STATEFUL_KINDS):
            continue
        try:
            stateless = not cls().state_dict()
        except TypeError:
            stateless = False
        if not stateless:
            unknown.append(name)
    assert unknown == []


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_stateful_class_of_torch_nn(tmp_path, name, suffix):
    trained, model, want = build(name, 1), build(name, 2), build(name, 3)
    save(trained, tmp_path / f"x{suffix}")
    if not trained.state_dict():
        assert name == "BatchNorm3d"  # without affine and statistics there is no state
        return
    want.load_state_dict(trained.state_dict())
    before = identities(model)
    smart_load(model, tmp_path / f"x{suffix}")
    assert_equal_bits(snapshot(model), snapshot(want))
    assert identities(model) == before


@pytest.mark.parametrize("name", HERE)
def test_every_stateful_class_built_on_meta_half_wrapped_and_mapped(tmp_path, name):
    trained, want = build(name, 1), build(name, 3)
    if name == "DataParallel":
        pytest.skip("is the wrapper")
    want.load_state_dict(trained.state_dict())
    torch.save({"state_dict": nn.DataParallel(trained).state_dict(), "epoch": 1}, tmp_path / "x.pth")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = STATEFUL[name]()
    parameters = list(model.parameters())
    smart_load(model, tmp_path / "x.pth", mmap=True)
    assert_equal_bits(snapshot(model), snapshot(want))
    assert all(one is other for one, other in zip(model.parameters(), parameters))
    model = build(name, 2)
    smart_load(model, tmp_path / "x.pth", dtype=torch.bfloat16, atomic=True)
    assert_equal_bits(snapshot(model), snapshot(want.to(torch.bfloat16)))


@pytest.mark.parametrize("name", LAZY)
def test_every_lazy_class(tmp_path, name):
    lazy, eager = LAZY[name]
    trained = randomise(eager(), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model, want = lazy(), lazy()
    want.load_state_dict(trained.state_dict())
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(want))


def test_recurrent_modules_built_on_meta_run_and_stay_the_same_objects(tmp_path):
    trained = randomise(nn.LSTM(3, 4, num_layers=2), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        model = nn.LSTM(3, 4, num_layers=2)
    parameters = list(model.parameters())
    smart_load(model, tmp_path / "x.pth")
    assert all(one is other for one, other in zip(model.parameters(), parameters))
    assert all(one is other for one, other in zip(model._flat_weights, parameters))
    inputs = torch.randn(5, 2, 3)
    assert torch.equal(model(inputs)[0], trained(inputs)[0])
    smart_load(model, tmp_path / "x.pth", dtype=torch.float64)
    assert torch.allclose(model(inputs.double())[0].float(), trained(inputs)[0])


@pytest.mark.parametrize("header_bytes", [640, 896, 1152, 1408])
def test_safetensors_whose_header_is_as_long_as_a_pickle_begins(tmp_path, header_bytes):
    trained = nn.Linear(3, 2)
    for padding in range(max(header_bytes - 250, 0), header_bytes, 4):
        save_file(trained.state_dict(), tmp_path / "x.safetensors", {"padding": "." * padding})
        if int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") == header_bytes:
            break
    model, want = nn.Linear(3, 2), snapshot(trained)
    smart_load(model, tmp_path / "x.safetensors")
    assert_equal_bits(snapshot(model), want)


# --- modules that torch builds out of others, or with state of their own making ---


def _fresh_parametrization(kind: str) -> Build:
    from torch.nn.utils import parametrizations

    return lambda: getattr(parametrizations, kind)(nn.Linear(3, 3))


class Doubled(nn.Linear):
    """Loads itself, from twice the values."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "weight" in state_dict:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


class Renaming(nn.Module):
    """Takes names of an older version, by every kind of hook that torch has."""

    def __init__(self, kind="new"):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.calls = []
        if kind == "new":
            register_pre_hook(self, lambda module, *args: self.upgrade(*args))
        else:
            self._register_load_state_dict_pre_hook(self.upgrade)
        self.register_load_state_dict_post_hook(lambda module, incompatible: module.calls.append("post"))

    def upgrade(self, state, prefix, metadata, *_):
        self.calls.append(metadata.get("version"))
        if prefix + "fc.weight" in state:
            state[prefix + "fc.weight"] = state[prefix + "fc.weight"].flip(0)


class Versioned(nn.Module):
    _version = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 3:
            state_dict[prefix + "scale"] = state_dict[prefix + "scale"] + 1
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.extra = {"step": 0, "amax": torch.zeros(3)}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class SpecialParameter(nn.Parameter):
    """As libraries subclass it: with attributes of its own."""


class Special(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = SpecialParameter(torch.zeros(4, 2))
        self.weight.loader = "mine"
        self.plain = nn.Parameter(torch.zeros(2), requires_grad=False)


class Shared(nn.Module):
    """The same sub-module under two names, a parameter under two, a buffer that shows a parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.deep = nn.ModuleDict({"inner": self.first})
        self.bias = self.first.bias
        self.register_buffer("view", self.first.weight.detach())


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("transient", torch.arange(3.0), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("nothing", None)


MADE: dict[str, Build] = {
    "weight_norm": _fresh_parametrization("weight_norm"),
    "spectral_norm": _fresh_parametrization("spectral_norm"),
    "orthogonal": _fresh_parametrization("orthogonal"),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
    "own loader": lambda: Doubled(3, 3),
    "own loader inside": lambda: nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"x": Doubled(3, 3)})),
    "hooks": Renaming,
    "old hooks": lambda: Renaming("old"),
    "hooks inside": lambda: nn.ModuleList([Renaming(), Renaming("old"), nn.Linear(2, 2)]),
    "version": lambda: nn.Sequential(Versioned()),
    "extra state": lambda: nn.ModuleDict({"a": Extra(), "b": nn.Linear(2, 2)}),
    "parameter subclass": Special,
    "shared": Shared,
    "buffers": Buffers,
    "frozen": lambda: nn.Linear(3, 2).requires_grad_(False),
    "channels last": lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex64),
    "double": lambda: nn.Linear(3, 2, dtype=torch.float64),
    "no state": lambda: nn.Sequential(nn.Linear(1, 1), nn.ReLU()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("name", MADE)
def test_modules_with_a_say_in_their_loading(tmp_path, name, wrapped):
    trained, model, want = (randomise(MADE[name](), seed) for seed in (1, 2, 3))
    if name == "extra state":
        trained["a"].extra = {"step": 7, "amax": torch.ones(3)}
    state = (nn.DataParallel(trained) if wrapped else trained).state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    want.load_state_dict(trained.state_dict())
    before = identities(model)
    smart_load(model, tmp_path / "x.pth")
    have = snapshot(model)
    if name == "extra state":
        assert same_bits(list(have.pop("a._extra_state").values()), [7, torch.ones(3)])
        want = {key: value for key, value in snapshot(want).items() if key != "a._extra_state"}
        assert_equal_bits(have, want)
    else:
        if name == "buffers":
            want.transient = model.transient
        assert_equal_bits(have, snapshot(want))
    assert identities(model) == before


def test_hooks_are_called_as_load_state_dict_calls_them(tmp_path):
    trained = nn.ModuleList([Renaming(), Renaming("old")])
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model, want = nn.ModuleList([Renaming(), Renaming("old")]), nn.ModuleList([Renaming(), Renaming("old")])
    want.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
    smart_load(model, tmp_path / "x.pth")
    assert [part.calls for part in model] == [part.calls for part in want] == [[1, "post"], [1, "post"]]


def test_version_upgrades_see_the_files_version(tmp_path):
    state = Versioned().state_dict()
    del state._metadata
    torch.save(state, tmp_path / "old.pth")
    model, want = Versioned(), Versioned()
    want.load_state_dict(state)
    smart_load(model, tmp_path / "old.pth")
    assert_equal_bits(snapshot(model), snapshot(want))
    assert model.scale.tolist() == [1.0, 1.0, 1.0]


def test_batch_norm_of_before_it_counted(tmp_path):
    trained, model = randomise(nn.BatchNorm2d(3), 1), randomise(nn.BatchNorm2d(3), 2)
    state = trained.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    torch.save(state, tmp_path / "x.pth")
    want = randomise(nn.BatchNorm2d(3), 2)
    want.load_state_dict(state)
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(want))
    with torch.device("meta"):
        model = nn.BatchNorm2d(3)
    smart_load(model, tmp_path / "x.pth")
    assert model.num_batches_tracked.item() == 0
    assert_equal_bits(snapshot(model), {**snapshot(trained), "num_batches_tracked": torch.tensor(0)})


# --- models built without memory ---


def test_models_of_accelerate_have_real_buffers_and_meta_parameters(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    trained = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Buffers())
    torch.save(randomise(trained, 1).state_dict(), tmp_path / "x.pth")
    with accelerate.init_empty_weights(include_buffers=False):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Buffers())
    parameters = list(model.parameters())
    smart_load(model, tmp_path / "x.pth", {"0": "cpu", "": "cpu"})
    want = snapshot(trained)
    want["2.transient"] = torch.arange(3.0)
    assert_equal_bits(snapshot(model), want)
    assert all(one is other for one, other in zip(model.parameters(), parameters))


def test_a_model_partly_on_meta(tmp_path):
    trained = randomise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"))
    address = model[0].weight.data_ptr()
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(trained))
    assert model[0].weight.data_ptr() == address


# --- what stays the same ---


def test_gradients_hooks_optimizers_and_captured_graphs_survive(tmp_path):
    torch.save(randomise(nn.Linear(3, 2), 1).state_dict(), tmp_path / "x.pth")
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.weight.register_hook(lambda gradient: calls.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.ones(1, 3)).sum().backward()
    gradient, version, address = model.weight.grad, model.weight._version, model.weight.data_ptr()
    smart_load(model, tmp_path / "x.pth")
    assert model.weight.grad is gradient
    assert model.weight._version > version
    assert model.weight.data_ptr() == address
    assert not model.bias.requires_grad
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before - 0.5 * gradient)
    model(torch.ones(1, 3)).sum().backward()
    assert calls == ["forward", "backward"] * 2


def test_a_graph_from_before_the_load_can_not_be_used_any_more(tmp_path):
    torch.save(randomise(nn.Linear(3, 3), 1).state_dict(), tmp_path / "x.pth")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    loss = model(torch.ones(1, 3, requires_grad=True)).sum()
    smart_load(model[1], tmp_path / "x.pth")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_part_of_a_model(tmp_path, suffix):
    trained = randomise(nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "fc": nn.Linear(4, 2)}), 1)
    save(trained["conv1"], tmp_path / f"conv1{suffix}")
    save(trained, tmp_path / f"full{suffix}")
    for arguments in ((f"conv1{suffix}", None), (f"full{suffix}", "conv1.")):
        model = randomise(nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "fc": nn.Linear(4, 2)}), 2)
        rest = snapshot(model["fc"])
        smart_load(model["conv1"], tmp_path / arguments[0], prefix=arguments[1])
        assert_equal_bits(snapshot(model["conv1"]), snapshot(trained["conv1"]))
        assert_equal_bits(snapshot(model["fc"]), rest)


# --- real architectures, where their libraries are installed ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BertConfig", "GPT2Config", "T5Config", "LlamaConfig", "ViTConfig"])
def test_models_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
        "d_model": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "num_key_value_heads": 2, "image_size": 32, "patch_size": 16, "n_positions": 32,
    }  # fmt: skip
    configuration = getattr(transformers, kind)(**small)
    trained, model = (randomise(transformers.AutoModel.from_config(configuration), seed) for seed in (1, 2))
    trained.save_pretrained(tmp_path / "folder")
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    want = transformers.AutoModel.from_config(configuration)
    want.load_state_dict(trained.state_dict())
    # Version 5 stores ViT under other names than its modules have; without its code nothing can know.
    for path in ("x.pth",) if kind == "ViTConfig" else ("x.pth", "folder"):
        randomise(model, 3)
        smart_load(model, tmp_path / path)
        assert_equal_bits(dict(model.state_dict()), dict(want.state_dict()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    "resnet18 vit_tiny_patch16_224 convnext_atto efficientnet_b0 swin_tiny_patch4_window7_224 mixer_s32_224 "
    "regnety_002 levit_128s xcit_nano_12_p16_224 ghostnet_050 maxvit_rmlp_pico_rw_256 repvgg_a0".split(),
)
def test_models_of_timm(tmp_path, name):
    timm = pytest.importorskip("timm")
    small = {"embed_dim": 24, "depths": (1, 1, 2, 1)} if name.startswith("swin") else {}
    trained, model, want = (randomise(timm.create_model(name, num_classes=3, **small), seed) for seed in (1, 2, 3))
    want.load_state_dict(trained.state_dict())
    average = {name: value * 2 for name, value in trained.state_dict().items()}
    torch.save({"state_dict": trained.state_dict(), "state_dict_ema": average, "arch": name}, tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth", key="state_dict")
    assert_equal_bits(dict(model.state_dict()), dict(want.state_dict()))
    assert smart_load(model, tmp_path / "x.pth").averaged  # as timm's own loader has it
    save(trained, tmp_path / "x.safetensors")
    smart_load(randomise(model, 5), tmp_path / "x.safetensors")
    assert_equal_bits(dict(model.state_dict()), dict(want.state_dict()))
