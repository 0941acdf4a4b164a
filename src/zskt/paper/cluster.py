"""Jobs on a Ray cluster: each one is a task, which goes on from its last checkpoint wherever it runs next.

A task is described by plain data: the function that builds the jobs, its argument, and a job's name. Everything else
passes through the folder of the jobs, which all nodes must see. Ray is imported here only, and only when asked for.
"""

import contextlib
import dataclasses
import logging
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zskt.errors import UsageError, ZsktError, first_line
from zskt.files import remove, write_text
from zskt.paper.jobs import Bar, Job, Show, hindered, perform
from zskt.run.checkpoint import Interrupted, InUse, read_lines, stopping

RETRIES = 5
"""How often a job is started again after its node was lost, in one command; the next command goes on from there."""
PATIENCE = 60.0
"""Seconds that a job waits for its folder: the process that had it before may still be ending, a file be on its way."""
POLL = 1.0
"""Seconds between two looks at progress and signals."""


class Stopped(Exception):
    """A worker was told to stop, and wrote a checkpoint first: Ray starts its task again, on another node."""


@dataclass(frozen=True)
class Order:
    """What to run, as plain data: `build(asked, name)` returns the job of that name."""

    build: Callable[[Any, str], Sequence[Job]]
    asked: Any
    root: Path
    cpus: int = 1
    gpus: float = 0.0
    until: float = math.inf  # by the clock that all nodes share
    folder: str = "."  # where the command was given
    marker: str = ""  # a file that proves that a node sees `root`


def run_jobs_on_ray(
    jobs: Sequence[Job], order: Order, seconds: float, bar: Bar, say: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """`zskt.paper.jobs.run_jobs`, but jobs whose needs are met run at the same time, on all nodes of a cluster."""
    with connected() as ray:
        nodes = able_nodes(ray, order.cpus, order.gpus)
        with visible(order.root) as marker:
            until, here = time.time() + seconds, os.getcwd()
            order = dataclasses.replace(order, until=until, folder=here, marker=str(marker))
            check_nodes(ray, order)
            say(f"Ray: {len(nodes)} node{'s' if len(nodes) > 1 else ''}, {slots(nodes, order)} jobs at a time")
            return _run(ray, jobs, order, bar)


def _run(ray: Any, jobs: Sequence[Job], order: Order, bar: Bar) -> dict[str, str]:
    """Submit what is ready, wait for what ends, until nothing is left or the time is up."""
    options = {"num_cpus": order.cpus, "num_gpus": order.gpus, "max_retries": RETRIES}
    task = ray.remote(**options, retry_exceptions=[Stopped])(work)
    failed: dict[str, str] = {}
    waiting = [job for job in jobs if job.measured(order.root) is None]
    finished = {job.name for job in jobs} - {job.name for job in waiting}
    running: dict[Any, Watched] = {}
    with stopping(math.inf, signals=True) as request:
        try:
            while waiting or running:
                for job in list(waiting):
                    if reason := hindered(job, failed):
                        failed[job.name] = reason
                        waiting.remove(job)
                    elif {need.name for need in job.needs} <= finished:
                        running[task.remote(order, job.name)] = Watched(job, order.root, bar)
                        waiting.remove(job)
                if not running:  # the time was up, and what is left needs what is unfinished
                    break
                done, _ = ray.wait(list(running), timeout=POLL)
                for watched in running.values():
                    watched.look()
                for ref in done:
                    watched = running.pop(ref)
                    try:
                        if watched.end(lambda ref=ref: outcome(ray, ref)):  # type: ignore[misc]
                            finished.add(watched.job.name)
                    except UsageError:
                        raise
                    except ZsktError as error:
                        failed[watched.job.name] = str(error)
                if request.signum is not None:
                    raise Interrupted(request.signum, "stopped; the same command goes on")
        except BaseException:
            for ref in running:
                ray.cancel(ref)  # which writes a checkpoint
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=PATIENCE / 2)
            raise
    return failed


