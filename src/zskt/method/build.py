"""Builds the methods that recipes name from a config."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.method.bank import Bank, BankDistillation
from zskt.method.config import Config
from zskt.method.generator import FreePixels, Generator, Pixels
from zskt.method.matching import BeliefMatching
from zskt.method.protocol import Make
from zskt.method.replay import Fresh, Replay, ReplayBuffer, Same
from zskt.method.schedule import learning_rate
from zskt.method.stage_pairs import stage_pairs
from zskt.method.synthesis import MetaGenerator, Synthesis
from zskt.method.terms import generator_terms, student_terms
from zskt.method.updates import Updates
from zskt.method.views import Augmentation
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observation, Observer, find_stages
from zskt.networks.synchronised import synchronise
from zskt.runtime import stream


def arrange(module: nn.Module, config: Config) -> None:
    """Convert a network's weights, in place, to the config's memory format; images follow the first convolution."""
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    module.to(memory_format=formats[config.machine.memory_format])  # type: ignore[call-overload]


def belief_matching(teacher: Classifier, student: nn.Module, config: Config) -> BeliefMatching:
    """Belief matching as `config` describes it, for a teacher and a student on one device.

    The generator is initialised from torch's global random numbers; latents and replay buffer use separate streams.
    Raises ZsktError if teacher, student and config do not fit together.
    """
    side, learner = config.generator, config.student
    _check_batchnorm(teacher, config)
    stages: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if learner.loss.attention:
        stages = stage_pairs(teacher, student, learner.loss.stages)
    if side.loss.activation:
        last = find_stages(teacher.module, teacher.input_size)[-1:]
        if not last:
            raise ZsktError("expected a stage in the teacher, found none; use --set generator.loss.activation=0")
        if stages[0][-1:] != last:  # not compared, or not the last
            stages = (stages[0] + last, stages[1])
    like = next(p for p in student.parameters() if p.requires_grad)
    generator = make_generator(teacher, config).to(like.device, like.dtype)
    arrange(generator, config)
    synchronise(generator, "generator")
    replays: dict[str, Callable[[], Replay]] = {
        "same": Same,
        "fresh": Fresh,
        "buffer": lambda: ReplayBuffer(config.replay.capacity, _draws(config, "bank", like.device)),
    }

    return BeliefMatching(
        teacher,
        student,
        generator,
        Updates(
            side.updates,
            torch.optim.Adam(generator.parameters(), betas=(side.beta1, 0.999), fused=config.machine.fused),
            generator_terms(side.loss),
            side.clip or None,
            learning_rate(config.schedule, side.learning_rate, config.steps, side.updates),
        ),
        _student_updates(student, config, config.steps),
        latent=side.latent,
        rng=_draws(config, "latents", like.device),
        steps=config.steps,
        batch_size=config.batch_size,
        replay=replays[config.replay.kind](),
        stages=stages,
        statistics=bool(side.loss.batchnorm),
        student_for_generator=learner.mode_for_generator,
        generator_for_student=side.mode_for_student,
        autocast=_autocast(config, like.device),
    )


def bank(teacher: Classifier, student: nn.Module, config: Config) -> BankDistillation:
    """Distillation from a bank as `config` describes it, for a teacher and a student on one device.

    Raises ZsktError if teacher, student and config do not fit together.
    """
    side, box = config.generator, config.bank
    _check_batchnorm(teacher, config)
    like = next(p for p in student.parameters() if p.requires_grad)
    assert isinstance(box.random_crop, int), "settle_sizes first"
    assert isinstance(box.horizontal_flip, bool), "settle_by_probe first"
    augmentation = Augmentation(box.random_crop, box.horizontal_flip)
    generator: nn.Module = FreePixels(teacher.mean, teacher.std) if box.pixels else make_generator(teacher, config)
    generator.to(like.device, like.dtype)
    arrange(generator, config)
    synchronise(generator, "generator")
    shape = teacher.input_size if box.pixels else (side.latent,)
    latents = torch.empty(box.batch_size, *shape, device=like.device, dtype=like.dtype, requires_grad=True)
    adam = functools.partial(torch.optim.Adam, betas=(side.beta1, 0.999), fused=config.machine.fused)
    groups: list[dict[str, Any]] = [{"params": [latents], "lr": box.latent_learning_rate}]
    if parameters := list(generator.parameters()):
        groups.append({"params": parameters, "lr": side.learning_rate})
    meta = None
    if box.survives == "meta":
        meta = MetaGenerator(generator, functools.partial(adam, lr=side.updates * side.learning_rate))
    reset = {
        "nothing": [],
        "generator": [generator],
        "first_layer": [generator.linear, generator.bn] if isinstance(generator, Generator) else [],
    }
    ask_teacher, ask_student = Observer(teacher.module, statistics=bool(side.loss.batchnorm)), Observer(student)
    autocast = _autocast(config, like.device)

    def ask(images: Tensor) -> Observation:
        with autocast():
            return ask_teacher(images)

    rounds = Synthesis(
        generator,
        latents,
        Updates(side.updates, adam(groups), generator_terms(side.loss), side.clip or None),
        size=teacher.input_size,
        classes=teacher.num_classes,
        ask_teacher=ask_teacher,
        ask_student=ask_student,
        rng=_draws(config, "latents", like.device),
        augmentation=augmentation,
        warmup=box.warmup * side.updates,
        momentum=box.momentum,
        meta=meta,
        reset=reset[box.reset],
        reset_every=box.reset_every,
        autocast=autocast,
    )
    images = Bank(
        teacher,
        ask,
        box.rounds * box.batch_size,
        views=box.views,
        augmentation=augmentation,
        rng=_draws(config, "bank", like.device),
    )
    updates = config.steps - box.warmup * side.updates
    return BankDistillation(
        student,
        rounds,
        images,
        _student_updates(student, config, updates),
        ask_student=ask_student,
        steps=config.steps,
        batch_size=config.batch_size,
        rounds=box.rounds,
        warmup=box.warmup,
        until=box.until,
        autocast=autocast,
    )


def _check_batchnorm(teacher: Classifier, config: Config) -> None:
    if config.generator.loss.batchnorm and not teacher.has_batchnorm:
        raise ZsktError(
            f"recipe {config.recipe} needs the BatchNorm statistics of the teacher, and this one has no BatchNorm; use "
            "--recipe bank-adversary or --set generator.loss.batchnorm=0"
        )


def make_generator(network: Classifier, config: Config) -> Generator:
    """The generator of a config for a network's images; its width is settled."""
    side = config.generator
    assert isinstance(side.width, int), "settle_sizes first"
    output = Pixels(network.mean, network.std) if side.output == "pixels" else None
    return Generator(side.latent, network.input_size, side.width, output)


def _draws(config: Config, purpose: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(stream(config.seed, purpose))


def _autocast(config: Config, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    assert config.machine.precision != "auto", "settle_precision first"
    if config.machine.precision == "bf16":
        return functools.partial(torch.autocast, device.type, torch.bfloat16)
    return contextlib.nullcontext


def _student_updates(student: nn.Module, config: Config, steps: int) -> Updates:
    """The student's updates, with the schedule over `steps`."""
    learner, fused = config.student, config.machine.fused
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if learner.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, weight_decay=learner.weight_decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(
            parameters,
            momentum=learner.momentum,
            nesterov=learner.nesterov,
            weight_decay=learner.weight_decay,
            fused=fused,
        )
    rate = learning_rate(config.schedule, learner.learning_rate, steps, learner.updates)
    return Updates(learner.updates, optimizer, student_terms(learner.loss), learner.clip or None, rate)


METHODS: dict[str, Make] = {"belief_matching": belief_matching, "bank": bank}
"""By their name in recipes."""
