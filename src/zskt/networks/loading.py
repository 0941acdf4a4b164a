"""Any trained classifier, by its spelling: a folder, a file, a factory, or a name in a model library.

Image size and normalisation come from what lies beside the weights, else they are asked for; they are never assumed.
"""

import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zskt.errors import UsageError, ZsktError, first_line, to_stderr
from zskt.files import expanded, read_json, tensor_shapes
from zskt.networks.archives import kind_of
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.factories import call_factory, is_factory
from zskt.networks.folder import is_hub_folder, load_network
from zskt.networks.graphs import read_exported, read_torchscript
from zskt.networks.models import Size
from zskt.networks.rebuild import quiet, unallocated, without_code
from zskt.networks.weights import fill, find_state_dict, unit_normalisation
from zskt.networks.weights_file import read_weights

Notice = Callable[[str], None]  # one line for the user

SPELLINGS = (
    "a teacher or run folder, a Hugging Face folder, a .pt2 or TorchScript file, package.module:factory, "
    "file.py:factory, timm:NAME or torchvision:NAME"
)
_LIBRARY = re.compile(r"(timm|torchvision):([\w.\-/]+)")


@dataclass(frozen=True)
class Loaded:
    """A teacher, and where things about it were found."""

    teacher: Classifier
    kind: str
    """what kind of thing it was loaded from"""
    normalisation: str
    """where mean and standard deviation come from"""
    lost: str = ""
    """in one line, what this kind cannot give; empty where nothing is lost"""


@dataclass
class _Found:
    """A network, and what was found beside it."""

    module: nn.Module
    kind: str
    input_size: Size | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    source: str = ""
    class_names: Sequence[str] | None = None
    lost: str = ""


def load_teacher(
    what: str | Path,
    *,
    weights: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust: bool = False,
    notice: Notice = to_stderr,
) -> Classifier:
    """The trained classifier that `what` spells, ready to be distilled, measured or compared.

    `what` is a teacher or run folder; a Hugging Face folder (config.json and safetensors); a `.pt2` file of
    torch.export or a TorchScript file; `package.module:factory` or `file.py:factory`, called with `arguments`;
    `timm:NAME` or `torchvision:NAME`. `weights` is a checkpoint for a factory or a name. `input_size` is (C, H, W);
    `mean` and `std` have C values each, in [0, 1] or 0..255: needed where nothing beside the weights says them.
    Nothing but a factory runs code; `trust` allows TorchScript, `.pt2` files that hold more than a plain network, and
    folders that name a factory. `notice` gets lines worth knowing. Raises UsageError for options that are missing or
    have no use, ZsktError for what cannot be loaded or distilled.
    """
    return load(
        what,
        weights=weights,
        arguments=arguments,
        input_size=input_size,
        mean=mean,
        std=std,
        trust=trust,
        notice=notice,
    ).teacher


def load(
    what: str | Path,
    *,
    weights: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust: bool = False,
    notice: Notice = to_stderr,
) -> Loaded:
    """What `load_teacher` returns, and where it was found."""
    spelling, path = str(what), expanded(what)
    if is_own_folder(path):
        given = {"weights": weights, "args": arguments, "input-size": input_size, "mean": mean, "std": std}
        _refuse_unused(given, f"{path}, a folder that says everything")
        return Loaded(load_network(path, trust=trust), "folder of zskt", "the folder")
    if path.exists():
        _refuse_unused({"weights": weights, "args": arguments}, str(path))
        found = _hugging_face(path) if path.is_dir() else _recorded(path, trust)
    elif match := _LIBRARY.fullmatch(spelling):
        found = _from_library(match[1], match[2], weights, dict(arguments or {}), notice)
    elif is_factory(spelling):
        notice(f"{spelling} runs the code of that file or package")
        found = _Found(call_factory(spelling, arguments), "factory")
        if weights is not None:
            fill(found.module, Path(weights), advice="check the factory, its arguments and the file")
    else:
        raise ZsktError(f"expected a network at {spelling}, found nothing there; give {SPELLINGS}")
    return _completed(spelling, found, input_size, mean, std, notice)


