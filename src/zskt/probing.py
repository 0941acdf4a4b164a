"""What a classifier does with noise, found before anything is built on it: classes, kind of output, gradients.

N images, K classes. Nothing here switches a network into training mode, but for a copy of a student.
"""

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zskt.features import logits_of
from zskt.files import ZsktError, first_line, short

Output = Literal["logits", "probabilities", "log-probabilities"]
OUTPUTS: tuple[Output, ...] = get_args(Output)

SMALLEST = 1e-12
"""Probabilities are raised to it before the logarithm, whose gradient then stays finite."""

_BATCHES = (1, 4, 8, 16, 32, 64)  # tried where a batch of two is refused: perhaps the network is fixed to one of them


@dataclass(frozen=True)
class Probe:
    """What a few forwards of noise have shown."""

    num_classes: int
    output: Output
    notes: tuple[str, ...]
    """lines for the user: nothing that stops the work"""


class Logarithm(nn.Module):
    """A network that returns probabilities (N, K), read as their logarithms: logits of the same softmax."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        named = getattr(network, "stages", None)
        if isinstance(named, (tuple, list)):
            self.stages = tuple(f"network.{name}" for name in named)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms (N, K) of the probabilities of images (N, C, H, W)."""
        return logits_of(self.network(images)).clamp_min(SMALLEST).log()


def output_kind(outputs: Tensor) -> Output:
    """Whether outputs (N, K) are logits, or probabilities or their logarithms; every row has to agree."""
    values = outputs.detach().double()  # (N, K)
    near = 1e-3 if outputs.dtype in (torch.float32, torch.float64) else 2e-2
    if ((values >= 0) & (values <= 1 + near)).all() and ((values.sum(dim=1) - 1).abs() < near).all():
        return "probabilities"
    if (values <= near).all() and ((values.exp().sum(dim=1) - 1).abs() < near).all():
        return "log-probabilities"
    return "logits"


def probe(module: nn.Module, size: tuple[int, int, int]) -> Probe:
    """Show noise to a frozen network for images of `size` = (C, H, W); raises ZsktError for what cannot be distilled.

    Three images in two batches, of unit and of three times that deviation, and one backward pass to the images.
    """
    rng = torch.Generator().manual_seed(0)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.randn(3, *size, generator=rng) * torch.tensor([1.0, 1.0, 3.0]).view(3, 1, 1, 1)  # (3, C, H, W)
    noise = noise.to(like.device, like.dtype)
    first = _with_gradient(module, noise[:2].clone(), size)  # (2, K)
    with torch.no_grad():
        try:
            both = logits_of(module(noise))  # (3, K)
        except (Exception, SystemExit) as error:
            raise _fixed_batch(2, error) from error
    if both.shape[0] != 3:
        raise ZsktError(f"expected logits for each of 3 images, found {both.shape[0]}; return (batch, classes)")
    if not torch.isfinite(both).all():
        raise ZsktError("the network answers noise with NaN or infinity; check its weights")
    notes = []
    kind = output_kind(both)
    if kind == "probabilities":
        notes.append(f"the network returns probabilities: their logarithm is taken, cut off at {SMALLEST:g}")
    elif kind == "log-probabilities":
        notes.append("the network returns log-probabilities, which serve as logits")
    if not torch.allclose(first, both[:2], rtol=1e-2, atol=1e-2 * float(both.abs().max())):
        notes.append(
            "the network answers the same image differently from call to call or beside other images: dropout or "
            "BatchNorm in training mode?"
        )
    return Probe(int(both.shape[1]), kind, tuple(notes))


