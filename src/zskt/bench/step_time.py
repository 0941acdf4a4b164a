"""The time of a step on this machine: the engine against the released loop.

For a fair comparison the arms run interleaved, A B A B, in one process with the same threads and with denormals
flushed, after a warm-up; speed-ups are medians over the pairs. Peak memory is measured per arm in a process of its own.
The reference's operations are checked against an independent formula, so that a handicap would be noticed.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zskt.bench.reference import released_loop
from zskt.bench.roofline import explain
from zskt.errors import UsageError, ZsktError, unknown
from zskt.method.build import arrange, belief_matching
from zskt.method.config import Config
from zskt.method.generator import Generator
from zskt.method.matching import BeliefMatching
from zskt.method.recipe import load_recipe
from zskt.networks import models
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.networks.observe import forward_flops
from zskt.runtime import arithmetic, pick_device, seeded, synchronise
from zskt.settings import replace

Precision = Literal["fp32", "bf16"]
Arm = Literal["reference", "fp32", "bf16"]
Name = TypeVar("Name", bound=str)
ARMS: tuple[Arm, ...] = ("reference", "fp32", "bf16")
ENGINE: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Pair:
    """A teacher and a student to time, with their recipe and batch size."""

    teacher: str
    student: str
    input_size: tuple[int, int, int]
    recipe: str = "zskt"
    batch_size: int = 128


PAIRS = {
    "wrn": Pair("wrn-40-2", "wrn-16-1", (3, 32, 32)),
    "resnet": Pair("resnet-34", "resnet-18", (3, 32, 32), "zskt-mmrazor"),
    "lenet": Pair("lenet-5", "lenet-5-half", (1, 28, 28)),
    "digits": Pair("convnet-32", "convnet-8", (1, 8, 8)),
    "large": Pair("resnet-18", "resnet-18", (3, 224, 224), batch_size=8),
}


def engine(pair: Pair, precision: Precision, device: torch.device) -> BeliefMatching:
    """The engine's step for a teacher, student and generator with random weights."""
    config = replace(_config(pair), {"machine.precision": precision})
    with seeded(0):
        teacher, student, _ = networks(pair, device)
        arrange(teacher, config)
        arrange(student, config)
        return belief_matching(teacher, student, config)


def start(pair: Pair, arm: Arm, device: torch.device) -> Callable[[], Any]:
    """A function that takes one step of an arm, for networks with random weights."""
    if arm != "reference":
        return engine(pair, arm, device).step
    with seeded(0):
        return _reference(_config(pair), *networks(pair, device))


def _config(pair: Pair) -> Config:
    steps = 1_000_000  # far longer than any timing, so that the learning rate stays constant
    return replace(load_recipe(pair.recipe), {"steps": steps, "batch_size": pair.batch_size})


def networks(pair: Pair, device: torch.device) -> tuple[Classifier, nn.Module, torch.Generator]:
    """Teacher and student of a pair, with random weights, and a generator of random numbers."""
    module = models.build(pair.teacher, 10, pair.input_size)
    student = models.build(pair.student, 10, pair.input_size).to(device)
    channels = pair.input_size[0]
    teacher = Classifier(module, input_size=pair.input_size, mean=[0.5] * channels, std=[0.25] * channels)
    return as_teacher(teacher, copied=False).to(device), student, torch.Generator(device).manual_seed(0)


def _reference(config: Config, teacher: Classifier, student: nn.Module, rng: torch.Generator) -> Callable[[], Any]:
    settings, device = config.generator, rng.device
    assert isinstance(settings.width, int)
    generator = Generator(settings.latent, teacher.input_size, settings.width).to(device)
    teacher.module.requires_grad_(config.recipe == "zskt")  # as released; mmrazor freezes its teacher
    shape = (config.batch_size, settings.latent)
    loop: Iterator[Any] = released_loop(
        teacher.module,
        student,
        generator,
        lambda: torch.randn(shape, generator=rng, device=device),
        student.stages,  # type: ignore[arg-type]
        total=config.steps,
        method=config.recipe,
    )
    return lambda: next(loop)


def time_pair(
    pair: Pair, device: torch.device, *, rounds: int = 5, report: Callable[[int, int, str], None] = lambda *_: None
) -> dict[Arm, list[float]]:
    """Seconds of one step per arm, `rounds` times each, interleaved, after one untimed step each."""
    taken = in_turns({arm: start(pair, arm, device) for arm in ARMS}, device, rounds + 1, report)
    return {arm: seconds[1:] for arm, seconds in taken.items()}


