"""Files of strangers and slips of one's own: each refused in one line, soon, and without much memory."""

import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zskt
from small import call, coloured, edit, fails, make_teacher, refused, run, student_for, write_images
from zskt.data import decode, images
from zskt.data.images import read
from zskt.errors import UsageError
from zskt.files import MOST_NESTED, read_json, regular, strict_json, write_text
from zskt.method.build import make_generator
from zskt.method.config import MOST_UPDATES, Config
from zskt.networks import rebuild
from zskt.networks.folder import load_network, save_teacher
from zskt.paper.experiments import normalisation
from zskt.run import plots
from zskt.run.checkpoint import read_lines
from zskt.run.plots import class_histograms
from zskt.run.report import write_report
from zskt.settings import replace

SIZES = {
    "steps": 3,
    "batch-size": 8,
    "generator.width": 8,
    "generator.latent": 8,
    "student.updates": 1,
}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", value)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of decoded images."""
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a teacher and a run."""
    root = tmp_path_factory.mktemp("made")
    train = coloured(24, size=(1, 8, 8))
    write_images(root / "data", train=train, test=coloured(9, size=(1, 8, 8), seed=1))
    mean, std = normalisation(train)
    module = zskt.models.convnet(4, num_classes=3, channels=1)
    save_teacher(root / "teacher", zskt.Classifier(module, input_size=(1, 8, 8), mean=mean, std=std))
    run(
        "distill",
        root / "teacher",
        "--student",
        "convnet-2",
        "--out",
        root / "run",
        "--recipe",
        "zskt-prior",
        *TINY,
        "--eval",
        root / "data",
    )
    return root


@pytest.fixture
def teacher(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


# Reads without end or bound

Pipe = Callable[[Path], Path]


@pytest.fixture
def to_pipe() -> Iterator[Pipe]:
    """Puts a pipe in the place of a file; whoever opens it waits for two seconds."""
    writers: list[subprocess.Popen[bytes]] = []

    def make(path: Path) -> Path:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        writers.append(subprocess.Popen(["sh", "-c", 'while sleep 2; do : >> "$0"; done', str(path)]))
        return path

    yield make
    for writer in writers:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("name", ["teacher.json", "teacher.safetensors"])
def test_a_pipe_is_no_part_of_a_teacher(name: str, teacher: Path, to_pipe: Pipe) -> None:
    to_pipe(teacher / name)
    assert f"expected a file at {teacher / name}, found a device, pipe or socket" in fails(1, "inspect", teacher)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "student.json"])
def test_a_pipe_is_no_part_of_a_run(name: str, finished: Path, to_pipe: Pipe) -> None:
    to_pipe(finished / name)
    assert "found a device, pipe or socket" in fails(1, "report", finished)


@pytest.mark.parametrize("name", ["generator.safetensors", "student.safetensors"])
def test_a_pipe_holds_no_tensors(name: str, finished: Path, tmp_path: Path, to_pipe: Pipe) -> None:
    to_pipe(finished / name)
    assert "found a device, pipe or socket" in fails(1, "sample", finished, "--out", tmp_path / "x.png")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt2", ""])
def test_a_pipe_holds_no_network_weights_settings_or_images(
    suffix: str, made: Path, tmp_path: Path, to_pipe: Pipe
) -> None:
    pipe = to_pipe(tmp_path / f"x{suffix}")
    preparation = ["--num-classes", 10, "--input-size", 1, 28, 28, "--mean", 0.5, "--std", 0.5]
    commands: list[list[object]] = [
        ["inspect", pipe],
        ["import", pipe, "--model", "lenet-5", *preparation, "--out", tmp_path / "out"],
        ["evaluate", made / "teacher", "--data", pipe],
        ["distill", made / "teacher", "--student", "convnet-2", "--out", tmp_path / "out", "--config", pipe],
    ]
    for command in commands:
        assert "found a device, pipe or socket" in fails(1, *command)
    assert not (tmp_path / "out").exists()


def test_a_device_is_no_file_however_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (Path("/dev/zero"), tmp_path / "link"):
        assert "found a device" in refused(lambda path=path: regular(path))  # type: ignore[misc]
    assert "found a folder" in refused(lambda: regular(tmp_path))


def test_a_text_of_any_length_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(2**33)  # takes no space on the disk
    assert "expected at most 67,108,864 bytes" in refused(lambda: read_json(tmp_path / "long.json"))


def test_a_link_among_samples_is_not_published(finished: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not for the public")
    (finished / "samples" / "00000009.png").symlink_to(secret)
    before = len((finished / "report.html").read_text().split("<figure>"))
    assert before > 1
    write_report(finished, tmp_path / "report.html")
    assert len((tmp_path / "report.html").read_text().split("<figure>")) == before
    (finished / "samples").rename(tmp_path / "elsewhere")
    (finished / "samples").symlink_to(tmp_path / "elsewhere")
    write_report(finished, tmp_path / "report.html")
    assert "<figure>" not in (tmp_path / "report.html").read_text()


def test_a_config_for_a_large_generator_is_compared_with_its_weights_first(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (finished / "config.toml").read_text()
    assert "width = 8\n" in config
    edit(finished / "student.json", files=None)  # as of a stranger who leaves no checksums
    write_text(finished / "config.toml", config.replace("width = 8\n", "width = 200000\n"))
    made: list[torch.device] = []

    def watched(*given: Any) -> nn.Module:
        made.append(torch.empty(0).device)
        return make_generator(*given)

    monkeypatch.setattr("zskt.run.distill.make_generator", watched)
    assert "does not fit the generator" in fails(1, "sample", finished, "--out", tmp_path / "x.png")
    assert made == [torch.device("meta")]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("count", [10**4, 10**7])
@pytest.mark.parametrize("place", ["config.json", "student.json"])
def test_a_config_of_a_million_layers_is_not_built(
    count: int, place: str, transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    if place == "config.json":
        model.save_pretrained(tmp_path)
        edit(tmp_path / place, num_hidden_layers=count)
    else:
        network = zskt.Classifier(model, input_size=(3, 16, 16), mean=[0.5] * 3, std=[0.5] * 3)
        rebuild_entry = save_student(tmp_path, network)
        rebuild_entry["config"]["num_hidden_layers"] = count
        edit(tmp_path / place, rebuild=rebuild_entry)
    modules: list[nn.Module] = []
    handle = nn.modules.module.register_module_module_registration_hook(lambda module, *_: modules.append(module))
    try:
        line = refused(lambda: zskt.load_teacher(tmp_path))
    finally:
        handle.remove()
    assert ("expected numbers up to 1,000,000" if count > 10**6 else "found a far deeper one") in line
    assert len(modules) < 10**4


def save_student(folder: Path, network: zskt.Classifier) -> dict[str, Any]:
    """Write a student's folder; the entry by which it is built again."""
    from zskt.networks.folder import save_network

    save_network(folder, "student", network)
    entry: dict[str, Any] = json.loads((folder / "student.json").read_text())["rebuild"]
    return entry


