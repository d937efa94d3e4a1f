"""Memory and communication of a step: against hand-written programs, and on machines that are not there."""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.marks import slow_unless
from trainer import BatchError, make_train_step
from trainer.compile.hlo import Traffic, collectives
from trainer.compile.planning import plan
from trainer.sharding import abstract_state, create_sharded, jit_step, make_mesh, shardings_of

ROOT = Path(__file__).parents[2]
ADAM = optax.adam(1e-3)
FEATURES, WIDTH = 64, 512
NUM_PARAMS = 2 * FEATURES * WIDTH + WIDTH + FEATURES


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, FEATURES, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


def squared_error(model, batch, rng, step):
    del rng, step
    return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}


def batch_of(examples):
    return {name: jax.ShapeDtypeStruct((examples, FEATURES), jnp.float32) for name in ("input", "target")}


def by_hand(params, opt_state, batch):
    """The same step with nothing of ours in it."""

    def loss_fn(params):
        hidden = jax.nn.relu(batch["input"] @ params["inner"]["kernel"] + params["inner"]["bias"][None])
        out = hidden @ params["outer"]["kernel"] + params["outer"]["bias"][None]
        return jnp.mean((out - batch["target"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = ADAM.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


SPLIT = {"params/inner/kernel": P(None, "fsdp"), "params/outer/kernel": P("fsdp", None)}
TENSOR = {
    "params/inner/kernel": P("fsdp", "tensor"),
    "params/inner/bias": P("tensor"),
    "params/outer/kernel": P("tensor", "fsdp"),
}
REPLICAS = {
    "params/inner/kernel": P(None, "tensor"),
    "params/inner/bias": P("tensor"),
    "params/outer/kernel": P("tensor", None),
}
LAYOUTS = {
    "data": ({"data": 8}, None),
    "tensor": ({"tensor": 8}, REPLICAS),
    "data x tensor": ({"data": 4, "tensor": 2}, REPLICAS),
    "fsdp x tensor": ({"fsdp": 4, "tensor": 2}, TENSOR),
    "fsdp": ({"fsdp": 8}, SPLIT),
    "data x fsdp": ({"data": 2, "fsdp": 4}, SPLIT),
    "data x fsdp x tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, TENSOR),
}


def planned(axes, rules, examples):
    mesh = make_mesh(axes)
    state = abstract_state(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh, rules=rules)
    return state, plan(make_train_step(squared_error, ADAM), state, batch_of(examples))


class TestAgainstAProgramByHand:
    @pytest.mark.parametrize(
        ("layout", "examples"),
        slow_unless(
            lambda layout, examples: layout == "data x fsdp x tensor" or (examples == 4096 and " x " not in layout),
            itertools.product(LAYOUTS, [32, 4096]),
        ),
    )
    @pytest.mark.few(2)
    def test_a_step_communicates_what_the_same_step_by_hand_does_and_no_more(self, layout, examples):
        axes, rules = LAYOUTS[layout]
        state, ours = planned(axes, rules, examples)
        mesh = jax.tree.leaves(state)[0].sharding.mesh
        shardings = shardings_of(state)
        replicated = NamedSharding(mesh, P())
        split = NamedSharding(mesh, P(tuple(axis for axis in ("data", "fsdp") if axis in axes)))
        compiled = (
            jax.jit(
                by_hand,
                in_shardings=(shardings.params, shardings.opt_state, split),
                out_shardings=(shardings.params, shardings.opt_state, replicated),
                donate_argnums=(0, 1),
            )
            .lower(state.params, state.opt_state, batch_of(examples))
            .compile()
        )
        assert ours.collectives == collectives(compiled.as_text())
        memory = compiled.memory_analysis()
        # The step has a key and a counter in its state besides, and what splitting that key takes.
        assert ours.arguments - memory.argument_size_in_bytes == 8 + 4
        assert abs(ours.temporary - memory.temp_size_in_bytes) <= 256

    def test_replicas_sum_their_gradients_and_the_loss_and_nothing_else(self):
        _, ours = planned({"data": 8}, None, 4096)
        assert set(ours.collectives) == {"all-reduce"}
        assert ours.collectives["all-reduce"].bytes == 4 * (NUM_PARAMS + 1)

    def test_fsdp_gathers_each_kernel_once(self):
        _, ours = planned({"fsdp": 8}, SPLIT, 4096)
        assert ours.collectives["all-gather"] == Traffic(2, 4 * 2 * FEATURES * WIDTH)


class TestPlan:
    def test_it_needs_what_the_arrays_hold(self):
        mesh = make_mesh({"data": 2, "fsdp": 4})
        state = create_sharded(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh, rules=SPLIT)
        ours = plan(make_train_step(squared_error, ADAM), state, batch_of(64))
        data = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
        held = sum(x.addressable_shards[0].data.nbytes for x in data) + 8  # the key
        assert ours.state == held
        assert ours.arguments == held + 2 * 64 * FEATURES * 4 // 8
        assert held - 64 <= ours.aliased <= held  # the compiler need not reuse the few bytes of a key
        assert ours.total == ours.arguments + ours.outputs - ours.aliased + ours.temporary

    def test_it_prints_as_a_table(self):
        _, ours = planned({"data": 8}, None, 64)
        lines = str(ours).splitlines()
        assert lines[0] == "on each of 8 devices (data 8)"
        assert [line.split("  ")[0] for line in lines[1:]] == [
            "state",
            "arguments",
            "temporary",
            "total",
            "all-reduce",
            "operations",
            "compiled in",
        ]
        assert lines[1].split()[1:] == [f"{ours.state:,}", "bytes"]
        assert lines[5].split()[1:] == [
            f"{4 * (NUM_PARAMS + 1):,}",
            "bytes",
            "in",
            str(ours.collectives["all-reduce"].count),
        ]

    def test_nothing_runs(self):
        mesh = make_mesh({"fsdp": 8})
        before = jax.live_arrays()
        state = abstract_state(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh)
        plan(make_train_step(squared_error, ADAM), state, batch_of(64))
        born = [array for array in jax.live_arrays() if not any(array is other for other in before)]
        assert sum(array.size for array in born) < 8

    @pytest.mark.parametrize(
        ("data", "fsdp", "tensor"), [(4, 8, 2), pytest.param(16, 8, 4, marks=pytest.mark.slow)], ids=["64", "512"]
    )
    @pytest.mark.slow
    def test_a_mesh_larger_than_the_machine_is_planned(self, data, fsdp, tensor):
        devices = data * fsdp * tensor
        code = f"""
            import jax
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", {devices})
            from tests.compile.test_planning import ADAM, Perceptron, TENSOR, batch_of, squared_error
            from trainer import make_train_step
            from trainer.compile.planning import plan
            from trainer.sharding import abstract_state, make_mesh

            mesh = make_mesh({{"data": {data}, "fsdp": {fsdp}, "tensor": {tensor}}})
            state = abstract_state(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh, rules=TENSOR)
            found = plan(make_train_step(squared_error, ADAM), state, batch_of(4096))
            print(found.state, found.arguments, found.temporary, found.collectives["all-gather"].bytes)
            print(found)
        """
        environment = {"PATH": "", "XLA_FLAGS": ""}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        first, title, *_ = done.stdout.splitlines()
        state, arguments, temporary, gathered = map(int, first.split())
        kernels = 3 * 4 * 2 * FEATURES * WIDTH // (fsdp * tensor)
        biases = 3 * 4 * (WIDTH // tensor + FEATURES)
        assert state == kernels + biases + 4 + 4 + 8  # two counters and the key
        assert arguments == state + 2 * 4 * 4096 * FEATURES // (data * fsdp)
        assert temporary >= 4 * 4096 * WIDTH // devices  # the hidden units are kept for the way back
        assert gathered >= 4 * 2 * FEATURES * WIDTH // tensor
        assert title == f"on each of {devices} devices (data {data} x fsdp {fsdp} x tensor {tensor})"

    def test_a_batch_that_does_not_fit_is_refused(self):
        with pytest.raises(BatchError, match="dimension 0 of length 30 is split in 8 over data; the nearest"):
            planned({"data": 8}, None, 30)


class TestCounting:
    def test_a_loop_counts_as_often_as_it_runs(self):
        mesh = make_mesh({"data": 8})

        def sums(x):
            def body(carry, row):
                return carry + jnp.sum(jnp.sin(row + carry)), None

            return jax.lax.scan(body, 0.0, x)[0]

        shape = jax.ShapeDtypeStruct((11, 64), np.float32)
        rows = NamedSharding(mesh, P(None, "data"))
        program = jax.jit(sums, in_shardings=rows).lower(shape).compile().as_text()
        assert collectives(program) == {"all-reduce": Traffic(11, 44)}

    def test_a_scan_over_steps_counts_each_of_them(self):
        mesh = make_mesh({"data": 8})
        state = abstract_state(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh)
        step = make_train_step(squared_error, ADAM)
        batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), batch_of(64))
        fused = jit_step(
            lambda state, batches: jax.lax.scan(step, state, batches), state, NamedSharding(mesh, P(None, "data"))
        )
        found = collectives(fused.lower(state, batches).compile().as_text())
        assert found["all-reduce"].bytes == 5 * 4 * (NUM_PARAMS + 1)

    def test_asynchronous_pairs_count_once(self):
        program = textwrap.dedent("""\
            HloModule jit_f, is_scheduled=true

            %region_0.4 (a: f32[], b: f32[]) -> f32[] {
              %a = f32[] parameter(0)
              %b = f32[] parameter(1)
              ROOT %add = f32[] add(%a, %b)
            }

            %async_computation (p: bf16[64,16]) -> bf16[8,16] {
              %p = bf16[64,16]{1,0} parameter(0)
              ROOT %reduce-scatter.1 = bf16[8,16]{1,0} reduce-scatter(%p), channel_id=3, to_apply=%region_0.4
            }

            ENTRY %main (x: f32[8,128], y: bf16[64,16]) -> f32[64,128] {
              %x = f32[8,128]{1,0:T(8,128)} parameter(0)
              %y = bf16[64,16]{1,0} parameter(1)
              %ag = (f32[8,128]{1,0}, f32[64,128]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
              %ag-done = f32[64,128]{1,0} all-gather-done(%ag)
              %rs = ((bf16[64,16]{1,0}), bf16[8,16]{1,0}) async-start(%y), calls=%async_computation
              %rs-done = bf16[8,16]{1,0} async-done(%rs), calls=%async_computation
              %cp = pred[4]{0} collective-permute(%rs-done), source_target_pairs={{0,1}}
              ROOT %out = f32[64,128]{1,0} copy(%ag-done)
            }
        """)
        assert collectives(program) == {
            "all-gather": Traffic(1, 4 * 64 * 128),
            "collective-permute": Traffic(1, 2 * 8 * 16),
            "reduce-scatter": Traffic(1, 2 * 64 * 16),
        }
