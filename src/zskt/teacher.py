"""A frozen network with everything needed to use it: normalisation, input size, class count. And its folder on disk.

A finished student is kept and loaded the same way, as `student.json` and `student.safetensors` in a run folder.
"""

import argparse
import copy
import functools
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from zskt import models
from zskt.archives import open_archive
from zskt.features import batchnorm_layers, evaluating, logits_of
from zskt.files import (
    ZsktError,
    cannot,
    first_line,
    printable,
    read_json,
    read_tensors,
    short,
    tensor_shapes,
    write_json,
    write_tensors,
)
from zskt.probing import Logarithm, check_state, check_training, output_kind, probe
from zskt.rebuild import describe_module, rebuild_module, unallocated

FORMAT = 1
"""Version of the JSON beside the weights."""
HUB_TYPE = "zskt"
"""`model_type` in the config.json of a folder in the Hugging Face layout."""


class Teacher(nn.Module):
    """A private copy of a trained classifier: frozen, in eval mode for good, together with its normalisation.

    `forward` takes *normalised* images (N, C, H, W) and returns logits (N, K); `normalise` makes them from uint8 or
    [0, 1] images. The module handed in is never touched. A finished student is read as one too.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Copy, freeze and probe `module`.

        `input_size` is (C, H, W); `mean` and `std` have C entries each, for pixels in [0, 1]. The class count and the
        kind of output are found by forwards of noise: `output` and `notes` say what was found, and probabilities are
        read as their logarithms. `num_classes` and `class_names` are checked. Raises ZsktError where they disagree,
        and for what cannot be distilled (`probing.probe`).
        """
        super().__init__()
        channels, height, width = _input_size(input_size)
        if not len(mean) == len(std) == channels:
            raise ZsktError(
                f"expected a mean and a standard deviation for each of {channels} channels, found {len(mean)} and "
                f"{len(std)}: give --mean and --std with {channels} numbers each"
            )
        if not all(0 <= m <= 1 for m in mean) or not all(1e-6 <= s <= 1 for s in std):
            raise ZsktError(f"expected mean and std of pixels in [0, 1], found {list(mean)} and {list(std)}")
        self.input_size = (channels, height, width)
        self.module = _frozen_copy(module)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64).view(-1, 1, 1), persistent=False)
        self.eval()
        found = probe(self.module, self.input_size)
        self.num_classes, self.output, self.notes = found.num_classes, found.output, found.notes
        if self.output == "probabilities":
            self.module = Logarithm(self.module).eval()
        self.class_names = tuple(map(printable, class_names)) if class_names is not None else None
        for what, count in (("classes", num_classes), ("class names", class_names and len(class_names))):
            if count not in (None, self.num_classes):
                raise ZsktError(f"expected a network with {count} {what}, found {self.num_classes} outputs; check both")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        return logits_of(self.module(images))

    def train(self, mode: bool = True) -> Self:
        """A teacher never trains: stays in eval mode."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 or [0, 1] images (N, C, H, W) -> what `forward` takes, on the network's device and in its dtype."""
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.zeros(()))
        x = images.to(like.device, like.dtype)
        if images.dtype == torch.uint8:
            x = x / 255
        return (x - self.mean.to(x)) / self.std.to(x)

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> [0, 1], clipped."""
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1)

    @property
    def has_batchnorm(self) -> bool:
        """Whether it remembers statistics of its training data."""
        return bool(batchnorm_layers(self.module))

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all parameters and buffers, and the normalisation: which teacher is this?"""
        digest = hashlib.sha256()
        for name, tensor in (*self.module.state_dict().items(), ("mean", self.mean), ("std", self.std)):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _frozen_copy(module: nn.Module) -> nn.Module:
    """A copy without gradients of its own; also of what TorchScript has compiled, which knows no requires_grad_."""
    try:
        with torch.no_grad():
            twin = copy.deepcopy(module)
        check_state(twin, "network")
        for parameter in twin.parameters():
            parameter.requires_grad_(False)
        twin.eval()
    except ZsktError:
        raise
    except (Exception, SystemExit) as error:  # locks, open files, tensors with a history, methods of its own
        raise ZsktError(
            f"the network cannot be copied and frozen ({first_line(error)}); take out what is no part of it, or load "
            "it anew"
        ) from error
    return twin


