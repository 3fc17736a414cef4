"""Shows a running search on the terminal: a live line on a screen, one line a trial in a log; computes nothing."""

from rich.console import Console
from rich.live import Live
from rich.text import Text

from evaluators.measurement import Measurement
from search.study import Progress
from search.training import TrainingProgress
from search.trial import TrialRecord
from search.view import View, not_ruined, optional, quality_text


class ProgressView:
    """A `Watcher`; use it as a context so that the live line is taken down at the end."""

    def __init__(self, console: Console, shown: View) -> None:
        self._console, self._shown = console, shown
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._printed = self._tenths = 0

    def __enter__(self) -> "ProgressView":
        """Put up the live line."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take down the live line."""
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Redraw, and in a log print a line for each trial that came in."""
        if self._live:
            self._live.update(Text(self._line(progress)))
        elif len(progress.records) > self._printed:
            self._printed = len(progress.records)
            self._console.print(
                self._line(progress) + " | " + _outcome(progress.records[-1], self._shown), highlight=False
            )

    def training(self, progress: TrainingProgress) -> None:
        """How far the training of the uncompressed network is: a bar on a screen, ten lines in a log."""
        tenth = 10 * progress.step // progress.steps
        filled = "#" * (2 * tenth) + "." * (20 - 2 * tenth)
        accuracy = "" if progress.accuracy is None else f", calibration accuracy {100 * progress.accuracy:.1f} %"
        text = (
            f"training the network [{filled}] step {progress.step}/{progress.steps}, loss {progress.loss:.3f}{accuracy}"
        )
        if self._live:
            self._live.update(Text(text))
        elif tenth > self._tenths:
            self._tenths = tenth
            self._console.print(text, highlight=False, markup=False)

    def phase(self, text: str) -> None:
        """What is being done, outside of a search."""
        if self._live:
            self._live.update(Text(text))

    def _line(self, progress: Progress) -> str:
        trials = f"/{progress.budget.trials}" if progress.budget.trials else ""
        parts = [f"trials {progress.done}{trials}", f"front {len(progress.front)}", self._best(progress)]
        parts.append(f"left {_clock(self._left_s(progress))}")
        if progress.phase:
            parts.append(progress.phase)
        return " | ".join(filter(None, parts))

    def _best(self, progress: Progress) -> str:
        """The best quality on the front, and the fastest of it that is not ruined."""
        if not progress.front:
            return ""
        near = not_ruined([r.value(self._shown.quality) for r in progress.front])
        best = max(near, key=lambda m: m.value)
        useful = [r for r in progress.front if r.value(self._shown.quality) in near]
        speeds = [s for r in useful if (s := optional(r, self._shown.speed))]
        fastest = f", fastest {1 / min(s.value for s in speeds):.2f}x" if speeds else ""
        return f"best {self._shown.quality} {_short(best)}{fastest}"

    def _left_s(self, progress: Progress) -> float:
        """The nearer of the two budgets, at the pace so far."""
        left = []
        if progress.budget.minutes is not None:
            left.append(60 * progress.budget.minutes - progress.elapsed_s)
        if progress.budget.trials is not None and progress.done:
            left.append((progress.budget.trials - progress.done) * progress.elapsed_s / progress.done)
        return max(0.0, min(left)) if left else float("nan")


def _outcome(record: TrialRecord, view: View) -> str:
    if record.infeasible is not None:
        return f"trial {record.number}: infeasible, {record.infeasible}"
    if record.stopped is not None:
        return f"trial {record.number}: stopped at {record.stopped.rung}, {record.stopped.reason}"
    ratio = optional(record, view.speed)
    speed = f", {1 / ratio.value:.2f}x" if ratio else ""
    return f"trial {record.number}: {view.quality} {_short(record.value(view.quality))}{speed}"


def _short(quality: Measurement) -> str:
    return quality_text(quality).partition(" [")[0]


def _clock(seconds: float) -> str:
    return "?" if seconds != seconds else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
