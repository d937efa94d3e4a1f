"""The module that ``Trainer.model`` returned last: changing it changes nothing, which is said when training begins."""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.core.averaged_params import with_eval_params
from trainer.core.nnx_bridge import Path, split_variables
from trainer.errors import warn
from trainer.run import Run
from trainer.types import EvalParams


class _Copy(NamedTuple):
    """A copy that the caller may keep; only weak references, so that its arrays are freed with it."""

    model: weakref.ref[Any]
    arrays: Mapping[Path, weakref.ref[Any]]
    step: int


class LatestCopy:
    """The latest copy of the model that a caller got. It is looked at once, and only while the caller keeps it.

    A copy that the caller dropped cannot be told from one that was only evaluated: ``nnx.jit`` replaces all arrays too.

    Args:
        wrt: Which variables are params.
        eval_params: The params of the copy, see `trainer.make_eval_step`.
    """

    def __init__(self, wrt: nnx.filterlib.Filter, eval_params: EvalParams | None) -> None:
        self._wrt, self._eval_params = wrt, eval_params
        self._copy: _Copy | None = None
        self._has_warned = False

    def add(self, model: Any, step: int) -> None:
        """Remembers a copy of the model at a step."""
        if not self._has_warned:
            params = split_variables(model, self._wrt)[0]
            arrays = {path: weakref.ref(array) for path, array in params.items() if isinstance(array, jax.Array)}
            self._copy = _Copy(weakref.ref(model), arrays, step)

    def check(self, run: Run) -> None:
        """Warns, once, if the caller keeps a copy of the run's model at this step and has changed its params."""
        if self._copy is None:
            return
        copy, self._copy = self._copy, None
        model = copy.model()
        if model is None or copy.step != run.step:
            return
        if not all(leaf.is_fully_addressable for leaf in run.leaves):  # of several processes
            return
        params = split_variables(model, self._wrt)[0]
        replaced = {
            path: params[path] for path, array in copy.arrays.items() if path in params and params[path] is not array()
        }
        if not replaced:
            return
        state = with_eval_params(run.state_with_edits(), self._eval_params)
        own = split_variables(state.model(), self._wrt)[0]
        changed = [path for path, array in replaced.items() if path in own and _differ(array, own[path])]
        if changed:
            self._has_warned = True
            warn(
                f"the params of a module from `trainer.model` were changed (`{'/'.join(map(str, changed[0]))}`"
                f"{', …' if len(changed) > 1 else ''}). It is a copy, so the run trains without that change. Change "
                f"`trainer.state.params`, or make a Trainer with the changed module."
            )


def _differ(changed: Any, own: Any) -> bool:
    if not isinstance(changed, jax.Array) or changed.is_deleted():
        return False
    # Of another dtype or shape it was converted for something else: such params could not be trained on.
    if (changed.shape, changed.dtype) != (own.shape, own.dtype) or not changed.is_fully_addressable:
        return False
    return not bool(jnp.array_equal(jax.device_get(changed), jax.device_get(own)))