def is_own_folder(path: Path) -> bool:
    """Whether `path` is a folder of zskt's, or one that can be nothing else."""
    return path.is_dir() and (is_hub_folder(path) or not (path / "config.json").exists())


def _refuse_unused(given: Mapping[str, object], what: str) -> None:
    for name, value in given.items():
        if value:
            option = f"--teacher-{name}" if name in ("weights", "args") else f"--{name}"
            raise UsageError(f"{option} has no use beside {what}; leave it out")


def _completed(
    what: str,
    found: _Found,
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    notice: Notice,
) -> Loaded:
    """The teacher, from what was found and what is given; what is given goes first."""
    size = input_size or found.input_size
    if bool(mean) != bool(std):
        raise UsageError("--mean and --std go together: give both or neither")
    source = "as given" if mean else found.source
    mean, std = mean or found.mean, std or found.std
    missing = [("--input-size C H W", size), ("--mean and --std of pixels in [0, 1], one number per channel", mean)]
    if wanted := [option for option, value in missing if not value]:
        raise UsageError(f"{what} does not say how its images were prepared: give {', and '.join(wanted)}")
    assert size
    assert mean
    assert std
    mean, std, lines = unit_normalisation(mean, std)
    for line in lines:
        notice(line)
    teacher = as_teacher(
        Classifier(found.module, input_size=size, mean=mean, std=std, class_names=found.class_names), copied=False
    )
    for line in (*teacher.notes, *([found.lost] if found.lost else [])):
        notice(line)
    return Loaded(teacher, found.kind, source, found.lost)


def _recorded(path: Path, trust: bool) -> _Found:
    """A file: an exported program, TorchScript, or weights alone, which are no network."""
    kind = kind_of(path)
    if kind == "weights":
        read_weights(path)  # damaged or unsafe files say so first
        raise ZsktError(
            f"{path} holds weights without a network: give package.module:factory with --teacher-weights {path}, or "
            "make a teacher folder of it with zskt import"
        )
    recording = (read_exported if kind == "exported program" else read_torchscript)(path, trust)
    return _Found(recording.network, kind, recording.input_size, lost=recording.lost)


# Model libraries: imported when asked for


