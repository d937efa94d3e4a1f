"""Metrics that merge: over uneven batches, devices and fused steps they are those of all the data at once."""

import contextlib
import json
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    Callback,
    EarlyStopping,
    FileLogger,
    ObjectiveError,
    Trainer,
    TrainState,
    histogram,
    make_eval_step,
    make_mesh,
    make_train_step,
    vector,
)


class Auc(flax.struct.PyTreeNode):
    """The area under the ROC curve from two histograms of scores, as a library of metrics would have it."""

    positive: jax.Array
    negative: jax.Array

    @classmethod
    def of(cls, scores, labels, bins=50):
        where = jnp.clip((jax.nn.sigmoid(scores) * bins).astype(int), 0, bins - 1)
        one = jax.nn.one_hot(where, bins)
        return cls((one * labels[:, None]).sum(0), (one * (1 - labels[:, None])).sum(0))

    def merge(self, other):
        return Auc(self.positive + other.positive, self.negative + other.negative)

    def compute(self):
        below = jnp.cumsum(self.negative) - self.negative / 2
        return (self.positive * below).sum() / (self.positive.sum() * self.negative.sum())


class OfSums(flax.struct.PyTreeNode):
    """A function of sums over examples, where the mean of its values over batches is another number."""

    sums: jax.Array
    function: Callable[[jax.Array], jax.Array] = flax.struct.field(pytree_node=False)

    def merge(self, other):
        return self.replace(sums=self.sums + other.sums)

    def compute(self):
        return self.function(self.sums)


def f1(sums):
    hits, said, positive = sums
    return 2 * hits / (said + positive)


def root_mean(sums):
    return jnp.sqrt(sums[0] / sums[1])


def perplexity(sums):
    return jnp.exp(sums[0] / sums[1])


def loss_fn(model, batch, rng, step):
    """Binary classification of the sign of a target, with every kind of metric."""
    scores = model(batch["input"])
    labels = (batch["target"] > 0).astype(jnp.float32)
    losses = optax.sigmoid_binary_cross_entropy(scores, labels)
    positive = labels.sum()
    accuracy = nnx.metrics.Accuracy(threshold=0.0)
    accuracy.update(logits=scores, labels=labels.astype(jnp.int32))
    moments = nnx.metrics.Welford()
    moments.update(values=scores)
    several = nnx.metrics.MultiMetric(
        mean_score=nnx.metrics.Average("scores"), mean_label=nnx.metrics.Average("labels")
    )
    several.update(scores=scores, labels=labels)
    return jnp.mean(losses), {
        "recall": (((scores > 0) * labels).sum() / positive, positive),
        "auc": Auc.of(scores, labels),
        "f1": OfSums(jnp.stack([((scores > 0) * labels).sum(), (scores > 0).sum(), positive]), f1),
        "rmse": OfSums(jnp.stack([((scores - batch["target"]) ** 2).sum(), jnp.float32(scores.size)]), root_mean),
        "perplexity": OfSums(jnp.stack([losses.sum(), jnp.float32(losses.size)]), perplexity),
        "accuracy": accuracy,
        "score": moments,
        "several": several,
        "recall_by_label": vector(recall_of(scores, labels), jnp.stack([(1 - labels).sum(), positive])),
        "scores": histogram(scores, -1.0, 1.0, bins=4),
    }


def recall_of(scores, labels):
    """The recall of either label; NaN where a batch has none of it, which then has no weight."""
    right = ((scores > 0) == (labels > 0)).astype(jnp.float32)
    return jnp.stack([(right * (1 - labels)).sum() / (1 - labels).sum(), (right * labels).sum() / labels.sum()])


NAMES = {
    "recall_by_label",
    "scores",
    "recall",
    "auc",
    "f1",
    "rmse",
    "perplexity",
    "accuracy",
    "mean_score",
    "mean_label",
    "score_mean",
    "score_standard_deviation",
}
NAMES |= {"score_standard_error_of_mean"}


