"""The model input and the checks of model outputs in prediction."""

from collections.abc import Mapping
from typing import Any

import jax

from trainer.batches import check_batch, summarize
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError

_INPUTS = frozenset({"input", "x"})
_TARGETS = frozenset({"label", "labels", "target", "targets", "y"})


def call_on_input(model: Any, batch: Any) -> Any:
    """Calls the model on the input of a batch, if it is unambiguous which part that is.

    It is the array itself, the only entry of a mapping or tuple, or the entry ``input`` or ``x`` of a mapping whose
    other entries have target names. An entry of another name may be needed by the model, for example a mask.

    Raises:
        ArgumentError: The model is not callable, or its input is ambiguous.
    """
    advice = "pass fn, such as fn=lambda model, batch: model(batch[...])"
    if not callable(model):
        raise ArgumentError(f"`model` is of type {type(model).__name__} and has no __call__; {advice}.")
    if jax.tree_util.all_leaves([batch]):
        return model(batch)
    if isinstance(batch, Mapping | tuple | list) and len(batch) == 1:
        return model(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))
    if isinstance(batch, Mapping):
        inputs = _INPUTS & set(batch)
        if len(inputs) == 1 and set(batch) <= inputs | _TARGETS:
            return model(batch[next(iter(inputs))])
    raise ArgumentError(
        f"`fn` was left out, and a batch of {summarize(batch)} does not tell what `model` is called on: an array, the "
        f"only entry, or `input` or `x` beside nothing but targets ({', '.join(sorted(_TARGETS))}); {advice}."
    )


def check_outputs(outputs: Any, batch: Any) -> None:
    """Checks that outputs can be concatenated over batches: each must be an array with one row per example.

    Raises:
        ArgumentError: There are no outputs, or one has another leading dimension than the batch. If the arrays of the
            batch do not share one, the outputs must share one.
    """
    leaves = jax.tree.leaves_with_path(outputs)
    examples = check_batch(batch)
    lengths = [shape[0] if (shape := getattr(leaf, "shape", ())) else None for _, leaf in leaves]
    wanted = examples if examples is not None or not lengths else lengths[0]
    if leaves and None not in lengths and set(lengths) == {wanted}:
        return
    rows = "one and the same number of" if examples is None else f"the batch's {examples}"
    wrong = [
        f"`{leaf_path(path) or 'outputs'}` of shape {getattr(leaf, 'shape', ())}"
        for (path, leaf), length in zip(leaves, lengths, strict=True)
        if length is None or length != wanted
    ]
    raise ArgumentError(
        f"`fn` returned {', '.join(wrong[:5]) or 'no array'} for a batch of {summarize(batch)}; every output must be "
        f"an array with {rows} examples along its first axis."
    )
