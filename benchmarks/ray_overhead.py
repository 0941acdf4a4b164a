"""What Ray costs a job: jobs that do nothing but write their result, one after the other, here and on a cluster.

python benchmarks/ray_overhead.py

The cluster is new, of this machine alone, and runs one job at a time. Its start includes a worker that loads zskt.
"""

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import record
from zskt.files import write_json
from zskt.paper.cluster import Order, run_jobs_on_ray
from zskt.paper.jobs import Job, Show, run_jobs


def empty_job(asked: str, name: str) -> list[Job]:
    """A job that is done at once."""

    def make(folder: Path, stop_after: str | None, show: Show) -> bool:
        write_json(folder / "belief.json", {})
        return True

    return [Job(name, {}, 1, "jobs", asked, lambda: lambda: None, make)]


class Clock:
    """When the work began, and when each job ended, in seconds."""

    def __init__(self) -> None:
        self.begun, self.ready = time.perf_counter(), 0.0
        self.ends: list[float] = []

    def say(self, line: str) -> None:
        """All nodes have been asked: the jobs are submitted now."""
        self.ready = time.perf_counter() - self.begun

    @contextlib.contextmanager
    def bar(self, name: str, unit: str) -> Iterator[Show]:
        """No bar."""
        yield lambda done, total, text: None
        self.ends.append(time.perf_counter() - self.begun)

    def between(self) -> list[float]:
        """Seconds from the end of one job to that of the next."""
        return [second - first for first, second in zip(self.ends, self.ends[1:], strict=False)]


def main() -> None:
    """Run the same jobs in both ways; write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50)
    count = parser.parse_args().jobs
    os.environ.pop("RAY_ADDRESS", None)
    jobs = [job for number in range(count) for job in empty_job("nothing", f"job-{number}")]
    here = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run_jobs(jobs, Path(folder) / "here", math.inf, here.bar)
        ray = Clock()
        order = Order(empty_job, "nothing", Path(folder) / "ray", cpus=os.cpu_count() or 1)
        failed = run_jobs_on_ray(jobs, order, math.inf, ray.bar, ray.say)
    assert not failed, failed
    result = {
        "jobs": count,
        "seconds_to_start": ray.ready,
        "seconds_to_first_result": ray.ends[0] - ray.ready,
        "seconds_per_job": {"here": statistics.median(here.between()), "ray": statistics.median(ray.between())},
        "most_seconds_per_job": {"here": max(here.between()), "ray": max(ray.between())},
    }
    rows = [
        ["start of Ray, connection, check of the nodes", f"{result['seconds_to_start']:.1f}"],
        ["first job on Ray", f"{result['seconds_to_first_result']:.2f}"],
        ["each further job on Ray, median", f"{result['seconds_per_job']['ray']:.3f}"],
        ["each further job on Ray, most", f"{result['most_seconds_per_job']['ray']:.3f}"],
        ["each job without Ray, median", f"{result['seconds_per_job']['here']:.3f}"],
        ["each job without Ray, most", f"{result['most_seconds_per_job']['here']:.3f}"],
    ]
    record.write("ray-overhead", f"What Ray costs a job, over {count} jobs that do nothing", result, ["", "s"], rows)


if __name__ == "__main__":
    main()
