"""Torch-Pruning at ratios picked by hand and distilled, in ONNX Runtime, OpenVINO bf16 and NNCF int8."""

import copy
import math
import time
import warnings
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import safetensors.torch
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from scripts.rivals.exchange import Exchange
from search import models
from search.data import varied

# Ratio of channels removed, widths are multiples of, epochs of distillation.
PICKED = ((0.5, 8, 8), (0.75, 4, 12), (0.875, 2, 14))
BATCH, RATE, TEMPERATURE, SPARE_S = 64, 0.05, 4.0, 10.0


def main(exchange: Exchange) -> None:
    """What is left of the time is shared evenly among the ratios that are still to come."""
    teacher = _network(exchange)
    for i, (ratio, multiple, epochs) in enumerate(PICKED):
        model = copy.deepcopy(teacher)
        _prune(model, exchange, ratio, multiple)
        share = (exchange.deadline - time.time()) / (len(PICKED) - i) - SPARE_S
        _distill(model, teacher, exchange, epochs, time.time() + share)
        _hand_in(model, exchange, f"prune {100 * ratio:g} %")


def _network(exchange: Exchange) -> nn.Module:
    about = exchange.about()
    build = {"resnet20": models.resnet20, "resnet18": models.resnet18}[about["network"]]
    model = build(**about["arguments"])
    safetensors.torch.load_model(model, exchange.inputs / "weights.safetensors")
    return model.eval()


def _example(exchange: Exchange) -> Tensor:
    return torch.from_numpy(exchange.split("calibration")[0][:2])


def _prune(model: nn.Module, exchange: Exchange, ratio: float, multiple: int) -> None:
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        _example(exchange),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=multiple,
        ignored_layers=[last],
    )
    pruner.step()


def _distill(model: nn.Module, teacher: nn.Module, exchange: Exchange, epochs: int, until: float) -> None:
    """One cycle of SGD over `epochs`, or as much of them as fits: the schedule ends by then in either case."""
    inputs, targets = map(torch.from_numpy, exchange.split("train"))
    augment, began = exchange.about()["augment"], time.time()
    steps, step = max(1, epochs * (len(targets) // BATCH)), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.train()
    while (done := max(step / steps, (time.time() - began) / max(until - began, 1e-9))) < 1:
        rows = torch.randint(len(targets), (BATCH,))
        images = varied(inputs[rows], **augment)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(done / 0.1, 0.5 * (1 + math.cos(math.pi * done))) + 1e-5
        with torch.no_grad():
            wanted = teacher(images)
        loss = _loss(model(images), wanted, targets[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
    model.eval()


def _loss(output: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    """Half the labels', half the teacher's at a higher temperature (Hinton 2015, arXiv 1503.02531)."""
    soft = F.kl_div(
        F.log_softmax(output / TEMPERATURE, 1),
        F.log_softmax(wanted / TEMPERATURE, 1),
        log_target=True,
        reduction="batchmean",
    )
    return 0.5 * F.cross_entropy(output, targets) + 0.5 * TEMPERATURE**2 * soft


def _hand_in(model: nn.Module, exchange: Exchange, what: str) -> None:
    name = what.replace(" ", "").replace("%", "")
    folder = exchange.place(name)
    _export(model, _example(exchange), folder / "model.onnx")
    exchange.hand_in(folder, what, ("onnxruntime", "fp32"))
    graph = ov.Core().read_model(folder / "model.onnx")
    _save(graph, exchange, f"{name}-openvino", what, "bf16")
    examples: np.ndarray = exchange.split("calibration")[0]
    int8 = nncf.quantize(graph, nncf.Dataset([x[None] for x in examples]), subset_size=len(examples))
    _save(int8, exchange, f"{name}-int8", f"{what}, int8", "fp32", "bf16")


def _save(graph: ov.Model, exchange: Exchange, name: str, what: str, *precisions: str) -> None:
    folder = exchange.place(name)
    ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    exchange.hand_in(folder, what, *(("openvino", precision) for precision in precisions))


def _export(model: nn.Module, example: Tensor, path: Path) -> None:
    free = {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the older exporter takes a second, the newer one eight
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            input_names=["input_0"],
            output_names=["output_0"],
            dynamic_axes={"input_0": free, "output_0": free},
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Exchange.from_arguments())
