"""The one way of updating: into named parameters, clipped, and not at all where numbers are not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from zskt.method.updates import Updates, by_name


def updates(fused: bool = True, *, clip: float | None = None, kind: str = "adam") -> tuple[nn.Linear, Updates]:
    """A linear layer, and updates towards less of its output on a record (N, 3)."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    optimizers: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimizer = optimizers[kind](layer.parameters(), lr=0.1, fused=fused)
    terms = {"output": lambda x: layer(x).sum(), "size": lambda x: layer.weight.square().sum()}
    return layer, Updates(1, optimizer, terms, clip)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_update_is_torchs_by_hand(fused: bool, clip: float | None, kind: str) -> None:
    layer, ours = updates(fused, clip=clip, kind=kind)
    twin, theirs = updates(fused, clip=clip, kind=kind)
    for value in (1.0, 2.0, -3.0):
        x = torch.full((2, 3), value)
        found = ours.update(x)
        theirs.optimizer.zero_grad()
        loss = twin(x).sum() + twin.weight.square().sum()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        theirs.optimizer.step()
        torch.testing.assert_close(found.total, loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))
    assert ours.done == 3


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_and_said_from_then_on(bad: float, fused: bool, kind: str) -> None:
    layer, ours = updates(fused, kind=kind)
    ours.update(torch.ones(2, 3))
    before = [p.clone() for p in layer.parameters()]
    state = [v.clone() for s in ours.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert not ours.update(torch.full((2, 3), bad)).total.isfinite()
    assert ours.update(torch.ones(2, 3)).total.isnan()  # though this one was fine
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    after = [v for s in ours.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_a_gradient_that_is_not_finite_counts_where_the_loss_is_fine() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    ours = Updates(
        1, torch.optim.SGD(layer.parameters(), lr=0.1, fused=True), {"root": lambda x: layer(x).sqrt().sum()}
    )
    ours.update(torch.ones(1, 1))  # the root of 0, whose slope is infinite
    assert not layer.weight.any()


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_bad_number_is_named_whatever_comes_after(fused: bool) -> None:
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(first.weight)
    nn.init.ones_(second.weight)
    optimizer = torch.optim.SGD([first.weight, second.weight], lr=0.0, fused=fused)
    loss = {"product": lambda x: (first(x[0]) * second(x[1])).sum(), "root": lambda x: second(x[2]).sqrt().sum()}
    ours = Updates(1, optimizer, loss)
    names = {id(first.weight): "net/first", id(second.weight): "net/second"}
    fine = torch.ones(3, 1, 1)
    ours.update(fine)
    assert ours.first_bad(names) == ""
    ours.update(torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1))  # the slope of a root at 0: the loss itself is finite
    ours.update(torch.tensor([float("nan"), 1.0, 1.0]).view(3, 1, 1))
    ours.update(fine)
    assert ours.first_bad(names) == "the gradient of net/second"
    other = Updates(1, optimizer, loss)
    other.update(torch.tensor([float("nan"), 1.0, 1.0]).view(3, 1, 1))
    assert other.first_bad(names) == "the loss term product"


def test_gradients_that_overflow_only_together_are_named_so() -> None:
    layer = nn.Linear(2, 1, bias=False)
    ours = Updates(1, torch.optim.SGD(layer.parameters(), lr=0.1, fused=True), {"sum": lambda x: layer(x).sum()})
    before = layer.weight.detach().clone()
    ours.update(torch.full((1, 2), 3e38))
    assert torch.equal(layer.weight, before)
    assert ours.first_bad({id(layer.weight): "weight"}) == "the gradient of weight"
    pair = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(2)])
    ours = Updates(
        1, torch.optim.SGD(pair.parameters(), lr=0.1, fused=True), {"sum": lambda x: (x * (pair[0] + pair[1])).sum()}
    )
    ours.update(torch.full((1,), 1.8e19) * 1.8e19 / 1.1)
    assert ours.first_bad({}) == "the norm of all gradients"


def test_nobody_elses_gradients_are_touched() -> None:
    layer, ours = updates()
    other = nn.Parameter(torch.ones(3))
    ours.loss = {"product": lambda x: (layer(x) * other.sum()).sum()}
    ours.update(torch.ones(2, 3))
    assert other.grad is None


def test_a_loss_of_another_network_is_noticed() -> None:
    _, ours = updates()
    other = nn.Linear(3, 1)
    ours.loss = {"output": lambda x: other(x).sum()}
    with pytest.raises(zskt.ZsktError, match="does not depend on the network"):
        ours.update(torch.ones(2, 3))
    assert other.weight.grad is None


def test_losses_by_name_are_all_totals_and_the_last_terms() -> None:
    _, ours = updates()
    found = by_name("student", [ours.update(torch.ones(2, 3)) for _ in range(3)])
    assert {name: value.shape for name, value in found.items()} == {
        "student": (3,),
        "student.output": (),
        "student.size": (),
    }
    torch.testing.assert_close(found["student"][-1], found["student.output"] + found["student.size"])
