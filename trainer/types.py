"""The words that signatures are written in: aliases and documented callables, no logic."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax

Batch = Any
"""A pytree of arrays (a dict, a tuple, …) that mostly share their leading dimension, the examples."""

Metrics = dict[str, Any]
"""Names to scalars on the device, or to what becomes one (`float(metric)`). Reading it waits for the step."""


class LossFn(Protocol):
    """The objective: what to minimize. The only thing that a caller must bring."""

    def __call__(
        self, model: Any, batch: Any, rng: jax.Array, step: jax.Array, /
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """Evaluates the objective on one batch.

        It is traced, so it sees abstract values and runs again only for a new shape. It may change
        the variables of ``model`` (batch statistics, random counts): the step carries them on.

        Args:
            model: The module. In a train step it is in training mode, but for the parts that were handed over in
                evaluation mode; otherwise all of it is in evaluation mode.
            batch: The batch as it was given: a pytree of arrays, mostly each of shape ``(batch_size, ...)``.
            rng: A key for this step and no other.
            step: The number of updates before this one, an int32 scalar.

        Returns:
            The loss, a floating scalar, and a mapping of metrics: scalars, averaged by the weights of batches; pairs
            ``(value, weight)``, averaged by weights of their own; an `nnx.Metric` that was made and updated in this
            call, or another pytree with ``merge(other)`` and ``compute()`` (clu, metrax), merged over all batches
            before it computes; arrays by entry, `trainer.vector` and `trainer.histogram`. Some names are special:

            * ``batch_weight``: how much this batch counts in averages (tokens that are not
              padding, say). Left out, a batch counts by its number of examples, or as one where its arrays have
              no common leading dimension. A batch of weight zero counts for nothing, whatever its metrics are.
            * ``model_outputs``: handed to the extensions, not reported. It may be any tree. Left out,
              an enabled extension costs a second call of the model.
            * ``loss`` is replaced by the total, extensions included; ``step`` is refused.
        """
        ...


class StepFn(Protocol):
    """A step of your own: any pure function that advances a training state by one step."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Mapping[str, Any]]:
        """Returns the next state and the metrics; it is traced.

        Args:
            state: A `trainer.TrainState`. Its fields may hold what you put there: ``opt_state`` the states of two
                optimizers, ``extensions`` a replay buffer.
            batch: The batch.

        Returns:
            The state with the same structure, shapes and dtypes, and a ``step`` that is larger by one; and metrics of
            the kinds that a `LossFn` reports, of which ``loss`` is the one that is watched for NaN.
        """
        ...


class EvalParams(Protocol):
    """Returns the params to evaluate, which an optimizer keeps beside those that it trains.

    Such are an average, `trainer.averaged_params`, and the x of ``optax.contrib.schedule_free_eval_params``, where
    y = (1 - β) z + β x is trained and x = (y - (1 - β) z) / β evaluated (Defazio et al. 2024, "The Road Less
    Scheduled").
    """

    def __call__(self, opt_state: Any, params: Any, /) -> Any:
        """Returns a tree like ``params``.

        It is traced in an evaluation step, and called as it is for ``trainer.model``.

        Args:
            opt_state: The state of the optimizer that you made.
            params: What it updates, as nested plain dicts.
        """
        ...


class LogCallback(Protocol):
    """Called with plain floats, ``prefix="train"`` or ``prefix="val"``."""

    def __call__(self, step: int, metrics: dict[str, float], *, prefix: str) -> Any: ...


class ExtensionLike(Protocol):
    """What a step and a trainer need of an extension; `trainer.Extension` has all of it."""

    @property
    def weight(self) -> float: ...

    def is_enabled(self) -> bool: ...

    def loss_fn(self, batch: Any, model_outputs: Any, **kwargs: Any) -> jax.Array: ...


BATCH_WEIGHT = "batch_weight"
"""The metric under which an objective reports how much its batch counts in averages."""

NonFinite = Literal["ignore", "skip", "raise"]
"""What becomes of a step whose loss, gradients or results are not finite; see `trainer.make_train_step`."""

SKIPPED = "skipped"
"""The metric under which a step with ``nonfinite`` reports whether it was left out: 0 or 1."""

MODEL_OUTPUTS = "model_outputs"
"""The metric under which an objective hands outputs of the model to extensions; it is not reported."""

LOSS_SCALE = "loss_scale"
"""The entry of ``state.extensions`` that holds the loss scale of a float16 step, and the metric that reports it."""

NONFINITE = "nonfinite"
"""The entry of ``state.extensions`` that holds what happened in steps that were not finite."""

RECORDS = (NONFINITE, LOSS_SCALE)
"""The entries of ``state.extensions`` that belong to no extension: records that a step keeps."""

Remat = str | Mapping[str, str | Callable[..., Any]] | Callable[..., Any] | None
"""What is computed again in the backward pass: a policy of `jax.checkpoint` by name, policies by path, or none."""
