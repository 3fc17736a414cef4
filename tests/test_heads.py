"""Which attention blocks can lose heads, which heads go, what is left without them, and that it deploys."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

import search.torchvision_compat  # noqa: F401  transformers imports torchvision
from compressors.errors import Infeasible
from compressors.fisher import Question, diagonal_fisher
from compressors.heads import CRITERIA, Heads
from compressors.pipeline import Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.quantize import Quantize
from tests.context import make_context
from tests.test_criteria import removed
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.zoo import CLASSES, NETS, GroupedQuery, build, images

BLOCK = ("attention.query", "attention.key", "attention.value")
OWNER = BLOCK[0]


def cut(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    context: Context | None = None,
    seed: int = 0,
    **shared: Scalar,
) -> Mapping[str, Settings]:
    context = context or make_context(model)
    shares = (
        sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(Heads().groups(model, context.example), sparsity)
    )
    step = Step("heads", {owner: {"sparsity": share} for owner, share in shares.items()}, shared)
    return Heads().apply(model, step, context, seed).achieved


def heads_gone(before: nn.Module, after: nn.Module, layer: str, heads: int) -> list[int]:
    """Which heads have no row left in a layer; every other one has all of its own."""
    size = len(before.get_parameter(f"{layer}.weight")) // heads
    rows = removed(before, after, layer)
    gone = sorted({row // size for row in rows})
    assert rows == {head * size + i for head in gone for i in range(size)}
    return gone


# -- Models of transformers, made from their configuration


class Answering(nn.Module):
    """One tensor of a model that answers with more."""

    def __init__(self, body: nn.Module, answer: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.body, self.answer = body, answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.body(x))


class Causal(Answering):
    """With a mask of its own, finite for calibration: ONNX has no operator for how the library makes one."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((1, 1, x.shape[1], x.shape[1]), -1e4).triu(1)
        return self.answer(self.body(x, attention_mask=mask))


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16}
PICTURES = {"image_size": 12, "patch_size": 4}


