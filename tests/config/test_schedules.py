"""Schedules: each equals what a reader of the configuration would write with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import ConfigError, SchedulerConfig, make_schedule
from trainer.config.schedules import SCHEDULER_FIELDS, needs_horizon

PEAK = 0.4
TOTAL = 20
MANY = 45


def values(schedule, steps=MANY):
    return np.array([schedule(step) for step in range(steps)], np.float32)


def schedule_of(scheduler_type, run_length=None, learning_rate=PEAK, **fields):
    return make_schedule(SchedulerConfig(scheduler_type=scheduler_type, **fields), learning_rate, run_length)


def floored(schedule, floor):
    return lambda count: jnp.maximum(schedule(count), floor)


def triangles(floor, length):
    rise = optax.linear_schedule(floor, PEAK, length // 2)
    fall = optax.linear_schedule(PEAK, floor, length - length // 2)
    ends = [length * i // 2 for i in range(1, 2 * (MANY // length + 1))]
    return optax.join_schedules([rise, fall] * (MANY // length + 1), ends)


# Fields, and the schedule after the warm-up by hand: of the floor, the steps that are left, and the warm-up.
SCHEDULES = {
    "constant": ({}, lambda floor, steps, warmup: optax.constant_schedule(PEAK)),
    "linear": ({"total_steps": TOTAL}, lambda floor, steps, warmup: optax.linear_schedule(PEAK, floor, steps)),
    "cosine": (
        {"total_steps": TOTAL},
        lambda floor, steps, warmup: optax.cosine_decay_schedule(PEAK, steps, alpha=floor / PEAK),
    ),
    "polynomial": (
        {"total_steps": TOTAL, "power": 2.0},
        lambda floor, steps, warmup: optax.polynomial_schedule(PEAK, floor, 2.0, steps),
    ),
    "exponential": (
        {"decay_rate": 0.5, "decay_steps": 3},
        lambda floor, steps, warmup: floored(optax.exponential_decay(PEAK, 3, 0.5), floor),
    ),
    "step": (
        {"step_size": 3, "gamma": 0.5},
        lambda floor, steps, warmup: floored(optax.exponential_decay(PEAK, 3, 0.5, staircase=True), floor),
    ),
    "multistep": (
        {"milestones": (6, 9, 18), "gamma": 0.5},
        lambda floor, steps, warmup: floored(
            optax.piecewise_constant_schedule(PEAK, {6 - warmup: 0.5, 9 - warmup: 0.5, 18 - warmup: 0.5}), floor
        ),
    ),
    "cyclic": ({"cycle_length": 8}, lambda floor, steps, warmup: triangles(floor, 8)),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_schedule_equals_the_one_written_by_hand(kind, warmup, ratio):
    fields, build = SCHEDULES[kind]
    if kind != "constant":
        fields = {**fields, "min_lr_ratio": ratio}
    by_hand = build(PEAK * ratio, TOTAL - warmup, warmup)
    if warmup:
        by_hand = optax.join_schedules([optax.linear_schedule(0.0, PEAK, warmup), by_hand], [warmup])
    made = schedule_of(kind, warmup_steps=warmup, **fields)
    np.testing.assert_array_equal(values(made), values(by_hand))


@pytest.mark.parametrize(("warmup", "rise"), [(0, 6), (4, 4)])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_one_cycle_equals_the_one_written_by_hand(warmup, rise, ratio):
    by_hand = optax.warmup_cosine_decay_schedule(
        init_value=PEAK * ratio, peak_value=PEAK, warmup_steps=rise, decay_steps=TOTAL, end_value=PEAK * ratio
    )
    made = schedule_of("one_cycle", run_length=TOTAL, warmup_steps=warmup, min_lr_ratio=ratio)
    np.testing.assert_array_equal(values(made), values(by_hand))


def test_the_cases_cover_every_schedule():
    assert {*SCHEDULES, "one_cycle", "none"} == SCHEDULER_FIELDS.keys()


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("constant", {}, {0: 1.0, 1000: 1.0}),
        ("constant", {"warmup_steps": 4}, {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 5: 1.0}),
        ("linear", {"min_lr_ratio": 0.2}, {0: 1.0, 5: 0.6, 10: 0.2, 99: 0.2}),
        ("linear", {"warmup_steps": 2}, {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", {}, {0: 1.0, 5: 0.5, 10: 0.0, 99: 0.0}),
        ("cosine", {"min_lr_ratio": 0.5, "warmup_steps": 2}, {0: 0.0, 2: 1.0, 6: 0.75, 10: 0.5}),
        ("cosine", {"cycle_length": 4}, {0: 1.0, 2: 0.5, 4: 0.0, 5: 0.0}),
        ("polynomial", {"power": 2.0}, {0: 1.0, 5: 0.25, 10: 0.0}),
        ("exponential", {"decay_rate": 0.25, "decay_steps": 2}, {0: 1.0, 1: 0.5, 2: 0.25, 4: 0.0625}),
        ("exponential", {"decay_rate": 0.25, "decay_steps": 2, "min_lr_ratio": 0.1}, {2: 0.25, 4: 0.1, 99: 0.1}),
        ("step", {"step_size": 3}, {0: 1.0, 2: 1.0, 3: 0.1, 5: 0.1, 6: 0.01}),
        ("step", {"step_size": 3, "min_lr_ratio": 0.05}, {3: 0.1, 6: 0.05}),
        ("multistep", {"milestones": (2, 5)}, {0: 1.0, 1: 1.0, 2: 0.1, 4: 0.1, 5: 0.01}),
        ("multistep", {"milestones": (4,), "warmup_steps": 2}, {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.0, 4: 0.1}),
        ("cyclic", {"cycle_length": 4}, {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.5, 4: 0.0, 6: 1.0, 402: 1.0}),
        ("cyclic", {"cycle_length": 5, "min_lr_ratio": 0.4}, {0: 0.4, 1: 0.7, 2: 1.0, 3: 0.8, 4: 0.6, 5: 0.4, 7: 1.0}),
        ("cyclic", {"cycle_length": 4, "warmup_steps": 3}, {0: 0.0, 3: 0.0, 5: 1.0, 7: 0.0}),
        ("cyclic", {}, {0: 0.0, 5: 1.0, 10: 0.0, 15: 1.0}),
        ("one_cycle", {"min_lr_ratio": 0.1}, {0: 0.1, 1: 0.4, 3: 1.0, 10: 0.1, 99: 0.1}),
        ("one_cycle", {"warmup_steps": 5}, {0: 0.0, 1: 0.2, 5: 1.0, 10: 0.0}),
    ],
)
def test_schedule_by_numbers(kind, fields, expected):
    schedule = schedule_of(kind, run_length=10, learning_rate=1.0, **fields)
    np.testing.assert_allclose([schedule(step) for step in expected], list(expected.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "cyclic", "one_cycle"])
def test_a_configured_horizon_wins_over_the_length_of_the_run(kind):
    by_run = schedule_of(kind, run_length=10, warmup_steps=2)
    np.testing.assert_array_equal(
        values(schedule_of(kind, run_length=33, total_steps=10, warmup_steps=2)), values(by_run)
    )
    np.testing.assert_array_equal(values(schedule_of(kind, total_steps=10, warmup_steps=2)), values(by_run))


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULER_FIELDS if kind != "none"])
def test_schedules_are_traceable(kind):
    milestones = {"milestones": (6,)} if kind == "multistep" else {}
    schedule = schedule_of(kind, run_length=10, warmup_steps=3, **milestones)
    compiled = jax.jit(lambda count: jnp.asarray(schedule(count)))
    np.testing.assert_allclose(values(compiled, 15), values(schedule, 15), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", SCHEDULER_FIELDS)
def test_every_field_that_a_schedule_reads_changes_it(kind):
    other = {
        "warmup_steps": 2,
        "min_lr_ratio": 0.9,
        "total_steps": 6,
        "cycle_length": 4,
        "decay_rate": 0.5,
        "decay_steps": 2,
        "power": 3.0,
        "step_size": 2,
        "gamma": 0.7,
        "milestones": (3,),
    }
    base = {"exponential": {"decay_steps": 1}, "step": {"step_size": 3}, "multistep": {"milestones": (6,)}}
    base = base.get(kind, {})
    before = values(schedule_of(kind, 10, **base), 12)
    for field in SCHEDULER_FIELDS[kind]:
        after = values(schedule_of(kind, 10, **{**base, field: other[field]}), 12)
        assert np.any(before != after), field


HORIZONS = ["linear", "cosine", "polynomial", "cyclic", "one_cycle"]


@pytest.mark.parametrize("kind", SCHEDULER_FIELDS)
def test_needs_horizon(kind):
    milestones = {"milestones": (6,)} if kind == "multistep" else {}
    assert needs_horizon(SchedulerConfig(scheduler_type=kind, **milestones)) == (kind in HORIZONS)
    for field in SCHEDULER_FIELDS[kind] & {"total_steps", "cycle_length"}:
        assert not needs_horizon(SchedulerConfig(scheduler_type=kind, **{field: 9}))


@pytest.mark.parametrize("kind", HORIZONS)
def test_an_unknown_horizon_is_refused(kind):
    with pytest.raises(ConfigError) as caught:
        schedule_of(kind)
    assert str(caught.value) == (
        "`SchedulerConfig.total_steps` is left out and the length of the run is not known here; set it, or set "
        f"`TrainingConfig.steps_per_epoch`. The schedule {kind!r} needs to know when it ends."
    )


@pytest.mark.parametrize("kind", HORIZONS)
@pytest.mark.parametrize("run_length", [4, 5])
def test_a_warmup_longer_than_the_run_is_refused(kind, run_length):
    with pytest.raises(ConfigError) as caught:
        schedule_of(kind, run_length=run_length, warmup_steps=5)
    assert str(caught.value) == (
        f"`SchedulerConfig.warmup_steps` is 5, but the run ends after {run_length} steps; it must be shorter than "
        "the run."
    )


def test_a_schedule_without_horizon_may_be_cut_off_in_its_warmup():
    np.testing.assert_allclose(values(schedule_of("constant", run_length=2, warmup_steps=4), 2), [0, PEAK / 4])


def test_a_run_too_short_for_a_rise_starts_at_the_peak():
    np.testing.assert_allclose(values(schedule_of("one_cycle", run_length=2), 3), [PEAK, PEAK / 2, 0], atol=1e-8)
