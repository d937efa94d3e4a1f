"""The benchmarks measure what they say: baselines do the work of a step, turns are fair, tables hold what was found."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from trainer import TrainState, make_train_step

ROOT = Path(__file__).parent.parent

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import by_hand
    import timing
    import workloads
finally:
    sys.path.remove(str(ROOT / "benchmarks"))


def our_last_loss(workload, epochs):
    """Trains by the pure step on the batches that the baselines draw."""
    optimizer = workload.optimizer()
    state = TrainState.create(workload.make_model(), optimizer, rng=jax.random.key(0))
    step = jax.jit(make_train_step(workload.loss_fn, optimizer))
    draws = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in by_hand.batches(workload.data, workload.batch_size, draws):
            state, metrics = step(state, batch)
    return float(metrics["loss"])


@pytest.mark.parametrize(
    "workload",
    [workloads.dispatch_bound(60), workloads.digits(300)],
    ids=lambda workload: workload.name,
)
@pytest.mark.few(1)
def test_a_loop_by_hand_does_what_our_step_does(workload):
    assert by_hand.loop(workload)(2) == pytest.approx(our_last_loss(workload, 2), rel=1e-4)


@pytest.mark.parametrize("gather_first", [False, True])
def test_a_scan_by_hand_does_it_too_short_last_batch_included(gather_first):
    workload = workloads.dispatch_bound(60)
    scanned = by_hand.scan(workload, gather_first=gather_first)(3)
    assert scanned == pytest.approx(our_last_loss(workload, 3), rel=1e-4)


def test_turns_go_forwards_and_backwards_and_the_first_is_not_counted():
    calls = []

    def contender(name):
        return lambda: calls.append(name) or float(len(calls))

    times = timing.in_turns({name: contender(name) for name in "ab"}, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert times == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_a_ratio_is_the_median_of_quotients_and_not_the_quotient_of_medians():
    assert timing.ratio([2.0, 30.0, 3.0], [1.0, 10.0, 3.0]) == 2.0


@pytest.mark.slow
def test_a_benchmark_prints_a_table_and_writes_what_it_found(tmp_path):
    path = tmp_path / "deep" / "input.json"
    command = [sys.executable, "benchmarks/input.py", "--quick", "--repeats", "3", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "x NumPy" in done.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["repeats"] == 3
    assert found["machine"]["python"] == platform.python_version()
    for numpy, ours in found["tables"].values():
        assert numpy["x NumPy"] == 1.0
        assert len(ours["turns"]) == 3
        assert min(ours["turns"]) <= ours["µs a batch"] <= max(ours["turns"])
