"""Which device each tensor goes to."""

from __future__ import annotations

import pytest
import torch

from torchload.errors import DeviceError
from torchload.model.placement import Placement, available_devices, best_device, check_room, free_bytes, resolve_device

CPU, META, GPU = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 1)


def test_none_leaves_tensors_where_they_are_and_brings_meta_to_the_cpu() -> None:
    placement = Placement(None)
    assert placement.of("a.weight", GPU) == GPU
    assert placement.of("a.weight", META) == CPU


def test_a_device_moves_everything() -> None:
    assert Placement("cpu").of("a", GPU) == CPU


def test_the_longest_prefix_counts_and_the_empty_one_is_the_rest() -> None:
    placement = Placement({"encoder": "cpu"})
    placement._by_prefix = {"encoder": CPU, "encoder.layer": GPU, "": META}
    assert placement.of("encoder.norm.weight", GPU) == CPU
    assert placement.of("encoder.layer.0.weight", CPU) == GPU
    assert placement.of("encoder2.weight", CPU) == META
    assert placement.of("encoder", GPU) == CPU


def test_what_a_mapping_does_not_name_stays() -> None:
    placement = Placement({"encoder.": "cpu"})
    assert placement.of("encoder.weight", GPU) == CPU
    assert placement.of("decoder.weight", GPU) == GPU
    assert placement.unused_prefixes(["encoder.weight"]) == []
    assert placement.unused_prefixes(["enc.weight", "encoder2.weight"]) == ["encoder"]


@pytest.mark.parametrize("wrong", ["cuda:97", 97, "gpu0", "meta", torch.device("cuda", 97)])
def test_devices_that_are_not_there(wrong: object) -> None:
    with pytest.raises(DeviceError) as caught:
        Placement(wrong)  # type: ignore[arg-type]
    assert caught.value.available == available_devices()
    assert "cpu" in caught.value.available


@pytest.mark.parametrize("wrong", [1.5, True, object(), ["cpu"]])
def test_what_is_no_device(wrong: object) -> None:
    with pytest.raises(TypeError):
        Placement(wrong)  # type: ignore[arg-type]


def test_auto_is_the_best_device() -> None:
    assert resolve_device("auto") == best_device()
    assert str(best_device()) in available_devices()


def test_too_little_memory_is_known_before_anything_is_read() -> None:
    check_room({CPU: 1})
    if free_bytes(CPU) is None:
        pytest.skip("this system does not tell")
    with pytest.raises(DeviceError, match=r"needs .* GiB on cpu, where .* are free"):
        check_room({CPU: 1 << 60})
