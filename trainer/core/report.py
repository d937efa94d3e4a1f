"""Metrics of an update that a step reports in addition to those of the objective: norms and the learning rate."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from trainer.core.checks import did_you_mean
from trainer.core.learning_rate import learning_rate_of
from trainer.core.objective import check_metric
from trainer.errors import ArgumentError, ArgumentTypeError, ObjectiveError
from trainer.types import Metrics


class Update(NamedTuple):
    """One update of a step.

    Attributes:
        step: The number of updates before it.
        grads: The gradient, averaged over devices, before any clipping by the optimizer.
        updates: The updates added to the params.
        params: The params before the update.
        opt_state: The optimizer state after the update.
    """

    step: jax.Array
    grads: Any
    updates: Any
    params: Any
    opt_state: Any


Measure = Callable[[Update], jax.Array]
"""Maps an update to a scalar."""


def gradient_norm(update: Update) -> jax.Array:
    """Returns ‖g‖₂ over all params."""
    norm: jax.Array = optax.tree.norm(update.grads)
    return norm


def update_ratio(update: Update) -> jax.Array:
    """Returns ‖u‖₂ / ‖θ‖₂ over all params; about 1e-3 in a healthy run."""
    ratio: jax.Array = optax.tree.norm(update.updates) / optax.tree.norm(update.params)
    return ratio


def learning_rate(update: Update) -> jax.Array:
    """Returns the learning rate of the update, if the optimizer keeps it in its state.

    Raises:
        ArgumentError: The optimizer keeps none, or several.
    """
    return learning_rate_of(update.opt_state)


MEASURES: dict[str, Measure] = {
    "gradient_norm": gradient_norm,
    "update_ratio": update_ratio,
    "learning_rate": learning_rate,
}
"""The measures that a step can report by name."""


def resolve_report(report: Iterable[str] | Mapping[str, Measure], known: Mapping[str, Measure]) -> dict[str, Measure]:
    """Returns the measures by name.

    Args:
        report: Names of measures, or a mapping of metric names to functions.
        known: The named measures.

    Raises:
        ArgumentTypeError: It is neither.
        ArgumentError: A name is unknown.
    """
    if isinstance(report, Mapping):
        for name, measure in report.items():
            if not callable(measure):
                raise ArgumentTypeError(
                    f"`report[{name!r}]` is of type {type(measure).__name__}; it must be a callable of a "
                    f"trainer.Update that returns a scalar."
                )
        return dict(report)
    if isinstance(report, str) or not isinstance(report, Iterable):
        raise ArgumentTypeError(f"`report` is {report!r:.60}; it must be a list of names, or functions by name.")
    for name in (names := list(report)):
        if name not in known:
            raise ArgumentError(f"`report` names {name!r}, which no step measures; {did_you_mean(str(name), known)}")
    return {name: known[name] for name in names}


def make_report(report: Iterable[str] | Mapping[str, Measure]) -> Callable[[Update, Metrics], Metrics]:
    """Returns the function that adds the reported measures of an update to the metrics of a step."""
    measures = resolve_report(report, MEASURES)

    def reported(update: Update, metrics: Metrics) -> Metrics:
        for name in measures:
            if name in metrics:
                raise ObjectiveError(
                    f"`loss_fn` returned a metric `{name}`, which `report` asks of the step; rename one of the two."
                )
        return metrics | {name: check_metric(name, measure(update), "report") for name, measure in measures.items()}

    return reported
