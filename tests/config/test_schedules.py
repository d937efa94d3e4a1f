"""Schedules: each equals what a reader of the configuration would write with optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import ConfigError, OptimizerConfig, SchedulerConfig, make_optimizer, make_schedule
from trainer.config.optimizers import OPTIMIZER_FIELDS
from trainer.config.schedules import SCHEDULER_FIELDS, check_horizon, needs_horizon

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


def by_optax(config, length):
    """The schedule with optax's own constructors, which need a horizon that is a Python int."""
    warmup, floor = config.warmup_steps, PEAK * config.min_lr_ratio
    left = length - warmup
    if config.scheduler_type == "one_cycle":
        return optax.warmup_cosine_decay_schedule(floor, PEAK, warmup or int(0.3 * length), length, floor)
    if config.scheduler_type == "cyclic":
        half = max(left // 2, 1)
        rise = optax.linear_schedule(floor, PEAK, half)
        triangle = optax.join_schedules([rise, optax.linear_schedule(PEAK, floor, max(left - half, 1))], [half])
        after = lambda count: triangle(count % left)  # noqa: E731 - beside the constructors of the others
    else:
        after = {
            "linear": lambda: optax.linear_schedule(PEAK, floor, left),
            "cosine": lambda: optax.cosine_decay_schedule(PEAK, left, config.min_lr_ratio),
            "polynomial": lambda: optax.polynomial_schedule(PEAK, floor, config.power, left),
        }[config.scheduler_type]()
    return optax.join_schedules([optax.linear_schedule(0.0, PEAK, warmup), after], [warmup]) if warmup else after


LENGTHS = [1, 2, 3, 4, 7, 8, 9, 10, 33, 100, 999, 4096, 12345]
AROUND = [(kind, warmup, ratio) for kind in HORIZONS for warmup in (0, 1, 6) for ratio in (0.0, 0.1)]


def config_around(kind, warmup, ratio):
    power = {"power": 2.5} if kind == "polynomial" else {}
    return SchedulerConfig(scheduler_type=kind, warmup_steps=warmup, min_lr_ratio=ratio, **power)


def steps_around(length, seed=0):
    """Steps before, at and after the horizon; always the same number of them."""
    edges = [0, 1, 2, 5, 6, 7, length // 2, 3 * length // 10, length - 1, length, length + 1, 3 * length, 10**6]
    return np.array([*edges, *np.random.default_rng(seed).integers(0, 2 * length, 50)], np.int32)


@pytest.mark.parametrize(("kind", "warmup", "ratio"), AROUND)
@pytest.mark.few(2)
def test_schedules_with_a_horizon_equal_those_of_optax(kind, warmup, ratio):
    config = config_around(kind, warmup, ratio)
    for length in LENGTHS:
        if length > warmup:
            # Step by step, as in training: over an array XLA multiplies by 1/T, and optax misses the floor.
            made, by_hand = make_schedule(config, PEAK, length), by_optax(config, length)
            for step in jnp.asarray(steps_around(length)[:18]):
                np.testing.assert_allclose(made(step), by_hand(step), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "warmup", "ratio"), AROUND)
@pytest.mark.few(2)
def test_a_traced_horizon_gives_the_bits_of_a_concrete_one(kind, warmup, ratio):
    config = config_around(kind, warmup, ratio)
    traced = jax.jit(lambda steps, length: make_schedule(config, PEAK, length)(steps))
    for length in [4096, 10, 97]:
        steps = steps_around(length)
        concrete = jax.jit(make_schedule(config, PEAK, length))(steps)
        np.testing.assert_array_equal(traced(steps, jnp.int32(length)), concrete)
        one = jax.jit(make_schedule(config, PEAK, length))(steps[6])
        np.testing.assert_array_equal(jax.jit(make_schedule(config, PEAK, jnp.int32(length)))(steps[6]), one)
    assert traced._cache_size() == 1


@pytest.mark.parametrize("kind", SCHEDULER_FIELDS)
def test_every_schedule_takes_a_traced_horizon(kind):
    needed = {"multistep": {"milestones": (6,)}}.get(kind, {})
    by_config = {field: 8 for field in ("total_steps", "cycle_length") if field in SCHEDULER_FIELDS[kind]}
    for fields in ({}, *({field: length} for field, length in by_config.items())):
        config = SchedulerConfig(scheduler_type=kind, **needed, **fields)
        steps = steps_around(10)
        traced = jax.jit(lambda steps, length, config=config: make_schedule(config, PEAK, length)(steps))
        np.testing.assert_allclose(
            np.broadcast_to(traced(steps, jnp.int32(10)), steps.shape),
            np.broadcast_to(make_schedule(config, PEAK, 10)(steps), steps.shape),
            rtol=1e-5,
            atol=1e-7,
        )


@pytest.mark.parametrize("kind", HORIZONS)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_traced_horizon_within_the_warmup_gives_finite_rates(kind, length):
    config = SchedulerConfig(scheduler_type=kind, warmup_steps=5)
    with jax.debug_nans(True):
        rates = jax.jit(lambda length: make_schedule(config, PEAK, length)(jnp.arange(12)))(jnp.int32(length))
    assert np.all((rates >= 0) & (rates <= PEAK))


@pytest.mark.parametrize("optimizer_type", ["adam", "muon"])
@pytest.mark.few(1)
def test_a_step_with_a_traced_horizon_compiles_once(optimizer_type):
    config = OptimizerConfig(optimizer_type=optimizer_type, learning_rate=PEAK)
    warm = SchedulerConfig(scheduler_type="cosine", warmup_steps=2)
    traces = []

    def step(params, opt_state, grads, horizon):
        traces.append(horizon)
        optimizer = make_optimizer(config, make_schedule(warm, PEAK, horizon))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step)
    rng = np.random.default_rng(0)
    params = {"bias": jnp.asarray(rng.normal(size=3)), "matrix": jnp.asarray(rng.normal(size=(4, 3)))}
    for length in (4, 40):
        by_hand = jax.jit(lambda *args, length=length: step(*args, length))
        opt_state = make_optimizer(config, make_schedule(warm, PEAK, length)).init(params)
        made = expected = (params, opt_state)
        for _ in range(6):
            grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
            made, expected = compiled(*made, grads, jnp.int32(length)), by_hand(*expected, grads)
        chex.assert_trees_all_close(made, expected, rtol=1e-6)
        assert np.any(made[0]["matrix"] != params["matrix"])
    assert len([horizon for horizon in traces if isinstance(horizon, jax.Array)]) == 1
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("optimizer_type", OPTIMIZER_FIELDS)
def test_every_optimizer_takes_a_schedule_with_a_traced_horizon(optimizer_type):
    config = OptimizerConfig(optimizer_type=optimizer_type, learning_rate=PEAK)
    params = {"bias": np.ones(3, np.float32), "matrix": np.ones((4, 3), np.float32)}

    @jax.jit
    def update(horizon):
        optimizer = make_optimizer(config, make_schedule(SchedulerConfig(scheduler_type="linear"), PEAK, horizon))
        return optimizer.update(params, optimizer.init(params), params)[0]

    assert all(np.all(np.isfinite(leaf) & (leaf != 0)) for leaf in jax.tree.leaves(update(jnp.int32(9))))


