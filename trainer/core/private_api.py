"""All uses of private names of other libraries, each wrapped in a function that documents it.

A release of such a library may rename or remove the name. No other module imports one (`tests/test_surface.py`). Here
too are the texts and keys whose change in a release would raise nothing: a lookup would just find nothing. Public
names that may change, but then raise, are noted with the release where they are used.
"""

import atexit
import threading
from collections.abc import Callable
from typing import Any

from trainer.errors import DistributedError


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service, None before `jax.distributed.initialize`.

    ``jax._src.distributed.global_state.client``, seen in jax 0.10.2 and 0.11; Orbax uses it too. JAX has no public
    API for its key-value store.

    Raises:
        DistributedError: This release of JAX does not have the name. Single-process runs never call this.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise DistributedError(
            f"This release of JAX has no `jax._src.distributed.global_state.client` ({error}), through which several "
            f"processes coordinate. Use a release of JAX that this library was tested with (0.10 or 0.11)."
        ) from error


def names_of_metrics(metric: Any) -> tuple[str, ...]:
    """Returns the names of the metrics in an `nnx.metrics.MultiMetric`, seen as ``_metric_names`` in Flax 0.12."""
    names: tuple[str, ...] = metric._metric_names
    return names


def is_about_lost_array(error: Exception) -> bool:
    """Whether an error says that an argument was deleted or donated.

    JAX raises no type of its own for it. The texts ``Array has been deleted`` and ``Buffer has been deleted or
    donated`` were seen in jax 0.10.2.
    """
    return "deleted" in str(error) or "donated" in str(error)


def operations_and_bytes(compiled: Any) -> tuple[float | None, float | None]:
    """Returns XLA's count of a program's floating-point operations and of the bytes that it accesses, None if unknown.

    The keys ``flops`` and ``bytes accessed`` of ``Compiled.cost_analysis()``, seen in jax 0.10.2. JAX documents that
    its format may change.
    """
    cost = compiled.cost_analysis() or {}
    return cost.get("flops"), cost.get("bytes accessed")


def memory_limit(device: Any) -> int | None:
    """Returns the bytes of memory of a device: ``bytes_limit`` of ``memory_stats()``, seen in jax 0.10.2 on GPUs."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def names_of_dimensions(variable: Any) -> Any:
    """Returns the names of an `nnx.Variable`'s dimensions (or a `NamedSharding`), None if it has none.

    ``out_sharding`` in its metadata, seen in Flax 0.12.8; earlier releases called it ``sharding``.
    """
    return variable.get_metadata().get("out_sharding")


def axes_by_name(variable: Any) -> dict[str, Any]:
    """Returns a variable's own mesh axes by name of dimension: ``sharding_rules`` in its metadata, in Flax 0.12.8."""
    return dict(variable.get_metadata().get("sharding_rules") or ())


def before_executors_shut_down(call: Callable[[], None]) -> None:
    """Runs a function at interpreter exit, while executors still accept work.

    ``threading._register_atexit``, seen in Python 3.11 to 3.13; `concurrent.futures.thread` registers its own shutdown
    with it, and functions run in reverse order of registration. If Python lacks the name, `atexit` is used instead: a
    save in flight at interpreter exit may then fail with an error from the executor.
    """
    import concurrent.futures.thread  # noqa: F401 - it has to register before this does

    register = getattr(threading, "_register_atexit", atexit.register)
    register(call)