def _optional(name: str, extra: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ZsktError(
            f"this needs {name}, which cannot be imported ({first_line(error)}): pip install 'zskt[{extra}]'"
        ) from error


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Somebody else's errors as one line, their warnings and chatter left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ZsktError:
        raise
    except Exception as error:
        raise ZsktError(f"{what} cannot be loaded ({type(error).__name__}: {first_line(error)}); check it") from error


def _from_library(
    library: str, name: str, weights: str | Path | None, arguments: dict[str, Any], notice: Notice
) -> _Found:
    """A network of timm or torchvision; without a weights file the library fetches its own."""
    package = _optional("torchvision.models" if library == "torchvision" else "timm", "vision")
    if weights is None:
        notice(f"{library} fetches its weights for {name}, unless it has done so before")
    with _failing(f"{library}:{name}"):
        if library == "timm":
            module = package.create_model(name, pretrained=weights is None, **arguments)
            facts = dict(module.pretrained_cfg)
            found = _Found(module, "timm network", facts.get("input_size"), facts["mean"], facts["std"])
            found.source = "pretrained_cfg"
        else:
            known = package.get_model_weights(name).DEFAULT
            module = package.get_model(name, weights=known if weights is None else None, **arguments)
            crop = known.transforms()
            (side,) = crop.crop_size if len(crop.crop_size) == 1 else (0,)
            found = _Found(module, "torchvision network", (3, side, side) if side else None, crop.mean, crop.std)
            found.source = f"transforms of {known}"
    if weights is not None:
        fill(found.module, Path(weights), advice=f"check {library}:{name}, --teacher-args and the file")
    return found


def _hugging_face(folder: Path) -> _Found:
    """An image classifier saved by transformers; nothing is fetched and no code of the folder's is run."""
    transformers = _optional("transformers", "hub")
    tensors = sorted(folder.glob("*.safetensors"))
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not tensors and len(pickled) != 1:
        there = f"{len(pickled)} .bin files" if pickled else "neither"
        raise ZsktError(f"expected *.safetensors or pytorch_model.bin in {folder}, found {there}; save it anew")
    facts = read_json(folder / "config.json")
    kind = str(facts.get("model_type")) if isinstance(facts, dict) else "none"
    with _failing(str(folder)), quiet(transformers):
        known = transformers.CONFIG_MAPPING[kind] if kind in transformers.CONFIG_MAPPING else None  # noqa: SIM401
        classes = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        if known is None or known not in classes:
            raise ZsktError(
                f"expected an image classifier of transformers in {folder}, found model type {kind[:80]!r}; its own "
                "code is not run: give package.module:factory"
            )
        config = known.from_dict(without_code(facts, folder / "config.json"))
        found_class = classes[known]
        kind_of_network = found_class[0] if isinstance(found_class, tuple) else found_class
        weights = None if tensors else read_weights(pickled[0])  # never by the library, which may unpickle
        held = sum(math.prod(shape) for path in tensors for shape in tensor_shapes(path).values())
        held += sum(tensor.numel() for tensor in find_state_dict(weights).values()) if weights is not None else 0
        with unallocated():
            wanted = count_parameters(kind_of_network(config))
        if wanted > 2 * held + 1_000_000:  # some may be absent, and then are said below
            raise ZsktError(
                f"{folder / 'config.json'} describes {wanted:,} parameters, and the weights beside it are {held:,} "
                "numbers; save the network anew"
            )
        model, loading = kind_of_network.from_pretrained(
            folder if tensors else None,
            config=config,
            state_dict=weights,
            use_safetensors=bool(tensors),
            output_loading_info=True,
            local_files_only=True,
            dtype="float32",
        )
    absent = sorted({str(name) for name in (*loading["missing_keys"], *loading["mismatched_keys"])})
    if absent:
        raise ZsktError(
            f"{folder} is no trained classifier: {absent[0]} and {len(absent) - 1} other tensors are missing or of "
            "another shape; save the network after training it for its classes"
        )
    found = _Found(model, f"Hugging Face {config.model_type}", class_names=_names(config))
    _read_preprocessor(folder, config, found)
    return found


def _names(config: Any) -> list[str] | None:
    """The class names, where somebody has given them."""
    names = [str(config.id2label.get(index, "")) for index in range(config.num_labels)]
    return None if all(name in ("", f"LABEL_{index}") for index, name in enumerate(names)) else names


def _read_preprocessor(folder: Path, config: Any, found: _Found) -> None:
    """Image size and normalisation, as far as a transformers folder says them."""
    facts: Any = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            facts = read_json(folder / name)
            facts = facts.get("image_processor", facts) if isinstance(facts, dict) else None
            found.source = name
            break
    channels = getattr(config, "num_channels", None)
    try:
        if not isinstance(facts, dict):
            raise TypeError(f"expected an object, found {type(facts).__name__}")
        sides = _sides(facts) or _pair(getattr(config, "image_size", None))
        if channels and sides:
            found.input_size = (int(channels), *sides)
        if not facts:
            return
        factor, offset = 1.0, 0.0  # what becomes of a pixel in 0..255 before mean and std
        if facts.get("do_rescale", True):
            factor = float(facts.get("rescale_factor", 1 / 255))
            offset = 1.0 if facts.get("rescale_offset") else 0.0
        zeros, ones = [0.0] * int(channels or 3), [1.0] * int(channels or 3)
        normalised = facts.get("do_normalize", True)
        means, deviations = (facts["image_mean"], facts["image_std"]) if normalised else (zeros, ones)
        found.mean = [(float(mean) + offset) / (255 * factor) for mean in means]
        found.std = [float(deviation) / (255 * factor) for deviation in deviations]
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ZsktError(
            f"{folder / found.source} is not understood ({type(error).__name__}: {first_line(error)}); correct it, or "
            "remove it and give --input-size, --mean and --std"
        ) from error


def _sides(facts: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (H, W) that a preprocessor ends with: its crop where it crops, else its resizing."""
    if facts.get("do_center_crop") and facts.get("crop_size"):
        return _pair(facts["crop_size"])
    return _pair(facts.get("size"))


def _pair(size: Any) -> tuple[int, int] | None:
    """transformers' ways to write (H, W): a side, a pair, or a dictionary."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
