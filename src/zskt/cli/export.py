"""The export subcommand. Its docstring is the help text."""

from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from zskt.cli.options import Text
from zskt.cli.progress import console, notice, warn
from zskt.cli.teachers import FOREIGN, Network, Options, open_method, open_networks, said_progress
from zskt.deploy.export import TIMED, Exported, Format, Source, as_json, export, from_folder
from zskt.deploy.formats import INPUTS, Input
from zskt.errors import UsageError
from zskt.files import expanded
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
    """Export a student as an ONNX file, torch.export archive or Hugging Face style folder.

    The export is read back and compared with the student on 256 pseudo images of the run; if its logits differ, it
    is deleted.

    Example: zskt export runs/a --format onnx --out student.onnx --teacher teacher

    Args:
        run: a run folder, whose student is exported, or any network as in zskt distill, compared on noise, as is the
            student of a stopped run.
        out: output file, or folder for hub; must not exist.
        format: onnx, pt2 or hub; by default from the suffix of --out, hub where it has none.
        input: fraction (the default): images in [0, 1]; uint8: images as bytes; normalised: normalised images.
        int8: quantise the ONNX file, calibrated on other pseudo images, without data.
        teacher: also time this network, specified as in zskt distill, and the student in onnxruntime.
        method: for a run with a custom method, as in zskt distill; needs --teacher and --trust.
        tolerance: largest accepted difference of a logit, as a fraction of the largest logit.
        least_agreement: least accepted fraction of images whose predicted class --int8 keeps.
    """
    found, beside = open_networks([run, teacher], foreign, unfinished=True)
    assert found is not None
    make = None if method is None else open_method(method, foreign.trust)
    other = None if beside is None else beside.teacher
    if found.unfinished is not None:
        source = Source(found.teacher, found.unfinished, None)
        if int8:
            raise UsageError(
                f"--int8 is calibrated with a finished run's images, found one at {found.unfinished['warnings'][0]}"
            )
    elif is_own_folder(expanded(run)):
        source = from_folder(expanded(run), found.teacher, make, other)
    else:
        source = Source(found.teacher, {}, None)
    for line in () if found.unfinished else source.metadata.get("warnings") or ():
        warn(f"of the run: {line}")
    if source.sample is not None and "accuracy" not in (source.metadata.get("measured") or {}):
        notice("note: this student was never measured on real images: zskt evaluate tells how good it is")
    exported = export(
        source,
        out,
        format,
        input=input,
        int8=int8,
        teacher=other,
        tolerance=tolerance,
        least_agreement=least_agreement,
    )
    show_export(exported)
    return said_progress(found) | as_json(exported)


def show_export(exported: Exported) -> None:
    """Print the export's input, its difference from the network and its speed."""
    notice(f"input: {exported.input}, {INPUTS[exported.input]}")
    notice(
        f"compared on {exported.images} images ({exported.images_from}): logits up to {exported.largest_logit:.3g} "
        f"differ by at most {exported.max_difference:.3g}; the file names the network's class on "
        f"{exported.agreement:.2%} of them, which says nothing about the teacher"
    )
    if exported.int8:
        notice(f"int8 changes the predicted class of {1 - exported.agreement:.2%} of the images")
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
            notice(
                f"note: other programs disturbed the timing: wall time is {waits:.1f} times the CPU time (see the JSON)"
            )
