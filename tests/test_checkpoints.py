"""Files that hold a state: whole or not at all, refused by name where they do not fit."""

import os

import chex
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, Linear, config, squared_error
from tests.test_state import Containers, Odd, Tied
from trainer import CheckpointError, StateError, Trainer, TrainState, load_state, save_state
from trainer.checkpoints import prune

EXTENSIONS = {"size": Counting()}


def create(model, optimizer=None, rng=None, **changes):
    rng = jax.random.key(0) if rng is None else rng
    return TrainState.create(model, optimizer or optax.adam(1e-2), rng=rng, **changes)


def repack(path, change):
    bundle = msgpack.unpackb(path.read_bytes())
    change(bundle)
    path.write_bytes(msgpack.packb(bundle))


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [Linear, Busy, Tied, Containers, Odd], ids=lambda make: make.__name__)
def test_a_state_comes_back_equal(make, tmp_path):
    state = create(make(rngs=nnx.Rngs(0)), extensions=EXTENSIONS).replace(step=jnp.int32(7))
    path = save_state(tmp_path / "new" / "state.msgpack", state)
    other = create(make(rngs=nnx.Rngs(1)), extensions=EXTENSIONS, rng=jax.random.key(9))
    loaded = load_state(path, like=other)
    assert_equal(loaded, state)
    assert loaded.graphdef is state.graphdef


@pytest.mark.parametrize(
    "rng",
    [jax.random.PRNGKey(3), jax.random.key(3), jax.random.key(3, impl="rbg"), jax.random.key(3, impl="unsafe_rbg")],
    ids=["raw", "threefry", "rbg", "unsafe_rbg"],
)
def test_keys_of_every_kind_come_back(rng, tmp_path):
    state = create(Linear(), rng=rng)
    loaded = load_state(save_state(tmp_path / "s.msgpack", state), like=state)
    assert_equal(loaded.rng, rng)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int4", "bool", "complex64", "uint8"])
def test_dtypes_come_back(dtype, tmp_path):
    model = Linear()
    model.extra = nnx.BatchStat(jnp.asarray([0, 1, 1], dtype))
    model.none = nnx.BatchStat(jnp.zeros((0, 3), dtype))
    state = create(model)
    assert_equal(load_state(save_state(tmp_path / "s.msgpack", state), like=state), state)


def test_arrays_go_where_their_counterparts_are(tmp_path):
    state = create(Linear())
    path = save_state(tmp_path / "s.msgpack", state)
    device = jax.devices()[3]
    loaded = load_state(path, like=jax.device_put(state, device))
    assert loaded.params["layer"]["kernel"].devices() == {device}
    assert not load_state(path, like=state).step.committed


