"""A recorded step is the step: what it is fed, what it undoes, what it hands out."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import zskt
from small import FourStages, make_matching, make_teacher
from zskt.method.matching import BeliefMatching
from zskt.run.cuda_graph import WARM_UP, CapturedStep, Step

SGD = {"student.optimizer": "sgd", "student.momentum": 0.9, "student.weight_decay": 5e-4, "student.learning_rate": 0.1}
GRAPH = {"machine.cuda_graph": True, "steps": 1}
BUFFER = {"replay.kind": "buffer", "replay.capacity": 2}


class Recorder:
    """Stands in for CUDA: warms up, goes through the step once to record it, then goes through it at every call."""

    recordings = 0

    def __call__(self, step: Step, generators: Sequence[torch.Generator]) -> Step:
        self.recordings += 1
        for _ in range(WARM_UP + 1):
            step()
        return step


def pair(recipe: str, changes: dict[str, Any]) -> BeliefMatching:
    torch.manual_seed(0)
    teacher, student = make_teacher().double(), FourStages(4).double()
    given = {"student.updates": 3, "student.loss.attention": 0.0, "schedule.clock": "update"}
    return make_matching(recipe, teacher, student, given | changes)[0]


def state(matching: BeliefMatching) -> dict[str, Tensor]:
    return CapturedStep(matching, Recorder())._state()


@pytest.mark.parametrize(("recipe", "changes"), [("zskt", {}), ("zskt-fresh", {}), ("zskt", SGD | BUFFER)])
def test_recorded_and_plain_steps_are_the_same(recipe: str, changes: dict[str, Any]) -> None:
    plain, recorded = pair(recipe, changes), pair(recipe, changes)
    recorder = Recorder()
    step = CapturedStep(recorded, recorder)
    for _ in range(4):
        expected, found = plain.step(), step()
        for name, theirs in expected.items():  # learning rates are fed in float32: the rest is exact
            assert found[name].tolist() == pytest.approx(theirs.tolist(), rel=1e-6)
    assert recorder.recordings == 1
    assert [u.done for u in step.players] == [plain.generator_updates.done, plain.student_updates.done] == [4, 12]
    assert torch.equal(recorded.rng.get_state(), plain.rng.get_state())
    for name, tensor in state(plain).items():
        torch.testing.assert_close(state(recorded)[name], tensor, rtol=1e-5, atol=1e-7)


def test_recording_leaves_everything_as_it_was() -> None:
    matching = pair("zskt", {})
    matching.step()
    step = CapturedStep(matching, Recorder())
    before = {name: tensor.clone() for name, tensor in state(matching).items()}
    drawn, dropout = matching.rng.get_state(), torch.get_rng_state()
    step._recorded()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(matching).items())
    assert len(before) == len(state(matching))
    assert torch.equal(matching.rng.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), dropout)
    assert (matching.generator_updates.done, matching.student_updates.done) == (1, 3)


def test_a_bank_is_recorded_once_it_is_full() -> None:
    matching = pair("zskt", {"replay.kind": "buffer", "replay.capacity": 3})
    recorder = Recorder()
    step = CapturedStep(matching, recorder)
    recordings = []
    for _ in range(5):
        step()
        recordings.append(recorder.recordings)
    assert recordings == [0, 0, 0, 1, 1]


def test_losses_outlive_the_next_step() -> None:
    matching = pair("zskt", {})
    kept: list[Mapping[str, Tensor]] = []

    def into_the_same_tensors(step: Step, generators: Sequence[torch.Generator]) -> Step:
        first = step()

        def repeat() -> Mapping[str, Tensor]:
            first["student"].copy_(step()["student"])
            return first

        return repeat

    step = CapturedStep(matching, into_the_same_tensors)
    kept += [step(), step()]
    assert not torch.equal(kept[0]["student"], kept[1]["student"])


def test_what_cannot_be_recorded_is_said() -> None:
    matching = pair("zskt", {})

    def unable(step: Step, generators: Sequence[torch.Generator]) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(
        zskt.ZsktError, match=r"recorded as a CUDA graph \(operation not.*--set machine.cuda_graph=false"
    ):
        CapturedStep(matching, unable)()


def test_a_graph_needs_a_gpu_and_fused_optimisers() -> None:
    with pytest.raises(zskt.ZsktError, match=r"machine\.cuda_graph is for CUDA devices, found cpu"):
        zskt.distill(make_teacher(), FourStages(4), "zskt-prior", settings=GRAPH | {"machine.device": "cpu"})
    with pytest.raises(zskt.ZsktError, match="needs machine"):
        zskt.distill(make_teacher(), FourStages(4), settings=GRAPH | {"machine.fused": False})


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "changes"), [("zskt", {}), ("zskt-fresh", {}), ("zskt", SGD | BUFFER)])
def test_a_graph_on_a_gpu_is_the_plain_step(recipe: str, changes: dict[str, Any]) -> None:
    def made() -> BeliefMatching:
        torch.manual_seed(0)
        teacher, student = make_teacher().double().cuda(), zskt.models.wide_resnet(10, 1).double().cuda()
        return make_matching(recipe, teacher, student, {"schedule.clock": "update"} | changes)[0]

    plain, recorded = made(), made()
    step = CapturedStep(recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            expected, found = plain.step(), step()
            for name, theirs in expected.items():
                assert found[name].tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert step.repeat is not None
    for name, tensor in state(plain).items():
        torch.testing.assert_close(state(recorded)[name], tensor, rtol=1e-4, atol=1e-6)
