"""Normalizing flows of the package bijx, which nobody here wrote: they train, save and resume.

`make third-party` installs the package and runs these; no other target does.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import config
from trainer import Trainer, TrainState, make_train_step

pytestmark = pytest.mark.third_party


def affine(bijx, rngs):
    return bijx.Chain(bijx.AffineLinear(jnp.ones(4), jnp.zeros(4), rngs=rngs), bijx.Sinh())


def splines(bijx, rngs):
    """Couples two halves by splines, whose parameters come from a network that ends in a function."""
    layers = []
    for parity in (True, False):
        mask = bijx.checker_mask((4,), parity=parity)
        template = bijx.ModuleReconstructor(bijx.MonotoneRQSpline(6, (), rngs=rngs))
        network = bijx.nn.nets.MLP(
            in_features=mask.count_secondary,
            out_features=mask.count_primary * template.params_total_size,
            rngs=rngs,
        )
        count = mask.count_primary
        shaped = nnx.Sequential(network, lambda p, count=count: p.reshape(*p.shape[:-1], count, -1))
        layers.append(bijx.GeneralCouplingLayer(shaped, mask, template, bijection_event_rank=0))
    return bijx.Chain(*layers)


def continuous(bijx, rngs):
    class Field(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, t, x):
            return jnp.tanh(self.layer(x)) * (1 + t)

    return bijx.ContFlowRK4(bijx.AutoJacVF(Field()), steps=3)


def negative_log_likelihood(model, batch, rng, step):
    del rng, step
    return -jnp.mean(model.log_density(batch["x"])), {}


@pytest.fixture(autouse=True)
def broadcasting():
    """The package broadcasts, which the other tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


def make(bijx, flow):
    rngs = nnx.Rngs(0)
    return bijx.Transformed(bijx.IndependentNormal((4,), rngs=rngs), flow(bijx, rngs))


DATA = {"x": np.random.default_rng(0).uniform(0.2, 0.8, size=(64, 4)).astype(np.float32)}  # splines map 0 to 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("flow", [affine, splines, continuous])
def test_a_flow_trains_as_under_nnx_jit(flow, compilations):
    import bijx

    model, batch = make(bijx, flow), {"x": DATA["x"][:16]}
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def by_flax(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(lambda model: negative_log_likelihood(model, batch, None, 0)[0])(model)
        optimizer.update(model, grads)
        return loss

    state = TrainState.create(make(bijx, flow), optax.adam(1e-2), rng=jax.random.key(0))
    step = jax.jit(make_train_step(negative_log_likelihood, optax.adam(1e-2)))
    for _ in range(5):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], by_flax(model, optimizer, batch), rtol=1e-5)
    assert compilations["jit(train_step)"] == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("flow", [affine, splines, continuous])
def test_a_flow_resumes_to_the_bit(flow, tmp_path):
    import bijx

    def trainer(workdir):
        return Trainer(make(bijx, flow), config(), loss_fn=negative_log_likelihood, workdir=tmp_path / workdir)

    whole, half, resumed = map(trainer, ("whole", "half", "resumed"))
    whole.train(DATA, num_epochs=4, batch_size=16)
    half.train(DATA, num_epochs=2, batch_size=16)
    resumed.train(DATA, num_epochs=4, batch_size=16, resume=half.save_checkpoint())
    chex.assert_trees_all_equal(resumed.state.params, whole.state.params)