def test_every_network_of_ours_has_few_layers_for_its_tensors() -> None:
    for spec in (*zskt.models.SPECS, "wrn-100-1", "convnet-1"):
        most = len(zskt.models.build(spec, 10, (3, 32, 32)).state_dict())
        with rebuild.unallocated(most):
            zskt.models.build(spec, 10, (3, 32, 32))


# Images


@pytest.mark.parametrize("size", [None, (1, 8, 8)])
def test_large_images_are_decoded_one_at_a_time(
    size: tuple[int, int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_LARGE", 100)
    monkeypatch.setattr(decode, "_GROUP_BYTES", 3 * 20 * 20)
    inside, most = 0, 0
    fitted = decode._fitted

    def watched(*arguments: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)  # so that two at a time would be seen
        try:
            return fitted(*arguments)
        finally:
            inside -= 1

    monkeypatch.setattr(decode, "_fitted", watched)
    data = coloured(12, size=(1, 20, 20))
    found = read([str(write_images(tmp_path / "x", test=data))], "test", size=size, notice=lambda line: None)
    assert most == 1
    if size is None:
        assert sorted(map(bytes, found.images.numpy())) == sorted(map(bytes, data.images.numpy()))


def test_images_of_too_many_pixels_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test" / "a" / "1.png"
    path.parent.mkdir(parents=True)
    Image.new("L", (9_000, 8_000)).save(path)
    monkeypatch.setattr(Image.Image, "load", None)
    for size in (None, (1, 8, 8)):
        line = refused(lambda size=size: read([str(tmp_path)], "test", size=size))  # type: ignore[misc]
        assert "expected at most 67,108,864 pixels, found 8000 x 9000" in line


@pytest.mark.parametrize("kind", ["objects", "float", "no array"])
def test_what_is_no_array_of_bytes_in_the_cache_is_decoded_again(kind: str, tmp_path: Path, cache: Path) -> None:
    source = str(write_images(tmp_path / "x", test=coloured(6, size=(1, 8, 8))))
    first = read([source], "test").images.clone()
    (entry,), (about,) = (cache.glob(f"*.{end}") for end in ("npy", "json"))
    entry.unlink()
    values = {"objects": np.array([{}, []], dtype=object), "float": np.zeros(first.shape)}
    entry.write_bytes(b"no array")
    if kind in values:
        np.save(entry, values[kind], allow_pickle=True)
    edit(about, sha256=images._file_digest(entry))
    assert torch.equal(read([source], "test").images, first)


# Names and texts


def test_a_name_that_is_not_utf_8_is_refused(finished: Path, tmp_path: Path) -> None:
    strange = finished.rename(tmp_path / os.fsdecode(b"run\xff"))
    assert "is not UTF-8" in fails(2, "report", strange)
    assert "is not UTF-8" in refused(lambda: zskt.export(zskt.load_student(strange), tmp_path / "x.onnx"), UsageError)


def test_a_report_can_be_written_inside_a_folder_whose_name_is_not_utf_8(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / os.fsdecode(b"here\xff")
    strange.mkdir()
    shutil.move(finished, strange / "run")
    monkeypatch.chdir(strange)
    write_report("run", "report.html")
    monkeypatch.chdir(strange / "run")
    write_report(".", "report.html")


ESCAPE = "\x1b[31m\x1b]0;title\x07"


@pytest.mark.parametrize(
    "arguments", [[ESCAPE], ["distill", f"--{ESCAPE}"], ["bench", "--rounds", ESCAPE], ["inspect", f"x{ESCAPE}"]]
)
def test_escapes_for_terminals_do_not_reach_them(arguments: list[str]) -> None:
    status, _, err = call(*arguments)
    assert status == 2
    assert "\x1b" not in err
    assert "control characters" in err


def test_warnings_of_libraries_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from zskt.cli import main

    def warn() -> dict[str, Any]:
        warnings.simplefilter("always")
        warnings.warn(f"of {ESCAPE} here", stacklevel=1)
        return {}

    monkeypatch.setitem(main.COMMANDS, "recipes", warn)
    before = warnings.showwarning
    status, _, err = call("recipes")
    assert status == 0
    assert "UserWarning: of " in err
    assert "\x1b" not in err
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    "name", [ESCAPE, "\ud800", "$\\frac{a}$", "<b>", "_hidden", "漢字", "\x00", "\u0600", "a" * 10_000]
)
def test_a_class_of_any_name_is_drawn(name: str) -> None:
    assert class_histograms({name: [1, 2]}, [name, "b"], name).startswith(b"\x89PNG")
    beliefs = {"T": torch.eye(2)}
    plots.believed_grid(torch.zeros(2, 1, 8, 8), beliefs, [name, name])


@pytest.mark.parametrize(
    "text",
    ["NaN", "[1e999]", "-Infinity", "9" * 30, "9" * 5_000, '{"a": "\\ud800"}', '{"\\udfff": 1}', "[", "",
     "[" * (MOST_NESTED + 1) + "]" * (MOST_NESTED + 1), "[" * 100_000],
)  # fmt: skip
def test_what_is_no_sound_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        strict_json(text)
    path = tmp_path / "x.json"
    path.write_text(text)
    assert "is not valid JSON" in refused(lambda: read_json(path))


def test_sound_json_is_what_json_says() -> None:
    text = '{"a": [1, -2.5, true, null, "漢", "\\ud83d\\ude00"], "b": {"c": 9223372036854775807}}'
    assert strict_json(text) == json.loads(text)
    assert strict_json("[" * (MOST_NESTED - 1) + "]" * (MOST_NESTED - 1)) is not None


@pytest.mark.parametrize(
    "entry",
    [{"class_counts": []}, {"class_counts": [-1, 2, 3]}, {"class_counts": [[1]]}, {"class_counts": 3},
     {"class_counts": [0.5, 1, 1]}, {"student_loss": []}, {"student_loss": 1.0}, {"student_loss": {}},
     {"x_loss": ["a"]}, {"student_terms": [1]}, {"student_terms": {"kl": "a"}}, {"accuracy": "a"},
     {"accuracy": [1]}, {"accuracy": True}, {"accuracy": None}, {"warnings": "a"}, {"warnings": [1]},
     {"step": "a"}, {"step": None}, {"accuracy": 10**400}, {"agreement": {"a": 1}}],
)  # fmt: skip
def test_a_log_with_an_odd_entry_is_damaged(entry: dict[str, Any], finished: Path) -> None:
    path = finished / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | entry)
    path.write_text("\n".join(lines) + "\n")
    assert f"line 2 of {path} is damaged" in fails(1, "report", finished)


def test_every_line_of_a_run_is_sound(finished: Path) -> None:
    assert len(read_lines(finished / "metrics.jsonl")) == 3
    assert len(read_lines(finished / "timing.jsonl")) == 3


# Settings that cannot be meant


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.loss.kl": -1.0}, "student.loss.kl = -1.0: expected 0 or a positive weight"),
        ({"student.loss.attention": -250.0}, "student.loss.attention = -250.0"),
        ({"generator.loss.kl": 1.0}, "generator.loss.kl = 1.0: expected 0 or a negative weight"),
        ({"generator.loss.l1": 1.0}, "generator.loss.l1 = 1.0"),
        ({"generator.loss.batchnorm": -1.0}, "generator.loss.batchnorm = -1.0: expected 0 or a positive weight"),
        ({"student.loss.temperature": 1e300}, "student.loss.temperature = 1e+300: expected 0 or a number from 1e-30"),
        ({"student.loss.kl": 1e-308}, "student.loss.kl = 1e-308: expected 0 or a number from 1e-30 to 1e30"),
        ({"student.updates": MOST_UPDATES + 1}, "student.updates = 100,001: expected at most 100,000"),
        ({"generator.updates": 10**9}, "generator.updates = 1,000,000,000: expected at most"),
    ],
)
def test_wrong_signs_and_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: replace(Config(), changes), UsageError)


