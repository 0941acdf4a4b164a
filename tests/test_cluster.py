"""Jobs on Ray: the rules of run_jobs with a stand-in, in seconds; numbers, lost nodes and lost drivers on real nodes.

The real cluster has two nodes on this machine, of one processor each.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zskt
from small import call, coloured, fails, quiet, run, write_images
from zskt.errors import UsageError, ZsktError
from zskt.files import write_json
from zskt.networks import models
from zskt.paper import cluster
from zskt.paper.cluster import RETRIES, Order, Stopped, run_jobs_on_ray, work
from zskt.paper.jobs import Job, Show, in_order
from zskt.run.checkpoint import Interrupted, InUse

SOURCE = str(Path(zskt.__file__).parent.parent)


class StandIn(SimpleNamespace):
    """What we use of Ray, in this process: a task runs when somebody waits for it."""

    def __init__(self) -> None:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: BaseException) -> None:
                super().__init__(str(cause))
                self.cause = cause

        super().__init__(exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError))
        self.resources: list[dict[str, float]] = [{"CPU": 2.0}, {"CPU": 2.0}]
        self.options: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []
        self.up = 0

    def init(self, address: str | None, **options: Any) -> None:
        self.up += 1

    def shutdown(self) -> None:
        self.up -= 1

    def nodes(self) -> list[dict[str, Any]]:
        alive = [{"Alive": True, "NodeID": "1", "NodeManagerAddress": "here", "Resources": r} for r in self.resources]
        return [*alive, {"Alive": False, "NodeID": "2", "Resources": {"CPU": 64.0}}]

    def remote(self, **options: Any) -> Callable[..., Any]:
        self.options.append(options)

        def task(function: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: _Ref(function, arguments))

        return task

    def wait(self, refs: Sequence[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        refs[0].run()
        return [refs[0]], list(refs[1:])

    def get(self, ref: Any) -> Any:
        ref.run()
        if ref.error is not None:
            own = isinstance(ref.error, self.exceptions.RayError)
            raise ref.error if own else self.exceptions.RayTaskError(ref.error)
        return ref.value

    def cancel(self, ref: Any) -> None:
        self.cancelled.append(ref)


class _Ref:
    """The outcome of a task, once it ran."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.task, self.value, self.error, self.over = (function, arguments), None, None, False

    def run(self) -> None:
        if not self.over:
            self.over = True
            function, arguments = self.task
            try:
                self.value = function(*arguments)
            except Exception as error:
                self.error = error  # type: ignore[assignment]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """The stand-in, in place of the package."""
    found = StandIn()
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(cluster, "POLL", 0.0)
    monkeypatch.chdir(tmp_path)
    return found


