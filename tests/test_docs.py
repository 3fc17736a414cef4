"""What the documents say must be so: tables, links, commands, quoted output, and every line of example code."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

import compareto
import compressors
import evaluators
from compressors.errors import Infeasible
from compressors.pipeline import Artifact, Context, LayerNumbers
from compressors.plan import CompressionPlan, Target
from evaluators.evaluation import Evaluator, Examples
from evaluators.runtime import Deployed, Runtime
from scripts.options import DOCUMENT, replaced
from search import build
from tests.context import make_context
from tests.fakes import FakeRuntime, deployed
from tests.zoo import build as build_net
from tests.zoo import images

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
README, CONTRIBUTING = (ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))
PACKAGES = ("compressors", "conf", "evaluators", "tests")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[list[str]]:
    """Every call of a script or of compareto, in a block or within a sentence, as words."""
    text = document.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ *((?:\./scripts/|compareto ).*)$", "\n".join(blocks(text)), re.MULTILINE)
    lines += re.findall(r"`((?:\./scripts/|compareto )[^`]*)`", text)
    return [line.partition(" # ")[0].split() for line in lines]


def options(document: Path) -> list[list[str]]:
    """The overrides of every search or select."""
    calls = [words for words in commands(document) if words[0] != "compareto" or words[1] in ("search", "select")]
    return [[word for word in words[1:] if "=" in word] for words in calls if words[0] != "./scripts/test"]


def test_the_option_tables_are_those_of_conf() -> None:
    assert replaced(DOCUMENT.read_text()) == DOCUMENT.read_text(), "run: python scripts/options.py"


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


@every_document
def test_commands_exist(document: Path) -> None:
    known = re.findall(r"^  (\w+)  ", compareto.USAGE, re.MULTILINE)
    for words in commands(document):
        if words[0] == "compareto":
            assert words[1] in known
        else:
            assert os.access(ROOT / words[0], os.X_OK), words


@pytest.mark.parametrize("overrides", [given for given in options(README) if given and "group=option" not in given])
def test_options_in_commands_fit_the_configuration(overrides: list[str]) -> None:
    assert build.compose(overrides).study


def test_quoted_output_is_in_the_log() -> None:
    log = {line.rstrip() for line in (ROOT / "benchmarks/default/search.log").read_text().splitlines()}
    quoted = next(block for block in blocks(README.read_text()) if "champion" in block)
    assert [line for line in quoted.splitlines() if line not in log] == []


@pytest.mark.parametrize("code", blocks(README.read_text(), "python"))
def test_python_in_the_readme_names_what_exists(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compile(code, str(README), "exec")
    if "compareto" in program.co_names:
        search = create_autospec(compareto.compress)
        search.return_value = create_autospec(compareto.Result, instance=True)
        monkeypatch.setattr(compareto, "compress", search)
        exec(program, {})  # noqa: S102  our own document
        search.assert_called_once()
        assert build.compose(search.call_args.kwargs["overrides"]).study
    else:
        named = [word for word in program.co_names if word in ("mlflow", "torch")]
        assert named


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the examples of CONTRIBUTING added as the files that they name."""
    folder = tmp_path_factory.mktemp("extended")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path, code in examples():
        (folder / path).write_text(code)
    return folder


def examples() -> list[tuple[str, str]]:
    """Path and content of every example."""
    pattern = r"^`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```(?:python|yaml)\n(.*?)^```"
    return re.findall(pattern, CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def plugins(extended: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The examples' modules can be imported in this process; their yaml files are found through `hydra.searchpath`."""
    for package in (compressors, evaluators):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(extended / package.__name__)])
    yield extended
    for path, _ in examples():
        sys.modules.pop(path.removesuffix(".py").replace("/", "."), None)


def composed(plugins: Path, *overrides: str) -> DictConfig:
    return build.compose([f"hydra.searchpath=[file://{plugins}/conf]", *overrides])


def run(folder: Path, module: str, *words: str) -> str:
    """What a tool prints when it is content."""
    command = [sys.executable, "-m", module, *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # small nets on several threads wait for each other
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_extension_is_two_files() -> None:
    paths = [path for path, _ in examples()]
    assert len(paths) == 6
    assert all((ROOT / path).parent.is_dir() and not (ROOT / path).exists() for path in paths)


def test_examples_are_in_the_style_of_the_house(extended: Path) -> None:
    files = [path for path, _ in examples() if path.endswith(".py")]
    for words in (["check"], ["format", "--check"]):
        run(extended, "ruff", *words, "--no-cache", *files)


def test_the_example_compressor_keeps_the_contract(extended: Path) -> None:
    suite = ["tests/test_compressor_contract.py", "-k", "recalibrate"]
    told = run(extended, "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *suite)
    assert re.search(r"^\d{2,} passed", told, re.MULTILINE), told


def test_options_for_the_examples_fit_the_configuration(plugins: Path) -> None:
    given = [overrides for overrides in options(CONTRIBUTING) if overrides]
    assert len(given) == 3
    for overrides in given:
        composed(plugins, *overrides)


def test_the_example_compressor_averages_what_pruning_left(plugins: Path) -> None:
    config = composed(plugins, "compressor=[prune,recalibrate]").compressor.recalibrate
    method = build.make("compressor.recalibrate", {"_target_": config._target_})
    model = build_net("plain")
    before = model.get_buffer("a.1.running_mean").clone()
    step = compressors.plan.Step("recalibrate", {}, {"batches": 2})
    assert method.apply(model, step, make_context(model), 0).achieved == {"": {"batches": 2}}
    assert not torch.equal(model.get_buffer("a.1.running_mean"), before)


@pytest.fixture
def reference(plugins: Path) -> Runtime:
    runtime: Runtime = build.make("runtime", composed(plugins, "runtime=[onnxreference]").runtime.onnxreference)
    return runtime


def deploy(runtime: Runtime, folder: Path, numbers: dict[str, LayerNumbers]) -> tuple[torch.nn.Module, Deployed]:
    model = build_net("residual")
    context = Context(model, (images(),), lambda: iter(()), lambda: iter(()), None)
    artifact = Artifact(model, CompressionPlan(Target(runtime.name, "fp32")), "original", {}, numbers, {})
    return model, runtime.deploy(artifact, context, folder / "deployed", folder / "cache")


def test_the_example_runtime_computes_what_torch_computes(reference: Runtime, tmp_path: Path) -> None:
    model, made = deploy(reference, tmp_path, {})
    with torch.no_grad():
        expected = model(images(5, 9)).numpy()
    np.testing.assert_allclose(made.run(images(5, 9).numpy()), expected, rtol=1e-4, atol=1e-5)


def test_the_example_runtime_refuses_what_it_cannot_run(reference: Runtime, tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="onnxreference has no 8-bit"):
        deploy(reference, tmp_path, {"head": LayerNumbers(8)})


def test_the_example_metric_measures_the_worst_class(plugins: Path, tmp_path: Path) -> None:
    config = composed(plugins, "evaluator=[worst_class]").evaluator.worst_class
    metric: Evaluator = build.make("evaluator.worst_class", config)
    given = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    shown = Examples("validation", (given,), np.array([0, 0, 1, 1]), given)
    made = deployed(FakeRuntime(), tmp_path)
    (measured,) = metric.measure(made, made, shown)
    assert (measured.name, measured.value, measured.n) == ("worst_class_accuracy", 0.5, 2)
