"""What is repeated is logged, stopped, kept and resumed, whatever it is."""

import errno
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import make_teacher
from zskt.errors import ZsktError
from zskt.files import read_tensors
from zskt.networks import models
from zskt.run import checkpoint, lifecycle
from zskt.run.lifecycle import Lifecycle, describe


class Walk:
    """The least that can be repeated: a weight that goes a random way, and a count of its own."""

    steps = 10

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.zeros_(self.module.weight)
        self.optimiser = torch.optim.Adam(self.module.parameters(), lr=0.1)
        self.count = 0
        self.bad_from = 99

    def step(self) -> Mapping[str, Tensor]:
        loss = (self.module.weight - torch.rand(())).square().sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.count += 1
        return {"walk": loss.detach() * (float("nan") if self.count >= self.bad_from else 1)}

    def modules(self) -> Mapping[str, nn.Module]:
        return {"walk": self.module}

    def optimisers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {"walk": self.optimiser}

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])

    def close(self) -> None: ...


def life(folder: Path | None, **options: Any) -> Lifecycle:
    torch.manual_seed(0)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "log_every": 1,
        "evaluate_every": 4,
        "checkpoint_every": 3,
        "identity": {"what": "walk"},
    }
    return Lifecycle(Walk(), folder, **settings | options)


