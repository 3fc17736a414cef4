import pytest
import torch

from compressors.errors import ConfigError
from search.workload import SPLITS, Split, Splits, Workload, checked, classification, fidelity, tensors_digest
from tests.zoo import CLASSES, build, images


def split(count: int = 8) -> Split:
    return Split((images(count),), torch.arange(count) % CLASSES)


def splits(**others: Split) -> Splits:
    parts = {name: split() for name in SPLITS} | others
    return Splits(
        parts["train"], parts["calibration"], parts["validation"], parts["test"], classes=tuple("abcde"), augment=None
    )


def test_good_splits_pass_as_they_are() -> None:
    good = splits()
    assert checked(good, "data") is good


def test_data_without_labels_passes() -> None:
    bare = Split((images(),), None)
    checked(Splits(bare, bare, bare, bare), "data")


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (split(0), "holds no example"),
        (Split((), None), "holds no example"),
        (Split((images(8),), torch.zeros(7, dtype=torch.long)), r"\[8, 7\] rows"),
        (Split((images(8), images(6)), None), r"\[8, 6\] rows"),
        (Split((images(4).index_fill(0, torch.tensor([2]), float("nan")),), None), "example 2 holds NaN"),
        (Split((images(4).index_fill(0, torch.tensor([1]), float("inf")),), None), "example 1 holds NaN"),
        (Split((images(2),), torch.tensor([0, 5])), "from 0 to 5"),
        (Split((images(2),), torch.tensor([-1, 0])), "from -1 to 0"),
    ],
)
def test_a_bad_split_is_refused_by_name_in_one_line(name: str, bad: Split, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        checked(splits(**{name: bad}), "data")
    assert str(error.value).startswith(f"data.{name}: ")
    assert "\n" not in str(error.value)


def test_a_pass_gives_every_example_once_and_shuffling_drops_the_rest() -> None:
    whole = split(10)
    assert [len(targets) for _, targets in whole.batches(4) if targets is not None] == [4, 4, 2]
    assert [len(inputs[0]) for inputs, _ in whole.batches(4, shuffle=True)] == [4, 4]
    assert [len(inputs[0]) for inputs, _ in split(3).batches(4, shuffle=True)] == [3]


def test_fingerprints_tell_weights_and_data_apart() -> None:
    one = Workload("w", build("plain"), splits(), classification())
    same = Workload("w", build("plain"), splits(), classification())
    assert one.fingerprint() == same.fingerprint()
    assert set(one.fingerprint()) == {"model", "network", "answers", "loss", *(f"data.{name}" for name in SPLITS)}
    other = Workload("w", build("plain", seed=1), splits(test=split(6)), classification())
    differing = {key for key, value in other.fingerprint().items() if value != one.fingerprint()[key]}
    assert differing == {"model", "answers", "data.test"}


def test_equal_weights_in_another_forward_are_another_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Workload("w", build("plain"), splits(), classification())
    before = one.fingerprint()
    monkeypatch.setattr(type(one.model), "forward", lambda self, x: -self.head(self.b(self.a(x)).mean((2, 3))))
    assert {key for key, value in one.fingerprint().items() if value != before[key]} == {"answers"}


def test_digests_depend_on_shape_and_type() -> None:
    zeros = torch.zeros(4)
    assert len({tensors_digest([x]) for x in (zeros, zeros.view(2, 2), zeros.int(), zeros.bfloat16())}) == 4
    assert tensors_digest([torch.tensor(3)]) != tensors_digest([torch.tensor(4)])


def test_classification_scores_the_right_class_and_fidelity_needs_none() -> None:
    loss = classification().loss
    assert loss is not None
    assert loss(torch.tensor([[9.0, 0.0]]), torch.tensor([0])) < loss(torch.tensor([[9.0, 0.0]]), torch.tensor([1]))
    assert fidelity().loss is None


def test_the_example_is_two_calibration_inputs() -> None:
    one = Workload("w", build("plain"), splits(), classification())
    assert torch.equal(one.example[0], images(8)[:2])
