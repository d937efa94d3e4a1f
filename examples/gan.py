"""A generative adversarial network on real handwritten digits: two networks, two optimizers, one step.

The step is an ordinary pure function. A custom loop compiles it and calls it; a `Trainer` runs it as ``step_fn``, with
saves, resuming and callbacks. A classifier trained on real digits measures how recognizable the generated ones are, and
how varied. Run it with ``python examples/gan.py``.
"""

import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState

LATENT = 16
OPTIMIZERS = {"generator": optax.adam(1e-3, b1=0.5), "critic": optax.adam(1e-3, b1=0.5)}


def mlp(*widths, rngs):
    layers = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nnx.Linear(inner, outer, rngs=rngs), lambda x: nnx.leaky_relu(x, 0.2)]
    return nnx.Sequential(*layers[:-1])


class Gan(nnx.Module):
    def __init__(self, rngs):
        self.generator = mlp(LATENT, 128, 128, 64, rngs=rngs)
        self.critic = mlp(64, 128, 128, 1, rngs=rngs)

    def generate(self, noise):
        return nnx.sigmoid(self.generator(noise))


def initial_state(rngs, rng):
    """A state whose two parts have their own optimizers."""
    state = TrainState.create(Gan(rngs), optax.identity(), rng=rng)
    return state.replace(opt_state={name: opt.init(state.params[name]) for name, opt in OPTIMIZERS.items()})


def step_fn(state, batch):
    """One update of the critic, then one of the generator against the updated critic."""
    real = batch["image"]
    draws = jax.random.split(jax.random.fold_in(state.rng, state.step))

    def critic_loss(part, params, noise):
        gan = state.replace(params={**params, "critic": part}).model()
        fake = jax.lax.stop_gradient(gan.generate(noise))
        return jnp.mean(nnx.softplus(-gan.critic(real))) + jnp.mean(nnx.softplus(gan.critic(fake)))

    def generator_loss(part, params, noise):
        gan = state.replace(params={**params, "generator": part}).model()
        return jnp.mean(nnx.softplus(-gan.critic(gan.generate(noise))))

    params, opt_state, metrics = dict(state.params), dict(state.opt_state), {}
    for (name, loss_of), rng in zip({"critic": critic_loss, "generator": generator_loss}.items(), draws, strict=True):
        noise = jax.random.normal(rng, (len(real), LATENT))
        metrics[f"{name}_loss"], grads = jax.value_and_grad(loss_of)(params[name], params, noise)
        updates, opt_state[name] = OPTIMIZERS[name].update(grads, opt_state[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
    return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def judged(gan, classifier, count=1000):
    """The classifier's confidence in generated digits, and the entropy of the classes that it finds (at most 2.30)."""
    images = np.asarray(gan.generate(jax.random.normal(jax.random.key(7), (count, LATENT))))
    found = classifier.predict_proba(images)
    share = np.bincount(found.argmax(-1), minlength=10) / count
    return float(found.max(-1).mean()), float(-(share[share > 0] * np.log(share[share > 0])).sum())


def main(workdir, epochs=300):
    """Returns the classifier's judgement of generated digits before and after training, for either loop."""
    digits = load_digits()
    image = (digits.data / 16).astype(np.float32)
    classifier = LogisticRegression(max_iter=2000).fit(image, digits.target)
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3))  # has no effect here
    start = initial_state(nnx.Rngs(0), jax.random.key(1))
    trainer = Trainer(start, config, loss_fn=None, step_fn=step_fn, workdir=workdir)
    trainer.train({"image": image}, epochs, 128)

    state, step = start.copy(), jax.jit(step_fn, donate_argnums=0)
    draws = np.random.default_rng(0)
    for _ in range(epochs):
        order = draws.permutation(len(image))
        for begin in range(0, len(order), 128):
            state, _ = step(state, {"image": image[order[begin : begin + 128]]})

    result = {}
    for when, gan in {"": trainer.model, ", pure core": state.model(), " before": start.model()}.items():
        result[f"sure{when}"], result[f"entropy{when}"] = judged(gan, classifier)
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(main(directory))
