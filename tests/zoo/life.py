"""The whole life of a tiny model of one family: built, saved, quantized while it is loaded, run, saved, reloaded."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quanto_hf
from quanto_hf import QuantoConfig

from .care import CARE, Care
from .families import Family, family
from .inputs import Calls, call, working
from .shrink import STEPS, Step, shrink

LARGEST = 70_000_000
# seconds of one processor after which no more sizes are tried
PATIENCE = 10.0
# sizes that can be built, but do not run
TRIES = 3
# how each family is quantized: together they pack what can be packed, and leave embeddings in float
CONFIGS: dict[str, Callable[[], QuantoConfig]] = {
    "int8": lambda: QuantoConfig("int8", embeddings="int8"),
    "int4": lambda: QuantoConfig("int4"),
}


class Unbuilt(Exception):
    """The float model of a family cannot be made here."""


def life(name: str, kinds: list[str]) -> dict[str, Any]:
    """What happened to a family, as JSON has it. ``float`` is why the float model does not run, or empty; ``kinds`` has
    what each configuration came to, with ``error`` where something went wrong."""
    care = CARE.get(name, Care())
    found: dict[str, Any] = {"family": name, "float": "", "runs": False, "kinds": {}}
    try:
        if care.left:
            raise Unbuilt(care.left)
        one = family(name, care.cls)
        found["class"] = one.model_class.__name__
        model, calls, step, said = build(one, care)
    except Exception as error:
        return {**found, "float": f"{error}" if isinstance(error, Unbuilt) else short(error)}
    found.update(step=list(step), parameters=sum(p.numel() for p in model.parameters()), runs=bool(calls))
    found["inputs"] = {
        part: {key: list(x.shape) for key, x in inputs.items() if torch.is_tensor(x)} for part, inputs in calls.items()
    }
    found["float"] = said
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            model.save_pretrained(folder / "float")
            del model
            plain = one.model_class.from_pretrained(folder / "float").eval()
            wanted = call(plain, calls)
            written = generated(plain, calls)
            del plain
        except Exception as error:
            return {**found, "runs": False, "float": f"saving or loading the float model: {short(error)}"}
        found["generates"] = isinstance(written, torch.Tensor)
        for kind in kinds:
            found["kinds"][kind] = quantized(one, kind, folder, calls, wanted, found["generates"])
    return found


def build(one: Family, care: Care) -> tuple[Any, Calls, Step, str]:
    """The smallest float model that runs, what it is called with, the step, and why it does not run. If none does, the
    smallest that has the most parts that run."""
    published, began = one.config_class(**care.config), time.process_time()
    best: tuple[Any, Calls, Step] | None = None
    said, unbuilt, built = "", "", 0
    for step in care.steps or STEPS:
        if built == TRIES or time.process_time() - began > PATIENCE * (1 if best else 2):
            break
        try:
            with torch.device("meta"):
                large = sum(p.numel() for p in one.model_class(shrink(published, step, **care.tiny)).parameters())
        except Exception:
            # what cannot be built on meta may be built otherwise
            large = 0
        if large > LARGEST:
            unbuilt = unbuilt or f"a tiny model has {large:,} parameters"
            continue
        try:
            torch.manual_seed(0)
            model = one.model_class(shrink(published, step, **care.tiny)).eval()
        except Exception as error:
            unbuilt = unbuilt or short(error)
            continue
        if not care.calm:
            lively(model)
        built += 1
        calls, why = working(model, care.inputs(model.config) if care.inputs else {})
        if "" in calls:
            return model, calls, step, ""
        said = said or why
        if best is None or len(calls) > len(best[1]):
            best = (model, calls, step)
    if best is None:
        raise Unbuilt(unbuilt or "no size can be built")
    return (*best, said)


@torch.no_grad()
def lively(model: Any) -> None:
    """Weights that keep the size of signals: with the initial ones of transformers, small models give nearly the same
    for all inputs."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if type(parameter) is not torch.nn.Parameter or not parameter.is_floating_point():
            continue
        if parameter.dim() >= 2 and name.endswith("weight") and float(parameter.std()) > 0:
            fan = parameter[0].numel() if parameter.dim() < 3 or parameter.dim() > 3 else parameter.shape[-1]
            drawn = torch.randn(parameter.shape, generator=draw) * fan**-0.5
            parameter.copy_(drawn)


