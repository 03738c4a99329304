"""Shows a run from its file of events: a live bar on a terminal, a line now and then elsewhere.

Layer 3.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cromss_dist.train.record import EVENTS_FILE

POLL_S = 0.2
LINES_OFF_TERMINAL = 10  # of progress, over a run


@contextmanager
def watching(run_dir: Path, console: Console) -> Iterator[None]:
    """Shows the events of a run while the block runs, and all that are left at its end."""
    stop = threading.Event()
    viewer = _Viewer(console)

    def follow() -> None:
        with viewer:
            tail = _Tail(run_dir / EVENTS_FILE)
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


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run so far; none if it has no file of events yet."""
    return _Tail(run_dir / EVENTS_FILE).read()


class _Tail:
    """New whole lines of a file that another process appends to; the file may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class _Viewer:
    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = 1
        self._lines_printed = 0
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "_Viewer":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            getattr(self, f"_on_{event['event']}", lambda _: None)(event)

    def _on_stage(self, event: dict[str, Any]) -> None:
        self.console.print(f"  {event['text']}", highlight=False)

    def _on_start(self, event: dict[str, Any]) -> None:
        self._total = event["total_samples"]
        self._task = self._bar.add_task("training", total=self._total, figures="")

    def _on_progress(self, event: dict[str, Any]) -> None:
        metrics = event["metrics"]
        figures = f"loss {metrics['train/loss/total']:.3f}  {metrics['perf/samples_per_s']:.1f}/s"
        if self._task is not None:
            self._bar.update(self._task, completed=event["samples"], figures=figures)
        line = event["samples"] * LINES_OFF_TERMINAL // self._total
        if not self.console.is_terminal and line > self._lines_printed:
            self._lines_printed = line
            self.console.print(
                f"  training {event['samples'] / self._total:4.0%}  {event['samples']} samples  {figures}", highlight=False
            )

    def _on_validation(self, event: dict[str, Any]) -> None:
        metrics = event["metrics"]
        text = f"  validation after {event['samples']} samples: loss {metrics['val/loss/total']:.3f}"
        for kind, name in (("miou", "mIoU, noisy labels"), ("reference_miou", "mIoU, clean truth")):
            if f"val/{kind}_s1" in metrics:
                text += f"  {name}: S1 {metrics[f'val/{kind}_s1']:.3f} S2 {metrics[f'val/{kind}_s2']:.3f}"
        self.console.print(text, highlight=False, soft_wrap=True)
