"""Typed configuration: frozen, checked when made, to and from plain dicts and YAML.

A field that would do nothing is an error rather than a surprise: an unknown name, a wrong type, or
a value that the chosen optimizer or schedule never reads (``momentum`` for ``adam``).
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from trainer.errors import ConfigError, did_you_mean

_ADAM_LIKE = frozenset({"beta1", "beta2", "eps", "weight_decay"})

OPTIMIZER_FIELDS: dict[str, frozenset[str]] = {
    "adam": _ADAM_LIKE,
    "adamw": _ADAM_LIKE,
    "sgd": frozenset({"momentum", "nesterov", "weight_decay"}),
    "rmsprop": frozenset({"beta2", "eps", "momentum", "nesterov", "initial_accumulator_value", "weight_decay"}),
    "adagrad": frozenset({"eps", "initial_accumulator_value", "weight_decay"}),
    "lamb": _ADAM_LIKE,
    "radam": _ADAM_LIKE,
    "nadam": _ADAM_LIKE,
    "lion": frozenset({"beta1", "beta2", "weight_decay"}),
    "adafactor": frozenset({"momentum", "weight_decay"}),
    "muon": _ADAM_LIKE | {"momentum"},
}
"""Each optimizer with the fields of its own that it reads."""

SCHEDULER_FIELDS: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "linear": frozenset({"min_lr_ratio", "total_steps"}),
    "cosine": frozenset({"min_lr_ratio", "total_steps", "cycle_length"}),
    "exponential": frozenset({"min_lr_ratio", "decay_rate", "decay_steps"}),
    "polynomial": frozenset({"min_lr_ratio", "total_steps", "power"}),
    "step": frozenset({"min_lr_ratio", "step_size", "gamma"}),
    "multistep": frozenset({"min_lr_ratio", "milestones", "gamma"}),
    "cyclic": frozenset({"min_lr_ratio", "total_steps", "cycle_length"}),
    "one_cycle": frozenset({"min_lr_ratio", "total_steps"}),
}
"""Each schedule with the fields of its own that it reads; ``warmup_steps`` goes with all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The base of all configurations: checks types against annotations, reads and writes.

    Raises:
        ConfigError: A field has the wrong type or an impossible value, named by its path.
    """

    name: str = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(getattr(self, field.name), hints[field.name], self._path(field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes a configuration from nested plain mappings.

        Raises:
            ConfigError: Also for unknown fields, with their path and the nearest known name.
        """
        config: Self = _from_mapping(cls, data, cls.__name__)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts of plain values; ``from_dict`` reads them back, a Path as its string."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a YAML file; ``1e-3`` is the number that it looks like."""
        import yaml

        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_loader())  # noqa: S506 - a SafeLoader
        return cls.from_dict(data)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes a YAML file, fields in the order of their declaration."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def replace(self, **changes: Any) -> Self:
        """Returns a checked copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def _path(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def _require(self, field: str, wanted: str, holds: bool) -> None:
        if not holds:
            raise ConfigError(f"`{self._path(field)}` is {getattr(self, field)!r}; it must be {wanted}.")

    def _positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self._require(field, "positive and finite", value is None or 0 < value < math.inf)

    def _within(self, field: str, low: float, high: float) -> None:
        self._require(field, f"between {low} and {high}", low <= getattr(self, field) <= high)

    def _refuse_unread(self, kind: str, table: dict[str, frozenset[str]], common: frozenset[str]) -> None:
        chosen = getattr(self, kind)
        if chosen not in table:
            raise ConfigError(f"`{self._path(kind)}` is {chosen!r}; {did_you_mean(chosen, table)}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field, default in defaults.items():
            if field not in common | table[chosen] and getattr(self, field) != default:
                readers = sorted(name for name, fields in table.items() if field in fields)
                raise ConfigError(
                    f"`{self._path(field)}` is {getattr(self, field)!r}, but {chosen!r} does not read it, "
                    f"so it would do nothing; remove it, or choose one that does: {', '.join(readers)}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """An optimizer of optax by name, see `trainer.make_optimizer` for what each reads.

    Example:
        >>> OptimizerConfig(optimizer_type="adam", learning_rate=1e-3, momentum=0.9)
        Traceback (most recent call last):
        trainer.errors.ConfigError: `OptimizerConfig.momentum` is 0.9, but 'adam' does not read it, ...

    Attributes:
        optimizer_type: One of the keys of `trainer.config.OPTIMIZER_FIELDS`.
        learning_rate: The step size, or the peak of the schedule.
        weight_decay: Decoupled where the optimizer has that (adamw, lamb, lion, adafactor, muon),
            else added to the gradient (L2). Only adafactor's is not multiplied by the learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment; the decay of rmsprop.
        eps: Added to denominators.
        momentum: Of sgd, rmsprop and adafactor; for muon 0 means its usual 0.95.
        nesterov: Nesterov's form of the momentum, for sgd and rmsprop.
        initial_accumulator_value: Where the accumulators of adagrad and rmsprop start.
        gradient_clip_norm: Scales gradients of a larger global norm down to it.
        gradient_clip_value: Clips every entry to ± this, before ``gradient_clip_norm``.
        decay_mask: Decay only leaves of two and more dimensions, so neither biases nor norm scales;
            with muon only the matrices that muon itself updates.
    """

    optimizer_type: str
    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    nesterov: bool = False
    initial_accumulator_value: float = 0.1
    gradient_clip_norm: float | None = None
    gradient_clip_value: float | None = None
    decay_mask: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("learning_rate", "eps", "gradient_clip_norm", "gradient_clip_value")
        for field in ("beta1", "beta2", "momentum"):
            self._require(field, "at least 0 and less than 1", 0 <= getattr(self, field) < 1)
        for field in ("weight_decay", "initial_accumulator_value"):
            self._require(field, "zero or more, and finite", 0 <= getattr(self, field) < math.inf)
        common = {"name", "optimizer_type", "learning_rate", "gradient_clip_norm", "gradient_clip_value"}
        self._refuse_unread("optimizer_type", OPTIMIZER_FIELDS, frozenset(common | {"decay_mask"}))
        self._require("decay_mask", "False while `weight_decay` is 0", not self.decay_mask or self.weight_decay > 0)
        self._require("nesterov", "False while `momentum` is 0", not self.nesterov or self.momentum > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """A learning-rate schedule by name, see `trainer.make_schedule` for the formulas.

    Horizons that are left out (``total_steps``, ``cycle_length``) become the length of the run.

    Attributes:
        scheduler_type: One of the keys of `trainer.config.SCHEDULER_FIELDS`.
        warmup_steps: Steps of a linear rise from zero that come before the schedule proper.
        min_lr_ratio: The floor, as a fraction of the learning rate.
        cycle_length: Steps of one cycle of cyclic; the horizon of cosine.
        decay_rate: Factor of exponential per ``decay_steps``.
        decay_steps: Steps over which exponential multiplies by ``decay_rate``.
        total_steps: The step at which the schedule has ended, warm-up included.
        step_size: Steps between two drops of step.
        gamma: Factor of a drop of step and multistep.
        milestones: The steps at which multistep drops, counted from the start of the run.
        power: Exponent of polynomial; 1 is linear.
    """

    scheduler_type: str
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    cycle_length: int | None = None
    decay_rate: float = 0.95
    decay_steps: int = 1000
    total_steps: int | None = None
    step_size: int = 1000
    gamma: float = 0.1
    milestones: tuple[int, ...] = ()
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("warmup_steps", "zero or more", self.warmup_steps >= 0)
        self._within("min_lr_ratio", 0, 1)
        self._positive("cycle_length", "decay_rate", "decay_steps", "total_steps", "step_size", "gamma", "power")
        self._within("decay_rate", 0, 1)
        self._within("gamma", 0, 1)
        self._refuse_unread("scheduler_type", SCHEDULER_FIELDS, frozenset({"name", "scheduler_type", "warmup_steps"}))
        ascending = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        late = all(milestone > self.warmup_steps for milestone in self.milestones)
        self._require("milestones", "ascending, and later than `warmup_steps`", ascending and late)
        if self.scheduler_type == "multistep":
            self._require("milestones", "at least one step", bool(self.milestones))
        if self.cycle_length is not None:
            self._require("cycle_length", "at least 2", self.cycle_length >= 2)
            self._require("total_steps", "left out where `cycle_length` is given", self.total_steps is None)
        if self.scheduler_type == "cosine" and self.cycle_length is not None:
            self._require("cycle_length", "more than `warmup_steps`", self.cycle_length > self.warmup_steps)
        if self.total_steps is not None:
            self._require("total_steps", "more than `warmup_steps`", self.total_steps > self.warmup_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """How to train: the reference's fields, each of which does something.

    Attributes:
        name: A label, logged with the hyperparameters and written into checkpoints.
        optimizer: Which optimizer to build, unless one is passed to the Trainer.
        scheduler: Its learning-rate schedule; None keeps the rate constant.
        batch_size: Passed to ``train_data_loader`` and ``val_data_loader``.
        num_epochs: Epochs of a run by ``train_epoch``; sets the horizon of a schedule there.
        gradient_clip_norm: Scales gradients of a larger global norm down to it, also with an
            optimizer of the caller's.
        checkpoint_dir: Where checkpoints go if the Trainer is given no directory.
        save_frequency: ``train_epoch`` saves every so many steps.
        max_checkpoints: How many checkpoints with default names are kept.
        log_frequency: Training metrics are logged every so many steps, and at the first.
        steps_per_epoch: Batches that ``train_epoch`` takes of a loader; None takes all there are.
        use_wandb: Log to Weights & Biases as well (the extra ``wandb``).
        wandb_project: The project to log to.
        metadata: Anything of plain values; logged and written into checkpoints.
    """

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig | None = None
    batch_size: int = 32
    num_epochs: int = 100
    gradient_clip_norm: float | None = None
    checkpoint_dir: str | Path = "./checkpoints"
    save_frequency: int = 1000
    max_checkpoints: int = 5
    log_frequency: int = 100
    steps_per_epoch: int | None = None
    use_wandb: bool = False
    wandb_project: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive(
            "batch_size",
            "num_epochs",
            "gradient_clip_norm",
            "save_frequency",
            "max_checkpoints",
            "log_frequency",
            "steps_per_epoch",
        )
        if self.gradient_clip_norm is not None and self.optimizer.gradient_clip_norm is not None:
            raise ConfigError(
                f"`gradient_clip_norm` is set twice, in TrainingConfig ({self.gradient_clip_norm}) and in "
                f"its optimizer ({self.optimizer.gradient_clip_norm}); keep one of them."
            )
        if self.wandb_project is not None:
            self._require("wandb_project", "left out unless `use_wandb` is true", self.use_wandb)


def _from_mapping(cls: type[Any], data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"`{path}` is of type {type(data).__name__}; it must be a mapping of fields.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [
        f"`{path}.{name}` is no field; {did_you_mean(str(name), fields)}" for name in data if name not in fields
    ]
    problems += [
        f"`{path}.{name}` is required."
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if problems:
        raise ConfigError(" ".join(problems))
    values = {}
    for name, value in data.items():
        nested = _config_class(hints[name])
        if nested is not None and isinstance(value, Mapping):
            value = _from_mapping(nested, value, f"{path}.{name}")
        values[name] = value
    return cls(**values)


def _config_class(hint: Any) -> type[Config] | None:
    for option in typing.get_args(hint) or (hint,):
        if isinstance(option, type) and issubclass(option, Config):
            return option
    return None


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """Returns ``value`` as the annotated type, refusing whatever would lose or invent something."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if option is types.NoneType and value is None:
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple):
            items = typing.get_args(option) or (Any, ...)
            items = items[:1] * len(value) if items[-1] is ... else items
            if len(items) != len(value):
                continue
            return tuple(_coerce(entry, items[i], f"{path}[{i}]") for i, entry in enumerate(value))
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        # Any, Literal and the like in a subclass: nothing that isinstance could tell.
        if origin is Any or not isinstance(origin, type):
            return value
        # A bool is an int to Python; here it is a mistake.
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            return value
    wanted = " or ".join("None" if option is types.NoneType else _type_name(option) for option in options)
    raise ConfigError(f"`{path}` is {value!r} of type {type(value).__name__}; it must be {wanted}.")


def _type_name(option: Any) -> str:
    return option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _loader() -> type[Any]:
    """Returns a SafeLoader that also reads ``1e-3``, a string by the letter of YAML 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader
