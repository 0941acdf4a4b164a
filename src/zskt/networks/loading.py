"""Any trained classifier, by its specifier: a folder, a file, a factory, or a name in a model library.

Image size and normalisation are read from files next to the weights or must be given; they are never guessed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zskt.errors import UsageError, ZsktError, failing, short, to_stderr
from zskt.files import expanded
from zskt.networks import hugging_face
from zskt.networks.archives import kind_of, read_weights
from zskt.networks.checks import as_teacher, untrained
from zskt.networks.classifier import Classifier, unit_normalisation
from zskt.networks.factories import call_factory, is_factory
from zskt.networks.folder import is_hub_folder, load_network
from zskt.networks.foreign import Found, optional, quiet
from zskt.networks.graphs import read_exported, read_torchscript
from zskt.networks.weights import fill

Notice = Callable[[str], None]  # one line for the user

SPECIFIERS = (
    "a teacher or run folder, a Hugging Face folder, a .pt2 or TorchScript file, package.module:factory, "
    "file.py:factory, timm:NAME or torchvision:NAME"
)
_LIBRARY = re.compile(r"(timm|torchvision):([\w.\-/]+)")


@dataclass(frozen=True)
class Loaded:
    """A teacher, and where its metadata came from."""

    teacher: Classifier
    kind: str  # what kind of thing it was loaded from
    normalisation: str  # where mean and standard deviation come from
    lost: str = ""  # one line on what this kind does not support; empty if nothing
    unfinished: Mapping[str, Any] | None = None  # of a stopped run, what its student.json would say


def load_teacher(
    what: str | Path,
    *,
    weights: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    module: nn.Module | None = None,
    trust: bool = False,
    notice: Notice = to_stderr,
    key: str = "",
) -> Classifier:
    """The trained classifier that `what` specifies, ready to be distilled, measured or compared.

    `what` is a teacher or run folder; a Hugging Face folder (config.json and safetensors); a `.pt2` file of
    torch.export or a TorchScript file; `package.module:factory` or `file.py:factory`, called with `arguments`;
    `timm:NAME` or `torchvision:NAME`. `weights` is a checkpoint for a factory or a name; `key` is the part of it to
    take, if it holds several networks: an entry, as in ema_state_dict, or how names begin. `input_size` is (C, H, W);
    `mean` and `std` have C values each, in [0, 1] or 0..255: required unless stored with the weights. `module` is the
    network of a folder that only its own code makes, as in `load_student`. Naming a factory
    runs its code; nothing else runs code without `trust`, which allows `.pt2` and TorchScript files, which are
    programs, and folders that name a factory. `notice` gets messages for the user. Raises UsageError for missing or
    unused options, ZsktError for what cannot be loaded or distilled.
    """
    return load(what, weights, arguments, input_size, mean, std, module, trust, notice, key).teacher


def load_pretrained(what: str | Path, *, trust: bool, revision: str | None) -> Classifier:
    """See `Classifier.from_pretrained`."""
    folder = expanded(what)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"revision has no effect with {folder}, a local folder; omit it")
    elif folder.exists() or not hugging_face.REPOSITORY.fullmatch(str(what)):
        raise ZsktError(
            f"expected a folder or a Hugging Face repository as owner/name, found {short(what)}, which is neither; "
            "zskt.load_teacher takes files and other specifiers"
        )
    else:
        folder = hugging_face.fetch(str(what), revision)
    return load_teacher(folder, trust=trust)


@torch.random.fork_rng(devices=[])  # networks are built with random weights first
def load(
    what: str | Path,
    weights: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    module: nn.Module | None = None,
    trust: bool = False,
    notice: Notice = to_stderr,
    key: str = "",
) -> Loaded:
    """What `load_teacher` returns, and where it was found."""
    specifier, path = str(what), expanded(what)
    if is_own_folder(path):
        given = {"weights": weights, "args": arguments, "input-size": input_size, "mean": mean, "std": std, "key": key}
        refuse_unused(given, f"{path}, a folder that contains all of this")
        return Loaded(load_network(path, module=module, trust=trust), "folder of zskt", "the folder")
    if module is not None:
        raise UsageError(f"module is for a folder of zskt, found {short(specifier)}; leave it out")
    if path.exists():
        refuse_unused({"weights": weights, "args": arguments, "key": key}, str(path))
        found = hugging_face.read_folder(path) if path.is_dir() else _recorded(path, trust)
    elif key and weights is None:
        raise UsageError(f"--teacher-key {short(key)} is a part of the file --teacher-weights: give both or neither")
    elif match := _LIBRARY.fullmatch(specifier):
        found = _from_library(match[1], match[2], weights, dict(arguments or {}), notice, key)
    elif is_factory(specifier):
        notice(f"{specifier} runs the code of that file or package")
        found = Found(call_factory(specifier, arguments), "factory")
        if weights is not None:
            fill(found.module, expanded(weights), advice="check the factory, its arguments and the file", key=key)
    else:
        raise ZsktError(f"expected a network at {specifier}, found nothing; give {SPECIFIERS}")
    return _completed(specifier, found, input_size, mean, std, notice)


def is_own_folder(path: Path) -> bool:
    """Whether `path` is a zskt folder, or can be nothing else."""
    return path.is_dir() and (is_hub_folder(path) or not (path / "config.json").exists())


def refuse_unused(given: Mapping[str, object], what: str) -> None:
    """Raise UsageError for options that have no effect, by name, with a network that has all of that."""
    for name, value in given.items():
        if value:
            option = f"--teacher-{name}" if name in ("weights", "args", "key") else f"--{name}"
            raise UsageError(f"{option} has no effect with {what}; omit it")


def _completed(
    what: str,
    found: Found,
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    notice: Notice,
) -> Loaded:
    """The teacher, from what was found and what is given, which takes precedence."""
    size, source = input_size or found.input_size, found.source
    if bool(mean) != bool(std):
        raise UsageError("--mean and --std go together: give both or neither")
    if mean and std:
        own = found.mean, found.std
        found.mean, found.std, lines = unit_normalisation(mean, std)
        if own[0] and list(map(list, own)) != [list(found.mean), list(found.std)]:
            notice(f"{what} itself says mean {list(own[0])} and std {list(own[1])}; using those given")
        source = "as given"
        for line in lines:
            notice(line)
    elif found.others:
        notice(
            f"{what}: mean and std are those of the library's own weights ({source}); give --mean and --std if the "
            "given weights were trained with others"
        )
    missing = [
        ("--input-size C H W", size),
        ("--mean and --std of pixels in [0, 1], one number per channel", found.mean),
    ]
    if wanted := [option for option, value in missing if not value]:
        raise UsageError(f"{what} does not specify its preprocessing: give {', and '.join(wanted)}")
    assert size
    network = Classifier(found.module, input_size=size, mean=found.mean, std=found.std, class_names=found.class_names)
    teacher = as_teacher(network, copied=False)
    if sign := untrained(teacher):
        teacher.notes += (f"the network looks untrained, with {sign}: give its weights, or check them",)
    for line in (*teacher.notes, *([found.lost] if found.lost else [])):
        notice(line)
    return Loaded(teacher, found.kind, source, found.lost)


def _recorded(path: Path, trust: bool) -> Found:
    """A file: an exported program, TorchScript, or weights alone, which are refused."""
    kind = kind_of(path)
    if kind == "weights":
        read_weights(path)  # reports damaged or unsafe files first
        raise ZsktError(
            f"{path} holds weights without a network: give package.module:factory with --teacher-weights {path}, or "
            "make a teacher folder of it with zskt import"
        )
    if not trust:
        name = "TorchScript" if kind == "TorchScript" else "an exported program"
        raise UsageError(
            f"{path} is {name}, and loading it can run any code that its maker put there: give --trust, in Python "
            "trust=True, if you trust them"
        )
    return read_exported(path) if kind == "exported program" else read_torchscript(path)


def _from_library(
    library: str, name: str, weights: str | Path | None, arguments: dict[str, Any], notice: Notice, key: str
) -> Found:
    """A network of timm or torchvision, imported on demand; without a weights file the library downloads its own."""
    package = optional("torchvision.models" if library == "torchvision" else "timm", "vision")
    if weights is None:
        notice(f"{library} downloads its weights for {name}, unless it has done so before")
    with failing(f"cannot load {library}:{name}", "check it", named=True), quiet():
        if library == "timm":
            module = package.create_model(name, pretrained=weights is None, **arguments)
            config = dict(module.pretrained_cfg)
            size, mean, std, source = config.get("input_size"), config["mean"], config["std"], "pretrained_cfg"
        else:
            known = package.get_model_weights(name).DEFAULT
            module = package.get_model(name, weights=known if weights is None else None, **arguments)
            crop = known.transforms()
            (side,) = crop.crop_size if len(crop.crop_size) == 1 else (0,)
            size, mean, std, source = (3, side, side) if side else None, crop.mean, crop.std, f"transforms of {known}"
        mean, std, _ = unit_normalisation(mean, std, white=1, where=source)
    if weights is not None:
        fill(module, expanded(weights), advice=f"check {library}:{name}, --teacher-args and the file", key=key)
    return Found(module, f"{library} network", size, mean, std, source, others=weights is not None)
