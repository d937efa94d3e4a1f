"""Mixed precision: what is computed in which dtype, that the state stays in float32, and the loss scale of float16."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from tests.core.test_models_of_all_kinds import Language, Staged
from tests.problems import Busy, Counting, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Callback,
    ExtensionConfig,
    NonFiniteError,
    ObjectiveError,
    Precision,
    StateError,
    Trainer,
    TrainState,
    check_finite,
    fuse_steps,
    make_eval_step,
    make_mesh,
    make_predict_step,
    make_train_step,
)


def products(function, *args):
    """The dtypes of the operands of every product and convolution in a traced function, at any depth."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(tuple(str(operand.aval.dtype) for operand in equation.invars))
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return set(found)


class Mlp(nnx.Module):
    def __init__(self, *, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))[:, 0]


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.conv(x[..., None]))).reshape(x.shape[0], -1))[:, 0]


class Attentive(nnx.Module):
    """Embeddings, a table of positions that NumPy made, attention, and the table of embeddings again at the end."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.positions = np.sin(np.arange(32, dtype=np.float32)).reshape(4, 8)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.embed(jnp.abs(x * 3).astype(jnp.int32) % 8) + self.positions[None]
        x = x + self.attention(self.norm(x))
        return jnp.mean(self.embed.attend(x), axis=(1, 2))


class Plain(nnx.Module):
    """No layer of Flax: products of arrays, one of which is no variable, and another that is no parameter."""

    def __init__(self, rngs):
        self.weights = nnx.Param(jax.random.normal(rngs(), (4, 8)))
        self.features = nnx.Variable(jax.random.normal(rngs(), (8, 8)))
        self.fixed = jnp.ones((8,))

    def __call__(self, x):
        return jnp.einsum("bi,ij,jk,k->b", x, self.weights[...], self.features[...], self.fixed) / 8


class Scaled(nnx.Module):
    """Makes a float32 constant between its modules."""

    def __init__(self, rngs):
        self.inner = Plain2(4, 8, rngs)
        self.outer = Plain2(8, 1, rngs)

    def __call__(self, x):
        return self.outer(self.inner(x) * jnp.linspace(0.0, 1.0, 8, dtype=jnp.float32)[None])[:, 0]


class Plain2(nnx.Module):
    def __init__(self, a, b, rngs):
        self.weights = nnx.Param(jax.random.normal(rngs(), (a, b)) / a)

    def __call__(self, x):
        return x @ self.weights[...]


class Recurrent(nnx.Module):
    def __init__(self, rngs, cell=nnx.LSTMCell):
        self.rnn = nnx.RNN(cell(1, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x[..., None])[:, -1])[:, 0]


class OfLinen(nnx.Module):
    """A module of Linen, whose layers have no dtype, with statistics."""

    def __init__(self, rngs):
        self.linen = nnx.bridge.ToNNX(LinenNet(), rngs=rngs).lazy_init(jnp.ones((1, 4)))

    def __call__(self, x):
        return self.linen(x, mutable=["batch_stats"])


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.BatchNorm(use_running_average=False)(linen.Dense(8)(x)))
        x = linen.LayerNorm()(linen.Conv(4, (3,))(x[..., None]).reshape(x.shape[0], -1))
        own = self.param("own", linen.initializers.lecun_normal(), (x.shape[1], 1))
        return (x @ own)[:, 0]


class Layer(nnx.Module):
    """A layer of Flax and a product of arrays, with statistics."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.weights = nnx.Param(jax.random.normal(rngs(), (8, 8)) / 8)

    def __call__(self, x):
        return x + jax.nn.gelu(self.norm(self.linear(x))) @ self.weights[...]


class Stacked(nnx.Module):
    """Layers that `nnx.vmap` makes and `nnx.scan` calls, with `nnx.remat` where asked."""

    def __init__(self, rngs, remat=False):
        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.layers = nnx.vmap(Layer, in_axes=0, out_axes=0)(rngs.split(3))
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        def call(layer, x):
            return layer(x)

        called = nnx.remat(call) if self.remat else call
        scanned = nnx.scan(called, in_axes=(nnx.StateAxes({...: 0}), nnx.Carry), out_axes=nnx.Carry)
        return self.head(scanned(self.layers, self.embed(x)))[:, 0]