def quantized(
    one: Family, kind: str, folder: Path, calls: Calls, wanted: list[torch.Tensor], generates: bool
) -> dict[str, Any]:
    """What one configuration came to."""
    cls, found, stage = one.model_class, {}, "load"
    try:
        config = CONFIGS[kind]()
        model = cls.from_pretrained(folder / "float", quantization_config=config).eval()
        stage = "report"
        # before it runs: some models make larger buffers of positions then
        footprint = model.get_memory_footprint()
        found["share"] = share(quanto_hf.report(model))
        found["packed"] = sum(isinstance(m, quanto_hf.nn.QuantizedWeight) for m in model.modules())
        stage = "run"
        made = call(model, calls)
        found["distance"] = distance(made, wanted) if wanted else None
        stage = "plan"
        planned = quanto_hf.plan(folder / "float", CONFIGS[kind](), auto_class=cls, device_map="cpu").nbytes
        found["footprint"] = [footprint, planned]
        stage = "save"
        model.save_pretrained(folder / kind)
        stage = "reload"
        again = cls.from_pretrained(folder / kind).eval()
        found["same_tensors"] = same_tensors(model.state_dict(), again.state_dict())
        stage = "run after reload"
        found["same_outputs"] = same(call(again, calls), made)
        if generates:
            stage = "generate"
            written = generated(again, calls)
            if not isinstance(written, torch.Tensor):
                raise written
            found["generates"] = True
    except Exception as error:
        found["error"] = f"{stage}: {short(error)}"
    return found


def generated(model: Any, calls: Calls) -> Any:
    """Three more tokens, or the error, or None."""
    if "" not in calls or not getattr(model, "can_generate", lambda: False)():
        return None
    torch.manual_seed(0)
    try:
        made = model.generate(**calls[""], max_new_tokens=3, do_sample=False, pad_token_id=0)
        made = getattr(made, "sequences", made)
        return made if isinstance(made, torch.Tensor) else None
    except Exception as error:
        return error


def share(table: Any) -> float:
    """Numbers in packed weights / numbers in weights of two dimensions and more."""
    sizes = [(torch.Size(row.shape).numel(), row) for row in table.rows if len(row.shape) > 1]
    total = sum(size for size, _ in sizes)
    return sum(size for size, row in sizes if not row.reason) / total if total else 0.0


def distance(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> float | None:
    """||made - wanted|| / ||wanted|| where both are finite and of one shape; an error if new numbers are not finite."""
    pairs = [(a.double(), b.double()) for a, b in zip(made, wanted, strict=False) if a.shape == b.shape]
    if not pairs:
        return None
    a, b = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs, strict=True))
    if bool((b.isfinite() & ~a.isfinite()).any()):
        raise ArithmeticError("the quantized model gives numbers that are not finite, the float model finite ones")
    finite = b.isfinite()
    return float((a - b)[finite].norm() / b[finite].norm().clamp(min=1e-30))


def same(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Whether all numbers are the same; NaN is NaN."""
    return len(made) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e5), b.nan_to_num(7e5))
        for a, b in zip(made, wanted, strict=True)
    )


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names and bits."""
    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype
        and torch.equal(
            a.contiguous().flatten().view(torch.uint8), other[name].contiguous().flatten().view(torch.uint8)
        )
        for name, a in one.items()
        if torch.is_tensor(a)
    )


def short(error: Any) -> str:
    """An error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 300 else f"{text[:297]}..."


def wrong(result: dict[str, Any]) -> str:
    """What quanto_hf does wrong with a family; empty if nothing."""
    if "crash" in result:
        return str(result["crash"])
    for kind, found in result["kinds"].items():
        if "error" in found:
            return f"{kind}: {found['error']}"
        if not found.get("same_tensors", True) or not found.get("same_outputs", True):
            return f"{kind}: another {'output' if found['same_tensors'] else 'tensor'} after reload"
        if len(set(found.get("footprint", ()))) > 1:
            return f"{kind}: footprint and plan {found['footprint']}"
    return ""
