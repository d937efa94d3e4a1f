"""Training mode and evaluation mode of a module and its parts.

In Flax the mode is set by two attributes, ``deterministic`` (dropout is off) and ``use_running_average`` (batch
normalization uses its stored statistics), which any module of the tree may have.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from trainer.core.nnx_bridge import Path, split_variables

_MODES = ("deterministic", "use_running_average")


def in_training_mode(model: Any) -> Any:
    """Returns the model in training mode, except for modules that were in evaluation mode.

    The state holds the original modes of the model, so a module that the user put into evaluation mode (for example
    to freeze the batch statistics of a backbone) stays in it, as in a hand-written loop.
    """
    held = [(module, name) for _, module, name in _evaluated(model)]
    _switch(model, "train")
    for module, name in held:
        setattr(module, name, True)
    return model


def in_evaluation_mode(model: Any) -> Any:
    """Returns the model with every module in evaluation mode."""
    _switch(model, "eval")
    return model


def evaluated_as_a_whole(model: Any, wrt: nnx.filterlib.Filter) -> list[str]:
    """Returns the modules in evaluation mode if that is all of them and some are next to trained variables.

    The mode is then probably left over from an evaluation. If no module in evaluation mode is trained, it is intended,
    as in fine-tuning.
    """
    evaluated = list(_evaluated(model))
    if len(evaluated) < sum(hasattr(module, name) for _, module in nnx.iter_modules(model) for name in _MODES):
        return []
    trained = split_variables(model, wrt)[0] if evaluated else {}
    owners = {_owner(path) for path, _, _ in evaluated}
    if not any(variable[: len(owner)] == owner for owner in owners for variable in trained):
        return []
    return list(dict.fromkeys("/".join(map(str, path)) or type(module).__name__ for path, module, _ in evaluated))


def _evaluated(model: Any) -> Iterator[tuple[Path, Any, str]]:
    for path, module in nnx.iter_modules(model):
        for name in _MODES:
            mode = getattr(module, name, None)
            if isinstance(mode, bool | np.bool_) and mode:
                yield path, module, name


def _owner(path: Path) -> Path:
    """Returns the path of the module that owns a submodule, directly or in a list."""
    owner = path[:-1]
    while owner and isinstance(path[len(owner)], int):
        owner = owner[:-1]
    return owner


def _switch(model: Any, name: str) -> None:
    # Looked up in the class, since an instance attribute may have this name. A class may override the method, or define
    # an unrelated one of this name.
    switch = getattr(type(model), name)
    try:
        inspect.signature(switch).bind(model)
    except TypeError:
        switch = getattr(nnx.Module, name)
    switch(model)
