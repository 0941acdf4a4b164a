"""Recipes: a method or a published experiment as the differences from the defaults, and how one becomes objects."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from importlib import resources

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError, unknown
from zskt.method import losses
from zskt.method.config import Config, Schedule
from zskt.method.generator import Generator, choose_width
from zskt.method.matching import BeliefMatching, Beliefs, Term, Updates
from zskt.method.replay import Bank, Fresh, Memory, Same
from zskt.method.stage_pairs import stage_pairs
from zskt.networks.checks import check_pair
from zskt.networks.classifier import Classifier
from zskt.networks.observe import find_stages, forward_flops, memory_format
from zskt.runtime import pick_device
from zskt.settings import from_toml

AUTO = "auto"
BF16_COMPARED = ("zskt-prior", "zskt")
"""Recipes whose bf16 lost no accuracy beyond a standard deviation over three seeds (benchmarks/precision.py)."""


def recipe_texts() -> dict[str, str]:
    """All recipes that come with the package: name -> TOML text, whose first line says what it is."""
    files = resources.files("zskt.method").joinpath("recipes").iterdir()
    texts = {file.name.removesuffix(".toml"): file.read_text() for file in files if file.name.endswith(".toml")}
    return dict(sorted(texts.items()))


def load_recipe(name: str) -> Config:
    """A recipe by name; raises UsageError naming the nearest ones. `auto` is resolved by `choose` first."""
    texts = recipe_texts()
    if name not in texts:
        raise unknown("recipe", name, [AUTO, *texts])
    return from_toml(Config, texts[name], f"recipe {name}")


def choose(name: str, teacher: Classifier) -> tuple[Config, str]:
    """The config of a recipe and why it was chosen; `auto` looks at the teacher."""
    if name != AUTO:
        return load_recipe(name), "as asked"
    if teacher.has_batchnorm:
        return load_recipe("zskt-prior"), "auto: the teacher has BatchNorm, whose statistics hold the pseudo images"
    config = load_recipe("zskt-fresh")
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, width="auto"))
    return config, "auto: the teacher has no BatchNorm, so fresh pseudo batches are the best that is known"


def settle_width(config: Config, teacher: Classifier, student: nn.Module) -> Config:
    """The config with the generator's width as a number."""
    if config.generator.width != "auto":
        return config
    size = teacher.input_size
    budget = forward_flops(teacher.module, size) + forward_flops(student, size)
    width = choose_width(config.generator.latent, size, budget)
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, width=width))


