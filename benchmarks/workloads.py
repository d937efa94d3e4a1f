"""What is trained in the benchmarks: models, objectives and data, the same for every contender."""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, an objective, and data to train it on by Adam."""

    name: str
    make_model: Callable[[], nnx.Module]
    loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    data: Mapping[str, np.ndarray]
    batch_size: int

    @property
    def num_examples(self) -> int:
        return len(next(iter(self.data.values())))

    @property
    def steps(self) -> int:
        """The number of batches in an epoch, including a short last one."""
        return -(-self.num_examples // self.batch_size)

    @property
    def batch(self) -> dict[str, np.ndarray]:
        """The first batch."""
        return {name: column[: self.batch_size] for name, column in self.data.items()}

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(LEARNING_RATE)

    def trainer(self, log_frequency: int | None = None, **options: Any) -> Any:
        """Makes a `trainer.Trainer` with nothing but defaults, except for ``options``, and shows no progress."""
        # Imported here, since a process that runs a loop by hand must not import this library.
        from trainer import OptimizerConfig, Trainer, TrainingConfig

        optimizer = OptimizerConfig(optimizer_type="adam", learning_rate=LEARNING_RATE)
        changes = {} if log_frequency is None else {"log_frequency": log_frequency}
        config = TrainingConfig(optimizer=optimizer, **changes)
        return Trainer(self.make_model(), config, loss_fn=self.loss_fn, **{"progress": False, **options})


class Mlp(nnx.Module):
    """Layers of the given widths with relu between them."""

    def __init__(self, *widths: int):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(inner, outer, rngs=rngs) for inner, outer in pairwise(widths)])

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


class ConvNet(nnx.Module):
    """Two convolutions with pooling and one dense layer, for images of shape (28, 28, 1)."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.head = nnx.Linear(7 * 7 * 32, 10, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        return self.head(x.reshape(x.shape[0], -1))


class Block(nnx.Module):
    """Attention and a feed-forward layer, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.inner = nnx.Linear(width, 4 * width, rngs=rngs)
        self.outer = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.outer(nnx.gelu(self.inner(self.norm2(x))))


VOCABULARY = 256


class Transformer(nnx.Module):
    """A causal language model over bytes, a small one by default."""

    def __init__(self, context: int = 64, width: int = 64, heads: int = 4, blocks: int = 2):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def squared_error(model, batch, rng, step):
    del rng, step
    return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}


def cross_entropy(model, batch, rng, step):
    """For classes of examples and for the next tokens of sequences."""
    del rng, step
    logits = model(batch["input"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean(), {}


def dispatch_bound(rows: int = 4096) -> Workload:
    """Four layers of width 32 at batch 8: the host has more to do than the device."""
    draws = np.random.default_rng(0)
    data = {name: draws.standard_normal((rows, 32), np.float32) for name in ("input", "target")}
    return Workload("dispatch-bound MLP", lambda: Mlp(32, 32, 32, 32, 32), squared_error, data, 8)


def digits(rows: int = 60_000) -> Workload:
    """A dense network on as many random digits as MNIST has, at batch 128; the last batch is short."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 10, rows).astype(np.int32)
    images = draws.standard_normal((rows, 784), np.float32)
    return Workload("MLP 784-128-10", lambda: Mlp(784, 128, 10), cross_entropy, _pair(images, labels), 128)


def dense(batch_size: int) -> Workload:
    """Four dense layers at a large batch, enough for a processor to work on."""
    wide = digits(batch_size)

    def make_model() -> Mlp:
        return Mlp(784, 256, 256, 256, 10)

    return dataclasses.replace(wide, name="MLP 784-256-256-256-10", make_model=make_model, batch_size=batch_size)


def scanned_digits() -> Workload:
    """A dense network on the 1,797 real digits of 8x8 pixels of scikit-learn, at batch 64."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = _pair((pixels / 16).astype(np.float32), labels.astype(np.int32))
    return Workload("MLP 64-128-10 on real digits", lambda: Mlp(64, 128, 10), cross_entropy, data, 64)


def images(rows: int = 768) -> Workload:
    """A convolutional network on images of 28x28 at batch 64."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 10, rows).astype(np.int32)
    pixels = draws.standard_normal((rows, 28, 28, 1), np.float32)
    return Workload("convolutional net", ConvNet, cross_entropy, _pair(pixels, labels), 64)


def text(rows: int = 512) -> Workload:
    """A transformer on the manual that comes with Python, at batch 32."""
    return Workload("transformer", Transformer, cross_entropy, _windows(rows, 64), 32)


def wide_text(rows: int = 64, context: int = 512, width: int = 512, blocks: int = 8) -> Workload:
    """A transformer of 26 million params at batch 16, by default: work enough for an accelerator."""

    def make_model() -> Transformer:
        return Transformer(context, width, heads=8, blocks=blocks)

    return Workload(f"transformer of width {width}", make_model, cross_entropy, _windows(rows, context), 16)


def _windows(rows: int, context: int) -> dict[str, np.ndarray]:
    """Cuts pieces of text, with the next byte for each position."""
    from pydoc_data.topics import topics

    manual = np.frombuffer("".join(topics[name] for name in sorted(topics)).encode(), np.uint8).astype(np.int32)
    windows = manual[: rows * (context + 1)].reshape(rows, context + 1)
    return _pair(windows[:, :-1], windows[:, 1:])


def _pair(inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    return {"input": np.ascontiguousarray(inputs), "target": np.ascontiguousarray(targets)}
