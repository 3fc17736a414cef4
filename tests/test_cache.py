"""Weights of structural prefixes on disk."""

from pathlib import Path

import pytest
import torch

from search.cache import WeightStore
from tests.zoo import NETS, build, images

ACHIEVED = {"distill": {"": {"epochs": 4, "loss": 0.25}}}


@pytest.mark.parametrize("net", NETS)
def test_weights_and_what_was_achieved_come_back(net: str, tmp_path: Path) -> None:
    store, trained, empty = WeightStore(tmp_path), build(net, seed=1), build(net, seed=2)
    store.save("abc", trained, ACHIEVED)
    assert store.load("abc", empty) == ACHIEVED
    assert torch.equal(empty(images()), trained(images()))


def test_tied_layers_stay_tied(tmp_path: Path) -> None:
    store, net = WeightStore(tmp_path), build("tied")
    store.save("abc", build("tied", seed=1), {})
    store.load("abc", net)
    assert net.get_submodule("first").weight is net.get_submodule("second").weight


def test_what_was_never_stored_is_none_and_leaves_the_model_alone(tmp_path: Path) -> None:
    net = build("plain")
    before = net(images())
    assert WeightStore(tmp_path).load("abc", net) is None
    assert torch.equal(net(images()), before)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_thrown_away_and_can_be_written_again(share: float, tmp_path: Path) -> None:
    store, net = WeightStore(tmp_path), build("plain")
    store.save("abc", net, ACHIEVED)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert store.load("abc", net) is None
    assert not path.exists()
    store.save("abc", net, ACHIEVED)
    assert store.load("abc", net) == ACHIEVED


def test_saving_leaves_one_file_and_nothing_half_written(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    for seed in (1, 2):
        store.save("abc", build("plain", seed), ACHIEVED)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["weights.safetensors"]


def test_prefixes_do_not_mix(tmp_path: Path) -> None:
    store, net = WeightStore(tmp_path), build("plain")
    store.save("a", build("plain", 1), {"a": {}})
    store.save("b", build("plain", 2), {"b": {}})
    assert store.load("a", net) == {"a": {}}
    assert torch.equal(net(images()), build("plain", 1)(images()))
