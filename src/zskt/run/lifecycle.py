"""The training loop of all methods: log, evaluation, signals, checkpoints and exact resume."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from zskt.errors import ZsktError, short
from zskt.files import digest, remove, write_tensors
from zskt.method.config import FORMAT, OTHER_FORMAT
from zskt.method.protocol import Growing, Repeatable, Watched
from zskt.networks import ranks
from zskt.run import checkpoint
from zskt.run.shards import Shards
from zskt.runtime import cpu_name, parse_limit, versions

MOST_RESTARTS = 3
VERDICTS = (None, "sound", "suspect", "collapsed")  # None: there was no evaluation


@dataclass(frozen=True)
class Event:
    """What callbacks get after every step; `line` is the new line of metrics.jsonl, if any."""

    step: int
    steps: int
    losses: Mapping[str, Tensor]
    line: dict[str, Any] | None
    repeated: Repeatable

    def numbers(self) -> dict[str, float]:
        """The numbers of `line` by name, for a logger: of several updates the last, terms as student_terms/kl."""
        found: dict[str, Any] = {}
        for name, value in (self.line or {}).items():
            if name.endswith("_loss"):
                found[name] = value[-1]
            elif isinstance(value, Mapping):
                found |= {f"{name}/{term}": each for term, each in value.items()}
            else:
                found[name] = value
        return {name: float(value) for name, value in found.items() if type(value) in (int, float) and name != "step"}


Callback = Callable[[Event], None]


@dataclass
class Lifecycle:
    """The state of a run, and its files if it has a folder. Of several ranks, rank 0 alone writes and evaluates."""

    repeated: Repeatable
    folder: Path | None
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    identity: Mapping[str, Any]  # JSON values that a run must share with the checkpoint it resumes from
    about: Mapping[str, Any] = field(default_factory=dict)  # JSON values that let a checkpoint be read without resuming
    machine: Mapping[str, Any] = field(default_factory=dict)  # may differ on resume, at the price of bitwise equality
    evaluate: Callable[[int], dict[str, Any]] = lambda step: {}  # returns what an evaluation adds to the log
    advance: Callable[[], Mapping[str, Tensor]] | None = None  # replaces `repeated.step`
    advice: str = "lower {name}.learning_rate or set {name}.clip, and start again"  # for divergence of network `name`
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    saved: int | None = None  # the step of the last checkpoint written or read
    rows: int = 0  # of a growing method, in that checkpoint
    judge: Callable[[Mapping[str, Any]], str | None] | None = None  # one of VERDICTS on a line; may make it go back
    good: int | None = None  # the step of the newest checkpoint after which an evaluation found nothing
    restarts: list[str] = field(default_factory=list)  # in words
    seconds_before: float = 0.0
    warnings: list[str] = field(default_factory=list)
    losses: Mapping[str, Tensor] = field(default_factory=dict)  # of the last step

    def __post_init__(self) -> None:
        self.device = next(p.device for module in self.repeated.modules().values() for p in module.parameters())
        self.machine = {
            **self.machine,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processes": ranks.size(),
            "processor": cpu_name(),
            "versions": versions(),
        }
        if self.folder is not None:
            self.logs = {name: checkpoint.JsonLines(self.folder / f"{name}.jsonl") for name in ("metrics", "timing")}
            self.shards = Shards(self.folder / "rows")

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
        seconds, count = parse_limit(stop_after)
        last = min(self.steps, self.step + count)
        advance = self.advance or self.repeated.step
        fresh = self.step == 0 and self.saved is None
        if self.folder is not None and ranks.is_main():
            remove(self.folder / checkpoint.DIVERGED)
            if fresh:  # what a killed process left before its first checkpoint
                for log in self.logs.values():
                    log.cut(0)
                remove(self.folder / "samples")
                remove(self.folder / f"{checkpoint.HALF_WAY}.safetensors")
                remove(self.shards.folder)
        if self.judge is not None and fresh:
            self.good = 0
            self.save()
        with checkpoint.stopping(seconds, signals=self.folder is not None) as request:
            while self.step < last:
                self.losses = losses = advance()
                self.step += 1
                line = self.log(losses)
                if callbacks and ranks.is_main():
                    # What a callback draws changes no step: other ranks have none.
                    with ranks.alone(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                        for callback in callbacks:
                            callback(Event(self.step, self.steps, losses, line, self.repeated))
                if self.judge is not None and self._go_back(self.judge(line or {})):
                    continue
                leaving = bool(ranks.most(request.reached())) or self.step == last
                if leaving or self.step % self.checkpoint_every == 0:
                    self.save()
                if leaving:
                    break
        if signum := ranks.most(request.signum or 0):  # everything is saved
            what = f"stopped at step {self.step:,} of {self.steps:,}; continue with --resume"
            raise checkpoint.Interrupted(signum, what)

    def log(self, losses: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Write what is due after this step; returns the log line, if any. Only this waits for losses."""
        line: dict[str, Any] = {"step": self.step}
        self._check_folder()
        if self.step in (1, self.steps) or self.step % self.log_every == 0:
            self._check_losses(losses)
            line |= describe(losses)
        if self.finished or self.step % self.evaluate_every == 0:
            self._check_losses(losses)
            self._check_networks()
            line |= (measured := self.evaluate(self.step))
            for name, value in measured.items():
                if isinstance(value, float) and not math.isfinite(value):
                    self._diverged(f"{name} is {value}", next(iter(self.repeated.modules())))
        if len(line) == 1:
            return None
        if self.folder is not None and ranks.is_main():
            self.logs["metrics"].append(line)
            self.logs["timing"].append({"step": self.step, "seconds": round(self.seconds, 3)})
        return line

    def save(self) -> None:
        """Write a checkpoint; raises ZsktError if the run has diverged."""
        self._check_losses(self.losses)
        self._check_networks()
        if self.folder is None:
            return
        self._check_folder()
        tensors = self._networks()
        tensors |= checkpoint.prefixed("state", self.repeated.state_dict())
        rows = self.repeated.rows(self.rows) if isinstance(self.repeated, Growing) else {}
        self.rows += len(next(iter(rows.values()), ()))
        before, self.saved = self.saved, self.step
        if not ranks.is_main():
            return
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        sizes = {name: log.size() for name, log in self.logs.items()}
        metadata = {
            "format": FORMAT,
            "identity": self.identity,
            "about": self.about,
            "machine": self.machine,
            **{f"{name}_bytes": size for name, size in sizes.items()},
            **{f"{name}_sha256": digest(self.logs[name].path, size) for name, size in sizes.items()},
            "seconds": round(self.seconds, 3),
            "shards": self.shards.append(rows) if rows else [],
            "restarts": self.restarts,
            "good": self.good,
        }
        kept = {step for step in (before, self.good) if step is not None and step < self.step}
        checkpoint.save(self.folder / "checkpoint", self.step, tensors, metadata, kept)

    def _go_back(self, verdict: str | None) -> bool:
        """Go back to the good checkpoint if the verdict on an evaluation, rank 0's, is that the run has collapsed."""
        number = ranks.most(VERDICTS.index(verdict))
        if VERDICTS[number] == "sound":
            self.good = self.saved
        if VERDICTS[number] != "collapsed" or len(self.restarts) == MOST_RESTARTS:
            return False
        fell, restarts, seconds = self.step, self.restarts, self.seconds_before
        self._load(self.good)
        text = f"collapse at step {fell:,}: back to step {self.step:,}, with half of the generator's learning rate"
        self._be_gentler([*restarts, text])
        self.seconds_before = seconds
        self.good = self.step
        self.save()  # newer ones go
        return True

    def _be_gentler(self, restarts: list[str]) -> None:
        """Halve the generator's learning rate for every restart so far."""
        self.restarts = restarts
        if restarts and isinstance(self.repeated, Watched):
            self.repeated.updates()["generator"].gentler = 0.5 ** len(restarts)

    def _networks(self) -> dict[str, Tensor]:
        """Networks and optimisers, as a checkpoint holds them."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.repeated.modules().items():
            tensors |= checkpoint.prefixed(name, module.state_dict())
        for name, optimiser in self.repeated.optimisers().items():
            tensors |= checkpoint.prefixed(f"optimiser:{name}", checkpoint.optimizer_state(optimiser))
        return tensors

    def _check_networks(self) -> None:
        """Raise ZsktError if a tensor of a network or optimiser contains NaN or infinity."""
        for name, tensor in self._networks().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                self._diverged(f"{name} contains NaN or infinity", name.split("/")[0].removeprefix("optimiser:"))

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, truncating the logs to it; from the start if there is none."""
        assert self.folder is not None
        begun = checkpoint.exists(self.folder / "checkpoint")
        ranks.check_same({"found": f"{'a' if begun else 'no'} checkpoint in {self.folder}"})
        if not begun:
            return
        self._load()

    def _load(self, step: int | None = None) -> None:
        """Take up the newest checkpoint, or that of a step."""
        assert self.folder is not None
        tensors, metadata, problems = checkpoint.load(self.folder / "checkpoint", self._check_files, step)
        self._check_metadata(metadata)
        with checkpoint.restoring(self.folder):
            for name, module in self.repeated.modules().items():
                module.load_state_dict(checkpoint.under(name, tensors))
            for name, optimiser in self.repeated.optimisers().items():
                optimiser.state.clear()
                checkpoint.restore_optimizer(optimiser, checkpoint.under(f"optimiser:{name}", tensors))
            self.repeated.load_state_dict(checkpoint.under("state", tensors))
            if isinstance(self.repeated, Growing):
                self.repeated.load_rows(self.shards.read(metadata["shards"]))
            checkpoint.restore_random_state(tensors, self.device)
            self.step, self.seconds_before = metadata["step"], metadata["seconds"]
            self.rows = self.shards.rows
            good = metadata.get("good")  # unless a newer one, damaged since, has replaced it
            self.good = good if good is None or checkpoint.has(self.folder / "checkpoint", good) else self.step
            self._be_gentler(metadata.get("restarts", []))
        ranks.check_same({"step": str(self.step)})  # from here on nobody reads
        if ranks.is_main():
            for name, log in self.logs.items():
                log.cut(metadata[f"{name}_bytes"])
        self.saved = self.step
        self.warnings += [f"{problem}; resumed from step {self.step:,} instead" for problem in problems]

    def _check_folder(self) -> None:
        """Raise ZsktError if somebody took the folder away: writing would make another, with half of a run."""
        if self.folder is not None and ranks.is_main() and not self.folder.is_dir():
            raise ZsktError(f"{self.folder} is gone; put it back and resume, or start again")

    def _check_files(self, metadata: Mapping[str, Any]) -> None:
        """Raise ZsktError unless logs and rows are as a checkpoint recorded them."""
        for name, log in self.logs.items():
            log.check(metadata[f"{name}_bytes"], metadata.get(f"{name}_sha256"))  # none in files of early 0.1.0
        self.shards.check(metadata.get("shards", []))

    def _check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raise ZsktError if the checkpoint is from another run; warn about differences of the machine."""
        if metadata.get("format") != FORMAT:
            raise ZsktError(f"expected a checkpoint of format {FORMAT} in {self.folder}, found another; {OTHER_FORMAT}")
        recorded = metadata.get("identity", {})
        different = [
            f"{name} {recorded.get(name)}, now {value}" if isinstance(value, str | int | float) else name
            for name, value in self.identity.items()
            if recorded.get(name, value) != value  # early 0.1.0 did not record the settings of a distillation
        ]
        if different:
            words = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", "; ".join(different))
            raise ZsktError(f"{self.folder} differs in {words}: resume it with the same")
        before = {"processes": 1} | metadata.get("machine", {})
        changed = [
            f"{name} {value} instead of {before.get(name)}"
            for name, value in self.machine.items()
            if before.get(name) != value
        ]
        if changed:
            self.warnings.append(f"resumed with {', '.join(changed)}: not bit for bit equal to an uninterrupted run")

    def _check_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Raise ZsktError when a loss is NaN or infinite, or no tensor."""
        if not isinstance(losses, Mapping) or not all(isinstance(value, Tensor) for value in losses.values()):
            step = f"{type(self.repeated).__name__}.step"
            raise ZsktError(f"expected tensors by name from {step}, found {short(repr(losses))}; return its losses so")
        for name, value in losses.items():
            if not bool(value.isfinite().all()):
                self._diverged(f"the loss of the {name} is {value.flatten()[-1]:g}", name.split(".")[0])

    def _diverged(self, found: str, network: str) -> NoReturn:
        """Raise ZsktError, with what went wrong first; the state, which no checkpoint may replace, is kept aside."""
        first = ""
        if isinstance(self.repeated, Watched):
            modules = self.repeated.modules().items()
            names = {id(p): f"{module}/{name}" for module, held in modules for name, p in held.named_parameters()}
            seen = [updates.first_bad(names) for updates in self.repeated.updates().values()]
            first = "".join(f", first in {words}" for words in seen if words)
        aside = ""
        if self.folder is not None and ranks.is_main():
            write_tensors(self.folder / checkpoint.DIVERGED, self._networks(), {"step": str(self.step), "found": found})
            aside = f"; its state is in {self.folder / checkpoint.DIVERGED}"
        advice = self.advice.format(name=network)
        raise ZsktError(f"{found} at step {self.step:,}{first}: the run has diverged; {advice}{aside}")


def describe(losses: Mapping[str, Tensor]) -> dict[str, Any]:
    """Losses as plain numbers: `network` -> network_loss, one entry per update; `network.term` -> in network_terms.

    In the order of their names: losses that come from a checkpoint have lost their own.
    """
    line: dict[str, Any] = {}
    for name, value in sorted(losses.items()):
        network, _, term = name.partition(".")
        if term:
            line.setdefault(f"{network}_terms", {})[term] = value.tolist()
        else:
            line[f"{network}_loss"] = value.flatten().tolist()
    return line
