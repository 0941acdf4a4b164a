"""Checkpoints for exact resume: tensors, random state, log positions. No pickle."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from zskt.errors import ZsktError, failing, system_errors
from zskt.files import (
    TEMPORARY,
    digest,
    held,
    make_folder,
    read_sealed,
    read_tensors,
    read_text,
    remove,
    strict_json,
    write_tensors,
)
from zskt.method.config import Config, read_config
from zskt.networks import ranks
from zskt.runtime import restore_generator
from zskt.settings import flat


class Interrupted(ZsktError):
    """A signal stopped the run after a checkpoint. `status` is the exit status, 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signum


class InUse(ZsktError):
    """Another process holds the folder's lock, perhaps one that is about to end."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], kept: Collection[int] = ()
) -> None:
    """Write a checkpoint as one file, complete or absent; then all others but those of the steps `kept` are deleted."""
    write_tensors(_path(folder, step), tensors, {"metadata": json.dumps({"step": step, **metadata})})
    for other in folder.glob("*.safetensors"):
        if other not in [_path(folder, each) for each in (step, *kept)]:
            remove(other)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}.safetensors"


def load(
    folder: Path, verify: Callable[[Mapping[str, Any]], None] = lambda metadata: None, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Tensors and metadata of the newest checkpoint that is whole, and what is wrong with newer ones.

    With a `step`, of that one only. `verify` raises ZsktError if a file that the metadata speak of is damaged. Raises
    ZsktError if none is whole.
    """
    problems: list[ZsktError] = []
    for path in sorted(folder.glob("*.safetensors"), reverse=True) if step is None else [_path(folder, step)]:
        try:
            tensors, texts = read_tensors(path)
            metadata = strict_json(texts["metadata"])
            if not isinstance(metadata, dict):
                raise TypeError
            verify(metadata)
            return tensors, metadata, [str(problem).split("; ")[0] for problem in problems]
        except ZsktError as error:
            problems.append(error)
        except (LookupError, TypeError, ValueError):
            problems.append(
                ZsktError(f"{path} is of another version of zskt; finish that run with the version that began it")
            )
    if problems:
        raise ZsktError(f"{problems[0]}, or start again with another --out")
    raise ZsktError(f"expected a checkpoint in {folder}, found none; remove the folder and start again")


