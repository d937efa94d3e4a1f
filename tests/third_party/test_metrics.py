"""Metrics of clu and metrax: over uneven batches, devices and micro-batches they are those of all the data at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Linear, config, regression
from trainer import ObjectiveError, Trainer, TrainState, make_mesh, make_train_step

pytestmark = pytest.mark.third_party


@pytest.fixture(autouse=True)
def promoted():
    """Metrax relies on implicit broadcasting."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def collection():
    """A class of several metrics. Made once: each call of `create` makes another type."""
    from clu import metrics as clu

    return clu.Collection.create(hits=clu.Accuracy, mean_score=clu.Average.from_output("scores"))


def metrics_of(scores, target):
    """The metrics of some examples, as the two packages make them."""
    import metrax
    from clu import metrics as clu

    labels = (target > 0).astype(jnp.int32)
    logits, chance = jnp.stack([-scores, scores], axis=-1), jax.nn.sigmoid(scores)
    return {
        "accuracy": clu.Accuracy.from_model_output(logits=logits, labels=labels),
        "mean": clu.Average.from_model_output(scores),
        "collection": collection().single_from_model_output(logits=logits, labels=labels, scores=scores),
        "auc": metrax.AUCROC.from_model_output(chance, labels),
        "precision": metrax.Precision.from_model_output(chance, labels),
        "recall": metrax.Recall.from_model_output(chance, labels),
        "rmse": metrax.RMSE.from_model_output(scores, target),
        "explained": metrax.RSQUARED.from_model_output(scores, target),
        "perplexity": metrax.Perplexity.from_model_output(logits[:, None], labels[:, None], from_logits=True),
    }


def loss_fn(model, batch, rng, step):
    scores = model(batch["input"])
    return jnp.mean((scores - batch["target"]) ** 2), metrics_of(scores, batch["target"])


def at_once(state, data):
    """The values of all examples in one call of the packages, without this library."""
    found = metrics_of(state.model()(data["input"]), jnp.asarray(data["target"]))
    values = {name: metric.compute() for name, metric in found.items()}
    values |= values.pop("collection")
    return {name: pytest.approx(float(value), rel=1e-5) for name, value in values.items()}


def build(directory=None, **options):
    return Trainer(Linear(4), config(), optax.sgd(0.01), loss_fn=loss_fn, workdir=directory, **options)


@pytest.mark.parametrize("axes", [None, {"data": 8}, {"data": 2, "fsdp": 4}])
def test_over_uneven_batches_and_devices(axes):
    trainer, data = build(mesh=axes and make_mesh(axes)), regression(52)
    averages = trainer.evaluate(data, 16)
    wanted = at_once(build().state, data)
    assert len(wanted) == 10
    assert {name: averages[name] for name in wanted} == wanted


def test_over_micro_batches():
    optimizer, data = optax.sgd(0.01), regression(30)
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    _, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate_steps=4))(state, data)
    wanted = at_once(state, data)
    assert {name: float(np.asarray(metrics[name])) for name in wanted} == wanted


def test_killed_and_resumed_an_epoch_has_the_same_numbers(tmp_path):
    wanted = build(tmp_path / "whole").train(regression(50), 1, 8)
    with pytest.raises(StoppedError):
        build(tmp_path / "cut", callbacks=[Watching(5)], save_interval=2).train(regression(50), 1, 8)
    resumed = build(tmp_path / "cut", callbacks=[Watching()], save_interval=2)
    assert resumed.train(regression(50), 1, 8, resume=True) == wanted


def test_one_that_cannot_be_merged_is_refused_by_name():
    import metrax
    import metrax.nnx

    def of_clu(scores, labels):
        return metrax.FBetaScore.from_model_output(scores, labels)

    def of_nnx(scores, labels):
        metric = metrax.nnx.Recall()
        metric.update(predictions=scores, labels=labels)
        return metric

    for make, name in ((of_clu, "FBetaScore"), (of_nnx, "Recall")):

        def fn(model, batch, rng, step, make=make):
            scores = model(batch["input"])
            return jnp.mean(scores**2), {"it": make(jax.nn.sigmoid(scores), batch["target"] > 0)}

        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        with pytest.raises(ObjectiveError, match=f"a metric `it` of type {name}, whose parts cannot be put together"):
            make_train_step(fn, optax.sgd(0.1))(state, regression(8))
