"""A run: the step repeated, with log, evaluation, sample images, checkpoints and exact resume around it.

Nothing here reads data, nor any image file: images to measure on are handed in as tensors and never reach the training.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import check_images, judge, predict, pseudo_beliefs
from zskt.evaluate.warnings import warning_lights
from zskt.files import read_json, read_tensors, read_text, write_tensors, write_text
from zskt.method.config import Config
from zskt.method.generator import Generator, pseudo_images
from zskt.method.matching import BeliefMatching, StepLosses
from zskt.method.recipe import (
    AUTO,
    arrange,
    assemble,
    choose,
    settle_layout,
    settle_precision,
    settle_stages,
    settle_width,
)
from zskt.method.stage_pairs import stages_pair_up
from zskt.networks.checks import as_teacher, check_pair
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import load_student, save_network
from zskt.networks.observe import evaluating, logits_of
from zskt.networks.rebuild import describe_module
from zskt.run import checkpoint
from zskt.run.cuda_graph import CapturedStep
from zskt.run.plots import believed_grid, save_image
from zskt.runtime import arithmetic, pick_device, seeded, stream, versions
from zskt.settings import from_toml, replace, to_toml


@dataclass(frozen=True)
class Event:
    """What callbacks get after every step: where the run is and, when one was written, the line of metrics.jsonl."""

    step: int
    steps: int
    losses: StepLosses
    line: dict[str, Any] | None
    matching: BeliefMatching


Callback = Callable[[Event], None]


@dataclass
class DistillResult:
    """The outcome of a run. `student` is the module handed in, trained in place, in eval mode."""

    student: nn.Module
    teacher: Classifier
    config: Config
    reason: str
    """why this recipe"""
    step: int
    finished: bool
    measured: dict[str, float] = field(default_factory=dict)
    """at the last iterate, on the images handed in"""
    warnings: list[str] = field(default_factory=list)
    out: Path | None = None
    generator: Generator | None = None
    """as it is at the last step"""

    @property
    def network(self) -> Classifier:
        """The student with its normalisation."""
        return self.teacher.like(self.student)


def plan(
    teacher: Classifier,
    student: nn.Module,
    recipe: str | Config = "auto",
    settings: Mapping[str, Any] | None = None,
) -> tuple[Config, str]:
    """The complete config of a run, with every choice made, and why this recipe."""
    if not isinstance(teacher, Classifier):
        raise UsageError(
            f"expected a zskt.Classifier, found {type(teacher).__name__}: wrap it, as in zskt.Classifier(module, "
            "input_size=(3, 32, 32), mean=..., std=...), so that its normalisation is known"
        )
    config, reason = (recipe, "as given") if isinstance(recipe, Config) else choose(recipe, teacher)
    check_pair(teacher, student)
    settings = dict(settings or {})
    named = "student.loss.stages" in settings or "student.loss.attention" in settings
    if recipe == AUTO and config.student.loss.attention and not named and not stages_pair_up(teacher, student):
        config = replace(config, {"student.loss.attention": 0.0})
        reason += "; without attention transfer, as the stages of teacher and student do not pair up"
    config = settle_precision(replace(config, settings), teacher)
    config = settle_stages(config, teacher, student)
    config, unable = settle_layout(config, teacher, student)
    if unable:
        problem = f"the {unable} cannot work in channels_last (a reshape by view, perhaps)"
        if settings.get("memory_format") == "channels_last":
            raise ZsktError(f"{problem}; leave memory_format out or set it to contiguous")
        reason += f"; in contiguous memory, as {problem}"
    return settle_width(config, teacher, student), reason


def distill(
    teacher: Classifier,
    student: nn.Module,
    recipe: str | Config = "auto",
    *,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    evaluate: tuple[Tensor, Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
    stop_after: str | int | None = None,
    resume: bool = False,
) -> DistillResult:
    """Train `student`, in place, to agree with `teacher` on pseudo images; returns it in eval mode.

    `settings` changes values of the recipe by dotted name, as in {"student.learning_rate": 1e-3}; `steps` and `seed`
    are short for two of them. `evaluate` is (images (M, C, H, W) uint8 or [0, 1], labels (M,)): measured on, never
    trained on. With `out` the run is kept in that folder; `resume` continues it there, bit for bit on a CPU with the
    same number of threads. `stop_after` ("90s", "9m", "2h" or a number of steps) leaves early, to be resumed.
    The teacher comes back exactly as it was. Raises ZsktError, with one line of advice, for whatever cannot work.
    """
    started = time.monotonic()
    budget = checkpoint.parse_budget(stop_after)
    given = {"steps": steps, "seed": seed}
    changes = dict(settings or {}) | {name: value for name, value in given.items() if value is not None}
    config, reason = plan(teacher, student, recipe, changes)
    if (stop_after or resume) and out is None:
        raise UsageError("a run that is resumed or stopped early needs a folder: give out")
    folder = Path(out) if out is not None else None
    if folder is not None:
        checkpoint.check_folder(folder, config, resume)
    device = pick_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        raise UsageError(f"cuda_graph = true is for CUDA devices, found {device}; leave it out or use --device cuda")
    student.to(device)
    arrange(student, config)
    working_teacher = as_teacher(teacher).to(device)
    arrange(working_teacher, config)
    if evaluate is not None:
        check_images(teacher, *evaluate)  # wrong size or labels: said now, not after the first hours

    with checkpoint.owning(folder), arithmetic(), seeded(stream(config.seed, "run"), device):
        rng = torch.Generator(device).manual_seed(stream(config.seed, "latents"))
        bank_rng = torch.Generator(device).manual_seed(stream(config.seed, "bank"))
        matching = assemble(config, working_teacher, student, rng, bank_rng)
        run = Run(config, matching, working_teacher, folder, evaluate, [rng, bank_rng], started)
        try:
            if resume:
                run.restore()
            elif folder is not None:
                write_text(folder / "config.toml", to_toml(config))
            run.train(callbacks, budget)
        finally:
            matching.close()
            student.eval().zero_grad()
        result = DistillResult(student, teacher, config, reason, run.step, run.step == config.steps, out=folder)
        if isinstance(matching.generator, Generator):
            result.generator = matching.generator
        if result.finished:
            run.finish(result)
        result.warnings += run.warnings
    return result


class Run:
    """The state around the step, and what is written of it."""

    def __init__(
        self,
        config: Config,
        matching: BeliefMatching,
        teacher: Classifier,
        folder: Path | None,
        evaluate: tuple[Tensor, Tensor] | None,
        rngs: list[torch.Generator],
        started: float,
    ) -> None:
        self.config = config
        self.matching = matching
        self.teacher = teacher
        self.folder = folder
        self.evaluate = evaluate
        self.rngs = rngs
        self.started = started
        self.advance = CapturedStep(matching, rngs) if config.cuda_graph else matching.step
        self.step = 0
        self.seconds_before = 0.0
        self.answers: Tensor | None = None
        self.measured: dict[str, float] = {}
        self.warnings: list[str] = []
        self.metrics = checkpoint.JsonLines(folder / "metrics.jsonl") if folder else None
        self.timing = checkpoint.JsonLines(folder / "timing.jsonl") if folder else None

    @property
    def student(self) -> nn.Module:
        return self.matching.student.module

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def train(self, callbacks: Sequence[Callback], budget: tuple[float, int]) -> None:
        """Step until the end, the budget (seconds, steps) or a signal."""
        config = self.config
        last = min(config.steps, self.step + budget[1])
        with checkpoint.stopping(budget[0], signals=self.folder is not None) as request:
            while self.step < last:
                losses = self.advance()
                self.step += 1
                line = self.log(losses)
                for callback in callbacks:
                    callback(Event(self.step, config.steps, losses, line, self.matching))
                leaving = request.reached() or self.step == last
                if self.folder and (leaving or self.step % config.interval("checkpoint_every") == 0):
                    self.save()
                if leaving:
                    request.raise_if_signalled(f"stopped at step {self.step:,} of {config.steps:,}")
                    break

    def log(self, losses: StepLosses) -> dict[str, Any] | None:
        """Write what is due after this step; returns the line written, if any. The only place that waits for losses."""
        config, step = self.config, self.step
        ending = step in (1, config.steps)
        line: dict[str, Any] = {"step": step}
        if ending or step % config.interval("log_every") == 0:
            line |= describe(losses)
            check_finite(line)
        if step == config.steps or step % config.interval("evaluate_every") == 0:
            line |= pseudo_beliefs(losses.teacher_logits, losses.student_logits)
            if self.evaluate is not None:
                line |= self.measure()
            if self.folder is not None:
                self.save_samples()
        if len(line) == 1:
            return None
        if self.metrics is not None and self.timing is not None:
            self.metrics.append(line)
            self.timing.append({"step": step, "seconds": round(self.seconds, 3)})
        return line

    def save_samples(self) -> None:
        """Write 64 pseudo images, always from the same latents, with what teacher (T) and student (S) take them for."""
        assert self.folder is not None
        x = pseudo_images(self.matching.generator, self.matching.latent)  # (64, C, H, W)
        with evaluating(self.student):
            beliefs = {"T": self.teacher(x), "S": logits_of(self.student(x))}  # (64, K) each
        grid = believed_grid(self.teacher.denormalise(x), beliefs, self.teacher.class_names)
        save_image(self.folder / "samples" / f"{self.step:08d}.png", grid)

    def measure(self) -> dict[str, float]:
        """Accuracy and agreement now, on the images handed in; the teacher answers them once in a run."""
        assert self.evaluate is not None
        images, labels = self.evaluate
        if self.answers is None:
            self.answers = predict(self.teacher, images)  # (M, K)
        self.measured = judge(predict(self.teacher.like(self.student), images), labels, self.answers)
        return self.measured

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        assert self.folder is not None
        assert self.metrics is not None
        assert self.timing is not None
        matching = self.matching
        tensors = {
            **checkpoint.prefixed("student", self.student.state_dict()),
            **checkpoint.prefixed("generator", matching.generator.state_dict()),
            **checkpoint.prefixed("student_optimizer", checkpoint.optimizer_state(matching.student_updates.optimizer)),
            **checkpoint.prefixed(
                "generator_optimizer", checkpoint.optimizer_state(matching.generator_updates.optimizer)
            ),
            **checkpoint.prefixed("memory", matching.memory.state_dict()),
            **{f"rng/{i}": rng.get_state() for i, rng in enumerate(self.rngs)},
            **checkpoint.random_state(self.rngs[0].device),
        }
        if not all(bool(t.isfinite().all()) for t in self.student.state_dict().values() if t.is_floating_point()):
            raise ZsktError(
                f"the student has left the numbers by step {self.step:,}: the run has diverged; lower "
                "student.learning_rate or set student.clip, and start anew"
            )
        facts = {
            "teacher": self.teacher.fingerprint(),
            "metrics_bytes": self.metrics.size(),
            "timing_bytes": self.timing.size(),
            "seconds": round(self.seconds, 3),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "evaluated": self.evaluate is not None,
        }
        checkpoint.save(self.folder / "checkpoint", self.step, tensors, facts)

    def restore(self) -> None:
        """Take up the newest checkpoint and cut the logs back to it."""
        assert self.folder is not None
        assert self.metrics is not None
        assert self.timing is not None
        tensors, facts = checkpoint.load(self.folder / "checkpoint")
        if facts.get("teacher") != self.teacher.fingerprint():
            raise ZsktError(f"{self.folder} was begun with another teacher; resume it with the same one")
        if facts.get("evaluated") != (self.evaluate is not None) and facts.get("step") != self.config.steps:
            how = "with" if facts.get("evaluated") else "without"
            raise ZsktError(f"{self.folder} was begun {how} images to measure on; resume it likewise")
        now = {"threads": torch.get_num_threads(), "versions": versions()}
        self.warnings += [
            f"resumed with {name} {now[name]} after {facts.get(name)}: not bit for bit what one run would have been"
            for name in now
            if now[name] != facts.get(name)
        ]
        matching = self.matching
        with checkpoint.restoring(self.folder):
            self.student.load_state_dict(checkpoint.under("student", tensors))
            matching.generator.load_state_dict(checkpoint.under("generator", tensors))
            for updates, name in ((matching.student_updates, "student"), (matching.generator_updates, "generator")):
                checkpoint.restore_optimizer(updates.optimizer, checkpoint.under(f"{name}_optimizer", tensors))
                updates.done = facts["step"] * updates.count
            matching.memory.load_state_dict(checkpoint.under("memory", tensors))
            for i, rng in enumerate(self.rngs):
                rng.set_state(tensors[f"rng/{i}"])
            checkpoint.restore_random_state(tensors, self.rngs[0].device)
            if not 0 <= facts["step"] <= self.config.steps:
                raise ValueError(f"step {facts['step']} of {self.config.steps}")
            self.step = facts["step"]
            self.seconds_before = facts["seconds"]
            self.metrics.cut(facts["metrics_bytes"])
            self.timing.cut(facts["timing_bytes"])

    def finish(self, result: DistillResult) -> None:
        """Measure the last iterate and write the finished student and the generator."""
        network = self.teacher.like(self.student)
        if self.evaluate is not None:
            result.measured = self.measured or self.measure()
        elif self.folder is not None and (self.folder / "student.json").exists():
            # resumed though finished, without images: what was measured then still holds
            result.measured = read_json(self.folder / "student.json").get("measured", {})
        images = pseudo_images(self.matching.generator, self.matching.latent)
        with torch.no_grad():
            result.warnings = warning_lights(pseudo_beliefs(self.teacher(images), network(images)))
        if self.folder is None:
            return
        teacher = self.teacher
        write_tensors(self.folder / "generator.safetensors", self.matching.generator.state_dict())
        save_network(
            self.folder,
            "student",
            network,
            recipe=self.config.recipe,
            steps=self.config.steps,
            seed=self.config.seed,
            teacher_fingerprint=teacher.fingerprint(),
            reason=result.reason,
            teacher_model=describe_module(teacher.module, teacher.num_classes, teacher.input_size).get("spec"),
            teacher_parameters=count_parameters(teacher.module),
            measured=result.measured,
            warnings=result.warnings,
            seconds=round(self.seconds, 1),
            versions=versions(),
        )


def sample(folder: str | Path, seed: int = 0) -> tuple[Tensor, Classifier]:
    """64 pseudo images (64, C, H, W), normalised, from the generator of a finished run; and the run's student."""
    network = load_student(folder)
    generator = load_generator(folder, network)
    return pseudo_images(generator, generator.latent, seed), network


