"""The paper's toy experiment: adversarial belief matching in two dimensions, where everything can be plotted.

Three classes form a butterfly in the plane. Fifty pseudo points, optimised directly instead of by a generator, move to
where student and teacher disagree, and a student that never sees the data is trained to agree there. Geometry and
numbers are those of the paper's notebook (polo5/ZeroShotKnowledgeTransfer, notebooks/toy_experiment.ipynb).
N points, K classes, G x G grid; everything runs in float32 on one CPU thread.
"""

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from zskt.errors import UsageError
from zskt.files import replacing
from zskt.method.losses import forward_kl
from zskt.paper.tables import markdown, provenance
from zskt.run.plots import save_image
from zskt.runtime import arithmetic, seeded, stream, threads

GAUSSIANS = (  # class, centre, standard deviations, radius of the hole around the centre
    (0, (0.0, 1.0), (0.3, 0.4), 0.3),
    (0, (0.0, -1.0), (0.3, 0.4), 0.3),
    (1, (-1.0, 0.0), (0.4, 0.3), 0.0),
    (1, (0.0, 1.0), (0.06, 0.06), 0.0),
    (2, (1.0, 0.0), (0.4, 0.3), 0.0),
    (2, (0.0, -1.0), (0.06, 0.06), 0.0),
)
DRAWN, TRAINING_SHARE, EPOCHS, BATCH, RATE = 1000, 0.7, 30, 50, 1e-3
"""points per Gaussian including the hole; training split; the teacher's epochs and batch size; Adam's learning rate"""
LARGEST = 3.0  # limit on the points' coordinates, on the elements of their gradient, and on the student's gradient norm
POINTS, ROUNDS, POINT_STEPS, STUDENT_STEPS = 50, 2000, 50, 10
"""the points take more steps than the student, the opposite of the experiments on images"""
GRID, FRAMES = 151, 50  # grid points per side of the plane; number of intervals between recorded rounds
COLORS, PALE = ("#4477aa", "#ddaa33", "#bb5566"), ListedColormap(["#c3d3e4", "#f6e7c4", "#eccdd3"])
"""of the classes' points and regions: colour-blind safe, and distinct in greyscale"""


@dataclass(frozen=True)
class Frame:
    """The record of a round."""

    round: int  # rounds done
    agreement: float  # share of the plane where student and teacher predict the same class
    points: Tensor  # pseudo points (N, 2)
    classes: Tensor  # the student's classes (G, G) over the plane, rows from the bottom


@dataclass(frozen=True)
class ToyResult:
    """One run of the experiment."""

    teacher: nn.Sequential  # trained on the butterfly, frozen
    student: nn.Sequential  # trained on pseudo points only; in eval mode, like the teacher
    teacher_accuracy: float  # on the test points
    agreement: float  # in the last frame
    frames: list[Frame]  # the recorded rounds, first and last included
    classes: Tensor  # the teacher's classes (G, G) over the plane, rows from the bottom
    test: tuple[Tensor, Tensor]  # points (M, 2) and their labels (M,)
    seconds: float  # wall time without drawing


def butterfly(seed: int) -> tuple[Tensor, Tensor]:
    """Points (M, 2) of three classes and their labels (M,), in random order, so any slice of them is a random split."""
    rng = torch.Generator().manual_seed(stream(seed, "toy data"))
    points, labels = [], []
    for label, centre, deviation, hole in GAUSSIANS:
        offsets = torch.randn(DRAWN, 2, generator=rng) * torch.tensor(deviation)  # (1000, 2)
        offsets = offsets[offsets.norm(dim=1) >= hole]  # (m, 2)
        points.append(torch.tensor(centre) + offsets)
        labels.append(torch.full((len(offsets),), label))
    order = torch.randperm(sum(map(len, points)), generator=rng)  # (M,)
    return torch.cat(points)[order], torch.cat(labels)[order]


