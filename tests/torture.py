"""Runs that are killed at random moments and around every write, or hindered otherwise: nothing may be lost.

python tests/torture.py --kills 200 --others 80     (or: make torture KILLS=200)

Each run of belief matching, of a bank and of a teacher's training is killed up to four times, resumed to its end, and
compared with one that was left alone: weights, optimiser states, rows, sample images and log must be equal to the last
bit. The others get a signal, a disk that fails, is full or read-only, a limit to the size of files, a clock that jumps,
or lose their folder for a while. The last line is JSON: how many kills, how many runs, how many of these ended
identical. Linux only; without a C compiler there are no faults at chosen calls.
"""

import argparse
import ctypes
import errno
import functools
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import zskt
from small import make_teacher, stripes
from zskt.files import TEMPORARY, digest
from zskt.networks import models
from zskt.paper.baselines import teach
from zskt.paper.training import Training, TrainingResult
from zskt.run import checkpoint
from zskt.run.lifecycle import Event

SIZE = (1, 8, 8)
OFTEN = {"log_every": 1, "evaluate_every": 3, "checkpoint_every": 2}
SMALL = {"batch_size": 8, "generator.width": 8, "generator.latent": 4}
BELIEF = {
    "steps": 6,
    "student.updates": 2,
    "student.loss.attention": 0.0,
    "replay.kind": "buffer",
    "replay.capacity": 3,
}
BANK = {"steps": 9, "generator.updates": 2, "student.loss.temperature": 2.0, "bank.rounds": 3, "bank.warmup": 1}
BANK |= {"bank.batch_size": 8, "bank.views": 2, "bank.random_crop": 1, "bank.horizontal_flip": False}


def distil(recipe: str, settings: dict[str, Any], out: Path, **options: Any) -> zskt.DistillResult:
    """A run of a few milliseconds a step."""
    torch.manual_seed(1)
    teacher = make_teacher(models.convnet(4, num_classes=3, channels=1), size=SIZE)
    student = models.convnet(2, num_classes=3, channels=1)
    settings = {**SMALL, **OFTEN, **settings}
    return zskt.distill(teacher, student, recipe, settings=settings, out=out, callbacks=[remember(out)], **options)


def train(out: Path, **options: Any) -> TrainingResult:
    """Training of a teacher for as long."""
    torch.manual_seed(1)
    module = models.convnet(4, num_classes=2, channels=1)
    training = Training(40, batch_size=16, random_crop=1, horizontal_flip=True)
    images = stripes(96), stripes(40)
    return teach(module, *images, training, mean=[0.2], std=[0.3], out=out, callbacks=[remember(out)], **options)


RUNS: dict[str, Callable[..., zskt.DistillResult | TrainingResult]] = {
    "belief matching": functools.partial(distil, "zskt-prior", BELIEF),
    "bank": functools.partial(distil, "bank", BANK),
    "teach": train,
}


def remember(out: Path) -> Callable[[Event], None]:
    """A callback that leaves beside the folder a digest of all that a method holds after its last step."""

    def callback(event: Event) -> None:
        if event.step < event.steps:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, module in event.repeated.modules().items():
            tensors |= checkpoint.prefixed(name, module.state_dict())
        for name, optimiser in event.repeated.optimisers().items():
            tensors |= checkpoint.prefixed(f"optimiser {name}", checkpoint.optimizer_state(optimiser))
        tensors |= checkpoint.prefixed("state", event.repeated.state_dict())
        found = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            found.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        out.with_suffix(".state").write_text(found.hexdigest())

    return callback


def outcome(out: Path) -> dict[str, str]:
    """What must be the same however often a run was interrupted: weights, rows, log, images, and the last state."""
    files = [
        path for pattern in ("*.safetensors", "rows/*", "samples/*", "metrics.jsonl") for path in out.glob(pattern)
    ]
    return {str(path.relative_to(out)): digest(path) for path in files} | {"state": digest(out.with_suffix(".state"))}


class Fault(NamedTuple):
    """What faults.c does at one of the calls that change the run's folder."""

    call: int
    what: int
    number: int = 0


BEFORE, HALFWAY, AFTER, ONCE, FROM_THEN_ON, CLOCK = range(1, 7)  # as in faults.c
DAY = 24 * 60 * 60


class Hindrance(NamedTuple):
    """What happens to a process: signals after so many seconds each, a fault, the largest size of a file in bytes.

    `taken` is after how many seconds its folder is renamed; it is put back once the process has ended.
    """

    signals: Sequence[tuple[float, int]] = ()
    fault: Fault | None = None
    largest: int | None = None
    taken: float | None = None


