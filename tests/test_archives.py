"""Crafted files: whatever they hold is refused, and none of it has run."""

import copy
import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.networks import archives
from zskt.networks.archives import kind_of, open_archive, vetted
from zskt.networks.graphs import read_exported
from zskt.networks.loading import load_teacher
from zskt.networks.weights_file import read_weights

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
HOW = {"input_size": (3, 8, 8), "mean": [0.5] * 3, "std": [0.25] * 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().view(x.shape[0], -1))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.pt2` file as torch.export writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What a payload creates when it runs."""
    return tmp_path / "payload-ran"


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def rewritten(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of an archive with members replaced (bytes), edited (a function of their JSON) or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        prefix = old.namelist()[0].partition("/")[0]
        left = dict(changes)
        for member in old.infolist():
            name = member.filename.partition("/")[2]
            content = old.read(member)
            change = left.pop(name, content)
            if callable(change):
                value = json.loads(content)
                change(value)
                change = json.dumps(value).encode()
            new.writestr(member.filename, change)
        for name, content in left.items():
            new.writestr(f"{prefix}/{name}", content)
    return target


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(ZsktError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def graph(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["graph"]


def calls_mkdir(model: dict[str, Any], trace: Path) -> None:
    """An operation that is looked up by name: torch.os.mkdir."""
    node = copy.deepcopy(graph(model)["nodes"][0])
    argument = {"name": "", "arg": {"as_string": str(trace)}, "kind": 1}
    node |= {"target": "torch.os.mkdir", "inputs": [argument], "name": "made"}
    node["outputs"] = [{"as_tensor": {"name": "made"}}]
    graph(model)["tensor_values"]["made"] = graph(model)["tensor_values"]["conv2d"]
    graph(model)["nodes"].append(node)


def evaluates(model: dict[str, Any], trace: Path) -> None:
    """A size that sympy evaluates as Python."""
    size = {"as_expr": {"expr_str": f"__import__('os').mkdir('{trace}')", "hint": {"as_int": 2}}}
    graph(model)["tensor_values"]["x"]["sizes"][0] = size


def guards(model: dict[str, Any], trace: Path) -> None:
    """A guard that is executed as Python."""
    model["guards_code"] = [f"__import__('os').mkdir('{trace}') is None"]


def imports(model: dict[str, Any], trace: Path) -> None:
    """A structure whose enum is imported by name, and attributes of it read."""
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    enum = json.dumps({"__enum__": True, "fqn": "antigravity:geohash", "name": "x"})
    spec = json.loads(signature["in_spec"])
    spec[1]["context"] = enum
    signature["in_spec"] = json.dumps(spec)


def names(model: dict[str, Any], trace: Path) -> None:
    """A name that would land in generated code."""
    graph(model)["inputs"][-1]["as_tensor"]["name"] = f"x=__import__('os').mkdir('{trace}')"


def reads_files(model: dict[str, Any], trace: Path) -> None:
    graph(model)["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def overrides(model: dict[str, Any], trace: Path) -> None:
    graph(model)["nodes"][0]["target"] = "torch.ops.aten.add.__class__"


def as_pickles(config: dict[str, Any]) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


ATTACKS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "pickled sample inputs": (
        lambda t: {"data/sample_inputs/model.pt": pickled(Payload(t))},
        "wants to run posix.mkdir",
    ),
    "pickled weights": (
        lambda t: {WEIGHTS: as_pickles, "data/weights/weight_0": pickled(Payload(t))},
        "tensors as pickles",
    ),
    "old weights": (lambda t: {"data/weights/model.pt": pickled(Payload(t))}, "model.pt"),
    "custom object": (lambda t: {"data/constants/custom_obj_0": b"x"}, "custom_obj_0"),
    "opaque object": (lambda t: {"data/constants/opaque_obj_0": pickled(Payload(t))}, "opaque_obj_0"),
    "compiled library": (lambda t: {"data/aotinductor/model/a.so": b"\x7fELF"}, "a.so"),
    "operation": (lambda t: {MODEL: lambda m: calls_mkdir(m, t)}, "'torch.os.mkdir'"),
    "size": (lambda t: {MODEL: lambda m: evaluates(m, t)}, "the size"),
    "structure": (lambda t: {MODEL: lambda m: imports(m, t)}, "inputs or outputs"),
    "name": (lambda t: {MODEL: lambda m: names(m, t)}, "the text"),
    "file operation": (lambda t: {MODEL: lambda m: reads_files(m, t)}, "from_file"),
    "attribute": (lambda t: {MODEL: lambda m: overrides(m, t)}, "__class__"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_crafted_program_is_refused_and_has_not_run(attack: str, program: Path, tmp_path: Path, trace: Path) -> None:
    changes, words = ATTACKS[attack]
    path = rewritten(program, tmp_path / "evil.pt2", changes(trace))
    message = refused(lambda: load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3))
    assert words in message
    assert "--trust" in message
    assert not trace.exists()


@pytest.mark.parametrize("attack", ["pickled sample inputs", "size", "pickled weights"])
def test_the_stock_loader_would_have_run_it(attack: str, program: Path, tmp_path: Path, trace: Path) -> None:
    path = rewritten(program, tmp_path / "evil.pt2", ATTACKS[attack][0](trace))
    try:
        loaded = torch.export.load(path)
        loaded.module()(torch.randn(2, 3, 8, 8))
    except Exception:
        pass
    assert trace.exists()


def test_guards_are_dropped_and_have_not_run(program: Path, tmp_path: Path, trace: Path) -> None:
    path = rewritten(program, tmp_path / "evil.pt2", {MODEL: lambda m: guards(m, trace)})
    teacher = load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3)
    teacher(torch.randn(4, 3, 8, 8))
    assert not trace.exists()
    torch.export.load(path).module()(torch.randn(2, 3, 8, 8))
    assert trace.exists()  # so it would have run


def test_a_plain_program_passes_and_answers_the_same(program: Path) -> None:
    x = torch.randn(3, 3, 8, 8)
    expected = torch.export.load(program).module()(x)
    assert torch.equal(torch.export.load(vetted(program)).module()(x), expected)
    assert torch.equal(read_exported(program).network(x), expected)
    assert torch.equal(read_exported(program, trust=True).network(x), expected)


@pytest.mark.parametrize(
    "operation",
    [
        *("_reshape_alias.default", "_scaled_dot_product_flash_attention_for_cpu.default", "set_.source_Tensor"),
        *("resize_.default", "as_strided_.default", "squeeze_.dim", "relu.out", "from_file.default"),
        *("segment_reduce.default", "batch_norm_update_stats.default", "max_pool2d_with_indices_backward.default"),
        "fbgemm_linear_int8_weight.default",
    ],
)
def test_operations_that_could_leave_their_tensors_are_refused(operation: str, program: Path, tmp_path: Path) -> None:
    def names_it(model: dict[str, Any]) -> None:
        graph(model)["nodes"][0]["target"] = f"torch.ops.aten.{operation}"

    path = rewritten(program, tmp_path / "evil.pt2", {MODEL: names_it})
    assert f"the operation 'torch.ops.aten.{operation}'" in refused(lambda: vetted(path))


class InPlace(Net):
    """What the usual networks do in place: activations, a sum with a shortcut, values put into slices."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Dropout)
        self.activations = nn.ModuleList(kind(inplace=True) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        shifted = x.new_zeros(x.shape)
        shifted[:, :2] = x[:, 2:]
        shifted += x
        for activation in self.activations:
            shifted = activation(shifted * 2)  # each has a tensor of its own, for the backward pass
        return self.fc(shifted.flatten(1))


def test_operations_in_place_on_their_own_elements_pass(tmp_path: Path) -> None:
    module, x = InPlace().eval(), torch.randn(4, 3, 8, 8)
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=shapes), tmp_path / "net.pt2")
    teacher = load_teacher(tmp_path / "net.pt2", mean=[0.5] * 3, std=[0.25] * 3)
    torch.testing.assert_close(teacher(x), module(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, while it decomposes
def test_a_decomposed_norm_looks_at_the_sizes_of_its_tensors(program: Path, tmp_path: Path) -> None:
    torch.export.save(torch.export.load(program).run_decompositions(), tmp_path / "core.pt2")

    def moves(model: dict[str, Any]) -> None:  # 5 weights for 4 channels
        (norm,) = (node for node in graph(model)["nodes"] if "batch_norm" in node["target"])
        norm["inputs"][1]["arg"]["as_tensor"]["name"] = "p_fc_bias"

    path = rewritten(tmp_path / "core.pt2", tmp_path / "evil.pt2", {MODEL: moves})
    assert "does not take images" in refused(lambda: load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3))


@pytest.mark.parametrize("value", [{"as_int": 1}, {"as_none": True}])
@pytest.mark.parametrize("place", [6, 7], ids=["momentum", "epsilon"])
def test_odd_numbers_of_a_norm_are_taken_or_refused(
    place: int, value: dict[str, Any], program: Path, tmp_path: Path
) -> None:
    def sets(model: dict[str, Any]) -> None:
        (norm,) = (node for node in graph(model)["nodes"] if "batch_norm" in node["target"])
        norm["inputs"][place]["arg"] = value

    path = rewritten(program, tmp_path / "odd.pt2", {MODEL: sets})
    if value == {"as_int": 1}:
        load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3)
    else:
        refused(lambda: load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3))


def storage_ends(config: dict[str, Any]) -> None:
    config["config"]["conv.weight"]["tensor_meta"]["storage_offset"] = {"as_int": 10**9}


def other_shape(model: dict[str, Any]) -> None:
    (linear,) = (node for node in graph(model)["nodes"] if "linear" in node["target"])
    linear["inputs"][1]["arg"]["as_tensor"]["name"] = "p_conv_weight"


@pytest.mark.parametrize("change", [{WEIGHTS: storage_ends}, {MODEL: other_shape}], ids=["loading", "calling"])
def test_torch_says_nothing_beside_our_line(
    change: dict[str, Any], program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(program, tmp_path / "broken.pt2", change)
    refused(lambda: load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.bin"])
def test_a_crafted_weights_file_is_refused_and_has_not_run(name: str, tmp_path: Path, trace: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": Payload(trace)}, tmp_path / name)
    for work in (lambda: read_weights(tmp_path / name), lambda: load_teacher(tmp_path / name, trust=True, **HOW)):
        assert "wants to run posix.mkdir" in refused(work)
    assert not trace.exists()


def test_torchscript_takes_trust(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("constants.pkl", "data.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", b"")
    assert kind_of(tmp_path / "script.pt") == "TorchScript"
    assert "--trust" in refused(lambda: load_teacher(tmp_path / "script.pt", **HOW))


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["/etc/passwd"], "absolute path"),
        (["C:\\x"], "absolute path"),
        (["a/../../x"], "out of the archive"),
        (["a\\..\\x"], "out of the archive"),
        ([link("a/link")], "symbolic link"),
        ([f"a/{i}" for i in range(11)], "11 members"),
        (["a/big"] * 2, "several members of one name"),
    ],
    ids=["absolute", "drive", "dots", "backslashes", "link", "many", "twice"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_archives_that_lead_elsewhere_are_refused(
    members: list[Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 10)
    path = tmp_path / "odd.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, b"x")
    for work in (lambda: open_archive(path), lambda: read_weights(path), lambda: load_teacher(path, **HOW)):
        assert words in refused(work)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/zeros", bytes(10**7))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing is read
    assert "decompression bomb" in refused(lambda: read_weights(path))
    monkeypatch.setattr(archives, "MOST_EXPANSION", 10**6)
    monkeypatch.setattr(archives, "MOST_BYTES", 10**6)
    assert "a member of over 1,000,000 bytes" in refused(lambda: read_weights(path))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/first", bytes(5_000))
        for i in range(9):  # entries of the directory that point at the first member's bytes
            twin = copy.copy(archive.getinfo("a/first"))
            twin.filename = f"a/{i}"
            archive.filelist.append(twin)
    assert "share their bytes" in refused(lambda: open_archive(path))


@pytest.mark.parametrize("length", [100, 3_000])
def test_a_damaged_program_is_refused(length: int, program: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(program.read_bytes()[:-length])
    assert "cut.pt2" in refused(lambda: load_teacher(path, mean=[0.5] * 3, std=[0.25] * 3))
    broken = rewritten(program, tmp_path / "broken.pt2", {MODEL: b"{"})
    assert "damaged" in refused(lambda: vetted(broken))
    empty = rewritten(program, tmp_path / "empty.pt2", {MODEL: b"{}"})
    assert "cannot be loaded" in refused(lambda: read_exported(empty))
