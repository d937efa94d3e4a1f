"""Trains the network of ``digits.py`` on all devices of all processes, and resumes if it is started again.

``python examples/many_devices.py`` uses all devices, or eight simulated ones on a CPU, and ends within a minute.
``slurm.sh`` and ``kubernetes.yaml``, beside this file, start it as several processes. An interrupted run is saved, and
resumes at its next batch when it is started again, with any number of processes.
"""

import argparse
from pathlib import Path

import jax
from digits import ConvNet, cross_entropy, digits

from trainer import OptimizerConfig, Trainer, TrainingConfig, make_mesh
from trainer.distributed import initialize


def axes(text):
    """Reads ``data=-1,fsdp=2``."""
    return {name: int(size) for name, size in (axis.split("=") for axis in text.split(","))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/many_devices"), help="one for all processes")
    parser.add_argument("--mesh", type=axes, default={"data": -1}, help="data=-1,fsdp=2")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--cpu-devices", type=int, default=8, help="how many this process pretends to have on a CPU")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes")
    arguments = parser.parse_args(argv)

    jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    if arguments.distributed:
        initialize()
    config = TrainingConfig(
        name="many devices",
        optimizer=OptimizerConfig(optimizer_type="adamw", learning_rate=3e-3, weight_decay=1e-4, decay_mask=True),
        gradient_clip_norm=1.0,
    )
    trainer = Trainer(
        ConvNet,  # makes the model, so that no device ever holds it whole
        config,
        loss_fn=cross_entropy,
        mesh=make_mesh(arguments.mesh),
        workdir=arguments.workdir,
        save_interval=20,
    )
    train_data, val_data = digits()
    result = trainer.train(train_data, arguments.epochs, 128, val_data, val_interval=50, resume=True)
    if trainer.is_primary_process:
        steps, devices = trainer.step, jax.device_count()
        print(f"validation accuracy {result['accuracy']:.4f} after {steps} steps on {devices} devices")
    return result


if __name__ == "__main__":
    main()