def settle_precision(config: Config, teacher: Classifier) -> Config:
    """The config with `auto` precision decided: bf16 on a CPU that computes in it, for recipes of BF16_COMPARED."""
    if config.precision != "auto":
        return config
    like = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
    fast = pick_device(config.device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    known = config.recipe in BF16_COMPARED and like == torch.float32
    return dataclasses.replace(config, precision="bf16" if fast and known else "fp32")


def settle_stages(config: Config, teacher: Classifier, student: nn.Module) -> Config:
    """The config with the stages that attention transfer compares by name; raises ZsktError where there are none."""
    loss = config.student.loss
    if not loss.attention:
        return config
    pairs = tuple("=".join(pair) for pair in zip(*stage_pairs(teacher, student, loss.stages), strict=True))
    return dataclasses.replace(
        config, student=dataclasses.replace(config.student, loss=dataclasses.replace(loss, stages=pairs))
    )


def settle_layout(config: Config, teacher: Classifier, student: nn.Module) -> tuple[Config, str]:
    """The config with a memory format that both networks take, and whose fault a change is: empty where none is.

    Images pass from network to network, so that one which reshapes maps by `view` decides for all.
    """
    if config.memory_format == "contiguous":
        return config, ""
    networks = {"teacher": teacher.module, "student": student}
    formats = {who: memory_format(module, teacher.input_size) for who, module in networks.items()}
    unable = [who for who, format in formats.items() if format == torch.contiguous_format]
    if not unable:
        return config, ""
    return dataclasses.replace(config, memory_format="contiguous"), " and ".join(unable)


def generator_terms(config: Config) -> dict[str, Term]:
    """The generator's loss as weighted terms; a weight of 0 leaves the term out."""
    w = config.generator.loss
    terms: dict[str, tuple[float, Term]] = {
        "kl": (w.kl, lambda b: losses.forward_kl(b.student.logits, b.teacher.logits, scale=w.kl_scale)),
        "l1": (w.l1, lambda b: losses.l1_logits(b.student.logits, b.teacher.logits)),
        "jensen_shannon": (w.jensen_shannon, lambda b: losses.jensen_shannon(b.student.logits, b.teacher.logits)),
        "batchnorm": (w.batchnorm, lambda b: losses.batchnorm_prior(b.teacher.statistics)),
        "one_hot": (w.one_hot, lambda b: losses.one_hot(b.teacher.logits, b.labels)),
        "balance": (w.balance, lambda b: losses.class_balance(b.teacher.logits)),
        "activation": (w.activation, lambda b: losses.activation(b.teacher.stages[-1])),
        "total_variation": (w.total_variation, lambda b: losses.total_variation(b.images)),
    }
    return {name: _weighted(weight, term) for name, (weight, term) in terms.items() if weight}


def student_terms(config: Config) -> dict[str, Term]:
    """The student's loss as weighted terms; a weight of 0 leaves the term out."""
    w = config.student.loss
    kl = functools.partial(losses.forward_kl, temperature=w.temperature, scale=w.kl_scale)
    terms: dict[str, tuple[float, Term]] = {
        "kl": (w.kl, lambda b: kl(b.student.logits, b.teacher.logits)),
        "l1": (w.l1, lambda b: losses.l1_logits(b.student.logits, b.teacher.logits)),
        "jensen_shannon": (w.jensen_shannon, lambda b: losses.jensen_shannon(b.student.logits, b.teacher.logits)),
        "attention": (w.attention, _attention),
    }
    return {name: _weighted(weight, term) for name, (weight, term) in terms.items() if weight}


def _attention(beliefs: Beliefs) -> Tensor:
    """Of the stages that are compared: the teacher's last one may be there beside them, for the activation prior."""
    student, teacher = beliefs.student, beliefs.teacher
    sizes = losses.common_sizes(student.stages, teacher.stages[: len(student.stages)])
    return losses.attention_distance(losses.attention_maps(student, sizes), losses.attention_maps(teacher, sizes))


def _weighted(weight: float, term: Term) -> Term:
    def weighted(beliefs: Beliefs) -> Tensor:
        return weight * term(beliefs)

    return weighted


def learning_rate(schedule: Schedule, initial: float, steps: int, updates: int) -> Callable[[int], float]:
    """The rate at a player's t-th update, of `updates` per step in a run of `steps`."""
    milestones = [max(1, math.floor(steps * fraction + 1e-9)) for fraction in schedule.milestones]

    def rate(t: int) -> float:
        step = t // updates if schedule.clock == "step" else t / updates
        if schedule.kind == "cosine":
            return initial * (1 + math.cos(math.pi * step / steps)) / 2
        return initial * schedule.factor ** sum(step >= milestone for milestone in milestones)

    return rate


def arrange(module: nn.Module, config: Config) -> None:
    """Lay a network's weights out, in place, as the config wants them; images follow the first convolution."""
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    module.to(memory_format=formats[config.memory_format])  # type: ignore[call-overload]


def assemble(
    config: Config, teacher: Classifier, student: nn.Module, rng: torch.Generator, bank_rng: torch.Generator
) -> BeliefMatching:
    """The step that `config` describes, for a teacher and a student on one device.

    The generator is initialised from torch's global random numbers; on that device `rng` draws latents and `bank_rng`
    from a bank. Raises ZsktError where teacher, student and config do not fit together.
    """
    check_pair(teacher, student)
    side, learner = config.generator, config.student
    if side.loss.batchnorm and not teacher.has_batchnorm:
        raise ZsktError(
            f"recipe {config.recipe} holds pseudo images to the teacher's BatchNorm statistics, and this teacher has "
            "no BatchNorm; use --recipe zskt-fresh or --set generator.loss.batchnorm=0"
        )
    stages: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if learner.loss.attention:
        stages = stage_pairs(teacher, student, learner.loss.stages)
    if side.loss.activation:
        last = find_stages(teacher.module, teacher.input_size)[-1:]
        if not last:
            raise ZsktError("found no stage in the teacher to look at; use --set generator.loss.activation=0")
        if stages[0][-1:] != last:  # not compared, or not last
            stages = (stages[0] + last, stages[1])
    like = next(p for p in student.parameters() if p.requires_grad)
    assert isinstance(side.width, int), "settle_width first"
    assert config.precision != "auto", "settle_precision first"
    generator = Generator(side.latent, teacher.input_size, side.width).to(like.device, like.dtype)
    arrange(generator, config)
    memories: dict[str, Callable[[], Memory]] = {
        "same": Same,
        "fresh": Fresh,
        "bank": lambda: Bank(config.memory.capacity, bank_rng),
    }

    generator_parameters = list(generator.parameters())
    student_parameters = [p for p in student.parameters() if p.requires_grad]
    student_optimizer: torch.optim.Optimizer
    if learner.optimizer == "adam":
        student_optimizer = torch.optim.Adam(student_parameters, weight_decay=learner.weight_decay, fused=config.fused)
    else:
        student_optimizer = torch.optim.SGD(
            student_parameters, momentum=learner.momentum, weight_decay=learner.weight_decay, fused=config.fused
        )
    return BeliefMatching(
        teacher,
        student,
        generator,
        Updates(
            side.updates,
            torch.optim.Adam(generator_parameters, fused=config.fused),
            generator_terms(config),
            side.clip or None,
            learning_rate(config.schedule, side.learning_rate, config.steps, side.updates),
        ),
        Updates(
            learner.updates,
            student_optimizer,
            student_terms(config),
            learner.clip or None,
            learning_rate(config.schedule, learner.learning_rate, config.steps, learner.updates),
        ),
        latent=side.latent,
        rng=rng,
        batch_size=config.batch_size,
        memory=memories[config.memory.kind](),
        stages=stages,
        statistics=bool(side.loss.batchnorm),
        student_in_search=learner.mode_in_search,
        generator_for_student=side.mode_for_student,
        autocast=functools.partial(torch.autocast, like.device.type, torch.bfloat16)
        if config.precision == "bf16"
        else contextlib.nullcontext,
    )
