"""Rebuilding a network before its weights are loaded, from the description stored with them."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zskt.errors import ZsktError, failing, short, to_stderr
from zskt.networks import models
from zskt.networks.checks import bare
from zskt.networks.factories import call_factory, factory_of
from zskt.networks.foreign import optional, quiet
from zskt.networks.models import Size

_RUNS_CODE = {
    *("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels"),
    *("kernel_config", "quantization_config"),
}
"""Entries of a config by which transformers loads modules or kernels from a repository."""
FETCHES = "timm"  # prefix of model types that delegate to timm, which downloads or unpickles what a config names


class _Untouched(TorchFunctionMode):
    """Skips in-place operations on meta tensors: initialising them would import much of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def unallocated(most: int | None = None) -> Iterator[None]:
    """Networks built inside have shapes and no values: quick, and without memory or random numbers.

    With `most`, the number of tensors in their weights file, ZsktError is raised once they have far more layers: a
    short file can describe a million of them.
    """
    layers = 0

    def count(*_: Any) -> None:
        nonlocal layers
        layers += 1
        if most is not None and layers > LAYERS_PER_TENSOR * (most + 100):
            raise ZsktError(
                f"expected a network that fits {most:,} tensors of weights, found a far deeper one; check it"
            )

    handle = nn.modules.module.register_module_module_registration_hook(count)
    try:
        with torch.device("meta"), _Untouched():
            yield
    finally:
        handle.remove()


LAYERS_PER_TENSOR = 20
"""More modules than this for each tensor, in a network from a file, are taken for a mistake."""
LARGEST_ENTRY = 10**6
"""Largest whole number in a config of transformers: there are lists of such lengths."""


def describe_module(module: nn.Module, num_classes: int, input_size: Size) -> dict[str, Any]:
    """What rebuilds a network, as plain JSON values; without values, in its dtype's default.

    One of {"spec": "wrn-16-1"}; {"transformers": class, "config": its config}; {"factory": "package.module:factory",
    "arguments": {...}}; and {"python": class} if only its own code can. A network of ours that was modified, so that
    its spec would not restore it, counts as a Python object.
    """
    module = bare(module)
    spec = getattr(module, "spec", None)
    if isinstance(spec, str) and type(module).__module__.startswith(f"{models.__name__}."):
        with unallocated():
            twin = models.build(spec, num_classes, input_size)
        if _shapes(twin) == _shapes(module):
            return {"spec": spec}
    transformers = sys.modules.get("transformers")
    name = type(module).__name__
    if transformers is not None and _classifier(transformers, name) is type(module):
        config: Any = module.config
        return {"transformers": name, "config": json.loads(config.to_json_string(use_diff=True))}
    if (made := factory_of(module)) is not None:
        return made
    return {"python": f"{type(module).__module__}.{type(module).__qualname__}"}


def rebuild_module(
    how: Mapping[str, Any], where: Path, num_classes: int, input_size: Size, *, trust: bool
) -> nn.Module:
    """The network that `describe_module` described, freshly initialised; `where` is the file.

    A factory runs code that the file names, so it needs `trust` and is reported on stderr. Raises ZsktError for a
    Python object, which only its own code can make.
    """
    load = "load_teacher" if where.stem == "teacher" else "load_student"
    if isinstance(spec := how.get("spec"), str):
        return models.build(spec, num_classes, input_size)
    if isinstance(how.get("transformers"), str) and isinstance(how.get("config"), dict):
        return _from_transformers(how["transformers"], how["config"], where, num_classes)
    if isinstance(spec := how.get("factory"), str) and isinstance(how.get("arguments"), dict):
        if not trust:
            raise ZsktError(
                f"{where} says that {spec} builds this network, and calling it runs that code: give --trust, in Python "
                f"trust=True, if you trust the folder, or pass the network, as in {load}(folder, module=...)"
            )
        to_stderr(f"running {spec}, named in {where}, to rebuild the network")
        return call_factory(spec, how["arguments"])
    package, _, name = str(how.get("python", "your.Network")).rpartition(".")
    folder = where.parent
    raise ZsktError(
        f"{where} describes a Python object that only its own code can rebuild: from {package} import {name}; "
        f"module = {name}(...); {load.removeprefix('load_')} = zskt.{load}({str(folder)!r}, module=module)"
    )


def _from_transformers(name: str, config: dict[str, Any], where: Path, num_classes: int) -> nn.Module:
    """A network of the transformers library from its config, without entries that would fetch code."""
    transformers = optional("transformers", "hub")
    kind = _classifier(transformers, name)
    if kind is None:
        raise ZsktError(
            f"{where} asks for {short(name)}, which this version of transformers does not have as an image classifier "
            "of its own; install another version, or build the network yourself and pass it as module"
        )
    config = without_code(config, where, num_classes)
    with failing(f"{where} holds a config that {name} does not accept", "save the network again"), quiet():
        module: nn.Module = kind(kind.config_class.from_dict(config))
    return module


def without_code(config: Any, where: Path, num_classes: int | None = None) -> Any:
    """A transformers config without what would fetch and run code; ZsktError for timm's types, a wrong class count."""
    if isinstance(config, list):
        return [without_code(item, where) for item in config]
    if not isinstance(config, dict):
        return config
    if (kind := str(config.get("model_type"))).startswith(FETCHES):
        raise ZsktError(
            f"{where} has model type {short(kind)}, for which timm downloads and unpickles files: not loaded; give "
            "timm:NAME with a weights file"
        )
    names = config.get("id2label")
    for count in (config.get("num_labels"), len(names) if isinstance(names, dict | list) else None):
        if count is None:
            continue
        if type(count) is not int or not 1 <= count <= models.MOST or num_classes not in (None, count):
            expected = f"{num_classes:,}" if num_classes else f"at most {models.MOST:,}"
            raise ZsktError(f"expected {expected} classes in {where}, found {short(count)}; save the network again")
    for name, item in config.items():
        sizes = item if isinstance(item, list) else [item]
        if any(type(size) is int and abs(size) > LARGEST_ENTRY for size in sizes):
            found = short(f"{name} = {item}")
            raise ZsktError(
                f"expected numbers up to {LARGEST_ENTRY:,} in {where}, found {found}; save the network again"
            )
    return {name: without_code(item, where) for name, item in config.items() if name not in _RUNS_CODE}


def _classifier(transformers: Any, name: str) -> Any:
    """The library's image classifier of this name, or None."""
    fitting = "ForImageClassification" in name and not name.lower().startswith(FETCHES)
    kind = getattr(transformers, name, None) if fitting else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
