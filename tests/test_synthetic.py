"""`zskt images`: images that a network recognises, in files that other programs read; nothing half-written."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zskt
from small import call, coloured, fails, make_teacher, refused, without_batchnorm
from zskt.errors import UsageError
from zskt.method import losses
from zskt.method.recipe import Plan, plan
from zskt.method.views import view
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observer
from zskt.paper.baselines import teach
from zskt.paper.training import Training
from zskt.run import synthetic
from zskt.run.synthetic import SyntheticImages, _settings, synthesise, write_synthetic

SIZE = (1, 12, 12)


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    """A small network that tells three brightnesses apart."""
    train, test = coloured(60), coloured(30, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.convnet(4, num_classes=3, channels=1)
    settings = Training(20, random_crop=0)
    teach(module, (train.images, train.labels), (test.images, test.labels), settings, mean=[0.4], std=[0.3])
    return Classifier(module, input_size=SIZE, mean=[0.4], std=[0.3], class_names=["dark", "grey", "bright"])


def prior(network: Classifier, images: Tensor) -> float:
    """How far the BatchNorm statistics of images are from those of the training images."""
    observer = Observer(network.module, statistics=True)
    with torch.enable_grad():
        found = losses.batchnorm_prior(observer(network.normalise(images).requires_grad_()).statistics)
    observer.close()
    return float(found.detach())


def test_the_network_recognises_them_and_they_look_like_its_images(teacher: Classifier) -> None:
    before = teacher.fingerprint()
    calls: list[tuple[int, int]] = []
    lines: list[str] = []
    found = synthesise(
        teacher, 30, updates=120, progress=lambda *call: calls.append(call), notice=lambda line: lines.append(line)
    )
    assert (found.images.shape, found.images.dtype) == ((30, *SIZE), torch.uint8)
    assert torch.bincount(found.targets).tolist() == [10, 10, 10]
    assert found.recognised > 0.8  # a third by chance
    noise = torch.randint(256, (30, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert prior(teacher, found.images) < 0.5 * prior(teacher, noise)
    assert calls == [(i + 1, 120) for i in range(120)]
    assert "30 images in batches of 30, about" in lines[0]
    assert len(lines) == 1
    assert teacher.fingerprint() == before


def test_several_batches_make_the_number_asked_for(teacher: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "BATCH", 8)
    found = synthesise(teacher, 20, updates=3)
    assert len(found.images) == len(found.logits) == len(found.targets) == 20
    assert len(torch.unique(found.images.flatten(1), dim=0)) == 20
    again, other = synthesise(teacher, 20, updates=3), synthesise(teacher, 20, updates=3, seed=1)
    assert torch.equal(again.images, found.images)
    assert torch.equal(again.targets, found.targets)
    assert not torch.equal(other.images, found.images)
    assert len(synthesise(teacher, 1, updates=1).images) == 1


def test_the_stand_in_for_a_student_is_never_asked(teacher: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def planning(teacher: Classifier, student: nn.Module, *settings: Any) -> Plan:
        planned = plan(teacher, student, *settings)

        def refuse(*inputs: object) -> None:
            raise AssertionError("asked")

        student.register_forward_pre_hook(refuse)
        return planned

    monkeypatch.setattr(synthetic, "BATCH", 4)
    monkeypatch.setattr(synthetic, "plan", planning)
    synthesise(teacher, 12, updates=2)


def test_beliefs_are_the_teachers_about_each_view(teacher: Classifier) -> None:
    found = synthesise(teacher, 6, views=4, updates=5)
    assert found.images.shape == (24, *SIZE)
    with torch.no_grad():
        expected = teacher((found.images.float() / 255 - 0.4) / 0.3)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    shown = found.images.unflatten(0, (6, 4))  # (M, V, C, H, W)
    places = torch.tensor(list(itertools.product(range(3), range(3), range(2))))  # every crop of 12 / 8 = 1 and flip
    changed = 0
    for image, views in zip(shown[:, 0], shown[:, 1:], strict=True):
        possible = view(image.expand(len(places), *SIZE), places, 1)
        for one in views:
            assert (possible == one).flatten(1).all(dim=1).any()
            changed += not torch.equal(one, image)
    assert changed > 6
    alone = synthesise(teacher, 6, updates=5)
    assert torch.equal(alone.images, shown[:, 0])


def test_a_network_without_batchnorm_has_images_too(teacher: Classifier) -> None:
    module = models.convnet(4, num_classes=3, channels=1)
    module.apply(without_batchnorm)
    plain = Classifier(module, input_size=SIZE, mean=[0.4], std=[0.3])
    lines: list[str] = []
    synthesise(plain, 4, updates=2, notice=lines.append)
    assert "no BatchNorm statistics" in lines[-1]
    double = make_teacher(models.wide_resnet(10, 1).double())
    assert len(synthesise(double, 4, updates=2).images) == 4


def test_large_images_are_made_in_smaller_batches() -> None:
    teacher = make_teacher(models.convnet(2, num_classes=3, channels=3), size=(3, 224, 224))
    assert _settings(teacher, 100, 2, 0, "cpu")["bank.batch_size"] == 21  # as recipe bank does


@pytest.mark.parametrize("wrong", [{"count": 0}, {"views": 0}, {"updates": -1}])
def test_numbers_must_be_positive(wrong: dict[str, Any], teacher: Classifier) -> None:
    (name,) = wrong
    line = refused(lambda: synthesise(teacher, **({"count": 4} | wrong)), UsageError)
    assert line == f"{name} = {wrong[name]}: expected a positive number"


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_files_hold_what_was_made(channels: int, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, channels, 5, 7), generator=rng, dtype=torch.uint8)
    logits = torch.randn(6, 10, generator=rng)
    targets = logits[::2].argmax(dim=1)
    targets[1] = (targets[1] + 1) % 10  # not recognised
    found = SyntheticImages(images, logits, targets, 2)
    network = make_teacher(size=(3, 16, 16))
    write_synthetic(tmp_path / "out", found, network, seed=5)
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        assert arrays["images"].dtype == np.float32
        assert np.array_equal((arrays["images"] * 255).round(), images.numpy())
        assert 0 <= arrays["images"].min() <= arrays["images"].max() <= 1
        assert np.allclose(arrays["probabilities"], found.logits.softmax(dim=1))
        assert arrays["image"].tolist() == [0, 0, 1, 1, 2, 2]
        assert arrays["targets"].tolist() == targets.repeat_interleave(2).tolist()
    names = sorted(path.name for path in (tmp_path / "out" / "png").glob("*"))
    assert names == ([] if channels == 2 else [f"{i:06d}-{v}.png" for i in range(3) for v in range(2)])
    for row, name in enumerate(names):
        with Image.open(tmp_path / "out" / "png" / name) as picture:
            pixels = np.asarray(picture).reshape(5, 7, channels)
        assert np.array_equal(pixels, images[row].permute(1, 2, 0).numpy())
    facts = json.loads((tmp_path / "out" / "images.json").read_text())
    assert (facts["images"], facts["views"], facts["seed"]) == (3, 2, 5)
    assert facts["teacher_fingerprint"] == network.fingerprint()
    assert facts["recognised"] == pytest.approx(2 / 3)
    assert facts["teacher_confidence"] == pytest.approx(float(found.logits.softmax(1).max(1).values.mean()))


def test_the_command(teacher: Classifier, tmp_path: Path) -> None:
    zskt.save_teacher(tmp_path / "teacher", teacher)
    out = tmp_path / "images"
    command = ["images", tmp_path / "teacher", "--count", 5, "--views", 2, "--updates", 4]
    status, printed, err = call(*command, "--out", out)
    assert status == 0, err
    result = json.loads(printed)
    assert (result["images"], result["views"]) == (5, 2)
    assert "of 100 as the class they were made for" in err
    with np.load(out / "images.npz") as arrays:
        expected = synthesise(teacher, 5, views=2, updates=4)
        assert np.array_equal(arrays["images"], expected.images.numpy() / np.float32(255))
    assert "already exists" in fails(1, *command, "--out", out)
    assert "count = 0" in fails(2, *command[:2], "--count", 0, "--out", tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "images"}


def test_a_failing_disk_leaves_nothing(teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    found = synthesise(teacher, 2, updates=1)
    assert "No space left" in refused(lambda: write_synthetic(tmp_path / "out", found, teacher))
    assert list(tmp_path.iterdir()) == []
