"""Bits and sparsity of every layer in every member of the front, as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from compressors.layers import inside
from compressors.plan import LayerSpec, Scalar, Settings
from search.trial import TrialRecord

FULL_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}


# A layer that is not there any more.
OUT = "#8b949e"


def layers_png(front: Sequence[TrialRecord], layers: Sequence[LayerSpec], path: Path) -> None:
    """Bits and sparsity of every layer (columns) in every front member (rows).

    What a method did to a group of layers stands at the layer that names the group; layers that are out are grey.
    """
    rows = sorted(front, key=lambda r: r.number)
    height = 2.2 + 0.5 * len(rows) + 0.09 * max((len(layer.name) for layer in layers), default=0)
    figure = Figure(figsize=(max(8.0, 2.6 + 0.36 * len(layers)), max(4.5, height)), dpi=100, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    colours = ListedColormap(["#0b3c6f", "#1f77b4", "#86bbdd", "#eef3f8"]).with_extremes(bad=OUT)
    limits = BoundaryNorm([0, 4.5, 8.5, 16.5, 33], colours.N)
    image = top.imshow(_grid(rows, layers, "bits"), aspect="auto", cmap=colours, norm=limits)
    bar = figure.colorbar(image, ax=top, ticks=[2.2, 6.5, 12.5, 24.7])
    bar.ax.set_yticklabels(["4 or fewer", "8", "16", "32"])
    oranges = colormaps["Oranges"].with_extremes(bad=OUT)
    image = bottom.imshow(100 * _grid(rows, layers, "sparsity"), aspect="auto", cmap=oranges, vmin=0, vmax=100)
    figure.colorbar(image, ax=bottom)
    for axes, title in (
        (top, "bits (grey: the layer was left out)"),
        (bottom, "sparsity, % (a group stands at the layer that names it)"),
    ):
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_yticks(range(len(rows)), [_row_name(r) for r in rows], fontsize=10)
        axes.set_xticks(np.arange(0.5, len(layers)), minor=True)
        axes.set_yticks(np.arange(0.5, len(rows)), minor=True)
        axes.grid(which="minor", color="#c9d1d9", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    bottom.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=90, fontsize=10)
    FigureCanvasAgg(figure).print_png(path)


def _row_name(record: TrialRecord) -> str:
    return f"{record.number} · {record.plan.target.runtime} {record.plan.target.precision}"


def _grid(rows: Sequence[TrialRecord], layers: Sequence[LayerSpec], key: str) -> NDArray[np.float64]:
    """`(rows, layers)`: what any method achieved under that key, else the value of an untouched layer; NaN if out."""
    return np.array([[_achieved(r, layer, key) for layer in layers] for r in rows], dtype=np.float64)


def _achieved(record: TrialRecord, layer: LayerSpec, key: str) -> float:
    if any(_is_out(layer.name, achieved) for achieved in record.achieved.values()):
        return math.nan
    untouched: dict[str, Scalar] = {"bits": FULL_BITS.get(record.plan.target.precision, 32), "sparsity": 0.0}
    found = [
        settings[key]
        for method in record.achieved.values()
        for name in (layer.name, layer.tied_to)
        if name is not None and key in (settings := method.get(name, {}))
    ]
    value = found[-1] if found else untouched[key]
    # 32 means "not quantized": it runs at the rest precision.
    return float(untouched[key] if (key, value) == ("bits", 32) else value)


def _is_out(layer: str, achieved: Mapping[str, Settings]) -> bool:
    return any(settings.get("skip") and inside(layer, block) for block, settings in achieved.items())
