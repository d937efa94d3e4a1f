"""Every optimizer of optax trains as in the loop that its documentation shows, to the bit."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from tests.marks import slow_unless
from tests.problems import config
from trainer import ArgumentError, Trainer, TrainState, make_train_step

RATE = 1e-2

ALIASES = (
    *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad"),
    *("fromage", "lamb", "lars", "lion", "nadam", "nadamw", "noisy_sgd", "novograd", "optimistic_adam"),
    *("optimistic_adam_v2", "optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd"),
    *("signum", "sm3", "yogi"),
)

CONTRIB = (
    *("acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "dog", "dowg", "madgrad", "muon", "prodigy"),
    *("schedule_free_adamw", "schedule_free_sgd", "simplified_ademamix"),
)


LINE_SEARCH = ("value", "grad", "value_fn")


def normalized_sgd():
    return optax.chain(contrib.normalize(), optax.sgd(0.1))


# By name: what makes the optimizer, and the extra arguments that its `update` asks for.
OPTIMIZERS = {
    **{name: (partial(getattr(optax, name), RATE), ()) for name in ALIASES if hasattr(optax, name)},
    **{name: (partial(getattr(contrib, name), RATE), ()) for name in CONTRIB},
    "noisy_sgd": (lambda: optax.noisy_sgd(RATE, key=0), ()),
    "lbfgs": (optax.lbfgs, LINE_SEARCH),
    "polyak_sgd": (optax.polyak_sgd, ("value",)),
    "backtracking": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8, store_grad=True)),
        LINE_SEARCH,
    ),
    "galore": (lambda: contrib.galore(RATE, rank=2), ()),
    "mechanize": (lambda: contrib.mechanize(optax.sgd(RATE)), ()),
    "momo": (lambda: contrib.momo(RATE), ("value",)),
    "momo_adam": (lambda: contrib.momo_adam(RATE), ("value",)),
    "reduce_on_plateau": (
        lambda: optax.chain(optax.adam(RATE), contrib.reduce_on_plateau(patience=1)),
        ("value",),
    ),
    "sam": (lambda: contrib.sam(optax.sgd(RATE), normalized_sgd()), ()),
    "sam_opaque": (lambda: contrib.sam(optax.sgd(RATE), normalized_sgd(), opaque_mode=True), ("grad_fn",)),
    "schedule_free": (lambda: contrib.schedule_free(optax.sgd(RATE), RATE), ()),
    "sophia": (lambda: contrib.sophia(RATE, update_interval=2), ("obj_fn",)),
    "split_real_and_imaginary": (lambda: contrib.split_real_and_imaginary(optax.adam(RATE)), ()),
    # Wrappers around what asks for more than gradients.
    "MultiSteps": (lambda: optax.MultiSteps(optax.polyak_sgd(), 2), ("value",)),
    "MultiSteps as a transformation": (
        lambda: optax.MultiSteps(optax.polyak_sgd(), 2).gradient_transformation(),
        ("value",),
    ),
    "MultiSteps that skips": (
        lambda: optax.MultiSteps(optax.lbfgs(), 2, should_skip_update_fn=optax.skip_not_finite),
        LINE_SEARCH,
    ),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.polyak_sgd)(max_learning_rate=1.0), ("value",)),
    "chain": (lambda: optax.chain(optax.clip(1.0), optax.lbfgs(), contrib.reduce_on_plateau()), LINE_SEARCH),
    "chain with sam": (
        lambda: optax.chain(optax.clip(1.0), contrib.sam(optax.sgd(RATE), optax.sgd(0.1), opaque_mode=True)),
        ("grad_fn",),
    ),
    "masked": (
        lambda: optax.masked(optax.polyak_sgd(), lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)),
        ("value",),
    ),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(RATE), 3), ()),
}

FAST = {"adam", "lbfgs", "polyak_sgd", "sam_opaque", "sophia", "MultiSteps", "inject_hyperparams", "chain with sam"}

# Of `contrib`: no optimizers, or such as want the gradients of single examples.
OTHERS = {
    *("differentially_private_aggregate", "dpsgd", "hutchinson_estimator_diag_hessian", "normalize"),
    "schedule_free_eval_params",
}


class Perceptron(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(jax.nn.tanh(self.inner(x)))


def loss_fn(model, batch, rng, step):
    del rng, step
    return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}


def batches(count=6):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(count, 16, 4)).astype(np.float32)
    return [{"input": x, "target": np.sin(x[:, :2])} for x in inputs]


def plain_loss():
    """The loss as a function of nested plain params, and the params."""
    graphdef, state = nnx.split(Perceptron(rngs=nnx.Rngs(0)))

    def loss_of(params, batch):
        held = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(held, params)
        return loss_fn(nnx.merge(graphdef, held), batch, None, None)[0]

    return loss_of, nnx.to_pure_dict(state)


def by_hand(optimizer, asked):
    """The loop of optax's documentation, with the extra arguments that the optimizer asks for."""
    loss_of, params = plain_loss()

    @jax.jit
    def step(params, opt_state, batch):
        def value_fn(params):
            return loss_of(params, batch)

        value, grads = jax.value_and_grad(value_fn)(params)
        extra = {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn}
        extra["grad_fn"] = lambda params, index: jax.grad(value_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, **{name: extra[name] for name in asked})
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for batch in batches():
        params, opt_state = step(params, opt_state, batch)
    return params


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


