import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from compressors.plan import CompressionPlan, LayerSpec, Step, Target
from evaluators.measurement import Measurement, Metric, exact
from evaluators.parameters import Parameters
from search.dots import dots_of, speed_range
from search.heatmap import layers_png
from search.page import pareto_html
from search.report import draw
from search.select import Choice
from search.table import front_table
from search.trial import Stop, TrialRecord
from search.view import View, describe

LAYERS = [LayerSpec(f"block.{i}", "conv", (8, 8, 3, 3), 576, 1000) for i in range(5)]
VIEW = View(quality="fidelity")
PRUNE = Step("prune", {"block.0": {"sparsity": 0.5}}, {"align": 8})
DISTILL = Step("distill", {}, {"epochs": 4})
QUANTIZE = Step("quantize", {"block.1": {"bits": 8}, "block.2": {"bits": 8}, "block.3": {"bits": 4}})


def trial(number: int, quality: float, ratio: float, *steps: Step, precision: str = "bf16") -> TrialRecord:
    def measured(metric: Metric, value: float, half: float) -> Measurement:
        return Measurement(metric, value, (value - half, value + half), 500)

    return TrialRecord(
        number=number,
        plan=CompressionPlan(Target("openvino", precision), steps),
        measurements=(
            measured(Metric("fidelity", "agreement", "maximize"), quality, 0.01),
            measured(Metric("latency_ratio", "of reference", "minimize"), ratio, 0.01 * ratio),
            exact(Metric("size_bytes", "bytes", "minimize"), round(1_500_000 * ratio)),
        ),
        infeasible=None,
        seconds={},
        achieved={step.method: step.per_layer for step in steps},
        environment={},
    )


BASE = trial(0, 0.98, 1.0, precision="fp32")
BEST = trial(2, 0.975, 0.25, PRUNE, DISTILL, QUANTIZE)
RUINED = trial(3, 0.11, 0.2, PRUNE)
REFUSED = TrialRecord(4, BEST.plan, (), "no kernel", {}, {}, {})
RECORDS = [BASE, trial(1, 0.97, 0.5, QUANTIZE), BEST, RUINED, REFUSED]
FRONT = [BASE, BEST, RUINED]
CHOICE = Choice(BEST, True, "fastest with at most 0.01 of <fidelity> lost")


def test_what_was_done_in_a_few_words() -> None:
    assert describe(BASE) == "uncompressed, openvino fp32"
    assert describe(BEST) == "prune 50 %, distill 4 epochs, int8 2 layers, int4 1 layer, openvino bf16"
    assert describe(trial(5, 0.9, 0.5, Step("fold", {}, {}))) == "fold, openvino bf16"
    low = Step("lowrank", {"block.0": {"rank": 0.5, "weights": 0.4}, "block.1": {"rank": 1.0}})
    assert describe(trial(5, 0.9, 0.5, low)) == "lowrank 1 layer, openvino bf16"
    few = Step("cluster", {f"block.{i}": {"clusters": n, "bits": 4} for i, n in enumerate((16, 0, 256, 16))})
    assert describe(trial(5, 0.9, 0.5, few)) == "256 clusters 1 layer, 16 clusters 2 layers, openvino bf16"
    skip = Step("depth", {"block": {"skip": True}, "tail": {"skip": False}})
    assert describe(trial(5, 0.9, 0.5, skip)) == "skip 1 block, openvino bf16"


def test_the_table_shows_front_baseline_and_champion_fastest_first() -> None:
    console = Console(width=200, record=True)
    console.print(front_table(RECORDS, FRONT, CHOICE, VIEW))
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    assert [row.split()[1:3] for row in rows] == [["★", "2"], ["○", "0"]]
    assert "97.5 % [96.5, 98.5]" in rows[0]
    assert "4.00x" in rows[0]
    assert "375.0 kB" in rows[0]
    assert "1.50 MB" in rows[1]


def test_what_is_ruined_is_told_of_and_not_shown() -> None:
    said = "1 more of the front lost far more than these, see report.json"
    for front, lines in ((FRONT, 1), ([BASE, BEST], 0)):
        console = Console(width=200, record=True)
        console.print(front_table(RECORDS, front, CHOICE, VIEW))
        text = console.export_text()
        assert text.count(said) == lines
        assert "11.0 %" not in text
    steps = [trial(n, 0.98 - 0.1 * n, 1 / (n + 1), PRUNE) for n in range(6)]
    console.print(front_table(steps, steps, replace(CHOICE, record=steps[0]), VIEW))
    assert "48.0 %" in console.export_text(), "a front that loses step by step is shown whole"


def test_parameters_have_a_column_where_they_were_counted() -> None:
    def counted(record: TrialRecord, count: int) -> TrialRecord:
        return replace(record, measurements=(*record.measurements, exact(Parameters().metrics()[0], count)))

    base, best = counted(BASE, 1_250_000), counted(BEST, 98_765)
    console = Console(width=200, record=True)
    console.print(front_table([base, best], [base, best], replace(CHOICE, record=best), VIEW))
    heading, *rows = [line for line in console.export_text().splitlines() if line.startswith(("┃", "│"))]
    assert heading.split("┃")[-2].strip() == "parameters"
    assert [row.split("│")[-2].strip() for row in rows] == ["98.8 k", "1.25 M"]


