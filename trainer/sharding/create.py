"""Creates training states that are initialized sharded: no device ever holds the whole state."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import optax
from flax import nnx
from flax.core import spmd
from jax.sharding import Mesh, PartitionSpec

from trainer.errors import ArgumentTypeError
from trainer.sharding.mesh import Axes, with_auto_axes
from trainer.sharding.partition import MIN_SIZE, partition, shardings_of
from trainer.state import TrainState, as_key, check_model, check_optimizer
from trainer.types import ExtensionLike, NonFinite


def abstract_state(
    model_fn: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    rng: jax.Array | int,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    logical_axes: Mapping[str, Axes] | None = None,
    min_size: int = MIN_SIZE,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
    nonfinite: NonFinite = "ignore",
) -> TrainState:
    """Returns the state of `create_sharded`, with a `jax.ShapeDtypeStruct` for each array.

    Computes nothing. Each leaf has its ``sharding``, so the result works for `trainer.plan` and for
    restoring a checkpoint.
    """
    held = {"wrt": wrt, "extensions": extensions, "nonfinite": nonfinite}
    how = {"rules": rules, "logical_axes": logical_axes, "min_size": min_size}
    return _abstract_init(model_fn, optimizer, as_key(rng), mesh, held, how)[1]


def create_sharded(
    model_fn: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    rng: jax.Array | int,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    logical_axes: Mapping[str, Axes] | None = None,
    min_size: int = MIN_SIZE,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
    nonfinite: NonFinite = "ignore",
) -> TrainState:
    """Creates a state that is initialized sharded.

    No device or host ever holds the whole state: one compiled program computes each part on the
    device that keeps it. On any mesh, it equals these lines under ``jax.jit``, bit for bit::

        model_rng, rng = jax.random.split(rng)
        TrainState.create(
            model_fn(nnx.Rngs(model_rng)), optimizer, rng=rng, wrt=wrt, extensions=extensions, nonfinite=nonfinite
        )

    Args:
        model_fn: Makes the module from random streams: ``lambda rngs: Transformer(config, rngs=rngs)``.
            It is traced, so it must not close over large arrays.
        optimizer: Any optax transformation.
        rng: A key, raw or typed, or an integer seed, the same in every process. It is an argument of the compiled
            program: a seed hard-coded in ``model_fn`` would be a constant, from which the compiler may fold whole
            params at compile time.
        mesh: See `make_mesh`.
        rules: See `partition`.
        logical_axes: See `partition`.
        min_size: See `partition`.
        wrt, extensions, nonfinite: See `TrainState.create`.

    Raises:
        ArgumentError: See `TrainState.create` and `partition`.
    """
    held = {"wrt": wrt, "extensions": extensions, "nonfinite": nonfinite}
    how = {"rules": rules, "logical_axes": logical_axes, "min_size": min_size}
    rng = as_key(rng)
    init, abstract = _abstract_init(model_fn, optimizer, rng, mesh, held, how)
    with _logical_axis_rules(mesh, logical_axes):
        state: TrainState = jax.jit(init, out_shardings=shardings_of(abstract))(rng)
    return state


def _abstract_init(
    model_fn: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    mesh: Mesh,
    held: Mapping[str, Any],
    how: Mapping[str, Any],
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """Returns the function from a key to the state, and the shapes and shardings of its result.

    ``held`` are the arguments of `TrainState.create` that determine its contents, ``how`` those of `partition`.
    """
    check_optimizer(optimizer)
    if not callable(model_fn) or isinstance(model_fn, nnx.Module):
        raise ArgumentTypeError(
            f"`model_fn` is of type {type(model_fn).__name__}; it must be a callable that makes the module from random "
            f"streams, such as `lambda rngs: Model(rngs=rngs)`. A module that exists is already unsharded in memory."
        )

    def init(rng: jax.Array) -> TrainState:
        model_rng, rng = jax.random.split(rng)
        model = model_fn(nnx.Rngs(model_rng))
        check_model(model)
        return TrainState.create(model, optimizer, rng=rng, **held)

    try:
        with _logical_axis_rules(mesh, how["logical_axes"]):
            shapes = jax.eval_shape(init, rng)
    except ValueError:
        # If the mesh lacks an axis that a dimension is named after, JAX's error does not say which variable has it.
        # Trace without Flax's placement, so that `partition` can raise an error that does. The lambda is a new
        # function, so its trace is not cached. `use_eager_sharding` was seen in Flax 0.12.8.
        with nnx.use_eager_sharding(False):  # type: ignore[no-untyped-call]
            partition(jax.eval_shape(lambda rng: init(rng), rng), mesh, **how)
        raise
    shardings = partition(shapes, mesh, **how)
    return init, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


@contextmanager
def _logical_axis_rules(mesh: Mesh, logical_axes: Mapping[str, Axes] | None) -> Iterator[None]:
    """Sets the mesh and axis rules for Flax, which places variables with named dimensions on creation.

    The rules are in `flax.core.spmd`, a module of Linen that NNX reads too; seen in Flax 0.12.8.
    """
    rules = {**dict(spmd.get_logical_axis_rules()), **(logical_axes or {})}
    with jax.set_mesh(with_auto_axes(mesh)), spmd.logical_axis_rules(tuple(rules.items())):
        yield
