"""How good a student is without data: images that it never saw, disagreements in words, and how they track accuracy."""

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import zskt
from small import call, edit, fails, make_teacher, refused, run, student_for
from zskt.evaluate.controls import untrained
from zskt.evaluate.measures import wilson
from zskt.evaluate.transitions import renormalised
from zskt.files import read_tensors, sealed
from zskt.method.config import read_config
from zskt.networks.classifier import Classifier
from zskt.networks.observe import forward_flops
from zskt.run import without_data
from zskt.run.without_data import (
    FILE,
    KINDS,
    disagreements,
    doubts,
    draw_probes,
    inspect_run,
    probe_count,
    rank_correlations,
    read_inspected,
    spearman,
    told,
)

SIZE = (3, 8, 8)
TINY: dict[str, Any] = {"batch_size": 8, "generator.width": 8, "generator.latent": 12, "evaluate_every": 1}
BANK = {
    "evaluate_every": 6,
    "bank.rounds": 4,
    "bank.warmup": 1,
    "bank.batch_size": 10,
    "bank.views": 2,
    "generator.updates": 2,
}


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return make_teacher(size=SIZE)


def settings_of(recipe: str) -> dict[str, Any]:
    return TINY | (BANK if recipe in ("bank", "deepinversion") else {})


def finished(
    folder: Path, teacher: Classifier, recipe: str = "zskt-fresh", steps: int = 4, **changes: Any
) -> tuple[Path, Classifier]:
    """A finished run and its student, which predicts several classes."""
    torch.manual_seed(0)
    student = student_for(teacher)
    settings = settings_of(recipe) | changes
    zskt.distill(teacher, student, recipe, steps=steps, settings=settings, out=folder)
    return folder, zskt.load_student(folder, module=student)