@dataclass(frozen=True)
class Family:
    """A model, its attention blocks with their four layers, and what reads before an activation in the rest.

    `heads` are those for keys and values; `left` is what a block says of itself when it has lost half of them.
    """

    make: Callable[[], nn.Module]
    block: str
    layers: tuple[str, str, str, str]
    up: tuple[str, ...]
    heads: int
    left: Mapping[str, int]

    def names(self, number: int) -> tuple[str, ...]:
        """The four layers of a block."""
        return tuple(f"{self.block.format(number)}.{layer}" for layer in self.layers)

    def build(self) -> nn.Module:
        """With the same weights every time, and large enough ones for attention to matter."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.make().eval()
            for number in range(2):
                for layer in self.names(number):
                    model.get_parameter(f"{layer}.weight").mul_(8)
        return model


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return Answering(
        BertForSequenceClassification(BertConfig(**SIZES, **WORDS, num_labels=CLASSES)), lambda out: out.logits
    )


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=CLASSES, **WORDS)
    return Answering(DistilBertForSequenceClassification(config), lambda out: out.logits)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Answering(
        ViTForImageClassification(ViTConfig(**SIZES, **PICTURES, num_labels=CLASSES)), lambda out: out.logits
    )


def _clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return Answering(CLIPVisionModel(CLIPVisionConfig(**SIZES, **PICTURES)), lambda out: out.pooler_output)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2, use_cache=False)
    return Causal(LlamaModel(config), lambda out: out.last_hidden_state[:, -1])


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return Answering(T5EncoderModel(config), lambda out: out.last_hidden_state.mean(1))


FAMILIES = {
    "bert": Family(
        _bert,
        "body.bert.encoder.layer.{}",
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        ("intermediate.dense",),
        4,
        {"num_attention_heads": 2, "all_head_size": 16, "attention_head_size": 8},
    ),
    "distilbert": Family(
        _distilbert,
        "body.distilbert.transformer.layer.{}",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("ffn.lin1",),
        4,
        {"n_heads": 2, "dim": 16, "attention_head_size": 8},
    ),
    "vit": Family(
        _vit,
        "body.vit.layers.{}",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        ("mlp.fc1",),
        4,
        {"num_attention_heads": 2, "head_dim": 8},
    ),
    "clip": Family(
        _clip,
        "body.encoder.layers.{}",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        ("mlp.fc1",),
        4,
        {"num_heads": 2, "embed_dim": 16, "head_dim": 8},
    ),
    "llama": Family(
        _llama,
        "body.layers.{}",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        2,
        {"num_key_value_groups": 2, "head_dim": 8},
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def shown(name: str, count: int = 2, seed: int = 0) -> Tensor:
    """Pictures, or rows of eight words."""
    words = torch.randint(1, 50, (count, 8), generator=torch.Generator().manual_seed(seed))
    return images(count, seed) if name in ("vit", "clip") else words


def context_of(name: str, model: nn.Module) -> Context:
    batch = (shown(name, 16, 1),)
    return Context(model, (batch[0][:2],), lambda: iter(()), lambda: iter([(batch, None)]), None)


@every_family
def test_the_blocks_of_transformers_are_found(name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].build()
    blocks = [family.names(number)[:3] for number in range(2)]
    assert dict(Heads().groups(model, (shown(name),))) == {members[0]: members for members in blocks}


@every_family
def test_neurons_between_their_blocks_are_for_structured_pruning(name: str) -> None:
    """Rotary position embeddings, which Llama has, once sent the tracer round and round."""
    groups = Prune().groups(FAMILIES[name].build(), (shown(name),))
    for number in range(2):
        up = {f"{FAMILIES[name].block.format(number)}.{layer}" for layer in FAMILIES[name].up}
        assert [set(members) for members in groups.values() if up & set(members)] == [up]


@every_family
def test_without_heads_they_answer_as_if_nobody_listened_to_these(name: str) -> None:
    family, model, x = FAMILIES[name], FAMILIES[name].build(), shown(name, 3)
    left, unheard = copy.deepcopy(model), copy.deepcopy(model)
    achieved = cut(left, 0.5, context_of(name, model), criterion="l2")
    for number in range(2):
        *members, reader = family.names(number)
        assert achieved[members[0]] == {"sparsity": 0.5, "heads": family.heads // 2}
        gone = [heads_gone(model, left, layer, family.heads) for layer in members]
        assert gone[0] == gone[1] == gone[2]
        weight = unheard.get_parameter(f"{reader}.weight").view(32, family.heads, -1)
        with torch.no_grad():
            weight[:, gone[0]] = 0
        module = left.get_submodule(members[0].rpartition(".")[0])
        assert {key: getattr(module, key) for key in family.left} == family.left
    with torch.no_grad():
        torch.testing.assert_close(left(x), unheard(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(left(x), model(x), rtol=1e-2, atol=1e-3)


def test_a_position_bias_that_all_blocks_share_keeps_their_heads() -> None:
    torch.manual_seed(0)
    assert Heads().groups(_t5().eval(), (shown("t5"),)) == {}


METHODS: dict[str, Compressor] = {"heads": Heads(), "prune": Prune(), "quantize": Quantize()}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["heads", "bert", "vit", "llama"])
def test_what_lost_heads_and_neurons_deploys_and_takes_8_bits(name: str, runtime: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build() if name in FAMILIES else build(name)
    context = make_context(model) if name == "heads" else context_of(name, model)
    owners = {method: list(METHODS[method].groups(model, context.example)) for method in ("heads", "prune")}
    steps = tuple(Step(method, {owner: {"sparsity": 0.5} for owner in found}, {}) for method, found in owners.items())
    bits = Step("quantize", {owner: {"bits": 8} for owner in (*owners["heads"], *owners["prune"])}, {})
    x = context.example[0]
    sizes = []
    for asked in ((), steps, (*steps, bits)):
        plan = CompressionPlan(Target(runtime, "fp32"), asked)
        made = compress(model, plan, METHODS, context)
        deployed = runtime_of(runtime).deploy(made, context, tmp_path / str(len(asked)), tmp_path / "cache")
        sizes.append(sum(path.stat().st_size for path in deployed.folder.rglob("*") if path.is_file()))
        with torch.no_grad():
            expected = made.model(x).flatten()
        got = torch.from_numpy(deployed.run(x.numpy())).flatten()
        assert F.cosine_similarity(got, expected, 0) > (0.98 if bits in asked else 1 - 1e-6)
        assert int8_kernels(deployed) >= len(owners["heads"]) if bits in asked else not int8_kernels(deployed)
    assert sizes[1] < sizes[0]


# -- The small net of this house, and others like it


@pytest.mark.parametrize("net", NETS)
def test_only_a_block_that_tells_its_heads_is_offered(net: str) -> None:
    assert dict(Heads().groups(build(net), (images(),))) == ({OWNER: BLOCK} if net == "heads" else {})


def test_a_key_value_head_takes_its_query_heads_along() -> None:
    model = build("heads")
    left = copy.deepcopy(model)
    assert cut(left, 0.5) == {OWNER: {"sparsity": 0.5, "heads": 2}}
    block = left.get_submodule("attention")
    assert isinstance(block, GroupedQuery)
    assert (block.num_heads, block.num_key_value_heads, block.head_dim) == (4, 2, 8)
    gone = [heads_gone(model, left, layer, 4) for layer in BLOCK]
    assert gone[0] == gone[1] == gone[2]
    shapes = [tuple(left.get_parameter(f"{layer}.weight").shape) for layer in (*BLOCK, "attention.out")]
    assert shapes == [(32, 32), (16, 32), (16, 32), (32, 32)]
    columns = model.get_parameter("attention.out.weight").view(32, 4, 16)
    kept = [head for head in range(4) if head not in gone[0]]
    assert torch.equal(left.get_parameter("attention.out.weight"), columns[:, kept].flatten(1))


@pytest.mark.parametrize(("share", "left"), [(0.0, 4), (0.1, 4), (0.25, 3), (0.5, 2), (0.75, 1), (0.99, 1)])
def test_the_nearest_number_of_heads_goes_and_the_last_one_stays(share: float, left: int) -> None:
    model = build("heads")
    assert cut(model, share)[OWNER] == {"sparsity": 1 - left / 4, "heads": left}
    assert model(images()).isfinite().all()


def test_parameters_learn_only_if_they_did_before() -> None:
    model = build("heads").requires_grad_(False)
    model.get_parameter("attention.key.bias").requires_grad_(True)
    cut(model, 0.5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["attention.key.bias"]


@pytest.mark.parametrize(
    ("settings", "shared", "reason"),
    [
        ({OWNER: {"sparsity": 1.0}}, {}, r"sparsity of attention\.query is 1\.0"),
        ({OWNER: {"sparsity": "half"}}, {}, r"sparsity of attention\.query is half"),
        ({OWNER: {"sparsity": 0.5}}, {"criterion": "bn_scale"}, r"criterion is bn_scale: expected one of fisher, "),
        ({"up": {"sparsity": 0.5}}, {}, r"no attention block up: possible are attention\.query"),
    ],
)
def test_what_cannot_be_done_is_infeasible(settings: Mapping[str, Settings], shared: Settings, reason: str) -> None:
    model = build("heads")
    with pytest.raises(Infeasible, match=reason):
        Heads().apply(model, Step("heads", settings, shared), make_context(model), 0)


def test_an_assistant_loses_half_as_much() -> None:
    half = Heads().half(Step("heads", {OWNER: {"sparsity": 0.5}}, {"criterion": "l2"}))
    assert half == Step("heads", {OWNER: {"sparsity": 0.25}}, {"criterion": "l2"})
    assert Heads().half(Step("heads", {OWNER: {"sparsity": 0.0}})) is None


class Told(GroupedQuery):
    """Works out how many heads there are, and calls its last layer by the name of what it takes."""

    def __init__(self) -> None:
        super().__init__()
        del self.num_heads, self.num_key_value_heads

    @property
    def n_heads(self) -> int:
        return self.query.out_features // self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.query(x).view(n, t, self.n_heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(n, t, -1, self.head_dim).transpose(1, 2) for f in (self.key, self.value))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(input=mixed)  # type: ignore[no-any-return]


def test_a_block_may_work_out_what_it_says() -> None:
    model = build("heads")
    model.attention = Told()
    assert dict(Heads().groups(model, (images(),))) == {OWNER: BLOCK}
    cut(model, 0.5)
    assert isinstance(model.attention, Told)
    assert model.attention.n_heads == 4


class Interleaved(GroupedQuery):
    """Query heads that share a key/value head do not lie side by side."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            f(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
        return self.out(mixed.transpose(1, 2).reshape(n, t, -1))  # type: ignore[no-any-return]


