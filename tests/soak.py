"""Short runs in one process, one after another: nothing grows, and nothing of the process is left changed.

    python tests/soak.py --seconds 3600

A round distils by both methods with a folder and without, resumes, reports, draws, exports, loads and measures. After
each, what is global is compared with what it was; memory, descriptors and threads are compared with those after the
first rounds. The last line on stdout is JSON.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import nn

import zskt
from small import make_teacher
from zskt.networks import models
from zskt.networks.folder import save_teacher
from zskt.run.distill import sampler
from zskt.run.report import write_report

SIZE = (3, 8, 8)
WARM_UP = 2  # rounds after which nothing grows any more
ROOM = 8  # MiB that memory may differ by: fragments, and caches of libraries
TINY = {"steps": 4, "batch_size": 8, "generator.width": 8, "generator.latent": 8, "log_every": 1}
BANK = {"bank.rounds": 3, "bank.warmup": 1, "bank.batch_size": 8, "generator.updates": 2, "bank.random_crop": 1}
BANK |= TINY | {"steps": 8, "bank.horizontal_flip": False}


def new_student() -> nn.Module:
    """A student with random weights of its own, which leaves the global random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        return models.build("convnet-2", 10, SIZE)


def round_of_runs(folder: Path, teacher: zskt.Classifier) -> None:
    """What one process may be asked to do, a few times a second."""
    images = torch.randint(0, 256, (12, *SIZE), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(12) % teacher.num_classes
    begun: dict[str, Any] = {"settings": TINY, "out": folder / "a"}
    test = (images, labels)
    zskt.distill(teacher, new_student(), "zskt-prior", **begun, stop_after=2)
    zskt.distill(teacher, new_student(), "zskt-prior", **begun, resume=True, evaluate=test)
    zskt.distill(teacher, new_student(), "bank", settings=BANK, out=folder / "b")
    zskt.distill(teacher, new_student(), "zskt-fresh", settings=TINY, evaluate=test)
    write_report([folder / "a", folder / "b"], folder / "report.html")
    student = zskt.load_student(folder / "a")
    sampler(folder / "b", zskt.load_student(folder / "b"))(8, 0)
    save_teacher(folder / "c", student)
    zskt.load_teacher(folder / "c", notice=lambda line: None)
    zskt.compare(teacher, teacher, images[:2], labels[:2], zskt.Paths(images=2, steps=3))
    for wrong in ({"student.loss.kl": -1.0}, {"generator.learning_rate": 1e30, "generator.clip": 0.0}):
        try:
            zskt.distill(teacher, new_student(), "zskt", settings=TINY | wrong)
        except zskt.ZsktError:
            continue
        raise AssertionError(f"{wrong} was accepted")


GLOBAL_HOOKS = [name for name in vars(nn.modules.module) if name.startswith("_global_") and name.endswith("_hooks")]


def global_state(teacher: zskt.Classifier) -> dict[str, object]:
    """What belongs to the process or the caller, in comparable form."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads of torch": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": (*tf32, torch.backends.cudnn.benchmark),
        "denormals": float(torch.tensor(1e-310, dtype=torch.float64) * 1) > 0,
        "random": (hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate())),
        "random of numpy": str(np.random.get_state()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "matplotlib": (matplotlib.get_backend(), dict(matplotlib.rcParams)),
        "global hooks": [len(getattr(torch.nn.modules.module, name)) for name in GLOBAL_HOOKS],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()],
        "teacher": (teacher.training, teacher.fingerprint(), [p.requires_grad for p in teacher.parameters()]),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "limits": sys.getrecursionlimit(),
        "umask": _umask(),
    }


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def sizes() -> dict[str, float]:
    """What may grow."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # of the C libraries that have it
        ctypes.CDLL(None).malloc_trim(0)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "tensors": sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor),
    }


def soak(folder: Path, seconds: float, rounds: int = sys.maxsize) -> dict[str, Any]:
    """Rounds for so long, or so many; what they left changed and how far they grew."""
    teacher = make_teacher(models.build("convnet-4", 10, SIZE), size=SIZE)
    started, changed = time.monotonic(), set[str]()
    history: list[dict[str, float]] = []
    while len(history) < rounds and time.monotonic() - started < seconds:
        before = global_state(teacher)
        round_of_runs(folder / "run", teacher)
        after = global_state(teacher)
        shutil.rmtree(folder / "run")
        if history:  # what a library sets when it is first imported is its own
            changed |= {name for name in before if before[name] != after[name]}
        history.append(sizes())
    warm = history[WARM_UP:]
    quarter = max(1, len(warm) // 4)

    def grown_by(name: str) -> float:
        early, late = (statistics.median(sizes[name] for sizes in part) for part in (warm[:quarter], warm[-quarter:]))
        return round(late - early, 2)

    grown = {name: grown_by(name) for name in warm[0]}
    return {
        "rounds": len(history),
        "seconds": round(time.monotonic() - started, 1),
        "changed": sorted(changed),
        "grown": grown,
        "MiB": round(history[-1]["MiB"]),
        "flat": not changed and all(by <= (ROOM if name == "MiB" else 0) for name, by in grown.items()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3_600)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = soak(Path(scratch), given.seconds)
    print(json.dumps(result))
    sys.exit(not result["flat"])
