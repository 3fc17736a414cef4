"""Builds a `Search` from the composed configuration; with `__main__.py` the only place where a DictConfig lives."""

import difflib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_args

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from compressors.errors import ConfigError
from compressors.layers import read_layers
from compressors.pipeline import Compressor
from compressors.plan import Scalar, digest
from compressors.unpacked import unpacked
from evaluators.evaluation import Evaluator
from evaluators.machine import machine, memory_bytes, versions
from evaluators.measurement import Metric
from evaluators.runtime import Runtime
from evaluators.score import Score
from evaluators.size import SIZE
from search.address import password
from search.cache import Cache
from search.conclude import Selection
from search.facts import Role
from search.ladder import Ladder
from search.models import check_model, load_checkpoint
from search.runner import Limits
from search.sampler import GuidedSampler
from search.select import Bound
from search.sensitivity import guide
from search.solver import Guide
from search.space import build_space
from search.storage import open_storage
from search.study import Budget, Measure, Search
from search.tracking import CONFIG_FILE, Tracker
from search.training import TrainingProgress, trained
from search.trial import Workbench
from search.view import View
from search.workload import Splits, Task, Workload, checked, classification, code_digest

Watch = Callable[[TrainingProgress], None]

# What an option's value must be, and how to give it; None where the option may be left open.
KINDS: dict[str, tuple[tuple[type | None, ...], str]] = {
    "study": ((str,), "give a name"),
    "seed": ((int,), "give a whole number"),
    "recovery_batch": ((int,), "give a whole number"),
    "cache_gb": ((int, float), "give a number of gigabytes"),
    "workers": ((int,), "give a whole number"),
    "limits": ((dict, None), "set limits.minutes or limits.memory_gb, or limits=null"),
    "limits.minutes": ((int, float, None), "give a number or null"),
    "limits.memory_gb": ((int, float, None), "give a number of gigabytes or null"),
    "worker": ((int, None), "give a whole number or null"),
    "measure": ((str,), "give all, never or only"),
    "budget.trials": ((int, None), "give a whole number or null"),
    "budget.minutes": ((int, float, None), "give a number or null"),
    "objectives": ((list,), "give a list of metrics, such as [accuracy,latency_ratio]"),
    "bounds": ((dict,), "give a limit with bounds.METRIC=NUMBER"),
    "ladder.enabled": ((bool,), "give true or false"),
    "ladder.error": ((float, int), "give a rate such as 0.05"),
    "ladder.shares": ((list,), "give a growing list such as [0.25,0.5]"),
    "compressor": ((dict,), "choose at least one with compressor=[...]"),
    "runtime": ((dict,), "choose at least one with runtime=[...]"),
    "evaluator": ((dict,), "choose at least one with evaluator=[...]"),
}

# Where what a configuration calls may come from.
OURS = ("compressors.", "evaluators.", "search.", "optuna.samplers.")

# The options that are addresses.
ADDRESSES = (("storage", "url"), ("tracking", "uri"))

# Stands for what an address takes from the environment.
HIDDEN = "HIDDEN"

# Of the machine's memory, for one trial, if limits.memory_gb is null.
MEMORY_SHARE = 0.8

# What decides whether two runs belong to the same study, beside model, data, machine and versions.
FINGERPRINTED = ("compressor", "runtime", "evaluator", "task", "objectives", "bounds", "seed", "recovery_batch")

# What of it decides what is made from a plan, beside the compressors' own settings; the cache is shared by it.
MAKING = ("runtime", "task", "seed", "recovery_batch")


