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

from zskt.errors import ZsktError, cannot, first_line

Notice = Callable[[str], None]  # one line for the user

LARGEST = 2**30  # bytes; no file of a known set is larger, a decompression bomb is
LARGEST_IMAGE = 2**26  # bytes of an image file
MOST_EXPANSION, SMALL = 100, 2**24  # unpacked bytes per packed one, of what is not small
IMAGE_NAME = re.compile(r".+\.(?:png|jpe?g|webp|bmp|gif|tiff?|p[gp]m)", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(r"(.*/)?(\.[^/]|__MACOSX/).*")


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    source: Path
    name: str  # relative to the source, parts joined by /; its own name where the source is a plain file
    size: int  # bytes
    load: Callable[[], bytes]
    packed: int = LARGEST  # bytes that it takes in an archive

    def __str__(self) -> str:
        return f"{self.source}: {self.name}"

    def read(self) -> bytes:
        """The content, decompressed where it is gzip, whatever the name says, unless that of an image."""
        image = IMAGE_NAME.fullmatch(self.name)
        most = min(LARGEST, LARGEST_IMAGE) if image else LARGEST
        if self.size > most:
            raise ZsktError(f"{self}: expected at most {most:,} bytes, found {self.size:,}; leave it out")
        if self.size > max(SMALL, MOST_EXPANSION * self.packed):
            raise ZsktError(f"{self} is a decompression bomb: {self.size:,} bytes from {self.packed:,}; leave it out")
        try:
            data = self.load()
            if image or data[:2] != b"\x1f\x8b":
                return data
            most = min(LARGEST, max(SMALL, MOST_EXPANSION * len(data)))
            content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
            if len(content) > most:
                raise ValueError(f"over {most:,} bytes from {len(data):,}, a decompression bomb")
            return content
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
            found = [
                Member(path, e.filename, e.file_size, partial(archive.read, e), e.compress_size)
                for e in archive.infolist()
            ]
        elif tarfile.is_tarfile(path):
            data = memoryview(whole.read())  # in memory, because seeking in a gzip is slow
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                spans = [(e.name, e.size, data[e.offset_data : e.offset_data + e.size]) for e in tar if e.isfile()]
            if any(length < 0 for _, length, _ in spans):
                raise ValueError("a member of negative size")
            found = [Member(path, name, length, partial(bytes, span)) for name, length, span in spans]
        else:
            found = [whole]
    except OSError as error:
        raise cannot("read", path, error) from error
    except (EOFError, NotImplementedError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
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
