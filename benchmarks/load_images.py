"""Loading an archive of PNGs as one uint8 tensor: with an empty cache, and from the cache.

python benchmarks/load_images.py cifar10-train-1.zip cifar10-train-2.zip cifar10-test.zip
"""

import argparse
import os
import tempfile
import time
from typing import Any

import record
from zskt.data.images import read


def main() -> None:
    """Read the training images twice, starting with an empty cache; write both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    arguments = parser.parse_args()
    rows, result = [], dict[str, Any]()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ZSKT_CACHE"] = cache
        for when in ("first", "again"):
            begun = time.perf_counter()
            dataset = read(arguments.data, "train")
            seconds = time.perf_counter() - begun
            result[when] = {"seconds": seconds, "images": len(dataset.images), "shape": list(dataset.images.shape)}
            rows.append([when, f"{len(dataset.images):,}", f"{seconds:.2f}", f"{len(dataset.images) / seconds:,.0f}"])
    record.write("load-images", "Images from archives to one tensor", result, ["", "images", "s", "images per s"], rows)


if __name__ == "__main__":
    main()
