"""`InBackground`: order, limits, failures, and a server that stalls."""

import gc
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.request
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, ArgumentTypeError, InBackground, Logger, Trainer


class Gate(Logger):
    """Records what it gets, and waits at a gate before each call while that is closed."""

    def __init__(self, is_open=True):
        self.calls, self.threads, self.opened, self.entered = [], set(), threading.Event(), threading.Event()
        if is_open:
            self.opened.set()

    def _record(self, *call):
        self.entered.set()
        assert self.opened.wait(30)
        self.calls.append(call)
        self.threads.add(threading.current_thread())

    def log_scalars(self, scalars, step=None):
        self._record("scalars", step, scalars)

    def log_text(self, name, text, step=None):
        self._record("text", step, text)

    def log_image(self, name, image, step=None):
        self._record("image", step, image)

    def log_histogram(self, name, values, step=None):
        self._record("histogram", step, values)

    def log_hyperparams(self, params):
        self._record("hyperparams", params)

    def log_checkpoint(self, path, step):
        self._record("checkpoint", step, path)

    def rewind(self, step):
        self._record("rewind", step)

    def close(self):
        self._record("close")


def test_everything_arrives_in_order_from_one_other_thread():
    inner = Gate()
    logger = InBackground(inner)
    logger.log_hyperparams({"a": 1})
    logger.rewind(2)
    logger.log_scalar("loss", 1.0, 3)
    logger.log_scalars({"loss": 2.0}, 4)
    logger.log_text("note", "text", 4)
    logger.log_checkpoint("path", 4)
    logger.close()
    logger.close()
    assert inner.calls == [
        ("hyperparams", {"a": 1}),
        ("rewind", 2),
        ("scalars", 3, {"loss": 1.0}),
        ("scalars", 4, {"loss": 2.0}),
        ("text", 4, "text"),
        ("checkpoint", 4, "path"),
        ("close",),
    ]
    assert len(inner.threads) == 1
    assert threading.current_thread() not in inner.threads


def test_what_the_caller_changes_later_is_logged_as_it_was():
    inner = Gate(is_open=False)
    logger = InBackground(inner)
    image, scalars, weights = np.zeros((2, 2)), {"a": 1.0}, jnp.ones(3)
    logger.log_image("x", image, 1)
    logger.log_scalars(scalars, 1)
    logger.log_histogram("w", weights, 1)
    image += 1
    scalars["a"] = 2.0
    weights.delete()
    inner.opened.set()
    logger.close()
    np.testing.assert_array_equal(inner.calls[0][2], np.zeros((2, 2)))
    assert inner.calls[1] == ("scalars", 1, {"a": 1.0})
    np.testing.assert_array_equal(inner.calls[2][2], np.ones(3))


def test_the_oldest_calls_are_dropped_but_never_hyperparameters():
    inner = Gate(is_open=False)
    logger = InBackground(inner, max_calls=4)
    logger.log_scalar("loss", 0.0, 0)
    inner.entered.wait(30)  # that one is in hand, and the queue empty
    logger.log_hyperparams({"a": 1})
    for step in range(1, 11):
        logger.log_scalar("loss", 0.0, step)
    inner.opened.set()
    with pytest.warns(
        UserWarning, match=r"^of 12 calls of Gate, 7 were dropped since it did not keep up \(`max_calls`"
    ):
        logger.close()
    assert [call[1] for call in inner.calls[:-1]] == [0, {"a": 1}, 8, 9, 10]


def test_arrays_that_wait_have_a_bound():
    inner = Gate(is_open=False)
    logger = InBackground(inner, max_bytes=1000)
    logger.log_text("note", "first", 0)
    inner.entered.wait(30)
    for step in range(5):
        logger.log_histogram("w", np.zeros(50), step)  # 400 bytes
    logger.log_histogram("w", np.zeros(1000), 5)  # alone it may
    inner.opened.set()
    with pytest.warns(UserWarning, match="of 7 calls of Gate, 5 were dropped"):
        logger.close()
    assert [call[1] for call in inner.calls[:-1]] == [0, 5]


def test_rows_that_waited_go_together_to_a_logger_that_takes_them():
    class Rows(Gate):
        def log_rows(self, rows):
            self._record("rows", [(step, dict(scalars)) for _, scalars, step in rows])
            assert all(abs(when - time.time()) < 60 for when, *_ in rows)

    inner = Rows(is_open=False)
    logger = InBackground(inner)
    logger.log_text("note", "first", 0)
    inner.entered.wait(30)
    for step in (1, 2, 3):
        logger.log_scalar("loss", 1.0, step)
    logger.log_text("note", "second", 3)
    logger.log_scalar("loss", 1.0, 4)
    inner.opened.set()
    logger.close()
    assert [call[:2] for call in inner.calls] == [
        ("text", 0),
        ("rows", [(1, {"loss": 1.0}), (2, {"loss": 1.0}), (3, {"loss": 1.0})]),
        ("text", 3),
        ("rows", [(4, {"loss": 1.0})]),
        ("close",),
    ]


class Broken(Gate):
    def __init__(self):
        super().__init__()
        self.taken = threading.Semaphore(0)

    def log_scalars(self, scalars, step=None):
        super().log_scalars(scalars, step)
        self.taken.release()
        if step % 2:
            raise ConnectionError(f"at {step}")


