"""Rematerialization: the same numbers from less memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from tests.core.test_models_of_all_kinds import Language, Staged
from tests.core.test_precision import KillAt, KilledError, products
from tests.problems import Busy, Counting, config, regression, squared_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    ExtensionConfig,
    Trainer,
    TrainState,
    fuse_steps,
    make_mesh,
    make_train_step,
)
from trainer.core.gradient import make_objective
from trainer.core.remat import in_parts, plan_of, rematerialized

pytestmark = pytest.mark.filterwarnings("ignore:Using .Module.sow..:DeprecationWarning")


class Block(nnx.Module):
    """Has batch statistics, dropout and a counter, takes a flag, and returns a constant beside its output."""

    def __init__(self, dim, rngs):
        self.norm = nnx.BatchNorm(dim, rngs=rngs)
        self.hidden = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4 * dim, dim, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, residual):
        self.calls[...] += 1
        y = self.out(self.dropout(jax.nn.gelu(self.hidden(self.norm(x)))))
        return (x + y if residual else y), "a constant"


class Deep(nnx.Module):
    def __init__(self, dim=8, depth=3, *, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.embed = nnx.Linear(4, dim, rngs=rngs)
        self.layers = nnx.List([Block(dim, rngs) for _ in range(depth)])
        self.head = nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x, constant = layer(x, residual=True)
            assert constant == "a constant"
        return self.head(x)[:, 0]


SETTINGS = {
    "blocks": "blocks",
    "nothing_saveable": "nothing_saveable",
    "dots": "dots_saveable",
    "batched dots": "dots_with_no_batch_dims_saveable",
    "a policy": jax.checkpoint_policies.save_only_these_names("activation"),
    "paths": {"layers/0": "dots_saveable", "layers/*": "nothing_saveable"},
    "depth": {"**/hidden": "everything_saveable"},
}


def create(model=None, **changes):
    return TrainState.create(model or Deep(), optax.adam(1e-2), rng=jax.random.key(0), **changes)


def step_of(remat, loss_fn=squared_error, **changes):
    return make_train_step(loss_fn, optax.adam(1e-2), remat=remat, **changes)


def checkpoints(step, *arguments):
    """How many recomputations a step has, at any depth."""

    def count(jaxpr):
        here = sum(equation.primitive.name == "remat2" for equation in jaxpr.eqns)
        return here + sum(count(inner) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params))

    return count(jax.make_jaxpr(step)(*arguments).jaxpr)


def residuals(remat, state, batch):
    """The bytes that are kept from the forward pass for the backward pass."""
    plan = plan_of(remat)
    objective = rematerialized(plan, make_objective(squared_error, nnx.Param, {}, None, in_parts(plan)))

    def forward(params):
        return jax.vjp(lambda params: objective(params, state, batch, state.rng)[0], params)[1]

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(forward, state.params)))


def bits(state):
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, state
    )


def test_none_is_the_program_without_it():
    arguments = create(), regression(8)
    plain = make_train_step(squared_error, optax.adam(1e-2))
    assert jax.jit(step_of(None)).lower(*arguments).as_text() == jax.jit(plain).lower(*arguments).as_text()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.few(2)
def test_the_step_is_the_same_within_rounding(name):
    plain, again = create(), create()
    step, recomputing = jax.jit(step_of(None)), jax.jit(step_of(SETTINGS[name]))
    assert checkpoints(step_of(SETTINGS[name]), again, regression(8)) > 0
    for _ in range(3):
        plain, metrics = step(plain, regression(16))
        again, found = recomputing(again, regression(16))
    chex.assert_trees_all_close(bits(again), bits(plain), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(found, metrics, rtol=1e-4, atol=1e-6)
    assert [int(again.model_state["layers"][index]["calls"]) for index in range(3)] == [3, 3, 3]


@pytest.mark.slow
def test_gradients_are_the_same_to_the_bit_operation_by_operation():
    """What differs in a compiled step is how XLA fuses it."""
    optimizer = optax.sgd(1.0)
    moved = []
    for remat in (None, "blocks"):
        step = make_train_step(squared_error, optimizer, remat=remat)
        state = TrainState.create(Deep(depth=2), optimizer, rng=jax.random.key(0))
        with jax.disable_jit():
            moved.append(bits(step(state, regression(8))[0]))
    chex.assert_trees_all_equal(*moved)


@pytest.mark.parametrize("make", [Staged, Language])
@pytest.mark.few(1)
def test_models_as_people_write_them(make):
    """Blocks are the outermost modules in lists, also in lists of lists; what they sow is there afterwards."""

    def loss_fn(model, batch, rng, step):
        loss, _ = squared_error(model, batch, rng, step)
        sown = jax.tree.leaves(nnx.pop(model, nnx.Intermediate))
        return loss + sum(1e-3 * jnp.mean(leaf**2) for leaf in sown), {"sown": len(sown)}

    def trained(remat):
        # Not by Adam, which makes a step of the noise in a gradient of zero, as that of the bias of keys is.
        optimizer = optax.sgd(0.1)
        state = TrainState.create(make(), optimizer, rng=jax.random.key(0))
        return jax.jit(make_train_step(loss_fn, optimizer, remat=remat))(state, regression(8))

    results = [trained(remat) for remat in (None, "blocks")]
    chex.assert_trees_all_close(*[(bits(state), metrics) for state, metrics in results], rtol=1e-4, atol=1e-5)
    count = {Staged: 4, Language: 2}[make]  # three blocks and what stands between stages, in a list too
    assert checkpoints(step_of("blocks", loss_fn), create(make()), regression(8)) == count


class SowingBlock(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        y = jnp.tanh(self.layer(x))
        self.sow(nnx.Intermediate, "balance", jnp.mean(y**2))
        return y


def test_what_a_block_sows_is_differentiated():
    def loss_fn(model, batch, rng, step):
        y = model(batch["input"])
        return jnp.mean(y) + sum(jax.tree.leaves(nnx.pop(model, nnx.Intermediate))), {}

    def model():
        return nnx.Sequential(SowingBlock(nnx.Rngs(0)), SowingBlock(nnx.Rngs(1)))

    results = [jax.jit(step_of(remat, loss_fn))(create(model()), regression(8))[0] for remat in (None, "blocks")]
    chex.assert_trees_all_close(*map(bits, results), rtol=1e-5, atol=1e-6)


def test_an_extension_that_is_switched_counts_at_once():
    extension = Counting(ExtensionConfig(weight=0.1))
    step = step_of("dots_saveable", extensions={"counting": extension})
    state = create(extensions={"counting": extension})
    assert "counting_loss" in jax.eval_shape(step, state, regression(8))[1]
    extension.enabled = False
    assert "counting_loss" not in jax.eval_shape(lambda *args: step(*args), state, regression(8))[1]


def test_what_is_kept_for_the_backward_pass():
    state, batch = create(Deep(64, 8)), regression(1024)
    kept = {str(remat): residuals(remat, state, batch) for remat in (None, "blocks", "dots_saveable")}
    assert kept["blocks"] < 0.2 * kept["None"]
    assert kept["dots_saveable"] < 0.6 * kept["None"]


MEMORY = """
    import jax, sys
    from tests.problems import config, regression, squared_error
    from tests.core.test_remat import Deep
    from trainer import Trainer
    for remat in ("blocks", "dots_saveable"):
        trainer = Trainer(Deep(64, 8), config(), loss_fn=squared_error, remat=remat)
        cost = trainer.compile(regression(1024), without_remat=True)
        print(cost.temporary, cost.without_remat.temporary)
