"""Foreign weights: mapped by name, confirmed by shape, never by order; no code in a file is run."""

import argparse
import functools
import random
import re
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from small import refused
from zskt.errors import UsageError, ZsktError
from zskt.networks import models
from zskt.networks.classifier import Classifier, unit_normalisation
from zskt.networks.folder import load_network, save_teacher
from zskt.networks.suggestions import _kinds
from zskt.networks.weights import find_renaming, find_state_dict, import_weights, parse_renames

SIZE, CLASSES = (3, 32, 32), 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
Shapes = dict[str, tuple[int, ...]]


def network(spec: str = "wrn-10-1", num_classes: int = CLASSES) -> nn.Module:
    """Random weights and BatchNorm statistics: no two tensors are equal, so a wrong mapping changes the outputs."""
    torch.manual_seed(0)
    module = models.build(spec, num_classes, SIZE)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return module.eval()


@functools.cache
def shapes_of(spec: str) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in models.build(spec, CLASSES, SIZE).state_dict().items()}


def renamed_by(rename: Callable[[str], str], own: Shapes) -> tuple[Shapes, dict[str, str]]:
    """Foreign shapes and the true mapping."""
    return {rename(key): shape for key, shape in own.items()}, {rename(key): key for key in own}


def bring(path: Path, spec: str = "wrn-10-1", **options: Any) -> Classifier:
    return import_weights(path, spec, SIZE, CLASSES, MEAN, STD, **options)[0]


@torch.no_grad()
def same_outputs(teacher: Classifier, source: nn.Module) -> bool:
    images = torch.randn(4, *SIZE)
    return torch.equal(teacher(images), source(images))


# --- finding the state dict


def test_state_dict_is_found_at_the_top_and_nested() -> None:
    weights = {"a.weight": torch.ones(2), "a.bias": torch.ones(1)}
    optimiser = {
        "state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}},
        "param_groups": [{"lr": 0.1}],
    }
    assert find_state_dict(weights).keys() == weights.keys()
    checkpoint = {"args": argparse.Namespace(lr=1), "epoch": 3, "optimizer": optimiser, "best": {"acc": torch.ones(())}}
    for key in ("state_dict", "model", "net", "model_state_dict", "weights"):
        assert find_state_dict(checkpoint | {key: weights}).keys() == weights.keys()
    assert find_state_dict({"student": {"state_dict": weights}} | checkpoint).keys() == weights.keys()


def test_equally_large_state_dicts_are_refused_by_name() -> None:
    weights = {"a.weight": torch.ones(2)}
    with pytest.raises(ZsktError, match=r"found 2 of 1 tensors: ema.state_dict, model; choose one by .*--key ema"):
        find_state_dict({"model": weights, "ema": {"state_dict": dict(weights)}})


def test_one_of_several_networks_is_taken_by_key() -> None:
    ones, twos = {"a.weight": torch.ones(2)}, {"a.weight": torch.full((2,), 2.0)}
    saved = {"model": ones, "ema": {"state_dict": twos}, "both": {"teacher.a.weight": torch.full((2,), 3.0)}}
    for key, value in (("model", 1), ("ema", 2), ("ema.state_dict", 2), ("both.teacher", 3), ("teacher", 3)):
        found = find_state_dict(saved, key)
        assert found.keys() == ones.keys()
        assert found["a.weight"].tolist() == [value, value], key
    assert find_state_dict({"teacher.a": torch.ones(2), "teachers.a": torch.zeros(2)}, "teacher").keys() == {"a"}
    with pytest.raises(ZsktError, match=r"'teachr': did you mean teacher"):
        find_state_dict(saved, "teachr")


@pytest.mark.parametrize("loaded", [{"epoch": 3, "acc": 0.5}, {}, [1, 2], torch.ones(3)])
def test_no_state_dict_is_an_error(loaded: object) -> None:
    with pytest.raises(ZsktError, match="expected a state dict"):
        find_state_dict(loaded)


def test_circular_and_deeply_nested_files_terminate() -> None:
    circular: dict[str, object] = {}
    circular["again"] = circular
    deep: dict[str, object] = {"a.weight": torch.ones(1)}
    for _ in range(5_000):
        deep = {"deeper": deep}
    with pytest.raises(ZsktError, match="expected a state dict"):
        find_state_dict(circular)
    assert list(find_state_dict(deep)) == ["a.weight"]


# --- finding the renaming


