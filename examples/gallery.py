"""Runs the other examples, prints their figures, and draws the pictures of ``docs/gallery.md``.

``make gallery`` runs all of them, which takes minutes; ``python examples/gallery.py gan bandit`` runs two.
"""

import argparse
import contextlib
import importlib
import io
import re
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from PIL import Image

from trainer import OptimizerConfig, Trainer, TrainingConfig
from trainer.commands.main import main as command

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def curves(path, metrics, *runs):
    """Plots recorded runs, as ``trainer plot RUN ... -o FILE --metric NAME`` does."""
    chosen = [word for metric in metrics for word in ("--metric", metric)]
    if command(["plot", *map(str, runs), "-o", str(path), *chosen]):
        raise SystemExit(f"{path} was not drawn")


def digits(directory, path):
    result = importlib.import_module("digits").main(["--workdir", str(directory)])
    curves(path, ["loss", "accuracy"], directory)
    return result


def many_devices(directory, path):
    result = importlib.import_module("many_devices").main(["--workdir", str(directory)])
    curves(path, ["loss", "accuracy"], directory)
    return result | {"devices": jax.device_count()}


def distillation(directory, path):
    result = importlib.import_module("distillation").main(directory)
    curves(path, ["accuracy"], directory / "teacher", directory / "student")
    return result


def contrastive(directory, path):
    result = importlib.import_module("contrastive").main(directory)
    curves(path, ["loss", "found"], directory)
    return result


def bandit(directory, path):
    result = importlib.import_module("bandit").main(directory)
    curves(path, ["reward"], directory)
    return result


def gan(directory, path):
    """Draws real digits, with generated ones below."""
    example = importlib.import_module("gan")
    result = example.main(directory)
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3))
    state = example.initial_state(nnx.Rngs(0), jax.random.key(1))
    trained = Trainer(state, config, loss_fn=None, step_fn=example.step_fn, workdir=directory)
    trained.load_checkpoint(next(Path(directory).glob("checkpoint_*.msgpack")))
    generated = trained.model.generate(jax.random.normal(jax.random.key(7), (36, example.LATENT)))
    real = example.load_digits().data[:36] / 16
    figure, axes = plt.subplots(2, 1, figsize=(5, 1.9), layout="constrained")
    for axis, images, title in zip(axes, (real, np.asarray(generated)), ("real", "generated"), strict=True):
        rows = images.reshape(2, 18, 8, 8)
        rows = np.pad(rows, [(0, 0), (0, 0), (1, 1), (1, 1)])
        axis.imshow(rows.transpose(0, 2, 1, 3).reshape(20, 180), cmap="gray_r")
        axis.set(xticks=[], yticks=[], title=title)
    figure.savefig(path, dpi=110)
    return result


def transformer(directory, path):
    """Its printed metrics: the averages over a new batch, every fifty steps."""
    del directory
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = importlib.import_module("transformer").main([])
    rows = re.findall(r"step +(\d+)  loss ([\d.]+)  accuracy ([\d.]+)", printed.getvalue())
    step, loss, accuracy = np.array(rows, float).T
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    for axis, values, title in zip(axes, (loss, accuracy), ("loss", "accuracy"), strict=True):
        axis.plot(step, values, marker="o")
        axis.set(xlabel="step", title=title)
        axis.margins(y=0.08)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return result


EXAMPLES = (digits, transformer, gan, distillation, contrastive, bandit, many_devices)


def main(argv=None):
    names = [example.__name__ for example in EXAMPLES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", nargs="*", choices=[*names, []], default=names, help="all, if left out")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for example in EXAMPLES:
        if example.__name__ not in arguments.examples:
            continue
        path = IMAGES / f"{example.__name__}.png"
        with tempfile.TemporaryDirectory() as directory:
            result = example(Path(directory), path)
        with Image.open(path) as image:  # 64 colours are plenty, and half the bytes
            small = image.convert("RGB").quantize(64)
        small.save(path, optimize=True)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        print(f"{example.__name__}: {shown}  ({path.stat().st_size // 1000} KB)", flush=True)


if __name__ == "__main__":
    main()
