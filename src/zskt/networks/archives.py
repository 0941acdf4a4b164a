"""Checks of zip archives (torch checkpoints, TorchScript, torch.export); reads weight files without running code."""

import argparse
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from zskt.errors import ZsktError, failing, system_errors
from zskt.files import read_tensors, regular

MOST_MEMBERS = 100_000
MOST_BYTES = 2**36  # 64 GiB in total, unpacked
MOST_EXPANSION = 100  # unpacked bytes of a member per packed one; torch does not compress at all

Kind = Literal["weights", "TorchScript", "exported program"]


def open_archive(path: Path) -> zipfile.ZipFile:
    """A zip archive whose directory passes these checks; the caller closes it.

    Raises ZsktError for absolute names or `..`, symbolic links, duplicate names, and more than MOST_MEMBERS members,
    MOST_BYTES or MOST_EXPANSION, all before any member is read.
    """
    with failing(f"{path} is a damaged archive", "fetch or save it again"), system_errors("read", path):
        archive = zipfile.ZipFile(path)
    members = archive.infolist()
    names = [member.filename for member in members]
    checks: list[tuple[str, Callable[[zipfile.ZipInfo], bool]]] = [
        ("an absolute path", lambda m: bool(re.match(r"[/\\]|[A-Za-z]:", m.filename))),
        ("a path that leads out of the archive", lambda m: ".." in re.split(r"[/\\]", m.filename)),
        ("a symbolic link", lambda m: stat.S_ISLNK(m.external_attr >> 16)),
        (f"a member larger than {MOST_BYTES:,} bytes", lambda m: m.file_size > MOST_BYTES),
        ("a decompression bomb", lambda m: m.file_size > MOST_EXPANSION * (m.compress_size + 1_000)),
    ]
    wrong = next((f"{what}, {m.filename[:80]!r}" for m in members for what, bad in checks if bad(m)), None)
    if len(members) > MOST_MEMBERS:
        wrong = f"{len(members):,} members, more than {MOST_MEMBERS:,}"
    elif wrong is None and len(set(names)) < len(names):
        wrong = "several members with the same name"
    elif wrong is None and (total := sum(member.file_size for member in members)) > MOST_BYTES:
        wrong = f"{total:,} bytes unpacked, more than {MOST_BYTES:,}"
    elif wrong is None and sum(member.compress_size for member in members) > path.stat().st_size:
        wrong = "overlapping members"
    if wrong is not None:
        archive.close()
        raise ZsktError(f"{path} is refused: expected a plain archive, found {wrong}; get it from a source you trust")
    return archive


def kind_of(path: Path) -> Kind:
    """What a torch file holds, by the names of its members; a file that is no zip archive can only be weights."""
    if not zipfile.is_zipfile(regular(path)):
        return "weights"
    with open_archive(path) as archive:
        names = {name.partition("/")[2] or name for name in archive.namelist()}
    if names & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        return "exported program"
    return "TorchScript" if "constants.pkl" in names else "weights"


def read_weights(path: Path) -> Any:
    """The content of a `.safetensors` file or torch checkpoint; no code in it is run.

    Torch files are loaded with `weights_only`; of other classes only `argparse.Namespace` is allowed, which many
    training scripts save with the weights. Raises ZsktError for anything unreadable, truncated or unsafe.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    with system_errors("read", path), regular(path).open("rb") as file:
        zipped = zipfile.is_zipfile(file)
    if zipped:
        again = "fetch or save it again"
        with open_archive(path) as archive, failing(f"{path} is a damaged archive", again):
            if damaged := archive.testzip():  # torch does not verify checksums
                raise ZsktError(f"{path} is damaged: wrong checksum of {damaged}; {again}")
    with failing(f"{path} is truncated or not a weights file", "fetch or save it again"):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about unusual pickle protocols
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if wanted := re.search(r"GLOBAL (\S+)", str(error)):
                raise ZsktError(
                    f"{path} wants to run {wanted[1]} while loading, which is refused; save only the state dict, with "
                    "safetensors or torch.save(model.state_dict(), ...), and import that"
                ) from error
            raise ZsktError(
                f"{path} is not a torch checkpoint of tensors; fetch it again, or save the state dict"
            ) from error
