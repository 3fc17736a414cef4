"""Networks of transformers: what they answer, which folders they come from, and that every method gets through."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.depth import Depth
from compressors.errors import ConfigError
from compressors.pipeline import compress
from compressors.plan import CompressionPlan, Settings, Step, Target
from compressors.recovery import embedding_loss
from search import build
from search.pretrained import image_classifier, sentence_encoder, text_classifier
from search.text import sentences
from search.training import FineTuning, trained
from search.workload import Splits, classification, embedding
from tests.context import METHODS, workload_context
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.words import CONFIG, save_bert, sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    # Good and bad are told by one word.
    lines = [f"{sentence(i)} {'word7' if i % 2 else 'word8'}\t{'good' if i % 2 else 'bad'}\n" for i in range(400)]
    (folder / "rated.txt").write_text("".join(lines))
    (folder / "plain.txt").write_text("".join(line.partition("\t")[0] + "\n" for line in lines))
    return folder


def splits_of(folder: Path, file: str) -> Splits:
    return sentences(str(folder / file), str(folder), 12, calibration=64, validation=40, test=40)


def test_an_embedding_is_the_mean_over_the_words_that_count(folder: Path) -> None:
    from transformers import BertModel

    encoder = sentence_encoder(str(folder)).eval()
    body = BertModel.from_pretrained(folder).eval()
    words = torch.tensor([[1, 5, 6, 0, 0], [1, 5, 6, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        alone = F.normalize(body(words[:1, :3]).last_hidden_state.mean(1), dim=-1)
        torch.testing.assert_close(encoder(words, mask), alone.expand(2, -1), rtol=1e-4, atol=1e-5)


def test_weights_of_half_precision_are_widened(folder: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    assert {p.dtype for p in sentence_encoder(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [text_classifier, sentence_encoder])
def test_a_configuration_gives_random_weights_from_the_seed(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(3)
    first, second = (make(classes=3, config=CONFIG) for _ in range(2))
    torch.manual_seed(3)
    again = make(classes=3, config=CONFIG)
    states = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, again)]
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


def test_pictures_of_any_channels_are_classified() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = image_classifier(5, 1, config={"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes})
    assert vit(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


def test_a_head_that_is_not_there_is_refused_unless_a_new_one_is_wanted(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has no weights for classifier\.bias, classifier\.weight; .*train a new head"
    ):
        text_classifier(2, str(folder), head="kept")
    model = text_classifier(2, str(folder), head="new")
    encoder = sentence_encoder(str(folder))
    assert torch.equal(
        model.get_parameter("body.bert.embeddings.word_embeddings.weight"),
        encoder.get_parameter("body.embeddings.word_embeddings.weight"),
    )


def test_a_head_of_other_classes_is_refused_unless_a_new_one_is_wanted(tmp_path: Path) -> None:
    save_bert(tmp_path, "BertForSequenceClassification", num_labels=3)
    words, mask = torch.ones(2, 2, 4, dtype=torch.long)
    assert text_classifier(3, str(tmp_path), head="kept")(words, mask).shape == (2, 3)
    assert text_classifier(2, str(tmp_path), head="new")(words, mask).shape == (2, 2)
    with pytest.raises(ConfigError, match=r"^model\.network\.source: .* cannot be loaded"):
        text_classifier(2, str(tmp_path), head="kept")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pytorch_model.bin", r"has weights in pytorch_model\.bin only; save the model as safetensors"),
        ("model.Q4_1.gguf", r"has weights in model\.Q4_1\.gguf only; save the model as safetensors"),
        ("notes.txt", r"has no model\.safetensors"),
    ],
)
def test_weights_that_are_no_safetensors_are_refused(folder: Path, tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=rf"^model\.network\.source: .*{problem}"):
        sentence_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, r"source: is not set; give a folder with weights or"),
        ({"source": "x", "config": CONFIG}, r"source: is set, and so is model\.network\.config"),
        ({"source": __file__}, r"source: .* is a file"),
        ({"config": {"model_type": "bart-like"}}, r"config: makes no network"),
    ],
)
def test_what_makes_no_network_is_refused(given: Mapping[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.network\.{problem}"):
        sentence_encoder(**given)  # type: ignore[arg-type]  # what a configuration may hold


def test_a_name_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^model\.network\.source: nobody/nothing cannot be loaded"):
        sentence_encoder("nobody/nothing")


def test_an_encoder_with_a_new_head_learns_to_classify(folder: Path, tmp_path: Path) -> None:
    splits = splits_of(folder, "rated.txt")
    torch.manual_seed(0)
    model = text_classifier(2, str(folder))
    recipe = FineTuning(epochs=10, learning_rate=3e-3, batch=16)
    model = trained(model, splits, classification(), recipe, tmp_path)
    with torch.no_grad():
        right = model(*splits.validation.inputs).argmax(-1) == splits.validation.targets
    assert right.float().mean() > 0.9


# -- Every method, on two inputs


LEARNING: Settings = {"epochs": 2, "temperature": 1.0, "weight": 1.0, "learning_rate": 3e-3}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def test_recovery_turns_embeddings_back(folder: Path) -> None:
    model, splits = sentence_encoder(str(folder)).eval().requires_grad_(False), splits_of(folder, "plain.txt")
    context, left = workload_context(model, splits, embedding()), copy.deepcopy(model)
    Depth().apply(left, Step("depth", {"body.encoder.layer.1": {"skip": True}}), context, 0)
    inputs = splits.validation.inputs
    before = cosine(left(*inputs), model(*inputs))
    told = METHODS["distill"].apply(left, Step("distill", {}, LEARNING), context, 0).achieved[""]
    with torch.no_grad():
        after = cosine(left(*inputs), model(*inputs))
    assert after > before + 0.1
    assert float(told["loss"]) == pytest.approx(1 - after, abs=0.1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_method_gets_through_and_deploys(folder: Path, tmp_path: Path, runtime: str) -> None:
    model, splits = sentence_encoder(str(folder)).eval().requires_grad_(False), splits_of(folder, "plain.txt")
    context = workload_context(model, splits, embedding())
    first, second = (f"body.encoder.layer.{i}" for i in range(2))
    rounded = [f"{first}.{layer}" for layer in ("attention.self.query", "intermediate.dense", "output.dense")]
    structure = (
        Step("depth", {second: {"skip": True}}),
        Step("heads", {f"{first}.attention.self.query": {"sparsity": 0.5}}),
        Step("prune", {f"{first}.intermediate.dense": {"sparsity": 0.5}}),
        Step("lowrank", {f"{first}.attention.output.dense": {"rank": 0.5}}),
        Step("distill", {}, LEARNING),
    )
    numbers = (
        Step("quantize", {name: {"bits": 8} for name in rounded}),
        Step("cluster", {"body.embeddings.word_embeddings": {"clusters": 16}}),
    )
    inputs = splits.validation.inputs
    sizes = []
    for steps in ((), structure, (*structure, *numbers)):
        made = compress(model, CompressionPlan(Target(runtime, "fp32"), steps), METHODS, context)
        deployed = runtime_of(runtime).deploy(made, context, tmp_path / str(len(steps)), tmp_path / "cache")
        got = torch.from_numpy(deployed.run(*(x.numpy() for x in inputs)))
        with torch.no_grad():
            assert cosine(got, made.model(*inputs)) > (0.97 if len(steps) > 5 else 1 - 1e-6)
        sizes.append(deployed.bytes)
    assert int8_kernels(deployed) == len(rounded)
    assert sizes[1] < 0.7 * sizes[0]


def test_a_search_is_built_from_a_folder_and_a_file(folder: Path, store: Path) -> None:
    options = [
        *("model=sentence_encoder", f"model.network.source={folder}", "task=embedding", "quality=fidelity"),
        *("data=sentences", f"data.file={folder}/plain.txt", "data.tokens=12"),
        *("data.calibration=64", "data.validation=40", "data.test=40"),
        *("compressor=[depth,heads,prune,distill,quantize]", "evaluator=[fidelity,latency,size]"),
        *(f"folder={store}", f"cache={store}/cache"),
    ]
    search = build.build(build.compose(options), lambda _: None)
    assert [method.name for method in search.space.methods] == ["depth", "heads", "prune", "distill", "quantize"]
    assert search.sparing, "every one of them can be guided"
    assert search.workbench.workload.task.imitation is embedding_loss
    assert search.workbench.workload.example[1].sum(1).tolist() != [12, 12]


def test_a_new_head_that_nothing_trains_is_refused(folder: Path, store: Path) -> None:
    options = [
        *("model=text_classifier", f"model.network.source={folder}", "model.training=null"),
        *("data=sentences", f"data.file={folder}/rated.txt", "data.tokens=12"),
        *("data.calibration=64", "data.validation=40", "data.test=40", f"folder={store}", f"cache={store}/cache"),
    ]
    with pytest.raises(ConfigError, match=r"^model\.checkpoint: is not set and .* or model\.network\.head=kept"):
        build.build(build.compose(options), lambda _: None)
