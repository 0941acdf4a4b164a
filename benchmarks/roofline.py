"""Records `zskt bench --explain`: the roofline of each phase of a step on this machine.

python benchmarks/roofline.py [--pairs wrn lenet] [--device cuda]
"""

import record
from zskt.bench import step_time as bench
from zskt.bench.roofline import PHASES
from zskt.runtime import pick_device


def main() -> None:
    """Count and time each pair; one result file for all."""
    arguments = record.pair_arguments(__doc__, "steps")
    results = {name: bench.explain_pair(name, arguments.device, steps=arguments.steps) for name in arguments.pairs}
    rows = []
    for name, result in results.items():
        for precision in bench.ENGINE:
            found = result[precision]
            rates = f"{found['operations_per_second'] / 1e9:,.0f} GFLOP/s, {found['bytes_per_second'] / 1e9:,.1f} GB/s"
            for phase, row in found["phases"].items():
                rows.append(
                    [
                        f"{bench.PAIRS[name].teacher} -> {bench.PAIRS[name].student}",
                        f"{precision} ({rates})",
                        PHASES.get(phase, "whole step"),
                        f"{row['operations'] / 1e9:,.1f}",
                        f"{row['bytes'] / 1e9:.3f}",
                        f"{row['seconds_at_best']:.4f}",
                        f"{row['seconds']:.4f}",
                        f"{row['fraction']:.0%}",
                    ]
                )
    head = ["pair", "precision", "phase", "GFLOP", "least GB", "least s", "measured s", "attained"]
    name = "-".join(["roofline", *arguments.pairs, pick_device(arguments.device).type])
    record.write(name, "Each phase of a step and the roofline of this machine", results, head, rows)


if __name__ == "__main__":
    main()
