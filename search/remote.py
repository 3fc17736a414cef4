"""MLflow's client, made quiet and quick to say that its server is away; imported before anything else of MLflow."""

import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests

from search import address

# Read by mlflow as it is imported: it would report its use to its makers and print a link after every run.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is away it would try for minutes, while whoever calls has better things to do.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")

from mlflow.exceptions import MlflowException, RestException

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# So long a server that did not answer is left alone.
REST_S = 10.0


class Away(Exception):
    """The server does not answer; what was to be recorded can be recorded later."""


class ServerError(Away):
    """The server answers that something of its own went wrong: its database is away, or it cannot take just this."""


class Remote:
    """An `MlflowClient` of which every call may raise `Away`; after a server did not answer, all do for a while."""

    def __init__(self, client: Any, uri: str) -> None:
        self._client, self._uri = client, uri
        self._again = -math.inf

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if time.monotonic() < self._again:
                raise Away("the MLflow server did not answer a moment ago")
            try:
                return method(*args, **kwargs)
            except (MlflowException, requests.RequestException) as error:
                said = address.masked(reason(error), self._uri)
                if _is_away(error):
                    self._again = time.monotonic() + REST_S
                    raise Away(f"the MLflow server does not answer: {said}") from None
                if _is_its_own(error):
                    raise ServerError(f"the MLflow server failed: {said}") from None
                if address.password(self._uri):
                    raise MlflowException(address.masked(str(error), self._uri)) from None
                raise

        return call


def _is_away(error: BaseException | None) -> bool:
    """No connection, a gateway before nothing, or a server that says so; not what it fails at or refuses."""
    if isinstance(error, RestException) and error.error_code == "TEMPORARILY_UNAVAILABLE":
        return True
    if isinstance(error, MlflowException) and re.search(r"failed with (exception|error code 50[234])", str(error)):
        return True
    while error is not None:
        if isinstance(error, requests.ConnectionError | requests.Timeout) or _status(error) in (502, 503, 504):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_its_own(error: BaseException) -> bool:
    """Whether the server fails, not the request; with tables of its database gone, it does at every one."""
    if isinstance(error, RestException):
        return bool(error.error_code == "INTERNAL_ERROR")
    return _status(error) == 500 or "failed with error code 5" in str(error)


def _status(error: BaseException) -> int | None:
    """Of the answer to a transfer of files, which MLflow hands on as it is."""
    answer = error.response if isinstance(error, requests.HTTPError) else None
    return None if answer is None else answer.status_code


@contextmanager
def impatient() -> Iterator[None]:
    """MLflow otherwise tries for minutes; it reads these anew for every request."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def reason(error: Exception) -> str:
    """One line: what a server or database said, or for a refused connection, a page of text, only its kind."""
    behind = error.__cause__ or error.__context__
    if behind is not None and isinstance(error, MlflowException | Away):
        return type(behind).__name__
    return str(error).strip().split("\n", 1)[0][:200]
