"""A config that is accepted can be run: every number type with any three of fit, grid, group size and flags."""

import itertools
import random
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quanto_hf
from quanto_hf.fit import FITS
from quanto_hf.qtypes import weight_names
from quanto_hf.schemes import GROUP_SIZES

WEIGHTS = (*weight_names(), "aqlm-1x4", "aqlm-2x3", "aqlm-1x20", "aqlm-65x2")
FIT_NAMES = (None, *FITS)
SYMMETRIC = (None, True, False)
GROUPS = (None, -1, GROUP_SIZES[0], 64, 7)
# activations, static_activations, qat, learn_scales
FLAGS = tuple(
    dict(zip(("activations", "static_activations", "qat", "learn_scales"), values, strict=True))
    for values in itertools.product((None, "int8", "float8"), (False, True), (False, True), (False, True))
)
SCHEMES = [
    dict(zip(("fit", "symmetric", "group_size"), values, strict=True))
    for values in itertools.product(FIT_NAMES, SYMMETRIC, GROUPS)
]
# Columns: whole groups of 16 and 7, also of AQLM, and a shorter last one of 64
WIDTH, ROWS = 112, 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:the codebooks of"),
    pytest.mark.filterwarnings("ignore:the pattern"),
    pytest.mark.filterwarnings("error:.*disagrees with the reference.*"),
]


def configs(weights, scheme, flags):
    """The config, or None where it is refused: with the one sentence that says why."""
    try:
        return quanto_hf.QuantoConfig(weights, **scheme, **flags)
    except ValueError as error:
        head, *sentences = str(error).split("\n  ")
        assert head == "this QuantoConfig cannot be used:"
        assert sentences and all(len(s) > 20 and s == s.strip() for s in sentences), error
        return None


def accepted(weights):
    """(scheme, flags) of every config that is accepted."""
    return [(s, f) for s, f in itertools.product(SCHEMES, FLAGS) if configs(weights, s, f) is not None]


def every_three(cases):
    """Of these (scheme, flags), a few among which any three words that occur together still do."""
    words = [set(itertools.combinations({**scheme, **flags}.items(), 3)) for scheme, flags in cases]
    chosen, seen = [], set()
    # in this order, since in theirs neighbours share most of their words
    for i in random.Random(0).sample(range(len(cases)), len(cases)):
        if not words[i] <= seen:
            chosen.append(cases[i])
            seen |= words[i]
    return chosen


def test_any_three_words_are_tried_together():
    flags = {"weights": "int4"}
    cases = [(dict(zip("abcd", values, strict=True)), flags) for values in itertools.product(range(3), repeat=4)]
    chosen = every_three(cases)
    assert len(chosen) < len(cases)
    for names in itertools.combinations("abcd", 3):
        assert len({tuple(scheme[name] for name in names) for scheme, _ in chosen}) == 27


def net():
    return nn.Sequential(nn.Linear(WIDTH, ROWS))


def quantized(model, weights, scheme, flags):
    """The model, as :func:`quanto_hf.quantize` makes it of the same words."""
    scheme, flags = dict(scheme), dict(flags)
    flags.pop("qat")
    return quanto_hf.quantize(model, weights, optimizer=scheme.pop("fit"), **scheme, **flags)


def calibrated(model, flags, *args, **kwargs):
    """The model, after it has seen data if it is to have static scales. All layers may have stayed float: 112 columns
    are no blocks of 64."""
    if flags["static_activations"] and any(isinstance(module, quanto_hf.QLinear) for module in model.modules()):
        with quanto_hf.Calibration(model), torch.no_grad():
            model(*args, **kwargs)
    return model


