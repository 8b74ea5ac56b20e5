"""Perplexity and KL of the bundled model with rounded activations, and with int2 weights before and after training.

    python benchmarks/activations.py [--windows 182] [--steps 100] [--peers]

Scales are calibrated, and weights trained, on docstrings of packages that are installed here (training_text.py); the
held-out text is seen by the evaluation only. That text is narrower than what the model was made with: trained to
predict it (``--loss text``) the float model loses too, as a row shows. So the aim is what the float model says of it.
``--peers`` does the same with optimum-quanto, where it is installed. ``--steps 0`` does not train.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from training_text import training_windows
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

import quanto_hf
from quanto_hf.cli.measure import Remembered
from quanto_hf.flow import Evaluation, evaluate, windows

OBSERVERS = ("moving_average", "minmax", "percentile", "histogram", "mse")
CALIBRATION, BATCH = 64, 8
RATES = {"int4": 3e-4, "int2": 1e-3}

Run = tuple[str, Callable[[nn.Module], nn.Module]]


def rounded(activations: str | None = None, observer: str | None = None, alpha: float = 0.0, **options: Any) -> Any:
    """Quantize a float model; with an observer its scales are static, with alpha it is smoothed before."""

    def run(model: nn.Module, data: torch.Tensor) -> nn.Module:
        if alpha:
            quanto_hf.smooth(model, data, alpha)
        static = observer is not None
        quanto_hf.quantize(model, activations=activations, static_activations=static, **options)
        quanto_hf.freeze(model)
        if observer is not None:
            quanto_hf.calibrate(model, list(data.split(BATCH)), observer, progress=False)
        return model

    return run


def optimum_quanto(activations: str | None = None, **options: Any) -> Any:
    """The same with optimum-quanto, whose activations are always static."""

    def run(model: nn.Module, data: torch.Tensor) -> nn.Module:
        import optimum.quanto as quanto

        kinds = {"weights": getattr(quanto, f"q{options.get('weights', 'int8')}")}
        if activations is not None:
            kinds["activations"] = getattr(quanto, f"q{activations}")
        quanto.quantize(model, exclude="lm_head", **kinds)
        if activations is not None:
            with torch.no_grad(), quanto.Calibration():
                for batch in data.split(BATCH):
                    model(input_ids=batch)
        quanto.freeze(model)
        return model

    return run


def train(
    model: nn.Module, teacher: nn.Module, data: torch.Tensor, steps: int, rate: float, loss: str, autocast: bool
) -> None:
    """AdamW, bfloat16 by autocast if wanted; the rate falls linearly to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    model.train()
    for step in range(steps):
        batch = data[step * BATCH : (step + 1) * BATCH]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1).float()
        if loss == "text":
            cost = F.cross_entropy(logits, batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = teacher(input_ids=batch).logits[:, :-1].flatten(0, 1).float()
            cost = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
        cost.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def trained(teacher: nn.Module, data: torch.Tensor, steps: int, loss: str, peers: bool) -> Iterator[Run]:
    """Runs that train, each from the float model."""

    def ours(weights: str) -> Callable[[nn.Module], nn.Module]:
        def run(model: nn.Module) -> nn.Module:
            quanto_hf.quantize(model.float(), weights=weights)
            train(model, teacher, data, steps, RATES[weights], loss, True)
            return quanto_hf.freeze(model).to(torch.bfloat16)

        return run

    def floats(model: nn.Module) -> nn.Module:
        train(model.float(), teacher, data, steps, RATES["int2"], loss, True)
        return model.to(torch.bfloat16)

    def theirs(model: nn.Module) -> nn.Module:
        import optimum.quanto as quanto

        # float32 throughout: it fails under autocast, and what it has frozen cannot be converted
        quanto.quantize(model.float(), weights=quanto.qint2, exclude="lm_head")
        train(model, teacher, data, steps, RATES["int2"], loss, False)
        quanto.freeze(model)
        return model

    if loss == "text":
        yield f"float, {steps} steps", floats
    yield from ((f"{weights}, {steps} steps of QAT", ours(weights)) for weights in ("int4", "int2"))
    if peers:
        yield f"optimum-quanto int2, {steps} steps of QAT", theirs


def post_training(data: torch.Tensor, peers: bool) -> Iterator[Run]:
    """Runs without training."""
    chosen = [("int8 weights", rounded())]
    chosen += [(f"{kind}, dynamic", rounded(kind)) for kind in ("int8", "float8", "float8_e5m2")]
    for alpha in (0.0, 0.5, 0.8):
        label = f", smooth {alpha}" if alpha else ""
        chosen += [(f"int8, static {name}{label}", rounded("int8", name, alpha)) for name in OBSERVERS]
    chosen += [("float8, static mse", rounded("float8", "mse"))]
    chosen += [(f"{kind} weights", rounded(weights=kind)) for kind in ("int4", "int2")]
    if peers:
        chosen += [(f"optimum-quanto {kind}", optimum_quanto(kind)) for kind in ("int8", "float8")]
        chosen += [("optimum-quanto int2 weights", optimum_quanto(weights="int2"))]
    for label, run in chosen:
        yield label, lambda model, run=run: run(model, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=182)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--loss", choices=["float", "text"], default="float")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())
    inputs = windows(tokenizer(quanto_hf.heldout_text(), verbose=False).input_ids, 256)[: args.windows]
    data = training_windows(tokenizer, CALIBRATION + args.steps * BATCH)
    if len(data) < CALIBRATION + args.steps * BATCH:
        parser.error(f"the installed packages have text for {len(data) // BATCH} steps")
    model = AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.bfloat16).eval()
    reference = Remembered(model)
    base = evaluate(reference, inputs)
    print(f"{base.tokens} tokens; float perplexity {base.perplexity:.3f}; {CALIBRATION} windows of calibration")
    print(f"{'':42}{'perplexity':>12}{'over float':>12}{'KL':>10}{'seconds':>9}", flush=True)
    runs = list(post_training(data[:CALIBRATION], args.peers))
    if args.steps:
        runs += trained(model, data[CALIBRATION:], args.steps, args.loss, args.peers)
    for label, run in runs:
        start = time.perf_counter()
        made = run(copy.deepcopy(model))
        seconds = time.perf_counter() - start
        row(label, evaluate(made, inputs, reference), base, seconds)


def row(label: str, result: Evaluation, base: Evaluation, seconds: float) -> None:
    over = 100 * (result.perplexity / base.perplexity - 1)
    print(f"{label:42}{result.perplexity:12.3f}{over:+11.2f}%{result.kl:10.5f}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
