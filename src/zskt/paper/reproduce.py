"""The tables and figures of the paper: the jobs behind each cell, and the published numbers.

A cell that was not run says so; nothing is estimated. A published number appears only beside a result on the image set
that it was measured on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from zskt.data.images import Dataset
from zskt.errors import UsageError, unknown
from zskt.evaluate.measures import noise_classes
from zskt.networks.classifier import Classifier
from zskt.networks.folder import load_network
from zskt.paper.experiments import Budget, Experiment
from zskt.paper.jobs import Job
from zskt.paper.tables import Cell, Read, Reproduction, measured
from zskt.paper.training import updates_in
from zskt.run.checkpoint import read_lines
from zskt.run.plots import average_transitions, class_histograms, few_shot_curves, nature_of_pseudo_data
from zskt.run.report import saved_samples

NAMES = ("table-1", "table-2", "figure-2", "figure-3", "figure-4", "figure-5", "toy", "mmrazor")

SCRATCH = {
    "wrn-16-1": "91.04 ± 0.04",
    "wrn-16-2": "93.97 ± 0.11",
    "wrn-40-1": "93.18 ± 0.08",
    "wrn-40-2": "94.73 ± 0.02",
}
"""Table 1, CIFAR-10: trained on all images."""
TABLE_1 = {
    ("wrn-16-2", "wrn-16-1"): ("84.54 ± 0.21", "82.44 ± 0.21"),
    ("wrn-40-1", "wrn-16-1"): ("81.71 ± 0.25", "79.93 ± 1.11"),
    ("wrn-40-2", "wrn-16-1"): ("81.25 ± 0.67", "83.69 ± 0.58"),
    ("wrn-40-1", "wrn-16-2"): ("85.74 ± 0.47", "86.60 ± 0.56"),
    ("wrn-40-2", "wrn-16-2"): ("86.39 ± 0.33", "89.71 ± 0.10"),
    ("wrn-40-2", "wrn-40-1"): ("87.35 ± 0.12", "86.60 ± 1.79"),
}
"""Teacher and student -> KD+AT on 200 images per class, zero-shot; CIFAR-10."""
PAIR = ("wrn-40-2", "wrn-16-1")  # of all other tables and figures
PER_CLASS = (10, 25, 50, 75, 100)
FIGURE_2: dict[str, dict[str, Sequence[str]]] = {
    "cifar10": {
        "no teacher": ("25.79", "33.5", "44.88", "55.62", "58.80", "91.55"),
        "KD+AT": ("40.32", "57", "68", "72", "76", "91.92"),
        "zskt": ("84.68", "84.71", "85.28", "85.75", "85.91"),
    },
    "svhn": {
        "no teacher": ("10.88", "19.71", "54.83", "64.26", "73.18", "95.71"),
        "KD+AT": ("24.57", "40.25", "54.03", "69.69", "77.72", "95.88"),
        "zskt": ("94.36", "94.37", "94.35", "94.38", "94.41"),
    },
}
"""WRN-40-2 -> WRN-16-1, by images per class, then all images; percent. From the authors' notebook."""
FIGURE_2_TEACHER = {"cifar10": "95.13", "svhn": "96.50"}
"""From the same notebook; in table 1 the teacher of CIFAR-10 has 94.73."""
AT_ZERO = {"cifar10": "83.69 ± 0.58", "svhn": "94.06 ± 0.27"}
TABLE_2 = {"cifar10": ("0.22", "0.68 (paper), 0.72 (notebook)"), "svhn": ("0.09", "0.64")}
"""Mean transition error of the zero-shot and of the KD+AT student, which the authors' scripts train on all images."""
PSEUDO_IMAGES = {
    "teacher confidence": ("teacher_confidence", "about 0.8"),
    "student confidence": ("student_confidence", "about 0.3"),
    "normalised class entropy, teacher": ("class_entropy", None),
    "normalised class entropy, student": ("student_class_entropy", None),
}
"""Column of figure 3 -> key in metrics.jsonl, published number."""

accuracy = measured("accuracy")
mean_transition_error = measured("mean_transition_error")


