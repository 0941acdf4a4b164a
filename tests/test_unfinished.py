"""What a stopped run is good for: its student, as the newest checkpoint has it, and said to be unfinished."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zskt
from small import call, fails, make_teacher, refused, run, write_images
from small import coloured as images_of
from zskt.files import read_tensors, write_tensors
from zskt.networks import models
from zskt.networks.folder import save_teacher
from zskt.run.unfinished import is_unfinished, load_unfinished

SIZE = (1, 8, 8)
TINY: list[Any] = ["--batch-size", 4, "--generator.width", 4, "--generator.latent", 4, "--student.updates", 2]
TINY += ["--recipe", "zskt-prior", "--steps", 6]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_teacher(tmp_path / "teacher", make_teacher(models.convnet(2, num_classes=3, channels=1), size=SIZE))
    write_images(tmp_path / "data", test=images_of(6, size=SIZE))
    return tmp_path


def distil(*more: object, student: str = "convnet-1") -> dict[str, Any]:
    return run("distill", "teacher", "--student", student, *TINY, *more)


def says_so(*arguments: object) -> dict[str, Any]:
    """The result of a command, one line of which says what the student is."""
    status, out, err = call(*arguments)
    assert status == 0, err
    (line,) = (line for line in err.splitlines() if "unfinished" in line)
    assert "is at step 4 of 6: unfinished; taking the student of its newest checkpoint" in line
    found: dict[str, Any] = json.loads(out)
    assert (found["finished"], found["step"], found["steps"]) == (False, 4, 6)
    return found


def test_it_is_evaluated_inspected_and_exported(folder: Path) -> None:
    live = zskt.distill(
        zskt.load_teacher("teacher"), models.build("convnet-1", 3, SIZE), "zskt-prior", out="b", stop_after=4,
        settings={"steps": 6, "batch_size": 4, "generator.width": 4, "generator.latent": 4, "student.updates": 2},
    )  # fmt: skip
    assert is_unfinished(Path("b"))
    found = says_so("evaluate", "b", "--data", "data", "--teacher", "teacher")
    assert {"accuracy", "agreement"} <= found.keys()
    (student, _), x = load_unfinished(Path("b")), torch.rand(5, *SIZE)
    now = live.student.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in student.module.state_dict().items())
    assert torch.equal(student.normalise(x), live.network.normalise(x))
    inspected = says_so("inspect", "b")
    assert (inspected["model"], inspected["kind"]) == ("convnet-1", "checkpoint of a run")
    says_so("export", "b", "--out", "hub")
    assert "Warning of the run: step 4 of 6: unfinished" in (folder / "hub" / "README.md").read_text()
    stored = json.loads((folder / "hub" / "config.json").read_text())
    assert (stored["step"], stored["warnings"]) == (4, ["step 4 of 6: unfinished"])
    exported = zskt.load_teacher("hub")
    with torch.no_grad():
        assert torch.equal(exported(x), student(x))


def test_a_finished_run_says_nothing_of_the_kind(folder: Path) -> None:
    distil("--out", "a")
    assert not is_unfinished(Path("a"))
    status, out, err = call("evaluate", "a", "--data", "data")
    assert status == 0
    assert "unfinished" not in err + out
    assert "finished" not in json.loads(out)


def test_a_damaged_checkpoint_gives_the_one_before(folder: Path) -> None:
    distil("--out", "a", "--checkpoint-every", 2, "--stop-after", 4)
    newest = folder / "a" / "checkpoint" / "00000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    assert run("evaluate", "a", "--data", "data")["step"] == 2
    distil("--out", "a", "--resume")  # which has its own way of saying so
    assert (folder / "a" / "student.json").exists()


def test_what_needs_a_finished_run_says_so(folder: Path) -> None:
    distil("--out", "a", "--stop-after", 4)
    assert "found one at step 4 of 6: unfinished" in fails(2, "export", "a", "--out", "x.onnx", "--int8")
    assert "are for a finished run" in fails(2, "inspect", "a", "--teacher", "teacher")
    assert "resume it with --resume" in fails(1, "distill", "a", "--student", "convnet-1", "--out", "b")
    assert "--mean has no effect with a" in fails(2, "evaluate", "a", "--data", "data", "--mean", 0.5, "--std", 0.5)
    assert "if this run has not finished, resume it" in refused(lambda: zskt.load_student("a"))


def test_a_factory_needs_trust_and_an_own_module_a_finished_run(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from torch import nn\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))\n"
    )
    distil("--out", "a", "--stop-after", 4, "--student.loss.attention", 0, student="mine.py:make")
    assert "give --trust" in fails(1, "evaluate", "a", "--data", "data")
    says_so("evaluate", "a", "--data", "data", "--trust")
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    tiny = {"steps": 6, "batch_size": 4, "generator.width": 4, "generator.latent": 4, "student.loss.attention": 0.0}
    zskt.distill(zskt.load_teacher("teacher"), own, "zskt-prior", settings=tiny, out="b", stop_after=4)
    assert "found a Python object; finish the run with --resume" in fails(1, "evaluate", "b", "--data", "data")


def test_a_finished_run_is_not_extended_but_gone_on_from(folder: Path) -> None:
    distil("--out", "a")
    before = read_tensors(folder / "a" / "student.safetensors")[0]
    for more in (["--steps", 9], ["--budget", "1m"]):
        line = fails(1, "distill", "--resume", "--out", "a", *more)
        assert "a has finished its 6 steps" in line
        assert line.endswith("begin a new run from its student, with --student a and another --out")
    distil("--out", "b", student="a")  # what it advises
    assert any(not torch.equal(read_tensors(folder / "b" / "student.safetensors")[0][k], t) for k, t in before.items())
    distil("--out", "c", "--stop-after", 4)
    assert "was started with other settings (steps = 6, now 9)" in fails(
        1, "distill", "--resume", "--out", "c", "--steps", 9
    )


@pytest.mark.parametrize(
    "odd", ["[]", "7", '{"about": {"rebuild": true, "steps": 6}, "step": 4}', '{"about": []}', "{}"]
)
def test_odd_descriptions_with_a_right_checksum_are_refused_in_a_line(odd: str, folder: Path) -> None:
    distil("--out", "a", "--stop-after", 4)
    for path in Path("a", "checkpoint").glob("*.safetensors"):
        write_tensors(path, read_tensors(path)[0], {"metadata": odd})
    assert "a" in fails(1, "evaluate", "a", "--data", "data")
    assert "a" in fails(1, "distill", "teacher", "--student", "convnet-1", *TINY, "--out", "a", "--resume")
