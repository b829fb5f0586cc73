"""Hooks of mkdocs: decisions and results are listed in the navigation without being named one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECTIONS = {"Decisions": "decisions", "Results": "results"}


def on_config(config: Any) -> Any:
    docs = Path(config["docs_dir"])
    for title, folder in SECTIONS.items():
        pages = sorted(path.relative_to(docs).as_posix() for path in (docs / folder).glob("*.md"))
        config["nav"].append({title: pages})
    return config