def run(model, x, flags):
    """Train if that is asked for, pack the weights, and run."""
    calibrated(model, flags, x)
    if flags["qat"]:
        model(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        before = model(x) if flags["qat"] else None
        quanto_hf.freeze(model)
        made = model(x)
    assert made.isfinite().all() and (before is None or torch.equal(made, before))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_accepted_quantizes_runs_and_trains(weights):
    x = torch.randn(3, WIDTH)
    for scheme, flags in every_three(accepted(weights)):
        model = net()
        try:
            run(quantized(model, weights, scheme, flags), x, flags)
        except Exception as error:
            raise AssertionError(f"{weights} {scheme} {flags}: {error}") from error


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_refused_changes_no_model(weights):
    model = net()
    modules = list(model)
    for scheme in SCHEMES:
        flags = {"activations": None, "static_activations": False, "qat": False, "learn_scales": False}
        if configs(weights, scheme, flags) is None:
            with pytest.raises(ValueError, match=r"choose|leave (it )?out"):
                quantized(model, weights, scheme, flags)
            with pytest.raises(ValueError, match=r"choose|leave (it )?out"):
                values = {"weights": weights, **scheme}
                quanto_hf.quantize(model, "int8", overrides={"nothing*": values})
            with pytest.raises(ValueError, match=r"overrides\['nothing'\]: "):
                quanto_hf.QuantoConfig(overrides={"nothing": values})
            assert list(model) == modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=24, hidden_size=WIDTH, intermediate_size=ROWS, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_accepted_loads_and_runs(weights, folder, tmp_path):
    ids = torch.arange(12).view(2, 6)
    # every scheme and every set of flags comes up, in turns
    chosen, seen = [], set()
    for scheme, flags in accepted(weights):
        names = {("fit", scheme["fit"]), ("grid", scheme["symmetric"], scheme["group_size"]), *flags.items()}
        names.add(tuple(flags.values()))
        if not names <= seen:
            chosen.append((scheme, flags))
            seen |= names
    for scheme, flags in chosen:
        config = configs(weights, scheme, flags)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no linear layer of")
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        calibrated(model, flags, input_ids=ids)
        if flags["qat"]:
            model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            assert quanto_hf.freeze(model)(input_ids=ids).logits.isfinite().all(), (scheme, flags)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"weights": "int4", "fit": "absmax"}, "fit='absmax' has no zero; choose symmetric=True"),
        ({"weights": "int8", "fit": "hqq"}, "fit='hqq' moves the zero, and symmetric int8 weights have none"),
        ({"weights": "nf4", "fit": "hqq"}, "symmetric nf4 weights have none; choose fit='mse' or 'absmax'"),
        ({"weights": "int4", "symmetric": True, "fit": "hqq"}, "symmetric int4 weights have none"),
        ({"weights": "aqlm-2x8", "fit": "mse"}, "fit='mse' is not for aqlm 2x8 g8 weights"),
        (
            {"weights": "aqlm-1x20"},
            "aqlm 1x20 g8 weights can be read, but not made: nbits=20 is out of range",
        ),
        ({"weights": "aqlm-65x8"}, "num_codebooks=65 is out of range; choose 1 to 64"),
        ({"overrides": {"a": {"fit": "hqq"}}}, r"overrides['a']: fit='hqq' moves the zero"),
        ({"weights": "int4", "fit": "hqq", "overrides": {"a": {"symmetric": True}}}, "overrides['a']: fit='hqq'"),
        ({"overrides": {"a": {"weights": "aqlm-1x17"}}}, "overrides['a']: aqlm 1x17 g8 weights can be read"),
    ],
    ids=str,
)
def test_the_sentence_comes_when_the_config_is_made(arguments, sentence):
    with pytest.raises(ValueError, match="cannot be used") as error:
        quanto_hf.QuantoConfig(**arguments)
    assert str(error.value).count("\n  ") == 1 and sentence in str(error.value)


def test_a_saved_config_whose_fit_nothing_uses_any_more_is_read():
    saved = {"scheme": {"kind": "affine", "qtype": "int4", "group_size": 64, "symmetric": True}, "modules": ["a"]}
    assert quanto_hf.QuantoConfig("int4", symmetric=True, fit="hqq", schemes=[saved]).fit == "hqq"


def test_an_aqlm_layout_that_can_be_read_but_not_made_is_refused_before_a_weight_is_read(folder):
    config = quanto_hf.AqlmConfig(nbits_per_codebook=20, num_codebooks=1)
    with pytest.raises(ValueError, match=r"^aqlm 1x20 g8 weights can be read, but not made: nbits=20 is out of range"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
