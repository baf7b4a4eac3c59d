"""What users see: text, tables and progress bars, in colour where rich is installed and plain where it is not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[str, int], None]

NO_RICH = "rich is not installed: plain output (pip install 'ringfa3[bench]')"
STYLES = {"ok": "green", "note": "yellow", "broken": "bold red", "plain": "", "dim": "dim"}


class Console:
    """Writes results to out (stdout) and progress to err (stderr), so that output can be piped.

    Args:
        out, err: where to; None: this process's.
        rich: False writes plain text even where rich is installed.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, *, rich: bool = True) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self.rich = rich and importlib.util.find_spec("rich") is not None
        if rich and not self.rich:
            print(NO_RICH, file=self.err)

    def say(self, text: str = "", style: str = "plain") -> None:
        """A line, wrapped to the terminal where rich does it."""
        if not self.rich:
            print(text, file=self.out)
            return
        from rich.text import Text

        self._console(self.out).print(Text(text, style=STYLES[style]))

    def heading(self, text: str) -> None:
        """The title of what follows."""
        if not self.rich:
            print(f"\n{text}\n{'-' * len(text)}", file=self.out)
            return
        from rich.text import Text

        self._console(self.out).print(Text(f"\n{text}", style="bold cyan"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None = None) -> None:
        """A table with a header; numbers are flushed right.

        Args:
            columns: titles; all empty: no header.
            rows: one string a column.
            styles: a key of STYLES for each row; None: plain.
        """
        right = [any(columns) and bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(columns))]
        if not self.rich:
            print("\n".join(plain_table(columns, rows, right)), file=self.out)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=box.SIMPLE_HEAD if any(columns) else None, show_header=any(columns), pad_edge=False)
        for title, flush in zip(columns, right, strict=True):
            grid.add_column(title, justify="right" if flush else "left", overflow="fold")
        for i, row in enumerate(rows):
            grid.add_row(*map(Text, row), style=STYLES[styles[i] if styles else "plain"])
        self._console(self.out).print(grid)

    @contextmanager
    def progress(self, total: int) -> Iterator[Advance]:
        """A bar of total steps on stderr; the block calls advance(what is under way, steps done since)."""
        if not self.rich or not self.err.isatty():
            yield self._lines(total)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console(self.err), transient=True) as bar:
            task = bar.add_task("starting the ranks", total=total)
            yield lambda text, steps: bar.update(task, description=text, advance=steps)

    def _lines(self, total: int) -> Advance:
        """Progress for logs: a line a step."""
        done = 0

        def advance(text: str, steps: int) -> None:
            nonlocal done
            done += steps
            print(f"[{done}/{total}] {text}", file=self.err, flush=True)

        return advance

    def _console(self, file: TextIO):  # type: ignore[no-untyped-def]  # rich is optional
        from rich.console import Console as RichConsole

        width = None if file.isatty() else 160
        return RichConsole(file=file, width=width, highlight=False)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """The table's lines, columns padded to their widest cell."""
    header = [list(columns), ["-" * len(title) for title in columns]] if any(columns) else []
    grid = [*header, *map(list, rows)]
    widths = [max((len(row[i]) for row in grid), default=0) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in grid
    ]


def _numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-+." or cell == "n/a"
