"""Networks of the transformers library, with the weights of a folder or hub, or with random ones; trains nothing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

import search.torchvision_compat  # noqa: F401  transformers imports torchvision
from compressors.errors import ConfigError
from search.efficientnet import FEATURES, IMAGENET, EfficientNetLite0
from search.image_text import PooledTower, ProjectedText, TwoTowers
from search.language import CausalLM
from search.models import load_checkpoint

Settings = Mapping[str, Any]
HEADS = ("new", "kept")
# Pickles, whose code would be run, and formats of other programs.
FOREIGN = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml")


class SentenceEncoder(nn.Module):
    """The mean of the last hidden states over the words that count, brought to length 1 (Reimers 2019, 1908.10084)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Two tensors `(n, tokens)`, of which the second has a 1 for each word that counts, to `(n, width)`."""
        hidden: Tensor = self.body(input_ids=words, attention_mask=mask).last_hidden_state
        counts = mask[..., None].to(hidden.dtype)
        # Not their mean, whose length would be taken out again.
        return F.normalize((hidden * counts).sum(1), dim=-1)


class TextClassifier(nn.Module):
    """Logits of whole texts."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Two tensors `(n, tokens)`, of which the second has a 1 for each word that counts, to `(n, classes)`."""
        logits: Tensor = self.body(input_ids=words, attention_mask=mask).logits
        return logits


class ImageClassifier(nn.Module):
    """Logits of pictures."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        """`(n, channels, height, width)` to `(n, classes)`."""
        logits: Tensor = self.body(pixel_values=images).logits
        return logits


def sentence_encoder(source: str | None = None, config: Settings | None = None, **_data: int) -> nn.Module:
    """An encoder with the weights of `source`, a folder or a name on the hub; or one with random weights by `config`.

    `config` holds `model_type` and whatever else differs from the library's settings for it.
    """
    body = _network("AutoModel", source, config, {})
    if getattr(body, "pooler", None) is not None:
        body.add_module("pooler", None)  # it would be computed for nothing, and exporters leave it out
    return SentenceEncoder(body)


def text_classifier(
    classes: int, source: str | None = None, config: Settings | None = None, head: str = "new", **_data: int
) -> nn.Module:
    """A classifier of texts, as `sentence_encoder` is made; a `head` new that does not fit begins at random."""
    return TextClassifier(
        _network("AutoModelForSequenceClassification", source, config, {"num_labels": classes}, _is_new(head))
    )


def image_classifier(
    classes: int, channels: int, source: str | None = None, config: Settings | None = None, head: str = "new"
) -> nn.Module:
    """A classifier of pictures such as ViT or DeiT, as `text_classifier` is made."""
    shape = {"num_labels": classes, "num_channels": channels}
    return ImageClassifier(_network("AutoModelForImageClassification", source, config, shape, _is_new(head)))


def clip(source: str | None = None, config: Settings | None = None, **_data: int) -> nn.Module:
    """CLIP's two towers with their projections, made as `sentence_encoder` is."""
    body: Any = _network("AutoModel", source, config, {})
    if not hasattr(body, "visual_projection"):
        problem = f"is a {body.config.model_type}, which has no towers for pictures and captions"
        path = "model.network." + ("source" if config is None else "config")
        raise ConfigError(path, problem, "give one of model_type clip")
    return TwoTowers(
        PooledTower(body.vision_model, body.visual_projection), PooledTower(body.text_model, body.text_projection)
    )


def two_towers(
    vision: str | None, text: str | None, channels: int, width: int = 128, config: Settings | None = None, **_data: int
) -> nn.Module:
    """EfficientNet-Lite0 and a sentence encoder, each with a linear layer into a common space that begins at random.

    `vision` is a file of Lite0's weights for ImageNet, None for random ones; `text` is what `sentence_encoder` takes.
    """
    pictures = EfficientNetLite0(IMAGENET, channels)
    with _told_of("model.network.vision"):
        if vision is not None:
            load_checkpoint(pictures, Path(vision).expanduser())
    with _told_of("model.network.text"):
        captions = sentence_encoder(text, config)
    pictures.head = nn.Linear(FEATURES, width)
    body: Any = captions.get_submodule("body")
    return TwoTowers(pictures, ProjectedText(captions, nn.Linear(body.config.hidden_size, width)))


