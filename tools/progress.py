"""Bars of the tools. Off a terminal, as in the log of a batch job, the bars are written out once a minute."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_EVERY_S = 60.0
_MOVE_EVERY_S = 0.1


class Bars(Progress):
    """Progress bars that a log shows too.

    Args:
        console: Where to.
        columns: Of each bar.
        transient: Whether the bars go when they are done.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = False) -> None:
        super().__init__(*columns, console=console, transient=transient)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Shows the bars."""
        super().start()
        if not self.console.is_terminal:
            threading.Thread(target=self._log, daemon=True).start()

    def stop(self) -> None:
        """Shows them a last time, or takes them away."""
        self._stopped.set()
        if self.live.transient:
            self.live.stop()  # rich's own puts an empty line into a log
        else:
            super().stop()

    def _log(self) -> None:
        while not self._stopped.wait(LOG_EVERY_S):
            self.console.print(self.make_tasks_table([task for task in self.tasks if task.visible and not task.finished]))


class Rate(ProgressColumn):
    """What is done a second.

    Args:
        unit: What is counted.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate, over the whole time once all is done."""
        rate = task.finished_speed if task.finished else task.speed
        return Text("" if rate is None else f"{rate:.1f} {self._unit}/s")


class _Done(ProgressColumn):
    """Files of a folder; bytes of a container and their rate."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.completed:,.0f} files" if task.completed else "")
        rate = f", {decimal(int(task.speed))}/s" if task.speed else ""
        return Text(f"{decimal(int(task.completed))} of {decimal(int(task.total))}{rate}")


@contextmanager
def finding_files(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far the inventory of an archive is; gives the function that `take_inventory` tells."""
    with Bars(console, TextColumn("{task.description}"), BarColumn(), _Done(), TimeRemainingColumn(), transient=True) as bars:
        tasks: dict[str, TaskID] = {".": bars.add_task("Finding files", total=None)}
        moved = 0.0

        def tell(path: str, done: int, size: int) -> None:
            nonlocal moved
            if path not in tasks:  # they are read one after the other
                for earlier in tasks.values():
                    bars.update(earlier, visible=False)
                tasks[path] = bars.add_task(f"Listing {path}", total=size)
            elif time.monotonic() - moved < _MOVE_EVERY_S:  # told of every member of a tar
                return
            moved = time.monotonic()
            bars.update(tasks[path], completed=done)

        yield tell