@pytest.mark.parametrize("spec", ["wrn-10-1", "wrn-16-1", "wrn-40-2", "resnet-18", "resnet-34", "vgg-11", "lenet-5"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "module.model.", "1.", "module.1."])
def test_own_names_map_to_themselves_under_any_prefix(spec: str, prefix: str) -> None:
    foreign, truth = renamed_by(lambda key: prefix + key, shapes_of(spec))
    assert find_renaming(foreign, shapes_of(spec)) == truth


@pytest.mark.parametrize(
    ("spec", "pattern", "replacement"),
    [
        ("wrn-16-1", r"\bshortcut\b", "convShortcut"),
        ("wrn-16-1", r"\bbn(\d)\b", r"batch_norm\1"),
        ("wrn-16-1", r"\blayer\b", "nblockLayer"),
        ("wrn-16-1", r"\bfc\b", "head.fc"),
        ("wrn-16-1", r"\bblock(\d)\b", r"stage\1"),
        ("resnet-18", r"\bbn(\d)\b", r"batch_norm\1"),
        ("resnet-18", r"\bdownsample\b", "shortcut"),
        ("resnet-34", r"^(?!fc)", "backbone."),
        ("resnet-34", r"^fc", "linear"),
        ("vgg-11", r"\bstage", "features.conv"),
        ("lenet-5", r"\bfc(\d)", r"classifier.f\1"),
    ],
)
def test_one_consistent_renaming_is_found(spec: str, pattern: str, replacement: str) -> None:
    foreign, truth = renamed_by(lambda key: re.sub(pattern, replacement, key), shapes_of(spec))
    assert foreign.keys() != shapes_of(spec).keys()
    assert find_renaming(foreign, shapes_of(spec)) == truth


@pytest.mark.parametrize("spec", ["wrn-40-2", "resnet-34"])
def test_wholly_foreign_names_are_mapped_quickly(spec: str) -> None:
    def disguise(key: str) -> str:
        *path, leaf = key.split(".")
        return ".".join(["net", *(word if word.isdecimal() else f"m{word[::-1]}" for word in path), leaf])

    foreign, truth = renamed_by(disguise, shapes_of(spec))
    start = time.process_time()
    assert find_renaming(foreign, shapes_of(spec)) == truth
    assert time.process_time() - start < 20  # backtracking over all names would take forever


def test_order_of_definition_does_not_matter() -> None:
    own = shapes_of("wrn-16-1")
    foreign, truth = renamed_by(lambda key: re.sub(r"\b(bn|conv)(\d)\b", r"\1_\2", key), own)
    assert find_renaming(dict(reversed(foreign.items())), own) == truth


def test_permuted_definitions_that_would_load_by_order_are_refused() -> None:
    """A network that defines its second convolution first, all shapes equal: loading by position would not complain."""
    own: Shapes = {"conv1.weight": (8, 8, 3, 3), "conv2.weight": (8, 8, 3, 3), "fc.weight": (10, 8)}
    permuted: Shapes = {"late.weight": (8, 8, 3, 3), "early.weight": (8, 8, 3, 3), "fc.weight": (10, 8)}
    assert list(permuted.values()) == list(own.values())
    line = refused(lambda: find_renaming(permuted, own))
    assert "--rename early=conv1 late=conv2" in line
    assert "--rename early=conv2 late=conv1" in line

    by_name: Shapes = {f"net.conv{i}.weight": (8, 8, 3, 3) for i in (2, 1)} | {"net.fc.weight": (10, 8)}
    assert find_renaming(by_name, own) == {key: key.removeprefix("net.") for key in by_name}


def counted_from_0(key: str) -> str:
    return re.sub(r"(?<=\.)(bn|conv)(\d)", lambda m: f"{m[1]}{int(m[2]) - 1}", key)


def test_partly_equal_names_do_not_settle_a_choice() -> None:
    """Counting from 0: `bn1` exists on both sides and fits, but means our `bn2`. Only shapes could tell, and do not."""
    own = shapes_of("resnet-18")
    foreign, truth = renamed_by(lambda key: counted_from_0(re.sub(r"^(?=bn|conv)", "stem_", key)), own)
    line = refused(lambda: find_renaming(foreign, own))
    assert "--rename bn0=bn1 bn1=bn2" in line
    assert "--rename bn0=bn2 bn1=bn1" in line
    assert find_renaming(foreign, own, {"bn0": "bn1", "bn1": "bn2"}) == truth


