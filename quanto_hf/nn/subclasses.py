"""Subclasses of registered types: which compute what their base does, and their quantized classes."""

import dis
import inspect
import types
from typing import Any

import torch
from torch import nn

from quanto_hf.nn.slots import LEFT, WEIGHT

# what the forward pass of a linear layer may read
READ = frozenset({WEIGHT, "bias", "in_features", "out_features", "training"})
# attributes of nn.Module itself, and a mark of transformers
MODULE = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}
# what else hangs on a module that is not handed on: hooks of accelerate, which know the module that they run
HOOKS = frozenset({"forward", "_old_forward", "_hf_hook", LEFT})
# what of a weight can be read without its numbers
DESCRIBES = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"})
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ROWS, COLUMNS = 5, 12


def why_not_equivalent(
    module: nn.Module,
    source: type[nn.Module],
    slots: tuple[str, ...] = (WEIGHT,),
    keeps_forward: bool = False,
) -> str | None:
    """Why a module does not compute what ``source`` does from weight, bias and input alone, or None if it does.

    It is tried out: the forward pass of a linear subclass runs on small numbers, in training and in eval mode. What it
    reads besides weight and bias may change later, and is a reason.

    Args:
        module: of the type ``source`` or of a subclass; may be on meta.
        source: ``nn.Linear``, or another type.
        slots: names of the parameters that are quantized.
        keeps_forward: whether the quantized class of a subclass runs the forward pass of the subclass, which may then
            do anything with what ``super().forward`` gives; only the numbers of the weight it may not read itself.
    """
    kind = type(module)
    patched = vars(module).get("forward")
    if patched is not None and "_hf_hook" not in vars(module):
        return "its forward is replaced, by an attribute of the module"
    for slot in slots:
        if slot not in module._parameters:
            # gone: of a weight norm, or pruned
            return f"its {slot} is computed from other parameters (a weight norm, pruning): make it one first"
        if module._parameters[slot] is None:
            return f"it has no {slot}"
    if kind is source:
        return None
    if isinstance(module._parameters[slots[0]], nn.UninitializedParameter):
        return "its shape is not known before its first forward pass"
    name, own = kind.__name__, {*module._parameters, *module._buffers, *module._modules} - {*slots, "bias"}
    if own and not keeps_forward:
        return f"{name} has more than a weight and a bias: {', '.join(sorted(own))}"
    if kind.__call__ is not nn.Module.__call__:
        return f"{name} has a __call__ of its own"
    if _same_forward(kind, source):
        return None
    if keeps_forward and getattr(kind, WEIGHT, None) is getattr(source, WEIGHT, None):
        return _why_not_kept(kind, source)
    if source is not nn.Linear:
        return f"{name} has a forward of its own"
    return _why_not_linear(module)


def _same_forward(kind: type[nn.Module], source: type[nn.Module]) -> bool:
    """Whether all methods by which a module of torch computes are inherited."""
    return all(
        getattr(kind, name, None) is getattr(source, name, None) for name in ("forward", "_conv_forward", WEIGHT)
    )


def _why_not_kept(kind: type[nn.Module], source: type[nn.Module]) -> str | None:
    """Why a forward pass cannot run above that of the quantized class: it does not call ``super().forward``, or it
    reads the numbers of the weight, all of which would be dequantized for it. Dtype, device and shape cost nothing."""
    reads = False
    for cls in kind.__mro__[: kind.__mro__.index(source)]:
        if "forward" not in vars(cls):
            continue
        code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
        if code is None or "__class__" not in code.co_freevars or "forward" not in code.co_names:
            return f"{kind.__name__} has a forward of its own, which does not call super().forward"
        reads = reads or _reads_weight(code)
    return f"the forward of {kind.__name__} reads its weight itself" if reads else None