@pytest.fixture(autouse=True)
def as_optax_expects():
    with jax.numpy_rank_promotion("allow"):  # some optimizers rely on it
        yield


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", slow_unless(FAST.__contains__, OPTIMIZERS))
@pytest.mark.few(2)
def test_an_optimizer_trains_as_in_the_loop_of_optax(name, compilations, tmp_path):
    make, asked = OPTIMIZERS[name]
    wanted = by_hand(make(), asked)
    optimizer = make()
    state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
    for batch in batches():
        state, _ = step(state, batch)
    assert_same(state.params, wanted)
    assert compilations["jit(train_step)"] == 1

    model = Perceptron(rngs=nnx.Rngs(0))
    trainer = Trainer(model, config(), optimizer, loss_fn=loss_fn, workdir=tmp_path, rng=jax.random.key(0))
    trainer.train(batches(), 1, 16)
    assert_same(trainer.state.params, wanted)
    assert np.isfinite(sum(map(np.sum, jax.tree.leaves(wanted))))


def test_no_optimizer_of_optax_is_missing():
    def functions(module):
        found = {name: getattr(module, name) for name in dir(module) if not name.startswith(("scale_by_", "_"))}
        return {name: function for name, function in found.items() if inspect.isfunction(function)}

    aliases = {name for name, made in functions(optax).items() if "learning_rate" in inspect.signature(made).parameters}
    assert (aliases | set(functions(contrib))) - set(OPTIMIZERS) - OTHERS == set()


@pytest.mark.parametrize("name", ["lbfgs", "polyak_sgd", "sophia", "momo"])
@pytest.mark.slow
def test_clipping_by_configuration_keeps_the_extra_arguments(name, tmp_path):
    make, asked = OPTIMIZERS[name]
    wanted = by_hand(optax.chain(optax.clip_by_global_norm(0.1), make()), asked)
    model, settings = Perceptron(rngs=nnx.Rngs(0)), config(gradient_clip_norm=0.1)
    trainer = Trainer(model, settings, make(), loss_fn=loss_fn, workdir=tmp_path)
    trainer.train(batches(), 1, 16)
    assert_same(trainer.state.params, wanted)


def test_clipping_by_configuration_reaches_into_multi_steps(tmp_path):
    model, settings = Perceptron(rngs=nnx.Rngs(0)), config(gradient_clip_norm=0.1)
    optimizer = optax.MultiSteps(optax.polyak_sgd(), 2)
    trainer = Trainer(model, settings, optimizer, loss_fn=loss_fn, workdir=tmp_path)
    trainer.train(batches(), 1, 16)
    assert int(trainer.opt_state[1].gradient_step) == 3


def test_only_accepted_arguments_are_passed():
    seen = {}

    def update(updates, opt_state, params=None, *, value):
        seen["value"] = value
        return jax.tree.map(lambda leaf: -0.1 * value * leaf, updates), opt_state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    state, metrics = make_train_step(loss_fn, optimizer)(state, batches()[0])
    assert float(seen["value"]) == float(metrics["loss"])


