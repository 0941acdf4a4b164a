"""A teacher is a frozen private copy with its normalisation; its folder on disk; weights are read, never executed."""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from small import edit, make_teacher, refused, shake_batchnorm
from zskt.errors import UsageError
from zskt.networks import models
from zskt.networks.archives import read_weights
from zskt.networks.checks import as_teacher, check_pair
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import load_network, load_student, save_network, save_teacher

SIZE, MEAN, STD = (3, 16, 16), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def teacher_of(module: nn.Module, **changes: Any) -> Classifier:
    return as_teacher(Classifier(module, **({"input_size": SIZE, "mean": MEAN, "std": STD} | changes)))


def test_the_module_handed_in_is_untouched() -> None:
    module = models.wide_resnet(10, 1)
    shake_batchnorm(module)
    module.block1.eval()
    module.fc.requires_grad_(False)
    before = copy.deepcopy(module)
    random = torch.get_rng_state()
    teacher = teacher_of(module)
    teacher(torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0)))
    teacher.double()
    assert torch.equal(torch.get_rng_state(), random)
    for ours, theirs in zip(module.modules(), before.modules(), strict=True):
        assert ours.training == theirs.training
        assert not ours._forward_hooks
        assert not ours._forward_pre_hooks
    for mine, other in zip(module.parameters(), before.parameters(), strict=True):
        assert mine.requires_grad == other.requires_grad
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    with torch.no_grad():
        module.state_dict()["fc.bias"].add_(1)
    assert not torch.equal(module.state_dict()["fc.bias"], teacher.module.state_dict()["fc.bias"])  # its own copy


