"""Saves beside the training: what is saved is the state of the call, and no failure goes unheard."""

import copy
import functools
import gc
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import Recorder, assert_same_bits
from trainer import Callback, CheckpointError, Trainer, TrainingConfig, latest_checkpoint
from trainer.checkpoints import background, checkpointer, detach
from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.saving import copied_to_host


def build(directory, callbacks=(), **options):
    options.setdefault("save_interval", 1000)
    options.setdefault("loss_fn", squared_error)
    return Trainer(Busy(), config(), workdir=directory, callbacks=list(callbacks), **options)


def by_epochs(directory, **settings):
    data = [regression(8)] * 5
    return Trainer(Busy(), config(**settings), loss_fn=squared_error, workdir=directory, train_data_loader=data)


@pytest.fixture
def held(monkeypatch):
    """Holds every write back until `held.set()`."""
    gate, write = threading.Event(), checkpointer.write_snapshot

    def wait_and_write(*arguments):
        assert gate.wait(timeout=60)
        write(*arguments)

    monkeypatch.setattr(checkpointer, "write_snapshot", wait_and_write)
    yield gate
    gate.set()


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """The CPU plays a device with memory of its own, from which a save copies the arrays to the host first."""

    def copied(array):
        return np.array(copied_to_host(array))

    for module in (detach, checkpointer):
        monkeypatch.setattr(module, "is_in_host_memory", lambda array: False)
    monkeypatch.setattr(detach, "copied_to_host", copied)


def failing(*_):
    raise CheckpointError("the disk is gone")


class TestSaver:
    def test_one_at_a_time_in_order(self):
        saver, gate, order = BackgroundSaver(), threading.Event(), []

        def first():
            gate.wait(timeout=60)
            order.append("first")

        saver.start(first)
        saver.check()
        assert order == []
        gate.set()
        saver.start(lambda: order.append("second"))
        saver.wait()
        assert order == ["first", "second"]

    @pytest.mark.parametrize("ask", ["wait", "check", "start"])
    def test_a_failure_is_raised_once(self, ask):
        saver = BackgroundSaver()
        saver.start(failing)
        saver._pending.exception(timeout=60)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            saver.start(lambda: None) if ask == "start" else getattr(saver, ask)()
        saver.wait()
        saver.check()

    def test_a_wait_that_a_signal_ends_forgets_nothing(self):
        saver, waiting, gate = BackgroundSaver(), threading.Event(), threading.Event()

        def save():
            waiting.wait(timeout=60)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            gate.wait(timeout=10)  # for a signal that came just before the wait began
            failing()

        def wait():
            waiting.set()
            saver.wait()

        saver.start(save)
        with pytest.raises(KeyboardInterrupt):
            wait()
        gate.set()
        with pytest.raises(CheckpointError, match="the disk is gone"):
            saver.wait()


def test_what_is_saved_is_the_state_of_the_call(tmp_path, held):
    trainer = build(tmp_path, extensions={"size": Counting()})
    trainer.train_step(regression())
    expected = trainer.state.copy()
    path = trainer.save_checkpoint(background=True)
    for seed in range(3):
        trainer.train_step(regression(seed=seed))  # donates the state that is being saved
    assert latest_checkpoint(tmp_path) is None
    held.set()
    trainer.close()
    other = build(tmp_path, extensions={"size": Counting()})
    other.load_checkpoint(path)
    assert_same_bits(other.state, expected)


