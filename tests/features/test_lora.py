"""Low-rank adaptation: equal to its definition for every kind of layer, and what is frozen costs nothing."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import config, regression
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Trainer,
    TrainState,
    add_lora,
    create_sharded,
    load_state,
    make_mesh,
    make_train_step,
    merge_lora,
    save_state,
)


def values(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


TOKENS = jnp.array([[0, 3, 6], [1, 1, 5]])

# By name: the layer, its inputs, and A B in the shape of its weights from the factors, written as an equation.
LAYERS = {
    "linear": (lambda rngs: nnx.Linear(4, 6, rngs=rngs), values(3, 4), "ir,ro->io"),
    "linear in bfloat16": (lambda rngs: nnx.Linear(4, 6, dtype=jnp.bfloat16, rngs=rngs), values(3, 4), "ir,ro->io"),
    "many outputs": (lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs), values(3, 5, 4), "ir,rop->iop"),
    "many inputs": (
        lambda rngs: nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs),
        values(3, 2, 4),
        "ijr,ro->ijo",
    ),
    "a batch axis": (
        lambda rngs: nnx.LinearGeneral(4, 6, batch_axis={0: 3}, rngs=rngs),
        values(3, 5, 4),
        "bir,ro->bio",
    ),
    "einsum": (lambda rngs: nnx.Einsum("nta,hab->nthb", (2, 4, 3), (2, 3), rngs=rngs), values(3, 5, 4), "ar,rhb->hab"),
    "einsum of experts": (
        lambda rngs: nnx.Einsum("eni,eio->eno", (2, 4, 6), rngs=rngs),
        values(2, 5, 4),
        "eir,ro->eio",
    ),
    "embed": (lambda rngs: nnx.Embed(7, 4, rngs=rngs), TOKENS, "ir,ro->io"),
    "embed of one": (lambda rngs: nnx.Embed(1, 4, rngs=rngs), TOKENS, "ir,ro->io"),
    "conv": (lambda rngs: nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs), values(2, 8, 8, 4), "xyir,ro->xyio"),
    "grouped conv": (
        lambda rngs: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=rngs),
        values(2, 8, 4),
        "xir,ro->xio",
    ),
    "transposed conv": (lambda rngs: nnx.ConvTranspose(4, 6, (3,), rngs=rngs), values(2, 8, 4), "xir,ro->xio"),
}


def with_random_factors(model):
    """The model with factors that change what it computes."""
    random = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):
        for name in ("lora_a", "lora_b"):
            if hasattr(module, name):
                factor = getattr(module, name)
                factor[...] = jnp.asarray(random.normal(size=factor.shape), factor.dtype)
    return model


@pytest.mark.few(5)
@pytest.mark.parametrize("name", LAYERS)
class TestLayers:
    def test_it_starts_equal_to_the_bit(self, name):
        make, inputs, _ = LAYERS[name]
        base = make(nnx.Rngs(0))
        adapted = add_lora(base, 2, rngs=nnx.Rngs(1))
        np.testing.assert_array_equal(
            nnx.jit(adapted.__class__.__call__)(adapted, inputs), nnx.jit(type(base).__call__)(base, inputs)
        )
        assert not hasattr(base, "lora_a")
        assert isinstance(adapted, type(base))

    def test_it_computes_with_the_weights_of_the_definition_and_so_does_the_merged_one(self, name):
        make, inputs, equation = LAYERS[name]
        base = make(nnx.Rngs(0))
        adapted = with_random_factors(add_lora(base, 2, alpha=3.0, rngs=nnx.Rngs(1)))
        weights = "embedding" if isinstance(base, nnx.Embed) else "kernel"
        change = 1.5 * np.einsum(equation, np.float64(adapted.lora_a[...]), np.float64(adapted.lora_b[...]))
        plain = base(inputs)
        getattr(base, weights)[...] += jnp.asarray(change, jnp.float32)
        rounding = 0.1 if plain.dtype == jnp.bfloat16 else 1e-4
        for model in (adapted, merge_lora(adapted)):
            np.testing.assert_allclose(*(np.float32(m(inputs)) for m in (model, base)), rtol=rounding, atol=rounding)
        assert np.abs(np.float32(plain) - np.float32(base(inputs))).max() > 5 * rounding
        adapted(inputs)  # what it merges for a call is not itself
        assert isinstance(adapted.lora_a, nnx.LoRAParam)

    def test_the_merged_one_is_of_the_original_class(self, name):
        base = LAYERS[name][0](nnx.Rngs(0))
        merged = merge_lora(add_lora(base, 2, rngs=nnx.Rngs(1)))
        assert type(merged) is type(base)
        assert nnx.graphdef(merged) == nnx.graphdef(base)
        assert_same_bits(nnx.to_pure_dict(nnx.state(merged)), nnx.to_pure_dict(nnx.state(base)))


def test_attend_computes_with_the_same_weights():
    adapted = with_random_factors(add_lora(nnx.Embed(7, 4, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1)))
    query = values(3, 4)
    np.testing.assert_allclose(adapted.attend(query), merge_lora(adapted).attend(query), rtol=1e-5, atol=1e-5)


def test_an_equation_given_in_the_call_is_obeyed():
    adapted = with_random_factors(add_lora(nnx.Einsum("ni,io->no", (4, 4), rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1)))
    inputs = values(3, 4)
    found = adapted(inputs, "ni,oi->no")
    np.testing.assert_allclose(found, merge_lora(adapted)(inputs, "ni,oi->no"), rtol=1e-5, atol=1e-5)


class Scaled(nnx.Linear):
    """A layer of someone else's."""

    def __call__(self, inputs):
        return super().__call__(inputs)