def test_of_versions_that_are_alike_the_table_shows_the_champion_or_the_smallest() -> None:
    twin, small = trial(5, 0.974, 0.2505, PRUNE), trial(6, 0.975, 0.252, PRUNE)
    size = exact(Metric("size_bytes", "bytes", "minimize"), 100_000)
    small = replace(small, measurements=(*small.measurements[:2], size))
    smaller = replace(
        trial(7, 0.974, 0.253, PRUNE), measurements=(*small.measurements[:2], replace_value(size, 99_000))
    )
    console = Console(width=200, record=True)
    console.print(front_table(RECORDS, [*FRONT, twin, small, smaller], CHOICE, VIEW))
    text = console.export_text()
    shown = [row.strip("│ ★○").split()[0] for row in text.splitlines() if row.startswith("│")]
    assert sorted(shown) == ["0", "2", "7"], "5 is like the champion; 6 is like 7, which is smaller"
    assert "2 more of the front are within the bands of these, see report.json" in text


def replace_value(measurement: Measurement, value: float) -> Measurement:
    return replace(measurement, value=value, interval=(value, value))


def test_one_line_says_how_many_were_stopped(tmp_path: Path) -> None:
    stop = Stop("preview 25 %", "fidelity", (0.5, 0.7), "")
    half = TrialRecord(5, BEST.plan, BEST.measurements[:1], None, {}, {}, {}, stopped=stop)
    for records, lines in ((RECORDS, 0), ([*RECORDS, half, half], 1)):
        console = Console(width=200, record=True)
        console.print(front_table(records, FRONT, CHOICE, VIEW))
        assert console.export_text().count("2 of 7 trials were stopped early") == lines
    draw(tmp_path, [*RECORDS, half], FRONT, CHOICE, LAYERS, VIEW)
    assert 'data-trial="5"' not in (tmp_path / "pareto.html").read_text()


def test_everything_is_drawn_and_not_blank(tmp_path: Path) -> None:
    paths = draw(tmp_path / "files", RECORDS, FRONT, CHOICE, LAYERS, VIEW)
    assert [p.name for p in paths] == ["pareto.png", "pareto.html", "layers.png", "report.json"]
    for path in (paths[0], paths[2]):
        assert np.std(imread(path)) > 0.05
    assert imread(paths[0]).shape[:2] == (800, 1200)
    assert [row["trial"] for row in json.loads(paths[3].read_text())] == [0, 2, 3]


def test_what_is_ruined_does_not_squeeze_the_rest() -> None:
    ruined = trial(3, 0.11, 0.002, PRUNE)
    dots = dots_of([*RECORDS, ruined], [*FRONT, ruined], CHOICE, VIEW)
    assert speed_range(dots) == pytest.approx((0.25 / 1.25, 1.25))


def test_a_study_of_one_trial_can_be_drawn(tmp_path: Path) -> None:
    paths = draw(tmp_path, [BASE], [BASE], Choice(BASE, True, "the only one"), LAYERS, VIEW)
    assert all(path.stat().st_size for path in paths)


@pytest.fixture
def page(tmp_path: Path) -> str:
    pareto_html(RECORDS, FRONT, CHOICE, tmp_path / "page.html", VIEW)
    return (tmp_path / "page.html").read_text()


def test_the_page_stands_alone(page: str) -> None:
    assert not re.search(r"https?://|src=|@import|<link", page)
    assert "&lt;fidelity&gt;" in page
    assert "<fidelity>" not in page


def test_the_page_has_a_dot_and_data_for_every_measured_trial(page: str) -> None:
    match = re.search(r'<script id="trials" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match
    data = json.loads(match[1])
    assert set(re.findall(r'data-trial="(\d+)"', page)) == set(data) == {"0", "1", "2", "3"}
    assert data["2"]["role"] == "champion"
    assert data["2"]["plan"]["steps"][0]["method"] == "prune"


def test_data_cannot_end_its_script(tmp_path: Path) -> None:
    odd = trial(5, 0.9, 0.5, Step("</script><script>alert(1)", {}, {}))
    pareto_html([BASE, odd], [BASE], Choice(BASE, True, ""), tmp_path / "page.html", VIEW)
    assert "<script>alert" not in (tmp_path / "page.html").read_text()


def test_layers_that_were_left_out_are_grey(tmp_path: Path) -> None:
    out = trial(5, 0.9, 0.5, Step("depth", {"block": {"skip": True}}))
    grey = np.array([0x8B, 0x94, 0x9E]) / 255

    def share(record: TrialRecord) -> float:
        layers_png([record], LAYERS, tmp_path / "layers.png")
        return float((np.abs(imread(tmp_path / "layers.png")[..., :3] - grey) < 0.01).all(-1).mean())

    assert share(BEST) < 0.01
    assert share(out) > 0.2


def test_many_layers_and_rows_are_drawn(tmp_path: Path) -> None:
    layers = [LayerSpec(f"stage.{i}", "conv", (8, 8, 3, 3), 576, 1000) for i in range(60)]
    layers_png(FRONT * 8, layers, tmp_path / "layers.png")
    height, width = imread(tmp_path / "layers.png").shape[:2]
    assert width > 2000
    assert height > 1000
