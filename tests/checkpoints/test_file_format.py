"""The file format: what is written comes back, and nothing else is taken for it."""

import os
import random
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash

from trainer import CheckpointError
from trainer.checkpoints.file_format import DTYPES, END, MAGIC, Bundle, Leaf, write_bundle

GOLDEN = Path(__file__).parent / "golden"


def arrays():
    return {
        ("params", "layers", 0, "kernel"): np.arange(6, dtype=np.float32).reshape(2, 3),
        ("params", "layers", 10, "bias"): np.zeros((0, 3), np.float32),
        ("step",): np.array(7, np.int32),
        ("model_state", "a/b"): np.array([1.5, -0.0, np.nan], DTYPES["bfloat16"]),
    }


def leaf_of(path, array, **changes):
    return Leaf(path, changes.pop("dtype", array.dtype.name), array.shape, **changes)


def write(path, values=None, info=None):
    values = arrays() if values is None else values
    write_bundle(path, info or {"step": 7}, [(leaf_of(p, a), lambda a=a: a) for p, a in values.items()])
    return path


def read(path):
    with Bundle(path) as bundle:
        bundle.verify()
        return bundle.info, {leaf.path: bundle.read(leaf) for leaf in bundle.leaves}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


class TestRoundTrip:
    def test_everything_comes_back_in_order(self, tmp_path):
        info, values = read(write(tmp_path / "a"))
        assert info == {"step": 7}
        assert list(values) == list(arrays())
        assert all(same(values[path], array) for path, array in arrays().items())

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    @pytest.mark.parametrize("shape", [(), (0, 4), (1,), (3, 5)], ids=str)
    def test_every_dtype_and_shape(self, dtype, shape, tmp_path):
        count = int(np.prod(shape))
        array = np.arange(count).reshape(shape).astype(np.float64).astype(DTYPES[dtype])
        assert same(read(write(tmp_path / "a", {("x",): array}))[1]["x",], array)

    @pytest.mark.parametrize(
        "array",
        [
            np.arange(12).reshape(3, 4).T,
            np.arange(12)[::2],
            np.asfortranarray(np.arange(12.0).reshape(3, 4)),
            np.arange(5, dtype=">i4"),
            np.frombuffer(b"\x01\x00\xc0\x7f", np.float32),
        ],
        ids=["transposed", "strided", "fortran", "big-endian", "nan payload"],
    )
    def test_arrays_of_every_memory_layout(self, array, tmp_path):
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        assert same(read(write(tmp_path / "a", {("x",): array}))[1]["x",], native)

    def test_arrays_are_aligned_and_their_own(self, tmp_path):
        values = {("x",): np.arange(1000, dtype=np.float32), ("y",): np.arange(3, dtype=np.int8)}
        for array in read(write(tmp_path / "a", values))[1].values():
            assert array.ctypes.data % 64 == 0
            assert array.flags.writeable

    def test_paths_that_look_alike_stay_apart(self, tmp_path):
        values = {path: np.array(i) for i, path in enumerate([("a", "b"), ("a/b",), ("a", 0), ("a", "0"), ("",)])}
        assert {path: int(array) for path, array in read(write(tmp_path / "a", values))[1].items()} == {
            path: i for i, path in enumerate(values)
        }

    def test_no_arrays_at_all(self, tmp_path):
        assert read(write(tmp_path / "a", {("x",): np.zeros(0)}))[1]["x",].size == 0

    def test_information_of_every_plain_kind(self, tmp_path):
        info = {"a": [1, 2.5, None, True, "ü"], "b": {"c": -1}, "path": Path("x")}
        assert read(write(tmp_path / "a", info=info))[0] == info


class TestRefusedWhenWriting:
    def test_two_arrays_with_one_path(self, tmp_path):
        leaf = leaf_of(("x",), np.zeros(1))
        with pytest.raises(ValueError, match="two arrays of the state have the same path"):
            write_bundle(tmp_path / "a", {}, [(leaf, lambda: np.zeros(1))] * 2)

    def test_a_header_that_is_too_long(self, tmp_path):
        with pytest.raises(ValueError, match=r"the header takes 1677\d+ bytes, more than 16 MiB"):
            write(tmp_path / "a", info={"text": "x" * (16 * 2**20)})

    def test_an_array_that_is_not_what_was_announced(self, tmp_path):
        with pytest.raises(ValueError, match="`x` has 16 bytes where 8 were announced"):
            write_bundle(tmp_path / "a", {}, [(leaf_of(("x",), np.zeros(1)), lambda: np.zeros(2))])
        assert list(tmp_path.iterdir()) == []


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


