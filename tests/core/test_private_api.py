"""What happens where a private name of another library is gone."""

import atexit
import sys
import threading
import types

import pytest

from trainer import DistributedError
from trainer.core.private_api import before_executors_shut_down, coordination_client


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
