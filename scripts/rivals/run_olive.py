"""Olive's TPE search over the flags of ONNX Runtime's quantizer; every model that it has evaluated is handed in."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"  # read as Olive is imported

from olive.workflows import run

from scripts.rivals.exchange import Exchange

POLL_S = 0.5


def main(exchange: Exchange) -> None:
    """Olive itself returns one model, and only at the end: its cache tells of the others, and of them in time."""
    os.environ["RIVAL_INPUTS"] = str(exchange.inputs)
    cache = exchange.output / "cache"
    seen: set[str] = set()

    def look() -> None:
        while True:
            _hand_in_new(exchange, cache, seen)
            time.sleep(POLL_S)

    threading.Thread(target=look, daemon=True).start()
    run(configuration(exchange, cache))
    time.sleep(2 * POLL_S)


def _hand_in_new(exchange: Exchange, cache: Path, seen: set[str]) -> None:
    for evaluation in sorted(cache.glob("*/evaluations/*.json"), key=lambda path: path.stat().st_mtime):
        name = evaluation.name.partition("-")[0]
        models = evaluation.parents[1] / "runs" / name / "models"
        if name in seen or not (models / "model.onnx").exists():  # the uncompressed model has an evaluation only
            continue
        seen.add(name)
        shutil.copytree(models, exchange.place(name), dirs_exist_ok=True)
        exchange.hand_in(exchange.output / name, f"olive {name}", ("onnxruntime", "fp32"))


def configuration(exchange: Exchange, cache: Path) -> dict[str, Any]:
    """As Olive's documentation has it. One pass: with a second before it, Olive 0.13 loses most of its trials."""
    about = exchange.about()
    return {
        "input_model": {"type": "OnnxModel", "model_path": str(exchange.model)},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [CPU]}},
        "data_configs": [_data("calibration", 1), _data("validation", about["batch"])],
        "evaluators": {"both": {"metrics": [_accuracy(about["arguments"]["classes"]), _latency()]}},
        "passes": {"quantize": {"type": "OnnxStaticQuantization", "data_config": "calibration"}},
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "sampler_config": {"max_samples": 1000, "seed": 0},
            "max_time": int(exchange.deadline - time.time()),
        },
        "host": "here",
        "target": "here",
        "evaluator": "both",
        "cache_dir": str(cache),
        "output_dir": str(exchange.output / "olive"),
    }


CPU = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}


def _data(split: str, batch: int) -> dict[str, Any]:
    return {
        "name": split,
        "user_script": str(Path(__file__).with_name("olive_data.py")),
        "load_dataset_config": {"type": "one_split", "params": {"split": split}},
        "post_process_data_config": {"type": "most_likely"},
        "dataloader_config": {"params": {"batch_size": batch}},
    }


def _accuracy(classes: int) -> dict[str, Any]:
    kind = {"name": "accuracy_score", "priority": 1, "metric_config": {"task": "multiclass", "num_classes": classes}}
    goal = {"type": "max-degradation", "value": 0.05}
    return {"name": "accuracy", "type": "accuracy", "data_config": "validation", "sub_types": [{**kind, "goal": goal}]}


def _latency() -> dict[str, Any]:
    return {
        "name": "latency",
        "type": "latency",
        "data_config": "validation",
        "sub_types": [{"name": "avg", "priority": 2}],
    }


if __name__ == "__main__":
    main(Exchange.from_arguments())
