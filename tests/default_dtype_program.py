"""What quantizing gives, as digests, in a process of its own: self-checks and tables are made once in each process.

Arguments: the default dtype of torch, and where the first calls are made: nowhere else, or under "autocast", "device",
"inference" or "grad". Prints a JSON object of name -> digest, or the error. The first calls may fail or give other
numbers, but what they leave behind (which kernels are trusted, tables) counts afterwards.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import sys
import tempfile
import warnings

import torch
from torch import nn

import quanto_hf
from quanto_hf import eager
from quanto_hf.fit import FITS
from quanto_hf.flow import evaluate
from quanto_hf.nn import observers
from quanto_hf.schemes import make_scheme

WEIGHTS = ("int8", "int4", "int2", "float8", "float8_e5m2", "nf4", "fp4", "aqlm-2x4", "aqlm-1x8")
CONVOLUTIONS = ("int8", "int4", "nf4")
AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "": contextlib.nullcontext,
}
# float32, whatever the default is
GENERATOR = torch.Generator().manual_seed(0)
WIDTHS = (64, 200, 48)
STATE = {}
for i, (columns, rows) in enumerate(itertools.pairwise(WIDTHS)):
    STATE[f"{2 * i}.weight"] = torch.randn(rows, columns, generator=GENERATOR, dtype=torch.float32) / columns**0.5
    STATE[f"{2 * i}.bias"] = torch.randn(rows, generator=GENERATOR, dtype=torch.float32)
X = torch.randn(20, WIDTHS[0], generator=GENERATOR, dtype=torch.float32)
IMAGE = torch.randn(2, 3, 9, 9, generator=GENERATOR, dtype=torch.float32)
IDS = torch.arange(3, 27, dtype=torch.int64, device="cpu").view(2, 12)
KERNEL = torch.randn(8, 3, 3, 3, generator=GENERATOR, dtype=torch.float32)


def net() -> nn.Module:
    made = nn.Sequential(
        nn.Linear(*WIDTHS[:2], dtype=torch.float32, device="cpu"), nn.ReLU(),
        nn.Linear(*WIDTHS[1:], dtype=torch.float32, device="cpu"),
    )  # fmt: skip
    made.load_state_dict(STATE)
    return made


def answers(model):
    """Outputs for few and many rows in each dtype, and the stored tensors."""
    inputs = [x.to(dtype) for x in (X[:1], X[:3], X) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    with torch.no_grad():
        return [model(x) for x in inputs] + list(model.state_dict().values())


def step(model):
    """Gradients, and the weights after a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return grads + [p.detach().clone() for p in model.parameters()]


def weight_only(weights, **how):
    return answers(quanto_hf.freeze(quanto_hf.quantize(net(), weights, **how)))


def dynamic(weights, activations):
    model = quanto_hf.quantize(net(), weights, activations)
    return ([] if "aqlm" in weights else step(model)) + answers(quanto_hf.freeze(model))


def static(weights, activations):
    model = quanto_hf.quantize(net(), weights, activations, static_activations=True)
    with quanto_hf.Calibration(model):
        model(X)
    return answers(quanto_hf.freeze(model))


def learned(weights, symmetric=None):
    model = quanto_hf.quantize(net(), weights, "int8", static_activations=True, learn_scales=True, symmetric=symmetric)
    with quanto_hf.Calibration(model):
        model(X)
    return step(model) + answers(quanto_hf.freeze(model))


def convolution(weights):
    conv = nn.Conv2d(3, 8, 3, bias=False, dtype=torch.float32, device="cpu")
    conv.load_state_dict({"weight": KERNEL})
    model = quanto_hf.freeze(quanto_hf.quantize(nn.Sequential(conv), weights, "int8"))
    return [model(IMAGE), *model.state_dict().values()]


def smoothed():
    norm = nn.LayerNorm(64, dtype=torch.float32, device="cpu")
    model = nn.Sequential(norm, *net())
    quanto_hf.smooth(model, [X])
    return list(model.state_dict().values())


