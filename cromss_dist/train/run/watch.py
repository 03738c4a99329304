"""Shows a run from its file of events: a live bar on a terminal, a line now and then elsewhere.

Layer 3.
"""

import shlex
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from cromss_dist.tracking.run.spool import EVENTS_FILE, Tail

POLL_S = 0.2
LINES_OFF_TERMINAL = 10  # of progress, over a run
SILENCE_S = 600.0  # without a line off a terminal, after which progress is one: a tenth of a run may take a day
_SPEED_WINDOW_S = 3600.0  # of the time left; must hold two progress events, which may be minutes apart

# What is shown of a progress event, by importance: names of its metrics, and their text, which may be empty.
_FIGURES: tuple[tuple[tuple[str, ...], Callable[..., str]], ...] = (
    (("train/loss/total",), "loss {:.3f}".format),
    (("perf/samples_per_s",), "{:.1f}/s".format),
    (("train/kept_s1", "train/kept_s2"), "kept S1 {:.0%} S2 {:.0%}".format),
    (("train/agreement",), "agree {:.0%}".format),
    (("train/grad_norm",), "gradient {:.3g}".format),
    (("perf/data_wait_s", "perf/step_s"), lambda wait_s, step_s: f"data wait {wait_s / step_s:.0%}"),
    (("train/skipped_steps",), lambda number: f"skipped {number:.0f}" if number else ""),
)


@contextmanager
def watching(run_dir: Path, console: Console) -> Iterator[None]:
    """Shows the events that a run writes while the block runs; not those that are there when it begins."""
    stop = threading.Event()
    viewer = _Viewer(console)
    tail = Tail.at_end(run_dir / EVENTS_FILE)

    def follow() -> None:
        with viewer:
            while not stop.wait(POLL_S):
                viewer.show(tail.read())
            viewer.show(tail.read())

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Bar(Progress):
    """A bar, and below it figures on as many lines as they need."""

    figures: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            unbroken = [figure.replace(" ", "\N{NO-BREAK SPACE}") for figure in self.figures]
            yield Text(
                textwrap.fill("  ".join(unbroken), max(self.console.width - 2, 20), initial_indent="  ", subsequent_indent="  ")
            )


class _Viewer:
    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = 1
        self._lines_printed = 0
        self._last_line_s = 0.0  # time of an event
        self._saved_step: int | None = None
        self._task: TaskID | None = None
        self._bar = _Bar(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=40)),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_SPEED_WINDOW_S,
        )

    def __enter__(self) -> "_Viewer":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            getattr(self, f"_on_{event['event']}", lambda _: None)(event)

    def _say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    def _on_stage(self, event: dict[str, Any]) -> None:
        self._say(event["text"])

    def _on_start(self, event: dict[str, Any]) -> None:
        self._total, self._last_line_s = event["total_samples"], event["time"]
        if self._task is None:  # a run that is restarted starts again
            self._task = self._bar.add_task("training", total=self._total)

    def _on_resumed(self, event: dict[str, Any]) -> None:
        self._saved_step = event["step"]
        if self._task is not None:
            self._bar.reset(self._task, completed=event["samples"])  # what was done before tells nothing of the speed
        differences = f", with {', '.join(event['differences'])}" if event["differences"] else ""
        self._say(f"goes on after step {event['step']} from {event['folder']}{differences}")

    def _on_progress(self, event: dict[str, Any]) -> None:
        figures = _figures(event["metrics"])
        if self._saved_step is not None:
            figures.append(f"saved step {self._saved_step}")
        self._bar.figures = figures
        if self._task is not None:
            self._bar.update(self._task, completed=event["samples"])
        line = event["samples"] * LINES_OFF_TERMINAL // self._total
        due = line > self._lines_printed or event["time"] >= self._last_line_s + SILENCE_S
        if due and not self.console.is_terminal:
            self._lines_printed, self._last_line_s = line, event["time"]
            self._say(f"training {event['samples'] / self._total:4.0%}  {event['samples']} samples  {'  '.join(figures)}")

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self._saved_step = event["step"]

    def _on_bad_step(self, event: dict[str, Any]) -> None:
        self._say(f"step {event['step']} skipped: {event['reason']}{_kept(event)}")

    def _on_spike(self, event: dict[str, Any]) -> None:
        self._say(f"step {event['step']}{' skipped' if event['skipped'] else ''}: {event['reason']}{_kept(event)}")

    def _on_stopping(self, event: dict[str, Any]) -> None:
        self._say(f"stops after step {event['step']}: {event['reason']}")

    def _on_validation(self, event: dict[str, Any]) -> None:
        metrics = event["metrics"]
        if "val/loss/total" not in metrics:  # scores on a test set, which have a line of their own
            return
        text = f"validation after {event['samples']} samples: loss {metrics['val/loss/total']:.3f}"
        for kind, name in (("miou", "mIoU, noisy labels"), ("reference_miou", "mIoU, clean truth")):
            if f"val/{kind}_s1" in metrics:
                text += f"  {name}: S1 {metrics[f'val/{kind}_s1']:.3f} S2 {metrics[f'val/{kind}_s2']:.3f}"
        self._say(text)


def _figures(metrics: Mapping[str, float]) -> list[str]:
    """The texts of those figures that a run has."""
    texts = (text(*map(metrics.__getitem__, names)) for names, text in _FIGURES if metrics.keys() >= set(names))
    return [text for text in texts if text]


def _kept(event: Mapping[str, Any]) -> str:
    return f"; cromss replay {shlex.quote(event['bundle'])}" if event["bundle"] else ""
