"""Language models: one file for whole texts and for the next word, and every method that gets through them."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressors.errors import ConfigError, Infeasible
from compressors.fisher import diagonal_fisher
from compressors.layers import read_layers
from compressors.pipeline import Artifact, compress
from compressors.plan import CompressionPlan, Settings, Step, Target
from compressors.prune import Prune
from compressors.rounding import dequantize
from evaluators.decode import Decode
from evaluators.evaluation import Examples
from evaluators.perplexity import Perplexity, surprise
from evaluators.runtime import Deployed
from search.language import CausalLM, language, next_word_loss
from search.pretrained import causal_lm
from search.pyfunc import save_pyfunc
from search.runner import Here
from search.training import FineTuning, trained
from search.trial import Clock, Workbench
from search.workload import Workload
from tests.context import METHODS, workload_context
from tests.fakes import FakeRuntime, deployed
from tests.prose import FAMILIES, GPT, TOKENS, VOCABULARY, small_lm, splits, texts
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.words import CONFIG as BERT

LEARNING: Settings = {"epochs": 1, "temperature": 1.0, "weight": 0.5, "learning_rate": 1e-3}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_library_and_go_on_behind_a_past(family: str) -> None:
    model, words = small_lm(family), texts(3, 0)
    with torch.no_grad():
        whole = model(words)
        torch.testing.assert_close(whole, model.body(input_ids=words).logits, atol=1e-5, rtol=1e-5)
        first, *past = model(words[:, :5], *model.empty_past(3))
        second, *past = model(words[:, 5:6], *past)
        rest, *_ = model(words[:, 6:], *past)
    torch.testing.assert_close(torch.cat([first, second, rest], 1), whole, atol=1e-5, rtol=1e-5)


def test_the_layers_of_gpt2_become_linear_layers_that_do_the_same() -> None:
    from transformers import AutoConfig, GPT2LMHeadModel

    model = causal_lm(config=GPT).eval()
    plain = GPT2LMHeadModel(AutoConfig.for_model(**GPT)).eval()
    state = {
        name: x.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else x
        for name, x in model.get_submodule("body").state_dict().items()
    }
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(texts(2, 0)), plain(texts(2, 0)).logits)
    kinds = {layer.name.removeprefix("body."): layer.kind for layer in read_layers(model, (texts(2, 0),))}
    assert kinds["transformer.h.1.mlp.c_fc"] == kinds["transformer.h.0.attn.c_attn"] == "linear"


def test_a_table_for_both_ends_becomes_two_only_where_that_is_wanted() -> None:
    tables = {True: 2, False: 1}
    for untie, count in tables.items():
        body: Any = small_lm("llama", untie=untie).body
        assert len({id(body.lm_head.weight), id(body.model.embed_tokens.weight)}) == count


def test_what_foresees_no_word_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.network\.config: is a vit, of which the library makes no ForCausal"
    ):
        causal_lm(config={**BERT, "model_type": "vit"})
    mamba = {"model_type": "mamba", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(ConfigError, match=r"^model\.network\.config: is a mamba, which cannot go on behind keys"):
        causal_lm(config=mamba)


def test_texts_longer_than_the_model_has_places_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokens: is 33, and the model has places for 32 words; "):
        causal_lm(config=GPT, channels=33)


def test_the_loss_is_that_of_each_word_from_those_before_it() -> None:
    logits, words = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    wanted = -logits.log_softmax(-1)[:, :4].gather(2, words[:, 1:, None]).mean()
    torch.testing.assert_close(next_word_loss(logits, words), wanted)


def test_it_learns_what_comes_next(tmp_path: Path) -> None:
    data = splits(2048)
    model: nn.Module = small_lm().requires_grad_(True)
    before = next_word_loss(model(data.validation.inputs[0]), data.validation.inputs[0])
    model = trained(model, data, language(), FineTuning(epochs=4, learning_rate=5e-3, batch=32), tmp_path)
    after = next_word_loss(model(data.validation.inputs[0]), data.validation.inputs[0])
    assert after < 0.6 * before


def test_fisher_takes_every_word_for_a_prediction_of_its_own() -> None:
    """Of a model whose logits are its bias, the gradient for a drawn word is its probability, less one where it is."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 0.0, -1.0]))

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(*words.shape, 3)

    model, p = Bias(), torch.tensor([1.0, 0.0, -1.0]).softmax(0)
    found = diagonal_fisher(model, [((torch.zeros(4000, 3),), None)], 4000)
    # Three independent words: variances add up, and the mean of each is zero.
    torch.testing.assert_close(found.squares["bias"], 3 * p * (1 - p), rtol=0.1, atol=0)