def test_one_component_never_maps_to_two() -> None:
    """The stem's `bn1` is ours, the blocks count from 0: no single renaming of `bn1` serves both."""
    own = shapes_of("resnet-18")
    foreign, _ = renamed_by(counted_from_0, own)
    with pytest.raises(ZsktError, match="no consistent renaming of bn0, conv0 to bn2, conv2"):
        find_renaming(foreign, own)


def test_every_candidate_in_the_error_resolves_the_ambiguity() -> None:
    own: Shapes = {f"{kind}{i}.weight": ((4, 4) if kind == "conv" else (4,)) for kind in ("conv", "bn") for i in (1, 2)}
    own |= {"fc.weight": (10, 4)}
    foreign = {re.sub("conv", "c", re.sub("bn", "norm", key)): shape for key, shape in own.items()}
    lines = re.findall(r"--rename ([^|]*)", refused(lambda: find_renaming(foreign, own)))
    assert len(lines) >= 2
    found = [find_renaming(foreign, own, parse_renames(shlex.split(line))) for line in lines]
    assert len({tuple(mapping.items()) for mapping in found}) == len(lines)
    assert any(mapping == {re.sub("conv", "c", re.sub("bn", "norm", key)): key for key in own} for mapping in found)


def test_the_search_is_bounded_for_hostile_names() -> None:
    own = shapes_of("wrn-40-2")
    numbers = {path: i for i, path in enumerate({key.rpartition(".")[0] for key in own})}
    unrelated: Shapes = {}
    for key, shape in own.items():
        path, _, leaf = key.rpartition(".")
        unrelated[".".join(f"{letter}{numbers[path]}" for letter in "abcd") + f".{leaf}"] = shape

    def graph(seed: int) -> Shapes:  # renaming one onto another is graph isomorphism
        edges = random.Random(seed).sample([(i, j) for i in range(14) for j in range(14)], 50)
        return {f"{'xX'[seed]}{i}.{'yY'[seed]}{j}.weight": (4, 4) for i, j in edges}

    start = time.perf_counter()
    for names, ours in ((unrelated, own), (graph(0), graph(1))):
        with pytest.raises(ZsktError, match="too many ways to map the names"):
            find_renaming(names, ours)
    assert time.perf_counter() - start < 20


def test_only_the_batch_counters_may_be_missing() -> None:
    own = shapes_of("wrn-10-1")
    old = {f"module.{key}": shape for key, shape in own.items() if "num_batches_tracked" not in key}
    assert set(find_renaming(old, own).values()) == {key for key in own if "num_batches_tracked" not in key}
    del old["module.bn1.running_mean"]
    with pytest.raises(ZsktError, match=r"bn1.running_mean: expected \(64,\), found nothing"):
        find_renaming(old, own)


def test_extra_tensors_are_refused_unless_omitted() -> None:
    own = shapes_of("wrn-10-1")
    foreign = own | {"aux.fc.weight": (10, 64), "aux.fc.bias": (10,), "block1.scale": (1,)}
    with pytest.raises(ZsktError, match=r"block1.scale: expected nothing, found \(1,\)"):
        find_renaming(foreign, own)
    assert find_renaming(foreign, own, parse_renames(["aux=-", "block1.scale=-"])) == {key: key for key in own}


def test_renames_apply_before_the_search_and_may_join_components() -> None:
    own = shapes_of("wrn-16-1")
    foreign, truth = renamed_by(lambda key: re.sub(r"block(\d).layer", r"layers.group\1.units", key), own)
    assert find_renaming(foreign, own) == truth
    assert find_renaming(foreign, own, parse_renames([f"layers.group{i}=block{i}" for i in (1, 2, 3)])) == truth
    assert find_renaming(foreign, own, parse_renames(["layers="])) == truth
    merged, truth = renamed_by(lambda key: re.sub(r"block(\d).layer", r"layer\1", key), own)
    with pytest.raises(ZsktError, match="the weights do not fit the model"):
        find_renaming(merged, own)
    assert find_renaming(merged, own, parse_renames([f"layer{i}=block{i}.layer" for i in (1, 2, 3)])) == truth


@pytest.mark.parametrize("entry", ["", "a", "=b", "a=b=c", "a..b=c", "a=.b", "a.=b"])
def test_malformed_renames_are_usage_errors(entry: str) -> None:
    with pytest.raises(UsageError, match="expected A=B"):
        parse_renames([entry])


