"""Trains a changed model on inputs alone, by how sure and how varied its own answers are; asks no label, no teacher."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible
from compressors.pipeline import Applied, Batch, Context
from compressors.plan import Step, digest
from compressors.recovery import Recovery, number, training, whole_epochs


@dataclass(frozen=True)
class Adapt(Recovery):
    """Self-supervised recovery of a classifier: each answer is to be sure, and all of them together varied.

    What is maximised is the information between input and answer (Krause 2010; Liang 2020, arXiv 2002.08546). Entropy
    alone (Tent, Wang 2020, arXiv 2006.10726) lets small pruned nets fall for one class, and agreement under noise too.
    Batch norms take their statistics anew on the way, which alone brings back much of what pruning lost (Li 2020, arXiv
    2007.02491); here all weights learn.

    It is no gain over distillation, whose teacher needs no labels either (distill.weight 1.0), but for a model that may
    not be asked. It does not help once most answers stay wrong with new statistics, for it makes the model sure of
    those too; nor where classes are not about equally frequent, or more of them than a batch has examples.
    """

    method: ClassVar[str] = "adapt"

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`epochs` and `learning_rate`.

        Raises `Infeasible` where outputs are not `(n, classes)`, and as soon as the loss is not finite. The model is in
        eval mode afterwards.
        """
        epochs = whole_epochs(self.method, step.shared)
        if epochs == 0:
            return Applied({"": {"epochs": 0}})
        rate = number(self.method, step.shared, "learning_rate", "more than 0", lambda value: value > 0)

        def loss(batch: Batch) -> Tensor:
            return unsure(model(*batch[0]))

        with training(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(digest([seed, self.method]), 16))
            reached = self.train([*model.parameters()], loss, rate, range(epochs), context)
        return Applied({"": {"epochs": epochs, "loss": reached}})


def unsure(output: Tensor) -> Tensor:
    """Minus the information between input and answer, in nats: `(n, classes)` logits to -log(classes)..0."""
    if output.dim() != 2 or output.shape[1] < 2:
        raise Infeasible(f"adapt needs a classifier: expected outputs (n, classes), not {tuple(output.shape)}")
    logs = F.log_softmax(output, dim=-1)
    each = -(logs.exp() * logs).sum(-1).mean()
    mean = logs.exp().mean(0).clamp_min(torch.finfo(logs.dtype).tiny)
    return each + (mean * mean.log()).sum()
