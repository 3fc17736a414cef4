import shutil
from pathlib import Path

import pytest
import torch

from search.tracking import Tracker

# Two threads that share a busy core wait for each other: small nets get seven times slower, and bits may differ.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{path}").check()
    return path


@pytest.fixture
def store(mlflow_template: Path, tmp_path: Path) -> Path:
    """A results folder with an empty MLflow database in it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return folder
