"""Files are whole or absent; what the operating system refuses is said in one line."""

import builtins
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from small import refused
from zskt.errors import UsageError, ZsktError, unknown
from zskt.files import (
    appearing,
    held,
    make_folder,
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
    write_text,
)


def interrupted(path: Path, error: BaseException) -> None:
    """Half of a file, then `error`."""
    with replacing(path) as file:
        file.write(b"half of the n")
        file.flush()
        assert not path.exists() or path.read_text() == "old"
        raise error


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_write_leaves_no_trace(there: bool, error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if there:
        path.write_text("old")
    with pytest.raises((type(error), ZsktError)):
        interrupted(path, error)
    assert [p.name for p in tmp_path.iterdir()] == (["file.json"] if there else [])
    assert not there or path.read_text() == "old"


def test_a_complete_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "old")
    write_text(path, "neu: ä €")
    assert path.read_text(encoding="utf-8") == "neu: ä €"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644  # mkstemp's own would be readable by its owner only


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str, real: Callable[..., object], *arguments: Any) -> object:
        calls.append(name)
        return real(*arguments)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(noted, name, getattr(os, name)))
    write_text(tmp_path / "file", "x")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def synced_folders(monkeypatch: pytest.MonkeyPatch, number: int = 0) -> list[tuple[int, int]]:
    """The folders that are fsynced from now on, by device and inode; with a `number` that error instead."""
    real, found = os.fsync, []

    def fsync(descriptor: int) -> None:
        state = os.fstat(descriptor)
        if stat.S_ISDIR(state.st_mode):
            found.append((state.st_dev, state.st_ino))
            if number:
                raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_new_folders_are_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = synced_folders(monkeypatch)
    write_text(tmp_path / "new" / "folder" / "file", "x")
    states = [path.stat() for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "folder")]
    assert found == [(state.st_dev, state.st_ino) for state in states]
    write_text(tmp_path / "new" / "folder" / "file", "y")
    assert len(found) == 4


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_text(path / "in a new folder", text)])
def test_a_folder_that_fails_to_sync_is_said(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        synced_folders(patch, errno.EIO)
        assert "Input/output error" in one_line(lambda: write(tmp_path / "a", "x"))
    synced_folders(monkeypatch, errno.EINVAL)  # a file system that cannot
    write(tmp_path / "b", "x")
    assert (tmp_path / "b").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, -float("inf")]}])
def test_json_stays_valid(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, None, "ä"]})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, value)
    assert read_json(path) == {"a": [1, 2.5, None, "ä"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def one_line(work: Callable[[], object]) -> str:
    with pytest.raises(ZsktError) as error:
        work()
    assert not isinstance(error.value, UsageError)
    assert "\n" not in str(error.value)
    return str(error.value)


WRITERS = {
    "text": lambda path: write_text(path, "x"),
    "json": lambda path: write_json(path, {}),
    "tensors": lambda path: write_tensors(path, {"x": torch.ones(2)}),
}
FAILURES = [
    (errno.ENOSPC, "No space left on device; free some space"),
    (errno.EACCES, "Permission denied; check the permissions"),
    (errno.EROFS, "Read-only file system; choose a writable place"),
    (errno.EIO, "check the path and try again"),
]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("number", "words"), FAILURES, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("call", ["fsync", "replace", "mkstemp"])
def test_what_the_system_refuses_is_one_line(
    call: str, number: int, words: str, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile if call == "mkstemp" else os, call, refuse)
        message = one_line(lambda: write(tmp_path / "file"))
    assert message.startswith(f"cannot write {tmp_path / 'file'}: ")
    assert words in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk(write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        return builtins.open("/dev/full", "wb")

    monkeypatch.setattr(os, "fdopen", full)
    assert "No space left on device; free some space" in one_line(lambda: write(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for below in (tmp_path / "file" / "below", tmp_path / "file" / "below" / "far"):
        assert "is a file" in one_line(partial(write_text, below, "x"))
    assert "cannot write" in one_line(lambda: write_text(tmp_path, "x"))  # a folder is there
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []
    readers: list[Callable[[Path], object]] = [read_json, read_tensors]
    for read in readers:
        assert "check the path" in one_line(partial(read, tmp_path / "absent"))
        assert "found a folder" in one_line(partial(read, tmp_path))
        assert str(tmp_path / "file") in one_line(partial(read, tmp_path / "file"))


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    grid = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tensors = {
        "channels_last": grid.to(memory_format=torch.channels_last),
        "transposed": grid.transpose(0, 3).requires_grad_(),
        "view": grid[:, 1],
        "twice": grid[:, 1],  # shares memory with the one before
        "bf16": grid.bfloat16() / 3,
        "count": torch.tensor(7),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"note": "ä"})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"note": "ä"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].view(-1).tolist() == pytest.approx(tensor.flatten().tolist(), abs=0, nan_ok=True)


def test_unknown_names_come_with_the_nearest() -> None:
    error = unknown("recipe", "zsktt", ["other", "zskt"])
    assert isinstance(error, UsageError)
    assert str(error) == "unknown recipe 'zsktt': did you mean zskt? valid are other, zskt"
    assert str(unknown("recipe", "x", ["zskt"])) == "unknown recipe 'x': valid are zskt"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_new_folder_appears_whole_or_not_at_all(error: BaseException, tmp_path: Path) -> None:
    def work(fail: BaseException | None) -> None:
        with appearing(tmp_path / "new") as place:
            place.mkdir()
            (place / "first").write_text("1")
            assert not (tmp_path / "new").exists()
            if fail:
                raise fail
            (place.parent / "scratch").touch()

    with pytest.raises((type(error), ZsktError)):
        work(error)
    assert list(tmp_path.iterdir()) == []
    work(None)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["new", "new/first"]
    with pytest.raises(ZsktError, match="already exists"):
        work(None)


def test_nothing_appears_where_something_is_or_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for path in (tmp_path / "link", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ZsktError, match=r"choose another (place with )?--out"), appearing(path):
            raise AssertionError("no place should have been given")
    assert {path.name for path in tmp_path.iterdir()} == {"link", "file"}


def test_a_folder_that_is_held_is_not_made_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run):
        make_folder(tmp_path / "other" / "deep")
        for path in (run / "a.json", run / "deep" / "a.json"):
            assert f"{run} is gone; put it back" in refused(partial(write_json, path, {}))
        assert not run.exists()
        run.mkdir()
        write_json(run / "deep" / "a.json", {})
    write_json(tmp_path / "run 2" / "a.json", {})
    shutil.rmtree(run)
    write_json(run / "a.json", {})
    assert run.exists()
