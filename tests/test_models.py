from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from compressors.errors import ConfigError
from search.models import check_model, load_checkpoint, resnet18, resnet20, torchvision
from tests.zoo import build, images


def outputs(model: nn.Module, channels: int, size: int) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.zeros(2, channels, size, size))  # type: ignore[no-any-return]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [resnet20, resnet18])
def test_networks_take_small_images(make: Callable[..., nn.Module], channels: int) -> None:
    assert outputs(make(classes=7, channels=channels), channels, 28).shape == (2, 7)


def test_resnet20_has_the_size_the_paper_gives() -> None:
    model = resnet20(classes=10, channels=3)
    assert 270_000 < sum(p.numel() for p in model.parameters()) < 275_000
    assert {"stem", "layer1.0.conv1", "layer3.2.conv2", "head"} <= dict(model.named_modules()).keys()


def test_the_stride_of_resnet18_quarters_the_work() -> None:
    def stem(stride: int) -> tuple[int, ...]:
        return tuple(resnet18(2, 1, stride).get_submodule("conv1")(torch.zeros(1, 1, 28, 28)).shape)

    assert (stem(1), stem(2)) == ((1, 64, 28, 28), (1, 64, 14, 14))


@pytest.mark.parametrize(("name", "channels"), [("mobilenet_v3_small", 1), ("squeezenet1_1", 3)])
def test_any_torchvision_model_comes_by_name(name: str, channels: int) -> None:
    assert outputs(torchvision(name, classes=4, channels=channels), channels, 64).shape == (2, 4)


@pytest.mark.parametrize(("name", "close"), [("mobilenet_v3", "mobilenet_v3_large"), ("resnet_18", "resnet18")])
def test_an_unknown_name_is_met_with_close_ones(name: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{close}"):
        torchvision(name, classes=4, channels=3)


def safetensors_file(state: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(state, path)


def nested_file(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("w.safetensors", safetensors_file), ("w.pt", torch.save), ("w.pth", torch.save), ("n.pt", nested_file)],
)
def test_weights_come_back(tmp_path: Path, name: str, save: Callable[[Any, Path], None]) -> None:
    source, model = build("residual", seed=1), build("residual", seed=2)
    save(source.state_dict(), tmp_path / name)
    load_checkpoint(model, tmp_path / name)
    assert torch.equal(model(images()), source(images()))


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": Trap(tmp_path / "mark")}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="plain weights"):
        load_checkpoint(build("plain"), tmp_path / "w.pt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("content", [b"", b"not weights", bytes(range(256)) * 8, b"PK\x03\x04 torn"])
def test_an_unreadable_checkpoint_is_named_in_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as error:
        load_checkpoint(build("plain"), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torn_checkpoint_is_unreadable(tmp_path: Path) -> None:
    for name, save in (("w.safetensors", safetensors_file), ("w.pt", torch.save)):
        path = tmp_path / name
        save(build("plain").state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ConfigError, match="cannot be read"):
            load_checkpoint(build("plain"), path)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no file"):
        load_checkpoint(build("plain"), tmp_path / "gone.pt")


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="no state dict"):
        load_checkpoint(build("plain"), tmp_path / "w.pt")


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = build("plain").state_dict()
    state["head.weight"] = torch.zeros(9, 32)
    state["extra"] = state.pop("head.bias")
    torch.save(state, tmp_path / "w.pt")
    said = r"head.bias is missing, extra is unknown, head.weight is \(9, 32\), not \(5, 32\)"
    with pytest.raises(ConfigError, match=said):
        load_checkpoint(build("plain"), tmp_path / "w.pt")


def test_a_fitting_model_passes() -> None:
    check_model(build("plain"), (images(),), classes=5)


def test_a_wrong_input_shape_names_both_shapes() -> None:
    with pytest.raises(ConfigError, match=r"\(n, 3, height, width\).*\(2, 1, 12, 12\)"):
        check_model(build("plain"), (torch.zeros(2, 1, 12, 12),))
    with pytest.raises(ConfigError, match=r"432\).*\(2, 7\)"):
        check_model(nn.Linear(432, 5), (torch.zeros(2, 7),))


def test_too_many_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="it takes"):
        check_model(build("plain"), (images(), images()))


def test_an_output_that_is_not_finite_is_refused() -> None:
    model = build("plain")
    nn.init.constant_(model.get_parameter("head.bias"), float("nan"))
    with pytest.raises(ConfigError, match="NaN"):
        check_model(model, (images(),))


def test_an_output_for_other_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 5\).*\(2, 10\)"):
        check_model(build("plain"), (images(),), classes=10)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ConfigError, match="tuple"):
        check_model(Two(), (images(),))
