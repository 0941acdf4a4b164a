"""Recipes, as differences from the defaults, and every choice made before a run starts."""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zskt.errors import UsageError, ZsktError, unknown
from zskt.method.budget import FLIPS, Cost, expected_seconds, fit, probe
from zskt.method.build import METHODS
from zskt.method.config import MOST_CROP, Config
from zskt.method.generator import choose_width
from zskt.method.memory import check_memory
from zskt.method.protocol import Make
from zskt.method.stage_pairs import stage_pairs
from zskt.networks import ranks
from zskt.networks.checks import check_pair
from zskt.networks.classifier import Classifier
from zskt.networks.observe import forward_flops, memory_format
from zskt.runtime import parse_limit, pick_device
from zskt.settings import flat, from_toml, replace

AUTO = "auto"
OURS = ("bank", "bank-adversary")
"""Recipes without a published length: their size follows from a time, or from the number of steps."""
LARGE = 64 * 64
"""Pixels of an image beyond which batches shrink."""
UNASKED = 1_800  # seconds that a run without steps or budget takes at the most
BF16_COMPARED = ("zskt-prior", "zskt")
"""Recipes that lost less than a standard deviation over three seeds in bf16 (benchmarks/precision.py)."""


def recipe_texts() -> dict[str, str]:
    """The packaged recipes: name -> TOML text, whose first line is a summary."""
    files = resources.files("zskt.method").joinpath("recipes").iterdir()
    texts = {file.name.removesuffix(".toml"): file.read_text() for file in files if file.name.endswith(".toml")}
    return dict(sorted(texts.items()))


def load_recipe(name: str, settings: Mapping[str, Any] | None = None) -> Config:
    """A recipe by name, with values changed by dotted name; raises UsageError with close matches."""
    texts = recipe_texts()
    if name.endswith(".toml"):
        raise UsageError(f"{name} is a file of settings: give it with --config")
    if name not in texts:
        raise unknown("recipe", name, [AUTO, *texts])
    _check_settings(settings or {})
    return replace(from_toml(Config, texts[name], f"recipe {name}"), settings or {})


@dataclass(frozen=True)
class Plan:
    """A run with every choice made."""

    config: Config
    reason: str
    """why this recipe was chosen"""
    make: Make
    """builds the method"""
    cost: Cost | None = None
    """what its parts take on this machine, where a choice needed a probe"""


