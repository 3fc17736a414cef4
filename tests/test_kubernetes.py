"""The manifest for Kubernetes fits the schema, and starts a worker whose options exist."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from search.build import compose

MANIFEST = Path(__file__).parents[1] / "scripts/cluster/kubernetes.yaml"


def validated(path: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_manifest_fits_the_schema() -> None:
    checked = validated(MANIFEST)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(("right", "wrong"), [("completions: 8", "completions: many"), ("parallelism:", "paralelism:")])
def test_a_mistake_in_it_would_be_seen(right: str, wrong: str, tmp_path: Path) -> None:
    text = MANIFEST.read_text()
    assert right in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(right, wrong))
    assert validated(broken).returncode != 0


def test_its_command_is_one_that_a_worker_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPARETO_STORAGE", "postgresql+psycopg://me@127.0.0.1/x")
    (container,) = OmegaConf.load(MANIFEST).spec.template.spec.containers
    program, verb, *options = container.command
    assert (program, verb) == ("compareto", "worker")
    config = compose([option.replace("$(JOB_COMPLETION_INDEX)", "3") for option in options])
    assert (config.worker, config.measure, config.storage.url) == (3, "never", "postgresql+psycopg://me@127.0.0.1/x")