PICTURES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


@pytest.mark.parametrize(
    ("pictures", "labels", "words"),
    [
        (PICTURES * 255, LABELS, "expected floating-point images in [0, 1], found"),
        (PICTURES - 0.5, LABELS, "expected floating-point images in [0, 1], found"),
        (PICTURES * float("nan"), LABELS, "found nan to nan"),
        ((PICTURES * 255).long(), LABELS, "expected images of uint8 or floating point, found torch.int64"),
        (PICTURES, LABELS.double(), "expected labels as class numbers (M,), found shape (6,) of torch.float64"),
        (PICTURES, nn.functional.one_hot(LABELS), "found shape (6, 3) of torch.int64; of one-hot labels"),
        (PICTURES, LABELS.bool(), "expected labels as class numbers"),
        (PICTURES.numpy(), LABELS, "expected images as a torch.Tensor, found ndarray"),
        (PICTURES, LABELS.numpy(), "expected labels as a torch.Tensor, found ndarray"),
        (PICTURES, LABELS.tolist(), "expected labels as a torch.Tensor, found list"),
    ],
)
def test_images_and_labels_of_other_kinds_are_refused(pictures: Any, labels: Any, words: str) -> None:
    small = make_teacher(student_for(make_teacher(size=(1, 8, 8))), size=(1, 8, 8))
    settings = {"batch_size": 8, "generator.width": 8}

    def distil(pictures: Tensor, labels: Tensor) -> object:
        return zskt.distill(
            small, student_for(small), "zskt-fresh", steps=1, settings=settings, evaluate=(pictures, labels)
        )

    assert words in refused(lambda: distil(pictures, labels))


@pytest.mark.parametrize(
    "command",
    [lambda run, out: ["sample", run, "--out", out], lambda run, out: ["report", run, "--out", out]],
)
def test_pictures_and_reports_replace_no_other_file(command: Callable[..., list[object]], finished: Path) -> None:
    weights = finished / "student.safetensors"
    before = weights.read_bytes()
    assert "expected a name that ends in" in fails(2, *command(finished, weights))
    assert weights.read_bytes() == before


def test_the_last_update_counts_too(made: Path, tmp_path: Path) -> None:
    """A student that diverges after the last loss was logged is no success."""
    settings = {
        "steps": 40, "batch_size": 8, "generator.width": 8, "student.optimizer": "sgd", "student.learning_rate": 1e4,
        "student.clip": 0.0, "log_every": 1_000, "evaluate_every": 1_000, "checkpoint_every": 1_000,
    }  # fmt: skip
    network = load_network(made / "teacher")
    with pytest.raises(zskt.ZsktError, match="has diverged"):
        zskt.distill(network, student_for(network), "zskt-fresh", settings=settings)
