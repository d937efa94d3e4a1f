"""Training mode and evaluation mode of a module and its parts.

In Flax a mode is two attributes, ``deterministic`` (dropout is off) and ``use_running_average`` (batch normalization
uses its stored statistics), which any module of the tree may have.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from trainer.core.nnx_bridge import Path, split_variables

_MODES = ("deterministic", "use_running_average")


def in_training_mode(model: Any) -> Any:
    """Returns the model, switched to training mode but for the parts that were in evaluation mode.

    The state holds the modes that the model was handed over in, so a part that its owner put into evaluation mode (the
    batch statistics of a backbone, say) stays in it, as it does in a loop by hand.
    """
    held = [(module, name) for _, module, name in _evaluated(model)]
    _switch(model, "train")
    for module, name in held:
        setattr(module, name, True)
    return model


def in_evaluation_mode(model: Any) -> Any:
    """Returns the model, switched to evaluation mode, every part of it."""
    _switch(model, "eval")
    return model


def evaluated_as_a_whole(model: Any, wrt: nnx.filterlib.Filter) -> list[str]:
    """Returns the parts in evaluation mode, if no part is in another and some stand beside trained variables.

    Then the mode is probably left from an evaluation. A model whose parts in evaluation mode are not trained is
    fine-tuned on purpose.
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
    """Returns the path of the module that a part belongs to, itself or in a list."""
    owner = path[:-1]
    while owner and isinstance(path[len(owner)], int):
        owner = owner[:-1]
    return owner


def _switch(model: Any, name: str) -> None:
    # Looked up in the class: an attribute of this name may be the model's own. A class may override the method, or have
    # one of this name that means something else.
    switch = getattr(type(model), name)
    try:
        inspect.signature(switch).bind(model)
    except TypeError:
        switch = getattr(nnx.Module, name)
    switch(model)
