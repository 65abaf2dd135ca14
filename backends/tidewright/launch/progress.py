"""What long work shows on a terminal; elsewhere, a line each, and one for each tenth that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    if not console.is_terminal:
        console.print(text)
        yield
        return
    with console.status(text):
        yield


@contextmanager
def progress_bar(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    if not console.is_terminal:
        console.print(text)
        yield _tenths(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tenths(console: Console) -> Callable[[int, int], None]:
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        tenths = 10 * done // max(total, 1)
        if tenths > shown:
            shown = tenths
            console.print(f"  {10 * tenths} %", highlight=False)

    return show