@pytest.fixture(scope="module")
def made(teacher: Classifier, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    return finished(tmp_path_factory.mktemp("runs") / "a", teacher)


@pytest.mark.parametrize(("recipe", "steps", "half"), [("zskt-fresh", 5, 3), ("bank", 24, 12)])
def test_the_generator_half_way_is_kept(
    recipe: str, steps: int, half: int, teacher: Classifier, tmp_path: Path
) -> None:
    folder, _ = finished(tmp_path / "whole", teacher, recipe, steps)
    kept, last = (read_tensors(folder / f"generator{name}.safetensors")[0] for name in ("-half-way", ""))
    assert any(not torch.equal(kept[name], last[name]) for name in last)
    torch.manual_seed(0)
    module, settings = student_for(teacher), settings_of(recipe)
    stopped = zskt.distill(
        teacher, module, recipe, steps=steps, settings=settings, out=tmp_path / "parts", stop_after=half
    )
    generator = stopped.method.modules()["generator"].state_dict()
    assert all(torch.equal(kept[name], generator[name]) for name in kept)
    torch.manual_seed(0)
    zskt.distill(
        teacher, student_for(teacher), recipe, steps=steps, settings=settings, out=tmp_path / "parts", resume=True
    )
    again = read_tensors(tmp_path / "parts" / "generator-half-way.safetensors")[0]
    assert all(torch.equal(kept[name], again[name]) for name in kept)  # not replaced by a later one


def test_a_run_evaluated_only_at_its_end_has_no_earlier_generator(teacher: Classifier, tmp_path: Path) -> None:
    folder, student = finished(tmp_path / "run", teacher, evaluate_every=100)
    assert not (folder / "generator-half-way.safetensors").exists()
    assert list(draw_probes(folder, student, 4)) == ["pseudo", "mixed", "noise"]


def test_probes_are_new_images(made: tuple[Path, Classifier]) -> None:
    folder, student = made
    probes = draw_probes(folder, student, 21)
    assert list(probes) == list(KINDS)
    assert all(images.shape == (21, *SIZE) for images in probes.values())
    again = draw_probes(folder, student, 21)
    assert all(torch.equal(again[kind], images) for kind, images in probes.items())
    flat = torch.cat([images.flatten(1) for images in probes.values()])
    assert len(torch.unique(flat, dim=0)) == 4 * 21  # none twice
    pixels = student.denormalise(probes["noise"])
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(pixels.std()) == pytest.approx(12**-0.5, abs=0.02)
    assert float(probes["mixed"].std()) < float(probes["pseudo"].std())


def test_images_of_a_bank_are_not_those_it_was_trained_on(teacher: Classifier, tmp_path: Path) -> None:
    folder, student = finished(tmp_path / "run", teacher, "bank", 24)
    probes = draw_probes(folder, student, 15)
    assert list(probes) == list(KINDS)
    stored = torch.cat([read_tensors(path)[0]["images"] for path in (folder / "rows").glob("*")])  # (M, C, H, W)
    fresh = (student.denormalise(probes["pseudo"]) * 255).round().byte()
    assert not (fresh.flatten(1)[:, None] == stored.flatten(1)).all(dim=2).any()


def test_without_a_generator_there_is_noise(teacher: Classifier, tmp_path: Path) -> None:
    folder, student = finished(tmp_path / "run", teacher, "deepinversion", 24)
    assert read_config(folder / "config.toml").bank.pixels
    assert list(draw_probes(folder, student, 5)) == ["noise"]


def test_disagreements_are_counted_with_each_networks_normalisation() -> None:
    class Red(nn.Module):
        """Class 1 for images whose first channel is above a half, in its own normalisation."""

        def __init__(self, channel: int) -> None:
            super().__init__()
            self.channel = channel

        def forward(self, x: Tensor) -> Tensor:
            value = x[:, self.channel].mean(dim=(1, 2))
            return torch.stack([-value, value], dim=1)

    first = Classifier(Red(0), input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3)
    same = Classifier(Red(0), input_size=SIZE, mean=[0.5, 0.1, 0.2], std=[0.5, 0.2, 0.2])
    other = Classifier(Red(1), input_size=SIZE, mean=[0.4] * 3, std=[0.2] * 3)
    pixels = torch.rand(150, *SIZE, generator=torch.Generator().manual_seed(0))
    probes = {"noise": first.normalise(pixels)}
    assert disagreements(first, same, probes)["noise"]["per_100"] == 0
    differ = ((pixels[:, 0].mean(dim=(1, 2)) > 0.5) != (pixels[:, 1].mean(dim=(1, 2)) > 0.4)).sum()
    low, high = wilson(int(differ), 150)
    expected = {"per_100": 100 * int(differ) / 150, "low": 100 * low, "high": 100 * high, "images": 150}
    ours, theirs = (pixels[:, i].mean(dim=(1, 2)) > line for i, line in ((0, 0.5), (1, 0.4)))
    favourite = int(ours.sum() > 75)  # the class of most images
    expected |= {"favourite": favourite, "favourite_per_100": 100 * int((ours == favourite).sum()) / 150}
    expected |= {"theirs_per_100": 100 * int((theirs == favourite).sum()) / 150}
    assert disagreements(first, other, probes)["noise"] == pytest.approx(expected)
    assert 10 < expected["per_100"] < 90


def test_what_a_run_is_found_to_be(made: tuple[Path, Classifier], teacher: Classifier, tmp_path: Path) -> None:
    folder, student = made
    torch.manual_seed(5)
    other = student.like(student_for(teacher)).eval()
    found = inspect_run(folder, student, teacher, {"other": other})
    assert read_inspected(folder) == sealed(found)
    assert list(found["students"]) == ["other"]
    probes = draw_probes(folder, student, 100)
    with torch.no_grad():
        x = probes["earlier"]
        count = (student(x).argmax(1) != teacher(renormalised(x, student, teacher)).argmax(1)).sum()
    assert found["teacher"]["earlier"]["per_100"] == int(count)
    assert all(each["images"] == 100 for each in found["teacher"].values())
    random = untrained(student)
    with torch.no_grad():
        count = (random(x).argmax(1) != teacher(renormalised(x, student, teacher)).argmax(1)).sum()
    assert found["untrained"]["earlier"]["per_100"] == int(count)
    itself = inspect_run(folder, student, others={"copy": student})
    assert {kind: each["per_100"] for kind, each in itself["students"]["copy"].items()} == dict.fromkeys(KINDS, 0)
    kept = found | {"students": found["students"] | itself["students"]}
    assert read_inspected(folder) == sealed(kept)  # what was found before stays


@pytest.mark.parametrize(
    "change",
    [
        {"students": None},
        {"teacher": {"noise": {"per_100": 1}}},
        {"teacher": {"noise": {"per_100": 200.0, "low": 0.0, "high": 300.0, "images": 1}}},
        {"teacher": {"odd": {"per_100": 1.0, "low": 0.0, "high": 3.0, "images": 1}}},
        {"teacher": []},
    ],
)
def test_a_changed_file_is_not_believed(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = made_up(tmp_path, 0, 0.5, pseudo=1)
    path = folder / FILE
    found = json.loads(path.read_text())
    path.write_text(json.dumps(sealed(found) | change))
    assert "is not as it was written" in refused(lambda: read_inspected(folder))
    path.write_text(json.dumps(found | change))  # the checksum taken out
    assert "is damaged" in refused(lambda: read_inspected(folder))


def test_another_teacher_is_refused(made: tuple[Path, Classifier], teacher: Classifier) -> None:
    folder, student = made
    assert "expected the teacher of" in refused(lambda: inspect_run(folder, student, make_teacher(size=SIZE, seed=1)))


def test_large_networks_are_asked_less(monkeypatch: pytest.MonkeyPatch, teacher: Classifier) -> None:
    assert probe_count(teacher) == 100
    flops = forward_flops(teacher.module, SIZE)
    monkeypatch.setattr(without_data, "FLOPS", 4 * 2 * flops * 300)
    assert probe_count(teacher, teacher) == 300
    monkeypatch.setattr(without_data, "FLOPS", 10**12)
    assert probe_count(teacher) == 1000


def test_a_network_that_cannot_be_initialised_anew_has_no_untrained_one(
    made: tuple[Path, Classifier], teacher: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: Classifier) -> Classifier:
        raise zskt.ZsktError("it has tensors of its own")

    monkeypatch.setattr(without_data, "untrained", refuse)
    assert "untrained" not in inspect_run(*made, teacher)


def numbers(per_100: float, most: float = 20, theirs: float = 20) -> dict[str, float]:
    low, high = (100 * value for value in wilson(round(per_100), 100))
    favourite = {"favourite": 3, "favourite_per_100": most, "theirs_per_100": theirs}
    return {"per_100": per_100, "low": low, "high": high, "images": 100} | favourite


@pytest.mark.parametrize(
    ("student", "random", "expected"),
    [
        ({"pseudo": numbers(20), "noise": numbers(40)}, {"pseudo": numbers(90), "noise": numbers(90)}, []),
        ({"pseudo": numbers(55), "noise": numbers(40)}, {}, []),  # it may be less than half
        ({"pseudo": numbers(70), "noise": numbers(40)}, {}, ["contradicts its teacher: on 70 of 100 fresh"]),
        (
            {"earlier": numbers(70), "noise": numbers(40)},
            {},
            ["contradicts its teacher: on 70 of 100 images of the gen"],
        ),
        ({"noise": numbers(88)}, {}, []),  # far from all images that there have been
        ({"noise": numbers(88)}, {"noise": numbers(90)}, ["as good as untrained: "]),
        ({"pseudo": numbers(20), "noise": numbers(88)}, {"pseudo": numbers(90), "noise": numbers(90)}, []),
        ({"pseudo": numbers(45, 60, 20)}, {}, ["one class for most: the student names class 3 on 60 of 100 fresh"]),
        ({"noise": numbers(45, 95, 80)}, {}, []),  # so does its teacher
        ({}, {}, []),
    ],
)
def test_what_is_a_reason_not_to_use_a_student(
    student: dict[str, Any], random: dict[str, Any], expected: list[str]
) -> None:
    found = doubts({"teacher": student, "untrained": random, "students": {}})
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_doubts_are_warnings_of_the_command_and_of_the_report(tmp_path: Path, teacher: Classifier) -> None:
    """A student that learns nothing, of two steps."""
    zskt.save_teacher(tmp_path / "teacher", teacher)
    command = ["distill", tmp_path / "teacher", "--student", "wrn-10-1", "--recipe", "zskt-prior", "--steps", 2]
    command += ["--batch-size", 8, "--generator.width", 8, "--student.learning-rate", 1e-9, "--out", tmp_path / "run"]
    status, out, err = call(*command)
    assert status == 0
    found = read_inspected(tmp_path / "run")
    assert found is not None
    lines = doubts(found)
    assert lines
    assert json.loads(out)["warnings"][-len(lines) :] == lines
    assert all(f"warning: {line}\n" in err for line in lines)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'<p class="warning">{html.escape(line)}</p>' in page for line in lines)
    assert "no warnings" not in page
    assert all(
        f"warning: {line}\n" in call("inspect", tmp_path / "run", "--teacher", tmp_path / "teacher")[2]
        for line in lines
    )


RESULT = {
    "teacher": {
        "pseudo": {"per_100": 7.5, "low": 4.6, "high": 12.0},
        "noise": {"per_100": 40.0, "low": 33.4, "high": 46.9},
    },
    "students": {"runs/b": {"noise": {"per_100": 0.0, "low": 0.0, "high": 1.9}}},
}


def test_it_is_told_in_sentences_none_of_which_reads_like_an_accuracy() -> None:
    lines = told(RESULT)
    seen = "of 100 fresh pseudo images that it was not trained on"
    assert lines[0].startswith(f"{seen}, the student and its teacher disagree on 7.5 (4.6 to 12.0)")
    assert lines[2].endswith("the student and that of runs/b disagree on 0.0 (0.0 to 1.9)")
    assert "no number here is an accuracy" in lines[-1]
    assert not any("%" in line for line in lines)


def test_what_has_been_measured_is_told_as_the_result_says() -> None:
    newest = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*-tracking.json"))[-1]
    result, told_by = json.loads(newest.read_text()), json.loads(without_data.TRACKING.read_text())
    assert told_by == {name: result[name] for name in ("runs", "rank_correlations", "on")}
    worth = result["rank_correlations"]["noise"]
    ending = f"; over {result['runs']} runs on {result['on']} few of these went with a high accuracy, rank correlation"
    assert told(RESULT)[1].endswith(f"{ending} {worth:.2f}")


def test_how_well_it_tracks_accuracy_is_told_once_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = {"runs": 12, "on": "digits", "rank_correlations": {"pseudo": 0.834, "noise": -0.1, "mixed": None}}
    monkeypatch.setattr(without_data, "TRACKING", tmp_path / "tracking.json")
    assert not any("correlation" in line for line in told(RESULT))  # nothing has been measured yet
    (tmp_path / "tracking.json").write_text(json.dumps(measured))
    lines = told(RESULT)
    assert lines[0].endswith("; over 12 runs on digits few of these went with a high accuracy, rank correlation 0.83")
    assert lines[1].endswith("rank correlation -0.10")
    assert not any("correlation" in line for line in lines[2:])  # measured of disagreements with the teacher alone


def test_an_interval_contains_what_was_found_to_the_last_bit() -> None:
    """A student that never disagrees: a bound of 2e-17 in place of 0 was taken for a damaged file."""
    for total in (*range(1, 200), 1_000):
        assert wilson(0, total)[0] == 0
        assert wilson(total, total)[1] == 1
        for count in range(total + 1):
            low, high = wilson(count, total)
            assert low <= count / total <= high


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 2, 3, 4], [10, 20, 25, 99]),
        ([1, 2, 3, 4], [4, 3, 2, 1]),
        ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]),
        ([0.5, 0.5, 0.5, 0.1], [1, 2, 2, 0]),
    ],
)
def test_rank_correlation_is_scipys(first: list[float], second: list[float]) -> None:
    assert spearman(first, second) == pytest.approx(float(spearmanr(first, second).statistic))


