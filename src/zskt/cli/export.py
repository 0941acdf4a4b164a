"""The subcommand that puts a student to use elsewhere. Its docstring is the help text."""

from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from zskt.cli.options import Text
from zskt.cli.progress import console, notice
from zskt.cli.teachers import FOREIGN, Network, Options, open_method, open_networks
from zskt.export.export import TIMED, Exported, Format, as_json, export, from_folder
from zskt.export.formats import INPUTS, Input
from zskt.networks.loading import is_own_folder


def run_export(
    run: tyro.conf.Positional[Network],
    /,
    *,
    out: Path,
    format: Format | None = None,
    input: Input | None = None,
    int8: bool = False,
    teacher: Text = None,
    method: Text = None,
    tolerance: float = 1e-3,
    least_agreement: float = 0.9,
    foreign: Options = FOREIGN,
) -> dict[str, Any]:
    """Write a student as ONNX, torch.export archive or Hugging Face style folder, compared with the student itself.

    What was written is read back and compared on 256 pseudo images of the run's generator; where it answers otherwise
    it is removed again.

    Example: zskt export runs/a --format onnx --out student.onnx --teacher teacher

    Args:
        run: a run folder (its student), or any network as in zskt distill, which is compared on noise.
        out: the file, or for hub the folder, to write; must not exist.
        format: onnx, pt2 or hub; by default by the ending of --out.
        input: fraction: images in [0, 1] (the default); uint8: images as bytes; normalised: images already normalised.
        int8: quantise the ONNX file, calibrated on other pseudo images: no data needed.
        teacher: also time this network, specified as in zskt distill, and the student in onnxruntime, side by side.
        method: of a run with an own method, as in zskt distill; needs --teacher and --trust.
        tolerance: largest difference of a logit that is let pass, as a fraction of the largest logit.
        least_agreement: fraction of the images that must keep their most probable class under --int8.
    """
    found, beside = open_networks([run, teacher], foreign)
    assert found is not None
    make = None if method is None else open_method(method, foreign.trust)
    other = None if beside is None else beside.teacher
    own = is_own_folder(Path(run))
    exported = export(
        from_folder(Path(run), found.teacher, make, other) if own else found.teacher,
        out,
        format,
        input=input,
        int8=int8,
        teacher=other,
        tolerance=tolerance,
        least_agreement=least_agreement,
    )
    show_export(exported)
    return as_json(exported)


def show_export(exported: Exported) -> None:
    """What the file is fed, how far it is from the network, how fast it runs."""
    notice(f"input: {exported.input}, {INPUTS[exported.input]}")
    notice(
        f"read back and compared on {exported.images} images ({exported.images_from}): logits of up to "
        f"{exported.largest_logit:.3g} differ by at most {exported.max_difference:.3g}; top-1 agreement "
        f"{exported.agreement:.4f}"
    )
    if exported.int8:
        notice(f"int8 cost {1 - exported.agreement:.4f} of the agreement with the student in fp32")
    if exported.timings:
        table = Table("", "parameters", "KiB", *(f"ms, batch {batch}" for batch in TIMED))
        table.title = "onnxruntime, one thread, median"
        for row in exported.timings:
            times = (f"{row.milliseconds[batch]:.3f}" for batch in TIMED)
            table.add_row(row.network, f"{row.parameters:,}", f"{row.bytes / 1024:,.0f}", *times)
        console().print(table)
        waits = max(
            row.milliseconds[batch] / (row.processor[batch] or 1e-9) for row in exported.timings for batch in TIMED
        )
        if waits > 1.5:
            notice(f"note: other programs were in the way: {waits:.1f} times the processor time, which the JSON has")
