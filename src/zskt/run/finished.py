"""Pseudo images from a finished run on disk."""

import functools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from zskt.errors import ZsktError
from zskt.files import read_json, read_tensors
from zskt.method.config import read_config
from zskt.method.generator import Generator, pseudo_images
from zskt.method.protocol import Make, check_method
from zskt.method.recipe import describe_method
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.run.checkpoint import restoring

Sample = Callable[[int, int], Tensor]
"""(n, seed) -> pseudo images (n, C, H, W), normalised"""


def sampler(
    folder: str | Path, network: Classifier, *, method: Make | None = None, teacher: Classifier | None = None
) -> Sample:
    """A function that draws pseudo images from the finished run in `folder`, whose student is `network`.

    A run with a custom method needs that `method` and the `teacher`. Raises ZsktError if they are missing or do not
    fit.
    """
    folder = Path(folder)
    config = read_config(folder / "config.toml")
    if config.method == "belief_matching":
        generator = load_generator(folder, network)
        return functools.partial(pseudo_images, generator, generator.latent)
    if method is None or teacher is None:
        raise ZsktError(
            f"{folder} uses a custom method, {config.method}: give --teacher, --method FILE:FUNCTION and "
            "--trust to draw its images"
        )
    if (given := describe_method(method)) != config.method:
        raise ZsktError(f"expected the method of {folder}, {config.method}, found {given}; give the same one")
    recorded = read_json(folder / "student.json").get("teacher_fingerprint")
    if (fingerprint := teacher.fingerprint()) != recorded:
        raise ZsktError(
            f"expected the teacher of {folder}, {str(recorded)[:12]}, found {fingerprint[:12]}; give the same one"
        )
    student = network.module.requires_grad_()
    built = check_method(method(as_teacher(teacher), student, config), student, config.method)
    built.close()
    with restoring(folder):
        for name, part in built.modules().items():
            part.load_state_dict(read_tensors(folder / f"{name}.safetensors")[0])
        built.load_state_dict(read_tensors(folder / "method.safetensors")[0])
    network.requires_grad_(False).eval()
    return built.sample


def load_generator(folder: str | Path, network: Classifier) -> Generator:
    """The generator of a finished run of belief matching, whose student is `network`."""
    folder = Path(folder)
    config = read_config(folder / "config.toml")
    if config.generator.width == "auto":
        raise ZsktError(
            f"expected a number for generator.width in {folder / 'config.toml'}, found auto; restore the number"
        )
    generator = Generator(config.generator.latent, network.input_size, config.generator.width)
    with restoring(folder):
        generator.load_state_dict(read_tensors(folder / "generator.safetensors")[0])
    return generator
