"""A comparison of two networks as a paper shows it: one table, one figure."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zskt.paper.tables import latex
from zskt.run.plots import styled, visible

Measured = Mapping[str, Any]

LABELS = {
    "mean_transition_error": "Mean transition error",
    "agreement": "Agreement",
    "agreement_where_teacher_right": "Agreement where the teacher is right",
    "agreement_where_teacher_wrong": "Agreement where the teacher is wrong",
    "agreement_expected": "Agreement expected from the accuracies alone",
    "cohens_kappa": "Cohen's kappa",
    "kl_teacher_student": "KL(teacher, student), nats",
    "kl_student_teacher": "KL(student, teacher), nats",
    "jensen_shannon": "Jensen-Shannon divergence, nats",
    "accuracy": "Accuracy of the student",
    "teacher_accuracy": "Accuracy of the teacher",
    "mcnemar_p": "p of equal accuracies (McNemar, exact)",
    "negative_flip_rate": "Negative flips",
    "calibration_error": "Calibration error of the student",
    "teacher_calibration_error": "Calibration error of the teacher",
}
WITHHELD = "withheld"
STYLE: Any = {"pdf.fonttype": 42, "lines.linewidth": 1.2, "axes.axisbelow": True}  # journals refuse fonts of type 3


class Row(NamedTuple):
    """One measure: its value, 95 % interval, mean over the controls and p-value, as text; empty where there is none."""

    label: str
    value: str
    interval: str = ""
    controls: str = ""
    p: str = ""


def belief_rows(measured: Measured) -> list[Row]:
    """What `zskt.fidelity` measured, row by row; a transition error of few images is withheld."""
    rows = []
    controls = list(measured.get("controls", {}).values())
    for key, label in LABELS.items():
        if measured.get(key) is None:
            continue
        interval = measured["intervals"].get(key)
        withheld = key == "mean_transition_error" and measured["warnings"]
        others = [c[key] for c in controls if key in c and not (key == "mean_transition_error" and c["warnings"])]
        p = measured.get("p_values", {}).get(key)
        row = Row(
            label,
            _probability(measured[key]) if key == "mcnemar_p" else _number(measured[key]),
            "" if interval is None else " .. ".join(map(_number, interval)),
            _number(float(np.mean(others))) if others else "",
            "" if p is None else _probability(p),
        )
        rows.append(Row(label, WITHHELD) if withheld else row)
    for kind, entries in measured["corruptions"].items():
        levels = ", ".join(f"{entry['severity']:g}" for entry in entries)
        agreements = ", ".join(_number(entry["agreement"]) for entry in entries)
        rows.append(Row(f"Agreement under {kind} of {levels}", agreements))
    for side, other in (("student", "teacher"), ("teacher", "student")):
        for attack, found in measured[f"attacks_on_{side}"].items():
            share = found["transferred"]
            text = "none succeeds" if share is None else _number(share)
            rows.append(Row(f"Attacks on the {side} that fool the {other} too ({attack.upper()})", text))
    for pair in measured["alignment"]:
        stages = pair["first"] if pair["first"] == pair["second"] else f"{pair['first']} and {pair['second']}"
        rows.append(Row(f"CKA of {stages}", "undefined" if pair["cka"] is None else _number(pair["cka"])))
    return rows


def belief_head(measured: Measured) -> list[str]:
    """The columns that `belief_rows` fill: with controls, their mean and the p-value."""
    return ["", "found", "95 % interval", *(["controls", "p"] if "controls" in measured else [])]


def belief_table(measured: Measured, names: Sequence[str]) -> str:
    """A LaTeX table of all rows; `names` are those of student and teacher."""
    head = belief_head(measured)
    rows = [row[: len(head)] for row in belief_rows(measured)]
    how = f"{measured['images']} images, {measured['followed']} followed, {measured['steps']} steps of size "
    return latex(head, rows, note=f"{names[0]} and its teacher {names[1]}: {how}{measured['step_size']:g}")


def belief_figure(measured: Measured, curves: Measured, class_names: Sequence[str] | None) -> dict[str, bytes]:
    """The figure as PNG and PDF, by suffix; `curves` is the result of `average_curves`."""
    with styled(), matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        panels = figure.subplots(2, 3).flatten()
        _transitions(panels[0], measured, curves)
        _agreements(panels[1], measured)
        _classes(panels[2], measured["disagreement_by_class"], class_names)
        _alignment(panels[3], measured["alignment"])
        _corruptions(panels[4], measured)
        _attacks(panels[5], measured)
        for letter, axes in zip("abcdef", panels, strict=True):
            axes.set_title(f"({letter}) {axes.get_title()}", loc="left")
            axes.set_title("")
        return {suffix: _saved(figure, suffix) for suffix in ("png", "pdf")}


def _saved(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    undated = {"CreationDate": None} if suffix == "pdf" else None
    figure.savefig(buffer, format=suffix, dpi=200, metadata=undated)
    return buffer.getvalue()


def _transitions(axes: Axes, measured: Measured, curves: Measured) -> None:
    for key, name, style in (("first", "student", "-"), ("second", "teacher", "--")):
        mean, error = np.array(curves[key]), 2 * np.array(curves[f"{key}_standard_error"])  # (S,) each
        axes.plot(range(len(mean)), mean, style, label=name)
        axes.fill_between(range(len(mean)), mean - error, mean + error, alpha=0.25)
    found = WITHHELD if measured["warnings"] else _number(measured["mean_transition_error"])
    axes.set(title=f"transition error {found}", xlabel="step", ylabel="p(target class)", ylim=(-0.03, 1.03))
    axes.legend()


def _agreements(axes: Axes, measured: Measured) -> None:
    """Dots with intervals, from top to bottom: overall, split by the teacher, expected, controls."""
    shown = {
        "overall": "agreement",
        "teacher right": "agreement_where_teacher_right",
        "teacher wrong": "agreement_where_teacher_wrong",
        "expected": "agreement_expected",
    }
    rows = [
        (label, measured[key], measured["intervals"].get(key), "C0" if label != "expected" else "0.4")
        for label, key in shown.items()
        if measured.get(key) is not None
    ]
    for name, control in measured.get("controls", {}).items():
        rows.append((visible(name)[:14], control["agreement"], control["intervals"]["agreement"], "C1"))
    for place, (_, value, interval, color) in enumerate(rows):
        axes.plot([value], [-place], "o" if color == "C0" else "s", color=color, markersize=4)
        if interval is not None:
            axes.plot(interval, [-place, -place], color=color)
    axes.set_yticks([-place for place in range(len(rows))], [label for label, *_ in rows])
    axes.set(title="agreement with the teacher", xlabel="fraction of images", xlim=(-0.03, 1.03))


def _classes(axes: Axes, shares: Sequence[float | None], class_names: Sequence[str] | None) -> None:
    """Disagreement by the teacher's class; above 20 classes in ascending order, as there is no room for names."""
    values = [100 * (share or 0.0) for share in shares]
    few = len(values) <= 20
    axes.bar(range(len(values)), values if few else sorted(values), width=0.8 if few else 1.0)
    if few:
        axes.set_xticks(range(len(values)), [str(name)[:10] for name in class_names or range(len(values))])
        if class_names and max(map(len, map(str, class_names))) > 2:
            axes.tick_params(axis="x", rotation=60, labelsize=6)
    axes.set(
        title="disagreement by class",
        xlabel="the teacher's class" if few else "the teacher's classes, in ascending order",
        ylabel="of 100 images",
    )


