"""Torch's packed attention as linear layers: the same answers, and whatever wants layers finds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.heads import Heads
from compressors.layers import read_layers
from compressors.pipeline import Compressor, Context, compress
from compressors.plan import CompressionPlan, Step, Target
from compressors.prune import Prune
from compressors.quantize import Quantize
from compressors.unpacked import UnpackedAttention, unpacked
from search.torchvision_compat import torchvision
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.zoo import CLASSES, images

WIDTH, HEADS, ROWS, ASKING, KEPT = 16, 4, 3, 5, 6
"""Of an attention: `ROWS` examples with `ASKING` queries and `KEPT` keys."""


def attention(**settings: Any) -> nn.MultiheadAttention:
    """With random biases too, which torch sets to zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = nn.MultiheadAttention(WIDTH, HEADS, **settings).eval()
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(packed: nn.MultiheadAttention, *inputs: Tensor, **options: Any) -> None:
    """With weights and without, averaged and not."""
    ours = UnpackedAttention(packed)
    for wanted in ({"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False}):
        with torch.no_grad():
            expected, told = packed(*inputs, **options, **wanted)
            answer, weights = ours(*inputs, **options, **wanted)
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
        assert (weights is None) == (told is None)
        if told is not None:
            torch.testing.assert_close(weights, told, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 7, "vdim": 9}])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "one example"])
def test_it_answers_others_as_the_packed_one(layout: str, widths: Mapping[str, int], bias: bool) -> None:
    def shaped(length: int, width: int) -> Tensor:
        rows = {"batch first": (ROWS, length), "sequence first": (length, ROWS), "one example": (length,)}[layout]
        return random(*rows, width, seed=width)

    packed = attention(bias=bias, batch_first=layout == "batch first", **widths)
    key, value = shaped(KEPT, widths.get("kdim", WIDTH)), shaped(KEPT, widths.get("vdim", WIDTH))
    agree(packed, shaped(ASKING, WIDTH), key, value)


LAST, SECOND = torch.arange(KEPT) == KEPT - 1, torch.arange(KEPT) == 1
PADDING = torch.stack([LAST, SECOND, LAST & SECOND])
LATER = torch.ones(KEPT, KEPT).triu(1).bool()
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": random(ROWS, KEPT)},
    "bool": {"attn_mask": LATER},
    "float": {"attn_mask": random(KEPT, KEPT)},
    "per head": {"attn_mask": random(ROWS * HEADS, KEPT, KEPT)},
    "causal": {"attn_mask": LATER, "is_causal": True},
    "bool and bool padding": {"attn_mask": LATER, "key_padding_mask": PADDING & ~PADDING[:, :1]},
    "float and float padding": {"attn_mask": random(KEPT, KEPT), "key_padding_mask": random(ROWS, KEPT)},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_it_answers_itself_as_the_packed_one(masks: str, batch_first: bool) -> None:
    x = random(ROWS, KEPT, WIDTH) if batch_first else random(KEPT, ROWS, WIDTH)
    agree(attention(batch_first=batch_first), x, x, x, **MASKS[masks])


@pytest.mark.parametrize("options", [{"key_padding_mask": LAST}, {"attn_mask": random(HEADS, KEPT, KEPT)}])
def test_masks_of_one_example_have_no_batch(options: Mapping[str, Tensor]) -> None:
    x = random(KEPT, WIDTH)
    agree(attention(), x, x, x, **options)


def test_what_drops_out_in_training_does_so_still() -> None:
    x, packed = random(ROWS, KEPT, WIDTH), attention(dropout=0.5, batch_first=True)
    ours = UnpackedAttention(packed)
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    for wanted in (True, False):
        found = []
        for module in (packed.train(), ours.train()):
            torch.manual_seed(0)
            found.append(module(x, x, x, need_weights=wanted)[0])
        torch.testing.assert_close(found[1], found[0])


def test_weights_learn_only_if_they_did_and_are_its_own() -> None:
    packed = attention().requires_grad_(False)
    packed.out_proj.weight.requires_grad_(True)
    ours = UnpackedAttention(packed)
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["out_proj.weight"]
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in packed.parameters()}


def test_making_one_draws_no_random_number() -> None:
    packed, before = attention(), torch.get_rng_state()
    UnpackedAttention(packed)
    assert torch.equal(torch.get_rng_state(), before)


# -- Whole models


class Encoder(nn.Module):
    """Torch's encoder over twelve tokens of a picture."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **settings)
        self.embed, self.head = nn.Linear(36, 32), nn.Linear(32, CLASSES)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.flatten(1).reshape(-1, 12, 36))).mean(1))  # type: ignore[no-any-return]


class Masked(Encoder):
    """Tokens of which the last ones are padding, and are not looked at afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.use_nested_tensor = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 12, 36)
        padding = (torch.arange(12) > 8).expand(x.shape[0], 12)
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, 0])  # type: ignore[no-any-return]


class Crossed(nn.Module):
    """Encoder and decoder, sequence first, one example behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(36, 32), nn.Linear(32, CLASSES)
        self.both = nn.Transformer(32, 4, 1, 1, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1).reshape(-1, 12, 36)).transpose(0, 1)
        later = torch.full((6, 6), -1e4).triu(1)
        return self.head(self.both(x, x[:6], tgt_mask=later)[-1])  # type: ignore[no-any-return]


def _vit() -> nn.Module:
    model: nn.Module = torchvision().models.VisionTransformer(12, 4, 2, 4, 32, 48, num_classes=CLASSES)
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


@dataclass(frozen=True)
class Family:
    """A model, and the attentions in it."""

    make: Callable[[], nn.Module]
    blocks: tuple[str, ...]

    def build(self) -> nn.Module:
        """With the same weights every time, and large enough ones for attention to matter."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.make().eval().requires_grad_(False)
            for block in self.blocks:
                model.get_parameter(f"{block}.in_proj_weight").mul_(4)
        return model