@pytest.mark.parametrize("rng", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
@pytest.mark.usefixtures("as_on_an_accelerator")
def test_from_an_accelerator_too(rng, tmp_path, held):
    trainer = build(tmp_path, extensions={"size": Counting()}, rng=rng)
    trainer.train_step(regression())
    expected = trainer.state.copy()
    path = trainer.save_checkpoint(background="if_finite")
    trainer.train_step(regression())
    held.set()
    trainer.close()
    other = build(tmp_path, extensions={"size": Counting()}, rng=rng)
    other.load_checkpoint(path)
    assert_same_bits(other.state, expected)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_run_on_an_accelerator_is_saved_and_resumed(tmp_path):
    whole = build(tmp_path / "whole", save_interval=2)
    whole.train(regression(24), 2, 4)
    build(tmp_path / "parts", save_interval=2).train(regression(24), 1, 4)
    resumed = build(tmp_path / "parts", save_interval=2)
    resumed.train(regression(24), 2, 4, resume=True)
    assert_same_bits(resumed.state, whole.state)


def test_periodic_saves_are_all_there_when_train_returns(tmp_path):
    trainer = build(tmp_path, save_interval=2)
    trainer.train(regression(24), 1, 4)
    assert sorted(path.name for path in tmp_path.glob("c*")) == [f"checkpoint_{step}.msgpack" for step in (2, 4, 6)]


def test_train_epoch_waits_for_its_saves(tmp_path):
    settings = config(save_frequency=2)
    trainer = Trainer(Busy(), settings, loss_fn=squared_error, workdir=tmp_path, train_data_loader=[regression(8)] * 5)
    trainer.train_epoch()
    assert latest_checkpoint(tmp_path).name == "checkpoint_4.msgpack"


def test_on_train_end_finds_the_last_save_finished(tmp_path):
    found = []

    class Looking(Callback):
        def on_train_end(self, trainer):
            found.append(latest_checkpoint(tmp_path))

    build(tmp_path, [Looking()], save_interval=6).train(regression(24), 1, 4)
    assert found == [tmp_path / "checkpoint_6.msgpack"]


class TestTheEndOfARun:
    def test_a_short_run_is_saved(self, tmp_path):
        trainer = build(tmp_path)
        trainer.train(regression(24), 1, 4)
        assert latest_checkpoint(tmp_path).name == "checkpoint_6.msgpack"
        again = build(tmp_path)
        again.train(regression(24), 1, 4, resume=True)
        assert (again.step, again.epoch) == (6, 1)
        assert_same_bits(again.state, trainer.state)

    def test_a_step_that_is_saved_is_not_saved_again(self, tmp_path, monkeypatch):
        trainer, saved = build(tmp_path, save_interval=6), []
        monkeypatch.setattr(type(trainer), "save_checkpoint", lambda self, **_: saved.append(self.step))
        monkeypatch.setattr(type(trainer.setup.checkpointer), "saved_step", lambda self, run: (saved or [None])[-1])
        trainer.train(regression(24), 1, 4)
        assert saved == [6]

    def test_without_a_directory_of_the_caller_nothing_is_saved(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        build(None).train(regression(24), 1, 4)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("directory", "saved"), [("./checkpoints", []), ("./saved", ["saved"])])
    def test_the_default_directory_written_out_is_the_default(self, directory, saved, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        settings = TrainingConfig.from_dict(config(checkpoint_dir=directory).to_dict())
        Trainer(Busy(), settings, loss_fn=squared_error).train(regression(24), 1, 4)
        assert [path.name for path in tmp_path.iterdir()] == saved

    @pytest.mark.parametrize("method", ["train", "train_epoch"])
    def test_nor_is_one_whose_model_state_alone_is_not_finite(self, method, tmp_path):
        """Running statistics that overflowed, which training does not read."""

        class Overflows(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                spoilt = jax.tree.map(
                    lambda leaf: leaf * jnp.inf if leaf.dtype == jnp.float32 else leaf, trainer.state.model_state
                )
                trainer.state = trainer.state.replace(model_state=spoilt)

        options = {"train_data_loader": [regression(4)] * 6} if method == "train_epoch" else {}
        trainer = build(tmp_path, [Overflows()], **options)
        with pytest.warns(UserWarning, match="the state is not finite any more at step 6"):
            trainer.train(regression(24), 1, 4) if method == "train" else trainer.train_epoch()
        trainer.close()
        assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), trainer.state.params))
        assert latest_checkpoint(tmp_path) is None

    def test_a_state_that_is_not_finite_is_not_saved(self, tmp_path):
        of_the_loss = pytest.warns(UserWarning, match="the loss is nan at step 1")
        with of_the_loss, pytest.warns(UserWarning, match="the state is not finite any more at step 6"):
            build(tmp_path, loss_fn=lambda *_: (jnp.nan * squared_error(*_)[0], {})).train(regression(24), 1, 4)
        assert latest_checkpoint(tmp_path) is None

    def test_train_epoch_saves_first_and_last(self, tmp_path):
        settings = config(num_epochs=3)
        trainer = Trainer(
            Busy(), settings, loss_fn=squared_error, workdir=tmp_path, train_data_loader=[regression(8)] * 5
        )
        found = []
        for _ in range(3):
            trainer.train_epoch()
            found.append(latest_checkpoint(tmp_path).name)
        assert found == ["checkpoint_5.msgpack", "checkpoint_5.msgpack", "checkpoint_15.msgpack"]

    def test_of_an_unknown_number_every_train_epoch_saves_and_none_waits(self, tmp_path, held):
        held.set()
        trainer = by_epochs(tmp_path)
        trainer.train_epoch()
        held.clear()
        trainer.train_epoch()
        assert latest_checkpoint(tmp_path).name == "checkpoint_5.msgpack"
        held.set()
        trainer.train_epoch()
        trainer.setup.checkpointer.wait()
        assert sorted(path.name for path in tmp_path.glob("c*")) == [
            f"checkpoint_{step}.msgpack" for step in (10, 15, 5)
        ]
        resumed = by_epochs(tmp_path)
        while resumed.epoch < 4:
            resumed.train_epoch(resume=True)
        trainer.train_epoch()
        assert_same_bits(resumed.state, trainer.state)

    def test_without_a_directory_of_the_caller_train_epoch_saves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for settings in ({}, {"num_epochs": 3}):
            with by_epochs(None, **settings) as trainer:
                trainer.train_epoch()
        assert list(tmp_path.iterdir()) == []

    def test_of_a_known_number_close_saves_where_the_loop_ends_before(self, tmp_path):
        with by_epochs(tmp_path, num_epochs=9) as trainer:
            for _ in range(2):
                trainer.train_epoch()
            assert latest_checkpoint(tmp_path).name == "checkpoint_5.msgpack"
        assert latest_checkpoint(tmp_path).name == "checkpoint_10.msgpack"
        resumed = by_epochs(tmp_path, num_epochs=9)
        while resumed.epoch < 3:
            resumed.train_epoch(resume=True)
        trainer.train_epoch()
        assert_same_bits(resumed.state, trainer.state)

    def test_close_saves_no_steps_of_the_callers_own(self, tmp_path):
        with by_epochs(tmp_path, num_epochs=9) as trainer:
            trainer.train_epoch()
            trainer.train_epoch()
            trainer.train_step(regression(8))
        with by_epochs(tmp_path / "steps") as other:
            other.train_step(regression(8))
        assert [path.name for path in tmp_path.rglob("c*")] == ["checkpoint_5.msgpack"]

    def test_train_epoch_saves_where_a_callback_ends_the_run(self, tmp_path):
        class Stops(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                self.should_stop = epoch == 1

        data = [regression(8)] * 5
        trainer = Trainer(
            Busy(), config(), loss_fn=squared_error, workdir=tmp_path, train_data_loader=data, callbacks=[Stops()]
        )
        while not trainer.should_stop:
            trainer.train_epoch()
        assert latest_checkpoint(tmp_path).name == "checkpoint_10.msgpack"

    @pytest.mark.parametrize("method", ["train", "train_epoch"])
    def test_a_last_save_of_a_callback_that_fails_is_raised(self, method, tmp_path, monkeypatch):
        class Saves(Callback):
            def on_train_end(self, trainer):
                monkeypatch.setattr("trainer.checkpoints.checkpointer.write_snapshot", failing)
                trainer.save_checkpoint(tmp_path / "last.msgpack", background=True)

        trainer = build(tmp_path, [Saves()], train_data_loader=[regression(8)])
        with pytest.raises(CheckpointError, match="the disk is gone"):
            trainer.train(regression(24), 1, 4) if method == "train" else trainer.train_epoch()


class TestFailures:
    def test_one_in_the_middle_ends_the_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trainer.checkpoints.checkpointer.write_snapshot", failing)
        recorder = Recorder()
        trainer = build(tmp_path, [recorder], save_interval=1)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            trainer.train(regression(24), 2, 4)
        assert recorder.names[-1] == "on_train_end"
        assert trainer.step < 12

    @pytest.mark.parametrize("which", ["periodic", "last"])
    @pytest.mark.parametrize("method", ["train", "train_epoch"])
    def test_one_at_the_end_is_raised_by_the_call(self, method, which, tmp_path, monkeypatch):
        monkeypatch.setattr("trainer.checkpoints.checkpointer.write_snapshot", failing)
        recorder = Recorder()
        every = 6 if which == "periodic" else 1000
        options = {"workdir": tmp_path, "save_interval": every, "callbacks": [recorder]}
        if method == "train_epoch":
            options["train_data_loader"] = [regression(4)] * 6
        changes = {} if method == "train" else {"save_frequency": every}
        trainer = Trainer(Busy(), config(**changes), loss_fn=squared_error, **options)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            trainer.train(regression(24), 1, 4) if method == "train" else trainer.train_epoch()
        assert trainer.step == 6
        assert recorder.names[-1] == "on_train_end"
        trainer.state.check_alive()

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_every_train_epoch_raises_those_of_its_own(self, call, tmp_path, monkeypatch):
        settings = config(save_frequency=6)
        data = [regression(4)] * 6
        trainer = Trainer(Busy(), settings, loss_fn=squared_error, workdir=tmp_path, train_data_loader=data)
        for _ in range(call - 1):
            trainer.train_epoch()
        monkeypatch.setattr("trainer.checkpoints.checkpointer.write_snapshot", failing)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            trainer.train_epoch()
        monkeypatch.undo()
        trainer.close()

    def test_one_does_not_hide_the_users_error(self, tmp_path, monkeypatch):
        gate = threading.Event()

        def fail_later(*_):
            gate.wait(timeout=60)
            failing()

        class Failing(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                gate.set()
                raise ZeroDivisionError

        monkeypatch.setattr("trainer.checkpoints.checkpointer.write_snapshot", fail_later)
        with pytest.raises(ZeroDivisionError) as caught:
            build(tmp_path, [Failing()], save_interval=6).train(regression(24), 1, 4)
        assert caught.value.__notes__ == ["and a save in the background raised CheckpointError('the disk is gone')"]

    def test_one_of_any_kind_does_not_hide_the_users_error_nor_skip_the_end(self, tmp_path, monkeypatch):
        gate = threading.Event()

        def fail_later(*_):
            gate.wait(timeout=60)
            raise PermissionError("not yours")

        class Failing(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                gate.set()
                raise ZeroDivisionError

        monkeypatch.setattr("trainer.checkpoints.checkpointer.Written.prune", fail_later)
        recorder = Recorder()
        with pytest.raises(ZeroDivisionError) as caught:
            build(tmp_path, [Failing(), recorder], save_interval=6).train(regression(24), 1, 4)
        assert caught.value.__notes__ == ["and a save in the background raised PermissionError('not yours')"]
        assert recorder.names[-1] == "on_train_end"

    @pytest.mark.parametrize("ask", ["close", "train_epoch"])
    def test_one_of_an_epoch_is_raised_by_the_next_call(self, ask, tmp_path, monkeypatch):
        trainer = by_epochs(tmp_path)
        trainer.train_epoch()
        with monkeypatch.context() as patch:
            patch.setattr("trainer.checkpoints.checkpointer.write_snapshot", failing)
            trainer.train_epoch()
            trainer.setup.checkpointer._saver._pending.exception(timeout=60)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            getattr(trainer, ask)()

    def test_one_that_nobody_asks_for_keeps_no_arrays(self, monkeypatch):
        monkeypatch.setattr(background, "_unheard", {})

        class Arrays:
            pass

        def fails(arrays):
            raise OSError("the disk is gone")

        saver, arrays = BackgroundSaver(), Arrays()
        held = weakref.ref(arrays)
        saver.start(functools.partial(fails, arrays))
        saver._pending.exception(timeout=60)
        del saver, arrays
        gc.collect()
        assert held() is None
        with pytest.warns(UserWarning, match=r"no later call could raise it: OSError\('the disk is gone'\)"):
            background._wait_for_all()

    def test_one_that_was_raised_is_not_told_again(self, monkeypatch):
        monkeypatch.setattr(background, "_unheard", {})
        saver = BackgroundSaver()
        for _ in range(2):
            saver.start(lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                saver.wait()
        background._wait_for_all()
        assert background._unheard == {}

    @pytest.mark.parametrize("ask", ["close", "save_checkpoint"])
    def test_one_after_a_call_is_raised_by_the_next(self, ask, tmp_path, monkeypatch):
        trainer = build(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("trainer.checkpoints.checkpointer.write_snapshot", failing)
            trainer.save_checkpoint(background=True)
            trainer.setup.checkpointer._saver._pending.exception(timeout=60)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            getattr(trainer, ask)()
        assert trainer.save_checkpoint().exists()


@pytest.mark.parametrize("suffix", ["msgpack", "orbax"])
@pytest.mark.few(1)
def test_an_interpreter_that_exits_waits(suffix, tmp_path):
    path = tmp_path / f"checkpoint_0.{suffix}"
    code = f"""
        from tests.checkpoints.test_background import build
        build({str(tmp_path)!r}).save_checkpoint({str(path)!r}, background=True)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert latest_checkpoint(tmp_path) == path


@pytest.mark.few(1)
def test_an_interpreter_that_exits_tells_of_a_failure(tmp_path):
    code = f"""
        from tests.checkpoints.test_background import build, checkpointer, failing
        checkpointer.write_snapshot = failing
        build({str(tmp_path)!r}).save_checkpoint(background=True)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    assert "a save in the background failed, and no later call could raise it: CheckpointError(" in ended.stderr


def test_a_pickle_is_written_at_once(tmp_path):
    assert build(tmp_path).save_checkpoint(tmp_path / "s.pkl", background=True).exists()


class TestWithoutADirectory:
    """Nothing is saved or read there unless the caller asks."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_the_default_interval_saves_nothing(self, tmp_path):
        trainer = build(None, steps_per_call=1000)
        trainer.train([regression(2)] * 1100, 1, 2)
        assert trainer.step == 1100
        assert list(tmp_path.iterdir()) == []

    def test_nor_does_that_of_train_epoch(self, tmp_path):
        data = [regression(2)] * 1100
        Trainer(Busy(), config(), loss_fn=squared_error, train_data_loader=data, steps_per_call=1000).train_epoch()
        assert list(tmp_path.iterdir()) == []

    def test_an_interval_of_the_callers_own_asks_for_saves(self, tmp_path):
        build(None, save_interval=6).train(regression(24), 1, 4)
        assert latest_checkpoint("checkpoints").name == "checkpoint_6.msgpack"
        settings = config(save_frequency=5)
        with pytest.warns(UserWarning, match="holds checkpoints up to step 6"):  # it is about to save there
            Trainer(Busy(), settings, loss_fn=squared_error, train_data_loader=[regression(8)] * 5).train_epoch()
        assert len(list(tmp_path.glob("checkpoints/*.msgpack"))) == 2

    @pytest.mark.filterwarnings("ignore:`train_data.* cannot be set to a position")
    @pytest.mark.parametrize("method", ["train", "train_epoch"])
    def test_resume_asks_for_saves_where_it_looks_for_them(self, method):
        data = [regression(2)] * 1100

        def resumed():
            trainer = build(None, train_data_loader=data, steps_per_call=1000)
            trainer.train(data, 1, 2, resume=True) if method == "train" else trainer.train_epoch(resume=True)
            return trainer

        assert resumed().step == 1100
        assert latest_checkpoint("checkpoints").name == "checkpoint_1000.msgpack"
        assert (again := resumed()).step == 1100
        assert again.setup.live.start_step == 1000

    @pytest.mark.parametrize(
        "options", [{}, {"save_interval": None}, {"save_interval": 10**6}, {"fast_dev_run": True}], ids=str
    )
    def test_a_run_that_saves_nothing_does_not_warn_of_what_is_there(self, options):
        build(None, save_interval=6).train(regression(24), 1, 4)
        build(None, **options).train(regression(8), 1, 4)

    def test_a_dry_run_resumes_nothing(self):
        build(None, save_interval=6).train(regression(24), 1, 4)
        dry = build(None, fast_dev_run=True)
        dry.train(regression(8), 1, 4, resume=True)
        assert dry.step == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copied", "pickled"]
)
def test_a_copy_of_a_checkpointer_saves_by_itself(copied, tmp_path, held):
    trainer = build(None)
    given = checkpointer.Checkpointer(tmp_path)
    given.save(trainer.run, tmp_path / "a.msgpack", background=True)
    other = copied(given)  # while the save of the first waits
    held.set()
    other.save(trainer.run, tmp_path / "b.msgpack", background=True)
    for one in (given, other):
        one.wait()
    assert sorted(path.name for path in tmp_path.glob("*.msgpack")) == ["a.msgpack", "b.msgpack"]
