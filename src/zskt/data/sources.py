"""Sources of real images: the files in folders, zips and tars, without unpacking any to disk."""

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

from zskt.errors import ZsktError, failing, system_errors
from zskt.files import regular

Notice = Callable[[str], None]  # one line for the user

LARGEST = 2**30  # bytes per file; no known image set has a larger one
LARGEST_IMAGE = 2**26  # bytes per image file
MOST_EXPANSION, SMALL = 100, 2**24  # highest compression ratio of a file of more than SMALL bytes
IMAGE_NAME = re.compile(r".+\.(?:png|jpe?g|webp|bmp|gif|tiff?|p[gp]m)", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(r"(.*/)?(\.[^/]|__MACOSX/).*")


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    source: Path
    name: str  # path in the source, joined by /; the file's own name if the source is a plain file
    size: int  # bytes
    load: Callable[[], bytes]
    packed: int = LARGEST  # compressed bytes

    def __str__(self) -> str:
        return f"{self.source}: {self.name}"

    def read(self) -> bytes:
        """The content; gzip is decompressed whatever the file is called, except under an image's name."""
        image = IMAGE_NAME.fullmatch(self.name)
        most = min(LARGEST, LARGEST_IMAGE) if image else LARGEST
        if self.size > most:
            advice = "remove it" if image else "unpack it into a folder, or remove it"
            raise ZsktError(f"{self}: expected at most {most:,} bytes, found {self.size:,}; {advice}")
        if self.size > max(SMALL, MOST_EXPANSION * self.packed):
            raise ZsktError(f"{self} is a decompression bomb: {self.size:,} bytes from {self.packed:,}; remove it")
        with failing(f"{self} cannot be read", "check it or fetch it again"):
            data = self.load()
            if image or data[:2] != b"\x1f\x8b":
                return data
            most = min(LARGEST, max(SMALL, MOST_EXPANSION * len(data)))
            content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
            if len(content) > most:
                raise ValueError(f"a decompression bomb: over {most:,} bytes from {len(data):,}")
            return content


def members_of(path: Path, notice: Notice) -> list[Member]:
    """The visible files of one source. An archive stays open as long as its members exist."""
    with failing(f"{path} is damaged", "fetch it again"), system_errors("read", path):
        if path.is_dir():
            return _visible(_walk(path, notice))
        whole = Member(path, path.name, regular(path).stat().st_size, path.read_bytes)
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            found = [
                Member(path, e.filename, e.file_size, partial(archive.read, e), e.compress_size)
                for e in archive.infolist()
            ]
        elif tarfile.is_tarfile(path):
            data = memoryview(whole.read())  # in memory, because seeking in gzip is slow
            if bytes(data[:6]).startswith((b"BZh", b"\xfd7zXZ\x00")):
                raise ZsktError(f"expected .zip, .tar or .tar.gz, found {path}, compressed otherwise; pack it again")
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                spans = [(e.name, e.size, data[e.offset_data : e.offset_data + e.size]) for e in tar if e.isfile()]
            if any(length < 0 for _, length, _ in spans):
                raise ValueError("a member of negative size")
            found = [Member(path, name, length, partial(bytes, span)) for name, length, span in spans]
        else:
            found = [whole]
    return _visible(found)


def _visible(members: list[Member]) -> list[Member]:
    return [member for member in members if not _HIDDEN.fullmatch(member.name)]


def _walk(folder: Path, notice: Notice) -> list[Member]:
    def fail(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = [Path(parent, name) for parent, folders, files in walk for name in folders + files]
    if links := [path for path in paths if path.is_symlink()]:  # they may lead out of the folder
        notice(f"{folder}: symbolic links are not followed, {len(links)} found, such as {links[0]}")
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return [Member(folder, p.relative_to(folder).as_posix(), p.stat().st_size, p.read_bytes) for p in files]
