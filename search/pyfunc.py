"""Writes deployed files as MLflow models that load where this repository is not; records and registers nothing."""

import inspect
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.runtime import Runtime, TensorSpec

with warnings.catch_warnings():
    # mlflow.pyfunc warns, as it is imported, about the type hints of its own classes.
    warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema
    from mlflow.types import TensorSpec as SignatureSpec

SCRIPT = '''"""Written by compareto: loads the deployed files beside it."""

from __future__ import annotations

import mlflow
import mlflow.pyfunc
import numpy

{loader}

class Deployed(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.session = {name}(context.artifacts["model"], {precision!r}, None, 0)

    # The hint keeps MLflow from warning that there is none; several inputs come as a dict of arrays.
    def predict(self, context, model_input: numpy.ndarray, params=None):
        if isinstance(model_input, dict):
            return self.session(*(model_input[name] for name in {inputs!r}))
        return self.session(model_input)


mlflow.models.set_model(Deployed())
'''


def save_pyfunc(
    path: Path, files: Path, runtime: Runtime, precision: str, inputs: Sequence[TensorSpec], model: Any = None
) -> None:
    """Write an MLflow model of deployed files that needs neither pickle nor this repository's code to load.

    One input is given to `predict` as an array, several as a dict of arrays. A past is none of them: who goes on behind
    one loads the files with the runtime itself.
    """
    needed = [spec for spec in inputs if 0 not in spec.shape]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "deployed.py")
        script.write_text(_script(runtime, precision, [spec.name for spec in needed]))
        with warnings.catch_warnings():
            # An example would be stored with every version, and add nothing to the signature given here.
            warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
            mlflow.pyfunc.save_model(
                path,
                python_model=str(script),
                artifacts={"model": str(files)},
                signature=ModelSignature(inputs=_schema(needed, any_length=len(needed) < len(inputs))),
                pip_requirements=[f"mlflow=={mlflow.__version__}", *runtime.requirements()],
                mlflow_model=model,
            )


def _script(runtime: Runtime, precision: str, inputs: list[str]) -> str:
    loader = runtime.loader()
    return SCRIPT.format(loader=inspect.getsource(loader), name=loader.__name__, precision=precision, inputs=inputs)


def _schema(inputs: Sequence[TensorSpec], any_length: bool) -> Any:
    """Sizes that may vary are -1; a single input stays unnamed, or MLflow would refuse a plain array."""
    return Schema(
        [
            SignatureSpec(
                np.dtype(s.dtype),
                (-1, -1) if any_length else (-1, *s.shape[1:]),
                s.name if len(inputs) > 1 else None,
            )
            for s in inputs
        ]
    )
