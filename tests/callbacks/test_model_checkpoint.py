"""The best checkpoints of a run: judged on the state they hold, and never lost to a NaN or to a newer one."""

import errno
import math
import os
import resource
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, Counting, Playing, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import ArgumentError, Callback, CheckpointError, ModelCheckpoint, Trainer
from trainer.checkpoints import atomic
from trainer.checkpoints.orbax_directory import OrbaxDirectory


def build(tmp_path, *callbacks, **options):
    return Trainer(
        Busy(),
        config(max_checkpoints=100),
        loss_fn=options.pop("loss_fn", squared_error),
        workdir=tmp_path / "files",
        rng=jax.random.key(options.pop("seed", 3)),
        callbacks=callbacks,
        extensions={"size": Counting()},
        **options,
    )


def run(trainer, epochs=3, val_interval=5, **options):
    """20 examples in batches of 4: five steps an epoch, a validation at the end of each."""
    return trainer.train(regression(20), epochs, 4, regression(8, seed=1), val_interval, **options)


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


class Scripted(Playing):
    """Stands for a trainer whose validations give the scores of a script, one at each step."""

    def __init__(self, tmp_path):
        self.real = build(tmp_path)
        self.step, self.validates = 0, True

    @property
    def state(self):
        return self.real.state.replace(step=jnp.asarray(self.step, jnp.int32))

    def snapshot(self):
        return self.real.snapshot()


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("scores", "options", "kept", "best"),
    [
        ([5, 4, 3, 2, 1], {"save_top_k": 2}, [4, 5], 5),
        ([1, 2, 3, 4, 5], {"save_top_k": 2}, [1, 2, 5], 1),
        ([1, 2, 3, 4, 5], {"save_top_k": 2, "mode": "max"}, [4, 5], 5),
        ([1, 2, 3, 4, 5], {"save_top_k": 2, "save_last": False}, [1, 2], 1),
        ([1, 2, nan], {"save_top_k": 2}, [1, 2, 3], 1),
        ([1, nan, 2, 3], {"save_top_k": 2}, [1, 3, 4], 1),
        ([nan, 2, nan, 3], {"save_top_k": 1}, [2, 4], 2),
        ([nan, nan], {"save_top_k": 1, "mode": "max"}, [1, 2], None),
        ([inf, 1, -inf], {"save_top_k": 1}, [3], 3),
        ([inf, 1, -inf], {"save_top_k": 1, "mode": "max"}, [1, 3], 1),
        ([2, 2, 2], {"save_top_k": 1}, [1, 3], 1),
        ([3, 1, 2], {"save_top_k": 0}, [3], 3),
        ([3, 1, 2], {"save_top_k": -1}, [1, 2, 3], 2),
        ([3, 1, 2], {"save_top_k": 1, "every_n_epochs": 3}, [3], 3),
    ],
)
@pytest.mark.few(5)
def test_what_is_kept(scores, options, kept, best, tmp_path):
    callback = ModelCheckpoint(tmp_path / "best", **options)
    Scripted(tmp_path).play(callback, scores)
    assert steps_in(tmp_path / "best") == kept
    assert callback.best_model_path == (None if best is None else tmp_path / "best" / str(best))
    assert callback.best_model_score == (None if best is None else scores[best - 1])
    assert callback.last_model_path == tmp_path / "best" / str(kept[-1])
    # Another process finds the same.
    again = ModelCheckpoint(tmp_path / "best", **options)
    assert (again.best_model_path, again.best_model_score) == (callback.best_model_path, callback.best_model_score)


def test_nothing_saved_yet(tmp_path):
    callback = ModelCheckpoint(tmp_path / "best")
    assert (callback.best_model_path, callback.best_model_score, callback.last_model_path) == (None, None, None)
    assert not (tmp_path / "best").exists()


def test_after_a_rollback_the_newest_is_the_one_that_was_written_last(tmp_path):
    callback = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
    trainer = build(tmp_path, callback)
    run(trainer, epochs=3)
    assert callback.last_model_path.name == "15"
    trainer.load_checkpoint(tmp_path / "best" / "5")
    with pytest.warns(UserWarning, match="holds checkpoints up to step 15"):
        run(trainer, epochs=1)
    assert callback.last_model_path.name == "10"
    assert ModelCheckpoint(tmp_path / "best").last_model_path.name == "15"


