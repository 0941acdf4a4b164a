"""One run over several processes: what it ends with is what one process ends with."""

import contextlib
import copy
import datetime
import functools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import zskt.runtime
from small import FourStages, call, make_teacher, refused, stripes
from zskt.errors import ZsktError
from zskt.files import read_tensors
from zskt.method.build import belief_matching
from zskt.method.config import Config
from zskt.method.memory import Need, need
from zskt.method.protocol import Method
from zskt.method.recipe import load_recipe
from zskt.networks import models, ranks
from zskt.networks.classifier import Classifier
from zskt.networks.folder import save_teacher
from zskt.networks.loading import load_teacher
from zskt.networks.observe import channel_moments
from zskt.networks.students import make_student
from zskt.networks.synchronised import separate, synchronise
from zskt.paper.baselines import teach
from zskt.paper.training import Training
from zskt.run import checkpoint
from zskt.run.distill import distill
from zskt.run.lifecycle import Event
from zskt.run.shards import saved_rows
from zskt.settings import replace

Work = Callable[[], Any]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def each_rank(count: int, work: Work, *, join: bool = True, attempt: int = 0) -> list[Any]:
    """What `work` returns, or the ZsktError it raises, in each of `count` processes; -9 of one that was killed.

    With `join` they have joined; `attempt` is how often torchrun would have started them anew.
    """
    port, ends = free_port(), []
    for number in range(count):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.environ.update(
                    RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RESTART_COUNT=str(attempt),
                )  # fmt: skip
                signal.alarm(300)  # instead of waiting for ever
                try:
                    with ranks.joined() if join else contextlib.nullcontext():
                        found = work()
                except ZsktError as error:
                    found = error
                with os.fdopen(writing, "wb") as file:
                    pickle.dump(found, file)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        ends.append((child, reading))
    results = []
    for child, reading in ends:
        with os.fdopen(reading, "rb") as file:
            text = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"a process ended with {status}"
        results.append(status or pickle.loads(text))
    return results


def settings(recipe: str, steps: int = 5) -> Config:
    """A recipe at a tiny size, with every part of it at work within five steps."""
    changes: dict[str, Any] = {
        "steps": steps, "batch_size": 12, "generator.width": 8, "generator.latent": 10, "machine.precision": "fp32",
        "log_every": 1, "evaluate_every": 100,
    }  # fmt: skip
    config = load_recipe(recipe)
    if config.method == "bank":
        changes |= {
            "steps": 6 + steps, "generator.updates": 3, "bank.batch_size": 12, "bank.rounds": 4, "bank.warmup": 2,
            "bank.random_crop": 1, "bank.horizontal_flip": True, "bank.until": 0.8,
        }  # fmt: skip
    else:
        changes |= {"generator.updates": 2, "student.updates": 2}
    return replace(config, changes)


