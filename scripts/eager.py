"""The uncompressed network as torch runs it, operation by operation: what deployed versions are compared with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray

from compressors.errors import Infeasible
from compressors.layers import first_output
from compressors.pipeline import Artifact, Context
from evaluators.export import input_specs
from evaluators.runtime import Array, Deployed, Loader, Session, Support


@dataclass(frozen=True)
class Eager:
    """Takes nothing but the network itself, of which `network` names the class and its arguments.

    Unlike what a search deploys, its files can be loaded only where the network's own code is.
    """

    network: Mapping[str, Any]

    @property
    def name(self) -> str:
        """How plans and tables refer to it."""
        return "torch"

    def precisions(self) -> tuple[str, ...]:
        """As the weights are."""
        return ("fp32",)

    def support(self, kind: str, bits: int) -> Support:
        """Nothing is quantized."""
        return Support.KERNEL if bits == 32 else Support.REFUSED

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> Deployed:
        """Write weights and network; `Infeasible` for a changed one, which its class could not make."""
        if artifact.plan.steps:
            raise Infeasible("torch runs the uncompressed network only: expected a plan without steps")
        weights = {name: x.clone().contiguous() for name, x in artifact.model.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "weights.safetensors")
        (folder / "network.json").write_text(json.dumps(dict(self.network)))
        return Deployed(self, folder, "fp32", input_specs(artifact.model, context.example))

    def loader(self) -> Loader:
        """`load_eager`."""
        return load_eager

    def requirements(self) -> tuple[str, ...]:
        """The installed torch."""
        return (f"torch=={version('torch')}",)

    def kernels(self, deployed: Deployed) -> Mapping[str, str]:
        """It does not tell."""
        return {}


def load_eager(folder: str, precision: str, batch: int | None, threads: int) -> Session:  # noqa: ARG001
    """Takes any batch size; `threads` 0 leaves their number as it is."""
    if threads:
        torch.set_num_threads(threads)
    model = instantiate(json.loads((Path(folder) / "network.json").read_text()))
    model.load_state_dict(safetensors.torch.load_file(Path(folder) / "weights.safetensors"))
    model.eval()

    def run(*inputs: Array) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(first_output(model(*map(torch.from_numpy, inputs))).numpy(), np.float32)

    return run
