"""What there is to evaluate: shipped suites, their datasets, methods and few-shot learners."""

from __future__ import annotations

from pathlib import Path

from configs.load import SHIPPED, load_config
from evaluation.average import main_metric
from evaluation.config import EvaluateConfig
from evaluation.datasets import is_there
from evaluation.methods.catalogue import learners, methods


def list_all() -> str:
    """Return the suites that are shipped, and the methods with what they do."""
    lines = ["suites (pairmill evaluate --list SUITE root=FOLDER says which datasets are there):"]
    for path in sorted((SHIPPED / "evaluation").glob("*.yaml")):
        name = str(path.relative_to(SHIPPED).with_suffix(""))
        config = load_config(name, EvaluateConfig)
        lines.append(f"  {name:<28} {len(config.datasets):>3} datasets  {_first_comment(path)}")
    for title, registry in (("methods", methods), ("few-shot learners", learners)):
        lines.append(f"\n{title} (their keys: pairmill evaluate ... --print-config):")
        for name in registry:
            text = (registry[name].__doc__ or "").strip().split("\n")[0]
            keys = ", ".join(k for k in registry.section(name).model_fields if k != "name")
            lines.append(f"  {name:<15} {text}{f' [{keys}]' if keys else ''}")
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    text = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    return text.lstrip("# ") if text.startswith("#") else ""


def list_suite(config: EvaluateConfig) -> str:
    """Return each dataset of a suite, whether it is there, its main metric and tags."""
    lines = []
    missing = 0
    for section in config.datasets:
        place = config.place(section)
        there = is_there(place)
        missing += not there
        tags = f"  {', '.join(section.tags)}" if section.tags else ""
        lines.append(
            f"{'ok    ' if there else 'absent'}  {section.label:<46} {main_metric(section):<32} "
            f"{place}{tags}"
        )
    lines.append(f"{len(config.datasets) - missing} of {len(config.datasets)} datasets are there")
    return "\n".join(lines)