@pytest.mark.parametrize("kind", SCHEDULER_FIELDS)
def test_check_horizon_takes_what_make_schedule_takes(kind):
    config = SchedulerConfig(scheduler_type=kind, **({"milestones": (6,)} if kind == "multistep" else {}))
    for length in (0, 1, 10, np.int64(10)):
        check_horizon(config, length)
        assert np.all(np.isfinite(values(make_schedule(config, PEAK, length), 12)))
    if needs_horizon(config):
        with pytest.raises(ConfigError, match="needs to know when it ends"):
            check_horizon(config, None)
    else:
        check_horizon(config, None)


def test_no_schedule_is_a_constant_rate_and_reads_nothing():
    config = SchedulerConfig.from_dict({"scheduler_type": "none", "warmup_steps": 0, "min_lr_ratio": 0.0})
    assert values(make_schedule(config, PEAK), 3).tolist() == [np.float32(PEAK)] * 3
    assert SchedulerConfig.from_dict(config.to_dict()) == config
    with pytest.warns(UserWarning, match=r"`SchedulerConfig\.warmup_steps` \(9\) does nothing"):
        config = SchedulerConfig(scheduler_type="none", warmup_steps=9)
    assert values(make_schedule(config, PEAK), 3).tolist() == [np.float32(PEAK)] * 3
