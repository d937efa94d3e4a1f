"""`predict`: what a model says for every example, in order, on one device and over a mesh; `evaluate` of loaders."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits, build, on_host
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    BatchError,
    InMemoryData,
    StateError,
    Trainer,
    TrainState,
    make_mesh,
    make_predict_step,
    make_train_step,
    predict,
)

SGD = optax.sgd(0.1)
DATA = regression(50)
Pair = collections.namedtuple("Pair", "first second")


def outputs(model, batch):
    """Several outputs in a tree, of several dtypes; the first says which example it is of."""
    said = model(batch["input"])
    return {"id": batch["target"], "pair": Pair(said, (said > 0)), "half": [said[:, None].astype(jnp.bfloat16)]}


@pytest.fixture(scope="module")
def trained():
    trainer = build(model=Busy())
    trainer.train(DATA, 1, 16)
    return trainer


def whole(trainer, batch=DATA):
    """What the model of the trainer says for all examples at once."""
    return np.asarray(trainer.model(batch["input"]))


class TestData:
    @pytest.mark.parametrize("batch_size", [16, 50, 64, 1])
    def test_in_memory_it_equals_one_call_whatever_the_batches(self, trained, batch_size):
        said = trained.predict(DATA, batch_size)
        assert type(said) is np.ndarray
        np.testing.assert_allclose(said, whole(trained), rtol=1e-5, atol=1e-6)

    def test_outputs_are_a_tree_of_rows_in_the_order_of_the_examples(self, trained):
        said = trained.predict(DATA, 16, outputs)
        np.testing.assert_array_equal(said["id"], DATA["target"])
        assert type(said["pair"]) is Pair
        np.testing.assert_array_equal(said["pair"].second, said["pair"].first > 0)
        assert (said["half"][0].shape, said["half"][0].dtype) == ((50, 1), jnp.bfloat16)

    @pytest.mark.parametrize("as_loader", [list, iter, lambda b: lambda: iter(b), lambda b: lambda batch_size: b])
    def test_a_loader_gives_the_same(self, trained, as_loader):
        batches = [{name: column[i : i + 16] for name, column in DATA.items()} for i in range(0, 50, 16)]
        np.testing.assert_array_equal(trained.predict(as_loader(batches), 16), trained.predict(DATA, 16))

        evaluated = trained.evaluate(as_loader(batches), 16)
        assert evaluated == trained.evaluate(DATA, 16)

    def test_a_callable_is_asked_for_batches_of_the_size(self, trained):
        sizes = []
        trained.predict(lambda batch_size: sizes.append(batch_size) or [DATA], 7)
        trained.evaluate(lambda batch_size: sizes.append(batch_size) or [DATA], 8)
        assert sizes == [7, 8]

    def test_a_loader_may_fill_the_same_buffer_again(self, trained):
        def refilling():
            buffer = np.empty_like(DATA["input"][:16])
            for i in range(0, 48, 16):
                buffer[...] = DATA["input"][i : i + 16]
                yield buffer

        np.testing.assert_array_equal(trained.predict(refilling, 16), trained.predict(DATA["input"][:48], 16))

    def test_batches_without_a_common_length_count_what_comes_out(self, trained):
        ragged = [{"inside": DATA["input"][:8], "edge": np.ones((3, 4), np.float32), "scale": 2.0}] * 2
        said = trained.predict(ragged, 8, lambda model, batch: batch["scale"] * model(batch["edge"]))
        assert said.shape == (6,)

    def test_a_loader_without_batches_is_an_error(self, trained):
        with pytest.raises(ArgumentError, match="`data` yielded no batch"):
            trained.predict([], 4)
        with pytest.raises(ArgumentError, match="`data` yielded no batch"):
            trained.evaluate([], 4)
        with pytest.raises(ArgumentError, match="yielded no batch"):
            predict(make_predict_step(), trained.state, [])

    def test_one_that_does_not_end_is_said(self, trained, monkeypatch):
        from trainer.data import loaders

        monkeypatch.setattr(loaders, "WARN_AFTER", 3)
        long = (DATA for _ in range(5))
        with pytest.warns(UserWarning, match=r"If the loader is endless, pass itertools.islice\(data, num_batches\)"):
            trained.predict(long, 50)
        with pytest.warns(UserWarning, match="has yielded 3 batches in this pass and has no length"):
            trained.evaluate((DATA for _ in range(5)), 50)

    def test_what_is_no_data_is_refused(self, trained):
        with pytest.raises(BatchError, match="`data/target` has dtype"):
            trained.predict({**DATA, "target": np.array(["a"] * 50)}, 4)
        with pytest.raises(BatchError, match="`data/target` has dtype"):
            trained.evaluate({**DATA, "target": np.array(["a"] * 50)}, 4)
        for call in (trained.predict, trained.evaluate):
            with pytest.raises(ArgumentError, match="`batch_size` is 0"):
                call(DATA, 0)


class TestInput:
    @pytest.mark.parametrize(
        "data",
        [
            DATA["input"],
            {"image": DATA["input"]},
            (DATA["input"],),
            {"input": DATA["input"], "label": DATA["target"]},
            {"x": DATA["input"], "y": DATA["target"]},
            {"x": DATA["input"], "y": DATA["target"], "targets": DATA["target"]},
        ],
    )
    def test_it_is_found_where_there_is_no_doubt(self, trained, data):
        np.testing.assert_array_equal(trained.predict(data, 16), trained.predict(DATA, 16))

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ({"image": DATA["input"], "label": DATA["target"]}, "image: float32(16, 4), label: float32(16,)"),
            ((DATA["input"], DATA["target"]), "0: float32(16, 4), 1: float32(16,)"),
            ({"input": DATA["input"], "mask": DATA["target"]}, "input: float32(16, 4), mask: float32(16,)"),
            ({"input": DATA["input"], "x": DATA["input"]}, "input: float32(16, 4), x: float32(16, 4)"),
        ],
    )
    def test_else_it_is_an_error_that_asks_for_fn(self, trained, data, said):
        message = (
            f"`fn` was left out, and a batch of {said} does not tell what `model` is called on: .* pass fn, such as"
        )
        with pytest.raises(ArgumentError, match=message.replace("(", r"\(").replace(")", r"\)")) as raised:
            trained.predict(data, 16)
        assert len(str(raised.value)) < 500

    def test_a_model_that_cannot_be_called_needs_fn_too(self):
        class Silent(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(jnp.ones(4))

        trainer = build(model=Silent(), loss_fn=lambda model, *_: (jnp.sum(model.w[...]), {}))
        with pytest.raises(ArgumentError, match="`model` is of type Silent and has no __call__; pass fn"):
            trainer.predict(DATA, 16)
        np.testing.assert_allclose(
            trainer.predict(DATA, 16, lambda model, batch: batch["input"] @ model.w[...]),
            DATA["input"].sum(1),
            rtol=1e-5,
        )


class TestOutputs:
    @pytest.mark.parametrize(
        ("fn", "said"),
        [
            (
                lambda m, b: m(b["input"]).mean(),
                r"`fn` returned `outputs` of shape \(\) for a batch of input: .* 16 exam",
            ),
            (lambda m, b: {"a": b["target"], "b": b["input"].T}, r"returned `b` of shape \(4, 16\) for a batch"),
            (lambda m, b: {"loss": 1.0, "a": b["target"]}, r"returned `loss` of shape \(\) for a batch"),
            (lambda m, b: None, "returned no array for a batch"),
        ],
    )
    def test_each_needs_a_row_for_every_example(self, trained, fn, said):
        with pytest.raises(ArgumentError, match=said):
            trained.predict(DATA, 16, fn)

    def test_without_a_common_length_of_the_batch_they_need_one_of_their_own(self, trained):
        ragged = [(np.ones((3, 4), np.float32), np.ones((2, 4), np.float32))]
        with pytest.raises(
            ArgumentError, match=r"returned `1` of shape \(2, 4\) .* one and the same number of examples"
        ):
            trained.predict(ragged, 3, lambda model, batch: batch)

    def test_widths_that_differ_between_batches_cannot_be_put_together(self, trained):
        batches = [np.ones((2, 3), np.float32), np.ones((2, 5), np.float32)]
        with pytest.raises(ArgumentError, match=r"of shapes \(2, 3\) and \(2, 5\) for two batches, .* pad them"):
            trained.predict(batches, 2, lambda model, batch: batch)

    def test_fn_must_be_callable(self, trained):
        with pytest.raises(ArgumentTypeError, match="`fn` is of type int; it must be a callable"):
            trained.predict(DATA, 16, 3)


class TestPurity:
    def test_nothing_changes_and_training_goes_on_as_without(self):
        one, other = build(), build()
        for trainer in (one, other):
            trainer.train_step(regression())
        before = on_host(one.state)
        one.predict(DATA, 16, lambda model, batch: model(batch["input"]))
        assert_same_bits(one.state, before)
        for trainer in (one, other):
            trainer.train_step(regression())
        assert_same_bits(one.state, other.state)

    def test_it_equals_the_functional_code(self, trained):
        data = InMemoryData(DATA, 16)
        step = jax.jit(make_predict_step(outputs))
        by_hand = [step(trained.state, batch) for batch in data.in_order()]
        by_hand = jax.tree.map(lambda *parts: np.concatenate(parts), *by_hand)
        for said in (trained.predict(DATA, 16, outputs), predict(step, trained.state, data.in_order())):
            jax.tree.map(np.testing.assert_array_equal, said, by_hand)

    def test_it_sees_edits_of_the_state(self):
        trainer = build(model=Linear(features=4))
        trainer.state.params["layer"]["kernel"] = jnp.zeros((4, 1))
        trainer.state.params["layer"]["bias"] = jnp.full(1, 3.0)
        np.testing.assert_array_equal(trainer.predict(DATA, 16), np.full(50, 3.0))

    def test_a_donated_state_is_said(self):
        state = TrainState.create(Linear(features=4), SGD, rng=jax.random.key(0))
        jax.jit(make_train_step(squared_error, SGD), donate_argnums=0)(state, regression())
        with pytest.raises(StateError, match="was donated"):
            predict(jax.jit(make_predict_step()), state, [DATA])

    def test_it_compiles_once_for_each_shape_of_each_function(self, compilations):
        trainer = build()
        for _ in range(2):
            trainer.predict(DATA, 16)
        assert compilations["jit(predict_step)"] == 2
        trainer.train_step(regression())
        trainer.predict(DATA, 16)
        trainer.predict(DATA, 16, outputs)
        trainer.predict(DATA, 16, outputs)
        assert compilations["jit(predict_step)"] == 4

    def test_under_vmap_an_ensemble_predicts(self):
        def make(seed):
            return TrainState.create(Linear(4, rngs=nnx.Rngs(jax.random.key(seed))), SGD, rng=jax.random.key(0))

        states = jax.vmap(make)(jnp.arange(3))
        said = jax.vmap(make_predict_step(), in_axes=(0, None))(states, DATA["input"])
        assert said.shape == (3, 50)
        np.testing.assert_allclose(said[1], make(1).model()(DATA["input"]), rtol=1e-5)


class TestMesh:
    @pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}])
    @pytest.mark.parametrize("num_examples", [50, 24, 3])
    @pytest.mark.few(3)
    def test_it_gives_what_one_device_gives_short_last_batch_included(self, tmp_path, axes, num_examples):
        data = regression(num_examples)
        trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path, mesh=make_mesh(axes))
        alone = build(tmp_path)
        loader = [{name: column[i : i + 16] for name, column in data.items()} for i in range(0, num_examples, 16)]
        for given in (data, loader):
            said = trainer.predict(given, 16, outputs)
            assert type(said["id"]) is np.ndarray
            np.testing.assert_array_equal(said["id"], data["target"])
            np.testing.assert_allclose(said["pair"].first, alone.predict(data, 16), rtol=1e-5, atol=1e-6)

    def test_a_loader_is_evaluated_as_data_in_memory_is(self, tmp_path):
        trainer = build(tmp_path, mesh=make_mesh({"data": 8}))
        batches = [{name: column[i : i + 16] for name, column in DATA.items()} for i in range(0, 50, 16)]
        assert trainer.evaluate(batches, 16) == trainer.evaluate(DATA, 16)

    def test_a_size_that_the_devices_cannot_share_is_said(self, tmp_path):
        trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path, mesh=make_mesh({"data": 8}))
        with pytest.raises(
            ArgumentError, match=re.escape("`batch_size` is 12, which cannot be shared by the 8 devices")
        ):
            trainer.predict(DATA, 12)
