"""Any teacher in: each kind with a real object of it, what it says about its images, and a short distillation."""

import copy
import json
import logging
import logging.handlers
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zskt
from small import (
    GREY,
    SMALL_BANK,
    Payload,
    call,
    edit,
    fails,
    make_teacher,
    refused,
    run,
    shake_batchnorm,
    stripes,
    student_for,
)
from test_cli import GREY as GREY_48
from zskt.cli.teachers import Foreign, open_network, open_networks
from zskt.errors import UsageError
from zskt.evaluate.measures import measure
from zskt.networks.loading import Loaded, load, load_teacher
from zskt.networks.observe import batchnorm_layers, find_stages, forward_flops
from zskt.networks.rebuild import rebuild_module, without_code

SIZE = (3, 16, 16)
TINY = {"batch_size": 4, "generator.width": 8, "generator.latent": 8, "student.updates": 1}

SCRIPT = """
import torch
from sibling import width

class Net(torch.nn.Module):
    def __init__(self, classes, bias):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3, 2, 1, bias=bias)
        self.bn = torch.nn.BatchNorm2d(width)
        self.fc = torch.nn.Linear(width, classes)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean(dim=(2, 3)))

def make(classes=10, bias=True):
    return Net(classes, bias)
"""


class Net(nn.Module):
    """Two convolutions with BatchNorm, one of them without scale and shift, and dropout."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8, affine=False)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class Described(Net):
    """As timm's networks say what images they take."""

    pretrained_cfg: ClassVar = {"input_size": SIZE, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"aux": logits + 1, "logits": logits}


def trained(module: nn.Module) -> nn.Module:
    shake_batchnorm(nn.ModuleList(layer for layer in batchnorm_layers(module) if layer.affine))
    if isinstance(module, Net):
        assert module.bn2.running_var is not None
        nn.init.uniform_(module.bn2.running_var, 0.5, 1.5)
    return module.eval()


def known(lines: list[str]) -> list[str]:
    """Without what is said of random weights, which these networks have."""
    return [line for line in lines if "looks untrained" not in line]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def exported(module: nn.Module, path: Path, *, dynamic: bool = True, like: Tensor | None = None) -> Path:
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic else None
    images = torch.randn(2, *SIZE) if like is None else like
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=shapes), path)
    return path


def traced(module: nn.Module, path: Path) -> Path:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(module, torch.randn(2, *SIZE)).save(str(path))
    return path


def distils(teacher: zskt.Classifier, recipe: str = "auto") -> str:
    """Two steps into a small student; the teacher comes back as it was. Returns the recipe."""
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    x = torch.randn(3, *teacher.input_size)
    answers = teacher(x)
    settings = TINY | (SMALL_BANK if recipe == "auto" else {})
    result = zskt.distill(teacher, student_for(teacher), recipe, steps=2, settings=settings)
    assert result.finished
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert [module.training for module in teacher.modules()] == modes
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(x), answers)
    return result.config.recipe


# Our own folders


def test_own_folders(tmp_path: Path) -> None:
    zskt.save_teacher(tmp_path / "teacher", make_teacher())
    loaded = load(tmp_path / "teacher")
    assert (loaded.kind, loaded.lost) == ("folder of zskt", "")
    assert loaded.teacher.fingerprint() == make_teacher().fingerprint()
    useless: dict[str, Any] = {"input_size": SIZE, "mean": [0.5] * 3, "weights": "net.pt", "arguments": {"a": 1}}
    for name, value in useless.items():
        assert "has no effect" in refused(partial(load, tmp_path / "teacher", **{name: value}), UsageError)
    (tmp_path / "empty").mkdir()
    assert "teacher.json" in refused(lambda: load_teacher(tmp_path / "empty"))
    assert "found nothing; give a teacher" in refused(lambda: load_teacher(tmp_path / "absent"))