def steps_and_runs(directory):
    found = []
    for path in directory.iterdir():
        with OrbaxDirectory(path) as opened:
            found.append((opened.info["step"], opened.info["run"]))
    return sorted(found)


def worse(model, batch, rng, step):
    loss, metrics = squared_error(model, batch, rng, step)
    return loss + 10, metrics


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TestOthersDirectories:
    @pytest.mark.parametrize("save_top_k", [0, 1, 3])
    def test_folders_with_numbers_for_names_stay_and_do_not_count(self, save_top_k, tmp_path):
        for name in [*map(str, range(10)), "007", "2023", "²"]:
            (tmp_path / "best" / name).mkdir(parents=True)
            (tmp_path / "best" / name / "image.png").write_bytes(name.encode())
        (tmp_path / "best" / "11").mkdir()
        before = contents(tmp_path / "best")
        callback = ModelCheckpoint(tmp_path / "best", save_top_k=save_top_k)
        Scripted(tmp_path).play(callback, [3, 1, 2, 4], first=20)
        assert before.items() <= contents(tmp_path / "best").items()
        assert (tmp_path / "best" / "11").is_dir()
        saved = {0: {23}, 1: {21, 23}, 3: {20, 21, 22, 23}}[save_top_k]
        assert {int(path.name) for path in (tmp_path / "best").iterdir() if (path / "about").exists()} == saved
        assert callback.last_model_path.name == "23"
        assert callback.best_model_score == (1 if save_top_k else 4)

    @pytest.mark.parametrize("fill", [lambda path: None, lambda path: (path / "about").write_text("mine")])
    def test_a_directory_that_is_in_the_way_is_not_replaced(self, fill, tmp_path):
        (tmp_path / "best" / "2").mkdir(parents=True)
        fill(tmp_path / "best" / "2")
        before = contents(tmp_path / "best")
        callback = ModelCheckpoint(tmp_path / "best")
        with pytest.raises(CheckpointError, match=r"best/2` is no checkpoint that a ModelCheckpoint with monitor "):
            Scripted(tmp_path).play(callback, [3, 1])
        assert before.items() <= contents(tmp_path / "best").items()
        assert callback.best_model_path == tmp_path / "best" / "1"

    def test_a_checkpoint_that_was_saved_by_hand_stays(self, tmp_path):
        build(tmp_path).save_checkpoint(tmp_path / "best" / "1.orbax")
        (tmp_path / "best" / "1.orbax").rename(tmp_path / "best" / "1")
        before = contents(tmp_path / "best" / "1")
        Scripted(tmp_path).play(ModelCheckpoint(tmp_path / "best", save_top_k=1), [3, 1, 2], first=2)
        assert steps_in(tmp_path / "best") == [1, 3, 4]
        assert contents(tmp_path / "best" / "1") == before

    def test_the_best_by_another_monitor_stay(self, tmp_path):
        first = ModelCheckpoint(tmp_path / "best", save_top_k=2)
        trainer = Scripted(tmp_path)
        trainer.play(first, [1, 2, 3])
        assert steps_in(tmp_path / "best") == [1, 2, 3]
        second = ModelCheckpoint(tmp_path / "best", monitor="val_error", save_top_k=1)
        assert (second.best_model_path, second.last_model_path) == (None, None)
        second.on_train_begin(trainer)
        for step, error in enumerate([5, 4, 3], start=4):
            trainer.step = step
            second.on_validation_end(trainer, {"error": error})
        second.on_train_end(trainer)
        assert steps_in(tmp_path / "best") == [1, 2, 3, 6]
        assert first.best_model_path.name == ModelCheckpoint(tmp_path / "best").best_model_path.name == "1"
        assert second.best_model_path.name == "6"

    def test_a_run_that_could_replace_the_best_by_another_monitor_is_refused_before_it_trains(self, tmp_path):
        run(build(tmp_path, ModelCheckpoint(tmp_path / "best")))
        before = contents(tmp_path / "best")
        trainer = build(tmp_path / "other", ModelCheckpoint(tmp_path / "best", monitor="val_mean_error"))
        with pytest.raises(ArgumentError, match=r"another metric than 'val_mean_error' up to step 15, .* at step 0"):
            run(trainer)
        assert trainer.step == 0
        assert contents(tmp_path / "best") == before

    def test_two_callbacks_with_one_directory_are_refused(self, tmp_path):
        both = [ModelCheckpoint(tmp_path / "best"), ModelCheckpoint(tmp_path / "best", monitor="val_mean_error")]
        trainer = build(tmp_path, *both)
        with pytest.raises(ArgumentError, match="best` is that of two callbacks; use a directory of its own for each"):
            run(trainer)
        assert trainer.step == 0
        assert not (tmp_path / "best").exists()


