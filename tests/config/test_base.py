"""What every configuration does: it checks types, round-trips, and says what is wrong and where."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.config.examples import ADAM, FULL, MINIMAL, optimizer, scheduler, training
from trainer import ConfigError, ExtensionConfig, OptimizerConfig, SchedulerConfig, TrainingConfig
from trainer.core.checks import did_you_mean


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
    with pytest.raises(
        ConfigError, match=r"^`ExtensionConfig\.zzz` is no field; known: description, enabled, metadata, name, "
    ):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarts(SchedulerConfig):
    restarts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(TrainingConfig):
    scheduler: Restarts | None = None
    trials: tuple[int, ...] = ()


def test_subclasses_of_every_configuration_add_fields(tmp_path):
    plain = {"scheduler_type": "cosine", "restarts": 2}
    made = Study.from_dict({"optimizer": {"optimizer_type": "sgd", "learning_rate": 1}, "scheduler": plain})
    assert made.scheduler == Restarts(scheduler_type="cosine", restarts=2)
    made.replace(trials=[1, 2]).to_yaml(tmp_path / "study.yaml")
    assert Study.from_yaml(tmp_path / "study.yaml") == made.replace(trials=(1, 2))
    with pytest.raises(ConfigError, match=r"`Study\.scheduler\.restart` is no field; did you mean 'restarts'\?"):
        Study.from_dict({"optimizer": ADAM, "scheduler": {"scheduler_type": "cosine", "restart": 2}})


LABELS = {"name": "a", "description": "what it is for", "tags": ["x", "y"], "metadata": {"seed": [1, None]}}


@pytest.mark.parametrize("cls", MINIMAL)
def test_labels_are_read_kept_and_written_back(cls, tmp_path):
    made = cls.from_dict({**MINIMAL[cls], **LABELS})
    assert (made.tags, made.metadata) == (("x", "y"), {"seed": [1, None]})
    assert made.to_dict().items() >= LABELS.items()
    made.to_yaml(tmp_path / "config.yaml")
    assert cls.from_yaml(tmp_path / "config.yaml") == made


def test_labels_of_nested_configurations_are_kept():
    nested = {"optimizer": {**PLAIN_ADAM, **LABELS}, "scheduler": {"scheduler_type": "none", **LABELS}, **LABELS}
    made = TrainingConfig.from_dict(nested)
    assert made.optimizer.description == made.scheduler.description == "what it is for"
    assert TrainingConfig.from_dict(made.to_dict()) == made


def test_configurations_are_hashable():
    assert hash(FULL) == hash(TrainingConfig.from_dict(FULL.to_dict()))
    assert len({ADAM, ADAM.replace(learning_rate=1.0), ADAM.replace(tags=("a",))}) == 3


@pytest.mark.parametrize("width", [9, 2])
def test_aliases_that_fill_the_memory_are_refused(width, tmp_path):
    """A file of a few hundred bytes unfolds into 9**9 strings."""
    lines = ["metadata:", "  a0: &a0 [" + ", ".join(["lol"] * width) + "]"]
    for level in range(1, 60 // width):
        names = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"  a{level}: &a{level} [{names}]")
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="repeats its parts by aliases"):
        TrainingConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("metadata: &a\n  self: *a\n", "repeats its parts by aliases"), ("metadata: " + "[" * 5000, "nested too deeply")],
)
def test_yaml_that_contains_itself_or_is_deep(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_yaml(path)


def test_aliases_are_fine_where_they_are_few(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "name: x\noptimizer: &a {optimizer_type: adam, learning_rate: 1e-3}\nmetadata: {again: *a, twice: *a}\n"
    )
    config = TrainingConfig.from_yaml(path)
    assert config.metadata["again"] == config.metadata["twice"] == {"optimizer_type": "adam", "learning_rate": 1e-3}


class TestNumbersOfArrays:
    @pytest.mark.parametrize("kind", [np.int64, np.int32, jnp.int32, np.array], ids=["int64", "int32", "jnp", "array"])
    def test_whole_ones(self, kind):
        made = training(batch_size=kind(16))
        assert (made.batch_size, type(made.batch_size)) == (16, int)

    @pytest.mark.parametrize(
        "kind", [np.float32, np.float64, jnp.float32, np.array], ids=["float32", "float64", "jnp", "array"]
    )
    def test_others(self, kind):
        made = training(gradient_clip_norm=kind(0.5), optimizer=optimizer(learning_rate=kind(0.25)))
        assert (made.gradient_clip_norm, made.optimizer.learning_rate) == (0.5, 0.25)
        assert made.to_dict() == training(gradient_clip_norm=0.5, optimizer=optimizer(learning_rate=0.25)).to_dict()

    def test_what_the_field_is_not_stays_refused(self):
        with pytest.raises(ConfigError, match=r"batch_size` is 1.5 of type float; it must be int"):
            training(batch_size=np.float32(1.5))
        with pytest.raises(ConfigError, match=r"batch_size` is True of type bool"):
            training(batch_size=np.bool_(True))
        with pytest.raises(ConfigError, match=r"batch_size` is array\(\[1, 2\]\) of type ndarray"):
            training(batch_size=np.array([1, 2]))

    def test_a_key_is_no_number(self):
        key = jax.random.key(0)
        with pytest.raises(ConfigError, match=r"(?s)batch_size` is Array\(\(\), dtype=key.* it must be int"):
            training(batch_size=key)
        assert training(metadata={"keys": [key]}).to_dict()["metadata"]["keys"] == [key]

    def test_nor_is_an_abstract_array(self):
        with pytest.raises(ConfigError, match=r"batch_size` is ShapeDtypeStruct\(.* it must be int"):
            training(batch_size=jax.ShapeDtypeStruct((), jnp.int32))

    def test_in_metadata_they_become_plain(self, tmp_path):
        made = training(metadata={"score": np.float64(0.5), "seeds": [np.int64(1), jnp.asarray(2)]})
        made.to_yaml(tmp_path / "c.yaml")
        assert TrainingConfig.from_yaml(tmp_path / "c.yaml").metadata == {"score": 0.5, "seeds": [1, 2]}


def test_metadata_that_yaml_cannot_hold_is_said_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"`TrainingConfig.metadata` holds an object of type ndarray, which YAML"):
        training(metadata={"a": {"b": np.ones(2)}}).to_yaml(tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()


def test_metadata_that_contains_itself():
    metadata = {}
    metadata["self"] = metadata
    with pytest.raises(ConfigError, match=r"`TrainingConfig.metadata` contains itself"):
        training(metadata=metadata).to_dict()


@pytest.mark.parametrize("content", [b"a: [1,", b"a: b: c", b"\xff\xfe\x00"], ids=["open", "nested", "bytes"])
def test_a_file_that_is_no_yaml(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.yaml` is no YAML: "):
        TrainingConfig.from_yaml(path)


@pytest.mark.parametrize("field", ["optimizer", "batch_size", "name", "gradient_clip_norm"])
def test_a_value_longer_than_a_line_is_cut(field):
    with pytest.raises(ConfigError) as caught:
        training(**{field: list(range(10_000))})
    assert len(str(caught.value)) < 250
