"""What people see of a study in files: its pictures, its page and its front as JSON; measures and chooses nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

from compressors.plan import LayerSpec
from search.dots import as_json
from search.heatmap import layers_png
from search.page import pareto_html
from search.picture import pareto_png
from search.select import Choice
from search.trial import TrialRecord
from search.view import View


def draw(
    folder: Path,
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    layers: Sequence[LayerSpec],
    view: View,
) -> list[Path]:
    """Write every picture and page of a study into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("pareto.png", "pareto.html", "layers.png", "report.json")
    png, page, heat, table = (folder / name for name in names)
    pareto_png(records, front, choice, png, view)
    pareto_html(records, front, choice, page, view)
    layers_png(front, layers, heat)
    table.write_text(json.dumps([as_json(r, front, choice, view) for r in front], indent=1))
    return [png, page, heat, table]
