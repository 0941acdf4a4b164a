"""Experiments: the right networks on the right images, exact resumption, teacher and data unchanged."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import coloured, make_teacher, quiet
from zskt.evaluate.measures import measure
from zskt.files import read_json
from zskt.method.budget import Cost
from zskt.method.recipe import load_recipe
from zskt.networks import models
from zskt.networks.folder import load_network
from zskt.paper import experiments
from zskt.paper.baselines import kd_at, train_student
from zskt.paper.experiments import Budget, Experiment, normalisation
from zskt.paper.jobs import Job, check_settings, in_order, run_jobs, time_jobs
from zskt.paper.training import Training, digest
from zskt.runtime import seeded

pytestmark = pytest.mark.usefixtures("tiny_recipes")

UPDATES, STEPS = 8, 2


def make_study(root: Path, **changes: Any) -> Experiment:
    """ConvNet-4 -> ConvNet-2 on three classes of grey images."""
    fields: dict[str, Any] = {
        "root": root,
        "train": coloured(60),
        "test": coloured(30, seed=1),
        "model": "convnet-4",
        "student": "convnet-2",
        "budget": Budget(UPDATES, STEPS, images=4, fine_tuning=0.25),
    }
    return Experiment(**fields | changes)


def make(study: Experiment, *wanted: Job) -> None:
    """Make jobs and all that they need."""
    assert run_jobs(in_order(wanted), study.root, math.inf, quiet) == {}


def weights(study: Experiment, job: Job) -> bytes:
    (path,) = (path for path in job.folder(study.root).glob("*.safetensors") if not path.stem.startswith("generator"))
    return path.read_bytes()


def network(study: Experiment, job: Job) -> zskt.Classifier:
    return load_network(job.folder(study.root))


def measured(study: Experiment, job: Job) -> dict[str, Any]:
    found = job.measured(study.root)
    assert found is not None
    return found


@dataclass
class Watched:
    """What students were trained with."""

    modules: list[dict[str, Tensor]] = field(default_factory=list)
    images: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    objectives: list[dict[str, Any] | None] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Notes what the training of students gets, before it starts."""
    found, wanted = Watched(), inspect.signature(kd_at)

    def training(module: nn.Module, master: zskt.Classifier, images: Any, test: Any, how: Training, **more: Any) -> Any:
        found.modules.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        found.images.append(images)
        found.trainings.append(how)
        if more["objective"] is None:
            found.objectives.append(None)
        return train_student(module, master, images, test, how, **more)

    def objective(*arguments: Any, **more: Any) -> Any:
        bound = wanted.bind(*arguments, **more)
        bound.apply_defaults()
        found.objectives.append(dict(bound.arguments))
        return kd_at(*arguments, **more)

    monkeypatch.setattr(experiments, "train_student", training)
    monkeypatch.setattr(experiments, "kd_at", objective)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_recipes: None) -> Experiment:
    """A study with a job of every kind, for two seeds."""
    study = make_study(tmp_path_factory.mktemp("study"))
    for seed in (0, 1):
        make(study, *every_kind(study, seed).values())
    return study


def every_kind(study: Experiment, seed: int = 0) -> dict[str, Job]:
    """A job of every kind that is trained, with whatever it needs; and a comparison."""
    zero_shot = study.zero_shot(seed, "zskt")
    return {
        "teacher": study.teacher(seed),
        "from scratch": study.taught("convnet-2", seed, 3),
        "KD+AT": study.distilled(seed, 3),
        "KD+AT without CE": study.distilled(seed, None, ce=False),
        "zero-shot": zero_shot,
        "fine-tuned": study.fine_tuned(seed, "zskt", 3),
        "belief": study.belief(zero_shot, seed),
    }


