"""The reference's pickle layout: written for NumPy alone, read without running what is in it."""

import copyreg
import inspect
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, Linear
from tests.test_state import Containers, Odd, Tied
from trainer import CheckpointError, TrainState
from trainer.checkpoints.reference_pickle import layout, machine, read_pickle, write_pickle
from trainer.core.tree_paths import leaf_path

EXTENSIONS = {"size": Counting(), "plain": Linear(2)}
EXTENSIONS["plain"].weight = 0.5


class Half(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


MODELS = [Linear, Busy, Tied, Containers, Odd, Half]

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10))),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "masked": optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    "partitioned": optax.partition(
        {"a": optax.adam(0.1), "b": optax.set_to_zero()},
        lambda tree: jax.tree.map(lambda leaf: "a" if leaf.ndim > 1 else "b", tree),
    ),
    "finite": optax.apply_if_finite(optax.lion(0.1), 3),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "lbfgs": optax.scale_by_lbfgs(),
}

KEYS = {
    "raw": jax.random.PRNGKey(3),
    "threefry": jax.random.key(3),
    "rbg": jax.random.key(3, impl="rbg"),
    "unsafe_rbg": jax.random.key(3, impl="unsafe_rbg"),
}


def updated(optimizer, params):
    return optimizer.update(params, optimizer.init(params), params)[1]


def create(model, optimizer=None, rng=None, extensions=EXTENSIONS):
    optimizer, rng = optimizer or optax.adamw(1e-2), jax.random.key(0) if rng is None else rng
    state = TrainState.create(model, optimizer, rng=rng, extensions=extensions)
    return state.replace(opt_state=updated(optimizer, state.params), step=jnp.int32(7))


def reference(model, optimizer=None, rng=None, extensions=EXTENSIONS):
    """Returns what the reference trainer pickles, made as it makes it."""
    return {
        "step": 7,
        "opt_state": updated(optimizer or optax.adamw(1e-2), nnx.state(model, nnx.Param)),
        "model_state": nnx.state(model),
        "rng": jax.random.key(0) if rng is None else rng,
        "extensions_state": {name: nnx.state(extension) for name, extension in extensions.items()},
    }


def own(state):
    file = io.BytesIO()
    write_pickle(file, state)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    def read(data, like):
        path = tmp_path / "bundle.pkl"
        path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
        return read_pickle(path, like)

    return read


def host(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf))
    return np.asarray(leaf), None


def assert_holds(found, state):
    wanted = {leaf_path(keys): host(leaf) for keys, leaf in jax.tree.leaves_with_path(state)}
    wanted = {path: leaf for path, leaf in wanted.items() if path not in [f"extensions/{x}/weight" for x in EXTENSIONS]}
    assert found.keys() == wanted.keys()
    for path, (array, implementation) in wanted.items():
        assert found[path][1] == implementation
        assert found[path][0].dtype == array.dtype
        np.testing.assert_array_equal(found[path][0], array, err_msg=path)


def plain(tree):
    """Returns a pickle's content for json, if it is made of what NumPy alone can load."""
    assert type(tree) in (dict, tuple, list, str, int, type(None), np.ndarray), type(tree)
    if isinstance(tree, np.ndarray):
        assert tree.flags.writeable
        return [str(tree.dtype), tree.shape, tree.tobytes().hex()]
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, tuple | list) else tree


