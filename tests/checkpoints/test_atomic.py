"""Files that are there as a whole or not at all: every system call is made to fail once."""

import errno
import os
import stat
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest

from trainer.checkpoints import atomic
from trainer.checkpoints.atomic import NewDirectory, locked, remove, replacing, restore, sweep
from trainer.checkpoints.listing import Written, keep_aside

CALLS = ("open", "posix_fallocate", "write", "fsync", "chmod", "replace", "close")
CALLS_OF_DIRECTORIES = ("mkdir", "open", "fsync", "chmod", "rename", "unlink", "rmdir", "close")


def write(path, data=b"new", size=None, **options):
    with replacing(path, len(data) if size is None else size, **options) as file:
        file.write(data)


def write_directory(path, data=b"new"):
    new = NewDirectory(path)
    (new.temporary / "file").write_bytes(data)
    new.commit()


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

    def __init__(self, monkeypatch, code, nth, names=CALLS):
        self.calls = []
        for module, name in [*((os, name) for name in names), (atomic.fcntl, "flock")]:
            monkeypatch.setattr(module, name, self.wrap(name, getattr(module, name), code, nth))

    def wrap(self, name, original, code, nth):
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == nth:
                if name == "close":
                    original(*args, **kwargs)
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        return call


BEFORE = ["open", "flock", "posix_fallocate", "write", "fsync", "chmod"]
AFTER = ["open", "fsync", "close"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINTR])
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, [*BEFORE, "replace", "close", *AFTER]),
        ({"claim": lambda: None}, [*BEFORE, "open", "flock", "replace", "close", "close", *AFTER]),
    ],
    ids=["plain", "claimed"],
)
def test_whichever_call_fails_the_old_file_or_the_new_one_is_there(tmp_path, monkeypatch, code, options, order):
    path = tmp_path / "a"
    for nth in range(1, len(order) + 2):
        write(path, b"old")
        failure = None
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            faults = Faults(patch, code, nth)
            try:
                write(path, b"new", **options)
            except OSError as error:
                failure = error.errno
        # A lock that fails is taken for one that the file system has not. What fails after the replacement finds the
        # new file in place, and says what may yet be lost.
        replaced = nth > order.index("replace") + 1 or order[nth - 1] == "flock"
        assert contents(tmp_path) == {"a": b"new" if replaced else b"old"}
        assert failure == (None if replaced else code)
        flushing = len(order) - len(AFTER) < nth <= len(order)
        assert ["could not be flushed to the disk" in str(w.message) for w in warned] == [True] * flushing
    assert faults.calls == order


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINTR])
@pytest.mark.parametrize("options", [{}, {"claim": lambda: None}], ids=["plain", "claimed"])
def test_whichever_call_fails_the_old_directory_or_the_new_one_is_there(tmp_path, monkeypatch, code, options):
    path = tmp_path / "a"
    nth, failed, seen = 1, 0, {"mkdir", "flock"}
    while True:
        write_directory(path, b"old")
        failure = new = None
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what could not be flushed
            faults = Faults(patch, code, nth, CALLS_OF_DIRECTORIES)
            try:
                new = NewDirectory(path, **options)
                (new.temporary / "file").write_bytes(b"new")
                new.commit()
            except OSError as error:
                failure = error.errno
                if new is not None:
                    new.discard()
        assert (path / "file").read_bytes() == (b"new" if failure is None else b"old"), faults.calls
        assert failure in (None, code)
        failed += failure is not None
        write_directory(path, b"next")
        assert os.listdir(tmp_path) == ["a"]  # nothing that failed keeps its place
        if len(faults.calls) < nth:
            break
        seen.add(faults.calls[nth - 1])
        nth += 1
    assert failed >= 5
    assert seen >= set(CALLS_OF_DIRECTORIES)


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


