"""Recipes: every shipped one loads, every mistake is one RecipeError that says where."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq import recipe
from qoq.errors import RecipeError
from qoq.recipe import Calibration, KVCache, Recipe, Weights


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_is_what_its_name_says(name):
    loaded = recipe.load(name)
    assert loaded.name == name
    suffix = "channel" if loaded.group_size == -1 else f"g{loaded.group_size}"
    if name.startswith(("qoq-", "rtn-")):
        assert name.removesuffix("-int4").endswith(suffix)
        assert loaded.weights.whole_zeros == name.endswith("-int4")
    if name.startswith("rtn-"):
        assert loaded == Recipe(name, loaded.group_size, calibration=loaded.calibration)  # everything else is off
    assert recipe.parse(recipe.dump(loaded)) == loaded


def test_the_default_and_the_baselines_ship():
    ours = {"qoq-g128", "qoq-g128-int4", "qoq-g64", "qoq-channel"}
    assert ours | {"rtn-g128", "rtn-g64", "rtn-channel"} <= set(recipe.names())


SWITCHES = [field.name for field in dataclasses.fields(Recipe) if field.type is bool]
LAYERS = st.sets(st.integers(0, 100)).map(lambda layers: tuple(sorted(layers)))
RATIOS = st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5).map(tuple)


@given(
    st.builds(
        Recipe,
        name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])),
        group_size=st.sampled_from([128, 64, -1]),
        kv_cache=st.builds(
            KVCache, rotate=st.booleans(), offset=st.booleans(), clip_ratios=RATIOS, layers_in_8_bits=LAYERS
        ),
        weights=st.builds(Weights, grid=st.sampled_from(["round", "search"]), gptq=st.booleans()),
        calibration=st.builds(Calibration, dataset=st.just("c4"), nsamples=st.integers(1), seqlen=st.integers(2)),
        seed=st.integers(0, 2**63 - 1),
        **{name: st.booleans() for name in SWITCHES},
    )
)
def test_dump_and_parse_are_inverse(settings):
    assert recipe.parse(recipe.dump(settings)) == settings


def test_a_file_is_read(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\ngroup_size: 64\nkv_cache: {clip_ratios: [1, 0.9]}\ncalibration: {seqlen: 64}\n")
    loaded = recipe.load(str(path))
    assert (loaded.name, loaded.group_size, loaded.calibration.seqlen) == ("own", 64, 64)
    assert loaded.kv_cache.clip_ratios == (1.0, 0.9) and isinstance(loaded.kv_cache.clip_ratios[0], float)


def test_what_is_not_given_has_its_default():
    assert recipe.parse("name: x") == Recipe("x")


NAMELESS = ("group_size: 64", "", "- 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gruop_size: 64", "here: unknown key gruop_size; known are .*group_size"),
        ("calibration: {samples: 1}", "here: unknown key calibration.samples; known are .*nsamples"),
        ("1: 2", "here: unknown key 1"),
        ("group_size: '64'", "here: group_size: '64', expected of type int"),
        ("group_size: true", "here: group_size: True, expected of type int"),
        ("group_size: null", "here: group_size: None, expected of type int"),
        ("rotate: 1", "here: rotate: 1, expected of type bool"),
        ("kv_cache: {clip_ratios: [strong]}", r"here: kv_cache.clip_ratios\[0\]: 'strong', expected of type float"),
        ("kv_cache: {clip_ratios: [1, true]}", r"here: kv_cache.clip_ratios\[1\]: True, expected of type float"),
        ("kv_cache: {clip_ratios: 1}", "here: kv_cache.clip_ratios: 1, expected a list"),
        ("kv_cache: 0.5", "here: kv_cache: 0.5, expected a mapping"),
        ("calibration: [c4]", r"here: calibration: \['c4'\], expected a mapping"),
        ("group_size: 32", r"here: group_size: 32, expected 128, 64 or -1"),
        ("kv_cache: {clip_ratios: []}", r"here: kv_cache.clip_ratios: \[\], expected"),
        ("kv_cache: {clip_ratios: [1, 0]}", "here: kv_cache.clip_ratios: .*, expected numbers above 0 and up to 1"),
        ("kv_cache: {clip_ratios: [1.1]}", "here: kv_cache.clip_ratios: .*, expected numbers above 0 and up to 1"),
        ("kv_cache: {clip_ratios: [.nan]}", "here: kv_cache.clip_ratios: .*nan"),
        ("kv_cache: {layers_in_8_bits: 3}", "here: kv_cache.layers_in_8_bits: 3, expected a list"),
        ("kv_cache: {layers_in_8_bits: [a]}", r"here: kv_cache.layers_in_8_bits\[0\]: 'a', expected of type int"),
        ("kv_cache: {layers_in_8_bits: [-1]}", r"here: kv_cache.layers_in_8_bits: \[-1\], expected numbers of layers"),
        ("kv_cache: {layers_in_8_bits: [3, 1]}", r"here: kv_cache.layers_in_8_bits: \[3, 1\], expected .*ascending"),
        ("kv_cache: {layers_in_8_bits: [1, 1]}", r"here: kv_cache.layers_in_8_bits: \[1, 1\], expected .*each once"),
        ("group_size: -1\nweights: {whole_zeros: true}", "here: weights.whole_zeros: True, expected false where"),
        ("weights: {grid: seek}", "here: weights.grid: 'seek', expected 'round' or 'search'"),
        ("calibration: {nsamples: 0}", "here: calibration.nsamples: 0, expected at least 1"),
        ("calibration: {seqlen: 1}", "here: calibration.seqlen: 1, expected at least 2"),
        ("group_size: 64", "here: key name is missing"),
        ("a: [", "here: not valid YAML"),
        ("", "here: recipe: None, expected a mapping"),
        ("- 1", r"here: recipe: \[1\], expected a mapping"),
        ("!!python/object/apply:os.getcwd []", "here: not valid YAML"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.parse(text if text in NAMELESS else f"name: x\n{text}", "here")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(RecipeError, match="'qoq-g12': no such recipe; there are .*qoq-g128"):
        recipe.load("qoq-g12")
    with pytest.raises(RecipeError, match="no such recipe file"):
        recipe.load(str(tmp_path / "absent.yaml"))


@given(st.text() | st.sampled_from("{}[]:-&*!|>%@`'\"\\\0\n\t").flatmap(lambda c: st.text(alphabet=c + ":a 1\n")))
def test_arbitrary_text_raises_nothing_but_recipe_errors(text):
    try:
        recipe.parse(text)
    except RecipeError as error:
        assert str(error).startswith("recipe: ")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Recipe)]) | st.text(), VALUES))
def test_arbitrary_values_raise_nothing_but_recipe_errors(data):
    import yaml

    try:
        assert isinstance(recipe.parse(yaml.safe_dump(data)), Recipe)
    except RecipeError:
        pass


def test_arbitrary_bytes_raise_nothing_but_recipe_errors(tmp_path):
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="bytes.yaml"):
        recipe.load(str(path))


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe("x").seed = 1  # type: ignore[misc]
