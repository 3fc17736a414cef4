"""The data sets that Olive's configuration names, registered in the process that Olive runs in; read by Olive alone."""

import os
from pathlib import Path

import numpy as np
import torch
from olive.data.registry import Registry
from torch import Tensor


class Pairs(torch.utils.data.Dataset[tuple[dict[str, Tensor], Tensor]]):
    """One split, as Olive wants it: a dictionary of inputs, and the target."""

    def __init__(self, split: str) -> None:
        with np.load(Path(os.environ["RIVAL_INPUTS"]) / f"{split}.npz", allow_pickle=False) as stored:
            self._inputs, self._targets = map(torch.from_numpy, (stored["inputs"], stored["targets"]))

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"input_0": self._inputs[i]}, self._targets[i]


@Registry.register_dataset()  # type: ignore[untyped-decorator]
def one_split(split: str, **_: object) -> Pairs:
    """By its name in the exchange folder."""
    return Pairs(split)


@Registry.register_post_process()  # type: ignore[untyped-decorator]
def most_likely(output: Tensor, **_: object) -> Tensor:
    """The label of each row of logits."""
    return output.argmax(1)
