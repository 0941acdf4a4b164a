"""A run: exact resume, evaluation without effect, no data, nothing changed that is not the student."""

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zskt
from small import make_teacher, refused
from zskt.errors import UsageError
from zskt.files import replacing
from zskt.method import recipe
from zskt.method.generator import SAMPLES
from zskt.method.protocol import Make
from zskt.method.recipe import load_recipe
from zskt.networks import checks, models
from zskt.run import checkpoint
from zskt.run.checkpoint import HALF_WAY, Interrupted, read_lines
from zskt.run.distill import DistillResult, distill, sampler
from zskt.run.lifecycle import Event
from zskt.run.shards import saved_rows
from zskt.runtime import stream

TINY = {"steps": 6, "batch_size": 8, "generator.width": 8, "generator.latent": 12, "student.updates": 2}
KEEP = {"log_every": 1, "checkpoint_every": 2, "evaluate_every": 3}


class WithDropout(nn.Module):
    """A student whose updates draw global random numbers, with stages like a WRN's."""

    stages = ("block1", "block2", "block3")

    def __init__(self) -> None:
        super().__init__()
        base = models.wide_resnet(10, 1)
        self.conv1, self.block1, self.block2, self.block3 = base.conv1, base.block1, base.block2, base.block3
        self.dropout = nn.Dropout(0.3)
        self.fc = base.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.block3(self.block2(self.block1(self.conv1(x)))).mean(dim=(2, 3))))


MLP = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
"""A network without stages."""


def new_student(kind: str = "wrn") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return WithDropout() if kind == "dropout" else models.wide_resnet(10, 1)


def run(out: Path | None, student: nn.Module | None = None, recipe: str = "zskt", **options: Any) -> DistillResult:
    """A distillation that takes milliseconds, by default of a WRN into a WRN."""
    return distill(make_teacher(), student or new_student(), recipe, out=out, **{"settings": TINY} | options)


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=rng, dtype=torch.uint8), torch.arange(count) % 10


PARTS = ("steps", "student", "step", "sample", "modules", "optimisers", "state_dict", "load_state_dict", "close")


def own(change: Callable[[Any], dict[str, Any]]) -> Make:
    """Belief matching as a method of one's own, with other parts; None leaves one out."""

    def make(teacher: zskt.Classifier, student: nn.Module, config: zskt.Config) -> Any:
        method = zskt.belief_matching(teacher, student, config)
        parts = {part: getattr(method, part) for part in PARTS} | change(method)
        return SimpleNamespace(**{name: part for name, part in parts.items() if part is not None})

    return make


class Killed(Exception):
    """Stands for a process that dies between two checkpoints."""


def die_at(step: int) -> Any:
    def callback(event: Event) -> None:
        if event.step == step:
            raise Killed

    return callback


def contents(folder: Path) -> dict[str, Any]:
    """All that must be equal after an exact resume."""
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("student", "generator")}
    return files | {"metrics": (folder / "metrics.jsonl").read_bytes(), "config": (folder / "config.toml").read_bytes()}


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["metrics"] == second["metrics"]
    assert first["config"] == second["config"]
    for network in ("student", "generator"):
        assert first[network].keys() == second[network].keys()
        for name, tensor in first[network].items():
            assert torch.equal(tensor, second[network][name]), name


