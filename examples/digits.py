"""Trains a small convolutional network on 1,797 real handwritten digits, in well under a minute.

Run it with ``make demo``, or with ``python examples/digits.py`` if the extra ``demo`` is installed.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from trainer import OptimizerConfig, SchedulerConfig, Trainer, TrainingConfig


class ConvNet(nnx.Module):
    """Two convolutions with batch normalization, dropout, and a linear classifier."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.classifier = nnx.Linear(64 * 2 * 2, 10, rngs=rngs)

    def __call__(self, image_BxHxWx1):
        x = nnx.relu(self.norm1(self.conv1(image_BxHxWx1)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.classifier(self.dropout(x.reshape(x.shape[0], -1)))


def cross_entropy(model, batch, rng, step):
    """The objective. The trainer switches dropout and batch statistics between training and evaluation."""
    del rng, step
    logits_BxC = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["label"]).mean()
    accuracy = jnp.mean(jnp.argmax(logits_BxC, axis=-1) == batch["label"])
    return loss, {"accuracy": accuracy}


def digits():
    """Returns training and validation data, one in five held out."""
    data = load_digits()
    image = data.images[..., None].astype(np.float32) / 16.0
    label = data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(label))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    return (
        {"image": image[rest], "label": label[rest]},
        {"image": image[held_out], "label": label[held_out]},
    )


def make_trainer(workdir):
    config = TrainingConfig(
        name="digits",
        optimizer=OptimizerConfig(optimizer_type="adamw", learning_rate=3e-3, weight_decay=1e-4, decay_mask=True),
        scheduler=SchedulerConfig(scheduler_type="one_cycle", min_lr_ratio=0.01),
        gradient_clip_norm=1.0,
        log_frequency=1,
    )
    return Trainer(ConvNet(nnx.Rngs(0)), config, loss_fn=cross_entropy, workdir=workdir)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args(argv)

    train_data, val_data = digits()
    steps_per_epoch = -(-len(train_data["label"]) // 128)
    for earlier in arguments.workdir.glob("checkpoint_*.msgpack"):  # the trainer would warn of them
        earlier.unlink()
    trainer = make_trainer(arguments.workdir)
    result = trainer.train(train_data, arguments.epochs, 128, val_data, val_interval=steps_per_epoch)
    checkpoint = trainer.save_checkpoint()

    restored = make_trainer(arguments.workdir)
    restored.load_checkpoint(checkpoint)
    again = restored.evaluate(val_data, 128)

    picture = arguments.workdir / "curves.png"
    trainer.history.plot(picture)
    print(f"validation accuracy   {result['accuracy']:.4f}  after {trainer.step} steps")
    print(f"restored from disk    {again['accuracy']:.4f}")
    print(f"checkpoint            {checkpoint}")
    print(f"curves                {picture}")
    if result["accuracy"] <= 0.97 or again != result:
        raise SystemExit("the run did not reach 0.97, or the restored trainer disagrees")
    return result


if __name__ == "__main__":
    main()
