"""Do few disagreements without data mean a high accuracy? Rank correlations over finished runs of one teacher.

python benchmarks/tracking.py RUN... --on "handwritten digits"

Each RUN was made with test images, by zskt distill or the league, and looked at by zskt inspect RUN --teacher TEACHER.
The result is also written to where zskt inspect reads it.
"""

import argparse
from pathlib import Path

import record
from zskt.files import write_json
from zskt.run.without_data import KINDS, TRACKING, rank_correlations


def main() -> None:
    """Correlate, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--on", required=True, help="what the images show")
    given = parser.parse_args()
    found = rank_correlations(given.runs) | {"on": given.on}
    worths = found["rank_correlations"]
    rows = [[KINDS[kind], "undefined" if worth is None else f"{worth:.2f}"] for kind, worth in worths.items()]
    title = (
        f"Rank correlation of accuracy with few disagreements, over {found['runs']} students of one teacher, {given.on}"
    )
    names = ["/".join(run.resolve().parts[-2:]) for run in given.runs]
    record.write("tracking", title, found | {"students": names}, ["images", "rank correlation"], rows)
    write_json(TRACKING, found)


if __name__ == "__main__":
    main()
