"""Converts the part of a `Run` beside its state to plain values for a checkpoint, and checks it on reading."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from trainer.checkpoints.plain_values import pack, to_plain
from trainer.checkpoints.saving import Snapshot, take_snapshot, write_snapshot
from trainer.checkpoints.state_io import Loaded, load_with_progress
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.errors import CheckpointError
from trainer.metrics.average import WeightedAverage, check_merged, read
from trainer.metrics.history import History, is_recordable
from trainer.paths import in_home
from trainer.run import FromLoader, InMemory, Run, Validation

_FIELDS = {
    *("seed", "num_examples", "batch_size", "first_epoch", "first_step", "step", "batch", "logged_step"),
    *("validation_step", "validation", "average", "metrics", "loader", "id", "arguments"),
}
_LATER_FIELDS = {"loader", "id", "arguments"}  # missing in the earliest files
_COUNTS = ("num_examples", "batch_size", "first_epoch", "first_step", "step", "batch", "logged_step")


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint, checked and ready to use.

    Attributes:
        path: The checkpoint.
        run: The saved run. Its position is None if it was saved outside a run.
        callback_states: The states of callbacks and extensions; None if the checkpoint has none.
        loaders: The positions of the loaders of all processes if there were several; else None.
    """

    path: Path
    run: Run
    callback_states: list[Any] | None
    loaders: list[Any] | None


def save_run(path: str | os.PathLike[str], run: Run, info: Mapping[str, Any] | None = None) -> Path:
    """Writes a run atomically: its state and everything that travels with it. See `trainer.save_state`.

    Args:
        path: The path; its suffix decides the format.
        run: The run.
        info: Plain values for people, shown by ``trainer inspect``.

    Returns:
        The path.

    Raises:
        CheckpointError: The write failed, or the loader cannot report its position. Any existing file is unchanged.
    """
    path = Path(in_home(path))
    write_snapshot(path, snapshot_run(run, info))
    return path


def snapshot_run(
    run: Run,
    info: Mapping[str, Any] | None = None,
    *,
    callback_states: Callable[[], Sequence[Any]] = list,
    loaders: Sequence[Any] | None = None,
) -> Snapshot:
    """Describes a run for `write_snapshot`. Copies no array, so write or copy the snapshot before the next step.

    Args:
        run: The run.
        info: Plain values for people.
        callback_states: Returns the states of callbacks and extensions.
        loaders: The positions of the loaders of all processes, if there are several.

    Raises:
        CheckpointError: It holds a value that no checkpoint can hold, or the loader cannot report its position.
    """
    run = run.with_edits()
    about = {"run": run.id, "epoch": run.epoch, "metrics": run.history[-1] if run.history else {}, **(info or {})}
    return take_snapshot(run.peek(), about, progress=lambda: _packed(run, callback_states, loaders))


def load_run(path: str | os.PathLike[str], like: Run) -> Run:
    """Reads a run.

    Args:
        path: A checkpoint from `save_run`, ``Trainer.save_checkpoint`` or `trainer.save_state`.
        like: A run with a state of the same structure. It supplies what the checkpoint lacks.

    Raises:
        CheckpointError: The checkpoint cannot be used.
    """
    return restore(load_with_progress(path, like.peek()), like).run


def restore(loaded: Loaded, current: Run) -> Restored:
    """Returns the run in a checkpoint. The current run supplies what the checkpoint lacks.

    Raises:
        CheckpointError: Part of it cannot be used.
    """
    path, state, progress = loaded.path, loaded.state, loaded.progress or {}
    try:
        epoch, rows, callback_states, loaders, horizon = _checked(progress)
    except ValueError as error:
        raise CheckpointError(f"`{path}` holds a progress that cannot be used: {error}.") from error
    step = int(state.step)
    if rows is None:
        history = current.history.copy()
        history.rewind(step)
    else:
        history = History.from_rows(rows)
    run = current.with_state(state, step=step).replace(
        epoch=current.epoch if epoch is None else epoch,
        position=None,
        average=WeightedAverage(),
        metrics={},
        arguments=None,
        validation=None,
        logged_step=0,
        history=history,
        horizon=current.horizon if horizon is None else horizon,
        drawn=None,
    )
    if progress.get("run"):
        try:
            run = _with_record(run, progress["run"], epoch, progress.get("run_epoch"))
        except ValueError as error:
            raise CheckpointError(f"`{path}` holds a run that cannot be understood: {error}.") from error
    return Restored(path, run, callback_states, loaders)


def _packed(run: Run, callback_states: Callable[[], Sequence[Any]], loaders: Sequence[Any] | None) -> bytes:
    record = to_plain(_record(run), "run")
    run_epoch = run.position.run_epoch if isinstance(run.position, FromLoader) else None
    if record is not None:
        try:
            _with_record(run, record, run.epoch, run_epoch)
        except ValueError as error:
            raise CheckpointError(f"the run cannot be saved, since it could not be read back: {error}.") from error
    fields = {
        "epoch": pack(run.epoch, "epoch"),
        "run": msgpack.packb(record),
        "loaders": pack(loaders, "loaders"),
        "listeners": pack(list(callback_states()), "callbacks"),
        "horizon": pack(run.horizon, "horizon"),
        "run_epoch": pack(run_epoch, "run_epoch"),  # not in the record, to which earlier readers allow no addition
    }
    try:
        count, rows = run.history.packed()
    except (TypeError, ValueError, OverflowError) as error:
        index = next((i for i, row in enumerate(run.history) if not all(map(is_recordable, row.values()))), "…")
        raise CheckpointError(
            f"`history[{index}]` cannot be saved: {error}; take numbers, strings, None and lists of these."
        ) from error
    packer = msgpack.Packer()
    pieces = [packer.pack_map_header(len(fields) + 1)]
    for name, packed in fields.items():
        pieces += [packer.pack(name), packed]
    # Rows come last, and most are already packed, so a long history is copied but not packed again.
    return b"".join([*pieces, packer.pack("history"), packer.pack_array_header(count), *rows])


