"""zskt belief and zskt reproduce: one JSON line, whole files or none, one line per error, exact continuation."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import zskt
from small import call, coloured, fails, run, write_images
from zskt.cli import paper as cli_paper
from zskt.data.images import read
from zskt.errors import ZsktError
from zskt.files import write_tensors
from zskt.networks import models
from zskt.paper import jobs
from zskt.paper.baselines import teach
from zskt.paper.jobs import time_jobs
from zskt.paper.training import Training

pytestmark = pytest.mark.usefixtures("tiny_recipes", "quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are measured at once, not for 20 seconds."""
    monkeypatch.setattr(cli_paper, "time_jobs", lambda wanted, folder, seconds: time_jobs(wanted, folder, 0.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Grey images of three classes, 20 of each to train on and 10 to measure on."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSKT_CACHE", str(folder / "cache"))
        yield write_images(folder / "images", train=coloured(60), test=coloured(30, seed=1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a student and of its teacher, who agree wherever the teacher does not see class 2."""
    root, train, test = tmp_path_factory.mktemp("pair"), coloured(60), coloured(30, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.convnet(4, num_classes=3, channels=1)
    settings = Training(12, random_crop=0)
    teach(module, (train.images, train.labels), (test.images, test.labels), settings, mean=[0.4], std=[0.3])
    save(root / "teacher", module)
    with torch.no_grad():
        module.get_parameter("fc.bias")[2] -= 100
    save(root / "student", module)
    return str(root / "student"), str(root / "teacher")


def save(folder: Path, module: torch.nn.Module, size: tuple[int, int, int] = (1, 12, 12)) -> str:
    network = zskt.Classifier(module, input_size=size, mean=[0.4] * size[0], std=[0.3] * size[0])
    zskt.save_teacher(folder, network, how="random weights")
    return str(folder)


def files(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# zskt belief


@pytest.mark.parametrize("options", [{}, {"stepped": "second", "start": "label", "step-size": 0.3, "seed": 3}])
def test_belief_is_fidelity(options: dict[str, Any], pair: tuple[str, str], data: Path, tmp_path: Path) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    out = tmp_path / "belief"
    found = run("belief", *pair, "--data", data, "--images", 9, "--steps", 7, *words, "--out", out)
    student, teacher = (zskt.load_teacher(folder) for folder in pair)
    named = {name.replace("-", "_"): value for name, value in options.items()}
    test = read([str(data)], "test")
    expected = zskt.fidelity(student, teacher, test.images, test.labels, zskt.Paths(images=9, steps=7, **named))
    assert {"mean_transition_error", "agreement", "kl_teacher_student", "accuracy", "intervals"} <= found.keys()
    assert found == expected.measured | {"out": str(out)}
    assert 0 < found["mean_transition_error"] < 1
    assert files(out) == {"belief.json", "belief.tex", "belief.pdf", "belief.png", "single-transitions.png"}
    facts = json.loads((out / "belief.json").read_text())
    assert facts["networks"] == ["student", "teacher"]
    assert {name: facts[name] for name in expected.measured} == expected.measured
    assert facts["curves"]["first"] == pytest.approx(expected.transitions.first.mean(dim=0).tolist())
    for name in ("belief", "single-transitions"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 150
    assert f" {found['agreement']:.3f} &" in (out / "belief.tex").read_text()


def test_belief_of_controls(pair: tuple[str, str], data: Path) -> None:
    student, teacher = pair
    words = ["--images", 9, "--steps", 2, "--control", "random", teacher, "random", teacher]
    status, out, err = call("belief", student, teacher, "--data", data, *words)
    assert status == 0, err
    found = json.loads(out)
    controls = found["controls"]
    assert list(controls) == ["random", "teacher", "random 3", "teacher 4"]
    assert controls["teacher"]["agreement"] == controls["teacher 4"]["agreement"] == 1
    assert controls["random"] != controls["random 3"]  # other weights
    assert found["p_values"]["mean_transition_error"] == 1  # the teacher itself is closer
    assert found["p_values"]["agreement"] > 0.3  # in half of the draws
    assert "controls" in err


def test_belief_of_a_control_for_another_task(pair: tuple[str, str], data: Path, tmp_path: Path) -> None:
    four = save(tmp_path / "four", models.convnet(4, num_classes=4, channels=1))
    words = ["--data", data, "--images", 3, "--steps", 2, "--control", four, "--out", tmp_path / "out"]
    assert "equal class count, found 4 and 3" in fails(1, "belief", *pair, *words)
    assert not (tmp_path / "out").exists()


def test_belief_of_a_poor_student_says_what_its_error_is_worth(
    data: Path, pair: tuple[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    poor = save(tmp_path / "poor", models.convnet(4, num_classes=3, channels=1))
    status, out, err = call("belief", poor, pair[1], "--data", data, "--images", 3, "--steps", 2)
    assert status == 0, err
    (line,) = json.loads(out)["warnings"]
    assert f"warning: {line}" in err
    assert "withheld" in err


def test_belief_writes_nothing_unless_asked(
    pair: tuple[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("belief", pair[1], pair[1], "--data", data, "--images", 3, "--steps", 2)
    assert found["mean_transition_error"] == 0
    assert found["agreement"] == 1
    assert "out" not in found
    assert files(tmp_path) == set()


def test_belief_of_what_does_not_belong_together(pair: tuple[str, str], data: Path, tmp_path: Path) -> None:
    student, teacher = pair
    out = tmp_path / "out"
    command = ["--data", data, "--out", out]
    four = save(tmp_path / "four", models.convnet(4, num_classes=4, channels=1))
    large = save(tmp_path / "large", models.convnet(4, num_classes=3, channels=1), (1, 16, 16))
    assert "equal class count, found 3 and 4" in fails(1, "belief", student, four, *command)
    assert "found 1 x 16 x 16 and 1 x 12 x 12" in fails(1, "belief", large, teacher, *command)
    assert "data of 4 classes, found 3" in fails(1, "belief", four, four, *command)
    line = fails(1, "belief", student, teacher, *command)
    assert "expected 1,000 images on which both networks agree, found 20 of 30; ask for fewer" in line
    assert "expected a network at" in fails(1, "belief", student, tmp_path / "nowhere", *command)
    assert not out.exists()


def test_belief_of_a_network_of_nan(pair: tuple[str, str], data: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "broken", models.convnet(4, num_classes=3, channels=1))
    tensors = zskt.load_teacher(path).module.state_dict()
    write_tensors(tmp_path / "broken" / "teacher.safetensors", tensors | {"fc.bias": torch.full((3,), torch.nan)})
    line = fails(1, "belief", path, pair[1], "--data", data, "--images", 3, "--out", tmp_path / "out")
    assert "NaN" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("images", 0), ("steps", 0), ("steps", -3), ("step-size", 0.0), ("step-size", "nan"), ("batch-size", 0)],
)
def test_belief_takes_positive_numbers(option: str, value: object, pair: tuple[str, str], data: Path) -> None:
    line = fails(2, "belief", *pair, "--data", data, f"--{option}", value)
    assert f"{option.replace('-', '_')} = {value}: expected a positive number" in line


def test_belief_leaves_whole_files_or_none(
    pair: tuple[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["belief", *pair, "--data", data, "--images", 3, "--steps", 2, "--out"]
    (tmp_path / "a" / "single-transitions.png").mkdir(parents=True)
    assert "cannot write" in fails(1, *command, tmp_path / "a")
    assert files(tmp_path / "a") <= {"belief.png", "belief.pdf"}
    (tmp_path / "file").touch()
    assert "part of the path is a file" in fails(1, *command, tmp_path / "file" / "b")

    def refuse(*arguments: object, **more: object) -> bytes:
        raise ZsktError("cannot draw")

    monkeypatch.setattr(cli_paper, "single_transitions", refuse)
    assert "cannot draw" in fails(1, *command, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# zskt reproduce

SMALL: list[object] = [
    "--model", "convnet-4", "--student", "convnet-2", "--seeds", 0, "--updates", 8, "--steps", 2, "--images", 2,
]  # fmt: skip


def test_reproduce_makes_a_table(data: Path, tmp_path: Path) -> None:
    command = ["reproduce", "figure-4", "--data", data, *SMALL, "--images-per-class", 3, "--out", tmp_path / "out"]
    found = run(*command)
    assert found["finished"]
    assert "scale" not in found
    assert "failed" not in found
    assert (found["name"], found["data"], found["seeds"]) == ("figure-4", "images", [0])
    assert found["out"] == str(tmp_path / "out")
    rows = ["zero-shot, zskt", "KD+AT, all images", "KD+AT, 3 per class"]
    columns = ["mean transition error", "accuracy, %", "agreement with the teacher, %"]
    assert [(cell["row"], cell["column"]) for cell in found["cells"]] == list(itertools.product(rows, columns))
    assert all(len(cell["values"]) == 1 for cell in found["cells"])
    for key in ("date", "command", "versions", "hardware", "threads", "seconds", "precision"):
        assert found[key] is not None
    out = tmp_path / "out"
    kinds = ("csv", "json", "md", "png", "tex")
    assert sorted(path.name for path in out.iterdir()) == [*(f"figure-4.{kind}" for kind in kinds), "parts"]
    kept = json.loads((out / "figure-4.json").read_text())
    assert kept == {key: value for key, value in found.items() if key != "out"} | {"parts": kept["parts"]}
    assert kept["parts"]["convnet-4-on-all-seed-0"] == {"units": 8, "unit": "updates"}

    assert "already holds jobs of a table; give --resume" in fails(1, *command)
    again = run(*command, "--resume")  # nothing is left to do
    assert again["cells"] == found["cells"]
    shared = run("reproduce", "table-2", *command[2:], "--resume")
    assert shared["cells"] == found["cells"]
    changed = fails(1, *command[:-2], "--learning-rate", 0.2, "--out", out, "--resume")
    assert "learning_rate = 0.1, now 0.2); give the same ones or choose another --out" in changed


@pytest.mark.parametrize("scale", ["0.5", "0.001"])
def test_reproduce_stamps_a_rehearsal(scale: str, data: Path, tmp_path: Path) -> None:
    command = ["reproduce", "figure-5", "--data", data, *SMALL, "--scale", scale, "--out", tmp_path / "out"]
    found = run(*command)
    assert found["scale"] == float(scale)
    assert found["title"].endswith(f" (scale {scale})")
    assert f"(scale {scale})" in (tmp_path / "out" / "figure-5.md").read_text().splitlines()[0]
    jobs = json.loads((tmp_path / "out" / "figure-5.json").read_text())["parts"]
    assert {job["units"] for job in jobs.values()} == {4 if scale == "0.5" else 1}


class SteppingClock:
    """One second passes whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_reproduce_stops_and_resumes_to_the_same_numbers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["reproduce", "figure-2", "--data", data, *SMALL, "--images-per-class", 3]
    command += ["--recipe", "zskt", "zskt-fresh"]
    whole = run(*command, "--out", tmp_path / "whole")
    clock, stopped = SteppingClock(), 0
    for module in (jobs, cli_paper):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter))
    found: dict[str, Any] = {"finished": False}
    for turn in range(9):
        if found["finished"]:
            break
        resume = ["--resume"] if turn else []
        # Five jobs get seconds, in which they are finished; the next one has a millisecond, enough for one update.
        found = run(*command, "--out", tmp_path / "parts", "--stop-after", "7.001s", *resume)
        begun = (path.parent for path in (tmp_path / "parts" / "parts").glob("*/checkpoint"))
        stopped += any(not list(job.glob("*.json")) for job in begun)
        page = (tmp_path / "parts" / "figure-2.md").read_text()
        assert found["finished"] == ("not run" not in page)
    assert found["finished"]
    assert stopped >= 1
    assert 2 <= turn <= 4
    assert found["cells"] == whole["cells"]
    weights = {path for path in files(tmp_path / "whole") if path.endswith(".safetensors") and "checkpoint" not in path}
    assert len(weights) > 10
    for path in weights:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "parts" / path).read_bytes()