class TestDamage:
    def test_every_single_bit(self, tmp_path):
        path = write(tmp_path / "a", {("x",): np.arange(3, dtype=np.int8), ("y",): np.float32(1).reshape(1)})
        good = path.read_bytes()
        for position in range(len(good)):
            for bit in range(8):
                bad = bytearray(good)
                bad[position] ^= 1 << bit
                path.write_bytes(bad)
                with pytest.raises(CheckpointError):
                    read(path)

    def test_every_truncation(self, tmp_path):
        path = write(tmp_path / "a")
        good = path.read_bytes()
        for length in range(len(good)):
            path.write_bytes(good[:length])
            refused(path)

    def test_bytes_behind_the_end(self, tmp_path):
        path = write(tmp_path / "a")
        good = path.read_bytes()
        for more in (b"\0", good):
            path.write_bytes(good + more)
            assert f"it has {len(good + more)} bytes where {len(good)} were written" in refused(path)

    def test_a_damaged_array_is_named(self, tmp_path):
        path = write(tmp_path / "a")
        data = bytearray(path.read_bytes())
        data[data.index(np.arange(6, dtype=np.float32).tobytes()) + 5] ^= 1
        path.write_bytes(data)
        assert "is damaged: the checksum of `params/layers/0/kernel` is " in refused(path)

    def test_a_file_that_shrinks_while_it_is_read(self, tmp_path):
        path = write(tmp_path / "a", {("x",): np.arange(10_000)})
        with Bundle(path) as bundle:
            os.truncate(path, 4096)
            with pytest.raises(CheckpointError, match="it became shorter while `x` was read"):
                bundle.read(bundle.leaves[0])


class TestOtherThings:
    def test_a_missing_file(self, tmp_path):
        assert "could not be read: [Errno 2]" in refused(tmp_path / "a")

    def test_a_directory(self, tmp_path):
        assert "could not be read: [Errno 21]" in refused(tmp_path)

    def test_a_pipe_that_nobody_writes_to(self, tmp_path):
        os.mkfifo(tmp_path / "a")
        assert "is no regular file" in refused(tmp_path / "a")

    def test_a_loop_of_links(self, tmp_path):
        (tmp_path / "a").symlink_to("a")
        assert "could not be read: [Errno 40]" in refused(tmp_path / "a")

    @pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04", MAGIC[:-1], b"x" * 1000])
    def test_other_content(self, tmp_path, content):
        (tmp_path / "a").write_bytes(content)
        assert "is no checkpoint of this library" in refused(tmp_path / "a")

    def test_a_failing_disk(self, tmp_path, monkeypatch):
        original, path = Bundle._read_at, write(tmp_path / "a")

        def fail(bundle, offset, length):
            if offset:
                raise OSError(5, "Input/output error")
            return original(bundle, offset, length)

        monkeypatch.setattr(Bundle, "_read_at", fail)
        assert "could not be read: [Errno 5]" in refused(path)


