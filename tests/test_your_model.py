"""docs/your-model.md does what it says: every block of it is run, in order, with fewer steps."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zskt
from small import SMALL_BANK, call, coloured, make_teacher, shake_batchnorm, write_images
from zskt.data.images import read
from zskt.evaluate.measures import measure
from zskt.networks import models
from zskt.networks.folder import load_network

PAGE = (Path(__file__).parent.parent / "docs" / "your-model.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
TINY = ["--steps", "2", "--batch-size", "8", "--set", "generator.width=8", "generator.latent=12", "student.updates=1"]
TINY += [f"{name}={value}" for name, value in SMALL_BANK.items()]


def blocks(number: int) -> list[tuple[str, str]]:
    """Language and text of each block of one case, in order."""
    (section,) = re.findall(rf"^## {number}\. .*?(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    return BLOCK.findall(section)


def arguments(command: str) -> list[str]:
    """A line of the page as a command of two small steps."""
    program, *words = shlex.split(command)
    assert program == "zskt"
    if "--steps" in words:
        at = words.index("--steps")
        assert words[at + 1] == "2000"
        words[at : at + 2] = TINY
    return words


def follow(number: int) -> list[dict[str, Any]]:
    """Run all blocks of a case in the current folder; what its commands print."""
    results = []
    for language, text in blocks(number):
        if text.startswith("# networks.py"):
            Path("networks.py").write_text(text)
        elif language == "python":
            with own_modules():
                exec(compile(text.replace('{"steps": 2000}', "SMALL"), "your-model.md", "exec"), {"SMALL": SMALL})
        else:
            for command in text.splitlines():
                status, out, err = call(*arguments(command))
                assert status == 0, f"{command}\n{err}"
                results.append(json.loads(out) | {"stderr": err})
    return results


SMALL = {"steps": 2, "batch_size": 8, "generator.width": 8, "generator.latent": 12, "student.updates": 1} | SMALL_BANK


@contextlib.contextmanager
def own_modules() -> Iterator[None]:
    """The current folder's modules can be imported, as beside a script, and are forgotten afterwards."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())
        sys.modules.pop("networks", None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with `cifar10-test.zip`, two images of each of ten classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", test=coloured(20, classes=10, size=(3, 32, 32)))
    subprocess.run([sys.executable, "-m", "zipfile", "-c", "cifar10-test.zip", "images/test"], check=True)
    return tmp_path


def networks(folder: Path) -> Any:
    """The module that the page writes down first."""
    text = next(text for _, text in blocks(1) if text.startswith("# networks.py"))
    (folder / "networks.py").write_text(text)
    found = importlib.util.spec_from_file_location("networks_of_the_page", folder / "networks.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_a_network_of_your_own(folder: Path) -> None:
    network = networks(folder).network()
    shake_batchnorm(network)
    torch.save(network.state_dict(), "network.pth")
    inspected, distilled, evaluated, exported = follow(1)
    assert inspected["kind"] == "factory"
    assert inspected["batchnorm_layers"] == 3
    assert "runs the code of that file" in inspected["stderr"]
    assert distilled["finished"]
    images = read(["cifar10-test.zip"], "test", size=(3, 32, 32))
    expected = measure(load_network("runs/own", trust=True), images.images, images.labels)
    assert evaluated["accuracy"] == expected["accuracy"]
    assert exported["agreement"] == 1
    assert (folder / "own.onnx").exists()
    own = networks(folder).network(width=24)
    own.load_state_dict(torch.load("student.pth", weights_only=True))  # a plain student checkpoint
    again = zskt.load_student("runs/python", module=own).module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in own.state_dict().items())


def test_a_hugging_face_folder(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = transformers.ResNetForImageClassification(config)
    classifier.save_pretrained("classifier")
    normalisation = {"image_mean": [0.4914, 0.4822, 0.4465], "image_std": [0.247, 0.2435, 0.2616]}
    facts = {"do_resize": True, "size": {"height": 32, "width": 32}, "do_normalize": True, **normalisation}
    Path("classifier/preprocessor_config.json").write_text(json.dumps(facts))
    inspected, distilled, evaluated, exported, folder_of_student = follow(2)
    assert inspected["input_size"] == [3, 32, 32]
    assert inspected["normalisation_from"] == "preprocessor_config.json"
    assert 0.12 < inspected["student_fraction"] < 0.5
    assert distilled["finished"]
    assert 0 <= evaluated["agreement"] <= 1
    assert [row["network"] for row in exported["timings"]] == ["teacher", "student"]
    assert folder_of_student["agreement"] == 1
    alone = transformers.AutoModelForImageClassification.from_pretrained("student-hub")  # without zskt
    student, images = zskt.load_student("runs/hub"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(alone(images).logits, student(images))


def test_a_name_in_timm(folder: Path) -> None:
    try:
        import timm
    except Exception as error:
        pytest.skip(f"timm cannot be imported here: {error}")
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), "resnet18.pth")
    inspected, distilled, exported = follow(3)
    assert inspected["normalisation_from"] == "pretrained_cfg"
    assert distilled["finished"]
    assert exported["agreement"] > 0.9


def test_a_recorded_graph(folder: Path) -> None:
    networks(folder)
    inspected, distilled = follow(4)
    assert inspected["kind"] == "exported program"
    assert inspected["input_size"] == [3, 32, 32]
    assert inspected["batchnorm_layers"] == 3
    assert "hooks do not work inside an exported graph" in inspected["stderr"]
    assert distilled["finished"]


def test_weights_of_unknown_naming(folder: Path) -> None:
    teacher = make_teacher(models.wide_resnet(16, 2), size=(3, 32, 32))
    spelled = {"group1": "stage_a", "group2": "stage_b", "group3": "stage_c", "fc": "classifier", "conv1": "c1"}
    weights = {
        "module." + ".".join(spelled.get(part, part) for part in name.split(".")): value
        for name, value in teacher.module.state_dict().items()
    }
    torch.save({"epoch": 200, "state_dict": weights}, "mystery.pth")
    imported, distilled = follow(5)
    assert imported["measured"]
    assert "classifier" in imported["renamed"]
    assert distilled["finished"]
    loaded = zskt.load_teacher("teacher").module.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in teacher.module.state_dict().items())


def test_every_command_of_the_page_is_in_a_case() -> None:
    inside = {text for number in range(1, 6) for _, text in blocks(number)}
    assert {text for _, text in BLOCK.findall(PAGE)} == inside
