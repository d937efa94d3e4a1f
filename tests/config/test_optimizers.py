"""Optimizers: each equals what a reader of the configuration would write with optax."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Linear, squared_error
from trainer import ConfigError, OptimizerConfig, Trainer, TrainingConfig, make_optimizer
from trainer.config.optimizers import OPTIMIZER_FIELDS

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
@pytest.mark.few(2)
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
@pytest.mark.few(2)
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
@pytest.mark.few(1)
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


def test_the_norm_of_a_training_config_is_clipped_before_the_value():
    settings = TrainingConfig(
        optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=RATE, gradient_clip_value=0.5),
        gradient_clip_norm=1.25,
    )
    optimizer = Trainer(Linear(), settings, loss_fn=squared_error).optimizer
    # (3, -4), of norm 5, becomes (0.75, -1), and then (0.5, -0.5).
    grads = {"w": np.array([3.0, -4.0], np.float32)}
    updates = first_update(optimizer, grads, grads)
    np.testing.assert_allclose(updates["w"], [-RATE * 0.5, RATE * 0.5], rtol=1e-6)


def test_small_gradients_are_not_clipped():
    grads = random_tree(1)
    updates = first_update(make("sgd", gradient_clip_value=100.0, gradient_clip_norm=100.0), random_tree(0), grads)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: np.float32(-RATE) * g, grads))


def test_sgd_without_momentum_keeps_no_velocity():
    assert jax.tree.leaves(make("sgd").init(random_tree(0))) == []


@pytest.mark.parametrize("name", OPTIMIZER_FIELDS)
@pytest.mark.few(4)
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


BY_DEFAULT = {
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE, weight_decay=0.0),
    "sgd": optax.sgd(RATE),
    "rmsprop": optax.rmsprop(RATE),
    "adagrad": optax.adagrad(RATE),
    "lamb": optax.lamb(RATE),
    "radam": optax.radam(RATE),
    "nadam": optax.nadam(RATE),
    "lion": optax.lion(RATE, weight_decay=0.0),
    "adafactor": optax.adafactor(RATE),
    "muon": optax.contrib.muon(RATE),
}


@pytest.mark.parametrize("name", OPTIMIZER_FIELDS)
@pytest.mark.few(3)
def test_a_field_that_is_left_out_is_optax_s_default(name):
    made = make(name)
    chex.assert_trees_all_equal(run(made), run(BY_DEFAULT[name]))
    chex.assert_trees_all_equal_structs(made.init(random_tree(0)), BY_DEFAULT[name].init(random_tree(0)))


def test_a_momentum_of_zero_is_no_momentum():
    by_hand = optax.contrib.muon(RATE, beta=0.0)
    chex.assert_trees_all_equal(run(make("muon", momentum=0.0)), run(by_hand))
    assert jax.tree.leaves(make("sgd", momentum=0.0).init(random_tree(0))) == []


@pytest.mark.parametrize("name", OPTIMIZER_FIELDS)
def test_the_defaults_that_the_reference_spells_out_are_kept_where_nothing_reads_them(name):
    spelt_out = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": 0.0, "initial_accumulator_value": 0.1}
    config = OptimizerConfig(optimizer_type=name, learning_rate=RATE, **spelt_out)
    assert config.to_dict().items() >= spelt_out.items()
    assert OptimizerConfig.from_dict(config.to_dict()) == config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(OptimizerConfig):
    lookahead: int = 5
    doubled: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "doubled", 2 * self.lookahead)


def test_a_subclass_adds_fields(tmp_path):
    config = Mine(optimizer_type="adam", learning_rate=RATE, lookahead=6)
    config.to_yaml(tmp_path / "mine.yaml")
    assert Mine.from_yaml(tmp_path / "mine.yaml") == config
    assert config.replace(lookahead=7).doubled == 14
    chex.assert_trees_all_equal(run(make_optimizer(config)), run(make("adam")))
    with pytest.raises(ConfigError, match=r"`Mine\.momentum` is 0\.9, but 'adam' does not read it"):
        config.replace(momentum=0.9)
    with pytest.raises(ConfigError, match=r"`Mine\.lookahead` is '6' of type str; it must be int\."):
        config.replace(lookahead="6")