def interval(per_100: float) -> dict[str, float]:
    return {"per_100": per_100, "low": 0.0, "high": 100.0, "images": 100}


def made_up(root: Path, number: int, accuracy: float | None, teacher: str = "abc", **per_100: float) -> Path:
    """A run folder with what the correlation reads."""
    folder = root / str(number)
    folder.mkdir()
    measured = {} if accuracy is None else {"accuracy": accuracy}
    (folder / "student.json").write_text(json.dumps({"measured": measured, "teacher_fingerprint": teacher}))
    kinds = {kind: interval(value) for kind, value in per_100.items()}
    (folder / FILE).write_text(json.dumps({"teacher": kinds, "students": {}}))
    return folder


def test_correlations_over_runs(tmp_path: Path) -> None:
    accuracies = [0.9, 0.8, 0.5, 0.7]
    pseudo, noise = [1.0, 2.0, 9.0, 5.0], [60.0, 70.0, 90.0, 50.0]
    folders = [
        made_up(tmp_path, i, a, pseudo=p, noise=n)
        for i, (a, p, n) in enumerate(zip(accuracies, pseudo, noise, strict=True))
    ]
    edit(
        folders[0] / FILE,
        teacher={"pseudo": interval(1.0), "noise": interval(60.0), "mixed": interval(1.0)},
    )
    found = rank_correlations(folders)
    assert found["runs"] == 4
    expected = -spearmanr(noise, accuracies).statistic
    assert found["rank_correlations"] == pytest.approx({"pseudo": 1, "noise": float(expected)})  # mixed: not in all