def attempt(kind: str, out: Path, hindrance: Hindrance = Hindrance()) -> tuple[int, str]:  # noqa: B008
    """Start or continue a run in a process of its own; its exit status, or minus the signal, and what it said.

    The process is forked, as loading torch takes longer than the run.
    """
    said = out.with_suffix(".said")
    said.write_text("")
    process = os.fork()
    if process == 0:
        try:
            os._exit(work(kind, out, hindrance, said))
        finally:
            os._exit(70)
    for seconds, number in hindrance.signals:
        time.sleep(seconds)
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(process, number)
    away = out.with_suffix(".away")
    if hindrance.taken is not None:
        time.sleep(hindrance.taken)
        if out.exists():
            out.rename(away)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if away.exists():
        if out.exists():
            return 70, f"it made another folder in place of the one that was taken away: {os.listdir(out)}"
        away.rename(out)
    return status, said.read_text()


def work(kind: str, out: Path, hindrance: Hindrance, said: Path) -> int:
    """Within the process: the exit status as the command line gives it; 70 for an error that has no line."""
    if hindrance.largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hindrance.largest, hindrance.largest))
    if hindrance.fault is not None:
        arm(out, hindrance.fault)
    try:
        RUNS[kind](out, resume=begun(out) or may_resume(out))
        status, words = 0, ""
    except checkpoint.Interrupted as error:
        status, words = error.status, str(error)
    except zskt.ZsktError as error:
        status, words = 1, str(error)
    except KeyboardInterrupt:
        status, words = 130, "interrupted"
    except BaseException:
        status, words = 70, traceback.format_exc()
    if hindrance.fault is not None:
        out.with_suffix(".calls").write_text(str(ctypes.CDLL(None).faults_calls()))
        arm(out, Fault(0, 0))
    said.write_text(words)
    return status


def arm(out: Path, fault: Fault) -> None:
    ctypes.CDLL(None).faults_arm(os.fsencode(out), fault.call, fault.what, fault.number)


def begun(out: Path) -> bool:
    """Whether there is a checkpoint, so that --resume must be given."""
    return checkpoint.exists(out / "checkpoint")


def may_resume(out: Path) -> bool:
    """Whether a run was begun, so that --resume may be given: half of the time it is."""
    return (out / ".lock").exists() and out.name[-1] in "02468"


def complete(out: Path) -> bool:
    """Whether a training has nothing left to do: killed after it has deleted its checkpoints."""
    return (out / "teacher.json").exists() and not begun(out)


def differences(kind: str, out: Path, whole: Path) -> list[str]:
    """Finish a run and say in what it is not like the whole one."""
    status, said = (0, "") if complete(out) else attempt(kind, out)
    if status:
        return [f"it does not go on: {said}"]
    found, wanted = outcome(out), outcome(whole)
    left = [path.name for path in out.rglob("*") if path.match(TEMPORARY)]
    return [f"{name} differs" for name in found.keys() | wanted if found.get(name) != wanted.get(name)] + left