def restoring(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The boundary for restoring a checkpoint: errors inside mean that it does not fit."""
    kinds = RuntimeError, LookupError, TypeError, ValueError
    return failing(f"the checkpoint in {folder} does not fit", "resume with the same model and settings", kinds=kinds)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under names that begin with `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as `PARAMETER_INDEX.key`. Learning rates are not state: they follow from the step."""
    state = {
        f"{index}.{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(optimizer).__name__
            raise ZsktError(f"expected tensors as the state of {kind}, found {name} = {value!r}; use another optimiser")
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Restore `optimizer_state`, copied into tensors laid out like the parameters where their shapes are equal.

    A fused optimiser reads parameter and state in memory order: a contiguous state of a channels_last parameter would
    silently be read in the wrong order.
    """
    parameters = _parameters(optimizer)
    for name, saved in state.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if key == "step":  # a counter, which only fused and capturable optimisers keep on the parameter's device
            on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
            optimizer.state[parameter][key] = saved.to(parameter.device if on_device else "cpu")
        elif saved.shape == parameter.shape:
            optimizer.state[parameter][key] = torch.zeros_like(parameter, dtype=saved.dtype).copy_(saved)
        else:
            optimizer.state[parameter][key] = saved.to(parameter.device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def restore_random_state(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore torch's global random generators; the state of a run on the CPU seeds a CUDA device."""
    torch.set_rng_state(tensors["rng/cpu"])
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        restore_generator(torch.cuda.default_generators[index], tensors.get("rng/cuda", tensors["rng/cpu"]))


@dataclass(frozen=True)
class JsonLines:
    """An append-only file of one JSON object per line, truncated on resume."""

    path: Path

    def append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False) + "\n"
        with system_errors("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def size(self) -> int:
        """Size in bytes, after an fsync."""
        with system_errors("write", self.path), self.path.open("ab") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def check(self, size: int, sha256: str | None) -> None:
        """Raise ZsktError unless its first `size` bytes are those of a checkpoint, where that has their `sha256`."""
        if not self.path.exists() or self.path.stat().st_size < size:
            raise ZsktError(f"{self.path} is shorter than its checkpoint says; restore it")
        if sha256 is not None and digest(self.path, size) != sha256:
            raise ZsktError(f"{self.path} is not as its checkpoint recorded it; restore it")

    def cut(self, size: int) -> None:
        """Truncate to `size` bytes, which drops lines newer than the checkpoint."""
        with system_errors("write", self.path), self.path.open("ab") as file:
            file.truncate(size)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; an incomplete last line is skipped."""
    lines: list[dict[str, Any]] = []
    texts = read_text(path).splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = strict_json(text)
            if not _is_sound(line):
                raise ValueError("no line of a log")
        except ValueError as error:
            if number < len(texts):
                raise ZsktError(f"line {number} of {path} is damaged; repair or remove it") from error
        else:
            lines.append(line)
    return lines


def _is_sound(line: Any) -> bool:
    """Whether a line of a log holds what its names say: the kinds that reports and plots rely on."""

    def numbers(values: Any, *kinds: type) -> bool:
        return isinstance(values, list) and bool(values) and all(type(value) in kinds for value in values)

    def sound(name: str, value: Any) -> bool:
        if name.endswith("_loss"):  # one number per update
            return numbers(value, int, float)
        if name.endswith("_counts"):  # one number per class
            return numbers(value, int) and min(value) >= 0
        if name.endswith("_terms"):
            return isinstance(value, dict) and all(type(term) in (int, float) for term in value.values())
        if name == "warnings":
            return numbers(value, str)
        return type(value) in (int, float)

    return isinstance(line, dict) and "step" in line and all(sound(name, value) for name, value in line.items())


FREE = ("log_every", "evaluate_every", "checkpoint_every")
"""Settings, beside those of the machine, that may differ on resume."""


def binding(config: Config) -> dict[str, Any]:
    """The settings, as JSON values, that may not differ on resume."""
    settings = {name: value for name, value in flat(config).items() if name not in FREE}
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return {name: value for name, value in found.items() if not name.startswith("machine.")}


def check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raise ZsktError unless a run may start in `folder`, or start again without a checkpoint, or `resume` there."""
    with system_errors("use", folder):
        begun = exists(folder / "checkpoint") or (folder / "student.json").exists()
        if not begun:
            check_unused(folder)
    if begun and not resume:
        raise ZsktError(f"{folder} already holds a run; continue it with --resume or choose another --out")
    if not begun:
        if resume and not any((folder / name).exists() for name in ("config.toml", ".lock")):  # left by a killed run
            raise ZsktError(
                f"expected a run to resume in {folder}, found no config.toml; check the path, or begin anew"
            )
        return
    if not exists(folder / "checkpoint"):
        raise ZsktError(f"{folder} holds a finished run whose checkpoints are gone; choose another --out")
    recorded, now = binding(read_config(folder / "config.toml")), binding(config)
    different = [f"{name} = {recorded[name]!r}, now {now[name]!r}" for name in now if recorded[name] != now[name]]
    sized = {name for name in now if recorded[name] != now[name]} & {"steps", "budget"}
    if sized and (folder / "student.json").exists():
        raise ZsktError(
            f"{folder} has finished its {recorded['steps']:,} steps, and its learning rates have ended with them: it "
            f"cannot be extended; begin a new run from its student, with --student {folder} and another --out"
        )
    if different:
        raise ZsktError(f"{folder} was started with other settings ({'; '.join(different)}); resume it with the same")


def check_unused(folder: Path) -> None:
    """Raise ZsktError if a folder holds anything but what a run leaves that is killed before its first checkpoint."""
    with system_errors("use", folder):
        if folder.exists() and not folder.is_dir():
            raise ZsktError(f"expected a new or empty folder at {folder}, found a file; choose another --out")
        if other := [path.name for path in _content(folder) if path.name not in _OURS]:
            raise ZsktError(
                f"expected a new or empty folder at {folder}, found other things ({other[0]}); choose another --out"
            )


DIVERGED = "diverged.safetensors"
"""The networks and optimisers of a run as they were when it was found to have diverged."""

HALF_WAY = "generator-half-way"
"""File of the generator half-way through a run."""

_OURS = {DIVERGED, f"{HALF_WAY}.safetensors", "config.toml", "metrics.jsonl", "timing.jsonl"}
_OURS |= {"samples", "checkpoint", "rows", "tensorboard", "command.json"}
"""What a run may have written before its first checkpoint is complete."""


def _content(folder: Path) -> list[Path]:
    """A folder's entries, without locks and unfinished files."""
    if not folder.exists():
        return []
    return [path for path in folder.iterdir() if path.name != ".lock" and not path.match(TEMPORARY)]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a finished run's samples and report rely on, for its student.json."""
    return {name: digest(folder / name) for name in ("config.toml", "metrics.jsonl")}


def read_finished(folder: Path) -> Any:
    """The student.json of a finished run; raises ZsktError if the files named by `digests` have changed since."""
    facts = read_sealed(folder / "student.json")
    recorded = facts.get("files") if isinstance(facts, dict) else None
    if recorded is not None:  # early 0.1.0 recorded none
        for name, found in digests(folder).items():
            if not isinstance(recorded, dict) or recorded.get(name) != found:
                raise ZsktError(f"{folder / name} is not as the finished run left it; restore it, or resume the run")
    return facts


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint, damaged or not."""
    return any(folder.glob("[0-9]*.safetensors"))


def has(folder: Path, step: int) -> bool:
    """Whether there is the checkpoint of a step."""
    return _path(folder, step).exists()


def restarted(folder: Path) -> bool:
    """Whether torchrun starts anew, since one of its processes had died, what has a checkpoint in `folder`."""
    return ranks.restarted() and bool(ranks.from_main(lambda: exists(folder / "checkpoint")))


@contextlib.contextmanager
def owning(folder: Path | None) -> Iterator[None]:
    """Lock a folder, created if missing, and remove it if the work fails before there is something to keep."""
    if folder is None:
        yield
        return
    with system_errors("write", folder):
        fresh = not _content(folder)
        make_folder(folder)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InUse(f"another process is using {folder}; wait for it or choose another --out") from error
    try:
        for path in folder.rglob(TEMPORARY):  # left behind by a killed process
            remove(path)
        with held(folder):
            yield
    except BaseException:
        if fresh and not exists(folder / "checkpoint") and not (folder / DIVERGED).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # systems that cannot delete open files
            (folder / ".lock").unlink(missing_ok=True)
        lock.release()


@dataclass
class StopRequest:
    """Whether the loop should stop: after a signal, or out of time."""

    deadline: float
    signum: int | None = None

    def reached(self) -> bool:
        return self.signum is not None or time.monotonic() >= self.deadline


@contextlib.contextmanager
def stopping(seconds: float, *, signals: bool) -> Iterator[StopRequest]:
    """A request to stop after `seconds` or, with `signals` (main thread), at SIGINT or SIGTERM; the second one acts.

    Only of its kind: a Ctrl-C may reach a process twice, by the terminal and by torchrun as SIGTERM.
    """
    request = StopRequest(time.monotonic() + seconds)
    if not signals or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(signum: int, frame: types.FrameType | None) -> None:
        request.signum = signum
        signal.signal(signum, before[signal.Signals(signum)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        put_back()