@pytest.mark.parametrize(
    ("recipe", "kind", "settings"),
    [
        ("zskt", "wrn", {"machine.memory_format": "channels_last", "machine.fused": True}),
        ("zskt", "wrn", {"machine.memory_format": "contiguous", "machine.fused": True}),
        ("zskt", "wrn", {"machine.memory_format": "channels_last", "machine.fused": False}),
        ("zskt", "dropout", {"machine.memory_format": "contiguous", "machine.fused": False}),
        ("zskt-mmrazor", "wrn", {"machine.memory_format": "channels_last", "student.learning_rate": 0.01}),
        ("zskt-prior", "dropout", {"replay.kind": "buffer", "replay.capacity": 3}),
        ("zskt-fresh", "wrn", {"machine.precision": "bf16"}),
    ],
)
def test_resume_is_bitwise_equal(recipe: str, kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": recipe, "settings": TINY | KEEP | settings, "evaluate": images()}
    run(tmp_path / "whole", new_student(kind), **options)
    with pytest.raises(Killed):  # at step 5: one logged step newer than the checkpoint of step 4
        run(tmp_path / "parts", new_student(kind), callbacks=[die_at(5)], **options)
    assert read_lines(tmp_path / "parts" / "metrics.jsonl")[-1]["step"] == 5
    torch.rand(100)  # somebody else draws random numbers in between
    assert run(tmp_path / "parts", new_student(kind), resume=True, **options).finished
    assert_equal(contents(tmp_path / "whole"), contents(tmp_path / "parts"))


def test_stop_after_leaves_and_goes_on(tmp_path: Path) -> None:
    settings = TINY | KEEP
    run(tmp_path / "whole", settings=settings)
    part = run(tmp_path / "parts", settings=settings, stop_after=3)
    assert (part.finished, part.step) == (False, 3)
    assert not (tmp_path / "parts" / "student.json").exists()
    with pytest.raises(zskt.ZsktError, match="has not finished"):
        zskt.load_student(tmp_path / "parts")
    part = run(tmp_path / "parts", settings=settings, stop_after="0.001s", resume=True)
    assert (part.finished, part.step) == (False, 4)
    run(tmp_path / "parts", settings=settings, resume=True)
    assert_equal(contents(tmp_path / "whole"), contents(tmp_path / "parts"))


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    settings = TINY | KEEP
    run(tmp_path / "whole", settings=settings)
    run(tmp_path / "parts", settings=settings, stop_after=5)
    kept = sorted((tmp_path / "parts" / "checkpoint").iterdir())
    assert [path.name for path in kept] == ["00000004.safetensors", "00000005.safetensors"]
    kept[-1].write_bytes(kept[-1].read_bytes()[:1000])
    run(tmp_path / "parts", settings=settings, resume=True)
    assert_equal(contents(tmp_path / "whole"), contents(tmp_path / "parts"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(signum: signal.Signals, tmp_path: Path) -> None:
    def ask(event: Event) -> None:
        if event.step == 3:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="continue with --resume") as caught:
        run(tmp_path / "run", callbacks=[ask])
    assert caught.value.status == 128 + signum
    assert signal.getsignal(signum) is before
    assert max(path.name for path in (tmp_path / "run" / "checkpoint").iterdir()) == "00000003.safetensors"


def test_evaluation_leaves_the_student_bit_identical(tmp_path: Path) -> None:
    students = []
    for evaluate, every in ((None, 6), (images(), 1)):
        student = new_student("dropout")
        run(tmp_path / str(every), student, settings=TINY | {"evaluate_every": every}, evaluate=evaluate)
        students.append(student.state_dict())
    assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())
    assert len(list((tmp_path / "1" / "samples").iterdir())) == 6


def test_a_method_that_seeds_global_random_numbers_for_its_samples_changes_nothing() -> None:
    def sample(method: Any) -> dict[str, Any]:
        return {"sample": lambda n, seed: (torch.manual_seed(seed), method.sample(n, seed))[1]}

    students = [new_student("dropout") for _ in range(2)]
    for student, every in zip(students, (1, 6), strict=True):
        distill(make_teacher(), student, method=own(sample), settings=TINY | {"evaluate_every": every})
    assert torch.equal(*(student.get_parameter("fc.weight") for student in students))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda method: dict.fromkeys(PARTS), "make, found SimpleNamespace without step, modules, optimisers"),
        (lambda method: {"close": None}, r"make, found SimpleNamespace without close; return .* zskt\.Method"),
        (lambda method: {"modules": dict}, 'expected the given student as `student` and as "student" in modules'),
        (lambda method: {"student": MLP}, "expected the given student as `student`"),
        (
            lambda method: {"modules": lambda: method.modules() | {"method": method.generator}},
            r"'method' in modules\(\) of the method from .*make is reserved",
        ),
        (
            lambda method: {"step": lambda: {"student": 1.0}},
            r"tensors by name from SimpleNamespace\.step, found .*1\.0",
        ),
        (lambda method: {"step": lambda: None}, r"SimpleNamespace\.step, found None"),
    ],
)
def test_an_incomplete_method_is_refused_at_once(
    change: Callable[[Any], dict[str, Any]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(zskt.ZsktError, match=words):
        distill(make_teacher(), new_student(), method=own(change), settings=TINY, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_given_beside_a_plan() -> None:
    teacher, student = make_teacher(), new_student()
    planned = recipe.plan(teacher, student, "zskt", TINY)
    with pytest.raises(zskt.UsageError, match="a Plan already has steps and settings"):
        distill(teacher, student, planned, steps=7, settings={})


def test_the_users_teacher_comes_back_as_it_was() -> None:
    module = models.wide_resnet(10, 2)
    module.block1.train()
    module.fc.requires_grad_(False)
    module.train()
    module.bn1.eval()
    handle = module.fc.register_forward_hook(lambda *_: None)
    state = {name: (t.clone(), t.stride()) for name, t in module.state_dict().items()}

    def flags() -> list[object]:
        modes = [(m.training, len(m._forward_hooks)) for m in module.modules()]
        return [*modes, *(p.requires_grad for p in module.parameters())]

    before = flags()
    teacher = zskt.Classifier(module, input_size=(3, 16, 16), mean=[0.5] * 3, std=[0.25] * 3)
    teacher_state = copy.deepcopy(teacher.state_dict())
    strides = [p.stride() for p in teacher.parameters()]
    distill(teacher, new_student(), "zskt-prior", settings=TINY)
    assert [p.stride() for p in teacher.parameters()] == strides
    assert all(torch.equal(teacher_state[name], t) for name, t in teacher.state_dict().items())
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name][0])
        assert tensor.stride() == state[name][1]
    assert flags() == before
    handle.remove()


def test_process_wide_state_is_restored_and_the_student_is_ready() -> None:
    torch.manual_seed(11)
    random_state, denormal = torch.get_rng_state(), torch.tensor(1e-310, dtype=torch.float64)
    student = new_student()
    result = run(None, student)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert float(denormal * 1) > 0  # flushed during the run
    assert all(parameter.grad is None for parameter in student.parameters())
    assert result.student is student
    assert not any(module.training for module in student.modules())
    assert not any(module._forward_hooks for module in student.modules())


def test_a_pair_is_checked_once_and_no_evaluation_copies_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return call(*arguments, **options)

        return wrapper

    monkeypatch.setattr("zskt.method.recipe.check_pair", counted("check", checks.check_pair))
    monkeypatch.setattr("zskt.networks.checks.probe", counted("probe", checks.probe))
    teacher, student = make_teacher(), new_student()
    done.clear()
    copies: list[int] = []
    monkeypatch.setattr(type(student), "__deepcopy__", lambda self, memo: copied(self, memo, copies), raising=False)
    planned = recipe.plan(teacher, student, "zskt", TINY | {"evaluate_every": 1})
    before = len(copies)
    distill(teacher, student, planned, evaluate=images())
    assert done == ["check"]
    assert before == 5  # the student to try training mode, both networks to try channels_last and for their memory
    assert len(copies) == before + 1  # the private copy of the teacher, of the same class


def copied(self: nn.Module, memo: dict[int, Any], copies: list[int]) -> nn.Module:
    """What copy.deepcopy does without a method of its own; counted."""
    copies.append(id(self))
    twin = self.__class__.__new__(self.__class__)
    memo[id(self)] = twin
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin


def test_seed_decides_everything() -> None:
    outcomes = []
    for seed in (0, 0, 1):
        student = new_student("dropout")
        run(None, student, "zskt-fresh", seed=seed)
        outcomes.append(student.get_parameter("fc.weight").detach().clone())
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


AUDITED = """
import sys
sys.modules["zskt.data"] = None  # importing it fails
import torch
sys.path.insert(0, {tests!r})
from small import make_teacher
from zskt.method.generator import SAMPLES
from zskt.method import recipe
from zskt.networks import checks, models
from zskt.run import examiner
from zskt.run.distill import distill
teacher, student = make_teacher(), models.wide_resnet(10, 1)
DATA = tuple("_batch _batch_1 .png .jpg .jpeg .webp .gif .bmp .zip .tar .gz .npy .npz .mat .bin ubyte".split())
opened = []
def audit(event, arguments):
    if event == "open" and str(arguments[0]).lower().endswith(DATA):
        mode, flags = arguments[1], arguments[2]
        writes = any(c in (mode or "") for c in "wxa+") or bool((flags or 0) & 3)
        if not writes:
            raise RuntimeError(f"data opened for reading: {{arguments[0]}}")
        opened.append(arguments[0])
sys.addaudithook(audit)
if {cheat}:
    examiner.judge = lambda *a: open("some.png", "rb").read()
rng = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (4, 3, 16, 16), generator=rng, dtype=torch.uint8), torch.arange(4)
for out, recipe in (({out!r}, "zskt-prior"), (None, "zskt")):
    distill(teacher, student, recipe, settings={settings!r}, out=out, evaluate=images)
assert "zskt.data" not in {{name for name, module in sys.modules.items() if module is not None}}
print("data-free")
"""


@pytest.mark.parametrize("cheat", [False, True])
def test_distil_reads_no_data(cheat: bool, tmp_path: Path) -> None:
    tests, out = str(Path(__file__).parent), str(tmp_path / "run")
    script = AUDITED.format(tests=tests, out=out, settings=TINY | {"steps": 2}, cheat=cheat)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    if cheat:
        assert "data opened for reading" in done.stderr
    else:
        assert done.stdout.strip() == "data-free", done.stderr
        assert list((tmp_path / "run" / "samples").iterdir())


def test_metrics_hold_losses_and_no_clock(tmp_path: Path) -> None:
    run(tmp_path / "run", settings=TINY | KEEP, evaluate=images())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(len(line["student_loss"]) == 2 and len(line["generator_loss"]) == 1 for line in lines)
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 6]
    for line in (lines[2], lines[5]):
        assert sum(line["class_counts"]) == sum(line["student_class_counts"]) == SAMPLES
        assert 0 <= line["student_class_entropy"] <= 1
    assert not any("second" in key or "time" in key for line in lines for key in line)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "timing.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_beliefs_about_pseudo_images_are_logged_at_each_evaluation(tmp_path: Path) -> None:
    run(tmp_path / "run", settings=TINY | {"log_every": 5, "evaluate_every": 2})
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    evaluated = [line["step"] for line in lines if "teacher_confidence" in line and "student_class_counts" in line]
    assert evaluated == [2, 4, 6]
    assert [line["step"] for line in lines if "student_loss" in line] == [1, 5, 6]