MODELS = {
    "linen": lambda: OfLinen(nnx.Rngs(0)),
    "stacked": lambda: Stacked(nnx.Rngs(0)),
    "stacked, remat": lambda: Stacked(nnx.Rngs(0), remat=True),
    "mlp": lambda: Mlp(),
    "busy": Busy,
    "convolutional": lambda: Convolutional(nnx.Rngs(0)),
    "attentive": lambda: Attentive(nnx.Rngs(0)),
    "plain": lambda: Plain(nnx.Rngs(0)),
    "constant between modules": lambda: Scaled(nnx.Rngs(0)),
    "lstm": lambda: Recurrent(nnx.Rngs(0)),
    "gru": lambda: Recurrent(nnx.Rngs(0), nnx.GRUCell),
    "staged": Staged,
    "language": Language,
    "layer": lambda: nnx.Sequential(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), lambda y: y[:, 0]),
}

pytestmark = pytest.mark.filterwarnings("ignore:Using .Module.sow..:DeprecationWarning")


def create(model=None, precision=None, optimizer=None, **changes):
    return TrainState.create(
        Mlp() if model is None else model,
        optimizer or optax.adam(1e-2),
        rng=jax.random.key(0),
        precision=precision,
        **changes,
    )


def step_of(precision=None, loss_fn=squared_error, optimizer=None, **changes):
    return make_train_step(loss_fn, optimizer or optax.adam(1e-2), precision=precision, **changes)


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("precision", [None, "float32", Precision("float32")])
def test_float32_is_the_program_without_it(precision):
    arguments = create(Busy()), regression(8)
    plain = make_train_step(squared_error, optax.adam(1e-2))
    assert jax.jit(step_of(precision)).lower(*arguments).as_text() == jax.jit(plain).lower(*arguments).as_text()
    for make in (make_eval_step, lambda fn, **how: make_predict_step(lambda m, batch: m(batch["input"]), **how)):
        wanted = str(jax.make_jaxpr(make(squared_error))(*arguments))
        assert str(jax.make_jaxpr(make(squared_error, precision=precision))(*arguments)) == wanted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.few(2)
def test_every_product_is_computed_in_it_and_the_state_stays_float32(name, precision):
    state, batch = create(MODELS[name](), precision), regression(8)
    step = step_of(precision)
    # Attention of Flax sums its logits in float32, so that their gradient meets keys and queries in it.
    mixed = {("float32", precision)} if name == "attentive" else set()
    assert products(step, state, batch) == {(precision, precision)} | mixed
    assert products(make_eval_step(squared_error, precision=precision), state, batch) == {(precision, precision)}
    after, metrics = jax.eval_shape(step, state, batch)  # XLA on the CPU has no such attention in float16
    assert dtypes(after) == dtypes(state)
    assert metrics["loss"].dtype == metrics["mean_error"].dtype == jnp.float32


