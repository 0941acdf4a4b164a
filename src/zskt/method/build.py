"""Builds the methods that recipes name from a config."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

from zskt.errors import ZsktError
from zskt.method.config import Config
from zskt.method.generator import Generator
from zskt.method.matching import BeliefMatching
from zskt.method.protocol import Make
from zskt.method.replay import Fresh, Replay, ReplayBuffer, Same
from zskt.method.schedule import learning_rate
from zskt.method.stage_pairs import stage_pairs
from zskt.method.terms import generator_terms, student_terms
from zskt.method.updates import Updates
from zskt.networks.classifier import Classifier
from zskt.networks.observe import find_stages
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
    if side.loss.batchnorm and not teacher.has_batchnorm:
        raise ZsktError(
            f"recipe {config.recipe} needs the BatchNorm statistics of the teacher, and this one has no BatchNorm; use "
            "--recipe zskt-fresh or --set generator.loss.batchnorm=0"
        )
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
    assert isinstance(side.width, int), "settle_width first"
    assert config.machine.precision != "auto", "settle_precision first"
    generator = Generator(side.latent, teacher.input_size, side.width).to(like.device, like.dtype)
    arrange(generator, config)

    def draws(purpose: str) -> torch.Generator:
        return torch.Generator(like.device).manual_seed(stream(config.seed, purpose))

    replays: dict[str, Callable[[], Replay]] = {
        "same": Same,
        "fresh": Fresh,
        "buffer": lambda: ReplayBuffer(config.replay.capacity, draws("bank")),
    }

    generator_parameters = list(generator.parameters())
    student_parameters = [p for p in student.parameters() if p.requires_grad]
    student_optimizer: torch.optim.Optimizer
    fused = config.machine.fused
    if learner.optimizer == "adam":
        student_optimizer = torch.optim.Adam(student_parameters, weight_decay=learner.weight_decay, fused=fused)
    else:
        student_optimizer = torch.optim.SGD(
            student_parameters, momentum=learner.momentum, weight_decay=learner.weight_decay, fused=fused
        )
    return BeliefMatching(
        teacher,
        student,
        generator,
        Updates(
            side.updates,
            torch.optim.Adam(generator_parameters, fused=fused),
            generator_terms(side.loss),
            side.clip or None,
            learning_rate(config.schedule, side.learning_rate, config.steps, side.updates),
        ),
        Updates(
            learner.updates,
            student_optimizer,
            student_terms(learner.loss),
            learner.clip or None,
            learning_rate(config.schedule, learner.learning_rate, config.steps, learner.updates),
        ),
        latent=side.latent,
        rng=draws("latents"),
        steps=config.steps,
        batch_size=config.batch_size,
        replay=replays[config.replay.kind](),
        stages=stages,
        statistics=bool(side.loss.batchnorm),
        student_for_generator=learner.mode_for_generator,
        generator_for_student=side.mode_for_student,
        autocast=functools.partial(torch.autocast, like.device.type, torch.bfloat16)
        if config.machine.precision == "bf16"
        else contextlib.nullcontext,
    )


METHODS: dict[str, Make] = {"belief_matching": belief_matching}
"""By their name in recipes."""
