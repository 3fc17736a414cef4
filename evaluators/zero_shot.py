"""Accuracy of pictures against classes known by their captions alone; needs pairs of embeddings, and targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressors.errors import Infeasible
from evaluators.accuracy import proportion
from evaluators.cross_retrieval import towers
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed


@dataclass(frozen=True)
class ZeroShot:
    """The share of pictures whose class is the nearest; a class is the mean direction of its captions in the split.

    So prompts are averaged in CLIP (Radford 2021, arXiv 2103.00020, section 3.1.4). Each class needs captions that
    fit all of its pictures: where every picture has a caption and a target of its own, this is recall at 1.
    """

    def metrics(self) -> tuple[Metric, ...]:
        """One: `zero_shot_accuracy`, a share in 0..1."""
        return (Metric("zero_shot_accuracy", "share", "maximize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Outputs are `(n, 2, width)`: picture and caption. Classes that are as near as the right one count against it.

        No preview: a part of the examples may lack a class.
        """
        if examples.targets is None:
            raise Infeasible(f"zero_shot_accuracy needs targets and the {examples.split} split has none")
        pictures, captions = towers(examples.outputs(deployed))
        classes, own = np.unique(examples.targets, return_inverse=True)
        means = np.stack([captions[own == number].mean(axis=0) for number in range(len(classes))])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        similarities = pictures @ means.T
        right = similarities[np.arange(len(own)), own]
        hits = int(((similarities >= right[:, None]).sum(axis=1) == 1).sum())
        return (proportion(self.metrics()[0], hits, len(examples), examples.split),)

    def close(self) -> None:
        """Holds nothing."""