def build(
    config: DictConfig,
    watch: Watch,
    workload: Workload | None = None,
    extra: Mapping[str, Evaluator] | None = None,
) -> Search:
    """Everything the search needs; raises `ConfigError` for whatever is wrong, before any trial.

    `watch` hears of the training of the uncompressed network, if it has to be trained first. A `workload` given
    takes the place of the groups model, data and task; `extra` evaluators come before the configured ones.
    """
    kept = _without_secrets(config)
    _check(config)
    budget = Budget(config.budget.trials, config.budget.minutes)
    folder, cache = _folder("folder", config.folder), _folder("cache", config.cache)
    runtimes: dict[str, Runtime] = {name: make(f"runtime.{name}", node) for name, node in config.runtime.items()}
    evaluators: dict[str, Evaluator] = dict(extra or {})
    evaluators |= {name: make(f"evaluator.{name}", node) for name, node in config.evaluator.items()}
    _no_metric_twice(evaluators)
    objectives, bounds = _objectives(config, evaluators), _bounds(config)
    for bound in bounds:
        _known(f"bounds.{bound.metric}", bound.metric, _metrics(evaluators))
    tracker: Tracker = make("tracking", config.tracking)
    rule = make("rule", config.rule)
    guided = isinstance(_plain_sampler(config, config.seed), GuidedSampler)
    for name in rule.needs():
        _known(f"rule: {name}", name, _metrics(evaluators))
    ladder = _ladder(config, objectives, bounds, rule.speed)
    compressors: dict[str, Compressor] = {}
    spaces: dict[str, Mapping[str, Any]] = {}
    fields = {str(name): _plain(node) for name, node in config.compressor.items()}
    for name, own in fields.items():
        spaces[name] = own.pop("space", {})
        compressors[name] = make(f"compressor.{name}", own)
    tracker.check(str(config.study))
    open_storage(str(config.storage.url))

    workload = workload or build_workload(config, cache, watch)
    check_model(workload.model, workload.example, len(workload.splits.classes) or None)
    workload = replace(workload, model=unpacked(workload.model, workload.example))
    layers = read_layers(workload.model, workload.example)
    groups = {name: c.groups(workload.model, workload.example) for name, c in compressors.items()}
    space = build_space(spaces, compressors, groups, layers, runtimes, config.seed)
    prints = workload.fingerprint()
    prints |= {f"metric.{n}": code_digest(e.function) for n, e in (extra or {}).items() if isinstance(e, Score)}
    environment = {**machine(), **versions()}
    # Not what is searched for or measured: another search of the same model finds what this one has made.
    shared = cache / digest([prints, environment, fields, {k: _plain(config[k]) for k in MAKING}])
    # A guide speaks of the quality: where that is no objective, there is nothing to be guided by.
    guided &= any(metric.name == str(config.quality) for metric in objectives)
    known = guide(workload, layers, compressors, space, cache) if guided else None
    store = Cache(shared, config.cache_gb * 1e9)
    workbench = Workbench(
        workload, compressors, runtimes, evaluators, environment, shared, store, config.recovery_batch
    )
    return Search(
        name=str(config.study),
        workbench=workbench,
        layers=layers,
        space=space,
        objectives=objectives,
        bounds=bounds,
        budget=budget,
        sampler=_sampler(config, known, [_role(metric, str(config.quality)) for metric in objectives]),
        storage=str(config.storage.url),
        tracker=tracker,
        rule=rule,
        folder=folder,
        fingerprint=_fingerprint(config, prints, environment, space.digest),
        config=OmegaConf.to_yaml(kept),
        quality=str(config.quality),
        seed=config.seed,
        sparing=known is not None,
        ladder=ladder,
        limits=None if config.limits is None else _limits(config),
        measure=config.measure,
    )


