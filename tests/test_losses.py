"""Every loss against its formula, written out in numpy or plain loops."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from zskt.errors import ZsktError
from zskt.method import losses
from zskt.method.config import GeneratorLoss
from zskt.method.terms import generator_terms
from zskt.method.updates import Beliefs
from zskt.networks.observe import Observation

N, K = 6, 5
Logits = tuple[Tensor, Tensor]


@pytest.fixture
def logits() -> Logits:
    rng = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, N, K, dtype=torch.float64, generator=rng)
    return student, teacher


def softmax(row: Tensor, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(float(x) / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("scale", "divisor"), [("batchmean", N), ("per_class", N * K)])
def test_forward_kl(logits: Logits, temperature: float, scale: losses.Scale, divisor: int) -> None:
    student, teacher = logits
    total = sum(kl(softmax(t, temperature), softmax(s, temperature)) for s, t in zip(student, teacher, strict=True))
    found = losses.forward_kl(student, teacher, temperature=temperature, scale=scale)
    assert float(found) == pytest.approx(temperature**2 * total / divisor, rel=1e-12)


def test_an_adversary_may_count_only_what_both_networks_agree_on(logits: Logits) -> None:
    """Source: CMI and Fast: the KL of an image counts 0 where student and teacher differ in its class."""
    student, teacher = logits
    student[:2] = teacher[:2] + 0.1 * student[:2]
    weights = losses.agreement(student, teacher)
    assert weights.tolist() == [float(s.argmax() == t.argmax()) for s, t in zip(student, teacher, strict=True)]
    assert 0 < weights.sum() < N
    pairs = zip(student, teacher, weights.tolist(), strict=True)
    total = sum(kl(softmax(t), softmax(s)) for s, t, agree in pairs if agree)
    found = losses.forward_kl(student, teacher, weights=weights)
    assert float(found) == pytest.approx(total / N, rel=1e-12)
    images = torch.zeros(N, 1, 2, 2)
    term = generator_terms(GeneratorLoss(kl=-2.0, kl_scale="batchmean", kl_where="agreeing"))["kl"]
    beliefs = Beliefs(images, None, Observation(teacher), Observation(student))
    assert float(term(beliefs)) == pytest.approx(-2 * total / N, rel=1e-12)


def test_per_class_is_what_the_released_code_computes(logits: Logits) -> None:
    student, teacher = logits
    with pytest.warns(UserWarning, match="batchmean"):  # torch's own advice against it
        released = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1))
    torch.testing.assert_close(losses.forward_kl(student, teacher, scale="per_class"), released)


def test_l1_logits(logits: Logits) -> None:
    student, teacher = (x.tolist() for x in logits)
    expected = sum(abs(student[n][k] - teacher[n][k]) for n, k in np.ndindex(N, K)) / (N * K)
    assert float(losses.l1_logits(*logits)) == pytest.approx(expected, rel=1e-12)


def test_jensen_shannon(logits: Logits) -> None:
    student, teacher = (4 * side for side in logits)  # some probabilities are clipped
    expected, clipped = 0.0, 0
    for s, t in zip(map(softmax, student / 3), map(softmax, teacher / 3), strict=True):
        middle = [(a + b) / 2 for a, b in zip(s, t, strict=True)]
        clipped += sum(p < 0.01 for p in s + t + middle)
        s, t, middle = ([min(0.99, max(0.01, p)) for p in side] for side in (s, t, middle))
        expected += (kl(middle, s) + kl(middle, t)) / 2 / N
    assert clipped
    assert float(losses.jensen_shannon(student, teacher)) == pytest.approx(expected, rel=1e-6)
    assert float(losses.jensen_shannon(teacher, student)) == pytest.approx(expected, rel=1e-6)
    assert expected > 0


def test_jensen_shannon_of_certain_logits_has_no_gradient(logits: Logits) -> None:
    student, _ = logits
    assert float(losses.jensen_shannon(student, student)) == pytest.approx(0, abs=1e-12)
    certain = (10_000 * torch.eye(2, dtype=torch.float64)).requires_grad_()
    found = losses.jensen_shannon(certain, certain.detach().flip(0))
    assert float(found.detach()) == pytest.approx(0.5 * math.log(0.5 / 0.01) + 0.5 * math.log(0.5 / 0.99), abs=1e-12)
    found.backward()
    assert certain.grad is not None
    assert not certain.grad.any()


def test_attention_transfer_with_unequal_channels() -> None:
    rng = np.random.default_rng(0)
    shapes = [((3, 2, 4, 6), (3, 5, 4, 6)), ((3, 7, 2, 3), (3, 4, 2, 3))]  # (N, C, H, W) of student and teacher
    pairs = [(rng.normal(size=a), rng.normal(size=b)) for a, b in shapes]

    def attention(x: np.ndarray) -> np.ndarray:
        maps = (x**2).mean(axis=1).reshape(len(x), -1)  # (N, H W)
        return maps / np.sqrt((maps**2).sum(axis=1, keepdims=True))

    expected = sum(((attention(a) - attention(b)) ** 2).mean() for a, b in pairs)
    student, teacher = ([torch.from_numpy(x) for x in side] for side in zip(*pairs, strict=True))
    assert float(losses.attention_transfer(student, teacher)) == pytest.approx(expected, rel=1e-12)
    for few, many in (([], []), (student[:1], teacher)):
        with pytest.raises(ZsktError, match=r"student\.loss\.attention"):
            losses.attention_transfer(few, many)


def test_attention_of_unequal_resolutions_is_compared_at_the_coarser() -> None:
    rng = np.random.default_rng(0)
    shapes = [((3, 2, 8, 6), (3, 5, 4, 3)), ((3, 2, 2, 6), (3, 5, 4, 3)), ((3, 1, 5, 5), (3, 1, 3, 2))]
    pairs = [(rng.normal(size=a), rng.normal(size=b)) for a, b in shapes]

    def attention(x: np.ndarray, height: int, width: int) -> np.ndarray:
        maps = (x**2).mean(axis=1)  # (N, H, W)
        _, h, w = maps.shape
        # cell i of n averages the pixels from floor(i h / n) to ceil((i + 1) h / n)
        rows = [slice(i * h // height, -(-(i + 1) * h // height)) for i in range(height)]
        columns = [slice(i * w // width, -(-(i + 1) * w // width)) for i in range(width)]
        small = np.stack([[maps[:, r, c].mean(axis=(1, 2)) for c in columns] for r in rows])  # (height, width, N)
        flat = small.reshape(-1, len(x)).T
        return flat / np.sqrt((flat**2).sum(axis=1, keepdims=True))

    expected = 0.0
    for a, b in pairs:
        size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
        expected += ((attention(a, *size) - attention(b, *size)) ** 2).mean()
    student, teacher = ([torch.from_numpy(x) for x in side] for side in zip(*pairs, strict=True))
    assert float(losses.attention_transfer(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(losses.attention_transfer(teacher, student)) == pytest.approx(expected, rel=1e-12)


def test_attention_of_equal_resolutions_is_as_published_to_the_last_bit() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5, 7), torch.randn(4, 6, 5, 7)

    def published(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x.pow(2).mean(1).flatten(1))

    expected = (published(student) - published(teacher)).pow(2).mean()
    assert torch.equal(losses.attention_transfer([student], [teacher]), expected)


def test_batchnorm_prior() -> None:
    layers = [np.random.default_rng(seed).uniform(0.5, 2, size=(4, channels)) for seed, channels in ((0, 3), (1, 8))]
    norms = [np.linalg.norm(m - rm) + np.linalg.norm(v - rv) for m, v, rm, rv in layers]
    statistics = [tuple(torch.from_numpy(layer)) for layer in layers]
    assert float(losses.batchnorm_prior(statistics)) == pytest.approx(sum(norms), rel=1e-12)
    with pytest.raises(ZsktError, match=r"generator\.loss\.batchnorm"):
        losses.batchnorm_prior([])


def test_one_hot_and_balance(logits: Logits) -> None:
    _, teacher = logits
    rows = [softmax(row) for row in teacher]
    labels = [3, 0, 1, 4, 4, 2]
    to_labels = -sum(math.log(row[k]) for row, k in zip(rows, labels, strict=True)) / N
    to_themselves = -sum(math.log(max(row)) for row in rows) / N
    assert float(losses.one_hot(teacher, torch.tensor(labels))) == pytest.approx(to_labels, rel=1e-12)
    assert float(losses.one_hot(teacher)) == pytest.approx(to_themselves, rel=1e-12)
    mean = [sum(row[k] for row in rows) / N for k in range(K)]
    assert float(losses.class_balance(teacher)) == pytest.approx(sum(p * math.log(p) for p in mean), rel=1e-12)
    assert float(losses.class_balance(torch.zeros(2, K))) == pytest.approx(-math.log(K))  # uniform: its minimum


def test_activation_and_total_variation() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(losses.activation(x)) == pytest.approx(-np.abs(x.numpy()).mean(), rel=1e-12)
    expected = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        steps = [
            abs(float(x[n, c, i + down, j + right] - x[n, c, i, j]))
            for n, c, i, j in np.ndindex(2, 3, 4, 5)
            if i + down < 4 and 0 <= j + right < 5
        ]
        expected += sum(steps) / len(steps)
    assert float(losses.total_variation(x)) == pytest.approx(expected, rel=1e-12)


def test_total_variation_of_a_single_row_or_column() -> None:
    row = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 1, 1, 4)
    assert float(losses.total_variation(row)) == pytest.approx(4 / 3)
    assert float(losses.total_variation(row.transpose(2, 3))) == pytest.approx(4 / 3)
    assert float(losses.total_variation(torch.ones(2, 3, 1, 1))) == 0.0


OF_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": lambda s, t: losses.forward_kl(t, s),
    "l1_logits": losses.l1_logits,
    "jensen_shannon": losses.jensen_shannon,
    "one_hot": lambda s, t: losses.one_hot(s),
    "one_hot_labels": lambda s, t: losses.one_hot(s, torch.arange(len(s)) % s.shape[1]),
    "class_balance": lambda s, t: losses.class_balance(s),
}
OF_IMAGES = {
    "attention_transfer": lambda s, t: losses.attention_transfer([s], [t]),
    "activation": lambda s, t: losses.activation(s),
    "total_variation": lambda s, t: losses.total_variation(s),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*OF_LOGITS, *OF_IMAGES])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    shape = (2, N, K) if name in OF_LOGITS else (2, N, 3, 4, 5)
    student, teacher = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    loss = (OF_LOGITS | OF_IMAGES)[name]
    found = loss(student, teacher)
    assert found.dtype == torch.float32
    expected = loss(student.float(), teacher.float())
    if name == "attention_transfer" and dtype == torch.bfloat16:  # whose squares are rounded
        assert found == pytest.approx(expected, rel=2**-8)
        assert found != expected
    else:
        assert torch.equal(found, expected)


def test_attention_of_float16_does_not_overflow_and_sums_of_bfloat16_do_not_stall() -> None:
    large = torch.full((1, 3, 2, 2), 3e4, dtype=torch.float16)
    assert losses.attention_map(large) == pytest.approx(torch.full((1, 4), 0.5))
    many = torch.ones(1, 1000, 2, 2, dtype=torch.bfloat16)  # added up in bfloat16, ones end at 256
    many[:, :500, 0, 0] = 2
    assert losses.attention_map(many)[0, 0] / losses.attention_map(many)[0, 1] == pytest.approx(2.5, rel=1e-6)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_gradients_are_finite_where_the_softmax_underflows(name: str) -> None:
    student, teacher = (torch.zeros(N, K).index_fill(1, torch.tensor([k]), 300.0) for k in (1, 2))
    assert student.softmax(1).min() == 0
    student.requires_grad_()
    loss = OF_LOGITS[name](student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_gradients_are_finite_where_a_norm_is_zero() -> None:
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    exact = torch.ones(3, requires_grad=True)
    loss = losses.attention_transfer([dead], [torch.ones(2, 5, 4, 4)])
    loss = loss + losses.batchnorm_prior([(exact, exact, torch.ones(3), torch.ones(3))])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (dead, exact)))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_attentions_gradient_keeps_the_layout_of_the_maps(memory_format: torch.memory_format) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    student = student.contiguous(memory_format=memory_format).requires_grad_()
    (gradient,) = torch.autograd.grad(losses.attention_transfer([student * 1], [teacher]), student)
    assert gradient.is_contiguous(memory_format=memory_format)
