"""Strict surroundings: eight CPU devices, no implicit broadcasting, and warnings are errors."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def compilations():
    """Counts the XLA compilations by the name of the compiled function."""
    counts: dict[str, int] = {}

    def count(event: str, duration: float, **about) -> None:
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            name = about["fun_name"]
            counts[name] = counts.get(name, 0) + 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """A cache on disk, new for every session, so that a program that trainers of many tests have is compiled once.

    The processes that tests start inherit it. Those of pytest have one each, since jax does not write it atomically.
    `compilations` counts what is found there too.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks cases of tests with ``few(n)`` as slow, all but n, which are spread over all of them."""
    cases = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    for found in cases.values():
        (count,) = found[0].get_closest_marker("few").args
        kept = {index * len(found) // count for index in range(count)}
        for item in (case for index, case in enumerate(found) if index not in kept):
            item.add_marker(pytest.mark.slow)