@pytest.mark.parametrize("name", ["linen", "stacked", "stacked, remat"])
@pytest.mark.parametrize("options", [{}, {"remat": {"layers": "nothing_saveable"}}, {"accumulate_steps": 2}], ids=str)
@pytest.mark.few(3)
def test_models_of_others_learn_in_it_what_they_learn_in_float32(name, options):
    if name == "linen" and "remat" in options:
        options = {"remat": {"linen": "nothing_saveable"}}
    optimizer, results = optax.sgd(0.05), []
    for precision in (None, "bfloat16"):
        step = jax.jit(step_of(precision, optimizer=optimizer, **options))
        state = create(MODELS[name](), optimizer=optimizer)
        traced = {("bfloat16",) * 2} if precision else {("float32",) * 2}
        assert products(step, state, regression(32)) == traced
        for _ in range(5):
            state, metrics = step(state, regression(32))
        results.append((metrics["loss"], state.params, state.model_state))
    (exact, _, statistics), (loss, params, rounded) = results
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(exact), rel=0.05)
    floating = [leaf for leaf in jax.tree.leaves(statistics) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    others = [leaf for leaf in jax.tree.leaves(rounded) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    for one, other in zip(floating, others, strict=True):
        np.testing.assert_allclose(other, one, rtol=0.1, atol=0.02)
    assert any(np.any(leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)) for leaf in others)


def test_the_step_by_hand_to_the_bit():
    # The rate is a power of two, so that the update rounds once, whichever way XLA fuses it.
    optimizer, batch = optax.sgd(2.0**-4), regression(16)

    def loss(params):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        x = batch["input"].astype(jnp.bfloat16)
        hidden = jnp.tanh(jnp.dot(x, low["hidden"]["kernel"]) + low["hidden"]["bias"][None])
        y = (jnp.dot(hidden, low["head"]["kernel"]) + low["head"]["bias"][None])[:, 0]
        return jnp.mean((y.astype(jnp.float32) - batch["target"]) ** 2)

    @jax.jit
    def by_hand(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    state, step = create(optimizer=optimizer), jax.jit(step_of("bfloat16", optimizer=optimizer))
    params, opt_state = state.params, state.opt_state
    for _ in range(5):
        state, metrics = step(state, batch)
        params, opt_state, value = by_hand(params, opt_state)
        chex.assert_trees_all_equal((state.params, state.opt_state, metrics["loss"]), (params, opt_state, value))


class Tokens(nnx.Module):
    """The sum of what each of many tokens looks up in a small table."""

    def __init__(self, **options):
        self.embed = nnx.Embed(2, 3, rngs=nnx.Rngs(0), **options)

    def __call__(self, tokens):
        return jnp.sum(self.embed(tokens).astype(jnp.float32), axis=(1, 2))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_of_a_table_are_summed_in_float32(precision):
    seen = []

    def loss_fn(model, tokens, rng, step):
        seen.append(model.embed(tokens).dtype)
        return jnp.sum(model(tokens)), {}

    tokens = jnp.arange(6000).reshape(1, 6000) % 3 // 2  # 4,000 zeros; each adds one to the gradient of its row
    # A loss scale would leave the range of float16, in which the sum comes back.
    policy = Precision(precision, initial_scale=1.0)
    state = create(Tokens(), policy, optax.sgd(1.0))
    after, _ = jax.jit(step_of(policy, loss_fn, optimizer=optax.sgd(1.0)))(state, tokens)
    gradient = jax.tree.map(jnp.subtract, state.params, after.params)["embed"]["embedding"]
    # In bfloat16, 256 + 1 is 256.
    np.testing.assert_allclose(gradient, [[4000.0] * 3, [2000.0] * 3], rtol=2.0**-8)
    assert set(seen) == {jnp.dtype(precision)}


def test_what_is_looked_up_is_a_row_of_the_table_in_that_dtype():
    state, tokens = create(Tokens(), "bfloat16"), jnp.array([[1, 0, 1]])
    rows = jax.jit(make_predict_step(lambda model, tokens: model.embed(tokens), precision="bfloat16"))(state, tokens)
    chex.assert_trees_all_equal(rows, state.params["embed"]["embedding"][tokens].astype(jnp.bfloat16))


def test_outputs_are_float32_or_as_asked_and_the_model_is_of_its_class():
    seen = []

    def loss_fn(model, batch, rng, step):
        y = model(batch["input"])
        graphdef, variables = nnx.split(model)
        again = nnx.merge(graphdef, variables)(batch["input"])
        seen.append((isinstance(model, Mlp), type(model).__name__, y.dtype, again.dtype, batch["target"].dtype))
        return jnp.mean((y - batch["target"]) ** 2), {}

    for precision in ("bfloat16", Precision("bfloat16", output="bfloat16", inputs="bfloat16")):
        jax.eval_shape(step_of(precision, loss_fn), create(), regression(8))
    assert seen == [(True, "Mlp", *["float32"] * 3), (True, "Mlp", *["bfloat16"] * 3)]
    assert jax.jit(make_predict_step(precision="bfloat16"))(create(), regression(8)["input"]).dtype == jnp.float32


def test_batch_statistics_are_those_of_float32_within_rounding():
    states = []
    for precision in (None, "bfloat16"):
        state, step = create(Busy(), precision), jax.jit(step_of(precision))
        for _ in range(20):
            state, _ = step(state, regression(64))
        states.append(state)
    exact, rounded = (state.model_state["norm"] for state in states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02), exact, rounded)
    # Float32 holds digits that bfloat16 does not.
    assert np.any(rounded["mean"] != rounded["mean"].astype(jnp.bfloat16).astype(jnp.float32))
    assert int(states[1].model_state["calls"]) == 20


def test_variables_that_nothing_assigns_keep_their_bits():
    state = create(Plain(nnx.Rngs(0)), wrt=nnx.All(nnx.Param, nnx.PathContains("weights")))
    after, _ = jax.jit(step_of("bfloat16"))(state, regression(8))
    chex.assert_trees_all_equal(after.model_state, state.model_state)


class Averaging(Mlp):
    """Keeps an average in a variable of no particular kind."""

    def __init__(self):
        super().__init__()
        self.average = nnx.Variable(jnp.ones(()))

    def __call__(self, x):
        self.average[...] = 0.999 * self.average[...] + 0.001 * jnp.mean(x)
        return super().__call__(x)


def test_an_average_in_half_precision_is_said_and_an_exception_keeps_it():
    with pytest.warns(UserWarning, match=r"assigned `average`, computed in bfloat16: .*exceptions=\{'average': 'flo"):
        after, _ = jax.jit(step_of("bfloat16"))(create(Averaging()), regression(8))
    assert after.model_state["average"].dtype == jnp.float32
    kept = Precision("bfloat16", exceptions={"average": "float32"})
    exact, _ = jax.jit(step_of())(create(Averaging()), regression(8))
    after, _ = jax.jit(step_of(kept))(create(Averaging()), regression(8))
    np.testing.assert_allclose(after.model_state["average"], exact.model_state["average"], rtol=1e-5)


@pytest.mark.parametrize("pattern", ["head", "head/**", "head/*", "he.d.*"])
def test_exceptions_by_path(pattern):
    precision = Precision("bfloat16", exceptions={pattern: "float32"})
    assert products(step_of(precision), create(), regression(8)) == {("bfloat16",) * 2, ("float32",) * 2}


def test_a_layer_that_was_made_with_a_dtype_keeps_it():
    model = Mlp()
    model.head = nnx.Linear(8, 1, dtype=jnp.float32, rngs=nnx.Rngs(1))
    assert products(step_of("bfloat16"), create(model), regression(8)) == {("bfloat16",) * 2, ("float32",) * 2}


def test_extensions_see_the_model_in_the_same_precision():
    class Calling(Counting):
        def loss_fn(self, batch, model_outputs, model=None, **kwargs):
            self.evaluations[...] += 1
            return jnp.mean(model(batch["input"]) ** 2) + jnp.mean(model_outputs**2)

    def silent(model, batch, rng, step):
        loss, _ = squared_error(model, batch, rng, step)
        return loss, {}

    extensions = {"calling": Calling(ExtensionConfig(weight=0.1))}
    state = create(extensions=extensions, precision="float16")
    step = step_of("float16", silent, extensions=extensions)
    assert products(step, state, regression(8)) == {("float16",) * 2}
    after, metrics = jax.jit(step)(state, regression(8))
    assert metrics["calling_loss"].dtype == jnp.float32
    assert int(after.extensions["calling"]["variables"]["evaluations"]) == 1


@pytest.mark.slow
def test_digits_are_learned_as_well():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = {"input": (images / 16).astype(np.float32), "label": labels.astype(np.int32)}

    def loss_fn(model, batch, rng, step):
        logits = model(batch["input"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])), {
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        }

    results = {}
    for precision in ("float32", "bfloat16", "float16"):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), jax.nn.relu, nnx.Linear(64, 10, rngs=rngs))
        trainer = Trainer(model, config(), loss_fn=loss_fn, precision=precision)
        trainer.train(data, 5, 64)
        results[precision] = trainer.evaluate(data, 256)
    for precision in ("bfloat16", "float16"):
        assert results[precision]["loss"] == pytest.approx(results["float32"]["loss"], rel=0.1)
        assert results[precision]["accuracy"] > 0.97