"""


@pytest.mark.slow
def test_compile_tells_the_memory_that_it_saves():
    """By the scheduler of XLA for the CPU that minds memory; its default one runs what is ready, recomputation too."""
    flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[2],
    )
    sizes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert sizes[0][0] < 0.55 * sizes[0][1]
    assert sizes[1][0] < 0.8 * sizes[1][1]


def build(tmp_path, remat="blocks", model=None, **changes):
    return Trainer(model or Deep(), config(), loss_fn=squared_error, remat=remat, workdir=tmp_path, **changes)


@pytest.mark.slow
def test_the_cost_says_what_is_saved_when_asked(tmp_path):
    trainer = build(tmp_path)
    assert trainer.compile(regression(8)).without_remat is None
    cost = trainer.compile(regression(8), without_remat=True)
    saved = cost.without_remat.temporary - cost.temporary
    assert [line.split() for line in str(cost).splitlines() if "remat" in line] == [
        ["saved", "by", "remat", f"{saved:,}", "bytes"]
    ]
    assert cost.flops > cost.without_remat.flops
    assert build(tmp_path, None).compile(regression(8), without_remat=True).without_remat is None


@pytest.mark.slow
def test_fused_steps_and_ensembles():
    step = step_of("blocks")
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), regression(16))
    results = [jax.jit(fuse_steps(step_of(remat), 4))(create(), batches)[0] for remat in (None, "blocks")]
    chex.assert_trees_all_close(*map(bits, results), rtol=1e-4, atol=1e-5)

    def member(key):
        return TrainState.create(Deep(rngs=nnx.Rngs(key)), optax.adam(1e-2), rng=key)

    keys = jax.random.split(jax.random.key(0), 2)
    states, _ = jax.jit(jax.vmap(step, (0, None)))(jax.vmap(member)(keys), regression(8))
    alone, _ = jax.jit(step)(member(keys[1]), regression(8))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], states.params), alone.params, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_devices_of_a_mapped_axis():
    mesh, results = make_mesh({"data": 8}), []
    for remat in (None, "blocks"):
        step = step_of(remat, axis_name="data")
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
        results.append(jax.jit(jax.shard_map(step, mesh=mesh, **specs))(create(), regression(32))[0])
    chex.assert_trees_all_close(*map(bits, results), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_trainer_on_a_mesh_of_eight(tmp_path):
    results = []
    for remat in (None, "blocks"):
        trainer = build(tmp_path / str(remat), remat, mesh=make_mesh({"fsdp": 8}))
        trainer.train(regression(64), 2, 16)
        results.append(bits(trainer.state))
    chex.assert_trees_all_close(*results, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(tmp_path):
    whole = build(tmp_path / "whole")
    whole.train(regression(40), 3, 8)
    killed = build(tmp_path / "killed", save_interval=3, callbacks=[KillAt(8)])
    with pytest.raises(KilledError):
        killed.train(regression(40), 3, 8)
    killed.close()
    resumed = build(tmp_path / "killed", save_interval=3)
    resumed.train(regression(40), 3, 8, resume=True)
    chex.assert_trees_all_equal(bits(resumed.state), bits(whole.state))


def test_with_mixed_precision():
    """The blocks compute in bfloat16, and frozen params and batch statistics keep their bits."""
    step = step_of("blocks", precision="bfloat16", wrt=nnx.All(nnx.Param, nnx.PathContains("head")))
    state = create(wrt=nnx.All(nnx.Param, nnx.PathContains("head")))
    assert products(step, state, regression(8)) == {("bfloat16",) * 2}
    after, _ = jax.jit(step)(state, regression(8))
    frozen = [lambda s, i=i: s.model_state["layers"][i]["hidden"] for i in range(3)]
    chex.assert_trees_all_equal(*[[get(s) for get in frozen] for s in (state, after)])
    assert after.model_state["layers"][0]["norm"]["mean"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("remat", "kind", "message"),
    [
        (
            "dots",
            ArgumentError,
            "`remat` is 'dots', which is no policy; known are 'blocks', 'everything_saveable', ",
        ),
        (
            "save_only_these_names",
            ArgumentError,
            r"`remat` is 'save_only_these_names', which takes arguments; pass what it returns, jax.checkpoint",
        ),
        (
            3,
            ArgumentTypeError,
            "`remat` is of type int; it must be the name of a policy, a policy of jax",
        ),
        ({}, ArgumentError, "`remat` is empty; map patterns of paths to policies"),
        ({"layers/*": "blocks"}, ArgumentError, r"`remat\['layers/\*'\]` is 'blocks', which is no policy"),
        (
            {"layers/(": "nothing_saveable"},
            ArgumentError,
            r"`remat` has the pattern 'layers/\(', which is no regular",
        ),
        (
            {"layer/*": "nothing_saveable"},
            ArgumentError,
            r"`remat` has the pattern 'layer/\*', which matches no whole",
        ),
    ],
)
def test_bad_input_is_refused_by_name(remat, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        build(tmp_path, remat)


def test_a_model_without_blocks_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="`remat` asks for every block, and no list of `model` holds modules; name"):
        build(tmp_path, "blocks", Busy())
