"""The networks that can be compressed, and a user's own weights for them; trains nothing."""

import difflib
import pickle  # for the name of torch.load's error; nothing is unpickled
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import ConfigError
from search.torchvision_compat import torchvision as load_torchvision


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a 1x1 convolution fits the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h / stride, w / stride)`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """He 2015 (arXiv 1512.03385), section 4.2: three stages of 16, 32 and 64 channels for small images.

    Where the paper pads the shortcut with zeros, ours is a 1x1 convolution: padding deploys badly.
    """

    def __init__(self, blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        self.stem, self.norm = _conv(channels, 16, 3, 1), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, channels, h, w)` to `(n, classes)`."""
        x = F.relu(self.norm(self.stem(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet20(classes: int, channels: int) -> nn.Module:
    """About 272 thousand parameters, made for images of 28 to 32 pixels."""
    return SmallResNet(blocks=3, classes=classes, channels=channels)


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet18(classes: int, channels: int, stride: int = 1) -> nn.Module:
    """ResNet-18 of torchvision with a 3x3 stem and no max-pool, for small images; stride 2 costs a quarter."""
    model: nn.Module = load_torchvision().models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, stride, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def torchvision(name: str, classes: int, channels: int) -> nn.Module:
    """A classification model of torchvision by name, without weights, for so many classes and input channels."""
    models = load_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or ", ".join(known[:3])
        raise ConfigError("model.network.name", f"torchvision has no model {name!r}", f"did you mean {close}?")
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    if channels != 3:
        _take_channels(model, channels)
    return model


def _take_channels(model: nn.Module, channels: int) -> None:
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    conv = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    model.set_submodule(name, conv)


# What torch and safetensors raise for files that are torn, foreign, or hold code.
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Put the weights of a `.safetensors`, `.pt` or `.pth` state dict into `model`; code in the file is never run."""
    if not path.is_file():
        raise ConfigError("model.checkpoint", f"{path} is no file", "give a .safetensors, .pt or .pth state dict")
    try:
        state = _state(path)
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[0][:120]
        problem = f"{path} cannot be read as plain weights ({reason})"
        raise ConfigError("model.checkpoint", problem, "save model.state_dict() again, best as safetensors") from error
    _check_state(state, model.state_dict(), path)
    model.load_state_dict(state)


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)  # type: ignore[no-any-return]
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds no state dict")
    return state


def _check_state(given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        problem = f"{path} does not fit the network: {', '.join(wrong[:3])}{more}"
        raise ConfigError("model.checkpoint", problem, "choose the network and the classes it was trained for")


def check_model(model: nn.Module, example: tuple[Tensor, ...], classes: int | None = None) -> None:
    """Refuse a model that cannot take the data, whose output is not finite, or is not `(n, classes)` where given."""
    shapes = ", ".join(str(tuple(x.shape)) for x in example)
    try:
        with torch.no_grad():
            output = model.eval()(*example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        problem = f"it takes {_expected(model)}, the data has {shapes} ({str(error).splitlines()[0][:120]})"
        raise ConfigError("model", problem, "choose data.size and channels that fit, or another model") from error
    if not isinstance(output, Tensor):
        raise ConfigError("model", f"its output is a {type(output).__name__}", "wrap it so that it gives one tensor")
    if not torch.isfinite(output).all():
        raise ConfigError("model", "its output holds NaN or infinity", "check its weights and the data's scale")
    if classes is not None and output.shape != (len(example[0]), classes):
        problem = f"its output is {tuple(output.shape)}, the data asks for {(len(example[0]), classes)}"
        raise ConfigError("model", problem, "use a model with as many outputs as there are classes")


def _expected(model: nn.Module) -> str:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            return f"(n, {layer.in_channels}, height, width) at {name}"
        if isinstance(layer, nn.Linear):
            return f"(..., {layer.in_features}) at {name}"
    return "another shape"
