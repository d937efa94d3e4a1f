"""The arguments of a call to ``train`` or ``train_epoch`` as text, stored in checkpoints and compared on resume."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.batches import describe
from trainer.core.fingerprint import are_comparable
from trainer.data.memory import InMemoryData, order_of
from trainer.errors import ArgumentError, warn
from trainer.fit.setup import Setup

# Settings that do not affect the updates. `num_epochs` is one of them: a larger value only extends the run.
_BESIDE = {"num_epochs", "name", "metadata", "checkpoint_dir", "save_frequency", "max_checkpoints", "log_frequency"}
_BESIDE |= {"use_wandb", "wandb_project"}

_ORDER = "order of train_data"
_ELEMENTS_COMPARED = 4096


def describe_call(
    setup: Setup,
    counts: Mapping[str, int | None],
    train_data: InMemoryData | None = None,
    val_data: InMemoryData | None = None,
    loaders: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Returns the arguments of a call by name, as text.

    Counts and settings are given as such, data in memory as a fingerprint of shapes and sampled rows, and the order of
    training data as a hash of what NumPy draws. Functions (the objective, the optimizer), extensions and the model are
    hashes of their bytecode and of the plain values that it reads. Of a loader, the number of batches counts if it has
    a length, and the first batch if it is a list.
    """
    config = {name: value for name, value in setup.config.to_dict().items() if name not in _BESIDE}
    if setup.given_optimizer is not None:
        config = {name: value for name, value in config.items() if name not in ("optimizer", "scheduler")}
    told = {name: json.dumps(value) for name, value in counts.items() if value is not None}
    told |= {f"training_config.{name}": text for name, text in _leaves(config)}
    told |= setup.fingerprints
    for name, data in (("train_data", train_data), ("val_data", val_data)):
        if data is not None:
            told[name] = data.fingerprint()
    if train_data is not None:
        told[_ORDER] = hashlib.sha256(order_of(setup.seed, 0, 64).astype("<i8").tobytes()).hexdigest()[:16]
    # The batches of a limited run are a copy, and of several processes each has its own.
    if setup.placement.num_processes == 1 and not setup.is_limited:
        for name, loader in (loaders or {}).items():
            told |= _describe_loader(name, loader)
    return told


def check_same_call(before: Mapping[str, str] | None, now: Mapping[str, str], *, in_epoch: bool = True) -> None:
    """Compares the arguments of the interrupted call with those of the call that resumes it.

    Arguments missing from one of the calls or from an older checkpoint are not compared, and neither are hashes of
    functions by another release of Python, JAX, Flax, Optax or this library. Different training data is an error, since
    the epoch would mix two data sets, and so is another order of them within an epoch. Any other difference may be
    intended, and only causes a warning.

    Args:
        before: The arguments of the interrupted call; None if they are unknown.
        now: The arguments of the call that resumes it.
        in_epoch: Whether the run was interrupted within an epoch.

    Raises:
        ArgumentError: The training data differs, or its order.
    """
    if before is None:
        return
    shared = [name for name in now if name in before and are_comparable(before[name], now[name])]
    differing = [name for name in shared if before[name] != now[name]]
    if not differing:
        return
    if _ORDER in differing and in_epoch:
        raise ArgumentError(
            f"`resume` cannot continue within the epoch: NumPy {np.__version__} shuffles `train_data` into another "
            f"order than the NumPy of the interrupted run, so some examples would come twice and others never. Use "
            f"that NumPy, or load_checkpoint() and start a new run."
        )
    if "train_data" in differing:
        raise ArgumentError(
            "`resume` cannot continue the interrupted run with other data: `train_data` has the same number of "
            "examples, and other values. Pass the same, or load_checkpoint() and start a new run."
        )
    warn(
        f"`resume` continues with arguments that differ from those of the interrupted call: "
        f"{'; '.join(_difference(name, before[name], now[name]) for name in differing)}."
    )


def _difference(name: str, before: str, now: str) -> str:
    if before.startswith("python ") or name == "val_data":
        return f"`{name}` differs"
    if name == _ORDER:
        return "NumPy shuffles `train_data` into another order"
    return f"`{name}` was {before} and is {now}"


def _describe_loader(name: str, loader: Any) -> dict[str, str]:
    """Returns what identifies a loader without drawing from it."""
    told: dict[str, str] = {}
    if isinstance(loader, Sized) and isinstance(loader, Iterable) and not hasattr(loader, "__next__"):
        with contextlib.suppress(Exception):  # a torch loader of an iterable data set raises TypeError
            told[f"{name}.batches"] = str(len(loader))
    if isinstance(loader, list | tuple) and loader:
        with contextlib.suppress(Exception):  # an error in a batch is reported when it is drawn
            told[f"{name}.first_batch"] = _describe_batch(loader[0])
    return told


def _describe_batch(batch: Any) -> str:
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(batch):
        if isinstance(leaf, jax.Array) and (
            not leaf.is_fully_addressable or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ):
            continue
        spread = np.linspace(0, max(0, np.size(leaf) - 1), min(np.size(leaf), _ELEMENTS_COMPARED)).astype(np.intp)
        content.update(np.asarray(jax.device_get(leaf)).reshape(-1)[spread].tobytes())
    return f"{describe(batch)} with hash {content.hexdigest()[:16]}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, json.dumps(value)
