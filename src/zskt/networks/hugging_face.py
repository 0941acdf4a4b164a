"""Folders and repositories of Hugging Face: image classifiers of transformers, with their preprocessing."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zskt.errors import ZsktError, failing
from zskt.files import read_json, regular, tensor_shapes
from zskt.networks.archives import read_weights
from zskt.networks.classifier import count_parameters, unit_normalisation
from zskt.networks.foreign import Found, optional, quiet
from zskt.networks.rebuild import unallocated, without_code
from zskt.networks.weights import find_state_dict

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
FETCHED = ["*.json", "*.safetensors", "README.md"]
"""What is downloaded from a repository's top folder: neither code nor pickles."""


def fetch(repository: str, revision: str | None = None) -> Path:
    """The local copy of a repository "owner/name" of the Hugging Face hub, downloaded unless it is there already."""
    hub = optional("huggingface_hub", "hub")
    what = f"found no folder {repository}, and cannot download it from the Hugging Face hub"
    # Unknown, private, offline, ...: the name of the exception says which.
    with failing(what, "check the name, the revision, your access and the connection", named=True):
        return Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=FETCHED, ignore_patterns=["*/*"])
        )


def read_folder(folder: Path) -> Found:
    """An image classifier saved by transformers; nothing is downloaded and no code in the folder is run."""
    transformers = optional("transformers", "hub")
    tensors = sorted(folder.glob("*.safetensors"))
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not tensors and len(pickled) != 1:
        there = f"{len(pickled)} .bin files" if pickled else "neither"
        raise ZsktError(
            f"expected *.safetensors or one pytorch_model.bin in {folder}, found {there}; save the network again with "
            "save_pretrained"
        )
    for path in folder.iterdir():  # transformers opens some of them itself
        if not path.is_dir():
            regular(path)
    written = read_json(folder / "config.json")
    with failing(f"cannot load {folder}", "check it", named=True), quiet():
        config, kind = _config_and_class(transformers, written, folder / "config.json")
        weights = None if tensors else read_weights(pickled[0])  # never by the library, which may unpickle
        shapes = [shape for path in tensors for shape in tensor_shapes(path).values()]
        shapes += [tuple(tensor.shape) for tensor in find_state_dict(weights).values()] if weights is not None else []
        held = sum(math.prod(shape) for shape in shapes)
        with unallocated(len(shapes)):
            wanted = count_parameters(kind(config))
        if wanted > 2 * held + 1_000_000:  # absent ones are reported below
            raise ZsktError(
                f"{folder / 'config.json'} describes {wanted:,} parameters, and the weights beside it hold only "
                f"{held:,} numbers; save the network again with save_pretrained"
            )
        model, loading = kind.from_pretrained(
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
        others = f" and {len(absent) - 1} other tensors are" if len(absent) > 1 else " is"
        raise ZsktError(
            f"{folder} is no trained classifier: {absent[0]}{others} missing or of another shape; save the network "
            "after training it for its classes"
        )
    found = Found(model, f"Hugging Face {config.model_type}", class_names=_class_names(config))
    _read_preprocessor(folder, config, found)
    return found


def _config_and_class(transformers: Any, written: Any, path: Path) -> tuple[Any, Any]:
    """The config in `path`, without entries that would run code, and the class of its classifier."""
    kind = str(written.get("model_type")) if isinstance(written, dict) else "none"
    known = transformers.CONFIG_MAPPING[kind] if kind in transformers.CONFIG_MAPPING else None  # noqa: SIM401
    classes = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if known is None or known not in classes:
        raise ZsktError(
            f"expected an image classifier of transformers in {path.parent}, found model type {kind[:80]!r}; code that "
            "comes with a folder is never run: give package.module:factory instead"
        )
    candidates = classes[known] if isinstance(classes[known], tuple) else (classes[known],)
    named = written.get("architectures") or ()
    fitting = [candidate for candidate in candidates if candidate.__name__ in named]
    return known.from_dict(without_code(written, path)), (fitting or candidates)[0]


def _class_names(config: Any) -> list[str] | None:
    """The class names, if any were given."""
    names = [str(config.id2label.get(index, "")) for index in range(config.num_labels)]
    return None if all(name in ("", f"LABEL_{index}") for index, name in enumerate(names)) else names


def _read_preprocessor(folder: Path, config: Any, found: Found) -> None:
    """Image size and normalisation, as far as a transformers folder gives them."""
    written: Any = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            written = read_json(folder / name)
            written = written.get("image_processor", written) if isinstance(written, dict) else None
            found.source = name
            break
    channels = getattr(config, "num_channels", None)
    advice = "correct it, or remove it and give --input-size, --mean and --std"
    with failing(f"cannot interpret {folder / found.source}", advice, named=True):
        if not isinstance(written, dict):
            raise TypeError(f"expected an object, found {type(written).__name__}")
        sides = _sides(written) or _pair(getattr(config, "image_size", None))
        if channels and sides:
            found.input_size = (int(channels), *sides)
        if not written:
            return
        white, offset = 255.0, 0.0  # a white pixel before mean and standard deviation, and what is subtracted from it
        if written.get("do_rescale", True):
            white *= float(written.get("rescale_factor", 1 / 255))
            offset = 1.0 if written.get("rescale_offset") else 0.0
        mean, std = [0.0] * int(channels or 3), [1.0] * int(channels or 3)
        if written.get("do_normalize", True):
            mean, std = (list(map(float, written[name])) for name in ("image_mean", "image_std"))
        mean = [value + offset for value in mean]
        found.mean, found.std, _ = unit_normalisation(mean, std, white=white, where=folder / found.source)


def _sides(written: Mapping[str, Any]) -> tuple[int, int] | None:
    """The final (H, W) of a preprocessor: that of its crop, if any, else of its resizing."""
    if written.get("do_center_crop") and written.get("crop_size"):
        return _pair(written["crop_size"])
    return _pair(written.get("size"))


def _pair(size: Any) -> tuple[int, int] | None:
    """transformers' ways to write (H, W): a side, a pair, or a dictionary."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
