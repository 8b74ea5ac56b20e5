"""The names of ``quanto_hf.eager``: those that its modules list, and nothing that they import."""

import importlib
import pkgutil
from types import ModuleType

from quanto_hf import eager


def test_every_name_is_there_and_none_is_a_module():
    assert eager.__all__ == sorted(set(eager.__all__)) and set(eager.__all__) <= {*dir(eager)}
    assert not [name for name in eager.__all__ if isinstance(getattr(eager, name), ModuleType)]
    # a function and the file that it is in have one name
    assert callable(eager.prepare) and callable(eager.convert)


def test_the_names_are_those_of_the_modules_and_no_imports_of_theirs():
    # the numeric suite is imported by itself; modules and qat have names of their own, of which few are here
    apart = {"numeric_suite", "modules", "qat"}
    files = [importlib.import_module(f"quanto_hf.eager.{file.name}") for file in pkgutil.iter_modules(eager.__path__)]
    listed = {
        name for file in files for name in getattr(file, "__all__", ()) if file.__name__.split(".")[-1] not in apart
    }
    assert listed <= set(eager.__all__)
    others = {getattr(eager, name) for name in set(eager.__all__) - listed}
    homes = (
        "quanto_hf.eager.modules",
        "quanto_hf.eager.qat",
        "quanto_hf.eager.fake_quantize",
        "quanto_hf.nn.observers",
    )
    assert all(value.__module__.startswith(homes) for value in others)


def test_what_prepare_and_convert_know_by_themselves_is_a_table():
    from torch import nn

    table = eager.get_default_custom_config_dict()
    observed = table["float_to_observed_custom_module_class"]
    assert observed == {nn.LSTM: eager.ObservedLSTM, nn.MultiheadAttention: eager.ObservedMultiheadAttention}
    quantized = table["observed_to_quantized_custom_module_class"]
    assert quantized == {
        eager.ObservedLSTM: eager.QuantizedLSTM, eager.ObservedMultiheadAttention: eager.QuantizedMultiheadAttention,
    }  # fmt: skip
    assert eager.no_observer_set() == set(quantized)
    # a copy: what a user adds to it is in no later call
    observed.clear()
    assert eager.get_default_custom_config_dict()["float_to_observed_custom_module_class"]