def test_a_subclass_of_a_layer_is_adapted_and_comes_back():
    adapted = with_random_factors(add_lora(Scaled(4, 6, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1)))
    merged = merge_lora(adapted)
    assert isinstance(adapted, Scaled)
    assert type(merged) is Scaled
    np.testing.assert_allclose(adapted(values(3, 4)), merged(values(3, 4)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_adapted_model_and_its_state_can_be_pickled():
    adapted = with_random_factors(add_lora(Attention(), 2, rngs=nnx.Rngs(1)))
    x = regression(4)["input"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(adapted))(x), adapted(x))
    state = TrainState.create(adapted, optax.sgd(0.1), rng=jax.random.PRNGKey(0), wrt=nnx.LoRAParam)
    assert pickle.loads(pickle.dumps(state)).graphdef is state.graphdef


def test_stacked_layers_have_factors_of_their_own():
    @nnx.vmap
    def stack(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def call(layer, x):
        return layer(x)

    base = stack(jax.random.split(jax.random.key(0), 3))
    adapted = with_random_factors(add_lora(base, 2, rngs=nnx.Rngs(1)))
    assert (adapted.lora_a.shape, adapted.lora_b.shape) == ((3, 4, 2), (3, 2, 4))
    inputs = values(5, 4)
    np.testing.assert_allclose(call(adapted, inputs), call(merge_lora(adapted), inputs), rtol=1e-4, atol=1e-4)


class Attention(nnx.Module):
    """Two blocks of attention, and a head: a model of someone who has not heard of LoRA."""

    def __init__(self, width=8, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.embed = nnx.Linear(1, width, rngs=rngs)
        self.blocks = nnx.List([nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        hidden = self.embed(x[..., None])
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden.mean(1))[:, 0]


def mean_squared_error(model, batch, rng, step):
    del rng, step
    return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}


class TestModels:
    PATHS = ("blocks/*/query", "blocks/1/value")

    def adapted(self):
        return add_lora(Attention(), 2, paths=self.PATHS, rngs=nnx.Rngs(1))

    def test_only_layers_at_the_paths_are_adapted_and_no_path_changes(self):
        adapted = self.adapted()
        factors = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))}
        assert factors == {"blocks/0/query", "blocks/1/query", "blocks/1/value"}
        before, after = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (Attention(), adapted))
        assert set(before) < set(after)
        x = regression(4)["input"]
        np.testing.assert_array_equal(Attention()(x), adapted(x))

    def test_only_the_factors_are_trained_and_the_merged_model_is_exported(self, tmp_path):
        adapted = self.adapted()
        trainer = Trainer(
            adapted, config(), optax.adam(1e-2), loss_fn=mean_squared_error, wrt=nnx.LoRAParam, workdir=tmp_path
        )
        trainer.train(regression(40), 3, 8)
        before, after = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (adapted, trainer.model))
        for path, variable in after.items():
            same = np.array_equal(variable[...], before[path][...])
            assert same != isinstance(variable, nnx.LoRAParam), path

        merged = merge_lora(trainer.model)
        x = regression(8)["input"]
        np.testing.assert_allclose(merged(x), trainer.model(x), rtol=1e-5, atol=1e-5)
        save_state(tmp_path / "merged.msgpack", TrainState.create(merged, optax.identity(), rng=jax.random.key(0)))
        plain = TrainState.create(Attention(), optax.identity(), rng=jax.random.key(0))
        loaded = load_state(tmp_path / "merged.msgpack", plain)
        np.testing.assert_array_equal(loaded.model()(x), merged(x))

    @pytest.mark.slow
    def test_killed_and_resumed_it_is_the_same_to_the_bit(self, tmp_path):
        def build(name, *callbacks):
            return Trainer(
                self.adapted(),
                config(),
                optax.adam(1e-2),
                loss_fn=mean_squared_error,
                wrt=nnx.LoRAParam,
                workdir=tmp_path / name,
                callbacks=callbacks,
                save_interval=2,
            )

        whole = build("whole")
        whole.train(regression(40), 2, 8)
        with pytest.raises(StoppedError):
            build("cut", Watching(7)).train(regression(40), 2, 8)
        resumed = build("cut", Watching())
        resumed.train(regression(40), 2, 8, resume=True)
        assert_same_bits(resumed.state, whole.state)

    @pytest.mark.slow
    def test_a_mesh_of_eight_trains_the_same(self):
        def make(rngs):
            return add_lora(Attention(rngs=rngs), 2, paths=self.PATHS, rngs=rngs)

        optimizer, losses = optax.adam(1e-2), []
        for axes, devices in (({"data": 2, "fsdp": 4}, None), ({"data": 1}, jax.devices()[:1])):
            state = create_sharded(
                make,
                optimizer,
                rng=jax.random.key(0),
                mesh=make_mesh(axes, devices),
                wrt=nnx.LoRAParam,
                min_size=0,
            )
            step = jax.jit(make_train_step(mean_squared_error, optimizer, wrt=nnx.LoRAParam))
            for seed in range(3):
                state, metrics = step(state, regression(8, seed=seed))
            losses.append(float(metrics["loss"]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    @pytest.mark.slow
    def test_an_ensemble_of_adapters(self):
        optimizer, keys = optax.sgd(0.1), jax.random.split(jax.random.key(0), 3)

        def create(key):
            return TrainState.create(
                add_lora(Attention(), 2, rngs=nnx.Rngs(key)), optimizer, rng=key, wrt=nnx.LoRAParam
            )

        step = jax.jit(jax.vmap(make_train_step(mean_squared_error, optimizer, wrt=nnx.LoRAParam), in_axes=(0, None)))
        state, metrics = step(jax.vmap(create)(keys), regression(8))
        state, metrics = step(state, regression(8))
        assert len(set(np.asarray(metrics["loss"]).tolist())) == 3

    def test_equal_models_compile_once(self, compilations):
        step = jax.jit(make_train_step(mean_squared_error, optax.sgd(0.1), wrt=nnx.LoRAParam))
        for _ in range(2):
            state = TrainState.create(self.adapted(), optax.sgd(0.1), rng=jax.random.key(0), wrt=nnx.LoRAParam)
            step(state, regression(8))
        assert compilations["jit(train_step)"] == 1


def cost(wrt):
    """The bytes of the optimizer, and the operations of a compiled step, for a wide perceptron."""
    width, optimizer = 256, optax.adam(1e-3)
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(width, width, rngs=rngs) for _ in range(4)]
    model = add_lora(nnx.Sequential(*layers), 4, rngs=rngs)
    state = TrainState.create(model, optimizer, rng=jax.random.key(0), wrt=wrt)

    def loss_fn(model, batch, rng, step):
        del rng, step
        return jnp.mean(model(batch["input"]) ** 2), {}

    step = jax.jit(make_train_step(loss_fn, optimizer, wrt=wrt))
    compiled = step.lower(state, {"input": jnp.ones((64, width))}).compile()
    flops = compiled.cost_analysis()["flops"]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)), flops


