"""Pictures and captions: what the losses want, that two towers learn it, and that every method gets through each."""

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FixedTrial
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.depth import Depth
from compressors.errors import ConfigError
from compressors.layers import read_layers
from compressors.pipeline import compress
from compressors.plan import CompressionPlan, Settings, Step, Target
from compressors.quantize import Quantize
from search.image_text import TEMPERATURE, contrastive_loss, image_text, relation_loss
from search.pretrained import clip, two_towers
from search.space import build_space
from search.training import FineTuning, Probing, trained
from search.workload import Split, Splits
from tests.context import METHODS, workload_context
from tests.pairs import CONFIG, small_clip, splits
from tests.studies import CountingRuntime
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.words import CONFIG as BERT

LEARNING: Settings = {"epochs": 2, "temperature": 1.0, "weight": 0.5, "learning_rate": 3e-3}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_the_loss_is_that_of_clip_where_every_caption_is_another() -> None:
    pairs = unit(5, 2, 4)
    logits = pairs[:, 0] @ pairs[:, 1].T / TEMPERATURE
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(contrastive_loss(pairs, torch.tensor([4, 0, 7, 2, 1])), expected)


def test_captions_that_say_the_same_do_not_push_each_other_away() -> None:
    """Two that are alike share the odds, and the loss is as low as it can get; as two targets, each is wrong once."""
    pairs = torch.eye(4)[[0, 0, 1, 2]][:, None].expand(-1, 2, -1)
    same, apart = (float(contrastive_loss(pairs, torch.tensor(t))) for t in ([0, 0, 1, 2], [0, 3, 1, 2]))
    assert same == pytest.approx(apart)
    assert same == pytest.approx(math.log(2) / 2, abs=1e-4)
    pushed = pairs.clone()
    pushed[1] = torch.eye(4)[3]
    assert float(contrastive_loss(pushed, torch.tensor([0, 3, 1, 2]))) < 0.01
    assert float(contrastive_loss(pushed, torch.tensor([0, 0, 1, 2]))) > same + 1


def test_imitation_is_nothing_for_the_teacher_and_sees_towers_that_turn() -> None:
    teacher = unit(6, 2, 4)
    turned = teacher.flip(-1)
    torch.testing.assert_close(relation_loss(teacher, teacher, 2.0), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        relation_loss(turned, teacher, 2.0), (1 - F.cosine_similarity(turned, teacher, dim=-1)).mean()
    )
    one_tower = torch.stack((turned[:, 0], teacher[:, 1]), dim=1)
    assert float(relation_loss(one_tower, teacher, 1.0)) > float(relation_loss(turned, teacher, 1.0))


def test_an_embedding_is_that_of_the_library() -> None:
    from transformers import AutoConfig, CLIPModel

    model = small_clip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {name: value for name, value in CONFIG.items() if name != "model_type"}
        body = CLIPModel(AutoConfig.for_model("clip", **fields)).eval()
    body.vision_model.load_state_dict(model.get_submodule("vision.body").state_dict())
    body.text_model.load_state_dict(model.get_submodule("text.body").state_dict())
    body.visual_projection.load_state_dict(model.get_submodule("vision.projection").state_dict())
    body.text_projection.load_state_dict(model.get_submodule("text.projection").state_dict())
    images, words, mask = (x[:8] for x in splits().train.inputs)
    with torch.no_grad():
        wanted = body(input_ids=words, pixel_values=images, attention_mask=mask)
        got = model(images, words, mask)
    torch.testing.assert_close(got, torch.stack((wanted.image_embeds, wanted.text_embeds), dim=1))


def test_a_network_without_towers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.network\.config: is a bert, which has no towers .*; give one of"):
        clip(config=BERT)


def test_two_towers_learn_to_find_each_other(tmp_path: Path) -> None:
    data, model = splits(2048), small_clip().requires_grad_(True)
    recipe = FineTuning(epochs=6, learning_rate=5e-3, batch=64)
    model = trained(model, data, image_text(), recipe, tmp_path)
    with torch.no_grad():
        pictures, captions = model(*data.validation.inputs).unbind(1)
    targets = data.validation.targets
    assert targets is not None
    assert float((targets[(pictures @ captions.T).argmax(1)] == targets).float().mean()) > 0.8


