"""Configurations: what they accept, what they refuse and in which words, and that they round-trip."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from trainer import ConfigError, ExtensionConfig, OptimizerConfig, SchedulerConfig, TrainingConfig
from trainer.config.training import OPTIMIZER_FIELDS, SCHEDULER_FIELDS
from trainer.errors import did_you_mean

ADAM = OptimizerConfig(optimizer_type="adam", learning_rate=1e-3)
MINIMAL = {
    OptimizerConfig: {"optimizer_type": "adam", "learning_rate": 1e-3},
    SchedulerConfig: {"scheduler_type": "constant"},
    TrainingConfig: {"optimizer": ADAM},
    ExtensionConfig: {},
}
DEFAULTS = {
    OptimizerConfig: {
        "name": "",
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "momentum": 0.0,
        "nesterov": False,
        "initial_accumulator_value": 0.1,
        "gradient_clip_norm": None,
        "gradient_clip_value": None,
        "decay_mask": False,
    },
    SchedulerConfig: {
        "name": "",
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
        "name": "",
        "scheduler": None,
        "batch_size": 32,
        "num_epochs": 100,
        "gradient_clip_norm": None,
        "checkpoint_dir": "./checkpoints",
        "save_frequency": 1000,
        "max_checkpoints": 5,
        "log_frequency": 100,
        "steps_per_epoch": None,
        "use_wandb": False,
        "wandb_project": None,
        "metadata": {},
    },
    ExtensionConfig: {"name": "", "weight": 1.0, "enabled": True},
}
FULL = TrainingConfig(
    name="full",
    optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=0.5, momentum=0.9, nesterov=True),
    scheduler=SchedulerConfig(scheduler_type="multistep", milestones=(10, 20), gamma=0.5, warmup_steps=3),
    gradient_clip_norm=1.0,
    steps_per_epoch=7,
    use_wandb=True,
    wandb_project="project",
    metadata={"seed": 3, "tags": ["a", "b"], "nested": {"rate": 1e-3, "none": None}},
)


def optimizer(**changes):
    return OptimizerConfig(**{**MINIMAL[OptimizerConfig], **changes})


def scheduler(scheduler_type, **changes):
    return SchedulerConfig(scheduler_type=scheduler_type, **changes)


def training(**changes):
    return TrainingConfig(**{"optimizer": ADAM, **changes})


@pytest.mark.parametrize("cls", MINIMAL)
def test_defaults(cls):
    made = cls(**MINIMAL[cls])
    given = MINIMAL[cls].keys()
    assert {f.name: getattr(made, f.name) for f in dataclasses.fields(cls) if f.name not in given} == DEFAULTS[cls]


@pytest.mark.parametrize("cls", MINIMAL)
def test_frozen_and_by_keyword_only(cls):
    made = cls(**MINIMAL[cls])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "other"
    with pytest.raises(TypeError, match="positional"):
        cls("name")


def test_metadata_is_not_shared():
    given = {"seed": 1}
    made = training(metadata=given)
    given["seed"] = 2
    assert made.metadata == {"seed": 1}
    assert training().metadata is not training().metadata


def test_an_int_becomes_the_float_that_is_asked_for():
    made = optimizer(learning_rate=1)
    assert (made.learning_rate, type(made.learning_rate)) == (1.0, float)


def test_replace_checks_again():
    assert ADAM.replace(beta1=0.5) == optimizer(beta1=0.5)
    with pytest.raises(ConfigError, match=r"`OptimizerConfig\.beta1` is 2\.0"):
        ADAM.replace(beta1=2.0)


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
def test_every_field_that_would_do_nothing_is_refused(cls, table, values):
    kind = "optimizer_type" if cls is OptimizerConfig else "scheduler_type"
    for chosen, read in table.items():
        base = {**MINIMAL[cls], kind: chosen}
        for field, value in values.items():
            if field not in read:
                with pytest.raises(ConfigError, match=rf"`{cls.__name__}\.{field}` is .* '{chosen}' does not read it"):
                    cls(**base, **{field: value})


@pytest.mark.parametrize("config", [FULL, training(), training(scheduler=scheduler("cosine", total_steps=9))])
def test_dict_round_trip(config):
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_dict_holds_plain_values():
    plain = training(checkpoint_dir=Path("a") / "b", metadata={"sizes": (1, 2)}).to_dict()
    assert plain["checkpoint_dir"] == "a/b"
    assert plain["metadata"] == {"sizes": [1, 2]}
    assert plain["scheduler"] is None
    assert type(plain["optimizer"]) is dict
    assert FULL.to_dict()["scheduler"]["milestones"] == [10, 20]


def test_dict_is_a_copy():
    config = training(metadata={"nested": {"a": 1}})
    config.to_dict()["metadata"]["nested"]["a"] = 2
    assert config.metadata == {"nested": {"a": 1}}


def test_from_dict_takes_made_configs_and_lists():
    made = TrainingConfig.from_dict(
        {"optimizer": ADAM, "scheduler": {"scheduler_type": "multistep", "milestones": [5, 9]}, "checkpoint_dir": "x"}
    )
    assert made.optimizer is ADAM
    assert made.scheduler.milestones == (5, 9)


@pytest.mark.parametrize("config", [FULL, training()])
def test_yaml_round_trip(config, tmp_path):
    config.to_yaml(tmp_path / "config.yaml")
    assert TrainingConfig.from_yaml(str(tmp_path / "config.yaml")) == config


def test_yaml_round_trip_of_a_path_gives_its_string(tmp_path):
    training(checkpoint_dir=tmp_path / "runs").to_yaml(tmp_path / "config.yaml")
    assert TrainingConfig.from_yaml(tmp_path / "config.yaml").checkpoint_dir == str(tmp_path / "runs")


def test_yaml_keeps_the_order_of_declaration(tmp_path):
    ADAM.to_yaml(tmp_path / "config.yaml")
    first = (tmp_path / "config.yaml").read_text().splitlines()[:3]
    assert [line.split(":")[0] for line in first] == ["name", "optimizer_type", "learning_rate"]


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "0.001", "+1e-3"])
def test_yaml_reads_a_number_that_looks_like_one(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"optimizer_type: adam\nlearning_rate: {text}\n")
    assert OptimizerConfig.from_yaml(path).learning_rate == 1e-3


def test_yaml_reads_words_as_words(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: 1e-3x\noptimizer_type: adam\nlearning_rate: '1e-3'\n")
    with pytest.raises(ConfigError, match=r"`OptimizerConfig\.learning_rate` is '1e-3' of type str"):
        OptimizerConfig.from_yaml(path)


def test_empty_yaml_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"^`TrainingConfig` is of type NoneType; it must be a mapping of fields\.$"):
        TrainingConfig.from_yaml(tmp_path / "config.yaml")


PLAIN_ADAM = {"optimizer_type": "adam", "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"optimizer": PLAIN_ADAM, "batchsize": 3},
            "`TrainingConfig.batchsize` is no field; did you mean 'batch_size'?",
        ),
        (
            {"optimizer": {**PLAIN_ADAM, "learning_rat": 1}},
            "`TrainingConfig.optimizer.learning_rat` is no field; did you mean 'learning_rate'?",
        ),
        (
            {"optimizer": PLAIN_ADAM, "scheduler": {"scheduler_type": "constant", "milestone": [1]}},
            "`TrainingConfig.scheduler.milestone` is no field; did you mean 'milestones'?",
        ),
        ({"optimizer": {"optimizer_type": "adam"}}, "`TrainingConfig.optimizer.learning_rate` is required."),
        ({}, "`TrainingConfig.optimizer` is required."),
        (
            {"batch_sizes": 1, "num_epoch": 2},
            "`TrainingConfig.batch_sizes` is no field; did you mean 'batch_size'? `TrainingConfig.num_epoch` is no "
            "field; did you mean 'num_epochs'? `TrainingConfig.optimizer` is required.",
        ),
        ([1], "`TrainingConfig` is of type list; it must be a mapping of fields."),
        (
            {"optimizer": "adam"},
            "`TrainingConfig.optimizer` is 'adam' of type str; it must be OptimizerConfig.",
        ),
        (
            {"optimizer": PLAIN_ADAM, "scheduler": "cosine"},
            "`TrainingConfig.scheduler` is 'cosine' of type str; it must be SchedulerConfig or None.",
        ),
    ],
)
def test_from_dict_says_what_is_wrong_and_where(data, message):
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_dict(data)
    assert str(caught.value) == message


def test_a_name_near_to_nothing_gets_the_whole_list():
    with pytest.raises(ConfigError, match=r"^`ExtensionConfig\.zzz` is no field; known: enabled, name, weight\.$"):
        ExtensionConfig.from_dict({"zzz": 1})
    assert did_you_mean("zzz", ()) == "known: none."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizer(learning_rate="1e-3"), "learning_rate` is '1e-3' of type str; it must be float."),
        (lambda: optimizer(learning_rate=True), "learning_rate` is True of type bool; it must be float."),
        (lambda: optimizer(learning_rate=None), "learning_rate` is None of type NoneType; it must be float."),
        (lambda: optimizer(nesterov=1), "nesterov` is 1 of type int; it must be bool."),
        (lambda: optimizer(optimizer_type=3), "optimizer_type` is 3 of type int; it must be str."),
        (lambda: optimizer(name=None), "name` is None of type NoneType; it must be str."),
        (lambda: optimizer(gradient_clip_norm="1"), "gradient_clip_norm` is '1' of type str; it must be float or None"),
        (lambda: optimizer(gradient_clip_norm=True), "gradient_clip_norm` is True of type bool; it must be float or "),
        (lambda: training(batch_size=True), "batch_size` is True of type bool; it must be int."),
        (lambda: training(batch_size=32.0), "batch_size` is 32.0 of type float; it must be int."),
        (lambda: training(steps_per_epoch="7"), "steps_per_epoch` is '7' of type str; it must be int or None."),
        (lambda: training(steps_per_epoch=True), "steps_per_epoch` is True of type bool; it must be int or None."),
        (lambda: training(checkpoint_dir=3), "checkpoint_dir` is 3 of type int; it must be str or Path."),
        (lambda: training(use_wandb="yes"), "use_wandb` is 'yes' of type str; it must be bool."),
        (lambda: training(metadata=[1]), "metadata` is [1] of type list; it must be dict[str, typing.Any]."),
        (lambda: training(optimizer=None), "optimizer` is None of type NoneType; it must be OptimizerConfig."),
        (lambda: training(scheduler=ADAM), "of type OptimizerConfig; it must be SchedulerConfig or None."),
        (lambda: scheduler("multistep", milestones=3), "milestones` is 3 of type int; it must be tuple[int, ...]."),
        (lambda: scheduler("multistep", milestones=[1, 2.5]), "milestones[1]` is 2.5 of type float; it must be int."),
        (lambda: scheduler("multistep", milestones=[True]), "milestones[0]` is True of type bool; it must be int."),
        (lambda: ExtensionConfig(weight="1"), "`ExtensionConfig.weight` is '1' of type str; it must be float."),
        (lambda: ExtensionConfig(enabled=0), "`ExtensionConfig.enabled` is 0 of type int; it must be bool."),
    ],
)
def test_mistyped_values_are_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rich(ExtensionConfig):
    """What a caller's own configuration may be annotated with."""

    depth: Optional[int] = None  # noqa: UP045 - the old spelling too
    mode: Literal["mean", "sum"] = "mean"
    extra: Any = None
    free: tuple = ()
    pair: tuple[int, float] = (0, 0.0)
    inner: ExtensionConfig | None = None


def test_subclasses_may_have_any_annotations():
    made = Rich(depth=2, mode="sum", extra=object, free=[1, "a"], pair=[1, 2], weight=2)
    assert (made.depth, made.mode, made.extra, made.free, made.pair) == (2, "sum", object, (1, "a"), (1, 2.0))


def test_subclasses_round_trip(tmp_path):
    made = Rich(name="rich", pair=(1, 2.5), inner=ExtensionConfig(weight=0.5))
    made.to_yaml(tmp_path / "rich.yaml")
    assert Rich.from_yaml(tmp_path / "rich.yaml") == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": "2"}, "`Rich.depth` is '2' of type str; it must be int or None."),
        ({"pair": (1, 2.0, 3)}, "`Rich.pair` is (1, 2.0, 3) of type tuple; it must be tuple[int, float]."),
        ({"pair": (1.5, 2.0)}, "`Rich.pair[0]` is 1.5 of type float; it must be int."),
    ],
)
def test_subclasses_are_checked_under_their_own_name(changes, message):
    with pytest.raises(ConfigError) as caught:
        Rich(**changes)
    assert str(caught.value) == message
