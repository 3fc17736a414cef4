from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressors.errors import ConfigError
from search.data import digits
from search.models import resnet20
from search.training import Recipe, TrainingProgress, trained
from search.workload import Split, Splits, classification, fidelity

RECIPE = Recipe(epochs=3, learning_rate=0.5, batch=16, weight_decay=0.0)


def squares(count: int, seed: int) -> Split:
    """Whether the left or the right half of a small picture is bright."""
    made = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    inputs = torch.randn(count, 1, 4, 4, generator=made)
    inputs[..., :2] += (1.0 - 2.0 * targets)[:, None, None, None]
    return Split((inputs,), targets)


def splits() -> Splits:
    return Splits(squares(100, 0), squares(20, 1), squares(20, 2), squares(20, 3), classes=("left", "right"))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def accuracy(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float((model(*split.inputs).argmax(1) == split.targets).float().mean())


def weights(model: nn.Module) -> Tensor:
    return torch.cat([x.flatten().float() for x in model.state_dict().values()])


def test_it_learns_and_tells_how_far_it_is(tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    model = trained(network(), splits(), classification(), RECIPE, tmp_path, seen.append)
    assert accuracy(model, splits().test) >= 0.9
    assert not model.training
    steps = [progress.step for progress in seen if progress.epoch == 0]
    assert steps == list(range(1, 7))
    last = seen[-1]
    assert (last.step, last.steps, last.epoch, last.epochs) == (18, 18, 3, 3)
    assert last.accuracy == accuracy(model, splits().calibration)


def test_the_same_training_gives_the_same_weights_whatever_was_drawn_before(tmp_path: Path) -> None:
    first = trained(network(), splits(), classification(), RECIPE, tmp_path / "a")
    torch.rand(5)
    state = torch.get_rng_state()
    second = trained(network(), splits(), classification(), RECIPE, tmp_path / "b")
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(state, torch.get_rng_state())


def test_it_trains_once(tmp_path: Path) -> None:
    first = trained(network(), splits(), classification(), RECIPE, tmp_path)
    seen: list[TrainingProgress] = []
    second = trained(network(), splits(), classification(), RECIPE, tmp_path, seen.append)
    assert seen == []
    assert torch.equal(weights(first), weights(second))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_another_start_recipe_or_train_split_is_another_training(tmp_path: Path) -> None:
    trained(network(), splits(), classification(), RECIPE, tmp_path)
    trained(network(seed=1), splits(), classification(), RECIPE, tmp_path)
    trained(network(), splits(), classification(), replace(RECIPE, seed=1), tmp_path)
    trained(network(), replace(splits(), train=squares(80, 9)), classification(), RECIPE, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    trained(network(), replace(splits(), test=squares(8, 9)), classification(), RECIPE, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_torn_file_is_trained_again_with_a_note(tmp_path: Path) -> None:
    first = trained(network(), splits(), classification(), RECIPE, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.warns(UserWarning, match="training again"):
        second = trained(network(), splits(), classification(), RECIPE, tmp_path)
    assert torch.equal(weights(first), weights(second))
    trained(network(), splits(), classification(), RECIPE, tmp_path, lambda _: pytest.fail("it is whole again"))


def test_tied_weights_can_be_kept(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
        model[2].weight = model[1].weight
        return model

    torch.manual_seed(0)
    start = tied()
    again = tied()
    again.load_state_dict(start.state_dict())
    recipe = replace(RECIPE, learning_rate=0.05)
    first = trained(start, splits(), classification(), recipe, tmp_path)
    second = trained(again, splits(), classification(), recipe, tmp_path, lambda _: pytest.fail("it is kept"))
    assert torch.equal(weights(first), weights(second))


def test_one_short_batch_is_enough(tmp_path: Path) -> None:
    few = replace(splits(), train=squares(4, 0))
    model = trained(network(), few, classification(), Recipe(epochs=1, learning_rate=0.1, batch=64), tmp_path)
    assert not torch.equal(weights(model), weights(network()))


def test_a_loss_that_explodes_names_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        trained(network(), splits(), classification(), replace(RECIPE, learning_rate=1e30), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        trained(
            network(),
            splits(),
            classification(),
            RECIPE,
            tmp_path / "file" / "cache",
            lambda _: pytest.fail("it trained"),
        )


def test_without_labels_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.checkpoint"):
        trained(network(), splits(), fidelity(), RECIPE, tmp_path)
    bare = replace(splits(), train=Split(splits().train.inputs, None))
    with pytest.raises(ConfigError, match="no labels"):
        trained(network(), bare, classification(), RECIPE, tmp_path)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": -0.1}, {"batch": 0}])
def test_a_senseless_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.training.{next(iter(wrong))}"):
        replace(RECIPE, **wrong)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.training\.precision"):
        replace(RECIPE, precision="half")


def test_in_bfloat16_the_weights_stay_float_and_come_out_otherwise(tmp_path: Path) -> None:
    whole = trained(network(), splits(), classification(), RECIPE, tmp_path)
    half = trained(network(), splits(), classification(), replace(RECIPE, precision="bf16"), tmp_path)
    assert all(p.dtype is torch.float32 for p in half.parameters())
    assert accuracy(half, splits().test) >= 0.9
    assert not torch.equal(weights(half), weights(whole))


def test_the_faster_precision_is_the_same_training_as_the_one_it_turns_out_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    trained(network(), splits(), classification(), replace(RECIPE, precision="auto"), tmp_path)
    trained(network(), splits(), classification(), RECIPE, tmp_path, lambda _: pytest.fail("it is kept"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_workload_is_learnt(tmp_path: Path, seed: int) -> None:
    data = digits(seed=seed)
    torch.manual_seed(seed)
    model = trained(resnet20(classes=10, channels=1), data, classification(), Recipe(seed=seed), tmp_path)
    assert accuracy(model, data.test) >= 0.98