def test_frozen_params_take_no_optimizer_memory_and_no_gradient():
    frozen_bytes, frozen_flops = cost(nnx.LoRAParam)
    half_bytes, half_flops = cost("layers/[23]/*")
    whole_bytes, whole_flops = cost(nnx.Param)
    print(
        f"factors alone: {frozen_bytes:,} of {whole_bytes:,} bytes, {frozen_flops / whole_flops:.2f} of the operations"
    )
    print(f"the last half: {half_bytes:,} of {whole_bytes:,} bytes, {half_flops / whole_flops:.2f} of the operations")
    rank, width, layers = 4, 256, 4
    assert frozen_bytes == 4 + 2 * 4 * layers * (2 * rank * width)  # a count, and two moments of A and B
    assert frozen_bytes < 0.05 * whole_bytes
    # Forward, and the gradients of activations and of weights: a third each. The last goes, and of half the layers.
    assert frozen_flops < 0.72 * whole_flops
    assert half_flops < 0.72 * whole_flops
    assert half_bytes < 0.51 * whole_bytes


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda model: add_lora(3, 2, rngs=nnx.Rngs(0)),
            ArgumentTypeError,
            "`model` is of type int; it must be a flax",
        ),
        (lambda model: add_lora(model, 0, rngs=nnx.Rngs(0)), ArgumentError, "`rank` is 0; it must be a positive"),
        (lambda model: add_lora(model, 2, rngs=0), ArgumentTypeError, "`rngs` is of type int; it must be an nnx.Rngs"),
        (
            lambda model: add_lora(model, 2, alpha="1", rngs=nnx.Rngs(0)),
            ArgumentTypeError,
            "`alpha` is '1' of type str",
        ),
        (
            lambda model: add_lora(model, 2, alpha=0, rngs=nnx.Rngs(0)),
            ArgumentError,
            "`alpha` is 0; it must be positive",
        ),
        (
            lambda model: add_lora(model, 2, paths="block/*", rngs=nnx.Rngs(0)),
            ArgumentError,
            "`paths` has the pattern 'block/*', which selects no layer that can be adapted (Linear, LinearGeneral, "
            "Einsum, Embed, Conv): it matches no whole path; the nearest are blocks/",
        ),
        (lambda model: add_lora(model, 2, paths=[3], rngs=nnx.Rngs(0)), ArgumentTypeError, "`paths` has the pattern 3"),
        (
            lambda model: add_lora(add_lora(model, 2, paths="head", rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(0)),
            ArgumentError,
            "`model` has low-rank factors already, at `head`; call merge_lora before.",
        ),
        (merge_lora, ArgumentError, "`model` has no low-rank factors of add_lora, so there is nothing to merge."),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make(Attention())
