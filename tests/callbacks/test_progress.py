"""`Progress`: what a terminal and a file get of a run."""

import io
from types import SimpleNamespace

from trainer import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def show(stream, times, num_batches_per_epoch=3):
    """Runs a display through one batch at each of the times, in seconds since the start."""
    clock = Clock()
    progress = Progress(stream, clock=clock)
    trainer = SimpleNamespace(epoch=0, step=0, is_primary_process=True)
    for i, time in enumerate(times):
        if i % num_batches_per_epoch == 0:
            trainer.epoch = i // num_batches_per_epoch
            progress.on_epoch_begin(trainer, trainer.epoch)
        clock.now = 100.0 + time
        trainer.step = i + 1
        progress.on_call_end(trainer, trainer.step, {"step": i + 1, "loss": float(i + 1)})
        if (i + 1) % num_batches_per_epoch == 0:
            progress.on_epoch_end(trainer, trainer.epoch, {"loss": 0.5})
    return stream.getvalue()


def test_a_file_gets_whole_lines_only():
    assert show(io.StringIO(), [0.5, 1.0, 2.0, 3.0, 4.0, 5.25]) == (
        "epoch 1  step 3  loss 0.5  2.0 s\nepoch 2  step 6  loss 0.5  3.2 s\n"
    )


def test_a_terminal_shows_the_metrics_of_the_step_before():
    assert show(Terminal(), [1.0, 2.0, 3.0]) == (
        "epoch 1  step 1  1.0 s\r"
        "epoch 1  step 2  loss 1  2.0 s\r"
        "epoch 1  step 3  loss 2  3.0 s\r"
        "epoch 1  step 3  loss 0.5  3.0 s\n"
    )


def test_a_terminal_is_drawn_at_most_ten_times_a_second():
    drawn = show(Terminal(), [i * 0.03 for i in range(100)], num_batches_per_epoch=1000).split("\r")[:-1]
    seconds = [float(line.split()[-2]) for line in drawn]
    # 0.0, then every fourth batch.
    assert len(drawn) == 25
    assert seconds == [round(4 * i * 0.03, 1) for i in range(25)]


def test_a_shorter_line_wipes_a_longer_one():
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, clock=clock)
    trainer = SimpleNamespace(epoch=0, step=9, is_primary_process=True)
    progress.on_epoch_begin(trainer, 0)
    metrics = {f"a_long_name_{i}": 0.123456 for i in range(9)}
    for logs in (metrics, {}, {}):
        clock.now += 1.0
        progress.on_call_end(trainer, 9, logs)
    progress.on_epoch_end(trainer, 0, {})
    _, long, short, last = stream.getvalue().split("\r")
    assert len(long) > 200
    assert len(short) == len(long)
    assert (short.rstrip(), last) == ("epoch 1  step 9  3.0 s", "epoch 1  step 9  3.0 s\n")


def test_progress_goes_to_standard_error_by_default(capsys):
    progress = Progress(clock=Clock())
    progress.on_epoch_begin(None, 0)
    progress.on_epoch_end(SimpleNamespace(step=4, is_primary_process=True), 0, {"step": 4, "loss": 1.0})
    assert capsys.readouterr() == ("", "epoch 1  step 4  loss 1  0.0 s\n")
