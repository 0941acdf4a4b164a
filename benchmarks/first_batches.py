"""Does the student's loss fall within each pseudo batch, and from one to the next, at 3 x 32 x 32?

python benchmarks/first_batches.py RUN

RUN is a folder made by
    zskt distill TEACHER --student wrn-10-1 --recipe zskt --steps 20 --out RUN
with TEACHER imported from the authors' WRN-16-1. Exits with 1 unless the loss falls from the first to the tenth update
in at least 18 of the 20 batches, and the mean loss of the last five batches is below 60 % of the first batch's.
"""

import statistics
import sys
from pathlib import Path

import record
from zskt.run.checkpoint import read_lines


def main() -> None:
    """Read the run's log, write the table, and check both conditions."""
    losses = [line["student_loss"] for line in read_lines(Path(sys.argv[1]) / "metrics.jsonl")]
    assert len(losses) == 20, f"expected a line for each of 20 steps, found {len(losses)}"
    falling = sum(batch[-1] < batch[0] for batch in losses)
    means = [statistics.fmean(batch) for batch in losses]
    share = statistics.fmean(means[-5:]) / means[0]
    rows = [
        [str(i + 1), f"{b[0]:.3f}", f"{b[-1]:.3f}", f"{m:.3f}"]
        for i, (b, m) in enumerate(zip(losses, means, strict=True))
    ]
    rows.append(["falling within the batch", f"{falling} of 20", "", ""])
    rows.append(["last five / first", f"{share:.3f}", "", ""])
    title = "WRN-16-1 (authors') -> WRN-10-1, recipe zskt: the first 20 pseudo batches"
    result = {"student_loss": losses, "falling": falling, "last_five_over_first": share}
    record.write("first-batches", title, result, ["batch", "1st update", "10th update", "mean"], rows)
    sys.exit(falling < 18 or share >= 0.6)


if __name__ == "__main__":
    main()
