"""Mutated files and command lines: whatever they hold, one line and an exit status, soon, and nothing executed.

    python tests/fuzz.py --cases 10000

Every case is a command of `zskt` in a process forked from this one, on a copy of the files of one format, one of which
is mutated, or with a mutated command line. `check` names what must hold. The last line on stdout is JSON: the cases and
their exit statuses by format, and the failures, whose files are kept.
"""

import argparse
import contextlib
import functools
import gc
import gzip
import io
import json
import os
import pickle
import posix
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from PIL import Image

import zskt
from small import Payload, coloured, run, write_images
from zskt.cli.main import main
from zskt.files import read_tensors, write_tensors
from zskt.networks.folder import save_teacher
from zskt.run.checkpoint import DIVERGED, HALF_WAY
from zskt.run.without_data import FILE

SECONDS = 5  # of processor time
MEMORY = 2**30  # bytes beyond what is imported
SIZE = (1, 8, 8)
TINY = "--batch-size 4 --generator.width 4 --generator.latent 4 --generator.updates 1 --student.updates 1"
MATCHING = ["--recipe", "zskt-prior"]
LONG = ["--steps", "6", "--checkpoint-every", "2"]


@dataclass(frozen=True)
class Outcome:
    """What a command did in a process of its own."""

    status: int  # negative: the signal that killed it
    out: bytes
    err: bytes
    memory: int  # bytes beyond those it began with
    started: bytes  # processes, connections and modules of others, one a line

    def problem(self) -> str:
        """What is wrong with it, or nothing."""
        if self.status not in (0, 1, 2):
            return f"exit {self.status}" if self.status > 0 else f"killed by {signal.Signals(-self.status).name}"
        if b"Traceback" in self.err or b"please report it" in self.err:
            return "an unexpected error"
        if self.status and self.out:
            return "a result beside an error"
        if self.status == 1 and self.err.count(b"\nzskt: ") + self.err.startswith(b"zskt: ") != 1:
            return "not one line"
        if any(byte < 32 and byte != 10 for byte in self.err):
            return "control characters"
        if self.memory > MEMORY:
            return f"{self.memory / 2**20:,.0f} MiB"
        return f"started {self.started!r}" if self.started else ""


WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")


def forked(arguments: Sequence[object]) -> Outcome:
    """A command in a fork of this process, which has everything imported."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as events:
        pid = os.fork()
        if pid == 0:
            _child([str(argument) for argument in arguments], out.fileno(), err.fileno(), events.fileno())
        _, status, used = os.wait4(pid, 0)
        texts = []
        for file in (out, err, events):
            file.seek(0)
            texts.append(file.read())
    before, _, started = texts[2].partition(b"\n")
    memory = used.ru_maxrss * 1024 - int(before)
    return Outcome(os.waitstatus_to_exitcode(status), texts[0], texts[1], memory, started)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _child(arguments: list[str], out: int, err: int, events: int) -> None:
    def watch(event: str, _: object) -> None:
        if event in WATCHED:
            os.write(events, event.encode() + b"\n")

    status = 99
    os.write(events, b"%d\n" % _resident())
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), errors="backslashreplace")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(12 * SECONDS)  # for what sleeps; the machine may be busy
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        sys.addaudithook(watch)
        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        posix._exit(status)  # not os._exit, in which coverage would save what all tests before have covered


# Mutations


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content of a file, changed in one of many ways."""
    data = bytearray(content)

    def place() -> int:
        head = rng.random() < 0.5  # where headers are
        return rng.randrange(max(1, min(len(data), 256) if head else len(data)))

    def flip() -> None:
        for _ in range(rng.choice((1, 1, 1, 4, 30))):
            if data:
                data[place()] = rng.randrange(256)

    def cut() -> None:
        del data[place() :]

    def drop() -> None:
        at = place()
        del data[at : at + rng.choice((1, 4, 100))]

    def insert() -> None:
        at = place()
        data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))

    def repeat() -> None:
        at, length = place(), rng.choice((4, 50, 500))
        data[at:at] = data[at : at + length] * rng.choice((1, 20))

    def extreme() -> None:
        at, width = place(), rng.choice((1, 2, 4, 8))
        number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**6)) % 2 ** (8 * width)
        data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))

    def clear() -> None:
        at = place()
        data[at : at + 64] = bytes(min(64, len(data) - at))

    rng.choice((flip, flip, flip, cut, drop, insert, repeat, extreme, extreme, clear))()
    return bytes(data)


ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 10**9, 10**30, 0.5, -0.0, 1e300, 1e-320, float("inf"), float("nan")]
ODD += ["", "a", "\x1b[31m", "\ud800", "é" * 300, "wrn-9999-9999", "lenet-5", "/dev/zero", "..", "NaN"]
ODD += [[], {}, [[]], [None], [1e999], {"a": {}}, ["a"] * 50, [0] * 50]


