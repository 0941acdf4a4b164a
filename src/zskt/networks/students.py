"""The student that a user asks for: a SPEC of ours, a factory of the user's, or the teacher's family in small.

`auto:0.25` counts parameters: of all smaller relatives of the teacher, the one nearest to a quarter of them.
"""

import copy
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from zskt.errors import UsageError, ZsktError, first_line
from zskt.networks import models
from zskt.networks.checks import Logarithm
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.factories import call_factory, is_factory
from zskt.networks.rebuild import unallocated
from zskt.runtime import seeded

NEAR = 2.0
"""Factor by which the nearest relative may miss the size asked for."""

SUGGESTED = (
    *("convnet-8", "convnet-16", "convnet-32", "convnet-64", "lenet-5-half", "lenet-5"),
    *("wrn-10-1", "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "wrn-40-4"),
    *("resnet-18-16", "resnet-18-32", "resnet-18", "resnet-34", "vgg-11-16", "vgg-11-32", "vgg-11"),
)
"""Networks of ours of all sizes, to choose from where a family has no small ones."""

Ladder = list[tuple[str, Callable[[], nn.Module]]]
"""Networks by name, not built yet, the largest first."""


def make_student(
    spec: str, teacher: Classifier, arguments: Mapping[str, Any] | None = None, *, seed: int = 0
) -> nn.Module:
    """A freshly initialised student for a teacher's images and classes.

    `spec` is a SPEC of `zskt.models` (wrn-16-1), `package.module:factory` or `file.py:factory` (called with
    `arguments`, which runs that code), `timm:NAME` or `torchvision:NAME`, or `auto:FRACTION`: the teacher's own family
    at about that fraction of its parameters. `seed` decides the initialisation. Raises UsageError for an unknown name,
    ZsktError where nothing fits.
    """
    fraction = re.fullmatch(r"auto:(.*)", spec)
    if arguments and not is_factory(spec):
        raise UsageError(f"arguments are for a factory, and {spec!r} is none: leave them out")
    with seeded(seed):
        if fraction:
            return _relative(teacher, _fraction(fraction[1]))
        if library := re.fullmatch(r"(timm|torchvision):([\w.\-/]+)", spec):
            return _from_library(teacher, library[1], library[2])
        if is_factory(spec):
            return call_factory(spec, arguments)
        return models.build(spec, teacher.num_classes, teacher.input_size)


def describe_student(student: nn.Module, teacher: Classifier) -> str:
    """Name, size and true fraction of the teacher's parameters, as `wrn-16-1: 175,066 parameters, 0.078 of ...`."""
    ours, theirs = count_parameters(student), count_parameters(teacher.module)
    name = getattr(student, "spec", None)
    share = f", {ours / theirs:.3f} of the teacher's {theirs:,}" if theirs else ""
    return f"{name if isinstance(name, str) else type(student).__name__}: {ours:,} parameters{share}"


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UsageError(f"auto:{text}: expected a fraction of the teacher's parameters below 1, as in auto:0.25")
    return fraction


def _relative(teacher: Classifier, fraction: float) -> nn.Module:
    """The member of the teacher's family whose parameter count is nearest to this fraction of the teacher's."""
    module = _bare(teacher)
    target = fraction * count_parameters(module)
    if not target:
        raise ZsktError(
            f"auto:{fraction:g} counts parameters, and the teacher has none; name a student, as in wrn-16-1"
        )
    sizes: dict[str, int] = {}
    builders: dict[str, Callable[[], nn.Module]] = {}
    for ladder in _family(teacher, fraction):
        sizes |= _around(ladder, target)
        builders |= ladder
    asked = f"auto:{fraction:g} asks for about {target:,.0f} parameters"
    if not sizes:
        raise ZsktError(
            f"{asked}, and nothing is known of smaller relatives of {type(module).__name__}; "
            f"{_suggestions(teacher, target)}"
        )
    nearest = min(sizes, key=lambda name: abs(math.log(sizes[name] / target)))
    if abs(math.log(sizes[nearest] / target)) > math.log(NEAR):
        raise ZsktError(
            f"{asked}, and the nearest relative of {type(module).__name__}, {nearest}, has {sizes[nearest]:,}; "
            f"{_suggestions(teacher, target)}"
        )
    return builders[nearest]()


def _around(ladder: Ladder, target: float) -> dict[str, int]:
    """Parameter counts of the networks next to `target` on a ladder, and of some more, found by bisection."""
    sizes: dict[str, int] = {}
    while ladder:
        middle = len(ladder) // 2
        name, builder = ladder[middle]
        try:
            with unallocated():
                sizes[name] = count_parameters(builder())
        except Exception:  # a relative that does not fit the images, or a width that its layers do not take
            ladder = ladder[:middle] + ladder[middle + 1 :]
        else:
            ladder = ladder[middle + 1 :] if sizes[name] > target else ladder[:middle]
    return sizes


def _bare(teacher: Classifier) -> nn.Module:
    """The network itself, where it is read through its probabilities' logarithms."""
    return teacher.module.network if isinstance(teacher.module, Logarithm) else teacher.module


def _suggestions(teacher: Classifier, target: float) -> str:
    """Networks of ours for the teacher's images, of about so many parameters."""
    sizes: dict[str, int] = {}
    for spec in SUGGESTED:
        try:
            with unallocated():
                sizes[spec] = count_parameters(models.build(spec, teacher.num_classes, teacher.input_size))
        except UsageError:  # the images are too small for it
            continue
    nearest = sorted(sizes, key=lambda spec: abs(math.log(sizes[spec] / target)))[:3]
    named = ", ".join(f"{spec} ({sizes[spec]:,})" for spec in nearest)
    return f"choose one yourself, of ours perhaps {named}"


def _family(teacher: Classifier, fraction: float) -> Iterator[Ladder]:
    """The teacher's relatives, itself excluded."""
    module = _bare(teacher)
    transformers = sys.modules.get("transformers")
    library = type(module).__module__.partition(".")[0]
    if type(module).__module__.startswith(f"{models.__name__}."):
        yield from _ours(teacher, str(getattr(module, "spec", "")))
    elif transformers is not None and isinstance(module, transformers.PreTrainedModel):
        yield from _scaled(module, fraction)
    elif library in ("torchvision", "timm"):
        yield from _listed(teacher, library, type(module).__module__)


def _ours(teacher: Classifier, spec: str) -> Iterator[Ladder]:
    """Narrower and shallower networks of ours."""
    ladders: list[list[str]] = []
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", spec):
        depth, width = int(match[1]), int(match[2])
        ladders = [[f"wrn-{d}-{w}" for w in _widths(width)] for d in range(depth, 9, -6)]
    elif match := re.fullmatch(r"resnet-(18|34)(?:-(\d+))?", spec):
        depths = [depth for depth in (34, 18) if depth <= int(match[1])]
        ladders = [[f"resnet-{d}-{w}" for w in _widths(int(match[2] or 64))] for d in depths]
    elif match := re.fullmatch(r"(vgg-11|convnet)(?:-(\d+))?", spec):
        ladders = [[f"{match[1]}-{w}" for w in _widths(int(match[2] or 64))]]
    elif spec == "lenet-5":
        ladders = [["lenet-5-half"]]
    for ladder in ladders:
        yield [
            (relative, functools.partial(models.build, relative, teacher.num_classes, teacher.input_size))
            for relative in ladder
            if relative not in (spec, f"{spec}-{models.WIDTH}")
        ]


def _widths(most: int) -> list[int]:
    """Up to 64 widths, the widest first."""
    return sorted({max(1, round(most * i / 64)) for i in range(1, 65)}, reverse=True)


def _scaled(module: Any, fraction: float) -> Iterator[Ladder]:
    """A network of transformers with all widths of its config scaled alike, by factors about the right one."""
    ladder: Ladder = []
    kind: Callable[[Any], nn.Module] = type(module)
    seen = {module.config.to_json_string()}
    for i in range(32):
        scale = min(1.0, math.sqrt(fraction) * 2 ** ((16 - i) / 8))  # parameters grow with the square of the width
        config = scaled_config(module.config, scale)
        if config is not None and (text := config.to_json_string()) not in seen:
            seen.add(text)
            widths = getattr(config, "hidden_sizes", None) or getattr(config, "hidden_size", None)
            ladder.append((f"{type(module).__name__} with widths {widths}", functools.partial(kind, config)))
    yield ladder


def scaled_config(config: Any, scale: float) -> Any:
    """A copy of a transformers config with its widths times `scale`, or None where it has none of the known names.

    Widths are rounded to multiples of 8 (of 4 below 16), which also suits grouped and bottleneck layers; a single
    width over attention heads keeps as many of them as divide it.
    """
    scaled = copy.deepcopy(config)
    scaled._name_or_path = ""
    found = False
    for name in ("hidden_sizes", "hidden_size", "embedding_size", "intermediate_size"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(scaled, name, _rounded(value * scale, value))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(width, int) for width in value):
            setattr(scaled, name, [_rounded(width * scale, width) for width in value])
        else:
            continue
        found = found or name.startswith("hidden")
    heads, width = getattr(config, "num_attention_heads", None), getattr(scaled, "hidden_size", None)
    if isinstance(heads, int) and isinstance(width, int):
        scaled.num_attention_heads = max(h for h in range(1, heads + 1) if width % h == 0)
        if getattr(config, "pooler_output_size", None) == config.hidden_size:
            scaled.pooler_output_size = width
    return scaled if found else None


def _rounded(width: float, most: int) -> int:
    step = 8 if width >= 16 else 4
    return min(most, max(step, step * round(width / step)))


def _listed(teacher: Classifier, library: str, home: str) -> Iterator[Ladder]:
    """All networks that torchvision or timm list beside the teacher's own, in the file `home`."""
    shelf = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    for name in shelf.list_models(module=home.rpartition(".")[2] if library == "timm" else sys.modules[home]):
        yield [(name, functools.partial(_from_library, teacher, library, name))]


def _from_library(teacher: Classifier, library: str, name: str) -> nn.Module:
    """A freshly initialised network of timm or torchvision for the teacher's classes."""
    home = "timm" if library == "timm" else "torchvision.models"
    try:
        importlib.import_module(home)
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ZsktError(
            f"{library}:{name} needs {library}, which cannot be imported ({first_line(error)}): "
            "pip install 'zskt[vision]'"
        ) from error
    arguments: dict[str, Any] = {"num_classes": teacher.num_classes}
    if library == "timm":
        made = {"model_name": name, "pretrained": False, "in_chans": teacher.input_size[0]}
        return call_factory("timm:create_model", made | arguments)
    return call_factory("torchvision.models:get_model", {"name": name} | arguments)
