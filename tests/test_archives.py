"""Crafted files: whatever they hold is refused, and none of it has run."""

import contextlib
import copy
import io
import json
import logging
import logging.handlers
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small import GREY, Normalisation, Payload, refused
from zskt.errors import ZsktError
from zskt.networks import archives
from zskt.networks.archives import open_archive, read_weights
from zskt.networks.foreign import quiet
from zskt.networks.loading import load_teacher
from zskt.networks.weights import import_weights

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


class Description(Normalisation):
    input_size: tuple[int, int, int]


HOW: Description = {"input_size": (3, 8, 8), **GREY}


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


def test_a_program_takes_trust_and_runs_nothing_without(
    program: Path, tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = rewritten(program, tmp_path / "evil.pt2", {"data/sample_inputs/model.pt": pickled(Payload(trace))})
    for path in (program, evil):
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipFile, "open", None)  # no member is read
            message = refused(partial(load_teacher, path, **GREY))
        assert "is an exported program, and loading it can run any code" in message
        assert "--trust" in message
    assert not trace.exists()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(load_teacher(program, trust=True, **GREY)(x), torch.export.load(program).module()(x))
    with contextlib.suppress(ZsktError):
        load_teacher(evil, trust=True, **GREY)
    assert trace.exists()  # so it would have run


def test_torch_says_nothing_beside_our_line(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def storage_ends(config: dict[str, Any]) -> None:
        config["config"]["conv.weight"]["tensor_meta"]["storage_offset"] = {"as_int": 10**9}

    handler = logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("torch.export"), "handlers", [handler])
    path = rewritten(program, tmp_path / "broken.pt2", {WEIGHTS: storage_ends})
    assert "cannot load" in refused(lambda: load_teacher(path, trust=True, **GREY))
    assert not handler.buffer


def test_quiet_keeps_the_terminal_clean_and_puts_everything_back(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyError), quiet():
        warnings.warn("a warning", stacklevel=1)
        print("a print")
        raise KeyError
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("elsewhere").isEnabledFor(logging.CRITICAL)
    with pytest.warns(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)


@pytest.mark.parametrize("how", ["zipped", "legacy", "plain pickle"])
@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.bin"])
def test_a_crafted_weights_file_is_refused_and_has_not_run(name: str, how: str, tmp_path: Path, trace: Path) -> None:
    path, content = tmp_path / name, {"state_dict": {"w": torch.ones(2)}, "extra": Payload(trace)}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"w": Payload(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zipped")
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_weights(path),
        lambda: import_weights(path, "wrn-10-1", (3, 8, 8), 10, **GREY),
        lambda: load_teacher(path, trust=True, **HOW),
    )
    for reader in readers:
        message = refused(reader)
        assert "wants to run posix.mkdir" in message
        assert "while loading, which is refused" in message
    assert not trace.exists()
    pickle.loads(path.read_bytes()) if how == "plain pickle" else torch.load(path, weights_only=False)
    assert trace.exists()  # the payload is live: an unsafe load does run it


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["/etc/passwd"], "absolute path"),
        (["C:\\x"], "absolute path"),
        (["a/../../x"], "leads out of the archive"),
        (["a\\..\\x"], "leads out of the archive"),
        ([link("a/link")], "symbolic link"),
        ([f"a/{i}" for i in range(11)], "11 members"),
        (["a/big"] * 2, "several members with the same name"),
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
    assert "a member larger than 1,000,000 bytes" in refused(lambda: read_weights(path))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/first", bytes(5_000))
        for i in range(9):  # entries of the directory that point at the first member's bytes
            twin = copy.copy(archive.getinfo("a/first"))
            twin.filename = f"a/{i}"
            archive.filelist.append(twin)
    assert "overlapping members" in refused(lambda: open_archive(path))


@pytest.mark.parametrize("length", [100, 3_000])
def test_a_damaged_program_is_refused(length: int, program: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(program.read_bytes()[:-length])
    assert "cut.pt2" in refused(lambda: load_teacher(tmp_path / "cut.pt2", trust=True, **GREY))

    def other_shape(model: dict[str, Any]) -> None:
        (linear,) = (node for node in model["graph_module"]["graph"]["nodes"] if "linear" in node["target"])
        linear["inputs"][1]["arg"]["as_tensor"]["name"] = "p_conv_weight"

    for change, words in ((b"{", "cannot load"), (b"{}", "cannot load"), (other_shape, "does not accept images")):
        broken = rewritten(program, tmp_path / "broken.pt2", {MODEL: change})
        assert words in refused(partial(load_teacher, broken, trust=True, **GREY))
