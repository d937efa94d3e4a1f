"""The fields of the configurations: their defaults, and the values that are refused, in which words."""

import dataclasses
import math

import pytest

from tests.config.examples import MINIMAL, optimizer, scheduler, training
from trainer import ConfigError, ExtensionConfig, OptimizerConfig, SchedulerConfig, TrainingConfig
from trainer.config.optimizers import OPTIMIZER_FIELDS
from trainer.config.schedules import SCHEDULER_FIELDS

LABELS = {"name": "", "description": "", "tags": (), "metadata": {}}
DEFAULTS = {
    OptimizerConfig: {
        "weight_decay": 0.0,
        "beta1": None,
        "beta2": None,
        "eps": None,
        "momentum": None,
        "nesterov": False,
        "initial_accumulator_value": None,
        "gradient_clip_norm": None,
        "gradient_clip_value": None,
        "decay_mask": False,
    },
    SchedulerConfig: {
        "warmup_steps": 0,
        "min_lr_ratio": 0.0,
        "cycle_length": None,
        "decay_rate": 0.95,
        "decay_steps": 1000,
        "total_steps": None,
        "step_size": 1000,
        "gamma": 0.1,
        "milestones": (),
        "power": 1.0,
    },
    TrainingConfig: {
        "scheduler": None,
        "batch_size": 32,
        "num_epochs": 100,
        "gradient_clip_norm": None,
        "checkpoint_dir": "./checkpoints",
        "save_frequency": 1000,
        "max_checkpoints": 5,
        "log_frequency": 100,
        "steps_per_epoch": None,
        "validation_steps": None,
        "epochs_per_validation": 1,
        "use_wandb": False,
        "wandb_project": None,
    },
    ExtensionConfig: {"weight": 1.0, "enabled": True},
}


@pytest.mark.parametrize("cls", MINIMAL)
def test_defaults(cls):
    made = cls(**MINIMAL[cls])
    left_out = {f.name: getattr(made, f.name) for f in dataclasses.fields(cls) if f.name not in MINIMAL[cls]}
    assert left_out == LABELS | DEFAULTS[cls]


@pytest.mark.parametrize("name", OPTIMIZER_FIELDS)
def test_every_optimizer_takes_the_fields_it_reads(name):
    values = {"beta1": 0.8, "beta2": 0.98, "eps": 1e-5, "momentum": 0.7, "nesterov": True, "weight_decay": 0.01}
    values["initial_accumulator_value"] = 0.2
    fields = {field: values[field] for field in OPTIMIZER_FIELDS[name]}
    assert optimizer(optimizer_type=name, **fields).to_dict().items() >= fields.items()


@pytest.mark.parametrize(
    ("cls", "table", "values"),
    [
        (
            OptimizerConfig,
            OPTIMIZER_FIELDS,
            {
                "beta1": 0.8,
                "beta2": 0.98,
                "eps": 1e-5,
                "momentum": 0.7,
                "nesterov": True,
                "initial_accumulator_value": 0.2,
                "weight_decay": 0.01,
            },
        ),
        (
            SchedulerConfig,
            SCHEDULER_FIELDS,
            {
                "min_lr_ratio": 0.1,
                "total_steps": 10,
                "cycle_length": 4,
                "decay_rate": 0.5,
                "decay_steps": 7,
                "power": 2.0,
                "step_size": 5,
                "gamma": 0.5,
                "milestones": (3,),
            },
        ),
    ],
)
def test_every_field_that_would_do_nothing_is_refused_or_said(cls, table, values):
    kind = "optimizer_type" if cls is OptimizerConfig else "scheduler_type"
    for chosen, read in table.items():
        base = {**MINIMAL[cls], kind: chosen}
        for field, value in values.items():
            if chosen == "none":  # switched off
                with pytest.warns(UserWarning, match=rf"`{cls.__name__}\.{field}` .* does nothing"):
                    cls(**base, **{field: value})
            elif field not in read:
                with pytest.raises(ConfigError, match=rf"`{cls.__name__}\.{field}` is .* '{chosen}' does not read it"):
                    cls(**base, **{field: value})


POSITIVE = "it must be positive and finite."


