"""Teachers, and students trained on few real images: from scratch, with a teacher, trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import FourStages, make_teacher, stripes
from zskt.networks import models
from zskt.paper import baselines
from zskt.paper.baselines import cross_entropy, few_shot, kd_at, teach, train_student
from zskt.paper.training import Training, TrainingResult

WRITTEN = {"student.json", "student.safetensors", "metrics.jsonl", "timing.jsonl"}


def small_network(width: int = 4, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.convnet(width, num_classes=2, channels=1)


def make_stripes_teacher(seed: int = 0) -> zskt.Classifier:
    return make_teacher(small_network(8, seed), size=(1, 8, 8))


def distilled(out: Path | None, teacher: zskt.Classifier | None = None, **options: Any) -> TrainingResult:
    """A student trained with KD+AT on ten images of each of two classes."""
    teacher, module = teacher or make_stripes_teacher(), small_network()
    images, labels = stripes(60)
    chosen = few_shot(labels, 10)
    data, training = (images[chosen], labels[chosen]), Training(12, batch_size=8, random_crop=1)
    objective = kd_at(teacher, module)
    return train_student(module, teacher, data, stripes(40), training, objective=objective, out=out, **options)


def test_teach_learns_and_writes_a_teacher(tmp_path: Path) -> None:
    module = small_network()
    settings = Training(24, batch_size=16, random_crop=1, horizontal_flip=True)
    result = teach(module, stripes(96), stripes(40), settings, mean=[0.2], std=[0.3], out=tmp_path / "teacher")
    assert result.finished
    assert result.measured["accuracy"] > 0.9
    loaded = zskt.load_teacher(tmp_path / "teacher")
    trained = result.network.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())
    facts = json.loads((tmp_path / "teacher" / "teacher.json").read_text())
    assert (facts["how"], facts["updates"], facts["images"]) == ("zskt teach", 24, 96)
    assert facts["measured"] == result.measured
    assert loaded.mean.flatten().tolist() == pytest.approx([0.2])


def outputs(module: Any, x: Tensor) -> list[Tensor]:
    """Stage outputs and, last, the logits, by hooks of its own."""
    seen: list[Tensor] = []
    handles = [
        module.get_submodule(name).register_forward_hook(lambda layer, inputs, output: seen.append(output))
        for name in module.stages
    ]
    seen.append(module(x))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize(("alpha", "t", "beta"), [(0.9, 4.0, 1000.0), (0.3, 2.5, 70.0)])
def test_kd_at_is_the_formula(
    with_labels: bool, alpha: float, t: float, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, in float64: 6 images, 10 classes, three stages of 16, 8 and 4 pixels squared."""
    teacher, module = make_teacher(models.wide_resnet(10, 2).double()), models.wide_resnet(10, 1).double().train()
    x, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([3, 1, 4, 1, 5, 9])
    assert (baselines.ALPHA, baselines.TEMPERATURE, baselines.BETA) == (0.9, 4, 1000)
    for name, value in (("ALPHA", alpha), ("TEMPERATURE", t), ("BETA", beta)):
        monkeypatch.setattr(baselines, name, value)
    found = kd_at(teacher, module, cross_entropy=with_labels)(x, labels)

    *theirs, teacher_logits = outputs(teacher.module, x)
    *ours, student_logits = outputs(module, x)
    p, q = (torch.exp(z / t) / torch.exp(z / t).sum(1, keepdim=True) for z in (teacher_logits, student_logits))
    kl = (p * (p / q).log()).sum() / (6 * 10)
    expected = 2 * alpha * t**2 * kl
    for a, b in zip(ours, theirs, strict=True):
        maps = [(y**2).mean(1).reshape(6, -1) for y in (a, b)]
        maps = [y / (y**2).sum(1, keepdim=True).sqrt() for y in maps]
        expected = expected + beta * ((maps[0] - maps[1]) ** 2).sum() / maps[0].numel()
    if with_labels:
        chances = torch.exp(student_logits) / torch.exp(student_logits).sum(1, keepdim=True)
        expected = expected - (1 - alpha) * chances[range(6), labels].log().sum() / 6
    assert len(ours) == 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in module.parameters())


