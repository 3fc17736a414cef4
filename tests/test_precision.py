import pytest
import torch
from torch import nn

from compressors.errors import ConfigError
from compressors.precision import check_precision, in_bf16


def networks() -> tuple[nn.Module, nn.Module]:
    """One of dense convolutions, and one in which only the stem and what mixes channels are."""
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    pairs = [nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)) for _ in range(2)]
    return dense, nn.Sequential(nn.Conv2d(3, 8, 3), *pairs)


@pytest.mark.parametrize("amx", [False, True])
def test_auto_takes_bf16_for_dense_convolutions_on_processors_that_have_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    dense, depthwise = networks()
    assert in_bf16("auto", dense) is amx
    assert in_bf16("auto", nn.Linear(4, 4)) is amx
    assert not in_bf16("auto", depthwise)


def test_what_is_asked_for_is_done_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert [in_bf16(precision, network) for precision in ("bf16", "fp32") for network in networks()] == [
            *(True, True),
            *(False, False),
        ]


def test_an_unknown_precision_is_refused_with_its_option() -> None:
    with pytest.raises(ConfigError, match=r"model\.training\.precision.*'half'.*auto, fp32, bf16"):
        check_precision("model.training.precision", "half")