class TestInARun:
    def test_the_score_is_that_of_the_state_it_is_saved_with(self, tmp_path):
        best = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
        trainer = build(tmp_path, best)
        run(trainer, val_interval=3)
        assert steps_in(tmp_path / "best") == [3, 5, 6, 9, 10, 12, 15]  # 5 and 10 end an epoch, and are not judged
        for step in (3, 6, 9, 12, 15):
            other = build(tmp_path)
            other.load_checkpoint(tmp_path / "best" / str(step))
            assert other.step == step
            averages = other.evaluate(regression(8, seed=1), 4)
            with OrbaxDirectory(tmp_path / "best" / str(step)) as directory:
                assert directory.info["score"] == averages["loss"]
        scores = trainer.history.series("val_loss")
        assert best.best_model_score == min(scores[1])
        assert best.best_model_path.name == str(scores[0][np.argmin(scores[1])])

    def test_a_metric_of_training_is_judged_at_the_end_of_epochs(self, tmp_path):
        best = ModelCheckpoint(tmp_path / "best", monitor="loss", save_top_k=1)
        seen = Watching()
        run(build(tmp_path, best, seen))
        losses = [logs["loss"] for _, logs in seen.epochs]
        assert best.best_model_score == min(losses)
        assert best.best_model_path.name == str(5 * (1 + int(np.argmin(losses))))

    def test_it_changes_nothing_in_what_is_learned(self, tmp_path):
        plain, saved = build(tmp_path / "a"), build(tmp_path / "b", ModelCheckpoint(tmp_path / "best"))
        run(plain)
        run(saved)
        assert_same_bits(saved.state, plain.state)

    @pytest.mark.parametrize("step", [3, 5, 9, 10, 12])
    @pytest.mark.few(2)
    def test_a_run_goes_on_from_it_to_the_bit(self, step, tmp_path):
        first, whole = Watching(), build(tmp_path, Watching(), ModelCheckpoint(tmp_path / "best", save_top_k=-1))
        returned = run(whole, val_interval=3)
        again = build(tmp_path / "again", first)
        assert run(again, val_interval=3, resume=tmp_path / "best" / str(step)) == returned
        assert_same_bits(again.state, whole.state)
        assert first.epochs == whole.callbacks.callbacks[0].epochs
        assert first.batches == whole.callbacks.callbacks[0].batches
        assert again.history.to_dict() == whole.history.to_dict()

    def test_it_hears_of_events_last(self, tmp_path):
        """Wherever it stands in the list: a validation that others have not heard of would be lost to them."""

        class Counts(Callback):
            validations = 0

            def on_validation_end(self, trainer, logs):
                self.validations += 1

            def state_dict(self):
                return self.validations

            def load_state_dict(self, state):
                self.validations = state

        run(build(tmp_path, ModelCheckpoint(tmp_path / "best", save_top_k=-1), Counts()))
        other = build(tmp_path, counts := Counts())
        other.load_checkpoint(tmp_path / "best" / "10")
        assert counts.validations == 2

    def test_a_run_that_was_stopped_goes_on_and_replaces_what_comes_again(self, tmp_path):
        best = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
        with pytest.raises(StoppedError):
            run(build(tmp_path, best, Watching(stop_at=12), save_interval=4))
        assert steps_in(tmp_path / "best") == [5, 10]
        again = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
        resumed = build(tmp_path, again, Watching(), save_interval=4)
        run(resumed, resume=tmp_path / "files" / "checkpoint_8.msgpack")  # which says nothing of step 10
        assert steps_in(tmp_path / "best") == [5, 10, 15]
        assert again.best_model_score == min(resumed.history.series("val_loss")[1])

    def test_a_state_that_is_not_finite_is_not_saved(self, tmp_path):
        def explode(model, batch, rng, step):
            loss, metrics = squared_error(model, batch, rng, step)
            return loss * jnp.where(step >= 7, jnp.nan, 1.0), metrics

        best = ModelCheckpoint(tmp_path / "best")
        of_the_loss = pytest.warns(UserWarning, match="the loss is nan at step 8")
        at_the_end = pytest.warns(UserWarning, match="the state is not finite any more at step 15")
        of_the_best = pytest.warns(UserWarning, match=r"the state is not finite at step 1[05]; .* keeps what it has")
        with of_the_loss, at_the_end, of_the_best:
            run(build(tmp_path, best, loss_fn=explode))
        assert steps_in(tmp_path / "best") == [5]
        assert best.best_model_path == tmp_path / "best" / "5"