def test_recovery_brings_similarities_back() -> None:
    model, data = small_clip(), splits()
    left = copy.deepcopy(model)
    context = workload_context(model, data, image_text())
    block = {f"{tower}.body.encoder.layers.1": {"skip": True} for tower in ("vision", "text")}
    Depth().apply(left, Step("depth", block), context, 0)
    inputs = data.validation.inputs
    with torch.no_grad():
        before = relation_loss(left(*inputs), model(*inputs), 1.0)
        METHODS["distill"].apply(left, Step("distill", {}, {**LEARNING, "weight": 1.0}), context, 0)
        after = relation_loss(left(*inputs), model(*inputs), 1.0)
    assert after < 0.7 * before


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_method_gets_through_each_tower_and_deploys(tmp_path: Path, runtime: str) -> None:
    model, data = small_clip(), splits()
    context = workload_context(model, data, image_text())
    vision, text = (f"{tower}.body.encoder.layers" for tower in ("vision", "text"))
    structure = (
        Step("depth", {f"{vision}.1": {"skip": True}}),
        Step("heads", {f"{text}.0.self_attn.q_proj": {"sparsity": 0.5}}),
        Step("prune", {f"{vision}.0.mlp.fc1": {"sparsity": 0.5}, f"{text}.1.mlp.fc1": {"sparsity": 0.25}}),
        Step("lowrank", {f"{text}.0.mlp.fc2": {"rank": 0.5}}),
        Step("distill", {}, LEARNING),
    )
    rounded = [f"{vision}.0.mlp.fc2", f"{text}.0.self_attn.v_proj", f"{text}.1.mlp.fc2"]
    inputs = data.validation.inputs
    without_text = (Step("depth", {f"{text}.{i}": {"skip": True} for i in range(2)}),)
    for steps in ((), without_text, structure, (*structure, Step("quantize", {name: {"bits": 8} for name in rounded}))):
        made = compress(model, CompressionPlan(Target(runtime, "fp32"), steps), METHODS, context)
        deployed = runtime_of(runtime).deploy(made, context, tmp_path / str(len(steps)), tmp_path / "cache")
        got = torch.from_numpy(deployed.run(*(x.numpy() for x in inputs)))
        assert got.shape == (64, 2, 8)
        with torch.no_grad():
            alike = F.cosine_similarity(got, made.model(*inputs), dim=-1).mean()
        assert alike > (0.97 if len(steps) > 5 else 1 - 1e-6)
    assert int8_kernels(deployed) == len(rounded)


def test_a_method_can_be_kept_to_one_tower() -> None:
    model, example = small_clip(), tuple(x[:2] for x in splits().calibration.inputs)
    quantize = Quantize()
    bits = {"choices": [8, 32], "granularity": "layer", "include": ["text.*"]}
    groups = {"quantize": quantize.groups(model, example)}
    layers = read_layers(model, example)
    space = build_space(
        {"quantize": {"bits": bits}}, {"quantize": quantize}, groups, layers, {"fake": CountingRuntime()}
    )
    trial = FixedTrial(next(iter(space.uniform())))
    plan = space.sample(trial)
    asked = [name for name in trial.params if "@" in name]
    assert asked
    assert all(name.startswith("quantize.bits@text.") for name in asked)
    assert all(layer.startswith("text.") for step in plan.steps for layer in step.per_layer)


def test_only_the_projections_of_joined_networks_learn(tmp_path: Path) -> None:
    model = two_towers(None, None, channels=3, width=8, config=BERT).eval()
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 20, (32, 6), generator=generator)
    data = Split((torch.randn(32, 3, 32, 32, generator=generator), words, torch.ones_like(words)), torch.arange(32))
    assert model(*data.inputs).shape == (32, 2, 8)
    recipe = Probing(epochs=1, batch=16, learn=["vision.head.*", "text.projection.*"])
    trained(model, Splits(data, data, data, data), image_text(), recipe, tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{part}.{kind}" for part in ("vision.head", "text.projection") for kind in ("weight", "bias")}
    with pytest.raises(
        ConfigError, match=r"^model\.training\.learn: 'hat\.\*' matches no parameter; the last ones are "
    ):
        Probing(learn=["hat.*"]).learning(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vision": "none.safetensors", "text": None, "config": BERT},
            r"^model\.network\.vision: none\.safetensors is no file",
        ),
        ({"vision": None, "text": "."}, r"^model\.network\.text: \. has no model\.safetensors"),
    ],
)
def test_a_joined_network_that_is_not_there_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(ConfigError, match=message):
        two_towers(channels=3, **fields)


def test_each_of_the_joined_networks_has_knobs_of_its_own() -> None:
    model = two_towers(None, None, channels=3, width=8, config=BERT).eval()
    example = (torch.randn(2, 3, 32, 32), torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long))
    quantize = Quantize()
    layers, groups = read_layers(model, example), {"quantize": quantize.groups(model, example)}
    bits = {"choices": {"conv": [8, 32], "linear": [8, 32], "embedding": [32]}, "granularity": "block"}
    space = build_space(
        {"quantize": {"bits": bits}}, {"quantize": quantize}, groups, layers, {"fake": CountingRuntime()}
    )
    towers = {knob.name.partition("@")[2].partition(".")[0] for method in space.methods for knob in method.deciding}
    assert towers == {"vision", "text"}