class OneKey(GroupedQuery):
    """All query heads share one key/value head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_heads, self.key, self.value = 1, nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]


class Shared(GroupedQuery):
    """Keys and values have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.value.weight = self.key.weight


class Normed(GroupedQuery):
    """A norm over all heads mixes them."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).reshape(n, t, -1, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value))
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        return self.out(F.layer_norm(mixed, (mixed.shape[-1],)))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """Three layers and a number of heads, but the product of all three makes each of them as good as the values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.a, self.b, self.c, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) * self.b(x) * self.c(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("block", [Interleaved, OneKey, Shared, Normed, Gate])
def test_heads_that_cannot_go_alone_stay(block: Callable[[], nn.Module], scale: float) -> None:
    """Also where small weights make all heads alike."""
    model = build("heads")
    torch.manual_seed(0)
    model.attention = block()
    with torch.no_grad():
        for parameter in model.attention.parameters():
            parameter.mul_(scale)
    assert Heads().groups(model, (images(),)) == {}


def test_packed_attention_stays_whole() -> None:
    torch.manual_seed(0)
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    assert Heads().groups(layers, (torch.randn(2, 5, 32),)) == {}


# -- Which heads go


def listened_to(shares: list[float]) -> nn.Module:
    """The answers of each head count for so much."""
    model = build("heads")
    with torch.no_grad():
        model.get_parameter("attention.out.weight").view(32, 4, 16).mul_(torch.tensor(shares)[:, None])
    return model


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "l2", "l1"])
def test_a_head_that_says_little_goes_first(criterion: str) -> None:
    model = listened_to([1.0, 0.01, 1.0, 1.0])
    left = copy.deepcopy(model)
    cut(left, 0.25, criterion=criterion)
    assert heads_gone(model, left, BLOCK[2], 4) == [1]


