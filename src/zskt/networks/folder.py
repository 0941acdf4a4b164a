"""A network on disk: NAME.json beside NAME.safetensors, in teacher, run and Hugging Face folders."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError, short
from zskt.files import expanded, read_json, read_sealed, read_tensors, sealed, write_json, write_tensors
from zskt.networks.checks import as_teacher, bare
from zskt.networks.classifier import Classifier, checked_size, count_parameters, unit_normalisation
from zskt.networks.rebuild import describe_module, rebuild_module, unallocated
from zskt.runtime import cpu_name, versions


def save_network(folder: Path, stem: str, network: Classifier, **metadata: Any) -> None:
    """Write `stem`.safetensors, then `stem`.json with `metadata`: without the JSON it does not count as a network."""
    write_tensors(folder / f"{stem}.safetensors", bare(network.module).state_dict())
    made = {"versions": versions(), "hardware": cpu_name()}
    write_json(folder / f"{stem}.json", sealed(describe_network(network) | metadata | made))


def describe_network(network: Classifier) -> dict[str, Any]:
    """The metadata stored with the weights, as plain JSON values."""
    how = describe_module(network.module, network.num_classes, network.input_size)
    return {
        "format": FORMAT,
        "model": how.get("spec"),
        "rebuild": how,
        "input_size": list(network.input_size),
        "num_classes": network.num_classes,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "class_names": list(network.class_names) if network.class_names else None,
        "parameters": count_parameters(network.module),
    }


def check_teacher_folder(folder: Path) -> None:
    """Raise ZsktError unless a teacher may be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise ZsktError(f"expected a folder or nothing at {folder}, found a file; choose another --out")
    for name, what in (("teacher.json", "a teacher"), ("config.toml", "a run"), ("student.json", "a student")):
        if (folder / name).exists():
            raise ZsktError(f"{folder} already holds {what}; choose another --out or remove it")


def save_teacher(folder: str | Path, teacher: Classifier, **metadata: Any) -> None:
    """Write a teacher folder; refuses one that already holds a teacher or a run."""
    folder = expanded(folder)
    check_teacher_folder(folder)
    save_network(folder, "teacher", teacher, **metadata)


def load_student(folder: str | Path, *, module: nn.Module | None = None, trust: bool = False) -> Classifier:
    """The finished student in a run folder, with its normalisation.

    A student that only its own code can make is passed as `module`, whose weights are replaced in a copy; one made by a
    factory needs `trust`, as rebuilding it runs that code. Raises ZsktError saying which it needs.
    """
    return load_network(folder, module=module, trust=trust, stem="student")


@torch.random.fork_rng(devices=[])  # networks are built with random weights first
def load_network(
    folder: str | Path, *, module: nn.Module | None = None, trust: bool = False, stem: str | None = None
) -> Classifier:
    """The teacher of a teacher folder or the student of a run folder, whichever `folder` is; see `load_student`."""
    folder = expanded(folder)
    stem = stem or ("student" if (folder / "student.json").exists() else "teacher")
    path = folder / f"{stem}.json"
    if path.exists():
        return read_network(path, folder / f"{stem}.safetensors", module, trust=trust)
    if is_hub_folder(folder):
        return read_network(folder / "config.json", folder / "model.safetensors", module, trust=trust)
    what = "a folder without it" if folder.is_dir() else "a file" if folder.exists() else "nothing"
    near = "make one with zskt teach, zskt import or zskt distill"
    if (folder / "config.toml").exists():
        near = "if this run has not finished, resume it with --resume"
    raise ZsktError(f"expected a folder with {stem}.json at {folder}, found {what}; {near}")


def is_hub_folder(folder: Path) -> bool:
    """Whether `zskt export --format hub` wrote this folder, or another of the same layout."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    return isinstance(config, dict) and config.get("model_type") == HUB_TYPE


def read_network(path: Path, weights: Path, module: nn.Module | None = None, *, trust: bool = False) -> Classifier:
    """The network that the JSON at `path` describes, or a copy of `module`, with the tensors of a safetensors file."""
    return build_network(read_sealed(path), read_tensors(weights)[0], path, weights, module, trust=trust)


def build_network(
    description: Any,
    tensors: Mapping[str, Tensor],
    path: Path,
    weights: Path,
    module: nn.Module | None = None,
    *,
    trust: bool = False,
) -> Classifier:
    """The network of a description found in `path`, or a copy of `module`, with the tensors found in `weights`."""
    metadata = _checked_metadata(description, path)
    mean, std, _ = unit_normalisation(metadata["mean"], metadata["std"], white=1, where=path)

    def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise ZsktError(
                f"{weights} does not fit the {short(metadata['model'] or type(network).__name__)} that {path.name} "
                f"describes ({' '.join(str(error).split())[:200]}); write the folder again"
            ) from error

    if module is not None:
        module = copy.deepcopy(module)
    else:
        how = {"spec": metadata["model"]} if metadata["model"] is not None else metadata.get("rebuild")
        how = how if isinstance(how, dict) else {}
        size = checked_size(metadata["input_size"])
        make = functools.partial(rebuild_module, how, path, metadata["num_classes"], size, trust=trust)
        if isinstance(how.get("spec"), str) or isinstance(how.get("transformers"), str):
            with unallocated(len(tensors)):  # a short file can describe a network too large for memory
                fill(make(), {name: torch.empty(tensor.shape) for name, tensor in tensors.items()})
        module = make()
    for tensor in tensors.values():
        if tensor.is_floating_point():  # float64 stays, all else becomes float32
            module.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            break
    own = module.state_dict()
    for name, tensor in tensors.items():
        if name in own and (tensor.is_floating_point(), tensor.is_complex()) != (own[name].is_floating_point(), False):
            raise ZsktError(f"expected {own[name].dtype} for {name} in {weights}, found {tensor.dtype}; write it again")
    fill(module, tensors)
    network = Classifier(
        module,
        input_size=metadata["input_size"],
        mean=mean,
        std=std,
        num_classes=metadata["num_classes"],
        class_names=metadata.get("class_names"),
    )
    return as_teacher(network, copied=False)


def _checked_metadata(metadata: Any, path: Path) -> dict[str, Any]:
    """The JSON stored with a network's weights, checked for what a network needs."""
    if not isinstance(metadata, dict):
        raise ZsktError(f"expected an object in {path}, found {type(metadata).__name__}; write the folder again")

    def numbers(value: Any, *kinds: type) -> bool:
        return isinstance(value, list) and bool(value) and all(type(item) in kinds for item in value)

    right = {
        "format": metadata.get("format") == FORMAT,
        "model": "model" in metadata and isinstance(metadata["model"], str | None),
        "num_classes": type(metadata.get("num_classes")) is int,
        "input_size": numbers(metadata.get("input_size"), int),
        "mean": numbers(metadata.get("mean"), int, float),
        "std": numbers(metadata.get("std"), int, float),
        "class_names": metadata.get("class_names") is None or numbers(metadata["class_names"], str),
    }
    wrong = [name for name, fine in right.items() if not fine]
    if wrong:
        raise ZsktError(f"{path}: {', '.join(wrong)} missing or of the wrong kind; write the folder again")
    return metadata


HUB_TYPE = "zskt"  # `model_type` in the config.json of a folder in the Hugging Face layout
FORMAT = 1  # version of the JSON stored with the weights