def forge(path, *, header=None, length=None, major=1, minor=0, flags=0, checksum=b"xxh3-64", data_start=None):
    """Rewrites the first bytes of a file with checksums that agree, as an attacker would."""
    data = path.read_bytes()
    old_length, old_start = struct.unpack_from("<QQ", data, 16)
    header = data[64 : 64 + old_length] if header is None else header
    start = -(-(64 + len(header)) // 64) * 64 if data_start is None else data_start
    body = data[old_start:]
    padding = bytes(min(max(start - 64 - len(header), 0), 64))
    total = 64 + len(header) + len(padding) + len(body)
    head = struct.pack(
        "<8sHHIQQQQ8s",
        MAGIC,
        major,
        minor,
        flags,
        len(header),
        start,
        total if length is None else length,
        xxhash.xxh3_64_intdigest(header),
        checksum,
    )
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    path.write_bytes(head + header + padding + body)
    return path


def header_of(path):
    data = path.read_bytes()
    return msgpack.unpackb(data[64 : 64 + struct.unpack_from("<Q", data, 16)[0]])


class TestForgeries:
    """Bytes with checksums that agree, made to mislead."""

    def test_the_forger_can_forge(self, tmp_path):
        assert read(forge(write(tmp_path / "a")))[0] == {"step": 7}

    def test_a_newer_minor_version_is_read(self, tmp_path):
        path = write(tmp_path / "a", info={"step": 7, "hitherto unknown": 1})
        assert read(forge(path, minor=9))[0]["step"] == 7

    @pytest.mark.parametrize("change", [{"major": 2}, {"flags": 1}, {"checksum": b"sha-9"}, {"checksum": b"\xff" * 8}])
    def test_a_newer_major_version_is_refused(self, tmp_path, change):
        message = refused(forge(write(tmp_path / "a"), **change))
        assert "this release reads 1.x with 'xxh3-64'. It was written by a newer release of nnx-trainer." in message

    @pytest.mark.parametrize("change", [{"length": 2**63}, {"data_start": 2**62}, {"data_start": 0}])
    def test_places_that_cannot_be(self, tmp_path, change):
        assert "is damaged" in refused(forge(write(tmp_path / "a"), **change))

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "O"},
            {"dtype": "V8"},
            {"dtype": "f4,f4"},
            {"dtype": "datetime64"},
            {"dtype": 4},
            {"shape": [2**62, 4]},
            {"shape": [-1, 6]},
            {"shape": [2.0, 3]},
            {"shape": [True, 6]},
            {"shape": [1] * 65},
            {"shape": None},
            {"path": []},
            {"path": ["a"] * 129},
            {"path": [None]},
            {"path": "params"},
            {"key": 5},
            {"offset": 64},
            {"offset": -64},
            {"offset": True},
            {"size": 2**63},
            {"size": 0},
            {"more": 1},
        ],
        ids=str,
    )
    def test_descriptions_that_make_no_sense(self, tmp_path, change):
        path = write(tmp_path / "a")
        header = header_of(path)
        header["leaves"][0].update(change)
        assert "is damaged" in refused(forge(path, header=msgpack.packb(header)))

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"\xc1",
            msgpack.packb([]),
            msgpack.packb({}),
            msgpack.packb({"info": [], "leaves": []}),
            msgpack.packb({"info": {}, "leaves": {}}),
            msgpack.packb({"info": {}, "leaves": [], "more": 1}),
            msgpack.packb({"info": {1: 2}, "leaves": []}),
            msgpack.packb({"info": {"t": msgpack.ExtType(4, b"")}, "leaves": []}),
            b"\x82" + msgpack.packb("info") + b"\x80" + msgpack.packb("info") + b"\x80",
            b"\x82" + msgpack.packb("info") + b"\x80" + msgpack.packb("leaves") + b"\xdd\xff\xff\xff\xff",
            b"\x91" * 5000 + b"\xc0",
            b"\x82" + msgpack.packb("info") + b"\x81\xa1\xff\xc0" + msgpack.packb("leaves") + b"\x90",
        ],
    )
    def test_headers_that_make_no_sense(self, tmp_path, header):
        assert "is damaged: its header" in refused(forge(write(tmp_path / "a"), header=header))

    def test_two_arrays_with_one_path(self, tmp_path):
        path = write(tmp_path / "a")
        header = header_of(path)
        header["leaves"][1]["path"] = header["leaves"][0]["path"]
        assert "its header has two arrays of one path" in refused(forge(path, header=msgpack.packb(header)))

    def test_bytes_between_the_arrays(self, tmp_path):
        path = write(tmp_path / "a")
        data = bytearray(path.read_bytes())
        data[struct.unpack_from("<Q", data, 24)[0] + 30] = 1
        path.write_bytes(data)
        assert "there are bytes between its arrays" in refused(path)

    @pytest.mark.slow
    def test_ten_thousand_mutated_headers(self, tmp_path):
        path = write(tmp_path / "a")
        good, header = path.read_bytes(), header_of(path)
        packed = msgpack.packb(header)
        draw = random.Random(0)
        for _ in range(10_000):
            mutated = bytearray(packed)
            for _ in range(draw.randint(1, 3)):
                mutated[draw.randrange(len(mutated))] = draw.randrange(256)
            path.write_bytes(good)
            forge(path, header=bytes(mutated))
            try:
                _, values = read(path)
            except CheckpointError:
                continue
            assert [a.tobytes() for a in values.values()] == [a.tobytes() for a in arrays().values()]

    @pytest.mark.slow
    def test_nothing_of_it_takes_more_memory_than_the_file_or_time(self, tmp_path):
        """A header of 16 MiB that unpacks to as many objects as it can."""
        nils = 15 * 2**20
        header = b"\x82" + msgpack.packb("info") + b"\x81\xa1x\xdd" + struct.pack(">I", nils) + b"\xc0" * nils
        header += msgpack.packb("leaves") + b"\x90"
        path = forge(write(tmp_path / "a", {("x",): np.zeros(0)}), header=header)
        code = f"""
            import resource, time
            from trainer.checkpoints.file_format import Bundle
            from trainer import CheckpointError
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try:
                Bundle({str(path)!r})
            except CheckpointError:
                pass
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        kibibytes, seconds = map(float, done.stdout.split())
        assert kibibytes < 256 * 1024
        assert seconds < 10


@pytest.mark.slow
def test_reading_a_large_array_takes_the_memory_of_one(tmp_path):
    path = write(tmp_path / "a", {("x",): np.ones(2**24, np.float32), ("y",): np.ones(2**24, np.float32)})
    code = f"""
        import resource
        from trainer.checkpoints.file_format import Bundle
        bundle = Bundle({str(path)!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for leaf in bundle.leaves:
            bundle.read(leaf)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < (64 + 32) * 1024


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("bundle-*.msgpack")), ids=lambda path: path.name)
def test_files_of_earlier_releases_are_read(path):
    """Written by `write(path)` above when each version of the format was made; never to be made again."""
    info, values = read(path)
    assert info == {"step": 7}
    assert [same(values[p], a) for p, a in arrays().items()] == [True] * 4


def test_there_is_a_golden_file_of_this_version():
    assert (GOLDEN / "bundle-1.0.msgpack").exists()


def test_the_end_is_where_the_document_says(tmp_path):
    assert write(tmp_path / "a").read_bytes().endswith(END)