# What float16 adds: a loss scale.


def scale_of(state):
    return {name: np.asarray(leaf).item() for name, leaf in state.extensions["loss_scale"].items()}


def overflowing_at(*steps):
    def loss_fn(model, batch, rng, step):
        loss, _metrics = squared_error(model, batch, rng, step)
        factor = jnp.where(jnp.isin(step, jnp.array(steps)), 6e4, 1.0)
        y = model(batch["input"]).astype(jnp.float16) * factor.astype(jnp.float16)
        return loss + jnp.mean((y * factor.astype(jnp.float16)).astype(jnp.float32)) * 1e-6, {}

    return loss_fn


def test_an_overflow_is_skipped_and_the_scale_recovers():
    precision = Precision("float16", initial_scale=1024, growth_interval=3)
    state, step = create(Busy(), precision), jax.jit(step_of(precision, overflowing_at(2)))
    scales = []
    for index in range(8):
        after, metrics = step(state, regression(16))
        assert int(metrics["step"]) == index + 1
        same = [jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)]
        assert all(same) == (index == 2)
        if index == 2:
            kept = {"step": after.step, "extensions": after.extensions}
            assert_same_bits(after, state.replace(**kept))
            assert int(after.model_state["calls"]) == 2 * index  # called twice a step
        scales.append(float(metrics["loss_scale"]))
        state = after
    assert scales == [1024, 1024, 1024, 512, 512, 512, 1024, 1024]
    assert scale_of(state) == {"scale": 1024.0, "good_steps": 2}