def with_rounded_weights(made: Artifact) -> nn.Module:
    """The model that a file of weights alone stands for; what it is given is rounded in the file only."""
    model = copy.deepcopy(made.model)
    for layer, numbers in made.numbers.items():
        if numbers.values is not None and numbers.scales is not None:
            weight = model.get_submodule(layer).get_parameter("weight")
            weight.data = dequantize(numbers.values, numbers.scales)
    return model


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_gets_through_and_the_file_goes_on_behind_a_past(
    tmp_path: Path, family: str, runtime: str
) -> None:
    model, data = small_lm(family), splits()
    context, names = workload_context(model, data, language()), [name for name, _ in model.named_modules()]
    blocks = "body.transformer.h" if family == "gpt2" else "body.model.layers"
    up = f"{blocks}.0.mlp." + ("c_fc" if family == "gpt2" else "gate_proj")
    down = f"{blocks}.0.mlp." + ("c_proj" if family == "gpt2" else "down_proj")
    assert {up, down} <= set(names)
    owner = next(o for o, members in Prune().groups(model, context.example).items() if up in members)
    structure = [Step("depth", {f"{blocks}.1": {"skip": True}}), Step("prune", {owner: {"sparsity": 0.5}})]
    if family == "llama":
        structure.insert(1, Step("heads", {f"{blocks}.0.self_attn.q_proj": {"sparsity": 0.5}}))
    shared = {"weights_alone": True, "group_size": 16}
    rounded = Step("quantize", {"body.lm_head": {"bits": 8}, down: {"bits": 4}}, shared)
    calibrated = Step("quantize", {"body.lm_head": {"bits": 8}})
    plans = [[], [*structure, Step("distill", {}, LEARNING)], [*structure, rounded], [calibrated]]
    words = data.validation.inputs[0]
    for i, steps in enumerate(plans):
        made = compress(model, CompressionPlan(Target(runtime, "fp32"), tuple(steps)), METHODS, context)
        assert isinstance(made.model, CausalLM)
        file = runtime_of(runtime).deploy(made, context, tmp_path / str(i), tmp_path / "cache")
        past = [spec.shape for spec in file.inputs[1:]]
        heads = {"gpt2": 4, "llama": 2 if i in (0, 3) else 1}[family]
        assert past == [(2, heads, 0, 8)] * (4 if i in (0, 3) else 2)
        stands_for = with_rounded_weights(made)
        with torch.no_grad():
            wanted = stands_for(words)
            _, *seen = stands_for(words[:, :7], *made.model.empty_past(64))
        tolerance = 1e-4 if i < 2 else 0.05
        whole = file.run(words.numpy())
        session = file.session(None, 1)
        rest = session(words[:, 7:].numpy(), *(x.numpy() for x in seen))
        for got, right in ((whole, wanted), (rest, wanted[:, 7:])):
            assert np.abs(got - right.numpy()).max() < tolerance * wanted.abs().max()
    assert int8_kernels(file) == 1


def test_a_model_without_any_attention_is_no_candidate(tmp_path: Path) -> None:
    model, data = small_lm(), splits()
    context = workload_context(model, data, language())
    step = Step("depth", {f"body.transformer.h.{i}": {"skip": True} for i in range(2)})
    made = compress(model, CompressionPlan(Target("onnxruntime", "fp32"), (step,)), METHODS, context)
    with pytest.raises(Infeasible, match="no attention is left"):
        runtime_of("onnxruntime").deploy(made, context, tmp_path / "file", tmp_path / "cache")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_alone_take_the_bytes_that_their_bits_say(tmp_path: Path, runtime: str) -> None:
    model, data = small_lm(), splits()
    context = workload_context(model, data, language())
    layer, size = "body.transformer.h.0.mlp.c_fc", {}
    for bits in (32, 8, 4):
        step = Step("quantize", {layer: {"bits": bits}}, {"weights_alone": True, "group_size": 32})
        made = compress(model, CompressionPlan(Target(runtime, "fp32"), (step,)), METHODS, context)
        size[bits] = runtime_of(runtime).deploy(made, context, tmp_path / str(bits), tmp_path / "cache").bytes
    weights = 32 * 128
    assert size[32] - size[8] > 2 * weights  # the operators that read them take some space
    assert size[8] - size[4] == pytest.approx(weights / 2, abs=100)


def examples(logits: torch.Tensor, words: torch.Tensor) -> Examples:
    return Examples("validation", (words.numpy(),), words.numpy(), logits.numpy())


def test_surprise_is_the_loss_window_by_window() -> None:
    model, words = small_lm(), texts(5, 0)
    logits = model(words)
    wanted = [float(next_word_loss(logits[i : i + 1], words[i : i + 1])) for i in range(5)]
    np.testing.assert_allclose(surprise(logits.numpy(), words.numpy()), wanted, rtol=1e-5)


