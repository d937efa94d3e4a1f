"""Types used in signatures: aliases and documented callables, no logic."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax

Batch = Any
"""A pytree of arrays (a dict, a tuple, …) that usually share their leading dimension, the examples."""

Metrics = dict[str, Any]
"""Scalars on the device, or objects that convert to one (`float(metric)`), by name. Reading one waits for the step."""


class LossFn(Protocol):
    """The objective to minimize, written by the caller."""

    def __call__(
        self, model: Any, batch: Any, rng: jax.Array, step: jax.Array, /
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """Evaluates the objective on one batch.

        It is traced, so it sees abstract values and runs again only for new shapes. It may assign the
        variables of ``model`` (batch statistics, RNG counts): the step carries them over.

        Args:
            model: The module. In a train step it is in training mode, except for modules that were in evaluation mode
                when the state was created; elsewhere it is in evaluation mode.
            batch: The batch as it was passed: a pytree of arrays, usually each of shape ``(batch_size, ...)``.
            rng: A key unique to this step.
            step: The number of updates before this one, an int32 scalar.

        Returns:
            The loss, a floating scalar, and a mapping of metrics: scalars, averaged with the weights of the batches;
            pairs ``(value, weight)``, averaged with their own weights; an `nnx.Metric` created and updated in this
            call, or another pytree with ``merge(other)`` and ``compute()`` (clu, metrax), merged over all batches
            and then computed; arrays as `trainer.vector` or `trainer.histogram`. Some names are special:

            * ``batch_weight``: the weight of this batch in averages, such as the number of tokens that are not
              padding. By default a batch is weighted by its number of examples, or as 1 if its arrays have no
              common leading dimension. A batch of weight zero is ignored, whatever its metrics are: gradient, loss and
              metrics are zero. It is still an update, so momentum and weight decay act.
            * ``model_outputs``: any tree, passed to the extensions and not reported. Without it, an enabled
              extension costs a second call of the model.
            * ``loss`` is replaced by the total: the returned loss, extensions included; report any other value under
              another name. ``step`` raises an error.
        """
        ...


class StepFn(Protocol):
    """A custom step: any pure function that advances a training state by one step."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Mapping[str, Any]]:
        """Returns the next state and the metrics; it is traced.

        Args:
            state: A `trainer.TrainState`. Its fields may hold other pytrees: ``opt_state`` the states of two
                optimizers, ``extensions`` a replay buffer.
            batch: The batch.

        Returns:
            The state with the same structure, shapes and dtypes, and ``step`` increased by one; and metrics, of the
            kinds that a `LossFn` reports. The metric ``loss`` is checked for NaN.
        """
        ...


class EvalParams(Protocol):
    """Returns the params to evaluate, which an optimizer keeps beside those that it trains.

    Examples are an average, `trainer.averaged_params`, and the x of ``optax.contrib.schedule_free_eval_params``, where
    y = (1 - β) z + β x is trained and x = (y - (1 - β) z) / β is evaluated (Defazio et al. 2024, "The Road Less
    Scheduled").
    """

    def __call__(self, opt_state: Any, params: Any, /) -> Any:
        """Returns a tree like ``params``.

        It is traced in an eval step, and called directly for ``trainer.model``.

        Args:
            opt_state: The state of the optimizer that you made.
            params: The params that it updates, as nested plain dicts.
        """
        ...


class LogCallback(Protocol):
    """Called with plain floats, ``prefix="train"`` or ``prefix="val"``."""

    def __call__(self, step: int, metrics: dict[str, float], *, prefix: str) -> Any: ...


class ExtensionLike(Protocol):
    """The interface of an extension, for a step and a trainer; `trainer.Extension` implements it."""

    @property
    def weight(self) -> float: ...

    def is_enabled(self) -> bool: ...

    def loss_fn(self, batch: Any, model_outputs: Any, **kwargs: Any) -> jax.Array: ...


BATCH_WEIGHT = "batch_weight"
"""The metric under which an objective reports the weight of its batch in averages."""

NonFinite = Literal["ignore", "skip", "raise"]
"""How a step handles a loss, gradients or results that are not finite; see `trainer.make_train_step`."""

SKIPPED = "skipped"
"""The metric under which a step with ``nonfinite`` reports whether it was skipped: 0 or 1."""

MODEL_OUTPUTS = "model_outputs"
"""The metric under which an objective passes model outputs to extensions; it is not reported."""

LOSS_SCALE = "loss_scale"
"""The entry of ``state.extensions`` that holds the loss scale of a float16 step, and the metric that reports it."""

NONFINITE = "nonfinite"
"""The entry of ``state.extensions`` that records steps that were not finite."""

MEMBERS = "members"
"""The entry of ``state.extensions`` under which a sweep holds the step counts and keys of its members."""

RECORDS = (NONFINITE, LOSS_SCALE)
"""The entries of ``state.extensions`` that are not extensions, but records kept by the step."""

Remat = str | Mapping[str, str | Callable[..., Any]] | Callable[..., Any] | None
"""What to recompute in the backward pass: a policy of `jax.checkpoint`, its name, policies by path, or None."""