def test_a_teacher_that_only_its_own_code_makes_is_handed_in(tmp_path: Path) -> None:
    saved = zskt.Classifier(trained(Net()), input_size=SIZE, **GREY)
    zskt.save_teacher(tmp_path / "t", saved)
    advice = f"teacher = zskt.load_teacher({str(tmp_path / 't')!r}, module=module)"
    assert advice in refused(lambda: load_teacher(tmp_path / "t"))
    assert load_teacher(tmp_path / "t", module=Net()).fingerprint() == saved.fingerprint()
    assert "for a folder of zskt" in refused(lambda: load_teacher("timm:resnet18", module=Net()), UsageError)


# Factories


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text("width = 6\n")
    (tmp_path / "mine.py").write_text(SCRIPT)
    return tmp_path / "mine.py"


def test_a_factory_with_weights(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    how: dict[str, Any] = {"arguments": {"classes": 37, "bias": False}, "input_size": SIZE, **GREY}
    made = load_teacher(f"{script}:make", notice=lines.append, **how)
    assert known(lines) == [f"{script}:make runs the code of that file or package"]
    state = {f"module.{name}": tensor + 1 for name, tensor in made.module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.pth")
    found = load(f"{script}:make", weights=tmp_path / "net.pth", **how)
    assert (found.kind, found.normalisation, found.teacher.num_classes) == ("factory", "as given", 37)
    assert torch.equal(found.teacher.module.state_dict()["conv.weight"], made.module.state_dict()["conv.weight"] + 1)
    assert distils(found.teacher) == "bank"
    monkeypatch.chdir(tmp_path)
    assert load_teacher("mine:Net", **how).num_classes == 37  # from the current folder
    del sys.modules["mine"]


def test_a_network_of_probabilities_is_saved_without_their_logarithm(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script.write_text(f"{SCRIPT}\ndef soft():\n    return torch.nn.Sequential(make(), torch.nn.Softmax(1))\n")
    made = load_teacher(f"{script}:soft", input_size=SIZE, **GREY)
    zskt.save_teacher(tmp_path / "teacher", made)
    zskt.export(made, tmp_path / "hub")
    for folder in ("teacher", "hub"):
        again = load_teacher(folder, trust=True)
        assert (again.output, again.fingerprint()) == ("probabilities", made.fingerprint())


def test_one_of_several_networks_in_a_file_is_chosen(script: Path, tmp_path: Path) -> None:
    spec = f"{script}:make"
    given: Any = {"input_size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = load(spec, **given).teacher.module.state_dict()
    made = {"model": state, "ema": {name: 2 * tensor for name, tensor in state.items()}}
    torch.save(made, tmp_path / "both.pt")
    line = refused(partial(load, spec, weights=tmp_path / "both.pt", **given))
    assert "choose one by --teacher-key ema" in line
    for key, state in made.items():
        found = load(spec, weights=tmp_path / "both.pt", key=key, **given).teacher.module.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert "give both or neither" in refused(partial(load, spec, key="ema", **given), UsageError)
    zskt.save_teacher(tmp_path / "teacher", make_teacher())
    assert "--teacher-key has no effect" in refused(partial(load, tmp_path / "teacher", key="ema"), UsageError)
    options = ["--input-size", *SIZE, "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25]
    weights = ["--teacher-weights", tmp_path / "both.pt", "--teacher-key", "ema"]
    assert run("inspect", spec, *options, *weights)["kind"] == "factory"


def test_a_factory_that_does_not_fit_is_refused(script: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"input_size": SIZE, **GREY}
    torch.save({"conv.weight": torch.ones(2, 3, 3, 3)}, tmp_path / "other.pt")
    assert "do not fit" in refused(lambda: load_teacher(f"{script}:make", weights=tmp_path / "other.pt", **how))
    assert "--input-size" in refused(lambda: load_teacher(f"{script}:make"), UsageError)
    assert "--mean" in refused(lambda: load_teacher(f"{script}:make", input_size=SIZE), UsageError)
    assert "go together" in refused(lambda: load_teacher(f"{script}:make", input_size=SIZE, mean=[0.5] * 3), UsageError)


def test_weights_alone_are_no_network(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    assert "--teacher-weights" in refused(lambda: load_teacher(tmp_path / "net.pt", input_size=SIZE, **GREY))


# Recorded graphs


def test_an_exported_program(tmp_path: Path) -> None:
    module = trained(Net())
    lines: list[str] = []
    found = load(exported(module, tmp_path / "net.pt2"), trust=True, notice=lines.append, **GREY)
    teacher, x = found.teacher, torch.randn(5, *SIZE)
    assert (found.kind, teacher.input_size, teacher.num_classes) == ("exported program", SIZE, 5)
    torch.testing.assert_close(teacher(x), module(x))
    assert find_stages(teacher.module, SIZE) == ()
    assert lines == [found.lost]
    assert "no attention transfer" in found.lost
    assert "2 BatchNorm layers" in found.lost
    ours, theirs = batchnorm_layers(teacher.module), batchnorm_layers(module)
    assert [type(layer) for layer in ours] == [nn.BatchNorm2d] * 2
    for one, other in zip(ours, theirs, strict=True):
        assert (one.eps, one.momentum, one.affine) == (other.eps, other.momentum, other.affine)
        assert torch.equal(one.state_dict()["running_var"], other.state_dict()["running_var"])
    assert forward_flops(teacher.module, SIZE) == forward_flops(module, SIZE)
    assert distils(teacher) == "bank"  # the prior sees the statistics of the graph's BatchNorm
    assert torch.equal(copy.deepcopy(teacher).double().float()(x), teacher(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, while it decomposes
def test_an_exported_program_may_return_a_dictionary_or_be_decomposed(tmp_path: Path) -> None:
    module, x = trained(Named()), torch.randn(5, *SIZE)
    teacher = load_teacher(exported(module, tmp_path / "named.pt2"), trust=True, **GREY)
    torch.testing.assert_close(teacher(x), module(x)["logits"])
    program = torch.export.load(tmp_path / "named.pt2").run_decompositions()
    torch.export.save(program, tmp_path / "core.pt2")
    found = load(tmp_path / "core.pt2", trust=True, **GREY)
    torch.testing.assert_close(found.teacher(x), module(x)["logits"])
    assert len(batchnorm_layers(found.teacher.module)) == 2


class Integers(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


class Two(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None])


def test_exported_programs_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    path = exported(trained(Net()), tmp_path / "fixed.pt2", dynamic=False)
    assert "batches of exactly 2" in (message := refused(lambda: load_teacher(path, trust=True, **GREY)))
    assert "dynamic_shapes" in message
    path = exported(Net().train(), tmp_path / "training.pt2")
    assert "training mode" in refused(lambda: load_teacher(path, trust=True, **GREY))
    images = torch.randint(256, (2, *SIZE), dtype=torch.uint8)
    path = exported(trained(Integers()), tmp_path / "bytes.pt2", like=images)
    assert "integer images" in refused(lambda: load_teacher(path, trust=True, **GREY))
    path = exported(trained(Two()), tmp_path / "single.pt2", dynamic=False, like=torch.randn(*SIZE))
    assert "one input of shape (N, C, H, W)" in refused(lambda: load_teacher(path, trust=True, **GREY))


def test_torchscript(tmp_path: Path) -> None:
    module, x = trained(Net()), torch.randn(5, *SIZE)
    path = traced(module, tmp_path / "net.pt")
    assert "--trust" in refused(lambda: load_teacher(path, input_size=SIZE, **GREY), UsageError)
    assert "--input-size" in refused(lambda: load_teacher(path, trust=True, **GREY), UsageError)
    found = load(path, trust=True, input_size=SIZE, **GREY)
    assert found.kind == "TorchScript"
    assert "no BatchNorm prior" in found.lost
    torch.testing.assert_close(found.teacher(x), module(x))
    assert found.teacher.fingerprint() == copy.deepcopy(found.teacher).fingerprint()
    assert distils(found.teacher) == "bank-adversary"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.load(str(path))
    bare = zskt.Classifier(script, input_size=SIZE, **GREY)  # handed in as it is
    assert find_stages(bare.module, SIZE) == ()
    assert all(parameter.requires_grad for parameter in script.parameters())  # it was copied
    torch.testing.assert_close(bare(x), module(x))


# Hugging Face folders


@pytest.fixture(scope="module")
def transformers() -> types.ModuleType:
    return pytest.importorskip("transformers", reason="transformers is not installed")


PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3],
}  # fmt: skip


CROP = {"do_center_crop": True, "crop_size": {"height": 16, "width": 24}}


def save_hugging_face(transformers: Any, kind: str, folder: Path, preprocessor: Any = PREPROCESSOR) -> Any:
    """A network of this kind, in a folder with its preprocessor, whose numbers are cut to the network's channels."""
    configs = {
        "resnet": lambda: transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=37
        ),
        "convnext": lambda: transformers.ConvNextConfig(
            num_channels=1, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, num_labels=2
        ),
        "vit": lambda: transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
            patch_size=4, id2label={0: "cat", 1: "dog", 2: "eel"}, label2id={"cat": 0, "dog": 1, "eel": 2},
        ),
    }  # fmt: skip
    module: Any = trained(transformers.AutoModelForImageClassification.from_config(configs[kind]()))
    module.save_pretrained(folder)
    if preprocessor:
        channels = module.config.num_channels
        numbers = {name: preprocessor[name][:channels] for name in ("image_mean", "image_std")}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | numbers))
    return module


@pytest.mark.parametrize(
    ("kind", "classes", "recipe"),
    [("resnet", 37, "bank"), ("convnext", 2, "bank-adversary"), ("vit", 3, "bank-adversary")],
)
def test_a_hugging_face_folder(transformers: Any, kind: str, classes: int, recipe: str, tmp_path: Path) -> None:
    channels = 1 if kind == "convnext" else 3
    module = save_hugging_face(transformers, kind, tmp_path)
    lines: list[str] = []
    found = load(tmp_path, notice=lines.append)
    teacher = found.teacher
    assert (found.kind, found.normalisation, known(lines)) == (f"Hugging Face {kind}", "preprocessor_config.json", [])
    assert (teacher.num_classes, teacher.input_size) == (classes, (channels, 16, 16))
    assert teacher.class_names == (("cat", "dog", "eel") if kind == "vit" else None)
    torch.testing.assert_close(teacher.mean.flatten().tolist(), PREPROCESSOR["image_mean"][:channels])
    torch.testing.assert_close(teacher.std.flatten().tolist(), PREPROCESSOR["image_std"][:channels])
    x = torch.randn(3, channels, 16, 16)
    torch.testing.assert_close(teacher(x), module(x).logits)
    assert bool(find_stages(teacher.module, teacher.input_size)) == (kind != "vit")
    assert distils(teacher) == recipe


@pytest.mark.parametrize(
    ("changes", "size", "mean", "std"),
    [
        ({"size": {"shortest_edge": 20}} | CROP, (16, 24), 0.5, 0.2),
        ({"size": 24, "do_center_crop": False, "crop_size": 16}, (24, 24), 0.5, 0.2),
        ({"do_normalize": False}, (16, 16), 0.0, 1.0),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, (16, 16), 0.5, 0.5),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [51.0]}, (16, 16), 0.5, 0.2),
    ],
    ids=["crop", "side", "no normalisation", "offset", "bytes"],
)
def test_preprocessors(
    transformers: Any, changes: dict[str, Any], size: tuple[int, int], mean: float, std: float, tmp_path: Path
) -> None:
    save_hugging_face(transformers, "convnext", tmp_path, PREPROCESSOR | changes)
    teacher = load_teacher(tmp_path)
    assert teacher.input_size == (1, *size)
    assert (teacher.mean.item(), teacher.std.item()) == pytest.approx((mean, std))


