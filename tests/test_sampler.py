"""The guided sampler: Optuna's own contract, determinism, speed, and how soon it finds a front that is known."""

from collections.abc import Callable

import numpy as np
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase
from optuna.trial import Trial

from compressors.fisher import Effect
from compressors.plan import LayerSpec, Scalar
from search.sampler import GuidedSampler
from search.solver import Guide, Variant

BITS = (2, 3, 4, 6, 8)


def make_guide(layers: int, seed: int = 0) -> Guide:
    """A chain of layers with one knob for each one's bits; the loss falls fourfold with every bit."""
    rng = np.random.default_rng(seed)
    specs = []
    effects: dict[str, dict[Scalar, Effect]] = {}
    for i in range(layers):
        params = int(10 ** rng.uniform(2, 4))
        specs.append(LayerSpec(f"l{i}", "linear", (params, 1), params, params))
        scale = 10 ** rng.uniform(-2, 1)
        effects[f"bits@l{i}"] = {b: Effect(scale * 4.0**-b, bits={f"l{i}": b}) for b in BITS}
    return Guide(tuple(specs), (Variant({}, effects),))


def ask_all(trial: Trial, guide: Guide) -> dict[str, int]:
    return {name: int(trial.suggest_categorical(name, BITS)) for name in guide.variants[0].effects}


class TestContract(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return GuidedSampler


class TestContractWithGuide(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: GuidedSampler(make_guide(3))