def test_perplexity_and_how_it_compares_with_the_uncompressed_models(tmp_path: Path) -> None:
    model, data = small_lm(), splits()
    words = data.validation.inputs[0]
    context = workload_context(model, data, language())
    made = compress(model, CompressionPlan(Target("onnxruntime", "fp32"), ()), METHODS, context)
    file = runtime_of("onnxruntime").deploy(made, context, tmp_path / "file", tmp_path / "cache")
    perplexity, relative = Perplexity().measure(file, file, examples(model(words), words))
    expected = np.exp(np.mean(surprise(model(words).numpy(), words.numpy())))
    assert perplexity.value == pytest.approx(expected, rel=1e-4)
    assert perplexity.interval[0] < expected < perplexity.interval[1]
    assert relative.value == pytest.approx(1, abs=1e-4)
    # The uncompressed model answers as if all words were alike, so that this file is that much better or worse.
    _, relative = Perplexity().measure(file, file, examples(torch.zeros(64, TOKENS, VOCABULARY), words))
    assert relative.value == pytest.approx(VOCABULARY / expected, rel=1e-4)


def test_perplexity_needs_logits_for_every_word(tmp_path: Path) -> None:
    flat = Examples("validation", (np.zeros((4, 2), np.float32),), None, np.zeros((4, 2), np.float32))
    file = deployed(FakeRuntime(), tmp_path)
    with pytest.raises(Infeasible, match="perplexity needs logits"):
        Perplexity().measure(file, file, flat)


def test_decode_gives_each_file_a_past_of_its_own_shape(tmp_path: Path) -> None:
    model, data = small_lm(), splits()
    context = workload_context(model, data, language())
    timer = Decode(context=9, batch=2, sessions=2, rounds=2, warmup=1, calls=2)
    files: list[Deployed] = []
    for i, steps in enumerate(((), (Step("depth", {"body.transformer.h.1": {"skip": True}}),))):
        made = compress(model, CompressionPlan(Target("onnxruntime", "fp32"), steps), METHODS, context)
        files.append(runtime_of("onnxruntime").deploy(made, context, tmp_path / str(i), tmp_path / "cache"))
    data_ = examples(model(data.validation.inputs[0]), data.validation.inputs[0])
    whole, shorter = (timer.fed(file, data_) for file in files)
    assert [x.shape for x in whole] == [(2, 1), *[(2, 4, 9, 8)] * 4]
    assert [x.shape for x in shorter] == [(2, 1), *[(2, 4, 9, 8)] * 2]
    try:
        ratio, milliseconds = timer.measure(files[1], files[0], data_)
    finally:
        timer.close()
    assert (ratio.name, milliseconds.name) == ("decode_ratio", "decode_ms")
    assert 0.1 < ratio.value < 1.5


@pytest.mark.parametrize(("context", "fails"), [(TOKENS, False), (1000, True)])
def test_a_past_of_more_words_than_the_model_has_places_is_found_before_any_trial(
    context: int, fails: bool, tmp_path: Path
) -> None:
    workload = Workload("prose", small_lm(), splits(), language())
    timer = Decode(name="next", context=context)
    bench = Workbench(workload, METHODS, {"onnxruntime": runtime_of("onnxruntime")}, {"mine": timer}, {}, tmp_path)
    begin = partial(Here, bench, Target("onnxruntime", "fp32"), Clock())
    if not fails:
        begin()
        return
    with pytest.raises(
        Infeasible, match=rf"evaluator\.mine calls it with inputs of shape \(1, 1\), \(1, 4, {context}, 8\)"
    ):
        begin()


def test_decode_needs_a_past(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    data = Examples("validation", (np.zeros((4, 2), np.float32),), None, np.zeros((4, 2), np.float32))
    with pytest.raises(Infeasible, match="decode needs a model that goes on behind a past"):
        Decode().measure(file, file, data)
    with pytest.raises(ConfigError, match=r"^evaluator\.decode\.context: is 0"):
        Decode(context=0)
    with pytest.raises(ConfigError, match=r"^evaluator\.decode\.batch: is 0"):
        Decode(batch=0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_registered_model_takes_words_of_any_number_and_needs_no_past(tmp_path: Path, runtime: str) -> None:
    import mlflow.pyfunc

    model, data = small_lm(), splits()
    context, words = workload_context(model, data, language()), data.validation.inputs[0]
    made = compress(model, CompressionPlan(Target(runtime, "fp32"), ()), METHODS, context)
    file = runtime_of(runtime).deploy(made, context, tmp_path / "file", tmp_path / "cache")
    save_pyfunc(tmp_path / "registered", file.folder, file.runtime, "fp32", file.inputs)
    answer = mlflow.pyfunc.load_model(str(tmp_path / "registered")).predict(words[:3, :7].numpy())
    np.testing.assert_allclose(answer, model(words[:3, :7]).numpy(), atol=1e-4)
