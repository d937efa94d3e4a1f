"""Files that are there as a whole or not at all: every system call is made to fail once."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest

from trainer.checkpoints import atomic
from trainer.checkpoints.atomic import replacing, sweep

CALLS = ("open", "posix_fallocate", "write", "fsync", "replace", "close")


def write(path, data=b"new", size=None):
    with replacing(path, len(data) if size is None else size) as file:
        file.write(data)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_new_file_and_one_over_an_old_one(tmp_path):
    path = tmp_path / "a"
    write(path, b"old")
    write(path, b"new")
    assert contents(tmp_path) == {"a": b"new"}


def test_nothing_is_there_before_the_end(tmp_path):
    path = tmp_path / "a"
    with replacing(path, 3) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_caller_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a"
    write(path, b"old")
    with pytest.raises(error), replacing(path, 3):
        raise error
    assert contents(tmp_path) == {"a": b"old"}


class Faults:
    """Makes the n-th of the watched system calls fail, and counts them."""

    def __init__(self, monkeypatch, code, nth):
        self.calls = []
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name), code, nth))

    def wrap(self, name, original, code, nth):
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == nth:
                if name == "close":
                    original(*args, **kwargs)
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINTR])
def test_whichever_call_fails_the_old_file_or_the_new_one_is_there(tmp_path, monkeypatch, code):
    path = tmp_path / "a"
    order = ["open", "posix_fallocate", "write", "fsync", "replace", "close", "open", "fsync", "close"]
    for nth in range(1, len(order) + 2):
        write(path, b"old")
        failure = None
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            faults = Faults(patch, code, nth)
            try:
                write(path, b"new")
            except OSError as error:
                failure = error.errno
        # What fails after the replacement finds the new file in place, and says what may yet be lost.
        replaced = nth > order.index("replace") + 1
        assert contents(tmp_path) == {"a": b"new" if replaced else b"old"}
        assert failure == (None if replaced else code)
        assert ["could not be flushed to the disk" in str(w.message) for w in warned] == [True] * (7 <= nth <= 9)
    assert faults.calls == order


def test_short_writes_are_completed(tmp_path, monkeypatch):
    original = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: original(descriptor, data[:3]))
    write(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_a_file_system_that_cannot_reserve_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(tmp_path / "a")
    monkeypatch.delattr(os, "posix_fallocate")
    write(tmp_path / "b")
    assert contents(tmp_path) == {"a": b"new", "b": b"new"}


def test_a_disk_that_is_full_is_found_out_before_a_byte_is_written(tmp_path):
    write(tmp_path / "a", b"old")
    code = f"""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        from pathlib import Path
        from trainer.checkpoints.atomic import replacing
        try:
            with replacing(Path({str(tmp_path / "a")!r}), 10_000) as file:
                print("opened")
        except OSError as error:
            print(error.errno)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG)]
    assert contents(tmp_path) == {"a": b"old"}


def test_a_link_stays_and_what_it_refers_to_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_others_may_read_it_as_far_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_system_without_directory_handles(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY")
    write(tmp_path / "a")
    assert contents(tmp_path) == {"a": b"new"}


class TestDebris:
    name = ".a.0123456789abcdef.tmp"

    def test_what_a_killed_writer_left_is_removed_by_the_next(self, tmp_path):
        code = f"""
            import os, signal
            from pathlib import Path
            from trainer.checkpoints.atomic import replacing
            with replacing(Path({str(tmp_path / "a")!r}), 3) as file:
                file.write(b"new")
                os.kill(os.getpid(), signal.SIGKILL)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
        assert done.returncode == -9
        assert len(contents(tmp_path)) == 1
        write(tmp_path / "b")
        assert contents(tmp_path) == {"b": b"new"}

    def test_what_somebody_is_writing_stays(self, tmp_path):
        with replacing(tmp_path / "a", 3) as file:
            write(tmp_path / "b")
            file.write(b"new")
        assert contents(tmp_path) == {"a": b"new", "b": b"new"}

    def test_nothing_else_is_touched(self, tmp_path):
        for name in (".a.tmp", "a.0123456789abcdef.tmp", ".a.0123456789abcdeX.tmp", "b"):
            (tmp_path / name).write_text("mine")
        (tmp_path / self.name).write_text("")
        sweep(tmp_path)
        assert len(contents(tmp_path)) == 4

    def test_a_file_that_was_swept_before_it_was_locked_is_made_again(self, tmp_path, monkeypatch):
        original, swept = atomic.fcntl.flock, []

        def late(descriptor, operation):
            if not swept:
                swept.append(next(tmp_path.glob(".a.*.tmp")))
                swept[0].unlink()
            return original(descriptor, operation)

        monkeypatch.setattr(atomic.fcntl, "flock", late)
        write(tmp_path / "a")
        assert contents(tmp_path) == {"a": b"new"}


def test_writers_at_the_same_time_never_mix(tmp_path):
    path = tmp_path / "a"
    texts = [bytes([letter]) * 50_000 for letter in b"abc"]
    write(path, texts[0])

    def keep_writing(text):
        for _ in range(20):
            write(path, text)

    threads = [threading.Thread(target=keep_writing, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in texts
    assert list(contents(tmp_path)) == ["a"]