@contextmanager
def _told_of(option: str) -> Iterator[None]:
    """What is wrong inside is this option's fault, whatever it is called elsewhere."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(option, error.problem, error.remedy) from error


def causal_lm(
    source: str | None = None,
    config: Settings | None = None,
    untie: bool = True,
    channels: int | None = None,
    **_data: int,
) -> nn.Module:
    """A language model such as GPT-2 or Llama, made as `sentence_encoder` is.

    `untie` gives the head a table of its own where it shares that of the embedding. `channels` is the number of words
    in each text of the data.
    """
    body: Any = _network("AutoModelForCausalLM", source, config, {})
    places = getattr(body.config, "max_position_embeddings", None)
    if channels and places and channels > places:
        problem = f"is {channels}, and the model has places for {places} words"
        raise ConfigError("data.tokens", problem, "give a number up to that")
    head, embedding = body.get_output_embeddings(), body.get_input_embeddings()
    if untie and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    _with_linear_layers(body)
    model = CausalLM(body.eval())
    if not _goes_on(model):
        problem = f"is a {body.config.model_type}, which cannot go on behind keys and values that were computed before"
        path = "model.network." + ("source" if config is None else "config")
        raise ConfigError(path, problem, "give one such as gpt2 or llama")
    return model


def _goes_on(model: CausalLM) -> bool:
    """Whether two words give the same at once and one after the other."""
    words = torch.tensor([[0, 1]])
    try:
        with torch.no_grad():
            whole = model(words)
            _, *past = model(words[:, :1], *model.empty_past(1))
            second, *_ = model(words[:, 1:], *past)
    except Exception:  # noqa: BLE001  whatever a model does that keeps something else than keys and values
        return False
    return torch.allclose(second, whole[:, 1:], atol=1e-3 * float(whole.abs().max()))


def _with_linear_layers(body: nn.Module) -> None:
    """GPT-2 has its linear layers as a class of the library's own, with the weight turned round."""
    from transformers.pytorch_utils import Conv1D

    for name, turned in [*body.named_modules()]:
        if isinstance(turned, Conv1D):
            layer = nn.Linear(*turned.weight.shape)
            layer.weight, layer.bias = nn.Parameter(turned.weight.detach().T.contiguous()), turned.bias
            body.set_submodule(name, layer)


def _is_new(head: str) -> bool:
    if head not in HEADS:
        raise ConfigError("model.network.head", f"is {head!r}", f"use one of {', '.join(HEADS)}")
    return head == "new"


def _network(
    kind: str, source: str | None, config: Settings | None, shape: Mapping[str, int], new_head: bool = False
) -> nn.Module:
    """One of the library's automatic classes; attention is written out, with a mask that is finite for calibration."""
    import transformers

    if (source is None) == (config is None):
        problem = "is not set" if source is None else "is set, and so is model.network.config"
        raise ConfigError("model.network.source", problem, "give a folder with weights or a config, and not both")
    auto, options = getattr(transformers, kind), {"attn_implementation": "eager", "dtype": torch.float32}
    if config is not None:
        settings = _configured(config, shape)
        try:
            made: nn.Module = auto.from_config(settings, **options)
        except ValueError as error:
            problem = f"is a {settings.model_type}, of which the library makes no {kind.removeprefix('AutoModel')}"
            raise ConfigError("model.network.config", problem.strip(), "name another model_type") from error
        return made
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # of what does not fit, this module tells itself
    return _loaded(auto, Path(str(source)).expanduser(), {**options, **shape}, new_head)


def _loaded(auto: Any, source: Path, options: Settings, new_head: bool) -> nn.Module:
    """With the weights of a folder, or of what the hub has under this name; without code of theirs."""
    _check_folder(source)
    try:
        model, told = auto.from_pretrained(
            str(source),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=new_head,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"{source} cannot be loaded ({' '.join(str(error).split()).partition('. ')[0][:160]})"
        remedy = "give a folder with config.json and model.safetensors, or a name on a hub that can be reached"
        raise ConfigError("model.network.source", problem, remedy) from error
    missing = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if missing and not new_head:
        problem = f"{source} has no weights for {', '.join(missing[:3])}"
        raise ConfigError("model.network.source", problem, "give a checkpoint of this kind, or train a new head")
    loaded: nn.Module = model
    return loaded


def _configured(config: Settings, shape: Mapping[str, int]) -> Any:
    from transformers import AutoConfig

    given = {**config, **shape}
    try:
        return AutoConfig.for_model(str(given.pop("model_type", "")), **given)
    except (ValueError, TypeError) as error:
        problem = f"makes no network ({' '.join(str(error).split())[:120]})"
        raise ConfigError(
            "model.network.config", problem, "name a model_type such as bert, and its settings"
        ) from error


def _check_folder(folder: Path) -> None:
    """Refuses a folder whose weights would have to be unpickled, or are another program's."""
    if folder.is_file():
        problem = f"{folder} is a file"
        raise ConfigError("model.network.source", problem, "give the folder of config.json and model.safetensors")
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    foreign = sorted(path.name for pattern in FOREIGN for path in folder.glob(pattern))
    problem = f"{folder} has weights in {foreign[0]} only" if foreign else f"{folder} has no model.safetensors"
    raise ConfigError("model.network.source", problem, "save the model as safetensors: model.save_pretrained(FOLDER)")
