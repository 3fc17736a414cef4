"""Latency of the next word, behind a text whose keys and values are at hand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressors.errors import Infeasible
from evaluators.evaluation import Examples
from evaluators.latency import Latency
from evaluators.runtime import Array, Deployed


@dataclass
class Decode(Latency):
    """As `Latency`, of one word behind `context` words; what a call adds to the past is not kept.

    Each call is given the whole past, as one that follows on another would be.
    """

    name: str = "decode"
    context: int = 128

    def __post_init__(self) -> None:
        """Refuses what `Latency` does, and a text without a word."""
        super().__post_init__()
        self._at_least(1, "context")

    def fed(self, deployed: Deployed, examples: Examples) -> Sequence[Array]:
        """The first word of each text, and a past whose numbers are drawn; `Infeasible` for a model without any."""
        past = [spec for spec in deployed.inputs if 0 in spec.shape]
        if not past:
            raise Infeasible("decode needs a model that goes on behind a past, as model=causal_lm does")
        words = super().fed(deployed, examples)[0][:, :1]
        drawn = np.random.default_rng(0)
        shapes = [(len(words), *(n or self.context for n in spec.shape[1:])) for spec in past]
        return [words, *(drawn.standard_normal(shape).astype(np.float32) for shape in shapes)]