def test_what_is_replaced_passes_its_permissions_on(tmp_path):
    write(tmp_path / "a", b"old")
    for mode in (0o600, 0o664, 0o444):
        (tmp_path / "a").chmod(mode)
        with replacing(tmp_path / "a", 3) as file:
            file.write(b"new")
            (temporary,) = tmp_path.glob(".a.*.tmp")
            assert temporary.stat().st_mode & 0o077 == 0
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_a_system_without_directory_handles(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY")
    write(tmp_path / "a")
    assert contents(tmp_path) == {"a": b"new"}


class TestDebris:
    name = ".a.0123456789abcdef.nnx-trainer.tmp"

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

    @pytest.mark.parametrize("kind", ["fifo", "directory with a fifo", "link", "dangling link", "link to a directory"])
    @pytest.mark.parametrize("ending", ["tmp", "old"])
    def test_what_is_no_file_neither_hangs_nor_fails_a_save_and_stays(self, kind, ending, tmp_path):
        path = tmp_path / self.name.replace("tmp", ending)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_text("mine")
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "directory with a fifo":
                path.mkdir()
                os.mkfifo(path / ".lock")
            case "link":
                path.symlink_to(tmp_path / "elsewhere" / "file")
            case "dangling link":
                path.symlink_to(tmp_path / "nowhere")
            case "link to a directory":
                path.symlink_to(tmp_path / "elsewhere")
        write(tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"new"
        assert os.path.lexists(path)
        assert (tmp_path / "elsewhere" / "file").read_text() == "mine"

    def test_nothing_else_is_touched(self, tmp_path):
        others = (".a.tmp", ".a.0123456789abcdef.tmp", self.name[1:], self.name.replace("f", "X"), "b")
        for name in others:
            (tmp_path / name).write_text("mine")
        (tmp_path / self.name).write_text("")
        sweep(tmp_path)
        assert set(contents(tmp_path)) == set(others)

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

    @pytest.mark.parametrize("make", [write, write_directory])
    def test_a_temporary_that_a_sweep_has_locked_is_made_again(self, make, tmp_path, monkeypatch):
        original, refused = atomic.fcntl.flock, []

        def late(descriptor, operation):
            if not refused:
                refused.append(descriptor)
                raise BlockingIOError(errno.EWOULDBLOCK, "locked")
            return original(descriptor, operation)

        monkeypatch.setattr(atomic.fcntl, "flock", late)
        before = os.listdir("/dev/fd")
        make(tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]
        assert len(os.listdir("/dev/fd")) == len(before)

    def test_a_directory_whose_removal_was_cut_short_is_removed(self, tmp_path):
        (tmp_path / self.name / "state").mkdir(parents=True)
        (tmp_path / self.name / "state" / "d").write_text("")
        sweep(tmp_path)
        assert os.listdir(tmp_path) == []

    def test_what_was_about_to_be_replaced_gets_its_name_back_unless_that_is_taken(self, tmp_path):
        for name in ("a", "b"):
            write_directory(tmp_path / name, b"old")
            os.rename(tmp_path / name, tmp_path / f".{name}.0123456789abcdef.nnx-trainer.old")
        write_directory(tmp_path / "b", b"new")
        assert {name: (tmp_path / name / "file").read_bytes() for name in os.listdir(tmp_path)} == {
            "a": b"old",
            "b": b"new",
        }


class TestWithoutLocks:
    """Some network file systems have none: NFS without its lock daemon, Lustre, Cray DVS."""

    @pytest.fixture(autouse=True, params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524])
    def no_locks(self, request, monkeypatch):
        def refuse(descriptor, operation):
            raise OSError(request.param, "no locks")

        monkeypatch.setattr(atomic.fcntl, "flock", refuse)

    @pytest.mark.parametrize("make", [write, write_directory])
    def test_writing_takes_one_temporary_and_leaves_nothing(self, make, tmp_path):
        before = len(os.listdir("/dev/fd"))
        for _ in range(3):
            make(tmp_path / "a")
            assert os.listdir(tmp_path) == ["a"]
        assert len(os.listdir("/dev/fd")) == before

    def test_what_was_about_to_be_replaced_gets_its_name_back(self, tmp_path):
        aside = ".a.0123456789abcdef.nnx-trainer.old"
        write_directory(tmp_path / aside, b"old")
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["a"]
        os.rename(tmp_path / "a", tmp_path / aside)
        write_directory(tmp_path / "a", b"new")  # sweeps first, and replaces what got its name back
        assert (tmp_path / "a" / "file").read_bytes() == b"new"

    def test_a_writer_whose_old_directory_got_its_name_back_meanwhile_replaces_it(self, tmp_path, monkeypatch):
        write_directory(tmp_path / "a", b"old")
        new, original, seen = NewDirectory(tmp_path / "a"), os.rename, []
        (new.temporary / "file").write_bytes(b"new")

        def rename(source, target):
            if source == new.temporary and len(seen) < 2:
                seen.append(target)
                monkeypatch.setattr(os, "rename", original)
                restore(tmp_path)  # a reader in another process
                monkeypatch.setattr(os, "rename", rename)
            original(source, target)

        monkeypatch.setattr(os, "rename", rename)
        new.commit()
        assert len(seen) == 2
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a" / "file").read_bytes() == b"new"

    def test_what_was_replaced_does_not_come_back(self, tmp_path):
        aside = tmp_path / ".a.0123456789abcdef.nnx-trainer.old"
        write_directory(aside, b"old")  # by a writer that was killed after both renames
        write_directory(tmp_path / "a", b"new")
        assert os.listdir(tmp_path) == ["a"]
        remove(tmp_path / "a")
        sweep(tmp_path)
        assert "a" not in os.listdir(tmp_path)

    def test_nothing_is_swept(self, tmp_path):
        (tmp_path / TestDebris.name).write_text("perhaps of a living process")
        write(tmp_path / "a")
        assert len(contents(tmp_path)) == 2


class TestTheLockOfADirectory:
    """Another process waits for it at most half a second, and a large checkpoint takes longer to remove."""

    @pytest.fixture
    def removed(self, tmp_path, monkeypatch):
        """The names of what was removed while nobody held the lock."""
        original, removed = atomic._remove, []

        def remove_later(path):
            descriptor = os.open(tmp_path, os.O_RDONLY)
            atomic.fcntl.flock(descriptor, atomic.fcntl.LOCK_EX | atomic.fcntl.LOCK_NB)
            os.close(descriptor)
            removed.append(path.name)
            original(path)

        monkeypatch.setattr(atomic, "_remove", remove_later)
        return removed

    def test_it_is_released_before_contents_are_removed(self, removed, tmp_path):
        write(tmp_path / "file")
        write_directory(tmp_path / "directory")
        with locked(tmp_path):
            for name in ("file", "directory", "absent"):
                remove(tmp_path / name)
            assert not any((tmp_path / name).exists() for name in ("file", "directory"))
        assert [name.split(".")[1] for name in removed] == ["file", "directory"]
        assert os.listdir(tmp_path) == []
        write(tmp_path / "file")
        remove(tmp_path / "file")
        assert os.listdir(tmp_path) == []

    def test_so_it_is_where_a_save_replaces_and_renames(self, removed, tmp_path):
        for name in ("7", "7.0123456789abcdef"):
            write_directory(tmp_path / name, b"old")
        new = NewDirectory(tmp_path / "7", lambda: keep_aside(tmp_path / "7", "0123456789abcdef"))
        new.commit()
        new = NewDirectory(tmp_path / "7", lambda: None)
        (new.temporary / "file").write_bytes(b"newer")
        new.commit()
        assert len(removed) == 2
        assert sorted(os.listdir(tmp_path)) == ["7", "7.0123456789abcdef"]
        assert (tmp_path / "7" / "file").read_bytes() == b"newer"

    def test_so_it_is_where_old_checkpoints_are_removed(self, removed, tmp_path):
        written = Written(tmp_path)
        for step in range(3):
            write(tmp_path / f"checkpoint_{step}.msgpack")
            write_directory(tmp_path / f"checkpoint_{step}.orbax")
            for suffix in ("msgpack", "orbax"):
                written.add(f"checkpoint_{step}.{suffix}", "a run")
        written.prune(2)
        assert len(removed) == 4
        assert sorted(os.listdir(tmp_path)) == ["checkpoint_2.msgpack", "checkpoint_2.orbax"]


class TestDirectories:
    def test_one_that_is_replaced_passes_its_permissions_on(self, tmp_path):
        write_directory(tmp_path / "a")
        (tmp_path / "a").chmod(0o750)
        write_directory(tmp_path / "a", b"newer")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750

    def test_one_that_cannot_be_made_leaves_nothing(self, tmp_path, monkeypatch):
        original = os.open

        def full(path, *arguments, **options):
            if str(path).endswith(".lock"):
                raise OSError(errno.ENOSPC, "no space")
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, "open", full)
        with pytest.raises(OSError, match="no space"):
            NewDirectory(tmp_path / "a")
        assert os.listdir(tmp_path) == []

    def test_an_old_one_stays_if_the_new_one_cannot_have_its_name(self, tmp_path, monkeypatch):
        write_directory(tmp_path / "a", b"old")
        new, original = NewDirectory(tmp_path / "a"), os.rename

        def fail(source, target):
            if source == new.temporary:
                raise OSError(errno.EIO, "broken")
            original(source, target)

        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="broken"):
            new.commit()
        new.discard()
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a" / "file").read_bytes() == b"old"


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
