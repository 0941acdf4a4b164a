"""The toy experiment: its geometry, both players against a plain restatement, its plots and numbers."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zskt.errors import UsageError
from zskt.method.losses import forward_kl
from zskt.paper import toy
from zskt.paper.toy import PointMatching, butterfly, draw_frame, mlp, point_gradient, reproduce_toy, run_toy, squash


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of two epochs and a coarse grid, unless a test overrides it."""
    monkeypatch.setattr(toy, "EPOCHS", 2)
    monkeypatch.setattr(toy, "GRID", 31)
    monkeypatch.setattr(toy, "FRAMES", 4)


def make_matching(*, steepness: float = 1.0, dtype: torch.dtype = torch.float64) -> PointMatching:
    """Two players with untrained networks, the student's logits `steepness` times as large, points around 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, student = mlp().to(dtype), mlp().to(dtype)
        points = torch.randn(20, 2, dtype=dtype)
    with torch.no_grad():
        for parameter in student[4].parameters():
            parameter.mul_(steepness)
    return PointMatching(teacher.requires_grad_(False), student, points)


def weights(*networks: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for network in networks for parameter in network.parameters()]


def divergence(matching: PointMatching) -> float:
    x = squash(matching.points)
    return float(forward_kl(matching.student(x), matching.teacher(x)).detach())


def test_butterfly_is_the_papers() -> None:
    points, labels = butterfly(0)
    assert points.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert points.shape == (len(labels), 2)
    assert [int((labels == k).sum()) for k in (1, 2)] == [2000, 2000]
    wings, bodies = points[labels == 0], {k: points[labels == k] for k in (1, 2)}
    # Of N((0, +-1), (.3, .4)) about 69 % lie at least .3 from the centre.
    assert 1300 < len(wings) < 1460
    for sign, guest in ((1, 1), (-1, 2)):
        centre = torch.tensor([0.0, sign])
        wing = wings[wings[:, 1] * sign > 0]
        assert 600 < len(wing) < 780
        assert float((wing - centre).norm(dim=1).min()) >= 0.3
        across, along = (wing - centre).std(dim=0).tolist()
        assert 0.3 < across < 0.38 < 0.43 < along < 0.5  # wider than .3 and .4, because of the hole
        inner = bodies[guest][(bodies[guest] - centre).norm(dim=1) < 0.3]
        assert 990 < len(inner) < 1020  # the narrow Gaussian in the hole, and a few points of the wide one
        assert torch.allclose(inner.mean(dim=0), centre, atol=0.02)
        assert torch.allclose(inner.std(dim=0), torch.tensor([0.06, 0.06]), atol=0.015)
    for k, x in ((1, -1.0), (2, 1.0)):
        wide = bodies[k][bodies[k][:, 1].abs() < 0.7]
        assert torch.allclose(wide.mean(dim=0), torch.tensor([x, 0.0]), atol=0.05)
        assert torch.allclose(wide.std(dim=0), torch.tensor([0.4, 0.28]), atol=0.03)


def test_butterfly_is_shuffled_and_follows_its_seed() -> None:
    points, labels = butterfly(0)
    assert all(torch.equal(a, b) for a, b in zip(butterfly(0), (points, labels), strict=True))
    assert not torch.equal(butterfly(1)[0][:100], points[:100])
    share = [float((labels[:1000] == k).float().mean()) for k in range(3)]
    assert all(0.2 < s < 0.45 for s in share)


def test_squash_stays_in_the_square() -> None:
    x = squash(torch.tensor([[-200.0, 0.0], [3.0, 200.0]]))
    assert torch.allclose(x, torch.tensor([[-3.0, 0.0], [6 / (1 + math.exp(-3)) - 3, 3.0]]))


@pytest.mark.parametrize("steepness", [1.0, 30.0])
def test_the_written_out_gradient_is_that_of_autograd(steepness: float) -> None:
    matching = make_matching(steepness=steepness)
    points = (2 * matching.points).requires_grad_()
    loss = forward_kl(matching.student(squash(points)), matching.teacher(squash(points)), scale="per_class")
    (expected,) = torch.autograd.grad(loss, points)
    found = point_gradient(points.detach(), *matching.weights)
    assert float(expected.abs().max()) > 1e-4
    assert torch.allclose(found.detach(), expected, rtol=1e-9, atol=1e-14)


def test_moving_points_raises_the_divergence_and_changes_no_weight() -> None:
    matching = make_matching(steepness=5)
    before, networks = divergence(matching), weights(matching.teacher, matching.student)
    points = matching.points.clone()
    matching.move_points()
    assert divergence(matching) > before
    assert not torch.equal(matching.points, points)
    after = weights(matching.teacher, matching.student)
    assert all(torch.equal(a, b) for a, b in zip(networks, after, strict=True))
    assert all(p.grad is None for w in matching.weights for p in w)


def test_training_lowers_the_divergence_and_changes_only_the_student() -> None:
    matching = make_matching(steepness=5)
    before, teacher, student = divergence(matching), weights(matching.teacher), weights(matching.student)
    points = matching.points.clone()
    matching.train_student()
    assert divergence(matching) < before
    assert torch.equal(matching.points, points)
    assert all(torch.equal(a, b) for a, b in zip(teacher, weights(matching.teacher), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(student, weights(matching.student), strict=True))


def plain_rounds(matching: PointMatching, rounds: int) -> tuple[Tensor, list[Tensor]]:
    """The published loop with autograd, independent of ours; returns points and student weights."""
    teacher, student = matching.teacher, mlp().double()
    student.load_state_dict(matching.student.state_dict())
    points = matching.points.clone().requires_grad_()
    of_points = torch.optim.Adam([points], lr=1e-3, fused=False, foreach=False)
    of_student = torch.optim.Adam(student.parameters(), lr=1e-3, fused=False, foreach=False)

    def kl() -> Tensor:
        x = 6 * torch.sigmoid(points) - 3
        return F.kl_div(F.log_softmax(student(x), dim=1), F.softmax(teacher(x), dim=1), reduction="mean")

    for _ in range(rounds):
        for _ in range(50):
            points.grad = torch.autograd.grad(-kl(), points)[0].clamp(-3, 3)
            of_points.step()
        for _ in range(10):
            of_student.zero_grad()
            torch.autograd.backward(kl(), inputs=list(student.parameters()))
            norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
            for p in student.parameters():
                assert p.grad is not None
                p.grad *= min(1.0, 3 / (float(norm) + 1e-6))
            of_student.step()
    return points.detach(), weights(student)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # on purpose here
@pytest.mark.parametrize("steepness", [1.0, 2000.0])
def test_rounds_are_those_of_a_plain_loop(steepness: float) -> None:
    matching = make_matching(steepness=steepness)
    points, student = plain_rounds(matching, rounds=3)
    start = matching.points.clone()
    for _ in range(3):
        matching.move_points()
        matching.train_student()
    assert float((points - start).abs().max()) > 0.05
    assert torch.allclose(matching.points, points, atol=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(weights(matching.student), student, strict=True))


def test_gradients_are_clipped_at_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "POINT_STEPS", 1)
    monkeypatch.setattr(toy, "STUDENT_STEPS", 1)
    matching = make_matching(steepness=2000)
    free = point_gradient(matching.points, *matching.weights).detach()
    assert float(free.abs().max()) > 3
    matching.move_points()
    assert matching.points.grad is not None
    assert torch.equal(matching.points.grad, free.clamp(-3, 3))
    x = squash(matching.points)
    loss = forward_kl(matching.student(x), matching.teacher(x), scale="per_class")
    free_norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, matching.weights[1])]).norm()
    assert float(free_norm) > 3
    matching.train_student()
    norm = torch.cat([p.grad.flatten() for p in matching.weights[1] if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(3, rel=1e-4)


def test_runs_are_reproducible_and_change_no_global_state() -> None:
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    seen: list[toy.Frame] = []
    first, second, other = run_toy(3, rounds=4, callback=seen.append), run_toy(3, rounds=4), run_toy(4, rounds=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) > 0  # denormals as they were
    for a, b in zip((first.teacher, first.student), (second.teacher, second.student), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))
    assert [frame.round for frame in first.frames] == [0, 1, 2, 3, 4]
    assert seen == first.frames
    assert all(torch.equal(a.points, b.points) for a, b in zip(first.frames, second.frames, strict=True))
    assert not torch.equal(first.frames[0].points, other.frames[0].points)
    assert not torch.equal(first.frames[0].points, first.frames[1].points)
    assert not torch.equal(weights(first.teacher)[0], weights(other.teacher)[0])


def test_the_number_of_threads_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)

    def stop(frame: toy.Frame) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy(0, rounds=1, callback=stop)
    assert calls == [1, 7]


def test_teachers_differ_by_seed_and_are_frozen() -> None:
    points, labels = butterfly(0)
    teachers = [toy.train_teacher(points[:200], labels[:200], seed) for seed in (0, 0, 1)]
    first, again, other = (weights(teacher)[0] for teacher in teachers)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not any(parameter.requires_grad for parameter in teachers[0].parameters())


def test_teacher_learns_the_butterfly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "EPOCHS", 8)
    result = run_toy(0, rounds=1)
    assert result.teacher_accuracy > 0.93
    points, labels = butterfly(0)
    assert len(result.test[0]) == round(0.3 * len(points))
    assert float((result.teacher(result.test[0]).argmax(1) == result.test[1]).float().mean()) == result.teacher_accuracy
    assert set(map(tuple, result.test[0].tolist())) < set(map(tuple, points.tolist()))
    assert len(labels) == len(points)


def test_agreement_is_that_of_the_classes_over_the_plane() -> None:
    result = run_toy(0, rounds=2)
    last = result.frames[-1]
    for i, j in ((0, 0), (0, 30), (30, 0), (17, 4)):  # row y from the bottom, column x
        x = torch.tensor([[-3 + 0.2 * j, -3 + 0.2 * i]])
        assert int(result.teacher(x).argmax()) == result.classes[i, j]
        assert int(result.student(x).argmax()) == last.classes[i, j]
    assert result.agreement == last.agreement == float((result.classes == last.classes).float().mean())


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def test_a_frame_shows_the_scale_of_a_shortened_run() -> None:
    result = run_toy(0, rounds=1)
    frame = result.frames[-1]
    whole, cut = draw_frame(result, frame), draw_frame(result, frame, scale=0.01)
    assert whole.mode == "RGB"
    assert whole.size == cut.size == (900, 490)
    red = (pixels(cut) == (0xBB, 0, 0)).all(axis=2)
    assert red.sum() > 100
    assert not (pixels(whole) == (0xBB, 0, 0)).all(axis=2).any()
    top, right = np.argwhere(pixels(whole) != pixels(cut)).max(axis=0)[:2]
    assert top < 40  # beside the title, covering nothing
    assert right < 150


def test_a_frame_shows_points_over_both_sides_and_the_plane_the_right_way_up() -> None:
    result = run_toy(0, rounds=1)
    regions = torch.tensor([2] * 15 + [1] * 16).view(31, 1).expand(31, 31)  # class 1 above, 2 below
    image = draw_frame(result, toy.Frame(1, 0.5, torch.tensor([[-1.5, 1.5]]), regions))
    assert image.getpixel((139, 167)) == image.getpixel((583, 167)) == (255, 255, 255)
    assert image.getpixel((780, 167)) == (0xF6, 0xE7, 0xC4)
    assert image.getpixel((780, 363)) == (0xEC, 0xCD, 0xD3)


def test_an_animation_can_be_read_back(tmp_path: Path) -> None:
    images = [Image.new("RGB", (40, 20), color) for color in ("red", "green", "blue")]
    toy.save_animation(tmp_path / "a.gif", images)
    with Image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == 3  # type: ignore[attr-defined]
        assert found.size == (40, 20)
        found.seek(2)
        assert found.convert("RGB").getpixel((5, 5))[2] > 200  # type: ignore[index]
        assert found.info["duration"] == 2000
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_reproducing_gives_medians_and_pictures(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    result = reproduce_toy([5, 1, 3], tmp_path, scale=0.0005, progress=lambda *given: seen.append(given))
    assert list(result) == ["agreement", "teacher_accuracy", "seconds", "seeds", "per_seed", "scale"]
    assert result["scale"] == 0.0005
    assert result["seeds"] == [run["seed"] for run in result["per_seed"]] == [5, 1, 3]
    for name in ("agreement", "teacher_accuracy"):
        values = [run[name] for run in result["per_seed"]]
        assert len(set(values)) == 3
        assert result[name] == statistics.median(values) == sorted(values)[1]
        assert all(0 <= value <= 1 for value in values)
    for run in result["per_seed"]:
        assert [done for done, _ in run["course"]] == [0, 1]
        assert run["course"][-1][1] == run["agreement"]
    assert result["seconds"] >= sum(run["seconds"] for run in result["per_seed"]) > 0
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
    assert seen[2][2].startswith("seed 1  agreement 0.")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    frames = [f"toy-seed-{seed}/round-0000{done}.png" for seed in (1, 3, 5) for done in (0, 1)]
    assert files == ["toy-agreement.png", *sorted([*frames, *(f"toy-seed-{seed}.gif" for seed in (1, 3, 5))])]
    for name in ("toy-agreement.png", frames[0]):
        assert (pixels(Image.open(tmp_path / name)) == (0xBB, 0, 0)).all(axis=2).any()
    with Image.open(tmp_path / "toy-seed-1.gif") as animation:
        assert animation.n_frames == 2  # type: ignore[attr-defined]


def test_a_full_run_shows_no_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "ROUNDS", 1)
    assert "scale" not in reproduce_toy([0], tmp_path)
    assert not (pixels(Image.open(tmp_path / "toy-agreement.png")) == (0xBB, 0, 0)).all(axis=2).any()


def test_a_small_scale_leaves_one_round(tmp_path: Path) -> None:
    assert reproduce_toy([0], tmp_path, scale=1e-9)["per_seed"][0]["course"][-1][0] == 1


@pytest.mark.parametrize(("seeds", "scale"), [([], 1.0), ([0], 0.0), ([0], 1.5), ([0], float("nan"))])
def test_invalid_seeds_and_scales_are_refused(tmp_path: Path, seeds: list[int], scale: float) -> None:
    with pytest.raises(UsageError, match="expected at least one seed and 0 < scale <= 1"):
        reproduce_toy(seeds, tmp_path, scale=scale)
