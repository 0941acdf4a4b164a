"""Checks of a teacher, which is also frozen, and of a pair of teacher and student; N images, K classes."""

import copy
import math

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError, failing, short
from zskt.networks.classifier import Classifier, Output
from zskt.networks.models import Size
from zskt.networks.observe import answer, batchnorm_layers, check_state, evaluating, fixed_batch, logits_of

SMALLEST = 1e-12  # probabilities are clamped to this before the logarithm, so that its gradient is finite


class Logarithm(nn.Module):
    """Turns a network that returns probabilities (N, K) into one that returns their logarithms, which are logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        named = getattr(network, "stages", None)
        if isinstance(named, (tuple, list)):
            self.stages = tuple(f"network.{name}" for name in named)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms (N, K) of the probabilities of images (N, C, H, W)."""
        return logits_of(self.network(images)).clamp_min(SMALLEST).log()


def bare(module: nn.Module) -> nn.Module:
    """The network inside `Logarithm`: what is saved, as `as_teacher` puts the wrapper around it again."""
    return module.network if isinstance(module, Logarithm) else module


def as_teacher(classifier: Classifier, *, copied: bool = True) -> Classifier:
    """A private copy of a classifier: frozen, in eval mode, checked on noise unless it already was.

    Probabilities are turned into their logarithms. Unless `copied` is False, the given classifier is left unchanged.
    Raises ZsktError for a network that cannot be distilled (`probe`) or has another number of classes.
    """
    advice = "remove attributes that are not part of it (locks, open files), or reload it"
    with failing("the network cannot be copied and frozen", advice), torch.no_grad():
        teacher = copy.deepcopy(classifier) if copied else classifier
        check_state(teacher.module, "network")
        check_values(teacher.module, "network")
        for parameter in teacher.parameters():  # TorchScript modules have no requires_grad_
            parameter.requires_grad_(False)
        teacher.eval()
    if teacher.probed == (teacher.module,):
        return teacher
    classes, teacher.output, teacher.notes = probe(teacher.module, teacher.input_size)
    if classes != teacher.num_classes:
        raise ZsktError(f"expected a network with {teacher.num_classes} classes, found {classes} outputs; check both")
    if teacher.output == "probabilities":
        teacher.module = Logarithm(teacher.module).eval()
    teacher.probed = (teacher.module,)
    return teacher


def check_values(module: nn.Module, who: str) -> None:
    """Raise ZsktError for NaN or infinity in parameters or BatchNorm statistics, which outputs may not show."""
    normalising = set(batchnorm_layers(module))
    layers = [(name, layer) for name, layer in module.named_modules() if layer in normalising]
    statistics = [(f"{name}.{kind}", tensor) for name, layer in layers for kind, tensor in layer.named_buffers()]
    for name, tensor in (*module.named_parameters(), *statistics):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ZsktError(f"{short(name)} of the {who} contains NaN or infinity; train it again or fetch it again")


def output_kind(outputs: Tensor) -> Output:
    """Whether outputs (N, K) are logits, probabilities or their logarithms, judged by all rows."""
    values = outputs.detach().double()  # (N, K)
    near = 1e-3 if outputs.dtype in (torch.float32, torch.float64) else 2e-2
    if ((values >= 0) & (values <= 1 + near)).all() and ((values.sum(dim=1) - 1).abs() < near).all():
        return "probabilities"
    if (values <= near).all() and ((values.exp().sum(dim=1) - 1).abs() < near).all():
        return "log-probabilities"
    return "logits"


def probe(module: nn.Module, size: Size) -> tuple[int, Output, tuple[str, ...]]:
    """Check a frozen network on noise of `size` = (C, H, W): its classes, kind of outputs, and notes for the user.

    Three images in two batches, of standard deviation 1 and 3, and one backward pass to the images. Raises ZsktError
    if it cannot be distilled.
    """
    rng = torch.Generator().manual_seed(0)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.randn(3, *size, generator=rng) * torch.tensor([1.0, 1.0, 3.0]).view(3, 1, 1, 1)  # (3, C, H, W)
    noise = noise.to(like.device, like.dtype)
    first = _with_gradient(module, noise[:2].clone())  # (2, K)
    with torch.no_grad():
        try:
            both = logits_of(module(noise))  # (3, K)
        except (Exception, SystemExit) as error:
            raise fixed_batch(2, error) from error
    if both.shape[0] != 3:
        raise ZsktError(f"expected logits for each of 3 images, found {both.shape[0]}; return (batch, classes)")
    if not torch.isfinite(both).all():
        raise ZsktError("the network outputs NaN or infinity for noise images; check its weights")
    notes = []
    kind = output_kind(both)
    if kind == "probabilities":
        notes.append(f"the network returns probabilities: using their logarithms, clamped at log {SMALLEST:g}")
    elif kind == "log-probabilities":
        notes.append("the network returns log-probabilities: using them as logits")
    elif bounded(module, both, noise):
        notes.append(
            "all outputs lie within [0, 1], as those of a sigmoid do, and are taken as logits: if there is a sigmoid, "
            "let the network return its input, or wrap it in a module that returns its torch.logit"
        )
    if not torch.allclose(first, both[:2], rtol=1e-2, atol=1e-2 * float(both.abs().max())):
        notes.append(
            "the output for an image varies between calls or with the rest of the batch: are dropout or BatchNorm in "
            "training mode?"
        )
    return int(both.shape[1]), kind, tuple(notes)


