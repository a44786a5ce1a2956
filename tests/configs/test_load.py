"""The configuration loader: inheritance, overrides, variants, and every error at once."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from configs.errors import ConfigError
from configs.load import digest, find_config, load_config, resolve, to_yaml, validate
from configs.registry import Config, Registry, Tagged, Variant

table: Registry[str] = Registry("part")


@table.register("length")
def length(*, min_words: Annotated[int, Field(ge=0)] = 0, max_words: int | None = None) -> str:
    """A part with defaults."""
    return f"{min_words}..{max_words}"


@table.register("threshold")
def threshold(*, t: int) -> str:
    """A part with a required key."""
    return f"t={t}"


class Optimizer(Config):
    learning_rate: float = 1.0e-3
    steps: int = 1


class Recipe(Config):
    name: str = "run"
    seed: int = 0
    parts: tuple[Annotated[Variant, Tagged(table)], ...] = ()
    chosen: Annotated[Variant, Tagged(table)] | None = None
    optimizer: Optimizer = Optimizer()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(tree: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(tree, Recipe, label="x.yaml")
    first, *rest = str(caught.value).split("\n  ")
    assert first == f"x.yaml: {len(rest)} problem{'s' if len(rest) > 1 else ''}"
    return rest


def test_a_child_overrides_its_parent_key_by_key_and_replaces_lists_whole(tmp_path):
    write(
        tmp_path,
        "parent.yaml",
        "seed: 1\noptimizer: {steps: 5}\nparts: [{name: length}, {name: length}]",
    )
    child = write(
        tmp_path,
        "child.yaml",
        "extends: parent.yaml\noptimizer: {learning_rate: 0.5}\nparts: [{name: length}]",
    )
    got = load_config(child, Recipe)
    assert (got.seed, got.optimizer.steps, got.optimizer.learning_rate, len(got.parts)) == (
        1,
        5,
        0.5,
        1,
    )


def test_a_section_whose_name_changes_starts_afresh(tmp_path):
    write(tmp_path, "parent.yaml", "chosen: {name: length, min_words: 3}")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nchosen: {name: threshold, t: 2}")
    assert resolve(child)["chosen"] == {"name": "threshold", "t": 2}
    same = write(tmp_path, "same.yaml", "extends: parent.yaml\nchosen: {max_words: 9}")
    assert resolve(same)["chosen"] == {"name": "length", "min_words": 3, "max_words": 9}
    assert resolve(tmp_path / "parent.yaml", ["chosen.name=threshold", "chosen.t=4"])["chosen"] == {
        "name": "threshold",
        "t": 4,
    }


def test_a_child_that_names_the_default_variant_keeps_its_parents_keys(tmp_path):
    write(tmp_path, "parent.yaml", "chosen: {min_words: 3}")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nchosen: {name: length}")
    assert resolve(child)["chosen"] == {"name": "length", "min_words": 3}


def test_the_name_of_a_run_is_a_label_and_drops_nothing(tmp_path):
    write(tmp_path, "parent.yaml", "name: parent\nseed: 7")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nname: child")
    assert load_config(child, Recipe).seed == 7


def test_overrides_reach_into_sections_and_lists(tmp_path):
    path = write(tmp_path, "a.yaml", "parts: [{name: length, min_words: 1}]")
    got = load_config(path, Recipe, ["parts.0.min_words=3", "optimizer.steps=4", "seed=2"])
    assert (got.parts[0].build(), got.optimizer.steps, got.seed) == ("3..None", 4, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.path=value"),
        ("parts.7.min_words=1", "'7' is not a position in a list of 1"),
        ("seed.deeper=1", "'seed' is 5, which has no keys"),
        ("seed=[1", "is not valid YAML"),
    ],
)
def test_a_bad_override_says_what_is_wrong(tmp_path, override, message):
    path = write(tmp_path, "a.yaml", "seed: 5\nparts: [{name: length}]")
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(path, Recipe, [override])


def test_every_problem_is_reported_at_once_with_its_path_and_the_nearest_key():
    got = problems(
        {
            "sed": 1,
            "optimizer": {"lerning_rate": 1, "steps": "12.8e9"},
            "parts": [
                {"name": "length", "min_word": 3},
                {"name": "lenght"},
                {"name": "threshold"},
                {"min_words": 3},
                {"name": "length", "min_words": -1},
            ],
        }
    )
    assert len(got) == 8
    text = "\n".join(got)
    for expected in (
        "sed: there is no such key, did you mean 'seed'? Known:",
        "optimizer.lerning_rate: there is no such key, did you mean 'learning_rate'?",
        "write 1.0e-3 and 12_800_000_000",
        "parts.0.min_word: there is no such key, did you mean 'min_words'?",
        "parts.1.name: got 'lenght', did you mean 'length'? Known: length, threshold",
        "parts.2.t: this key is required",
        "parts.3: this section needs a `name`",
        "parts.4.min_words: Input should be greater than or equal to 0 (got -1)",
    ):
        assert expected in text


def test_a_missing_file_says_what_was_meant_or_lists_what_is_shipped():
    with pytest.raises(ConfigError, match=r"did you mean 'demo/pretrain'\? Give") as raised:
        find_config("demo/pretrian")
    assert "Shipped" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"Shipped: .*demo/\{curate, evaluate, .*pretrain"):
        find_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "got a list"), ("extends: a.yaml", "goes in a circle")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, message):
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, Recipe)


def test_the_digest_is_that_of_the_resolved_values_not_of_the_text(tmp_path):
    short = load_config(write(tmp_path, "a.yaml", "seed: 3"), Recipe)
    long = load_config(write(tmp_path, "b.yaml", "optimizer: {steps: 1}\nseed: 3"), Recipe)
    assert digest(short) == digest(long)
    assert digest(short) != digest(load_config(tmp_path / "a.yaml", Recipe, ["seed=4"]))


def test_the_resolved_yaml_loads_to_the_same_configuration(tmp_path):
    got = validate({"parts": [{"name": "threshold", "t": 3}]}, Recipe, label="x")
    assert load_config(write(tmp_path, "again.yaml", to_yaml(got)), Recipe) == got


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no part is called 'treshold', did you mean 'threshold'"):
        table["treshold"]
