"""Compiling ahead of time, and taking programs from the compilation cache of JAX."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.problems import Busy, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import BatchError, Trainer


def build(model=None, loss_fn=squared_error):
    return Trainer(model or Busy(), config(), loss_fn=loss_fn, rng=jax.random.key(0))


def test_the_first_step_compiles_nothing_afterwards(compilations):
    trainer = build()
    before = trainer.state.copy()
    cost = trainer.compile(regression(8))
    assert_same_bits(trainer.state, before)
    trainer.train_step(regression(8))
    assert compilations["jit(train_step)"] == 1
    assert cost.flops > 0
    assert cost.seconds > 0


def test_shapes_are_enough(compilations):
    trainer = build()
    trainer.compile(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), regression(8)))
    trainer.train_step(regression(8))
    assert compilations["jit(train_step)"] == 1


def test_it_tells_the_memory():
    trainer = build()
    cost = trainer.compile(regression(8))
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state))
    batch = sum(leaf.nbytes for leaf in regression(8).values())
    assert cost.arguments == state + batch
    assert cost.aliased == state
    assert cost.fits
    assert cost.available > 2**30
    assert cost.state == state
    assert cost.mesh == {}
    assert cost.collectives == {}
    lines = str(cost).splitlines()
    assert lines[0] == "on one device"
    assert [line.split() for line in lines if line.startswith("total")] == [["total", f"{cost.total:,}", "bytes"]]


def test_it_says_what_will_not_fit():
    def huge(model, batch, rng, step):
        noise = jax.random.normal(rng, (2**22, 2**20))  # 16 TiB
        return jnp.mean(model(batch["input"])) + jnp.sum(noise @ noise.T), {}

    trainer = build(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), huge)
    with pytest.warns(UserWarning, match=r"a step needs [\d,]+ bytes and the device has [\d,]+: it will not fit\."):
        assert not trainer.compile(regression(8)).fits


def test_bad_input():
    with pytest.raises(BatchError, match="`batch` is a list of Python values"):
        build().compile([1, 2])


@pytest.mark.slow
def test_with_the_cache_of_jax_a_second_process_compiles_no_step(tmp_path):
    code = f"""
        import jax
        jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        import trainer
        hits = []
        jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
        from tests.problems import Busy, config, regression, squared_error
        run = trainer.Trainer(Busy(), config(), loss_fn=squared_error)
        hits.clear()
        run.train(regression(16), 1, 8)
        print(len(hits))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    printed = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for _ in range(2)]
    assert printed[0] == "0"
    assert int(printed[1]) >= 1