class Torture:
    """Runs in a temporary folder, one after another, and what became of them."""

    def __init__(self, folder: Path, seed: int = 0, stopped: float | None = None) -> None:
        self.folder, self.rng, self.stopped = folder, random.Random(seed), stopped
        self.has_faults = hasattr(ctypes.CDLL(None), "faults_arm")
        self.count: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.points: dict[str, list[Fault]] = {kind: [] for kind in RUNS}
        for kind in RUNS:
            (folder / kind).mkdir()
            RUNS[kind](folder / kind / "first")  # what is loaded at first use is loaded before the forks
            begun = time.monotonic()
            counting = Fault(0, BEFORE) if self.has_faults else None
            assert attempt(kind, folder / kind / "whole", Hindrance(fault=counting)) == (0, "")
            self.seconds[kind] = time.monotonic() - begun
            if self.has_faults:
                self.calls[kind] = int((folder / kind / "whole.calls").read_text())

    def kill(self, kind: str, times: int) -> None:
        """A run that is killed up to so many times."""
        out = self.fresh(kind)
        history = []
        for _ in range(times):
            history.append(hindrance := self.deadly(kind))
            status, said = attempt(kind, out, hindrance)
            if status != -signal.SIGKILL:
                self.expect(status == 0 or complete(out), f"status {status}: {said}", kind, history)
                break
            self.count["kills"] += 1
        self.finish(kind, out, history)

    def hinder(self, kind: str, name: str) -> None:
        """A run that is hindered otherwise, once."""
        out = self.fresh(kind)
        hindrance, statuses = self.hindrances(kind)[name]
        status, said = attempt(kind, out, hindrance)
        self.count[name] += 1
        self.expect(status in statuses, f"status {status}: {said}", kind, [hindrance])
        self.expect("\n" not in said, f"more than a line: {said}", kind, [hindrance])
        self.finish(kind, out, [hindrance])

    def deadly(self, kind: str) -> Hindrance:
        """A kill at any moment or, of all places around a call that changes the folder, the next in a random order."""
        if not self.has_faults or self.rng.random() < 0.3:
            return Hindrance(signals=[(self.moment(kind), signal.SIGKILL)])
        if not self.points[kind]:
            places = itertools.product(range(1, self.calls[kind] + 1), (BEFORE, HALFWAY, AFTER))
            self.points[kind] = [Fault(call, what) for call, what in places]
            self.rng.shuffle(self.points[kind])
        return Hindrance(fault=self.points[kind].pop())

    def hindrances(self, kind: str) -> dict[str, tuple[Hindrance, set[int]]]:
        """By name, with the exit statuses that are right."""

        def sent(*numbers: int) -> Hindrance:
            return Hindrance(signals=[(self.moment(kind) / len(numbers), number) for number in numbers])

        found = {
            "SIGTERM": (sent(signal.SIGTERM), {0, 143, -signal.SIGTERM}),
            "SIGINT": (sent(signal.SIGINT), {0, 130}),
            "SIGINT twice": (sent(signal.SIGINT, signal.SIGINT), {0, 130}),
            "SIGSTOP": (self.stop(sent(signal.SIGSTOP, signal.SIGCONT)), {0}),
            "folder taken away": (Hindrance(taken=self.moment(kind)), {0, 1}),
            "small files": (Hindrance(largest=self.rng.randrange(100_000)), {0, 1}),
        }
        if self.has_faults:
            call = self.rng.randint(1, self.calls[kind])
            for number in (errno.EIO, errno.ENOSPC):
                found[f"{errno.errorcode[number]} once"] = Hindrance(fault=Fault(call, ONCE, number)), {0, 1}
            for number in (errno.ENOSPC, errno.EROFS):
                name = f"{errno.errorcode[number]} from then on"
                found[name] = Hindrance(fault=Fault(call, FROM_THEN_ON, number)), {0, 1}
            found["clock"] = Hindrance(fault=Fault(call, CLOCK, self.rng.choice((-DAY, DAY)))), {0}
        return found

    def stop(self, hindrance: Hindrance) -> Hindrance:
        """Stopped for as long as asked for, if that was."""
        (first, stop), (moment, go) = hindrance.signals
        return Hindrance(signals=[(first, stop), (moment if self.stopped is None else self.stopped, go)])

    def moment(self, kind: str) -> float:
        return self.rng.uniform(0, 1.1 * self.seconds[kind])

    def fresh(self, kind: str) -> Path:
        self.count["runs"] += 1
        return self.folder / kind / str(self.count["runs"])

    def finish(self, kind: str, out: Path, history: Sequence[Hindrance]) -> None:
        found = differences(kind, out, self.folder / kind / "whole")
        self.expect(not found, "; ".join(found), kind, history)
        self.count["identical"] += not found
        shutil.rmtree(out, ignore_errors=True)

    def expect(self, right: bool, problem: str, kind: str, history: Sequence[Hindrance]) -> None:
        if not right:
            self.problems.append(f"{kind}, after {list(history)}: {problem}")
            print(self.problems[-1], file=sys.stderr, flush=True)


def compiled(folder: Path) -> Path | None:
    """faults.c as a library, or None without a compiler."""
    library = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("faults.c")), "-ldl"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def main() -> int:
    """Kill and hinder as many runs as asked for; returns 1 if one did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, default=None, help="runs that are hindered otherwise; default: kills / 2")
    parser.add_argument("--stopped", type=float, help="seconds for which processes are stopped; default: a moment")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "LD_PRELOAD" not in os.environ and (library := compiled(folder)):
            environment = os.environ | {"LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": ""}
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
        torch.set_num_threads(1)  # threads do not survive a fork
        torture = Torture(folder, arguments.seed, arguments.stopped)
        kinds = itertools.cycle(RUNS)
        while torture.count["kills"] < arguments.kills:
            times = torture.rng.randint(1, 4)
            torture.kill(next(kinds), min(times, arguments.kills - torture.count["kills"]))
        others = arguments.kills // 2 if arguments.others is None else arguments.others
        for kind, hindrance in itertools.islice(every(torture), others):
            torture.hinder(kind, hindrance)
    seconds = round(time.monotonic() - begun)
    found = {"kills": 0, "runs": 0, "identical": 0} | torture.count
    print(json.dumps(found | {"faults at calls": torture.has_faults, "calls": torture.calls, "seconds": seconds}))
    return 1 if torture.problems else 0


def every(torture: Torture) -> Iterator[tuple[str, str]]:
    """All other hindrances of all kinds of runs, over and over."""
    return itertools.cycle((kind, name) for name in torture.hindrances("bank") for kind in RUNS)


if __name__ == "__main__":
    sys.exit(main())
