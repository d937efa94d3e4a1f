"""Models as people write them: for language and vision, of hijax variables, that sow, and named as the methods are."""

import dataclasses
import enum
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, config, regression, squared_error
from trainer import Trainer, TrainState, make_eval_step, make_train_step


def create(model, optimizer=None, **changes):
    return TrainState.create(model, optimizer or optax.adam(1e-2), **{"rng": jax.random.key(0), **changes})


def step_of(loss_fn=squared_error, **changes):
    return jax.jit(make_train_step(loss_fn, optax.adam(1e-2), **changes))


class Block(nnx.Module):
    def __init__(self, dim, rngs):
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.hidden = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.out = nnx.Linear(2 * dim, dim, rngs=rngs)

    def __call__(self, x):
        return x + self.out(jax.nn.gelu(self.hidden(self.norm(x))))


class Staged(nnx.Module):
    """Stages of blocks, with the lists of depths and widths as attributes, as ConvNeXt has them."""

    def __init__(self, depths=(1, 2), dims=(4, 8), *, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.depths, self.dims = list(depths), list(dims)
        self.rates = [float(rate) for rate in np.linspace(0, 0.1, sum(depths))]
        self.stages = nnx.List(
            [nnx.List([Block(d, rngs) for _ in range(n)]) for n, d in zip(depths, dims, strict=True)]
        )
        self.down = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(dims)])
        self.head = nnx.Linear(dims[-1], 1, rngs=rngs)

    def __call__(self, x):
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            x = self.down[index](x) if index < len(self.dims) - 1 else x
        return self.head(x)[:, 0]


class AttentionType(enum.Enum):
    GLOBAL = 1
    LOCAL = 2