def resealed(content: bytes, rng: random.Random) -> bytes:
    """A checkpoint whose metadata are odd and whose checksum is right, as somebody who means it would make it."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "checkpoint.safetensors")
        path.write_bytes(content)
        tensors, texts = read_tensors(path)
        odd = json_mutated(texts["metadata"].encode(), rng).decode(errors="surrogateescape")
        write_tensors(path, tensors, {"metadata": odd})
        return path.read_bytes()


def json_mutated(content: bytes, rng: random.Random) -> bytes:
    """A JSON text, or one line of JSON lines, with a value replaced by an odd one, taken out, or put elsewhere."""
    try:
        lines = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        lines = [json.loads(content)]
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            visit(value[key])

    visit(lines)
    holder, key = rng.choice(places)
    if rng.random() < 0.15:
        del holder[key]
    elif rng.random() < 0.1:
        other, there = rng.choice(places)
        with contextlib.suppress(LookupError, TypeError):
            holder[key] = other[there]
    else:
        holder[key] = rng.choice(ODD)
    try:
        return b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
    except (ValueError, RecursionError):  # put into itself
        return b"{}"


def toml_mutated(content: bytes, rng: random.Random) -> bytes:
    """A TOML text with a line changed, repeated, moved or taken out."""
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    name = lines[at].partition("=")[0]
    odd = [*map(json.dumps, ODD), "nan", "inf", "1979-05-27", "'''", "[", "{}", "0x1p3", "[[x]]", "1" * 5_000]
    choice = rng.randrange(5)
    if choice < 3:
        lines[at] = f"{name}= {rng.choice(odd)}"
    elif choice == 3:
        lines.insert(rng.randrange(len(lines)), lines[at])
    else:
        lines[at] = rng.choice(odd)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def arguments_mutated(arguments: Sequence[object], rng: random.Random) -> list[str]:
    """A command line with one to three arguments replaced, added or taken out; the last two are kept."""
    words = [str(argument) for argument in arguments]
    odd = [*ODD_WORDS, *words]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(max(1, len(words) - 2))
        words[at : at + rng.choice((0, 1, 1))] = rng.choice(([], [rng.choice(odd)], [rng.choice(odd)]))
    return [word.replace("\0", "") for word in words]


ODD_WORDS = ["", "-", "--", "-1", "0", "1e999", "nan", "9" * 40, "a=b", "=", "\x1b[31m", os.fsdecode(b"\xff"), "/", "."]
ODD_WORDS += ["/dev/null", "/dev/zero", "é", "{", "--help", "--student", "--set", "student.loss.kl=-1", "steps=x"]
ODD_WORDS += [
    "seed=[1]",
    "--trust",
    "--resume",
    "--method",
    "os:system",
    "--recipe",
    "bank",
    "--budget",
    "1s",
    "timm:x",
]

# What is read


@dataclass(frozen=True)
class Format:
    """Files that a command reads: `make` writes them to a folder, `mutable` matches those that are mutated."""

    make: Callable[[Path], object]
    mutable: str
    command: Sequence[str]  # {} is the folder, {out} a place for output
    mutations: Sequence[Callable[[bytes, random.Random], bytes]] = (mutated,)


def formats(root: Path) -> dict[str, Format]:
    """Every format that is read, with small examples made in `root`."""
    data, teacher, finished = root / "data", root / "teacher", root / "run"
    train = coloured(12, size=SIZE)
    write_images(data, train=train, test=coloured(6, size=SIZE, seed=1))
    torch.manual_seed(0)
    module = zskt.models.convnet(2, num_classes=3, channels=1)
    network = zskt.Classifier(module, input_size=SIZE, mean=[0.5], std=[0.25], class_names=train.class_names)
    save_teacher(teacher, network)
    tiny = TINY.split()
    run("distill", teacher, "--student", "convnet-1", "--out", finished, *MATCHING, *tiny, *LONG)
    begun = ["distill", teacher, "--student", "convnet-1", "--out", root / "begun", *MATCHING, *tiny, *LONG]
    run(*begun, "--stop-after", 3)
    bank = ["--recipe", "bank", "--set", "bank.rounds=2", "bank.warmup=1", "bank.batch_size=4", "bank.random_crop=1"]
    bank += [*tiny, "--steps", "6", "--checkpoint-every", "3"]
    run("distill", teacher, "--student", "convnet-1", "--out", root / "begun bank", *bank, "--stop-after", 4)
    further = ["--stop-after", "1"]  # all is read by then, and what is drawn at the end takes seconds
    run("inspect", finished, "--teacher", teacher)
    run("evaluate", teacher, "--data", data)  # fills the cache
    evaluate = ["evaluate", str(teacher), "--data", "{}"]
    texts, settings, images = (mutated, json_mutated, json_mutated), (mutated, toml_mutated), {}

    def copy(source: Path) -> Callable[[Path], object]:
        return functools.partial(shutil.copytree, source, dirs_exist_ok=True)

    def pictures(suffix: str, folder: Path) -> None:
        for label, name in enumerate(train.class_names):
            path = folder / "test" / name / f"1.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(train.images[label, 0].numpy()).save(path)

    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff", "pgm"):
        images[suffix] = Format(functools.partial(pictures, suffix), f"test/*/1.{suffix}", evaluate)
    evaluate_run = ["evaluate", "{}", "--data", str(data)]
    resume = ["distill", str(teacher), "--student", "convnet-1", "--out", "{}", "--resume", *MATCHING, *tiny, *LONG]
    imported = ["import", "{}/w", "--model", "convnet-2", "--num-classes", "3", "--input-size", "1", "8", "8"]
    imported += ["--mean", ".5", "--std", ".25", "--out", "{out}"]
    distill = [
        "distill",
        str(teacher),
        "--student",
        "convnet-1",
        "--out",
        "{out}",
        "--config",
        "{}/c.toml",
        "--steps",
        "1",
        *tiny,
    ]
    found = {
        "teacher.json": Format(copy(teacher), "teacher.json", ["evaluate", "{}", "--data", str(data)], texts),
        "safetensors": Format(copy(teacher), "teacher.safetensors", ["evaluate", "{}", "--data", str(data)]),
        "student.json": Format(copy(finished), "student.json", ["report", "{}", "--out", "{out}.html"], texts),
        "metrics.jsonl": Format(copy(finished), "metrics.jsonl", ["report", "{}", "--out", "{out}.html"], texts),
        "config.toml": Format(copy(finished), "config.toml", ["sample", "{}", "--out", "{out}.png"], settings),
        "generator": Format(copy(finished), "generator.safetensors", ["sample", "{}", "--out", "{out}.png"]),
        "checkpoint": Format(copy(root / "begun"), "checkpoint/*", [*resume, *further]),
        "bank": Format(copy(root / "begun bank"), "checkpoint/*", [*resume[:7], *bank, *further]),
        "rows of a bank": Format(copy(root / "begun bank"), "rows/*", [*resume[:7], *bank, *further]),
        "found without data": Format(copy(finished), FILE, ["report", "{}", "--out", "{out}.html"], texts),
        "half-way": Format(copy(finished), f"{HALF_WAY}.safetensors", ["inspect", "{}", "--teacher", str(teacher)]),
        "cache": Format(
            lambda folder: shutil.copytree(root / "cache", folder / "cache"), "cache/*", [*evaluate[:-1], str(data)]
        ),
        "command.json": Format(
            copy(root / "begun"), "command.json", ["distill", "--resume", "--out", "{}", *further], texts
        ),
        "resumed log": Format(copy(root / "begun"), "*.jsonl", [*resume, *further], texts),
        "settings file": Format(
            lambda folder: shutil.copy(finished / "config.toml", folder / "c.toml"), "c.toml", distill, settings
        ),
        "torch zip": Format(functools.partial(_torch, module, True), "w", imported),
        "torch pickle": Format(functools.partial(_torch, module, False), "w", imported),
        "payload": Format(functools.partial(_payload, root / "canary"), "w", imported),
        "exported": Format(functools.partial(_exported, module), "x.pt2", ["inspect", "{}/x.pt2"]),
        "zip": Format(functools.partial(_zip, data), "x.zip", [*evaluate[:-1], "{}/x.zip"]),
        "tar.gz": Format(functools.partial(_tar, data), "x.tar.gz", [*evaluate[:-1], "{}/x.tar.gz"]),
        "idx": Format(functools.partial(_idx, ""), "*ubyte*", evaluate),
        "idx.gz": Format(functools.partial(_idx, ".gz"), "*ubyte*", evaluate),
        "cifar pickle": Format(functools.partial(_cifar, False), "test_batch", evaluate),
        "cifar binary": Format(functools.partial(_cifar, True), "test_batch.bin", evaluate),
        "svhn": Format(_svhn, "test_32x32.mat", evaluate),
        **images,
        "stopped run": Format(copy(root / "begun"), "checkpoint/*", evaluate_run, (mutated, resealed, resealed)),
    }
    with contextlib.suppress(ImportError):
        found["Hugging Face"] = _hugging_face(root, data)
    return found


SELDOM = dict.fromkeys(("student.json", "metrics.jsonl", "found without data", "half-way"), 1)
SELDOM |= dict.fromkeys(("checkpoint", "resumed log", "settings file", "bank", "rows of a bank", "command.json"), 1)
"""Formats whose commands take long, as they draw or train."""


def _torch(module: torch.nn.Module, zipped: bool, folder: Path) -> None:
    torch.save({"state_dict": module.state_dict()}, folder / "w", _use_new_zipfile_serialization=zipped)


def _payload(canary: Path, folder: Path) -> None:
    torch.save({"state_dict": Payload(canary)}, folder / "w", _use_new_zipfile_serialization=False)


def _exported(module: torch.nn.Module, folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.pt2", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
        archive.writestr("x/models/model.json", "{}")


def _zip(data: Path, folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in data.rglob("*.png"):
            archive.write(path, path.relative_to(data))


def _tar(data: Path, folder: Path) -> None:
    with tarfile.open(folder / "x.tar.gz", "w:gz") as archive:
        archive.add(data, "data")


def _idx(suffix: str, folder: Path) -> None:
    train = coloured(6, size=SIZE)
    packed = gzip.compress if suffix else bytes
    head = bytes([0, 0, 8])
    shape = np.array([6, 8, 8], ">u4").tobytes()
    (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(
        packed(head + b"\3" + shape + train.images.numpy().tobytes())
    )
    labels = train.labels.numpy().astype(np.uint8).tobytes()
    (folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(packed(head + b"\1" + shape[:4] + labels))


def _cifar(binary: bool, folder: Path) -> None:
    images, labels = np.zeros((4, 3072), np.uint8), [0, 1, 2, 1]
    content = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    if not binary:
        content = pickle.dumps({b"data": images, b"labels": labels}, protocol=2)
    (folder / ("test_batch.bin" if binary else "test_batch")).write_bytes(content)


def _svhn(folder: Path) -> None:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.array([[1], [2], [10], [1]], np.uint8)})
    (folder / "test_32x32.mat").write_bytes(buffer.getvalue())


def _hugging_face(root: Path, data: Path) -> Format:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4, image_size=8, patch_size=4,
        num_channels=1, id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(root / "vit")
    facts = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(facts | {"size": {"height": 8, "width": 8}}))
    copy = functools.partial(shutil.copytree, root / "vit", dirs_exist_ok=True)
    return Format(copy, "*config.json", ["evaluate", "{}", "--data", str(data)], (mutated, json_mutated, json_mutated))


def command_lines(root: Path) -> list[list[str]]:
    """Commands that work, to be mutated; each ends in what keeps it short."""
    teacher, finished, data, out = (str(root / name) for name in ("teacher", "run", "data", "out"))
    distill = ["distill", teacher, "--student", "convnet-1", "--out", out, "--steps", "1", *MATCHING, *TINY.split()]
    return [
        ["evaluate", teacher, "--teacher", finished, "--data", data],
        ["report", finished, "--out", f"{out}.html"],
        ["sample", finished, "--teacher", teacher, "--seed", "1", "--out", f"{out}.png"],
        ["recipes", "zskt", "--", ""],
        [*distill, "--stop-after", "1"],
        [*distill, "--set", "student.loss.kl=2", "student.optimizer=sgd", "--stop-after", "1"],
        ["import", f"{teacher}/teacher.safetensors", "--model", "convnet-2", "--num-classes", "3", "--input-size", "1",
         "8", "8", "--mean", ".5", "--std", ".25", "--out", out],
    ]  # fmt: skip


# The cases


@dataclass
class Fuzzer:
    """Runs cases, each of which follows from its number alone."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        os.environ["ZSKT_CACHE"] = str(self.root / "cache")
        self.formats = formats(self.root)
        self.lines = command_lines(self.root)
        self.canary = self.root / "canary"
        self.before = self.content()
        gc.freeze()  # a collection in a fork would touch, and so copy, all that was imported: two thirds of its time

    def content(self) -> set[str]:
        """The files that no case may change or add to."""
        kept = [path for path in self.root.rglob("*") if "cache" not in path.parts and "case" not in path.parts]
        return {f"{path} {path.stat().st_size}" for path in kept if not path.is_dir()}

    def make(self, name: str, folder: Path) -> None:
        """Write the files of a format, and have the cache of images where they are if it is one of them."""
        self.formats[name].make(folder)
        os.environ["ZSKT_CACHE"] = str(folder / "cache" if name == "cache" else self.root / "cache")

    def case(self, number: int) -> tuple[str, int, str]:
        """The format, exit status and problem of a case."""
        rng = random.Random(number)
        shutil.rmtree(self.root / "case", ignore_errors=True)
        folder, out = self.root / "case" / "in", self.root / "case" / "out"
        folder.mkdir(parents=True)
        names = [*self.formats, "command line"]
        (name,) = rng.choices(names, [{"command line": 6, **SELDOM}.get(name, 3) for name in names])
        if name == "command line":
            line = [word.replace(str(self.root / "out"), str(out)) for word in rng.choice(self.lines)]
            arguments = arguments_mutated(line, rng)
        else:
            form = self.formats[name]
            self.make(name, folder)
            path = rng.choice(sorted(folder.glob(form.mutable)))
            path.write_bytes(rng.choice(form.mutations)(path.read_bytes(), rng))
            shutil.copytree(folder, folder.with_name("kept"))
            arguments = [word.replace("{}", str(folder)).replace("{out}", str(out)) for word in form.command]
        outcome = forked(arguments)
        if outcome.status in (-signal.SIGKILL, -signal.SIGXCPU):  # a busy machine, unless it is so again
            shutil.rmtree(out, ignore_errors=True)
            if name != "command line":
                shutil.copytree(folder.with_name("kept"), folder, dirs_exist_ok=True)
            outcome = forked(arguments)
        problem = outcome.problem() or self.left_behind(out, outcome.status)
        if problem:
            problem += f": {' '.join(arguments)!r}: {outcome.err[-300:]!r}"
        return name, outcome.status, problem

    def left_behind(self, out: Path, status: int) -> str:
        """What a command left that it should not have."""
        if self.canary.exists():
            self.canary.rmdir()
            return "code was executed"
        if half := [path for path in out.parent.rglob(".*") if path.suffix == ".tmp" or path.name.startswith(".out")]:
            return f"left {half[0]}"
        aside = (out / DIVERGED).exists()  # the state of a run that diverged is kept
        if status and not aside and (there := [path for path in out.parent.glob("out*")]):
            return f"failed and left {there[0]}"
        return ""


