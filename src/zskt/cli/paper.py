"""The subcommands that measure what the paper measures. Their docstrings are the help texts."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from zskt.cli.jobs import HERE, ClusterOptions, carry_out
from zskt.cli.options import File, Text, Time, options, typed
from zskt.cli.progress import bar, console, notice, silence
from zskt.cli.teachers import (
    FOREIGN,
    Data,
    Foreign,
    Network,
    Options,
    Result,
    open_network,
    open_networks,
    read_images,
    test_images,
)
from zskt.errors import UsageError, ZsktError, unknown
from zskt.evaluate.controls import untrained
from zskt.evaluate.fidelity import Comparison, fidelity
from zskt.evaluate.measures import check_networks
from zskt.evaluate.transitions import Paths, average_curves
from zskt.files import fresh_folder, replacing, write_json, write_text
from zskt.method.budget import duration
from zskt.networks.classifier import Classifier
from zskt.paper.belief import belief_figure, belief_head, belief_rows, belief_table
from zskt.paper.experiments import Budget
from zskt.paper.jobs import Job, check_settings, in_order, time_jobs
from zskt.paper.reproduce import NAMES, Request, reproduction
from zskt.paper.tables import Reproduction, markdown_table, write_result
from zskt.paper.toy import POINT_STEPS, ROUNDS, STUDENT_STEPS, reproduce_toy, seconds_per_round, toy_table
from zskt.run.plots import single_transitions
from zskt.runtime import circumstances, parse_limit, pick_device

ASK_ABOVE = 600.0
"""Seconds of work that are started without --yes."""


DEFAULT_PATHS = {name: f"default: {value}" for name, value in vars(Paths()).items()}
PUBLISHED = "default: the published"
if TYPE_CHECKING:
    PathOptions = Any
    RequestOptions = Any
    BudgetOptions = Any
else:
    PathOptions = options(Paths, "", notes=DEFAULT_PATHS)
    RequestOptions = options(
        Request,
        PUBLISHED,
        leave_out={"name", "train", "test", "root", "teacher", "changes"},
        notes={
            "seeds": "default: 0 1 2",
            "scale": "default: 1",
            "device": "default: auto",
            "precision": "default: fp32",
        },
    )
    BudgetOptions = options(Budget, PUBLISHED, leave_out={"fine_tuning"})
RANDOM = "random"
Controls = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NETWORK...", help_behavior_hint="")]
PATHS, REQUEST, BUDGET = PathOptions(), RequestOptions(), BudgetOptions()


def run_belief(
    student: tyro.conf.Positional[Network],
    teacher: tyro.conf.Positional[Network],
    /,
    *,
    data: Data,
    control: Controls = (),
    out: File = None,
    given: Annotated[PathOptions, tyro.conf.arg(name="")] = PATHS,
    device: str = "auto",
    foreign: Options = FOREIGN,
) -> Result:
    """Measure how closely two networks' beliefs match, near decision boundaries above all.

    From images on which both agree, gradient steps on one network lead to every other class; the mean transition error
    is how far apart the two networks' probabilities of that class are along the way: 0 is equal, 1 opposite. Following
    these paths takes nearly all of the time. Beside it: agreement where the teacher is right and wrong, and what the
    accuracies alone would give; divergences; alignment of stages; agreement under corruptions; attacks on either.

    Example: zskt belief runs/a teacher --data cifar10-test.zip --control runs/other random --out belief

    Args:
        student: a teacher or run folder, a Hugging Face folder, a .pt2 or TorchScript file, package.module:factory,
            file.py:factory, timm:NAME or torchvision:NAME.
        teacher: the network to compare it with, specified in the same way.
        data: labelled images, as in zskt teach; their test split is used.
        control: networks of the student's architecture that never saw the teacher, or `random` for new random weights;
            each takes as long as the student. P-values say how often one is as close to the teacher as the student is.
        out: folder for belief.json, the figure (.pdf, .png), the LaTeX table and single paths; by default none.
        given: how the paths are followed.
        device: auto, cpu, cuda or cuda:N.
    """
    paths = Paths(**typed(given))
    if out is not None and out.exists() and not out.is_dir():
        raise ZsktError(f"expected a folder or nothing at {out}, found a file; choose another --out")
    where = pick_device(device)
    trained = [name for name in control if name != RANDOM]
    found_networks = open_networks([student, teacher, *trained], foreign)
    first, second, *others = (found.teacher.to(where) for found in found_networks if found is not None)
    check_networks(first, second)
    controls = named_controls(control, first, others)
    pictures, labels = test_images(data, second)
    with bar("comparing", "done") as show:
        found = fidelity(
            first,
            second,
            pictures,
            labels,
            paths,
            controls=controls,
            progress=lambda what, done, total: show(done, total, what),
        )
    show_comparison(found)
    if out is None:
        notice("give --out for the figure and the LaTeX table")
        return found.measured
    names = [Path(name).resolve().name for name in (student, teacher)]
    write_comparison(out, found, names, second.class_names)
    notice(f"{out / 'belief.pdf'}, {out / 'belief.tex'}, {out / 'single-transitions.png'}")
    return found.measured | {"out": str(out)}


def named_controls(asked: Sequence[str], student: Classifier, trained: Sequence[Classifier]) -> dict[str, Classifier]:
    """The controls by a name for each: `trained` in the order asked for, and random ones, each of another seed."""
    remaining = iter(trained)
    controls: dict[str, Classifier] = {}
    for number, name in enumerate(asked):
        label = name if name == RANDOM else Path(name).resolve().name
        label = f"{label} {number + 1}" if label in controls else label
        controls[label] = untrained(student, number) if name == RANDOM else next(remaining)
    return controls


def show_comparison(found: Comparison) -> None:
    """The measures as a table, with their intervals."""
    columns = belief_head(found.measured)
    table = Table(*columns)
    for row in belief_rows(found.measured):
        table.add_row(*map(escape, row[: len(columns)]))
    console().print(table)
    for line in found.measured["warnings"]:
        notice(f"warning: {line}")


def write_comparison(out: Path, found: Comparison, names: list[str], class_names: tuple[str, ...] | None) -> None:
    """Write the numbers, the figure, the LaTeX table and single paths."""
    curves = average_curves(found.transitions)
    pictures = {
        f"belief.{suffix}": content for suffix, content in belief_figure(found.measured, curves, class_names).items()
    }
    pictures["single-transitions.png"] = single_transitions(found.transitions, names, class_names)
    for name, content in pictures.items():
        with replacing(out / name) as file:
            file.write(content)
    write_text(out / "belief.tex", belief_table(found.measured, names))
    write_json(out / "belief.json", {"networks": names, **found.measured, "curves": curves})


def run_reproduce(
    name: tyro.conf.Positional[str],
    /,
    *,
    data: Data = (),
    teacher: Text = None,
    request: Annotated[RequestOptions, tyro.conf.arg(name="")] = REQUEST,
    budget: Annotated[BudgetOptions, tyro.conf.arg(name="")] = BUDGET,
    out: File = None,
    yes: bool = False,
    stop_after: Time = None,
    resume: bool = False,
    cluster: ClusterOptions = HERE,
    foreign: Options = FOREIGN,
) -> Result:
    """Reproduce a table or a figure of the paper, from training the teachers to the numbers beside the published ones.

    First prints the amount of work and the estimated time on this machine, from 20 seconds of measurement or more: each
    kind of work is timed at least once. Also the way to compare recipes: --recipe A B are rows, --seeds repetitions.
    Writes the table as Markdown, LaTeX, CSV and JSON.

    Example: zskt reproduce table-1 --data cifar10-train.zip cifar10-test.zip --scale 0.01 --out runs/table-1

    Args:
        name: table-1, table-2, figure-2, figure-3, figure-4, figure-5, toy or mmrazor.
        data: labelled images, as in zskt teach; toy generates its own.
        teacher: a network, specified as in zskt distill, to use instead of training one.
        request: what to reproduce.
        budget: how much work to spend.
        out: folder for the results and for all jobs; by default runs/NAME. Several tables can share one.
        yes: start even if it takes more than ten minutes.
        stop_after: stop after a time (90s, 9m, 2h); continue with --resume.
        resume: reuse the finished jobs in --out and continue the interrupted ones.
        cluster: where the jobs run.
    """
    where = cluster if cluster.wanted else None
    asked, given = typed(request), typed(budget)
    seeds, scale = asked.get("seeds", Request.seeds), asked.get("scale", Request.scale)
    if name not in NAMES:
        raise unknown("table or figure", name, NAMES)
    if not 0 < scale <= 1:
        raise UsageError(f"--scale {scale}: expected a number above 0, up to 1")
    amounts = [("images_per_class", number) for number in asked.get("images_per_class", ())]
    for option, value in (*given.items(), *amounts):
        if not value > 0:
            raise UsageError(f"--{option.replace('_', '-')} {value}: expected a positive number")
    if teacher is not None and "model" in asked:
        raise UsageError("--teacher and --model: a given teacher is a network already, leave one of them out")
    begun = time.monotonic()
    if name == "toy":
        if data or teacher or stop_after or resume or given or cluster.ray or asked.keys() - {"seeds", "scale"}:
            raise UsageError("toy takes --seeds, --scale, --out and --yes only: it generates its own data and networks")
        return reproduce_the_toy(seeds, out or fresh_folder(Path("runs"), "toy"), scale, yes)
    folder = out or Path("runs") / name
    if (folder / "parts").exists() and not resume:
        raise ZsktError(f"{folder} already holds jobs of a table; give --resume to reuse them, or choose another --out")
    if not data:
        raise UsageError(f"{name} needs --data: labelled images to train teachers on and to measure with")
    wanted = Asked(name, data, teacher, tuple(asked.items()), tuple(given.items()), folder, foreign)
    made, images = reproduction_of(wanted)
    jobs = in_order(made.jobs)
    check_settings(jobs, folder)
    seconds, _ = parse_limit(stop_after)
    if stop_after is not None and math.isinf(seconds):
        raise UsageError(f"--stop-after {stop_after}: expected a time such as 90s, 9m, 2h")
    estimate = state_cost(jobs, folder, seconds)
    refuse_long_work(name, min(estimate, seconds), yes, scale)
    left = seconds - (time.monotonic() - begun)
    failed = carry_out(jobs, folder, left, where, reproduced_jobs, wanted, job_bar)
    facts = circumstances() | {
        "data": images,
        "seeds": list(seeds),
        "precision": asked.get("precision", Request.precision),
        "seconds": round(time.monotonic() - begun, 1),
    }
    result = write_result(made, folder, scale=scale, failed=failed, circumstances=facts)
    for line in markdown_table(made.cells, folder, failed):
        notice(line)
    notice(f"results: {folder / name}.md" + ("" if result["finished"] else "; incomplete: continue with --resume"))
    if failed:
        job, why = next(iter(failed.items()))
        raise ZsktError(f"{len(failed)} of {len(jobs)} jobs failed, {job} first: {why}")
    return result | {"out": str(folder)}


@dataclass(frozen=True)
class Asked:
    """A reproduction as plain data: what it takes to build its jobs, here or in another process."""

    name: str
    data: tuple[str, ...]
    teacher: str | None
    request: tuple[tuple[str, Any], ...]
    budget: tuple[tuple[str, Any], ...]
    folder: Path
    foreign: Foreign


def reproduction_of(asked: Asked) -> tuple[Reproduction, str]:
    """The table or figure, and the name of its images, which are read. Raises ZsktError if a teacher does not fit."""
    network = None if asked.teacher is None else open_network(asked.teacher, asked.foreign).teacher
    train = read_images(asked.data, "train", None if network is None else network.input_size)
    test = read_images(asked.data, "test", (train.images.shape[1], train.images.shape[2], train.images.shape[3]))
    if network is not None and network.num_classes != len(test.class_names):
        raise ZsktError(
            f"expected data of {network.num_classes} classes, found {len(test.class_names)}; give the data that the "
            "teacher was trained on"
        )
    request = Request(asked.name, train, test, asked.folder, network, dict(asked.budget), **dict(asked.request))
    return reproduction(request), train.name


@functools.lru_cache(maxsize=1)  # a worker reads the images once
def all_jobs(asked: Asked) -> list[Job]:
    """The jobs of a reproduction, made in another process."""
    with silence(True):
        return in_order(reproduction_of(asked)[0].jobs)


def reproduced_jobs(asked: Asked, name: str) -> list[Job]:
    """The job of that name, for Ray."""
    return [job for job in all_jobs(asked) if job.name == name]


def reproduce_the_toy(seeds: Sequence[int], folder: Path, scale: float, yes: bool) -> Result:
    """The two-dimensional experiment: no data, no jobs, two minutes per seed."""
    if (folder / "toy.json").exists():
        raise ZsktError(f"{folder} already holds the toy experiment; choose another --out")
    rounds = max(1, round(ROUNDS * scale))
    notice("measuring the speed of this machine, a few seconds")
    refuse_long_work("toy", len(seeds) * rounds * seconds_per_round(), yes, scale)
    work = f"each {POINT_STEPS} updates of the points and {STUDENT_STEPS} of the student"
    notice(f"{len(seeds)} seeds of {rounds:,} rounds, {work}")
    with bar("toy", "rounds") as show:
        result = reproduce_toy(seeds, folder, scale=scale, progress=show) | circumstances()
    write_json(folder / "toy.json", result)
    write_text(folder / "toy.md", toy_table(result))
    notice(f"results: {folder / 'toy.md'}, {folder / f'toy-seed-{seeds[0]}.gif'}")
    return result | {"out": str(folder)}


def refuse_long_work(name: str, seconds: float, yes: bool, scale: float) -> None:
    """Raise UsageError above ten minutes, unless `yes` is given."""
    some = "" if name == "toy" else ", --stop-after 9m to do part of it"
    if seconds > ASK_ABOVE and not yes:
        raise UsageError(
            f"{name} takes about {duration(seconds)} on this machine; give --yes to start{some}, or --scale "
            f"{scale / 100:g} to rehearse"
        )
    if seconds:
        notice(f"this takes about {duration(seconds)}")


def job_bar(name: str, unit: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
    """The job's name, which is long, on a line above its progress bar."""
    notice(name)
    return bar("  running", unit)


def state_cost(jobs: Sequence[Job], folder: Path, budget: float) -> float:
    """Show the remaining work and the estimated time on this machine; returns the seconds."""
    missing = [job for job in jobs if job.measured(folder) is None]
    if not missing:
        return 0.0
    measuring = min(20.0, budget / 10)  # or a short --stop-after would be spent on it
    notice(f"measuring the speed of this machine, about {measuring:.0f} seconds; slow networks take longer")
    seconds = time_jobs(missing, folder, measuring)
    table = Table("work", "jobs", "amount", "takes about")
    total = 0.0
    for pace in dict.fromkeys(job.pace for job in missing if job.units):
        those = [job for job in missing if job.pace == pace]
        units = sum(job.units for job in those)
        total += units * seconds[pace]
        table.add_row(pace, str(len(those)), f"{units:,} {those[0].unit}", duration(units * seconds[pace]))
    table.add_row("total, without evaluations", str(len(missing)), "", duration(total))
    console().print(table)
    return total
