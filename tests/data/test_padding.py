"""Short batches that are padded: one shape, so one compilation, and the averages of the examples alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    BatchError,
    Callback,
    InMemoryData,
    ObjectiveError,
    Trainer,
    TrainState,
    evaluate,
    make_eval_step,
    make_mesh,
    make_train_step,
    pad_batch,
    predict,
)
from trainer.data.padding import PaddedBatches

EXAMPLES, BATCH = 58, 16  # three full batches and one of ten, which eight devices cannot share


def masked_error(model, batch, rng, step):
    """Counts what the mask says, or everything where there is no mask."""
    del rng, step
    losses = (model(batch["input"]) - batch["target"]) ** 2
    mask = batch["mask"] if "mask" in batch else jnp.ones_like(losses)
    weight = mask.sum()
    return (losses * mask).sum() / weight, {"batch_weight": weight, "largest": (losses * mask).max()}


def build(directory, **options):
    options = {"loss_fn": masked_error, "save_interval": 10**9, "handle_signals": False, **options}
    model, settings = options.pop("model", None) or Linear(4), options.pop("settings", None) or config(log_frequency=1)
    return Trainer(model, settings, workdir=directory, rng=jax.random.key(3), **options)


def loader(examples, size, seed=0):
    data = regression(examples, seed=seed)
    return [{name: leaf[i : i + size] for name, leaf in data.items()} for i in range(0, examples, size)]


class TestPadBatch:
    def test_the_last_row_is_repeated_and_the_mask_tells(self):
        batch = {"x": np.arange(6, dtype=np.int8).reshape(3, 2), "deep": {"y": jnp.arange(3.0)}, "scale": 0.5}
        padded = pad_batch(batch, 5)
        np.testing.assert_array_equal(padded["x"], [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
        np.testing.assert_array_equal(padded["deep"]["y"], [0, 1, 2, 2, 2])
        np.testing.assert_array_equal(padded["mask"], [1, 1, 1, 0, 0])
        assert (padded["x"].dtype, padded["mask"].dtype, padded["scale"]) == (np.int8, np.float32, 0.5)
        assert set(batch) == {"x", "deep", "scale"}

    def test_a_full_batch_has_a_mask_of_ones_and_is_not_copied(self):
        batch = regression(4)
        padded = pad_batch(batch, 4)
        assert padded["input"] is batch["input"]
        np.testing.assert_array_equal(padded["mask"], np.ones(4))

    def test_keys_are_padded_too(self):
        keys = jax.random.split(jax.random.key(0), 2)
        padded = pad_batch({"key": keys}, 3)["key"]
        np.testing.assert_array_equal(jax.random.key_data(padded)[2], jax.random.key_data(keys)[1])

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ((np.ones(2), np.ones(2)), "`batch` is of type tuple, and padding adds an entry 'mask' to it"),
            ({"x": np.ones(2), "mask": np.ones(2)}, "`batch` has an entry 'mask' already"),
            ({"x": np.ones(9)}, r"`batch` has 9 examples \(x: float64\(9,\)\), more than the 4"),
            ({"x": np.ones(2), "y": np.ones(3)}, "`batch` has no common leading dimension"),
            ({"x": 1.0}, "`batch` has no common leading dimension"),
        ],
    )
    def test_what_cannot_be_padded_is_refused(self, batch, message):
        with pytest.raises(BatchError, match=message):
            pad_batch(batch, 4)

    def test_an_objective_learns_from_the_examples_alone(self):
        optimizer = optax.sgd(0.1)
        step = jax.jit(make_train_step(masked_error, optimizer))
        state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
        padded, expected = step(state, pad_batch(regression(5), 8)), step(state, regression(5))
        chex.assert_trees_all_close(padded[0].params, expected[0].params, rtol=1e-6)
        chex.assert_trees_all_close(padded[1], expected[1], rtol=1e-6)


class TestDataInMemory:
    @pytest.mark.parametrize("shuffled", [False, True])
    @pytest.mark.parametrize("device", [False, True])
    def test_every_example_once_and_padding_at_the_end(self, shuffled, device):
        numbers = np.arange(10, dtype=np.int32)
        data = InMemoryData(
            {"x": jax.random.split(jax.random.key(0), 10) if device else numbers, "n": numbers}, 4, pad_to="batch"
        )
        epoch = data.shuffled((0,), 1) if shuffled else data.in_order()
        drawn, batches = [], []
        for batch in epoch:
            batches.append(batch)
            drawn.append(epoch.drawn)
        assert drawn == [4, 4, 2]
        masks = np.concatenate([batch["mask"] for batch in batches])
        np.testing.assert_array_equal(masks, [1] * 10 + [0] * 2)
        found = np.concatenate([batch["n"] for batch in batches])
        assert sorted(found[:10]) == list(range(10))
        assert set(found) == set(range(10))
        plain = InMemoryData({"n": numbers}, 4)
        expected = plain.shuffled((0,), 1) if shuffled else plain.in_order()
        np.testing.assert_array_equal(found[:10], np.concatenate([batch["n"] for batch in expected]))

    def test_stacked_batches_are_those_that_come_one_by_one(self):
        data = InMemoryData(regression(10), 4, pad_to="batch")
        stacked = data.shuffled((0,), 1).stacked(3, 5)
        for index, batch in enumerate(data.shuffled((0,), 1)):
            chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=index: leaf[i], stacked), batch)
        assert data.in_order().full_batches == data.in_order().full_batches_in_epoch == 3

    def test_a_fingerprint_is_that_of_the_data(self):
        assert (
            InMemoryData(regression(10), 4, pad_to="batch").fingerprint()
            == InMemoryData(regression(10), 4).fingerprint()
        )

    def test_loops_of_ones_own(self):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
        step = jax.jit(make_eval_step(masked_error))
        averages = [
            evaluate(step, state, InMemoryData(regression(10), 4, pad_to=pad_to).in_order())
            for pad_to in (None, "batch")
        ]
        for average in averages:
            del average["largest"]  # of a batch
        assert averages[1] == pytest.approx(averages[0], rel=1e-6)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.ones((10, 2)), "`data` is of type ndarray"),
            ({"mask": np.ones(10)}, "`data` has an entry 'mask' already"),
        ],
    )
    def test_data_that_take_no_mask_are_refused(self, data, message):
        with pytest.raises(BatchError, match=message):
            InMemoryData(data, 4, pad_to="batch")

    def test_another_word_is_refused(self):
        with pytest.raises(ArgumentError, match="`pad_to` is 'bucket'; it must be 'batch' or None"):
            InMemoryData(regression(10), 4, pad_to="bucket")


class TestTrainer:
    @pytest.mark.parametrize("steps_per_call", [1, "auto"])
    @pytest.mark.parametrize("axes", [None, {"data": 8}])
    @pytest.mark.few(3)
    def test_short_batches_compile_nothing_and_averages_stay(self, steps_per_call, axes, tmp_path, compilations):
        options = {"steps_per_call": steps_per_call, "mesh": None if axes is None else make_mesh(axes)}
        plain, padded = (build(tmp_path / str(pad_to), pad_to=pad_to, **options) for pad_to in (None, "batch"))
        expected = (
            plain.train(regression(EXAMPLES), 2, BATCH, regression(10, seed=1)),
            plain.evaluate(regression(21), BATCH),
        )
        compilations.clear()
        found = (
            padded.train(regression(EXAMPLES), 2, BATCH, regression(10, seed=1)),
            padded.evaluate(regression(21), BATCH),
        )
        assert {name: n for name, n in compilations.items() if "step" in name} == {
            f"jit(train_step{'s' * (steps_per_call == 'auto')})": 1,
            "jit(eval_step)": 1,
        }
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["batch_weight"] == theirs["batch_weight"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        chex.assert_trees_all_close(
            jax.tree.map(np.asarray, padded.state.params),
            jax.tree.map(np.asarray, plain.state.params),
            rtol=1e-4,
            atol=1e-6,
        )
        ours, theirs = padded.history.to_dict(), plain.history.to_dict()
        assert ours["step"] == theirs["step"]
        for name in ("loss", "batch_weight", "val_loss"):
            np.testing.assert_allclose(
                np.array(ours[name], float), np.array(theirs[name], float), rtol=1e-4, err_msg=name
            )

    def test_the_batches_of_loaders_are_padded_too(self, tmp_path, compilations):
        train, held_out = loader(EXAMPLES, BATCH), loader(10, 8, seed=1)
        plain, padded = (build(tmp_path / str(pad_to), pad_to=pad_to) for pad_to in (None, "batch"))
        expected = plain.train(train, 2, BATCH, held_out)
        compilations.clear()
        assert padded.train(train, 2, BATCH, held_out)["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert {name: n for name, n in compilations.items() if "step" in name} == {
            "jit(train_step)": 1,
            "jit(eval_step)": 1,
        }
        assert padded.run.average.compute()["batch_weight"] == EXAMPLES

    @pytest.mark.parametrize("axes", [None, {"data": 8}])
    @pytest.mark.parametrize("as_loader", [False, True])
    def test_predictions_are_those_of_the_examples(self, axes, as_loader, tmp_path, compilations):
        trainer = build(tmp_path, pad_to="batch", mesh=None if axes is None else make_mesh(axes))
        data = [batch["input"] for batch in loader(21, 8)] if as_loader else regression(21)["input"]
        found = trainer.predict(data, 8)
        assert compilations["jit(predict_step)"] == 1
        assert found.shape == (21,)
        np.testing.assert_allclose(found, trainer.model(regression(21)["input"]), rtol=1e-5, atol=1e-6)

    def test_data_of_less_than_a_batch_are_padded(self, tmp_path):
        trainer = build(tmp_path, pad_to="batch", mesh=make_mesh({"data": 8}))
        with pytest.warns(UserWarning, match="every epoch is one batch of 5"):
            trainer.train(regression(5), 1, 16)
        assert trainer.run.average.compute()["batch_weight"] == 5

    def test_with_accumulation_a_micro_batch_may_be_padding_alone(self, tmp_path):
        plain, padded = (
            build(tmp_path / str(pad_to), pad_to=pad_to, accumulate_steps=steps)
            for pad_to, steps in ((None, 1), ("batch", 8))
        )
        for trainer in (plain, padded):
            trainer.train(regression(51), 2, 16)  # the last batch has three examples
        chex.assert_trees_all_close(padded.state.params, plain.state.params, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(padded.history.to_dict()["loss"], plain.history.to_dict()["loss"], rtol=1e-4)

    @pytest.mark.parametrize("as_loader", [False, True])
    @pytest.mark.slow
    def test_an_interrupted_run_resumes_to_the_same_bits(self, as_loader, tmp_path):
        class Stopping(Callback):
            def on_batch_begin(self, trainer, step):
                if step == 7:  # before the short batch
                    raise InterruptedError

        data = loader(EXAMPLES, BATCH) if as_loader else regression(EXAMPLES)
        options = {"model": Busy(), "pad_to": "batch", "save_interval": 1}
        never = build(tmp_path / "never", callbacks=[Callback()], **options)
        never.train(data, 2, BATCH)
        broken = build(tmp_path / "broken", callbacks=[Stopping()], **options)
        with pytest.raises(InterruptedError):
            broken.train(data, 2, BATCH)
        broken.close()
        again = build(tmp_path / "broken", callbacks=[Callback()], **options)
        if as_loader:
            with pytest.warns(UserWarning, match="are drawn again and dropped"):
                again.train(data, 2, BATCH, resume=True)
        else:
            again.train(data, 2, BATCH, resume=True)
        assert_same_bits(again.state, never.state)
        assert again.history.to_dict() == never.history.to_dict()

    def test_single_batches_get_a_mask_of_ones_or_keep_theirs(self, tmp_path):
        trainer = build(tmp_path, pad_to="batch")
        assert float(trainer.train_step(regression(5))["batch_weight"]) == 5
        assert float(trainer.train_step(pad_batch(regression(3), 5))["batch_weight"]) == 3
        assert float(trainer.validate_step(regression(5))["batch_weight"]) == 5
        assert trainer.compile(regression(5)).state > 0
        with pytest.raises(BatchError, match="`batch` is of type tuple"):
            trainer.train_step(tuple(regression(5).values()))

    def test_an_objective_without_a_weight_is_told_how(self, tmp_path):
        trainer = build(tmp_path, loss_fn=squared_error, pad_to="batch")
        for call in (
            lambda: trainer.train(regression(EXAMPLES), 1, BATCH),
            lambda: trainer.evaluate(regression(5), BATCH),
        ):
            with pytest.raises(ObjectiveError, match="`loss_fn` reports no `batch_weight`") as refused:
                call()
            assert "loss = (losses * batch['mask']).sum() / weight" in str(refused.value)

    def test_data_and_words_that_cannot_be_used_are_refused(self, tmp_path):
        with pytest.raises(ArgumentError, match="`pad_to` is True; it must be 'batch' or None"):
            build(tmp_path, pad_to=True)
        trainer = build(tmp_path, pad_to="batch")
        with pytest.raises(BatchError, match="`train_data` has an entry 'mask' already"):
            trainer.train({**regression(20), "mask": np.ones(20)}, 1, BATCH)
        with pytest.raises(BatchError, match="`data` is of type tuple"):
            trainer.evaluate(tuple(regression(20).values()), BATCH)
        with pytest.raises(BatchError, match=r"`batch` has 16 examples .*, more than the 8 to which it is padded"):
            trainer.train(loader(EXAMPLES, BATCH), 1, 8)
        assert trainer.step == 0

    def test_a_batch_size_that_is_not_the_loaders_is_said(self, tmp_path):
        trainer = build(tmp_path, pad_to="batch")
        with pytest.warns(UserWarning, match="first batch has 16 examples and is padded to 32, which is `batch_size`"):
            trainer.train(loader(32, 16), 1, 32)


def test_batches_of_ones_own_loader_are_padded_to_the_first():
    optimizer = optax.sgd(0.1)
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    batches = PaddedBatches((batch["input"] for batch in loader(21, 8)), mask=False)
    outputs = predict(jax.jit(lambda state, batch: state.model()(batch)), state, batches)
    np.testing.assert_allclose(outputs, state.model()(regression(21)["input"]), rtol=1e-5, atol=1e-6)


class TestLoadersOfEvaluations:
    SIZES = (5, 16, 16, 7)

    def batches(self, *sizes):
        data, ends = regression(sum(sizes)), np.cumsum(sizes)
        pairs = zip(ends - sizes, ends, strict=True)
        return [{name: leaf[start:end] for name, leaf in data.items()} for start, end in pairs]

    def test_a_short_first_batch_is_padded_to_the_batch_size(self):
        trainer, seen = build(None, pad_to="batch"), []

        def given(batch_size):
            assert batch_size == BATCH
            return self.batches(*self.SIZES)

        def outputs(model, batch):
            seen.append(len(batch["input"]))
            return model(batch["input"])

        data = regression(sum(self.SIZES))
        assert trainer.evaluate(given, BATCH)["loss"] == pytest.approx(trainer.evaluate(data, BATCH)["loss"])
        found = trainer.predict(given, BATCH, outputs)
        np.testing.assert_allclose(found, trainer.predict(data, BATCH, outputs), rtol=1e-6)
        assert set(seen) == {BATCH}
        assert trainer.train(data, 1, BATCH, val_data=given)["batch_weight"] == sum(self.SIZES)

    @pytest.mark.parametrize(
        "wrap", [lambda batches: batches, lambda batches: lambda: batches], ids=["list", "callable"]
    )
    def test_a_loader_that_is_not_given_the_batch_size_keeps_its_own(self, wrap):
        sizes, seen = (4, 4, 3), []

        def seeing(model, batch, rng, step):
            seen.append(len(batch["input"]))
            return masked_error(model, batch, rng, step)

        trainer, given, data = build(None, loss_fn=seeing, pad_to="batch"), wrap(self.batches(*sizes)), regression(11)
        seen.clear()
        found = trainer.evaluate(given, 1000)
        assert set(seen) == {4}
        assert found["loss"] == pytest.approx(trainer.evaluate(data, 11)["loss"])
        seen.clear()
        assert trainer.train(regression(BATCH), 1, BATCH, val_data=given)["batch_weight"] == sum(sizes)
        assert set(seen) <= {4, BATCH}
        seen.clear()

        def outputs(model, batch):
            seen.append(len(batch["input"]))
            return model(batch["input"])

        np.testing.assert_allclose(trainer.predict(given, 1000, outputs), trainer.predict(data, 11, outputs), rtol=1e-6)
        assert set(seen) == {4, 11}

    def test_longer_batches_are_taken_as_they_are(self):
        trainer = build(None, pad_to="batch")
        expected = trainer.evaluate(regression(60), BATCH)["loss"]
        assert trainer.evaluate(self.batches(16, 20, 20, 4), BATCH)["loss"] == pytest.approx(expected)

    def test_a_mask_of_the_loader_is_kept(self):
        trainer, given = build(None, pad_to="batch"), self.batches(16, 16, 5)
        own = [{**batch, "mask": np.arange(len(batch["input"])) % 2 == 0} for batch in given]
        assert trainer.evaluate(own, BATCH)["batch_weight"] == 8 + 8 + 3
        assert trainer.train(own, 1, BATCH)["batch_weight"] == 8 + 8 + 3
        assert trainer.train(regression(16), 1, BATCH, val_data=own)["batch_weight"] == 8 + 8 + 3
        wide = [{**batch, "mask": np.ones((len(batch["input"]), 3))} for batch in given]
        with pytest.raises(BatchError, match="`batch` has an entry 'mask' already"):
            trainer.evaluate(wide, BATCH)
