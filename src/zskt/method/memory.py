"""What a run needs in memory, found before it starts: a lower bound, so that nothing is refused that would have fitted.

T, S, G: bytes that a backward pass needs of one forward of teacher, student and generator for one image.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError, out_of_memory
from zskt.method.build import make_generator
from zskt.method.config import Config
from zskt.networks import ranks
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.networks.observe import blank_images
from zskt.networks.rebuild import unallocated
from zskt.runtime import pick_device


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs at least."""

    fixed: int
    """networks, gradients, optimisers and what is stored of pseudo images"""
    per_image: dict[str, int]
    """setting of a batch's size -> bytes for each image of it"""

    def most(self, name: str, memory: int) -> int:
        """The largest batch that fits `memory`."""
        return max(0, memory - self.fixed) // max(1, self.per_image[name])


def need(teacher: Classifier, student: nn.Module, config: Config, own: int = 0) -> Need:
    """What a run of one of our methods needs, from one forward of each network for two images.

    `own` images of the user's join those of a bank.
    """
    frozen, twin = as_teacher(teacher), copy.deepcopy(student).eval()
    bf16 = config.machine.precision == "bf16"
    images = blank_images(student, teacher.input_size).requires_grad_()  # (2, C, H, W)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not images.is_cuda):
        t, s = kept_bytes(frozen.module, images), kept_bytes(twin, images)
    g = generator_bytes = 0
    if not config.bank.pixels:
        with unallocated(), torch.enable_grad():
            generator = make_generator(teacher, config).to("meta")  # its normalisation is the teacher's
            g = kept_bytes(generator, torch.empty(2, config.generator.latent)) // (2 if bf16 else 1)
            generator_bytes = _state_bytes(generator)
    image = images[0].nbytes
    stored = config.replay.capacity * config.batch_size * images[0].numel() * 2  # in bfloat16
    per_image = {"batch_size": t + s + g + image}
    if config.method == "bank":
        views = config.bank.views * (2 * teacher.num_classes + 3)  # logits in half precision, and the views
        stored = (config.bank.rounds * config.bank.batch_size + own) * (images[0].numel() + views)
        per_image = {"bank.batch_size": t + s + g + image, "batch_size": s + image}
    # Of several ranks each has its share, and those of one machine its memory together.
    together = ranks.beside() if pick_device(config.machine.device).type == "cpu" else 1
    stored = stored * together // ranks.size()
    per_image = {name: size * together // ranks.size() for name, size in per_image.items()}
    # Weights, gradients and Adam's two moments.
    networks = _state_bytes(frozen) + 4 * (_state_bytes(twin) + generator_bytes)
    return Need(together * networks + stored, per_image)


def kept_bytes(module: nn.Module, inputs: Tensor) -> int:
    """Bytes per input that a backward pass needs of a forward of `inputs` (2, ...), apart from weights."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:  # not the tensor, which a graph that holds itself would never let go
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        outputs = module(inputs)
    del outputs
    return sum(storage.nbytes() for storage in kept.values()) // len(inputs)


def _state_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run can have on a device, swap included; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["MemAvailable"] + sizes["SwapFree"]


def check_memory(teacher: Classifier, student: nn.Module, config: Config, own: int = 0) -> None:
    """Raise UsageError for a run that cannot fit the memory of its device, with the largest batch that could."""
    memory = free_memory(pick_device(config.machine.device))
    if memory is None:
        return
    found = need(teacher, student, config, own)
    if found.fixed > memory:
        raise UsageError(
            f"this run needs at least {_size(found.fixed)} of memory beside its batches, found {_size(memory)}: use "
            f"smaller networks, {'fewer images, ' if own else ''}generator.width, bank.rounds or replay.capacity"
        )
    for name in found.per_image:
        if _batch(config, name) > found.most(name, memory):
            needed = found.fixed + _batch(config, name) * found.per_image[name]
            raise UsageError(
                f"{name} = {_batch(config, name):,} needs at least {_size(needed)} of memory, found {_size(memory)}: "
                f"expected at most {found.most(name, memory):,}"
            )


@contextlib.contextmanager
def naming_batch_that_fits(teacher: Classifier, student: nn.Module, config: Config) -> Iterator[None]:
    """The boundary at which running out of memory becomes an error with the batch that would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        memory = free_memory(pick_device(config.machine.device))
        found = need(teacher, student, config)
        name = max(found.per_image, key=lambda name: _batch(config, name) * found.per_image[name])
        most = _batch(config, name) // 2
        if memory is not None:
            most = min(most, found.most(name, memory) // 2)  # what is needed besides is up to as much again
        advice = f"{name} = {most:,} should fit" if most > 1 else "use smaller networks or another device"
        raise ZsktError(f"out of memory with {name} = {_batch(config, name):,}: {advice}") from error


def _batch(config: Config, name: str) -> int:
    return config.bank.batch_size if name == "bank.batch_size" else config.batch_size


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