class OfRun(Scripted):
    """One that has a run, which the callback asks for its id."""

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.run = self.real.run


class TestTwoRuns:
    def test_the_best_of_another_run_stays_and_does_not_count(self, tmp_path):
        first = ModelCheckpoint(tmp_path / "best", save_top_k=1)
        run(build(tmp_path / "a", first), epochs=4)
        before = steps_in(tmp_path / "best")
        second = ModelCheckpoint(tmp_path / "best", save_top_k=1)
        trainer = build(tmp_path / "b", second)
        with pytest.warns(UserWarning, match=r"holds checkpoints of another run up to step 20, later than this run's"):
            run(trainer, epochs=2, val_interval=3)
        assert set(before) <= set(steps_in(tmp_path / "best"))
        assert second.best_model_score == min(trainer.history.series("val_loss")[1])

    @pytest.mark.parametrize("save_top_k", [1, 3])
    def test_the_best_and_the_last_stay_when_the_same_script_runs_again(self, save_top_k, tmp_path):
        kept, scores = {}, []
        for seed in range(3):
            best = ModelCheckpoint(tmp_path / "best", save_top_k=save_top_k)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                trainer = build(tmp_path / str(seed), best, seed=seed)
                run(trainer, epochs=4)
            assert ["holds checkpoints of another run up to step 20" in str(one.message) for one in told] == [True] * (
                seed > 0
            )
            for path in (best.best_model_path, best.last_model_path):
                with OrbaxDirectory(path) as opened:
                    kept[trainer.run.id, path.name] = opened.info["time"], opened.info["score"]
            scores.append(best.best_model_score)
        for (run_id, name), expected in kept.items():
            renamed = tmp_path / "best" / f"{name}.{run_id}"
            with OrbaxDirectory(renamed if renamed.exists() else tmp_path / "best" / name) as opened:
                opened.verify()
                assert opened.info["run"] == run_id
                assert (opened.info["time"], opened.info["score"]) == expected
        assert len(list((tmp_path / "best").iterdir())) <= 2 * 2 + save_top_k + 1
        # Another process finds the best of all runs.
        found = ModelCheckpoint(tmp_path / "best", save_top_k=save_top_k)
        assert found.best_model_score == min(scores)
        again = build(tmp_path / "again")
        again.load_checkpoint(found.best_model_path)
        assert again.evaluate(regression(8, seed=1), 4)["loss"] == min(scores)

    def test_a_run_finds_its_own_under_another_name(self, tmp_path):
        first = ModelCheckpoint(tmp_path / "best", save_top_k=1)
        trainer = build(tmp_path / "a", first)
        run(trainer, epochs=2)
        score = first.best_model_score
        with pytest.warns(UserWarning, match="checkpoints of another run"):
            run(build(tmp_path / "b", ModelCheckpoint(tmp_path / "best", save_top_k=-1), loss_fn=worse), epochs=2)
        assert (first.best_model_path.name, first.best_model_score) == (f"10.{trainer.run.id}", score)
        again = ModelCheckpoint(tmp_path / "best", save_top_k=1)
        run(build(tmp_path / "a", again), epochs=4, resume=True)
        found = steps_and_runs(tmp_path / "best")
        assert [step for step, run_id in found if run_id == trainer.run.id] == sorted(
            {int(again.best_model_path.name.partition(".")[0]), 20}
        )
        assert [step for step, run_id in found if run_id != trainer.run.id] == [5, 10]

    def test_what_a_run_saves_again_counts_and_not_what_was_renamed_before(self, tmp_path, monkeypatch):
        one, two, options = OfRun(tmp_path), OfRun(tmp_path), {"save_top_k": 2, "background": False}
        one.play(ModelCheckpoint(tmp_path / "best", **options), [5, 1])
        two.step = 0
        with pytest.warns(UserWarning, match="holds checkpoints of another run up to step 2"):
            two.play(ModelCheckpoint(tmp_path / "best", **options), [8, 9])
        renamed = tmp_path / "best" / f"2.{one.run.id}"
        assert renamed.exists()
        one.is_new_run, one.step, first = False, 1, ModelCheckpoint(tmp_path / "best", **options)
        monkeypatch.setattr(ModelCheckpoint, "_remove", lambda *_: None)  # as if it was killed before that
        with pytest.warns(UserWarning, match="another run"):
            one.play(first, [7], first=2)
        monkeypatch.undo()
        again = ModelCheckpoint(tmp_path / "best", **options)
        again.on_train_begin(one)
        for callback in (first, again, ModelCheckpoint(tmp_path / "best")):
            assert (callback.best_model_path, callback.best_model_score) == (tmp_path / "best" / "2", 7)
            assert callback.last_model_path == tmp_path / "best" / "2"
        # What is dropped is dropped under both names.
        for step, score in ((3, 3), (4, 2)):
            one.step = step
            again.on_validation_end(one, {"loss": score})
        again.on_train_end(one)
        assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["1", f"2.{two.run.id}", "3", "4"]

    def test_what_goes_while_a_name_is_freed_is_not_missed(self, tmp_path, monkeypatch):
        """Another process of the other run may remove its checkpoint between two looks at it."""
        one, two = OfRun(tmp_path), OfRun(tmp_path)
        one.play(ModelCheckpoint(tmp_path / "best"), [5])
        two.step, second = 0, ModelCheckpoint(tmp_path / "best", background=False)
        with pytest.warns(UserWarning, match="another run"):
            second.on_train_begin(two)
        monkeypatch.setattr(second, "_on_disk", list)
        two.step = 1
        second.on_validation_end(two, {"loss": 1.0})
        assert second.best_model_path == tmp_path / "best" / "1"

    def test_what_another_run_has_replaced_is_not_removed(self, tmp_path):
        first, second = ModelCheckpoint(tmp_path / "best", save_top_k=1), ModelCheckpoint(tmp_path / "best")
        one, two = OfRun(tmp_path), OfRun(tmp_path)
        one.play(first, [3])
        one.step = two.step = 1
        second.on_train_begin(two)
        with pytest.warns(UserWarning, match=r"best/1` is of another run, which may be saving in `dirpath` too"):
            second.on_validation_end(two, {"loss": 2})
        second.wait()
        one.step = 2
        first.on_validation_end(one, {"loss": 1})
        first.wait()
        assert steps_and_runs(tmp_path / "best") == sorted([(0, two.run.id), (0, one.run.id)])
        with OrbaxDirectory(tmp_path / "best" / "1") as directory:
            assert directory.info["run"] == two.run.id
        assert not (tmp_path / "best" / f"1.{one.run.id}").exists()  # it was of `first`, which removed it


