"""The documentation names commands, files and recipe keys that exist."""

import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from offline.formats import LayerSites, Site
from offline.recipe import KVCache, Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "infoquant_vllm|offline|tests|benchmarks|docs|packaging|requirements"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_command_and_path_on_a_page_exists(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(r"python -m ((?:benchmarks|offline)[\w.]*)", text))
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []
    paths = set(re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)", text))
    placeholders = {path for path in paths if re.search(r"/[A-Z]+(/|$)", path) and not path.endswith(".md")}
    named = sorted(paths - placeholders)
    assert [path for path in named if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))] == []


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("model", [Recipe, Site, LayerSites, KVCache], ids=lambda model: model.__name__)
def test_every_key_of_a_recipe_is_explained(model: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in model.model_fields if f"`{name}`" not in page] == []
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                assert [name for name in part.model_fields if f"`{name}`" not in page] == []