def test_a_scale_changes_no_gradient_but_for_what_float16_cannot_hold():
    def tiny(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return loss * 1e-8, metrics

    rate = 2.0**20  # else a param would swallow its update
    optimizer, batch = optax.sgd(rate), regression(16)
    moved = {}
    for scale in (1.0, 2.0**20):
        precision = Precision("float16", initial_scale=scale)
        state = create(precision=precision, optimizer=optimizer)
        after, _metrics = jax.jit(step_of(precision, tiny, optimizer))(state, batch)
        grads = jax.tree.map(lambda a, b: (a - b) / rate, state.params, after.params)
        moved[scale] = float(optax.tree.norm(grads))
    exact = jax.grad(lambda params: tiny(create().replace(params=params).model(), batch, None, 0)[0])(create().params)
    assert moved[2.0**20] == pytest.approx(float(optax.tree.norm(exact)), rel=0.02)
    assert moved[1.0] != pytest.approx(float(optax.tree.norm(exact)), rel=0.02)


def test_fused_steps_are_the_same():
    precision = Precision("float16", growth_interval=3)
    step = step_of(precision, overflowing_at(1))
    single = create(precision=precision)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), regression(16))
    fused, metrics = jax.jit(fuse_steps(step, 6))(single, batches)
    for _ in range(6):
        single, _ = jax.jit(step)(single, regression(16))
    chex.assert_trees_all_close(fused.params, single.params, rtol=1e-3, atol=1e-5)
    assert scale_of(fused) == scale_of(single)
    assert metrics["loss_scale"].shape == (6,)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.slow
def test_an_ensemble_is_its_members(precision):
    def member(key):
        return TrainState.create(Mlp(rngs=nnx.Rngs(key)), optax.adam(1e-2), rng=key, precision=precision)

    keys = jax.random.split(jax.random.key(0), 3)
    states, _metrics = jax.jit(jax.vmap(step_of(precision), (0, None)))(jax.vmap(member)(keys), regression(8))
    for index in range(3):
        alone, _ = jax.jit(step_of(precision))(member(keys[index]), regression(8))
        chosen = jax.tree.map(lambda leaf: leaf[index], states.params)  # noqa: B023
        chex.assert_trees_all_close(chosen, alone.params, atol=1e-4)


