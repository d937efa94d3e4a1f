"""Optimizers and schedules: each equals what a reader of the configuration would write with optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import ConfigError, OptimizerConfig, SchedulerConfig, make_optimizer, make_schedule
from trainer.config.optimizers import needs_horizon
from trainer.config.training import OPTIMIZER_FIELDS, SCHEDULER_FIELDS

RATE = 0.03
SHAPES = {"bias": (4,), "kernel": (3, 3, 2, 4), "matrix": (4, 8)}
MATRICES_ONLY = {"bias": False, "kernel": True, "matrix": True}


def random_tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run(optimizer, num_steps=6, shapes=SHAPES):
    """Returns the updates of every step, on gradients that differ from step to step."""

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updates

    params = random_tree(0, shapes)
    opt_state = optimizer.init(params)
    steps = []
    for i in range(num_steps):
        params, opt_state, updates = step(params, opt_state, random_tree(i + 1, shapes))
        steps.append(updates)
    return steps


def make(optimizer_type, **fields):
    return make_optimizer(OptimizerConfig(optimizer_type=optimizer_type, learning_rate=RATE, **fields))


ADAM = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4}
BY_RATE = optax.scale_by_learning_rate(RATE)
EQUIVALENTS = {
    "adam": (ADAM, optax.chain(optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4), BY_RATE)),
    "adam with L2": (
        {**ADAM, "weight_decay": 0.1},
        optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4), BY_RATE),
    ),
    "adamw": (
        {**ADAM, "weight_decay": 0.1},
        optax.chain(optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4), optax.add_decayed_weights(0.1), BY_RATE),
    ),
    "adamw without decay": (ADAM, optax.chain(optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4), BY_RATE)),
    "adamw masked": (
        {**ADAM, "weight_decay": 0.1, "decay_mask": True},
        optax.chain(
            optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4), optax.add_decayed_weights(0.1, MATRICES_ONLY), BY_RATE
        ),
    ),
    "sgd": ({}, BY_RATE),
    "sgd with momentum": ({"momentum": 0.7}, optax.chain(optax.trace(0.7), BY_RATE)),
    "sgd of Nesterov, masked L2": (
        {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1, "decay_mask": True},
        optax.chain(optax.add_decayed_weights(0.1, MATRICES_ONLY), optax.trace(0.7, nesterov=True), BY_RATE),
    ),
    "rmsprop": (
        {"beta2": 0.8, "eps": 1e-4, "initial_accumulator_value": 0.3},
        optax.chain(optax.scale_by_rms(decay=0.8, eps=1e-4, initial_scale=0.3), BY_RATE),
    ),
    "rmsprop of Nesterov with L2": (
        {
            "beta2": 0.8,
            "eps": 1e-4,
            "initial_accumulator_value": 0.3,
            "momentum": 0.7,
            "nesterov": True,
            "weight_decay": 0.1,
        },
        optax.chain(
            optax.add_decayed_weights(0.1),
            optax.scale_by_rms(decay=0.8, eps=1e-4, initial_scale=0.3),
            BY_RATE,
            optax.trace(0.7, nesterov=True),
        ),
    ),
    "adagrad": (
        {"eps": 1e-4, "initial_accumulator_value": 0.3, "weight_decay": 0.1},
        optax.chain(
            optax.add_decayed_weights(0.1), optax.scale_by_rss(initial_accumulator_value=0.3, eps=1e-4), BY_RATE
        ),
    ),
    "lamb": (
        {**ADAM, "weight_decay": 0.1, "decay_mask": True},
        optax.chain(
            optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4),
            optax.add_decayed_weights(0.1, MATRICES_ONLY),
            optax.scale_by_trust_ratio(),
            BY_RATE,
        ),
    ),
    "radam": (
        {**ADAM, "weight_decay": 0.1},
        optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_radam(b1=0.8, b2=0.95, eps=1e-4), BY_RATE),
    ),
    "nadam": (
        {**ADAM, "weight_decay": 0.1},
        optax.chain(
            optax.add_decayed_weights(0.1), optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4, nesterov=True), BY_RATE
        ),
    ),
    "lion": (
        {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "decay_mask": True},
        optax.chain(optax.scale_by_lion(b1=0.8, b2=0.95), optax.add_decayed_weights(0.1, MATRICES_ONLY), BY_RATE),
    ),
    "adafactor": (
        {"momentum": 0.7, "weight_decay": 0.1, "decay_mask": True},
        optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_learning_rate(RATE, flip_sign=False),
            optax.scale_by_param_block_rms(),
            optax.ema(0.7, debias=False),
            optax.add_decayed_weights(0.1, MATRICES_ONLY),
            optax.scale(-1),
        ),
    ),
    "adafactor without momentum": (
        {},
        optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_learning_rate(RATE, flip_sign=False),
            optax.scale_by_param_block_rms(),
            optax.scale(-1),
        ),
    ),
    "muon": (
        {**ADAM, "momentum": 0.7, "weight_decay": 0.1},
        optax.contrib.muon(
            RATE, beta=0.7, eps=1e-4, weight_decay=0.1, adam_b1=0.8, adam_b2=0.95, adam_weight_decay=0.1
        ),
    ),
    "muon masked, usual momentum": (
        {**ADAM, "weight_decay": 0.1, "decay_mask": True},
        optax.contrib.muon(RATE, beta=0.95, eps=1e-4, weight_decay=0.1, adam_b1=0.8, adam_b2=0.95),
    ),
    "sgd, clipped by value": ({"gradient_clip_value": 0.2}, optax.chain(optax.clip(0.2), BY_RATE)),
    "sgd, clipped by norm": ({"gradient_clip_norm": 0.2}, optax.chain(optax.clip_by_global_norm(0.2), BY_RATE)),
    "adam, clipped by both, with L2": (
        {**ADAM, "gradient_clip_norm": 0.3, "gradient_clip_value": 0.2, "weight_decay": 0.1},
        optax.chain(
            optax.clip(0.2),
            optax.clip_by_global_norm(0.3),
            optax.add_decayed_weights(0.1),
            optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-4),
            BY_RATE,
        ),
    ),
}


@pytest.mark.parametrize("case", EQUIVALENTS)
def test_equals_the_chain_written_by_hand(case):
    fields, by_hand = EQUIVALENTS[case]
    updates = run(make(case.split()[0].rstrip(","), **fields))
    chex.assert_trees_all_equal(updates, run(by_hand))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))


def test_the_cases_cover_every_optimizer():
    assert {case.split()[0].rstrip(",") for case in EQUIVALENTS} == OPTIMIZER_FIELDS.keys()


def test_adafactor_factors_large_matrices():
    shapes = {"matrix": (130, 128)}
    by_hand = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_learning_rate(RATE, flip_sign=False),
        optax.scale_by_param_block_rms(),
        optax.scale(-1),
    )
    adafactor = make("adafactor")
    chex.assert_trees_all_equal(run(adafactor, shapes=shapes), run(by_hand, shapes=shapes))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(adafactor.init(random_tree(0, shapes))))
    assert numbers < 130 * 128


@pytest.mark.parametrize("name", OPTIMIZER_FIELDS)
def test_every_field_that_an_optimizer_reads_changes_its_updates(name):
    other = {
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 0.1,
        "momentum": 0.5,
        "initial_accumulator_value": 0.7,
        "weight_decay": 0.3,
        "nesterov": True,
    }
    shapes = {"bias": (3,), "matrix": (2, 3)}
    base = {"momentum": 0.6} if "momentum" in OPTIMIZER_FIELDS[name] else {}
    before = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run(make(name, **base), 8, shapes))])
    for field in OPTIMIZER_FIELDS[name]:
        updates = run(make(name, **{**base, field: other[field]}), 8, shapes)
        after = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)])
        assert np.any(before != after), field


def first_update(optimizer, params, grads):
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize(
    ("name", "factor"),
    # Adafactor's decay is not multiplied by the learning rate.
    [("adamw", RATE * 0.1), ("lion", RATE * 0.1), ("muon", RATE * 0.1), ("adafactor", 0.1)],
)
@pytest.mark.parametrize("mask", [False, True])
def test_decoupled_decay_without_gradient_shrinks_the_params(name, factor, mask):
    params = random_tree(0)
    updates = first_update(make(name, weight_decay=0.1, decay_mask=mask), params, jax.tree.map(np.zeros_like, params))
    left_out = {"bias", "kernel"} if name == "muon" else {"bias"}
    for leaf in params:
        expected = 0 * params[leaf] if mask and leaf in left_out else -factor * params[leaf]
        np.testing.assert_allclose(updates[leaf], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "adagrad", "radam", "nadam"])
def test_l2_decay_is_a_gradient(name):
    params = random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    decayed = first_update(make(name, weight_decay=0.1), params, zeros)
    shrinking = first_update(make(name), params, jax.tree.map(lambda leaf: np.float32(0.1) * leaf, params))
    chex.assert_trees_all_close(decayed, shrinking, rtol=1e-6)
    masked = first_update(make(name, weight_decay=0.1, decay_mask=True), params, zeros)
    np.testing.assert_array_equal(masked["bias"], zeros["bias"])
    np.testing.assert_array_equal(masked["kernel"], decayed["kernel"])


def test_value_is_clipped_before_norm_and_decay_is_not_clipped():
    params = {"w": np.array([10.0, 0.0], np.float32)}
    grads = {"w": np.array([30.0, -0.75], np.float32)}
    config = {"gradient_clip_value": 1.0, "gradient_clip_norm": 0.625, "weight_decay": 0.5}
    # clip to (1, -0.75), of norm 1.25, so halved to (0.5, -0.375); then + 0.5 * (10, 0).
    updates = first_update(make("sgd", **config), params, grads)
    np.testing.assert_allclose(updates["w"], [-RATE * 5.5, RATE * 0.375], rtol=1e-6)


def test_small_gradients_are_not_clipped():
    grads = random_tree(1)
    updates = first_update(make("sgd", gradient_clip_value=100.0, gradient_clip_norm=100.0), random_tree(0), grads)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: np.float32(-RATE) * g, grads))


def test_sgd_without_momentum_keeps_no_velocity():
    assert jax.tree.leaves(make("sgd").init(random_tree(0))) == []


@pytest.mark.parametrize("name", OPTIMIZER_FIELDS)
def test_a_schedule_replaces_the_learning_rate(name):
    def schedule(count):
        return jnp.where(count < 1, 0.0, RATE)

    shapes = {"bias": (3,), "matrix": (2, 3)}
    config = OptimizerConfig(optimizer_type=name, learning_rate=123.0)
    scheduled = run(make_optimizer(config, schedule), 2, shapes)
    plain = run(make_optimizer(config, optax.constant_schedule(RATE)), 1, shapes)
    chex.assert_trees_all_equal(scheduled[0], jax.tree.map(np.zeros_like, scheduled[0]))
    assert optax.tree.norm(scheduled[1]) > 0
    assert optax.tree.norm(plain[0]) < 10


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
    assert {*SCHEDULES, "one_cycle"} == SCHEDULER_FIELDS.keys()


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


@pytest.mark.parametrize("kind", SCHEDULER_FIELDS)
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
    for field in SCHEDULER_FIELDS[kind] | {"warmup_steps"}:
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