def _reads_weight(code: types.CodeType) -> bool:
    """Whether a method reads the attribute ``weight`` for more than its dtype, device or shape."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP", "EXTENDED_ARG")]
    return any(
        step.argval == WEIGHT and step.opname.startswith("LOAD_") and following.argval not in DESCRIBES
        for step, following in zip(steps, [*steps[1:], steps[-1]], strict=True)
        if step.opname != "LOAD_CONST"
    )


def _why_not_linear(module: nn.Module) -> str | None:
    """The same for a subclass of ``nn.Linear`` with a forward of its own."""
    kind = type(module)
    try:
        inputs = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return f"the forward of {kind.__name__} has no signature"
    if len(inputs) != 1 or inputs[0].kind not in POSITIONAL:
        return f"the forward of {kind.__name__} takes more than one input"
    try:
        read = _run_twice(module)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"the forward of {kind.__name__} does not run on a small weight ({type(error).__name__}: {first[:80]})"
    if read is None:
        return f"the forward of {kind.__name__} is not that of {nn.Linear.__name__}"
    if read:
        return f"the forward of {kind.__name__} reads {', '.join(sorted(read))}"
    return None


def _run_twice(module: nn.Module) -> set[str] | None:
    """What the forward pass reads besides weight and bias; None if it is not that of a linear layer."""
    read: set[str] = set()
    probe = _probe(module, read)
    # no random numbers: those of the user stay as they are
    x = torch.linspace(-1, 1, 2 * 3 * COLUMNS, dtype=torch.float32, device="cpu").view(2, 3, COLUMNS).sin()
    for shape in ((2, 3, COLUMNS), (6, COLUMNS), (COLUMNS,)):
        for training in (False, True):
            probe.training = training
            given = x.reshape(-1)[: torch.Size(shape).numel()].view(shape)
            before = given.clone()
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                made = type(module).forward(probe, given)
                wanted = nn.functional.linear(before, probe._parameters[WEIGHT], probe._parameters["bias"])
            if not isinstance(made, torch.Tensor) or made.shape != wanted.shape or made.dtype != wanted.dtype:
                return None
            if not torch.equal(given, before) or not torch.allclose(made, wanted, rtol=1e-5, atol=1e-6):
                return None
    return read


def _probe(module: nn.Module, read: set[str]) -> Any:
    """A small module of the same class, on the CPU, that notes the attributes that are read."""
    kind: Any = type(module)

    class Probe(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("__") and name not in READ | MODULE and not _is_method(kind, name):
                read.add(name)
            return super().__getattribute__(name)

    probe: Any = Probe.__new__(Probe)
    nn.Module.__init__(probe)
    vars(probe).update({name: value for name, value in vars(module).items() if name not in MODULE})
    vars(probe).update(in_features=COLUMNS, out_features=ROWS)
    bias = module._parameters.get("bias") is not None
    for name, size in ((WEIGHT, (ROWS, COLUMNS)), ("bias", (ROWS,))):
        values = torch.linspace(0.1, 3, torch.Size(size).numel(), dtype=torch.float32, device="cpu").cos().view(size)
        probe._parameters[name] = nn.Parameter(values) if name == WEIGHT or bias else None
    read.clear()
    return probe


def _is_method(kind: type, name: str) -> bool:
    """Whether a class has a method of this name, or a property, which reads what it reads."""
    held = inspect.getattr_static(kind, name, None)
    return isinstance(held, types.FunctionType | staticmethod | classmethod | property)


# ------------------------------------------------------------------------------------------- quantized subclasses


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beyond those of nn.Module, by its class or its user: it is handed on with the parameters."""
    return {name: value for name, value in vars(module).items() if name not in MODULE | HOOKS}


_MADE: dict[tuple[type, type, type], type] = {}


def subclassed(quantized: type[nn.Module], source: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The quantized module of a subclass: of both classes, so that its methods and ``isinstance`` go on working.

    A quantized class with ``keeps_forward`` stands below a subclass with a forward pass of its own, whose
    ``super().forward`` it then is; of other methods its own ones count all the same.

    Args:
        quantized: what was registered for ``source``: a subclass of it, or a mixin.
        source: the base that has one.
        kind: ``source`` itself, or an equivalent subclass.
    """
    if issubclass(quantized, kind):
        return quantized
    if (made := _MADE.get((quantized, source, kind))) is not None:
        return made
    names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": f"Q{kind.__name__}", "__doc__": None}
    names["made_of"], names["__reduce_ex__"] = (quantized, source, kind), _reduce
    argument = _first_input(kind)
    bases: tuple[type, ...] = (quantized, kind)
    renamed = _first_input(quantized) == "input" and argument != "input"
    if argument is not None and renamed and not getattr(quantized, "keeps_forward", False):
        names["forward"] = _forward_by(quantized, argument)
    elif getattr(quantized, "keeps_forward", False) and not _same_forward(kind, source):
        bases, names = (kind, quantized), {**_methods(quantized, kind, source), **names}
    # the first one, if another thread has made one too
    return _MADE.setdefault((quantized, source, kind), type(f"Q{kind.__name__}", bases, names))


def _methods(quantized: type, kind: type, source: type) -> dict[str, Any]:
    """What a quantized class and a subclass of its source both have, as the quantized class has it; forward aside."""
    ours, theirs = (
        {name for cls in found.__mro__ if cls not in source.__mro__ for name in vars(cls)}
        for found in (quantized, kind)
    )
    both = {name for name in ours & theirs if not name.startswith("__")} - {"forward"}
    return {name: inspect.getattr_static(quantized, name) for name in both}


def source_class(quantized: type[nn.Module]) -> type[nn.Module]:
    """The class of the float modules that a quantized class stands for."""
    made_of: Any = getattr(quantized, "made_of", None)
    if made_of is not None:
        kind: type[nn.Module] = made_of[2]
        return kind
    source: type[nn.Module] = quantized.stands_for  # type: ignore[attr-defined]
    return source


def _first_input(cls: type[nn.Module]) -> str | None:
    """Name of the first input of a forward pass; None where there is none, or no forward pass, as in some mixins."""
    inputs = list(inspect.signature(cls.forward).parameters.values())[1:2]
    return inputs[0].name if inputs and inputs[0].kind in POSITIONAL else None


def _forward_by(quantized: Any, argument: str) -> Any:
    """A forward pass whose input has another name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if argument in kwargs:
            kwargs["input"] = kwargs.pop(argument)
        return quantized.forward(self, *args, **kwargs)

    return forward


def _reduce(self: Any, protocol: Any) -> Any:
    # the class is made when it is wanted, and found under no name
    return _empty, type(self).made_of, self.__getstate__()


def _empty(*made_of: Any) -> Any:
    cls = subclassed(*made_of)
    return cls.__new__(cls)
