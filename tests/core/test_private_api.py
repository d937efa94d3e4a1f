"""What happens where a private name of another library is gone, and that texts and keys are those of this release."""

import atexit
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trainer import DistributedError
from trainer.core.private_api import (
    axes_by_name,
    before_executors_shut_down,
    coordination_client,
    is_about_lost_array,
    memory_limit,
    names_of_dimensions,
    operations_and_bytes,
)


@pytest.mark.parametrize("module", [None, types.ModuleType("distributed")])
def test_a_jax_without_its_client_is_an_error_that_says_which_releases_have_it(module, monkeypatch):
    import jax._src

    monkeypatch.setitem(sys.modules, "jax._src.distributed", module)
    monkeypatch.setattr(jax._src, "distributed", module)
    if module is None:
        monkeypatch.delattr(jax._src, "distributed")
    with pytest.raises(DistributedError, match=r"no `jax._src.distributed.global_state.client` .* \(0\.10 or 0\.11\)"):
        coordination_client()


def test_a_single_process_has_no_client():
    assert coordination_client() is None


@pytest.mark.parametrize("is_there", [True, False])
def test_the_exit_of_python_is_heard_with_or_without_the_name(is_there, monkeypatch):
    heard = []
    monkeypatch.setattr(threading, "_register_atexit", lambda call: heard.append(("threading", call)))
    monkeypatch.setattr(atexit, "register", lambda call: heard.append(("atexit", call)))
    if not is_there:
        monkeypatch.delattr(threading, "_register_atexit")
    before_executors_shut_down(print)
    assert heard == [("threading" if is_there else "atexit", print)]


@pytest.mark.parametrize("is_donated", [True, False])
def test_jax_says_of_a_lost_array_that_it_is_lost(is_donated):
    array = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(array) if is_donated else array.delete()
    for use in (jax.jit(lambda x: 2 * x), lambda x: x + 1, np.asarray):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            use(array)
        assert is_about_lost_array(caught.value)
    with pytest.raises(TypeError) as caught:
        jnp.ones(3) @ jnp.ones(4)
    assert not is_about_lost_array(caught.value)


def test_xla_counts_operations_and_bytes_under_these_keys():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
    operations, accessed = operations_and_bytes(compiled)
    assert operations == pytest.approx(2 * 64**3, rel=0.05)
    assert accessed >= 2 * 64 * 64 * 4
    assert operations_and_bytes(types.SimpleNamespace(cost_analysis=lambda: None)) == (None, None)


@pytest.mark.parametrize(("statistics", "expected"), [(None, None), ({}, None), ({"bytes_limit": 7}, 7)])
def test_the_memory_of_a_device(statistics, expected):
    assert memory_limit(types.SimpleNamespace(memory_stats=lambda: statistics)) == expected


def test_flax_keeps_the_names_of_dimensions_under_these_keys():
    with nnx.use_eager_sharding(False):
        named = nnx.Param(jnp.ones((2, 3)), out_sharding=("rows", None), sharding_rules=(("rows", "data"),))
    assert names_of_dimensions(named) == ("rows", None)
    assert axes_by_name(named) == {"rows": "data"}
    plain = nnx.Param(jnp.ones(3))
    assert names_of_dimensions(plain) is None
    assert axes_by_name(plain) == {}
