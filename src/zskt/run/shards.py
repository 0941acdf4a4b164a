"""Rows that a method only ever adds to, such as images of a bank, in files beside the checkpoints.

A checkpoint holds the names and hashes of these files, not their content: a bank may have gigabytes, a run has fifty
checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from zskt.errors import ZsktError
from zskt.files import digest, read_tensors, remove, write_tensors
from zskt.networks import ranks


class Shard(TypedDict):
    """A file of consecutive rows."""

    file: str
    rows: int
    sha256: str


class Shards:
    """The files of a run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: list[Shard] = []
        """as of the checkpoint that was written or read last"""

    def append(self, rows: Mapping[str, Tensor]) -> list[Shard]:
        """Write rows (M, ...) that no file has yet as one more file; returns all files for the checkpoint."""
        first, new = self.rows, len(next(iter(rows.values())))
        if new:
            path = self.folder / f"{first:08d}-{first + new:08d}.safetensors"
            write_tensors(path, rows)
            self.known.append(Shard(file=path.name, rows=new, sha256=digest(path)))
        return self.known

    @property
    def rows(self) -> int:
        """How many rows the files have."""
        return sum(shard["rows"] for shard in self.known)

    def check(self, known: Sequence[Shard]) -> None:
        """Raise ZsktError if a file that a checkpoint names is damaged or missing."""
        for shard in known:
            path = self.folder / Path(shard["file"]).name
            if digest(path) != shard["sha256"]:
                raise ZsktError(f"{path} is not as the checkpoint recorded it; restore it")

    def read(self, known: Sequence[Shard]) -> Iterator[dict[str, Tensor]]:
        """The rows of each file that a checkpoint names, in order; others, written after it, are removed."""
        self.known = list(known)
        names = {shard["file"] for shard in known}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names and ranks.is_main():
                remove(path)
        for shard in known:
            yield read_tensors(self.folder / Path(shard["file"]).name)[0]


def saved_rows(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The rows of a finished run, file by file."""
    for path in sorted(folder.glob("*.safetensors")):
        yield read_tensors(path)[0]
