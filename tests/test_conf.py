"""Every yaml under conf/: it composes with the rest, and what it names exists and takes its arguments."""

import functools
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose as compose_all
from hydra import initialize_config_module
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

import conf
from compressors.pipeline import Stage
from evaluators.measurement import Metric
from search.build import compose

CONF = Path(conf.__file__).parent
LAUNCHERS = {
    "many_processes": "hydra_plugins.hydra_joblib_launcher",
    "background": "hydra_plugins.hydra_submitit_launcher",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
    "ray_cluster": "hydra_plugins.hydra_ray_launcher",
}
NODES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
LISTS = ("compressor", "runtime", "evaluator")
# tests of their own make them
PRETRAINED = ("causal_lm", "clip", "image_classifier", "sentence_encoder", "text_classifier", "two_towers")
MANDATORY = {
    "image_folder": ["data.folder=x"],
    "sentences": ["data.file=x", "data.tokenizer=x"],
    "text": ["data.file=x", "data.tokenizer=x"],
    "captions": ["data.folder=x", "data.tokenizer=x"],
    "postgresql": ["storage.url=x"],
    **{name: ["model.network.source=x"] for name in PRETRAINED},
    "two_towers": ["model.network.vision=x", "model.network.text=x"],
}


def nodes(group: str) -> list[str]:
    return [name for kind, name in NODES if kind == group]


@functools.cache
def composed(group: str, name: str) -> DictConfig:
    chosen = f"{group}=[{name}]" if group in LISTS else f"{group}={name}"
    return compose([chosen, *MANDATORY.get(name, [])])


def node(group: str, name: str) -> dict[str, Any]:
    config = composed(group, name)
    OmegaConf.resolve(config)
    found = config[group][name] if group in LISTS else config[group]
    return dict(OmegaConf.to_container(found))  # type: ignore[arg-type]


@pytest.mark.parametrize(("group", "name"), NODES)
def test_every_option_composes_with_the_defaults_and_resolves(group: str, name: str) -> None:
    config = composed(group, name)
    OmegaConf.resolve(config)
    assert not OmegaConf.missing_keys(config)


@pytest.mark.parametrize(("group", "name"), [n for n in NODES if n[0] in ("task", "sampler", "tracking", "rule")])
def test_what_needs_no_model_can_be_made(group: str, name: str) -> None:
    made = instantiate(node(group, name), _convert_="all")
    assert made(seed=1) if group == "sampler" else made


@pytest.mark.parametrize("name", nodes("data"))
def test_a_data_set_takes_its_arguments(name: str) -> None:
    fields = node("data", name)
    load = get_method(fields.pop("_target_"))
    assert fields.pop("name") == name
    inspect.signature(load).bind(**fields)


@pytest.mark.parametrize("name", nodes("model"))
def test_a_network_can_be_made_and_its_recipe_too(name: str) -> None:
    fields = node("model", name)
    if name in PRETRAINED:
        inspect.signature(get_method(fields["network"].pop("_target_"))).bind(
            classes=4, channels=1, **fields["network"]
        )
    else:
        assert instantiate(fields["network"], classes=4, channels=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    assert fields["training"] is None or instantiate(fields["training"]).epochs > 0
    assert fields["checkpoint"] is None


@pytest.mark.parametrize("name", nodes("compressor"))
def test_a_compressor_says_how_it_is_called_when_it_runs_and_how_it_is_off(name: str) -> None:
    fields = node("compressor", name)
    space = fields.pop("space")
    made = instantiate(fields, _convert_="all")
    assert made.method == name
    assert made.stage in Stage
    key, off = made.off
    assert key in space
    assert off in _values(space[key])


@pytest.mark.parametrize("name", nodes("runtime"))
def test_a_runtime_is_called_as_its_file_is(name: str) -> None:
    made = instantiate(node("runtime", name), _convert_="all")
    assert made.name == name
    assert made.precisions()[0] == "fp32"


@pytest.mark.parametrize("name", nodes("evaluator"))
def test_an_evaluator_says_what_it_measures(name: str) -> None:
    metrics = instantiate(node("evaluator", name), _convert_="all").metrics()
    assert metrics
    assert all(isinstance(metric, Metric) for metric in metrics)


def test_no_two_evaluators_measure_the_same() -> None:
    made = [instantiate(node("evaluator", name), _convert_="all") for name in nodes("evaluator")]
    names = [metric.name for evaluator in made for metric in evaluator.metrics()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("group", "name"), [n for n in NODES if n[0] in LISTS])
def test_options_of_a_list_have_a_place_of_their_own(group: str, name: str) -> None:
    first = (CONF / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# @package {group}.{name}"


def test_the_defaults_are_the_search_that_is_documented() -> None:
    config = compose([])
    assert (config.model.name, config.data.name) == ("resnet20", "digits")
    assert [list(config[group]) for group in LISTS] == [
        ["depth", "prune", "distill", "quantize"],
        ["onnxruntime", "openvino"],
        ["accuracy", "latency", "size"],
    ]
    assert config.study == "resnet20-digits"
    assert list(config.objectives) == ["accuracy", "latency_ratio", "size_bytes"]
    assert config.budget.minutes == 3


def test_every_group_is_in_the_defaults_list() -> None:
    text = (CONF / "config.yaml").read_text()
    # Those below hydra/ are for Hydra's own group, whose default is its own, too.
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_"} - {"hydra"}
    assert all(f"{group}: " in text for group in groups)


def test_the_comment_beside_a_group_names_every_option() -> None:
    lines = (CONF / "config.yaml").read_text().splitlines()
    for group, name in NODES:
        if group not in ("compressor", "runtime", "experiment"):
            (line,) = (text for text in lines if text.startswith(f"  - {group}: "))
            assert name in line


def test_the_yaml_files_travel_with_the_package() -> None:
    settings = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "conf" in settings["packages"]
    (pattern,) = settings["package-data"]["conf"]
    found = {(p.parent.name, p.stem) for p in CONF.glob(pattern)}
    assert found == {*NODES, *(("launcher", name) for name in LAUNCHERS), ("conf", "config")}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_setting_of_a_launcher_is_one_that_it_takes(name: str) -> None:
    pytest.importorskip(LAUNCHERS[name])
    with initialize_config_module("conf", version_base="1.3"):
        launcher = compose_all("config", [f"hydra/launcher={name}"], return_hydra_config=True).hydra.launcher
    assert "Launcher" in launcher._target_


def _values(entry: dict[str, Any]) -> list[Any]:
    choices = entry["choices"]
    return [bits for kind in choices.values() for bits in kind] if isinstance(choices, dict) else choices