class TestAKillBetweenTwoRenames:
    """While a directory is replaced, it has another name for an instant: a kill then must not hide it."""

    @pytest.fixture
    def killed(self, tmp_path):
        run(build(tmp_path, ModelCheckpoint(tmp_path / "best")), epochs=2)
        (step,) = steps_in(tmp_path / "best")[-1:]
        os.rename(tmp_path / "best" / str(step), tmp_path / "best" / f".{step}.0123456789abcdef.nnx-trainer.old")
        return tmp_path / "best" / str(step)

    @pytest.mark.parametrize("has_locks", [True, False])
    def test_it_counts_among_the_best(self, killed, has_locks, monkeypatch):
        def refuse(descriptor, operation):
            raise OSError(errno.ENOLCK, "no locks")

        if not has_locks:
            monkeypatch.setattr(atomic.fcntl, "flock", refuse)
        assert ModelCheckpoint(killed.parent).best_model_path == killed

    def test_it_is_loaded_by_its_path(self, killed, tmp_path):
        trainer = build(tmp_path)
        trainer.load_checkpoint(killed)
        assert trainer.step == int(killed.name)


class TestAKillBetweenTwoSaves:
    """The trainer's checkpoint of a step is there, and that of the callback is not."""

    @pytest.mark.parametrize(("step", "val_interval"), [(3, 3), (10, 5), (15, 5)])
    @pytest.mark.few(1)
    def test_the_step_is_judged_when_the_run_is_resumed(self, step, val_interval, tmp_path):
        best = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
        trainer = build(tmp_path, best, save_interval=1)
        run(trainer, val_interval=val_interval)
        assert step in steps_in(tmp_path / "best")
        with OrbaxDirectory(tmp_path / "best" / str(step)) as directory:
            score = directory.info["score"]
        shutil.rmtree(tmp_path / "best")
        again = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
        resumed = build(tmp_path / "again", again)
        run(resumed, val_interval=val_interval, resume=tmp_path / "files" / f"checkpoint_{step}.msgpack")
        with OrbaxDirectory(tmp_path / "best" / str(step)) as directory:
            assert directory.info["score"] == score
        restored = build(tmp_path / "other")
        restored.load_checkpoint(tmp_path / "best" / str(step))
        assert restored.step == step

    def test_one_that_is_there_is_not_written_again(self, tmp_path):
        run(build(tmp_path, ModelCheckpoint(tmp_path / "best", save_top_k=-1), save_interval=5))
        before = (tmp_path / "best" / "15").stat().st_ino
        run(build(tmp_path, ModelCheckpoint(tmp_path / "best", save_top_k=-1), save_interval=5), resume=True)
        assert (tmp_path / "best" / "15").stat().st_ino == before

    def test_a_metric_of_training_is_judged_at_the_end_of_the_run(self, tmp_path):
        best = ModelCheckpoint(tmp_path / "best", monitor="loss", save_top_k=-1)
        run(build(tmp_path, best))  # the last step is saved at the end of the run
        score = best.best_model_score
        shutil.rmtree(tmp_path / "best")
        again = ModelCheckpoint(tmp_path / "best", monitor="loss", save_top_k=-1)
        run(build(tmp_path, again), resume=True)
        assert steps_in(tmp_path / "best") == [15]
        assert again.best_model_score >= score


