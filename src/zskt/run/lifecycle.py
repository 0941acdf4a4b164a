"""The training loop of all methods: log, evaluation, signals, checkpoints and exact resume."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.method.config import FORMAT, OTHER_FORMAT
from zskt.method.protocol import Repeatable
from zskt.run import checkpoint
from zskt.runtime import cpu_name, versions


@dataclass(frozen=True)
class Event:
    """What callbacks get after every step; `line` is the new line of metrics.jsonl, if any."""

    step: int
    steps: int
    losses: Mapping[str, Tensor]
    line: dict[str, Any] | None
    repeated: Repeatable


Callback = Callable[[Event], None]


@dataclass(frozen=True)
class Intervals:
    """Steps between log lines, evaluations and checkpoints."""

    log: int
    evaluate: int
    checkpoint: int


@dataclass
class Lifecycle:
    """The state of a run, and its files if it has a folder."""

    repeated: Repeatable
    folder: Path | None
    intervals: Intervals
    identity: Mapping[str, Any]
    """JSON values that a run must share with the checkpoint it resumes from"""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """values that may differ on resume, at the price of bitwise equality"""
    evaluate: Callable[[int], dict[str, Any]] = lambda step: {}
    """returns what an evaluation adds to the log"""
    advance: Callable[[], Mapping[str, Tensor]] | None = None
    """replaces `repeated.step`"""
    advice: str = "lower {name}.learning_rate or set {name}.clip, and start again"
    """remedy for divergence of network `name`"""
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    seconds_before: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = next(parameter.device for module in self._modules() for parameter in module.parameters())
        self.machine = {
            **self.machine,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processor": cpu_name(),
            "versions": versions(),
        }
        if self.folder is not None:
            self.metrics = checkpoint.JsonLines(self.folder / "metrics.jsonl")
            self.timing = checkpoint.JsonLines(self.folder / "timing.jsonl")

    @property
    def steps(self) -> int:
        return self.repeated.steps

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, over all its processes."""
        return self.seconds_before + time.monotonic() - self.started

    def run(self, callbacks: Sequence[Callback], stop_after: str | int | None = None) -> None:
        """Step until the end, the limit (a time or a number of steps) or a signal."""
        seconds, count = checkpoint.parse_budget(stop_after)
        last = min(self.steps, self.step + count)
        advance = self.advance or self.repeated.step
        with checkpoint.stopping(seconds, signals=self.folder is not None) as request:
            while self.step < last:
                losses = advance()
                self.step += 1
                line = self.log(losses)
                for callback in callbacks:
                    callback(Event(self.step, self.steps, losses, line, self.repeated))
                leaving = request.reached() or self.step == last
                if leaving or self.step % self.intervals.checkpoint == 0:
                    self.save()
                if leaving:
                    request.raise_if_signalled(f"stopped at step {self.step:,} of {self.steps:,}")
                    break

    def log(self, losses: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Write what is due after this step; returns the log line, if any. Only this waits for losses."""
        line: dict[str, Any] = {"step": self.step}
        if self.step in (1, self.steps) or self.step % self.intervals.log == 0:
            line |= describe(losses)
            self._check_losses(losses)
        if self.finished or self.step % self.intervals.evaluate == 0:
            line |= self.evaluate(self.step)
        if len(line) == 1:
            return None
        if self.folder is not None:
            self.metrics.append(line)
            self.timing.append({"step": self.step, "seconds": round(self.seconds, 3)})
        return line

    def save(self) -> None:
        """Write a checkpoint; raises ZsktError if the run has diverged."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.repeated.modules().items():
            tensors |= checkpoint.prefixed(name, module.state_dict())
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            raise ZsktError(
                f"{broken[0]} contains NaN or infinity at step {self.step:,}: the run has diverged; "
                + self.advice.format(name=broken[0].split("/")[0])
            )
        if self.folder is None:
            return
        for name, optimiser in self.repeated.optimisers().items():
            tensors |= checkpoint.prefixed(f"optimiser:{name}", checkpoint.optimizer_state(optimiser))
        tensors |= checkpoint.prefixed("state", self.repeated.state_dict())
        tensors |= checkpoint.random_state(self.device)
        metadata = {
            "format": FORMAT,
            "identity": self.identity,
            "machine": self.machine,
            "metrics_bytes": self.metrics.size(),
            "timing_bytes": self.timing.size(),
            "seconds": round(self.seconds, 3),
        }
        checkpoint.save(self.folder / "checkpoint", self.step, tensors, metadata)

    def restore(self) -> None:
        """Continue from the newest checkpoint, truncating the logs to it; from the start if there is none."""
        assert self.folder is not None
        if not checkpoint.exists(self.folder / "checkpoint"):
            self.metrics.cut(0)
            self.timing.cut(0)
            return
        tensors, metadata = checkpoint.load(self.folder / "checkpoint")
        self._check_metadata(metadata)
        with checkpoint.restoring(self.folder):
            for name, module in self.repeated.modules().items():
                module.load_state_dict(checkpoint.under(name, tensors))
            for name, optimiser in self.repeated.optimisers().items():
                checkpoint.restore_optimizer(optimiser, checkpoint.under(f"optimiser:{name}", tensors))
            self.repeated.load_state_dict(checkpoint.under("state", tensors))
            checkpoint.restore_random_state(tensors, self.device)
            self.step, self.seconds_before = metadata["step"], metadata["seconds"]
            self.metrics.cut(metadata["metrics_bytes"])
            self.timing.cut(metadata["timing_bytes"])

    def _check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raise ZsktError if the checkpoint is from another run; warn about differences of the machine."""
        if metadata.get("format") != FORMAT:
            raise ZsktError(f"expected a checkpoint of format {FORMAT} in {self.folder}, found another; {OTHER_FORMAT}")
        recorded = metadata.get("identity", {})
        different = [
            f"{name} {recorded.get(name)}, now {value}" if isinstance(value, str | int | float) else name
            for name, value in self.identity.items()
            if recorded.get(name) != value
        ]
        if different:
            raise ZsktError(f"{self.folder} differs in {'; '.join(different)}: resume it with the same")
        before = metadata.get("machine", {})
        changed = [
            f"{name} {value} instead of {before.get(name)}"
            for name, value in self.machine.items()
            if before.get(name) != value
        ]
        if changed:
            self.warnings.append(f"resumed with {', '.join(changed)}: not bit for bit equal to an uninterrupted run")

    def _check_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Raise ZsktError when a loss is NaN or infinite."""
        for name, value in losses.items():
            if not bool(value.isfinite().all()):
                raise ZsktError(
                    f"the loss of the {name} is {value.flatten()[-1]:g} at step {self.step:,}: the run has diverged; "
                    + self.advice.format(name=name.split(".")[0])
                )

    def _modules(self) -> list[nn.Module]:
        return list(self.repeated.modules().values())


def describe(losses: Mapping[str, Tensor]) -> dict[str, Any]:
    """Losses as plain numbers: `network` -> network_loss, one entry per update; `network.term` -> in network_terms."""
    line: dict[str, Any] = {}
    for name, value in losses.items():
        network, _, term = name.partition(".")
        if term:
            line.setdefault(f"{network}_terms", {})[term] = value.tolist()
        else:
            line[f"{network}_loss"] = value.tolist()
    return line