def test_cross_entropy_is_the_mean_negative_log_probability() -> None:
    module, x = small_network().double(), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1])
    expected = -module(x).softmax(1)[range(5), labels].log().mean()
    torch.testing.assert_close(cross_entropy(module)(x, labels), expected)


def test_kd_at_leaves_no_hooks_and_the_teacher_alone() -> None:
    teacher, module = make_stripes_teacher(), small_network()
    teacher.module.requires_grad_(True)  # as somebody may have it
    teacher.module.register_forward_hook(lambda *call: None)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    strides = [p.stride() for p in teacher.parameters()]
    objective = kd_at(teacher, module)
    objective(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))
    data = stripes(20)
    train_student(module, teacher, data, data, Training(3, random_crop=0), objective=objective)
    for child in module.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
    assert len(teacher.module._forward_hooks) == 1
    assert sum(len(child._forward_hooks) for child in teacher.modules()) == 1
    assert all(p.requires_grad and p.grad is None for p in teacher.module.parameters())
    assert [p.stride() for p in teacher.parameters()] == strides
    assert not any(child.training for child in teacher.modules())
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_stages_that_do_not_pair_up_are_refused() -> None:
    teacher, module = make_teacher(FourStages(4)), nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    with pytest.raises(zskt.ZsktError, match=r"attention transfer .* none in the student; choose another student$"):
        kd_at(teacher, module)


def test_other_classes_are_refused() -> None:
    teacher, module, data = make_stripes_teacher(), models.convnet(4, num_classes=3, channels=1), stripes(20)
    for refused in (lambda: kd_at(teacher, module), lambda: train_student(module, teacher, data, data, Training(2))):
        with pytest.raises(zskt.ZsktError, match="the teacher's 2 classes, found 3"):
            refused()
    with pytest.raises(zskt.ZsktError, match="labels of 2 classes, found label 2"):
        train_student(small_network(), teacher, (data[0], data[1] + 1), data, Training(2))


