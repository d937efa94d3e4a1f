"""A small network learns from a large one: distillation (Hinton et al. 2015) on real handwritten digits.

Teacher and student are parts of one module. ``wrt="student/**"`` trains the student and freezes the teacher, which
takes no gradient and no optimizer memory. Run it with ``python examples/distillation.py``.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, make_eval_step, make_train_step

TEMPERATURE = 4.0


class Mlp(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class Pair(nnx.Module):
    def __init__(self, teacher, student):
        self.teacher, self.student = teacher, student


def supervised(model, batch, rng, step):
    """The cross entropy with the labels."""
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


def distillation(pair, batch, rng, step):
    """T² · KL(teacher ‖ student) of the softened outputs; labels serve only for the accuracy."""
    logits = pair.student(batch["image"])
    soft = jax.nn.softmax(pair.teacher(batch["image"]) / TEMPERATURE)
    loss = TEMPERATURE**2 * optax.kl_divergence(jax.nn.log_softmax(logits / TEMPERATURE), soft).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


def data():
    """The digits for training and for the test."""
    digits = load_digits()
    image, label = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(label))
    return tuple({"image": image[rows], "label": label[rows]} for rows in (order[400:], order[:400]))


def main(workdir):
    """Returns the accuracy of the teacher and of the student, trained by a `Trainer` and by the pure core."""
    training, test = data()
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=3e-3))
    teacher = Trainer(Mlp(256, nnx.Rngs(0)), config, loss_fn=supervised, workdir=Path(workdir, "teacher"))
    result = {"teacher": teacher.train(training, 30, 128, test)["accuracy"]}

    pair = Pair(teacher.model, Mlp(8, nnx.Rngs(1)))
    pair.train()
    student = Trainer(pair, config, loss_fn=distillation, wrt="student/**", workdir=Path(workdir, "student"))
    result["student"] = student.train(training, 60, 128, test)["accuracy"]

    optimizer = optax.adam(3e-3)
    state = TrainState.create(pair, optimizer, rng=jax.random.key(0), wrt="student/**")
    step = jax.jit(make_train_step(distillation, optimizer, wrt="student/**"), donate_argnums=0)
    draws = np.random.default_rng(0)
    for _ in range(60):
        order = draws.permutation(len(training["label"]))
        for start in range(0, len(order), 128):
            state, _ = step(state, {name: column[order[start : start + 128]] for name, column in training.items()})
    result["student, pure core"] = float(jax.jit(make_eval_step(distillation))(state, test)["accuracy"])
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(main(directory))