def test_finished_student_loads_with_its_normalisation(tmp_path: Path) -> None:
    result = run(tmp_path / "run", evaluate=images())
    student = zskt.load_student(tmp_path / "run")
    x, _ = images()
    torch.testing.assert_close(student(student.normalise(x)), result.network(result.network.normalise(x)))
    facts = json.loads((tmp_path / "run" / "student.json").read_text())
    assert facts["model"] == "wrn-10-1"
    assert facts["measured"] == result.measured
    written = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.toml", "metrics.jsonl", "student.safetensors", "generator.safetensors"} <= written
    assert not any(path.endswith((".pt", ".pth", ".pkl")) for path in written)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong: list[tuple[nn.Module, dict[str, Any], str]] = [
        (models.wide_resnet(10, 1, num_classes=7), {}, "10 classes, found 7"),
        (models.wide_resnet(10, 1, channels=1), {}, "rejects the teacher's images of 3 x 16 x 16"),
        (new_student(), {"settings": {"student.learning_rat": 1.0}}, "did you mean student.learning_rate"),
        (new_student(), {"settings": {"student.updates": "ten"}}, "expected a whole number"),
        (new_student(), {"recipe": "zskt-prio"}, "did you mean zskt-prior"),
        (new_student(), {"stop_after": "5 years"}, "expected a time"),
        (new_student(), {"evaluate": (torch.zeros(2, 3, 8, 8), torch.zeros(2).long())}, "found 3 x 8 x 8"),
        (new_student(), {"evaluate": (torch.zeros(1, 3, 16, 16), torch.tensor([12]))}, "found label 12"),
        (MLP, {"recipe": "zskt"}, "none in the student; use --set student.loss.attention=0"),
        (new_student(), {"settings": {"student.loss.stages": "blok1=block1"}}, "stage 'blok1': did you mean block1"),
    ]
    for student, arguments, message in wrong:
        assert message in refused(partial(run, out, student, **arguments))
        assert not out.exists()


