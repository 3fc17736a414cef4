"""Whether pictures and captions are as alike as the uncompressed model finds them; needs pairs of embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.cross_retrieval import Rows, towers
from evaluators.evaluation import Examples
from evaluators.fidelity import average, cosines
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed


@dataclass(frozen=True)
class Similarity:
    """The mean over pictures of how their similarities to all captions correlate with the uncompressed model's.

    It sees what recall does not: whether wrong captions keep their order. A split has as many captions as examples, and
    a part of it has other ones, so there is no preview.
    """

    def metrics(self) -> tuple[Metric, ...]:
        """One: `similarity_agreement`, Pearson's correlation, at most 1."""
        return (Metric("similarity_agreement", "correlation", "maximize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Outputs are `(n, 2, width)`: picture and caption."""
        scores = cosines(_centred(*towers(examples.outputs(deployed))), _centred(*towers(examples.original)))
        return (average(self.metrics()[0], scores, examples.split),)

    def close(self) -> None:
        """Holds nothing."""


def _centred(pictures: Rows, captions: Rows) -> Rows:
    # The mean over captions of a picture's similarities is its similarity to their mean.
    return np.asarray(pictures @ (captions - captions.mean(axis=0)).T)