def outcome(folder: Path) -> tuple[dict[str, list[Any]], dict[str, Any], bytes]:
    tensors, metadata, problems = checkpoint.load(folder / "checkpoint")
    assert not problems
    return {name: t.tolist() for name, t in tensors.items()}, metadata, (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stops", [["1"], ["3"], ["4", "4"], ["0.0001s", "5"]])
def test_whatever_is_repeated_resumes_bit_for_bit(
    stops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lifecycle, "seconds", 0.0)  # of the clock, which a checkpoint remembers
    life(tmp_path / "whole").run([])
    for i, stop in enumerate([*stops, None]):
        part = life(tmp_path / "parts")
        if i:
            part.restore()
        part.run([], stop)
    assert part.finished
    assert isinstance(part.repeated, Walk)
    assert part.repeated.count == 10
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    killed = life(tmp_path / "run")
    killed.step = 1
    killed.log({"walk": torch.tensor(1.0)})
    again = life(tmp_path / "run")
    if resume:
        again.restore()
    again.run([])
    assert not (tmp_path / "run" / "samples").exists()
    lines = checkpoint.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_a_folder_that_is_taken_away_is_said_and_not_made_again(tmp_path: Path) -> None:
    def take(event: lifecycle.Event) -> None:
        if event.step == 5:
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    life(tmp_path / "whole").run([])
    with pytest.raises(zskt.ZsktError, match=r"run is gone; put it back and resume"):
        life(tmp_path / "run").run([take])
    assert not (tmp_path / "run").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    again = life(tmp_path / "run")
    again.restore()
    again.run([])
    assert outcome(tmp_path / "run")[::2] == outcome(tmp_path / "whole")[::2]


def test_an_old_checkpoint_that_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.unlink

    def refuse(path: Path, **options: Any) -> None:
        if path.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(zskt.ZsktError, match=r"cannot remove .*00000003\.safetensors: Input/output error"):
            life(tmp_path / "run").run([])
    again = life(tmp_path / "run")
    again.restore()
    assert again.step == 9
    again.run([])
    assert [int(path.stem) for path in sorted((tmp_path / "run" / "checkpoint").iterdir())] == [9, 10]


def test_another_identity_is_refused_and_another_machine_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life(tmp_path / "run", identity={"what": "walk", "teacher": "a", "settings": {"x": 1}}).run([], 2)
    other = life(tmp_path / "run", identity={"what": "walk", "teacher": "b", "settings": {"x": 2}})
    with pytest.raises(zskt.ZsktError, match=r"differs in teacher a, now b; settings: resume it with the same"):
        other.restore()
    monkeypatch.setattr(lifecycle, "cpu_name", lambda: "another processor")
    same = life(tmp_path / "run", identity={"what": "walk", "teacher": "a", "settings": {"x": 1}})
    same.restore()
    assert same.step == 2
    (line,) = same.warnings
    assert "processor another processor instead of" in line
    assert "not bit for bit" in line


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    life(tmp_path / "run").run([], 2)
    tensors, metadata, _ = checkpoint.load(tmp_path / "run" / "checkpoint")
    checkpoint.save(tmp_path / "run" / "checkpoint", 2, tensors, metadata | {"format": 1})
    with pytest.raises(zskt.ZsktError, match="expected a checkpoint of format 2"):
        life(tmp_path / "run").restore()


@pytest.mark.parametrize(("log", "evaluate", "checkpoint", "step"), [(4, 9, 9, 8), (9, 7, 9, 7), (9, 9, 2, 6)])
def test_losses_that_are_not_finite_end_a_run_before_anything_is_written(
    log: int, evaluate: int, checkpoint: int, step: int, tmp_path: Path
) -> None:
    intervals = {"log_every": log, "evaluate_every": evaluate, "checkpoint_every": checkpoint}
    run = life(tmp_path / "run", **intervals, evaluate=lambda step: {"seen": step})
    assert isinstance(run.repeated, Walk)
    run.repeated.bad_from = 6
    with pytest.raises(zskt.ZsktError, match=rf"loss of the walk is nan at step {step}: .*lower walk\.learning_rate"):
        run.run([])
    assert not list((tmp_path / "run").glob("checkpoint/*6.safetensors"))


def test_a_measurement_that_is_not_finite_ends_a_run(tmp_path: Path) -> None:
    run = life(tmp_path / "run", evaluate=lambda step: {"confidence": float("nan"), "counts": [1]})
    with pytest.raises(zskt.ZsktError, match=r"^confidence is nan at step 4: the run has diverged; lower walk"):
        run.run([])


def test_a_diverged_state_is_kept_aside_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    run = life(tmp_path / "run", log_every=5, checkpoint_every=3, evaluate_every=9)
    assert isinstance(run.repeated, Walk)
    run.repeated.bad_from = 4
    with pytest.raises(zskt.ZsktError, match=r"at step 5: the run has diverged; .*; its state is in .*diverged"):
        run.run([])
    (good,) = (tmp_path / "run" / "checkpoint").iterdir()
    assert good.name == "00000003.safetensors"
    tensors, metadata = read_tensors(tmp_path / "run" / "diverged.safetensors")
    assert torch.equal(tensors["walk/weight"], run.repeated.module.weight)
    assert any(name.startswith("optimiser:walk/") for name in tensors)
    assert metadata["step"] == "5"
    assert "loss of the walk is nan" in metadata["found"]
    again = life(tmp_path / "run")
    again.restore()
    again.run([])
    assert again.finished
    assert not (tmp_path / "run" / "diverged.safetensors").exists()


def test_an_optimiser_that_is_not_finite_ends_a_run(tmp_path: Path) -> None:
    run = life(tmp_path / "run", checkpoint_every=2)
    assert isinstance(run.repeated, Walk)
    run.run([], 1)
    run.repeated.optimiser.state[run.repeated.module.weight]["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(
        zskt.ZsktError, match=r"optimiser:walk/0\.exp_avg_sq contains NaN or infinity at step 2: .*lower walk"
    ):
        run.run([])


@pytest.mark.parametrize("kind", ["NAdam", "ASGD", "Adafactor", "SGD"])
def test_every_optimiser_of_torch_goes_on_as_it_would_have(kind: str) -> None:
    def trained(weight: Tensor, updates: int, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        parameter = nn.Parameter(weight.clone())
        optimiser = getattr(torch.optim, kind)([parameter], lr=0.1)
        checkpoint.restore_optimizer(optimiser, state)
        for _ in range(updates):
            parameter.grad = parameter.detach() + 1
            optimiser.step()
        return parameter.detach(), checkpoint.optimizer_state(optimiser)

    start = torch.arange(6.0).view(3, 2)
    half, state = trained(start, 2, {})
    assert torch.equal(trained(half, 2, state)[0], trained(start, 4, {})[0])


def test_an_optimiser_whose_state_no_checkpoint_holds_is_refused() -> None:
    optimiser = torch.optim.LBFGS([nn.Parameter(torch.ones(1))])
    optimiser.step(lambda: torch.ones(()))
    with pytest.raises(zskt.ZsktError, match=r"tensors as the state of LBFGS, found 0\.func_evals = 1"):
        checkpoint.optimizer_state(optimiser)


@pytest.mark.parametrize("saved", ["rng/cpu", "rng/cuda"])
def test_random_state_of_a_cpu_seeds_a_cuda_device(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"rng/cpu": torch.get_rng_state(), saved: torch.get_rng_state()}
    done: list[str] = []

    class Cuda:
        def set_state(self, state: Tensor) -> None:
            done.append("set")
            if state is not tensors.get("rng/cuda"):
                raise RuntimeError("RNG state is wrong size")

        def manual_seed(self, seed: int) -> None:
            done.append("seeded")

    monkeypatch.setattr(torch.cuda, "default_generators", (Cuda(),))
    checkpoint.restore_random_state(tensors, torch.device("cuda:0"))
    assert done == (["set", "seeded"] if saved == "rng/cpu" else ["set"])


@pytest.mark.parametrize("folder", [True, False])
def test_weights_that_are_not_finite_are_neither_kept_nor_returned(folder: bool, tmp_path: Path) -> None:
    """Even where no loss showed it: the last update comes after the last loss."""
    run = life(tmp_path / "run" if folder else None, log_every=100, evaluate_every=100, checkpoint_every=100)

    def break_it(event: lifecycle.Event) -> None:
        assert isinstance(run.repeated, Walk)
        if event.step == 10:
            nn.init.constant_(run.repeated.module.weight, float("inf"))

    with pytest.raises(zskt.ZsktError, match=r"walk/weight contains NaN or infinity at step 10"):
        run.run([break_it])
    assert not checkpoint.exists(tmp_path / "run" / "checkpoint")


def test_losses_become_lines() -> None:
    losses = {"student": torch.tensor([1.0, 2.0]), "student.kl": torch.tensor(2.0), "teacher": torch.tensor(3.0)}
    assert describe(losses) == {"student_loss": [1.0, 2.0], "student_terms": {"kl": 2.0}, "teacher_loss": [3.0]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to become an ordinary user")
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_may_not_be_written_is_said_in_a_line(resume: bool) -> None:
    """In a process of an ordinary user: root may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        out = Path(name, "run")
        teacher = make_teacher(models.convnet(2, num_classes=3, channels=1), size=(1, 8, 8))
        settings = {"steps": 4, "batch_size": 4, "generator.width": 4, "generator.latent": 4}

        def work(out: Path, **options: Any) -> None:
            student = models.convnet(1, num_classes=3, channels=1)
            zskt.distill(teacher, student, "zskt-prior", settings=settings, out=out, **options)

        work(Path(name, "other"))  # imports what this user may not read
        if resume:
            work(out, stop_after=2)
        else:
            out.mkdir()
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for path in (out, *(each for each in out.rglob("*") if each.is_dir())):
            path.chmod(0o555)
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                work(out, resume=resume)
                os.write(writer, b"it wrote")
            except ZsktError as error:
                os.write(writer, str(error).encode())
            except BaseException as error:
                os.write(writer, b"unexpected\n" + repr(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        said = os.read(reader, 10_000).decode()
        os.close(reader)
        os.close(writer)
        assert re.fullmatch(rf"cannot \w+ {out}.*: Permission denied; check the permissions.*", said), said
        for path in (out, *(each for each in out.rglob("*") if each.is_dir())):
            path.chmod(0o755)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
