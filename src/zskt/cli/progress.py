"""Live progress on stderr: a bar and a line of key figures on a terminal, a line now and then elsewhere."""

import contextlib
import contextvars
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from zskt.errors import to_stderr
from zskt.method.budget import duration
from zskt.run.lifecycle import Event
from zskt.runtime import pick_device, threads

EVERY = 30.0
"""Seconds between two lines of progress where stderr is no terminal."""
_SILENT = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silence(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, only warnings and errors are printed."""
    before = _SILENT.set(wanted)
    try:
        yield
    finally:
        _SILENT.reset(before)


def notice(line: str) -> None:
    """One line for the user, unless they asked for silence."""
    if not _SILENT.get():
        to_stderr(line)


def warn(line: str) -> None:
    """A warning, which is always printed."""
    to_stderr(f"warning: {line}")


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f}/s" if task.speed else "", style="progress.data.speed")


def say_if_busy(count: int | str, work: Callable[[], object]) -> None:
    """A note if other programs use this machine's processors and one thread does `work` faster than `count`.

    Threads wait for one another, by spinning: two on a busy machine may be several times slower than one.
    """
    count = count if isinstance(count, int) else torch.get_num_threads()
    if count < 2 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return
    seconds: dict[int, list[float]] = {count: [], 1: []}
    for _ in range(4):  # in turns; the first of each, which allocates, does not count
        for number, taken in seconds.items():
            with threads(number):
                begun = time.perf_counter()
                work()
                taken.append(time.perf_counter() - begun)
    several, one = (statistics.median(taken[1:]) for taken in seconds.values())
    if one < several:
        notice(
            f"note: other programs keep this machine busy (load {load:.1f} on {cores} cores), and one thread is "
            f"{several / one:.1f} times as fast as {count} now: --threads 1, or OMP_WAIT_POLICY=passive"
        )


def say_if_emulated(precision: str, device: str = "auto") -> None:
    """A line if this CPU has no arithmetic in bfloat16: it computes in float32 and rounds, 10 to 15 times slower."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if precision == "bf16" and x86 and pick_device(device).type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        notice("note: this CPU has no bf16 arithmetic and emulates it, 10 times slower than fp32: --precision fp32")


def console() -> Console:
    """Stderr, for everything but the final JSON."""
    return Console(stderr=True, soft_wrap=True, quiet=_SILENT.get())


class _TwoLines(Progress):
    """The bar on one line and the key figures on the next, so that both fit 80 columns."""

    beside = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.beside:
            yield Text(self.beside)


class _Lines:
    """Progress as plain lines: nothing for work of a few seconds, then one every `EVERY` seconds and one at the end."""

    def __init__(self, phase: str, unit: str) -> None:
        self.phase, self.unit = phase, unit
        self.begun = self.said = time.monotonic()
        self.first: int | None = None  # not 0 where a run is continued
        self.over = False

    def __call__(self, done: int, total: int, beside: str = "", lines: Sequence[str] = ()) -> None:
        for line in lines:
            to_stderr(line)
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        ended = done >= total and not self.over and now - self.begun > EVERY / 6
        self.over = self.over or done >= total
        if not ended and (self.over or now - self.said < EVERY):
            return
        self.said = now
        left = (total - done) * (now - self.begun) / max(1, done - self.first)
        time_left = f"in {duration(now - self.begun)}" if ended else f"{duration(left)} left"
        notice(f"{self.phase}: {done:,} of {total:,} {self.unit}, {time_left}{'  ' + beside if beside else ''}")


@contextlib.contextmanager
def bar(phase: str, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar; call it with (done, total, key figures, lines to keep above it)."""
    if _SILENT.get() or not console().is_terminal:
        yield _Lines(phase, unit)
        return
    progress = _TwoLines(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=15),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console(),
    )
    with progress:
        task = progress.add_task(phase, total=None)

        def show(done: int, total: int, beside: str = "", lines: Sequence[str] = ()) -> None:
            for line in lines:
                progress.console.print(line, markup=False, highlight=False)
            progress.beside = beside or progress.beside
            progress.update(task, completed=done, total=total)

        yield show


@contextlib.contextmanager
def distilling() -> Iterator[Callable[[Event], None]]:
    """A callback for `distill`: step k/N, rate, time left, losses, the teacher's confidence, class entropy."""
    with bar("distilling", "steps") as show:
        shown: dict[str, str] = {}

        def callback(event: Event) -> None:
            line = event.line or {}
            losses = {key.removesuffix("_loss"): value for key, value in line.items() if key.endswith("_loss")}
            if losses:
                last = {name: value[-1] if isinstance(value, list) else value for name, value in losses.items()}
                shown["losses"] = "loss " + " ".join(f"{name} {value:.4f}" for name, value in last.items())
            if "teacher_confidence" in line:
                shown["teacher"] = f"teacher confidence {line['teacher_confidence']:.2f}"
                shown["classes"] = f"class entropy {line['class_entropy']:.2f}"
            if "accuracy" in line:
                shown["accuracy"] = f"test {100 * line['accuracy']:.2f} %"
            warnings = [f"warning at step {event.step:,}: {text}" for text in line.get("warnings", [])]
            show(event.step, event.steps, "  ".join(shown.values()), warnings)

        yield callback


@contextlib.contextmanager
def teaching(phase: str = "teaching") -> Iterator[Callable[[Event], None]]:
    """A callback for `teach` and `train_student`: update k/N, rate, time left, accuracy."""
    with bar(phase, "updates") as show:

        def callback(event: Event) -> None:
            accuracy = (event.line or {}).get("accuracy")
            show(event.step, event.steps, "" if accuracy is None else f"test {100 * accuracy:.2f} %")

        yield callback
