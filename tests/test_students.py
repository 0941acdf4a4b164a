"""Students by every kind of specifier, and how a finished one is rebuilt from its folder."""

import dataclasses
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import SMALL_BANK, FourStages, call, edit, fails, make_teacher, refused
from zskt.errors import UsageError
from zskt.networks import models
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.factories import call_factory, is_factory, parse_arguments
from zskt.networks.students import describe_student, make_student, scaled_config
from zskt.run.distill import distill

TINY = {"steps": 2, "batch_size": 4, "generator.width": 8, "generator.latent": 12, "student.updates": 1}

FACTORY = """
from torch import nn
import helper

def network(width=4, *, classes=10):
    layers = [nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*layers)

class Holder:
    @staticmethod
    def make():
        return network(helper.WIDTH)

def nothing():
    return 3

def broken():
    raise KeyError("lost")

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project: a package and a file of their own, in the current folder."""
    (tmp_path / "mynets.py").write_text(FACTORY)
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    (tmp_path / "wrong.py").write_text("import nothing_that_exists\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mynets", "helper", "zskt_factory_mynets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_specifiers_and_arguments_of_factories() -> None:
    assert all(map(is_factory, ("mynets:network", "a.b.c:f", "nets/my.py:Holder.make", "/x y/z.py:f")))
    assert not any(map(is_factory, ("auto:0.25", "wrn-16-1", "a:", ":f", "a:b c")))
    found = parse_arguments(["width=8", "rate=.5", "kind=basic", "sizes=[1, 2]"], "--student-args")
    assert found == {"width": 8, "rate": 0.5, "kind": "basic", "sizes": [1, 2]}
    for wrong in (["width"], ["8=width"], ["a=1", "a=2"], ["a b=1"]):
        with pytest.raises(zskt.UsageError, match="--student-args"):
            parse_arguments(wrong, "--student-args")


@pytest.mark.parametrize("place", ["mynets", "mynets.py"])
def test_a_factory_is_called_with_its_arguments(place: str, folder: Path) -> None:
    assert make_student(f"{place}:network", make_teacher()).get_parameter("0.weight").shape[0] == 4
    assert make_student(f"{place}:network", make_teacher(), {"width": 5}).get_parameter("0.weight").shape[0] == 5
    assert make_student(f"{place}:Holder.make", make_teacher()).get_parameter("0.weight").shape[0] == 6
    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("spec", "arguments", "words"),
    [
        ("mynets:netwrk", {}, "unknown function in mynets 'netwrk': did you mean network"),
        ("mynets:number", {}, "expected a function or class at mynets:number, found int"),
        ("mynets:nothing", {}, "expected mynets:nothing to return a torch.nn.Module, found int"),
        ("mynets:broken", {}, "mynets:broken failed with KeyError: 'lost'"),
        ("mynets:network", {"depth": 3}, "does not take these arguments (network() got an unexpected keyword argument"),
        ("nonets:network", {}, "cannot import nonets for nonets:network (ModuleNotFoundError: No module named"),
        ("wrong.py:network", {}, "cannot import wrong.py for wrong.py:network (ModuleNotFoundError"),
        ("nonets.py:network", {}, "expected a Python file at nonets.py, found none"),
        ("wrn-16-1", {"depth": 3}, "arguments are for factories, and 'wrn-16-1' is not one"),
        ("auto:0.5", {"depth": 3}, "arguments are for factories"),
        ("auto:half", {}, "auto:half: expected a fraction"),
        ("auto:0", {}, "expected a fraction"),
        ("auto:1", {}, "expected a fraction"),
        ("wrn-17-1", {}, "expected a depth of 6 n + 4"),
    ],
)
def test_invalid_specifiers_are_refused_in_one_line(
    spec: str, arguments: dict[str, Any], words: str, folder: Path
) -> None:
    assert words in refused(lambda: make_student(spec, make_teacher(), arguments))
    assert not any(name.startswith("zskt_factory_wrong") for name in sys.modules)


def test_a_stopped_run_says_so_and_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher()
    monkeypatch.setenv("HOME", str(tmp_path))
    distill(teacher, models.wide_resnet(10, 1), "zskt", settings=TINY, out=tmp_path / "run", stop_after=1)
    line = refused(lambda: make_student("~/run", teacher))
    assert f"expected a finished run, found one that was stopped in {tmp_path / 'run'}; resume it first" in line
    distill(teacher, models.wide_resnet(10, 1), "zskt", settings=TINY, out=tmp_path / "run", resume=True)
    assert getattr(make_student("~/run", teacher), "spec", None) == "wrn-10-1"