def build_workload(config: DictConfig, cache: Path, watch: Watch) -> Workload:
    """Load the data, make the network, and load its checkpoint or train it once."""
    model_config = config.model
    if model_config.network is None:
        raise ConfigError(
            "model",
            f"{model_config.name!r} was given from Python",
            "call compareto.compress with the same model, and reproduce() on its result",
        )
    splits: Splits = checked(make("data", _without_name(config.data)), f"data={config.data.name}")
    task: Task = make("task", config.task)
    shape = {"classes": len(splits.classes), "channels": splits.train.inputs[0].shape[1]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make("model.network", {**_plain(model_config.network), **shape})
    if model_config.checkpoint is not None:
        load_checkpoint(model, Path(model_config.checkpoint).expanduser())
    elif model_config.training is not None:
        recipe = make("model.training", model_config.training)
        # Without a judge by labels, the network itself may still have learnt from them.
        lesson = task if task.loss or splits.train.targets is None else classification()
        model = trained(model, splits, lesson, recipe, cache / "trained", watch)
    elif model_config.network.get("source") is None or model_config.network.get("head") == "new":
        # With a source it came with its weights, but perhaps not with those of a head.
        remedy = "set one of them" + (", or model.network.head=kept" if "head" in model_config.network else "")
        raise ConfigError("model.checkpoint", "is not set and model.training is null", remedy)
    return Workload(f"{config.model.name}-{config.data.name}", model.eval().requires_grad_(False), splits, task)


def selection(overrides: Sequence[str]) -> Selection:
    """What `select` needs; neither the model nor the data is touched.

    Quality, objectives, bounds and rule are those that the study was run with, but for what `overrides` name.
    """
    tracker = open_tracker(compose(overrides))
    study = tracker.study(str(compose(overrides).study))
    stored = _trusted(tracker.read_study_file(study, CONFIG_FILE) or "{}", compose(overrides))
    quality = [f"quality={stored.quality}"] if "quality" in stored else []
    config = compose([*quality, *overrides])
    named = {_key(override).split(".")[0] for override in overrides}
    with open_dict(config):
        for key in {"objectives", "bounds", "rule"} - named:
            config[key] = stored.get(key, config[key])
    return Selection(
        study=study.name,
        tracker=tracker,
        rule=make("rule", config.rule),
        objectives=list(config.objectives),
        bounds=_bounds(config),
        runtimes={name: make(f"runtime.{name}", node) for name, node in config.runtime.items()},
        quality=str(config.quality),
    )


def storage_of(overrides: Sequence[str]) -> tuple[str, str]:
    """The storage's URL and the study's name, of a configuration that makes sense."""
    config = compose(overrides)
    _check(config)
    return str(config.storage.url), str(config.study)


def view(config: DictConfig) -> View:
    """What people are shown while it runs."""
    return View(str(config.quality), str(config.rule.get("speed", "latency_ratio")))


def open_tracker(config: DictConfig) -> Tracker:
    """The store of the studies, known to answer."""
    tracker: Tracker = make("tracking", config.tracking)
    tracker.check(str(config.study))
    return tracker


def recorded(text: str, config: DictConfig) -> DictConfig:
    """A study's own configuration, with the folders and stores of the one at hand."""
    stored = _trusted(text, config)
    for name in (
        "folder",
        "cache",
        "cache_gb",
        "storage",
        "tracking",
        "ladder",
        "workers",
        "worker",
        "measure",
        "limits",
    ):
        stored[name] = config[name]
    return stored


def _trusted(text: str, config: DictConfig) -> DictConfig:
    """A configuration from a store that others may write to: what it would call must be ours, or named here as well.

    Ours is what was made in a module of ours: through one of them, everything that it imports can be reached.
    """
    stored = cast(DictConfig, OmegaConf.create(text))
    known = set(_targets(OmegaConf.to_container(config, resolve=False)))
    for target in _targets(OmegaConf.to_container(stored, resolve=False)):
        if target not in known and not (target.startswith(OURS) and _made_in(target).startswith(OURS)):
            problem = f"was begun with {target!r}, which is none of compareto's and would be run here"
            raise ConfigError("study", problem, "if you trust it, name it on this command line too")
    return stored


def _made_in(target: str) -> str:
    """The module in which what a configuration names was defined; empty if there is no such thing."""
    try:
        return f"{get_object(target).__module__}."
    except (HydraException, ImportError, ValueError, AttributeError):
        return ""


def _targets(node: Any) -> Iterator[str]:
    """All that instantiating a configuration would call."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for child in node.values():
            yield from _targets(child)
    elif isinstance(node, list):
        for child in node:
            yield from _targets(child)


def from_yaml(text: str) -> DictConfig:
    """A whole configuration, as `Search.config` has it."""
    return cast(DictConfig, OmegaConf.create(text))


def for_worker(text: str) -> str:
    """The configuration of one of several processes: it starts none itself."""
    config = from_yaml(text)
    if config.limits is not None:
        config.limits.memory_gb = _limits(config).memory_gb
    config.workers = 1
    return OmegaConf.to_yaml(config)


def _without_secrets(config: DictConfig) -> DictConfig:
    """A copy to be kept and shown: addresses that come from the environment say so, instead of what they are.

    `config` is not resolved yet. Raises `ConfigError` where an address with a password was written down.
    """
    kept = OmegaConf.create(_resolved(config))
    for group, key in ADDRESSES:
        written = _plain_unresolved(config[group]).get(key)
        if "${oc.env:" in str(written) and not _is_written(password(re.sub(r"\$\{[^}]*\}", HIDDEN, str(written)))):
            kept[group][key] = written
        elif password(str(kept[group].get(key))):
            problem = "has a password in it, which would be written into logs and records"
            remedy = f"put the address into the environment: {group}.{key}='${{oc.env:NAME}}'"
            raise ConfigError(f"{group}.{key}", problem, remedy)
    return kept


def _is_written(secret: str | None) -> bool:
    return bool(secret) and secret != HIDDEN


def _resolved(config: DictConfig) -> dict[str, Any]:
    """All references filled in; raises `ConfigError` for one that leads nowhere, such as an unset variable."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        reason = " ".join(str(error.msg or error).split())
        raise ConfigError(str(error.full_key), f"cannot be filled in ({reason})", "set what it refers to") from error


def _plain_unresolved(node: Any) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))


