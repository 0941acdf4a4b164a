"""Unlabelled images that a user does have, in the bank of a run."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zskt
from small import coloured as images_of
from small import fails, make_teacher, refused, run, write_images
from zskt.data.images import read_unlabelled
from zskt.errors import UsageError, ZsktError
from zskt.files import read_tensors
from zskt.method.bank import BankDistillation
from zskt.method.budget import BUDGETED, Cost, disk
from zskt.method.memory import need
from zskt.method.recipe import plan
from zskt.method.views import view
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.folder import save_teacher
from zskt.run.distill import sampler

SIZE = (1, 8, 8)
TINY: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "generator.width": 4,
    "generator.latent": 4,
    "generator.updates": 2,
    "bank.batch_size": 4,
    "bank.rounds": 3,
    "bank.warmup": 1,
    "bank.views": 3,
    "bank.horizontal_flip": True,
}
OWN = images_of(6, size=SIZE).images


@pytest.fixture
def teacher() -> Classifier:
    torch.manual_seed(0)
    return make_teacher(models.convnet(2, num_classes=3, channels=1), size=SIZE)


def student() -> nn.Module:
    torch.manual_seed(1)
    return models.convnet(1, num_classes=3, channels=1)


def distil(teacher: Classifier, images: Tensor | None = OWN, **options: Any) -> zskt.DistillResult:
    settings = TINY | options.pop("settings", {})
    return zskt.distill(teacher, student(), "bank", settings=settings, images=images, **options)


def test_they_are_the_first_rows_with_views_and_the_teachers_logits(teacher: Classifier) -> None:
    method = distil(teacher).method
    assert isinstance(method, BankDistillation)
    rows = method.rows(0)
    assert len(rows["images"]) == len(OWN) + 3 * 4 == len(method.bank.images)  # full: the capacity grew by them
    assert torch.equal(rows["images"][:6], OWN)
    assert rows["views"].shape == (18, 3, 3)
    assert len(rows["views"][:6].unique(dim=1)) == 6
    assert len(rows["views"][:6].flatten(0, 1).unique(dim=0)) > 3  # views are drawn, not given
    for number in range(3):
        shown = teacher.normalise(view(OWN, rows["views"][:6, number], 1))
        with torch.no_grad():
            torch.testing.assert_close(rows["logits"][:6, number].float(), teacher(shown), rtol=1e-3, atol=1e-3)


def test_the_teacher_is_asked_once_for_each_view(teacher: Classifier) -> None:
    """Of own images and of pseudo images; the rounds of synthesis ask on top, with and without them."""
    asked: list[int] = []

    def count(images: Tensor | None) -> int:
        asked.clear()
        distil(teacher, images)
        return sum(asked)

    hook = teacher.module.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    try:
        assert count(OWN) - count(None) == 3 * len(OWN)
    finally:
        hook.remove()


def test_they_are_drawn_as_often_as_the_others(teacher: Classifier) -> None:
    method = distil(teacher).method
    assert isinstance(method, BankDistillation)
    method.bank.images[:6] = 255
    method.bank.images[6:] = 0
    drawn = teacher.denormalise(method.bank.draw(3_000).images).mean(dim=(1, 2, 3))  # (3000,)
    assert abs(float(drawn.mean()) - 6 / 18) < 4 * (1 / 3 * 2 / 3 / 3_000) ** 0.5


def test_samples_are_pseudo_images_only(teacher: Classifier, tmp_path: Path) -> None:
    """Nobody's own images are in a report, in an export's comparison or in its calibration."""
    white = torch.full((6, *SIZE), 255, dtype=torch.uint8)
    result = distil(teacher, white, out=tmp_path / "a")
    for drawn in (result.method.sample(500, 0), sampler(tmp_path / "a", result.network)(500, 0)):
        pixels = (result.network.denormalise(drawn) * 255).round()
        assert not (pixels == 255).flatten(1).all(dim=1).any()
    method = distil(teacher, white, settings={"bank.warmup": 2}, stop_after=1, out=tmp_path / "b").method
    assert isinstance(method, BankDistillation)
    assert method.bank.count == 6  # no pseudo image is finished yet
    assert not (method.sample(50, 0) == teacher.normalise(white[:1])).flatten(1).all(dim=1).any()


def test_the_result_says_so(teacher: Classifier, tmp_path: Path) -> None:
    result = distil(teacher, out=tmp_path / "a")
    assert result.images == 6
    assert json.loads((tmp_path / "a" / "student.json").read_text())["images"] == 6
    zskt.write_report(tmp_path / "a", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Distilled with data" in page
    assert "not data-free: 6 unlabelled images" in page
    zskt.export(tmp_path / "a", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "6 unlabelled images, so not without data" in card
    assert "data-free" not in card
    plain = distil(teacher, None, out=tmp_path / "b")
    assert plain.images == 0
    assert "images" not in json.loads((tmp_path / "b" / "student.json").read_text())
    summary = zskt.write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html")
    assert "the runs differ in images of the user" in (tmp_path / "both.html").read_text()
    assert not summary


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_is_the_same_to_the_bit(teacher: Classifier, tmp_path: Path, stop: int) -> None:
    whole = distil(teacher, out=tmp_path / "whole")
    distil(teacher, out=tmp_path / "a", stop_after=stop)
    resumed = distil(teacher, out=tmp_path / "a", resume=True)
    assert resumed.finished
    first, second = (read_tensors(tmp_path / name / "student.safetensors")[0] for name in ("whole", "a"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert isinstance(whole.method, BankDistillation)
    assert isinstance(resumed.method, BankDistillation)
    for name, rows in whole.method.rows(0).items():
        assert torch.equal(rows, resumed.method.rows(0)[name])
    other = distil(teacher, OWN.flip(0))
    pairs = zip(other.student.parameters(), whole.student.parameters(), strict=True)
    assert any(not torch.equal(first, second) for first, second in pairs)


def test_other_images_are_refused_on_resume(teacher: Classifier, tmp_path: Path) -> None:
    distil(teacher, out=tmp_path / "a", stop_after=4)
    for images in (None, OWN[:5], OWN.flip(0)):
        line = refused(functools.partial(distil, teacher, images, out=tmp_path / "a", resume=True))
        assert "differs in images 6 of " in line
        assert line.endswith("resume it with the same")
    distil(teacher, None, out=tmp_path / "b", stop_after=4)
    assert "differs in images none, now 6 of" in refused(lambda: distil(teacher, out=tmp_path / "b", resume=True))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 1, 8, 7, dtype=torch.uint8), "expected images of 1 x 8 x 8, found 1 x 8 x 7"),
        (
            torch.zeros(0, *SIZE, dtype=torch.uint8),
            "expected at least one image and uint8, as a bank stores them",
        ),
        (torch.zeros(3, *SIZE), "found 3 images of torch.float32; convert them"),
        ([1], "expected images as a torch.Tensor, found list"),
    ],
    ids=["size", "none", "floats", "list"],
)
def test_images_that_do_not_fit_are_refused(teacher: Classifier, images: Any, words: str) -> None:
    assert words in refused(lambda: distil(teacher, images))


def test_the_estimates_count_them(teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zskt.method.recipe.probe", lambda *_: Cost(round=1.0, step=0.1, asked=0.5))
    budget = {name: value for name, value in TINY.items() if name not in BUDGETED} | {"budget": "100s"}
    config = plan(teacher, student(), "bank", budget, own=len(OWN)).config
    assert config.bank.rounds < plan(teacher, student(), "bank", budget).config.bank.rounds
    out = tmp_path / "run"
    assert zskt.distill(teacher, student(), settings=budget, images=OWN, out=out, stop_after=1).config == config
    more = need(teacher, student(), config, own=6).fixed - need(teacher, student(), config).fixed
    image = 64 + 3 * (3 + 2 * 3)  # pixels, and three views with three logits each
    assert disk(teacher, student(), config, own=6) - disk(teacher, student(), config) == 6 * image
    assert more == 6 * image


def test_a_method_without_a_bank_refuses_them(teacher: Classifier) -> None:
    line = refused(lambda: zskt.distill(teacher, student(), "zskt", steps=2, images=OWN), UsageError)
    assert "found recipe zskt, which would not use them; give --recipe bank" in line
    own = refused(
        lambda: zskt.distill(teacher, student(), method=zskt.belief_matching, steps=2, images=OWN), UsageError
    )
    assert "found method build.py:belief_matching" in own


@pytest.fixture
def folder(teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher, and images in folders that mean nothing, in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "teacher", teacher)
    for i, image in enumerate(OWN):
        place = tmp_path / "mine" / ("a" if i % 2 else "b/c") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place)
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    return tmp_path


COMMAND: list[Any] = ["distill", "teacher", "--student", "convnet-1", "--recipe", "bank"]
COMMAND += [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_the_command_reads_a_folder_and_remembers_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(*COMMAND, "--images", "mine", "--out", "whole")
    assert found["images"] == 6
    assert run("inspect", "whole")["images"] == 6
    assert "images" not in run("inspect", "teacher")
    run(*COMMAND, "--images", "mine", "--out", "a", "--stop-after", 4)
    assert run("inspect", "a")["images"] == 6
    monkeypatch.chdir("/")
    assert run("distill", "--resume", "--out", folder / "a")["images"] == 6
    first, second = ((folder / name / "student.safetensors").read_bytes() for name in ("whole", "a"))
    assert first == second


def test_one_line_each(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "expected PNG, JPEG or similar images in empty, found none" in fails(
        1, *COMMAND, "--images", "empty", "--out", "a"
    )
    assert "expected a folder or archive of images at nowhere" in fails(
        1, *COMMAND, "--images", "nowhere", "--out", "a"
    )
    assert "--recipe bank" in fails(
        2, "distill", "teacher", "--student", "convnet-1", "--recipe", "zskt", "--images", "nowhere", "--out", "a"
    )
    run(*COMMAND, "--images", "mine", "--out", "b", "--stop-after", 4)
    (folder / "mine" / "a" / "1.png").unlink()
    assert "differs in images 6 of" in fails(1, "distill", "--resume", "--out", "b")


def test_images_are_read_at_the_networks_size_in_the_order_of_their_names(folder: Path) -> None:
    lines: list[str] = []
    found = read_unlabelled(folder / "mine", SIZE, notice=lines.append)
    assert torch.equal(found, OWN[[1, 3, 5, 0, 2, 4]])  # a/1, a/3, a/5, b/c/0, ...
    assert not lines
    assert read_unlabelled(folder / "mine", (3, 4, 4), notice=lines.append).shape == (6, 3, 4, 4)
    assert "6 of 6 images resized and centre-cropped to 4 x 4" in lines
    write_images(folder / "labelled", train=images_of(3, size=SIZE))
    assert len(read_unlabelled(folder / "labelled", SIZE)) == 3  # classes do not matter
    with pytest.raises(ZsktError, match="C 1 or 3"):
        read_unlabelled(folder / "mine", (4, 8, 8))
