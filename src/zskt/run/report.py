"""A self-contained HTML report on one run, or on several side by side, from their folders."""

import base64
import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zskt.errors import UsageError, ZsktError, failing, printable
from zskt.files import MOST_TEXT, expanded, regular, write_text
from zskt.method.budget import BUDGETED
from zskt.method.config import read_config
from zskt.method.recipe import load_recipe, recipe_texts
from zskt.run.checkpoint import read_finished, read_lines
from zskt.run.plots import readable_curves, run_classes
from zskt.run.without_data import doubts, read_inspected, told
from zskt.settings import flat

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}img{max-width:100%}
.wide{overflow-x:auto}.wide img{min-width:45rem}figure{display:inline-block;margin:.5rem}
figcaption,.note{color:#666;font-size:.85em}.samples img{width:32rem}
.warning{background:#fff3cd;padding:.5rem 1rem}summary{cursor:pointer}
figure[hidden]{display:none}.samples input{width:min(32rem,100%)}.samples input:not([hidden]){display:block}
:root{color-scheme:light dark}@media(prefers-color-scheme:dark){body{background:#181a1b;color:#ddd}
td,th{border-color:#444}.warning{color:#222}figcaption,.note{color:#aaa}}
.curves div{position:relative}.curves img{display:block}
.curves i{position:absolute;border-left:1px solid #888;pointer-events:none}output{display:block;min-height:1.5em}
@media print{figure[hidden]{display:inline-block!important}input{display:none}}"""

SLIDER = """document.querySelectorAll(".samples").forEach(box => {
const slider = box.querySelector("input"), figures = [...box.querySelectorAll("figure")]
if (!slider) return
slider.oninput = () => figures.forEach((figure, i) => { figure.hidden = i != slider.value })
slider.hidden = false
slider.oninput()
})"""
"""Shows one picture of a run at a time; without scripts and in print there are all."""

READING = """document.querySelectorAll(".curves").forEach(box => {
const panels = JSON.parse(box.querySelector("script").textContent)
const picture = box.querySelector("img"), line = box.querySelector("i"), words = box.querySelector("output")
picture.onpointermove = event => {
const x = event.offsetX / picture.clientWidth, y = event.offsetY / picture.clientHeight
const panel = panels.find(({box: [left, top, width, height]}) =>
x >= left && x <= left + width && y >= top && y <= top + height)
line.hidden = !panel
if (!panel) return
const [first, last] = panel.steps, [left, top, width, height] = panel.box
const step = first + (x - left) / width * (last - first)
const found = panel.curves.filter(curve => curve.steps.length).map(({label, steps, values}) => {
let i = steps.findIndex(each => each >= step)
if (i < 0) i = steps.length - 1
if (i && step - steps[i - 1] < steps[i] - step) i -= 1
return `${label} ${values[i]} at step ${steps[i].toLocaleString("en")}`.trim()
})
words.textContent = `${panel.title}: ${found.join(" \u00b7 ") || "nothing"}`
line.style.cssText = `left:${100 * x}%;top:${100 * top}%;height:${100 * height}%`
}
})"""
"""Says the values nearest to the pointer, or to a finger, below the curves."""

UNKNOWN = (
    "nobody knows how good the student is: no number here is an accuracy, and no warning is no proof. A hundred "
    "labelled images are enough to tell a good one from a poor one: zskt evaluate RUN --data IMAGES --teacher TEACHER."
)
MEASURES = {
    "teacher_accuracy": "teacher accuracy",
    "accuracy": "student accuracy",
    "agreement": "agreement with the teacher",
    "kl_teacher_student": "KL(teacher, student), nats",
    "calibration_error": "expected calibration error",
}
COMPARED = {"student": "model", "student parameters": "parameters", "teacher": "teacher_fingerprint"}
COMPARED["images of the user's own"] = "images"
"""What runs of one mean share, beside their settings: name -> key in student.json."""
METADATA = {
    "teacher_model": "teacher",
    "model": "student",
    "teacher_parameters": "teacher parameters",
    "parameters": "student parameters",
    "reason": "reason for the recipe",
    "seconds": "seconds",
}


def read_run(folder: Path) -> dict[str, Any]:
    """What a report shows of one run; raises ZsktError if `folder` holds none."""
    if not (folder / "metrics.jsonl").exists() or not (folder / "config.toml").exists():
        raise ZsktError(
            f"expected a run folder at {folder}, found no metrics.jsonl and config.toml; give the --out of zskt distill"
        )
    student = folder / "student.json"
    return {
        "name": printable(folder.resolve().name),
        "config": flat(read_config(folder / "config.toml")),
        "lines": read_lines(folder / "metrics.jsonl"),
        "metadata": read_finished(folder) if student.exists() else {},
        "without_data": read_inspected(folder),
        "samples": saved_samples(folder),
    }


def saved_samples(folder: Path) -> list[Path]:
    """The sample images of a run, in order. Links are left out: a report would publish what they lead to."""
    samples = folder / "samples"
    there = [] if samples.is_symlink() else sorted(samples.glob("*.png"))
    return [path for path in there if path.stem.isdecimal() and not path.is_symlink()]


def write_report(
    folders: str | Path | Sequence[str | Path], path: str | Path, *, reload: int | None = None
) -> dict[str, Any]:
    """Write the report on these runs to `path`; returns each measure over the runs: values, mean and std.

    A browser loads the page anew every `reload` seconds; without, once.
    Mean and std are None for runs that differ in more than their seed and the machine: those are not repetitions.
    """
    paths = [expanded(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    if len({folder.resolve() for folder in paths}) < len(paths):
        raise UsageError("expected different runs, found one twice; give each once, as the mean counts every run")
    runs = [read_run(folder) for folder in paths]
    if len({run["name"] for run in runs}) < len(runs):
        for run, folder in zip(runs, paths, strict=True):
            run["name"] = printable(folder)
    what = f"metrics.jsonl or student.json in {', '.join(map(str, paths))} is damaged"
    with failing(what, "restore or omit it", kinds=(LookupError, TypeError, ValueError, AttributeError)):
        page = _page(runs, reload)
        repeated = not differences(runs)
        summaries = {key: summary for key in MEASURES if (summary := summarise(runs, key, repeated)) is not None}
    write_text(expanded(path), page)
    return summaries


def _page(runs: Sequence[Mapping[str, Any]], reload: int | None) -> str:
    own = any(run["metadata"].get("images") for run in runs)
    title = f"Distilled with{'' if own else 'out'} data: " + ", ".join(run["name"] for run in runs)
    body = [f"<h1>{html.escape(title)}</h1>", _results(runs), _without_data(runs)]
    for run in runs:
        unfinished = "" if run["metadata"] else f"{run['name']} has not finished: continue it with --resume"
        for warning in [*run["metadata"].get("warnings", []), *doubts(run["without_data"] or {}), unfinished]:
            if warning:
                named = warning if len(runs) == 1 or warning == unfinished else f"{run['name']}: {warning}"
                body.append(f'<p class="warning">{html.escape(named)}</p>')
    body += ["<h2>Curves</h2>", _curves(runs)]
    for run in runs:
        if histogram := run_classes(run["lines"], run["metadata"].get("class_names")):
            body += [f"<h2>Classes of the pseudo images of {html.escape(run['name'])}</h2>"]
            body += [f'<img alt="class histograms" src="{_inline(histogram)}">']
        body += [f"<h2>Pseudo images of {html.escape(run['name'])}</h2>", _samples(run["samples"])]
    words = "The student learned from them; they need not look like the data. T, S: predictions of teacher and student."
    body.append(f'<p class="note">{words}</p>')
    body.append(_settings(runs))
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f'<meta http-equiv="refresh" content="{reload}">' if reload else ""
    style, script = f"<style>{STYLE}</style>", f"<script>{SLIDER}\n{READING}</script>"
    return f"{head}<title>{html.escape(title)}</title>{style}{''.join(body)}{script}</html>\n"


def differences(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the runs differ in, by name, beside seeds, machine and what a budget chose: settings, student, teacher."""
    facts = [
        {
            name: value
            for name, value in run["config"].items()
            if name != "seed" and not name.startswith("machine.") and not (run["config"]["budget"] and name in BUDGETED)
        }
        | {name: run["metadata"].get(key) for name, key in COMPARED.items() if run["metadata"]}
        for run in runs
    ]
    known = dict.fromkeys(name for fact in facts for name in fact)
    return [name for name in known if len({str(fact[name]) for fact in facts if name in fact}) > 1]


def summarise(runs: Sequence[Mapping[str, Any]], key: str, repeated: bool = True) -> dict[str, Any] | None:
    """A measure over runs, with mean and sample standard deviation if `repeated`; None unless every run has it."""
    values = [run["metadata"].get("measured", {}).get(key) for run in runs]
    if None in values:
        return None
    return {
        "values": values,
        "mean": statistics.fmean(values) if repeated else None,
        "std": statistics.stdev(values) if repeated and len(values) > 1 else None,
    }


def _results(runs: Sequence[Mapping[str, Any]]) -> str:
    differing = differences(runs)
    several = len(runs) > 1 and not differing
    rows = []
    for key, label in MEASURES.items():
        values = [run["metadata"].get("measured", {}).get(key) for run in runs]
        if all(value is None for value in values):
            continue
        cells = ["not measured" if value is None else f"{value:.4f}" for value in values]
        summary = summarise(runs, key)
        mean = f"{summary['mean']:.4f} ± {summary['std']:.4f}" if several and summary else "-"
        rows.append([label, *cells, *([mean] if several else [])])
    for key, label in METADATA.items():
        values = [run["metadata"].get(key) for run in runs]
        cells = [
            "-" if value is None else f"{value:,}" if isinstance(value, (int, float)) else value for value in values
        ]
        rows.append([label, *cells, *([""] if several else [])])
    head = ["last iterate", *(run["name"] for run in runs), *(["mean ± std"] if several else [])]
    which = ", ".join(differing[:5]) + (" and more" if len(differing) > 5 else "")
    note = f"<p class=note>No mean, as the runs differ in {html.escape(which)}.</p>" if differing else ""
    finished = [run for run in runs if run["metadata"]]
    unknown = [run["name"] for run in finished if run["metadata"].get("measured", {}).get("accuracy") is None]
    if unknown:
        names = "This run" if len(runs) == 1 else html.escape(" and ".join(unknown))
        note += f'<p class="warning">{names}: not measured on real images, so {UNKNOWN}</p>'
    return "".join(map(_told, finished)) + "<h2>Result</h2>" + _table(head, rows) + note


def _told(run: Mapping[str, Any]) -> str:
    """A finished run in a sentence: the student, what was measured, whether anything warned."""
    facts, measured = run["metadata"], run["metadata"].get("measured", {})
    student, teacher = facts.get("parameters"), facts.get("teacher_parameters")
    parts = [f"{facts.get('model') or 'a student'} of {student:,} parameters" if student else "a student"]
    if student and teacher:
        parts[0] += f", {student / teacher:.0%} of the teacher's"
    if own := facts.get("images"):
        parts.append(f"not data-free: {own:,} unlabelled images were given beside the pseudo images")
    if measured.get("accuracy") is not None:
        beside = measured.get("teacher_accuracy")
        right = f"right on {measured['accuracy']:.2%} of the test images"
        parts.append(right + (f" (teacher {beside:.2%})" if beside is not None else ""))
    if measured.get("agreement") is not None:
        parts.append(f"agrees with the teacher on {measured['agreement']:.2%}")
    warned = len(facts.get("warnings", [])) + len(doubts(run["without_data"] or {}))
    parts.append(f"{warned} warning{'s' if warned > 1 else ''}, below" if warned else "no warnings")
    return f"<p><strong>{html.escape(run['name'])}</strong>: {html.escape('; '.join(parts))}.</p>"


def _without_data(runs: Sequence[Mapping[str, Any]]) -> str:
    """What is known of the students where there are no data, in the words of `zskt inspect`."""
    body = ["<h2>How good is the student, without data?</h2>"]
    for run in runs:
        body.append(f"<h3>{html.escape(run['name'])}</h3>" if len(runs) > 1 else "")
        lines = ["not inspected: zskt inspect RUN --teacher TEACHER does it"]
        if run["without_data"] is not None:
            lines = told(run["without_data"])
        body.append(f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>")
    return "".join(body)


def _curves(runs: Sequence[Mapping[str, Any]]) -> str:
    png, panels = readable_curves({run["name"]: run["lines"] for run in runs})
    data = json.dumps(panels, separators=(",", ":")).replace("<", "\\u003c")  # no name may end the script
    return (
        f'<div class="wide curves"><div><img alt="curves over the steps" src="{_inline(png)}"><i hidden></i></div>'
        f'<output class="note">Point at a curve to read its values.</output>'
        f'<script type="application/json">{data}</script></div>'
    )


def _samples(paths: list[Path]) -> str:
    if not paths:
        return "<p class=note>none saved</p>"
    shown = [paths[round(i * (len(paths) - 1) / 5)] for i in range(6)] if len(paths) > 6 else paths
    figures = [
        f'<figure><img alt="pseudo images" src="{_inline(regular(p, MOST_TEXT).read_bytes())}">'
        f"<figcaption>step {html.escape(p.stem.lstrip('0'))}</figcaption></figure>"
        for p in shown
    ]
    last = len(figures) - 1
    slider = f'<input type="range" aria-label="time" max="{last}" value="{last}" hidden>' if last else ""
    return f'<div class="samples">{slider}{"".join(figures)}</div>'


def _settings(runs: Sequence[Mapping[str, Any]]) -> str:
    """What differs from the recipe, then everything, and the commands that do it again."""
    rows = [[key, *(str(run["config"][key]) for run in runs)] for key in runs[0]["config"]]
    head = ["", *(run["name"] for run in runs)]
    usual = [flat(load_recipe(name)) if (name := run["config"]["recipe"]) in recipe_texts() else {} for run in runs]
    changed = [
        row
        for row in rows
        if any(str(recipe.get(row[0], value)) != value for recipe, value in zip(usual, row[1:], strict=True))
    ]
    commands = [
        f"zskt distill TEACHER --student {run['metadata'].get('model') or 'STUDENT'} "
        f"--config {run['name']}/config.toml {'--images FOLDER ' if run['metadata'].get('images') else ''}"
        f"--out {run['name']}-again"
        for run in runs
    ]
    versions = runs[0]["metadata"].get("versions", {})
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"<h2>Settings that differ from the recipe</h2>{_table(head, changed)}"
        f"<details><summary>All settings</summary>{_table(head, rows)}</details>"
        f'<p>To do it again:</p><pre class="wide">{html.escape(chr(10).join(commands))}</pre>'
        f"<p class=note>{html.escape(made)}</p>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