def at_once(state, data):
    """The metrics of all data in one call, without this library."""
    model = state.model()
    model.eval()
    scores, labels = model(data["input"]), (data["target"] > 0).astype(np.float32)
    deviation = jnp.std(scores)
    return {
        "recall_by_label": recall_of(scores, labels),
        "scores": np.histogram(np.clip(scores, -1, 1), 4, (-1, 1))[0],
        "recall": ((scores > 0) * labels).sum() / labels.sum(),
        "auc": Auc.of(scores, labels).compute(),
        "f1": 2 * ((scores > 0) * labels).sum() / ((scores > 0).sum() + labels.sum()),
        "rmse": np.sqrt(np.mean((np.asarray(scores) - data["target"]) ** 2)),
        "perplexity": np.exp(np.mean(optax.sigmoid_binary_cross_entropy(scores, labels))),
        "accuracy": jnp.mean((scores >= 0) == (labels > 0)),
        "mean_score": scores.mean(),
        "mean_label": labels.mean(),
        "score_mean": scores.mean(),
        "score_standard_deviation": deviation,
        "score_standard_error_of_mean": deviation / np.sqrt(len(scores)),
    }


def agreeing(wanted):
    return {name: pytest.approx(np.asarray(value).tolist(), rel=1e-5) for name, value in wanted.items()}


def build(tmp_path=None, callbacks=(), **options):
    return Trainer(
        Linear(4), config(log_frequency=1), loss_fn=loss_fn, workdir=tmp_path, callbacks=list(callbacks), **options
    )


@pytest.mark.parametrize("batch_size", [1, 7, 32, 50])
@pytest.mark.few(1)
def test_over_uneven_batches(batch_size):
    trainer, data = build(), regression(50)
    averages = trainer.evaluate(data, batch_size)
    wanted = at_once(trainer.state, data)
    assert {name: averages[name] for name in NAMES} == agreeing(wanted)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
@pytest.mark.few(1)
def test_over_a_mesh(axes):
    trainer, data = build(mesh=make_mesh(axes)), regression(52)
    averages = trainer.evaluate(data, 16)
    wanted = at_once(build().state, data)
    assert {name: averages[name] for name in NAMES} == agreeing(wanted)


@pytest.mark.parametrize("transform", ["vmap", "shard_map"])
@pytest.mark.slow
def test_over_a_mapped_axis(transform):
    state, data = build().state, regression(32)
    step = make_eval_step(loss_fn, axis_name="data")
    if transform == "vmap":
        parts = jax.tree.map(lambda leaf: leaf.reshape(4, 8, *leaf.shape[1:]), data)
        metrics = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="data"))(state, parts)
        metrics = jax.tree.map(lambda leaf: leaf[0], metrics)
    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
        spec = jax.sharding.PartitionSpec
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
        metrics = jax.jit(mapped)(state, data)  # without it each operation is a program over four devices
    wanted = at_once(state, data)
    assert {n: np.asarray(metrics[n]).tolist() for n in NAMES} == agreeing(wanted)


def test_a_device_whose_weight_is_zero_counts_for_nothing():
    def weighted(model, batch, rng, step):
        loss, metrics = loss_fn(model, batch, rng, step)
        return loss, {**metrics, "batch_weight": batch["weight"].sum()}

    state, data = build().state, regression(32)
    data["input"][8:24] = np.nan
    weight = np.ones(32, np.float32)
    weight[8:24] = 0
    parts = jax.tree.map(lambda leaf: leaf.reshape(4, 8, *leaf.shape[1:]), {**data, "weight": weight})
    step = make_eval_step(weighted, axis_name="data")
    metrics = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="data"))(state, parts)
    kept = {name: leaf[weight > 0] for name, leaf in data.items()}
    wanted = at_once(state, kept)
    found = jax.tree.map(lambda leaf: leaf[0], metrics)
    assert {n: np.asarray(found[n]).tolist() for n in NAMES} == agreeing(wanted)


@pytest.mark.slow
def test_over_micro_batches():
    """Of 11, 11 and 10 rows, and of 8, 8, 8 and 6."""
    optimizer, data = optax.sgd(0.1), regression(32)
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    _, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate_steps=4))(state, regression(30))
    wanted = at_once(state, regression(30))
    assert {n: np.asarray(metrics[n]).tolist() for n in NAMES} == agreeing(wanted)
    _, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate_steps=3))(state, data)
    wanted = at_once(state, data)
    assert {n: np.asarray(metrics[n]).tolist() for n in NAMES} == agreeing(wanted)


