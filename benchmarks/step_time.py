"""Records `zskt bench`: the time of a step against the released loop, in fp32 and bf16, and peak memory.

python benchmarks/step_time.py [--pairs wrn lenet digits] [--device cuda]

Run it on an idle machine: the timings are interleaved, but other load still slows the arms unequally.
"""

import record
from zskt.bench import step_time as bench
from zskt.runtime import pick_device


def main() -> None:
    """Time each pair; one result file for all."""
    arguments = record.pair_arguments(__doc__, "rounds")
    results = {name: bench.run(name, arguments.device, rounds=arguments.rounds) for name in arguments.pairs}
    rows = []
    for name, result in results.items():
        for arm in bench.ARMS:
            ratio, spread = result.get(f"speedup_{arm}", 1.0), result.get(f"speedup_{arm}_range")
            times = f"{ratio:.2f}" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")
            cells = [f"{result[f'seconds_{arm}']:.3f}", times, f"{result[f'peak_mib_{arm}']:.0f}"]
            rows.append([bench.describe(name), arm, *cells])
    head = ["pair", "arm", "seconds", "times as fast, median (range)", "peak MiB"]
    name = "-".join(["step-time", *arguments.pairs, pick_device(arguments.device).type])
    record.write(name, "One step: engine and released loop, interleaved", results, head, rows)


if __name__ == "__main__":
    main()
