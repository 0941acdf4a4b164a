"""What `zskt.fidelity` adds to `zskt.compare`: each part is that of its own function, controls are told apart."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import zskt
from zskt.evaluate.agreement import jensen_shannon, negative_flips, statistics
from zskt.evaluate.controls import untrained
from zskt.evaluate.measures import predict
from zskt.evaluate.perturbations import transfer, under_corruption
from zskt.evaluate.representations import stage_alignment
from zskt.networks.classifier import Classifier
from zskt.paper import belief
from zskt.paper.belief import LABELS, belief_figure, belief_head, belief_rows, belief_table
from zskt.paper.tables import latex

K, M, SIZE = 4, 120, (3, 8, 8)
PATHS = zskt.Paths(images=20, steps=6)
Three = tuple[Classifier, Classifier, Classifier]


def network(seed: int, near: Classifier | None = None) -> Classifier:
    """A linear classifier that sees differences between noisy images; close to another one if given."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, K, bias=False))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(K, 192, generator=rng) / 8)  # type: ignore[operator]
        if near is not None:
            module[1].weight.mul_(0.5).add_(near.module[1].weight)  # type: ignore[operator,index]
    return Classifier(module, input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def three() -> Three:
    """A teacher, a student near it, and a network that has nothing to do with either."""
    teacher = network(0)
    return teacher, network(1, near=teacher), network(2)


@pytest.fixture(scope="module")
def data(three: Three) -> tuple[Tensor, Tensor]:
    """Noise (M, C, H, W), and labels that the teacher gets right on all but a quarter."""
    images = torch.randint(256, (M, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = predict(three[0], images).argmax(dim=1)
    labels[: M // 4] = (labels[: M // 4] + 1) % K
    return images, labels


@pytest.fixture(scope="module")
def found(three: Three, data: tuple[Tensor, Tensor]) -> zskt.Comparison:
    teacher, student, other = three
    return zskt.fidelity(
        student, teacher, *data, PATHS, controls={"other_run": other, "near": network(3, near=teacher)}
    )


def test_each_part_is_that_of_its_function(three: Three, data: tuple[Tensor, Tensor], found: zskt.Comparison) -> None:
    teacher, student, _ = three
    images, labels = data
    measured = found.measured
    plain = zskt.compare(student, teacher, images, labels, PATHS)
    assert {name: measured[name] for name in plain.measured} == plain.measured
    logits, answers = predict(student, images), predict(teacher, images)
    for name, value in statistics(logits, answers, labels).items():
        assert measured[name] == value, name
    assert measured["jensen_shannon"] == pytest.approx(float(jensen_shannon(logits, answers).mean()))
    assert measured["negative_flip_rate"] == pytest.approx(
        float(negative_flips(logits, answers, labels).double().mean())
    )
    some = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    assert measured["corruptions"] == under_corruption(student, teacher, images[some], labels[some])
    alignment = [pair._asdict() for pair in stage_alignment(student, teacher, images[some])]
    assert measured["alignment"] == alignment
    starts = images[found.followed], logits.argmax(dim=1)[found.followed]
    assert measured["attacks_on_student"] == transfer(student, teacher, *starts)
    assert measured["attacks_on_teacher"] == transfer(teacher, student, *starts)
    assert measured["attacks_on_student"] != measured["attacks_on_teacher"]
    assert torch.equal(starts[1], answers.argmax(dim=1)[found.followed])


def test_controls_are_compared_with_the_teacher(
    three: Three, data: tuple[Tensor, Tensor], found: zskt.Comparison
) -> None:
    teacher, _, other = three
    agreeing = int((predict(other, data[0]).argmax(1) == predict(teacher, data[0]).argmax(1)).sum())
    alone = zskt.compare(other, teacher, *data, PATHS).measured
    control = found.measured["controls"]["other_run"]
    assert control == {name: alone[name] for name in control}
    assert control["agreement"] == agreeing / M < 0.5
    assert control["followed"] == 20


def test_p_values_say_whether_a_control_is_as_close(three: Three, data: tuple[Tensor, Tensor]) -> None:
    teacher, student, other = three

    def p_values(student: Classifier, *controls: Classifier) -> dict[str, Any]:
        named = {str(number): control for number, control in enumerate(controls)}
        found: dict[str, Any] = zskt.fidelity(student, teacher, *data, PATHS, controls=named).measured["p_values"]
        return found

    assert p_values(student, other) == {"agreement": 1 / 1001, "mean_transition_error": None}
    assert p_values(student, teacher) == {"agreement": 1, "mean_transition_error": 1}
    assert p_values(teacher, student) == {"agreement": 1 / 1001, "mean_transition_error": 1 / 1001}
    assert p_values(other, student)["mean_transition_error"] is None
    both = p_values(teacher, student, other)
    assert both["mean_transition_error"] == 1 / 1001  # of the control that agrees on most images alone


def test_a_control_that_agrees_on_few_images_is_followed_from_those(three: Three, data: tuple[Tensor, Tensor]) -> None:
    teacher, _, other = three
    agreeing = int((predict(other, data[0]).argmax(1) == predict(teacher, data[0]).argmax(1)).sum())
    many = zskt.Paths(images=60, steps=2)
    found = zskt.fidelity(teacher, teacher, *data, many, controls={"other": other})
    assert found.measured["followed"] == 60
    assert found.measured["controls"]["other"]["followed"] == agreeing < 60
    opposite = copy.deepcopy(teacher)
    with torch.no_grad():
        opposite.module[1].weight.neg_()  # type: ignore[index]
    calls: list[tuple[str, int, int]] = []
    with pytest.raises(zskt.ZsktError, match="agrees with the teacher on some image, found none of opposite"):
        zskt.fidelity(
            teacher,
            teacher,
            *data,
            many,
            controls={"opposite": opposite},
            progress=lambda *call: calls.append(call),
        )
    assert calls == []  # before the work


def test_an_error_over_a_minority_of_the_images_is_withheld(
    three: Three, data: tuple[Tensor, Tensor], found: zskt.Comparison
) -> None:
    teacher, student, other = three
    assert found.measured["warnings"] == []
    assert (
        dict((row.label, row.value) for row in belief_rows(found.measured))[LABELS["mean_transition_error"]]
        != "withheld"
    )
    poor = zskt.fidelity(other, teacher, *data, PATHS, controls={"student": student}).measured
    (line,) = poor["warnings"]
    assert f"over the {100 * poor['agreement']:.0f} of 100 images on which the networks agree" in line
    assert poor["mean_transition_error"] > 0  # still there for those who know what it is
    (row,) = (row for row in belief_rows(poor) if row.label == LABELS["mean_transition_error"])
    assert row == (row.label, "withheld", "", "", "")
    assert belief_rows(poor)[1].p == "1.000"


def test_without_labels_there_are_no_accuracies(three: Three, data: tuple[Tensor, Tensor]) -> None:
    teacher, student, _ = three
    measured = zskt.fidelity(student, teacher, data[0], paths=PATHS).measured
    for name in ("accuracy", "mcnemar_p", "agreement_expected", "negative_flip_rate", "controls"):
        assert name not in measured
    assert measured["jensen_shannon"] > 0
    assert belief_head(measured) == ["", "found", "95 % interval"]
    assert "Accuracy of the student" not in belief_table(measured, ["a", "b"])


def test_progress_is_told_in_phases(three: Three, data: tuple[Tensor, Tensor]) -> None:
    teacher, student, other = three
    calls: list[tuple[str, int, int]] = []
    zskt.fidelity(student, teacher, *data, PATHS, controls={"x": other}, progress=lambda *call: calls.append(call))
    phases = ["paths", "corruptions", "attacks on the student", "attacks on the teacher", "paths of control x"]
    assert list(dict.fromkeys(what for what, *_ in calls)) == phases
    for phase in phases:
        *_, (_, done, total) = (call for call in calls if call[0] == phase)
        assert done == total


def test_what_is_printed_of_a_comparison_is_its_numbers(found: zskt.Comparison) -> None:
    assert "tensor(" not in repr(found)
    assert "'agreement': " in repr(found)


# The table and the figure of a paper


def test_the_table_has_every_measure_with_its_numbers(found: zskt.Comparison) -> None:
    measured = found.measured
    rows = {row.label: row for row in belief_rows(measured)}
    for key, label in LABELS.items():
        assert rows[label].value == (f"{measured[key]:.3f}" if measured[key] >= 0.0005 else "< 0.001"), key
    low, high = measured["intervals"]["agreement"]
    controls = measured["controls"].values()
    mean = sum(control["agreement"] for control in controls) / 2
    p = measured["p_values"]["agreement"]
    expected = (f"{measured['agreement']:.3f}", f"{low:.3f} .. {high:.3f}", f"{mean:.3f}", f"{p:.3f}")
    assert rows["Agreement"][1:] == expected
    near = measured["controls"]["near"]["mean_transition_error"]  # the other's is withheld
    assert rows["Mean transition error"].controls == f"{near:.3f}"
    noise = ", ".join(f"{entry['agreement']:.3f}" for entry in measured["corruptions"]["noise"])
    assert rows["Agreement under noise of 0.04, 0.08, 0.16"].value == noise
    share = measured["attacks_on_teacher"]["pgd"]["transferred"]
    assert rows["Attacks on the teacher that fool the student too (PGD)"].value == f"{share:.3f}"
    assert rows["CKA of logits"].value == f"{measured['alignment'][-1]['cka']:.3f}"


def test_the_latex_table_is_well_formed(found: zskt.Comparison) -> None:
    text = belief_table(found.measured, ["my_student", "50% teacher"])
    comment, begin, top, head, *rows, bottom, end = text.splitlines()
    assert comment.startswith("% my_student and its teacher 50% teacher: 120 images, 20 followed, 6 steps of size 1")
    assert (begin, top, bottom, end) == (r"\begin{tabular}{lrrrr}", r"\toprule", r"\bottomrule", r"\end{tabular}")
    assert head == r" & found & 95 \% interval & controls & p \\"
    assert rows[0] == r"\midrule"
    assert all(row.count(" & ") == 4 and row.endswith(r" \\") for row in rows[1:])
    assert len(rows) - 1 == len(belief_rows(found.measured))


def test_special_letters_are_escaped() -> None:
    text = latex(["a_b", "c"], [["50% & #1", "$x^2$ {~\\}"]])
    assert r"a\_b & c \\" in text
    assert r"50\% \& \#1 & \$x\textasciicircum{}2\$ \{\textasciitilde{}\textbackslash{}\} \\" in text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the files."""
    figures: list[Figure] = []
    real = belief._saved

    def recording(figure: Figure, suffix: str) -> bytes:
        figures.append(figure)
        return real(figure, suffix)

    monkeypatch.setattr(belief, "_saved", recording)
    return figures


def curves(steps: int = 6) -> dict[str, list[float]]:
    names = ("first", "first_standard_error", "second", "second_standard_error")
    return {name: np.linspace(0, 0.1 * (i + 1), steps).tolist() for i, name in enumerate(names)}


def test_the_figure_shows_the_numbers(found: zskt.Comparison, drawn: list[Figure]) -> None:
    measured = found.measured
    files = belief_figure(measured, curves(), ["a$b", "_c", "d", "e"])
    assert files["pdf"].startswith(b"%PDF")
    assert b"CreationDate" not in files["pdf"]
    assert files == belief_figure(measured, curves(), ["a$b", "_c", "d", "e"])
    with Image.open(io.BytesIO(files["png"])) as image:
        assert image.size == (1440, 920)
    paths, agreements, classes, alignment, corruptions, attacks = drawn[0].axes
    assert paths.get_title(loc="left") == f"(a) transition error {measured['mean_transition_error']:.3f}"
    assert [np.asarray(line.get_ydata())[-1] for line in paths.lines] == pytest.approx([0.1, 0.3])
    dots = [np.asarray(line.get_xdata())[0] for line in agreements.lines if line.get_marker() in ("o", "s")]
    keys = ["agreement", "agreement_where_teacher_right", "agreement_where_teacher_wrong", "agreement_expected"]
    others = [control["agreement"] for control in measured["controls"].values()]
    assert dots == pytest.approx([*(measured[key] for key in keys), *others])
    bars = [bar.get_height() for bar in classes.patches]  # type: ignore[attr-defined]
    assert bars == pytest.approx([100 * share for share in measured["disagreement_by_class"]])
    (line,) = alignment.lines
    assert list(line.get_ydata()) == pytest.approx([pair["cka"] for pair in measured["alignment"]])  # type: ignore[arg-type]
    shown = {line.get_label(): list(line.get_ydata()) for line in corruptions.lines}  # type: ignore[arg-type]
    blur = [measured["agreement"], *(entry["agreement"] for entry in measured["corruptions"]["blur"])]
    assert shown["blur"] == pytest.approx(blur)
    heights = [bar.get_height() for bar in attacks.patches]  # type: ignore[attr-defined]
    fooled = [
        measured[f"attacks_on_{side}"][attack]["fooled"]
        for side in ("student", "teacher")
        for attack in ("fgsm", "pgd")
    ]
    assert heights[:4] == pytest.approx(fooled)


def test_the_figure_of_many_classes_of_a_poor_student(
    three: Three, data: tuple[Tensor, Tensor], drawn: list[Figure]
) -> None:
    teacher, _, other = three
    measured = zskt.fidelity(other, teacher, data[0], paths=PATHS).measured
    measured |= {
        "disagreement_by_class": [0.5, None, 0.25] * 10,
        "alignment": [{"first": "x", "second": "x", "cka": None}],
    }
    measured["attacks_on_student"]["fgsm"]["transferred"] = None
    belief_figure(measured, curves(), None)
    axes = drawn[0].axes
    assert axes[0].get_title(loc="left") == "(a) transition error withheld"
    bars = [bar.get_height() for bar in axes[2].patches]  # type: ignore[attr-defined]
    assert bars == sorted([50, 0, 25] * 10)


def test_a_random_control_is_far_from_the_teacher(three: Three, data: tuple[Tensor, Tensor]) -> None:
    teacher, student, _ = three
    measured = zskt.fidelity(student, teacher, *data, PATHS, controls={"random": untrained(student)}).measured
    assert measured["controls"]["random"]["agreement"] < 0.5
    assert measured["p_values"]["agreement"] == 1 / 1001