def test_a_teacher_never_trains() -> None:
    teacher = teacher_of(models.wide_resnet(10, 1).train())
    assert not any(child.training for child in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(2, *SIZE, requires_grad=True)
    teacher(images).sum().backward()
    assert images.grad is not None  # gradients do flow through it


def test_normalisation() -> None:
    teacher = teacher_of(models.wide_resnet(10, 1))
    bytes_ = torch.randint(256, (4, *SIZE), dtype=torch.uint8)
    bytes_[2, 1, 5, 7] = 200  # far from the mean, where the difference would cancel and a relative bound say nothing
    x = teacher.normalise(bytes_)
    assert torch.equal(x, teacher.normalise(bytes_ / 255))
    by_hand = (bytes_[2, 1, 5, 7].item() / 255 - 0.4822) / 0.1994
    assert float(x[2, 1, 5, 7]) == pytest.approx(by_hand, rel=1e-5)
    torch.testing.assert_close(teacher.denormalise(x), bytes_ / 255)
    assert (teacher.denormalise(100 * x.sign()).unique() == torch.tensor([0.0, 1.0])).all()  # clipped
    for kind in (torch.int64, torch.int8, torch.bool):
        with pytest.raises(UsageError, match=r"found torch\.\w+; convert, as in images\.to\(torch\.uint8\)"):
            teacher.normalise(bytes_.to(kind))
    assert teacher.double().normalise(bytes_).dtype == torch.float64


@pytest.mark.parametrize("spec", ["wrn-10-1", "lenet-5-half"])
def test_a_folder_gives_the_same_teacher_back(spec: str, tmp_path: Path) -> None:
    size = (1, 12, 20)
    names = [f'class "{i}" ä' for i in range(7)]
    module = models.build(spec, 7, size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shake_batchnorm(module)
    saved = Classifier(module, input_size=size, mean=[0.1307], std=[1 / 3], class_names=names)
    save_teacher(tmp_path / "t", saved, measured={"accuracy": 0.5})
    loaded = load_network(tmp_path / "t")
    for name, tensor in saved.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor)
    assert (loaded.mean.tolist(), loaded.std.tolist()) == ([[[0.1307]]], [[[1 / 3]]])
    assert (loaded.class_names, loaded.num_classes, loaded.input_size) == (tuple(names), 7, size)
    assert loaded.fingerprint() == saved.fingerprint()
    assert loaded.fingerprint() != make_teacher().fingerprint()
    facts = json.loads((tmp_path / "t" / "teacher.json").read_text())
    assert facts["measured"] == {"accuracy": 0.5}
    assert facts["parameters"] == count_parameters(module)
    assert "already holds a teacher" in refused(lambda: save_teacher(tmp_path / "t", saved))
    save_network(tmp_path / "run", "student", saved)
    assert load_student(tmp_path / "run").fingerprint() == saved.fingerprint()
    assert load_network(tmp_path / "run").fingerprint() == load_network(tmp_path / "t").fingerprint()


def test_a_folder_keeps_every_bit_of_a_double_precision_teacher(tmp_path: Path) -> None:
    saved = teacher_of(models.wide_resnet(10, 1).double())
    save_teacher(tmp_path, saved)
    assert load_network(tmp_path).fingerprint() == saved.fingerprint()


def words_only(value: object) -> str:
    return value if isinstance(value, str) else ""


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def broken() -> nn.Module:
    module = models.wide_resnet(10, 1)
    nn.init.constant_(module.fc.bias[3:4], float("nan"))
    return module


LENET = models.lenet5(input_size=SIZE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: teacher_of(LENET, num_classes=11), "11 classes, found 10"),
        (lambda: teacher_of(LENET, class_names=["a", "b"]), "2 class names, found 10"),
        (lambda: teacher_of(LENET, input_size=(3, 32, 32)), "does not accept images of 3 x 32 x 32"),
        (lambda: teacher_of(LENET, input_size=(1, 16, 16), mean=[0.5], std=[0.5]), "does not accept images of 1 x 16"),
        (lambda: teacher_of(LENET, input_size=(16, 16)), "C H W"),
        (lambda: teacher_of(LENET, mean=[0.5]), "3 channels, found 1 and 3"),
        (lambda: teacher_of(LENET, mean=(125.3, 123.0, 113.9)), "pixels in [0, 1]"),
        (lambda: teacher_of(LENET, std=(0.2, 0.2, 0.0)), "pixels in [0, 1]"),
        (lambda: teacher_of(LENET, std=(0.2, 0.2, float("nan"))), "pixels in [0, 1]"),
        (lambda: teacher_of(broken()), "NaN"),
        (lambda: teacher_of(nn.Conv2d(3, 10, 3)), "shape (2, 10, 14, 14)"),
        (lambda: teacher_of(Pair()), "found tuple"),
        (lambda: teacher_of(nn.Sequential(nn.Flatten(), nn.Linear(768, 1))), "found 1 output"),
        (lambda: check_pair(make_teacher(), models.wide_resnet(10, 1, num_classes=9)), "10 classes, found 9"),
        (lambda: check_pair(make_teacher(), models.lenet5(input_size=(3, 28, 28))), "images of 3 x 16 x 16"),
    ],
    ids=words_only,
)
def test_what_is_no_teacher_is_refused(make: Callable[[], object], words: str) -> None:
    assert words in refused(make)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shorten(f / "teacher.safetensors"), "not a complete safetensors file"),
        (lambda f: (f / "teacher.safetensors").write_bytes(b""), "not a complete safetensors file"),
        (lambda f: (f / "teacher.safetensors").unlink(), "cannot read"),
        (lambda f: (f / "teacher.json").unlink(), "expected a folder with teacher.json"),
        (lambda f: shorten(f / "teacher.json"), "not valid JSON"),
        (lambda f: (f / "teacher.json").write_text("[]"), "expected an object"),
        (lambda f: (f / "teacher.json").write_text("3"), "teacher.json"),
        (lambda f: edit(f / "teacher.json", format=2), "format missing or of the wrong kind"),
        (lambda f: edit(f / "teacher.json", model="wrn-16-1"), "does not fit the wrn-16-1"),
        (lambda f: edit(f / "teacher.json", num_classes=9), "does not fit the wrn-10-1"),
        (lambda f: edit(f / "teacher.json", num_classes="ten"), "teacher.json"),
        (lambda f: edit(f / "teacher.json", model=None, rebuild=None), "describes a Python object"),
        (lambda f: edit(f / "teacher.json", model="os.system"), "unknown model"),
    ],
    ids=words_only,
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    save_teacher(tmp_path, teacher_of(models.wide_resnet(10, 1)))
    load_network(tmp_path)
    damage(tmp_path)
    assert words in refused(lambda: load_network(tmp_path))


