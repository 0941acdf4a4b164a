"""Exported networks answer like the network they came from, in programs of their own, or they are not left behind."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zskt
from small import call, fails, make_teacher, refused, run
from zskt.deploy import export as exporting
from zskt.deploy.export import BATCHES, IMAGES, check_agreement, deviation
from zskt.deploy.formats import feed, need, open_onnx
from zskt.deploy.hub import write_hub
from zskt.errors import UsageError, ZsktError
from zskt.networks import models
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.networks.factories import call_factory
from zskt.networks.folder import load_network

TINY = {"steps": 2, "batch_size": 8, "generator.width": 8, "generator.latent": 12, "student.updates": 1}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher (wrn-10-2, 3 x 16 x 16) and a finished run of two steps (wrn-10-1)."""
    folder = tmp_path_factory.mktemp("finished")
    teacher = make_teacher()
    zskt.save_teacher(folder / "teacher", teacher, how="random weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = models.wide_resnet(10, 1)
    zskt.distill(teacher, student, "zskt", settings=TINY, out=folder / "run")
    return folder


def lenet() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_teacher(models.lenet5(half=True, num_classes=4, input_size=(1, 28, 28)), size=(1, 28, 28))


class Plain(nn.Module):
    """Somebody's own network, of no spec."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(dim=(2, 3)))


def plain(size: tuple[int, int, int] = (3, 8, 12)) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Classifier(Plain(), input_size=size, mean=MEAN, std=STD, class_names=["cat", "dog", "none of these"])
        return as_teacher(network)


def pixels(network: Classifier, count: int) -> Tensor:
    """Images (count, C, H, W) of bytes."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, *network.input_size), generator=rng, dtype=torch.uint8)


def answer(path: Path, images: Tensor) -> Tensor:
    """Logits (N, K) of an ONNX file, without our reader."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_exports_take_any_batch_and_normalise(batch: int, exports: dict[str, Path]) -> None:
    network = plain()
    images = pixels(network, batch)
    expected = pytest.approx(network(network.normalise(images)), abs=1e-5)  # (N, K)
    for fed, x in (("uint8", images), ("fraction", images / 255), ("normalised", network.normalise(images))):
        assert answer(exports[f"{fed}.onnx"], x) == expected, fed
    assert torch.export.load(exports["uint8.pt2"]).module()(images) == expected


@pytest.mark.parametrize("fed", ["fraction", "normalised"])
def test_a_pt2_comes_back_with_its_normalisation_and_class_names(fed: Any, tmp_path: Path) -> None:
    network, path, lines = plain(), tmp_path / "student.pt2", list[str]()
    images = pixels(network, 5)
    zskt.export(network, path, input=fed)
    again = zskt.load_teacher(path, trust=True, notice=lines.append)
    assert again.class_names == network.class_names
    torch.testing.assert_close(again(again.normalise(images)), network(network.normalise(images)))
    assert not any("using those given" in line for line in lines)
    zskt.load_teacher(path, trust=True, mean=[0.5] * 3, std=[0.5] * 3, notice=lines.append)
    assert any("itself says mean" in line for line in lines)
    damaged = path.with_name("damaged.pt2")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(damaged, "w") as copy:
        for entry in archive.namelist():
            copy.writestr(entry, b"{}" if entry.endswith("zskt.json") else archive.read(entry))
    assert "zskt.json in" in refused(lambda: zskt.load_teacher(damaged, trust=True))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`plain` in several formats."""
    folder = tmp_path_factory.mktemp("exports")
    paths = {name: folder / name for name in ("uint8.onnx", "fraction.onnx", "normalised.onnx", "uint8.pt2")}
    for path in paths.values():
        exported = zskt.export(plain(), path, input=path.stem)  # type: ignore[arg-type]
        assert exported.images_from == "seeded noise in [0, 1]"
        assert exported.max_difference <= 1e-5
        assert exported.agreement == 1
        assert (exported.images, exported.bytes) == (IMAGES, path.stat().st_size)
    return paths


def test_what_travels_with_a_file(exports: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(exports["uint8.onnx"])
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts["input"] == "uint8: images as bytes, 0..255"
    assert facts["zskt_version"] == zskt.__version__
    found = [json.loads(facts[key]) for key in ("class_names", "input_size", "mean", "std")]
    assert found == [["cat", "dog", "none of these"], [3, 8, 12], list(MEAN), list(STD)]
    extra = {"zskt.json": ""}
    torch.export.load(exports["uint8.pt2"], extra_files=extra)
    assert json.loads(extra["zskt.json"]) == facts
    (images,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, 8, 12]


def test_no_file_names_of_this_machine_travel_with_a_file(exports: dict[str, Path]) -> None:
    here = str(Path(__file__).parent.parent).encode()
    with zipfile.ZipFile(exports["uint8.pt2"]) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for content in (*contents, *(path.read_bytes() for path in exports.values() if path.suffix == ".onnx")):
        assert here not in content
        assert b"site-packages" not in content


def test_a_run_is_compared_on_its_generators_images(finished: Path, tmp_path: Path) -> None:
    exported = zskt.export(finished / "run", tmp_path / "student.onnx")
    assert (exported.format, exported.input, exported.int8) == ("onnx", "fraction", False)
    assert exported.images_from == "the run's pseudo images"
    assert exported.max_difference <= 1e-4 * exported.largest_logit
    student = zskt.load_student(finished / "run")
    images = pixels(student, 5)
    expected = student(student.normalise(images))
    assert answer(tmp_path / "student.onnx", images / 255) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    assert sum(BATCHES) == IMAGES


def test_a_result_is_exported_without_a_folder(tmp_path: Path) -> None:
    student = models.convnet(2, num_classes=10, channels=3)
    result = zskt.distill(make_teacher(), student, "zskt-prior", settings=TINY)
    exported = zskt.export(result, tmp_path / "student.pt2")
    assert exported.images_from == "the run's pseudo images"
    assert exported.agreement == 1
    card = tmp_path / "student"
    zskt.export(result, card)
    assert "| recipe | zskt-prior |" in (card / "README.md").read_text()
    result.finished = False
    assert "resume it" in refused(lambda: zskt.export(result, tmp_path / "other.pt2"))


@pytest.mark.parametrize("form", ["onnx", "pt2", "hub"])
def test_grey_images_and_float64(form: Any, tmp_path: Path) -> None:
    network = lenet()
    twin = Classifier(network.module.double(), input_size=(1, 28, 28), mean=[0.5], std=[0.25])
    exported = zskt.export(twin, tmp_path / "network", form)
    assert exported.max_difference <= 1e-4
    if form == "hub":
        assert next(load_network(tmp_path / "network").parameters()).dtype == torch.float64


# Hub folders.


def test_a_hub_folder_comes_back_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my student"
    exported = zskt.export(finished / "run", folder)
    assert (exported.format, exported.input, exported.max_difference) == ("hub", "normalised", 0)
    student = zskt.load_student(finished / "run")
    for loaded in (zskt.load_student(folder), load_network(folder)):
        assert loaded.fingerprint() == student.fingerprint()
        assert loaded.input_size == student.input_size
    written = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == written
    again = zskt.export(folder, tmp_path / "again")  # a folder like any other
    assert again.images_from == "seeded noise in [0, 1]"
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_hub_folder_tells_no_path_of_its_maker(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "mynet.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    )
    module = call_factory(f"{tmp_path / 'secret' / 'mynet.py'}:make")
    network = Classifier(module, input_size=(3, 2, 2), mean=MEAN, std=STD)
    zskt.export(network, tmp_path / "hub")
    how = json.loads((tmp_path / "hub" / "config.json").read_text())["rebuild"]
    assert how == {"factory": "mynet.py:make", "arguments": {}}
    for path in (tmp_path / "hub").iterdir():
        assert b"secret" not in path.read_bytes()


def test_a_hub_folder_passes_on_only_known_metadata(tmp_path: Path) -> None:
    names = ["\ud800", "<b>b</b>", "c"]
    network = Classifier(Plain(), input_size=(3, 16, 16), mean=MEAN, std=STD, class_names=names)
    facts = {
        "auto_map": {"AutoModel": "evil--x.Y"}, "model_type": "vit", "id2label": 5, "steps": "many",
        "seed": float("nan"),
        "recipe": "zskt", "measured": {"accuracy": float("nan"), "agreement": "x", "calibration_error": 0.5},
        "warnings": ["x\n\n# Heading\n<script>alert(1)</script>", 5], "teacher_model": "<img src=x>", "reason": 7,
    }  # fmt: skip
    write_hub(tmp_path, network, facts)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "zskt"
    assert not {"auto_map", "steps", "seed", "reason"} & config.keys()
    assert config["measured"] == {"calibration_error": 0.5}
    card = (tmp_path / "README.md").read_text()
    assert "\n# Heading" not in card
    assert not any(tag in card for tag in ("<script", "<img", "<b>"))
    assert "not measured" in card
    write_hub(tmp_path, network, {name: object() for name in facts})


def test_a_model_card_says_what_was_not_measured(finished: Path, tmp_path: Path) -> None:
    zskt.export(finished / "run", tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    header, body = card.split("---\n")[1:]
    assert 'library_name: "zskt"' in header.splitlines()
    assert 'pipeline_tag: "image-classification"' in header.splitlines()
    for row in ("| teacher | wrn-10-2 |", "| recipe | zskt |", "| steps | 2 |", "| student accuracy | not measured |"):
        assert row in body.splitlines()
    description = json.loads((tmp_path / "student" / "config.json").read_text())
    assert description["model_type"] == "zskt"
    assert len(description["id2label"]) == 10
    preprocessing = json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())
    assert (preprocessing["image_mean"], preprocessing["size"]) == ([0.5] * 3, {"height": 16, "width": 16})


def test_a_model_card_has_what_was_measured(tmp_path: Path) -> None:
    zskt.save_teacher(tmp_path / "lenet", lenet(), measured={"accuracy": 0.91234})
    zskt.export(tmp_path / "lenet", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | 0.9123 |" in card.splitlines()
    assert "| calibration error | not measured |" in card.splitlines()


def test_the_cards_own_words_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source, name in ((lenet(), "spec"), (plain(), "object")):
        zskt.export(source, name)
        code = (tmp_path / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
        images = pixels(source, 2)
        namespace: dict[str, Any] = {"images": images, "module": Plain()}
        exec(code, namespace)
        assert torch.equal(namespace["logits"], source(source.normalise(images)))
    assert "only its own code can rebuild" in refused(lambda: zskt.load_student("object"))
    again = zskt.export("object", "again", module=Plain())
    assert again.max_difference == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_transformers_leaves_for_transformers_alone(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    names = ["cat", "dog", "none of these"]
    options: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options |= {"num_channels": channels, "num_labels": 3, "auto_map": {"AutoModel": "x--y.Z"}}
        module = transformers.ResNetForImageClassification(transformers.ResNetConfig(**options))
    size, mean, std = (channels, 16, 24), MEAN[:channels], STD[:channels]
    source = as_teacher(Classifier(module, input_size=size, mean=mean, std=std, class_names=names))
    assert zskt.export(source, "mine").agreement == 1
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("resnet", ["ResNetForImageClassification"])
    assert config["label2id"] == {"cat": 0, "dog": 1, "none of these": 2}
    assert "auto_map" not in config
    card = (tmp_path / "mine" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "zskt" not in code
    assert 'library_name: "transformers"' in card.splitlines()
    images = pixels(source, 2)
    namespace: dict[str, Any] = {"images": list(images)}
    exec(code, namespace)  # the processor normalises, the model answers
    expected = source(source.normalise(images))
    torch.testing.assert_close(namespace["logits"], expected, rtol=1e-4, atol=1e-5)
    assert namespace["model"].config.id2label == dict(enumerate(names))
    again = Classifier.from_pretrained("mine")
    assert (again.class_names, again.input_size) == (tuple(names), size)
    assert again.fingerprint() == source.fingerprint()


def test_of_several_classes_the_one_that_was_exported_is_read_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.DeiTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    module = transformers.DeiTForImageClassificationWithTeacher(config)
    network = Classifier(module, input_size=(3, 16, 16), mean=MEAN, std=STD)
    zskt.export(network, tmp_path / "deit")
    assert type(Classifier.from_pretrained(tmp_path / "deit").module) is type(module)


# Wrong files.


def spoil(function: str, after: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen to a file between its writing and its reading."""
    write = getattr(exporting, function)

    def spoiled(path: Path, *rest: object) -> None:
        write(path, *rest)
        after(path)

    monkeypatch.setattr(exporting, function, spoiled)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_weight(path: Path) -> None:
    import onnx

    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(largest.raw_data, np.float32).copy()
    values[: len(values) // 2] *= 2
    largest.raw_data = values.tobytes()
    onnx.save(model, path)


def other_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors, _ = zskt.files.read_tensors(path)
    tensors["head.bias"] += 0.5
    zskt.files.write_tensors(path, tensors)


@pytest.mark.parametrize(
    ("form", "function", "after", "message"),
    [
        ("onnx", "write_onnx", cut, "cannot be read back"),
        ("pt2", "write_pt2", cut, "cannot be read back"),
        ("hub", "write_hub", lambda folder: cut(folder / "model.safetensors"), "cannot be read back"),
        ("hub", "write_hub", lambda folder: (folder / "config.json").unlink(), "cannot be read back"),
        ("onnx", "write_onnx", change_a_weight, "disagrees with the network: logits differ by up to"),
        ("hub", "write_hub", other_head, "disagrees with the network: logits differ by up to 0.5"),
    ],
)
def test_a_wrong_file_is_not_left_behind(
    form: Any, function: str, after: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(function, after, monkeypatch)
    line = refused(lambda: zskt.export(plain(), tmp_path / "out", form))
    assert message in line
    assert "nothing was written" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_wrong_normalisation_is_caught(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = getattr(exporting, f"write_{form}")

    def tampered(path: Path, network: Classifier, fed: Any) -> None:
        other = Classifier(network.module, input_size=network.input_size, mean=(0.4814, *MEAN[1:]), std=STD)
        write(path, other, fed)

    monkeypatch.setattr(exporting, f"write_{form}", tampered)
    assert "disagrees with the network" in refused(lambda: zskt.export(plain(), tmp_path / "out", form))
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_size_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(path: Path, network: Classifier, fed: Any) -> None:
        torch.export.save(torch.export.export(network, (torch.zeros(2, *network.input_size),)), path)

    monkeypatch.setattr(exporting, "write_pt2", fixed)
    assert "fails on a batch of 1" in refused(lambda: zskt.export(plain(), tmp_path / "out.pt2", input="normalised"))
    assert not list(tmp_path.iterdir())


class Untraceable(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) > 0 else -x)


class TwoByTwo(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] != 5 else super().forward(x) * 2


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_what_cannot_be_traced_is_said_in_one_line(form: Any, tmp_path: Path) -> None:
    for module in (Untraceable(), TwoByTwo()):
        network = Classifier(module, input_size=(3, 8, 8), mean=MEAN, std=STD)
        assert "cannot trace this network" in refused(partial(zskt.export, network, tmp_path / "out", form))
        assert not list(tmp_path.iterdir())


def test_nan_is_not_agreement() -> None:
    network = plain()
    images = feed(network, torch.zeros(IMAGES, *network.input_size), "fraction")
    found = deviation(lambda x: torch.full((len(x), 3), torch.nan), network, images, "fraction")
    for judge in (lambda: exporting.check(found, "onnx", 1e-3), lambda: check_agreement(found, 0.0)):
        with pytest.raises(ZsktError, match="nothing was written"):
            judge()


# int8.


def test_int8_is_calibrated_without_data(finished: Path, tmp_path: Path) -> None:
    exported = zskt.export(finished / "run", tmp_path / "int8.onnx", int8=True, input="uint8", least_agreement=0.5)
    assert exported.int8
    assert 0.5 <= exported.agreement <= 1
    assert exported.max_difference > 1e-3 * exported.largest_logit  # it is another network
    import onnx

    model = onnx.load(tmp_path / "int8.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert "class_names" in {p.key for p in model.metadata_props}
    student = zskt.load_student(finished / "run")
    for batch in (1, 7, 256):
        assert answer(tmp_path / "int8.onnx", pixels(student, batch)).shape == (batch, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]
    strict: dict[str, Any] = {"int8": True, "tolerance": 0.1, "least_agreement": 1.0}
    line = refused(lambda: zskt.export(finished / "run", tmp_path / "no.onnx", **strict))
    assert "pseudo images keep the student's class, expected at least 1 " in line
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_int8_is_judged_on_other_images_than_it_is_calibrated_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Tensor] = []

    def watched(real: Any, first: Any, second: Any, images: Tensor, *rest: Any) -> Any:
        used.append(images)
        return real(first, second, images, *rest)

    for name in ("quantise", "deviation"):
        monkeypatch.setattr(exporting, name, partial(watched, getattr(exporting, name)))
    zskt.export(finished / "run", tmp_path / "int8.onnx", int8=True, least_agreement=0)
    plain_images, calibration, judged = used
    assert torch.equal(plain_images, judged)
    assert len(calibration) == IMAGES
    assert not any(torch.equal(a, b) for a in calibration for b in judged)


# What is asked for.


def test_paths_may_be_texts_from_the_home_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    zskt.save_teacher("~/teacher", zskt.load_teacher(finished / "teacher"))
    zskt.distill(zskt.load_teacher("~/teacher"), models.wide_resnet(10, 1), "zskt", settings=TINY, out="~/run")
    assert zskt.load_student("~/run").num_classes == 10
    assert zskt.write_report("~/run", "~/report.html") == zskt.write_report(["~/run"], "~/report.html")
    zskt.export("~/run", "~/hub")
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "run", "report.html", "hub"}


def test_any_name_will_do(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of what is made on the way, too."""
    monkeypatch.setattr(exporting, "TURNS", 5)
    teacher = zskt.load_teacher(finished / "teacher")
    zskt.export(finished / "run", tmp_path / "student", teacher=teacher)
    zskt.export(finished / "run", tmp_path / "teacher", teacher=teacher)
    zskt.export(finished / "run", tmp_path / "fp32", "onnx", int8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32", "student", "teacher"]


def test_requests_that_cannot_be_met(finished: Path, tmp_path: Path) -> None:
    run, out = finished / "run", tmp_path / "out.onnx"
    assert "without a generator" in refused(lambda: zskt.export(finished / "teacher", out, int8=True))
    assert "wrap it, as in zskt.Classifier" in refused(lambda: zskt.export(Plain(), out))  # type: ignore[arg-type]
    for options, message in (
        ({"format": "onx"}, "did you mean onnx"),
        ({"input": "uint"}, "did you mean uint8"),
        ({"format": "hub", "input": "uint8"}, "preprocessor_config.json"),
        ({"format": "pt2", "int8": True}, "int8 is for ONNX"),
        ({"tolerance": -1.0}, "tolerance of at least 0"),
        ({"least_agreement": 90.0}, "an agreement from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            zskt.export(run, out, **options)
    assert "found .bin; give a format" in refused(lambda: zskt.export(run, tmp_path / "out.bin"))
    out.write_text("mine")
    assert "already exists; choose another --out" in refused(lambda: zskt.export(run, out))
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(lambda: zskt.export(plain(), tmp_path / "out.onnx"))
    assert package in line
    assert 'pip install "zskt[export]"' in line
    assert not list(tmp_path.iterdir())
    zskt.export(plain(), tmp_path / "hub")  # which needs none of them


# The command.


def test_the_command(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "TURNS", 5)
    out = tmp_path / "student.onnx"
    command = [finished / "run", "--format", "onnx", "--out", out, "--teacher", finished / "teacher"]
    found = run("export", *command, "--int8", "--least-agreement", 0)
    assert found["bytes"] == out.stat().st_size
    assert found["agreement_lost"] == pytest.approx(1 - found["agreement"])
    assert (found["format"], found["input"], found["images"]) == ("onnx", "fraction", 256)
    rows = found["timings"]
    assert [row["network"] for row in rows] == ["teacher", "student", "student, int8"]
    for row in rows:
        assert row["threads"] == 1
        assert row["bytes"] > 0
        assert row["ms_batch_1"] > 0
        assert row["ms_batch_32"] > 0
    assert rows[0]["parameters"] > rows[1]["parameters"] == rows[2]["parameters"]
    assert rows[1]["bytes"] > rows[2]["bytes"] == found["bytes"]
    zskt.save_teacher(tmp_path / "small", lenet())
    small = [tmp_path / "small", "--format", "hub", "--out", tmp_path / "hub", "--teacher", tmp_path / "small"]
    assert [row["network"] for row in run("export", *small)["timings"]] == ["teacher", "student"]
    assert {path.name for path in tmp_path.iterdir()} == {"student.onnx", "small", "hub"}


def test_the_commands_errors(finished: Path, tmp_path: Path) -> None:
    out, unfinished = tmp_path / "out.onnx", tmp_path / "unfinished"
    settings = {**TINY, "steps": 4}
    zskt.distill(make_teacher(), models.convnet(2), "zskt-prior", settings=settings, out=unfinished, stop_after=1)
    shutil.rmtree(unfinished / "checkpoint")  # with one, its student would be exported
    assert "has not finished, resume it" in fails(1, "export", unfinished, "--out", out)
    assert "found nothing" in fails(1, "export", tmp_path / "nowhere", "--out", out)
    export = ("export", finished / "run", "--out")
    assert "already exists" in fails(1, *export, unfinished, "--format", "hub")
    assert "int8 is for ONNX" in fails(2, *export, tmp_path / "a.pt2", "--int8")
    with pytest.raises(SystemExit) as caught:
        call(*export, out, "--format", "tflite")
    assert caught.value.code == 2
    assert not out.exists()


def test_the_home_folder_stays_clean(finished: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    environment |= {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    command = [sys.executable, "-m", "zskt", "export", str(finished / "run"), "--out", str(tmp_path / "student.onnx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not list(home.iterdir())
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["agreement"] == 1
    for noise in ("torchvision", "Warning", "[torch.onnx]"):
        assert noise not in done.stderr


def test_telemetry_is_off_before_onnxruntime_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    look = lambda name, extra: os.environ["ORT_DISABLE_TELEMETRY"]  # noqa: E731
    monkeypatch.setattr(sys.modules[need.__module__], "optional", look)
    assert need("onnxruntime") == "1"


def test_sessions_run_on_one_thread(exports: dict[str, Path]) -> None:
    options = open_onnx(exports["uint8.onnx"]).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