class Site:
    """Jobs that record when they run, and how to build them anew."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[str, Job] = {}
        self.worked: list[str] = []

    def job(self, name: str, *needs: Job, work: Callable[[], Any] = lambda: True) -> Job:
        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            self.worked.append(name)
            if finished := work():
                write_json(folder / "belief.json", {"threads": torch.get_num_threads()})
            return bool(finished)

        self.jobs[name] = Job(name, {}, 7, "units", "pace", lambda: lambda: None, make, needs)
        return self.jobs[name]

    def build(self, asked: Any, name: str) -> list[Job]:
        assert asked == "asked"
        return [self.jobs[name]]

    def run(self, *wanted: Job, seconds: float = math.inf, **order: Any) -> dict[str, str]:
        return run_jobs_on_ray(in_order(wanted), Order(self.build, "asked", self.root, **order), seconds, quiet)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "out")


def failing(error: BaseException) -> Callable[[], Any]:
    def work() -> bool:
        raise error

    return work


def test_jobs_run_once_after_what_they_need(ray: StandIn, site: Site) -> None:
    teacher = site.job("teacher")
    student = site.job("student", teacher)
    belief = site.job("belief", student, teacher)
    assert site.run(belief, site.job("other"), cpus=2, gpus=0) == {}
    assert site.worked == ["teacher", "other", "student", "belief"]
    assert site.run(belief) == {}
    assert len(site.worked) == 4
    assert ray.up == 0
    options = [each for each in ray.options if "max_retries" in each]
    assert options[0] == {"num_cpus": 2, "num_gpus": 0, "max_retries": RETRIES, "retry_exceptions": [Stopped]}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert {path.name for path in (site.root / "parts").iterdir() if path.name.startswith(".")} == set()
    torch.set_num_threads(1)


def test_threads_are_the_processors_of_a_run(ray: StandIn, site: Site) -> None:
    job = site.job("job")
    try:
        site.run(job, cpus=2)
    finally:
        torch.set_num_threads(1)
    assert job.measured(site.root) == {"threads": 2}


def test_a_failure_stops_only_what_needs_it(ray: StandIn, site: Site) -> None:
    broken = site.job("broken", work=failing(ZsktError("it diverged")))
    lost = site.job("lost", work=failing(ray.exceptions.RayError("the node died\nstack")))
    preempted = site.job("preempted", work=failing(Interrupted(15, "stopped at step 3")))
    student = site.job("student", broken)
    assert site.run(site.job("belief", student), lost, preempted, site.job("sound")) == {
        "broken": "it diverged",
        "student": "needs broken",
        "belief": "needs student",
        "lost": "lost its worker (RayError: the node died)",
        "preempted": f"stopped at step 3 ({RETRIES} times over)",
    }
    assert site.worked == ["broken", "lost", "preempted", "sound"]


@pytest.mark.parametrize("error", [UsageError("no such recipe"), KeyError("a bug")])
def test_usage_errors_and_bugs_stop_everything(error: Exception, ray: StandIn, site: Site) -> None:
    with pytest.raises(type(error)) as caught:
        site.run(site.job("first", work=failing(error)), site.job("second"))
    assert caught.value is error
    assert site.worked == ["first"] or site.worked == ["first", "second"]  # which was waited for
    assert len(ray.cancelled) == 1
    assert ray.up == 0


def test_a_signal_cancels_what_runs(ray: StandIn, site: Site) -> None:
    def interrupt() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with pytest.raises(Interrupted) as caught:
        site.run(site.job("first", work=interrupt), site.job("second"))
    assert caught.value.status == 143
    assert len(ray.cancelled) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_starts_when_the_time_is_up(ray: StandIn, site: Site) -> None:
    first = site.job("first", work=lambda: time.sleep(0.2))  # which leaves it unfinished
    assert site.run(first, site.job("second"), site.job("third", first), seconds=0.1) == {}
    assert site.worked == ["first"]


def test_a_job_waits_for_its_folder(ray: StandIn, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while: the process that had it before may still be ending."""

    def used() -> bool:
        if len(site.worked) < 3:
            raise InUse("another process is using it")
        return True

    assert site.run(site.job("job", work=used)) == {}
    assert site.worked == ["job"] * 3
    monkeypatch.setattr(cluster, "PATIENCE", 0.0)
    assert site.run(site.job("other", work=failing(InUse("another process is using it")))) == {
        "other": "another process is using it"
    }


