"""``trainer plan``: compiles the step of a configuration and prints its cost, without training."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TextIO

from trainer.commands.text import add_command
from trainer.commands.train import add_job_arguments, plain_warnings
from trainer.errors import ArgumentError

_EXAMPLE = """\
  trainer plan examples/digits.yaml batch_size=512
  trainer plan examples/digits.yaml --devices 8 mesh.data=4 mesh.fsdp=2

Memory, operations and communication are those that XLA's own analysis gives for one device. The initial state is made,
so it has to fit into the memory of this machine; `trainer.plan` in Python makes nothing."""


def add_to(commands: Any) -> None:
    """Adds the command to a parser."""
    about = "compile the step of a configuration and print its memory and operations, without training"
    parser = add_command(commands, "plan", run, about, _EXAMPLE)
    add_job_arguments(parser)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="let N devices of the CPU stand for those of the configuration's mesh"
    )


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Runs the command."""
    from trainer.commands.job import Job
    from trainer.fit.plan import first_batch, plan_run
    from trainer.fit.resume import planned_end

    if options.devices is not None:
        _use_devices(options.devices)
    job = Job.from_file(Path(options.config), options.overrides)
    with plain_warnings(), job.opened(handle_signals=False) as (trainer, train_data, _):
        counts = {"num_epochs": job.config.num_epochs, "batch_size": job.config.batch_size, "val_interval": 1}
        plan = plan_run(trainer.setup, trainer.run, train_data, None, False, **counts)
        trainer.hold(trainer.setup.with_horizon(trainer.run, planned_end(trainer.run.step, plan)))
        batch = first_batch(trainer.setup, plan)
        cost = trainer.compile(batch, without_remat=job.config.trainer.get("remat") is not None)
    if options.devices is not None:
        cost = dataclasses.replace(cost, available=None)
    print(f"a step of {job.config.batch_size} examples", file=out)
    print(cost, file=out)


def _use_devices(count: int) -> None:
    import jax

    if count < 1:
        raise ArgumentError(f"`--devices` is {count}; it must be positive.")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX is already initialized in the caller's process
        if len(jax.devices()) != count:
            raise ArgumentError(f"`--devices` is {count}, but JAX has started with {len(jax.devices())}.") from error
