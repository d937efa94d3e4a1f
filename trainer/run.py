"""Where a run is: what a checkpoint holds beside the state, so that a run can go on at the next batch."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from trainer.data.resumable import LoaderPosition
from trainer.errors import ArgumentError
from trainer.metrics.history import WeightedAverage, metrics_at, read
from trainer.types import Metrics

_COUNTS = ("num_examples", "batch_size", "first_epoch", "first_step", "step", "batch", "logged_step")


@dataclasses.dataclass(frozen=True)
class Books:
    """What a checkpoint holds beside the state; None for what it does not hold.

    Attributes:
        epoch: The epochs finished.
        history: The rows of the `trainer.History`.
        listeners: The states of the callbacks and extensions that have one.
        run: What `RunProgress.to_dict` returned.
        loaders: Of several processes, where the loader of each is, as ``loader`` in ``run``.
    """

    epoch: int | None = None
    history: list[dict[str, Any]] | None = None
    listeners: list[Any] = dataclasses.field(default_factory=list)
    run: Any = None
    loaders: list[Any] | None = None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Takes what it knows of a mapping, and leaves the rest of it alone.

        Raises:
            ValueError: Something is of the wrong type. ``run`` is for `RunProgress.from_dict` to check.
        """
        books = cls(**{field.name: plain[field.name] for field in dataclasses.fields(cls) if field.name in plain})
        if books.epoch is not None:
            _check_count("epoch", books.epoch)
        for name, value in (("listeners", books.listeners), ("loaders", books.loaders or [])):
            if not isinstance(value, list):
                raise ValueError(f"`{name}` is of type {type(value).__name__}, not a list")
        if books.history is not None:
            if not isinstance(books.history, list):
                raise ValueError(f"`history` is of type {type(books.history).__name__}, not a list")
            for index, row in enumerate(books.history):
                _check_scalars(f"history/{index}", row)
                _check_count(f"history/{index}/step", row.get("step"))
        return books


@dataclasses.dataclass
class RunProgress:
    """The bookkeeping of one call of ``train`` or ``train_epoch``.

    Attributes:
        seed: What the order of the data is drawn from.
        num_examples: How many examples the data has; 0 for a loader.
        batch_size: Examples in a batch; 0 for a loader that is not told.
        first_epoch: The epochs finished when the run began.
        first_step: The updates finished when the run began.
        step: The updates finished.
        batch: The batches finished of the current epoch.
        logged_step: The latest step whose training metrics were logged.
        validation_step: The step of the latest validation, -1 before the first.
        validation: Its averages.
        average: The average over the current epoch, or over the latest between two.
        metrics: Those of the latest step.
        loader: Where the loader is, if there is one.
    """

    seed: tuple[int, ...] = ()
    num_examples: int = 0
    batch_size: int = 0
    first_epoch: int = 0
    first_step: int = 0
    step: int = 0
    batch: int = 0
    logged_step: int = 0
    validation_step: int = -1
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    average: WeightedAverage = dataclasses.field(default_factory=WeightedAverage)
    metrics: Metrics | dict[str, float] = dataclasses.field(default_factory=dict)
    loader: LoaderPosition | None = None

    @property
    def validation_of_epoch(self) -> dict[str, float]:
        """The latest validation, if it was in the current epoch."""
        return self.validation if self.validation_step > self.step - self.batch else {}

    def count(self, step: int, metrics: Metrics, examples: int, batches: int | None = None) -> None:
        """Counts a batch as finished, or several with metrics as `trainer.fuse_steps` returns them."""
        self.metrics = metrics if batches is None else metrics_at(metrics, batches - 1)
        self.average.add(metrics, examples, batches)
        self.step, self.batch = step, self.batch + (batches or 1)

    def copy(self) -> "RunProgress":
        """Returns another one that counts for itself."""
        return dataclasses.replace(self, average=WeightedAverage.from_dict(self.average.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; waits for the metrics that are still on the device."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **plain,
            "seed": list(self.seed),
            "average": self.average.to_dict(),
            "metrics": read(dict(self.metrics)),
            "loader": None if self.loader is None else dataclasses.asdict(self.loader),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Makes it again from what `to_dict` returned.

        Raises:
            ValueError: It is no such thing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        # The position of a loader came later; whatever else is missing was never written.
        if not isinstance(plain, dict) or not known - {"loader"} <= plain.keys() <= known:
            raise ValueError(f"it does not consist of {', '.join(sorted(known))}")
        for name in _COUNTS:
            _check_count(name, plain[name])
        _check_count("validation_step", plain["validation_step"], least=-1)
        if plain["batch"] > plain["step"]:
            raise ValueError(f"it has finished {plain['batch']} batches of an epoch after {plain['step']} steps")
        if not isinstance(plain["seed"], list):
            raise ValueError(f"`seed` is of type {type(plain['seed']).__name__}, not a list")
        for word in plain["seed"]:
            _check_count("seed", word)
        for name in ("validation", "metrics"):
            _check_scalars(name, plain[name])
        average, loader = plain["average"], plain.get("loader")
        if not isinstance(average, dict) or average.keys() != {"sums", "weights"}:
            raise ValueError("`average` does not consist of sums and weights")
        for name, numbers in average.items():
            _check_scalars(f"average/{name}", numbers, of=(int, float))
        if average["sums"].keys() != average["weights"].keys():
            raise ValueError("`average` has sums without weights, or weights without sums")
        return cls(
            **{
                **plain,
                "seed": tuple(plain["seed"]),
                "average": WeightedAverage.from_dict(average),
                "loader": None if loader is None else LoaderPosition.from_dict(loader),
            }
        )

    def check_same_run(self, asked: "RunProgress") -> None:
        """Compares the run that was interrupted with the one that is asked for.

        Raises:
            ArgumentError: They differ in the data or its order; every difference is named.
        """
        names = {"seed": "rng", "num_examples": "train_data", "batch_size": "batch_size"}
        differences = [
            f"`{argument}` ({name.replace('_', ' ')}) was {getattr(self, name)} and is {getattr(asked, name)}"
            for name, argument in names.items()
            if getattr(self, name) != getattr(asked, name)
        ]
        if differences:
            raise ArgumentError(
                f"`resume` cannot continue the interrupted run with other arguments: {'; '.join(differences)}. Pass "
                f"the same, or load_checkpoint() and start a run of its own."
            )


def _check_count(name: str, value: Any, least: int = 0) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, not a count")


def _check_scalars(name: str, values: Any, of: Iterable[type] = (bool, int, float, str, type(None))) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"`{name}` is of type {type(values).__name__}, not a mapping")
    for key, value in values.items():
        if type(key) is not str or type(value) not in of:
            raise ValueError(
                f"`{name}` has {reprlib.repr(value)} of type {type(value).__name__} under {reprlib.repr(key)}"
            )