def test_devices_of_a_mapped_axis_skip_together():
    """One part of the batch overflows, and all devices keep their params."""
    precision = Precision("float16", initial_scale=1024)

    def loss_fn(model, batch, rng, step):
        y = model(batch["input"])
        return jnp.mean((y.astype(jnp.float16) * batch["factor"].astype(jnp.float16)).astype(jnp.float32)), {}

    batch = {"input": regression(8)["input"], "factor": jnp.where(jnp.arange(8) == 5, 6e4, 1.0)}
    mesh = make_mesh({"data": 8})
    step = jax.shard_map(
        step_of(precision, loss_fn, axis_name="data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    state = create(precision=precision)
    after, _ = jax.jit(step)(state, batch)
    chex.assert_trees_all_equal(after.params, state.params)
    assert scale_of(after) == {"scale": 512.0, "good_steps": 0}
    after, _metrics = jax.jit(step)(state, {**batch, "factor": jnp.ones(8)})
    assert scale_of(after) == {"scale": 1024.0, "good_steps": 1}


def build(tmp_path, precision, **changes):
    return Trainer(Busy(), config(), loss_fn=squared_error, precision=precision, workdir=tmp_path, **changes)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.few(1)
def test_a_trainer_on_a_mesh_of_eight(precision, tmp_path):
    results = []
    for mesh in (None, make_mesh({"fsdp": 8})):
        trainer = build(tmp_path / str(mesh), precision, mesh=mesh)
        trainer.train(regression(64), 2, 16)
        results.append(trainer.evaluate(regression(64), 16)["loss"])
    assert results[0] == pytest.approx(results[1], rel=0.02)


class KilledError(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, trainer, step, logs):
        if step == self.step:
            raise KilledError


@pytest.mark.parametrize("precision", ["bfloat16", Precision("float16", initial_scale=2.0**30, growth_interval=3)])
@pytest.mark.parametrize("format", [".msgpack", ".orbax"])
@pytest.mark.few(1)
def test_a_killed_run_resumes_to_the_bit(precision, format, tmp_path):
    data = regression(40)
    whole = build(tmp_path / "whole", precision)
    whole.train(data, 4, 8)
    killed = build(tmp_path / "killed", precision, save_interval=3, callbacks=[KillAt(11)])
    with pytest.raises(KilledError):
        killed.train(data, 4, 8)
    killed.close()
    resumed = build(tmp_path / "killed", precision, save_interval=3)
    resumed.train(data, 4, 8, resume=True)
    chex.assert_trees_all_equal(resumed.state.replace(rng=0), whole.state.replace(rng=0))
    path = resumed.save_checkpoint(tmp_path / f"saved{format}")
    again = build(tmp_path / "again", precision)
    again.load_checkpoint(path)
    chex.assert_trees_all_equal(again.state.replace(rng=0), whole.state.replace(rng=0))


@pytest.mark.slow
def test_pickles_of_the_reference_leave_the_scale_alone(tmp_path):
    trainer = build(tmp_path, "float16")
    trainer.train(regression(16), 1, 8)
    path = trainer.save_checkpoint(tmp_path / "checkpoint.pkl")
    again = build(tmp_path, Precision("float16", initial_scale=64.0))
    again.load_checkpoint(path)
    assert scale_of(again.state) == {"scale": 64.0, "good_steps": 0}
    chex.assert_trees_all_equal(again.state.params, trainer.state.params)


@pytest.mark.slow
def test_weights_of_extensions_that_change_leave_the_scale_alone(tmp_path):
    extension = Counting(ExtensionConfig(weight=0.1))
    trainer = build(tmp_path, "float16", extensions={"counting": extension})
    trainer.train_step(regression(8))
    extension.weight = 0.2
    trainer.train_step(regression(8))
    assert scale_of(trainer.state) == {"scale": 2.0**15, "good_steps": 2}


def test_evaluation_and_prediction_are_in_the_same_precision(tmp_path):
    trainer = build(tmp_path, "bfloat16")
    held_out = regression(8, seed=1)
    wanted = jax.jit(make_eval_step(squared_error, precision="bfloat16"))(trainer.state, held_out)["loss"]
    assert trainer.evaluate(held_out, 8)["loss"] == float(trainer.validate_step(held_out)["loss"]) == float(wanted)
    assert float(wanted) != float(jax.jit(make_eval_step(squared_error))(trainer.state, held_out)["loss"])
    predict = make_predict_step(precision="bfloat16")
    predicted = trainer.predict(held_out["input"], 8)
    np.testing.assert_array_equal(predicted, jax.jit(predict)(trainer.state, held_out["input"]))
    assert predicted.dtype == np.float32
    assert products(predict, trainer.state, held_out["input"]) == {("bfloat16",) * 2}


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: step_of("bf16"),
            ArgumentError,
            "`precision` is 'bf16'; it must be one of 'float32', 'bfloat16', 'float16'",
        ),
        (
            lambda: step_of(16),
            ArgumentTypeError,
            "`precision` is 16; it must be one of 'float32', 'bfloat16', 'float16'",
        ),
        (lambda: make_eval_step(squared_error, precision=1.5), ArgumentTypeError, "`precision` is 1.5; it must be one"),
        (lambda: Precision("bfloat16", output="int8"), ArgumentError, "`Precision.output` is 'int8'; it must be"),
        (
            lambda: Precision("bfloat16", exceptions=["head"]),
            ArgumentTypeError,
            "`Precision.exceptions` is of type list",
        ),
        (
            lambda: Precision("bfloat16", exceptions={"head": "float64"}),
            ArgumentError,
            r"`Precision.exceptions\['head'\]` is 'float64'; it must be",
        ),
        (
            lambda: Precision("float16", initial_scale=0),
            ArgumentError,
            "`Precision.initial_scale` is 0; it must be a pos",
        ),
        (
            lambda: Precision("float16", growth_interval=0),
            ArgumentError,
            "`Precision.growth_interval` is 0; it must be a",
        ),
    ],
)
def test_bad_input_is_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_pattern_that_matches_nothing_is_refused_when_the_trainer_is_made(tmp_path):
    wrong = Precision("bfloat16", exceptions={"haed/**": "float32"})
    with pytest.raises(
        ArgumentError, match=r"`Precision.exceptions` has the pattern 'haed/\*\*', which matches no whole"
    ):
        build(tmp_path, wrong)


