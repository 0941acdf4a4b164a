"""`zskt sweep`: a grid of distillation runs, each in its own folder, and their tables."""

import functools
import itertools
import math
import re
import shlex
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from zskt.cli.given import SHORTCUTS
from zskt.cli.jobs import HERE, ClusterOptions, carry_out
from zskt.cli.options import Assignments, Number, Text
from zskt.cli.progress import notice, silence
from zskt.cli.teachers import FOREIGN, Data, Foreign, Options, Result, each_foreign, open_as, test_images
from zskt.errors import UsageError, ZsktError, failing, unknown
from zskt.files import expanded
from zskt.method.budget import BUDGETED
from zskt.method.recipe import AUTO, recipe_for
from zskt.networks.classifier import Classifier
from zskt.networks.factories import is_factory
from zskt.networks.students import make_student
from zskt.paper.experiments import going_on
from zskt.paper.grid import Row, label, write_sweep
from zskt.paper.jobs import Job, Show, check_settings
from zskt.paper.training import digest
from zskt.run.distill import distill
from zskt.run.report import write_report
from zskt.run.without_data import inspect_run
from zskt.runtime import circumstances
from zskt.settings import from_text

Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")]
Networks = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NETWORK...")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")]
LONGEST = 200  # letters of a job's name, which file systems allow for a folder


def run_sweep(
    teachers: tyro.conf.Positional[Networks],
    /,
    *,
    student: Words,
    out: Path,
    recipe: Words = (AUTO,),
    seed: Seeds = (0,),
    settings: Annotated[Assignments, tyro.conf.arg(name="set")] = (),
    steps: Number = None,
    evaluate: Annotated[Data, tyro.conf.arg(name="eval")] = (),
    only: Text = None,
    print_jobs: bool = False,
    cluster: ClusterOptions = HERE,
    foreign: Options = FOREIGN,
) -> Result | None:
    """Distil every teacher into every student by every recipe, with every setting and seed, and tabulate the students.

    Each run has a folder in OUT/parts; sweep.json, .csv, .md, .tex and report.html in OUT compare them: a row for each
    setting, mean ± std over its seeds. Given again, the same command does only what is missing; with more seeds or
    values, only those.

    Example: zskt sweep teacher --student wrn-16-1 --recipe zskt bank --seed 0 1 2 --set student.learning_rate=1e-3,2e-3
    --steps 2000 --eval cifar10-test.zip --out runs/sweep

    Args:
        teachers: networks, each specified as in zskt distill.
        student: networks, each specified as in zskt distill; factories without arguments.
        out: folder for the tables, the report and all runs.
        recipe: names from `zskt recipes`, or auto.
        seed: of the runs of each setting.
        settings: of the runs, with the names that `zskt recipes NAME` prints; values separated by commas are tried
            in turn.
        steps: of every run; short for --set steps=N.
        evaluate: labelled test images, used for evaluation only; without them no number is an accuracy.
        only: the run of this name alone, here, without tables.
        print_jobs: only print a command for each missing run, for Slurm or GNU parallel; given again without it, the
            command writes the tables.
        cluster: where the runs go.
    """
    given = tuple(map(placed, evaluate))
    students = tuple(placed(name, "student.json") for name in student)
    grid = Grid(
        tuple(map(placed, teachers)), students, recipe, seed, settings, steps, given, expanded(out).resolve(), foreign
    )
    if only is not None and (cluster.ray or print_jobs):
        raise UsageError("--only is for a run here, without --ray and --print-jobs: leave it or them out")
    where = cluster if only is None and cluster.wanted else None
    begun = time.monotonic()
    rows = rows_of(grid, only)
    jobs = [job for row in rows for job in row.jobs]
    check_settings(jobs, grid.out)
    missing = [job for job in jobs if job.measured(grid.out) is None]
    if print_jobs:
        notice(f"{len(jobs)} runs, {len(missing)} of them missing; afterwards, the same command writes the tables")
        for job in missing:
            print(shlex.join(["zskt", "sweep", *words_of(grid), "--only", job.name]), flush=True)
        return None
    started = sum(job.folder(grid.out).exists() for job in missing)
    if only is None:
        notice(f"{shape(grid)}: {len(jobs)} runs; {len(missing)} are missing, {started} of them begun")
    failed = carry_out(jobs, grid.out, math.inf, where, jobs_of, grid) if missing else {}
    result = {"finished": not failed, "runs": len(jobs), "out": str(grid.out)}
    if only is None:
        facts = circumstances() | {"seeds": list(seed), "seconds": round(time.monotonic() - begun, 1)}
        facts |= {"data": [Path(name).name for name in given]} if given else {}
        found, table = write_sweep(rows, grid.out, failed=failed, circumstances=facts)
        for line in table:
            notice(line)
        if done := [job.folder(grid.out) for job in jobs if job.measured(grid.out) is not None]:
            write_report(done, grid.out / "report.html")
        notice(f"results: {grid.out / 'sweep.md'}, {grid.out / 'report.html'}")
        result = found | {"out": str(grid.out)}
    if failed:
        name, why = next(iter(failed.items()))
        raise ZsktError(f"{len(failed)} of {len(jobs)} runs failed, {name} first: {why}")
    return result


