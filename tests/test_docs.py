"""What the docs and examples show is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import MODELS, Program, run_all

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def python_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


def run(*arguments: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# every page with Python in it
PAGES = [
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if "quanto_hf" in python_blocks(page)),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What became of the Python blocks of each page, in a process and a folder of their own."""
    programs = [
        Program(f"import os; os.chdir({str(tmp_path_factory.mktemp('page'))!r})\n" + python_blocks(ROOT / page))
        for page in PAGES
    ]
    return dict(zip(PAGES, run_all(programs, MODELS, environment=ENVIRONMENT), strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run_in_order(page: str, done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    code = python_blocks(ROOT / page)
    assert "quanto_hf" in code
    if "import peft" in code:
        pytest.importorskip("peft")
    assert done[page].returncode == 0, done[page].stderr[-3000:]


def test_the_example_that_quantizes_and_saves_writes_a_line(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/quantize_and_save.py"), "--weights", "int8", "--out", str(tmp_path), cwd=tmp_path)
    assert "8.07" in out.splitlines()[0]
    assert (tmp_path / "model.safetensors").exists()
    assert out.splitlines()[2].startswith("Return the ")


def test_the_plain_torch_example_learns_and_packs_without_a_change(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/plain_torch.py"), "--steps", "100", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0] / 2
    assert float(re.search(r"after packing: (\S+)", out)[1]) < 1e-5


def test_the_readme_has_the_two_commands_that_ci_and_newcomers_use() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install ".[cli]" -c constraints.txt && quanto-hf demo' in text
    assert 'pip install -e ".[test]" -c constraints.txt && pytest' in text