@dataclass(frozen=True)
class Request:
    """What to reproduce, and with which data and networks."""

    name: str
    train: Dataset
    test: Dataset
    root: Path
    teacher: Classifier | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    """fields of the published budget to override"""
    model: str | None = None
    """another teacher network than the paper's"""
    student: str | None = None
    """another student network than the paper's"""
    recipe: tuple[str, ...] = ()
    """recipes, each a row, in place of the paper's"""
    images_per_class: tuple[int, ...] = ()
    """real images per class for the students that see data"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of all networks and runs; each seed trains its own teacher, unless one is given"""
    scale: float = 1.0
    """factor on all amounts of work, such as 0.01 for a trial run; stamped on every output"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster where the hardware supports it"""

    @property
    def data(self) -> str:
        return self.train.name

    def study(self, model: str, student: str, **published: int) -> Experiment:
        """This pair, or the requested one; `published` overrides the usual budget, and `changes` both."""
        if self.teacher is not None:
            model = getattr(self.teacher.module, "spec", None) or "teacher"
        else:
            model = self.model or model
        student = self.student or student
        budget = replace(published_budget(self.train), **published | dict(self.changes)).scaled(self.scale)  # type: ignore[arg-type]
        return Experiment(
            self.root, self.train, self.test, model, student, budget, self.teacher, self.device, self.precision
        )

    def published(self, study: Experiment) -> bool:
        """Whether the paper has numbers for these networks on this image set."""
        return (study.model, study.student) == PAIR and self.data in FIGURE_2


def published_budget(train: Dataset) -> Budget:
    """The paper's: 200 epochs and 80,000 steps on CIFAR-10, 100 and 50,000 on SVHN; other sets use CIFAR-10's.

    MNIST: 10 epochs, and 25,000 steps as in the KTH reproduction.
    """
    epochs, steps = {"svhn": (100, 50_000), "mnist": (10, 25_000)}.get(train.name, (200, 80_000))
    updates = updates_in(epochs, len(train.images), 128)
    return Budget(updates, steps)


def reproduction(request: Request) -> Reproduction:
    """The requested table or figure."""
    makers: dict[str, Callable[[Request], Reproduction]] = {
        "table-1": table_1,
        "table-2": table_2,
        "figure-2": figure_2,
        "figure-3": figure_3,
        "figure-4": figure_4,
        "figure-5": figure_5,
        "mmrazor": mmrazor,
    }
    if request.name not in makers:
        raise unknown("table or figure", request.name, NAMES)
    if not request.seeds or len(set(request.seeds)) < len(request.seeds):
        raise UsageError(f"seeds {request.seeds}: expected at least one, without repetition")
    return makers[request.name](request)


def table_1(request: Request) -> Reproduction:
    """Six pairs: both networks trained from scratch, KD+AT on 200 images per class, zero-shot."""
    own = request.model or request.student or request.teacher
    cells: list[Cell] = []
    for pair in [PAIR] if own else TABLE_1:
        study = request.study(*pair)
        kd_at, zero_shot = TABLE_1.get((study.model, study.student), (None, None))
        published = {
            "teacher": SCRATCH.get(study.model),
            "student from scratch": SCRATCH.get(study.student),
            "KD+AT, 200 per class": kd_at,
            "zero-shot, zskt": zero_shot,
        }
        cells += _accuracies(
            request, study, published if request.data == "cifar10" else {}, "zskt", request.images_per_class or (200,)
        )
    return Reproduction("table-1", f"Table 1: test accuracy (%) on {request.data}", tuple(cells))


def _accuracies(
    request: Request, study: Experiment, published: Mapping[str, str | None], recipe: str, per_class: Sequence[int]
) -> list[Cell]:
    """A row of accuracies: teacher, student from scratch, KD+AT on some images per class, zero-shot."""
    seeds = request.seeds
    columns = {
        "teacher": study.teachers(seeds),
        "student from scratch": [study.taught(study.student, s) for s in seeds],
    }
    columns |= {f"KD+AT, {m} per class": [study.distilled(s, m) for s in seeds] for m in per_class}
    columns |= {f"zero-shot, {r}": [study.zero_shot(s, r) for s in seeds] for r in request.recipe or (recipe,)}
    row = f"{study.model} → {study.student}"
    return [Cell(row, column, tuple(jobs), accuracy, published.get(column)) for column, jobs in columns.items()]


