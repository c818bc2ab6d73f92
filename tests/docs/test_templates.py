"""Frozen here: issue forms are as GitHub reads them, and links of the templates lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

GITHUB = Path(__file__).parents[2] / ".github"
FORMS = ("bug", "feature", "question")
NEEDED = {"textarea": {"label"}, "checkboxes": {"label", "options"}}
RENDERED = {"shell", "text", "yaml", "json"}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_complete(name):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    for part in form["body"]:
        assert NEEDED[part["type"]] <= part["attributes"].keys()
        assert part["attributes"].get("render", "text") in RENDERED
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_every_form_is_listed_here():
    files = {path.stem for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()}
    assert files == {*FORMS, "config"}


def test_links_of_the_pull_request_template_exist():
    text = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert (GITHUB / link).resolve().is_file(), link