def test_what_a_hugging_face_folder_does_not_say_is_asked_for(transformers: Any, tmp_path: Path) -> None:
    save_hugging_face(transformers, "convnext", tmp_path, None)
    message = refused(lambda: load_teacher(tmp_path), UsageError)
    assert "--mean and --std" in message
    lines: list[str] = []
    how: dict[str, Any] = {"input_size": (1, 16, 16), "mean": [127.5], "std": [51]}
    found = load(tmp_path, notice=lines.append, **how)
    assert found.normalisation == "as given"
    assert known(lines) == ["--mean 127.5 --std 51 read as 0..255 and divided by 255"]
    assert found.teacher.mean.item() == 0.5


def test_hugging_face_folders_run_nothing(transformers: Any, tmp_path: Path) -> None:
    module = save_hugging_face(transformers, "convnext", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refused(lambda: load_teacher(tmp_path))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(load_teacher(tmp_path)(x), module(x).logits)
    trace = tmp_path / "payload-ran"
    torch.save(module.state_dict() | {"extra": Payload(trace)}, tmp_path / "pytorch_model.bin")
    assert "wants to run posix.mkdir" in refused(lambda: load_teacher(tmp_path, trust=True))
    assert not trace.exists()
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    theirs = {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"}
    edit(tmp_path / "config.json", model_type="mine", auto_map=theirs)
    assert "code that comes with a folder is never run" in refused(lambda: load_teacher(tmp_path, trust=True))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    edit(tmp_path / "config.json", model_type="convnext", _attn_implementation="someone/kernels")
    torch.testing.assert_close(load_teacher(tmp_path)(x), module(x).logits)
    assert not trace.exists()


def test_an_untrained_head_is_refused(transformers: Any, tmp_path: Path) -> None:
    module = save_hugging_face(transformers, "convnext", tmp_path)
    module.convnext.save_pretrained(tmp_path)  # the network without its classifier
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ConvNextModel"]
    assert "no trained classifier: classifier.bias" in refused(lambda: load_teacher(tmp_path))


def test_from_pretrained_takes_a_folder_or_downloads_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    zskt.save_teacher(tmp_path / "teacher", make_teacher())
    asked: list[Any] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path / "teacher")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    expected = make_teacher().fingerprint()
    assert zskt.Classifier.from_pretrained(tmp_path / "teacher").fingerprint() == expected
    assert asked == []
    assert zskt.Classifier.from_pretrained("owner/a.name-1", revision="v1").fingerprint() == expected
    ((repository, options),) = asked
    assert (repository, options.pop("revision")) == ("owner/a.name-1", "v1")
    files = ["README.md", "config.json", "model.safetensors", "code.py", "pytorch_model.bin", "onnx/config.json"]
    assert list(hub.utils.filter_repo_objects(files, **options)) == files[:3]


def test_from_pretrained_says_what_it_could_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    (tmp_path / "net.pt").touch()
    places: list[str | Path] = ["nowhere", tmp_path / "nowhere", tmp_path / "net.pt", "owner/name:factory"]
    for what in places:
        assert "which is neither" in refused(partial(zskt.Classifier.from_pretrained, what))
    (tmp_path / "teacher").mkdir()
    revised = refused(lambda: zskt.Classifier.from_pretrained(tmp_path / "teacher", revision="v1"), UsageError)
    assert "revision has no effect" in revised

    def offline(repository: str, **options: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline, and nothing in the cache\nTraceback")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    message = refused(lambda: zskt.Classifier.from_pretrained("owner/name"))
    assert "found no folder owner/name" in message
    assert "LocalEntryNotFoundError: offline, and nothing in the cache" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "zskt[hub]"' in refused(lambda: zskt.Classifier.from_pretrained("owner/name"))


# Model libraries: neither can be imported beside every torch, so stand-ins play them


def test_libraries_that_are_missing_say_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    for what in ("timm:resnet18", "torchvision:resnet18"):
        assert "zskt[vision]" in refused(partial(load_teacher, what))


def test_names_of_model_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append(options)
        return trained(Described())

    def get_model(name: str, weights: Any, **options: Any) -> nn.Module:
        asked.append({"weights": weights} | options)
        return trained(Net())

    crop = types.SimpleNamespace(crop_size=[16], mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.2])
    default = types.SimpleNamespace(transforms=lambda: crop)
    models = types.ModuleType("torchvision.models")
    vars(models).update(get_model=get_model, get_model_weights=lambda name: types.SimpleNamespace(DEFAULT=default))
    timm = types.ModuleType("timm")
    vars(timm).update(create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    for what in ("timm:resnet18.a1_in1k", "torchvision:resnet18"):
        lines: list[str] = []
        found = load(what, notice=lines.append)
        assert "downloads" in lines[0]
        assert found.teacher.input_size == SIZE
        assert found.teacher.mean.flatten().tolist() == [0.4, 0.5, 0.6]
        load(what, weights=tmp_path / "net.pt", arguments={"num_classes": 5}, notice=lines.append)
        theirs = [line for line in known(lines) if "are those of the library's own weights" in line]
        assert len(theirs) == 1
        assert len(known(lines)) == 2
        lines = []
        own: Any = {"mean": [0.5] * 3, "std": [0.25] * 3}
        load(what, weights=tmp_path / "net.pt", arguments={"num_classes": 5}, notice=lines.append, **own)
        assert not any("library's own weights" in line for line in lines)
    assert asked == [
        {"pretrained": True}, *[{"pretrained": False, "num_classes": 5}] * 2,
        {"weights": default}, *[{"weights": None, "num_classes": 5}] * 2,
    ]  # fmt: skip


# The command line


def test_commands_take_every_spelling(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_teacher(f"{script}:make", arguments={"classes": 2}, input_size=(3, 8, 8), **GREY)
    torch.save(made.module.state_dict(), tmp_path / "net.pt")
    images = (("--input-size", 3, 8, 8), ("--mean", *GREY["mean"]), ("--std", *GREY["std"]))
    factory = [f"{script}:make", "--teacher-weights", tmp_path / "net.pt", "--teacher-args", "classes=2"]
    options = [item for option in images for item in option]
    _, out, err = call("inspect", *factory, *options, "--student", "convnet-4")
    found = json.loads(out)
    assert (found["kind"], found["num_classes"], found["output"]) == ("factory", 2, "logits")
    assert (found["normalisation_from"], found["recipe"]) == ("as given", "bank")
    assert found["latency_ms"] > 0
    assert found["stage_resolutions"] == [[4, 4]]
    assert "runs the code" in err
    tiny = ["--steps", 2, "--batch-size", 4, "--set", "generator.width=8", "generator.latent=8", "student.updates=1"]
    run("distill", *factory, *options, "--student", "convnet-4", "--out", tmp_path / "run", *tiny)
    monkeypatch.setattr("zskt.cli.runs.test_images", lambda data, network: stripes(16, 3))
    measured = run("evaluate", tmp_path / "run", "--data", "x", "--teacher", *factory, *options)
    assert measured == measure(zskt.load_student(tmp_path / "run"), *stripes(16, 3), made)
    monkeypatch.setattr("zskt.cli.paper.test_images", lambda data, network: stripes(64, 3))
    run("belief", tmp_path / "run", *factory, *options, "--data", "x", "--images", 2, "--steps", 2)
    run("sample", tmp_path / "run", "--out", tmp_path / "a.png", "--teacher", *factory, *options)
    assert "--input-size C H W" in fails(2, "inspect", f"{script}:make")
    assert "has no effect" in fails(2, "inspect", tmp_path / "run", *options)
    assert "key=value" in fails(2, "inspect", *factory[:3], "--teacher-args", "classes")


def test_options_go_to_the_network_from_elsewhere(script: Path, tmp_path: Path) -> None:
    zskt.save_teacher(tmp_path / "teacher", make_teacher())
    foreign = Foreign(input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, teacher_args=("classes=10",))
    first, none, second = open_networks([tmp_path / "teacher", None, f"{script}:make"], foreign)
    assert isinstance(first, Loaded)
    assert isinstance(second, Loaded)
    assert none is None
    assert (first.kind, second.kind) == ("folder of zskt", "factory")
    with pytest.raises(UsageError, match="are for one factory"):
        open_networks([f"{script}:make", f"{script}:Net"], foreign)
    with pytest.raises(UsageError, match="has no effect"):
        open_network(tmp_path / "teacher", foreign)


@pytest.mark.parametrize(
    "facts",
    [
        [{"image_processor": [1]}],
        {"image_processor": None},
        {"size": {"height": 16}},
        {"size": {"height": float("inf"), "width": 8}},
        {"image_mean": [10**400] * 3},
        {"size": {"shortest_edge": [8]}},
        {"rescale_factor": "x"},
    ],
)
def test_a_preprocessor_of_odd_values_is_not_understood(transformers: Any, facts: Any, tmp_path: Path) -> None:
    save_hugging_face(transformers, "vit", tmp_path, None)
    text = json.dumps(facts if isinstance(facts, list) else PREPROCESSOR | facts)
    (tmp_path / "preprocessor_config.json").write_text(text)
    line = refused(lambda: load_teacher(tmp_path))
    assert "cannot interpret" in line or "is not valid JSON" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_labels": 10**9}, "at most 100,000 classes"),
        ({"id2label": {str(i): "x" for i in range(100_001)}}, "at most 100,000 classes"),
        ({"hidden_size": 2**15, "intermediate_size": 2**15, "num_hidden_layers": 2}, "numbers; save the network again"),
        ({"model_type": "timm_wrapper", "architecture": "x"}, "timm"),
        ({"backbone_config": [{"model_type": "timm_backbone"}]}, "timm"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused(
    transformers: Any, changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hugging_face(transformers, "vit", tmp_path)
    edit(tmp_path / "config.json", **changes)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)  # nothing is made
    assert words in refused(lambda: load_teacher(tmp_path))


def test_transformers_quotes_no_config_on_the_terminal(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hugging_face(transformers, "vit", tmp_path)
    handler = logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    edit(tmp_path / "config.json", use_return_dict="\x1b[2J")
    refused(lambda: load_teacher(tmp_path))
    assert not handler.buffer


def test_configs_lose_what_fetches_code_at_any_depth(transformers: Any) -> None:
    evil = {"auto_map": {"AutoModel": "x--y.Z"}, "quantization_config": {}, "attn_implementation": "a/b"}
    config = {"a": 1, "b": [evil | {"c": 2}], "d": {"e": evil}, **evil}
    assert without_code(config, Path("here")) == {"a": 1, "b": [{"c": 2}], "d": {"e": {}}}
    how = {"transformers": "TimmWrapperForImageClassification", "config": {}}
    rebuild = partial(rebuild_module, where=Path("here"), num_classes=3, input_size=SIZE, trust=True)
    assert "does not have as an image classifier" in refused(partial(rebuild, how))
    how = {"transformers": "ViTForImageClassification", "config": {"num_labels": 4}}
    assert "expected 3 classes" in refused(partial(rebuild, how))


def unusual(tmp_path: Path, body: str) -> str:
    (tmp_path / "unusual.py").write_text(
        f"import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.fc = torch.nn.Linear(48, 3)\n\n{body}"
    )
    return f"{tmp_path}/unusual.py:Net"


FORWARD = "    def forward(self, x):\n        return self.fc(x.flatten(1))\n"


@pytest.mark.parametrize(
    "body",
    [
        f"{FORWARD}    spec = {{1, 2}}\n",
        f"{FORWARD}    stages = ['fc', {{}}]\n",
        FORWARD.replace("return", "assert len(x) > 1; return"),
        f"{FORWARD}    def __setattr__(self, name, value):\n        assert not name.startswith('_zskt')\n"
        "        super().__setattr__(name, value)\n",
    ],
    ids=["spec", "stages", "single", "setattr"],
)
def test_unusual_networks_are_inspected(body: str, tmp_path: Path) -> None:
    result = run("inspect", unusual(tmp_path, body), *GREY_48)
    assert (result["model"], result["num_classes"]) == (None, 3)
    assert (result["latency_ms"] is None) == ("len(x) > 1" in body)


def test_a_fraction_of_nothing_is_refused(tmp_path: Path) -> None:
    body = "        self.register_buffer('w', self.fc.weight.detach().T.clone())\n        del self.fc\n"
    network = unusual(tmp_path, body + "    def forward(self, x):\n        return x.flatten(1) @ self.w\n")
    assert "the teacher has none" in fails(1, "inspect", network, *GREY_48, "--student", "auto:0.5")