class Watched:
    """A job that was submitted, and its place in the display."""

    def __init__(self, job: Job, root: Path, bar: Bar) -> None:
        self.job, self.root = job, root
        self.before = self._written()
        self.stack = contextlib.ExitStack()
        self.show: Show = self.stack.enter_context(bar(job.name, job.unit))

    def _written(self) -> int | None:
        """When the job's settings were written, which is the first thing that a worker does."""
        path = self.root / "parts" / f"{self.job.name}.json"
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def look(self) -> None:
        """Show the last step in the job's log, once a worker has begun."""
        if self._written() == self.before:
            return
        log = self.job.folder(self.root) / "timing.jsonl"
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(ZsktError):  # while it is being written
            lines = read_lines(log)
        self.show(int(lines[-1]["step"]) if lines else 0, self.job.units, "")

    def end(self, outcome: Callable[[], bool]) -> bool:
        """Whether the job has finished; its failure passes through the display."""
        with self.stack:
            finished = outcome()
            deadline = time.monotonic() + PATIENCE  # a network file system may show the result a little later
            while finished and self.job.measured(self.root) is None and time.monotonic() < deadline:
                time.sleep(POLL)
            return finished


def outcome(ray: Any, ref: Any) -> bool:
    """Whether a job that ended has finished; raises what ended it, a lost cluster or worker as ZsktError."""
    try:
        return bool(ray.get(ref))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Stopped):
            raise ZsktError(f"{error.cause} ({RETRIES} times over)") from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ZsktError(f"lost its worker ({type(error).__name__}: {first_line(error)})") from error


def work(order: Order, name: str) -> bool:
    """In a worker: go on with one job; whether it has finished."""
    if problem := unseen(order):
        raise ZsktError(problem)
    os.chdir(order.folder)
    if not order.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # those of other tasks
    torch.set_num_threads(order.cpus)
    (job,) = order.build(order.asked, name)
    deadline = time.monotonic() + PATIENCE
    while job.measured(order.root) is None:
        left = order.until - time.time()
        if left <= 0:
            return False
        try:
            return perform(job, order.root, left, lambda done, total, text: None)
        except InUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)
        except Interrupted as error:
            raise Stopped(str(error)) from None
    return True


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Ray, connected to the cluster at RAY_ADDRESS, else to that of this machine, else to a new one on it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs the package ray: pip install 'zskt[cluster]'") from error
    address = os.environ.get("RAY_ADDRESS")
    advice = "start it with `ray start`, or correct or unset RAY_ADDRESS"
    if address is not None:
        check_address(address, advice)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise ZsktError(f"cannot use Ray {where} ({first_line(error)}); {advice}") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray's own words belong
            yield ray
    finally:
        ray.shutdown()


def check_address(address: str, advice: str) -> None:
    """Raise ZsktError if nobody listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or "/" in host or not port.isdecimal():
        raise UsageError(f"RAY_ADDRESS {address!r}: expected HOST:PORT, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ZsktError(f"cannot reach Ray at {address} ({error}); {advice}") from error


def able_nodes(ray: Any, cpus: int, gpus: float) -> list[Mapping[str, Any]]:
    """The nodes that have what one run takes; raises UsageError if there is none, as its task would wait forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus]
    if not able:
        most = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UsageError(
            f"expected a node with {cpus} CPUs and {gpus:g} GPUs, found {most}; lower --cpus-per-run or --gpus-per-run"
        )
    return able


def slots(nodes: Sequence[Mapping[str, Any]], order: Order) -> int:
    """How many runs fit these nodes at the same time."""
    return sum(
        int(min(node["CPU"] / order.cpus, node["GPU"] / order.gpus if order.gpus else math.inf)) for node in nodes
    )


@contextlib.contextmanager
def visible(root: Path) -> Iterator[Path]:
    """A file in `root` that a node sees only if it sees that folder, and not another one of the same name."""
    marker = root.resolve() / "parts" / f".seen-{uuid.uuid4().hex}"
    write_text(marker, "")
    try:
        yield marker
    finally:
        remove(marker)


def check_nodes(ray: Any, order: Order) -> None:
    """Raise ZsktError unless every node sees the folders and can run jobs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))(unseen)
        for node in nodes
    ]
    for node, ref in zip(nodes, [task.remote(order) for task in asked], strict=True):
        try:
            problem = ray.get(ref)
        except ray.exceptions.RayError as error:
            reason = first_line(getattr(error, "cause", None) or error)
            name = node["NodeManagerAddress"]
            raise ZsktError(f"node {name} cannot run zskt ({reason}); install zskt[cluster] there, too") from error
        if problem:
            raise ZsktError(problem)


def unseen(order: Order) -> str | None:
    """On a node: which folder is missing there, in a line."""
    folders = (order.root, order.marker), (order.folder, order.folder)
    for folder, proof in folders:
        if not os.path.exists(proof):
            return f"node {socket.gethostname()} does not see {folder}; use a folder on storage that all nodes share"
    return None
