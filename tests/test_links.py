"""Links, pictures and anchors of every Markdown file lead somewhere; what is said of experiments/ is there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
# An archive has no history: then what lies there.
FILES = [ROOT / name for name in TRACKED] or [path for path in ROOT.rglob("*") if ".venv" not in path.parts]
PAGES = sorted(path for path in FILES if path.suffix == ".md" and path.exists())
FOLDERS = ("paper", "death", "speed", "trust")
TEXT = (".md", ".py", ".sh", ".cfg", ".toml", ".ipynb")


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dangling(page):
    """The links and pictures of a page that lead nowhere in the repository."""
    text = page.read_text()
    found = []
    for link in re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = link.partition("#")
        if not re.match(r"\w+:", path):
            target = page.parent / path if path else page
            if not target.exists() or anchor and anchor not in anchors(target.read_text()):
                found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_pictures_and_anchors_lead_somewhere(page):
    assert not dangling(page)


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, of one\n\n[a](#a-heading-of-one) [b](#b) ![c](c.png) [d](page.md) [e](page.md#e)\n"
                    "[f](https://example.org/f) <img src=\"g.png\">\n")  # fmt: skip
    assert dangling(page) == ["#b", "c.png", "page.md#e", "g.png"]


def test_the_four_folders_are_all_there_is():
    assert {path.relative_to(ROOT).parts[1] for path in FILES if path.is_relative_to(ROOT / "experiments")} == {
        *FOLDERS, "README.md", "command.py", "layers.py"}  # fmt: skip
    assert len((ROOT / "experiments/README.md").read_text().splitlines()) <= 40


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_a_page_of_200_lines_that_names_all_that_lies_in_it(folder):
    page = (ROOT / "experiments" / folder / "README.md").read_text()
    assert len(page.splitlines()) <= 200
    first_table = page.find("\n|")
    assert 0 < page.find("\n- **") < first_table  # what was found, before any table
    for path in FILES:
        if path.is_relative_to(ROOT / "experiments" / folder) and path.name != "README.md" and path.exists():
            assert re.search(rf"\b{re.escape(path.stem)}\b", page), path.name


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix in TEXT and p.exists()], ids=lambda p: p.name)
def test_scripts_and_tables_of_experiments_are_where_they_are_said_to_be(path):
    text = path.read_text()
    for folder, name in re.findall(r"-m experiments\.(\w+)\.(\w+)", text):
        assert (ROOT / "experiments" / folder / f"{name}.py").exists(), name
    for name in re.findall(r"\bexperiments/[\w/-]+\.\w+", text):
        assert (ROOT / name).exists(), name