def test_a_failure_is_raised_by_the_next_call_once_and_counted_at_the_end():
    inner = Broken()
    logger = InBackground(inner)
    raised = []
    for step in range(1, 7):
        try:
            logger.log_scalar("loss", 1.0, step)
        except ConnectionError as error:
            raised.append(str(error))
        assert inner.taken.acquire(timeout=30)
    assert raised == ["at 1"]
    with pytest.warns(
        UserWarning, match=r"^of 6 calls of Broken, 3 failed, the first with ConnectionError\('at 1'\).$"
    ):
        logger.close()
    assert [call[1] for call in inner.calls[:-1]] == [1, 2, 3, 4, 5, 6]  # also that at which the failure was raised


def test_a_logger_that_fails_to_close_is_said():
    class NoClose(Logger):
        def close(self):
            raise OSError("no close")

    logger = InBackground(NoClose())
    logger.log_text("note", "text")
    with pytest.warns(UserWarning, match=r"of 1 calls of NoClose, 0 failed, the first with OSError\('no close'\)"):
        logger.close()


def test_closing_waits_for_a_bounded_time():
    inner = Gate(is_open=False)
    logger = InBackground(inner, close_timeout=0.2)
    for step in range(5):
        logger.log_scalar("loss", 1.0, step)
    start = time.monotonic()
    said = r"^of 5 calls of Gate, 5 were not sent within 0.2 s \(`close_timeout`\).$"
    with pytest.warns(UserWarning, match=said):
        logger.close()
    assert time.monotonic() - start < 5
    inner.opened.set()
    logger._thread.join(30)
    assert [call[:2] for call in inner.calls] == [("scalars", 0), ("close",)]  # the rest was given up


def test_a_closed_logger_takes_nothing_and_one_without_calls_is_closed_at_once():
    inner = Gate()
    logger = InBackground(inner)
    logger.close()
    assert inner.calls == [("close",)]
    with pytest.raises(ArgumentError, match=r"log_text of a closed InBackground\(Gate\); make a new one"):
        logger.log_text("note", "text")


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"logger": Gate}, ArgumentTypeError, r"`logger` is the class Gate; pass an instance, Gate\(…\)"),
        ({"logger": 3}, ArgumentTypeError, "`logger` is of type int; it must have the methods of trainer.Logger"),
        ({"max_calls": 0}, ArgumentError, "`max_calls` is 0; it must be a positive integer"),
        ({"max_bytes": 0.5}, ArgumentTypeError, "`max_bytes` is 0.5 of type float"),
        ({"close_timeout": 0}, ArgumentError, "`close_timeout` is 0; it must be a positive number of seconds"),
        ({"close_timeout": "1"}, ArgumentError, "`close_timeout` is '1'"),
    ],
)
def test_bad_input_is_refused_by_name(how, error, text):
    with pytest.raises(error, match=text):
        InBackground(**{"logger": Gate(), **how})


def test_an_interpreter_that_exits_sends_what_waits(tmp_path):
    code = f"""
import time
from trainer import InBackground, FileLogger

class Slow(FileLogger):
    def log_scalars(self, scalars, step=None):
        time.sleep(0.05)
        super().log_scalars(scalars, step)

logger = InBackground(Slow({str(tmp_path / "log.jsonl")!r}))
for step in range(5):
    logger.log_scalar("loss", 1.0, step)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_nothing_is_kept_for_the_exit_after_closing():
    logger = InBackground(Gate())
    logger.log_text("note", "text")
    logger.close()
    alive = weakref.ref(logger)
    del logger
    gc.collect()
    assert alive() is None


@pytest.fixture
def stalling_server():
    """A server on 127.0.0.1 that takes requests and answers none until the test is over."""
    over, requests = threading.Event(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            over.wait(60)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *about):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests, over
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Posting(Logger):
    """Posts each row, as a logger of somebody's own server does."""

    def __init__(self, url):
        self.url = url

    def log_scalars(self, scalars, step=None):
        body = json.dumps({"step": step, **scalars}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url, data=body, method="POST"), timeout=60) as answer:
            answer.read()


def test_a_server_that_stalls_does_not_slow_the_steps(stalling_server):
    url, requests, over = stalling_server
    logger = InBackground(Posting(url), close_timeout=0.1)
    trainer = Trainer(Linear(4), config(log_frequency=1), loss_fn=squared_error, logger=logger)
    start = time.monotonic()
    trainer.train(regression(400), 5, 4)  # 500 rows and more, each of which would wait for ever
    trainer.close()
    for step in range(501, 1501):
        logger.log_scalar("loss", 1.0, step)
    assert time.monotonic() - start < 30
    assert [request["step"] for request in requests] in ([], [1])
    with pytest.warns(UserWarning, match=r"of 15\d\d calls of Posting, 15\d\d were not sent within 0.1 s"):
        logger.close()
    over.set()
    logger._thread.join(30)


def test_a_server_that_is_gone_is_said_once():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    logger = InBackground(Posting(url))
    trainer = Trainer(Linear(4), config(log_frequency=1), loss_fn=squared_error, logger=logger)
    with pytest.warns(UserWarning, match=r"InBackground\(Posting\) failed in .*refused") as warned:
        trainer.train(regression(80), 5, 4)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=r"calls of Posting, \d+ failed, the first with URLError"):
        logger.close()
