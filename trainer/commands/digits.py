"""What ``trainer demo`` trains: a two-layer network on the handwritten digits that come with scikit-learn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Network(nnx.Module):
    """A hidden layer with dropout, and a linear classifier for ten digits."""

    def __init__(self, width: int = 256, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.classifier = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, image_BxP: jax.Array) -> jax.Array:  # noqa: N803 - shapes
        hidden = self.dropout(nnx.relu(self.hidden(image_BxP)))
        logits: jax.Array = self.classifier(hidden)
        return logits


def cross_entropy(model: Any, batch: Any, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean cross-entropy, and the accuracy."""
    del rng, step
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])}


def load(held_out: float = 0.2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns training and validation data: 1,797 images of 8 x 8 pixels from 0 to 1, shuffled once.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed (the extra ``demo``).
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs scikit-learn: pip install 'nnx-trainer[demo]'") from error
    image, label = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(label))
    data = {"image": image[order].astype(np.float32) / 16.0, "label": label[order].astype(np.int32)}
    count = int(held_out * len(label))
    return {name: rows[count:] for name, rows in data.items()}, {name: rows[:count] for name, rows in data.items()}