def _with_gradient(module: nn.Module, noise: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The outputs (2, K) for two images, once it is sure that gradients reach the images."""
    images = noise.requires_grad_() * 1  # not a leaf, as a generator's images are none
    with torch.enable_grad():
        try:
            outputs = logits_of(module(images))  # (2, K)
        except ZsktError:
            raise
        except (Exception, SystemExit) as error:  # somebody else's module may refuse a shape in any way
            raise _refusal(module, noise.detach(), size, error) from error
    if images._version:
        raise ZsktError("the network changes its images in place, which others see after it; make that out of place")
    if not outputs.is_floating_point():
        advice = "return their real part" if outputs.is_complex() else "an argmax inside? Return what it is taken of"
        raise ZsktError(f"expected logits as floating-point numbers, found {outputs.dtype}: {advice}")
    if not torch.isfinite(outputs).all():
        raise ZsktError("the network answers noise with NaN or infinity; check its weights")
    if outputs.shape[1] < 2:
        raise ZsktError("expected a classifier of at least 2 classes, found 1 output")
    unequal = torch.linspace(1, 2, outputs.shape[1]).to(outputs)  # (K,): probabilities have a sum without gradient
    gradient = None
    if outputs.requires_grad:
        try:
            (gradient,) = torch.autograd.grad((outputs * unequal).sum(), noise, allow_unused=True)  # (2, C, H, W)
        except Exception as error:
            raise ZsktError(
                f"the backward pass of the network fails ({first_line(error)}); see what it changes in place"
            ) from error
    if gradient is None:
        raise ZsktError(
            "no gradient reaches the images, and without it there is no search: the network runs under torch.no_grad "
            "or inference_mode, or goes through integers, an argmax or NumPy; take that out"
        )
    if not torch.isfinite(gradient).all():
        raise ZsktError("the gradient of the network with respect to noise is NaN or infinite; check its weights")
    return outputs.detach()


def _refusal(module: nn.Module, noise: Tensor, size: tuple[int, int, int], error: BaseException) -> ZsktError:
    """Why two images were not taken: another batch size, integers, or another image size."""

    def taken(images: Tensor) -> bool:
        try:
            with torch.no_grad():
                module(images)
        except (Exception, SystemExit):
            return False
        return True

    for count in _BATCHES:
        if taken(noise[:1].expand(count, *size).contiguous()):
            return _fixed_batch(count, error)
    if any(taken(noise.to(dtype)) for dtype in (torch.uint8, torch.int64)):
        return ZsktError("the network takes integer images, which no gradient reaches; let it take floating-point ones")
    return ZsktError(
        f"the network does not take images of {' x '.join(map(str, size))} ({first_line(error)}); check the input size"
    )


def _fixed_batch(count: int, error: BaseException) -> ZsktError:
    return ZsktError(
        f"the network takes batches of exactly {count} ({first_line(error)}); export it with a dynamic batch, as in "
        "torch.export.export(..., dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
    )


def check_state(module: nn.Module, who: str) -> None:
    """Raise ZsktError, with the name, unless all that a network remembers are ordinary tensors with values."""
    try:
        state = module.state_dict()
    except (Exception, SystemExit) as error:
        raise ZsktError(f"the {who} does not give its state ({first_line(error)}); mend its state_dict") from error
    for name, value in state.items():
        found = "" if isinstance(value, Tensor) else f"a {type(value).__name__}, which no weights file holds"
        if is_lazy(value):
            found = "one without a shape yet; show the network an image first"
        elif isinstance(value, Tensor) and value.is_meta:
            found = "one without values, on the meta device; load its weights"
        elif isinstance(value, Tensor) and value.layout is not torch.strided:
            found = f"one of layout {value.layout}; make it dense"
        if found:
            raise ZsktError(f"expected an ordinary tensor in {short(name)} of the {who}, found {found}")


def check_training(student: nn.Module, images: Tensor, shape: torch.Size) -> None:
    """One forward and backward in training mode, of a copy, which may do otherwise than in eval mode."""
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.enable_grad():
            twin = copy.deepcopy(student)
            twin.train()
            logits = logits_of(twin(images))  # (2, K)
            trained = [p for p in twin.parameters() if p.requires_grad]
            weights = torch.linspace(1, 2, logits.shape[1]).to(logits)  # (K,): unequal, for a softmax inside
            reached = logits.requires_grad and any(
                gradient is not None
                for gradient in torch.autograd.grad((logits * weights).sum(), trained, allow_unused=True)
            )
    except ZsktError:
        raise
    except (Exception, SystemExit) as error:
        raise ZsktError(
            f"the student cannot be copied and trained on a batch of two ({first_line(error)}); mend its training mode"
        ) from error
    if logits.shape != shape or not reached:
        found = f"shape {tuple(logits.shape)}" if logits.shape != shape else "ones that no gradient passes"
        raise ZsktError(
            f"expected logits of shape {tuple(shape)} from the student in training mode as in eval mode, found "
            f"{found}; mend its training mode"
        )
