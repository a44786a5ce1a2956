"""Every recipe in configs/curation loads, and dry-runs once its paths are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.load import load_config
from curation.config import CurateConfig
from curation.job import dry_run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "curation").glob("*.yaml"))
WANTED = {"metaclip_400m", "metaclip_2_5b", "metaclip2_worldwide", "wfpp_cc12m", "datacomp_basic",
          "laion_like", "demo",
          "semdedup_laion", "datacomp_image_based", "clipcov_cc12m", "poison_cc3m"}  # fmt: skip


def test_the_wanted_recipes_are_there_and_in_the_table():
    assert {path.stem for path in RECIPES} >= WANTED
    table = (ROOT / "configs" / "README.md").read_text()
    assert all(f"`curation/{path.stem}`" in table for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_where_it_comes_from_loads_and_dry_runs(path, pool, tmp_path):
    header = path.read_text().split("\nname:")[0]
    assert "arXiv:" in header or path.stem == "demo"
    assert "#" in path.read_text().split("\nname:")[1]
    config = load_config(f"curation/{path.stem}", CurateConfig)
    lists = tmp_path / "lists"
    lists.mkdir()
    for language in ("en", "zh", "other"):
        (lists / f"{language}.txt").write_text("a\n")
    overrides = [f"output={tmp_path}/out", f"index_dir={tmp_path}/indexes",
                 f"sources.0.shards={pool}/train"]  # fmt: skip
    for number, rule in enumerate(config.rules):
        if hasattr(rule, "metadata"):
            metadata = lists if rule.name == "metaclip2" else pool / "metadata.txt"
            overrides.append(f"rules.{number}.metadata={metadata}")
        for key in ("centroids", "target", "labels"):
            if isinstance(getattr(rule, key, None), Path):
                np.save(tmp_path / "vectors.npy", np.eye(4))
                overrides.append(f"rules.{number}.{key}={tmp_path}/vectors.npy")
    text = dry_run(load_config(f"curation/{path.stem}", CurateConfig, overrides))
    assert "rules, in order: " + ", ".join(config.rule_labels()) in text
    assert yaml.safe_load(config.recipe())["name"] == config.name