def test_a_state_without_a_scale_is_refused():
    with pytest.raises(StateError, match=r"`state` holds no loss scale, .* TrainState.create\(..., precision=...\)"):
        step_of("float16")(create(), regression(8))


def test_a_metric_or_an_extension_of_the_name_of_the_scale_is_refused():
    def loss_fn(model, batch, rng, step):
        return jnp.mean(model(batch["input"])), {"loss_scale": 1.0}

    with pytest.raises(ObjectiveError, match="`loss_fn` returned a metric `loss_scale`, which a float16 step reports"):
        jax.eval_shape(step_of("float16", loss_fn), create(precision="float16"), regression(8))
    with pytest.raises(ArgumentError, match=r"`extensions\['loss_scale'\]` has the name of the loss scale"):
        create(precision="float16", extensions={"loss_scale": Counting()})


class TestBesideAGuard:
    """`nonfinite` leaves an overflow to the loss scale, and watches everything else."""

    @staticmethod
    def stepped(policy, spoil):
        def loss_fn(model, batch, rng, step):
            loss, metrics = squared_error(model, batch, rng, step)
            return loss * spoil, metrics

        options = {"precision": "float16", "nonfinite": policy}
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0), **options)
        step = jax.jit(make_train_step(loss_fn, optax.sgd(0.1), **options))
        return state, *step(state, regression(8))

    @pytest.mark.parametrize("policy", ["skip", "raise"])
    def test_an_overflow_of_the_scaled_gradient_is_no_failure(self, policy):
        before, after, metrics = self.stepped(policy, 3e4)
        assert metrics["skipped"] == 0
        assert after.extensions["loss_scale"]["scale"] == before.extensions["loss_scale"]["scale"] / 2
        assert_same_bits(after.params, before.params)
        check_finite(after)

    def test_a_loss_that_is_not_finite_is_one_and_the_scale_is_adapted(self):
        before, after, metrics = self.stepped("skip", jnp.nan)
        assert metrics["skipped"] == 1
        assert after.extensions["nonfinite"]["skipped"] == 1
        assert after.extensions["loss_scale"]["scale"] == before.extensions["loss_scale"]["scale"] / 2
        _, after, _ = self.stepped("raise", jnp.nan)
        with pytest.raises(NonFiniteError, match="step 1 is not finite: `loss` is NaN or infinite"):
            check_finite(after)