def test_a_folder_that_a_node_does_not_see_is_refused(
    ray: StandIn, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def elsewhere(root: Path) -> Iterator[Path]:
        yield root / "nowhere"

    monkeypatch.setattr(cluster, "visible", elsewhere)
    with pytest.raises(
        ZsktError, match=f"node {socket.gethostname()} does not see .*out; use a folder on storage that"
    ):
        site.run(site.job("job"))
    order = Order(site.build, "asked", site.root, marker=str(site.root / "nowhere"))
    with pytest.raises(ZsktError, match="does not see"):  # on a node that joined later
        work(order, "job")
    assert site.worked == []


def test_a_node_without_the_package_is_named(ray: StandIn, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "unseen", lambda order: failing(ModuleNotFoundError("No module named 'zskt'"))())
    with pytest.raises(ZsktError, match=r"node here cannot run zskt \(No module named 'zskt'\); install"):
        site.run(site.job("job"))


def test_what_no_node_has_is_refused(ray: StandIn, site: Site) -> None:
    ray.resources = [{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]
    for order in ({"cpus": 3}, {"cpus": 2, "gpus": 0.5}):
        with pytest.raises(UsageError, match="found 2 CPUs and 0 GPUs, 1 CPUs and 1 GPUs; lower --cpus-per-run or"):
            site.run(site.job("job"), **order)
    assert site.run(site.job("job"), gpus=0.5) == {}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


# The command, without a cluster


def refusing(status: int, tmp_path: Path) -> str:
    """The line of a sweep that cannot use Ray, of a teacher that exists."""
    with torch.random.fork_rng():
        module = models.convnet(4, num_classes=3, channels=1)
    if not (tmp_path / "t").exists():
        zskt.save_teacher(
            tmp_path / "t", zskt.Classifier(module, input_size=(1, 12, 12), mean=[0.4], std=[0.3]), how="-"
        )
    words = [
        "sweep",
        tmp_path / "t",
        "--student",
        "convnet-2",
        "--recipe",
        "zskt",
        "--steps",
        2,
        "--out",
        tmp_path / "o",
    ]
    return fails(status, *words, "--ray")


def test_a_missing_ray_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusing(2, tmp_path) == "zskt: --ray needs the package ray: pip install 'zskt[cluster]'"


@pytest.mark.parametrize("address", ["10.0.0.1", "ray://10.0.0.1:10001", "head:", "head:http"])
def test_an_address_that_is_none_is_one_line(
    address: str, ray: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refusing(2, tmp_path) == f"zskt: RAY_ADDRESS {address!r}: expected HOST:PORT, such as 10.0.0.1:6379"


def test_a_cluster_that_is_not_there_is_one_line(ray: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    line = refusing(1, tmp_path)
    assert f"cannot reach Ray at 127.0.0.1:{port} (" in line
    assert line.endswith("start it with `ray start`, or correct or unset RAY_ADDRESS")

    def leave(address: str | None, **options: Any) -> None:
        sys.exit(15)  # as Ray does, if something else listens there

    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray, "init", leave)
    assert "cannot use Ray on this machine (15); start it" in refusing(1, tmp_path)


def test_reproduce_on_the_stand_in(ray: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs are built anew from what the command was given; the numbers are those of the usual order."""
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("zskt.cli.paper.state_cost", lambda *arguments: 0.0)
    data = write_images(tmp_path / "images", train=coloured(30), test=coloured(30, seed=1))
    words = ["reproduce", "table-1", "--data", data, "--model", "convnet-4", "--student", "convnet-2", "--seeds", 0, 1]
    words += ["--updates", 3, "--steps", 1, "--images-per-class", 2, "--recipe", "zskt-fresh"]
    usual = run(*words, "--out", tmp_path / "usual")
    found = run(*words, "--out", tmp_path / "ray", "--ray")
    assert found["finished"]
    assert found["cells"] == usual["cells"]
    assert len([each for each in ray.options if "max_retries" in each]) == 1
    assert "toy takes --seeds" in fails(2, "reproduce", "toy", "--ray")


def test_no_command_loads_ray_unasked() -> None:
    script = "import sys, zskt.cli.main; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# On real nodes

SLOW = ("checkpoint_every=2", "log_every=1", "batch_size=16", "generator.width=8", "generator.latent=12")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one processor each, found by RAY_ADDRESS."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", SOURCE)  # of the workers
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    kind: Any = importlib.import_module("ray.cluster_utils").Cluster
    options = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    found = kind(initialize_head=True, head_node_args=options | {"include_dashboard": False})
    try:
        found.second = found.add_node(**options)
        monkeypatch.setenv("RAY_ADDRESS", found.address)
        yield found
    finally:
        found.shutdown()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher and images."""
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", train=coloured(30), test=coloured(30, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.convnet(4, num_classes=3, channels=1)
    zskt.save_teacher(tmp_path / "t", zskt.Classifier(module, input_size=(1, 12, 12), mean=[0.4], std=[0.3]), how="-")
    return tmp_path


def words_for(place: Path, out: str, *more: object, steps: int) -> list[str]:
    words = ["sweep", place / "t", "--student", "convnet-2", "--recipe", "zskt", "--steps", steps]
    words += ["--eval", place / "images", "--out", place / out, "--set", *SLOW, *more]
    return list(map(str, words))


def begin(words: list[str]) -> "subprocess.Popen[str]":
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "zskt", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def weights(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (out / "parts").glob("*/student.safetensors")}


def first_samples(out: Path) -> dict[str, int]:
    """When the first picture of each run with a later checkpoint was written: once, unless the run begins anew."""
    found = {}
    for folder in (out / "parts").glob("*/"):
        pictures, checkpoints = sorted((folder / "samples").glob("0*.png")), sorted((folder / "checkpoint").glob("0*"))
        if pictures and checkpoints and checkpoints[-1].stem > pictures[0].stem:
            found[folder.name] = pictures[0].stat().st_mtime_ns
    return found


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    """Wait for something that a process does; fails if it ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sequentially(words: list[str], place: Path) -> dict[str, bytes]:
    """The weights of the same sweep in the usual order, in this process and without Ray."""
    words = [str(place / "usual") if word == str(place / "out") else word for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        assert call(*words)[0] in (0, 1)
    return weights(place / "usual")


@pytest.mark.slow
def test_numbers_are_those_of_the_usual_order_and_a_failure_stays_alone(nodes: Any, place: Path) -> None:
    words = words_for(place, "out", "student.learning_rate=2e-3,1e29", "--seed", 0, 1, steps=4)
    status, out, err = ended(begin(words))
    assert (status, out) == (1, ""), err
    assert "Ray: 2 nodes, 2 jobs at a time" in err
    assert err.splitlines()[-1].startswith("zskt: 2 of 4 runs failed, t-to-convnet-2-zskt-")
    result = json.loads((place / "out" / "sweep.json").read_text())
    assert [(row["runs"], row["failed"]) for row in result["rows"]] == [(2, 0), (0, 2)]
    assert all("diverged" in why for why in result["failed"].values())
    assert weights(place / "out") == sequentially(words, place)
    assert len(weights(place / "out")) == 2


@pytest.mark.slow
def test_the_jobs_of_a_lost_node_go_on_elsewhere(nodes: Any, place: Path) -> None:
    words = words_for(place, "out", "evaluate_every=10", "--seed", 0, 1, 2, steps=150)
    process = begin(words)
    wait_for(lambda: len(first_samples(place / "out")) == 2, process)
    before = first_samples(place / "out")
    nodes.remove_node(nodes.second, allow_graceful=False)
    assert not weights(place / "out")  # all had work left
    status, out, err = ended(process)
    assert status == 0, err
    (line,) = out.splitlines()  # what Ray says about the node is elsewhere
    assert json.loads(line)["rows"][0]["runs"] == 3
    assert {name: time for name, time in first_samples(place / "out").items() if name in before} == before
    assert weights(place / "out") == sequentially(words, place)


@pytest.mark.slow
def test_a_driver_that_was_killed_is_started_again(nodes: Any, place: Path) -> None:
    words = words_for(place, "out", "evaluate_every=10", "--seed", 0, 1, steps=150)
    process = begin(words)
    wait_for(lambda: len(first_samples(place / "out")) == 2, process)
    process.kill()
    assert ended(process)[:2] == (-signal.SIGKILL, "")
    before = first_samples(place / "out")
    status, _, err = ended(begin(words))  # at once: its workers may still be ending
    assert status == 0, err
    assert "2 runs; 2 are missing, 2 of them begun" in err
    assert first_samples(place / "out") == before
    assert weights(place / "out") == sequentially(words, place)


@pytest.mark.slow
def test_ctrl_c_writes_checkpoints(nodes: Any, place: Path) -> None:
    words = words_for(place, "out", "checkpoint_every=1000", "--seed", 0, 1, steps=400)
    words.remove("checkpoint_every=2")
    process = begin(words)
    wait_for(lambda: len(list((place / "out" / "parts").glob("*/timing.jsonl"))) == 2, process)
    process.send_signal(signal.SIGINT)
    status, out, err = ended(process)
    assert status == 130, err
    assert json.loads(out) == {"finished": False, "reason": "stopped; the same command goes on"}
    assert len(list((place / "out" / "parts").glob("*/checkpoint/*.safetensors"))) == 2


@pytest.mark.slow
def test_one_node_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cluster: --ray starts one on this machine, and ends it."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    words = words_for(place, "out", steps=2)
    status, _, err = ended(begin([*words, "--ray"]))
    assert status == 0, err
    assert weights(place / "out") == sequentially(words, place)