def test_what_asks_for_nothing_compiles_to_the_same_program():
    """Chains take any argument, and what no member uses leaves no trace."""

    def compiled(optimizer):
        state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
        return jax.jit(make_train_step(loss_fn, optimizer)).lower(state, batches()[0])

    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    alone = optax.GradientTransformation(
        chain.init, lambda updates, state, params: chain.update(updates, state, params)
    )
    assert compiled(chain).as_text() == compiled(alone).as_text()
    assert compiled(optax.polyak_sgd()).as_text() != compiled(optax.sgd(1.0)).as_text()


@pytest.mark.parametrize("wrap", [lambda own: own, optax.chain])
@pytest.mark.parametrize("kind", [optax.GradientTransformation, optax.GradientTransformationExtraArgs])
def test_the_first_parameter_may_be_called_grad(kind, wrap):
    def update(grad, opt_state, params=None, **value):
        return jax.tree.map(lambda leaf: -0.1 * leaf, grad), opt_state

    def named(grad, opt_state, params=None):
        return update(grad, opt_state)

    for function in (update, named):
        optimizer = wrap(kind(lambda params: optax.EmptyState(), function))
        state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
        stepped, _ = make_train_step(loss_fn, optimizer)(state, batches()[0])
        assert not np.array_equal(stepped.params["inner"]["kernel"], state.params["inner"]["kernel"])


def test_an_argument_that_nobody_has_says_what_there_is():
    def update(updates, opt_state, params=None, *, hessian, **extra):
        return updates, opt_state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    with pytest.raises(TypeError, match="hessian") as caught:
        make_train_step(loss_fn, optimizer)(state, batches()[0])
    note = "raised in `optimizer.update`, which was given grad, grad_fn, obj_fn, value, value_fn"
    assert note in caught.value.__notes__


def test_the_value_function_sees_the_step_as_it_is():
    """With dropout and batch statistics: the function of the step's params is the step's loss."""

    class Noisy(nnx.Module):
        def __init__(self, *, rngs):
            self.layer = nnx.Linear(4, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.layer(x)))

    def update(updates, opt_state, params, *, value, grad, value_fn, grad_fn):
        again = grad_fn(params, 0)
        close = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), grad, again)
        return jax.tree.map(jnp.zeros_like, updates), (value - value_fn(params), close)

    def init(params):
        return jnp.ones(()), jax.tree.map(lambda leaf: jnp.ones(()), params)

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    state = TrainState.create(Noisy(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    state, _ = jax.jit(make_train_step(loss_fn, optimizer))(state, batches()[0])
    assert max(map(abs, map(float, jax.tree.leaves(state.opt_state)))) < 1e-6


@pytest.mark.parametrize("name", ["lbfgs", "polyak_sgd", "sophia", "sam_opaque"])
@pytest.mark.slow
def test_over_a_mapped_axis_the_functions_average_as_the_step_does(name):
    make, _ = OPTIMIZERS[name]
    optimizer, batch = make(), batches()[0]
    state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    parts = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
    alone, mapped = make_train_step(loss_fn, optimizer), make_train_step(loss_fn, optimizer, axis_name="parts")
    wanted = mapping = state
    together = jax.jit(jax.vmap(mapped, in_axes=(None, 0), out_axes=0, axis_name="parts"))
    for _ in range(3):
        wanted, _ = jax.jit(alone)(wanted, batch)
        everywhere, _ = together(mapping, parts)
        for leaf in jax.tree.leaves(everywhere.params):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        mapping = jax.tree.map(lambda leaf: leaf[0], everywhere)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), mapping.params, wanted.params)