def test_every_kind_is_measured_on_the_test_images(made: Experiment) -> None:
    images, labels = made.test.images, made.test.labels
    for seed in (0, 1):
        jobs = every_kind(made, seed)
        teacher = network(made, jobs["teacher"])
        for name, job in jobs.items():
            if name == "belief":
                continue
            beside = teacher if (job.folder(made.root) / "student.json").exists() else None
            expected = measure(network(made, job), images, labels, beside)
            found = measured(made, job)
            if name == "from scratch":
                assert "agreement" not in found
            for key in expected.keys() & found.keys():
                assert found[key] == pytest.approx(expected[key], abs=1e-5), (name, key)
            assert found["accuracy"] == expected["accuracy"]
            assert found["parameters"] == sum(p.numel() for p in network(made, job).parameters())
    assert measured(made, made.teacher(0))["accuracy"] > 0.9  # 1/3 by chance


def test_seeds_have_teachers_and_students_of_their_own(made: Experiment) -> None:
    for first, second in zip(every_kind(made, 0).values(), every_kind(made, 1).values(), strict=True):
        assert first.name != second.name
        if first.unit != "steps of 128 paths":
            assert weights(made, first) != weights(made, second)
    for seed in (0, 1):
        fingerprint = network(made, made.teacher(seed)).fingerprint()
        for job in every_kind(made, seed).values():
            path = job.folder(made.root) / "student.json"
            assert not path.exists() or read_json(path)["teacher_fingerprint"] == fingerprint


def test_different_jobs_have_different_names(tmp_path: Path) -> None:
    names = []
    given = make_teacher(models.convnet(4, num_classes=3, channels=1), size=(1, 12, 12))
    for study in (make_study(tmp_path), make_study(tmp_path, student="convnet-3"), make_study(tmp_path, given=given)):
        for seed in (0, 1):
            for per_class in (1, 11, None):
                names += [study.distilled(seed, per_class, ce=ce).name for ce in (True, False)]
                names += [study.taught(study.student, seed, per_class).name] * (study.given is None)
            for recipe in ("zskt", "zskt-fresh"):
                zero_shot = study.zero_shot(seed, recipe)
                names += [zero_shot.name, study.fine_tuned(seed, recipe, 1).name, study.belief(zero_shot, seed).name]
        names += [study.teacher(0).name] * (study.student != "convnet-3")
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