@dataclass(frozen=True)
class Grid:
    """A sweep as plain data: what it takes to build its jobs, here or in another process."""

    teachers: tuple[str, ...]
    students: tuple[str, ...]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    """key=value,value as it was typed"""
    steps: int | None
    evaluate: tuple[str, ...]
    out: Path
    foreign: Foreign

    def changes(self, cell: "Cell") -> dict[str, Any]:
        """The settings of a run, but for its seed."""
        return {**cell.settings, **({} if self.steps is None else {"steps": self.steps})}


def placed(name: str, holding: str = "") -> str:
    """A path from the root if there is a file or folder of that name, `holding` a file: jobs may run elsewhere."""
    path = expanded(name)
    return str(path.resolve()) if (path / holding).exists() else name


def words_of(grid: Grid) -> list[str]:
    """The arguments of `zskt sweep` that make this grid."""
    options: dict[str, Sequence[object]] = {
        "--student": grid.students,
        "--recipe": grid.recipes,
        "--seed": grid.seeds,
        "--set": grid.settings,
        "--steps": () if grid.steps is None else (grid.steps,),
        "--eval": grid.evaluate,
        "--out": (grid.out,),
    }
    words = list(grid.teachers)
    for option, values in options.items():
        words += [option, *map(str, values)] if values else []
    for field in fields(Foreign):
        value = getattr(grid.foreign, field.name)
        if value not in (None, (), False):
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return words


def shape(grid: Grid) -> str:
    """The sides of the grid, as in: 1 teacher, 2 students, 1 recipe, 4 settings, 3 seeds."""
    settings = math.prod(len(values) for values in variations(grid).values())
    sides = {"teacher": len(grid.teachers), "student": len(grid.students), "recipe": len(grid.recipes)}
    sides |= {"setting": settings, "seed": len(grid.seeds)}
    return ", ".join(f"{number} {side}{'s' if number > 1 else ''}" for side, number in sides.items())


def variations(grid: Grid) -> dict[str, list[Any]]:
    """The values of each setting; raises UsageError for a setting that has a side or option of its own."""
    found: dict[str, list[Any]] = {}
    for assignment in grid.settings:
        name, values = values_of(assignment)
        name = SHORTCUTS.get(name, name)
        if name in ("recipe", "seed"):
            raise UsageError(f"--set {name}: use --{name}, which takes several")
        if name in found or (name == "steps" and grid.steps is not None):
            raise UsageError(f"{name} is given twice; give it once, with all its values")
        check_different(f"--set {name}", list(map(label, values)))
        found[name] = values
    sizes = [name for name in BUDGETED if name in found or (name == "steps" and grid.steps is not None)]
    if "budget" in found and sizes:
        raise UsageError(f"--set budget chooses {sizes[0]}: give one of them")
    return found | ({} if grid.steps is None else {"steps": [grid.steps]})


def values_of(assignment: str) -> tuple[str, list[Any]]:
    """`key=value,value` -> the key and its values, each TOML or a bare word; a list has brackets, as in TOML."""
    name, equals, text = assignment.partition("=")
    try:
        values = tomllib.loads(f"values = [{text}]")["values"]
    except (ValueError, RecursionError):
        values = [from_text(f"{name}={part}")[1] for part in text.split(",")]
    if not equals or not name.strip() or not values or "" in values:
        raise UsageError(
            f"--set {assignment!r}: expected key=value or key=value,value, as in --set student.learning_rate=1e-3,2e-3"
        )
    return name.strip(), values


def check_different(option: str, names: Sequence[object]) -> None:
    """Raise UsageError for an empty list, or one with the same name twice: they would be the same runs."""
    if not names:
        raise UsageError(f"{option}: expected at least one, found none")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{option}: found {twice[0]} twice; runs are named after them: give each once, or rename one")


