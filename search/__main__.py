"""`python -m search`: the whole program on one screen; with `build.py` the only reader of a DictConfig."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

import hydra
from omegaconf import DictConfig
from rich.console import Console

from compressors.errors import ConfigError
from search import build
from search.conclude import conclude, conclude_once, show
from search.progress import ProgressView
from search.remote import Away
from search.workers import run_together


def search(config: DictConfig, console: Console) -> None:
    """Build, run to the budget or to Ctrl-C, choose, register, and print the front."""
    with ProgressView(console, build.view(config)) as view:
        job = build.build(config, view.training)
        outcome = run_together(job, view, config.workers)
        conclusion = conclude(job, outcome) if config.worker is None else conclude_once(job, outcome)
    if conclusion is None:
        console.print(f"{outcome.ended}; another worker chooses and draws")
    else:
        show(conclusion, console)


def terminal() -> Console:
    """A log has no width of its own: the front's table needs this much."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def guarded(action: Callable[[], None], console: Console) -> int:
    """Exit code of an action; what the user got wrong becomes one line."""
    try:
        action()
    except ConfigError as error:
        console.print(f"compareto: {error}", style="bold red", highlight=False, soft_wrap=True, markup=False)
        return 2
    except Away as away:
        line = f"compareto: tracking.uri: {away}; start the server: the same command goes on"
        console.print(line, style="bold red", highlight=False, soft_wrap=True, markup=False)
        return 2
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        line = f"compareto: {reason}; make room or choose another folder=DIRECTORY: the same command goes on"
        console.print(line, style="bold red", highlight=False, soft_wrap=True, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("compareto: interrupted before the first trial; the same command begins again")
        return 130
    return 0


# MLflow tells of several files that it could not copy in an error of its own, which has no number.
NO_ROOM = ("database or disk is full", "readonly database", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def no_room(error: BaseException | None) -> str | None:
    """What an error says of a disk that is full or cannot be written, whatever was raised because of it; or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return str(error)
        for line in str(error).splitlines():
            if any(sign in line for sign in NO_ROOM):
                return line[:200]
        error = error.__cause__ or error.__context__
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a search with Hydra's command line: overrides, `--multirun`, `--cfg job`, `--help`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word.startswith("-") for word in arguments):
        # Hydra would print a page about a mistyped option; this says it in a line.
        code = guarded(lambda: _check(arguments), Console(stderr=True))
        if code:
            return code
    sys.argv = ["compareto search", *arguments]
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(job)()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def job(config: DictConfig) -> None:
    """One job of Hydra's, here or wherever a launcher takes it; one that fails ends its process with the exit code."""
    code = guarded(lambda: search(config, terminal()), Console(stderr=True))
    if code:
        sys.exit(code)


def _check(arguments: Sequence[str]) -> None:
    build.compose(arguments)


if __name__ == "__main__":
    sys.exit(main())
