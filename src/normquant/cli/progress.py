"""How far a long command is: on stderr, a bar in a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

DELAY_S = 5.0  # what ends sooner shows nothing
INTERVAL_S = 20.0  # between plain lines
TICK_S = 1.0
BAR = "{n_fmt}/{total_fmt} {bar:12} {elapsed}, about {remaining} left {desc}"
BAR_OF_ONE = "{elapsed} {desc}"
PLAIN = "{n_fmt} of {total_fmt} in {elapsed}, about {remaining} left"


def add_quiet(parser: argparse._ActionsContainer) -> None:
    """--quiet of a command that shows its progress."""
    parser.add_argument("--quiet", action="store_true", help="show no progress on stderr")


class Progress:
    """Steps done out of a total; nothing is shown of what takes less than DELAY_S, unless it is eager.

    What a command prints on stdout meanwhile goes through `line`, so that no bar is in its way. Where stderr is no
    terminal, a plain line is shown every INTERVAL_S at the most; where it is eager, also one for each `begin`.
    """

    def __init__(self, total: int, quiet: bool, eager: bool = False) -> None:
        from tqdm import tqdm

        self.done = 0
        self.doing = ""
        self._tqdm, self._total, self._quiet, self._eager = tqdm, total, quiet, eager
        self._started = time.monotonic()
        self._next = self._started + (0.0 if eager else DELAY_S)
        self._bar: Any = None
        if not quiet and sys.stderr and sys.stderr.isatty():
            size = shutil.get_terminal_size()  # which has an answer for a terminal that says 0
            self._bar = tqdm(
                total=total, file=sys.stderr, delay=0.0 if eager else DELAY_S, leave=False,
                ncols=size.columns, nrows=size.lines, bar_format=BAR if total > 1 else BAR_OF_ONE,
            )  # fmt: skip

    def begin(self, what: str) -> None:
        """Say what is done now."""
        self.doing = what
        if self._bar is not None:
            self._bar.set_description_str(what, refresh=False)
        if self._eager:
            self._next = 0.0
        self.show()

    def step(self, count: int = 1) -> None:
        """So many steps are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._eager:
            self.show()

    def line(self, text: str, file: TextIO | None = None) -> None:
        """A line of the command's own, on stdout unless given."""
        if self._bar is not None:
            self._tqdm.write(text, file=file or sys.stdout)
        else:
            print(text, file=file, flush=True)

    def result(self, text: str) -> None:
        """A step is done, and this is what came of it."""
        self.line(text)
        self.step()

    def show(self) -> None:
        """Show how far it is, where that is due."""
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        if self._bar is not None:
            self._bar.refresh()
        else:
            self._next = now + INTERVAL_S
            print(f"[{self._text(now - self._started)}] {self.doing}".rstrip(), file=sys.stderr, flush=True)

    def _text(self, elapsed: float) -> str:
        if not self.done:  # no estimate yet
            of = f"0 of {self._total} in " if self._total > 1 else ""
            return f"{of}{self._tqdm.format_interval(elapsed)}"
        return str(self._tqdm.format_meter(self.done, self._total, elapsed, bar_format=PLAIN))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def showing(total: int, quiet: bool, ticking: bool = False, eager: bool = False) -> Iterator[Progress]:
    """The progress of what is done within. ticking: steps are long, so time goes on in between."""
    progress, ended = Progress(total, quiet, eager), threading.Event()

    def tick() -> None:
        while not ended.wait(TICK_S):
            progress.show()

    thread = threading.Thread(target=tick, daemon=True)
    if ticking and not quiet:
        thread.start()
    try:
        yield progress
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
        progress.close()


@contextlib.contextmanager
def compiling(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """The progress of compiling ahead, on all cores: gives what is told (calls made, of how many)."""
    shown: list[Progress] = []

    def told(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(total, quiet, eager=True))
            shown[0].begin(f"compiling on {os.cpu_count()} cores")
        shown[0].step(done - shown[0].done)
        shown[0].show()

    try:
        yield told
    finally:
        for progress in shown:
            progress.close()
