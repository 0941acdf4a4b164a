"""Distillation from a bank: storage, cached views, synthesis, exact resume."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import make_teacher
from zskt.errors import UsageError, ZsktError
from zskt.method.bank import Bank, BankDistillation
from zskt.method.recipe import plan
from zskt.method.synthesis import MetaGenerator, MovingStatistics
from zskt.method.views import Augmentation, jitter, random_views, view
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.observe import ChannelStatistics, Observation, logits_of
from zskt.run.distill import sampler

TINY: dict[str, Any] = {
    "steps": 24,
    "batch_size": 8,
    "generator.width": 8,
    "generator.latent": 12,
    "generator.updates": 3,
    "bank.batch_size": 10,
    "bank.rounds": 4,
    "bank.warmup": 2,
    "bank.views": 2,
    "student.learning_rate": 1e-2,
}
SIZE = (3, 8, 8)


def make_student(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("convnet-4", 10, SIZE)


@pytest.fixture
def teacher() -> Classifier:
    return make_teacher(size=SIZE)


def make(teacher: Classifier, changes: dict[str, Any] | None = None) -> BankDistillation:
    settled = plan(teacher, student := make_student(), "bank", TINY | (changes or {}))
    method = settled.make(teacher, student, settled.config)
    assert isinstance(method, BankDistillation)
    return method


def stored(teacher: Classifier, views: int, seed: int = 3, count: int = 24) -> tuple[Bank, Tensor]:
    """A bank that rounds nothing, and its images (count, C, H, W)."""
    bank = Bank(
        teacher,
        lambda images: Observation(logits_of(teacher.module(images))),
        count,
        views=views,
        augmentation=Augmentation(1, True),
        rng=torch.Generator().manual_seed(seed),
        as_bytes=False,
        logits=torch.float64,
    )
    images = torch.randn(count, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for batch in images.split(8):
        bank.add(batch)
    return bank, images


def test_a_view_is_the_crop_of_the_image_padded_by_its_edge_then_flipped() -> None:
    images = torch.randn(20, 3, 5, 7)
    views = random_views(20, Augmentation(2, True), torch.Generator().manual_seed(0))
    assert set(views[:, :2].flatten().tolist()) == {0, 1, 2, 3, 4}
    assert set(views[:, 2].tolist()) == {0, 1}
    for image, (top, left, flipped), shown in zip(images, views.tolist(), view(images, views, 2), strict=True):
        padded = nn.functional.pad(image.unsqueeze(0), (2, 2, 2, 2), mode="replicate")[0]
        crop = padded[:, top : top + 5, left : left + 7]
        assert torch.equal(shown, crop.flip(2) if flipped else crop)


def test_jitter_crops_a_batch_at_one_place_and_flips_each_image_at_random() -> None:
    images = torch.arange(200.0).view(8, 1, 5, 5).requires_grad_()
    shown = jitter(images, Augmentation(1, True), torch.Generator().manual_seed(1))
    corners = torch.arange(9).view(3, 3)
    matches = [
        all(torch.equal(x, y) or torch.equal(x, y.flip(2)) for x, y in zip(shown, view(images, v, 1), strict=True))
        for top, left in [divmod(int(c), 3) for c in corners.flatten()]
        for v in [torch.tensor([[top, left, 0]] * 8)]
    ]
    assert sum(matches) == 1
    shown.sum().backward()
    assert images.grad is not None


def test_cached_logits_are_the_teachers_for_what_the_student_sees(teacher: Classifier) -> None:
    """Unrounded, in float64, and asked in the same batches: bit for bit."""
    double = make_teacher(size=SIZE).double()
    bank, images = stored(double, views=3)
    assert len(bank.rows(0)["views"].unique(dim=1)) == 24
    for start in range(0, 24, 8):
        for number in range(3):
            shown = view(images[start : start + 8], bank.views[start : start + 8, number], 1)
            with torch.no_grad():
                assert torch.equal(bank.logits[start : start + 8, number], double(shown))
    batch = bank.draw(200)
    assert batch.teacher is not None
    with torch.no_grad():
        torch.testing.assert_close(batch.teacher.logits, double(batch.images), rtol=1e-10, atol=1e-10)


def test_half_precision_costs_no_more_than_its_rounding(teacher: Classifier) -> None:
    method = make(teacher)
    while method.bank.count == 0:
        method.step()
    batch = method.bank.draw(50)
    assert batch.teacher is not None
    with torch.no_grad():
        exact = teacher(batch.images)
    torch.testing.assert_close(batch.teacher.logits, exact, rtol=2**-11, atol=1e-4)


def test_without_views_the_teacher_is_asked_about_every_batch(teacher: Classifier) -> None:
    double = make_teacher(size=SIZE).double()
    bank, _ = stored(double, views=0)
    first, second = bank.draw(20), bank.draw(20)
    for batch in (first, second):
        assert batch.teacher is not None
        with torch.no_grad():
            assert torch.equal(batch.teacher.logits, double(batch.images))
    assert not torch.equal(first.images, second.images)


def test_images_survive_storage_as_bytes(teacher: Classifier) -> None:
    method = make(teacher)
    pixels = torch.randint(0, 256, (10, *SIZE), dtype=torch.uint8)
    method.bank.add(teacher.normalise(pixels))
    assert torch.equal(method.bank.images[:10], pixels)


def test_logits_too_large_for_half_precision_are_refused(teacher: Classifier) -> None:
    method = make(teacher)
    method.bank.ask = lambda images: Observation(torch.full((len(images), 10), 1e6))
    with pytest.raises(ZsktError, match=r"overflow torch.float16.*use bank.views=0"):
        method.bank.add(torch.zeros(10, *SIZE))
    asked = make(teacher, {"bank.views": 0})
    asked.bank.ask = method.bank.ask
    asked.bank.add(torch.zeros(10, *SIZE))  # the remedy


def test_a_student_that_has_not_begun_is_not_warned_of(teacher: Classifier) -> None:
    """Of 24 steps 6 are warm-up, of a round of 3 each; before the first one there is nothing to look at."""
    method = make(teacher)
    assert (method.progress, method.has_images) == (0, False)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zskt.run.examiner.new_warnings", lambda past, now, progress: seen.append(progress))
        lines: list[dict[str, Any]] = []
        zskt.distill(
            teacher,
            make_student(),
            "bank",
            settings=TINY | {"evaluate_every": 1},
            callbacks=[lambda event: lines.append(dict(event.line or {}))],
        )
    assert ["class_counts" in line for line in lines] == [False, False] + [True] * 22
    assert seen == [0.0] * 4 + [n / 18 for n in range(1, 19)]


def test_places_that_a_byte_cannot_hold_are_refused(teacher: Classifier) -> None:
    with pytest.raises(UsageError, match=r"bank.random_crop = 128: expected at most 127"):
        make(teacher, {"bank.random_crop": 128})
    drawn = random_views(2_000, Augmentation(127, False), torch.Generator().manual_seed(0))  # (2000, 3)
    assert drawn[:, :2].max() == 254
    assert 117 < drawn[:, :2].float().mean() < 137


def test_a_gentler_generator_is_gentler_between_rounds_too() -> None:
    change = []
    for gentler in (1.0, 0.5):
        layer = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(layer.weight)
        meta = MetaGenerator(layer, lambda parameters: torch.optim.SGD(parameters, 0.1))
        layer.weight.grad = torch.ones(2, 2)
        meta.add_gradients()
        meta.end_round(gentler)
        change.append(float(layer.weight.detach().mean()))
    assert change == pytest.approx([-0.1, -0.05])


def test_synthesis_is_spread_over_the_steps_as_the_config_says(teacher: Classifier) -> None:
    method = make(teacher, {"bank.until": 0.5})
    made, learnt = [], []
    for _ in range(method.steps):
        method.step()
        made.append(method.synthesis.updates.done)
        learnt.append(method.student_updates.done)
    assert made[:6] == [1, 2, 3, 4, 5, 6]  # warm-up: 2 rounds of 3 updates
    assert learnt == [0] * 6 + list(range(1, 19))
    assert made[6 + 8] == made[-1] == 12  # all 4 rounds by half of 18 student updates
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(made))
    assert method.bank.count == 40


def test_every_round_has_all_classes_alike_and_keeps_its_best_images(teacher: Classifier) -> None:
    method = make(teacher, {"bank.batch_size": 25})
    synthesis, losses, images = method.synthesis, list[float](), list[Tensor]()
    synthesis.generator.register_forward_hook(lambda module, inputs, output: images.append(output))
    for _ in range(3):
        loss, batch = synthesis.update()
        losses.append(loss.total.item())
    assert batch is not None
    assert batch.labels is not None
    assert set(batch.labels.bincount(minlength=10).tolist()) == {2, 3}
    assert torch.equal(batch.images, images[losses.index(min(losses))])
    assert torch.equal(synthesis.images, batch.images)
    before = synthesis.latents.clone()
    synthesis.update()
    assert not torch.equal(before, synthesis.latents)
    adam = synthesis.updates.optimizer
    assert {int(state["step"]) for state in adam.state.values()} == {1}


@pytest.mark.parametrize("others", [{"batchnorm", "one_hot"}, set()])
def test_the_warmup_leaves_the_adversary_out_unless_it_is_all_there_is(teacher: Classifier, others: set[str]) -> None:
    weights = {f"generator.loss.{name}": float(name in others) for name in ("batchnorm", "one_hot")}
    method = make(teacher, weights | {"generator.loss.kl": -1.0})
    asked = []
    method.student.register_forward_hook(lambda *_: asked.append(method.synthesis.updates.done))
    terms = [set(method.synthesis.update()[0].terms) for _ in range(9)]  # three rounds, of which two warm up
    assert terms == [others or {"kl"}] * 6 + [others | {"kl"}] * 3
    assert asked == list(range(6 if others else 0, 9))


def test_moving_statistics_are_the_average_that_fast_uses() -> None:
    moving, running = MovingStatistics(0.9), torch.zeros(2)
    batches = [torch.tensor([float(i), 2.0 * i], requires_grad=True) for i in (1, 2, 3)]
    for index, mean in enumerate(batches):
        moving.end_round()
        moving(Observation(torch.zeros(1, 2), [], [ChannelStatistics(mean * 100, mean, running, running)]))  # replaced
        seen = moving(Observation(torch.zeros(1, 2), [], [ChannelStatistics(mean, mean + 1, running, running)]))
        expected = [1.0, 0.9 * 1 + 0.1 * 2, 0.9 * 1.1 + 0.1 * 3][index]
        assert seen.statistics[0].mean[0].item() == pytest.approx(expected)
        assert seen.statistics[0].variance[1].item() == pytest.approx(2 * expected + 1)
    seen.statistics[0].mean.sum().backward()
    assert batches[2].grad is not None
    assert batches[2].grad.tolist() == pytest.approx([0.1, 0.1])
    assert batches[0].grad is None


def test_the_next_round_begins_with_one_meta_step_along_the_sum_of_all_gradients(teacher: Classifier) -> None:
    method = make(teacher, {"bank.survives": "meta"})
    synthesis = method.synthesis
    parameters = list(synthesis.generator.parameters())
    before: list[Tensor] = [p.detach().clone().requires_grad_() for p in parameters]
    adam = torch.optim.Adam(before, lr=3 * 4e-3, betas=(0.5, 0.999))
    total = [torch.zeros_like(p) for p in parameters]
    moved = False
    for number in range(3):
        synthesis.update()
        if number == 1:
            moved = any(not torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
        for gradients, p in zip(total, parameters, strict=True):
            assert p.grad is not None
            gradients += p.grad
    for initial, gradients in zip(before, total, strict=True):
        initial.grad = gradients
    adam.step()
    assert moved
    for p, expected in zip(parameters, before, strict=True):
        torch.testing.assert_close(p, expected)


@pytest.mark.parametrize(("reset", "fresh"), [("first_layer", {"linear"}), ("generator", {"linear", "blocks", "conv"})])
def test_what_is_reset_begins_anew_and_nothing_else(teacher: Classifier, reset: str, fresh: set[str]) -> None:
    method = make(teacher, {"bank.reset": reset, "bank.reset_every": 2, "generator.learning_rate": 1e-9})
    synthesis, generator = method.synthesis, method.synthesis.generator

    def changed(before: dict[str, Tensor]) -> set[str]:
        after = {name: p.detach() for name, p in generator.named_parameters()}
        return {name.split(".")[0] for name, p in after.items() if (p - before[name]).abs().max() > 1e-3}

    before = {name: p.detach().clone() for name, p in generator.named_parameters()}
    for _ in range(6):
        synthesis.update()
    assert changed(before) == set()
    synthesis.update()
    assert changed(before) == fresh  # a BatchNorm begins as it was


def test_free_pixels_stay_within_the_range_of_pixels_and_can_return_to_it(teacher: Classifier) -> None:
    method = make(teacher, {"bank.pixels": True, "bank.latent_learning_rate": 1.0})
    synthesis = method.synthesis
    assert synthesis.latents.shape == (10, *SIZE)
    for _ in range(3):
        synthesis.update()
    assert synthesis.latents.grad is not None
    assert bool((synthesis.latents.grad.abs().flatten(1).sum(dim=1) > 0).all())
    torch.testing.assert_close(synthesis.images, teacher.normalise(teacher.denormalise(synthesis.images)))


META = {"bank.momentum": 0.9, "bank.survives": "meta", "bank.reset": "first_layer", "bank.reset_every": 2}


@pytest.mark.parametrize(
    ("stop", "changes"),
    [(4, META), (8, META), (13, META | {"bank.reset": "generator"}), (20, {}), (8, {"bank.pixels": True})],
)
def test_a_stopped_run_resumes_bit_for_bit(
    teacher: Classifier, tmp_path: Path, stop: int, changes: dict[str, Any]
) -> None:
    """In the warm-up, within a round, between rounds, after the last round."""

    def run(out: Path, stop: int | None = None, resume: bool = False) -> zskt.DistillResult:
        settings = TINY | changes | {"log_every": 1, "checkpoint_every": 2}
        student = make_student()
        return zskt.distill(teacher, student, "bank", settings=settings, out=out, stop_after=stop, resume=resume)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop)
    parts = run(tmp_path / "parts", resume=True)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, parts.student.state_dict()[name]), name
    for file in ("metrics.jsonl", "config.toml"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    draw = sampler(tmp_path / "parts", zskt.load_student(tmp_path / "parts"))
    assert torch.equal(draw(16, 5), whole.method.sample(16, 5))


def test_damaged_rows_are_noticed_and_late_ones_removed(teacher: Classifier, tmp_path: Path) -> None:
    def run(resume: bool = False) -> zskt.DistillResult:
        return zskt.distill(
            teacher, make_student(), "bank", settings=TINY, out=tmp_path / "run", stop_after=12, resume=resume
        )

    run()
    (tmp_path / "run" / "rows" / "00000099-00000100.safetensors").write_bytes(b"written after the checkpoint")
    shard = min((tmp_path / "run" / "rows").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ZsktError, match="not as the checkpoint recorded it"):
        run(resume=True)
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run(resume=True).finished
    assert sum(int(path.stem[9:]) - int(path.stem[:8]) for path in (tmp_path / "run" / "rows").iterdir()) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank.warmup": 5}, "bank.warmup"),
        ({"bank.warmup": 0}, "bank.warmup"),
        ({"steps": 6}, "warm-up"),
        ({"student.updates": 2}, "student.updates"),
        ({"student.loss.attention": 250.0}, "attention"),
        ({"bank.until": 0.0}, "bank.until"),
        ({"bank.reset": "generator"}, "bank.reset_every"),
        ({"bank.pixels": True, "bank.survives": "meta"}, "bank.pixels"),
        ({"generator.output": "batchnorm"}, "generator.output"),
        ({"replay.kind": "fresh"}, "replay.kind has no effect"),
        ({"student.mode_for_generator": "eval"}, "student.mode_for_generator has no effect"),
        ({"generator.mode_for_student": "eval"}, "generator.mode_for_student has no effect"),
        ({"generator.loss.activation": 0.1}, "generator.loss.activation has no effect"),
        ({"bank.momentum": 1.0}, "bank.momentum"),
    ],
)
def test_settings_that_cannot_work_are_refused(teacher: Classifier, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(teacher, make_student(), "bank", TINY | changes)


def test_a_bank_for_another_method_is_refused(teacher: Classifier) -> None:
    with pytest.raises(UsageError, match="method = bank"):
        plan(teacher, make_student(), "zskt", {"bank.rounds": 3})


def test_a_teacher_without_batchnorm_is_refused_by_name() -> None:
    bare = make_teacher(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), size=SIZE)
    with pytest.raises(ZsktError, match="recipe bank needs the BatchNorm statistics of the teacher"):
        plan(bare, make_student(), "bank", TINY)
