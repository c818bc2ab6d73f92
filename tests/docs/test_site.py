"""The site builds, and what its tables list is what there is.

* ``mkdocs build --strict`` succeeds: no broken link, anchor, snippet or reference.
* Nothing is loaded from elsewhere, no docstring shows markup of another kind, and every page of
  ``docs/`` is in the navigation.
* The reference has every public name of the packages that people extend; the command line's page
  every command and packaged config, the metrics' page every metric.
"""

from __future__ import annotations

import ast
import html
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import ROOT

from okd_lightning.__main__ import COMMANDS
from okd_lightning.commands.cli_arguments import packaged_configs
from okd_lightning.metrics import measure_metrics

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None
    or importlib.util.find_spec("mkdocstrings_handlers") is None,
    reason="mkdocs-material and mkdocstrings are not installed: pip install -e '.[docs]'",
)
REFERENCE = [  # page, and a package whose public names it holds
    ("methods", "okd_lightning.callbacks"),
    ("divergences", "okd_lightning.divergences"),
    ("advantages", "okd_lightning.advantages"),
    ("advantages", "okd_lightning.rewards"),
    ("losses", "okd_lightning.losses"),
    ("rollouts", "okd_lightning.rollouts"),
    ("rollouts", "okd_lightning.engines"),
    ("data", "okd_lightning.data"),
    ("tools", "okd_lightning.tools"),
    ("errors", "okd_lightning.errors"),
]
INNER = {  # public for the library's own floors; people neither call nor write them
    "okd_lightning.advantages": {"Variant"},
    "okd_lightning.data": {"DataSource", "OnOverlong", "describe_source"},
    "okd_lightning.losses": {
        *("CachedAgreement", "CachedDivergence", "CachedDrawnOutcome", "CachedExpectedWeight"),
        *("cached_form", "fused_loss", "Head", "measure"),
        *("ChunkValues", "chunked_loss", "measure_chunks", "token_values"),
        *("Mixing", "Mixture", "Product", "mixed_side", "routed_side"),
        *("ChunkValues", "chunked_loss", "measure_chunks", "token_values"),
        *("ModelRole", "pack_outcomes", "PackedHead", "Side", "weighted_loss", "WeightedLoss"),
        "WeightedTerm",
    },
    "okd_lightning.engines": {"Blend", "MixedDraws", "hashed_uniform"},
    "okd_lightning.rewards": {"GroupBaseline", "checked_rewards"},
    "okd_lightning.rollouts": {
        *("KeptResponses", "LoaderShape", "plan_for", "RolloutPlan", "StagedPlan", "engine_of"),
        *("NoiseStream", "Sampling", "TransformersEngine"),  # on the page as names of engines
    },
    "okd_lightning.tools": {"FunctionTool", "ToolResult"},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def body(page: Path) -> str:
    """Return the visible text of a page."""
    article = re.search(r"<article.*?</article>", page.read_text(), re.DOTALL)
    assert article, page
    without_code = re.sub(r"<(pre|code).*?</\1>", "", article[0], flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", without_code))


@needs_mkdocs
def test_every_page_is_there_and_leads_nowhere_else(site):
    for source in (ROOT / "docs").rglob("*.md"):
        page = site / source.relative_to(ROOT / "docs").with_suffix(".html")
        loaded = re.findall(r"(?:src|href)=\"(https?:[^\"]+)\"", page.read_text())
        assert not [url for url in loaded if "squidfunk" not in url], page
        assert not re.findall(r"(?:<script|<link|<img)[^>]+https?:", page.read_text()), page


@needs_mkdocs
def test_docstrings_show_no_markup(site):
    for page in sorted((site / "api").glob("*.html")):
        text = body(page)
        for sign in ("::\n", "``", "====", ":class:", ":func:"):
            assert sign not in text, f"{page.name}: {sign!r}"


def test_docstrings_lose_no_words():
    for path in (ROOT / "okd_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                text = re.sub(r"``.*?``", "", ast.get_docstring(node) or "")
                assert not re.search(r"<[a-z]\w*>", text), f"{path}: a page takes <word> for a tag"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r"^ +- [^#\n]*: (\S+\.md)$", navigation, re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize(("page", "package"), REFERENCE)
def test_reference_is_complete(page, package):
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if isinstance(value, type)
    ]
    pages = [page, "measures", "monitors"] if page == "methods" else [page]
    texts = [(ROOT / "docs" / "api" / f"{name}.md").read_text() for name in pages]
    shown = set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", "\n".join(texts), re.MULTILINE))
    assert shown == set(names) - INNER.get(package, set())


def test_command_line_page_is_complete():
    text = (ROOT / "docs" / "api" / "cli.md").read_text()
    table = text.split("| command |")[1].split("\n\n")[0]
    commands = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    assert set(re.findall(r"`([a-z]+)`", " ".join(commands))) == set(COMMANDS)
    listed = text.split("Packaged configs:")[1]
    assert set(re.findall(r"`([\w/]+)`", listed)) == set(packaged_configs())


def test_metrics_page_knows_every_metric():
    text = (ROOT / "docs" / "concepts" / "metrics.md").read_text()
    listed = re.findall(r"`(\w+/[\w<>*]+)`", text)
    patterns = [re.escape(name).replace(r"\*", r"\w+") for name in listed]
    written = "\n".join(path.read_text() for path in (ROOT / "okd_lightning").rglob("*.py"))
    names = set(re.findall(r"\"((?:train|rollout)/\w+)\"", written))
    names |= {name for name in measure_metrics() if name.startswith("val/")}
    missing = [name for name in names if not any(re.fullmatch(p, name) for p in patterns)]
    assert not missing
