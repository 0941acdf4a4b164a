"""Running the jobs of `zskt sweep` and `zskt reproduce`, one after the other or on Ray; the table of their states."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from zskt.cli.options import Number, Real
from zskt.cli.progress import console, notice
from zskt.errors import UsageError, ZsktError, short
from zskt.paper.cluster import Order, run_jobs_on_ray
from zskt.paper.jobs import Bar, Job, Show, run_jobs


@dataclass(frozen=True)
class Cluster:
    """Where the jobs run."""

    ray: bool = False
    """run jobs at the same time on the Ray cluster at RAY_ADDRESS, else on this machine's; RAY_ADDRESS alone does, too.
    The output folder must be on storage that all nodes share, as must files that the command names."""
    cpus_per_run: Number = None
    """with Ray: processors of one job, which are its threads; by default 1."""
    gpus_per_run: Real = None
    """with Ray: GPUs of one job, also a part of one, such as 0.5; by default 0."""

    @property
    def wanted(self) -> bool:
        """Whether jobs go to Ray; raises UsageError for options that would have no effect."""
        wanted = self.ray or bool(os.environ.get("RAY_ADDRESS"))
        given = {"--cpus-per-run": self.cpus_per_run, "--gpus-per-run": self.gpus_per_run}
        for option, value in given.items():
            if value is not None and not wanted:
                raise UsageError(f"{option} is for Ray: give --ray, too, or leave it out")
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{option} {value}: expected a number from 0 on")
        if self.cpus_per_run == 0:
            raise UsageError("--cpus-per-run 0: expected at least 1, for the threads of a job")
        return wanted


ClusterOptions = tyro.conf.OmitArgPrefixes[Cluster]
HERE = Cluster()


def carry_out(
    jobs: Sequence[Job],
    root: Path,
    seconds: float,
    cluster: Cluster | None,
    build: Callable[[Any, str], Sequence[Job]],
    asked: Any,
    bar: Bar | None = None,
) -> dict[str, str]:
    """Run the unfinished jobs, here or on a cluster, for which `build(asked, name)` makes one of them again.

    Returns failed job -> reason. Shows `bar` for each job that runs here, else a table of all jobs.
    """
    if cluster is None:
        if bar is not None:
            return run_jobs(jobs, root, seconds, bar)
        with board(jobs, root) as shown:
            return run_jobs(jobs, root, seconds, shown)
    order = Order(build, asked, root, cluster.cpus_per_run or 1, cluster.gpus_per_run or 0.0)
    with board(jobs, root, begun="queued") as shown:
        return run_jobs_on_ray(jobs, order, seconds, shown, notice)


@contextlib.contextmanager
def board(jobs: Sequence[Job], root: Path, *, begun: str = "running") -> Iterator[Bar]:
    """A table of all jobs, live on a terminal, lines elsewhere; a job that was `begun` runs from its first step on."""
    shown = Board(jobs, root, begun)
    screen = console()
    if screen.quiet or not screen.is_terminal:
        yield shown.bar
        return
    with Live(console=screen, get_renderable=shown.table, refresh_per_second=2):
        yield shown.bar


@dataclass
class Line:
    """A job in the table."""

    state: str
    text: str = ""
    seconds: float | None = None


class Board:
    """The states of jobs: waiting, queued (with Ray), running, done, failed."""

    ORDER = ("running", "failed", "queued", "waiting", "done")

    def __init__(self, jobs: Sequence[Job], root: Path, begun: str) -> None:
        self.root, self.begun = root, begun
        self.jobs = {job.name: job for job in jobs}
        self.lines = {job.name: Line("waiting") for job in jobs}
        for job in jobs:
            if (found := job.measured(root)) is not None:
                self.lines[job.name] = Line("done", said(found))

    @contextlib.contextmanager
    def bar(self, name: str, unit: str) -> Iterator[Show]:
        """The progress of one job; what ends it passes through, so that the table has its outcome."""
        line = self.lines[name] = Line(self.begun)
        started = time.monotonic()

        def show(done: int, total: int, text: str) -> None:
            line.state = "running"
            line.text = f"{done:,} of {total:,} {unit}{'  ' + text if text else ''}"

        try:
            yield show
        except ZsktError as error:
            line.state, line.text = "failed", short(error, 2_000)
            raise
        finally:
            line.seconds = time.monotonic() - started
            if line.state != "failed":
                found = self.jobs[name].measured(self.root)
                line.state, line.text = ("waiting", "stopped") if found is None else ("done", said(found))
            if not console().is_terminal:
                counts = self.counts()
                text = f", {line.text}" if line.text else ""
                notice(f"{name}: {line.state}{text}, {line.seconds:.1f} s ({counts})")

    def counts(self) -> str:
        """How many jobs are in each state."""
        states = [line.state for line in self.lines.values()]
        return ", ".join(f"{states.count(state)} {state}" for state in reversed(self.ORDER) if state in states)

    def table(self) -> Table:
        """All jobs, those first that say most; what does not fit the screen is cut off below."""
        table = Table("job", "state", "", "s", caption=self.counts())
        for name, line in sorted(self.lines.items(), key=lambda item: self.ORDER.index(item[1].state)):
            took = "" if line.seconds is None else f"{line.seconds:.1f}"
            table.add_row(escape(name), line.state, escape(line.text), took)
        return table


def said(measured: dict[str, Any]) -> str:
    """A finished job in two words."""
    accuracy = measured.get("accuracy")
    return f"test {100 * accuracy:.2f} %" if isinstance(accuracy, float) else ""