def in_turns(
    arms: Mapping[Name, Callable[[], object]],
    device: torch.device,
    rounds: int,
    report: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[Name, list[float]]:
    """Seconds of each arm's calls, A B A B; the first of each, which allocates or compiles, is among them."""
    seconds: dict[Name, list[float]] = {arm: [] for arm in arms}
    with arithmetic():
        for _ in range(rounds):
            for arm, step in arms.items():
                synchronise(device)
                begun = time.perf_counter()
                step()
                synchronise(device)
                seconds[arm].append(time.perf_counter() - begun)
                report(sum(map(len, seconds.values())), rounds * len(arms), arm)
    return seconds


def check_operations(pair: Pair) -> int:
    """Operations per image of one reference step, counted as it runs; raises ZsktError unless a formula agrees.

    With t, s and g the forward operations per image of teacher, student and generator, a backward costs twice a
    forward. The generator update runs all three forward and backward; then the teacher runs once, and ten student
    updates run student and generator forward and backward. That is 4 t + 33 s + 33 g, less the gradients with respect
    to the latent, which autograd does not compute.
    """
    small = Pair(pair.teacher, pair.student, pair.input_size, "zskt", 2)
    step = start(small, "reference", torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step()
    counted = counter.get_total_flops() // small.batch_size
    size = pair.input_size
    generator = Generator(100, size)
    t, s = (forward_flops(models.build(spec, 10, size), size) for spec in (pair.teacher, pair.student))
    g = forward_flops(generator, (100,))
    expected = 4 * t + 33 * s + 33 * g - 11 * 2 * generator.linear.weight.numel()
    if abs(counted - expected) > 0.001 * expected:
        raise ZsktError(
            f"expected {expected:,} operations per image in a reference step, found {counted:,}; fix bench/reference.py"
        )
    return int(counted)


def peak_memory(name: str, arm: Arm, device: str) -> float:
    """MiB that two steps of an arm add to the memory before the first, in a process of its own."""
    code = f"from zskt.bench.step_time import print_peak_memory; print_peak_memory({name!r}, {arm!r}, {device!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ZsktError(f"the memory measurement of {arm} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(json.loads(done.stdout))


STATUS = Path("/proc/self/status")
"""Where Linux keeps a process's peak memory; elsewhere it is not measured."""


def print_peak_memory(name: str, arm: Arm, device_name: str) -> None:
    """The process of `peak_memory`: peak resident memory on a CPU, the allocator's maximum on CUDA."""
    device = pick_device(device_name)
    step = start(PAIRS[name], arm, device)
    before = _high_water(device)
    step()
    step()
    print(json.dumps((_high_water(device) - before) / 2**20))


def _high_water(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose maximum a child inherits from its parent.
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def describe(name: str) -> str:
    """A pair in words, for tables."""
    pair = PAIRS[name]
    size = " x ".join(map(str, pair.input_size))
    return f"{pair.teacher} -> {pair.student}, {size}, recipe {pair.recipe}, batch {pair.batch_size}"


def run(
    name: str = "wrn",
    device_name: str = "auto",
    *,
    rounds: int = 5,
    report: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time one pair and measure its memory; returns what `zskt bench` prints.

    `report` is called after every step with (steps done, total, arm). Speed-ups are medians over the interleaved pairs
    of timings, with their ranges.
    """
    device = _checked(name, device_name, rounds)
    operations = check_operations(PAIRS[name])
    seconds = time_pair(PAIRS[name], device, rounds=rounds, report=report)
    result: dict[str, Any] = {"pair": name, "device": str(device), "reference_flops_per_image": operations}
    for arm in ARMS[1:]:
        ratios = [a / b for a, b in zip(seconds["reference"], seconds[arm], strict=True)]
        result |= {f"speedup_{arm}": statistics.median(ratios), f"speedup_{arm}_range": [min(ratios), max(ratios)]}
    result |= {f"seconds_{arm}": statistics.median(values) for arm, values in seconds.items()}
    if device.type == "cuda" or STATUS.exists():
        result |= {f"peak_mib_{arm}": peak_memory(name, arm, device_name) for arm in ARMS}
    return result


def explain_pair(
    name: str = "wrn", device_name: str = "auto", *, steps: int = 5, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The result of `roofline.explain` for each precision."""
    device = _checked(name, device_name, steps)
    result: dict[str, Any] = {"pair": name, "device": str(device)}
    for precision in ENGINE:
        report(f"{precision}: counting operations, then timing the machine and {steps} steps")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        result[precision] = explain(engine(PAIRS[name], precision, device), device, dtype, steps=steps)
    return result


def _checked(name: str, device_name: str, rounds: int) -> torch.device:
    if name not in PAIRS:
        raise unknown("pair", name, PAIRS)
    if rounds < 1:
        raise UsageError(f"rounds = {rounds}: expected at least 1")
    return pick_device(device_name)
