"""What trains: path patterns beside the filters of nnx, one language with the rules of a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, config, regression, squared_error
from tests.test_api import assert_same_bits, on_host
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Trainer,
    TrainState,
    by_path,
    create_sharded,
    make_mesh,
    make_train_step,
    partition,
)
from trainer.core.path_patterns import matches

ALL = {"inner/bias", "inner/kernel", "norm/bias", "norm/scale", "outer/bias", "outer/kernel"}


def paths_of(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("*", ["kernel", "a/kernel", "a/0/b"], []),
        ("**", ["kernel", "a/kernel"], []),
        ("*bias", ["bias", "a/bias", "a/b/out_bias"], ["a/bias/b", "a/kernel"]),
        ("a/*", ["a/kernel"], ["a", "a/b/kernel", "b/a/kernel"]),
        ("a/**", ["a/kernel", "a/b/kernel"], ["a", "b/a/kernel", "ab/kernel"]),
        ("a/*/kernel", ["a/0/kernel"], ["a/kernel", "a/0/1/kernel", "a/0/bias"]),
        ("a/**/kernel", ["a/kernel", "a/0/kernel", "a/0/1/kernel"], ["b/kernel"]),
        ("**/kernel", ["kernel", "a/b/kernel"], ["a/my_kernel"]),
        ("a/[0-2]/*", ["a/0/x", "a/2/x"], ["a/3/x", "a/10/x"]),
        ("a/layer*/x", ["a/layer/x", "a/layer12/x"], ["a/my_layer/x", "a/layer/1/x"]),
        ("a/b", ["a/b"], ["a/b/c", "c/a/b"]),
        ("a", ["a"], ["b/a", "a/b"]),
        ("a/.*/kernel", ["a/0/kernel", "a/0/1/kernel"], ["a/kernel"]),
        ("a/(query|value)/.*", ["a/query/kernel", "a/value/x/y"], ["a/key/kernel"]),
        (r"a/\d+/x", ["a/12/x"], ["a/b/x"]),
    ],
)
def test_what_a_pattern_matches(pattern, matched, others):
    assert [path for path in [*matched, *others] if matches(pattern, path)] == matched


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("wrt", "trained"),
    [
        ("*", ALL),
        ("inner/*", {"inner/bias", "inner/kernel"}),
        ("*/kernel", {"inner/kernel", "outer/kernel"}),
        (by_path("inner/kernel"), {"inner/kernel"}),
        (by_path("inner/**", "outer/bias"), {"inner/bias", "inner/kernel", "outer/bias"}),
        (["inner/**", "*/bias"], {"inner/bias", "inner/kernel", "norm/bias", "outer/bias"}),
        (("inner/*", nnx.filterlib.PathContains("norm")), None),  # batch statistics too, which no pattern selects
        (nnx.All(nnx.Param, nnx.Not("norm/*")), ALL - {"norm/bias", "norm/scale"}),
        (nnx.All("norm/*", nnx.filterlib.PathContains("scale")), {"norm/scale"}),
        (by_path("norm/**"), {"norm/bias", "norm/scale"}),
        (by_path("norm/**", of=(nnx.Param, nnx.BatchStat)), {"norm/bias", "norm/scale", "norm/mean", "norm/var"}),
        (nnx.Param, ALL),
    ],
)
@pytest.mark.few(3)
def test_what_is_trained(wrt, trained):
    state = TrainState.create(Busy(), optax.sgd(0.1), rng=jax.random.key(0), wrt=wrt)
    if trained is None:
        trained = {"inner/bias", "inner/kernel", "norm/bias", "norm/scale", "norm/mean", "norm/var"}
    assert paths_of(state.params) == trained
    after, _ = jax.jit(make_train_step(squared_error, optax.sgd(0.1), wrt=wrt))(state, regression(8))
    for path in ALL - trained:
        layer, name = path.split("/")
        np.testing.assert_array_equal(after.model_state[layer][name], state.model_state[layer][name])
    assert np.any(jax.tree.leaves(after.params)[0] != jax.tree.leaves(state.params)[0])


def test_a_tag_of_nnx_stays_a_tag():
    class Tagged(nnx.Param):
        tag = "head"

    model = Busy()
    model.outer.kernel = Tagged(model.outer.kernel[...])
    assert paths_of(TrainState.create(model, optax.sgd(0.1), rng=jax.random.key(0), wrt="head").params) == {
        "outer/kernel"
    }


def test_nnx_takes_the_filter_anywhere():
    state = nnx.state(Busy(), by_path("*/kernel"))
    assert paths_of(nnx.to_pure_dict(state)) == {"inner/kernel", "outer/kernel"}
    assert repr(by_path("a/*", "b", of=nnx.BatchStat)).startswith("by_path('a/*', 'b', of=<class")
    assert by_path("a/*") == by_path("a/*")
    assert hash(by_path("a/*")) != hash(by_path("b/*"))


def create(wrt):
    return TrainState.create(Busy(), optax.sgd(0.1), rng=jax.random.key(0), wrt=wrt)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: create("inner/kernl*"),
            ArgumentError,
            "`wrt` selects nothing where it should: the pattern 'inner/kernl*' for variables of Param matches no whole "
            "path; the nearest are inner/kernel",
        ),
        (lambda: create(["inner/**", "nothing/**"]), ArgumentError, "the pattern 'nothing/**' for variables of Param"),
        (lambda: create(nnx.All(nnx.Param, nnx.Not("nrm/*"))), ArgumentError, "the nearest are norm/"),
        (
            lambda: create("norm/mean*"),
            ArgumentError,
            "the pattern 'norm/mean*' for variables of Param matches no whole path",
        ),
        (
            lambda: create("inner"),
            ArgumentError,
            "`wrt` is the string 'inner', a tag of nnx that no variable has. A pattern of paths has a `*` or a slash, "
            "as in 'inner/**', or is trainer.by_path('inner').",
        ),
        (lambda: create("(/*"), ArgumentError, "`wrt` has the pattern '(/*', which is no regular expression"),
        (lambda: by_path(), ArgumentError, "`patterns` is empty; pass one or more, such as by_path('encoder/**')."),
        (lambda: by_path(3), ArgumentTypeError, "`patterns` has the pattern 3 of type int; it must be a string"),
        (
            lambda: make_train_step(squared_error, optax.sgd(0.1), wrt="outer/*")(create("inner/*"), regression(8)),
            ArgumentError,
            "`wrt` = 'outer/*' selects other variables than the filter that the state was created with",
        ),
    ],
)
def test_what_selects_nothing_is_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make()


class TestTrainer:
    def build(self, directory, **options):
        return Trainer(
            Busy(), config(), loss_fn=squared_error, workdir=directory, wrt=["inner/**", "*/bias"], **options
        )

    @pytest.mark.slow
    def test_killed_and_resumed_it_is_the_same_to_the_bit(self, tmp_path):
        whole = self.build(tmp_path / "whole")
        whole.train(regression(40), 2, 8)
        with pytest.raises(StoppedError):
            self.build(tmp_path / "cut", callbacks=[Watching(7)], save_interval=2).train(regression(40), 2, 8)
        resumed = self.build(tmp_path / "cut", callbacks=[Watching()], save_interval=2)
        resumed.train(regression(40), 2, 8, resume=True)
        assert_same_bits(resumed.state, whole.state)
        np.testing.assert_array_equal(whole.state.model_state["outer"]["kernel"], Busy().outer.kernel[...])

    def test_it_is_refused_at_once(self, tmp_path):
        with pytest.raises(ArgumentError, match=re.escape("the pattern 'iner/**' for variables of Param")):
            Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path, wrt="iner/**")

    @pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
    @pytest.mark.few(1)
    def test_on_a_mesh_the_numbers_are_those_of_one_device(self, axes, tmp_path):
        trained = []  # with SGD: before a BatchNorm a bias has no gradient but rounding, which Adam would scale up
        for name, options in {"eight": {"mesh": make_mesh(axes)}, "one": {}}.items():
            trainer = self.build(tmp_path / name, optimizer=optax.sgd(0.1), **options)
            trainer.train(regression(40), 2, 8)
            assert paths_of(trainer.state.params) == {"inner/bias", "inner/kernel", "norm/bias", "outer/bias"}
            trained.append(on_host((trainer.state.params, trainer.state.model_state)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *trained)

    def test_on_a_mesh_only_the_trained_params_have_moments(self):
        state = create_sharded(
            lambda rngs: Busy(width=16, rngs=rngs),
            optax.adam(0.1),
            rng=jax.random.key(0),
            mesh=make_mesh({"data": 2, "fsdp": 4}),
            rules={"**/kernel": P(None, None), "params/**": P("fsdp")},
            wrt="inner/**",
        )
        assert paths_of(state.opt_state[0].mu) == paths_of(state.params) == {"inner/bias", "inner/kernel"}
        state, metrics = jax.jit(make_train_step(squared_error, optax.adam(0.1), wrt="inner/**"))(state, regression(8))
        assert np.isfinite(float(metrics["loss"]))


def test_the_rules_of_a_mesh_take_the_same_patterns():
    tree = {"layers": [{"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)} for _ in range(3)]}
    mesh = make_mesh({"data": 2, "tensor": 4})
    found = partition(tree, mesh, {"layers/[01]/kernel*": P("tensor"), "*kernel": P(None, "tensor"), "**": P()})
    assert [tuple(layer["kernel"].spec) for layer in found["layers"]] == [("tensor",), ("tensor",), (None, "tensor")]
    with pytest.raises(ArgumentError, match=re.escape("the rule 'layer/*/kernel' matches no whole path; the nearest")):
        partition(tree, mesh, {"layer/*/kernel": P()})


def test_a_set_of_patterns_is_a_list_of_them():
    selected = [
        Trainer(Busy(), config(), loss_fn=squared_error, wrt=kind(("outer/**", "inner/**"))) for kind in (set, list)
    ]
    assert jax.tree.structure(selected[0].state.params) == jax.tree.structure(selected[1].state.params)