def test_the_file_says_what_is_in_it(tmp_path):
    path = save_state(tmp_path / "s.msgpack", create(Linear()), {"name": "mine"})
    bundle = msgpack.unpackb(path.read_bytes())
    assert bundle["info"]["step"] == 0
    assert bundle["info"]["name"] == "mine"
    assert bundle["info"]["versions"]["jax"] == jax.__version__
    assert [leaf[0] for leaf in bundle["leaves"]][:2] == ["params/layer/bias", "params/layer/kernel"]


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        return save_state(tmp_path / "s.msgpack", create(Busy()))

    def refused(self, path, like=None):
        like = create(Busy()) if like is None else like
        before = jax.tree.map(lambda leaf: leaf, like)
        with pytest.raises(CheckpointError) as caught:
            load_state(path, like=like)
        chex.assert_trees_all_equal(like.params, before.params)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_all_arrays_that_do_not_fit_are_named(self, path):
        message = self.refused(path, create(Busy(width=9)))
        assert "params/inner/kernel: (4, 8) float32 in the file, (4, 9) float32 here" in message
        assert "opt_state/0/mu/outer/kernel: (8, 1) float32 in the file, (9, 1) float32 here" in message

    def test_another_optimizer_is_named(self, path):
        message = self.refused(path, create(Busy(), optax.sgd(0.1, momentum=0.9)))
        assert "opt_state/0/trace/inner/bias: not in the file, (8,) float32 here" in message
        assert "opt_state/0/nu/inner/bias: (8,) float32 in the file, nothing here" in message

    def test_another_dtype_or_key_is_named(self, path):
        raw = create(Busy(), rng=jax.random.PRNGKey(0))
        assert "rng: () key<threefry2x32> in the file, (2,) uint32 here" in self.refused(path, raw)

    def test_a_long_list_is_cut(self, path):
        message = self.refused(path, create(Containers(nnx.Rngs(0))))
        assert message.count(";") == 20
        assert message.endswith(" more.")

    def test_no_file(self, tmp_path):
        assert "could not be read" in self.refused(tmp_path / "absent.msgpack")

    @pytest.mark.parametrize("keep", [0, 1, 100, -1])
    def test_a_truncated_file(self, path, keep):
        path.write_bytes(path.read_bytes()[:keep])
        assert "is damaged or no checkpoint" in self.refused(path)

    def test_bytes_behind_the_end(self, path):
        path.write_bytes(path.read_bytes() + b"x")
        assert "is damaged or no checkpoint" in self.refused(path)

    def test_another_kind_of_file(self, path):
        path.write_bytes(msgpack.packb({"format": "other"}))
        assert "is no checkpoint of this library" in self.refused(path)

    def test_a_newer_version(self, path):
        repack(path, lambda bundle: bundle.update(version=99))
        assert "has format version 99; this release reads version 1" in self.refused(path)

    @pytest.mark.parametrize("leaves", [None, [1], [["a", "b", [], None, 5]], [["a"]]])
    def test_a_list_of_arrays_that_makes_no_sense(self, path, leaves):
        repack(path, lambda bundle: bundle.update(leaves=leaves))
        assert "its list of arrays cannot be understood" in self.refused(path)

    def test_an_array_of_the_wrong_length(self, path):
        repack(path, lambda bundle: bundle["leaves"][0].__setitem__(4, b"123"))
        assert "params/inner/bias: 3 bytes in the file, which is not (8,) float32" in self.refused(path)

    def test_the_pickle_layout(self, tmp_path):
        with pytest.raises(CheckpointError, match="the pickle layout is not supported by this version"):
            save_state(tmp_path / "s.pkl", create(Linear()))

    def test_a_donated_state(self, tmp_path):
        state = create(Linear())
        state.params["layer"]["bias"].delete()
        with pytest.raises(StateError, match="`state` was donated"):
            save_state(tmp_path / "s.msgpack", state)

    def test_the_trainer_is_as_it_was(self, path):
        trainer = Trainer(Busy(width=9), config(), loss_fn=squared_error)
        state = trainer.state
        with pytest.raises(CheckpointError):
            trainer.load_checkpoint(path)
        assert trainer.state is state


class TestAtomicity:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failure_leaves_the_old_file_and_no_debris(self, call, tmp_path, monkeypatch):
        path = save_state(tmp_path / "s.msgpack", create(Linear()))
        before = path.read_bytes()

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"could not be written: \[Errno 28\] No space left on device"):
            save_state(path, create(Linear(rngs=nnx.Rngs(1))))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_others_may_read_it_as_far_as_the_umask_allows(self, tmp_path):
        before = os.umask(0o027)
        try:
            path = save_state(tmp_path / "s.msgpack", create(Linear()))
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o640

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="could not be written"):
            save_state(tmp_path / "file" / "s.msgpack", create(Linear()))

    def test_a_system_without_directory_handles(self, tmp_path, monkeypatch):
        monkeypatch.delattr(os, "O_DIRECTORY")
        save_state(str(tmp_path / "s.msgpack"), create(Linear()))
        assert (tmp_path / "s.msgpack").stat().st_size > 0


def test_pruning_removes_the_oldest_with_default_names_only(tmp_path):
    names = [f"checkpoint_{step}.msgpack" for step in (2, 10, 9, 100)]
    others = ["checkpoint_1.msgpack.bak", "checkpoint_x.msgpack", "model.msgpack"]
    for name in names + others:
        (tmp_path / name).write_text("")
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["checkpoint_10.msgpack", "checkpoint_100.msgpack", *others]
    )
