"""What a run needs in memory is said before it starts, and the batch that fits where it was not enough."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zskt
from small import make_teacher, refused
from zskt.errors import UsageError
from zskt.method import memory
from zskt.method.config import Config
from zskt.method.matching import BeliefMatching
from zskt.method.recipe import load_recipe, plan
from zskt.networks import models
from zskt.settings import replace

SIZE = (3, 8, 8)
BANK = {"bank.batch_size": 8, "bank.rounds": 3, "bank.warmup": 1, "steps": 99, "bank.random_crop": 0}


@pytest.fixture
def pair() -> tuple[zskt.Classifier, nn.Module]:
    torch.manual_seed(0)
    return make_teacher(models.build("convnet-8", 10, SIZE), size=SIZE), models.build("convnet-4", 10, SIZE)


def tiny(recipe: str, changes: dict[str, Any] | None = None) -> Config:
    return replace(load_recipe(recipe), {"generator.width": 8, "batch_size": 8} | (changes or {}))


def test_what_a_backward_needs_is_counted_once_and_without_weights() -> None:
    module = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Flatten(), nn.Linear(20, 5))
    kept = memory.kept_bytes(module, torch.ones(2, 10))
    assert kept == 4 * (10 + 20)  # the inputs of both layers; the second is also what the ReLU needs


def test_the_estimate_grows_with_what_is_stored(pair: tuple[zskt.Classifier, nn.Module]) -> None:
    found = memory.need(*pair, tiny("bank", BANK))
    more = memory.need(*pair, tiny("bank", BANK | {"bank.rounds": 5}))
    assert more.fixed - found.fixed == 2 * 8 * (3 * 8 * 8 + 8 * (2 * 10 + 3))  # bytes, and 8 views with their logits
    assert found.per_image["bank.batch_size"] > found.per_image["batch_size"]
    ring = memory.need(*pair, tiny("zskt", {"replay.kind": "buffer", "replay.capacity": 7}))
    assert ring.fixed - memory.need(*pair, tiny("zskt")).fixed == 7 * 8 * 3 * 8 * 8 * 2


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("zskt", {"batch_size": 10**6}, ["batch_size = 1,000,000 needs at least", "found 64 MiB: expected at most"]),
        ("bank", BANK | {"bank.batch_size": 10**4}, ["bank.batch_size = 10,000 needs at least"]),
        ("bank", BANK | {"bank.rounds": 10**6}, ["this run needs at least", "GiB of memory", "bank.rounds"]),
        ("zskt", {"generator.width": 10**4}, ["this run needs at least", "generator.width"]),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_anything_is_allocated(
    recipe: str,
    changes: dict[str, Any],
    words: list[str],
    pair: tuple[zskt.Classifier, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**26)
    line = refused(lambda: plan(*pair, tiny(recipe, changes)), UsageError)
    for word in words:
        assert word in line


def test_the_largest_batch_named_is_the_largest_that_is_taken(
    pair: tuple[zskt.Classifier, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**26)
    most = memory.need(*pair, tiny("zskt")).most("batch_size", 2**26)
    assert f"expected at most {most:,}" in refused(lambda: plan(*pair, tiny("zskt", {"batch_size": most + 1})))
    assert plan(*pair, tiny("zskt", {"batch_size": most})).config.batch_size == most


def test_out_of_memory_names_a_batch_that_fits(
    pair: tuple[zskt.Classifier, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: BeliefMatching) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(BeliefMatching, "step", step)
    line = refused(lambda: zskt.distill(*pair, tiny("zskt"), steps=2, out=tmp_path / "run"))
    assert line == "out of memory with batch_size = 8: batch_size = 4 should fit"
    assert not (tmp_path / "run").exists()


def test_other_failures_of_the_step_are_not_taken_for_it(
    pair: tuple[zskt.Classifier, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: BeliefMatching) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(BeliefMatching, "step", step)
    with pytest.raises(RuntimeError, match="shapes"):
        zskt.distill(*pair, tiny("zskt"), steps=2)
