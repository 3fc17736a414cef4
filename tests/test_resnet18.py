"""What a search of a network of everyday size spends beside training and measuring."""

import statistics
import time
from pathlib import Path

import pytest
import torch

from compressors.layers import read_layers
from compressors.plan import CompressionPlan, Step, Target
from search import build
from search.models import resnet18
from search.sensitivity import guide
from search.study import Search
from search.trial import Clock

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    folder = tmp_path_factory.mktemp("resnet18")
    torch.manual_seed(0)
    torch.save(resnet18(10, 1).state_dict(), folder / "weights.pt")
    words = ("model=resnet18", f"model.checkpoint={folder}/weights.pt", f"folder={folder}", f"cache={folder}/cache")
    return build.build(build.compose([*words]), lambda _progress: None)


def test_sensitivities_take_seconds(search: Search, tmp_path: Path) -> None:
    workload = search.workbench.workload
    layers = read_layers(workload.model, workload.example)
    began = time.perf_counter()
    assert guide(workload, layers, search.workbench.compressors, search.space, tmp_path) is not None
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_bits_of_a_known_prefix_take_half_a_second(search: Search, runtime: str, tmp_path: Path) -> None:
    workload = search.workbench.workload
    layers = [layer.name for layer in read_layers(workload.model, workload.example)]

    def realised(turn: int) -> float:
        bits = {name: {"bits": 32 if (i + turn) % 5 == 0 else 8} for i, name in enumerate(layers)}
        (tmp_path / str(turn)).mkdir()
        plan = CompressionPlan(Target(runtime, "fp32"), (Step("quantize", bits),))
        began = time.perf_counter()
        search.workbench.realise(plan, tmp_path / str(turn), Clock(), None)
        return time.perf_counter() - began

    realised(0)
    assert statistics.median(realised(turn) for turn in range(1, 5)) < 0.5