def _record(run: Run) -> dict[str, Any] | None:
    """Returns the run's progress as plain values; waits for metrics that are still on the device."""
    position = run.position
    if position is None:
        return None
    loader = None
    if isinstance(position, FromLoader):
        found = position.loader
        loader = found.position(position.batch) if isinstance(found, LoaderPass) else found
    return {
        "id": run.id,
        "arguments": {} if run.arguments is None else dict(run.arguments),
        "seed": list(position.seed) if isinstance(position, InMemory) else [],
        # Format version 1 has no tag: zero examples means a loader.
        "num_examples": position.num_examples if isinstance(position, InMemory) else 0,
        "batch_size": position.batch_size,
        "first_epoch": position.first_epoch,
        "first_step": position.first_step,
        "step": run.step,
        "batch": position.batch,
        "logged_step": run.logged_step,
        "validation_step": -1 if run.validation is None else run.validation.step,
        "validation": {} if run.validation is None else dict(run.validation.averages),
        "average": run.average.to_dict(),
        "metrics": read(dict(run.metrics)),
        "loader": None if loader is None else dataclasses.asdict(loader),
    }


def _with_record(run: Run, plain: Any, epoch: int | None, run_epoch: Any = None) -> Run:
    if not isinstance(plain, dict) or not _FIELDS - _LATER_FIELDS <= plain.keys() <= _FIELDS:
        raise ValueError(f"it does not consist of {', '.join(sorted(_FIELDS))}")
    for name in _COUNTS:
        _check_count(name, plain[name])
    _check_count("validation_step", plain["validation_step"], least=-1)
    if not isinstance(plain["seed"], list):
        raise ValueError(f"`seed` is of type {type(plain['seed']).__name__}, not a list")
    for word in plain["seed"]:
        _check_count("seed", word)
    for name in ("validation", "metrics"):
        _check_values(name, plain[name])
    if type(plain.get("id", "")) is not str:
        raise ValueError(f"`id` is of type {type(plain['id']).__name__}, not a text")
    _check_values("arguments", plain.get("arguments", {}), lambda value: type(value) is str)
    average, loader = plain["average"], plain.get("loader")
    if not isinstance(average, dict) or average.keys() - {"merged"} != {"sums", "weights"}:
        raise ValueError("`average` does not consist of sums and weights")
    check_merged(average.get("merged", {}))
    for name, numbers in average.items():
        if name == "merged":
            continue
        _check_values(f"average/{name}", numbers, lambda value: type(value) in (int, float))
    if average["sums"].keys() != average["weights"].keys():
        raise ValueError("`average` has sums without weights, or weights without sums")
    if plain["step"] != run.step or epoch is None or plain["first_epoch"] > epoch:
        raise ValueError(
            f"it is at step {plain['step']} and began in epoch {plain['first_epoch']}, but the state is at step "
            f"{run.step} in epoch {epoch}"
        )
    where = {name: plain[name] for name in ("batch_size", "first_epoch", "first_step", "batch")}
    run_epoch = plain["first_epoch"] if run_epoch is None else run_epoch
    _check_count("run_epoch", run_epoch)
    found = None if loader is None else LoaderPosition.from_dict(loader)
    position = (
        InMemory(seed=tuple(plain["seed"]), num_examples=plain["num_examples"], **where)
        if plain["num_examples"]
        else FromLoader(loader=found, run_epoch=run_epoch, **where)
    )
    validation = None
    if (validated := plain["validation_step"]) >= 0:
        # Of a state that was rolled back, or that steps beside the loop have trained, this may be the epoch before.
        within = validated > plain["step"] - plain["batch"]
        validation = Validation(validated, plain["validation"], epoch if within else epoch - 1)
    return run.replace(
        position=position,
        average=WeightedAverage.from_dict(average),
        metrics=plain["metrics"],
        validation=validation,
        logged_step=plain["logged_step"],
        id=plain.get("id") or run.id,
        arguments=plain.get("arguments"),
    )


def _checked(
    plain: Mapping[str, Any],
) -> tuple[int | None, list[dict[str, Any]] | None, list[Any] | None, list[Any] | None, int | None]:
    """Returns the parts beside the run, None for each that the checkpoint lacks; ignores unknown names."""
    epoch, rows, horizon = (plain.get(name) for name in ("epoch", "history", "horizon"))
    callback_states, loaders = plain.get("listeners"), plain.get("loaders")
    for name, value in (("epoch", epoch), ("horizon", horizon)):
        if value is not None:
            _check_count(name, value)
    for name, value in (("listeners", callback_states), ("loaders", loaders)):
        if value is not None and not isinstance(value, list):
            raise ValueError(f"`{name}` is of type {type(value).__name__}, not a list")
    if rows is not None:
        if not isinstance(rows, list):
            raise ValueError(f"`history` is of type {type(rows).__name__}, not a list")
        for index, row in enumerate(rows):
            _check_values(f"history/{index}", row)
            _check_count(f"history/{index}/step", row.get("step"))
    return epoch, rows, callback_states, loaders, horizon


def _check_count(name: str, value: Any, least: int = 0) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, not a count")


def _check_values(name: str, values: Any, is_right: Callable[[Any], bool] = is_recordable) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"`{name}` is of type {type(values).__name__}, not a mapping")
    for key, value in values.items():
        if type(key) is not str or not is_right(value):
            raise ValueError(
                f"`{name}` has {reprlib.repr(value)} of type {type(value).__name__} under {reprlib.repr(key)}"
            )
