import pytest
import torch
from torch import Tensor, nn

from compressors.layers import read_layers
from compressors.plan import LayerSpec
from tests.zoo import NETS, build, images


def layers(net: str, count: int = 2) -> dict[str, LayerSpec]:
    return {layer.name: layer for layer in read_layers(build(net), (images(count),))}


def test_layers_come_in_the_order_of_their_first_call() -> None:
    assert list(layers("residual")) == ["stem.0", "block.a.0", "block.b.0", "down.0", "shortcut", "head"]
    assert list(layers("attention")) == ["embed", "query", "key", "value", "out", "up", "down", "head"]


def test_a_layer_tells_its_shape_and_cost() -> None:
    assert layers("plain")["b.0"] == LayerSpec("b.0", "conv", (32, 16, 3, 3), 32 * 16 * 9, 12 * 12 * 32 * 16 * 9)
    assert layers("plain")["head"] == LayerSpec("head", "linear", (5, 32), 5 * 32 + 5, 5 * 32)


def test_a_depthwise_layer_reads_one_channel_each() -> None:
    assert layers("depthwise")["depth.0"].weight_shape == (16, 1, 3, 3)
    assert layers("depthwise")["depth.0"].macs == 12 * 12 * 16 * 9


def test_a_layer_called_per_token_or_twice_costs_more() -> None:
    assert layers("attention")["up"].macs == 12 * 32 * 64
    assert layers("reused")["twice.0"].macs == 2 * 12 * 12 * 16 * 16 * 9


@pytest.mark.parametrize("net", NETS)
def test_the_batch_size_does_not_count(net: str) -> None:
    assert layers(net, 1) == layers(net, 3)


@pytest.mark.parametrize("net", NETS)
def test_only_the_tied_net_ties(net: str) -> None:
    tied = {name: layer.tied_to for name, layer in layers(net).items() if layer.tied_to}
    assert tied == ({"second": "first"} if net == "tied" else {})


def test_embeddings_count_and_uncalled_layers_do_not() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.used, self.idle = nn.Embedding(10, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.words(x))  # type: ignore[no-any-return]

    specs = read_layers(Tokens(), (torch.zeros(2, 3, dtype=torch.long),))
    assert [(s.name, s.kind, s.macs) for s in specs] == [("words", "embedding", 0), ("used", "linear", 3 * 8)]


def test_reading_leaves_no_trace() -> None:
    model = build("plain").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read_layers(model, (images(),))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
