"""Data of libraries that nothing else needs: Hugging Face, torch and TensorFlow.

`make third-party` installs Hugging Face's datasets; `make heavy` torch, on the CPU (880 MB); nothing TensorFlow.
"""

import warnings

import chex
import pytest

from tests.problems import Linear, config, regression, squared_error
from tests.test_docs import run
from trainer import ArgumentTypeError, BatchError, Trainer

DATA = regression(24)


def trained(loader, *, loss_fn=squared_error, epochs=2, **arguments):
    trainer = Trainer(Linear(4), config(), loss_fn=loss_fn, **arguments)
    trainer.train(loader, num_epochs=epochs, batch_size=8)
    return trainer


def batches():
    return [{name: column[start : start + 8] for name, column in DATA.items()} for start in range(0, 24, 8)]


def assert_trained_alike(trainer):
    chex.assert_trees_all_equal(trainer.state.params, trained(batches()).state.params)
    assert trainer.step == 6


class Examples:
    """Examples by their index, at the top of a module, from which worker processes import it."""

    def __len__(self):
        return len(DATA["target"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in DATA.items()}


class Broken(Examples):
    def __getitem__(self, index):
        if index == 9:
            raise ZeroDivisionError
        return super().__getitem__(index)


@pytest.mark.third_party
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestHuggingFace:
    @pytest.fixture
    def dataset(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        datasets.disable_progress_bars()
        return datasets.Dataset.from_dict({name: column.astype("float32") for name, column in DATA.items()})

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_batches_train(self, dataset, prefetch):
        arrays = dataset.with_format("numpy")
        assert_trained_alike(trained(lambda batch_size: arrays.iter(batch_size), prefetch=prefetch))
        assert_trained_alike(trained(arrays.batch(8), prefetch=prefetch))
        assert_trained_alike(trained(arrays.to_iterable_dataset().batch(8), prefetch=prefetch))

    def test_all_rows_are_data_in_memory(self, dataset):
        chex.assert_trees_all_equal(trained(dataset.with_format("numpy")[:]).state.params, trained(DATA).state.params)

    def test_rows_are_refused_and_it_is_said_what_to_pass(self, dataset):
        for rows in (dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset()):
            with pytest.raises(ArgumentTypeError, match=r"gives rows, not batches.*with_format\('numpy'\)\.iter"):
                trained(rows)
        with pytest.raises(BatchError, match=r"Hugging Face gives arrays after \.with_format\('numpy'\)"):
            trained(lambda batch_size: dataset.iter(batch_size))
        with pytest.raises(BatchError, match=r"Hugging Face gives arrays after \.with_format\('numpy'\)"):
            trained(dataset[:])


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # the packages' own
class TestTorch:
    @pytest.fixture
    def torch(self):
        import torch

        return torch

    @pytest.fixture
    def dataset(self, torch):
        class Examples(torch.utils.data.Dataset):
            def __len__(self):
                return len(DATA["target"])

            def __getitem__(self, index):
                return {name: column[index] for name, column in DATA.items()}

        return Examples()

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_loaders_train(self, torch, dataset, prefetch):
        assert_trained_alike(trained(torch.utils.data.DataLoader(dataset, 8), prefetch=prefetch))

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_tuples_of_tensors_train(self, torch, prefetch):
        def loss_fn(model, batch, rng, step):
            return squared_error(model, {"input": batch[0], "target": batch[1]}, rng, step)

        pairs = torch.utils.data.TensorDataset(*(torch.from_numpy(DATA[name]) for name in ("input", "target")))
        loader = torch.utils.data.DataLoader(pairs, 8)
        assert_trained_alike(trained(loader, loss_fn=loss_fn, prefetch=prefetch))

    @pytest.mark.parametrize("prefetch", [0, 2])
    @pytest.mark.parametrize("context", ["spawn", "forkserver"])
    def test_workers_that_are_started_anew_train(self, torch, context, prefetch):
        loader = torch.utils.data.DataLoader(
            Examples(), 8, num_workers=2, multiprocessing_context=context, persistent_workers=True, timeout=60
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert_trained_alike(trained(loader, prefetch=prefetch))

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_of_forked_workers_jax_warns_and_they_train(self, torch, prefetch):
        """They touch no JAX: what is copied into them is not used."""
        loader = torch.utils.data.DataLoader(
            Examples(), 8, num_workers=2, multiprocessing_context="fork", persistent_workers=True, timeout=60
        )
        with pytest.warns(RuntimeWarning, match=r"os\.fork\(\) is incompatible with multithreaded code"):
            assert_trained_alike(trained(loader, prefetch=prefetch))

    def test_what_a_worker_raises_is_raised_at_its_batch(self, torch):
        loader = torch.utils.data.DataLoader(
            Broken(), 8, num_workers=2, multiprocessing_context="spawn", persistent_workers=True, timeout=60
        )
        with pytest.raises(ZeroDivisionError) as caught:
            trained(loader)
        assert caught.value.__notes__ == [
            "raised by `train_data` in place of batch 1 of its pass (the first is batch 0)"
        ]

    def test_a_data_set_without_a_loader_is_refused(self, dataset):
        with pytest.raises(BatchError, match="gives examples by their index; pass a loader of batches"):
            trained(dataset)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")
class TestTensorFlow:
    """No target installs it: it is 1.8 GB."""

    @pytest.fixture
    def dataset(self):
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(DATA).batch(8)

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_data_sets_train(self, dataset, prefetch):
        assert_trained_alike(trained(dataset, prefetch=prefetch))
        assert_trained_alike(trained(dataset.as_numpy_iterator, prefetch=prefetch))


@pytest.mark.third_party
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_of_data_runs(tmp_path, monkeypatch):
    """Every block that needs no torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    run("data.md", r"(?s)```python(?: third_party)?\n(.*?)```")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_the_page_of_data_runs_with_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "loader" in run("data.md", r"(?s)```python(?: heavy)?\n(.*?)```")