def test_relatives_of_what_pruning_leaves_and_of_raw_shortcuts() -> None:
    for spec in ("wrn-10-1.5", "wrn-10-2-raw"):
        teacher = make_teacher(models.build(spec, 10, (3, 16, 16)))
        for kind in ("auto", "pruned"):
            student: Any = make_student(f"{kind}:0.5", teacher)
            assert student.spec.endswith("-raw") == spec.endswith("-raw")
            assert 0.2 < count_parameters(student) / count_parameters(teacher.module) < 0.7


def test_a_run_folder_gives_its_student_to_go_on_from(tmp_path: Path) -> None:
    teacher, student = make_teacher(), make_student("convnet-4", make_teacher())
    first = distill(teacher, student, "zskt", settings=TINY | {"student.loss.attention": 0.0}, out=tmp_path / "a")
    assert first.finished
    trained = make_student(str(tmp_path / "a"), teacher, seed=5)
    assert same(trained, student)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    distill(teacher, trained, "zskt", settings=TINY | {"student.loss.attention": 0.0})
    assert not same(trained, student)
    brighter = Classifier(teacher.module, input_size=teacher.input_size, mean=[0.9] * 3, std=[0.5] * 3)
    assert "expected a student for the pixel mean [0.9, 0.9, 0.9], as the teacher's, found [" in refused(
        lambda: make_student(str(tmp_path / "a"), brighter)
    )
    smaller = make_teacher(size=(3, 8, 8))
    assert "expected a student for images of size (3, 8, 8)" in refused(
        lambda: make_student(str(tmp_path / "a"), smaller)
    )


@pytest.mark.parametrize(
    ("spec", "size", "words"),
    [
        ("lenet-5", (1, 28, 11), "lenet-5: expected images of at least 12 x 12, found 1 x 28 x 11"),
        ("vgg-11-8", (3, 15, 32), "vgg-11-8: expected images of at least 16 x 16, found 3 x 15 x 32"),
        *((f"{name}-0", (3, 32, 32), "width of at least 1") for name in ("wrn-10", "resnet-18", "vgg-11", "convnet")),
    ],
)
def test_networks_of_ours_that_cannot_be_built(spec: str, size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        models.build(spec, 10, size)


def test_only_the_seed_determines_the_weights(folder: Path) -> None:
    teacher = make_teacher()
    for spec in ("wrn-10-1", "auto:0.5", "mynets:network"):
        state = torch.get_rng_state()
        first = make_student(spec, teacher, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert same(first, make_student(spec, teacher, seed=1))
        assert not same(first, make_student(spec, teacher, seed=2))


@pytest.mark.parametrize(
    ("spec", "fraction", "size"),
    [
        ("wrn-16-4", 0.25, (3, 16, 16)),
        ("wrn-40-2", 0.08, (1, 16, 16)),
        ("resnet-34", 0.5, (3, 16, 16)),
        ("resnet-18", 0.1, (3, 16, 16)),
        ("resnet-18-16", 0.25, (4, 16, 16)),
        ("vgg-11", 0.25, (3, 16, 16)),
        ("lenet-5", 0.25, (1, 28, 28)),
        ("convnet-16", 0.25, (1, 8, 8)),
    ],
)
def test_auto_takes_the_nearest_relative(spec: str, fraction: float, size: tuple[int, int, int]) -> None:
    teacher = make_teacher(models.build(spec, 10, size), size=size)
    student = make_student(f"auto:{fraction}", teacher)
    assert type(student) is type(teacher.module)
    share = count_parameters(student) / count_parameters(teacher.module)
    assert abs(math.log(share / fraction)) < math.log(1.25)
    assert student(torch.zeros(2, *size)).shape == (2, 10)
    line = describe_student(student, teacher)
    assert line.startswith(f"{student.spec}: {count_parameters(student):,} parameters, {share:.3f} of the teacher's")


def test_auto_finds_a_pair_of_the_paper() -> None:
    assert make_student("auto:0.25", make_teacher(models.wide_resnet(40, 2))).spec == "wrn-40-1"


MNIST = (1, 28, 28)


@pytest.mark.parametrize(
    ("module", "size", "words"),
    [
        (FourStages(8), (3, 16, 16), "no smaller relatives of FourStages are known; choose a student, such as"),
        (models.wide_resnet(10, 1), (3, 16, 16), "no smaller relatives of WideResNet are known"),
        (models.lenet5(half=True, input_size=MNIST), MNIST, "relatives of LeNet5 are known; choose a student"),
        (models.lenet5(input_size=MNIST), MNIST, "the nearest relative of LeNet5, lenet-5-half, has 15,"),
    ],
)
def test_auto_refuses_with_suggestions_that_fit(module: nn.Module, size: tuple[int, int, int], words: str) -> None:
    teacher = make_teacher(module, size=size)
    message = refused(lambda: make_student("auto:0.05", teacher))
    assert words in message
    suggested = re.findall(r"([a-z0-9-]+) \(([\d,]+)\)", message)
    assert len(suggested) == 3
    for spec, count in suggested:
        student = make_student(spec, teacher)
        assert count_parameters(student) == int(count.replace(",", ""))
        assert student(torch.zeros(2, *size)).shape == (2, 10)


def test_auto_reads_through_a_softmax() -> None:
    class Sure(models.ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(dim=1)

    teacher = make_teacher(Sure(16, channels=1), size=(1, 8, 8))
    with pytest.raises(zskt.ZsktError, match="smaller relatives of Sure"):
        make_student("auto:0.25", teacher)


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common = {"num_channels": 3, "num_labels": 5}
        if kind == "vit":
            sizes = {"hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
            config = transformers.ViTConfig(num_attention_heads=4, num_hidden_layers=2, **sizes, **common)
            return transformers.ViTForImageClassification(config)
        widths = {"hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]}
        if kind == "convnext":
            return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**widths, **common))
        layer = {"embedding_size": 32, "layer_type": "bottleneck" if kind == "bottleneck" else "basic"}
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**widths, **layer, **common))


@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "convnext", "vit"])
def test_auto_scales_a_hugging_face_config(kind: str, tmp_path: Path) -> None:
    teacher = make_teacher(hugging_face(kind), size=(3, 32, 32))
    student = make_student("auto:0.25", teacher)
    assert type(student) is type(teacher.module)
    assert count_parameters(student) / count_parameters(teacher.module) == pytest.approx(0.25, rel=0.4)
    result = distill(teacher, student, settings=TINY | SMALL_BANK, out=tmp_path / "run")
    assert result.finished
    assert result.config.recipe == ("bank" if teacher.has_batchnorm else "bank-adversary")
    facts = json.loads((tmp_path / "run" / "student.json").read_text())
    assert facts["model"] is None
    assert facts["rebuild"]["transformers"] == type(student).__name__
    loaded = zskt.load_student(tmp_path / "run")  # a config is no code: nothing else is needed
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), student(x).logits)