def networks() -> tuple[Classifier, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student = FourStages(4)
        teacher = make_teacher(FourStages(6), size=(3, 8, 8))
    return teacher.double(), student.double()


def learnt(recipe: str, changes: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The student that a short run ends with, and the losses of its steps."""
    teacher, student = networks()
    seen: list[dict[str, Tensor]] = []
    config = replace(settings(recipe), changes or {})
    result = distill(teacher, student, config, callbacks=[lambda event: seen.append(dict(event.losses))])
    return result.student.state_dict(), seen


@functools.cache
def alone(recipe: str, clip: float | None = None) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The same of one process, for the tests that compare with it; gradients longer than `clip` are clipped."""
    return learnt(recipe, clipping(clip))


def clipping(norm: float | None) -> dict[str, float]:
    return {} if norm is None else {"student.clip": norm, "generator.clip": norm}


def furthest(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of a number."""
    return max(float((state[name] - other[name]).abs().max()) for name in state)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("recipe", ["zskt", "zskt-prior", "bank"])
def test_several_processes_end_where_one_does(recipe: str, count: int) -> None:
    expected, losses = alone(recipe)
    found = each_rank(count, lambda: learnt(recipe))
    for state, _ in found:
        assert furthest(state, expected) < 1e-9
    assert [len(seen) for _, seen in found] == [len(losses), *[0] * (count - 1)]  # only rank 0 tells
    for ours, theirs in zip(losses, found[0][1], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9)


OTHERS = [
    "zskt-fresh",
    "zskt-mmrazor",
    "dfad",
    "dfq",
    "dafl",
    "deepinversion",
    "fast",
    "nayer",
    "cmi",
    "bank-adversary",
]


@pytest.fixture(scope="module")
def others() -> list[dict[str, dict[str, Tensor]]]:
    """By rank and recipe, the student of two processes."""
    return each_rank(2, lambda: {recipe: learnt(recipe)[0] for recipe in OTHERS})


@pytest.mark.parametrize("recipe", OTHERS)
def test_so_it_is_with_the_other_recipes(recipe: str, others: list[dict[str, dict[str, Tensor]]]) -> None:
    """Replay, class balance, what survives a round, and layers that are drawn anew."""
    for states in others:
        assert furthest(states[recipe], alone(recipe)[0]) < 1e-9


def own_latents(batch: Tensor) -> Tensor:
    return batch[: len(batch) // ranks.size()]


def not_averaged(tensors: Sequence[Tensor]) -> None:
    pass


def summed(tensors: Sequence[Tensor]) -> None:
    AVERAGE(tensors)
    for tensor in tensors:
        tensor.mul_(ranks.size() if tensor.ndim else 1)  # gradients, not losses


def clipped_before(tensors: Sequence[Tensor]) -> None:
    gradients = [tensor for tensor in tensors if tensor.ndim]
    norm = nn.utils.get_total_norm(gradients)
    for tensor in gradients:
        tensor.mul_((0.01 / norm).clamp(max=1))
    AVERAGE(tensors)


AVERAGE = ranks.average_


@pytest.mark.parametrize(
    ("recipe", "place", "wrong"),
    [
        ("zskt", "zskt.method.build.synchronise", lambda module, who: None),
        ("zskt", "zskt.run.several.synchronise", lambda module, who: None),
        ("zskt", "zskt.networks.ranks.own", own_latents),
        ("zskt", "zskt.networks.ranks.average_", not_averaged),
        ("zskt", "zskt.networks.ranks.average_", clipped_before),
        ("bank", "zskt.networks.ranks.average_", summed),
        ("zskt-prior", "zskt.networks.observe.over_ranks", list),
        ("dfq", "zskt.method.losses.ranks.gather", lambda x: x.unsqueeze(0)),
    ],
)
def test_what_is_left_out_is_missed(
    recipe: str, place: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above see BatchNorm, prior or class balance of a share, equal latents on all ranks, and gradients that
    are not averaged, are summed or clipped first."""
    clip = 0.01 if recipe == "zskt" else None

    def work() -> dict[str, Tensor]:
        monkeypatch.setattr(place, wrong)
        return learnt(recipe, clipping(clip))[0]

    assert furthest(each_rank(2, work)[0], alone(recipe, clip)[0]) > 1e-6


# The parts.


def test_batchnorm_over_ranks_is_batchnorm_over_the_batch() -> None:
    """Outputs, gradients of the mean loss, and running statistics; of torch's own layer, on the whole batch."""
    x, wanted = torch.randn(6, 4, 5, 3, dtype=torch.float64), torch.randn(6, 4, 5, 3, dtype=torch.float64)
    for arguments in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        layer = nn.BatchNorm2d(4, **arguments).double()
        if layer.affine:
            nn.init.uniform_(layer.weight)

        def passed(x: Tensor, wanted: Tensor, layer: nn.BatchNorm2d = layer) -> tuple[Tensor, ...]:
            layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
            synchronise(layer, "student")
            for _ in range(2):
                y = layer(x)
            gradients = torch.autograd.grad((y - wanted).pow(2).mean(), [x, *layer.parameters()])
            parameters = list(gradients[1:])
            ranks.average_(parameters)
            separate(layer)
            assert type(layer) is nn.BatchNorm2d
            layer.eval()
            return (*(each.detach() for each in (y, gradients[0], layer(x))), *parameters, *layer.buffers())

        expected = passed(x, wanted)
        shares = each_rank(3, lambda: passed(ranks.own(x), ranks.own(wanted)))
        for number, name in enumerate(("outputs", "gradients of inputs", "outputs in eval mode")):
            whole = torch.cat([share[number] for share in shares])
            if number == 1:
                whole = whole / 3  # of the mean over ranks, not of this rank's loss
            if number < 2 or layer.track_running_stats:
                torch.testing.assert_close(whole, expected[number], rtol=1e-10, atol=1e-12, msg=name)
        for share in shares:
            torch.testing.assert_close(share[3:], expected[3:], rtol=1e-10, atol=1e-12)


def test_batchnorm_over_ranks_in_half_precision_is_as_good_as_torchs() -> None:
    """Inputs far from 0: scale and offset must not be rounded before they cancel."""
    x = (10 + torch.randn(60, 4, 5, 5)).bfloat16()

    def passed() -> Tensor:
        layer = nn.BatchNorm2d(4)
        synchronise(layer, "student")
        y: Tensor = layer(ranks.own(x))
        assert y.dtype == torch.bfloat16
        return y.detach().float()

    found = torch.cat(each_rank(2, passed))
    exact = nn.BatchNorm2d(4)(x.float()).detach()
    assert float((found - exact).mean().abs()) < 1e-3
    assert float((found - exact).abs().max()) < 0.02


def test_what_ranks_gather_has_the_gradient_of_the_whole() -> None:
    """R losses that all depend on all ranks' tensors: averaging must leave the gradient of one, not of R or 1 / R."""
    x, weight = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        w = weight.clone().requires_grad_()
        parts = ranks.gather((x * w).exp().mean(dim=0))  # (R, 2)
        loss = parts.mean(dim=0).pow(3).sum() + (x * w).mean()
        (gradient,) = torch.autograd.grad(loss, w)
        ranks.average_([gradient])
        return gradient

    for count in (2, 3):
        for found in each_rank(count, lambda: slope(ranks.own(x))):
            torch.testing.assert_close(found, slope(x), rtol=1e-12, atol=1e-12)


def test_moments_survive_a_mean_that_is_large() -> None:
    """As mean of squares minus square of mean they would lose every digit in single precision."""
    x = 1e4 + torch.randn(600, 2)
    for mean, variance in each_rank(3, lambda: ranks.moments(*channel_moments(ranks.own(x)))):
        torch.testing.assert_close(mean, x.mean(dim=0))
        torch.testing.assert_close(variance, x.var(dim=0, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_rows_are_fetched_from_wherever_they_lie(kind: torch.dtype) -> None:
    rows = torch.arange(60).view(20, 3).to(kind)  # rank 0 has the first 12, rank 1 the others
    chosen = torch.randint(20, (8,), generator=torch.Generator().manual_seed(0))
    owner = (chosen >= 12).long()

    def fetched() -> Tensor:
        mine = rows[:12] if ranks.rank() == 0 else rows[12:]
        return ranks.fetch(mine, owner, chosen - 12 * owner)

    assert torch.equal(torch.cat(each_rank(2, fetched)), rows[chosen])


def test_batchnorm_of_another_kind_is_refused() -> None:
    class Own(nn.BatchNorm2d):
        pass

    for error in each_rank(2, lambda: refused(lambda: synchronise(nn.Sequential(Own(3)), "student"))):
        assert error == (
            "expected torch's BatchNorm in the student, found Own in 0, which several processes cannot share; "
            "use torch's, or one process"
        )


def test_memory_is_that_of_the_ranks_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the networks, and its share of batches and bank."""
    teacher, student = networks()
    config = replace(settings("bank"), {"generator.width": 8})
    alone = need(teacher, student, config)

    def asked(local: int) -> Need:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        return need(teacher, student, config)

    together, apart = each_rank(2, lambda: asked(2))[0], each_rank(2, lambda: asked(1))[0]
    assert together.per_image == alone.per_image
    assert apart.per_image == {name: size // 2 for name, size in alone.per_image.items()}
    assert apart.fixed < alone.fixed < together.fixed < 2 * alone.fixed


# Runs that go on.


def continued(out: Path, recipe: str, plan: Sequence[tuple[int, int | None]]) -> dict[str, Tensor]:
    """The student of a run that goes on with other numbers of processes: (processes, steps or to the end)."""
    for number, (count, steps) in enumerate(plan):

        def work(number: int = number, steps: int | None = steps) -> dict[str, Tensor]:
            teacher, student = networks()
            result = distill(
                teacher, student, settings(recipe), out=out, evaluate=IMAGES, stop_after=steps, resume=number > 0
            )
            return result.student.state_dict()

        states = each_rank(count, work) if count > 1 else [work()]
        assert all(furthest(state, states[0]) < 1e-12 for state in states)
    return states[0]


IMAGES = (torch.randint(0, 256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8),
          torch.arange(8))  # fmt: skip


@pytest.mark.parametrize("recipe", ["bank", "dfad"])
def test_a_run_goes_on_with_another_number_of_processes(recipe: str, tmp_path: Path) -> None:
    expected = continued(tmp_path / "alone", recipe, [(1, None)])
    steps = 4 if recipe == "dfad" else 9
    found = continued(tmp_path / "several", recipe, [(2, 2), (1, 1), (3, steps - 3), (2, None)])
    assert furthest(found, expected) < 1e-9
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("alone", "several")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert theirs.keys() == ours.keys()
        for name in ours.keys() & {"student_loss", "accuracy", "pseudo_variation"}:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-7)
    if recipe == "bank":
        rows = [torch.cat([r["images"] for r in saved_rows(tmp_path / name / "rows")]) for name in ("alone", "several")]
        assert torch.equal(*rows)


def test_images_of_the_users_own_are_shared_too(tmp_path: Path) -> None:
    """Seven, which neither two nor three processes can share equally."""
    images = torch.randint(0, 256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)

    def work(out: str, **options: Any) -> dict[str, Tensor]:
        teacher, student = networks()
        made = distill(teacher, student, settings("bank"), images=images, out=tmp_path / out, **options)
        return made.student.state_dict()

    expected = work("alone")
    for count in (2, 3):
        for state in each_rank(count, functools.partial(work, str(count))):
            assert furthest(state, expected) < 1e-9
    each_rank(3, functools.partial(work, "parts", stop_after=8))
    for state in each_rank(2, functools.partial(work, "parts", resume=True)):
        assert furthest(state, expected) < 1e-9
    stored = [torch.cat([rows["images"] for rows in saved_rows(tmp_path / out / "rows")]) for out in ("alone", "parts")]
    assert torch.equal(stored[0][:7], images)
    assert torch.equal(*stored)


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    def work() -> Any:
        teacher, student = networks()

        def interrupted(event: Event) -> None:
            if event.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)  # rank 0 only: the others have no callbacks

        return refused(
            lambda: distill(teacher, student, settings("zskt"), out=tmp_path / "run", callbacks=[interrupted])
        )

    said = each_rank(2, work)
    assert said == ["stopped at step 2 of 5; continue with --resume"] * 2


def test_a_callback_may_look_at_the_method(tmp_path: Path) -> None:
    """It is rank 0's alone, so that nothing in it may wait for the others."""

    def work() -> list[int]:
        teacher, student = networks()
        seen: list[int] = []

        def look(event: Event) -> None:
            method = cast(Method, event.repeated)
            seen.append(len(method.sample(4, 0)) + len(method.student(torch.zeros(3, 3, 8, 8).double())))

        for recipe in ("bank", "zskt"):
            distill(teacher, student, settings(recipe), callbacks=[look])
        return seen

    assert each_rank(2, work) == [[7] * 16, []]


def test_what_a_callback_draws_changes_no_rank(tmp_path: Path) -> None:
    """Recipe nayer initialises layers anew, from torch's global random numbers."""

    def draw(event: Event) -> None:
        torch.rand(3)

    def work() -> dict[str, Tensor]:
        teacher, student = networks()
        return distill(teacher, student, settings("nayer"), callbacks=[draw]).student.state_dict()

    for state in each_rank(2, work):
        assert furthest(state, alone("nayer")[0]) < 1e-9


def own_method(teacher: Classifier, student: nn.Module, config: Config) -> Method:
    return belief_matching(teacher, student, replace(config, {"replay.kind": "buffer", "replay.capacity": 3}))


def test_a_method_of_ones_own_is_saved_by_all_ranks(tmp_path: Path) -> None:
    """Its state, saved at the end, may have to be put together."""
    tiny = {"batch_size": 12, "generator.width": 8, "generator.latent": 10, "student.updates": 2}

    def work(out: str) -> dict[str, Tensor]:
        teacher, student = networks()
        options: dict[str, Any] = {"method": own_method, "steps": 4, "settings": tiny, "out": tmp_path / out}
        return distill(teacher, student, **options).student.state_dict()

    expected = work("alone")
    for state in each_rank(2, lambda: work("several")):
        assert furthest(state, expected) < 1e-9
    ours, theirs = (read_tensors(tmp_path / out / "method.safetensors")[0] for out in ("alone", "several"))
    assert ours["replay.images"].shape == theirs["replay.images"].shape


@pytest.mark.parametrize("count", [24, 26])
def test_teaching_is_shared_alike(count: int, tmp_path: Path) -> None:
    """Of 26 images the last batch of a pass has two, of which three processes cannot each have one."""
    images, labels = stripes(count)
    training = Training(updates=6, batch_size=12, random_crop=1, horizontal_flip=True)

    def work(out: str) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
            ).double()
        result = teach(module, (images, labels), (images, labels), training, mean=[0.5], std=[0.25], out=tmp_path / out)
        return result.network.module.state_dict()

    expected = work("alone")
    for state in each_rank(3, lambda: work("several")):
        if count == 24:
            assert furthest(state, expected) < 1e-9
    found = read_tensors(tmp_path / "several" / "teacher.safetensors")[0]
    assert furthest(found, state) == 0


def collapsing(teacher: Classifier, student: nn.Module, config: Config) -> Method:
    """Its images are all the same from the third step on, unless the generator learns more gently."""
    method = belief_matching(teacher, student, config)
    sample = method.sample

    def shown(n: int, seed: int) -> Tensor:
        dead = method.generator_updates.gentler == 1 and method.generator_updates.done >= 6
        return torch.zeros(n, 3, 8, 8, dtype=torch.float64) if dead else sample(n, seed)

    method.sample = shown  # type: ignore[method-assign]
    return method


def test_a_collapsed_run_goes_back_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zskt.run.examiner.COLLAPSES", {"dead generator"})
    changes = {"on_collapse": "restart", "evaluate_every": 1, "checkpoint_every": 1}

    def work(name: str) -> tuple[dict[str, Tensor], list[str]]:
        teacher, student = networks()
        config = replace(settings("zskt", 8), changes)
        result = distill(teacher, student, config, method=collapsing, out=tmp_path / name)
        return result.student.state_dict(), [text for text in result.warnings if "back to" in text]

    expected, said = work("one")
    assert [text.split(",")[0] for text in said] == ["collapse at step 4: back to step 1"]
    found = each_rank(2, lambda: work("two"))
    assert found[0][1] == said
    for state, _ in found:
        assert furthest(state, expected) < 1e-9


# What is refused, on all ranks and without waiting.


def test_runs_that_differ_are_refused(tmp_path: Path) -> None:
    def work(what: str) -> str:
        teacher, student = networks()
        changes: dict[str, Any] = {}
        if what == "batch":
            changes = {"batch_size": 15}
        elif what == "bank":
            changes = {"bank.batch_size": 9}
        elif ranks.rank() == 1:
            if what == "teacher":
                teacher = make_teacher(FourStages(6), size=(3, 8, 8), seed=1).double()
            elif what == "version":
                zskt.runtime.__version__ = "0.0.1"
            elif what == "config":
                changes = {"student.learning_rate": 1e-9}
        if what == "graph":
            changes = {"machine.cuda_graph": True}
        return refused(lambda: distill(teacher, student, replace(settings("bank"), changes), out=tmp_path / "run"))

    for what, expected in {
        "batch": r"batch_size = 15: expected a multiple of the 2 processes; change one of them",
        "bank": r"bank.batch_size = 9: expected a multiple of the 2 processes; change one of them",
        "graph": r"machine.cuda_graph .*; leave it out",
        "teacher": r"process 1 on .* has teacher [0-9a-f]+, process 0 on .* [0-9a-f]+; start all of them with .*",
        "version": r"process 1 on .* has zskt 0\.0\.1, process 0 on .* 0\.1\.0; start all of them with .*",
        "config": r"process 1 on .* has student.learning_rate 1e-09, process 0 on .* 0\.3; start all of them with .*",
    }.items():
        for line in each_rank(2, functools.partial(work, what)):
            assert re.fullmatch(expected, line), line
    assert not (tmp_path / "run").exists()


def test_processes_that_were_started_otherwise_are_refused(tmp_path: Path) -> None:
    """Before the first of them waits for what another never does."""
    continued(tmp_path / "run", "zskt", [(2, 2)])

    def work(what: str) -> str:
        teacher, student = networks()
        options: dict[str, Any] = {"out": tmp_path / what}
        if what == "run":
            options["resume"] = ranks.rank() == 0
        elif what == "stopped":
            options["stop_after"] = 2 + ranks.rank()
        elif ranks.rank() == 1:
            student = FourStages(5).double()
        return refused(lambda: distill(teacher, student, settings("bank"), **options))

    for what, expected in {
        "run": "has resume False, process 0 on .* True",
        "stopped": "has stop_after 3, process 0 on .* 2",
        "student": "has student [0-9a-f]+, process 0 on .* [0-9a-f]+",
    }.items():
        for line in each_rank(2, functools.partial(work, what)):
            assert re.fullmatch(f"process 1 on .* {expected}; start all of them with .*", line), line


def test_a_restart_is_known_to_all_by_one_of_them(tmp_path: Path) -> None:
    """torchrun does not count a new start on every machine."""

    def work() -> bool:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
        with ranks.joined():
            return ranks.restarted()

    assert each_rank(2, work, join=False) == [True, True]


def test_students_begin_as_rank_0s() -> None:
    """A factory may have drawn other weights in every process."""

    def work() -> dict[str, Tensor]:
        teacher, _ = networks()
        torch.manual_seed(ranks.rank())
        return distill(teacher, FourStages(4).double(), settings("zskt")).student.state_dict()

    first, second = each_rank(2, work)
    assert furthest(first, second) < 1e-12


def test_a_folder_that_one_process_does_not_see_is_said(tmp_path: Path) -> None:
    continued(tmp_path / "run", "zskt", [(2, 2)])

    def work() -> str:
        teacher, student = networks()
        out = tmp_path / ("run" if ranks.rank() == 0 else "elsewhere")
        return refused(lambda: distill(teacher, student, settings("zskt"), out=out, resume=True))

    for line in each_rank(2, work):
        assert re.fullmatch(r"process 1 on .* has checkpoint False in .*, process 0 on .* True in .*", line)


def test_a_port_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", **place}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ZsktError, match=r"the processes cannot meet at 127.0.0.1:\d+ .*; check address and port"):
            ranks.joined().__enter__()
    assert ranks.size() == 1


def test_a_process_that_comes_alone_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MEETING", datetime.timedelta(seconds=1))

    def work() -> None:
        os.environ["WORLD_SIZE"] = "2"
        with ranks.joined():
            pass

    (error,) = each_rank(1, work, join=False)
    assert "the processes cannot meet at 127.0.0.1:" in str(error)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in each_rank(2, lambda: refused(lambda: ranks.check_device("cuda:1"))):
        assert error == "device cuda:1: expected auto, cpu or cuda, as each of 2 processes has its own GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZsktError, match="expected a GPU for each process of this machine, found 1"):
        ranks.joined().__enter__()


# The command, by torchrun.


@contextlib.contextmanager
def torchrun(count: int, *arguments: object, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--max-restarts", restarts]
    command += ["--master-port", free_port(), "-m", "zskt", *arguments]
    words = list(map(str, command))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


TINY = {"batch_size": 12, "generator.width": 4, "generator.latent": 4, "checkpoint_every": 5, "log_every": 5}


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    save_teacher(tmp_path / "teacher", make_teacher(models.convnet(4, num_classes=3, channels=1), size=(1, 8, 8)))
    tiny = [f"{name}={value}" for name, value in TINY.items()]
    return ["distill", tmp_path / "teacher", "--student", "convnet-2", "--recipe", "zskt-prior", "--set", *tiny]


def undisturbed(folder: Path, steps: int) -> None:
    """The run of the command, by the library."""

    def work() -> None:
        teacher = load_teacher(folder / "teacher")
        student = make_student("convnet-2", teacher, seed=0)
        distill(teacher, student, "zskt-prior", settings=TINY, steps=steps, out=folder / "undisturbed")

    each_rank(2, work)


def same_ends(folder: Path) -> None:
    for name in ("student", "generator"):
        ours, theirs = (read_tensors(folder / out / f"{name}.safetensors")[0] for out in ("undisturbed", "run"))
        assert furthest(ours, theirs) == 0


def test_a_killed_process_ends_all_and_started_anew_they_go_on(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed(tmp_path, 16)

    def work(killed: bool) -> tuple[int, str]:
        most, calls = ranks.most, iter(range(10**6))

        def watched(number: int) -> int:
            if killed and ranks.rank() == 1 and next(calls) == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return most(number)

        monkeypatch.setattr("zskt.networks.ranks.most", watched)
        status, _, err = call(*command, "--out", tmp_path / "run", "--steps", 16)
        return status, err

    found, killed = each_rank(2, lambda: work(True), join=False)
    assert killed == -signal.SIGKILL
    assert found[0] == 1
    assert found[1].splitlines()[-1].startswith("zskt: another process of this run has ended")
    assert checkpoint.exists(tmp_path / "run" / "checkpoint")
    assert [status for status, _ in each_rank(2, lambda: work(False), join=False, attempt=1)] == [0, 0]
    same_ends(tmp_path)


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_anew(command: list[object], tmp_path: Path) -> None:
    steps, run = 60, tmp_path / "run"
    undisturbed(tmp_path, steps)
    with torchrun(2, *command, "--out", run, "--steps", steps, restarts=1) as process:
        while not checkpoint.exists(run / "checkpoint"):
            assert process.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["finished"]  # one line, of rank 0 after the restart
    assert "zskt: another process of this run has ended" in err
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged))
    assert logged[-1] == steps
    same_ends(tmp_path)


def test_a_mistake_is_told_once(command: list[object], tmp_path: Path) -> None:
    odd = ["batch_size=5" if word == "batch_size=12" else word for word in command]
    for arguments, line in (
        ([*odd, "--out", tmp_path / "run", "--steps", 2], "expected a multiple of the 2 processes"),
        (["report", tmp_path], "report is for one process"),
    ):
        with torchrun(2, *arguments) as process:
            _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        said = [each for each in err.splitlines() if "zskt: " in each]
        assert len(said) == 1, err
        assert line in said[0]
