"""Models of Equinox, by the adapter of `docs/models.md`."""

import chex
import jax
import numpy as np
import optax
import pytest

from tests.problems import config, regression
from tests.test_docs import run
from trainer import Trainer

pytestmark = pytest.mark.third_party

DATA = regression(24)


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """What the page defines, all of whose blocks run."""
    monkeypatch.chdir(tmp_path)
    return run("models.md", r"(?s)```python[^\n]*\n(.*?)```")["FromEquinox"]


def loss_fn(model, batch, rng, step):
    return optax.squared_error(model(batch["input"])[:, 0], batch["target"]).mean(), {}


def test_a_model_of_equinox_trains_saves_resumes_and_comes_back(adapter, tmp_path):
    import equinox as eqx

    def trainer():
        return Trainer(adapter(eqx.nn.MLP(4, 1, 8, 2, key=jax.random.key(0))), config(), loss_fn=loss_fn)

    whole, half = trainer(), trainer()
    whole.train(DATA, num_epochs=4, batch_size=8)
    half.train(DATA, num_epochs=2, batch_size=8)
    path = half.save_checkpoint(tmp_path / "half.msgpack")
    resumed = trainer()
    resumed.train(DATA, num_epochs=4, batch_size=8, resume=path)
    chex.assert_trees_all_equal(resumed.state.params, whole.state.params)
    module = whole.model.module
    assert isinstance(module, eqx.nn.MLP)
    predicted = whole.predict({"input": DATA["input"]}, 8)
    np.testing.assert_allclose(jax.vmap(module)(DATA["input"]), predicted, rtol=1e-5)


def test_it_trains_as_a_loop_of_equinox_does(adapter):
    import equinox as eqx

    module = eqx.nn.MLP(4, 1, 8, 2, key=jax.random.key(0))
    trainer = Trainer(adapter(module), config(), optax.sgd(0.1), loss_fn=loss_fn)
    trainer.train_step(DATA)

    def loss(module):
        return optax.squared_error(jax.vmap(module)(DATA["input"])[:, 0], DATA["target"]).mean()

    grads = eqx.filter_grad(loss)(module)
    by_hand = eqx.apply_updates(module, jax.tree.map(lambda grad: -0.1 * grad, grads))
    for ours, theirs in zip(
        jax.tree.leaves(eqx.filter(trainer.model.module, eqx.is_array)),
        jax.tree.leaves(eqx.filter(by_hand, eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
