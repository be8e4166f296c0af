"""The pages: a page a method, the README short and its links good, the headers of configs complete."""

from __future__ import annotations

import importlib
import re
import types
from pathlib import Path

import pytest
import yaml

from mmalign.cli import main
from mmalign.core.registry import false_captions, methods, open_attributes, question_sets
from rewards.registry import ENTRY_POINT_GROUP

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
KEYS = ["Run", "Needs", "Cost", "Result", "Differs from the paper"]
READMES = [ROOT / "rewards" / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "assets").rglob("README.md")]
GROUPS = {methods.group, question_sets.group, false_captions.group, open_attributes.group, ENTRY_POINT_GROUP}
"""Groups of entry points, which look like modules."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *READMES])


def header(text: str) -> dict[str, list[str]]:
    """Return the lines of each key in the comment that a config begins with."""
    found: dict[str, list[str]] = {}
    for line in re.match(r"(#.*\n)*", text)[0].splitlines():  # type: ignore[index]
        if line.startswith("#   "):
            found[list(found)[-1]].append(line[4:])
        else:
            key, colon, value = line.removeprefix("# ").partition(": ")
            assert colon and value and key not in found, line
            found[key] = [value]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_every_config_has_a_complete_header(path: Path) -> None:
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    found = header(path.read_text(encoding="utf-8"))
    assert list(found) == KEYS
    verb = "compare" if name.startswith("compare/") else "train-reward" if path.stem == "latent_reward" else "train"
    assert found["Run"][0].split()[:3] == ["mmalign", verb, name] and len(found["Run"]) == 1
    for page in re.findall(r"docs/[\w/-]+\.md", " ".join(sum(found.values(), []))):
        assert (ROOT / page).is_file(), page
    for word in re.findall(r"mmalign (?:train|train-reward|compare) ([\w/]+)", " ".join(sum(found.values(), []))):
        assert (ROOT / "configs" / f"{word}.yaml").is_file(), word


def test_list_configs_prints_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["config", "run", "needs", "cost"]
    [line] = [line for line in lines if line.startswith("shapes/draft ")]
    assert re.split(r"\s{2,}", line.strip()) == [
        "shapes/draft", "mmalign train shapes/draft", "nothing else; 2 GB of memory.", "7 min on 2 CPU cores."
    ]  # fmt: skip


def test_every_method_has_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods"]) == 0
    places = re.findall(r"docs/methods/(\w+)\.md", capsys.readouterr().out)
    assert sorted(places) == sorted(methods.names())
    overview = (ROOT / "docs" / "methods" / "index.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for name in places:
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert f"]({name}.md)" in overview and f"(docs/methods/{name}.md)" in readme, name
        assert "\n## Objective\n" in page and "\n## Measured result\n" in page, name
        files = re.findall(r"`(mmalign/(?:losses|methods)/\w+\.py)`", page)
        assert files and all((ROOT / file).is_file() for file in files), name
        facts = page.partition("## Objective")[0].partition("| configs |")[2]
        configs = re.findall(r"`([\w/]+)`", facts)
        assert configs and all((ROOT / "configs" / f"{config}.yaml").is_file() for config in configs), name
        pictures = re.findall(r"\]\(\.\./(images/[^)]*)\)", page)
        assert pictures or methods.get(name).needs.modality != "image", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)", place.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings]
            assert anchor in slugs, target


def resolve(name: str) -> object:
    """Return what a dotted name stands for: a module, or an attribute of one, however deep."""
    module, *attributes = "", *name.split(".")
    found: object = types.SimpleNamespace()
    while attributes:
        module = f"{module}.{attributes[0]}".lstrip(".")
        try:
            found = importlib.import_module(module)
        except ImportError:
            break
        del attributes[0]
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_names_of_ours_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if re.fullmatch(r"(mmalign|pipelines|rewards|configs|tests|docs|benchmarks|assets|examples)/[\w./*-]*", span):
            if "NAME" not in span:  # stands for any name
                assert list(ROOT.glob(span)), span
        elif dotted := re.fullmatch(r"((?:mmalign|pipelines|rewards)(?:\.\w+)+)(?:\(.*\))?", span):
            assert span in GROUPS or resolve(dotted[1]) is not None, span
    for module in re.findall(r"(?m)^::: ([\w.]+)$", text):
        resolve(module)


def test_the_tree_of_the_readme_names_files_and_what_is_in_them() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].split("```")[1]
    folder, named = "", []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(?:([\w]+)/)?", line).groups()  # type: ignore[union-attr]
        if name:
            folder = f"mmalign/{name}" if indent else name
            assert (ROOT / folder).is_dir(), folder
        if place := re.search(r"  ([\w/]+)\.py: ([\w.]+)$", line):
            resolve(f"{folder}/{place[1]}".replace("/", ".") + f".{place[2]}")
            named.append(folder)
    assert {path.parent.name for path in ROOT.glob("mmalign/*/__init__.py")} == {
        Path(one).name for one in named if one.startswith("mmalign/")
    }


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} == listed
    assert yaml.safe_load(text)["site_name"] == "mmalign"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
