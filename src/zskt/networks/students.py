"""Students by specifier: a network of ours, a user's factory, or a smaller network of the teacher's family.

`auto:0.25` is the smaller relative of the teacher whose parameter count is nearest to a quarter of the teacher's;
`pruned:0.25` is one of the teacher's depth that begins as the teacher without its weakest channels.
"""

import copy
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError, failing
from zskt.files import expanded
from zskt.networks import models
from zskt.networks.checks import bare
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.factories import call_factory, is_factory
from zskt.networks.folder import load_student
from zskt.networks.pruning import can_prune, keep_strongest
from zskt.networks.rebuild import unallocated
from zskt.runtime import seeded

NEAR = 2.0  # largest factor between the requested size and that of the nearest relative

SUGGESTED = (
    *("convnet-8", "convnet-16", "convnet-32", "convnet-64", "lenet-5-half", "lenet-5"),
    *("wrn-10-1", "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "wrn-40-4"),
    *("resnet-18-16", "resnet-18-32", "resnet-18", "resnet-34", "vgg-11-16", "vgg-11-32", "vgg-11"),
)
"""Networks of ours of many sizes, suggested where `auto` finds no relative."""

Ladder = list[tuple[str, Callable[[], nn.Module]]]  # names and builders of networks, the largest first


def make_student(
    spec: str, teacher: Classifier, arguments: Mapping[str, Any] | None = None, *, seed: int = 0
) -> nn.Module:
    """A student with random weights for a teacher's images and classes.

    `spec` is a specifier of `zskt.models` (wrn-16-1), `package.module:factory` or `file.py:factory` (whose code runs,
    with `arguments`), `timm:NAME` or `torchvision:NAME`, or `auto:FRACTION` for the teacher's family at about that
    fraction of its parameters; `seed` determines the initialisation. `pruned:FRACTION` has no random weights: it is the
    teacher without its weakest channels. A run folder gives its trained student, to go on from. Raises UsageError for
    an unknown name, ZsktError if nothing fits.
    """
    relative = re.fullmatch(r"(auto|pruned):(.*)", spec)
    if arguments and not is_factory(spec):
        raise UsageError(f"arguments are for factories, and {spec!r} is not one; omit them")
    folder = expanded(spec)
    if (folder / "student.json").is_file():
        return _trained(folder, teacher)
    if (folder / "checkpoint").is_dir():
        raise ZsktError(f"expected a finished run, found one that was stopped in {folder}; resume it first")
    with seeded(seed):
        if relative:
            return _relative(teacher, relative[1], _fraction(relative[1], relative[2]))
        if library := re.fullmatch(r"(timm|torchvision):([\w.\-/]+)", spec):
            return _from_library(teacher, library[1], library[2])
        if is_factory(spec):
            return call_factory(spec, arguments)
        return models.build(spec, teacher.num_classes, teacher.input_size)


def _trained(folder: Path, teacher: Classifier) -> nn.Module:
    """The student of a run, which must take images as the teacher does."""
    found = load_student(folder)
    for what, ours, theirs in (
        ("images of size", teacher.input_size, found.input_size),
        ("the pixel mean", _numbers(teacher.mean), _numbers(found.mean)),
        ("the pixel std", _numbers(teacher.std), _numbers(found.std)),
    ):
        if ours != theirs:
            raise ZsktError(
                f"expected a student for {what} {ours}, as the teacher's, found {theirs} in {folder}; begin with a new "
                "student or one that was distilled from this teacher"
            )
    return found.module.requires_grad_()


def _numbers(pixels: Tensor) -> list[float]:
    return [round(value, 6) for value in pixels.flatten().tolist()]


def describe_student(student: nn.Module, teacher: Classifier) -> str:
    """Name, size and exact fraction of the teacher's size, as in `wrn-16-1: 175,066 parameters, 0.078 of ...`."""
    ours, theirs = count_parameters(student), count_parameters(teacher.module)
    name = getattr(student, "spec", None)
    share = f", {ours / theirs:.3f} of the teacher's {theirs:,}" if theirs else ""
    return f"{name if isinstance(name, str) else type(student).__name__}: {ours:,} parameters{share}"


def _fraction(kind: str, text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1 and (kind, fraction) != ("pruned", 1):
        raise UsageError(f"{kind}:{text}: expected a fraction of the teacher's parameters below 1, as in {kind}:0.25")
    return fraction


def _relative(teacher: Classifier, kind: str, fraction: float) -> nn.Module:
    """The network of the teacher's family whose parameter count is nearest to this fraction of the teacher's.

    Of kind "pruned" it is one of the teacher's layers, which begins with the teacher's weights.
    """
    module = bare(teacher.module)
    target = fraction * count_parameters(module)
    if not target:
        raise ZsktError(
            f"{kind}:{fraction:g} counts parameters, but the teacher has none; choose a student, such as wrn-16-1"
        )
    if kind == "pruned" and not can_prune(teacher):
        raise ZsktError(
            f"pruned:{fraction:g} is for networks of zskt and transformers' ResNet, found {type(module).__name__}; "
            f"use --student auto:{min(fraction, 0.5):g}, or choose a student, such as wrn-16-1"
        )
    sizes: dict[str, int] = {}
    builders: dict[str, Callable[[], nn.Module]] = {}
    for ladder in _narrower(teacher, fraction) if kind == "pruned" else _family(teacher, fraction):
        sizes |= _around(ladder, target)
        builders |= ladder
    wanted, family = f"{kind}:{fraction:g} asks for about {target:,.0f} parameters, but", type(module).__name__
    if not sizes:
        raise ZsktError(f"{wanted} no smaller relatives of {family} are known; {_suggestions(teacher, target)}")
    nearest = min(sizes, key=lambda name: _distance(sizes[name], target))
    if _distance(sizes[nearest], target) > math.log(NEAR):
        found = f"the nearest relative of {family}, {nearest}, has {sizes[nearest]:,}"
        raise ZsktError(f"{wanted} {found}; {_suggestions(teacher, target)}")
    student = builders[nearest]()
    if kind == "pruned":
        keep_strongest(module, student)
    return student


def _distance(size: int, target: float) -> float:
    return abs(math.log(size / target))


def _around(ladder: Ladder, target: float) -> dict[str, int]:
    """Parameter counts of the networks around `target` on a ladder, and of a few others, by bisection."""
    sizes: dict[str, int] = {}
    while ladder:
        middle = len(ladder) // 2
        name, builder = ladder[middle]
        try:
            with unallocated():
                sizes[name] = count_parameters(builder())
        except Exception:  # the images are too small for it, or its layers do not accept the width
            ladder = ladder[:middle] + ladder[middle + 1 :]
        else:
            ladder = ladder[middle + 1 :] if sizes[name] > target else ladder[:middle]
    return sizes


def _suggestions(teacher: Classifier, target: float) -> str:
    """Networks of ours for the teacher's images with about `target` parameters."""
    sizes: dict[str, int] = {}
    for spec in SUGGESTED:
        try:
            with unallocated():
                sizes[spec] = count_parameters(models.build(spec, teacher.num_classes, teacher.input_size))
        except UsageError:  # the images are too small for it
            continue
    nearest = sorted(sizes, key=lambda spec: _distance(sizes[spec], target))[:3]
    return "choose a student, such as " + " or ".join(f"{spec} ({sizes[spec]:,})" for spec in nearest)


def _family(teacher: Classifier, fraction: float) -> Iterator[Ladder]:
    """The teacher's relatives, without itself."""
    module = bare(teacher.module)
    transformers = sys.modules.get("transformers")
    library = type(module).__module__.partition(".")[0]
    if type(module).__module__.startswith(f"{models.__name__}."):
        yield from _ours(teacher, str(getattr(module, "spec", "")))
    elif transformers is not None and isinstance(module, transformers.PreTrainedModel):
        yield from _scaled(module, fraction)
    elif library in ("torchvision", "timm"):
        yield from _listed(teacher, library, type(module).__module__)


def _ours(teacher: Classifier, spec: str) -> Iterator[Ladder]:
    ladders: list[list[str]] = []
    if match := re.fullmatch(r"wrn-(\d+)-([\d.]+)(-raw)?", spec):
        depth, raw = int(match[1]), match[3] or ""
        widths = _widths(int(match[2])) if match[2].isdecimal() else _sixteenths(float(match[2]))
        ladders = [[f"wrn-{d}-{w}{raw}" for w in widths] for d in range(depth, 9, -6)]
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


def _narrower(teacher: Classifier, fraction: float) -> Iterator[Ladder]:
    """The networks of the teacher's depth and no greater width, itself among them, as a ladder."""
    module = bare(teacher.module)
    spec = str(getattr(module, "spec", ""))
    if match := re.fullmatch(r"wrn-(\d+)-([\d.]+)(-raw)?", spec):
        specs = [f"wrn-{match[1]}-{width}{match[3] or ''}" for width in _sixteenths(float(match[2]))]
    elif match := re.fullmatch(r"(resnet-18|resnet-34|vgg-11|convnet)(?:-(\d+))?", spec):
        specs = [f"{match[1]}-{width}" for width in range(int(match[2] or models.WIDTH), 0, -1)]
    else:
        specs = ["lenet-5", "lenet-5-half"] if spec == "lenet-5" else [spec]
    ladder: Ladder = [
        (each, functools.partial(models.build, each, teacher.num_classes, teacher.input_size)) for each in specs
    ]
    if not spec:
        kind: Callable[[Any], nn.Module] = type(module)
        itself = functools.partial(kind, copy.deepcopy(module.config))
        ladder = [(type(module).__name__, itself), *next(_scaled(module, fraction))]
    names = module.state_dict().keys()
    yield [(name, functools.partial(_of_layers, names, build)) for name, build in ladder]


def _of_layers(names: Collection[str], build: Callable[[], nn.Module]) -> nn.Module:
    """The network, unless its layers are others: a residual network loses a shortcut where widths become equal."""
    module = build()
    if module.state_dict().keys() != names:
        raise ZsktError(f"expected the teacher's layers in {type(module).__name__}, found others; choose another width")
    return module


def _sixteenths(most: float) -> list[float]:
    """The widths of a wide residual network, the widest first."""
    return [k / 16 if k % 16 else k // 16 for k in range(round(16 * most), 0, -1)]


def _widths(most: int) -> list[int]:
    """Up to 64 widths, the widest first."""
    return sorted({max(1, round(most * i / 64)) for i in range(1, 65)}, reverse=True)


def _scaled(module: Any, fraction: float) -> Iterator[Ladder]:
    """A transformers network with all widths in its config scaled, by factors around the expected one."""
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
    """A copy of a transformers config with its widths times `scale`, or None if it has no width of a known name.

    Widths are rounded to multiples of 8 (4 below 16), which also suits grouped and bottleneck layers; the number of
    attention heads becomes the largest one, up to the old, that divides the new width.
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
    """All networks that torchvision or timm lists from the teacher's own module `home`."""
    package = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    for name in package.list_models(module=home.rpartition(".")[2] if library == "timm" else sys.modules[home]):
        yield [(name, functools.partial(_from_library, teacher, library, name))]


def _from_library(teacher: Classifier, library: str, name: str) -> nn.Module:
    """A timm or torchvision network with random weights for the teacher's classes."""
    what = f"{library}:{name} needs {library}, which cannot be imported"
    with failing(what, "pip install 'zskt[vision]'"):
        importlib.import_module("timm" if library == "timm" else "torchvision.models")
    arguments: dict[str, Any] = {"num_classes": teacher.num_classes}
    if library == "timm":
        made = {"model_name": name, "pretrained": False, "in_chans": teacher.input_size[0]}
        return call_factory("timm:create_model", made | arguments)
    return call_factory("torchvision.models:get_model", {"name": name} | arguments)