def table_2(request: Request) -> Reproduction:
    """Mean transition error between zero-shot and KD+AT students and their teacher."""
    study, seeds = request.study(*PAIR), request.seeds
    published = dict(zip(("zero-shot, zskt", "KD+AT, all images"), TABLE_2.get(request.data, ()), strict=False))
    students = {f"zero-shot, {r}": [study.zero_shot(s, r) for s in seeds] for r in request.recipe or ("zskt",)}
    students["KD+AT, all images"] = [study.distilled(s, None) for s in seeds]
    for per_class in request.images_per_class or (200,):
        students[f"KD+AT, {per_class} per class"] = [study.distilled(s, per_class) for s in seeds]
    cells = []
    for row, jobs in students.items():
        beliefs = tuple(study.belief(job, s) for job, s in zip(jobs, seeds, strict=True))
        paper = published.get(row) if request.published(study) else None
        cells.append(Cell(row, "mean transition error", beliefs, mean_transition_error, paper, percent=False))
        cells.append(Cell(row, "accuracy, %", tuple(jobs), accuracy))
        cells.append(Cell(row, "agreement with the teacher, %", beliefs, measured("agreement")))
    title = f"Table 2: mean transition error on {request.data}, {study.model} → {study.student}, K = 100, ξ = 1"
    return Reproduction("table-2", title, tuple(cells))


def figure_4(request: Request) -> Reproduction:
    """Average transition curves of the students of table 2."""
    table = table_2(request)
    beliefs = {cell.row: cell.jobs for cell in table.cells if not cell.percent}

    def draw(root: Path, note: str) -> bytes | None:
        panels = {}
        for row, jobs in beliefs.items():
            if found := jobs[0].measured(root):  # one student, as in the paper
                title = f"{row}\nMTE {found['mean_transition_error']:.3f}, {found['followed']:,} images{note}"
                panels[title] = found["curves"]
        return average_transitions(panels, ("student", "teacher")) if panels else None

    title = table.title.replace("Table 2: mean transition error", "Figure 4: transition curves")
    return Reproduction("figure-4", title, table.cells, draw)


def figure_2(request: Request) -> Reproduction:
    """Accuracy against real images per class: no teacher, KD+AT with and without CE, zero-shot and fine-tuned."""
    study = request.study(*PAIR)
    amounts = request.images_per_class or PER_CLASS
    known = FIGURE_2[request.data] if request.published(study) else {}
    zero = AT_ZERO.get(request.data) if known else None

    def paper(row: str, per_class: int | None) -> str | None:
        place = len(PER_CLASS) if per_class is None else PER_CLASS.index(per_class) if per_class in PER_CLASS else -1
        return known[row][place] if row in known and 0 <= place < len(known[row]) else None

    cells = []
    seeds = request.seeds
    for recipe in request.recipe or ("zskt",):
        runs = tuple(study.zero_shot(s, recipe) for s in seeds)
        cells.append(Cell(recipe, "M = 0", runs, accuracy, zero if recipe == "zskt" else None))
        for per_class in amounts:
            jobs = tuple(study.fine_tuned(s, recipe, per_class) for s in seeds)
            cells.append(Cell(recipe, f"M = {per_class}", jobs, accuracy, paper(recipe, per_class)))
    for number in (*amounts, None):
        column = "all" if number is None else f"M = {number}"
        scratch = tuple(study.taught(study.student, s, number) for s in seeds)
        cells.append(Cell("no teacher", column, scratch, accuracy, paper("no teacher", number)))
        for ce, row in ((True, "KD+AT"), (False, "KD+AT without CE")):
            jobs = tuple(study.distilled(s, number, ce=ce) for s in seeds)
            cells.append(Cell(row, column, jobs, accuracy, paper(row, number)))
    cells.append(
        Cell(
            "teacher",
            "all",
            tuple(study.teachers(seeds)),
            accuracy,
            FIGURE_2_TEACHER.get(request.data) if known else None,
        )
    )

    def draw(root: Path, note: str) -> bytes | None:
        lines: dict[str, dict[float, list[float]]] = {}
        for cell in cells:
            if (values := cell.values(root)) and cell.column != "all":
                lines.setdefault(cell.row, {})[float(cell.column.removeprefix("M = "))] = values
        flat = {cell.row: values for cell in cells if cell.column == "all" and (values := cell.values(root))}
        title = f"{study.model} → {study.student} on {request.data}{note}"
        return few_shot_curves(lines, flat, title) if lines else None

    title = f"Figure 2: test accuracy (%) on {request.data} by images per class, {study.model} → {study.student}"
    return Reproduction("figure-2", title, tuple(cells), draw)