def _input_size(size: Sequence[int]) -> tuple[int, int, int]:
    if len(size) != 3 or min(size) < 1 or max(size) > models.MOST:
        raise ZsktError(f"expected an input size of three positive numbers C H W, found {short(list(size))}")
    return size[0], size[1], size[2]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(p.numel() for p in module.parameters())


def check_pair(teacher: Teacher, student: nn.Module) -> None:
    """Raise ZsktError unless the student takes the teacher's images, has its classes, and can be trained on them."""
    check_state(student, "student")
    like = next((p for p in student.parameters() if p.requires_grad), None)
    if like is None:
        raise ZsktError("expected a student with parameters to train, found none that wants gradients")
    theirs = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), like.dtype)
    if like.dtype != theirs or like.dtype not in (torch.float32, torch.float64):
        raise ZsktError(
            f"expected teacher and student both in float32 or both in float64, found {theirs} and {like.dtype}; "
            "convert one, as in student.float(); for bfloat16 arithmetic use precision bf16"
        )
    noise = torch.randn(2, *teacher.input_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    size = " x ".join(map(str, teacher.input_size))
    try:
        with evaluating(student):
            outputs = logits_of(student(noise))  # (2, K)
    except ZsktError:
        raise
    except (Exception, SystemExit) as error:  # as in Teacher
        raise ZsktError(
            f"the student does not take the teacher's images of {size} ({first_line(error)}); build it for that size"
        ) from error
    if (kind := output_kind(outputs)) == "probabilities":
        raise ZsktError(f"expected a student that returns logits, found {kind}; leave the softmax out of it")
    classes = outputs.shape[1]
    if classes != teacher.num_classes:
        raise ZsktError(
            f"expected a student with the teacher's {teacher.num_classes} classes, found {classes}; build it with them"
        )
    check_training(student, noise, outputs.shape)


def save_network(folder: Path, stem: str, network: Teacher, **facts: Any) -> None:
    """Write `stem`.safetensors and `stem`.json; `facts` (how trained, measured accuracy, ...) go into the JSON.

    The JSON goes last: a folder without it does not count as a network.
    """
    write_tensors(folder / f"{stem}.safetensors", network.module.state_dict())
    write_json(folder / f"{stem}.json", describe_network(network) | facts)


def describe_network(network: Teacher) -> dict[str, Any]:
    """What must be known beside the weights, as plain JSON values."""
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


def save_teacher(folder: Path, teacher: Teacher, **facts: Any) -> None:
    """Write a teacher folder; refuses one that already holds a teacher or a run."""
    check_teacher_folder(folder)
    save_network(folder, "teacher", teacher, **facts)


def load_student(folder: str | Path, *, module: nn.Module | None = None, trust: bool = False) -> Teacher:
    """The finished student in a run folder, as a Teacher-like network with its normalisation.

    A student that only its owner's code can make is handed in as `module`, whose weights are replaced in a copy; one
    that a factory made is rebuilt by it, which runs that code, with `trust`. Raises ZsktError saying which it needs.
    """
    return _load(Path(folder), "student", module, trust)


def load_network(folder: str | Path, *, module: nn.Module | None = None, trust: bool = False) -> Teacher:
    """The teacher of a teacher folder or the student of a run folder, whichever `folder` is; see `load_student`."""
    return _load(Path(folder), "student" if (Path(folder) / "student.json").exists() else "teacher", module, trust)


def _load(folder: Path, stem: str, module: nn.Module | None = None, trust: bool = False) -> Teacher:
    path = folder / f"{stem}.json"
    if not path.exists() and is_hub_folder(folder):
        return read_network(folder / "config.json", folder / "model.safetensors", module, trust=trust)
    if not path.exists():
        what = "a folder" if folder.is_dir() else "a file" if folder.exists() else "nothing"
        near = (
            "a run that has not finished? resume it with --resume"
            if (folder / "config.toml").exists()
            else ("make one with zskt teach, zskt import or zskt distill")
        )
        raise ZsktError(f"expected a folder with {stem}.json at {folder}, found {what} without it; {near}")
    return read_network(path, folder / f"{stem}.safetensors", module, trust=trust)


def is_hub_folder(folder: Path) -> bool:
    """Whether `zskt export --format hub` wrote this folder, or another of the same layout."""
    path = folder / "config.json"
    facts = read_json(path) if path.is_file() else None
    return isinstance(facts, dict) and facts.get("model_type") == HUB_TYPE


def read_network(path: Path, weights: Path, module: nn.Module | None = None, *, trust: bool = False) -> Teacher:
    """The network that the JSON at `path` describes, with the tensors of a safetensors file.

    `module` is a network rebuilt by the caller: its weights are replaced in a copy. `trust` lets a factory that the
    JSON names run.
    """
    facts = _checked_facts(path)

    def fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise ZsktError(
                f"{weights} does not fit the {short(facts['model'] or type(network).__name__)} that {path.name} "
                f"describes ({' '.join(str(error).split())[:200]}); write the folder anew"
            ) from error

    if module is not None:
        module = copy.deepcopy(module)
    else:
        how = {"spec": facts["model"]} if facts["model"] is not None else facts.get("rebuild")
        how = how if isinstance(how, dict) else {}
        size = _input_size(facts["input_size"])
        make = functools.partial(rebuild_module, how, path, facts["num_classes"], size, trust=trust)
        if isinstance(how.get("spec"), str) or isinstance(how.get("transformers"), str):
            with unallocated():  # a short file can describe a network that no memory holds
                fill(make(), {name: torch.empty(shape) for name, shape in tensor_shapes(weights).items()})
        module = make()
    tensors, _ = read_tensors(weights)
    for tensor in tensors.values():
        if tensor.is_floating_point():  # float64 stays, all else is widened
            module.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            break
    own = module.state_dict()
    for name, tensor in tensors.items():
        if name in own and (tensor.is_floating_point(), tensor.is_complex()) != (own[name].is_floating_point(), False):
            raise ZsktError(f"expected {own[name].dtype} for {name} in {weights}, found {tensor.dtype}; write it anew")
    fill(module, tensors)
    return Teacher(
        module,
        input_size=facts["input_size"],
        mean=facts["mean"],
        std=facts["std"],
        num_classes=facts["num_classes"],
        class_names=facts.get("class_names"),
    )


def _checked_facts(path: Path) -> dict[str, Any]:
    """The JSON beside a network's weights, after a look at whether it says what a network needs."""
    facts: Any = read_json(path)
    if not isinstance(facts, dict):
        raise ZsktError(f"expected an object in {path}, found {type(facts).__name__}; write the folder anew")

    def numbers(value: Any, *kinds: type) -> bool:
        return isinstance(value, list) and bool(value) and all(type(item) in kinds for item in value)

    right = {
        "format": facts.get("format") == FORMAT,
        "model": "model" in facts and isinstance(facts["model"], str | None),
        "num_classes": type(facts.get("num_classes")) is int,
        "input_size": numbers(facts.get("input_size"), int),
        "mean": numbers(facts.get("mean"), int, float),
        "std": numbers(facts.get("std"), int, float),
        "class_names": facts.get("class_names") is None or numbers(facts["class_names"], str),
    }
    wrong = [name for name, fine in right.items() if not fine]
    if wrong:
        raise ZsktError(f"{path} lacks {', '.join(wrong)} or holds a wrong value there; write the folder anew")
    return facts


def read_weights(path: Path) -> Any:
    """What a `.safetensors` or torch checkpoint file holds, without executing anything in it.

    Torch files go through weights-only loading, with `argparse.Namespace` (which many training scripts store beside
    the weights) allowed by name. Raises ZsktError for anything unreadable, truncated or unsafe.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
    except OSError as error:
        raise cannot("read", path, error) from error
    damaged = None
    if zipped:
        with open_archive(path) as archive:
            try:
                damaged = archive.testzip()
            except Exception as error:
                raise ZsktError(f"{path} is a damaged archive ({first_line(error)}); fetch or save it again") from error
    if damaged is not None:  # torch does not look at checksums
        raise ZsktError(f"{path} is damaged: the checksum of {damaged} is wrong; fetch or save it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols: what matters is whether it loads
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ZsktError(
                f"{path} wants to run {wanted[1]} while loading, which is refused; save the plain state dict "
                "(safetensors or torch.save(model.state_dict(), ...)) and import that"
            ) from error
        raise ZsktError(f"{path} is not a plain torch checkpoint; fetch it again, or save the state dict") from error
    except Exception as error:  # damaged files fail in every way that a parser can
        raise ZsktError(
            f"{path} is truncated or not a weights file ({first_line(error)}); fetch or save it again"
        ) from error