def test_a_whole_module_in_a_weights_file_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    assert "wants to run torch.nn.modules.linear.Linear" in refused(lambda: read_weights(tmp_path / "module.pt"))


def test_weights_files_are_read_or_refused(tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0), "n": torch.tensor(5)}
    checkpoint = {"state_dict": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    for name, legacy in (("new.pt", True), ("old.pth", False)):
        torch.save(checkpoint, tmp_path / name, _use_new_zipfile_serialization=legacy)
        found = read_weights(tmp_path / name)
        assert torch.equal(found["state_dict"]["w"], state["w"])
        assert found["args"].lr == 0.1
        shorten(tmp_path / name)
        refused(partial(read_weights, tmp_path / name))
    (tmp_path / "text.pt").write_text("<html>404</html>")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("text.pt", "empty.pt", "absent.pt", "absent.safetensors"):
        assert name in refused(partial(read_weights, tmp_path / name))


HUGE = {"transformers": "ViTForImageClassification", "config": {"hidden_size": 10**5}}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"model": "wrn-16-9999"}, "does not fit the wrn-16-9999"),
        ({"num_classes": 100_000}, "does not fit"),
        ({"model": None, "rebuild": HUGE}, ""),
    ],
)
def test_a_short_file_makes_no_large_network(
    facts: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    save_teacher(tmp_path / "t", make_teacher())
    edit(tmp_path / "t" / "teacher.json", **facts)
    real = nn.Linear.__init__

    def small(self: nn.Linear, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        assert self.weight.is_meta or self.weight.numel() < 10**6

    monkeypatch.setattr(nn.Linear, "__init__", small)
    assert words in refused(lambda: load_network(tmp_path / "t"))


def test_eight_bit_floats_are_widened(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", make_teacher())
    path = tmp_path / "t" / "teacher.safetensors"
    tensors = {n: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    assert torch.equal(load_network(tmp_path / "t").module.state_dict()["fc.weight"], tensors["fc.weight"].float())


class Odd(nn.Module):
    """Like many a student, but for one thing."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        if what == "sparse buffer":
            self.register_buffer("mask", torch.eye(3).to_sparse())

    def train(self, mode: bool = True) -> Any:
        if self.what == "refuses to change":
            raise RuntimeError("no train")
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.what == "fails":
            raise ValueError("cannot\ntrain")
        y = self.fc(self.conv(x).mean(dim=(2, 3)))
        if self.training and self.what == "detaches":
            return y.detach()
        return y[:1] if self.training and self.what == "returns fewer" else y


class Remembers(Odd):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (Odd("fails"), "training mode"),
        (Odd("detaches"), "logits without a gradient"),
        (Odd("returns fewer"), "shape (1, 10)"),
        (Odd("sparse buffer"), "mask"),
        (Remembers(""), "_extra_state"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "without a shape"),
    ],
    ids=["fails", "detaches", "fewer", "sparse", "extra", "lazy"],
)
def test_a_student_is_tried_in_training_mode(student: nn.Module, words: str) -> None:
    random = torch.get_rng_state()
    assert words in refused(lambda: check_pair(make_teacher(), student))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Odd("refuses to change"), "no train"),
        (Odd("sparse buffer"), "mask"),
        (Remembers(""), "_extra_state"),
        (Odd("").to("meta"), "meta device"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "without a shape"),
    ],
    ids=["mode", "sparse", "extra", "meta", "lazy"],
)
def test_a_teacher_remembers_ordinary_tensors(module: nn.Module, words: str) -> None:
    assert words in refused(lambda: teacher_of(module))


def test_names_of_classes_are_text() -> None:
    names = ["\ud800", "a\nb", "\x1b[2J", *"defghij"]
    kept = teacher_of(models.wide_resnet(10, 1), class_names=names).class_names
    assert kept is not None
    assert kept[:3] == (" ", "a b", " [2J")