def make(path: str, node: Any) -> Any:
    """Instantiate a `_target_` block; what the block's own class refuses keeps its `ConfigError`."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        reason = " ".join(str(cause or error).split())
        raise ConfigError(path, reason, f"see the comments in conf/{path.split('.')[0]}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(path, " ".join(str(error).split()), f"see conf/{path.split('.')[0]}") from error


def _check(config: DictConfig) -> None:
    """Resolves references in place; refuses what is not set or is of another kind than the option takes."""
    _resolved(config)
    OmegaConf.resolve(config)
    for path in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(path, "is not set", f"set {path}=VALUE")
    for path, (kinds, remedy) in KINDS.items():
        value = _plain(OmegaConf.select(config, path))
        # A bool would pass for a whole number.
        if (type(value) if value is not None else None) not in kinds:
            raise ConfigError(path, "is not set" if value is None else f"is {value!r}", remedy)
    if config.measure not in get_args(Measure):
        raise ConfigError("measure", f"is {config.measure!r}", f"use {', '.join(get_args(Measure))}")
    if config.recovery_batch < 1:
        raise ConfigError("recovery_batch", f"is {config.recovery_batch}", "give 1 or more")
    cores = len(os.sched_getaffinity(0))
    # More than that would slow each other, and no latency could be trusted.
    if not 1 <= config.workers <= cores:
        raise ConfigError("workers", f"is {config.workers}", f"give 1 to {cores}, one process for each core")
    if not config.cache_gb > 0:
        raise ConfigError("cache_gb", f"is {config.cache_gb}", "give a number above 0")


def _limits(config: DictConfig) -> Limits:
    """Without a bound of its own, a trial may take most of its share of the memory, but not bring all to a halt."""
    share, own = MEMORY_SHARE / max(config.workers, 1), config.limits.memory_gb
    return Limits(config.limits.minutes, share * memory_bytes() / 1e9 if own is None else own)


def _sampler(config: DictConfig, known: Guide | None, roles: Sequence[Role]) -> Callable[[int], Any]:
    """How to make the sampler of a worker that comes after so many others."""

    def sampler(joined: int) -> Any:
        if known is not None:
            # It tells trials apart by itself, and must propose the same from the same trials.
            return _plain_sampler(config, config.seed).guided_by(known, roles)
        return _plain_sampler(config, config.seed + joined)

    return sampler


def _plain_sampler(config: DictConfig, seed: int) -> Any:
    return make("sampler", {**_plain(config.sampler), "_partial_": False, "seed": seed})


def _role(metric: Metric, quality: str) -> Role:
    if metric.name == quality:
        return "quality"
    # Memory has bytes too, but follows from the weights no better than a latency does; parameters know no bit-widths.
    return "size" if metric.name == SIZE.name else "latency"


def _no_metric_twice(evaluators: Mapping[str, Evaluator]) -> None:
    names = [(metric.name, name) for name, evaluator in evaluators.items() for metric in evaluator.metrics()]
    first: dict[str, str] = {}
    for metric, name in names:
        if first.setdefault(metric, name) != name:
            problem = f"measures {metric}, as evaluator.{first[metric]} does"
            raise ConfigError(f"evaluator.{name}", problem, f"leave one out, or set evaluator.{name}.name={name}")


def _metrics(evaluators: Mapping[str, Evaluator]) -> dict[str, Metric]:
    return {metric.name: metric for evaluator in evaluators.values() for metric in evaluator.metrics()}


def _objectives(config: DictConfig, evaluators: Mapping[str, Evaluator]) -> tuple[Metric, ...]:
    known = _metrics(evaluators)
    if len(config.objectives) < 2:
        raise ConfigError("objectives", f"is {list(config.objectives)}", "give at least two of " + ", ".join(known))
    for name in config.objectives:
        _known(f"objectives: {name}", name, known)
    return tuple(known[name] for name in config.objectives)


def _bounds(config: DictConfig) -> tuple[Bound, ...]:
    limits = {str(name): limit for name, limit in config.bounds.items() if limit is not None}
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise ConfigError(f"bounds.{name}", f"is {limit!r}", "give a number or null")
    return tuple(Bound(name, float(limit)) for name, limit in limits.items())


def _ladder(config: DictConfig, objectives: Sequence[Metric], bounds: Sequence[Bound], speed: str) -> Ladder | None:
    """None where it is off; what is wrong is said all the same."""
    shares = tuple(_plain(config.ladder.shares))
    names = tuple(metric.name for metric in objectives)
    ladder = Ladder(names, str(config.quality), speed, tuple(bounds), shares, config.ladder.error)
    return ladder if config.ladder.enabled else None


def _known(path: str, name: str, known: Mapping[str, Metric]) -> None:
    if name not in known:
        raise ConfigError(path, "no evaluator measures it", f"use {', '.join(known)}, or add to evaluator=[...]")


def _folder(path: str, value: str) -> Path:
    """The folder, made if need be and known to be writable."""
    folder = Path(value).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(path, f"{folder} cannot be written ({error.strerror})", f"set {path}=DIRECTORY") from error
    return folder


def _fingerprint(
    config: DictConfig, workload: Mapping[str, str], environment: Mapping[str, Scalar], space: str
) -> dict[str, Scalar]:
    chosen = {name: _shown(_plain(config[name])) for name in FINGERPRINTED}
    return {**workload, **environment, **chosen, "space": space}


def _shown(value: Any) -> Scalar:
    """Short settings as they are, so that a difference can be read; long ones by digest."""
    text = str(value)
    return text if len(text) <= 100 else digest(value)


def _without_name(node: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in _plain(node).items() if key != "name"}


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration with command-line overrides applied; raises `ConfigError` for one that fits nothing."""
    for override in overrides:
        if not _key(override):
            raise ConfigError(override, "names no option", "write OPTION=VALUE")
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return hydra_compose("config", overrides=list(overrides))
    except OverrideParseException as error:
        problem = f"cannot be read ({' '.join(str(error).split()).partition(' See ')[0]})"
        raise ConfigError(str(error.override), problem, "write OPTION=VALUE, with brackets closed") from error
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        wrong = _culprit(text, overrides)
        # Hydra goes on with where it looked; what there is, the remedy says.
        reason = re.split(r"\.? (?:Config search path|Available options|To append to)\b", text)[0]
        raise ConfigError(wrong, f"does not fit the configuration ({reason})", _remedy(_key(wrong), text)) from error


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _culprit(text: str, overrides: Sequence[str]) -> str:
    """The override that an error speaks of: the last one with the longest name in it."""
    named = [o for o in reversed(overrides) if _key(o) in text]
    return max(named, key=lambda o: len(_key(o)), default=" ".join(overrides))


def _remedy(key: str, text: str) -> str:
    """What can be chosen, the option that was probably meant, or where to look."""
    group = resources.files("conf") / key
    if key and group.is_dir():
        return "use " + ", ".join(sorted(f.name.removesuffix(".yaml") for f in group.iterdir() if "." in f.name))
    with initialize_config_module("conf", version_base="1.3"):
        known = sorted(_options(OmegaConf.to_container(hydra_compose("config")), ""))
    if key in known and "Could not override" in text:
        return f"add an entry with +{key}.NAME=VALUE"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else "all options: conf/config.yaml and the folders beside it"


def _options(node: Any, path: str) -> Iterator[str]:
    if path:
        yield path
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _options(child, f"{path}.{name}" if path else str(name))
