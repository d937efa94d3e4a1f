"""`Meter`: what counts as work, as waiting and as neither, and when utilization is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from tests.problems import Busy, config, regression, squared_error
from trainer import Throughput, Trainer, make_mesh
from trainer.metrics.throughput import PEAK_FLOPS, Meter


class Result:
    """Stands for an array on a device, finished or not. To wait for it is an error."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def measure(kind, dtype, flops=989e12):
    now = [0.0]
    meter = Meter(flops, dtype, clock=lambda: now[0])
    meter.dispatched(Result(ready=False), 1, 8)
    now[0] = 4.0
    return meter.read([SimpleNamespace(device_kind=kind)] * 2)


def test_it_adds_up():
    now = [0.0]
    meter = Meter(1e6, clock=lambda: now[0])
    for _ in range(4):
        with meter.preparing():
            now[0] += 0.5
        meter.dispatched(jax.block_until_ready(jnp.zeros(())), 10, 8)
        with meter.pausing():
            now[0] += 7.0
        now[0] += 0.5
    # Before the first call there is nothing that the device could have finished.
    assert meter.read(jax.devices()[:1]) == Throughput(10.0, 80.0, 1.5 / 4, 10e6, None)


def test_the_part_of_the_time_that_compiling_took():
    now = [0.0]
    meter = Meter(None, clock=lambda: now[0])
    now[0] = 4.0
    meter.compiled(1.0)
    assert meter.compiling == 0.25
    meter.compiled(9.0)
    assert meter.compiling == 1.0


def test_a_device_that_is_busy_does_not_wait_for_data():
    now = [0.0]
    meter = Meter(None, clock=lambda: now[0])
    for ready in (False, True, False):
        meter.dispatched(Result(ready), 1, 8)
        with meter.preparing():
            now[0] += 1.0
    assert meter.read(jax.devices()[:1]) == Throughput(1.0, 8.0, 1 / 3, None, None)


def test_utilization_where_everything_is_known():
    throughput = measure("NVIDIA H200", jnp.bfloat16)
    assert throughput.utilization == 1 / 8
    assert str(throughput) == "0.2 steps/s, 2 examples/s, 12.5% of the bfloat16 peak, waiting for data 0%"
    assert measure("NVIDIA H100 NVL", "bfloat16").utilization == pytest.approx(989 / 835 / 8)


@pytest.mark.parametrize(
    ("kind", "dtype", "flops"),
    [
        ("NVIDIA H200", jnp.float32, 1e12),
        ("NVIDIA H200", None, 1e12),
        ("NVIDIA H200", jnp.bfloat16, None),
        ("NVIDIA H100 of a kind to come", jnp.bfloat16, 1e12),
        ("cpu", jnp.bfloat16, 1e12),
    ],
)
def test_utilization_is_unknown_where_anything_is(kind, dtype, flops):
    throughput = measure(kind, dtype, flops)
    assert throughput.utilization is None
    assert "peak" not in str(throughput)
    assert (throughput.flops_per_second is None) == (flops is None)


def test_boards_of_one_name_have_peaks_of_their_own():
    assert PEAK_FLOPS["NVIDIA H100 PCIe"] < PEAK_FLOPS["NVIDIA H100 NVL"] < PEAK_FLOPS["NVIDIA H100 80GB HBM3"]


def test_a_trainer_measures_its_epochs():
    trainer = Trainer(Busy(), config(), loss_fn=squared_error)
    assert trainer.throughput is None
    trainer.train(regression(40), 1, 4)
    assert trainer.throughput.examples_per_second == pytest.approx(4 * trainer.throughput.steps_per_second)
    assert trainer.throughput.flops_per_second > 0
    assert trainer.throughput.utilization is None  # the peak of a CPU is not known


def kernel_error(model, batch, rng, step):
    """`squared_error` in which a kernel squares."""

    def square(source, result):
        result[...] = source[...] ** 2

    error = model(batch["input"]) - batch["target"]
    squared = pallas.pallas_call(square, out_shape=jax.ShapeDtypeStruct(error.shape, error.dtype), interpret=True)
    return jnp.mean(error**2) + jnp.mean(jax.lax.stop_gradient(squared(jax.lax.stop_gradient(error)))), {}


@pytest.mark.parametrize("train", ["train", "train_epoch"])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_trainer_relates_its_operations_to_the_peak_of_all_its_devices(train, devices, monkeypatch):
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    loader = [regression(8, seed=number) for number in range(5)]
    trainer = Trainer(
        Busy(),
        config(batch_size=8),
        loss_fn=squared_error,
        precision="bfloat16",
        mesh=None if devices == 1 else make_mesh({"data": devices}, devices=jax.devices()[:devices]),
        train_data_loader=loader,
    )
    trainer.train(regression(40), 1, 8) if train == "train" else trainer.train_epoch()
    speed = trainer.throughput
    assert speed.utilization == pytest.approx(speed.flops_per_second / (devices * 1e9))
    assert "of the bfloat16 peak" in str(speed)


def test_counting_the_operations_of_a_loaders_batches_traces_the_step_no_second_time():
    traces = []

    def objective(*arguments):
        traces.append(1)
        return squared_error(*arguments)

    trainer = Trainer(Busy(), config(), loss_fn=objective, train_data_loader=[regression(8)] * 3)
    trainer.train_epoch()
    assert trainer.throughput.flops_per_second > 0
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("precision", "objective", "is_counted"),
    [("bfloat16", squared_error, True), (None, squared_error, True), ("bfloat16", kernel_error, False)],
)
def test_a_trainer_knows_its_utilization_if_products_are_in_bfloat16_and_all_is_counted(
    precision, objective, is_counted, monkeypatch
):
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    trainer = Trainer(Busy(), config(), loss_fn=objective, precision=precision)
    trainer.train(regression(40), 1, 8)
    assert (trainer.throughput.flops_per_second is not None) == is_counted
    assert (trainer.throughput.utilization is not None) == (is_counted and precision == "bfloat16")
