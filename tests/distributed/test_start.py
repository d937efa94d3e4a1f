"""Real processes over 127.0.0.1, with collectives of Gloo: they train as one, agree, and end together."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from tests.compile.test_planning import ADAM, SPLIT, Perceptron, squared_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    create_sharded,
    jit_step,
    make_mesh,
    make_train_step,
)
from trainer.distributed import barrier, check_agreement, initialize

ROOT = Path(__file__).parents[2]

PREAMBLE = """
import json, os, signal, sys, time
import jax
import numpy as np
from trainer.distributed import barrier, check_agreement, initialize

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
"""
JOIN = "initialize(heartbeat_timeout_seconds=5, shutdown_timeout_seconds=120)\nprocess = jax.process_index()\n"


def start(body, processes, devices=1, started=None, flags=()):
    """Starts a program as so many processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    # Not the cache of the tests either, from which one would read what another has half written.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    flags_of_xla = os.environ.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags_of_xla if "device_count" not in flag)
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "DEVICES": str(devices)}
    environment["FLAGS"] = json.dumps(flags)
    return [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)],
            env=environment | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for process in range(processes if started is None else started)
    ]


def finish(running, timeout=180):
    """Returns status, output and errors of each process, and how long they took; none is left behind."""
    begun = time.monotonic()
    try:
        results = [(*process.communicate(timeout=timeout), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()  # closes its pipes as well
    return [(status, out, errors) for out, errors, status in results], time.monotonic() - begun


def run(body, processes, **how):
    return finish(start(JOIN + textwrap.dedent(body), processes, **how))[0]


TRAIN = """
from tests.distributed.test_start import global_batch
from tests.compile.test_planning import ADAM, SPLIT, Perceptron, squared_error
from trainer import batch_sharding, create_sharded, jit_step, make_mesh, make_train_step

mesh = make_mesh({"data": 2, "fsdp": 2})
state = create_sharded(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh, rules=SPLIT)
step = jit_step(make_train_step(squared_error, ADAM), state)
mine = slice(process * 32 // jax.process_count(), (process + 1) * 32 // jax.process_count())

def place(seed):
    local = {name: column[mine] for name, column in global_batch(seed).items()}
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)

check_agreement({"step": step.lower(state, place(0)).as_text()})
losses = []
for seed in range(20):
    state, metrics = step(state, place(seed))
    losses.append(float(metrics["loss"]))
held = sum(shard.data.nbytes for shard in state.params["inner"]["kernel"].addressable_shards)
print(json.dumps({"losses": losses, "held": held, "step": int(state.step)}))
"""


def global_batch(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(32, 64)).astype(np.float32) for name in ("input", "target")}


@pytest.mark.slow
class TestTraining:
    """Without a `Trainer`; with one it is in test_trainer_processes.py."""

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_train_as_one_does(self, processes):
        results = run(TRAIN, processes, devices=4 // processes)
        assert [status for status, _, _ in results] == [0] * processes, results
        found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
        assert all(one == found[0] for one in found)

        mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
        state = create_sharded(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh, rules=SPLIT)
        step = jit_step(make_train_step(squared_error, ADAM), state)
        losses = []
        for seed in range(20):
            state, metrics = step(state, global_batch(seed))
            losses.append(float(metrics["loss"]))
        # Gloo adds in another order than the collectives within a process.
        np.testing.assert_allclose(found[0]["losses"], losses, rtol=2e-6)
        assert found[0]["step"] == 20
        assert found[0]["held"] == 64 * 512 * 4 * 2 // processes  # half a kernel on each device


class TestAgreement:
    @pytest.mark.slow
    def test_equal_processes_agree_again_and_again(self):
        results = run("for _ in range(3): check_agreement({'config': {'lr': 0.1}})", 2)
        assert [status for status, _, _ in results] == [0, 0], results

    def test_every_process_names_every_difference(self):
        body = """
            from trainer.distributed import agreement
            version = agreement.version  # of an environment in which one process has another NumPy
            agreement.version = lambda name: "1.26.4" if (name, process) == ("numpy", 2) else version(name)
            config = {"seed": process, "optimizer": {"lr": 0.1, **({"decay": 1e-4} if process == 1 else {})}}
            check_agreement({"config": config, "step": "x" * (1000 + process % 2)})
        """
        for status, _, errors in run(body, 3):
            assert status == 1
            message = re.search(r"DistributedError: The processes disagree: (.*)", errors)[1]
            shown = re.sub(r"hash \w{16}", "hash …", message)
            assert shown == (
                "`config/optimizer/decay` is absent in processes 0, 2 and 0.0001 in process 1; "
                "`config/seed` is 0 in process 0 and 1 in process 1 and 2 in process 2; "
                "`step` is a text of 1,000 characters with hash … in processes 0, 2 and "
                "a text of 1,001 characters with hash … in process 1; "
                f"`versions/numpy` is {np.__version__} in processes 0, 1 and 1.26.4 in process 2. "
                "Start all of them with the same code and configuration."
            )

    @pytest.mark.slow
    def test_an_objective_that_differs_is_found_in_the_lowered_step(self):
        body = """
            from tests.compile.test_planning import ADAM, Perceptron, batch_of, squared_error
            from trainer import abstract_state, jit_step, make_mesh, make_train_step

            def objective(model, batch, rng, step):
                loss, metrics = squared_error(model, batch, rng, step)
                return loss * (1.0 + 1e-3 * process), metrics

            state = abstract_state(Perceptron, ADAM, rng=jax.random.key(0), mesh=make_mesh({"data": -1}))
            lowered = jit_step(make_train_step(objective, ADAM), state).lower(state, batch_of(32))
            check_agreement({"step": lowered.as_text()})
        """
        for status, _, errors in run(body, 2):
            assert status == 1
            assert "The processes disagree: `step` is a text of" in errors

    def test_one_process_agrees_with_itself_and_still_checks_what_it_is_given(self):
        check_agreement({"config": {"lr": 0.1}, "code": b"text"})
        with pytest.raises(
            ArgumentTypeError, match=r"`parts` has the entry `config/f` of type function; it must be text"
        ):
            check_agreement({"config": {"f": finish}})


class TestBarrier:
    def test_a_process_that_does_not_come_is_named(self):
        body = """
            barrier("both")
            barrier("both")
            if process == 0:
                try:
                    barrier("one", timeout_seconds=1)
                except Exception as error:
                    print(type(error).__name__, error)
            barrier("both")
        """
        (status, out, _), other = run(body, 2)
        assert status == other[0] == 0
        assert out == (
            "DistributedError process 1 of 2 did not come to the barrier 'one' within 1 s. It may have raised an "
            "error, or be busy with something else.\n"
        )

    def test_one_process_never_waits(self):
        barrier("alone", timeout_seconds=0)


class TestClusters:
    @pytest.mark.slow
    def test_slurm_is_detected(self):
        body = """
            process = int(os.environ.pop("JAX_PROCESS_ID"))
            for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"):
                del os.environ[name]
            os.environ |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(process)}
            os.environ |= {"SLURM_JOB_ID": str(os.getppid()), "SLURM_LOCALID": str(process)}
            initialize()
            print(jax.process_index() == process, jax.process_count())
        """
        results, _ = finish(start(body, 2))
        assert [out.splitlines()[-1] for _, out, _ in results] == ["True 2"] * 2, results

    def test_the_manifest_says_what_initialize_reads(self):
        service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text(encoding="utf-8"))
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        host, port = values["JAX_COORDINATOR_ADDRESS"].split(":")
        assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert pod["subdomain"] == service["metadata"]["name"]
        assert [{"containerPort": int(port)}] == container["ports"]
        assert int(values["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
        assert set(values) == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}

    def test_the_script_is_a_script(self):
        script = ROOT / "examples" / "slurm.sh"
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert os.access(script, os.X_OK)


@pytest.mark.slow
class TestTransformer:
    """The example, as one process and as two."""

    def test_it_learns_the_same_on_eight_devices_and_across_two_processes(self):
        body = """
            sys.path.insert(0, "examples")
            import transformer

            flags = ["--distributed", "--steps", "100", "--cpu-devices", os.environ["DEVICES"]]
            print(json.dumps(transformer.main([*flags, *json.loads(os.environ["FLAGS"])])))
        """
        ((status, out, errors),), _ = finish(start(body, 1, devices=8), timeout=120)
        assert status == 0, errors
        alone = json.loads(out.splitlines()[-1])
        assert alone["accuracy"] > 0.99
        # Each layer is split over the two processes, so they communicate in the middle of it.
        results, _ = finish(start(body, 2, flags=("--mesh", "tensor=2")), timeout=120)
        for status, out, errors in results:
            assert status == 0, errors
            # A hundred steps of AdamW enlarge what is rounded otherwise.
            assert json.loads(out.splitlines()[-1]) == pytest.approx(alone, rel=1e-2)


TURN = """
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
total = jax.jit(lambda x: x.sum(), out_shardings=whole)

def turn():
    return float(total(jax.make_array_from_process_local_data(split, np.ones(1, np.float32))))

assert turn() == 2
"""


class TestEnd:
    """Every way in which one process goes ends the other, in a time that is known."""

    @pytest.mark.parametrize("failing", [0, 1])
    @pytest.mark.few(1)
    def test_an_exception_in_one_process_is_told_by_the_other(self, failing):
        body = f"""
            if process == {failing}:
                raise ValueError("the data is gone")
            time.sleep(100)
        """
        running = start(JOIN + TURN + textwrap.dedent(body), 2)
        results, seconds = finish(running)
        assert seconds < 40  # to start, on a busy machine; then a second
        assert [status for status, _, _ in results] == [1, 1], results
        assert "ValueError: the data is gone" in results[failing][2]
        expected = f"process {1 - failing} ends, since process {failing} failed: ValueError: the data is gone"
        assert expected in results[1 - failing][2]

    @pytest.mark.parametrize(
        ("killed", "way"),
        [
            (0, "os.kill(os.getpid(), signal.SIGKILL)"),
            (1, "os.kill(os.getpid(), signal.SIGKILL)"),
            (1, "os.kill(os.getpid(), signal.SIGTERM)"),  # outside of a run, which would end in order
            pytest.param(1, "os._exit(3)", marks=pytest.mark.slow),  # as SIGKILL does
        ],
    )
    @pytest.mark.few(1)
    def test_a_process_that_is_killed_takes_the_other_with_it(self, killed, way):
        body = f"""
            if process == {killed}:
                {way}
            time.sleep(100)
        """
        running = start(JOIN + TURN + textwrap.dedent(body), 2)
        results, seconds = finish(running)
        assert seconds < 40  # to start, and the heartbeat
        status, _, errors = results[1 - killed]
        assert status != 0
        expected = "the leader task was preempted/died" if killed == 0 else "(stopped sending heartbeats):\n1\n"
        assert expected in errors

    @pytest.mark.slow
    def test_a_process_in_a_collective_is_ended_too(self):
        body = """
            if process == 1:
                time.sleep(2)
                raise ValueError("too late")
            while True:
                turn()
        """
        running = start(JOIN + TURN + textwrap.dedent(body), 2)
        results, seconds = finish(running)
        assert seconds < 40
        assert [status for status, _, _ in results] == [1, 1], results

    @pytest.mark.slow
    def test_one_that_leaves_early_is_waited_for_so_long_and_no_longer(self):
        body = """
            initialize(heartbeat_timeout_seconds=100, shutdown_timeout_seconds=2)
            if jax.process_index() == 0:
                sys.exit(143)
            time.sleep(100)
        """
        results, seconds = finish(start(body, 2))
        assert seconds < 40
        assert all(status != 0 and "Shutdown barrier has failed" in errors for status, _, errors in results)

    @pytest.mark.slow
    def test_an_ordinary_end_is_quiet(self):
        for status, _, errors in run("print(jax.device_count())", 2):
            assert status == 0
            assert "failed" not in errors


class TestStart:
    @pytest.mark.slow
    def test_a_handler_of_the_callers_stays(self):
        body = """
            signal.signal(signal.SIGTERM, lambda *_: print("handled"))
            initialize()
            os.kill(os.getpid(), signal.SIGTERM)
        """
        results, _ = finish(start(body, 2))
        assert [(status, out) for status, out, _ in results] == [(0, "handled\n")] * 2, results

    def test_one_process_runs_alone(self):
        initialize(num_processes=1)
        assert jax.process_count() == 1

    @pytest.mark.parametrize("process", [0, 1])
    @pytest.mark.slow
    def test_a_process_that_nobody_started_is_missed(self, process):
        body = f"initialize(process_id={process}, initialization_timeout_seconds=2)"
        ((status, _, errors),), seconds = finish(start(body, 2, started=1))
        assert seconds < 40
        assert status != 0
        assert f"process {process} has waited 1 s for the others of 2 at 127.0.0.1:" in errors
        assert "gives up after 2 s. Check that each was started" in errors

    @pytest.mark.parametrize(
        ("arguments", "environment", "message"),
        [
            ({"num_processes": 2, "process_id": 2}, {}, "`process_id` is 2; it must be from 0 to 1."),
            ({"num_processes": "2"}, {}, "`num_processes` is '2'; it must be an integer."),
            ({}, {"JAX_PROCESS_ID": "one"}, "The environment variable JAX_PROCESS_ID is 'one'; it must be an integer."),
        ],
    )
    def test_numbers_that_are_none_are_refused(self, arguments, environment, message, monkeypatch):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ArgumentError, match=re.escape(message)):
            initialize(**arguments)

    def test_without_a_cluster_it_says_what_to_set(self):
        body = """
            for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
                del os.environ[name]
            try:
                initialize()
            except ValueError as error:
                print(error)
        """
        ((status, out, errors),), _ = finish(start(body, 1))
        assert status == 0, errors
        assert out.strip() == (
            "`coordinator_address`, `num_processes` and `process_id` are None, None and None, and JAX detected no "
            "cluster (coordinator_address should be defined.). Pass them, set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass `num_processes` = 1 to run alone."
        )