def test_reproduce_asks_before_it_starts_long_work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["reproduce", "figure-3", "--data", data, *SMALL, "--out", tmp_path / "out"]
    monkeypatch.setattr(cli_paper, "time_jobs", lambda wanted, folder, seconds: {job.pace: 3600.0 for job in wanted})
    line = fails(2, *command)  # 8 updates and 2 steps, an hour each
    assert "figure-3 takes about 10.0 h on this machine; give --yes to start, --stop-after" in line
    assert line.endswith("or --scale 0.01 to rehearse")
    assert fails(2, *command, "--scale", "0.5").endswith("or --scale 0.005 to rehearse")
    assert not (tmp_path / "out").exists()
    assert "takes about 11 min" in fails(2, *command, "--stop-after", "11m")
    assert run(*command, "--stop-after", "9m")["finished"]  # ten minutes it is at most
    assert run(*command[:-2], "--out", tmp_path / "other", "--yes")["finished"]


def test_reproduce_says_what_it_will_do_and_takes_a_given_teacher(
    pair: tuple[str, str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["reproduce", "table-1", "--data", data, "--teacher", pair[1], *SMALL[2:4], *SMALL[6:10]]
    command += ["--seeds", 0, 1]
    before = {path: (Path(pair[1]) / path).read_bytes() for path in files(Path(pair[1]))}
    status, stdout, stderr = call(*command, "--images-per-class", 2, 3, "--out", out)
    assert status == 0
    found = json.loads(stdout)
    assert "KD+AT, given-to-convnet-2" in stderr
    assert "16 updates" in stderr  # two students from scratch
    assert "32 updates" in stderr  # two and two with KD+AT
    assert "4 pseudo batches" in stderr
    assert [(cell["column"], len(cell["values"])) for cell in found["cells"]] == [
        ("teacher", 1),
        ("student from scratch", 2),
        ("KD+AT, 2 per class", 2),
        ("KD+AT, 3 per class", 2),
        ("zero-shot, zskt", 2),
    ]
    assert {path: (Path(pair[1]) / path).read_bytes() for path in files(Path(pair[1]))} == before
    given = zskt.load_teacher(out / "parts" / "given-teacher")
    assert given.fingerprint() == zskt.load_teacher(pair[1]).fingerprint()
    measured = run("evaluate", pair[1], "--data", data)
    assert found["cells"][0]["values"] == [measured["accuracy"]]


def test_reproduce_goes_on_after_a_failure_and_says_so(data: Path, tmp_path: Path) -> None:
    command = ["reproduce", "table-1", "--data", data, *SMALL, "--images-per-class", 21, "--out", tmp_path / "out"]
    line = fails(1, *command)
    job = "kd-at-convnet-4-to-convnet-2-on-21-per-class-seed-0"
    assert f"1 of 4 jobs failed, {job} first: expected 21 images of each class, found 20" in line
    page = (tmp_path / "out" / "table-1.md").read_text()
    assert "| failed |" in page
    assert f"Failed: {job}: expected 21 images" in page
    assert "not run" not in page  # all others were made
    result = json.loads((tmp_path / "out" / "table-1.json").read_text())
    assert not result["finished"]
    assert list(result["failed"]) == [job]
    assert [len(cell["values"]) for cell in result["cells"]] == [1, 1, 0, 1]


def test_reproduce_of_what_diverges_at_once(data: Path, tmp_path: Path) -> None:
    command = ["reproduce", "figure-3", "--data", data, *SMALL, "--out", tmp_path / "out"]
    line = fails(1, *command, "--learning-rate", "1e30")
    assert "2 of 2 jobs failed, convnet-4-on-all-seed-0 first: " in line
    assert "failed" in (tmp_path / "out" / "figure-3.md").read_text()
    assert run(*command, "--learning-rate", "0.1", "--resume")["finished"]  # nothing of it was left


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("unknown table or figure 'tabel-1': did you mean table-1", ["tabel-1"]),
        ("--scale 0.0: expected a number above 0, up to 1", ["table-1", "--scale", 0]),
        ("--scale 2.0: expected a number above 0, up to 1", ["table-1", "--scale", 2]),
        ("--scale nan: expected a number above 0, up to 1", ["table-1", "--scale", "nan"]),
        ("--scale 2.0: expected a number above 0, up to 1", ["toy", "--scale", 2]),
        ("--steps 0: expected a positive number", ["table-1", "--steps", 0]),
        ("--updates -1: expected a positive number", ["table-1", "--updates", -1]),
        ("--images 0: expected a positive number", ["table-2", "--images", 0]),
        ("--learning-rate nan: expected a positive number", ["table-1", "--learning-rate", "nan"]),
        ("--images-per-class 0: expected a positive number", ["table-1", "--images-per-class", 3, 0]),
        ("expected at least one, without repetition", ["table-1", "--seeds", 1, 1]),
        ("expected 0 or more", ["table-1", "--seeds", -1]),
        ("unknown recipe 'zskd': did you mean zskt", ["table-1", "--recipe", "zskd"]),
        ("did you mean wrn-16-1", ["table-1", "--model", "wnr-16-1"]),
        ("did you mean wrn-16-1", ["table-1", "--student", "wnr-16-1"]),
        ("'soon': expected a time", ["table-1", "--stop-after", "soon"]),
        ("--stop-after 5: expected a time", ["table-1", "--stop-after", 5]),
        ("usable CUDA devices", ["table-1", "--device", "cuda:99"]),
    ],
)
def test_reproduce_refuses(message: str, words: list[object], data: Path, tmp_path: Path) -> None:
    kept = list(SMALL)
    for word in words:
        if word in kept:  # an option that is given once, as here
            place = kept.index(word)
            del kept[place : place + 2]
    line = fails(2, "reproduce", *words, "--data", data, *kept, "--out", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_reproduce_refuses_data_that_do_not_fit(pair: tuple[str, str], data: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert "table-1 needs --data" in fails(2, "reproduce", "table-1", *out)
    assert "folder with teacher.json" in fails(1, "reproduce", "table-1", "--data", data, "--teacher", tmp_path, *out)
    four = save(tmp_path / "four", models.convnet(4, num_classes=4, channels=1))
    for name in ("table-1", "figure-5"):
        line = fails(
            1, "reproduce", name, "--data", data, "--teacher", four, "--student", "convnet-2", *SMALL[4:], *out
        )
        assert "4 classes, found 3" in line
    line = fails(2, "reproduce", "table-1", "--data", data, "--teacher", pair[1], *SMALL, *out)
    assert "--model" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the toy experiment was asked for; it is in a test of its own."""
    asked: list[dict[str, Any]] = []

    def experiment(seeds: tuple[int, ...], out: Path, *, scale: float, progress: object) -> dict[str, Any]:
        asked.append({"seeds": seeds, "out": out, "scale": scale})
        numbers = {"agreement": 0.5, "teacher_accuracy": 0.75, "seconds": 1.5}
        return numbers | {"seeds": list(seeds), "per_seed": [numbers | {"seed": seed} for seed in seeds]}

    monkeypatch.setattr(cli_paper, "reproduce_toy", experiment)
    monkeypatch.setattr(cli_paper, "seconds_per_round", lambda: 0.1)
    return asked


def test_reproduce_the_toy(tmp_path: Path, toys: list[dict[str, Any]]) -> None:
    out = tmp_path / "toy"
    found = run("reproduce", "toy", "--seeds", 3, 4, "--scale", 0.25, "--out", out)
    assert toys == [{"seeds": (3, 4), "out": out, "scale": 0.25}]
    assert (found["agreement"], found["seeds"], found["out"]) == (0.5, [3, 4], str(out))
    assert json.loads((out / "toy.json").read_text()) == {key: value for key, value in found.items() if key != "out"}
    assert "| 4 | 0.500 | 0.750 |" in (out / "toy.md").read_text()
    assert "already holds the toy experiment" in fails(1, "reproduce", "toy", "--out", out, "--yes")
    assert len(toys) == 1


def test_the_toy_takes_few_options_and_ten_minutes_at_most(
    tmp_path: Path, toys: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["reproduce", "toy", "--out", tmp_path / "toy"]
    for words in (["--data", "digits"], ["--steps", 3], ["--resume"], ["--model", "wrn-16-1"], ["--stop-after", "9m"]):
        assert "toy takes --seeds" in fails(2, *command, *words)
    monkeypatch.setattr(cli_paper, "seconds_per_round", lambda: 0.4)  # 2,000 rounds, three seeds: 40 minutes
    assert "toy takes about 40 min" in fails(2, *command)
    assert toys == []
    assert not (tmp_path / "toy").exists()
    run(*command, "--yes")
    assert len(toys) == 1
