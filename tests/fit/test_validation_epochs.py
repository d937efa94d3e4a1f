"""`epochs_per_validation`: at the end of which epochs a run validates, beside the multiples of `val_interval`."""

import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import Callback, EarlyStopping, Trainer, load_run

STEPS = 4  # of an epoch


def batches():
    data = regression(32)
    return [{name: array[i : i + 8] for name, array in data.items()} for i in range(0, 32, 8)]


def build(every, num_epochs=5, **options):
    settings = config(epochs_per_validation=every, num_epochs=num_epochs)
    return Trainer(Linear(4), settings, loss_fn=squared_error, progress=False, **options)


def validated_epochs(trainer):
    return [step / STEPS for step in trainer.history.series("val_loss")[0]]


class Ends(Callback):
    """The epochs, counted from one, whose logs have the averages of a validation."""

    def __init__(self):
        self.with_validation = []

    def on_epoch_end(self, trainer, epoch, logs):
        if "val_loss" in logs:
            self.with_validation.append(epoch + 1)


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (100, [5]), (None, [5])])
class TestWhichEpochs:
    def test_data_in_memory_and_loaders(self, every, due):
        for data in (regression(32), batches()):
            ends = Ends()
            trainer = build(every, callbacks=[ends])
            averages = trainer.train(data, 5, 8, regression(16))
            assert validated_epochs(trainer) == ends.with_validation == due
            assert averages == trainer.run.validation.averages

    def test_calls_of_train_epoch(self, every, due):
        ends = Ends()
        trainer = build(every, callbacks=[ends], train_data_loader=batches(), val_data_loader=batches()[:2])
        returned = [trainer.train_epoch() for _ in range(5)]
        assert [epoch for epoch, averages in enumerate(returned, 1) if "val_loss" in averages] == due
        assert validated_epochs(trainer) == ends.with_validation == due


def test_multiples_of_val_interval_are_validated_as_well():
    trainer = build(None)
    trainer.train(regression(32), 5, 8, regression(16), 6)
    assert trainer.history.series("val_loss")[0] == [6, 12, 18, 20]


class StopsAfterThree(Callback):
    should_stop = False

    def on_epoch_end(self, trainer, epoch, logs):
        self.should_stop = epoch == 2


def test_where_a_callback_ends_the_run_the_last_state_is_validated():
    trainer = build(2, callbacks=[StopsAfterThree()])
    averages = trainer.train(regression(32), 5, 8, regression(16))
    assert validated_epochs(trainer) == [2, 3]
    assert averages == trainer.run.validation.averages
    trainer = build(2, callbacks=[StopsAfterThree()], train_data_loader=batches(), val_data_loader=batches())
    while not trainer.should_stop:
        averages = trainer.train_epoch()
    assert validated_epochs(trainer) == [2, 3]
    assert averages["val_loss"] == trainer.run.validation.averages["loss"]


def test_patience_counts_validations():
    stopping = EarlyStopping("val_loss", patience=2, min_delta=1e9)
    trainer = build(2, 10, callbacks=[stopping])
    trainer.train(regression(32), 10, 8, regression(16))
    assert validated_epochs(trainer) == [2, 4, 6]


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_an_interrupted_run_validates_where_one_that_was_not_does(stop, tmp_path):
    class Interrupts(Callback):
        def on_call_end(self, trainer, step, logs):
            if step == stop:
                raise KeyboardInterrupt

    whole = build(2)
    whole.train(regression(32), 5, 8, regression(16))
    first = build(2, callbacks=[Interrupts()], steps_per_call=1, workdir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.train(regression(32), 5, 8, regression(16))
    first.save_checkpoint()
    resumed = build(2, workdir=tmp_path)
    resumed.train(regression(32), 5, 8, regression(16), resume=True)
    assert resumed.history.to_dict() == whole.history.to_dict()


def test_a_call_does_not_return_the_validation_of_another():
    trainer = build(1, train_data_loader=batches())
    trainer.train(regression(32), 1, 8, regression(16))
    assert "val_loss" not in trainer.train_epoch()


def test_the_validation_after_a_stop_is_that_of_the_epoch_that_ended(tmp_path):
    ends = Ends()
    trainer = build(100, callbacks=[StopsAfterThree(), ends], workdir=tmp_path)
    trainer.train(regression(32), 5, 8, regression(16))
    assert trainer.run.validation.epoch == 2
    assert load_run(tmp_path / "checkpoint_12.msgpack", trainer.run).validation == trainer.run.validation
    trainer.train(regression(32), 5, 8, regression(16))
    assert ends.with_validation == [8]


def test_with_calls_of_train_epoch_too():
    ends = Ends()
    trainer = build(100, 9, callbacks=[StopsAfterThree(), ends], train_data_loader=batches(), val_data_loader=batches())
    while not trainer.should_stop:
        trainer.train_epoch()
    assert validated_epochs(trainer) == [3]
    trainer.train_epoch()
    assert ends.with_validation == []
