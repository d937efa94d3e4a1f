"""Gradient accumulation together with `precision`, `nonfinite`, `remat`, averages of params and `report`.

Each is compared with the same step on the whole batch. In float32 the two differ by the order of sums; in half
precision by the rounding of sums over rows, to 8 bits in bfloat16 and 11 in float16. Tolerances are the norm of the
difference over the norm of what was learned.
"""

import itertools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.core.test_accumulation import Deep
from tests.problems import Busy, config, regression, squared_error
from tests.test_api import assert_same_bits
from tests.test_transforms import mesh, on_host
from trainer import (
    NonFiniteError,
    Precision,
    Trainer,
    TrainState,
    averaged_params,
    check_finite,
    ema_of_params,
    fuse_steps,
    make_mesh,
    make_train_step,
)

EXACT, ELEVEN_BITS, EIGHT_BITS = 1e-5, 0.005, 0.05
FLOAT16 = Precision("float16", initial_scale=256)
AVERAGED = optax.chain(optax.sgd(0.01, momentum=0.9), ema_of_params(0.5))
REPORT = ("gradient_norm", "update_ratio")
STEPS = 4


def weighted(model, batch, rng, step):
    """A mean by weights, with a factor for each row: one of 3e4 makes a scaled gradient in float16 infinite."""
    del rng, step
    error = (model(batch["input"]) - batch["target"]) ** 2 * batch["factor"]
    weight = batch["mask"].sum()
    return (error * batch["mask"]).sum() / weight, {"batch_weight": weight}


def rows(count=32, features=24, seed=0, factor=1.0, of=2):
    """Rows of which micro-batch ``of`` of four has a factor."""
    strided = np.arange(count) % STEPS == of
    return {
        **regression(count, features, seed),
        "mask": np.arange(count, dtype=np.float32) % 3 + 0.5,
        "factor": np.where(strided, factor, 1.0).astype(np.float32),
    }


def stacked(*batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def create(model=None, optimizer=AVERAGED, **options):
    held = {name: options[name] for name in ("precision", "nonfinite") if name in options}
    return TrainState.create(model or Deep(), optimizer, rng=jax.random.key(0), **held)


def made(loss_fn=weighted, optimizer=AVERAGED, steps=STEPS, **options):
    return make_train_step(loss_fn, optimizer, accumulate_steps=steps, **options)


def apart(found, wanted):
    """The norm of the difference of two params, over the norm of what was learned since `Deep` was made."""
    start = on_host(create().params)
    difference, moved = (jax.tree.map(np.subtract, wanted, other) for other in (found, start))
    return float(optax.tree.norm(difference) / optax.tree.norm(moved))


def learned(state):
    return state.params, state.opt_state, state.model_state


def placements():
    """Puts a state and batches on one device, and on eight that share the rows."""

    def shared(state, batches):
        replicated, split = NamedSharding(mesh(), P()), NamedSharding(mesh(), P(None, "data"))
        return jax.device_put(state, replicated), jax.device_put(batches, split)

    return {"one": lambda state, batches: (state, batches), "eight": shared}


@pytest.fixture(params=placements())
def place(request):
    return placements()[request.param]


@pytest.mark.parametrize("nonfinite", ["ignore", "skip", "raise"])
@pytest.mark.few(1)
def test_an_overflow_in_one_micro_batch_skips_the_update_and_halves_the_scale(nonfinite, place):
    precision = Precision("float16", initial_scale=1024)
    options = {"precision": precision, "nonfinite": nonfinite}
    step = made(**options)
    before, batches = place(create(Busy(), **options), stacked(*(rows(features=4, factor=f) for f in (1.0, 3e4, 1.0))))
    first, _ = jax.jit(fuse_steps(step, 3))(before, batches, 1)
    second, _ = jax.jit(fuse_steps(step, 3))(before, batches, 2)
    third, metrics = jax.jit(fuse_steps(step, 3))(before, batches)
    assert_same_bits(learned(second), learned(first))
    kernels = [np.asarray(state.params["outer"]["kernel"]) for state in (before, first, third)]
    assert not any(np.array_equal(one, other) for one, other in itertools.pairwise(kernels))
    assert metrics["loss_scale"].tolist() == [1024, 1024, 512]
    assert int(third.step) == 3


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("loss_fn", [weighted, squared_error])
@pytest.mark.few(1)
def test_nan_in_one_micro_batch_leaves_every_bit_as_it_was(policy, loss_fn, place):
    step = jax.jit(fuse_steps(made(loss_fn, nonfinite=policy), 3))
    batches = [rows(features=4, seed=seed) for seed in range(3)]
    batches[1]["target"][6] = np.nan  # a row of micro-batch 2
    before, batches = place(create(Busy(), nonfinite=policy), stacked(*batches))
    first, _ = step(before, batches, 1)
    second, _ = step(before, batches, 2)
    third, metrics = step(before, batches)
    assert_same_bits(learned(second), learned(first))
    assert int(first.model_state["calls"]) == int(second.model_state["calls"]) == STEPS
    if policy == "skip":
        assert metrics["skipped"].tolist() == [0, 1, 0]
        assert (int(second.step), int(third.step)) == (2, 3)
        assert int(third.model_state["calls"]) == 2 * STEPS
        return
    assert metrics["skipped"].tolist() == [0, 1, 1]
    assert_same_bits(learned(third), learned(first))
    with pytest.raises(NonFiniteError, match="step 2 is not finite: `loss`"):
        check_finite(third)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"precision": "bfloat16"}, EIGHT_BITS),
        ({"precision": FLOAT16}, ELEVEN_BITS),
        ({"remat": "blocks"}, EXACT),
        ({"remat": "dots_saveable"}, EXACT),
        ({"report": REPORT}, EXACT),
        ({"nonfinite": "skip", "remat": "blocks", "report": REPORT}, EXACT),
        ({"nonfinite": "skip", "remat": "blocks", "report": REPORT, "precision": "bfloat16"}, EIGHT_BITS),
        ({"nonfinite": "raise", "remat": "blocks", "report": REPORT, "precision": FLOAT16}, ELEVEN_BITS),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.few(2)