def test_lookahead_trains_as_in_the_loop_of_optax(tmp_path):
    def make():
        return optax.lookahead(optax.adam(RATE), sync_period=3, slow_step_size=0.5)

    optimizer, (loss_of, params) = make(), plain_loss()

    @jax.jit
    def step(params, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss_of)(params.fast, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    both = optax.LookaheadParams.init_synced(params)
    opt_state = optimizer.init(both)
    for batch in batches(7):
        both, opt_state = step(both, opt_state, batch)

    trainer = Trainer(
        Perceptron(rngs=nnx.Rngs(0)),
        config(),
        make(),
        loss_fn=loss_fn,
        eval_params=lambda opt_state, params: opt_state.slow,
        workdir=tmp_path,
    )
    trainer.train(batches(7), 1, 16)
    assert_same(trainer.state.params, both.fast)
    assert_same(trainer.opt_state.slow, both.slow)
    assert_same(nnx.to_pure_dict(nnx.state(trainer.model)), both.slow)
    path = trainer.save_checkpoint()
    trainer.load_checkpoint(path)
    assert_same(trainer.opt_state.slow, both.slow)


def test_a_mask_made_from_an_nnx_state():
    model = Perceptron(rngs=nnx.Rngs(0))
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, nnx.state(model, nnx.Param))
    with pytest.raises(ArgumentError, match=r"`flax.nnx.to_pure_dict\(mask\)`"):
        TrainState.create(model, optax.masked(optax.sgd(1.0), mask), rng=jax.random.key(0))
    optimizer = optax.adamw(RATE, mask=nnx.to_pure_dict(mask))
    state = TrainState.create(model, optimizer, rng=jax.random.key(0))
    state, _ = make_train_step(loss_fn, optimizer)(state, batches()[0])
    by_function = optax.adamw(RATE, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params))
    other = TrainState.create(model, by_function, rng=jax.random.key(0))
    other, _ = make_train_step(loss_fn, by_function)(other, batches()[0])
    assert_same(state.params, other.params)


def test_gradients_of_single_examples_are_not_there():
    optimizer = contrib.differentially_private_aggregate(1.0, 0.1, key=0)
    state = TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="batch dimension"):
        make_train_step(loss_fn, optimizer)(state, batches()[0])


class Mixed(nnx.Module):
    def __init__(self):
        self.norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
        self.inner = nnx.Linear(4, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.inner(self.norm(x))


MIXED = {
    "adam": lambda: optax.inject_hyperparams(optax.adam)(RATE),
    "momentum": lambda: optax.inject_hyperparams(optax.sgd)(RATE, momentum=0.9),
    "MultiSteps": lambda: optax.MultiSteps(optax.inject_hyperparams(optax.adam)(RATE), 2),
    "without hyperparameters": lambda: optax.adam(RATE),
    "lbfgs": optax.lbfgs,
}


@pytest.mark.parametrize("name", MIXED)
def test_with_params_of_two_dtypes_steps_are_fused_and_runs_are_resumed(name, tmp_path):
    def make(**options):
        options = {"loss_fn": loss_fn, "workdir": tmp_path, "rng": jax.random.key(0), **options}
        return Trainer(Mixed(), config(), MIXED[name](), **options)

    data = {key: np.concatenate([batch[key] for batch in batches()]) for key in batches()[0]}
    alone, fused = make(workdir=None, steps_per_call=1), make(steps_per_call=2)
    alone.train(data, 2, 16)
    fused.train(data, 1, 16)
    resumed = make(steps_per_call=1)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(resumed.opt_state)]
    resumed.train(data, 2, 16, resume=True)
    assert [leaf.dtype for leaf in jax.tree.leaves(resumed.opt_state)] == dtypes
    close = partial(np.testing.assert_allclose, rtol=2e-2, atol=2e-3)
    jax.tree.map(close, *(jax.tree.map(np.float32, trainer.state.params) for trainer in (alone, resumed)))


def test_with_params_of_two_dtypes_it_trains_as_by_hand():
    optimizer = MIXED["adam"]()
    state = TrainState.create(Mixed(), optimizer, rng=jax.random.key(0))
    by_optax = state.replace(opt_state=optimizer.init(state.params))
    step = jax.jit(make_train_step(loss_fn, optimizer))
    for batch in batches():
        (state, _), (by_optax, _) = step(state, batch), step(by_optax, batch)
    assert_same((state.params, state.opt_state), (by_optax.params, by_optax.opt_state))
    assert state.opt_state.inner_state[0].mu["inner"]["kernel"].dtype == jnp.float32


def test_an_optimizer_of_one_dtype_is_not_traced_when_its_state_is_created():
    def update(updates, opt_state, params=None):
        raise AssertionError

    optimizer = optax.GradientTransformation(optax.adam(RATE).init, update)
    TrainState.create(Perceptron(rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