class TestTraining:
    @pytest.mark.parametrize("steps_per_call", [1, "auto"])
    def test_rows_are_of_steps_and_averages_of_all(self, steps_per_call):
        seen = []

        class Reads(Callback):
            def on_call_end(self, trainer, step, logs):
                seen.append(float(logs["auc"]))

        trainer = build(callbacks=[Reads()], steps_per_call=steps_per_call, optimizer=optax.sgd(0.0))
        averages = trainer.train(regression(50), 1, 16, regression(30, seed=1))
        assert averages["auc"] == pytest.approx(float(at_once(trainer.state, regression(30, seed=1))["auc"]), rel=1e-5)
        wanted = at_once(trainer.state, regression(50))
        of_epoch = trainer.run.average.compute()
        assert {n: of_epoch[n] for n in NAMES} == agreeing(wanted)
        rows = trainer.history.series("auc")[1]
        assert len(rows) == 4
        assert rows[-1] == seen[-1]
        assert len(set(rows)) > 1
        assert "val_recall" in trainer.history[-1]

    def test_an_interrupted_epoch_goes_on_to_the_same_numbers(self, tmp_path):
        class Stops(Callback):
            def on_batch_end(self, trainer, step, logs):
                if step == 3:
                    raise KeyboardInterrupt

        wanted = build(tmp_path / "whole").train(regression(50), 1, 10)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "part", [Stops()], save_interval=2).train(regression(50), 1, 10)
        assert build(tmp_path / "part").train(regression(50), 1, 10, resume=True) == wanted
        # At the end of the epoch no batch comes that would tell the type.
        assert build(tmp_path / "part").train(regression(50), 1, 10, resume=True) == wanted

    def test_they_are_floats_for_whoever_calls_a_step(self):
        metrics = build().train_step(regression(8))
        assert 0 <= float(metrics["accuracy"]) <= 1
        assert np.asarray(metrics["recall"]).shape == ()


class Unmergeable(nnx.Metric):
    def __init__(self):
        self.largest = nnx.metrics.MetricState(jnp.zeros(()))

    def update(self, **values):
        self.largest[...] = jnp.maximum(self.largest[...], values["values"].max())

    def compute(self):
        return self.largest[...]


class Largest(Unmergeable):
    def merge(self, other):
        self.largest[...] = jnp.maximum(self.largest[...], other.largest[...])


def reporting(value):
    def fn(model, batch, rng, step):
        loss, _ = squared_error(model, batch, rng, step)
        return loss, {"it": value(batch)}

    return fn


def updated(metric, values):
    metric.update(values=values)
    return metric


def test_an_nnx_metric_of_ones_own_that_merges():
    fn = reporting(lambda batch: updated(Largest(), batch["target"]))
    data = regression(50)
    trainer = Trainer(Linear(4), config(), loss_fn=fn)
    assert trainer.evaluate(data, 8)["it"] == pytest.approx(data["target"].max())


class Words(flax.struct.PyTreeNode):
    values: jax.Array

    def merge(self, other):
        return self

    def compute(self):
        return [self.values]


class Named(flax.struct.PyTreeNode):
    """Two metrics in one, as a collection of clu has them."""

    total: jax.Array
    largest: jax.Array

    def merge(self, other):
        return Named(self.total + other.total, jnp.maximum(self.largest, other.largest))

    def compute(self):
        return {"sum": self.total, "most": self.largest}


def test_what_computes_a_mapping_is_a_metric_for_each_name():
    fn = reporting(lambda batch: Named(batch["target"].sum(), batch["target"].max()))
    trainer, data = Trainer(Linear(4), config(), loss_fn=fn), regression(50)
    averages = trainer.evaluate(data, 8)
    assert averages["sum"] == pytest.approx(data["target"].sum(), rel=1e-5)
    assert averages["most"] == data["target"].max()
    assert "it" not in averages


