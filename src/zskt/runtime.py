"""Random numbers, arithmetic, devices, and what a result depends on."""

import contextlib
import datetime
import hashlib
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zskt.errors import UsageError

__version__ = "0.1.0"  # of this package; defined only here

CPU = torch.device("cpu")

LARGEST = 10**9  # whole number that a setting may have; libraries overflow beyond it


@contextlib.contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed torch's global random numbers inside, and restore their state afterwards."""
    if not 0 <= seed <= LARGEST:
        raise UsageError(f"seed = {seed}: expected a number from 0 to {LARGEST:,}")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def stream(seed: int, purpose: str) -> int:
    """A separate seed for each use of random numbers, so that weights and latents are independent."""
    return int(hashlib.sha256(f"{seed} {purpose}".encode()).hexdigest()[:7], 16)


def restore_generator(rng: torch.Generator, state: torch.Tensor) -> None:
    """Restore a generator's state; a state from another kind of device only seeds it."""
    try:
        rng.set_state(state)
    except RuntimeError:
        rng.manual_seed(int(hashlib.sha256(state.numpy().tobytes()).hexdigest()[:7], 16))


@contextlib.contextmanager
def arithmetic() -> Iterator[None]:
    """Arithmetic of a run: denormals are 0, as they are slow; on CUDA float32 is not TF32, and cudnn benchmarks."""
    already = float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    torch.set_flush_denormal(True)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        torch.set_flush_denormal(already)


@contextlib.contextmanager
def threads(count: int | str) -> Iterator[None]:
    """Set the number of torch threads inside; `auto` leaves it unchanged."""
    if not isinstance(count, int):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"zskt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def circumstances() -> dict[str, Any]:
    """Date, command, commit where the package runs from a checkout, versions, hardware and threads."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:  # the repository around an installed package is another one
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        commit = None
    found = {} if commit is None or commit.returncode else {"commit": commit.stdout.strip()}
    if found and changed.stdout.strip():
        found["commit"] += " with uncommitted changes"
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *map(short, sys.argv[1:])]),
        **found,
        "versions": versions(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def short(argument: str) -> str:
    """A command-line argument; of a path, its last part only."""
    return Path(argument).name if os.path.exists(argument) else argument


def cpu_name() -> str:
    """Model and number of the processors."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def pick_device(name: str) -> torch.device:
    """The device of that name; raises UsageError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f"device {name!r}: found {count} usable CUDA devices; use one of them or --device cpu")
    return device


def parse_limit(text: str | int | None, what: str = "stop_after") -> tuple[float, int]:
    """`90s`, `9m`, `2h` or a count -> (seconds, count), of which the other one is unlimited."""
    if text is None:
        return math.inf, sys.maxsize
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text))
    if not match or float(match[1]) <= 0 or (not match[2] and "." in match[1]):
        raise UsageError(f"{what} = {text!r}: expected a time such as 90s, 9m, 2h or a whole number")
    if not match[2]:
        return math.inf, int(match[1])
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]], sys.maxsize