def compared():
    model, exact = net(), net()
    quanto_hf.freeze(quanto_hf.quantize(model, "int4"))
    found = quanto_hf.compare(model, exact, [X])
    return [str(found)]


def calibrated_aqlm():
    model = quanto_hf.quantize(net(), "aqlm-2x4")
    quanto_hf.freeze_aqlm(model, [X], progress=False)
    return answers(model)


def tuned_aqlm():
    model = quanto_hf.freeze(quanto_hf.quantize(net(), "aqlm-2x4"))
    wanted = net()(X).detach()
    losses = quanto_hf.tune_codebooks(model, [X], lambda m, x: (m(x) - wanted).square().mean(), epochs=2)
    return [torch.tensor(losses, dtype=torch.float64), *answers(model)]


def moments():
    return list(quanto_hf.collect_moments(net(), [X]).values())


def observed(name):
    observer = observers.OBSERVERS[name](*((0.1, 3) if name == "fixed" else ()))
    for x in (X, 2 * X):
        observer(x)
    if not isinstance(observer, observers.RangeObserver):
        return list(observer.state_dict().values())
    return [*observer.calculate_qparams(), *observer.state_dict().values()]


def eagerly():
    made = []
    for qconfig in (eager.get_default_qconfig("x86"), eager.get_default_qat_qconfig("x86")):
        model = eager.QuantWrapper(net())
        model.qconfig = qconfig
        model = eager.prepare(model.eval()) if qconfig.activation is not None else model
        model(X)
        model = eager.convert(model)
        made += [model(X), *(t for t in model.state_dict().values() if isinstance(t, torch.Tensor))]
    dynamic = eager.quantize_dynamic(net(), dtype="int8")
    return [*made, dynamic(X)]


def trained_eagerly():
    model = eager.QuantWrapper(net())
    model.qconfig = eager.get_default_qat_qconfig("x86")
    model = eager.prepare_qat(model.train())
    model(X).square().mean().backward()
    return [p.grad for p in model.parameters()] + [eager.convert(model.eval())(X)]


def quantized_stub():
    from quanto_hf.eager.modules import Quantize

    return [Quantize(0.3, 2, "quint8")(X)]


def tiny(folder=None, **how):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder or quanto_hf.tiny_lm(), **how)


def saved_and_reloaded(model):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        first = model(input_ids=IDS).logits
        model.save_pretrained(folder)
        again = tiny(folder)
        return [first, again(input_ids=IDS).logits, *model.state_dict().values(), *again.state_dict().values()]


def loaded(weights, **how):
    return saved_and_reloaded(tiny(quantization_config=quanto_hf.QuantoConfig(weights), **how))


def loaded_with_everything():
    how = {"activations": "int8", "static_activations": True}
    model = tiny(quantization_config=quanto_hf.QuantoConfig("int4", **how), dtype=torch.bfloat16)
    with quanto_hf.Calibration(model):
        model(input_ids=IDS)
    return saved_and_reloaded(model)


def trained_and_reloaded():
    model = tiny(quantization_config=quanto_hf.QuantoConfig("int4", qat=True, learn_scales=True, symmetric=True))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    before = saved_and_reloaded(model)
    return before + saved_and_reloaded(quanto_hf.freeze(model))


def dequantized():
    model = tiny(quantization_config=quanto_hf.QuantoConfig("fp4", dequantize=True))
    return list(model.state_dict().values())


def converted():
    with tempfile.TemporaryDirectory() as folder:
        quanto_hf.convert_checkpoint(quanto_hf.tiny_lm(), folder, quanto_hf.QuantoConfig("int2"))
        return list(tiny(folder).state_dict().values())


def planned():
    found = quanto_hf.plan(quanto_hf.tiny_lm(), quanto_hf.QuantoConfig("int4"), "100KiB")
    return [found.nbytes, found.others]