def test_renames_without_effect_or_in_conflict_are_usage_errors() -> None:
    own = shapes_of("wrn-10-1")
    with pytest.raises(UsageError, match="'convshortcut': did you mean shortcut"):
        find_renaming(own, own, {"convshortcut": "shortcut"})
    with pytest.raises(UsageError, match="'shortcutt': did you mean shortcut"):
        find_renaming(own, own, {"shortcut": "shortcutt"})
    with pytest.raises(UsageError, match=r"'block1.layer.0.bn2.weight' the name of another tensor"):
        find_renaming(own, own, {"bn1": "bn2", "bn2": "bn2"})
    with pytest.raises(UsageError, match="'a' is given twice"):
        parse_renames(["a=b", "a=c"])


# --- importing files


def checkpoint(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    optimiser = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    return {
        "args": argparse.Namespace(lr=0.1),
        "epoch": 7,
        "state_dict": {prefix + name: tensor for name, tensor in module.state_dict().items()},
        "optimizer": optimiser.state_dict(),
    }


def test_a_training_checkpoint_becomes_a_teacher_folder(tmp_path: Path) -> None:
    source = network()
    saved = checkpoint(source, "module.")
    saved["state_dict"] = {name.replace("shortcut", "convShortcut"): t for name, t in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "model.pth.tar")
    teacher, report = import_weights(tmp_path / "model.pth.tar", "wrn-10-1", SIZE, CLASSES, MEAN, STD)
    assert same_outputs(teacher, source)
    assert report.metadata["renamed"] == {"module": "", "convShortcut": "shortcut"}
    assert report.notices == ("46 tensors mapped by name: module dropped, convShortcut -> shortcut",)
    save_teacher(tmp_path / "teacher", teacher, **report.metadata)
    assert same_outputs(load_network(tmp_path / "teacher"), source)


def test_safetensors_and_other_float_types(tmp_path: Path) -> None:
    source = network().double()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    teacher = bring(tmp_path / "model.safetensors")
    assert {t.dtype for t in teacher.module.parameters()} == {torch.float32}
    assert same_outputs(teacher, source.float())


def test_checkpoints_without_batch_counters(tmp_path: Path) -> None:
    source = network()
    torch.save({k: v for k, v in source.state_dict().items() if "num_batches" not in k}, tmp_path / "old.pth")
    teacher = bring(tmp_path / "old.pth")
    assert same_outputs(teacher, source)
    assert teacher.module.state_dict()["bn1.num_batches_tracked"] == 0


def test_mmclassification_resnet18(tmp_path: Path) -> None:
    source = network("resnet-18")
    layout = {("head." if name.startswith("fc.") else "backbone.") + name: t for name, t in source.state_dict().items()}
    meta = {"epoch": 200, "CLASSES": ["airplane", "automobile"], "mmcls_version": "0.24.0"}
    torch.save({"meta": meta, "state_dict": layout}, tmp_path / "resnet18_b16x8_cifar10.pth")
    mean, std = (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)
    path = tmp_path / "resnet18_b16x8_cifar10.pth"
    teacher, report = import_weights(path, "resnet-18", SIZE, CLASSES, mean, std)
    assert same_outputs(teacher, source)
    assert teacher.mean.flatten().tolist() == pytest.approx(MEAN, abs=1e-4)
    assert teacher.std.flatten().tolist() == pytest.approx(STD, abs=1e-4)
    assert report.metadata["renamed"] == {"backbone": "", "head": ""}
    assert "read as 0..255 and divided by 255" in report.notices[0]
    assert "backbone dropped, head dropped" in report.notices[1]


@pytest.mark.parametrize("name", ["fc.", "linear."])
def test_wrong_class_count_names_our_layer(tmp_path: Path, name: str) -> None:
    weights = {k.replace("fc.", name): v for k, v in network(num_classes=100).state_dict().items()}
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(ZsktError, match=r"fc.weight: expected \(10, 64\), found \(100, 64\); fc.bias: .*--num-classes"):
        bring(tmp_path / "model.pth")


@pytest.mark.parametrize("spec", ["wrn-16-1", "wrn-10-2", "lenet-5", "vgg-11"])
def test_wrong_architecture_is_one_line(tmp_path: Path, spec: str) -> None:
    torch.save(network().state_dict(), tmp_path / "model.pth")
    line = refused(lambda: bring(tmp_path / "model.pth", spec))
    assert re.search(r"the weights do not fit the model: .*: expected .*, found .*--model", line)
    assert len(line) < 600
    assert line.endswith("its shapes are those of --model wrn-10-1")


@pytest.mark.parametrize(("spec", "classes"), [("wrn-16-2", 10), ("resnet-18-16", 100), ("lenet-5-half", 7)])
def test_a_file_that_does_not_fit_is_recognised_by_its_shapes(spec: str, classes: int, tmp_path: Path) -> None:
    weights = {f"net.{name.replace('conv', 'c')}": t for name, t in network(spec, classes).state_dict().items()}
    torch.save(weights, tmp_path / "model.pth")
    line = refused(lambda: bring(tmp_path / "model.pth", "wrn-10-1"))
    wanted = re.search(r"its shapes are those of --model (\S+)(?: --num-classes (\d+))?$", line)
    assert wanted is not None, line
    assert (wanted[1], int(wanted[2] or CLASSES)) == (spec, classes)


def test_a_teacher_and_its_student_in_one_file(tmp_path: Path) -> None:
    """As a distillation of mmrazor saves them."""
    teacher, student = network("wrn-10-2"), network("wrn-10-1")
    both = {f"architecture.backbone.{name}": tensor for name, tensor in student.state_dict().items()}
    both |= {f"teacher.backbone.{name}": tensor for name, tensor in teacher.state_dict().items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": both}, tmp_path / "epoch_1.pth")
    assert refused(lambda: bring(tmp_path / "epoch_1.pth")).endswith("its shapes are those of --key architecture")
    assert same_outputs(bring(tmp_path / "epoch_1.pth", key="architecture"), student)
    line = refused(lambda: bring(tmp_path / "epoch_1.pth", key="teacher"))
    assert line.endswith("its shapes are those of --model wrn-10-2")
    assert same_outputs(bring(tmp_path / "epoch_1.pth", "wrn-10-2", key="teacher"), teacher)


def test_a_suggestion_names_what_was_not_given(tmp_path: Path) -> None:
    weights = network().state_dict()
    torch.save(weights | {"fc.bias": torch.full((CLASSES,), torch.nan)}, tmp_path / "nan.pth")
    line = refused(lambda: bring(tmp_path / "nan.pth"))
    assert "NaN or infinity" in line
    assert "its shapes" not in line
    swapped = {name.replace("bn1", "x").replace("bn2", "bn1").replace("x", "y.y"): t for name, t in weights.items()}
    torch.save(swapped, tmp_path / "names.pth")  # the shapes fit, the names do not
    assert "its shapes" not in refused(lambda: bring(tmp_path / "names.pth"))


def test_looking_for_a_model_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many linear layers of different sizes a file has."""
    built: list[str] = []
    actual = models.build

    def counted(spec: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
        built.append(spec)
        return actual(spec, num_classes, input_size)

    monkeypatch.setattr(models, "build", counted)
    _kinds.cache_clear()
    torch.save(nn.Sequential(*(nn.Linear(n, n + 1) for n in range(3, 40))).state_dict(), tmp_path / "many.pth")
    assert "its shapes" not in refused(lambda: bring(tmp_path / "many.pth"))
    assert len(built) < 100


def test_what_resembles_none_of_our_networks_gets_no_suggestion(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model.pth")
    assert "its shapes" not in refused(lambda: bring(tmp_path / "model.pth"))


def test_networks_of_the_same_tensors_compute_something_else() -> None:
    """The one whose shortcuts see the raw input: against the block written out by hand."""
    torch.manual_seed(0)
    (name,) = models.with_same_tensors("wrn-10-2")
    ours, raw = network("wrn-10-2"), network(name)
    assert models.with_same_tensors(name) == ["wrn-10-2"]
    assert getattr(raw, "spec", None) == name
    raw.load_state_dict(ours.state_dict())  # the same names and shapes
    assert not same_outputs(Classifier(raw, input_size=SIZE, mean=[0.0] * 3, std=[1.0] * 3), ours)
    x = torch.randn(2, 3, 8, 8)

    def relu(y: Tensor) -> Tensor:
        return y.clamp(min=0)

    block: Any
    with torch.no_grad():
        out = raw.get_submodule("conv1")(x)
        for stage in ("block1", "block2", "block3"):
            block = raw.get_submodule(f"{stage}.layer.0")
            residual = block.conv2(relu(block.bn2(block.conv1(relu(block.bn1(out))))))
            out = block.shortcut(out) + residual
        out = raw.get_submodule("fc")(relu(raw.get_submodule("bn1")(out)).mean(dim=(2, 3)))
        torch.testing.assert_close(raw(x), out)


def test_ambiguous_file_is_refused_and_rename_resolves_it(tmp_path: Path) -> None:
    source = network("resnet-18")
    disguise = {"bn1": "second_norm", "bn2": "first_norm"}  # alphabetical order misleads, too
    weights = {
        re.sub(r"(?<=\d\.)bn\d", lambda match: disguise[match[0]], name): tensor
        for name, tensor in source.state_dict().items()
    }
    torch.save(weights, tmp_path / "model.pth")
    line = refused(lambda: bring(tmp_path / "model.pth", "resnet-18"))
    assert "found several that fit all shapes" in line
    assert "--rename first_norm=bn2 second_norm=bn1" in line
    assert "--rename first_norm=bn1 second_norm=bn2" in line
    rename = parse_renames(["first_norm=bn2", "second_norm=bn1"])
    assert same_outputs(bring(tmp_path / "model.pth", "resnet-18", rename=rename), source)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nan", "inf", "integer", "sparse", "quantised", "float4", "nested"])
def test_tensors_other_than_finite_floats_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    state = network().state_dict()
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    name = {"quantised": counter, "float4": "fc.weight"}.get(kind, "fc.bias")
    odd: dict[str, Callable[[], Tensor]] = {
        "nan": lambda: state[name].index_fill(0, torch.tensor([3]), float("nan")),
        "inf": lambda: state[name].index_fill(0, torch.tensor([3]), float("inf")),
        "integer": lambda: state[name].long(),
        "sparse": lambda: state[name].to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.zeros(()), 1.0, 0, torch.qint8),
        "float4": lambda: torch.zeros(state[name].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    }
    torch.save(state | {name: odd[kind]()}, tmp_path / "model.pth")
    with pytest.raises(ZsktError, match=rf"{name}: expected a dense tensor"):
        bring(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_truncated_and_missing_files_are_one_line(tmp_path: Path, name: str, part: float) -> None:
    save = torch.save if name.endswith("pth") else safetensors.torch.save_file
    save(network().state_dict(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(part * len(whole))])
    assert name in refused(lambda: bring(tmp_path / name))
    (tmp_path / name).unlink()
    assert re.search(f"cannot read .*{name}", refused(lambda: bring(tmp_path / name)))


# --- normalisation


def test_values_above_one_mean_0_to_255() -> None:
    assert unit_normalisation(MEAN, STD) == (MEAN, STD, ())
    mean, std, notices = unit_normalisation((103.53, 116.28, 123.675), (1, 1, 1))
    assert mean == pytest.approx((0.406, 0.456, 0.485), abs=1e-3)
    assert std == pytest.approx((1 / 255,) * 3)
    assert len(notices) == 1


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (127.5,)), ((127.5,), (0.5,)), ((300.0,), (1.0,)), ((-3.0,), (9.0,))]
)
def test_mixed_or_impossible_scales_are_usage_errors(mean: tuple[float], std: tuple[float]) -> None:
    with pytest.raises(UsageError, match=r"expected all in \[0, 1\] or all in 0..255"):
        unit_normalisation(mean, std)


def test_where_the_scale_is_known_nothing_is_guessed() -> None:
    assert unit_normalisation([127.5], [51], white=255, where="file") == ([0.5], [0.2], ())
    for mean, std, white in (([0.0], [1.0], 0.99), ([127.5], [51], 1), ([0.5], [0.0], 1), ([0.5], [float("nan")], 1)):
        with pytest.raises(ZsktError, match=r"^file: mean .* and std .*: expected") as error:
            unit_normalisation(mean, std, white=white, where="file")
        assert not isinstance(error.value, UsageError)  # nobody gave an option


class Renamed:
    """An OrderedDict that the file gives an attribute `items`."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.content.items()),), {"items": 5, "keys": 6}


def test_attributes_in_a_file_shadow_no_methods(tmp_path: Path) -> None:
    state = network().state_dict()
    weight = nn.Parameter(state["fc.weight"])
    weight.to, weight.isfinite = 7, 8  # type: ignore[assignment,method-assign]
    torch.save(Renamed(state | {"fc.weight": weight}), tmp_path / "model.pth")
    assert torch.equal(bring(tmp_path / "model.pth").module.state_dict()["fc.weight"], weight)
