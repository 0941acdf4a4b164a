"""Jobs: dependencies first, each run once, resumed after an interruption, refused if its settings changed."""

import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from small import quiet
from zskt.errors import UsageError, ZsktError
from zskt.files import write_json
from zskt.paper import jobs
from zskt.paper.jobs import Job, Show, check_settings, in_order, run_jobs, time_jobs
from zskt.run.checkpoint import Interrupted
from zskt.runtime import parse_limit


class Clock:
    """A clock that advances only on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=self.read, perf_counter=self.read))

    def read(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Workshop:
    """Jobs that only record when they run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.worked: list[str] = []
        self.budgets: list[str | None] = []
        self.trials: list[str] = []

    def job(
        self,
        name: str,
        *needs: Job,
        turns: int = 1,
        error: Exception | None = None,
        work: Callable[[], object] = lambda: None,
        units: int = 7,
        pace: str = "pace",
        **settings: Any,
    ) -> Job:
        """One that is finished after so many turns, or never with an `error`."""

        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            self.worked.append(name)
            self.budgets.append(stop_after)
            write_json(folder / "begun.json", {})
            work()
            if error is not None:
                raise error
            if self.worked.count(name) < turns:
                return False
            write_json(folder / "belief.json", {"value": len(name)})
            return True

        def trial() -> Callable[[], object]:
            self.trials.append(pace)
            return work

        return Job(name, settings, units, "units", pace, trial, make, needs)

    def make(self, *wanted: Job, seconds: float = math.inf) -> dict[str, str]:
        return run_jobs(in_order(wanted), self.root, seconds, quiet)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_dependencies_come_first_and_once(workshop: Workshop) -> None:
    rng = random.Random(0)
    for _ in range(50):
        made: list[Job] = []
        for i in range(12):
            made.append(workshop.job(f"job {i}", *rng.sample(made, min(i, rng.randrange(4)))))
        wanted = rng.sample(made, 3)
        order = in_order([*wanted, *wanted])
        closure = {job.name for job in wanted}
        for job in reversed(made):
            closure |= {need.name for need in job.needs} if job.name in closure else set()
        assert sorted(job.name for job in order) == sorted(closure)
        for place, job in enumerate(order):
            assert {need.name for need in job.needs} <= {earlier.name for earlier in order[:place]}


def test_each_job_runs_once(workshop: Workshop) -> None:
    teacher = workshop.job("teacher")
    student = workshop.job("student", teacher)
    both = workshop.job("belief", student, teacher)
    assert workshop.make(both, student) == {}
    assert workshop.worked == ["teacher", "student", "belief"]
    assert workshop.make(both, student, teacher) == {}
    assert workshop.worked == ["teacher", "student", "belief"]
    assert workshop.make(both, workshop.job("another", teacher)) == {}
    assert workshop.worked[3:] == ["another"]
    assert both.measured(workshop.root) == {"value": 6}


def test_measurements_of_a_network_include_its_size(workshop: Workshop) -> None:
    job = workshop.job("network")
    assert job.measured(workshop.root) is None
    for stem in ("teacher", "student"):
        facts = {"measured": {"accuracy": 0.5}, "parameters": 12, "model": "convnet-2"}
        write_json(job.folder(workshop.root) / f"{stem}.json", facts)
        assert job.measured(workshop.root) == {"accuracy": 0.5, "parameters": 12}
        (job.folder(workshop.root) / f"{stem}.json").unlink()


def test_an_interrupted_job_resumes_before_the_next_starts(workshop: Workshop) -> None:
    first = workshop.job("first", turns=3)
    second = workshop.job("second", first)
    for turns in (1, 2):
        assert workshop.make(second) == {}
        assert workshop.worked == ["first"] * turns
        assert first.measured(workshop.root) is None
    assert workshop.make(second) == {}
    assert workshop.worked == ["first"] * 3 + ["second"]


def test_the_remaining_time_is_passed_on(workshop: Workshop, clock: Clock) -> None:
    wanted = [workshop.job(f"job {i}", work=lambda: clock.wait(4)) for i in range(4)]
    assert workshop.make(*wanted, seconds=10) == {}
    assert workshop.worked == ["job 0", "job 1", "job 2"]  # which ends after 12 seconds
    assert workshop.budgets == ["10.000s", "6.000s", "2.000s"]
    assert workshop.make(*wanted, seconds=0) == {}
    assert len(workshop.worked) == 3
    assert workshop.make(*wanted) == {}
    assert workshop.worked[3:] == ["job 3"]
    assert workshop.budgets[3:] == [None]


@pytest.mark.parametrize("left", [1e-9, 0.0004, 0.9996, 59.99999, 86_400.0])
def test_any_remaining_time_is_a_valid_budget(left: float, workshop: Workshop, clock: Clock) -> None:
    assert workshop.make(workshop.job("job"), seconds=left) == {}
    (budget,) = workshop.budgets
    seconds, _ = parse_limit(budget)
    assert seconds == pytest.approx(left, abs=1e-3)