def test_few_shot_is_balanced_nested_and_seeded() -> None:
    labels = torch.tensor([0, 1, 2, 1, 1, 2, 0, 0, 2, 2, 1, 0, 0, 2, 1, 1])
    before = torch.get_rng_state()
    sets = [few_shot(labels, m) for m in (1, 3, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    for m, chosen in zip((1, 3, 5), sets, strict=True):
        assert torch.bincount(labels[chosen]).tolist() == [m] * 3
        assert len(set(chosen.tolist())) == 3 * m
    assert torch.equal(sets[0], sets[1][:3])
    assert torch.equal(sets[1], sets[2][:9])
    assert torch.equal(few_shot(labels, 3), sets[1])
    assert len({tuple(few_shot(labels, 2, seed).tolist()) for seed in range(10)}) > 5


def test_few_shot_says_which_class_is_too_small() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    with pytest.raises(zskt.ZsktError, match="expected 2 images of each class, found 0 of class 2; give images of it"):
        few_shot(labels, 2)
    with pytest.raises(zskt.ZsktError, match="expected 3 images of each class, found 2 of class 1; ask for at most 2"):
        few_shot(labels[:5], 3)
    with pytest.raises(zskt.ZsktError, match="found 0 of class 7; give images of it"):
        few_shot(torch.arange(7).repeat(3), 2, num_classes=8)
    with pytest.raises(zskt.ZsktError, match="found 0 of class 0"):
        few_shot(labels[:0], 1)
    with pytest.raises(zskt.ZsktError, match="per_class = 0: expected at least 1"):
        few_shot(labels, 0)


@pytest.mark.parametrize("per_class", [1, 10, 25])
def test_a_student_gets_equally_many_updates_whatever_the_images(per_class: int) -> None:
    images, labels = stripes(60)
    chosen = few_shot(labels, per_class)
    updates: list[int] = []
    module = small_network()
    module.register_forward_pre_hook(lambda module, inputs: updates.append(len(inputs[0])) if module.training else None)
    data = images[chosen], labels[chosen]
    training = Training(9, batch_size=16, random_crop=0)
    result = train_student(module, make_stripes_teacher(), data, stripes(20), training)
    assert result.update == 9
    assert len(updates) == 1 + 9  # tried once before, on a copy
    assert max(updates) == min(16, 2 * per_class)


def test_a_student_is_written_with_what_was_measured(tmp_path: Path) -> None:
    teacher = make_stripes_teacher()
    result = distilled(tmp_path / "run", teacher, per_class=10, how="KD+AT")
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN
    loaded = zskt.load_student(tmp_path / "run")
    assert loaded.mean.tolist() == teacher.mean.tolist()
    assert loaded.std.tolist() == teacher.std.tolist()
    facts = json.loads((tmp_path / "run" / "student.json").read_text())
    assert (facts["per_class"], facts["how"], facts["images"], facts["updates"]) == (10, "KD+AT", 20, 12)
    assert facts["teacher_fingerprint"] == teacher.fingerprint()
    assert facts["measured"] == result.measured
    images, labels = stripes(40)
    with torch.no_grad():
        ours, theirs = (network(network.normalise(images)).argmax(1) for network in (loaded, teacher))
    assert result.measured["accuracy"] == pytest.approx(float((ours == labels).float().mean()))
    assert result.measured["agreement"] == pytest.approx(float((ours == theirs).float().mean()))
    with pytest.raises(zskt.ZsktError, match="already holds a student"):
        distilled(tmp_path / "run", teacher)


def test_a_student_resumes_exactly_and_only_as_it_was_begun(tmp_path: Path) -> None:
    distilled(tmp_path / "whole", per_class=10)
    assert distilled(tmp_path / "parts", per_class=10, stop_after=5).update == 5
    with pytest.raises(zskt.ZsktError, match="differs in metadata: resume"):
        distilled(tmp_path / "parts", per_class=20, resume=True)
    other = make_stripes_teacher(seed=1)
    with pytest.raises(zskt.ZsktError, match=r"differs in teacher .*: resume"):
        distilled(tmp_path / "parts", other, per_class=10, resume=True)
    distilled(tmp_path / "parts", per_class=10, resume=True)
    files = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_without_cross_entropy_the_teacher_teaches_and_not_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    training, (images, labels) = Training(60, batch_size=16, random_crop=0), stripes(96)
    teacher = teach(small_network(8), (images, labels), stripes(40), training, mean=[0.2], std=[0.3]).network
    module, wrong = small_network(), (images, 1 - labels)
    monkeypatch.setattr(baselines, "BETA", 5)  # for 8 x 8
    objective = kd_at(teacher, module, cross_entropy=False)
    result = train_student(module, teacher, wrong, (images, labels), training, objective=objective)
    assert result.measured["accuracy"] > 0.9
    assert result.measured["agreement"] > 0.9


def test_fine_tuning_goes_on_from_the_weights_given(tmp_path: Path) -> None:
    distilled(tmp_path / "run")
    teacher, data = make_stripes_teacher(), stripes(20)
    module = zskt.load_student(tmp_path / "run").module
    with pytest.raises(zskt.ZsktError, match="with trainable parameters, found none"):
        train_student(module, teacher, data, data, Training(2))
    module.requires_grad_()
    before = [p.detach().clone() for p in module.parameters()]
    modes: list[bool] = []
    module.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    still = train_student(module, teacher, data, data, Training(5, learning_rate=1e-12, weight_decay=0.0))
    for now, then in zip(still.network.module.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-8)
    assert sum(modes) == 1 + 5  # it came in eval mode; tried once before, on a copy
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    moved = train_student(module, teacher, data, data, Training(5, learning_rate=0.1))
    assert not all(torch.equal(a, b) for a, b in zip(moved.network.module.parameters(), before, strict=True))
