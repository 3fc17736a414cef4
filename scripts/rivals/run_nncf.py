"""NNCF on OpenVINO: post-training 8 bits, plain and with accuracy control; the float model in bf16 comes along."""

import nncf
import numpy as np
import openvino as ov

from scripts.rivals.exchange import Exchange

OPENVINO = (("openvino", "fp32"), ("openvino", "bf16"))


def main(exchange: Exchange) -> None:
    """Each result is handed in as soon as it is there."""
    model = ov.Core().read_model(exchange.model)
    _hand_in(exchange, model, "float", "uncompressed")
    examples, _ = exchange.split("calibration")
    calibration = nncf.Dataset([x[None] for x in examples])
    _hand_in(exchange, nncf.quantize(model, calibration, subset_size=len(examples)), "quantize", "int8")
    validation = nncf.Dataset(list(zip(*exchange.split("validation"), strict=True)), lambda pair: pair[0][None])
    controlled = nncf.quantize_with_accuracy_control(model, calibration, validation, _accuracy, max_drop=0.01)
    _hand_in(exchange, controlled, "controlled", "int8 with accuracy control")


def _hand_in(exchange: Exchange, model: ov.Model, name: str, what: str) -> None:
    folder = exchange.place(name)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    exchange.hand_in(folder, what, *OPENVINO)


def _accuracy(model: ov.CompiledModel, data: "list[tuple[np.ndarray, np.integer]]") -> float:
    return float(np.mean([model(image[None])[0].argmax() == label for image, label in data]))


if __name__ == "__main__":
    main(Exchange.from_arguments())
