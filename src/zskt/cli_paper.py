"""The subcommands that measure what the paper measures. Their docstrings are the help texts."""

from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from zskt.cli_teachers import Data, Result, test_images
from zskt.figures import average_transitions, single_transitions
from zskt.files import UsageError, replacing, write_json
from zskt.progress import bar, console, notice
from zskt.recipe import pick_device
from zskt.teacher import load_network
from zskt.transitions import Comparison, Start, Stepped, check_networks, compare


def run_belief(
    student: tyro.conf.Positional[Path],
    teacher: tyro.conf.Positional[Path],
    /,
    *,
    data: Data,
    images: int = 1_000,
    steps: int = 100,
    step_size: float = 1.0,
    stepped: Stepped = "first",
    start: Start = "prediction",
    out: Path | None = None,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Result:
    """Measure how closely two networks' beliefs match, near decision boundaries above all.

    From images on which both agree, one network is followed by gradient steps into every other class; the mean
    transition error is how far apart the two believe themselves to be on the way: 0 is the same, 1 the opposite.

    Example: zskt belief runs/a teacher --data cifar10-test.zip --out belief

    Args:
        student: a teacher folder, or a run folder (its student).
        teacher: the network to compare it with, likewise.
        data: labelled images, as in zskt teach; their test split is used.
        images: how many images to follow, drawn from those on which both networks agree.
        steps: gradient steps towards each class, K in the paper.
        step_size: of a gradient step in the stepped network's normalised space, xi in the paper.
        stepped: the network whose gradient is followed.
        start: the class a path starts from: the common prediction (the paper) or the label (the released code).
        out: folder for belief.json and the figures; by default none are written.
        seed: of the choice of images.
        batch_size: paths followed together; smaller needs less memory.
        device: auto, cpu, cuda or cuda:N.
        precision: bf16 is faster on hardware that has it and changes the error by a little; see docs/method.md.
    """
    for name, value in (("images", images), ("steps", steps), ("step-size", step_size), ("batch-size", batch_size)):
        if not value > 0:
            raise UsageError(f"--{name} {value}: expected a positive number")
    where = pick_device(device)
    first, second = load_network(student).to(where), load_network(teacher).to(where)
    check_networks(first, second)
    pictures, labels = test_images(data, second)
    with bar("following", "paths") as show:
        found = compare(
            first,
            second,
            pictures,
            labels,
            number=images,
            steps=steps,
            step_size=step_size,
            stepped=stepped,
            start=start,
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            progress=lambda done, total: show(done, total, ""),
        )
    show_comparison(found)
    if out is None:
        notice("give --out for the transition curves as figures")
        return found.measured
    names = [student.resolve().name, teacher.resolve().name]
    write_comparison(out, found, names, second.class_names)
    notice(f"look at {out / 'average-transitions.png'} and {out / 'single-transitions.png'}")
    return found.measured | {"out": str(out)}


def show_comparison(found: Comparison) -> None:
    """The measures as a table, with their intervals."""
    table = Table("", "found", "95 % interval")
    for name, value in found.measured.items():
        if isinstance(value, float) and name != "step_size":
            interval = found.measured["intervals"].get(name)
            table.add_row(
                name.replace("_", " "),
                f"{value:.4f}",
                "-" if interval is None else "{:.4f} .. {:.4f}".format(*interval),
            )
    console().print(table)


def write_comparison(out: Path, found: Comparison, names: list[str], class_names: tuple[str, ...] | None) -> None:
    """Write belief.json and the two figures."""
    facts: dict[str, Any] = {"networks": names, **found.measured}
    average = average_transitions(found.transitions, names)
    single = single_transitions(found.transitions, names, class_names)
    for name, png in (("average", average), ("single", single)):
        with replacing(out / f"{name}-transitions.png") as file:
            file.write(png)
    write_json(out / "belief.json", facts)