def test_a_config_without_known_widths_is_not_scaled() -> None:
    @dataclasses.dataclass
    class Config:
        depth: int = 3
        _name_or_path: str = "somewhere"

    assert scaled_config(Config(), 0.5) is None


def test_libraries_are_imported_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for timm: it lists the names of the teacher's module and builds by name."""
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails
    timm, file = types.ModuleType("timm"), types.ModuleType("timm.models.nets")
    asked: list[dict[str, Any]] = []

    class Net(nn.Module):
        def __init__(self, width: int, classes: int, channels: int) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(channels, width, 3), nn.Linear(width, classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean(dim=(2, 3)))

    Net.__module__ = file.__name__

    def create_model(model_name: str, *, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
        asked.append({"name": model_name, "pretrained": pretrained})
        return Net(int(model_name.removeprefix("net")), num_classes, in_chans)

    with pytest.raises(zskt.ZsktError, match=r"timm:net8 needs timm.*pip install 'zskt\[vision\]'"):
        make_student("timm:net8", make_teacher())
    timm.create_model = create_model  # type: ignore[attr-defined]
    timm.list_models = lambda module: ["net64", "net16", "net4"] if module == "nets" else []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    teacher = make_teacher(Net(64, 7, 1), size=(1, 8, 8))
    student = make_student("auto:0.25", teacher)
    assert student.get_parameter("conv.weight").shape[0] == 16
    assert make_student("timm:net8", teacher).get_parameter("conv.weight").shape[0] == 8
    assert not any(call["pretrained"] for call in asked)


# Finished students.


def finished(student: nn.Module, out: Path, teacher: Classifier | None = None) -> nn.Module:
    return distill(teacher or make_teacher(), student, "zskt-prior", settings=TINY, out=out).student


def test_a_network_of_ours_is_rebuilt_by_its_spec(tmp_path: Path) -> None:
    student = finished(make_student("resnet-18-4", make_teacher()), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "student.json").read_text())["rebuild"] == {"spec": "resnet-18-4"}
    assert same(zskt.load_student(tmp_path / "run").module, student)


