"""What README and docs say is true: names exist, tables are complete, commands parse, README's examples run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.target import write_shallow
from typer.testing import CliRunner

import llmopt.compiler.vocabulary  # noqa: F401
from llmopt.cli import app
from llmopt.codegen.cpu.templates import HEADERS
from llmopt.codegen.cpu.toolchain import LEVELS, find_compiler
from llmopt.compiler import errors
from llmopt.compiler.opspec import OPS
from llmopt.compiler.options import Options
from llmopt.compiler.step import STEP_INPUTS
from llmopt.compiler.verify import Level
from llmopt.passes.pipeline import BACKEND, InsertLora, step_pipeline
from llmopt.runtime.program_file import FORMAT, VERSION
from llmopt.runtime.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("api", "compiler", "passes", "codegen", "runtime")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "passes/README.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
]
# A file name in backquotes; `<name>` in it marks a placeholder.
FILE_NAME = re.compile(r"`([\w./-]+\.(?:py|h|cpp|md|toml|json))`")


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The rows of the table that follows the line `heading`, as cells without backquotes."""
    _, found, rest = read(page).partition(heading)
    assert found, f"{page} has no {heading!r}"
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table is not None
    for line in table.group().splitlines()[2:]:
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def code_blocks(page: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


# ---- links and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", read(page))
    for link in (x for x in links if not x.startswith("http")):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """With a folder from the repository's root or the page's own folder; a bare name anywhere among the sources."""
    everywhere = {
        p.name for top in (*LAYERS, "tests", "benchmarks", "examples", "docs") for p in (ROOT / top).rglob("*")
    } | {p.name for p in ROOT.iterdir()}
    for name in FILE_NAME.findall(read(page)):
        exists = (ROOT / name).exists() or ("/" not in name and name in everywhere)
        assert exists, f"{page} names {name}"


def test_readme_leads_to_every_page() -> None:
    for page in PAGES[1:]:
        assert f"]({page})" in read("README.md"), page


def test_architecture_lists_every_module() -> None:
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", read("docs/architecture.md"), re.MULTILINE))
    there = {p.relative_to(ROOT).as_posix() for layer in LAYERS for p in (ROOT / layer).rglob("*.py")}
    there = {name for name in there if read(name).strip()}
    assert listed == there, "docs/architecture.md, Files"


# ---- tables --------------------------------------------------------------------------------------------------------


def test_ops() -> None:
    page = read("docs/ops.md")
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == set(OPS)
    for spec in OPS.values():
        assert f"### {spec.name}\n\n```\n{spec.schema}\n```" in page, spec.name


def test_passes() -> None:
    everything = {p.name: p for p in (*BACKEND, *step_pipeline(16, lora=InsertLora(), prompt_embeds=True))}
    assert {names(row[0])[0] for row in rows("passes/README.md", "## Table")} == set(everything)
    required = {name for name, item in everything.items() if item.required}
    sentence = re.search(r"^(.*) cannot be disabled", " ".join(read("passes/README.md").split("\n")), re.MULTILINE)
    assert sentence is not None
    assert set(names(sentence.group(1).rpartition(". ")[2])) == required
    assert all(level.name.lower() in read("passes/README.md") for level in Level)


def test_sample_of_explain_has_the_pipeline_of_today() -> None:
    sample = next(block for block in code_blocks("README.md") if block.startswith("graph 0: step"))
    passes = sample.split("their reasons)\n")[1].split("kernels (")[0]
    assert [line.split()[0] for line in passes.splitlines()] == [p.name for p in step_pipeline(16)]


@pytest.mark.parametrize(("heading", "kind"), [("# Options", Options), ("## Sampling", SamplingParams)])
def test_options_and_their_defaults(heading: str, kind: type[Options] | type[SamplingParams]) -> None:
    table = {names(row[0])[0]: names(row[1])[0] for row in rows("docs/options.md", heading)}
    defaults = {field.name: repr(field.default).replace("'", '"') for field in dataclasses.fields(kind)}
    assert table == defaults


def test_environment_variables() -> None:
    sources = [p.read_text("utf-8") for layer in LAYERS for p in (ROOT / layer).rglob("*.py")]
    used = {name for text in sources for name in re.findall(r'"(LLMOPT_[A-Z_]+)"', text)}
    assert {names(row[0])[0] for row in rows("docs/options.md", "## Environment")} == used
    for page in PAGES:
        # Macros of the C++ side are given as -DNAME=value, or are entries such as LLMOPT_KERNEL.
        assert set(re.findall(r"(?<!-D)\bLLMOPT_[A-Z_]+\b", read(page))) <= used, page


def test_kernels() -> None:
    table = {name: names(row[1])[0] for row in rows("docs/kernels.md", "# CPU kernels") for name in names(row[0])}
    assert table == {**HEADERS, "loop": "loops.h"}
    assert [names(row[0])[0] for row in rows("docs/kernels.md", "## Instruction sets")] == [x.name for x in LEVELS]


def test_errors() -> None:
    table = {names(row[0])[0] for row in rows("docs/troubleshooting.md", "## Errors")}
    classes = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LlmoptError)}
    assert table == classes - {"LlmoptError"}


def test_step_inputs_and_file_format() -> None:
    table = {names(row[0])[0]: row[1].split()[-1] for row in rows("docs/programs.md", "## The step program")}
    assert table == {name: str(dtype).removeprefix("torch.") for name, dtype in STEP_INPUTS.items()}
    assert f'`"{FORMAT}"`, {VERSION};' in read("docs/programs.md")


# ---- commands and examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    inline = [c for c in re.findall(r"`([^`\n]+)`", read(page)) if re.match(r"(llmopt|make) [a-z]", c)]
    lines = [line for block in code_blocks(page) for line in block.splitlines()]
    for line in [*inline, *lines]:
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] == ["llmopt"] and page.endswith(".md") and "import" not in words[1:2]:
            command = words[1:3] if words[1] in ("bench", "cache") else words[1:2]
            answer = CliRunner().invoke(app, [*command, "--help"])
            assert answer.exit_code == 0, line
            flags = re.findall(r"(?<![\w-])--[a-z-]+", line)
            assert all(f"{flag} " in answer.stdout for flag in flags), line


def test_examples_of_the_readme_run(tmp_path: Path) -> None:
    """All blocks marked `<!-- run -->`, one after the other in one process, as a reader would type them.

    Over the first layers of the trained model: what it says is no matter here.
    """
    try:
        find_compiler()
    except errors.ToolchainError as error:
        pytest.skip(str(error))
    blocks = re.findall(r"^<!-- run -->\n```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == read("README.md").count("```python") == 3, "every python block is to be run"
    write_shallow(tmp_path / "examples" / "models" / "target")
    answer = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    assert "torch.Size([1, " in answer.stdout and "def fib(n):" in answer.stdout
    assert (tmp_path / "target.engine").is_file()