def mlp() -> nn.Sequential:
    """The 2-100-500-3 network of teacher and student, initialised from torch's global generator."""
    return nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 3))


def train_teacher(points: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """An MLP trained with cross-entropy on points (M, 2) and labels (M,); incomplete batches are dropped."""
    with seeded(stream(seed, "toy teacher")):
        network = mlp()
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
        for _ in range(EPOCHS):
            for chosen in torch.split(torch.randperm(len(points)), BATCH)[: len(points) // BATCH]:
                loss = F.cross_entropy(network(points[chosen]), labels[chosen])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
    return network.eval().requires_grad_(False)


def squash(points: Tensor) -> Tensor:
    """The plane -> the square from -3 to 3, element by element."""
    return 2 * LARGEST * torch.sigmoid(points) - LARGEST


def point_gradient(points: Tensor, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Gradient (N, 2) at `points` (N, 2) of the per-class forward KL between two MLPs' beliefs about squash(points).

    Written out, because for networks this small autograd doubles the cost, and this is most of the run. With t and s
    the probabilities and d = log t - log s, the gradients of N K times the KL are s - t at the student's logits and
    t (d - sum_k t_k d_k) at the teacher's. A network is given as its parameters in order.
    """
    x = squash(points)  # (N, 2)
    *seen_by_teacher, log_t = _activations(x, teacher)
    *seen_by_student, log_s = _activations(x, student)
    t, d = log_t.exp(), log_t - log_s  # (N, K)
    at_teacher = t * (d - (t * d).sum(dim=1, keepdim=True))  # (N, K)
    at_x = _back(at_teacher, teacher, seen_by_teacher) + _back(log_s.exp() - t, student, seen_by_student)  # (N, 2)
    return at_x * (LARGEST - x) * (LARGEST + x) / (2 * LARGEST * d.numel())  # the derivative of squash, and 1 / N K


def _activations(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden layers (N, 100) and (N, 500), and the log-probabilities (N, K)."""
    first = F.linear(x, *weights[:2]).relu_()
    second = F.linear(first, *weights[2:4]).relu_()
    return first, second, F.log_softmax(F.linear(second, *weights[4:]), dim=1)


def _back(gradient: Tensor, weights: Sequence[Tensor], hidden: Sequence[Tensor]) -> Tensor:
    """A gradient at the logits (N, K) propagated back to the input (N, 2)."""
    gradient = (gradient @ weights[4]) * hidden[1].sign()  # (N, 500); the sign of a ReLU's output is its derivative
    return ((gradient @ weights[2]) * hidden[0].sign()) @ weights[0]


class PointMatching:
    """The two players: pseudo points (N, 2), which are optimised in place, and a student; the teacher is frozen."""

    def __init__(self, teacher: nn.Sequential, student: nn.Sequential, points: Tensor) -> None:
        self.teacher, self.student, self.points = teacher, student, points
        self.weights = [list(network.parameters()) for network in (teacher, student)]
        self.point_optimizer = torch.optim.Adam([points], lr=RATE, maximize=True, fused=True)
        self.student_optimizer = torch.optim.Adam(student.parameters(), lr=RATE, fused=True)

    @torch.no_grad()
    def move_points(self) -> None:
        for _ in range(POINT_STEPS):
            self.points.grad = point_gradient(self.points, *self.weights).clamp_(-LARGEST, LARGEST)  # (N, 2)
            self.point_optimizer.step()

    def train_student(self) -> None:
        x = squash(self.points)  # (N, 2)
        teacher_logits = self.teacher(x)  # (N, K), constant over the updates
        for _ in range(STUDENT_STEPS):
            loss = forward_kl(self.student(x), teacher_logits, scale="per_class")
            self.student_optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.weights[1], LARGEST)
            self.student_optimizer.step()


def run_toy(seed: int, *, rounds: int = ROUNDS, callback: Callable[[Frame], None] | None = None) -> ToyResult:
    """The experiment; about fifty evenly spaced rounds are recorded, and `callback` is called with each."""
    started = time.monotonic()
    with arithmetic(), threads(1):  # enough for matrices this small, and sums are the same on every machine
        points, labels = butterfly(seed)
        training = round(TRAINING_SHARE * len(points))
        teacher = train_teacher(points[:training], labels[:training], seed)
        test = points[training:], labels[training:]
        accuracy = float((teacher(test[0]).argmax(dim=1) == test[1]).float().mean())
        with seeded(stream(seed, "toy student")):
            student, start = mlp(), 3 + torch.randn(POINTS, 2)  # (N, 2)
        matching = PointMatching(teacher, student, start)
        truth = classes(teacher)  # (G, G)
        frames: list[Frame] = []
        recorded = {round(rounds * i / FRAMES) for i in range(FRAMES + 1)}
        for done in range(rounds + 1):
            if done > 0:
                matching.move_points()
                matching.train_student()
            if done in recorded:
                belief = classes(student)  # (G, G)
                frames.append(Frame(done, float((belief == truth).float().mean()), squash(matching.points), belief))
                if callback is not None:
                    callback(frames[-1])
    seconds = time.monotonic() - started
    return ToyResult(teacher, student.eval(), accuracy, frames[-1].agreement, frames, truth, test, seconds)


def seconds_per_round() -> float:
    """Seconds of a round on this machine without drawing: the mean of 20 with untrained networks."""
    with arithmetic(), seeded(0), threads(1):
        matching = PointMatching(mlp().requires_grad_(False), mlp(), torch.randn(POINTS, 2))
        started = time.monotonic()
        for _ in range(20):
            matching.move_points()
            matching.train_student()
        return (time.monotonic() - started) / 20


@torch.no_grad()
def classes(network: nn.Module) -> Tensor:
    """The class (G, G) that a network predicts at each point of the grid over the square, rows from the bottom."""
    axis = torch.linspace(-LARGEST, LARGEST, GRID)  # (G,)
    logits: Tensor = network(torch.cartesian_prod(axis, axis).flip(1))  # (G G, K), x running faster than y
    return logits.argmax(dim=1).view(GRID, GRID)


def draw_frame(result: ToyResult, frame: Frame, *, scale: float = 1.0) -> Image.Image:
    """Both networks' decision regions and the pseudo points, with the test data on the teacher's side."""
    figure = Figure(figsize=(9, 4.9), dpi=100)
    figure.subplots_adjust(left=0.04, right=0.98, bottom=0.06, top=0.86, wspace=0.1)
    left, right = figure.subplots(1, 2)
    left.set_title(f"teacher: {100 * result.teacher_accuracy:.1f} % on the test data shown", fontsize=10)
    right.set_title("student: trained on the white points only", fontsize=10)
    x, y = result.test[0].T.numpy()  # (M,) each
    left.scatter(x, y, s=4, c=[COLORS[label] for label in result.test[1]], alpha=0.4, linewidths=0)
    x, y = frame.points.T.numpy()  # (N,) each
    for axes, regions in ((left, result.classes), (right, frame.classes)):
        axes.imshow(regions.numpy(), cmap=PALE, vmin=0, vmax=2, extent=(-3, 3, -3, 3), origin="lower", zorder=0)
        axes.scatter(x, y, s=22, color="white", edgecolors="black", linewidths=1, clip_on=False, zorder=3)
        axes.set(xticks=[-3, 0, 3], yticks=[-3, 0, 3])
    figure.suptitle(f"round {frame.round:,} of {result.frames[-1].round:,}, agreement {frame.agreement:.3f}")
    return _render(figure, scale)


def draw_courses(courses: dict[int, list[tuple[int, float]]], *, scale: float = 1.0) -> Image.Image:
    """Agreement over the rounds: seed -> [(round, agreement), ...]."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for seed, course in courses.items():
        axes.plot(*zip(*course, strict=True), linewidth=1.5, label=f"seed {seed}")
    axes.set(title="toy: agreement with the teacher over the plane", xlabel="round", ylabel="agreement", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return _render(figure, scale)


def _render(figure: Figure, scale: float) -> Image.Image:
    """The figure in RGB, with the scale in a corner if it is not 1."""
    if scale != 1:
        figure.text(0.01, 0.985, f"scale {scale:g}", color="#bb0000", weight="bold", fontsize=12, va="top")
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")


def save_animation(path: Path, images: Sequence[Image.Image]) -> None:
    """Write a looping GIF; each image is shown for 0.12 s, the last one for 2 s."""
    shown = [120] * (len(images) - 1) + [2000]
    with replacing(path) as file:
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=shown, loop=0)


def reproduce_toy(
    seeds: Sequence[int], out: Path, *, scale: float = 1.0, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Run every seed and plot it in `out`: toy-seed-S/round-R.png, toy-seed-S.gif, and toy-agreement.png for all.

    `scale` is the share of the rounds to run; `progress` is called with (rounds done, total, text to show beside them).
    Returns medians over seeds, the total time and every seed's numbers, ready for JSON.
    """
    if not seeds or not 0 < scale <= 1:
        raise UsageError(
            f"expected at least one seed and 0 < scale <= 1, found {len(seeds)} seeds and scale = {scale}; correct them"
        )
    started = time.monotonic()
    rounds = max(1, round(ROUNDS * scale))
    per_seed: list[dict[str, Any]] = []

    def show(frame: Frame) -> None:
        done, seed = len(per_seed) * rounds + frame.round, seeds[len(per_seed)]
        if progress is not None:
            progress(done, len(seeds) * rounds, f"seed {seed}  agreement {frame.agreement:.3f}")

    for seed in seeds:
        result = run_toy(seed, rounds=rounds, callback=show)
        images = [draw_frame(result, frame, scale=scale) for frame in result.frames]
        for frame, image in zip(result.frames, images, strict=True):
            save_image(out / f"toy-seed-{seed}" / f"round-{frame.round:05d}.png", image)
        save_animation(out / f"toy-seed-{seed}.gif", images)
        measured = {name: round(getattr(result, name), 4) for name in ("agreement", "teacher_accuracy")}
        course = [[frame.round, round(frame.agreement, 4)] for frame in result.frames]
        per_seed.append({"seed": seed, **measured, "seconds": round(result.seconds, 1), "course": course})
    save_image(out / "toy-agreement.png", draw_courses({run["seed"]: run["course"] for run in per_seed}, scale=scale))
    medians = {name: statistics.median(run[name] for run in per_seed) for name in ("agreement", "teacher_accuracy")}
    whole = {"seconds": round(time.monotonic() - started, 1), "seeds": list(seeds), "per_seed": per_seed}
    return medians | whole | ({} if scale == 1 else {"scale": scale})


def toy_table(result: Mapping[str, Any]) -> str:
    """The Markdown page for what `reproduce_toy` returned, with the `circumstances` of the run."""
    stamp = f" (scale {result['scale']:g})" if "scale" in result else ""
    rows = [
        [str(run["seed"]), f"{run['agreement']:.3f}", f"{run['teacher_accuracy']:.3f}", f"{run['seconds']:.0f}"]
        for run in result["per_seed"]
    ]
    rows.append(["median", f"{result['agreement']:.3f}", f"{result['teacher_accuracy']:.3f}", ""])
    table = "\n".join(markdown(["seed", "agreement", "teacher accuracy", "seconds"], rows))
    made = "\n".join(provenance({**result, "threads": 1}))
    return f"""# Toy experiment: agreement with the teacher over the plane{stamp}

{table}

The authors' notebook gives the teacher's accuracy, 0.968, and the paper shows the student's regions without a number.

![agreement over the rounds](toy-agreement.png)

![both networks' regions](toy-seed-{result["seeds"][0]}.gif)

{made}
"""