def fuzz(fuzzer: Fuzzer, cases: range, seconds: float = float("inf"), keep: Path | None = None) -> dict[str, Any]:
    """Run cases until they end or the time does; counts, and the failures by the number of their case."""
    started = time.monotonic()
    counts: dict[str, Counter[int]] = {}
    failures: dict[int, str] = {}
    done = 0
    for number in cases:
        if time.monotonic() - started > seconds:
            break
        name, status, problem = fuzzer.case(number)
        counts.setdefault(name, Counter())[status] += 1
        done += 1
        if done % 500 == 0:
            print(f"{done:,} of {len(cases):,} cases", file=sys.stderr, flush=True)
        if problem:
            failures[number] = f"{name}: {problem}"
            print(f"case {number}: {name}: {problem}", file=sys.stderr, flush=True)
            if keep is not None:
                shutil.copytree(fuzzer.root / "case", keep / str(number), dirs_exist_ok=True)
    if changed := fuzzer.content() ^ fuzzer.before:
        failures[-1] = f"changed outside: {sorted(changed)[:3]}"
    return {
        "cases": done,
        "failures": failures,
        "statuses": {name: {str(k): n for k, n in sorted(counts[name].items())} for name in sorted(counts)},
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases = range(given.first, given.first + given.cases)
        result = fuzz(Fuzzer(Path(scratch)), cases, given.seconds, given.keep)
    print(json.dumps(result))
    sys.exit(bool(result["failures"]))
