"""Every function that the documents name exists: `path/file.py:Class.method` and `path/file.cpp:function` in backticks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOP = re.compile(r"`([\w/.-]+\.(?:py|cpp|hpp|h)):([\w.]+)`")
PAGES = ("life-of-a-request.md", "life-of-a-step.md")


def names_of(source: str) -> set[str]:
    """Classes, functions and methods of a Python file, with dots; those of a base in the same file are the class's own too."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return found


def problem_of(path: str, name: str) -> str | None:
    """Why a hop leads nowhere."""
    file = ROOT / path
    if not file.is_file():
        return f"there is no file {path}"
    source = file.read_text()
    known = name in names_of(source) if file.suffix == ".py" else re.search(rf"\b{name}\(", source)
    return None if known else f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_hop_of_a_page_leads_to_a_function(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    hops = HOP.findall(text)
    assert len(hops) >= 15
    assert [problem for path, name in hops if (problem := problem_of(path, name))] == []
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)), "hops are numbered in order"


def test_all_pages_when_read_then_their_links_and_hops_lead_somewhere() -> None:
    found = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
            if not (page.parent / target).exists():
                found.append(f"{page.relative_to(ROOT)} links to {target}")
        found += [
            f"{page.relative_to(ROOT)}: {problem}"
            for path, name in HOP.findall(text)
            if (problem := problem_of(path, name))
        ]
    assert found == []


def test_a_hop_that_leads_nowhere_when_checked_then_it_is_named() -> None:
    assert problem_of("pellucid/absent.py", "f") == "there is no file pellucid/absent.py"
    assert problem_of("pellucid/llm.py", "LLM.absent") == "pellucid/llm.py has no LLM.absent"
    assert problem_of("pellucid/llm.py", "LLM.generate") is None
    assert problem_of("csrc/src/stages.cpp", "absent") == "csrc/src/stages.cpp has no absent"


def test_every_decision_stands_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    assert [path.name for path in sorted(folder.glob("0*.md")) if f"]({path.name})" not in index] == []


def test_every_page_stands_in_the_index_of_documents() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md" and f"({path.name})" not in index
    ] == []