def test_runs_that_cannot_be_correlated(tmp_path: Path) -> None:
    folders = [made_up(tmp_path, i, 0.5 + i / 10, pseudo=i) for i in range(3)]
    assert "at least three runs to correlate, found 2" in refused(lambda: rank_correlations(folders[:2]))
    blind = made_up(tmp_path, 3, None, pseudo=1)
    assert f"no accuracy in {blind}" in refused(lambda: rank_correlations([*folders, blind]))
    other = made_up(tmp_path, 4, 0.5, "another", pseudo=1)
    assert "one teacher, found 2" in refused(lambda: rank_correlations([*folders, other]))
    assert spearman([1, 1, 1], [1, 2, 3]) is None


# zskt inspect RUN, zskt distill, the report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the command, and their teacher."""
    root = tmp_path_factory.mktemp("commands")
    zskt.save_teacher(root / "teacher", make_teacher(size=(3, 16, 16)), how="random weights")
    words = ["--batch-size", 8, "--set", "generator.width=8", "generator.latent=12", "student.updates=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(without_data, "FLOPS", 0)
        for seed, name in enumerate("ab"):
            command = ["distill", root / "teacher", "--student", "wrn-10-1", "--out", root / name, "--recipe", "zskt"]
            found = run(*command, "--steps", 3, "--seed", seed, *words)
            assert found["disagreements"] == json.loads((root / name / FILE).read_text())["teacher"]
    return root


def test_inspect_counts_disagreements(runs: Path, tmp_path: Path) -> None:
    first, second = (shutil.copytree(runs / name, tmp_path / name) for name in "ab")
    status, out, err = call("inspect", first, "--teacher", runs / "teacher", "--other", second)
    assert status == 0, err
    found = json.loads(out)["disagreements"]
    assert list(found["teacher"]) == list(KINDS)
    assert list(found["students"]) == [str(second)]
    assert all(line in err for line in told(found))
    page = tmp_path / "page.html"
    (second / FILE).unlink()
    run("report", first, second, "--out", page)
    text = page.read_text()
    assert "How good is the student, without data?" in text
    assert all(line in text for line in told(found))
    assert text.count("not inspected: zskt inspect RUN --teacher TEACHER does it") == 1


def test_inspect_of_what_has_no_student(runs: Path, tmp_path: Path) -> None:
    words = ["--teacher", runs / "teacher"]
    assert "are for a finished run" in fails(2, "inspect", runs / "teacher", *words)
    assert "are for a finished run" in fails(2, "inspect", runs / "teacher", "--other", runs / "a")
    assert "expected the teacher of" in fails(1, "inspect", runs / "a", "--teacher", runs / "b")
    damaged = shutil.copytree(runs / "a", tmp_path / "a")
    (damaged / "generator.safetensors").unlink()
    assert "generator.safetensors" in fails(1, "inspect", damaged, *words)