class TestOwnLayout:
    @pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
    @pytest.mark.few(2)
    def test_every_model_comes_back(self, make, read):
        state = create(make(rngs=nnx.Rngs(0)))
        assert_holds(read(own(state), create(make(rngs=nnx.Rngs(1)))), state)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
    @pytest.mark.few(3)
    def test_every_optimizer_comes_back(self, optimizer, read):
        state = create(Linear(), optimizer)
        assert_holds(read(own(state), state), state)

    def test_an_optimizer_state_of_a_class_of_its_own_comes_back(self, read):
        @chex.dataclass
        class Moments:
            second: jax.Array
            first: jax.Array

        state = create(Linear()).replace(opt_state=(Moments(second=jnp.ones(2), first=jnp.zeros(3)), None))
        found = read(own(state), state)
        assert_holds(found, state)
        assert {"opt_state/0/first", "opt_state/0/second"} <= found.keys()

    @pytest.mark.parametrize("rng", KEYS.values(), ids=KEYS)
    def test_every_key_comes_back(self, rng, read):
        state = create(Linear(), rng=rng)
        assert_holds(read(own(state), state), state)

    @pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 1, 3)], ids=str)
    @pytest.mark.parametrize(
        "dtype", ["bool", "uint8", "int32", "float16", "complex64", "bfloat16", "float8_e4m3fn", "int4", "uint2"]
    )
    def test_every_dtype_comes_back(self, dtype, shape, read):
        model = Linear()
        model.extra = nnx.BatchStat(jnp.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype))
        state = create(model)
        assert_holds(read(own(state), state), state)

    def test_it_has_the_keys_of_the_reference_and_one_tree_for_all_variables(self):
        state = create(Busy())
        bundle = pickle.loads(own(state))
        assert list(bundle) == ["step", "opt_state", "model_state", "rng", "extensions_state"]
        assert (bundle["step"], type(bundle["step"])) == (7, int)
        assert bundle["model_state"]["norm"].keys() == {"bias", "scale", "mean", "var"}
        assert bundle["extensions_state"]["size"]["evaluations"] == 0
        (count, mu, nu), *rest = bundle["opt_state"]
        assert rest == [(), ()]
        assert count == 1
        np.testing.assert_array_equal(mu["inner"]["kernel"], state.opt_state[0].mu["inner"]["kernel"])
        np.testing.assert_array_equal(nu["inner"]["kernel"], state.opt_state[0].nu["inner"]["kernel"])

    def test_lists_of_layers_keep_their_indices(self):
        assert list(pickle.loads(own(create(Half(nnx.Rngs(0)))))["model_state"]["layers"]) == [0, 1]

    def test_what_numpy_has_no_dtype_for_is_told_in_bits(self):
        state = create(Half(nnx.Rngs(0)), rng=jax.random.key(3, impl="rbg"))
        bundle = pickle.loads(own(state))
        kernel = bundle["model_state"]["layers"][0]["kernel"]
        assert kernel["dtype"] == "bfloat16"
        assert kernel["bits"].dtype == np.uint16
        np.testing.assert_array_equal(kernel["bits"].view(ml_dtypes.bfloat16), state.params["layers"][0]["kernel"])
        assert bundle["rng"]["key_impl"] == "rbg"
        np.testing.assert_array_equal(bundle["rng"]["key_data"], jax.random.key_data(state.rng))

    def test_numpy_alone_loads_it(self, tmp_path):
        script = f"""
import json, pickle, sys
for name in ("jax", "jaxlib", "flax", "optax", "ml_dtypes", "trainer"):
    sys.modules[name] = None
import numpy as np

{inspect.getsource(plain)}

for path in sys.argv[1:]:
    with open(path, "rb") as file:
        print(json.dumps(plain(pickle.load(file))))
"""
        states = [create(make(rngs=nnx.Rngs(0)), rng=KEYS["rbg"]) for make in (Busy, Odd, Half)]
        paths = [tmp_path / f"{index}.pkl" for index in range(len(states))]
        for path, state in zip(paths, states, strict=True):
            path.write_bytes(own(state))
        command = [sys.executable, "-I", "-W", "error", "-c", script, *paths]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for line, state in zip(lines, states, strict=True):
            assert json.loads(line) == json.loads(json.dumps(plain(pickle.loads(own(state)))))

    def test_a_sharded_state_is_written_whole(self, read):
        state = create(Linear(8))
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.tree.map(lambda leaf: jax.device_put(leaf, spread if leaf.shape == (8, 1) else everywhere), state)
        assert_holds(read(own(placed), state), state)