def evaluated():
    model = tiny(quantization_config=quanto_hf.QuantoConfig("nf4"))
    found = evaluate(model, IDS, reference=tiny())
    return [found.perplexity, found.kl]


def embedding():
    made = nn.Embedding(40, 64, dtype=torch.float32, device="cpu")
    made.load_state_dict({"weight": STATE["0.weight"][:40]})
    layer = quanto_hf.QEmbedding.from_module(made, make_scheme("int4"))
    layer.freeze()
    return [layer(IDS), layer.weight.clone(), *layer.state_dict().values()]


def recurrent():
    made = nn.LSTM(64, 10, dtype=torch.float32, device="cpu")
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    made.load_state_dict(
        {n: torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") for n, s in shapes.items()}
    )
    return list(eager.quantize_dynamic(nn.Sequential(made))(X[None])[0])


def reported():
    model = quanto_hf.freeze(quanto_hf.quantize(net(), "int4"))
    return [str(quanto_hf.report(model))]


def adopted():
    return list(quanto_hf.freeze(quanto_hf.quantize(tiny(), "nf4", "int8")).state_dict().values())


CASES = {f"{weights} weight-only": (weight_only, weights) for weights in WEIGHTS}
for kind in ("int8", "float8"):
    CASES |= {f"{weights} with {kind}": (dynamic, weights, kind) for weights in WEIGHTS}
    CASES |= {f"{weights} with static {kind}": (static, weights, kind) for weights in WEIGHTS}
CASES |= {f"{weights} learned": (learned, weights) for weights in WEIGHTS if "aqlm" not in weights}
CASES |= {f"symmetric {weights} learned": (learned, weights, True) for weights in ("int4", "int2")}
CASES |= {f"convolution {weights}": (convolution, weights) for weights in CONVOLUTIONS}
CASES |= {f"observer {name}": (observed, name) for name in observers.OBSERVERS}
CASES |= {f"loaded {weights}": (loaded, weights) for weights in ("int8", "int4", "nf4")}
PLAIN = (
    smoothed, compared, calibrated_aqlm, tuned_aqlm, moments, eagerly, trained_eagerly, quantized_stub, adopted,
    loaded_with_everything, trained_and_reloaded, dequantized, converted, planned, evaluated, embedding, recurrent,
    reported,
)  # fmt: skip
CASES |= {case.__name__: (case,) for case in PLAIN}


# no gradient, and no module that is made: the same on a default device that is not used, and in inference mode
SAME = [name for name in CASES if name.endswith(("weight-only", "with static int8", "with static float8"))]
SAME += [
    "embedding",
    "moments",
    "recurrent",
    "compared",
    "calibrated_aqlm",
    *(f"convolution {weights}" for weights in CONVOLUTIONS),
]


def fitted(fit):
    return weight_only("int4", optimizer=fit, symmetric=fit == "absmax")


CASES |= {f"fit {name}": (fitted, name) for name in FITS}


def digest(values) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            held = value.detach().contiguous()
            found.update(f"{held.dtype} {list(held.shape)}".encode())
            if held.numel():
                found.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(str(value).encode())
    return found.hexdigest()


def run(case):
    call, *arguments = case
    # of tensors that nobody initialises
    torch.manual_seed(0)
    try:
        return digest(call(*copy.deepcopy(arguments)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dtype, around = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    # a kernel that is called wrong is no error, but slow
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message=".*disagrees with the reference.*")
    torch.set_default_dtype(getattr(torch, dtype))
    with AROUND[around]():
        first = {name: run(case) for name, case in CASES.items() if around}
    found = {name: run(case) for name, case in CASES.items()}
    wrong = {f"{name}, at first": text for name, text in first.items() if "disagrees" in text}
    if around in ("device", "inference"):
        wrong |= {f"{n}, at first": text for n, text in first.items() if n in SAME and text != found[n]}
    print(json.dumps(found | wrong))
