"""A distillation run: training with evaluation, sample images and the finished student; later, images from its folder.

Nothing here reads data: test images come in as tensors and never reach the training. Unlabelled images that a user does
have come in as a tensor, too, and join those of a bank.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import check_images, pseudo_image_warnings
from zskt.files import expanded, read_tensors, tensor_shapes, write_tensors, write_text
from zskt.method.bank import BankDistillation, bank_images
from zskt.method.budget import BUDGETED
from zskt.method.build import METHODS, arrange, make_generator
from zskt.method.config import Config, read_config
from zskt.method.generator import Generator, pseudo_images
from zskt.method.matching import BeliefMatching
from zskt.method.memory import naming_batch_that_fits
from zskt.method.protocol import Make, Method, Watched, check_method
from zskt.method.recipe import AUTO, Plan, describe_method, plan
from zskt.networks import ranks
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import describe_network, save_network
from zskt.networks.rebuild import describe_module, unallocated
from zskt.networks.synchronised import separate
from zskt.run import checkpoint
from zskt.run.cuda_graph import CapturedStep
from zskt.run.examiner import Examiner
from zskt.run.lifecycle import Callback, Lifecycle
from zskt.run.own_images import check_own_images, fingerprint
from zskt.run.several import share
from zskt.run.shards import saved_rows
from zskt.runtime import arithmetic, parse_limit, pick_device, seeded, stream, threads
from zskt.settings import flat, to_toml


@dataclass
class DistillResult:
    """The outcome of a run. `student` is the given module, trained in place, in eval mode."""

    student: nn.Module = field(repr=False)
    teacher: Classifier = field(repr=False)
    method: Method = field(repr=False)  # in its state after the last step; `method.sample(n, seed)` draws pseudo images
    config: Config = field(repr=False)
    reason: str  # why this recipe was chosen
    step: int
    finished: bool
    measured: dict[str, float] = field(default_factory=dict)  # at the last iterate, on the test images
    warnings: list[str] = field(default_factory=list)
    out: Path | None = None
    images: int = 0  # of the user's own, beside the pseudo images

    @property
    def network(self) -> Classifier:
        """The student with its normalisation."""
        return self.teacher.like(self.student)

    def metadata(self) -> dict[str, Any]:
        """Metadata saved with the student's weights and with exports of it."""
        known = origin(self.teacher, self.config, self.reason, self.images)
        return known | {"measured": self.measured, "warnings": self.warnings}


def origin(teacher: Classifier, config: Config, reason: str, images: int) -> dict[str, Any]:
    """Where a student comes from, as plain JSON values: known before the run."""
    return {
        "recipe": config.recipe,
        "method": config.method,
        "steps": config.steps,
        "seed": config.seed,
        "reason": reason,
        "teacher_fingerprint": teacher.fingerprint(),
        "teacher_model": describe_module(teacher.module, teacher.num_classes, teacher.input_size).get("spec"),
        "teacher_parameters": count_parameters(teacher.module),
        **({"images": images} if images else {}),
    }