@pytest.mark.parametrize("place", ["mynets", "mynets.py"])
def test_a_factorys_student_is_rebuilt_with_trust(place: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = finished(make_student(f"{place}:network", make_teacher(), {"width": 5}), folder / "run")
    how = json.loads((folder / "run" / "student.json").read_text())["rebuild"]
    spec = "mynets:network" if place == "mynets" else f"{folder / 'mynets.py'}:network"
    assert how == {"factory": spec, "arguments": {"width": 5}}
    says = r"says that .*:network builds this network, and calling it runs that code: .*--trust"
    with pytest.raises(zskt.ZsktError, match=says):
        zskt.load_student(folder / "run")
    capsys.readouterr()
    assert same(zskt.load_student(folder / "run", trust=True).module, student)
    assert capsys.readouterr().err.startswith(f"running {spec}, named in ")
    assert same(zskt.load_student(folder / "run", module=call_factory("mynets:network", {"width": 5})).module, student)


def test_nothing_that_a_folder_names_runs_unasked(tmp_path: Path) -> None:
    finished(make_student("wrn-10-1", make_teacher()), tmp_path / "run")
    (tmp_path / "run" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for how in (
        {"factory": "os:system", "arguments": {"command": f"touch {tmp_path / 'ran'}"}},
        {"factory": f"{tmp_path / 'run' / 'evil.py'}:x", "arguments": {}},
        {"transformers": "AutoModelForImageClassification", "config": {}},
        {"transformers": "pipeline", "config": {}},
        {"python": "os.system"},
        "os:system",
        {},
    ):
        edit(tmp_path / "run" / "student.json", model=None, rebuild=how)
        refused(lambda: zskt.load_student(tmp_path / "run"))
        assert not (tmp_path / "ran").exists()


def test_a_python_object_is_filled_and_the_error_shows_how(tmp_path: Path) -> None:
    student = finished(FourStages(4), tmp_path / "run")
    message = refused(lambda: zskt.load_student(tmp_path / "run"))
    assert "only its own code can rebuild: from small import FourStages; module" in message
    assert f"student = zskt.load_student({str(tmp_path / 'run')!r}, module=module)" in message
    mine = FourStages(4)
    before = mine.fc.weight.clone()
    loaded = zskt.load_student(tmp_path / "run", module=mine)
    assert same(loaded.module, student)
    assert torch.equal(mine.fc.weight, before)
    with pytest.raises(zskt.ZsktError, match="does not fit the FourStages"):
        zskt.load_student(tmp_path / "run", module=FourStages(5))


def test_a_network_of_ours_that_was_altered_is_a_python_object(tmp_path: Path) -> None:
    student: nn.Module = models.wide_resnet(10, 1)
    student.fc = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 10))
    finished(student, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "student.json").read_text())
    assert (facts["model"], facts["rebuild"]) == (None, {"python": "zskt.networks.models.wide_resnet.WideResNet"})


def test_a_foreign_attribute_named_spec_is_ignored(tmp_path: Path) -> None:
    student = FourStages(4)
    vars(student).update(spec={1, 2})
    finished(student, tmp_path / "run", make_teacher(FourStages(8)))
    assert json.loads((tmp_path / "run" / "student.json").read_text())["model"] is None


# On the command line.


def test_the_command_line_prints_the_student_and_stages(folder: Path) -> None:
    zskt.save_teacher(folder / "teacher", make_teacher())
    tiny = ["--set", *(f"{name}={value}" for name, value in TINY.items() if name not in ("steps", "batch_size"))]
    common = ["--steps", "2", "--batch-size", "4", "--recipe", "zskt"]
    status, out, err = call("distill", "teacher", "--student", "auto:0.25", "--out", "a", *common, *tiny)
    assert status == 0
    assert f"student wrn-10-1: {json.loads(out)['student_parameters']:,} parameters, 0.25" in err
    pairs = "block1 = block1 (16 x 16), block2 = block2 (8 x 8), block3 = block3 (4 x 4)"
    assert f"attention transfer compares {pairs}" in err

    made = ["--student", "mynets.py:network", "--student-args", "width=5"]
    status, _, err = call("distill", "teacher", *made, "--out", "b", *common, *tiny, "student.loss.stages=block2=0")
    assert status == 0
    assert "mynets.py:network runs the code of that file" in err
    assert "attention transfer compares block2 = 0 (8 x 8 and 7 x 7)" in err
    assert 'stages = [\n    "block2=0",\n]' in (folder / "b" / "config.toml").read_text()
    for arguments, words in (
        (["--student", "auto:2"], "expected a fraction"),
        (["--student", "wrn-10-1", "--student-args", "width=3"], "arguments are for factories"),
        ([*made, "--set", "student.loss.stages=block2=stem"], "unknown student stage 'stem'"),
    ):
        assert words in fails(2, "distill", "teacher", *arguments, "--out", "c", *common)
    assert not (folder / "c").exists()


@pytest.mark.parametrize("value", ["1979-05-27", "nan", "inf", "[{a = 07:32:00}]"])
def test_arguments_that_student_json_cannot_hold_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match=r"expected a value that student\.json can hold"):
        parse_arguments([f"d={value}"], "--student-args")
