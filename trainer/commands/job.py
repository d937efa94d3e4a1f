"""`JobConfig`: a training run described by a YAML file, and by ``key=value`` overrides on the command line.

It is a `trainer.TrainingConfig` plus the import paths of Python callables, which a file cannot hold. `Config.from_dict`
already checks types and suggests names, and a file, a checkpoint and ``run.json`` have the same fields; the overrides
are one function here. jsonargparse, tyro and draccus would each add a second set of rules for types and messages.

    model: digits:ConvNet              # called with rngs, returns the module
    data: digits:digits                # returns (train_data, val_data), as for Trainer.train
    objective: digits:cross_entropy    # the loss_fn itself
    workdir: runs/digits
    num_epochs: 12
    batch_size: 128
    optimizer: {optimizer_type: adamw, learning_rate: 3.0e-3}

A factory with arguments is ``model: {factory: digits:ConvNet, arguments: {width: 32}}``; an objective is bound to its
arguments by `functools.partial`. Modules are looked up in the directory of the file, then in the current one, then on
Python's path.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import yaml
from flax import nnx

from trainer.api import Trainer
from trainer.commands.factories import FactoryConfig, as_factory, check_call, import_factory, importing_from
from trainer.config import TrainingConfig
from trainer.config.base import load_yaml
from trainer.core.checks import did_you_mean
from trainer.errors import ConfigError
from trainer.sharding import make_mesh

_FACTORIES = ("model", "data", "objective")

_OPTIONS = {
    *("nonfinite", "report", "accumulate_steps", "pad_to", "prefetch", "precision", "remat"),
    *("steps_per_call", "handle_signals"),
}
"""The arguments of `trainer.Trainer` that are plain values and not fields of the configuration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig(TrainingConfig):
    """The job of ``trainer train``: a configuration, plus the callables that a trainer needs, by import path.

    Attributes:
        model: Called with ``rngs``, if it accepts that, and its arguments; returns an ``nnx.Module``.
        data: Called with its arguments; returns ``(train_data, val_data)``, each as for `trainer.Trainer.train`, the
            latter None for no validation.
        objective: The objective itself, see `trainer.LossFn`, bound to its arguments.
        workdir: The directory of the run; ``runs/`` plus the name of the file if left out.
        val_interval: Validate at multiples of this step, and at the end of every epoch.
        seed: Seeds the initial params, and the key of the run.
        mesh: Names and sizes of the axes of a mesh, see `trainer.make_mesh`; one device if left out.
        trainer: Further arguments of `trainer.Trainer`: nonfinite, report, accumulate_steps, pad_to, prefetch,
            precision, remat, steps_per_call, handle_signals.
    """

    model: FactoryConfig
    data: FactoryConfig
    objective: FactoryConfig
    workdir: str | None = None
    val_interval: int = 100
    seed: int = 0
    mesh: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("val_interval")
        self._require("seed", "at least 0", self.seed >= 0)
        for name in self.trainer:
            if name not in _OPTIONS:
                raise ConfigError(f"`{self._path('trainer')}.{name}` is no field; {did_you_mean(name, _OPTIONS)}")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that can import its callables.

    Attributes:
        config: The configuration.
        folders: The directories where modules are looked up first.
    """

    config: JobConfig
    folders: tuple[Path, ...] = ()

    @classmethod
    def from_file(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Returns the job in a YAML file, with some fields replaced.

        Raises:
            ConfigError: The file is not readable as YAML, or an override or a field is invalid.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"`{path}` is no YAML: it is not UTF-8 ({error}).") from error
        data = _plain(text, f"`{path}`")
        if not isinstance(data, Mapping):
            raise ConfigError(f"`{path}` holds no mapping of fields.")
        data = {name: as_factory(value) if name in _FACTORIES else value for name, value in data.items()}
        for override in overrides:
            data = _with_override(data, override)
        if data.get("workdir") in (None, ""):
            data = {**data, "workdir": f"runs/{path.stem}"}
        return cls(JobConfig.from_dict(data), (path.absolute().parent, Path.cwd()))

    @contextlib.contextmanager
    def opened(self, **options: Any) -> Iterator[tuple[Trainer, Any, Any]]:
        """Makes the trainer, the training data and the validation data; closes the trainer after the block.

        Args:
            options: Arguments of `trainer.Trainer` in addition to those of the configuration.

        Raises:
            ConfigError: A callable cannot be imported or called as configured, or returned something else.
        """
        config = self.config
        with importing_from(*self.folders):
            make_model = self._called("model")
            make_data = self._called("data")
            objective = import_factory(config.objective, "objective")
            if config.objective.arguments:
                objective = functools.partial(objective, **config.objective.arguments)
            train_data, val_data = _pair(make_data(), config.data.factory)
            mesh = None if config.mesh is None else make_mesh(config.mesh)
            trainer = Trainer(
                make_model if mesh is not None else make_model(rngs=nnx.Rngs(config.seed)),
                config,
                loss_fn=objective,
                mesh=mesh,
                rng=jax.random.key(config.seed),
                save_interval=config.save_frequency,
                **config.trainer,
                **options,
            )
            with trainer:
                yield trainer, train_data, val_data

    def _called(self, field: str) -> Callable[..., Any]:
        config: FactoryConfig = getattr(self.config, field)
        factory = import_factory(config, field)

        def called(rngs: Any = None) -> Any:
            return factory(**check_call(factory, field, config, **({} if rngs is None else {"rngs": rngs})))

        return called


def _with_override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """Returns nested mappings with the value of ``dotted.key=value``, which is read as YAML: ``1e-3`` is a number."""
    dotted, _, text = override.partition("=")
    value = _plain(text, f"the value of `{dotted}`")
    *parents, last = dotted.split(".")
    if not parents and last in _FACTORIES:
        value = as_factory(value)
    changed = dict(data)
    inner: dict[str, Any] = changed
    for depth, name in enumerate(parents):
        below = inner.get(name)
        if below is not None and not isinstance(below, Mapping):
            raise ConfigError(
                f"`{dotted}` cannot be set: `{'.'.join(parents[: depth + 1])}` is {below!r:.60}, no mapping."
            )
        inner[name] = dict(below or {})
        inner = inner[name]
    inner[last] = value
    return changed


def _plain(text: str, name: str) -> Any:
    """Returns the plain values of a YAML text; invalid YAML raises a one-line error."""
    try:
        return load_yaml(text, name)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}.") from error


def _pair(data: Any, factory: str) -> tuple[Any, Any]:
    is_pair = isinstance(data, tuple) and len(data) == 2
    if not is_pair or all(isinstance(part, np.ndarray | jax.Array) for part in data):
        what = "a pair of arrays" if is_pair else f"a {type(data).__name__}"
        raise ConfigError(
            f"`data` is {factory!r}, which returned {what}; it must return (train_data, val_data), such as "
            f"({{'x': x, 'y': y}}, None)."
        )
    return data[0], data[1]
