"""Shows a run's progress and tables on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping

import rich.console
import rich.live
import rich.table


class Display:
    """Shows the progress of a run: a table that refreshes in place on a terminal, one line per step elsewhere."""

    # Column title, metric, format.
    COLUMNS = (
        ("reward", "reward/total", "{:.3f}"),
        ("global", "reward/outcome", "{:.3f}"),
        ("chunk", "reward/chunk", "{:.3f}"),
        ("valid ops", "operations/valid_fraction", "{:.3f}"),
        ("memory tok", "memory/tokens", "{:.0f}"),
        ("entropy", "loss/entropy", "{:.2f}"),
        ("tok/s", "time/new_tokens_per_second", "{:.0f}"),
        ("s/step", "time/step_seconds", "{:.1f}"),
    )

    def __init__(self, num_steps: int, silent: bool = False):
        """Prepares; the table is shown within the `with` block.

        Args:
            num_steps: Steps of the whole run; 0 where there are none to count.
            silent: Show nothing, because another process does.
        """
        self._silent = silent
        self._console = rich.console.Console()
        self._num_steps = num_steps
        self._rows: list[tuple[str, ...]] = []
        self._durations: list[float] = []
        self._phase, self._phase_began = "", time.monotonic()
        self._live: rich.live.Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal and not self._silent:
            self._live = rich.live.Live(
                get_renderable=self._table, console=self._console, refresh_per_second=2, vertical_overflow="visible"
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._phase = ""
        if self._live:
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Says what is going on now."""
        self._phase, self._phase_began = name, time.monotonic()

    def say(self, line: str) -> None:
        """Prints one line above the table."""
        if self._silent:
            return
        if self._live:
            self._console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a finished step."""
        self._durations.append(metrics["time/step_seconds"])
        cells = tuple(form.format(metrics[name]) if name in metrics else "-" for _, name, form in self.COLUMNS)
        self._rows.append((f"{step + 1}/{self._num_steps}", *cells, self._time_left(step)))
        if not self._live and not self._silent:
            shown = " · ".join(f"{title} {cell}" for (title, *_), cell in zip(self.COLUMNS, cells, strict=True))
            print(f"step {step + 1}/{self._num_steps} · {shown} · left {self._time_left(step)}", flush=True)

    def _time_left(self, step: int) -> str:
        # The median of the last few steps, because the first one compiles, which would distort a mean.
        recent = sorted(self._durations[-5:])
        seconds = recent[len(recent) // 2] * (self._num_steps - step - 1)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def _table(self) -> rich.table.Table:
        table = rich.table.Table(box=None, pad_edge=False)
        for title in ("step", *(title for title, *_ in self.COLUMNS), "left"):
            table.add_column(title, justify="right")
        for row in self._rows[-12:]:
            table.add_row(*row)
        if self._phase:
            table.caption = f"{self._phase} · {time.monotonic() - self._phase_began:.0f} s"
        return table


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table; without colors, and 110 characters wide, where the output is no terminal."""
    table = rich.table.Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 110
    rich.console.Console(width=width).print(table)
