"""How long a run takes, and how large one fits a time: a few of its updates are timed, once, before it starts.

T, S, G: operations of one forward of teacher, student and generator for one image.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zskt.errors import UsageError
from zskt.method.bank import BankDistillation
from zskt.method.build import arrange, make_generator
from zskt.method.config import Config
from zskt.method.generator import SAMPLES
from zskt.method.protocol import Make
from zskt.method.terms import ADVERSARIES
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.observe import evaluating, forward_flops
from zskt.runtime import arithmetic, pick_device, seeded, stream, synchronise, threads
from zskt.settings import replace

SYNTHESIS = 0.35
"""Share of a budget for making images; the rest is for the student."""
MOST_IMAGES = 51_200
"""Images that a budget makes at the most, as in published banks; more time then goes to the student."""
LEAST_UPDATES = 50
PROBED = 10
"""Generator updates of a probe."""
FLIPS = 0.6
"""Share of pseudo images that keep their class when flipped, from which on views are flipped too."""
BUDGETED = ("steps", "bank.rounds", "bank.warmup")
"""Settings that a budget chooses."""
SPARE = 0.95
"""Share of a budget that is planned: checkpoints and pictures take the rest."""
LOOKS = 21
"""Evaluations of a run, and one at its end."""


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run on this machine."""

    round: float = 0.0
    """one round of synthesis, with the teacher's logits for all views; method bank only"""
    step: float = 0.0
    """one student update of method bank, one whole step of any other"""
    flips: float = 0.0
    """share of pseudo images that keep their class when flipped left to right; method bank only"""
    asked: float = 0.0
    """the teacher's logits for all views of one image, a part of a round; method bank only"""
    look: float = 0.0
    """one evaluation without test images: both networks' outputs for pseudo images"""


def probe(teacher: Classifier, student: nn.Module, config: Config, make: Make) -> Cost:
    """Time a few updates of the run that `config` describes, on copies of its networks.

    With method bank they are a whole round, whose images also show what the teacher makes of flipped ones.
    """
    if config.bank.horizontal_flip == "auto":
        config = replace(config, {"bank.horizontal_flip": False})
    device = pick_device(config.machine.device)
    frozen, student = as_teacher(teacher).to(device), copy.deepcopy(student).to(device)
    arrange(frozen, config)
    arrange(student, config)

    def seconds(work: Callable[[], object], times: int) -> float:
        """Of the fastest of several times; the first, which allocates, does not count."""
        work()
        taken = []
        for _ in range(times):
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def look() -> None:
        x = method.sample(SAMPLES, 0)  # (64, C, H, W)
        with evaluating(student):
            frozen(x), student(x)

    with threads(config.machine.threads), arithmetic(), seeded(stream(config.seed, "budget"), device):
        method = make(frozen, student, config)
        try:
            if not isinstance(method, BankDistillation):
                return Cost(step=seconds(method.step, 3), look=seconds(look, 1))
            count = config.generator.updates
            update = seconds(method.synthesis.update, max(1, min(count, PROBED) - 1))
            images, synthesis = method.synthesis.images, method.synthesis
            if len(synthesis.warmup_loss) < len(synthesis.loss):  # after the warm-up the student is asked, too
                early = config.bank.warmup / config.bank.rounds
                synthesis.warmup = 0
                update = early * update + (1 - early) * seconds(synthesis.update, 3)
            asked = time.perf_counter()
            method.bank.add(images)
            asked = time.perf_counter() - asked
            step = seconds(lambda: method.student_step(method.bank.draw(config.batch_size)), 3)
            return Cost(
                count * update + asked, step, same_when_flipped(frozen, images), asked / len(images), seconds(look, 1)
            )
        finally:
            method.close()


@torch.no_grad()
def same_when_flipped(teacher: Classifier, images: Tensor) -> float:
    """The share of the images (N, C, H, W) that the teacher is sure of whose class stays when they are flipped."""
    confidence, classes = teacher(images).softmax(dim=1).max(dim=1)  # (N,) each
    same = teacher(images.flip(3)).argmax(dim=1) == classes
    sure = confidence >= confidence.median()
    return float(same[sure].double().mean())


