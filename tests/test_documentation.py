"""The documentation holds together: links lead somewhere, both READMEs say the same, and every verb is in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def links(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http:", "https:", "#"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    missing = [
        link for link in links(page.read_text(encoding="utf-8")) if not (page.parent / link.split("#")[0]).exists()
    ]
    assert missing == []


def test_every_page_is_reached_from_the_index():
    reached = {
        (ROOT / "docs" / link).resolve() for link in links((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    }
    pages = {page for page in ROOT.glob("docs/*.md") if page.name != "index.md"}
    assert pages <= reached


def test_both_readmes_say_the_same():
    """The same headings, commands, rows, pictures and links, in the same order."""
    assert re.findall(r"(?m)^#+", README) == re.findall(r"(?m)^#+", CHINESE)
    assert re.findall(r"```.*?```", README, re.DOTALL) == re.findall(r"```.*?```", CHINESE, re.DOTALL)
    assert len(re.findall(r"(?m)^\|", README)) == len(re.findall(r"(?m)^\|", CHINESE))
    assert len(re.findall(r"(?m)^- ", README)) == len(re.findall(r"(?m)^- ", CHINESE))
    assert links(README)[1:] == links(CHINESE)[1:]
    assert (links(README)[0], links(CHINESE)[0]) == ("README.zh-CN.md", "README.md")


def test_every_verb_of_the_command_line_is_in_the_readme():
    from liaoyuan.cli.main import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {group.name for group in app.registered_groups}
    table = re.findall(r"(?m)^\| (`.*?) \|", README)
    named = {word for row in table for word in re.findall(r"`(\w+)", row)}
    assert verbs == named


def test_the_documentation_names_no_place_of_one_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.~])/(root|home|work|opt)/", text), page
