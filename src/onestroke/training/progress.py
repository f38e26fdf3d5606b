"""The progress line of a run: rounds, losses, images per second."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A rich progress bar; `quiet` shows nothing."""

    def __init__(self, total: int, images: int, quiet: bool, task: str = "distilling"):
        self.images, self.since, self.at = images, time.monotonic(), -1
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, disable=quiet, refresh_per_second=2)
        self.task = self.bar.add_task(task, total=total, losses="")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def show(self, done: int, log: dict[str, float]) -> None:
        if self.at < 0:
            self.since, self.at = time.monotonic(), done
        rate = (done - self.at) * self.images / max(time.monotonic() - self.since, 1e-9)
        losses = "  ".join(f"{k} {v:.3g}" for k, v in log.items())
        self.bar.update(self.task, completed=done, losses=f"{losses}  {rate:.1f} images/s")