def test_a_failure_stops_only_what_needs_it(workshop: Workshop) -> None:
    broken = workshop.job("broken", error=ZsktError("it diverged"))
    student = workshop.job("student", broken)
    belief = workshop.job("belief", student)
    sound = workshop.job("sound")
    failed = workshop.make(belief, sound)
    assert failed == {"broken": "it diverged", "student": "needs broken", "belief": "needs student"}
    assert workshop.worked == ["broken", "sound"]
    assert sound.measured(workshop.root) == {"value": 5}
    mended = workshop.job("broken")
    assert workshop.make(workshop.job("belief", workshop.job("student", mended)), sound) == {}
    assert workshop.worked == ["broken", "sound", "broken", "student", "belief"]


@pytest.mark.parametrize("error", [UsageError("no such recipe"), Interrupted(2, "stopped"), KeyError("a bug")])
def test_usage_errors_signals_and_bugs_stop_everything(error: Exception, workshop: Workshop) -> None:
    with pytest.raises(type(error)) as caught:
        workshop.make(workshop.job("first", error=error), workshop.job("second"))
    assert caught.value is error
    assert workshop.worked == ["first"]


def test_other_settings_are_refused_and_named(workshop: Workshop) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.1, "seed": 3, "data": "svhn"}
    workshop.make(workshop.job("a", **settings))
    check_settings([workshop.job("a", **settings)], workshop.root)
    for change, words in (
        ({"learning_rate": 0.2}, "learning_rate = 0.1, now 0.2"),
        ({"seed": 4}, "seed = 3, now 4"),
        ({"learning_rate": 1.0, "data": "cifar10"}, "learning_rate = 0.1, now 1.0; data = 'svhn', now 'cifar10'"),
        ({"units": 8}, "units = 7, now 8"),
        ({"new": 1}, "new = None, now 1"),
    ):
        other = workshop.job("a", **settings | change)
        with pytest.raises(ZsktError, match=f"{re.escape(f'({words})')}; give the same ones or choose another --out"):
            check_settings([workshop.job("b"), other], workshop.root)
    assert workshop.worked == ["a"]


def test_settings_are_on_disk_before_a_job_runs(workshop: Workshop) -> None:
    """So that a killed job does not resume with other settings."""
    job = workshop.job("a", seed=0, error=KeyError("killed"))
    with pytest.raises(KeyError):
        workshop.make(job)
    assert json.loads((workshop.root / "parts" / "a.json").read_text()) == {"seed": 0, "units": 7}
    with pytest.raises(ZsktError, match="seed = 0, now 1"):
        check_settings([workshop.job("a", seed=1)], workshop.root)


def test_a_job_that_left_no_result_may_run_with_other_settings(workshop: Workshop) -> None:
    """Training that diverges at once removes its files, so that its advice, a lower learning rate, can be followed."""
    write_json(workshop.root / "parts" / "a.json", {"learning_rate": 9.0, "units": 7})
    other = workshop.job("a", learning_rate=0.1)
    check_settings([other], workshop.root)
    workshop.make(other)
    with pytest.raises(ZsktError, match=re.escape("learning_rate = 0.1, now 9.0")):
        check_settings([workshop.job("a", learning_rate=9.0)], workshop.root)


def test_only_unfinished_jobs_are_timed_and_each_pace_once(workshop: Workshop, clock: Clock) -> None:
    workshop.make(workshop.job("made", pace="of what is there"))
    first: list[str] = []

    def takes(pace: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            clock.wait(seconds if pace in first else 30)  # the first one is slow
            first.append(pace)

        return work

    wanted = [
        workshop.job("made", pace="of what is there", work=takes("of what is there", 1)),
        workshop.job("a", pace="fast", work=takes("fast", 0.5)),
        workshop.job("b", pace="slow", work=takes("slow", 7)),
        workshop.job("c", pace="fast", work=takes("fast", 0.5)),
        workshop.job("given", units=0, pace="nothing to do"),
    ]
    assert time_jobs(wanted, workshop.root, seconds=20) == {"fast": 0.5, "slow": 7}
    assert sorted(workshop.trials) == ["fast", "slow"]
    assert (first.count("fast"), first.count("slow")) == (1 + 10, 1 + 1)  # at least once, else five seconds
    assert workshop.worked == ["made"]
    assert time_jobs(wanted[:1], workshop.root) == {}


def test_timing_is_realistic_and_changes_no_global_state(workshop: Workshop) -> None:
    drawn, flushed = [], []

    def work() -> None:
        time.sleep(0.01)
        drawn.append(float(torch.rand(())))
        flushed.append(float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0)

    random_numbers = torch.get_rng_state()
    found = time_jobs([workshop.job("a", work=work)], workshop.root, seconds=0.2)
    assert found["pace"] >= 0.01
    assert torch.equal(random_numbers, torch.get_rng_state())
    assert all(flushed)  # as in the work itself
    assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) > 0
    assert [path.name for path in workshop.root.iterdir()] == []
