"""Models of Linen and with a configuration, as `docs/models.md` defines them."""

import chex
import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

from tests.problems import config, regression
from tests.test_docs import run
from trainer import Trainer, load_weights, save_state

pytestmark = pytest.mark.slow  # the page takes seconds

DATA = regression(24)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page defines, in the blocks that need no package of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        return run("models.md")


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        x = linen.Dense(8)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.3, deterministic=not train)(x)
        return linen.Dense(1)(x)[:, 0]


def loss_fn(model, batch, rng, step):
    return optax.squared_error(model(batch["input"]), batch["target"]).mean(), {}


def from_linen(page, **arguments):
    model = page["FromLinen"](Net(), DATA["input"][:1], rngs=nnx.Rngs(0))
    return Trainer(model, config(), loss_fn=loss_fn, **arguments)


def test_a_model_of_linen_trains_with_its_statistics_and_resumes_to_the_bit(page, tmp_path):
    whole, half, resumed = (from_linen(page) for _ in range(3))
    before = whole.state.model_state["linen"]["BatchNorm_0"]["mean"]
    whole.train(DATA, num_epochs=4, batch_size=8)
    assert not np.array_equal(whole.state.model_state["linen"]["BatchNorm_0"]["mean"], before)
    half.train(DATA, num_epochs=2, batch_size=8)
    path = half.save_checkpoint(tmp_path / "half.msgpack")
    resumed.train(DATA, num_epochs=4, batch_size=8, resume=path)
    chex.assert_trees_all_equal(resumed.state.params, whole.state.params)
    chex.assert_trees_all_equal(resumed.state.model_state, whole.state.model_state)


def test_a_model_of_linen_predicts_as_linen_does_in_evaluation(page):
    trainer = from_linen(page)
    trainer.train(DATA, num_epochs=2, batch_size=8)
    statistics = {"BatchNorm_0": trainer.state.model_state["linen"]["BatchNorm_0"]}
    variables = {"params": trainer.state.params["linen"], "batch_stats": statistics}
    expected = Net().apply(variables, DATA["input"], train=False)
    for batch_size in (24, 5):  # neither dropout nor the statistics of a batch
        np.testing.assert_allclose(trainer.predict({"input": DATA["input"]}, batch_size), expected, rtol=1e-5)


def test_a_step_on_a_model_of_linen_is_that_of_linen(page):
    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x, train=True):
            return linen.Dense(1)(linen.BatchNorm(use_running_average=not train)(x))[:, 0]

    model = page["FromLinen"](Plain(), DATA["input"][:1], rngs=nnx.Rngs(0))
    trainer = Trainer(model, config(), optax.sgd(0.1), loss_fn=loss_fn)
    start = trainer.state
    params = jax.tree.map(np.array, start.params["linen"])
    held = jax.tree.map(np.array, {"BatchNorm_0": start.model_state["linen"]["BatchNorm_0"]})
    trainer.train_step(DATA)

    def loss(params):
        variables = {"params": params, "batch_stats": held}
        outputs, updated = Plain().apply(variables, DATA["input"], mutable=["batch_stats"])
        return optax.squared_error(outputs, DATA["target"]).mean(), updated["batch_stats"]

    grads, statistics = jax.grad(loss, has_aux=True)(params)
    expected = jax.tree.map(lambda param, grad: param - 0.1 * grad, params, grads)
    chex.assert_trees_all_close(trainer.state.params["linen"], expected, rtol=1e-5)
    found = {"BatchNorm_0": trainer.state.model_state["linen"]["BatchNorm_0"]}
    chex.assert_trees_all_close(found, statistics, rtol=1e-5)


def test_a_model_with_a_configuration_trains_and_its_weights_have_its_names(page, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    trainer = page["trainer"]
    with pytest.warns(UserWarning, match="nothing to continue a run with"):
        path = save_state(tmp_path / "model.safetensors", trainer.state)
    names = set(safetensors.load_file(path))
    assert {"embeddings.embedding", "layers.0.attention.query.kernel", "classifier.bias"} <= names
    fresh = type(trainer.model)(trainer.model.config, rngs=nnx.Rngs(9))
    batch = page["batch"]
    loaded = load_weights(path, fresh)
    loaded.eval()
    expected = trainer.model
    expected.eval()
    found, wanted = (model(batch["input_ids"], batch["attention_mask"]) for model in (loaded, expected))
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=1e-5)
    assert loaded.config == trainer.model.config
