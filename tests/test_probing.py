"""What a few forwards of noise tell about a classifier, and what they refuse."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zskt
from small import SMALL_BANK, Tokens, refused, student_for
from zskt.errors import ZsktError
from zskt.networks.checks import SMALLEST, Logarithm, as_teacher, check_pair, output_kind, probe, untrained
from zskt.networks.observe import logits_of

SIZE = (3, 8, 8)
TINY = {"batch_size": 4, "generator.width": 8, "generator.latent": 8, "student.updates": 1}


class Small(nn.Module):
    """A convolution, a norm without BatchNorm, dropout, and whatever `after` makes of images and logits."""

    def __init__(
        self, classes: int = 5, channels: int = 3, after: Callable[[Tensor, Tensor], Any] = lambda x, logits: logits
    ) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(channels, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.Dropout(0.5)
        self.fc = nn.Linear(4, classes)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        logits = self.fc(self.dropout(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3))))
        return self.after(x, logits)


class Pair(NamedTuple):
    features: Tensor
    logits: Tensor


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def teacher_of(module: nn.Module, size: tuple[int, int, int] = SIZE) -> zskt.Classifier:
    return as_teacher(zskt.Classifier(module, input_size=size, mean=[0.5] * size[0], std=[0.25] * size[0]))


@pytest.mark.parametrize(
    "after",
    [
        lambda x, logits: logits,
        lambda x, logits: (logits, x),
        lambda x, logits: [{"aux": 1}, logits],
        lambda x, logits: {"aux": x, "logits": logits},
        lambda x, logits: SimpleNamespace(logits=logits, hidden_states=None),
        lambda x, logits: Pair(x, logits),
    ],
    ids=["tensor", "tuple", "list", "dictionary", "object", "named tuple"],
)
def test_logits_of_whatever_a_network_returns(after: Callable[[Tensor, Tensor], Any]) -> None:
    x, logits = torch.rand(2, *SIZE), torch.rand(2, 5)
    assert logits_of(after(x, logits)) is logits
    teacher = teacher_of(Small(after=after))
    plain = Small().eval()
    plain.load_state_dict(teacher.module.state_dict())
    assert torch.equal(teacher(x), plain(x))
    assert (teacher.num_classes, teacher.output, teacher.notes) == (5, "logits", ())
    result = zskt.distill(
        teacher, Small(after=after), steps=2, settings=TINY | SMALL_BANK
    )  # a student may return the same
    assert result.finished


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.rand(2, 5, 1), "a tensor of shape (2, 5, 1)"),
        ((torch.rand(2), torch.rand(2, 5)), "tuple with a tensor of shape (2,)"),
        ({"scores": torch.rand(2, 5)}, "dict without logits, with scores; wrap the network in a module whose forward"),
        ({"boxes": torch.rand(2, 4, 3), "cls_score": torch.rand(2, 5)}, "returns its output['cls_score'], if that is"),
        ({"boxes": torch.rand(2, 4, 3)}, "dict without logits, with boxes; wrap the network"),
        ({}, "dict without logits, with nothing; wrap the network"),
        (None, "NoneType without logits"),
        ({"logits": [1.0]}, "dict without logits"),
    ],
    ids=["map", "first of a tuple", "other key", "one of two keys", "no key", "empty", "nothing", "list"],
)
def test_what_holds_no_logits_is_refused(output: Any, words: str) -> None:
    message = refused(lambda: logits_of(output))
    assert "expected a network that returns logits" in message
    assert words in message


SIZES = [(2, (1, 8, 8)), (37, (4, 28, 28)), (1000, (3, 32, 96)), (1000, (3, 224, 224))]


@pytest.mark.parametrize(("classes", "size"), SIZES, ids=str)
def test_classes_and_sizes(classes: int, size: tuple[int, int, int]) -> None:
    for module in (Tokens(size=size, classes=classes), Small(classes, size[0])):
        teacher = teacher_of(module, size)
        assert (teacher.num_classes, teacher.has_batchnorm) == (classes, False)
        assert module.training  # whoever handed it in still has it as it was
    few = TINY | SMALL_BANK | {"bank.horizontal_flip": False}
    assert zskt.distill(teacher, student_for(teacher), steps=2, settings=few).finished


@pytest.mark.parametrize("sharpness", [1.0, 1e4])
def test_probabilities_are_read_as_their_logarithms(sharpness: float) -> None:
    raw = Small()
    with torch.no_grad():
        raw.fc.weight.mul_(sharpness)  # so sure that most probabilities are 0
    soft = Small(after=lambda x, logits: logits.softmax(dim=1))
    soft.load_state_dict(raw.state_dict())
    teacher, wanted = teacher_of(soft), teacher_of(raw)
    assert teacher.output == "probabilities"
    assert "logarithm" in " ".join(teacher.notes)
    x = torch.randn(6, *SIZE, requires_grad=True)
    logits = teacher(x)
    expected = wanted(x).log_softmax(dim=1).clamp_min(torch.tensor(SMALLEST).log())
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert torch.isfinite(gradient).all()
    result = zskt.distill(teacher, student_for(teacher), "zskt-fresh", steps=2, settings=TINY)
    assert result.finished


def test_a_module_put_in_later_is_checked_too() -> None:
    teacher = teacher_of(Small())
    teacher.module = Small(after=lambda x, logits: logits.softmax(dim=1))
    found = as_teacher(teacher)
    assert found.output == "probabilities"
    assert as_teacher(found).output == "probabilities"  # not checked again: it returns their logarithms


def test_log_probabilities_serve_as_logits() -> None:
    teacher = teacher_of(Small(after=lambda x, logits: logits.log_softmax(dim=1)))
    assert teacher.output == "log-probabilities"
    assert not isinstance(teacher.module, Logarithm)
    assert "log-probabilities" in teacher.notes[0]


def test_kinds_of_output() -> None:
    logits = torch.randn(3, 4)
    assert output_kind(logits) == "logits"
    assert output_kind(logits.softmax(dim=1)) == "probabilities"
    assert output_kind(logits.half().softmax(dim=1)) == "probabilities"
    assert output_kind(logits.log_softmax(dim=1)) == "log-probabilities"
    assert output_kind(logits.sigmoid()) == "logits"
    assert output_kind(torch.eye(3) + 1) == "logits"


def test_a_sigmoid_is_noted_with_what_to_do() -> None:
    """Each output in [0, 1] and no probabilities of one class: no logits, though nothing else about them is wrong."""
    teacher = teacher_of(Small(after=lambda x, logits: logits.sigmoid()))
    assert teacher.output == "logits"
    (note,) = teacher.notes
    assert "as those of a sigmoid do, and are taken as logits" in note
    assert "return its input" in note
    undone = teacher_of(Small(after=lambda x, logits: torch.logit(logits.sigmoid())))  # what it advises
    assert undone.notes == ()


@pytest.mark.parametrize(
    "after",
    [
        lambda x, logits: logits.softmax(dim=1),
        lambda x, logits: 0.5 + 0.3 * x.mean(dim=(2, 3))[:, :1] + 0 * logits,  # by chance, on ordinary images
        lambda x, logits: F.relu(logits),
    ],
    ids=["softmax", "small logits", "relu"],
)
def test_what_is_no_sigmoid_is_not_called_one(after: Callable[[Tensor, Tensor], Any]) -> None:
    class Growing(Small):
        def forward(self, x: Tensor) -> Any:
            return after(x, self.fc(x.mean(dim=(2, 3)).repeat(1, 2)[:, :4] * 10))

    assert not any("sigmoid" in note for note in teacher_of(Growing()).notes)


def batch_normalised() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def test_a_network_as_initialised_looks_untrained() -> None:
    assert "running mean 0 and variance 1 in all of its 1 BatchNorm layers" in untrained(teacher_of(batch_normalised()))
    module = batch_normalised()
    module(torch.randn(8, *SIZE))  # one batch in training mode moves the statistics
    assert untrained(teacher_of(module)) == ""
    for scale, words in ((0.1, "all classes nearly equally likely for noise (entropy "), (50, "")):
        network = Small()
        with torch.no_grad():
            network.fc.weight.mul_(scale)
            network.fc.bias.zero_()
        found = untrained(teacher_of(network))
        assert found.startswith(words)
        assert bool(found) is bool(words)


def test_a_student_that_returns_probabilities_is_refused() -> None:
    with pytest.raises(ZsktError, match="remove its softmax"):
        zskt.distill(teacher_of(Small()), Small(after=lambda x, y: y.softmax(dim=1)), steps=1)


class Detached(Small):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Inferring(Small):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            return super().forward(x)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(256, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.table(x.long() if x.dtype == torch.uint8 else x).mean(dim=(1, 2, 3)))


class InPlace(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5))


class FixedBatch(Small):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(self.batch, *SIZE))


def spoilt(what: float) -> nn.Module:
    module = Small()
    nn.init.constant_(module.fc.bias[:1], what)
    return module


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Detached(), "torch.no_grad"),
        (Inferring(), "no gradient reaches the images"),
        (Small(after=lambda x, y: torch.from_numpy(np.exp(y.detach().numpy()))), "NumPy"),
        (Small(after=lambda x, y: F.one_hot(y.argmax(dim=1), 5)), "if there is an argmax"),
        (Small(after=lambda x, y: F.one_hot(y.argmax(dim=1), 5).float()), "no gradient reaches the images"),
        (Small(after=lambda x, y: y.detach() + torch.zeros(5, requires_grad=True)), "no gradient reaches the images"),
        (Embedding(), "takes integer images"),
        (InPlace(), "in place"),
        (FixedBatch(8), "batches of exactly 8"),
        (FixedBatch(2), "batches of exactly 2"),
        (spoilt(float("nan")), "NaN or infinity"),
        (spoilt(float("inf")), "NaN or infinity"),
        (Small(classes=1), "at least 2 classes, found 1"),
        (Small(after=lambda x, y: y[:1]), "each of 3 images, found 1"),
        (Small(after=lambda x, y: (y.detach() * 0 + x.mean(dim=(1, 2, 3))[:, None] * 0).sqrt() + y), "gradient"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_cannot_be_distilled_is_refused_with_the_reason(module: nn.Module, words: str) -> None:
    assert words in refused(lambda: teacher_of(module))


def test_an_unsteady_network_is_noted() -> None:
    teacher = teacher_of(Small(after=lambda x, logits: F.dropout(logits, 0.9)))
    assert "varies between calls" in teacher.notes[0]


def test_what_cannot_be_copied_is_refused() -> None:
    module = Small()
    module.lock = __import__("threading").Lock()
    assert "cannot be copied" in refused(lambda: teacher_of(module))


def test_the_probe_never_trains_and_leaves_no_gradient() -> None:
    class Watchful(Small):
        def train(self, mode: bool = True) -> "Watchful":
            assert not mode
            return super().train(mode)

    module = Watchful().eval()
    random = torch.get_rng_state()
    probe(module, SIZE)
    teacher_of(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(("place", "value"), [("1.running_var", float("inf")), ("1.running_mean", float("nan"))])
def test_statistics_that_no_output_shows_are_looked_at(place: str, value: float) -> None:
    """Divided by the root of infinity everything is 0, and finite."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    network.state_dict()[place].fill_(value)
    for work in (lambda: teacher_of(network), lambda: check_pair(teacher_of(Small()), network)):
        assert f"{place} of the" in refused(work)


def test_a_parameter_that_is_not_finite_is_named() -> None:
    network = Small()
    nn.init.constant_(network.fc.bias, float("nan"))
    assert "fc.bias of the network contains NaN or infinity" in refused(lambda: teacher_of(network))