@pytest.mark.parametrize("kind", ["teacher", "from scratch", "KD+AT", "fine-tuned", "zero-shot"])
def test_an_interrupted_job_resumes_bit_for_bit(kind: str, made: Experiment, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    job = every_kind(study)[kind]
    make(study, *job.needs)
    shown: list[int] = []
    for stop in ("1", "0.000001s") if job.units > 2 else ("1",):
        assert not job.run(job.folder(tmp_path), stop, lambda done, total, beside: shown.append(done))
        assert job.measured(tmp_path) is None
    assert shown == [1, 2][: len(shown)]
    make(study, job)
    assert weights(study, job) == weights(made, job)
    assert measured(study, job) == measured(made, job)


def test_few_shot_images_are_nested_balanced_and_the_same_for_all_seeds(watched: Watched, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for seed in (0, 5):
        make(study, *(study.distilled(seed, m) for m in (1, 4)), study.fine_tuned(seed, "zskt", 4))
    one, four, tuned, *others = watched.images
    for number, (images, labels) in ((1, one), (4, four), (4, tuned)):
        assert torch.bincount(labels).tolist() == [number] * 3
        assert all(any(torch.equal(image, other) for other in study.train.images) for image in images)
        assert len({bytes(image.numpy()) for image in images}) == 3 * number
    assert torch.equal(one[0], four[0][:3])
    for found, other in zip((one, four, tuned), others, strict=True):
        assert torch.equal(found[0], other[0])
        assert torch.equal(found[1], other[1])
    assert torch.equal(four[0], tuned[0])


def test_kd_at_is_the_published_baseline(watched: Watched, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    make(study, study.distilled(0, 2), study.distilled(0, None, ce=False))
    assert len(watched.objectives) == 2
    for found, ce in zip(watched.objectives, (True, False), strict=True):
        assert found is not None
        assert found["cross_entropy"] is ce  # the weights are constants: see test_baselines.py
        assert found["teacher"].fingerprint() == network(study, study.teacher(0)).fingerprint()
    fresh = study.build("convnet-2", 0).state_dict()
    for state in watched.modules:  # from scratch, as the student without a teacher
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in state.items())


def test_fine_tuning_starts_from_the_zero_shot_student(watched: Watched, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    job = study.fine_tuned(0, "zskt", 3)
    make(study, job)
    zero_shot = network(study, study.zero_shot(0, "zskt"))
    (state,) = watched.modules
    for name, tensor in zero_shot.module.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert watched.objectives == [None]  # cross-entropy alone, naive
    (training,) = watched.trainings
    assert training.updates == UPDATES // 4
    assert training.learning_rate == pytest.approx(0.1 / 4)
    assert Budget(UPDATES, STEPS).fine_tuning == 0.1
    tuned = network(study, job).module.state_dict()
    assert not torch.equal(tuned["fc.weight"], state["fc.weight"])


def test_updates_do_not_depend_on_the_number_of_images(made: Experiment, watched: Watched, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    jobs = [study.distilled(0, m) for m in (1, 7, None)] + [study.taught("convnet-2", 0, m) for m in (1, 7, None)]
    assert {job.units for job in jobs} == {UPDATES}
    counted: list[int] = []

    def show(done: int, total: int, beside: str) -> None:
        assert total == UPDATES
        counted.append(done)

    make(study, study.teacher(0))
    for job in jobs:
        job.run(job.folder(tmp_path), None, show)
    assert counted == [*range(1, UPDATES + 1)] * len(jobs)
    assert len(set(map(str, watched.trainings))) == 1
    assert [len(labels) for _, labels in watched.images] == [3, 21, 60]


def test_a_given_teacher_is_measured_and_not_trained(tmp_path: Path) -> None:
    with seeded(0):
        given = make_teacher(models.convnet(6, num_classes=3, channels=1), size=(1, 12, 12))
    before = given.fingerprint()
    study = make_study(tmp_path, given=given, budget=Budget(UPDATES, STEPS, images=1, fine_tuning=0.25))
    assert [study.teacher(seed).name for seed in (0, 1)] == ["given-teacher"] * 2
    make(study, *every_kind(study).values())
    copy = network(study, study.teacher(3))
    assert copy.fingerprint() == before == given.fingerprint()
    for name, value in measure(given, study.test.images, study.test.labels).items():
        assert measured(study, study.teacher(0))[name] == pytest.approx(value)
    assert not [path for path in (tmp_path / "parts").iterdir() if path.name.startswith("convnet-4")]
    other = make_teacher(models.convnet(6, num_classes=3, channels=1), size=(1, 12, 12), seed=1)
    with pytest.raises(zskt.ZsktError, match=r"given-teacher was made with other settings .*fingerprint = "):
        check_settings(in_order([make_study(tmp_path, given=other).zero_shot(0, "zskt")]), tmp_path)


def test_beliefs_are_those_of_compare(made: Experiment) -> None:
    for seed in (0, 1):
        student, teacher = made.zero_shot(seed, "zskt"), made.teacher(seed)
        pair = zskt.load_student(student.folder(made.root)), zskt.load_teacher(teacher.folder(made.root))
        expected = zskt.compare(*pair, made.test.images, made.test.labels, zskt.Paths(images=4, seed=seed))
        found = measured(made, made.belief(student, seed))
        assert {name: found[name] for name in expected.measured} == expected.measured
        assert (found["steps"], found["step_size"], found["stepped"], found["start"]) == (100, 1, "first", "prediction")
        first = expected.transitions.first.mean(dim=0)
        assert found["curves"]["first"] == pytest.approx(first.tolist())
        assert len(found["curves"]["second_standard_error"]) == 100


def test_teacher_and_data_are_unchanged(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    before = [digest(*pair) for pair in ((study.train.images, study.train.labels), study.measuring)]
    teacher = study.teacher(0)
    make(study, teacher)
    files = {path.name: path.read_bytes() for path in teacher.folder(tmp_path).iterdir()}
    make(study, *every_kind(study).values())
    assert {path.name: path.read_bytes() for path in teacher.folder(tmp_path).iterdir()} == files
    assert [digest(*pair) for pair in ((study.train.images, study.train.labels), study.measuring)] == before


def test_the_global_generator_does_not_matter(made: Experiment, tmp_path: Path) -> None:
    torch.manual_seed(7)
    study = make_study(tmp_path)
    job = study.zero_shot(0, "zskt")
    make(study, job)
    assert weights(study, job) == weights(made, job)


CHANGES: list[tuple[Callable[[Experiment], Job], dict[str, Any], str]] = [
    (lambda s: s.teacher(0), {"budget": Budget(9, STEPS, 4)}, r"\(updates = 8, now 9"),
    (lambda s: s.teacher(0), {"budget": Budget(UPDATES, STEPS, 4, 0.2)}, r"\(learning_rate = 0.1, now 0.2\)"),
    (lambda s: s.distilled(0, 3), {"precision": "bf16"}, r"\(precision = 'fp32', now 'bf16'\)"),
    (lambda s: s.zero_shot(0, "zskt"), {"budget": Budget(UPDATES, 3, 4)}, r"\(steps = 2, now 3"),
    (lambda s: s.belief(s.zero_shot(0, "zskt"), 0), {"budget": Budget(UPDATES, STEPS, 5)}, r"\(images = 4, now 5"),
    (lambda s: s.teacher(0), {"train": coloured(60, seed=2)}, r"\(data = '.*', now '.*'\)"),
    (lambda s: s.zero_shot(0, "zskt"), {"test": coloured(30, seed=2)}, r"\(data = '.*', now '.*'\)"),
]


@pytest.mark.parametrize(("kind", "change", "words"), CHANGES)
def test_results_with_other_settings_are_refused(
    kind: Callable[[Experiment], Job], change: dict[str, Any], words: str, made: Experiment
) -> None:
    """Other images of the same name among them."""
    check_settings([kind(made)], made.root)
    with pytest.raises(zskt.ZsktError, match=f"was made with other settings {words}") as caught:
        check_settings([kind(replace(made, **change))], made.root)
    assert len(str(caught.value)) < 220 + len(str(made.root))


def test_each_network_has_its_own_learning_rate(tmp_path: Path) -> None:
    """LeNets diverge at the 0.1 of the others, whatever they stand beside."""
    study = make_study(tmp_path, model="wrn-10-1", student="lenet-5-half")
    assert study.taught("wrn-10-1", 0).settings["learning_rate"] == 0.1
    assert study.taught("lenet-5-half", 0).settings["learning_rate"] == 0.01
    assert study.distilled(0, None).settings["learning_rate"] == 0.01
    assert study.fine_tuned(0, "zskt", 3).settings["learning_rate"] == pytest.approx(0.01 / 4)
    given = replace(study, budget=replace(study.budget, learning_rate=0.3))
    assert given.distilled(0, None).settings["learning_rate"] == 0.3


def test_the_time_of_a_banks_step_is_that_of_the_average_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first steps are all synthesis."""
    monkeypatch.setattr("zskt.method.recipe.load_recipe", load_recipe)  # the real one
    for place in ("zskt.method.recipe", "zskt.paper.experiments"):
        monkeypatch.setattr(f"{place}.probe", lambda *_: Cost(round=1.0, step=0.1))
    study = make_study(tmp_path)
    settings = {"steps": 130, "bank.rounds": 5, "bank.warmup": 3, "generator.updates": 10}
    assert study.try_distilling("bank", settings) == pytest.approx((5 * 1.0 + 100 * 0.1) / 130)


def test_budgets_shrink_alike() -> None:
    budget = Budget(78_200, 80_000, 1_000, 0.03, 0.2)
    for scale in (1e-9, 0.001, 0.01, 0.3, 1.0):
        found = budget.scaled(scale)
        for name in ("updates", "steps", "images"):
            expected = getattr(budget, name) * scale
            assert abs(getattr(found, name) - expected) <= 0.5 or (getattr(found, name) == 1 and expected < 1)
        assert (found.learning_rate, found.fine_tuning) == (0.03, 0.2)
    assert budget.scaled(1) == budget


def test_constants_of_known_image_sets_are_used(tmp_path: Path) -> None:
    known = {"cifar10": True, "svhn": False, "fashion-mnist": True, "mnist": False, "images": False}
    for name, mirrored in known.items():
        size = (1, 28, 28) if "mnist" in name else (3, 32, 32)
        study = make_study(tmp_path, train=coloured(6, size=size, name=name))
        training = study.training("convnet-4", 0)
        assert (training.horizontal_flip, training.random_crop) == (mirrored, 28 // 8 if "mnist" in name else 4)
        assert (training.schedule, training.batch_size, training.weight_decay) == ("step", 128, 5e-4)
    published = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    assert normalisation(coloured(6, size=(3, 32, 32), name="cifar10")) == published
    for other in (coloured(90, size=(3, 16, 16), name="cifar10"), coloured(90, size=(3, 32, 32))):
        mean, std = normalisation(other)  # resized, or an unknown set
        pixels = other.images.double().numpy() / 255
        assert mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-4)
        assert std == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-4)


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"given": True}])
def test_every_kind_of_job_can_be_timed(change: dict[str, Any], tmp_path: Path) -> None:
    given = make_teacher(models.convnet(4, num_classes=3, channels=1), size=(1, 12, 12))
    study = make_study(tmp_path, **{"given": given} if "given" in change else change)
    before = given.fingerprint()
    jobs = in_order(list(every_kind(study).values()))
    found = time_jobs(jobs, tmp_path, seconds=0.01)
    assert found.keys() == {job.pace for job in jobs if job.units}
    assert len(found) == (4 if "given" in change else 5)  # cross-entropy of both networks, KD+AT, zskt, curves
    assert all(0 < seconds < 5 for seconds in found.values())
    assert given.fingerprint() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [2, 3, 30])
def test_units_of_transition_curves_are_their_gradient_steps(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "PATHS", 16)
    given = make_teacher(models.convnet(2, num_classes=classes, channels=1), size=(1, 12, 12))
    study = make_study(tmp_path, test=coloured(60, classes=classes), given=given, budget=Budget(1, 1, 3))
    make(study, study.teacher(0))
    gradients: list[str] = []
    real = torch.autograd.grad

    def counting(*arguments: Any, **more: Any) -> Any:
        if "allow_unused" not in more:  # which the probe of a network that is loaded asks for
            gradients.append("one")
        return real(*arguments, **more)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    job = study.belief(study.teacher(0), 0)  # with itself, as both agree on all images
    make(study, job)
    assert job.units == len(gradients) == math.ceil(3 * (classes - 1) / 16) * 99
    assert measured(study, job)["mean_transition_error"] == 0


@pytest.mark.parametrize("kind", ["zero-shot", "taught"])
def test_a_job_killed_before_its_first_checkpoint_starts_again(kind: str, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    job = study.zero_shot(0, "zskt") if kind == "zero-shot" else study.taught("convnet-2", 0)
    left = job.folder(tmp_path) / ("config.toml" if kind == "zero-shot" else "checkpoint/.00000001.safetensors.x7")
    left.parent.mkdir(parents=True)
    left.write_text("half")
    make(study, job)
    assert job.measured(tmp_path) is not None