@dataclasses.dataclass(slots=True, frozen=True)
class ShardingConfig:
    activation: tuple
    kernel: tuple

    @staticmethod
    def default():
        return ShardingConfig(("data", None), (None, "model"))


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Its list of layer types makes it unhashable, in spite of being frozen."""

    dim: int = 8
    attention_types: list = dataclasses.field(default_factory=lambda: [AttentionType.LOCAL, AttentionType.GLOBAL])
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig.default)
    window: int | None = 2


class Attention(nnx.Module):
    def __init__(self, config, kind, rngs):
        self.config, self.kind = config, kind
        self.qkv = nnx.Linear(config.dim, 3 * config.dim, rngs=rngs)
        self.sharding = config.sharding

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        if self.kind is AttentionType.LOCAL:
            mask &= ~jnp.tril(mask, -self.config.window)
        weights = jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(1, 2), -1e9))
        return x + weights @ v


class Language(nnx.Module):
    """A small language model with a configuration in every layer, as Gemma has it."""

    def __init__(self, *, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.config = LanguageConfig()
        self.embed = nnx.Linear(1, self.config.dim, rngs=rngs)
        self.layers = nnx.List([Attention(self.config, kind, rngs) for kind in self.config.attention_types])
        self.head = nnx.Linear(self.config.dim, 1, rngs=rngs)
        self.sow_config = {"every": [1, 2]}

    def __call__(self, x):
        x = self.embed(x[..., None])
        for layer in self.layers:
            x = layer(x)
            self.sow(nnx.Intermediate, "residual", x)
        return self.head(x)[:, -1, 0]


class Hijax(Busy):
    """A model of hijax variables, with lists."""

    def __init__(self, *, rngs=None):
        with nnx.var_defaults(hijax=True):
            super().__init__(rngs=rngs)
        self.widths = [4, 8]


pytestmark = pytest.mark.filterwarnings("ignore:Using .Module.sow..:DeprecationWarning")  # models in use do

MODELS = [Staged, Language, Hijax]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.few(1)
def test_models_train_save_and_resume_to_the_bit(make, tmp_path, compilations):
    def trainer(workdir):
        return Trainer(make(), config(), loss_fn=squared_error, workdir=tmp_path / workdir)

    data = regression()
    whole = trainer("whole")
    whole.train(data, num_epochs=4, batch_size=16)
    assert compilations.get("jit(train_step)", 0) + compilations.get("jit(train_steps)", 0) == 1
    half = trainer("half")
    half.train(data, num_epochs=2, batch_size=16)
    path = half.save_checkpoint()
    resumed = trainer("resumed")
    resumed.train(data, num_epochs=4, batch_size=16, resume=path)
    chex.assert_trees_all_equal(resumed.state.params, whole.state.params)
    assert whole.model(data["input"]).shape == (64,)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.slow
def test_models_train_on_a_mesh(make, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    trainer = Trainer(make(), config(), loss_fn=squared_error, workdir=tmp_path, mesh=mesh)
    trainer.train(regression(), num_epochs=1, batch_size=16)
    assert jnp.isfinite(trainer.evaluate(regression(), batch_size=16)["loss"])


def test_hijax_variables_compute_what_ordinary_ones_do(compilations):
    step, batch = step_of(), regression()
    results = []
    for model in (Hijax(), Busy()):
        state = create(model)
        for _ in range(3):
            state, metrics = step(state, batch)
        results.append((state.params, state.model_state, metrics))
    chex.assert_trees_all_equal(*results)
    assert compilations["jit(train_step)"] == 2


def test_sown_values_change_no_number_and_compile_nothing(compilations):
    class Sowing(Busy):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(nnx.Intermediate, "outputs", y)
            self.inner.sow(nnx.Intermediate, "doubled", 2 * y)
            return y

    model, batch = Sowing(), regression()
    model(batch["input"])  # leaves values behind
    silent = Busy()
    silent(batch["input"])
    step = step_of()
    sowing, plain = create(model), create(silent)
    for _ in range(3):
        sowing, metrics = step(sowing, batch)
    for _ in range(3):
        plain, expected = step(plain, batch)
    assert compilations["jit(train_step)"] == 2
    chex.assert_trees_all_equal(
        (sowing.params, sowing.model_state, metrics), (plain.params, plain.model_state, expected)
    )
    assert not hasattr(sowing.model(), "outputs")
    assert hasattr(model, "outputs")


class Shadowed(Busy):
    def __init__(self, *, rngs=None):
        super().__init__(rngs=rngs)
        self.train, self.eval = True, [1, 2]
        self.inner.train = False


class ClassAttribute(Busy):
    train: bool = True
    eval = None


class OtherMethod(Busy):
    def train(self, data):
        raise AssertionError("called")

    def eval(self, data):
        raise AssertionError("called")


@pytest.mark.parametrize("make", [Shadowed, ClassAttribute, OtherMethod])
def test_attributes_named_as_the_modes_are_no_obstacle(make):
    results = []
    for model in (make(), Busy()):
        state, metrics = step_of()(create(model), regression())
        evaluated = jax.jit(make_eval_step(squared_error))(state, regression())
        results.append((state.params, state.model_state, metrics, evaluated))
    chex.assert_trees_all_equal(*results)


def test_a_mode_that_a_model_overrides_is_called():
    class Overriding(Busy):
        def train(self, **attributes):
            super().train(**attributes)
            self.dropout.rate = 0.0

    state = create(Overriding())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnx.Dropout, "__call__", lambda self, x: x * (1.0 if self.rate == 0.0 else jnp.nan))
        assert jnp.isfinite(step_of()(state, regression())[1]["loss"])


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm], ids=lambda norm: norm.__name__)
def test_normalized_weights_hold_for_one_pass(norm):
    class Normed(nnx.Module):
        def __init__(self):
            self.layer = norm(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.layer(x)[:, 0]

    model, data, still = Normed(), regression(8, 4), optax.sgd(0.0)
    state = create(model, still)
    after, metrics = jax.jit(make_train_step(squared_error, still))(state, data)
    chex.assert_trees_all_equal(after.params, state.params)
    assert metrics["loss"] == pytest.approx(float(squared_error(model, data, None, 0)[0]), rel=1e-5)
    with pytest.raises(AssertionError):  # a call outside a step normalizes the params of the module
        chex.assert_trees_all_equal(create(model, still).params, state.params)