# Where a save fails, Orbax leaves coroutines behind that complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestFailures:
    @pytest.mark.parametrize("background", [True, False])
    def test_a_save_that_fails_raises_and_leaves_the_others(self, background, tmp_path):
        best = ModelCheckpoint(tmp_path / "best", save_top_k=-1, background=background)

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        class FillsTheDisk(Callback):
            def on_epoch_begin(self, trainer, epoch):
                if epoch == 1:
                    best.wait()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))

        trainer = build(tmp_path, best, FillsTheDisk())
        try:
            with pytest.raises(CheckpointError, match=r"`.*best/10` could not be written \(ValueError: "):
                run(trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trainer.state.check_alive()
        assert best.best_model_path == tmp_path / "best" / "5"
        build(tmp_path).load_checkpoint(best.best_model_path)

    def test_a_missing_monitor_names_the_nearest(self, tmp_path):
        with pytest.raises(ArgumentError, match="`monitor` is 'val_lss', which nothing measured; did you mean 'val_l"):
            run(build(tmp_path, ModelCheckpoint(tmp_path / "best", monitor="val_lss")))
        with pytest.raises(ArgumentError, match=r"`monitor` is 'accuracy', which nothing measured; known: .*mean_er"):
            run(build(tmp_path, ModelCheckpoint(tmp_path / "best", monitor="accuracy")))

    def test_a_run_without_validation(self, tmp_path):
        trainer = build(tmp_path, ModelCheckpoint(tmp_path / "best"))
        with pytest.raises(ArgumentError, match="`monitor` is 'val_loss', but this run validates on nothing; pass"):
            trainer.train(regression(20), 3, 4)
        assert trainer.step == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "least"}, "`mode` is 'least'; it must be 'min' or 'max'"),
            ({"save_top_k": -2}, "`save_top_k` is -2; it must be -1 for all"),
            ({"save_top_k": True}, "`save_top_k` is True"),
            ({"every_n_epochs": 0}, "`every_n_epochs` is 0; it must be a positive integer"),
        ],
    )
    def test_arguments(self, options, message, tmp_path):
        with pytest.raises(ArgumentError, match=message):
            ModelCheckpoint(tmp_path, **options)

    @pytest.mark.parametrize(
        ("name", "instead"),
        [("best.keras", "best"), ("w.{epoch}.h5", "w"), ("best.msgpack", "best"), ("{epoch}", "best")],
    )
    def test_the_name_of_a_file_is_refused(self, name, instead, tmp_path):
        with pytest.raises(ArgumentError) as caught:
            ModelCheckpoint(tmp_path / name)
        assert str(caught.value) == (
            f"`dirpath` is `{tmp_path / name}`, the name of a file; pass that of a directory, such as '{instead}', for "
            f"checkpoints named by their steps."
        )
