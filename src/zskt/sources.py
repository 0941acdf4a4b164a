"""Sources of real images: the files in folders, zips and tars, none of them unpacked to disk."""

import gzip
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zskt.files import ZsktError, cannot, first_line

Notice = Callable[[str], None]  # one line for the user

LARGEST = 2**30  # bytes; no file of a known set is larger, a decompression bomb is
_HIDDEN = re.compile(r"(.*/)?(\.[^/]|__MACOSX/).*")


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    source: Path
    name: str  # relative to the source, parts joined by /; its own name where the source is a plain file
    size: int  # bytes
    load: Callable[[], bytes]

    def __str__(self) -> str:
        return f"{self.source}: {self.name}"

    def read(self) -> bytes:
        """The content, decompressed where it is gzip, whatever the name says."""
        if self.size > LARGEST:
            raise ZsktError(f"{self}: expected at most {LARGEST:,} bytes, found {self.size:,}; leave it out")
        try:
            data = self.load()
            return gzip.GzipFile(fileobj=io.BytesIO(data)).read(LARGEST) if data[:2] == b"\x1f\x8b" else data
        except Exception as error:  # a damaged or encrypted archive can raise nearly anything
            raise ZsktError(f"{self} cannot be read ({first_line(error)}); check it or fetch it again") from error


def members_of(path: Path, notice: Notice) -> list[Member]:
    """The visible files of one source. An archive stays open as long as its members are held."""
    try:
        whole = Member(path, path.name, path.stat().st_size, path.read_bytes)
        if path.is_dir():
            found = _walk(path, notice)
        elif zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            found = [Member(path, e.filename, e.file_size, partial(archive.read, e)) for e in archive.infolist()]
        elif tarfile.is_tarfile(path):
            data = memoryview(whole.read())  # in memory, because seeking in a gzip is slow
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                spans = [(e.name, e.size, data[e.offset_data : e.offset_data + e.size]) for e in tar if e.isfile()]
            found = [Member(path, name, length, partial(bytes, span)) for name, length, span in spans]
        else:
            found = [whole]
    except OSError as error:
        raise cannot("read", path, error) from error
    except (EOFError, NotImplementedError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ZsktError(f"{path} is not a whole archive ({first_line(error)}); fetch it again") from error
    return [member for member in found if not _HIDDEN.fullmatch(member.name)]


def _walk(folder: Path, notice: Notice) -> list[Member]:
    def fail(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = [Path(parent, name) for parent, folders, files in walk for name in folders + files]
    if links := [path for path in paths if path.is_symlink()]:  # they may lead out of the folder
        notice(f"{folder}: symbolic links are not followed, {len(links)} found, such as {links[0]}")
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return [Member(folder, p.relative_to(folder).as_posix(), p.stat().st_size, p.read_bytes) for p in files]
