"""An old transformers: a sentence from the import of quanto_hf, and nothing of transformers breaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quanto_hf.hf.config.requirements import TRANSFORMERS, check_transformers

# of those that the quantizer imports, one that transformers does not
MISSING = "quanto_hf.hf.offload.deferred"


def run(code, path=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


def test_the_version_is_that_of_the_package():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"transformers>={TRANSFORMERS}",' in project


@pytest.mark.parametrize("found", ["4.57.1", "5.20.9", "5.4.0.dev0", "4"])
def test_an_older_one_is_refused(found):
    with pytest.raises(
        ImportError, match=rf"needs transformers {TRANSFORMERS} or later, and {found} is installed: pip"
    ):
        check_transformers(found)


@pytest.mark.parametrize("found", ["5.21.0", "5.21.0.dev0", "5.23.0+local", "6.0", "", "of my own"])
def test_a_later_one_and_one_without_a_number_are_let_through(found):
    check_transformers(found)


OLD = """
import transformers
transformers.__version__ = '4.57.1'
try:
    import quanto_hf
except ImportError as error:
    print(error)
import sys
assert not [f for f in sys.meta_path if 'quanto_hf' in type(f).__module__]
from transformers import LlamaForCausalLM
print(LlamaForCausalLM.__name__)
"""
LACKING = f"""
import sys, warnings
sys.modules[{MISSING!r}] = None
import quanto_hf
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    import transformers.quantizers.auto as auto
print([str(w.message) for w in said if 'quanto_hf' in str(w.message)])
try:
    auto.AutoHfQuantizer.from_config(quanto_hf.QuantoConfig('int4'))
except ImportError as error:
    print(error)
"""


def test_the_import_says_which_version_is_needed_and_transformers_still_works():
    done = run(OLD)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("quanto_hf needs transformers 5.21 or later, and 4.57.1 is installed: pip install")
    assert second == "LlamaForCausalLM"


def test_an_old_transformers_without_what_we_import_gives_the_same_sentence(tmp_path):
    # nothing of it is used before its version is known
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.40.0'\n")
    done = run("import quanto_hf", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: quanto_hf needs transformers 5.21 or later, and 4.40.0"
    )


def test_a_transformers_that_lacks_a_module_we_need_still_imports_its_models():
    done = run(LACKING)
    assert done.returncode == 0, done.stderr
    assert "quanto_hf cannot quantize with this transformers" in done.stdout and MISSING in done.stdout
