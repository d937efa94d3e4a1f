"""Comparing the batches of several processes: what a single process does not pay, and what an error leaves behind."""

import types

import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import BatchError, Trainer
from trainer.distributed import passes
from trainer.distributed.passes import CommonPass
from trainer.fit.common_batches import compare_single


class Unsized:
    """A loader of two batches whose length cannot be had."""

    def __iter__(self):
        data = regression(16)
        return iter([{name: array[i : i + 8] for name, array in data.items()} for i in (0, 8)])

    def __len__(self):
        raise RuntimeError("reads every file")


CALLS = {
    "evaluate": lambda trainer: trainer.evaluate(Unsized(), 8),
    "predict": lambda trainer: trainer.predict(Unsized(), 8),
    "train": lambda trainer: trainer.train(regression(16), 1, 8, Unsized()),
    "train_epoch": lambda trainer: trainer.train_epoch(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_single_process_does_not_ask_for_the_lengths_that_only_several_compare(call):
    given = {"train_data_loader": list(Unsized.__iter__(None)), "val_data_loader": Unsized()}
    call(Trainer(Linear(4), config(), loss_fn=squared_error, progress=False, **given))


class TestSingleSteps:
    placement = types.SimpleNamespace(num_processes=2, own_examples=lambda examples: examples // 2)

    def test_an_interrupted_comparison_begins_anew(self, monkeypatch):
        def interrupted(*args, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(passes, "exchange", interrupted)
        held = {}
        with pytest.raises(KeyboardInterrupt):
            compare_single(held, self.placement, "train_step", regression(8))
        assert held == {}

    def test_a_batch_that_is_refused_is_not_counted(self, monkeypatch):
        monkeypatch.setattr(CommonPass, "draw", lambda *args: None)
        held = {}
        compare_single(held, self.placement, "train_step", regression(8))
        before = dict(held)
        with pytest.raises(BatchError):
            compare_single(held, self.placement, "train_step", {"input": np.ones((0, 4))})
        assert held == before


def test_a_batch_of_known_shapes_is_not_described_again(monkeypatch):
    described = []
    describe = passes.describe
    monkeypatch.setattr(passes, "describe", lambda batch: described.append(len(batch["input"])) or describe(batch))
    common = CommonPass("training", lambda examples: examples)
    for examples in (8, 4, 8, 4, 8, 4):
        common.draw(regression(examples), examples)
    assert described == [8, 4]
