"""What resume does where a call differs from the interrupted one: other data are refused, anything else is said."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import ArgumentError, Callback, Extension, ExtensionConfig, InMemoryData, Trainer
from trainer.core.fingerprint import fingerprint

DATA, HELD_OUT = regression(16), regression(8, seed=1)


def absolute_error(model, batch, rng, step):
    del rng, step
    return jnp.mean(jnp.abs(model(batch["input"]) - batch["target"])), {}


def build(directory, settings=None, model=None, loss_fn=squared_error, **options):
    model = Busy() if model is None else model
    return Trainer(model, settings or config(), loss_fn=loss_fn, workdir=directory, **options)


def train(trainer, data=DATA, epochs=1, held_out=HELD_OUT, val_interval=2, **options):
    with trainer:
        trainer.train(data, epochs, 4, held_out, val_interval, **options)


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return self.scale * loss, metrics


class Penalty(Extension):
    def __init__(self, weight=1.0, power=2.0):
        super().__init__(ExtensionConfig(weight=weight))
        self.power, self.epochs = power, 0

    def loss_fn(self, batch, model_outputs, **kwargs):
        return jnp.mean(jnp.abs(model_outputs) ** self.power)

    def on_epoch_end(self, trainer, epoch, logs):
        self.weight *= 0.5
        self.epochs += 1


class OtherForward(Busy):
    def __call__(self, x):
        self.calls[...] += 1
        return self.outer(self.dropout(jax.nn.gelu(self.norm(self.inner(x)))))[:, 0]


@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    resume: bool = False


def scaled_by(settings):
    def loss_fn(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return settings.scale * loss, metrics

    return loss_fn


class Configured(Busy):
    def __init__(self, scale):
        super().__init__()
        self.config = Settings(scale)

    def __call__(self, x):
        return self.config.scale * super().__call__(x)


def other_dropout():
    model = Busy()
    model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    return model


@pytest.mark.parametrize(
    ("first", "second", "call", "said"),
    [
        (
            {},
            {"settings": config(optimizer={"learning_rate": 1e-4})},
            {},
            "optimizer.learning_rate` was 0.01 and is 0.0001",
        ),
        (
            {"settings": config(gradient_clip_norm=2.0)},
            {"settings": config(gradient_clip_norm=1.0)},
            {},
            "gradient_clip_norm` was 2.0 and is 1.0",
        ),
        ({"optimizer": optax.adam(1e-2)}, {"optimizer": optax.adam(1e-3)}, {}, "`optimizer` differs"),
        ({}, {"loss_fn": absolute_error}, {}, "`loss_fn` differs"),
        ({"loss_fn": Scaled(1.0)}, {"loss_fn": Scaled(2.0)}, {}, "`loss_fn` differs"),
        ({}, {"model": other_dropout()}, {}, "`model` differs"),
        ({}, {"model": OtherForward()}, {}, "`model` differs"),
        ({"model": Configured(1.0)}, {"model": Configured(2.0)}, {}, "`model` differs"),
        ({"loss_fn": scaled_by(Settings(1.0))}, {"loss_fn": scaled_by(Settings(2.0))}, {}, "`loss_fn` differs"),
        (
            {"extensions": {"size": Penalty(1.0)}},
            {"extensions": {"size": Penalty(0.25)}},
            {},
            "`extensions.size.weight` was 1.0 and is 0.25",
        ),
        (
            {"extensions": {"size": Penalty(power=2.0)}},
            {"extensions": {"size": Penalty(power=3.0)}},
            {},
            "`extensions.size` differs",
        ),
        ({}, {}, {"val_interval": 3}, "`val_interval` was 2 and is 3"),
        ({}, {}, {"held_out": regression(8, seed=2)}, "`val_data` differs"),
    ],
    ids=[
        *("rate", "clip", "optax", "objective", "scale", "dropout", "forward", "config", "settings", "weight", "power"),
        *("interval", "val_data"),
    ],
)
@pytest.mark.few(2)
def test_what_differs_is_said(first, second, call, said, tmp_path):
    train(build(tmp_path, **first))
    with pytest.warns(UserWarning, match=said) as warned:
        train(build(tmp_path, **second), **call, resume=True)
    (text,) = [str(one.message) for one in warned if "arguments that differ from" in str(one.message)]
    assert text.count(" was ") + text.count("` differs") == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"optimizer": optax.sgd(0.1)}, {"optimizer": optax.sgd(0.0)}),
        ({"optimizer": optax.sgd(0.1), "loss_fn": Scaled(1.0)}, {"optimizer": optax.sgd(0.1), "loss_fn": Scaled(0.0)}),
        (
            {"settings": config(optimizer={"optimizer_type": "sgd", "learning_rate": 0.1})},
            {"settings": config(optimizer={"optimizer_type": "sgd", "learning_rate": 1e-30})},
        ),
    ],
    ids=["optimizer", "objective", "rate"],
)
def test_the_new_optimizer_objective_or_rate_is_the_one_that_trains(first, second, tmp_path):
    """Of a kind that changes no param any more."""
    whole = build(tmp_path, **first)
    train(whole)
    resumed = build(tmp_path, **second)
    with pytest.warns(UserWarning, match="arguments that differ from"):
        train(resumed, epochs=2, resume=True)
    assert resumed.step == 2 * whole.step
    assert_same_bits(resumed.state.params, whole.state.params)
    again = build(tmp_path / "other", **first)
    train(again, epochs=2)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (again.state.params, whole.state.params)), strict=True)
    )


def test_the_new_validation_data_and_interval_are_the_ones_that_count(tmp_path):
    train(build(tmp_path))
    resumed, other = build(tmp_path), regression(8, seed=2)
    with pytest.warns(UserWarning, match="arguments that differ from"):
        train(resumed, epochs=2, held_out=other, val_interval=3, resume=True)
    assert list(resumed.history.series("val_loss")[0]) == [
        2,
        4,
        6,
        8,
    ]  # every second step, then every third and the end
    assert resumed.history.series("val_loss")[1][-1] == pytest.approx(resumed.evaluate(other, 4)["loss"])
    assert resumed.evaluate(HELD_OUT, 4)["loss"] != resumed.evaluate(other, 4)["loss"]


def test_other_data_of_the_same_shape_are_refused_and_nothing_has_happened(tmp_path):
    train(build(tmp_path))
    trainer = build(tmp_path)
    before = trainer.run
    with pytest.raises(ArgumentError, match="with other data: `train_data` has the same number of examples, and other"):
        train(trainer, regression(16, seed=5), 2, resume=True)
    assert trainer.run is before


def test_the_same_call_says_nothing(tmp_path):
    options = {"optimizer": optax.chain(optax.clip(1.0), optax.adamw(1e-2)), "extensions": {"size": Counting()}}
    train(build(tmp_path, loss_fn=functools.partial(squared_error), **options))
    options["optimizer"] = optax.chain(optax.clip(1.0), optax.adamw(1e-2))
    renamed = config(name="b", log_frequency=3, max_checkpoints=9)
    longer = build(tmp_path, renamed, loss_fn=functools.partial(squared_error), **options)
    train(longer, epochs=2, resume=True)
    assert longer.epoch == 2


@pytest.mark.parametrize("reuse", [False, True], ids=["another process", "the same objects"])
def test_the_same_program_run_twice_says_nothing(reuse, tmp_path):
    weights, seen = jnp.array([0.3, 0.7]), []

    def program(resume, penalty):
        args = argparse.Namespace(scale=2.0, resume=resume, epochs=3 if resume else 1)

        def loss_fn(model, batch, rng, step):
            seen.append(step)
            loss, metrics = squared_error(model, batch, rng, step)
            return args.scale * weights[1] * loss, metrics

        trainer = build(tmp_path, model=Configured(1.0), loss_fn=loss_fn, extensions={"size": penalty})
        train(trainer, epochs=args.epochs, resume=args.resume)
        return trainer

    penalty = Penalty()
    program(False, penalty)
    assert penalty.weight == 0.5
    assert program(True, penalty if reuse else Penalty()).epoch == 3


def test_hashes_of_other_versions_say_nothing(tmp_path, monkeypatch):
    train(build(tmp_path))
    monkeypatch.setattr(jax, "__version__", "9.9")
    train(build(tmp_path, loss_fn=absolute_error), epochs=2, resume=True)


class Batches:
    def __init__(self, batches):
        self._batches = batches

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        return iter(self._batches)


@pytest.mark.parametrize("kind", [list, Batches])
def test_of_a_loader_the_length_and_the_first_batch_count(kind, tmp_path):
    batches = [regression(4, seed=seed) for seed in range(4)]
    train(build(tmp_path), kind(batches))
    train(build(tmp_path), kind(batches), epochs=2, resume=True)
    with pytest.warns(UserWarning, match="differ from .*: `train_data.batches` was 4 and is 3"):
        train(build(tmp_path), kind(batches[:3]), epochs=3, resume=True)
    if kind is list:
        with pytest.warns(UserWarning, match=r"differ from .*: `train_data.first_batch` was .* with hash .* and is "):
            train(build(tmp_path), batches[1:], epochs=4, resume=True)


def test_train_epoch_compares_its_loaders(tmp_path):
    first = build(tmp_path, train_data_loader=[DATA] * 3, val_data_loader=[HELD_OUT])
    first.train_epoch()
    build(tmp_path, train_data_loader=[DATA] * 3, val_data_loader=[HELD_OUT]).train_epoch(resume=True)
    with pytest.warns(
        UserWarning, match="`train_data_loader.batches` was 3 and is 2; `val_data_loader.first_batch` was"
    ):
        build(tmp_path, train_data_loader=[DATA] * 2, val_data_loader=[DATA]).train_epoch(resume=True)


class Failing(Callback):
    def on_batch_end(self, trainer, step, logs):
        if step == 3:
            raise RuntimeError("on purpose")


def test_another_order_by_another_numpy_is_refused_within_an_epoch(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="on purpose"):
        train(build(tmp_path, callbacks=[Failing()], save_interval=2))

    def other(seed):
        return np.random.Generator(np.random.MT19937(seed))

    with monkeypatch.context() as patched:
        patched.setattr(np.random, "default_rng", other)
        trainer = build(tmp_path)
        before = trainer.run
        with pytest.raises(
            ArgumentError, match=r"NumPy .* shuffles `train_data` into another order than the NumPy of the"
        ):
            train(trainer, resume=True)
        assert trainer.run is before
    train(build(tmp_path), resume=True)
    monkeypatch.setattr(np.random, "default_rng", other)
    with pytest.warns(UserWarning, match="NumPy shuffles `train_data` into another order"):
        train(build(tmp_path), epochs=2, resume=True)


def test_a_call_is_compared_with_the_one_that_saved_last(tmp_path):
    train(build(tmp_path))
    with pytest.warns(UserWarning, match="`val_interval` was 2 and is 3"):
        train(build(tmp_path), epochs=2, val_interval=3, resume=True)
    train(build(tmp_path), epochs=3, val_interval=3, resume=True)


def test_train_epoch_says_it_too(tmp_path):
    first = build(tmp_path, train_data_loader=[DATA] * 3)
    first.train_epoch()
    changed = config(optimizer={"learning_rate": 1e-3})
    with pytest.warns(UserWarning, match="learning_rate` was 0.01 and is 0.001"):
        build(tmp_path, changed, train_data_loader=[DATA] * 3).train_epoch(resume=True)


def test_data_are_compared_by_rows_spread_over_all():
    rows = np.arange(6400, dtype=np.float32).reshape(6400, 1)
    known = InMemoryData(rows, 32).fingerprint()
    assert InMemoryData(rows.copy(), 32).fingerprint() == known
    assert InMemoryData(rows[:-1], 32).fingerprint() != known
    noticed = 0
    for start in range(0, 6400, 100):  # of each hundred rows one is looked at
        other = rows.copy()
        other[start : start + 100] += 1
        noticed += InMemoryData(other, 32).fingerprint() != known
    assert noticed >= 63


class TestFingerprints:
    def make(self, scale):
        return lambda x: x * scale

    def test_functions_of_the_same_code_and_values_are_equal(self):
        assert fingerprint(self.make(1.0)) == fingerprint(self.make(1.0)) != fingerprint(self.make(2.0))
        assert fingerprint(functools.partial(max, 1)) != fingerprint(functools.partial(max, 2))
        assert fingerprint(tuple(optax.sgd(0.1))) == fingerprint(tuple(optax.sgd(0.1)))
        assert fingerprint(tuple(optax.sgd(0.1))) != fingerprint(tuple(optax.sgd(0.2)))

    def test_a_cycle_ends(self):
        values = [1]
        values.append(values)
        assert fingerprint(values) == fingerprint(values)
