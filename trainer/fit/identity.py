"""The arguments of a call to ``train`` or ``train_epoch`` as text, stored in checkpoints and compared on resume."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.memory import InMemoryData
from trainer.errors import ArgumentError, warn
from trainer.fit.setup import Setup

# Settings that do not affect the updates. `num_epochs` is one of them: a larger value only extends the run.
_BESIDE = {"num_epochs", "name", "metadata", "checkpoint_dir", "save_frequency", "max_checkpoints", "log_frequency"}
_BESIDE |= {"use_wandb", "wandb_project"}


def describe_call(
    setup: Setup,
    counts: Mapping[str, int | None],
    train_data: InMemoryData | None = None,
    val_data: InMemoryData | None = None,
) -> dict[str, str]:
    """Returns the arguments of a call by name, as text.

    Counts and settings are given as such, data in memory as a fingerprint of shapes and sampled rows. Functions (the
    objective, the optimizer), extensions and the static attributes of the model are hashes of their bytecode and plain
    values. Arguments without a plain value, such as loaders and arrays, are not compared.
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
    return told


def check_same_call(before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Compares the arguments of the interrupted call with those of the call that resumes it.

    Arguments missing from one of the calls or from an older checkpoint are not compared. Different training data is an
    error, since the epoch would mix two data sets. Any other difference may be intended, and only causes a warning.

    Raises:
        ArgumentError: The training data differs.
    """
    differing = [name for name in now if before is not None and before.get(name, now[name]) != now[name]]
    if before is None or not differing:
        return
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
    if before.startswith("python ") and now.startswith("python "):
        return f"`{name}` differs"
    if name == "val_data":
        return "`val_data` differs"
    return f"`{name}` was {before} and is {now}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, json.dumps(value)