def fit(config: Config, cost: Cost, seconds: float, own: int = 0) -> Config:
    """The config with as many steps, and rounds of synthesis, as `seconds` hold; raises UsageError if none do.

    Here and below, `own` images of the user's join those of the bank.
    """
    planned = SPARE * seconds - own * cost.asked - LOOKS * cost.look
    if config.method != "bank":
        steps = int(planned / cost.step)
        if steps < 1:
            needed = _at_least((cost.step + LOOKS * cost.look) / SPARE)
            raise UsageError(f"budget = {config.budget}: expected at least {needed}, for one step")
        return dataclasses.replace(config, steps=steps)
    least = 2 * cost.round + LEAST_UPDATES * cost.step
    if planned < least:
        needed = _at_least((least + own * cost.asked + LOOKS * cost.look) / SPARE)
        why = f"for two rounds of synthesis of {duration(cost.round)} and {LEAST_UPDATES} student updates"
        if not config.budget:
            raise UsageError(
                f"without a budget a run takes {duration(seconds)} at most, and this one at least {needed}, {why}; "
                "give a budget"
            )
        raise UsageError(f"budget = {config.budget}: expected at least {needed}, {why}")
    rounds = max(2, min(int(SYNTHESIS * planned / cost.round), math.ceil(MOST_IMAGES / config.bank.batch_size)))
    updates = max(LEAST_UPDATES, int((planned - rounds * cost.round) / cost.step))
    warmup = max(1, rounds // 5)
    bank = dataclasses.replace(config.bank, rounds=rounds, warmup=warmup)
    return dataclasses.replace(config, bank=bank, steps=warmup * config.generator.updates + updates)


def expected_seconds(config: Config, cost: Cost, own: int = 0) -> float:
    """How long the run of a config takes."""
    looks = (1 + -(-config.steps // config.interval("evaluate_every"))) * cost.look
    if config.method != "bank":
        return config.steps * cost.step + looks
    learnt = config.steps - config.bank.warmup * config.generator.updates
    return config.bank.rounds * cost.round + learnt * cost.step + own * cost.asked + looks


def operations(teacher: Classifier, student: nn.Module, config: Config, own: int = 0) -> float:
    """Floating-point operations of a run; a backward to inputs or to weights counts as much as a forward."""
    size = teacher.input_size
    t, s = forward_flops(teacher.module, size), forward_flops(student, size)
    side, learner, bank = config.generator, config.student, config.bank
    g = 0 if bank.pixels else forward_flops(make_generator(teacher, config), (side.latent,))
    asks = any(getattr(side.loss, name) for name in ADVERSARIES)  # the student, for a gradient to the images
    updated = 2 * t + 3 * g + (2 * s if asks else 0)  # one generator update, an image
    if config.method == "bank":
        made = bank.rounds * bank.batch_size
        early = bank.warmup * bank.batch_size * side.updates * 2 * s if asks else 0  # which the warm-up does not ask
        learnt = (config.steps - bank.warmup * side.updates) * config.batch_size
        asked = (made + own) * bank.views if bank.views else learnt
        return made * side.updates * updated - early + asked * t + learnt * 3 * s
    draws = 1 if config.replay.kind == "same" else learner.updates
    updated += 0 if asks else s  # whose outputs are there in any case
    each = side.updates * updated + draws * t + (draws if config.replay.kind == "fresh" else 1) * g
    return config.steps * config.batch_size * (each + learner.updates * 3 * s)


def disk(teacher: Classifier, student: nn.Module, config: Config, own: int = 0) -> int:
    """Bytes that a run leaves, roughly: two checkpoints with Adam's averages, the networks, a bank's images.

    Without log and pictures, which are a few MB.
    """
    bank = config.bank
    trained = count_parameters(student)
    if not bank.pixels:
        trained += count_parameters(make_generator(teacher, config))
    image = math.prod(teacher.input_size) + bank.views * (3 + 2 * teacher.num_classes)
    return 4 * trained * (1 + 2 * 3) + (bank.rounds * bank.batch_size + own) * image


def _at_least(seconds: float) -> str:
    """A duration that is not shorter than it reads."""
    unit = 1 if seconds < 90 else 60 if seconds < 5_400 else 360
    return duration(math.ceil(seconds / unit) * unit)


def duration(seconds: float) -> str:
    """As in `45 s`, `12 min`, `3.1 h`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"
