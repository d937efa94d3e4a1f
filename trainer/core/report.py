"""What a step reports of its update beside what the objective reports: norms, and the learning rate in force."""

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
    """An update as a step made it.

    Attributes:
        step: The number of updates before it.
        grads: The gradient, averaged over devices, before any clipping by the optimizer.
        updates: What was added to the params.
        params: The params before it.
        opt_state: The state of the optimizer after it.
    """

    step: jax.Array
    grads: Any
    updates: Any
    params: Any
    opt_state: Any


Measure = Callable[[Update], jax.Array]
"""From an update to a scalar."""


def gradient_norm(update: Update) -> jax.Array:
    """Returns ‖g‖₂ over all params."""
    norm: jax.Array = optax.tree.norm(update.grads)
    return norm


def update_ratio(update: Update) -> jax.Array:
    """Returns ‖u‖₂ / ‖θ‖₂ over all params: about 1e-3 in a run that goes well."""
    ratio: jax.Array = optax.tree.norm(update.updates) / optax.tree.norm(update.params)
    return ratio


def learning_rate(update: Update) -> jax.Array:
    """Returns the learning rate of the update, where the optimizer keeps it in its state.

    Raises:
        ArgumentError: The optimizer keeps none, or several.
    """
    return learning_rate_of(update.opt_state)


MEASURES: dict[str, Measure] = {
    "gradient_norm": gradient_norm,
    "update_ratio": update_ratio,
    "learning_rate": learning_rate,
}
"""What a step can report by name."""


def resolve_report(report: Iterable[str] | Mapping[str, Measure], known: Mapping[str, Measure]) -> dict[str, Measure]:
    """Returns the measures by name.

    Args:
        report: Names of measures, or functions by the name of their metric.
        known: The measures that have names.

    Raises:
        ArgumentTypeError: It is something else.
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
        raise ArgumentTypeError(f"`report` is {report!r}; it must be a list of names, or functions by name.")
    for name in (names := list(report)):
        if name not in known:
            raise ArgumentError(f"`report` names {name!r}, which no step measures; {did_you_mean(str(name), known)}")
    return {name: known[name] for name in names}


def make_report(report: Iterable[str] | Mapping[str, Measure]) -> Callable[[Update, Metrics], Metrics]:
    """Returns the function that adds to the metrics of a step what is to be reported of its update."""
    measures = resolve_report(report, MEASURES)

    def reported(update: Update, metrics: Metrics) -> Metrics:
        for name in measures:
            if name in metrics:
                raise ObjectiveError(
                    f"`loss_fn` returned a metric `{name}`, which `report` asks of the step; rename one of the two."
                )
        return metrics | {name: check_metric(name, measure(update), "report") for name, measure in measures.items()}

    return reported