def plan(
    teacher: Classifier,
    student: nn.Module,
    recipe: str | Config = AUTO,
    settings: Mapping[str, Any] | None = None,
    method: Make | None = None,
    begun: Config | None = None,
    own: int = 0,
) -> Plan:
    """Check the pair and settle every choice of a run.

    `settings` changes values by dotted name. A custom `method` uses what it needs of the config. `begun` is the config
    of the run that is to be resumed, whose sizes are kept. `own` images of the user's join those of a bank.
    """
    if not isinstance(teacher, Classifier):
        raise UsageError(
            f"expected a zskt.Classifier, found {type(teacher).__name__}: wrap it, as in zskt.Classifier(module, "
            "input_size=(3, 32, 32), mean=..., std=...)"
        )
    settings = dict(settings or {})
    _check_settings(settings)
    check_pair(teacher, student)
    if method is not None:
        config, reason = _own(method, recipe, settings), "a custom method"
    else:
        config, reason = (recipe, "as given") if isinstance(recipe, Config) else choose(recipe, teacher)
        if config.method not in METHODS:
            raise custom_method(config.method)
    sizes = {} if isinstance(recipe, Config) else _batches(config, teacher)
    settings = _rounds(config, settings) | sizes | settings
    config = settle_precision(replace(config, settings), teacher)
    config, unable = settle_layout(config, teacher, student)
    if unable:
        problem = f"the {unable} cannot run in channels_last (perhaps it reshapes by view)"
        if settings.get("machine.memory_format") == "channels_last":
            raise ZsktError(f"{problem}; leave machine.memory_format out or set it to contiguous")
        reason += f"; in contiguous memory, as {problem}"
    if method is None or isinstance(recipe, Config):
        config = settle_sizes(settle_stages(config, teacher, student), teacher, student)
    make = method or METHODS[config.method]
    cost = None
    if method is None:
        check_memory(teacher, student, config, own)
        config, cost = settle_by_probe(config, teacher, student, make, begun, "steps" in settings, own)
    return Plan(config, reason, make, cost)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UsageError for what no setting changes."""
    if named := [name for name in ("recipe", "method", "format") if name in settings]:
        raise UsageError(
            f"{named[0]} is not among the settings that can be changed: give the argument recipe or method"
        )


def _rounds(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds of synthesis in proportion to the steps asked for, in a recipe without a published length.

    A trial of a few steps has shorter rounds too.
    """
    steps = settings.get("steps")
    named = {"bank.rounds", "bank.warmup"} & settings.keys()
    if config.recipe not in OURS or named or not isinstance(steps, int) or steps < 1:
        return {}
    scale = steps / config.steps
    warmup = max(1, round(scale * config.bank.warmup))
    rounds = max(warmup + 1, round(scale * config.bank.rounds))
    updates = min(config.generator.updates, max(1, steps // 2))
    return {"bank.warmup": warmup, "bank.rounds": rounds, "generator.updates": updates}


def _batches(config: Config, teacher: Classifier) -> dict[str, Any]:
    """Smaller batches for large images, in a recipe without a published length, as memory grows with their pixels."""
    share = LARGE / math.prod(teacher.input_size[1:])
    if config.recipe not in OURS or share >= 1:
        return {}
    sizes = {"batch_size": config.batch_size, "bank.batch_size": config.bank.batch_size}
    return {name: max(8, round(share * size)) for name, size in sizes.items()}


def _own(method: Make, recipe: str | Config, settings: Mapping[str, Any]) -> Config:
    """The config that a custom method starts from."""
    if isinstance(recipe, Config):
        return dataclasses.replace(recipe, method=describe_method(method))
    if recipe != AUTO:
        raise UsageError(f"recipe {recipe!r} has its own method: give a recipe or a method, not both")
    if "steps" not in settings:
        raise UsageError("a custom method has no default number of steps: give steps")
    return Config(recipe="own", method=describe_method(method))


def custom_method(name: str) -> UsageError:
    """The error for a custom method that was not given."""
    return UsageError(f"this run uses a custom method, {name}: give it, as in --method FILE:FUNCTION")


def describe_method(method: Make) -> str:
    """A custom method's file, function and arguments of a partial, by which a resumed run recognises it."""
    inner, arguments = method, ""
    if isinstance(method, functools.partial):
        inner = method.func
        given = [*map(repr, method.args), *(f"{name}={value!r}" for name, value in method.keywords.items())]
        arguments = re.sub(r" at 0x[0-9a-f]+", "", f"({', '.join(given)})")  # addresses differ from run to run
    function: Any = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    return f"{Path(inspect.getfile(function)).name}:{function.__qualname__}{arguments}"


def choose(name: str, teacher: Classifier) -> tuple[Config, str]:
    """The config of a recipe and why it was chosen; `auto` depends on the teacher."""
    if name != AUTO:
        return load_recipe(name), "as requested"
    if teacher.has_batchnorm:
        return load_recipe("bank"), "auto: the teacher has BatchNorm, whose statistics guide the images of a bank"
    return load_recipe(
        "bank-adversary"
    ), "auto: without BatchNorm in the teacher, an adversary guides the images of a bank"


def recipe_for(teacher: Classifier, name: str, settings: Mapping[str, Any]) -> Config:
    """A recipe's config for a teacher with changes by dotted name, before anything is timed or settled."""
    _check_settings(settings)
    config, _ = choose(name, teacher)
    return replace(config, _rounds(config, settings) | _batches(config, teacher) | dict(settings))


def settle_sizes(config: Config, teacher: Classifier, student: nn.Module) -> Config:
    """The config with `auto` width and crops resolved."""
    if config.method == "bank" and config.bank.random_crop == "auto":
        config = replace(config, {"bank.random_crop": min(MOST_CROP, min(teacher.input_size[1:]) // 8)})
    if config.generator.width != "auto":
        return config
    size = teacher.input_size
    budget = forward_flops(teacher.module, size) + forward_flops(student, size)
    width = choose_width(config.generator.latent, size, budget)
    return replace(config, {"generator.width": width})


def settle_by_probe(
    config: Config,
    teacher: Classifier,
    student: nn.Module,
    make: Make,
    begun: Config | None,
    steps_given: bool,
    own: int = 0,
) -> tuple[Config, Cost | None]:
    """The config with flips, and sizes that fit its budget, as a short probe shows, or as in the run that is resumed.

    Without steps or budget, recipe bank stays within UNASKED seconds; all others keep their published steps.
    """
    sized = not steps_given and (config.budget or config.recipe in OURS)
    flips = config.bank.horizontal_flip == "auto"
    if not sized and not flips:
        return config, None
    if begun is not None and begun.budget == config.budget and begun.method == config.method:
        kept = ("bank.horizontal_flip", *(("steps", "bank.rounds", "bank.warmup") if sized else ()))
        return replace(config, {name: flat(begun)[name] for name in kept}), None
    # As one process; rank 0 measures for all, as sizes have to be the same.
    found = Cost(**ranks.from_main(lambda: dataclasses.asdict(probe(teacher, student, config, make))))
    if flips:
        config = replace(config, {"bank.horizontal_flip": found.flips >= FLIPS})
    if sized and config.budget:
        config = fit(config, found, parse_limit(config.budget)[0], own)
    elif sized and expected_seconds(config, found, own) > UNASKED:
        config = fit(config, found, UNASKED, own)
    return config, found


def settle_precision(config: Config, teacher: Classifier) -> Config:
    """The config with `auto` precision resolved: bf16 on a CPU that supports it, for BF16_COMPARED recipes."""
    if config.machine.precision != "auto":
        return config
    like = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
    fast = pick_device(config.machine.device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    known = config.recipe in BF16_COMPARED and like == torch.float32
    return replace(config, {"machine.precision": "bf16" if fast and known else "fp32"})


def settle_stages(config: Config, teacher: Classifier, student: nn.Module) -> Config:
    """The config with the names of the stages that attention transfer compares; raises ZsktError if none pair up."""
    loss = config.student.loss
    if not loss.attention:
        return config
    pairs = tuple("=".join(pair) for pair in zip(*stage_pairs(teacher, student, loss.stages), strict=True))
    return replace(config, {"student.loss.stages": pairs})


def settle_layout(config: Config, teacher: Classifier, student: nn.Module) -> tuple[Config, str]:
    """The config with a memory format that both networks accept, and the names of those that force contiguous.

    Images pass from network to network, so that one which reshapes maps by `view` decides for all.
    """
    if config.machine.memory_format == "contiguous":
        return config, ""
    networks = {"teacher": teacher.module, "student": student}
    formats = {name: memory_format(module, teacher.input_size) for name, module in networks.items()}
    unable = [name for name, format in formats.items() if format == torch.contiguous_format]
    if not unable:
        return config, ""
    return replace(config, {"machine.memory_format": "contiguous"}), " and ".join(unable)