def _alignment(axes: Axes, pairs: Sequence[Measured]) -> None:
    values = [pair["cka"] if pair["cka"] is not None else np.nan for pair in pairs]
    axes.plot(range(len(pairs)), values, "o-", markersize=4)
    axes.set_xticks(range(len(pairs)), [str(pair["first"])[-10:] for pair in pairs], rotation=30, ha="right")
    axes.set(title="alignment of stages", ylabel="linear CKA", ylim=(min(-0.03, np.nanmin([0, *values])), 1.03))


def _corruptions(axes: Axes, measured: Measured) -> None:
    for (kind, entries), style in zip(measured["corruptions"].items(), ("o-", "s--", "^:"), strict=True):
        values = [measured["agreement"], *(entry["agreement"] for entry in entries)]
        axes.plot(range(len(values)), values, style, markersize=4, label=kind)
    axes.set_xticks(range(4))
    axes.set(title="agreement when corrupted", xlabel="severity", ylabel="fraction of images", ylim=(-0.03, 1.03))
    axes.legend()


def _attacks(axes: Axes, measured: Measured) -> None:
    """By attacked network: the share of attacks that succeed, and of these, that succeed on the other one too."""
    labels, bars = [], []
    for side in ("student", "teacher"):
        for attack, found in measured[f"attacks_on_{side}"].items():
            labels.append(f"{side}\n{attack.upper()}")
            bars.append((found["fooled"], found["transferred"] or 0.0))
    places = np.arange(len(bars))
    for offset, (values, label, hatch) in enumerate(
        zip(zip(*bars, strict=True), ("fooled", "the other, too"), ("", "//"), strict=True)
    ):
        axes.bar(places + 0.4 * offset - 0.2, values, width=0.38, label=label, hatch=hatch, edgecolor="white")
    axes.set_xticks(places, labels, fontsize=6)
    axes.set(title="attacks", xlabel="attacked network", ylabel="fraction", ylim=(0, 1.35), yticks=[0, 0.5, 1])
    axes.legend(loc="upper center", ncols=2, columnspacing=0.8, handlelength=1.2)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.0005 else _number(p)
