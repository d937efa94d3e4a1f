"""Which device holds which part of a training state: meshes, partition rules, states sharded from birth.

The engine is JAX's own. A step says nothing about devices; under ``jax.jit`` the compiler derives every
collective from where the arrays lie. So all there is to decide is a `NamedSharding` for each leaf of
the state and for the batch, and that the state which a step returns lies as the one it was given.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import spmd
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.batches import batch_length
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError, did_you_mean, leaf_path
from trainer.state import TrainState, check_model, check_optimizer, check_rng
from trainer.types import Batch, ExtensionLike

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which a batch is split: each of their devices computes on examples of its own."""

FSDP_AXIS = "fsdp"
"""The mesh axis over which leaves are split that nothing else decides."""

MIN_SIZE = 2**16
"""Leaves with fewer entries are replicated: they are not worth the latency of gathering them."""

Axes = str | tuple[str, ...] | None
"""What splits one dimension: a mesh axis, several of them from major to minor, or none."""

Keys = tuple[str, ...]


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh, for the compiler to partition over (axis type `Auto`).

    Args:
        axes: Name to size, from major to minor. At most one size is -1, which takes what is left. The
            names of the field are ``data`` (replicas), ``fsdp`` (the state is split, and the batch
            too) and ``tensor`` (layers are split). An axis of size 1 costs nothing and lets the same
            rules serve on fewer devices.
        devices: By default all devices of all processes, in an order that suits their network.

    Raises:
        ArgumentTypeError: A size is no integer.
        ArgumentError: The sizes do not multiply to the number of devices.

    Example:
        >>> make_mesh({"data": -1, "tensor": 1}, jax.devices()[:1]).axis_names
        ('data', 'tensor')
    """
    if not axes or not isinstance(axes, Mapping):
        raise ArgumentTypeError(f"`axes` is {axes!r}; it must map names of axes to sizes, such as {{'data': -1}}.")
    for name, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ArgumentTypeError(f"`axes[{name!r}]` is {size!r}; it must be an integer, -1 for what is left.")
        if size == 0 or size < -1:
            raise ArgumentError(f"`axes[{name!r}]` is {size}; it must be positive, or -1 for what is left.")
    free = [name for name, size in axes.items() if size == -1]
    if len(free) > 1:
        raise ArgumentError(f"`axes` leaves {' and '.join(map(repr, free))} open; at most one size can be -1.")
    count = len(jax.devices() if devices is None else devices)
    fixed = math.prod(size for size in axes.values() if size != -1)
    if count % fixed or (not free and count != fixed):
        raise ArgumentError(
            f"`axes` = {dict(axes)} needs {'a multiple of ' if free else ''}{fixed} devices, and there are {count}; "
            f"change the sizes"
            + (f", or pass `devices` = jax.devices()[:{fixed}]." if not free and fixed < count else ".")
        )
    sizes = tuple(count // fixed if size == -1 else size for size in axes.values())
    return jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def partition(
    tree: Any,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    logical_axes: Mapping[str, Axes] | None = None,
    min_size: int = MIN_SIZE,
) -> Any:
    """Decides how each leaf is split over the mesh.

    The first of these that has an answer decides:

    1. The names that a module's author gave to the dimensions of a variable (``nnx.with_partitioning``).
       ``logical_axes`` says which mesh axes they mean; a name of the mesh means itself.
    2. The first of ``rules`` whose pattern matches the path.
    3. A leaf of ``opt_state`` or ``extensions`` whose path ends with that of a param lies as that param
       does, by 1, 2 or 4: one of the same shape (a momentum, an average of the params), one that lacks a
       dimension (the rows and columns of Adafactor; not where that could be either of two which are
       split differently), and one with a dimension more in front, which stays whole (the memory of L-BFGS).
    4. The axis ``fsdp`` of the mesh splits the largest dimension that it divides, the last one among
       equals. Leaves with fewer than ``min_size`` entries, keys and scalars are replicated, and
       everything is where the mesh has no such axis.

    A momentum lies as its param also where the names of 1 decide; a rule that matches only
    ``opt_state/...`` splits the state of the optimizer and leaves the params whole.

    Args:
        tree: A `TrainState`, or another tree, of arrays or `jax.ShapeDtypeStruct`. Names given to
            dimensions and the params that 3 follows are known for a `TrainState` only.
        mesh: The mesh, see `make_mesh`.
        rules: Pattern to `PartitionSpec`. A pattern is a regular expression that has to match a
            whole path, ``params/layers/.*/kernel``.
        logical_axes: Name of a dimension to mesh axes, or to None for a dimension that stays whole.
        min_size: Entries below which 4 replicates a leaf.

    Returns:
        The same tree with a `NamedSharding` for each leaf, to be passed to ``jax.device_put`` or ``jax.jit``.

    Raises:
        ArgumentTypeError: A rule has no `PartitionSpec`.
        ArgumentError: Naming every rule that decides nothing, axis that the mesh does not have and
            dimension that its axes do not divide.

    Example:
        >>> mesh = make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])
        >>> shapes = {"dense": {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)}}
        >>> partition(shapes, mesh)["dense"]["kernel"].spec
        P('fsdp', None)
        >>> partition(shapes, mesh, {"dense/.*": PartitionSpec(None, "tensor")})["dense"]["kernel"].spec
        P(None, 'tensor')
    """
    rules = _check_rules(rules)
    unknown = _unknown_axes(rules, mesh)
    leaves = {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    problems = list(unknown.values())
    named = _named_specs(tree, mesh, logical_axes or {}, problems)
    params = {keys[1:] for keys in leaves if keys[0] == "params"} if isinstance(tree, TrainState) else set()
    decided_by = dict.fromkeys(rules, 0)
    matched = dict.fromkeys(rules, 0)

    @functools.cache
    def decide(keys: Keys) -> PartitionSpec:
        leaf, path = leaves[keys], "/".join(keys)
        source = _mirrored(keys, params)
        followed = _followed(decide(source), leaves[source].shape, leaf.shape) if source else None
        spec = named.get(keys, followed if source in named else None)
        for pattern, ruled in rules.items():
            if re.fullmatch(pattern, path):
                matched[pattern] += 1
                if spec is None:
                    decided_by[pattern] += 1
                    spec = ruled
                    if pattern not in unknown:
                        problems.extend(_misfits(path, leaf.shape, spec, mesh, f"by the rule {pattern!r}"))
        if spec is None:
            spec = followed
        return _automatic(leaf, mesh, min_size) if spec is None else spec

    specs = [decide(keys) for keys in leaves]
    for pattern, count in decided_by.items():
        if not count:
            problems.append(_idle(pattern, matched[pattern], leaves))
    if problems:
        found = "; ".join(dict.fromkeys(problems))
        raise ArgumentError(f"`tree` cannot be partitioned over the mesh {dict(mesh.shape)}: {found}.")
    return jax.tree.unflatten(jax.tree.structure(tree), [NamedSharding(mesh, spec) for spec in specs])


def batch_sharding(mesh: Mesh, axes: Axes = BATCH_AXES, *others: Axes) -> NamedSharding:
    """Returns the sharding of a batch, over those of the axes that the mesh has.

    Args:
        mesh: See `make_mesh`.
        axes: What splits the first dimension, the examples.
        *others: What splits the dimensions after it, in their order. To split the second one of
            sequences is sequence parallelism: every device computes on its part of each sequence, and
            the compiler gathers the keys and values of an attention. No rule and no model need know.

    Example:
        >>> mesh = make_mesh({"data": 1, "sequence": 1}, jax.devices()[:1])
        >>> batch_sharding(mesh).spec
        P('data',)
        >>> batch_sharding(mesh, BATCH_AXES, "sequence").spec
        P('data', 'sequence')
    """
    split = [tuple(axis for axis in _axes(those) if axis in mesh.axis_names) or None for those in (axes, *others)]
    while split and split[-1] is None:
        split.pop()
    return NamedSharding(mesh, PartitionSpec(*split))


def check_batch_fits(batch: Batch, sharding: Any) -> None:
    """Refuses a batch that cannot be split evenly, before anything is placed or compiled.

    Args:
        batch: The global batch, of arrays or `jax.ShapeDtypeStruct`.
        sharding: What `batch_sharding` returned, or a tree of such that the batch begins with.

    Raises:
        BatchError: Naming the leaves, the axes that do not divide their dimensions, and the nearest
            sizes that they do. It also refuses what is no batch at all.
    """
    batch_length(batch)
    whole = jax.tree.broadcast(sharding, batch)
    mesh = jax.tree.leaves(whole)[0].mesh
    uneven: dict[str, list[str]] = {}
    for (path, leaf), split in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(whole), strict=True):
        for dimension, axes in enumerate(map(_axes, split.spec)):
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if axes and dimension >= len(leaf.shape):
                why = f"no dimension {dimension} to split over {', '.join(axes)}; give it a sharding of its own"
            elif axes and leaf.shape[dimension] % parts:
                why = _uneven(dimension, leaf.shape[dimension], parts, axes)
            else:
                continue
            uneven.setdefault(why, []).append(f"`batch/{leaf_path(path)}`")
    if uneven:
        found = "; ".join(f"{', '.join(names)}: {why}" for why, names in uneven.items())
        raise BatchError(f"`batch` cannot be split evenly over the mesh {dict(mesh.shape)}. {found}.")


def multiples_near(length: int, parts: int) -> list[int]:
    """Returns the nearest lengths, below if there is one and above, that can be split in so many parts."""
    return [size for size in (length // parts * parts, -(-length // parts) * parts) if size]


def abstract_state(
    model_fn: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    rng: jax.Array,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    logical_axes: Mapping[str, Axes] | None = None,
    min_size: int = MIN_SIZE,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
) -> TrainState:
    """Returns what `create_sharded` would, with a `jax.ShapeDtypeStruct` in place of each array.

    Nothing is computed. Each leaf knows its ``sharding``, so the result is what `trainer.planning.plan`
    and the restoration of a checkpoint start from.
    """
    return _plan_birth(
        model_fn, optimizer, rng, mesh, wrt, extensions, rules=rules, logical_axes=logical_axes, min_size=min_size
    )[1]


def create_sharded(
    model_fn: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    rng: jax.Array,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    logical_axes: Mapping[str, Axes] | None = None,
    min_size: int = MIN_SIZE,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
) -> TrainState:
    """Creates a state whose every leaf is born where it belongs.

    No device and no host ever holds the whole state: it is one compiled program that computes each
    part on the device that keeps it. It equals, bit for bit on any mesh, these lines compiled::

        model_rng, rng = jax.random.split(rng)
        TrainState.create(model_fn(nnx.Rngs(model_rng)), optimizer, rng=rng, wrt=wrt, extensions=extensions)

    Args:
        model_fn: Makes the module from random streams, such as ``lambda rngs: Transformer(config, rngs=rngs)``.
            It is traced, so it must not close over large arrays.
        optimizer: Any optax transformation.
        rng: A key, raw or typed, the same in every process. The compiled program takes it as an
            argument: of a seed written into ``model_fn`` the compiler would compute the consequences itself.
        mesh: See `make_mesh`.
        rules: See `partition`, as for ``logical_axes`` and ``min_size``.
        logical_axes: What the names of dimensions mean.
        min_size: Entries below which a leaf is replicated.
        wrt: See `TrainState.create`, as for ``extensions``.
        extensions: The extensions whose weights and variables the state carries.

    Raises:
        ArgumentError: See `TrainState.create` and `partition`.
    """
    init, shapes = _plan_birth(
        model_fn, optimizer, rng, mesh, wrt, extensions, rules=rules, logical_axes=logical_axes, min_size=min_size
    )
    with _names_mean(mesh, logical_axes):
        state: TrainState = jax.jit(init, out_shardings=shardings_of(shapes))(rng)
    return state


def jit_step(step: Callable[..., Any], state: Any, batch: Any = None) -> Any:
    """Compiles a train step that takes, donates and returns a state that lies as ``state`` does.

    Left to itself the compiler may return a leaf split differently from how it came, which compiles
    the next step again and changes what each device holds. It is the same as::

        shardings = shardings_of(state)
        jax.jit(
            step,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )

    Args:
        step: ``(state, batch) -> (state, metrics)``, see `trainer.make_train_step` without ``axis_name``.
        state: The sharded state, or its shapes with shardings. It is read, never changed.
        batch: The sharding of the batch, or a tree of them; by default `batch_sharding`. Arrays of the
            host are placed accordingly; where there are several processes, make global arrays of
            them first (``jax.make_array_from_process_local_data``).

    Returns:
        The compiled ``(state, batch) -> (state, metrics)``, with ``lower`` and ``trace`` as ``jax.jit`` has
        them. Where a batch is refused that cannot be split evenly, it raises the `BatchError` of
        `check_batch_fits` in place of JAX's, and the state lives on.

    Raises:
        ArgumentTypeError: A leaf of ``state`` lies on no mesh.
    """
    shardings = shardings_of(state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    split = batch_sharding(mesh) if batch is None else batch
    compiled = jax.jit(
        step,
        in_shardings=(shardings, split),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return _ShardedStep(compiled, split)


class _ShardedStep:
    """A compiled step that explains a batch which JAX refuses; one that fits pays nothing for it."""

    def __init__(self, compiled: Any, batch_sharding: Any) -> None:
        self._compiled = compiled
        self._batch_sharding = batch_sharding
        functools.update_wrapper(self, compiled)

    def __call__(self, state: Any, batch: Any) -> Any:
        return self._explaining(self._compiled, state, batch)

    def lower(self, state: Any, batch: Any) -> Any:
        return self._explaining(self._compiled.lower, state, batch)

    def trace(self, state: Any, batch: Any) -> Any:
        return self._explaining(self._compiled.trace, state, batch)

    def _explaining(self, function: Callable[..., Any], state: Any, batch: Any) -> Any:
        try:
            return function(state, batch)
        except (TypeError, ValueError):
            check_batch_fits(batch, self._batch_sharding)
            raise


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of each leaf, an array or a `jax.ShapeDtypeStruct`.

    Raises:
        ArgumentTypeError: A leaf lies on no mesh.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ArgumentTypeError(
                f"`{leaf_path(path)}` lies on {sharding}, and not on a mesh; make the state with create_sharded, or "
                f"place it: jax.device_put(state, partition(state, mesh))."
            )
        return sharding

    return jax.tree.map_with_path(of, tree)


def bytes_per_device(tree: Any) -> int:
    """Returns how many bytes of the tree a device of its mesh holds."""
    return sum(_bytes(leaf, sharding) for leaf, sharding in _with_shardings(tree))


def describe(tree: Any) -> str:
    """Returns a table of where each leaf lies.

    Args:
        tree: A sharded state or another tree of arrays or `jax.ShapeDtypeStruct` with shardings.

    Returns:
        A line for each leaf, with its path, dtype and shape, `PartitionSpec` and bytes per device, and
        a line with the sums.

    Raises:
        ArgumentTypeError: A leaf lies on no mesh.

    Example:
        >>> mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        >>> print(describe(jax.device_put({"bias": jnp.zeros(8)}, NamedSharding(mesh, PartitionSpec()))))
        path   array       spec  bytes per device
        bias   float32[8]  P()                 32
        total                            32 of 32
    """
    paths = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)]
    held = _with_shardings(tree)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf, _ in held)
    lines = [("path", "array", "spec", "bytes per device")]
    for path, (leaf, sharding) in zip(paths, held, strict=True):
        array = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        lines.append((path, array, str(sharding.spec), f"{_bytes(leaf, sharding):,}"))
    lines.append(("total", "", "", f"{bytes_per_device(tree):,} of {whole:,}"))
    path_width, array_width, spec_width, size_width = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{path:<{path_width}}  {array:<{array_width}}  {spec:<{spec_width}}  {size:>{size_width}}"
        for path, array, spec, size in lines
    )


def _plan_birth(
    model_fn: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    mesh: Mesh,
    wrt: nnx.filterlib.Filter,
    extensions: Mapping[str, ExtensionLike] | None,
    **how: Any,
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """Returns the function that makes the state from a key, and the shapes and shardings of its result."""
    check_optimizer(optimizer)
    check_rng(rng)
    if not callable(model_fn) or isinstance(model_fn, nnx.Module):
        raise ArgumentTypeError(
            f"`model_fn` is of type {type(model_fn).__name__}; it must be a callable that makes the module from random "
            f"streams, such as `lambda rngs: Model(rngs=rngs)`. A module that exists has been whole already."
        )

    def init(rng: jax.Array) -> TrainState:
        model_rng, rng = jax.random.split(rng)
        model = model_fn(nnx.Rngs(model_rng))
        check_model(model)
        return TrainState.create(model, optimizer, rng=rng, wrt=wrt, extensions=extensions)

    try:
        with _names_mean(mesh, how["logical_axes"]):
            shapes = jax.eval_shape(init, rng)
    except ValueError:
        # Flax lets JAX refuse a name that the mesh does not have, without saying whose it is.
        with nnx.use_eager_sharding(False):  # type: ignore[no-untyped-call]
            partition(jax.eval_shape(lambda rng: init(rng), rng), mesh, **how)
        raise
    shardings = partition(shapes, mesh, **how)
    return init, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


@contextmanager
def _names_mean(mesh: Mesh, logical_axes: Mapping[str, Axes] | None) -> Iterator[None]:
    """Tells Flax, which places a variable with named dimensions when it is made, what the names mean."""
    rules = {**dict(spmd.get_logical_axis_rules()), **(logical_axes or {})}
    with jax.set_mesh(mesh), spmd.logical_axis_rules(tuple(rules.items())):
        yield


def _check_rules(rules: Mapping[str, PartitionSpec] | None) -> dict[str, PartitionSpec]:
    if rules is None:
        return {}
    if not isinstance(rules, Mapping):
        raise ArgumentTypeError(
            f"`rules` is of type {type(rules).__name__}; it must map patterns to specs, "
            f"such as {{'params/.*/kernel': PartitionSpec(None, 'tensor')}}."
        )
    for pattern, spec in rules.items():
        if not isinstance(spec, PartitionSpec):
            raise ArgumentTypeError(
                f"`rules[{pattern!r}]` is {spec!r} of type {type(spec).__name__}; it must be a "
                f"jax.sharding.PartitionSpec, such as PartitionSpec(None, 'tensor')."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentError(
                f"`rules` has the pattern {pattern!r}, which is no regular expression: {error}."
            ) from None
    return dict(rules)


def _unknown_axes(rules: Mapping[str, PartitionSpec], mesh: Mesh) -> dict[str, str]:
    """Returns what to say of each rule that names an axis which the mesh does not have."""
    found = {}
    for pattern, spec in rules.items():
        absent = [axis for axes in spec for axis in _axes(axes) if axis not in mesh.axis_names]
        if absent:
            hint = did_you_mean(absent[0], mesh.axis_names).rstrip(".")
            found[pattern] = (
                f"the rule {pattern!r} splits as {spec}, and the mesh has no axis {absent[0]!r}: {hint} "
                f"(one of size 1 costs nothing)"
            )
    return found


def _named_specs(
    tree: Any, mesh: Mesh, logical_axes: Mapping[str, Axes], problems: list[str]
) -> dict[Keys, PartitionSpec]:
    """Returns the specs of the variables whose dimensions have names, by the path in the state."""
    if not isinstance(tree, TrainState):
        return {}
    leaves = {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    specs: dict[Keys, PartitionSpec] = {}
    for path, variable in nnx.to_flat_state(nnx.state(tree.model())):
        names = variable.get_metadata().get("out_sharding") if isinstance(variable, nnx.Variable) else None
        if not names:
            continue
        if isinstance(names, NamedSharding):
            names = names.spec
        local = dict(variable.get_metadata().get("sharding_rules") or ())
        meaning = {**local, **dict(spmd.get_logical_axis_rules()), **logical_axes}
        spec = PartitionSpec(*(meaning.get(name, name) if isinstance(name, str) else name for name in names))
        for where in ("params", "model_state"):
            keys = (where, *map(str, path))
            if keys in leaves:
                specs[keys] = spec
                problems.extend(
                    _misfits(
                        "/".join(keys), leaves[keys].shape, spec, mesh, f"by the names {tuple(names)} in its metadata"
                    )
                )
    return specs


def _mirrored(keys: Keys, params: set[Keys]) -> Keys | None:
    """Returns the path of the param that a leaf belongs to, if there is one."""
    if not params or keys[0] not in ("opt_state", "extensions"):
        return None
    # The longest ending is the right one: `mu/layers/kernel` follows `layers/kernel`, never a param `kernel`.
    for start in range(1, len(keys)):
        if keys[start:] in params:
            return "params", *keys[start:]
    return None


def _followed(spec: PartitionSpec, param: tuple[int, ...], shape: tuple[int, ...]) -> PartitionSpec | None:
    """Returns how a leaf is split that belongs to a param of shape ``param``, None if its shape does not tell."""
    if shape == param:
        return spec
    if shape[1:] == param:
        return PartitionSpec(None, *spec)
    axes = (*spec, *[None] * len(param))[: len(param)]
    lacking = {axes[:i] + axes[i + 1 :] for i in range(len(param)) if param[:i] + param[i + 1 :] == shape}
    return PartitionSpec(*lacking.pop()) if len(lacking) == 1 else None


def _automatic(leaf: Any, mesh: Mesh, min_size: int) -> PartitionSpec:
    if FSDP_AXIS not in mesh.axis_names or leaf.size < min_size or not jnp.issubdtype(leaf.dtype, np.number):
        return PartitionSpec()
    size = mesh.shape[FSDP_AXIS]
    divisible = [(length, dimension) for dimension, length in enumerate(leaf.shape) if length % size == 0]
    if not divisible:
        return PartitionSpec()
    chosen = max(divisible)[1]
    return PartitionSpec(*(FSDP_AXIS if dimension == chosen else None for dimension in range(leaf.ndim)))


def _uneven(dimension: int, length: int, parts: int, axes: tuple[str, ...]) -> str:
    """Says why a dimension of a batch cannot be split, and what could be."""
    near = multiples_near(length, parts)
    wanted = f"lengths are {near[0]} and {near[1]}" if len(near) > 1 else f"length is {near[0]}"
    return f"dimension {dimension} of length {length} is split in {parts} over {', '.join(axes)}; the nearest {wanted}"


def _misfits(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, why: str) -> list[str]:
    """Returns what is wrong with a spec for a shape."""
    subject = f"`{path}` of shape {shape} is split {why} as {spec}"
    if len(spec) > len(shape):
        return [f"{subject}, which has {len(spec)} dimensions; a pattern can be narrowed to other paths"]
    axes = [axis for axes in spec for axis in _axes(axes)]
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
        hint = did_you_mean(unknown[0], mesh.axis_names).rstrip(".")
        return [f"{subject}, and the mesh has no axis {unknown[0]!r}: {hint} (`logical_axes` maps names to axes)"]
    if len(set(axes)) < len(axes):
        return [f"{subject}, which uses an axis twice"]
    wrong = []
    for dimension, (length, names) in enumerate(zip(shape, spec, strict=False)):
        parts = math.prod(mesh.shape[axis] for axis in _axes(names))
        if length % parts:
            wrong.append(f"{subject}, and dimension {dimension} of length {length} cannot be split in {parts}")
    return wrong


def _idle(pattern: str, matched: int, leaves: Mapping[Keys, Any]) -> str:
    if matched:
        return f"the rule {pattern!r} decides nothing, since names in metadata or rules before it decide every match"
    paths = ["/".join(keys) for keys in leaves]
    partly = [path for path in paths if re.search(pattern, path)]
    near = partly[:3] or difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return f"the rule {pattern!r} matches no whole path; the nearest are {', '.join(near)}"


def _axes(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _keys(path: Sequence[Any]) -> Keys:
    return tuple(leaf_path([key]) for key in path)


def _with_shardings(tree: Any) -> list[tuple[Any, NamedSharding]]:
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings_of(tree)), strict=True))


def _bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize)
