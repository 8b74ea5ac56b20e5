"""torch puts a finder in place, and quanto_hf registers with transformers in programs that do not import it."""

import subprocess
import sys

import pytest
from foreign import ABSENT, check_installed, environment, run
from forked import Program, run_all
from tiny_models import save

CHECK = (
    "\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING"
    "\nmade = AUTO_QUANTIZER_MAPPING['quanto_hf'](AUTO_QUANTIZATION_CONFIG_MAPPING['quanto_hf'](), pre_quantized=False)"
    "\n# where there are threads, what makes a quantizer stands there until one has been made"
    "\nassert type(made) is AUTO_QUANTIZER_MAPPING['quanto_hf']"
    "\nprint(type(made).__name__, type(made.quantization_config).__name__)"
)


@pytest.fixture(scope="module", autouse=True)
def _installed():
    check_installed()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a float model and of the same model quantized."""
    from transformers import AutoModelForCausalLM

    from quanto_hf import QuantoConfig

    made = tmp_path_factory.mktemp("autoload")
    folder = save("llama", made / "float")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig("int4"))
    model.save_pretrained(made / "int4")
    return made


def test_importing_torch_imports_neither_transformers_nor_quanto_hf_and_costs_less_than_2_ms():
    out = run(
        "import sys, time, torch\n"
        "assert not {'quanto_hf', 'transformers', 'safetensors'} & {*sys.modules}\n"
        "from importlib import import_module\n"
        "assert type(sys.meta_path[0]).__module__ == 'quanto_hf_autoload'\n"
        "def took():\n"
        "    del sys.modules['quanto_hf_autoload']\n"
        "    start = time.process_time()\n"
        "    import_module('quanto_hf_autoload').autoload()\n"
        "    return time.process_time() - start\n"
        "print(min(took() for _ in range(5)))"
    )
    assert float(out) < 0.002


ORDERS = {
    "torch-first": "import torch, transformers.quantizers.auto",
    "quantizers-import-torch": "import sys, transformers.quantizers.auto\nassert 'torch' in sys.modules",
    "ours-first": "import quanto_hf, torch, transformers.quantizers.auto",
    "ours-last": "import torch, transformers.quantizers.auto, quanto_hf",
    "a-model": "from transformers import AutoModelForCausalLM",
    "again": "import importlib, transformers.quantizers.auto as auto\nimportlib.reload(auto)",
    "threads": (
        # transformers itself fails now and then where threads race for its utils
        "import importlib, torch, transformers.utils\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "parts = ['transformers.quantizers.auto', 'transformers.modeling_utils', 'quanto_hf'] * 4\n"
        "with ThreadPoolExecutor(12) as pool: list(pool.map(importlib.import_module, parts))"
    ),
}


# in these torch is not the first, or not imported by the program
FRESH = ("quantizers-import-torch", "ours-first")
LOAD = """
import torch
from transformers import AutoModelForCausalLM as M
print(type(M.from_pretrained(sys.argv[1] + '/float')).__name__)
try: M.from_pretrained(sys.argv[1] + '/int4')
except ImportError as error: print(error)
"""
# a package that is installed, but broken: what the program begins with
BEGIN = {
    "raises": "import sys\nsys.path.insert(0, sys.argv[2])\n",
    "empty": "import sys\nsys.path.insert(0, sys.argv[2])\n",
    "absent": "import sys\nsys.modules['quanto_hf'] = None\n",
}


@pytest.fixture(scope="module")
def done(saved, tmp_path_factory):
    """Standard output of a program that must end well. Each has a process of its own, in which torch is imported."""
    programs = {order: Program(ORDERS[order] + CHECK) for order in ORDERS if order not in FRESH}
    for broken, begin in BEGIN.items():
        place = tmp_path_factory.mktemp(broken)
        package = place / "quanto_hf"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('half of it is gone')\n" if broken == "raises" else "")
        (package / "hf").mkdir()
        (package / "hf" / "__init__.py").write_text("")
        programs[broken] = Program(begin + LOAD, arguments=[str(saved), str(place)])
    results = dict(zip(programs, run_all(list(programs.values()), environment=environment()), strict=True))

    def of(name):
        assert results[name].returncode == 0, results[name].stderr[-3000:]
        return results[name].stdout.strip()

    return of


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_is_imported_first_the_method_is_registered(order, done):
    said = run(ORDERS[order] + CHECK).strip() if order in FRESH else done(order)
    assert said == "QuantoHfQuantizer QuantoConfig"


def test_a_spawned_worker_loads_a_saved_folder(saved, tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def work(folder):\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    return type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj).__name__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, [sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, script, saved / "int4"], capture_output=True, text=True, timeout=280, env=environment()
    )
    assert done.stdout.strip() == "['QLinear']", done.stderr[-2000:]


@pytest.mark.parametrize("broken", BEGIN)
def test_a_broken_package_stops_neither_torch_nor_transformers_but_the_models_that_need_it(broken, done):
    first, second = done(broken).splitlines()
    assert first == "LlamaForCausalLM"
    assert second.startswith("the model is quantized with quanto_hf, which cannot be imported: ")
    assert broken != "raises" or "half of it is gone" in second


@pytest.mark.parametrize("how", ["absent", "off"])
def test_without_it_the_folder_is_an_error(how, saved):
    values = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out = run(
        (ABSENT if how == "absent" else "") + "import sys\nfrom transformers import AutoModelForCausalLM as M\n"
        "try: M.from_pretrained(sys.argv[1] + '/int4')\n"
        "except RuntimeError as error: print(error)\n"
        "print('quanto_hf.hf' in sys.modules)",
        saved, **values,
    )  # fmt: skip
    assert "ignore_mismatched_sizes" in out and out.strip().endswith("False")
