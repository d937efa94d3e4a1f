"""Signals to some of several processes: all stop at the same point, able to save together, and nobody hangs."""

import json
import signal
import textwrap
import threading

import pytest

from tests.distributed.test_start import JOIN, TURN, finish, run, start
from trainer.distributed.signals import Signals

LOOP = """
import threading
from trainer import TrainingInterrupted
from trainer.distributed.signals import Signals

STEPS, VALIDATE_EVERY = 8, 4

def send(number):
    os.kill(os.getpid(), number)

def train(name, planned, turn=turn, steps=STEPS):
    '''Tells where this process stopped, and by what; signals come at the moments that are planned for it.'''
    signals = {moment: number for who, moment, number in planned if who == process}
    interruption, stopped = Signals(together=True), None

    def comes(moment):
        if moment in signals:
            send(signals[moment])

    def step(number):
        moment = f"inside step {number}"
        if moment in signals:
            def send_and_tell():
                send(signals[moment])
                barrier(name)
            threading.Thread(target=send_and_tell).start()
        elif any(moment == other for _, other, _ in planned):
            barrier(name)  # until the signal has come to the one that waits in this step
        turn()

    with interruption:
        try:
            comes("begin")
            for number in range(1, steps + 1):
                stopped = f"step {number}"
                step(number)
                comes(stopped)
                interruption.check()
                for batch in range(1, 4 if number % VALIDATE_EVERY == 0 else 1):
                    stopped = f"step {number} batch {batch}"
                    turn()
                    comes(stopped)
                    interruption.check()
            stopped = "end"
            comes("end")
            if interruption.wait_for_all():
                raise interruption.exception()
            comes("too late")
            return stopped, None
        except (TrainingInterrupted, KeyboardInterrupt) as error:
            assert turn() == 2  # as a save would, it needs all
            comes("save")
            assert turn() == 2
            return stopped, type(error).__name__
"""

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)
TERMINATED, INTERRUPTED = "TrainingInterrupted", "KeyboardInterrupt"

# Which process gets which signal, at which moment; between which moments all stop, and by what.
COURSES = {
    "before the first step": ([(1, "begin", TERM)], ("step 1", "step 2"), TERMINATED),
    "between the steps of 0": ([(0, "step 3", TERM)], ("step 3", "step 4 batch 1"), TERMINATED),
    "between the steps of 1": ([(1, "step 2", INT)], ("step 2", "step 3"), INTERRUPTED),
    "in a collective": ([(0, "inside step 5", TERM)], ("step 5", "step 6"), TERMINATED),
    "in an evaluation": ([(1, "step 4 batch 2", TERM)], ("step 4 batch 2", "step 4 batch 3"), TERMINATED),
    "after the last evaluation": ([(0, "step 8 batch 3", TERM)], ("step 8 batch 3", "end"), TERMINATED),
    "at the end of 0": ([(0, "end", TERM)], ("end", "end"), TERMINATED),
    "at the end of 1": ([(1, "end", INT)], ("end", "end"), INTERRUPTED),
    "to both at once": ([(0, "step 3", TERM), (1, "step 3", TERM)], ("step 3", "step 4 batch 1"), TERMINATED),
    "to both, different ones": ([(0, "step 6", INT), (1, "step 6", TERM)], ("step 6", "step 7"), INTERRUPTED),
    "to the other while all save": ([(0, "step 3", TERM), (1, "save", TERM)], ("step 3", "step 4 batch 1"), TERMINATED),
    "to none": ([], ("end", "end"), None),
}
MOMENTS = [
    *(f"step {number}" + batch for number in range(1, 9) for batch in ("", " batch 1", " batch 2", " batch 3")),
    "end",
]


@pytest.fixture(scope="module")
def ends():
    """How each of two processes ended each course, one after the other."""
    body = f"""
        courses = {[(name, planned) for name, (planned, _, _) in COURSES.items()]!r}
        print(json.dumps({{name: train(name, planned) for name, planned in courses}}))
    """
    results = run(TURN + LOOP + textwrap.dedent(body), 2)
    assert [status for status, _, _ in results] == [0, 0], results
    assert not any("failed" in errors for _, _, errors in results)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.slow
def test_wherever_it_comes_all_stop_at_the_same_point(course, ends):
    _, (earliest, latest), exception = COURSES[course]
    first, second = (end[course] for end in ends)
    assert first == second
    stopped, raised = first
    assert raised == exception
    assert MOMENTS.index(earliest) <= MOMENTS.index(stopped) <= MOMENTS.index(latest)