class TestReference:
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    @pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
    def test_every_model_is_read(self, make, protocol, read):
        model = make(rngs=nnx.Rngs(0))
        data = pickle.dumps(reference(model), protocol)
        assert_holds(read(data, create(make(rngs=nnx.Rngs(1)))), create(model))

    @pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
    @pytest.mark.few(2)
    def test_every_optimizer_is_read(self, optimizer, read):
        state = create(Linear(), optimizer)
        assert_holds(read(reference(Linear(), optimizer), state), state)

    @pytest.mark.parametrize("protocol", [2, 5])
    @pytest.mark.parametrize("rng", KEYS.values(), ids=KEYS)
    def test_every_key_is_read(self, rng, protocol, read):
        state = create(Linear(), rng=rng)
        assert_holds(read(pickle.dumps(reference(Linear(), rng=rng), protocol), state), state)

    def test_the_paths_of_older_releases_are_read(self, read):
        # NumPy 1 and jax 0.8 have other modules, flax before 0.12.1 another name for a variable's value.
        data = pickle.dumps(reference(Busy()), 2)
        for new, old in [
            (b"numpy._core.", b"numpy.core."),
            (b"jax._src.random.prng", b"jax._src.prng"),
            (b"X\x0a\0\0\0_raw_value", b"X\x09\0\0\0raw_value"),
        ]:
            assert new in data
            data = data.replace(new, old)
        assert_holds(read(data, create(Busy())), create(Busy()))

    def test_the_variables_of_flax_0_10_are_read(self, read):
        def slotted(tree):
            return jax.tree.map(Slotted, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

        bundle = reference(Linear(), optax.sgd(0.1))
        bundle["model_state"] = slotted(bundle["model_state"])
        assert_holds(read(bundle, create(Linear(), optax.sgd(0.1))), create(Linear(), optax.sgd(0.1)))

    def test_sown_values_are_left_out(self, read):
        model = Linear()
        model.activations = nnx.Intermediate((jnp.ones(3),))
        assert_holds(read(reference(model), create(model)), create(model))

    def test_fortran_order_numpy_scalars_and_python_numbers(self, read):
        bundle = reference(Linear())
        matrix = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        bundle["opt_state"] = (matrix, np.float32(0.5), True, 3, 0.25, None, [np.int8(1)])
        for protocol in (2, 3, 4, 5):
            found = read(pickle.dumps(bundle, protocol), create(Linear()))
            np.testing.assert_array_equal(found["opt_state/0"][0], matrix)
            dtypes = {path: leaf.dtype.name for path, (leaf, _) in found.items() if path.startswith("opt_state")}
            assert dtypes == {
                "opt_state/0": "float64",
                "opt_state/1": "float32",
                "opt_state/2": "bool",
                "opt_state/3": "int32",
                "opt_state/4": "float32",
                "opt_state/6/0": "int8",
            }

    def test_a_step_may_be_an_array(self, read):
        for step in (np.int64(5), jnp.int32(5), np.asarray(5, np.uint8)):
            array, _ = read({**reference(Linear()), "step": step}, create(Linear()))["step"]
            assert (array.dtype, array.shape, int(array)) == (np.int32, (), 5)

    def test_what_has_no_counterpart_goes_by_its_path_in_the_file(self, read):
        found = read(reference(Busy(), optax.adam(1e-2)), create(Linear(), optax.sgd(0.1, momentum=0.9), extensions={}))
        assert {"model_state/inner/kernel", "opt_state/0/trace", "opt_state/0/1/inner/kernel"} <= found.keys()
        assert {"extensions/size/variables/evaluations", "extensions/plain/variables/layer/bias"} <= found.keys()
        assert not any(path.startswith("params") for path in found)

    def test_extensions_may_be_absent(self, read):
        bundle = reference(Linear())
        del bundle["extensions_state"]
        assert_holds(read(bundle, create(Linear(), extensions={})), create(Linear(), extensions={}))

    def test_the_arrays_lie_over_the_file(self, read):
        model = nnx.Linear(1000, 1000, rngs=nnx.Rngs(0))
        for data in (own(create(model, optax.sgd(0.1))), pickle.dumps(reference(model, optax.sgd(0.1)))):
            like = create(model, optax.sgd(0.1))
            tracemalloc.start()
            found = read(data, like)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert not found["params/kernel"][0].flags.writeable
            assert peak < len(data) + 2**20


class Slotted:
    """Pickles as a variable's state did in flax 0.10: of a class with slots, whose state is a pair."""

    def __init__(self, variable):
        fields = {"type": type(variable), "value": variable.get_raw_value(), "_var_metadata": {}}
        self.reduced = (copyreg.__newobj__, (Slotted,), (None, fields))

    def __reduce__(self):
        return self.reduced


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Built(Call):
    """Pickles as a call and a state for its result."""

    def __init__(self, function, arguments, state):
        self.reduced = (function, arguments, state)


def array_of(shape, dtype, data, version=1, fortran=False):
    return Built(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (version, shape, dtype, fortran, data))


def dtype_of(code, *state):
    return Built(np.dtype, (code, False, True), state)


def variable_with(**metadata):
    variable = nnx.Param(jnp.ones(2))
    return {**BUNDLE, "model_state": nnx.State({"weight": variable.copy(**metadata)})}


def named(module, name):
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def at_step(value):
    return {**BUNDLE, "step": value}


def program(operations):
    return b"\x80\x04" + operations + b"."


def laughs(grow, times=40):
    node = jnp.ones(())
    for _ in range(times):
        node = grow(node)
    return node


def cycle():
    loop = []
    loop.append(loop)
    return loop


BUNDLE = reference(Linear())

MARKER = "pickle-was-executed"

ATTACKS = {
    "os.system": at_step(Call(os.system, f"touch {MARKER}")),
    "eval": at_step(Call(eval, f"open({MARKER!r}, 'w')")),
    "getattr": at_step(Call(getattr, "", "join")),
    "import": at_step(Call(__import__, "antigravity")),
    "nested": at_step([{"a": (Call(os.system, f"touch {MARKER}"),)}]),
    "in the metadata of a variable": variable_with(note=Call(os.system, f"touch {MARKER}")),
    "as a hook of a variable": variable_with(on_get_value=os.system),
    "as a class": program(named("posix", "system") + b"\x8c\x04true\x85\x81"),
    "dotted below jax": program(named("jax._src.path", "os.system") + b"\x8c\x04true\x85R"),
    "dotted below numpy": program(named("numpy", "f2py.os.system") + b"\x8c\x04true\x85R"),
    "old global": b"\x80\x02cos\nsystem\n(X\x04\0\0\0truetR.",
    "another function of jax's arrays": program(
        named("jax._src.array", "_reconstruct_array") + b"(" + named("jax", "eval_shape") + b")))tR"
    ),
    "a module that is not there": program(named("trainer.absent", "f") + b")R"),
    "state of a class": program(named("flax.nnx.variablelib", "Param") + b"}\x8c\x01aK\x01sb"),
    "state of a dict": program(b"}}b"),
    "state twice": program(named("flax.nnx.variablelib", "Param") + b")\x81}b}b"),
    "state that is a list": program(named("flax.nnx.variablelib", "Param") + b")\x81]b"),
    "dtype with fields": at_step(array_of((1,), dtype_of("f4", 3, "<", None, ("a",), {"a": (1,)}, 4, 4, 0), b"0000")),
    "dtype with a subarray": at_step(array_of((1,), dtype_of("f4", 3, "<", (1,), None, None, 4, 4, 0), b"0000")),
    "dtype with metadata": at_step(array_of((1,), dtype_of("f4", 4, "<", None, None, None, -1, -1, 0, {}), b"0000")),
    "dtype of objects": at_step(np.array([None, "a"], object)),
    "pointers as objects": at_step(array_of((1,), dtype_of("O8", 3, "|", None, None, None, -1, -1, 63), b"A" * 8)),
    "dtype V8": at_step(np.zeros(2, "V8")),
    "dtype f4,f4": at_step(np.zeros(2, "f4,f4")),
    "dtype datetime64": at_step(np.zeros(2, "datetime64[s]")),
    "big-endian": at_step(np.arange(3, dtype=">i4")),
    "a huge shape": at_step(array_of((2**47, 2**47), np.dtype("f4"), b"0000")),
    "a shape that overflows": at_step(array_of((2**32, 2**32), np.dtype("f4"), b"")),
    "a negative shape": at_step(array_of((-1, -4), np.dtype("f4"), b"0" * 16)),
    "a shape of 65 dimensions": at_step(array_of((1,) * 65, np.dtype("f4"), b"0000")),
    "a shape of huge numbers": at_step(array_of((2**2000,) * 1000, np.dtype("f4"), b"0000")),
    "too few bytes": at_step(array_of((4,), np.dtype("f4"), b"0000")),
    "a list for bytes": at_step(array_of((1,), np.dtype("f4"), [1.0])),
    "an unknown array version": at_step(array_of((1,), np.dtype("f4"), b"0000", version=2)),
    "an array without values": at_step(Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")),
    "a subclass of arrays": at_step(np.rec.array([1, 2])),
    "memo bomb": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "long int": program(b"\x8b\xff\xff\xff\x7f"),
    "long bytes": program(b"\x8e" + struct.pack("<Q", 2**62)),
    "long bytearray": program(b"\x96" + struct.pack("<Q", 2**40)),
    "long text": program(b"\x8d" + struct.pack("<Q", 2**63)),
    "billion laughs of tuples": at_step(laughs(lambda x: (x, x))),
    "billion laughs of dicts": {**BUNDLE, "model_state": laughs(lambda x: {"a": x, "b": x})},
    "wide laughs": {**BUNDLE, "opt_state": laughs(lambda x: [x] * 5000, times=20)},
    "laughs without names": {**BUNDLE, "extensions_state": {"a": laughs(lambda x: {"": x, 0: x})}},
    "a list in itself": {**BUNDLE, "opt_state": cycle()},
    "deep tuples": program(b")" + b"\x85" * 50_000),
    "deep tuples as a key": program(b"})" + b"\x85" * 50_000 + b"Ns"),
    "deeper tuples as a key than C recurses": program(b"})" + b"\x85" * 300_000 + b"Ns"),
    "deep lists": program(b"]" * 20_000 + b"a" * 19_999),
    "deep instances": program(named("a", "b") + b"\x94" + b"h\0" * 20_000 + b")" + b"\x81\x85" * 20_000 + b"\x86"),
    "more data than the file": program(
        named("_codecs", "encode") + b"\x94X" + struct.pack("<I", 2**16) + b"a" * 2**16
        + b"\x8c\x06latin1\x86\x94" + b"h\0h\1R" * 5000
    ),
    "text of four bytes a character": program(b"X\4\0\0\1" + b"a" * 2**24 + "\U0001f600".encode()),
    "a name of numbers": program(b"K\0K\0\x93"),
    "text that is no utf-8": program(b"\x8c\x02\xff\xfe"),
    "an item of a list": program(b"]K\x00Ns"),
    "an item appended to a dict": program(b"}Na"),
    "a float as a key": program(b"}G" + b"\0" * 8 + b"Ns"),
    "a nan as a key": program(b"}G\x7f\xf8" + b"\0" * 6 + b"Ns"),
    "a long key": {"a" * 300: 1},
    "a key without a value": program(b"}(Nu"),
    "nothing on the stack": program(b""),
    "two values on the stack": program(b"NN"),
    "a tuple of nothing": program(b"N\x87"),
    "a mark too many": program(b"t"),
    "a reference to nothing": program(b"h\x05"),
    "trailing bytes": pickle.dumps(BUNDLE) + b"x",
    "two pickles": pickle.dumps(BUNDLE) * 2,
    "protocol 0": pickle.dumps({"step": 1}, 0),
    "protocol 6": b"\x80\x06}.",
    "nothing": b"",
}  # fmt: skip


@pytest.fixture(scope="module")
def like():
    return create(Linear())


class TestAttacks:
    @pytest.mark.parametrize("attack", ATTACKS)
    @pytest.mark.few(3)
    def test_it_is_refused_at_once_in_little_memory_and_nothing_is_run(self, attack, like, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "attack.pkl"
        data = ATTACKS[attack]
        path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
        modules = dict(sys.modules)
        tracing = sys.gettrace()
        sys.settrace(None)  # counting lines takes longer than the work
        start = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            read_pickle(path, like)
        seconds = time.process_time() - start
        sys.settrace(tracing)
        assert seconds < 5  # 0.3 on a quiet machine; an attack that works takes minutes
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            read_pickle(path, like)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * 2**20
        assert dict(sys.modules) == modules
        assert os.listdir(tmp_path) == ["attack.pkl"]
        assert f"`{path}`" in str(caught.value)
        assert str(caught.value).endswith("Nothing in it was executed.")
        assert len(str(caught.value)) < 600

    def test_what_it_says(self, like, read):
        layout = "a checkpoint is a dict of the keys step, opt_state, model_state, rng, extensions_state"
        bundle = BUNDLE
        for attack, reason in [
            (ATTACKS["os.system"], "it names `posix.system`, which has no place in a checkpoint"),
            (ATTACKS["dotted below jax"], "it calls `jax._src.path.os.system`, which makes no array"),
            (ATTACKS["old global"], "it names `os.system`, which has no place in a checkpoint"),
            (ATTACKS["big-endian"], "it has an array of the dtype int32, but big-endian or with parts"),
            (ATTACKS["dtype of objects"], "it has an array of the dtype 'O8', which no jax array has"),
            (ATTACKS["too few bytes"], "it has 4 bytes for an array of float32(4,)"),
            (ATTACKS["state of a class"], "it gives `flax.nnx.variablelib.Param` a state that has no place"),
            (ATTACKS["a float as a key"], "it sets the item a float of a dict"),
            (ATTACKS["billion laughs of dicts"], "it unfolds into a tree that is too deep or too large"),
            (ATTACKS["more data than the file"], "it unfolds into more data than it holds"),
            (ATTACKS["a name of numbers"], "it names an int in an int"),
            (ATTACKS["long bytes"], "it ends in the middle"),
            (ATTACKS["trailing bytes"], "1 bytes follow its end"),
            (ATTACKS["protocol 0"], "it is no pickle of a protocol from 2 to 5"),
            ([1], f"it holds a list, and {layout}"),
            ({}, f"it holds a dict of the keys none, and {layout}"),
            ({**bundle, "epoch": 3}, f"it holds a dict of the keys {', '.join([*bundle, 'epoch'])}, and {layout}"),
            ({**bundle, "step": -1}, "its `step` is no number of updates"),
            ({**bundle, "step": 2.0}, "its `step` is no number of updates"),
            ({**bundle, "step": None}, "its `step` is no number of updates"),
            ({**bundle, "step": {"a": 1}}, "its `step` is no number of updates"),
            ({**bundle, "rng": "seed"}, "`rng` is 'seed', where an array must be"),
            ({**bundle, "model_state": {"a": 1, "b": {0: 1, "0": 2}}}, "it has two arrays at `model_state/b/0`"),
            ({**bundle, "rng": {"key_impl": "rbg", "key_data": np.zeros(2, "u4")}}, "`rng/key_impl` is 'rbg', where"),
            ({**bundle, "rng": {"dtype": "bfloat16", "bits": np.zeros(2)}}, "`rng/dtype` is 'bfloat16', where"),
        ]:  # fmt: skip
            with pytest.raises(CheckpointError) as caught:
                read(attack, like)
            assert f"bundle.pkl` is refused: {reason}" in str(caught.value)

    @pytest.mark.parametrize("name", [
        "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEWOBJ_EX", "POP", "DUP", "POP_MARK",
        "INT", "LONG", "LONG4", "FLOAT", "STRING", "BINSTRING", "UNICODE", "GET", "PUT", "DICT", "LIST",
        "EMPTY_SET", "ADDITEMS", "FROZENSET", "NEXT_BUFFER", "READONLY_BUFFER", "PROTO",
    ])  # fmt: skip
    def test_an_operation_outside_of_the_list(self, name, like, read):
        with pytest.raises(CheckpointError, match=f"the operation {name} at byte 4 has no place in a checkpoint"):
            read(program(b"}(" + getattr(pickle, name) + b"\0" * 20), like)

    def test_more_operations_than_a_checkpoint_has(self, like, read, monkeypatch):
        monkeypatch.setattr(machine, "MAX_OPERATIONS", 1000)
        with pytest.raises(CheckpointError, match="it has more than 1,000 operations"):
            read(program(b"N" * 1001), like)

    def test_a_file_that_is_not_there_or_none(self, like, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "loop").symlink_to("loop")
        for name in ("absent", "fifo", "loop", "."):
            with pytest.raises(CheckpointError, match=r"` could not be read: there is no such file"):
                read_pickle(tmp_path / name, like)

    def test_a_key_that_could_not_be_read_back_is_not_written(self, monkeypatch):
        monkeypatch.delitem(layout.KEY_WIDTHS, "rbg")
        with pytest.raises(CheckpointError, match="a key is of the implementation 'rbg'; known: threefry2x32, unsafe_"):
            own(create(Linear(), rng=KEYS["rbg"]))


class TestDamage:
    @pytest.mark.parametrize("make", [own, pickle.dumps], ids=["own", "reference"])
    def test_every_truncation_is_refused(self, make, read):
        like = create(Linear(), optax.sgd(0.1), extensions={})
        data = make(like if make is own else reference(Linear(), optax.sgd(0.1), extensions={}))
        for length in range(len(data)):
            with pytest.raises(CheckpointError):
                read(data[:length], like)

    @pytest.mark.parametrize("source", ["own", 2, 4])
    @pytest.mark.slow
    def test_a_mutated_file_is_refused_or_read_and_nothing_else(self, source, read):
        like = create(Busy())
        data = own(like) if source == "own" else pickle.dumps(reference(Busy()), source)
        modules, random_ = dict(sys.modules), random.Random(f"{source}")
        refused = 0
        for _ in range(1000):
            mutated = bytearray(data)
            for _ in range(random_.choice([1, 1, 2, 8])):
                start = random_.randrange(len(mutated))
                end = start + random_.choice([0, 1, 1, 1, 4, 40])
                mutated[start:end] = random_.choice(
                    [random_.randbytes(end - start), random_.randbytes(1), b"", mutated[-(end - start) :]]
                )
            try:
                found = read(bytes(mutated), like)
            except CheckpointError:
                refused += 1
                continue
            for path, (array, implementation) in found.items():
                assert isinstance(path, str)
                assert isinstance(array, np.ndarray)
                assert not array.dtype.hasobject
                assert implementation in (None, "threefry2x32", "rbg", "unsafe_rbg")
        assert 300 < refused < 1000
        assert dict(sys.modules) == modules
