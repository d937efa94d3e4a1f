"""Where a run is: what a checkpoint holds beside the state, so that a run can go on at the next batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from trainer.errors import ArgumentError
from trainer.history import WeightedAverage, read
from trainer.types import Metrics


@dataclasses.dataclass
class RunProgress:
    """The bookkeeping of one call of ``train`` or ``train_epoch``.

    Attributes:
        seed: What the order of the data is drawn from.
        num_examples: How many examples the data has; 0 for a loader.
        batch_size: Examples in a batch; 0 for a loader.
        first_epoch: The epochs finished when the run began.
        first_step: The updates finished when the run began.
        step: The updates finished.
        batch: The batches finished of the current epoch.
        logged_step: The latest step whose training metrics were logged.
        validation_step: The step of the latest validation, -1 before the first.
        validation: Its averages.
        average: The average over the current epoch, or over the latest between two.
        metrics: Those of the latest step.
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

    @property
    def validation_of_epoch(self) -> dict[str, float]:
        """The latest validation, if it was in the current epoch."""
        return self.validation if self.validation_step > self.step - self.batch else {}

    def can_resume_at(self, step: int) -> bool:
        """Tells whether this is a run over data in memory, and still stands where the state does."""
        return self.num_examples > 0 and self.step == step

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; waits for the metrics that are still on the device."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **plain,
            "seed": list(self.seed),
            "average": self.average.to_dict(),
            "metrics": read(dict(self.metrics)),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Makes it again from what `to_dict` returned."""
        return cls(**{**plain, "seed": tuple(plain["seed"]), "average": WeightedAverage.from_dict(plain["average"])})

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