def test_three_fused_steps_are_those_of_the_whole_batches(options, tolerance, place):
    batches = stacked(*(rows(seed=seed) for seed in range(3)))
    state, batches = place(create(**options), batches)
    found, metrics = jax.jit(fuse_steps(made(**options), 3))(state, batches)
    wanted, expected = jax.jit(fuse_steps(made(steps=1, **options), 3))(state, batches)
    found, metrics, wanted, expected = on_host(
        (found.replace(rng=np.zeros(())), metrics, wanted.replace(rng=np.zeros(())), expected)
    )
    averages = [averaged_params(state.opt_state, state.params) for state in (found, wanted)]
    assert np.any(averages[0]["last"]["kernel"] != found.params["last"]["kernel"])
    assert apart(found.params, wanted.params) < tolerance
    assert apart(*averages) < tolerance
    assert metrics.keys() == expected.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("devices", [None, 8])
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2 * EIGHT_BITS), (FLOAT16, 2 * ELEVEN_BITS)])
@pytest.mark.few(1)
def test_a_trainer_with_all_of_them_learns_what_it_learns_from_whole_batches(devices, precision, tolerance, tmp_path):
    data = rows(128)
    data["target"][17] = np.nan  # one batch of four is left out
    results = []
    for steps in (STEPS, 1):
        trainer = Trainer(
            Deep(),
            config(log_frequency=1),
            optax.sgd(0.01, momentum=0.9),
            loss_fn=weighted,
            workdir=tmp_path / str(steps),
            params_average=ema_of_params(0.5),
            accumulate_steps=steps,
            precision=precision,
            nonfinite="skip",
            remat="blocks",
            report=REPORT,
            mesh=None if devices is None else make_mesh({"data": devices}),
        )
        averages = trainer.train(data, 2, 32, rows(32, seed=1))
        assert trainer.history[-1]["step"] == trainer.step == 8
        assert int(trainer.state.extensions["nonfinite"]["skipped"]) == 2
        norms = trainer.history.series("gradient_norm")[1]
        params = trainer.state.params, averaged_params(trainer.opt_state, trainer.state.params)
        results.append((on_host(params), averages, norms))
    (found, averages, norms), (wanted, expected, others) = results
    assert all(apart(*params) < tolerance for params in zip(found, wanted, strict=True))
    assert averages == pytest.approx(expected, rel=tolerance)
    np.testing.assert_allclose(norms, others, rtol=tolerance)  # NaN at the same steps