def distill(
    teacher: Classifier,
    student: nn.Module,
    recipe: str | Config | Plan = AUTO,
    *,
    method: Make | None = None,
    steps: int | None = None,
    budget: str | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    evaluate: tuple[Tensor, Tensor] | None = None,
    images: Tensor | None = None,
    callbacks: Sequence[Callback] = (),
    stop_after: str | int | None = None,
    resume: bool = False,
) -> DistillResult:
    """Train `student`, in place, to agree with `teacher` on pseudo images; returns it in eval mode.

    `settings` changes values of the recipe by dotted name, as in {"student.learning_rate": 1e-3}; `steps`, `budget`
    ("10m", "2h": as many steps as fit) and `seed` are short for three of them. `method` builds a custom method from
    teacher, student and config (`zskt.Method`). A `Plan` as `recipe` already contains all of these. `evaluate` is
    (images (M, C, H, W) uint8 or [0, 1], labels (M,)), for evaluation only. `images` (M, C, H, W) uint8, unlabelled,
    join the bank of a recipe that has one: the result says so, as it is no longer data-free. With `out` the run is
    saved to that folder; `resume` continues it, bit for bit on the same kind of CPU with the same number of threads.
    `stop_after` ("90s", "9m", "2h" or a number of steps) stops early. The teacher is left unchanged. Raises ZsktError,
    with one line of advice, for anything that cannot work. One run at a time in a process: torch's seed and threads are
    shared.
    """
    started = time.monotonic()
    parse_limit(stop_after)
    if (stop_after or resume) and out is None:
        raise UsageError("resume and stop_after need a folder for the run: set out")
    begun = resume and checkpoint.exists(expanded(out) / "checkpoint") if out is not None else False
    ranks.check_same({"resume": str(resume), "stop_after": str(stop_after), "checkpoint": f"{begun} in {out}"})
    given = {"steps": steps, "budget": budget, "seed": seed}
    if isinstance(recipe, Plan):
        beside = given | {"method": method, "settings": settings}
        if named := [name for name, value in beside.items() if value is not None]:
            raise UsageError(f"a Plan already has {' and '.join(named)}: give them to `plan`")
    else:
        changes = dict(settings or {}) | {name: value for name, value in given.items() if value is not None}
        if changes.get("budget") and (both := [name for name in BUDGETED if name in changes]):
            raise UsageError(f"budget chooses {both[0]}: give one of them")
        begun_with = begun_config(out) if resume else None
        own = 0 if images is None else len(images)
        recipe = plan(teacher, student, recipe, changes, method, begun_with, own)
    config = recipe.config
    folder = expanded(out) if out is not None else None
    if config.on_collapse == "restart" and (folder is None or config.machine.cuda_graph):
        raise UsageError("on_collapse = restart goes back to a checkpoint: set out, and leave out machine.cuda_graph")
    if folder is not None and ranks.is_main():
        checkpoint.check_folder(folder, config, resume)
    if evaluate is not None:
        check_images(teacher, *evaluate)  # reject a wrong size or labels before training
    if images is not None:
        check_own_images(teacher, images, config)
    device = pick_device(config.machine.device)
    student.to(device)
    arrange(student, config)
    frozen = as_teacher(teacher).to(device)
    arrange(frozen, config)
    share(frozen, student, config, fingerprint(images))

    with (
        checkpoint.owning(folder if ranks.is_main() else None),
        naming_batch_that_fits(teacher, student, config) if config.method in METHODS else contextlib.nullcontext(),
        threads(config.machine.threads),
        arithmetic(),
        seeded(stream(config.seed, "run"), device),
    ):
        repeated = check_method(recipe.make(frozen, student, config), student, config.method)
        if config.on_collapse == "restart" and not (
            isinstance(repeated, Watched) and "generator" in repeated.updates()
        ):
            raise UsageError(f"on_collapse = restart needs the updates of a generator, {config.method} has none")
        try:
            if images is not None:
                assert isinstance(repeated, BankDistillation)
                repeated.bank.reserve(len(images))
            own = 0 if images is None else len(images)
            about = describe_network(frozen.like(student)) | origin(frozen, config, recipe.reason, own)
            examiner = Examiner(frozen, repeated, folder, evaluate, isinstance(repeated, BeliefMatching))
            life = Lifecycle(
                repeated,
                folder,
                log_every=config.interval("log_every"),
                evaluate_every=config.interval("evaluate_every"),
                checkpoint_every=config.interval("checkpoint_every"),
                identity={
                    "method": config.method,
                    "teacher": frozen.fingerprint(),
                    "settings": checkpoint.binding(config),
                    "images": fingerprint(images),
                },
                about=about,
                machine={name: value for name, value in flat(config.machine).items() if name != "device"},
                evaluate=examiner.examine,
                advance=_captured(repeated, config, device),
                started=started,
                judge=examiner.judge if config.on_collapse == "restart" else None,
            )
            if resume:
                life.restore()
            if isinstance(repeated, BankDistillation) and images is not None and not repeated.bank.count:
                for part in torch.split(images.to(device), config.bank.batch_size):
                    repeated.bank.add_own(frozen.normalise(part))
            if life.step:
                lines = checkpoint.read_lines(life.logs["metrics"].path)
                examiner.past = [line for line in lines if "class_entropy" in line]
            if folder is not None and ranks.is_main():
                write_text(folder / "config.toml", to_toml(config))
            life.run(callbacks, stop_after)
        finally:
            repeated.close()
            student.eval().zero_grad()
            for module in repeated.modules().values():
                separate(module)
        result = DistillResult(
            student,
            teacher,
            repeated,
            config,
            recipe.reason,
            life.step,
            life.finished,
            warnings=[*life.warnings, *life.restarts],
            out=folder,
            images=own,
        )
        beliefs = examiner.beliefs() if result.finished else {}
        state = repeated.state_dict() if result.finished and config.method not in METHODS else {}  # of all ranks
        if result.finished and ranks.is_main():
            result.measured = examiner.last()
            found = [*examiner.said(), *pseudo_image_warnings(beliefs).values()]
            result.warnings += dict.fromkeys(found)  # each once
            if folder is not None:
                write_run(folder, result, life.seconds, state)
    return result