LAYERS = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
FAMILIES = {
    "vit": Family(_vit, tuple(f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2))),
    "encoder": Family(Encoder, LAYERS),
    "pre-norm encoder": Family(lambda: Encoder(norm_first=True), LAYERS),
    "gelu without bias": Family(lambda: Encoder(activation=F.gelu, bias=False), LAYERS),
    "masked": Family(Masked, LAYERS),
    "crossed": Family(
        Crossed,
        tuple(
            f"both.{part}"
            for part in (
                "encoder.layers.0.self_attn",
                *(f"decoder.layers.0.{x}" for x in ("self_attn", "multihead_attn")),
            )
        ),
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
# Torch says so of its encoders: that nested tensors are new, and that it goes without them.
nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@nested
@every_family
def test_a_model_answers_as_before_and_has_layers(name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].build()
    ours, x = unpacked(model, (images(),)), images(5, 1)
    assert {n for n, m in ours.named_modules() if isinstance(m, UnpackedAttention)} == set(family.blocks)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)
    wanted = {f"{block}.{layer}" for block in family.blocks for layer in PROJECTIONS}
    assert wanted <= {layer.name for layer in read_layers(ours, (images(),))}
    assert not wanted & {layer.name for layer in read_layers(model, (images(),))}, "the model itself is untouched"


METHODS: dict[str, Compressor] = {"heads": Heads(), "prune": Prune(), "quantize": Quantize()}


@nested
@pytest.mark.parametrize("runtime", RUNTIMES)
@every_family
def test_it_loses_heads_and_neurons_and_takes_8_bits(name: str, runtime: str, tmp_path: Path) -> None:
    model = unpacked(FAMILIES[name].build(), (images(),))
    batch = (images(16, 1),)
    context = Context(model, (images(),), lambda: iter(()), lambda: iter([(batch, None)]), None)
    owners = {method: METHODS[method].groups(model, context.example) for method in ("heads", "prune")}
    assert list(owners["heads"]) == [f"{block}.q_proj" for block in FAMILIES[name].blocks]
    assert owners["prune"]
    steps = tuple(Step(method, {owner: {"sparsity": 0.5} for owner in found}, {}) for method, found in owners.items())
    layers = [f"{block}.{layer}" for block in FAMILIES[name].blocks for layer in PROJECTIONS]
    bits = Step(
        "quantize",
        {owner: {"bits": 8} for owner in METHODS["quantize"].groups(model, context.example) if owner in layers},
        {},
    )
    sizes = []
    for asked in ((), steps, (*steps, bits)):
        made = compress(model, CompressionPlan(Target(runtime, "fp32"), asked), METHODS, context)
        deployed = runtime_of(runtime).deploy(made, context, tmp_path / str(len(asked)), tmp_path / "cache")
        sizes.append(deployed.bytes)
        with torch.no_grad():
            expected = made.model(batch[0]).flatten()
        got = torch.from_numpy(deployed.run(batch[0].numpy())).flatten()
        assert F.cosine_similarity(got, expected, 0) > (0.98 if bits in asked else 1 - 1e-6)
        assert int8_kernels(deployed) >= len(layers) if bits in asked else not int8_kernels(deployed)
    assert sizes[1] < sizes[0]


class Pool(nn.Module):
    """Reads the packed weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(36, WIDTH), attention(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1).reshape(-1, 12, 36)) @ self.attention.in_proj_weight.T
        return self.head(x[..., :WIDTH].mean(1))  # type: ignore[no-any-return]


class Padded(Masked):
    """Looks at its padding, where nested tensors leave zeros."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 12, 36)
        padding = (torch.arange(12) > 8).expand(x.shape[0], 12)
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding).mean(1))  # type: ignore[no-any-return]


@nested
@pytest.mark.parametrize("make", [Pool, Padded])
def test_a_model_that_would_answer_otherwise_stays(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    assert unpacked(model, (images(),)) is model


class Several(nn.Module):
    """Attentions one behind the other."""

    def __init__(self, *attentions: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed, self.attentions = nn.Linear(36, WIDTH), nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1).reshape(-1, 12, 36))
        for layer in self.attentions:
            x = layer(x, x, x)[0]
        return x.mean(1)


def test_what_has_more_than_linear_layers_stays_alone() -> None:
    model = Several(attention(add_bias_kv=True), attention(add_zero_attn=True), attention()).eval()
    kinds = [type(module) for module in unpacked(model, (images(),)).get_submodule("attentions").children()]
    assert kinds == [nn.MultiheadAttention, nn.MultiheadAttention, UnpackedAttention]


def test_shared_weights_stay_shared() -> None:
    one, other = attention(), attention()
    other.in_proj_weight = one.in_proj_weight
    tied = Several(one, other, attention()).eval()
    kinds = [type(module) for module in unpacked(tied, (images(),)).get_submodule("attentions").children()]
    assert kinds == [nn.MultiheadAttention, nn.MultiheadAttention, UnpackedAttention]
    twice = unpacked(Several(one, one).eval(), (images(),))
    assert twice.get_submodule("attentions.0") is twice.get_submodule("attentions.1")