def test_a_failure_before_the_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", settings=TINY | KEEP, callbacks=[die_at(1)])
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    def meanwhile(event: Event) -> None:
        with pytest.raises(zskt.ZsktError, match="another process is using"), checkpoint.owning(tmp_path / "run"):
            pass

    run(tmp_path / "run", callbacks=[meanwhile])
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_log_shorter_than_its_checkpoint_says_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", settings=TINY | KEEP, stop_after=3)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(zskt.ZsktError, match="shorter than its checkpoint"):
        run(tmp_path / "run", settings=TINY | KEEP, resume=True)


def test_resuming_a_finished_run_keeps_what_was_measured(tmp_path: Path) -> None:
    first = run(tmp_path / "run", evaluate=images())
    assert run(tmp_path / "run", resume=True).measured == first.measured


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    for name in ("absent", "empty"):
        with pytest.raises(zskt.ZsktError, match=f"run to resume in {tmp_path / name}, found no config.toml"):
            distill(make_teacher(), new_student(), "zskt", settings=TINY, out=tmp_path / name, resume=True)
        (tmp_path / "empty").mkdir(exist_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


LEFT = [".lock", "config.toml", "metrics.jsonl", "rows/", f"{HALF_WAY}.safetensors"]


@pytest.mark.parametrize(
    ("left", "resume"),
    [*((LEFT[:n], resume) for n in (1, 2, 5) for resume in (True, False)), (["samples/", ".config.toml.x.tmp"], False)],
)
def test_what_a_run_leaves_that_is_killed_at_once_does_not_stand_in_its_way(
    left: list[str], resume: bool, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        path = tmp_path / "run" / name
        path.mkdir() if name.endswith("/") else path.touch()
    run(tmp_path / "whole")
    run(tmp_path / "run", resume=resume)
    assert_equal(contents(tmp_path / "whole"), contents(tmp_path / "run"))
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".") or path.name == "rows"]


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"settings": TINY, "out": tmp_path / "run"}
    distill(make_teacher(), new_student(), "zskt", **arguments)
    before = (tmp_path / "run" / "student.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    with pytest.raises(zskt.ZsktError, match="holds a finished run whose checkpoints are gone"):
        distill(make_teacher(seed=9), new_student(), "zskt", resume=True, **arguments)
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == before


def test_resuming_otherwise_than_begun_is_refused_or_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"settings": TINY, "out": tmp_path / "run"}
    distill(make_teacher(), new_student(), "zskt", stop_after=2, **arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    (line,) = (line for line in run(tmp_path / "run", resume=True).warnings if "resumed" in line)
    assert "threads 64 instead of 1" in line


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (nn.Flatten(), "with trainable parameters, found none"),
        (new_student().requires_grad_(False), "with trainable parameters, found none"),
        (new_student().double(), "both in float32 or both in float64"),
        (new_student().half(), r"both in float32 or both in float64, .*convert, as in student.float\(\)"),
    ],
)
def test_students_that_cannot_be_trained_are_refused(student: nn.Module, message: str) -> None:
    with pytest.raises(zskt.ZsktError, match=message):
        run(None, student)