def load_generator(folder: str | Path, network: Classifier) -> Generator:
    """The generator of a finished run, whose student is `network`."""
    folder = Path(folder)
    config = from_toml(Config, read_text(folder / "config.toml"), str(folder / "config.toml"))
    if config.generator.width == "auto":
        raise ZsktError(f"expected a number for generator.width in {folder / 'config.toml'}, found auto; put it back")
    generator = Generator(config.generator.latent, network.input_size, config.generator.width)
    with checkpoint.restoring(folder):
        generator.load_state_dict(read_tensors(folder / "generator.safetensors")[0])
    return generator


def describe(losses: StepLosses) -> dict[str, Any]:
    """A step's losses and beliefs as plain numbers: one list entry per update."""
    return {
        "generator_loss": [float(update.total) for update in losses.generator],
        "generator_terms": {name: float(value) for name, value in losses.generator[-1].terms.items()},
        "student_loss": [float(update.total) for update in losses.student],
        "student_terms": {name: float(value) for name, value in losses.student[-1].terms.items()},
        **pseudo_beliefs(losses.teacher_logits, losses.student_logits),
    }


def check_finite(line: Mapping[str, Any]) -> None:
    """Raise ZsktError when a loss has left the numbers."""
    for player in ("generator", "student"):
        loss = line[f"{player}_loss"]
        if not all(map(math.isfinite, loss)):
            raise ZsktError(
                f"the {player}'s loss is {loss[-1]} at step {line['step']:,}: the run has diverged; "
                f"lower {player}.learning_rate or set {player}.clip"
            )
