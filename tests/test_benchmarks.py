"""The benchmarks measure what they say: baselines do the work of a step, turns are fair, tables hold what was found."""

import ast
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
    import features
    import timing
    import workloads
finally:
    sys.path.remove(str(ROOT / "benchmarks"))


def test_what_they_name_of_the_workloads_exists():
    """Also where the package that it is for is not installed here."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "workloads":
                assert hasattr(workloads, node.attr), f"{path.name}: workloads.{node.attr}"


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


SAME_LOSS = [
    feature
    for feature in features.FEATURES
    # Half precision rounds, factors are drawn anew, and half a batch is compared with a whole one.
    if feature.contenders not in (features.precision, features.low_rank, features.padding)
]


@pytest.mark.parametrize("feature", SAME_LOSS, ids=lambda feature: feature.name)
@pytest.mark.slow
def test_contenders_compute_the_loss_of_the_step_without_the_feature(feature):
    made = feature.contenders(workloads.dense(64)).values()
    first = [contender.update()["loss"] for contender in made if len(contender.batches) == 1]
    np.testing.assert_allclose(first, first[0], rtol=1e-5)


@pytest.mark.parametrize(
    "contenders",
    [features.reports, features.own, features.groups, features.trained_part, features.schedule_free, features.average],
)
@pytest.mark.slow
def test_by_hand_trains_as_the_feature_does(contenders):
    made = contenders(workloads.dense(64))
    ours, hand = (made[name] for name in (list(made)[1], list(made)[-1]))
    for _ in range(3):
        losses = [contender.update()["loss"] for contender in (ours, hand)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_half_precision_by_hand_is_that_of_the_feature():
    made = features.precision(workloads.dense(64))
    losses = {name: float(contender.update()["loss"]) for name, contender in made.items()}
    plain, ours, _, hand = losses.values()
    assert hand == pytest.approx(ours, rel=1e-4)
    assert ours == pytest.approx(plain, rel=1e-2)
    assert ours != plain


@pytest.mark.slow
def test_low_rank_factors_by_hand_are_as_many_and_start_at_the_same_loss():
    plain, ours, hand = features.low_rank(workloads.dense(64)).values()
    assert sorted(map(np.shape, jax.tree.leaves(ours.state.params))) == sorted(
        map(np.shape, jax.tree.leaves(hand.state[0]))
    )
    losses = [contender.update()["loss"] for contender in (plain, ours, hand)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_a_padded_batch_has_the_loss_of_the_short_one():
    _, padded, short = features.padding(workloads.dense(64)).values()
    assert float(padded.update()["loss"]) == pytest.approx(float(short.update()["loss"]), rel=1e-5)


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