def test_each_use_of_random_numbers_has_its_own() -> None:
    seeds = [stream(seed, purpose) for seed in range(50) for purpose in ("run", "latents", "bank")]
    assert len(set(seeds)) == 150
    assert stream(0, "latents") == stream(0, "latents")


def test_a_folder_that_is_taken_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(zskt.ZsktError, match="already holds a run"):
        run(tmp_path / "run")
    with pytest.raises(zskt.ZsktError, match="has finished its 6 steps"):
        run(tmp_path / "run", settings=TINY | {"steps": 7}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(zskt.ZsktError, match="found other things"):
        run(tmp_path / "other")


def test_the_network_to_be_converted_is_named() -> None:
    student = new_student()
    for teacher, advice in ((torch.float16, "teacher.float"), (torch.float64, "student.double")):
        network = make_teacher().to(teacher)
        with pytest.raises(zskt.ZsktError, match=rf"convert, as in {advice}\(\)"):
            checks.check_pair(network, student)


def stuck(teacher: zskt.Classifier, student: nn.Module, config: zskt.Config) -> zskt.Method:
    method = zskt.belief_matching(teacher, student, config)
    method.sample = lambda n, seed: torch.zeros(n, 3, 16, 16)  # type: ignore[method-assign]
    return method


def test_a_run_warns_while_it_goes_on_and_alike_when_resumed(tmp_path: Path) -> None:
    often = KEEP | {"evaluate_every": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run(whole, None, "auto", method=stuck, settings=TINY | often)
    given = [(line["step"], line.get("warnings", [])) for line in read_lines(whole / "metrics.jsonl")]
    assert given[0] == (1, [])
    assert {"collapse", "dead generator"} <= {text.split(":")[0] for text in given[1][1]}
    assert not any("dead generator" in text for _, texts in given[2:] for text in texts)
    assert sum("dead generator" in text for text in result.warnings) == 1
    run(parts, None, "auto", method=stuck, settings=TINY | often, stop_after=1)
    again = run(parts, None, "auto", method=stuck, settings=TINY | often, resume=True)
    assert again.warnings == result.warnings
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    killed = tmp_path / "killed"  # before its first checkpoint: what it said does not count
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("checkpoint", "student.*", "*.safetensors"))
    run(killed, None, "auto", method=stuck, settings=TINY | often, resume=True)
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()


def test_a_generator_that_finds_nothing_any_more_is_said() -> None:
    """A student that is its teacher, and stays it, beside one that is not."""
    settings = TINY | {"steps": 8, "evaluate_every": 1, "student.updates": 1, "student.learning_rate": 1e-12}
    found = {}
    for name, student in (
        ("twin", copy.deepcopy(make_teacher().module).requires_grad_()),
        ("other", models.wide_resnet(10, 2)),
    ):
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # its running statistics stay, too
        result = run(None, student, settings=settings)
        found[name] = [text for text in result.warnings if text.startswith("vanished adversary: ")]
    assert (len(found["twin"]), found["other"]) == (1, [])


def collapsing(teacher: zskt.Classifier, student: nn.Module, config: zskt.Config) -> zskt.Method:
    """Its images are all the same from the third step on, unless the generator learns more gently."""
    method = zskt.belief_matching(teacher, student, config)
    sample = method.sample

    def shown(n: int, seed: int) -> Tensor:
        updates = method.generator_updates
        dead = updates.gentler == 1 and updates.done >= 3
        return torch.zeros(n, 3, 16, 16) if dead else sample(n, seed)

    method.sample = shown  # type: ignore[method-assign]
    return method


def alike(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


RESTART = {"on_collapse": "restart", "evaluate_every": 1, "checkpoint_every": 1, "generator.learning_rate": 1e-2}


def test_a_collapsed_run_goes_back_and_on_more_gently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zskt.run.examiner.COLLAPSES", {"dead generator"})  # the teacher, untrained, knows few classes
    settings = TINY | {"steps": 8} | RESTART
    result = run(tmp_path / "whole", None, "auto", method=collapsing, settings=settings)
    assert result.finished
    # Step 3 is suspect, step 4 sure; step 2 was sound, after the checkpoint of step 1.
    back = "collapse at step 4: back to step 1, with half of the generator's learning rate"
    assert [text for text in result.warnings if "back to" in text] == [back]
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert not any("dead generator" in text for line in lines for text in line.get("warnings", []))

    # From step 1 on it is the run that had been gentle from there; and stopping makes no difference.
    def gentle(teacher: zskt.Classifier, student: nn.Module, config: zskt.Config) -> zskt.Method:
        method = zskt.belief_matching(teacher, student, config)
        step = method.step

        def halved() -> dict[str, Tensor]:
            method.generator_updates.gentler = 0.5 if method.generator_updates.done >= 1 else 1.0
            return step()

        method.step = halved  # type: ignore[method-assign]
        return method

    other = run(None, None, "auto", method=gentle, settings=settings | {"on_collapse": "warn"})
    assert alike(result.student, other.student)
    for steps in (2, 4, 6):
        parts = tmp_path / f"parts-{steps}"
        run(parts, None, "auto", method=collapsing, settings=settings, stop_after=steps)
        again = run(parts, None, "auto", method=collapsing, settings=settings, resume=True)
        assert alike(again.student, result.student)
        assert (parts / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        assert [text for text in again.warnings if "back to" in text] == [back]


def test_it_gives_up_going_back_after_three_times(tmp_path: Path) -> None:
    result = run(tmp_path / "run", None, "auto", method=stuck, settings=TINY | {"steps": 8} | RESTART)
    assert [text for text in result.warnings if "back to" in text] == [
        "collapse at step 2: back to step 0, with half of the generator's learning rate"
    ] * 3
    assert any("dead generator" in text for text in result.warnings)
    assert result.finished
    with pytest.raises(UsageError, match="on_collapse = restart goes back to a checkpoint: set out"):
        run(None, None, "auto", method=stuck, settings=TINY | RESTART)


def test_a_method_without_a_generator_cannot_be_gentler(tmp_path: Path) -> None:
    def without(teacher: zskt.Classifier, student: nn.Module, config: zskt.Config) -> zskt.Method:
        method = zskt.belief_matching(teacher, student, config)
        method.updates = dict  # type: ignore[method-assign]
        return method

    settings = TINY | RESTART
    said = refused(lambda: run(tmp_path / "run", None, "auto", method=without, settings=settings), UsageError)
    assert said.startswith("on_collapse = restart needs the updates of a generator, test_distill.py:")


def test_what_is_good_is_there(tmp_path: Path) -> None:
    """The newest checkpoint is damaged, and the good one that the one before names is gone."""
    settings = TINY | {"steps": 8} | RESTART
    found: list[str] = []

    def judge(self: object, line: Mapping[str, Any]) -> str | None:
        if line["step"] != 5 or found:
            return "sound"
        found.append("collapsed")
        return "collapsed"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zskt.run.examiner.Examiner.judge", judge)
        run(tmp_path / "run", settings=settings, stop_after=4)
        (newest, *_) = sorted((tmp_path / "run" / "checkpoint").glob("*.safetensors"), reverse=True)
        content = bytearray(newest.read_bytes())
        content[-1] ^= 1
        newest.write_bytes(content)
        patch.setattr(
            "zskt.run.examiner.Examiner.judge", lambda self, line: "suspect" if line["step"] == 4 else judge(self, line)
        )
        result = run(tmp_path / "run", settings=settings, resume=True)
    assert [text for text in result.warnings if "collapse at step 5: back to step 3" in text]  # 2 is gone
    assert result.finished


def test_images_of_the_users_own_are_kept_by_a_run_that_may_go_back(tmp_path: Path) -> None:
    """They are in the checkpoint of step 0."""
    tiny: dict[str, Any] = {"steps": 12, "batch_size": 8, "generator.width": 8, "generator.latent": 12}
    tiny |= {"bank.rounds": 4, "bank.warmup": 1, "bank.batch_size": 8, "generator.updates": 2} | RESTART
    own = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    arguments: dict[str, Any] = {"settings": tiny | {"checkpoint_every": 100}, "images": own}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(make_teacher(), new_student(), "bank", out=whole, **arguments)
    distill(make_teacher(), new_student(), "bank", out=parts, stop_after=1, **arguments)
    (parts / "checkpoint" / "00000001.safetensors").unlink()  # as a kill before it leaves the folder
    distill(make_teacher(), new_student(), "bank", out=parts, stop_after=5, resume=True, **arguments)
    distill(make_teacher(), new_student(), "bank", out=parts, resume=True, **arguments)
    rows = [torch.cat([part["images"] for part in saved_rows(out / "rows")]) for out in (whole, parts)]
    assert torch.equal(*rows)
    assert len(rows[0]) == 7 + 32


@pytest.mark.parametrize("recipe", ["bank", "dfad", "fast"])
def test_what_a_method_has_goes_back_with_it(recipe: str, tmp_path: Path) -> None:
    """Bank, replay buffer, optimisers, averages: from step 0 again, all is as at first."""
    tiny = {"steps": 12, "batch_size": 8, "generator.width": 8, "generator.latent": 12, "log_every": 1}
    if load_recipe(recipe).method == "bank":
        tiny |= {"bank.rounds": 4, "bank.warmup": 1, "bank.batch_size": 8, "generator.updates": 2}
    arguments: dict[str, Any] = {"settings": tiny, "seed": 3}
    expected = distill(make_teacher(), new_student(), recipe, **arguments)

    fallen: list[int] = []

    def judge(line: Mapping[str, Any]) -> str | None:
        if line.get("step") != 7:
            return None
        fallen.append(7)
        return "collapsed" if len(fallen) == 1 else "sound"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zskt.run.examiner.Examiner.judge", lambda self, line: judge(line))
        patch.setattr("zskt.run.lifecycle.Lifecycle._be_gentler", lambda life, texts: setattr(life, "restarts", texts))
        arguments["settings"] = tiny | {"on_collapse": "restart", "checkpoint_every": 100, "evaluate_every": 7}
        found = distill(make_teacher(), new_student(), recipe, out=tmp_path / "run", **arguments)
    assert fallen == [7, 7]
    assert alike(found.student, expected.student)


def test_what_a_killed_writer_left_is_swept_by_the_next_run(tmp_path: Path) -> None:
    run(tmp_path / "run", stop_after=2)
    with replacing(tmp_path / "run" / "checkpoint" / "half.safetensors") as file:
        (left,) = [path for path in (tmp_path / "run").rglob("*half*") if path.name != "half.safetensors"]
        kept = shutil.copy(left, tmp_path / left.name)
        file.write(b"half")
    (tmp_path / "run" / "checkpoint" / "half.safetensors").unlink()
    shutil.copy(kept, left)  # as a kill during the writing leaves it
    run(tmp_path / "run", resume=True)
    assert not left.exists()


def test_another_teacher_is_refused_on_resume(tmp_path: Path) -> None:
    distill(make_teacher(), new_student(), "zskt", settings=TINY, out=tmp_path / "run", stop_after=2)
    before = (tmp_path / "run" / "config.toml").read_text()
    settings = TINY | {"log_every": 3}
    with pytest.raises(zskt.ZsktError, match=r"differs in teacher [0-9a-f]{12}, now [0-9a-f]{12}: resume"):
        distill(make_teacher(seed=9), new_student(), "zskt", settings=settings, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.toml").read_text() == before


def rated(teacher: zskt.Classifier, student: nn.Module, config: zskt.Config, rate: object) -> zskt.Method:
    return zskt.belief_matching(teacher, student, config)


def test_another_argument_or_teacher_of_an_own_method_is_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"settings": TINY, "out": tmp_path / "run"}
    make = functools.partial(rated, rate=1e-3)
    distill(make_teacher(), new_student(), method=make, **arguments)
    with pytest.raises(zskt.ZsktError, match=r"rated\(rate=0\.001\)', now '.*rated\(rate=1\.0\)'"):
        distill(make_teacher(), new_student(), method=functools.partial(rated, rate=1.0), resume=True, **arguments)
    student = zskt.load_student(tmp_path / "run")
    assert sampler(tmp_path / "run", student, method=make, teacher=make_teacher())(2, 0).shape == (2, 3, 16, 16)
    with pytest.raises(zskt.ZsktError, match=r"expected the teacher of .*run, [0-9a-f]{12}, found [0-9a-f]{12}; give"):
        sampler(tmp_path / "run", student, method=make, teacher=make_teacher(seed=9))
    described = {recipe.describe_method(functools.partial(rated, rate=nn.ReLU().forward)) for _ in range(2)}
    assert len(described) == 1  # whatever the addresses


def test_divergence_is_said(tmp_path: Path) -> None:
    settings = TINY | {"student.learning_rate": 1e30, "student.clip": 0.0, "log_every": 1}
    with pytest.raises(zskt.ZsktError, match=r"lower student\.learning_rate"):
        run(tmp_path / "run", settings=settings)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync, armed = os.fsync, threading.Event()

    def fsync(descriptor: int) -> None:
        if armed.is_set():
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    fill = lambda event: armed.set() if event.step == 3 else None  # noqa: E731
    with pytest.raises(zskt.ZsktError, match="No space left on device; free some space"):
        run(tmp_path / "run", settings=TINY | KEEP, callbacks=[fill])
    armed.clear()
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["00000002.safetensors"]
    assert run(tmp_path / "run", settings=TINY | KEEP, resume=True).finished
