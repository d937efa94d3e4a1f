"""Extensions: objects that add a loss to the objective, handle events of the run, or both."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.callbacks.base import Callback
from trainer.config.base import Config
from trainer.errors import ArgumentTypeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionConfig(Config):
    """The base configuration of all extensions.

    Attributes:
        name: A display name; the loss is reported under the key in ``extensions``.
        weight: The factor of the loss, any finite number. It is negative for a bonus that should grow, such as the
            entropy of a policy. Changing it compiles nothing.
        enabled: Whether the loss is included. Each setting compiles the step once.
    """

    weight: float = 1.0
    enabled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("weight", "finite", math.isfinite(self.weight))


class Extension(nnx.Module, Callback):
    """The base class of extensions; any object with the same methods works too.

    Its variables are part of the training state: `loss_fn` may read and assign them, and the step
    carries them into the next state; no optimizer updates them. The hooks of `trainer.Callback` run
    outside compiled code, on the object that was passed to the trainer, with its Python attributes. A
    number, text, container or dataclass in an attribute that `loss_fn` reads becomes a constant of the
    step when an epoch begins: if a hook has changed it, the step is compiled again. A hook that changes
    one within an epoch changes the next epoch; if the run is resumed within that epoch, its rest has
    the value of the save. Several processes keep the value of the first step. Of containers with more
    than 1000 entries or 8 KiB of arrays, only another object counts, not a change in place. An array in
    an attribute is part of the training state, like a variable: to change it, assign
    ``trainer.state.extensions[name]["variables"][attribute]``.

    Example::

        class OutputPenalty(Extension):
            def loss_fn(self, batch, model_outputs, **kwargs):
                return jnp.mean(model_outputs**2)

        Trainer(..., extensions={"penalty": OutputPenalty(ExtensionConfig(weight=1e-3))})
    """

    def __init__(self, config: ExtensionConfig | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        """Makes an extension.

        Args:
            config: Its weight and whether it is enabled.
            rngs: For subclasses that need random variables; not used here.

        Raises:
            ArgumentTypeError: ``config`` is not an `ExtensionConfig`.
        """
        del rngs
        config = ExtensionConfig() if config is None else config
        if not isinstance(config, ExtensionConfig):
            raise ArgumentTypeError(
                f"`config` is of type {type(config).__name__}; it must be a trainer.ExtensionConfig."
            )
        self.config = config

    def is_enabled(self) -> bool:
        """Returns whether the loss is included."""
        return self.config.enabled

    @property
    def enabled(self) -> bool:
        """The same as `is_enabled`; assign it to switch the extension on or off."""
        return self.config.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.config = self.config.replace(enabled=value)

    @property
    def weight(self) -> float:
        """The factor of the loss; assign it to change it from the next step on."""
        return self.config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.config = self.config.replace(weight=value)

    def loss_fn(self, batch: Any, model_outputs: Any, **kwargs: Any) -> jax.Array:
        """Returns the loss before weighting, a floating scalar; zero here.

        Args:
            batch: The batch of the step.
            model_outputs: The objective's ``model_outputs``; if it reports none,
                ``model(batch["input"])`` where possible, else None.
            **kwargs: ``model`` (after the objective's forward pass), ``rng`` (a key for this
                extension and this step) and ``step`` (the updates before this one).
        """
        del batch, model_outputs, kwargs
        return jnp.zeros(())