def figure_3(request: Request) -> Reproduction:
    """The pseudo images of a run: both networks' confidence over the steps, class histograms, samples."""
    study = request.study(*PAIR)
    published = request.published(study) and request.data == "cifar10"
    cells = []
    runs = {recipe: tuple(study.zero_shot(s, recipe) for s in request.seeds) for recipe in request.recipe or ("zskt",)}
    for recipe, jobs in runs.items():
        for column, (key, paper) in PSEUDO_IMAGES.items():
            known = paper if published and recipe == "zskt" else None
            cells.append(Cell(recipe, column, jobs, _last(key), known, percent=False))

    def draw(root: Path, note: str) -> bytes | None:
        folder = next((p[0].folder(root) for p in runs.values() if p[0].measured(root)), None)
        if folder is None:
            return None
        lines = read_lines(folder / "metrics.jsonl")
        return nature_of_pseudo_data(lines, saved_samples(folder), study.test.class_names, f"{folder.name}{note}")

    title = f"Figure 3: the nature of the pseudo images, {study.model} → {study.student}, {request.data}"
    return Reproduction("figure-3", title, tuple(cells), draw)


def _last(key: str) -> Read:
    def read(root: Path, job: Job) -> float | None:
        if job.measured(root) is None:
            return None
        found: list[float] = [line[key] for line in read_lines(job.folder(root) / "metrics.jsonl") if key in line]
        return found[-1]

    return read


def figure_5(request: Request) -> Reproduction:
    """The classes that trained networks assign to uniform noise."""
    own = request.model or request.student or request.teacher
    study = request.study(*PAIR)
    specs = [study.model, study.student] if own else ["lenet-5", "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2"]
    networks = {
        spec: study.teachers(request.seeds)
        if spec == study.model
        else [request.study(spec, spec).taught(spec, s) for s in request.seeds]
        for spec in specs
    }

    def counts(root: Path, job: Job) -> list[int] | None:
        return None if job.measured(root) is None else noise_classes(load_network(job.folder(root)))

    def two_largest(root: Path, job: Job) -> float | None:
        found = counts(root, job)
        return None if found is None else sum(sorted(found)[-2:]) / sum(found)

    cells = [
        Cell(spec, "noise in the two most common classes, %", tuple(jobs), two_largest)
        for spec, jobs in networks.items()
    ]
    cells += [Cell(spec, "accuracy, %", tuple(jobs), accuracy) for spec, jobs in networks.items()]

    def draw(root: Path, note: str) -> bytes | None:
        bars = {spec: found for spec, jobs in networks.items() if (found := counts(root, jobs[0]))}
        title = f"Classes of 1,000 images of uniform noise, networks trained on {request.data}{note}"
        return class_histograms(bars, study.test.class_names, title) if bars else None

    return Reproduction("figure-5", f"Figure 5: uniform noise, {request.data}", tuple(cells), draw)


def mmrazor(request: Request) -> Reproduction:
    """ResNet-34 -> ResNet-18, the highest published accuracy of plain ZSKT."""
    study = request.study("resnet-34", "resnet-18", steps=25_000)
    published = {
        "teacher": "95.34",
        "student from scratch": "94.82",
        "zero-shot, zskt-mmrazor": "93.05 (metafile), 93.50 (page)",
    }
    known = request.data == "cifar10" and (study.model, study.student) == ("resnet-34", "resnet-18")
    cells = _accuracies(request, study, published if known else {}, "zskt-mmrazor", ())
    return Reproduction("mmrazor", f"mmrazor's ZSKT: test accuracy (%) on {request.data}", tuple(cells))
