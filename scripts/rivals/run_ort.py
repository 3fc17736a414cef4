"""ONNX Runtime's static quantization: unsigned activations, signed weights per channel, in both of its formats."""

from collections.abc import Iterator

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from scripts.rivals.exchange import Exchange

ONNXRUNTIME = ("onnxruntime", "fp32")


class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
    """The calibration split, one example at a time."""

    def __init__(self, exchange: Exchange) -> None:
        inputs, _ = exchange.split("calibration")
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([{"input_0": x[None]} for x in inputs])

    def get_next(self) -> "dict[str, np.ndarray] | None":
        """None at the end, as the quantizer wants it."""
        return next(self._feeds, None)


def main(exchange: Exchange) -> None:
    """The prepared float model, then QOperator, then QDQ."""
    prepared = exchange.place("float")
    quant_pre_process(str(exchange.model), str(prepared / "model.onnx"))
    exchange.hand_in(prepared, "uncompressed", ONNXRUNTIME)
    for form in (QuantFormat.QOperator, QuantFormat.QDQ):
        folder = exchange.place(form.name.lower())
        quantize_static(
            str(prepared / "model.onnx"),
            str(folder / "model.onnx"),
            Reader(exchange),
            quant_format=form,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        exchange.hand_in(folder, f"int8 {form.name}", ONNXRUNTIME)


if __name__ == "__main__":
    main(Exchange.from_arguments())