class Begun(Words):
    """Has the merge of a base class that expects another."""

    def merge(self, other):
        raise NotImplementedError


class NoTree:
    def merge(self, other):
        return self

    def compute(self):
        return 0.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda batch: updated(Unmergeable(), batch["target"]), "`it` of type Unmergeable, whose parts cannot be put"),
        (lambda batch: Words(jnp.ones(3)), r"`it` that computes list; it must compute an array"),
        (lambda batch: Begun(jnp.ones(3)), "`it` of type Begun, whose parts cannot be put together; give it a method"),
        (lambda batch: NoTree(), r"`it` of type NoTree, which has merge\(\) and compute\(\) but is no pytree"),
        (lambda batch: (batch["target"], 1.0), r"`it` of shapes \(8,\) and \(\); a pair is a scalar and its weight"),
        (lambda batch: jnp.complex64(1j), "`it` of dtype complex64; metrics are real numbers. Report its parts"),
        (lambda batch: (jnp.complex64(1j), 1.0), "`it` of dtype complex64; metrics are real numbers. Report its parts"),
        (lambda batch: vector(jnp.ones(3) * 1j), "`it` of dtype complex64; metrics are real numbers. Report its parts"),
        (lambda batch: jax.random.key(0), r"`it` of dtype key<\w+>; metrics are real numbers"),
        (lambda batch: jnp.ones(3), r"`it` of shape \(3,\); metrics are scalars"),
    ],
)
def test_refusals(value, message):
    state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
    with pytest.raises(ObjectiveError, match=message):
        make_train_step(reporting(value), optax.sgd(0.1))(state, regression(8))


class TestArrays:
    def test_the_history_has_them_and_loggers_their_entries(self, tmp_path):
        told = []
        with contextlib.closing(FileLogger(tmp_path / "log.jsonl")) as logger:
            trainer = build(logger=logger, log_callback=lambda step, metrics, prefix: told.append(metrics))
            trainer.train(regression(32), 2, 8, val_data=regression(16))
        counts = trainer.history.series("scores")[1]
        assert [sum(row) for row in counts] == [8] * 8
        assert sum(trainer.run.validation.averages["scores"]) == 16
        assert told[0]["scores"] == counts[0]
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        (first,) = [line for line in lines if line.get("step") == 1 and "train/loss" in line]
        assert [first[f"train/scores/{index}"] for index in range(4)] == counts[0]

    def test_a_checkpoint_holds_them_and_a_resumed_epoch_goes_on(self, tmp_path):
        class Stop(Callback):
            def on_batch_end(self, trainer, step, logs):
                if step == 3:
                    trainer.save_checkpoint()
                    raise RuntimeError("enough")

        whole = build().train(regression(50), 1, 8)
        with pytest.raises(RuntimeError, match="enough"):
            build(tmp_path, [Stop()]).train(regression(50), 1, 8)
        resumed = build(tmp_path).train(regression(50), 1, 8, resume=True)
        assert resumed == whole
        assert sum(whole["scores"]) == 50

    def test_a_monitor_wants_a_number(self):
        stopping = EarlyStopping("val_scores")
        with pytest.raises(ArgumentError, match="`monitor` is 'val_scores', which is an array"):
            build(callbacks=[stopping]).train(regression(16), 1, 8, val_data=regression(8))

    def test_nan_counts_into_no_bin_and_what_lies_beyond_into_the_last(self):
        values = jnp.array([-jnp.inf, -5.0, 0.0, 0.49, 0.5, 1.0, jnp.inf, jnp.nan])
        assert histogram(values, 0.0, 1.0, bins=2).counts.tolist() == [4, 3]

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: histogram(jnp.ones(3), 1.0, 1.0), "must ascend"),
            (lambda: histogram(jnp.ones(3), 0.0, 1.0, bins=0), "`bins`"),
            (lambda: vector(jnp.ones(3), jnp.ones(2)), r"`weights` is of shape \(2,\)"),
        ],
    )
    def test_arguments_that_cannot_be_used(self, make, said):
        with pytest.raises(ArgumentError, match=said):
            make()