@pytest.mark.parametrize(
    ("make", "field", "bad", "wanted"),
    [
        (optimizer, "learning_rate", [0.0, -1.0, math.nan, math.inf], POSITIVE),
        (optimizer, "eps", [0.0, -1e-8, math.nan], POSITIVE),
        (optimizer, "gradient_clip_norm", [0.0, -1.0, math.nan, math.inf], POSITIVE),
        (optimizer, "gradient_clip_value", [0.0, -1.0, math.nan], POSITIVE),
        (optimizer, "beta1", [-0.1, 1.0, math.nan], "it must be at least 0 and less than 1."),
        (optimizer, "beta2", [-0.1, 1.0], "it must be at least 0 and less than 1."),
        (optimizer, "momentum", [-0.1, 1.0], "it must be at least 0 and less than 1."),
        (optimizer, "weight_decay", [-0.1, math.inf, math.nan], "it must be zero or more, and finite."),
        (optimizer, "initial_accumulator_value", [-0.1, math.inf], "it must be zero or more, and finite."),
        (training, "batch_size", [0, -1], POSITIVE),
        (training, "num_epochs", [0, -1], POSITIVE),
        (training, "gradient_clip_norm", [0.0, -1.0, math.nan], POSITIVE),
        (training, "save_frequency", [0, -1], POSITIVE),
        (training, "max_checkpoints", [0, -1], POSITIVE),
        (training, "log_frequency", [0, -1], POSITIVE),
        (training, "steps_per_epoch", [0, -1], POSITIVE),
        (training, "validation_steps", [0, -1], POSITIVE),
        (training, "epochs_per_validation", [0, -1], POSITIVE),
    ],
)
def test_values_out_of_range_are_refused(make, field, bad, wanted):
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            make(**{field: value})
        assert str(caught.value).endswith(f".{field}` is {value}; {wanted}")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("constant", {"warmup_steps": -1}, "`SchedulerConfig.warmup_steps` is -1; it must be zero or more."),
        ("cosine", {"min_lr_ratio": -0.1}, "`SchedulerConfig.min_lr_ratio` is -0.1; it must be between 0 and 1."),
        ("cosine", {"min_lr_ratio": 1.5}, "`SchedulerConfig.min_lr_ratio` is 1.5; it must be between 0 and 1."),
        ("cyclic", {"cycle_length": 0}, f"`SchedulerConfig.cycle_length` is 0; {POSITIVE}"),
        ("exponential", {"decay_rate": 0.0}, f"`SchedulerConfig.decay_rate` is 0.0; {POSITIVE}"),
        ("exponential", {"decay_rate": 1.1}, "`SchedulerConfig.decay_rate` is 1.1; it must be between 0 and 1."),
        ("exponential", {"decay_steps": 0}, f"`SchedulerConfig.decay_steps` is 0; {POSITIVE}"),
        ("linear", {"total_steps": 0}, f"`SchedulerConfig.total_steps` is 0; {POSITIVE}"),
        (
            "linear",
            {"total_steps": 5, "warmup_steps": 5},
            "`SchedulerConfig.total_steps` is 5; it must be more than `warmup_steps`.",
        ),
        (
            "cosine",
            {"cycle_length": 5, "warmup_steps": 5},
            "`SchedulerConfig.cycle_length` is 5; it must be more than `warmup_steps`.",
        ),
        ("step", {"step_size": 0}, f"`SchedulerConfig.step_size` is 0; {POSITIVE}"),
        ("step", {"gamma": 0.0}, f"`SchedulerConfig.gamma` is 0.0; {POSITIVE}"),
        ("step", {"gamma": 2.0}, "`SchedulerConfig.gamma` is 2.0; it must be between 0 and 1."),
        ("polynomial", {"power": 0.0}, f"`SchedulerConfig.power` is 0.0; {POSITIVE}"),
        ("multistep", {}, "`SchedulerConfig.milestones` is (); it must be at least one step."),
        (
            "multistep",
            {"milestones": (5, 5)},
            "`SchedulerConfig.milestones` is (5, 5); it must be ascending, and later than `warmup_steps`.",
        ),
        (
            "multistep",
            {"milestones": (9, 5)},
            "`SchedulerConfig.milestones` is (9, 5); it must be ascending, and later than `warmup_steps`.",
        ),
        (
            "multistep",
            {"milestones": (3, 9), "warmup_steps": 3},
            "`SchedulerConfig.milestones` is (3, 9); it must be ascending, and later than `warmup_steps`.",
        ),
        (
            "cosine",
            {"total_steps": 9, "cycle_length": 9},
            "`SchedulerConfig.total_steps` is 9; it must be left out where `cycle_length` is given.",
        ),
        (
            "cyclic",
            {"total_steps": 9, "cycle_length": 3},
            "`SchedulerConfig.total_steps` is 9; it must be left out where `cycle_length` is given.",
        ),
        ("cosin", {}, "`SchedulerConfig.scheduler_type` is 'cosin'; did you mean 'cosine'?"),
    ],
)
def test_impossible_schedules_are_refused(kind, changes, message):
    with pytest.raises(ConfigError) as caught:
        scheduler(kind, **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"momentum": 0.9},
            "`OptimizerConfig.momentum` is 0.9, but 'adam' does not read it, so it would do nothing; remove it, or "
            "choose one that does: adafactor, muon, rmsprop, sgd.",
        ),
        (
            {"optimizer_type": "sgd", "nesterov": True},
            "`OptimizerConfig.nesterov` is True; it must be False while `momentum` is 0.",
        ),
        (
            {"optimizer_type": "adamw", "decay_mask": True},
            "`OptimizerConfig.decay_mask` is True; it must be False while `weight_decay` is 0.",
        ),
        ({"optimizer_type": "adamax"}, "`OptimizerConfig.optimizer_type` is 'adamax'; did you mean 'adam'?"),
        (
            {"optimizer_type": "xyz"},
            "`OptimizerConfig.optimizer_type` is 'xyz'; known: adafactor, adagrad, adam, adamw, lamb, lion, muon, "
            "nadam, radam, rmsprop, sgd.",
        ),
        # The first in the order of declaration, not in the order of a set.
        ({"optimizer_type": "sgd", "beta2": 0.5, "beta1": 0.5, "eps": 1.0}, "`OptimizerConfig.beta1` is 0.5, but"),
    ],
)
def test_contradictory_optimizers_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        optimizer(**changes)
    assert str(caught.value).startswith(message)


def test_clipping_twice_is_refused():
    with pytest.raises(ConfigError) as caught:
        training(gradient_clip_norm=1.0, optimizer=optimizer(gradient_clip_norm=2.0))
    assert str(caught.value) == (
        "`gradient_clip_norm` is set twice, in TrainingConfig (1.0) and in its optimizer (2.0); keep one of them."
    )
    assert training(gradient_clip_norm=1.0, optimizer=optimizer(gradient_clip_value=2.0)).gradient_clip_norm == 1.0


def test_a_wandb_project_without_wandb_is_refused():
    with pytest.raises(ConfigError) as caught:
        training(wandb_project="project")
    assert str(caught.value) == (
        "`TrainingConfig.wandb_project` is 'project'; it must be left out unless `use_wandb` is true."
    )
