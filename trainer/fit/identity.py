"""What a call of ``train`` or ``train_epoch`` was made with, as texts that a checkpoint carries and resume compares."""

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
    """Returns the arguments of a call by name.

    Counts and settings are texts of their own, data in memory by a fingerprint of shapes and sampled rows. Functions
    (the objective, the optimizer) and the static attributes of the model are hashes of their bytecode and plain values,
    and so are the extensions. What has no plain value, as a loader or an array, is not compared.
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

    What was given once only, or is not in an older checkpoint, is not compared. Other training data are refused: the
    rest of an epoch over other examples is no epoch of either. Anything else may be meant, and is said in a warning.

    Raises:
        ArgumentError: The training data are others.
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