def test_the_data_sees_what_weights_do_not_tell() -> None:
    """A head that answers everything with nothing may have large weights."""
    model = build("heads")
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"attention.value.{name}")[16:24] = 0
            model.get_parameter(f"attention.query.{name}")[32:48] *= 3
    gone = {}
    for criterion in ("fisher", "taylor", "l2", "l1"):
        left = copy.deepcopy(model)
        cut(left, 0.25, criterion=criterion)
        gone[criterion] = heads_gone(model, left, OWNER, 4) == [2]
    assert gone == {"fisher": True, "taylor": True, "l2": False, "l1": False}


def test_taylor_is_the_slope_of_the_loss_along_a_factor_on_the_head() -> None:
    """Against differences of the loss, in double precision."""
    model, context = build("heads"), make_context(build("heads"))
    batches = [(inputs[0].double(), target) for inputs, target in context.calibration()]

    def loss(head: int, scale: float) -> float:
        shares = torch.ones(4, dtype=torch.double)
        shares[head] = scale
        scaled = copy.deepcopy(model).double()
        weight = scaled.get_parameter("attention.out.weight").data
        weight.view(32, 4, 16).mul_(shares[:, None])
        return sum(F.cross_entropy(scaled(inputs), target).item() for inputs, target in batches if target is not None)

    slopes = torch.tensor([loss(head, 1 + 1e-4) - loss(head, 1 - 1e-4) for head in range(4)])
    for count in (1, 2, 3):
        left = copy.deepcopy(model)
        cut(left, count / 4, criterion="taylor")
        assert heads_gone(model, left, BLOCK[2], 4) == sorted(slopes.abs().argsort()[:count].tolist())


def test_without_labels_taylor_is_fisher() -> None:
    blind = replace(make_context(build("heads")), loss=None)
    by = {criterion: build("heads") for criterion in ("taylor", "fisher")}
    for criterion, model in by.items():
        cut(model, 0.5, blind, criterion=criterion)
    assert torch.equal(by["taylor"](images()), by["fisher"](images()))


def test_what_goes_at_random_is_up_to_the_seed_alone() -> None:
    def gone(model: nn.Module, seed: int) -> list[int]:
        left = copy.deepcopy(model)
        cut(left, 0.5, seed=seed, criterion="random")
        return heads_gone(model, left, OWNER, 4)

    found = [gone(build("heads"), seed) for seed in range(6)]
    assert found == [gone(build("heads", seed=1), seed) for seed in range(6)], "other weights, same heads"
    assert len({tuple(heads) for heads in found}) > 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_effects_are_of_the_heads_that_go(criterion: str) -> None:
    model, context = build("heads"), make_context(build("heads"))
    fisher = diagonal_fisher(model, context.calibration(), loss=context.loss)
    questions: list[Question] = [(OWNER, {"sparsity": share, "criterion": criterion}) for share in (0.0, 0.5, 0.75)]
    whole, half, most = Heads().effects(model, context.example, questions, fisher)
    left = copy.deepcopy(model)
    cut(left, 0.5, context, criterion=criterion)
    gates = fisher.gates["attention.value.weight"] + fisher.gates["attention.value.bias"]
    gone = heads_gone(model, left, BLOCK[2], 4)
    assert half.loss == pytest.approx(0.5 * float(gates.view(-1, 4, 8).sum(2).square().mean(0)[gone].sum()))
    assert whole.loss == 0 < half.loss < most.loss < math.inf
    assert {*whole.outputs.values(), *whole.inputs.values()} == {1.0}
    assert half.outputs == dict.fromkeys(BLOCK, 0.5)
    assert most.inputs == {"attention.out": 0.25}


def test_effects_foresee_which_heads_cost_more() -> None:
    model = listened_to([0.02, 0.05, 0.1, 0.2])
    inputs = images(64, seed=3)
    fisher = diagonal_fisher(model, [((inputs,), None)], 64)
    questions: list[Question] = [(OWNER, {"sparsity": share}) for share in (0.25, 0.5, 0.75)]
    predicted = [effect.loss for effect in Heads().effects(model, (images(),), questions, fisher)]
    measured = []
    for share in (0.25, 0.5, 0.75):
        left = copy.deepcopy(model)
        cut(left, share)
        with torch.no_grad():
            sure, other = (net(inputs).log_softmax(1) for net in (model, left))
        measured.append(float(F.kl_div(other, sure, reduction="batchmean", log_target=True)))
    assert predicted == sorted(predicted)
    for guess, true in zip(predicted, measured, strict=True):
        assert true / 3 < guess < 3 * true