def bounded(module: nn.Module, outputs: Tensor, noise: Tensor) -> bool:
    """Whether outputs (3, K) lie within [0, 1] and stay there for noise (3, C, H, W) a hundred times as strong."""
    if not ((outputs >= 0) & (outputs <= 1)).all():
        return False
    with torch.no_grad():
        strong = logits_of(module(100 * noise))  # (3, K): logits leave [0, 1] as images grow
    return bool(((strong >= 0) & (strong <= 1)).all())


UNIFORM = 0.97
"""Mean entropy of a network's beliefs about noise, as a fraction of the largest, from which on it looks untrained."""


def untrained(teacher: Classifier) -> str:
    """Why a network looks untrained: BatchNorm statistics as initialised, or uniform answers; or nothing."""
    if layers := batchnorm_layers(teacher.module):
        for layer in layers:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            if bool((layer.running_mean != 0).any()) or bool((layer.running_var != 1).any()):
                return ""
        return f"running mean 0 and variance 1 in all of its {len(layers)} BatchNorm layers"
    pixels = torch.rand(64, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    with evaluating(teacher):
        logs = teacher(teacher.normalise(pixels)).double().log_softmax(dim=1)  # (64, K)
    entropy = float(-(logs.exp() * logs).sum(dim=1).mean()) / math.log(teacher.num_classes)
    return f"all classes nearly equally likely for noise (entropy {entropy:.3f} of 1)" if entropy > UNIFORM else ""


def _with_gradient(module: nn.Module, noise: Tensor) -> Tensor:
    """The outputs (2, K) for two images; raises ZsktError unless gradients reach the images."""
    images = noise.requires_grad_() * 1  # not a leaf, like a generator's images
    with torch.enable_grad():
        outputs = answer(module, images)  # (2, K)
    if images._version:
        raise ZsktError("the network changes its input images in place; use out-of-place operations")
    if not outputs.is_floating_point():
        advice = "return their real part" if outputs.is_complex() else "if there is an argmax, return its input"
        raise ZsktError(f"expected logits as floating-point numbers, found {outputs.dtype}; {advice}")
    if not torch.isfinite(outputs).all():
        raise ZsktError("the network outputs NaN or infinity for noise images; check its weights")
    if outputs.shape[1] < 2:
        raise ZsktError("expected a classifier of at least 2 classes, found 1 output; return two logits instead of one")
    unequal = torch.linspace(1, 2, outputs.shape[1]).to(outputs)  # (K,): the plain sum of probabilities has no gradient
    gradient = None
    if outputs.requires_grad:
        with failing("the backward pass of the network fails", "check its in-place operations"):
            (gradient,) = torch.autograd.grad((outputs * unequal).sum(), noise, allow_unused=True)  # (2, C, H, W)
    if gradient is None:
        raise ZsktError(
            "no gradient reaches the images, which distillation needs: remove torch.no_grad, inference_mode, integer "
            "conversions, argmax or NumPy from the network"
        )
    if not torch.isfinite(gradient).all():
        raise ZsktError("the gradient with respect to noise images is NaN or infinite; check the network's weights")
    return outputs.detach()


def check_training(student: nn.Module, images: Tensor, shape: torch.Size) -> None:
    """Check a copy of the student with one forward and backward pass in training mode."""
    unchanged = torch.random.fork_rng([images.device] if images.is_cuda else [])
    what = "the student cannot be copied and trained on a batch of two"
    with failing(what, "fix its training mode"), unchanged, torch.enable_grad():
        twin = copy.deepcopy(student)
        twin.train()
        logits = logits_of(twin(images))  # (2, K)
        trained = [p for p in twin.parameters() if p.requires_grad]
        weights = torch.linspace(1, 2, logits.shape[1]).to(logits)  # (K,): unequal, in case of a softmax
        reached = logits.requires_grad and any(
            gradient is not None
            for gradient in torch.autograd.grad((logits * weights).sum(), trained, allow_unused=True)
        )
    if logits.shape != shape or not reached:
        found = f"shape {tuple(logits.shape)}" if logits.shape != shape else "logits without a gradient"
        raise ZsktError(
            f"expected logits of shape {tuple(shape)} from the student in training mode as in eval mode, found "
            f"{found}; fix its training mode"
        )


def check_pair(teacher: Classifier, student: nn.Module) -> None:
    """Raise ZsktError unless the student accepts the teacher's images, has its classes and can be trained."""
    check_state(student, "student")
    check_values(student, "student")
    like = next((p for p in student.parameters() if p.requires_grad), None)
    if like is None:
        raise ZsktError("expected a student with trainable parameters, found none; call student.requires_grad_()")
    theirs = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), like.dtype)
    if like.dtype != theirs or like.dtype not in (torch.float32, torch.float64):
        convert = "student.float()" if theirs == torch.float32 else "student.double()"
        if theirs not in (torch.float32, torch.float64):
            convert = "teacher.float()" if like.dtype == torch.float32 else "teacher.float() and student.float()"
        raise ZsktError(
            f"expected teacher and student both in float32 or both in float64, found {theirs} and {like.dtype}; "
            f"convert, as in {convert}; for bfloat16 arithmetic use precision bf16"
        )
    noise = torch.randn(2, *teacher.input_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    size = " x ".join(map(str, teacher.input_size))
    with failing(f"the student rejects the teacher's images of {size}", "build it for that size"), evaluating(student):
        outputs = logits_of(student(noise))  # (2, K)
    if (kind := output_kind(outputs)) == "probabilities":
        raise ZsktError(f"expected a student that returns logits, found {kind}; remove its softmax")
    classes = outputs.shape[1]
    if classes != teacher.num_classes:
        raise ZsktError(
            f"expected a student with the teacher's {teacher.num_classes} classes, found {classes}; give it as many"
        )
    check_training(student, noise, outputs.shape)
