"""Which modules count as residual blocks, what is left without them, and what that is predicted to cost."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

import search.torchvision_compat  # noqa: F401  transformers imports torchvision
from compressors.depth import Depth
from compressors.errors import Infeasible
from compressors.fisher import diagonal_fisher
from compressors.pipeline import Context
from compressors.plan import Step
from search.models import resnet18, resnet20
from tests.context import make_context
from tests.test_heads import FAMILIES, shown
from tests.zoo import Block, build, images


class Layers(nn.Module):
    """Two residual blocks in a row, one of two branches; one that changes the shape; one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Block(), Block())
        self.wide, self.again = nn.Conv2d(16, 16, 3, padding=1), Block()
        self.forked, self.head = Forked(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = self.again(self.again(F.relu(self.wide(x))))
        return self.head(self.forked(x).mean((2, 3)))  # type: ignore[no-any-return]


class Forked(nn.Module):
    """Adds two branches to its input, of which none alone can be silent for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(16, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.left(torch.relu(self.first(x))) + self.right(x)  # type: ignore[no-any-return]


def skip(model: nn.Module, *blocks: str) -> None:
    Depth().apply(model, Step("depth", {name: {"skip": True} for name in blocks}), make_context(model), 0)


def test_what_adds_to_its_input_is_a_block_and_a_row_of_blocks_is_not() -> None:
    found = Depth().groups(Layers().eval(), (images(),))
    assert found == {name: (name,) for name in ("blocks.0", "blocks.1", "forked")}


def test_networks_as_they_come_have_their_blocks() -> None:
    example = (torch.randn(2, 1, 32, 32),)
    twenty = Depth().groups(resnet20(10, 1).eval(), example)
    assert len(twenty) == 7
    assert len(Depth().groups(resnet18(10, 1).eval(), example)) == 5
    assert Depth().groups(build("attention"), (images(),)) == {}


def test_without_a_block_its_input_goes_on() -> None:
    model = Layers().eval()
    left = copy.deepcopy(model)
    skip(left, "blocks.1", "forked")
    x = images()
    hidden = model.blocks[0](F.relu(model.stem(x)))
    hidden = model.again(model.again(F.relu(model.wide(hidden))))
    torch.testing.assert_close(left(x), model.head(hidden.mean((2, 3))))
    assert sum(p.numel() for p in left.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_is_no_block_cannot_be_left_out() -> None:
    with pytest.raises(Infeasible, match=r"depth has no block blocks: possible are blocks\.0, blocks\.1, forked"):
        skip(Layers().eval(), "blocks")


def test_a_block_that_adds_little_is_predicted_to_cost_little() -> None:
    """Measured and predicted rise of the divergence, for blocks whose branches are scaled down."""
    torch.manual_seed(0)
    model = Layers().eval()
    with torch.no_grad():
        for block, share in (("blocks.0", 0.02), ("blocks.1", 0.1)):
            for name in ("weight", "bias"):
                model.get_parameter(f"{block}.b.1.{name}").mul_(share)
    inputs = images(64, seed=3)
    fisher = diagonal_fisher(model, [((inputs,), None)], 64)
    questions = [(name, {"skip": True}) for name in ("blocks.0", "blocks.1")]
    small, large = (effect.loss for effect in Depth().effects(model, (images(),), questions, fisher))
    measured = []
    for name, _ in questions:
        left = copy.deepcopy(model)
        skip(left, name)
        with torch.no_grad():
            p, q = model(inputs).log_softmax(-1), left(inputs).log_softmax(-1)
        measured.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert 0 < small < large
    assert small == pytest.approx(measured[0], rel=1.0)
    assert large == pytest.approx(measured[1], rel=1.0)


def test_layers_of_a_block_that_is_out_are_gone() -> None:
    model = Layers().eval()
    fisher = diagonal_fisher(model, [((images(8),), None)], 8)
    questions = [("forked", {"skip": value}) for value in (False, True)]
    kept, gone = Depth().effects(model, (images(),), questions, fisher)
    assert kept.loss == 0
    assert not kept.outputs
    assert gone.outputs == {"forked.first": 0.0, "forked.left": 0.0, "forked.right": 0.0}


class Curious(nn.Module):
    """Looks into one of its blocks and leaves the others alone, one of which it calls with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.named, self.known, self.free = nn.Conv2d(3, 16, 3, padding=1), Named(), Block(), Block()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.named(F.relu(self.stem(x)), scale=1.0)
        assert isinstance(self.known.a[0], nn.Conv2d)
        return self.head(self.free(self.known(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Named(Block):
    """Takes a keyword."""

    def forward(self, x: Tensor, scale: float = 0.0) -> Tensor:
        return F.relu(x + scale * self.b(self.a(x)))


def test_a_block_without_which_the_model_does_not_run_is_not_offered() -> None:
    assert list(Depth().groups(Curious().eval(), (images(),))) == ["named", "free"]


def test_of_what_a_block_is_given_its_first_input_goes_on() -> None:
    model = Curious().eval()
    hidden = F.relu(model.stem(images()))
    skip(model, "named")
    assert torch.equal(model.named(hidden, 3.0, scale=2.0), hidden)
    assert model(images()).isfinite().all()


def bert() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Three layers that normalise what they have added, with norms that do not look untrained; words and a mask."""
    torch.manual_seed(0)
    model = _bert_with_mask()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
    words = torch.randint(1, 50, (6, 8), generator=torch.Generator().manual_seed(1))
    return model.eval(), (words, (torch.arange(8) < torch.arange(3, 9)[:, None]).long())


def _bert_with_mask() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=16))

        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            hidden: Tensor = self.body(words, attention_mask=mask).last_hidden_state
            return hidden[:, 0]

    return Bert()


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_transformers_are_blocks_wherever_their_norms_are(name: str) -> None:
    found = Depth().groups(FAMILIES[name].build(), (shown(name),))
    assert list(found) == [FAMILIES[name].block.format(number) for number in range(2)]


LAYERS = tuple(f"body.encoder.layer.{i}" for i in range(3))


def test_layers_that_normalise_what_they_added_are_blocks() -> None:
    model, example = bert()
    assert Depth().groups(model, example) == {name: (name,) for name in LAYERS}


def test_without_a_layer_of_a_transformer_the_next_one_reads_its_input() -> None:
    model, example = bert()
    left = copy.deepcopy(model)
    context = Context(model, example, lambda: iter(()), lambda: iter([(example, None)]), None)
    Depth().apply(left, Step("depth", {LAYERS[1]: {"skip": True}}), context, 0)
    shorter = copy.deepcopy(model)
    del shorter.get_submodule("body.encoder.layer")[1]  # type: ignore[operator]  # a list of modules
    with torch.no_grad():
        assert torch.equal(left(*example), shorter(*example))
        assert not torch.allclose(left(*example), model(*example), rtol=0, atol=0.01)


def test_a_layer_of_a_transformer_costs_what_its_branches_add() -> None:
    model, example = bert()
    with torch.no_grad():
        for branch in ("attention.output", "output"):
            for parameter in model.get_submodule(f"{LAYERS[1]}.{branch}.dense").parameters():
                parameter.mul_(0.1)
    fisher = diagonal_fisher(model, [(example, None)], 6)
    quiet, loud, kept = Depth().effects(
        model, example, [(LAYERS[1], {"skip": True}), (LAYERS[2], {"skip": True}), (LAYERS[2], {"skip": False})], fisher
    )
    assert 0 == kept.loss < quiet.loss < loud.loss / 10
    assert {name.removeprefix(LAYERS[1]) for name in quiet.outputs} == {
        *(f".attention.self.{name}" for name in ("query", "key", "value")),
        *(".attention.output.dense", ".intermediate.dense", ".output.dense"),
    }
