"""Names of Keras, Lightning and Hugging Face: what they give is one error that names what is here."""

import inspect
import re
import subprocess
import sys

import pytest

import trainer
from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, ArgumentTypeError, Callback, EarlyStopping, Precision, Trainer
from trainer.core.other_names import ARGUMENTS, ATTRIBUTES, NAMES, PRECISIONS

HINTS = [
    *(("name", name, hint) for name, hint in NAMES.items()),
    *(("attribute", name, hint) for name, hint in ATTRIBUTES.items()),
    *((owner, name, hint) for owner, hints in ARGUMENTS.items() for name, hint in hints.items()),
]


def called(owner):
    first, *rest = owner.split(".")
    return getattr(getattr(trainer, first), rest[0]) if rest else getattr(trainer, first)


def build(**options):
    return Trainer(Linear(4), config(), loss_fn=squared_error, progress=False, **options)


@pytest.mark.parametrize("package", ["trainer", "trainer.callbacks", "trainer.loggers"])
@pytest.mark.parametrize(
    "name", ["TerminateOnNaN", "TensorBoard", "RichProgressBar", "BackupAndRestore", "seed_everything"]
)
def test_an_import_says_what_there_is(package, name):
    with pytest.raises(ImportError) as caught:
        exec(f"from {package} import {name}")
    assert str(caught.value) == f"module {package!r} has no {name!r}; here, {NAMES[name]}."
    with pytest.raises(AttributeError, match=re.escape(str(caught.value))):
        getattr(sys.modules[package], name)
    assert not hasattr(sys.modules[package], name)


def test_an_import_in_a_new_process_says_it_too():
    code = "from trainer import Trainer, StochasticWeightAveraging"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: module 'trainer' has no 'StochasticWeightAveraging'; here, "
        "`Trainer(params_average=ema_of_params(0.999))`, or `polyak_average()`."
    )


@pytest.mark.parametrize("owner", ARGUMENTS)
def test_arguments_are_refused_with_what_to_pass(owner):
    for name, hint in ARGUMENTS[owner].items():
        with pytest.raises(ArgumentTypeError) as caught:
            called(owner)(**{name: 1})
        assert str(caught.value) == f"{owner}(...) takes no `{name}`. Here, for `{name}`: {hint}."


def test_all_of_a_call_are_told_at_once():
    with pytest.raises(
        TypeError, match=r"takes no `accelerator`, `max_epochs`. Here, for `accelerator`: .*; for `max_epochs`"
    ):
        build(accelerator="gpu", max_epochs=3)


def test_a_name_that_nobody_has_and_errors_from_inside_stay_as_they_are():
    with pytest.raises(TypeError, match="unexpected keyword argument 'loader_of_mine'"):
        build(loader_of_mine=1)
    with pytest.raises(ArgumentError, match="`save_interval` is 0"):
        build(save_interval=0)

    def broken(model, batch, rng, step):
        raise TypeError("got an unexpected keyword argument 'max_epochs'")

    with pytest.raises(TypeError, match=r"^got an unexpected keyword argument 'max_epochs'"):
        Trainer(Linear(4), config(), loss_fn=broken, progress=False).train(regression(8), 1, 8)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_say_what_there_is(name):
    held = build()
    with pytest.raises(AttributeError) as caught:
        getattr(held, name)
    assert str(caught.value) == f"'Trainer' object has no attribute '{name}'; here, {ATTRIBUTES[name]}."
    assert not hasattr(held, name)


def test_other_attributes_fail_as_ever():
    class Broken(Trainer):
        @property
        def half(self):
            return self.run.no_such_thing

    held = Broken(Linear(4), config(), loss_fn=squared_error, progress=False)
    with pytest.raises(AttributeError, match=r"^'Broken' object has no attribute 'hafl'"):
        _ = held.hafl
    with pytest.raises(AttributeError, match="'Run' object has no attribute 'no_such_thing'"):
        _ = held.half


def test_signatures_stay():
    assert list(inspect.signature(EarlyStopping).parameters)[:3] == ["monitor", "mode", "patience"]
    assert list(inspect.signature(Trainer).parameters)[:2] == ["model", "training_config"]
    assert inspect.signature(Trainer.train).parameters["num_epochs"].annotation is int
    assert not any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for owner in ARGUMENTS
        for parameter in inspect.signature(called(owner)).parameters.values()
    )


@pytest.mark.parametrize(("name", "dtype"), PRECISIONS.items())
def test_precisions_say_the_dtype(name, dtype):
    with pytest.raises(ArgumentError, match=rf"`precision` is '{name}'; .* Here it is '{dtype}'\."):
        build(precision=name)
    assert Precision(dtype)


def test_no_name_of_others_is_one_of_ours():
    assert not [name for name in NAMES if name in trainer.__all__]
    held = build()
    assert not [name for name in ATTRIBUTES if name in dir(held)]
    for owner, hints in ARGUMENTS.items():
        assert not set(hints) & set(inspect.signature(called(owner)).parameters)


@pytest.mark.parametrize(("kind", "name", "hint"), HINTS)
def test_what_a_hint_names_is_there(kind, name, hint):
    """Calls with their keywords, classes and functions of the package, keywords of the same call."""
    keywords = {*inspect.signature(Trainer).parameters, *inspect.signature(Trainer.train).parameters}
    own = set() if kind in ("name", "attribute") else set(inspect.signature(called(kind)).parameters)
    held = build()
    for code in re.findall(r"`([^`]+)`", hint):
        head = re.match(r"[\w.]+", code)
        if head is None:  # a tuple or a dict of data
            continue
        head = head[0]
        options = set(re.findall(r"[(,]\s*(\w+)=", code)) - {"x"}
        if head.startswith("Trainer."):
            assert hasattr(held, head.removeprefix("Trainer.").split("(")[0]), code
        elif callable(getattr(trainer, head, None)):
            target = getattr(trainer, head)
            assert options <= set(inspect.signature(target).parameters), code
        elif head == "train":
            assert options <= set(inspect.signature(Trainer.train).parameters), code
        elif head in ("trainer.state", "trainer.summary"):
            assert hasattr(held, head.split(".")[1])
        else:
            first = head.split(".")[0]
            known = keywords | own | {"nnx", "loss_fn", "batch_weight", "val_", "dirpath", "trainer", "XLA_FLAGS"}
            known |= {"polyak_average", "summarize", "monitor", "num_epochs"}
            assert first in known or hasattr(held, first), code


@pytest.mark.parametrize("name", ["should_stop", "stop_training"])
def test_an_assignment_that_ends_a_run_elsewhere_says_how_it_does_here(name):
    class Ends(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            setattr(trainer, name, True)

    class Own(Trainer):  # without slots, it would take any attribute
        pass

    for kind in (Trainer, Own):
        held = kind(Linear(4), config(), loss_fn=squared_error, progress=False, callbacks=[Ends()])
        with pytest.raises(AttributeError, match=r"in a callback, set `self\.should_stop = True`"):
            held.train(regression(8), 1, 8)
    assert held.should_stop is False


def test_the_history_of_keras():
    history = build().history
    with pytest.raises(AttributeError, match=r"has no attribute 'history'; here, `series\('loss'\)` returns"):
        _ = history.history
    with pytest.raises(AttributeError, match="'History' object has no attribute 'hystory'"):
        _ = history.hystory