def begun_config(out: str | Path | None) -> Config | None:
    """The config of the run in a folder, if there is something to resume."""
    if out is None or not checkpoint.exists(expanded(out) / "checkpoint"):
        return None
    return read_config(expanded(out) / "config.toml")


def _captured(method: Method, config: Config, device: torch.device) -> CapturedStep | None:
    """The step as a CUDA graph, if the config asks for one."""
    if not config.machine.cuda_graph:
        return None
    if device.type != "cuda":
        raise UsageError(f"machine.cuda_graph is for CUDA devices, found {device}; leave it out or use --device cuda")
    if not isinstance(method, BeliefMatching):
        raise UsageError(f"machine.cuda_graph is for belief_matching, found {config.method}; leave it out")
    return CapturedStep(method)


def write_run(folder: Path, result: DistillResult, seconds: float, state: Mapping[str, Tensor]) -> None:
    """Save the finished student and what `sample` needs."""
    for name, module in result.method.modules().items():
        if name != "student":
            write_tensors(folder / f"{name}.safetensors", module.state_dict())
    if result.config.method not in METHODS:
        write_tensors(folder / "method.safetensors", state)
    facts = result.metadata() | {"seconds": round(seconds, 1), "files": checkpoint.digests(folder)}
    save_network(folder, "student", result.network, **facts)


def saved_generator(folder: Path, network: Classifier, config: Config, name: str = "generator") -> Generator:
    """A generator of the run in `folder`, whose student is `network`: the last one, or that of HALF_WAY."""
    if config.generator.width == "auto":
        raise ZsktError(
            f"expected a number for generator.width in {folder / 'config.toml'}, found auto; restore the number"
        )
    weights = folder / f"{name}.safetensors"
    with checkpoint.restoring(folder):
        with unallocated():  # a short file can describe a generator too large for memory
            twin = make_generator(network, config).state_dict()
        if {name: tuple(tensor.shape) for name, tensor in twin.items()} != tensor_shapes(weights):
            raise ZsktError(f"{weights} does not fit the generator in {folder / 'config.toml'}; restore both")
        generator = make_generator(network, config)
        generator.load_state_dict(read_tensors(weights)[0])
    return generator


Sample = Callable[[int, int], Tensor]  # (n, seed) -> pseudo images (n, C, H, W), normalised


@torch.random.fork_rng(devices=[])  # networks are built with random weights first
def sampler(
    folder: str | Path, network: Classifier, *, method: Make | None = None, teacher: Classifier | None = None
) -> Sample:
    """A function that draws pseudo images from the finished run in `folder`, whose student is `network`."""
    folder = Path(folder)
    facts = checkpoint.read_finished(folder)
    config = read_config(folder / "config.toml")
    if config.method == "belief_matching":
        generator = saved_generator(folder, network, config)
        return functools.partial(pseudo_images, generator, generator.latent)
    if config.method == "bank":
        stored = torch.cat([rows["images"] for rows in saved_rows(folder / "rows")])  # (M, C, H, W)
        if type(own := facts.get("images", 0)) is not int or not 0 <= own < len(stored):
            raise ZsktError(
                f"expected up to {len(stored):,} images of the user's own in {folder}, found {own}; restore it"
            )
        images = stored[own:]  # the pseudo images
        return functools.partial(bank_images, network, images)
    if method is None or teacher is None:
        raise ZsktError(
            f"{folder} uses a custom method, {config.method}: give --teacher, --method FILE:FUNCTION and "
            "--trust to draw its images"
        )
    if (given := describe_method(method)) != config.method:
        raise ZsktError(f"expected the method of {folder}, {config.method}, found {given}; give the same one")
    recorded = facts.get("teacher_fingerprint")
    if (fingerprint := teacher.fingerprint()) != recorded:
        raise ZsktError(
            f"expected the teacher of {folder}, {str(recorded)[:12]}, found {fingerprint[:12]}; give the same one"
        )
    student = network.module.requires_grad_()
    built = check_method(method(as_teacher(teacher), student, config), student, config.method)
    built.close()
    with checkpoint.restoring(folder):
        for name, part in built.modules().items():
            part.load_state_dict(read_tensors(folder / f"{name}.safetensors")[0])
        built.load_state_dict(read_tensors(folder / "method.safetensors")[0])
    network.requires_grad_(False).eval()
    return built.sample
