"""The cost of a shuffled batch from memory, beside indexing the same arrays with a NumPy permutation.

A turn is an epoch in batches of 128; the last one is short. Run it with ``python benchmarks/input.py``.
"""

import numpy as np

import by_hand
from timing import Report, compared, in_turns, per
from trainer import InMemoryData

BATCH_SIZE = 128


def contenders(data):
    draws = np.random.default_rng(0)
    epochs = iter(range(10**9))
    source = InMemoryData(data, BATCH_SIZE)

    def ours():
        for _ in source.shuffled((0, 0), next(epochs)):
            pass

    def numpy():
        for _ in by_hand.batches(data, BATCH_SIZE, draws):
            pass

    return {"NumPy": per(len(source), numpy), "InMemoryData": per(len(source), ours)}


def main():
    report = Report(__doc__, repeats=11)
    for rows, features in ((6000, 784), (10_000, 32)) if report.quick else ((60_000, 784), (1_000_000, 32)):
        draws = np.random.default_rng(0)
        data = {
            "input": draws.standard_normal((rows, features), np.float32),
            "target": draws.integers(0, 10, rows).astype(np.int32),
        }
        times = in_turns(contenders(data), report.repeats)
        report.table(f"{rows:,} rows of {features}", compared(times, "µs a batch", 1e6, {"x NumPy": "NumPy"}))
    report.close()


if __name__ == "__main__":
    main()