@pytest.mark.slow
def test_the_one_that_is_furthest_decides():
    """Without collectives process 1 is far ahead when the signal comes to 0; a device may be as far behind."""
    body = """
        import itertools
        from trainer.distributed.stop import CommonStop

        reason = None
        with CommonStop(lambda: reason) as stop:
            for passed in itertools.count():
                if process == 0 and passed == 3:
                    barrier("ahead")
                    reason = 7
                if process == 1 and passed == 1000:
                    barrier("ahead")
                if (why := stop.pass_point()) is not None:
                    break
        print(passed, why)
    """
    (status, out, _), other = run(body, 2)
    assert status == other[0] == 0
    assert out == other[1]
    passed, why = map(int, out.split())
    assert passed >= 1000
    assert why == 7


@pytest.mark.slow
def test_one_that_comes_when_all_have_agreed_is_handled_after_the_run():
    body = """
        signal.signal(signal.SIGTERM, lambda *_: print("handled"))
        print(*train("run", [(1, "too late", signal.SIGTERM)]))
    """
    (status, out, _), other = run(TURN + LOOP + textwrap.dedent(body), 2)
    assert status == other[0] == 0
    assert out.splitlines()[-1] == other[1].splitlines()[-1] == "end None"
    assert "handled" not in out
    assert "handled\n" in other[1]


@pytest.mark.parametrize("insisting", [0, 1])
@pytest.mark.slow
def test_a_second_signal_does_not_wait_and_ends_the_others(insisting):
    body = f"""
        interruption = Signals(together=True)
        with interruption:
            for number in range(1, 100000):
                turn()
                if process == {insisting} and number == 3:
                    send(signal.SIGTERM)
                    send(signal.SIGTERM)
                interruption.check()
    """
    results, seconds = finish(start(JOIN + TURN + LOOP + textwrap.dedent(body), 2))
    assert seconds < 40  # to start; then a second
    assert results[insisting][0] == 143, results
    status, _, errors = results[1 - insisting]
    assert status == 1
    assert (
        f"process {1 - insisting} ends, since process {insisting} got a second signal, and did not wait "
        f"for the others" in errors
    )


class TestErrors:
    def test_a_process_that_leaves_without_an_answer_is_named_at_once(self):
        body = """
            from trainer import DistributedError
            from trainer.distributed.stop import CommonStop

            for missing in (0, 1):
                if process != missing:
                    try:
                        with CommonStop(lambda: 15) as stop:
                            stop.pass_point()
                    except DistributedError as error:
                        print(error)
                else:
                    with CommonStop(lambda: None) as stop:
                        pass
                barrier("next")
        """
        results = run(body, 2)
        for missing, (status, out, errors) in zip((1, 0), results, strict=True):
            assert status == 0, errors
            assert out == (
                f"process {missing} of 2 did not come to the agreement where to stop, since it left the run.\n"
            )

    @pytest.mark.slow
    def test_runs_of_different_lengths_are_told(self):
        body = """
            from trainer.distributed.stop import CommonStop

            with CommonStop(lambda: None) as stop:
                for _ in range(2 + process):
                    stop.pass_point()
                try:
                    stop.finish()
                except Exception as error:
                    print(type(error).__name__, error)
        """
        results = run(body, 2)
        assert [status for status, _, _ in results] == [0, 0], results
        assert results[0][1] == (
            "DistributedError Process 0 ended its run at point 2, where another continued to point 3. Give all "
            "processes the same number of batches, and let none stop by itself.\n"
        )


LOADED = """
import tempfile
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import data
from trainer import Callback, make_mesh

class Stops(Callback):
    def on_epoch_end(self, trainer, epoch, logs):
        self.should_stop = process == 1

class Restored(Stops):
    def state_dict(self):
        return {"should_stop": self.should_stop}

    def load_state_dict(self, state):
        self.should_stop = state["should_stop"]

parts = [{name: column[process::2] for name, column in data(16).items()}] * 2
found = []
for kind in Restored, Stops:
    trainer = trainer_on(
        make_mesh({"data": 2}), tempfile.mkdtemp(), callbacks=[kind()], train_data_loader=parts
    )
    path = trainer.save_checkpoint(os.path.join(directory, f"{kind.__name__}.orbax"))
    trainer.train_epoch()
    found.append(trainer.should_stop)
    trainer.load_checkpoint(path)
    found.append(trainer.should_stop)
print(json.dumps(found))
barrier("done")
"""


@pytest.mark.slow
def test_a_checkpoint_takes_back_a_stop_in_all_processes_or_in_none(tmp_path):
    """A callback that the checkpoint does not restore still asks for it, in its own process, and all must agree."""
    results = run(f"directory = {str(tmp_path)!r}\n{LOADED}", 2)
    assert [status for status, _, _ in results] == [0, 0], results
    assert [json.loads(out.splitlines()[-1]) for _, out, _ in results] == [[True, False, True, True]] * 2


def test_one_process_watches_without_a_thread():
    before = threading.active_count()
    with Signals():
        assert threading.active_count() == before
