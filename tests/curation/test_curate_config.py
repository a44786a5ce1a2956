from __future__ import annotations

import random
from pathlib import Path

import pytest

from configs.errors import ConfigError, UsageError
from configs.load import load_config, validate
from curation.config import CurateConfig, find_inputs
from curation.job import dry_run
from curation.sources import expand_braces, find_shards


def test_every_problem_of_a_configuration_is_reported_at_once():
    tree = {
        "name": "n",
        "outptu": "o",
        "sources": [{"name": "a/b", "shards": "x"}],
        "rules": [
            {"name": "metaclip", "metadata": "m.txt", "t": 1},
            {"name": "caption_length"},
            {"name": "metaclip", "metadata": "m.txt", "t": 1},
        ],
        "write": {"samples_per_shard": 0},
    }
    with pytest.raises(ConfigError) as error:
        validate(tree, CurateConfig, label="x.yaml")
    text = str(error.value)
    for part in (
        "outptu: there is no such key, did you mean 'output'?",
        "output: this key is required",
        "sources.0.name",
        "a balancer must be the last rule",
        "rules.0 (metaclip)",
        "write.samples_per_shard",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "caption_lenght"}, "did you mean 'caption_length'"),
        ({"name": "caption_length", "min_word": 1}, "did you mean 'min_words'"),
        ({"name": "metaclip", "metadata": "m", "t": 0}, r"rules\.0\.t"),
        ({"name": "metaclip", "t": 1}, r"rules\.0\.metadata: this key is required"),
    ],
)
def test_a_wrong_rule_is_named_with_what_was_meant(job, rule, message):
    with pytest.raises(ConfigError, match=message):
        job(rules=[rule])


def test_two_sources_of_one_name_are_refused(job):
    with pytest.raises(ConfigError, match="two sources are called 's'"):
        job(sources=[{"name": "s", "shards": "a"}, {"name": "s", "shards": "b"}])


def test_braces_expand_as_in_a_shell():
    assert list(expand_braces("a/{008..011}.tar")) == [f"a/{n:03d}.tar" for n in range(8, 12)]
    assert list(expand_braces("{a,b}{1..2}")) == ["a1", "a2", "b1", "b2"]
    assert list(expand_braces("plain")) == ["plain"]


def test_folder_glob_braces_and_lists_name_the_same_shards(pool):
    folder = pool / "train"
    files = [str(path) for path in folder.glob("*.tar")]
    random.Random(0).shuffle(files)
    forms = [
        [str(folder)],
        [f"{folder}/*.tar"],
        [f"{folder}/{{00000..00005}}.tar"],
        files,
        [f"{folder}/{{00003..00005}}.tar", f"{folder}/0000[012].tar", str(folder)],
    ]
    found = [find_shards("s", patterns) for patterns in forms]
    assert all(shards == found[0] for shards in found)
    assert [s.shard for s in found[0]] == [f"{n:05d}.tar" for n in range(6)]


@pytest.mark.parametrize(
    "pattern", ["nowhere", "nowhere/*.tar", "{folder}/{{00000..00009}}.tar", "{folder}/.."]
)
def test_a_pattern_that_matches_nothing_is_named(pool, tmp_path, pattern):
    empty = tmp_path / "empty" / "inner"
    empty.mkdir(parents=True)
    pattern = pattern.format(folder=empty if ".." in pattern[-3:] else pool / "train")
    with pytest.raises(UsageError, match="source 's'"):
        find_shards("s", [pattern])


def test_a_tar_in_two_sources_is_refused(job, pool):
    folder = str(pool / "train")
    config = job(sources=[{"name": "a", "shards": folder}, {"name": "b", "shards": folder}])
    with pytest.raises(UsageError, match="belongs to two sources"):
        find_inputs(config)


def test_the_recipe_leaves_out_where_and_how_a_job_runs(job, pool):
    files = [str(path) for path in sorted((pool / "train").glob("*.tar"))]
    digests = {
        job(**changes).digest()
        for changes in (
            {"sources": [{"name": "pool", "shards": files}]},
            {"sources": [{"name": "pool", "shards": files[::-1]}], "output": "elsewhere"},
            {"sources": [{"name": "pool", "shards": files}], "engine": {"num_workers": 1}},
            {"sources": [{"name": "pool", "shards": files}], "stages": ["scan"]},
        )
    }
    assert len(digests) == 1
    assert job().digest() != job(seed=8).digest()


def test_a_dry_run_says_what_would_be_read_and_finds_what_is_missing(job, pool, tmp_path):
    text = dry_run(job())
    assert "6 shards" in text
    assert "15 entries" in text
    with pytest.raises(UsageError, match="metadata"):
        dry_run(job(rules=[{"name": "metaclip", "metadata": str(tmp_path / "no.txt"), "t": 1}]))
    with pytest.raises(UsageError, match="source 's'"):
        dry_run(job(sources=[{"name": "s", "shards": "nowhere"}]))
    with pytest.raises(UsageError, match="lies inside"):
        dry_run(job(output=str(pool / "train" / "out")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty"):
        dry_run(job(output=str(tmp_path / "full")))
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_demo_configuration_loads():
    config = load_config("demo/curate", CurateConfig)
    assert config.output == str(Path("runs/demo/dataset"))
    assert config.rule_labels() == ["caption_length", "image_size", "metaclip"]


def test_folders_and_globs_pass_over_what_is_no_tar_and_a_named_one_is_refused(tmp_path, tars):
    tars.write(tmp_path / "a.tar", tars.sample("a", "one"))
    for name in ("a_stats.json", "a.index.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    for pattern in (f"{tmp_path}/*", str(tmp_path), f"{tmp_path}/{{a}}*"):
        assert [shard.shard for shard in find_shards("s", [pattern])] == ["a.tar"]
    with pytest.raises(UsageError, match=r"a_stats\.json is no shard"):
        find_shards("s", [str(tmp_path / "a_stats.json")])
    with pytest.raises(UsageError, match="nothing matches"):
        find_shards("s", [f"{tmp_path}/*.json"])


@pytest.mark.parametrize("folder", ["dataset", "dataset.work"])
@pytest.mark.parametrize("pattern", ["{}/**/*.tar", "{}/in/**/*.tar"])
def test_a_job_never_reads_what_it_writes(job, tars, tmp_path, folder, pattern):
    tars.write(tmp_path / "in" / "a.tar", tars.sample("a", "one"))
    config = job(sources=[{"name": "s", "shards": pattern.format(tmp_path)}])
    assert len(find_inputs(config)) == 1
    tars.write(tmp_path / folder / "00000.tar", tars.sample("a", "one"))
    (tmp_path / "in" / "link").symlink_to(tmp_path / folder)
    with pytest.raises(UsageError, match="would read what it writes"):
        find_inputs(config)


def test_an_output_that_cannot_be_made_is_found_before_the_work(job, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/pairmill/out")):
        with pytest.raises(UsageError, match=f"{output} cannot be made"):
            dry_run(job(output=str(output)))
    dry_run(job(output=str(tmp_path / "not" / "yet" / "there")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