def short_name(network: str) -> str:
    """A network in the names of its runs: a path's last part, without what folders cannot be called."""
    return re.sub(r"[^\w.+-]+", "-", Path(network).name).strip("-.")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    teacher: str
    student: str
    recipe: str
    settings: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """That of its folder: with all that --set says, so that it stays when other values are added."""
        parts = [f"{short_name(self.teacher)}-to-{short_name(self.student)}", self.recipe]
        parts += [re.sub(r"[^\w.+=-]+", "-", f"{name}={label(value)}") for name, value in self.settings.items()]
        return "-".join([*parts, f"seed-{self.seed}"])


def cells_of(grid: Grid) -> Iterator[list[Cell]]:
    """The runs of each row, by seed."""
    check_different("teachers", list(map(short_name, grid.teachers)))
    check_different("--student", list(map(short_name, grid.students)))
    check_different("--recipe", grid.recipes)
    check_different("--seed", grid.seeds)
    varied = variations(grid)
    names = [name for name in varied if not (name == "steps" and grid.steps is not None)]
    for teacher, student, recipe in itertools.product(grid.teachers, grid.students, grid.recipes):
        for values in itertools.product(*(varied[name] for name in names)):
            settings = dict(zip(names, values, strict=True))
            yield [Cell(teacher, student, recipe, settings, seed) for seed in grid.seeds]


def rows_of(grid: Grid, only: str | None = None) -> list[Row]:
    """The jobs of the grid, by setting; with `only` that job alone. Raises UsageError for what no run could be."""
    cells = list(cells_of(grid))
    names = [cell.name for row in cells for cell in row]
    check_different("the names of the runs", names)
    if long := [name for name in names if len(name) > LONGEST]:
        raise UsageError(f"{long[0]} is too long for a folder's name; set fewer settings at once")
    if only is not None and only not in names:
        raise unknown("run", only, names)
    options = dict(zip(grid.teachers, each_foreign(grid.teachers, grid.foreign), strict=True))

    @functools.lru_cache(maxsize=1)  # networks can be large, and runs go through one teacher after the other
    def opened(teacher: str) -> tuple[Classifier, tuple[Tensor, Tensor] | None]:
        network = open_as(teacher, options[teacher]).teacher
        return network, test_images(grid.evaluate, network) if grid.evaluate else None

    for student in grid.students:
        if is_factory(student):
            notice(f"note: --student {student} runs the code of that file or package")
    rows = []
    for row in cells:
        chosen = [cell for cell in row if only in (None, cell.name)]
        if chosen:
            jobs = tuple(job_of(cell, grid, opened) for cell in chosen)
            labels = {"teacher": short_name(row[0].teacher), "student": short_name(row[0].student)}
            labels |= {"recipe": row[0].recipe}
            rows.append(Row(labels, grid.changes(row[0]), jobs))
    return rows


def jobs_of(grid: Grid, name: str) -> list[Job]:
    """One job of the grid, made in another process."""
    with silence(True):
        return [job for row in rows_of(grid, name) for job in row.jobs]


def job_of(cell: Cell, grid: Grid, opened: Any) -> Job:
    """The job of one run."""
    network, images = opened(cell.teacher)
    changes = grid.changes(cell)
    config = recipe_for(network, cell.recipe, {**changes, "seed": cell.seed})  # rejects what is misspelt
    begins = None  # what is trained, if the name does not tell
    try:
        student = make_student(cell.student, network, seed=cell.seed)
        if is_factory(cell.student) or expanded(cell.student).exists():
            begins = network.like(student).fingerprint()[:12]
    except UsageError:
        raise
    except ZsktError:
        pass  # this pair fails alone, when its turn comes

    def make(folder: Path, stop_after: str | None, show: Show) -> bool:
        with silence(True), failing("unexpected", "please report it with the command", named=True):
            teacher, evaluated = opened(cell.teacher)
            try:
                result = distill(
                    teacher,
                    make_student(cell.student, teacher, seed=cell.seed),
                    cell.recipe,
                    settings={**changes, "seed": cell.seed},
                    evaluate=evaluated,
                    **going_on(folder, stop_after, show),
                )
                if result.finished:
                    inspect_run(folder, result.network.cpu(), teacher.cpu())
                return result.finished
            except UsageError as error:  # of this combination, not of the whole request
                raise ZsktError(str(error)) from error

    settings = {"teacher": network.fingerprint(), "student": short_name(cell.student), "recipe": cell.recipe}
    settings |= {} if begins is None else {"student_weights": begins}
    settings |= {"seed": cell.seed, "data": digest(*images)[:8] if images else None, **changes}
    return Job(cell.name, settings, config.steps, "steps", cell.recipe, lambda: lambda: None, make)
