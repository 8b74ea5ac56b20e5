"""After loading: offloaded weights are used where they lie, in place of being copied from a file at each forward pass.

accelerate's hooks open the file of a tensor again for each use, and copy it. Here a file is mapped once. Where the
model runs on the CPU, its parameters are the pages of the file, and no hook is left.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn

from quanto_hf.hf.load.names import split_name
from quanto_hf.hf.offload.prefetch_hook import prefetch
from quanto_hf.io import MappedFiles, aligned
from quanto_hf.schemes import TensorSpec


class MappedWeights(Mapping[str, torch.Tensor]):
    """The tensors that accelerate's hooks ask for by name, from files that are mapped once.

    Args:
        loader: accelerate's own; its index says where a tensor is, and which dtype it has in the model.
        ties: name -> the name of the same tensor in the index.
    """

    def __init__(self, loader: OffloadedWeightsLoader, ties: Mapping[str, str]) -> None:
        self.loader, self.ties, self.files = loader, ties, MappedFiles()
        # At once: save_pretrained removes files of the folder before it has read what it wants to save, which may be
        # these.
        for file in {entry.get("safetensors_file") for entry in loader.index.values()} - {None}:
            self.files.map(file)

    def entry(self, name: str) -> dict[str, str] | None:
        """File, name and dtype of a tensor in a safetensors file; None for one that is elsewhere."""
        index = self.loader.index
        found = index.get(name) or index.get(self.ties.get(name, ""))
        return found if found is not None and found.get("safetensors_file") else None

    def is_in_place(self, name: str) -> bool:
        """Whether the file has the tensor in the dtype of the model, so that its pages can be the parameter."""
        entry = self.entry(name)
        return entry is not None and self._read(name, entry).dtype == getattr(torch, entry["dtype"])

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = None if name in self.loader.state_dict else self.entry(name)
        if entry is None:
            tensor: torch.Tensor = self.loader[name]
            return tensor
        return self._read(name, entry).to(getattr(torch, entry["dtype"]))

    def _read(self, name: str, entry: Mapping[str, str]) -> torch.Tensor:
        return self.files.tensor(entry["safetensors_file"], entry.get("weight_name", name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def offload_hooks(model: nn.Module) -> dict[str, AlignDevicesHook]:
    """Module name -> accelerate's hook that brings its weights in from an index of files."""
    found = {}
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if isinstance(part, AlignDevicesHook) and part.offload and isinstance(part.weights_map, PrefixedDataset):
                if isinstance(part.weights_map.dataset, OffloadedWeightsLoader):
                    found[name] = part
    return found


def folder_of(hooks: Mapping[str, AlignDevicesHook]) -> Any:
    """The ``offload_folder`` that was given to ``from_pretrained``, or None."""
    return next((hook.weights_map.dataset.save_folder for hook in hooks.values()), None)


def add_to_index(
    hooks: Mapping[str, AlignDevicesHook], written: Mapping[str, tuple[str | PathLike[str], TensorSpec]]
) -> None:
    """Tell the hooks where tensors are that were written after they were made."""
    for loader in {id(h.weights_map.dataset): h.weights_map.dataset for h in hooks.values()}.values():
        for name, (file, spec) in written.items():
            dtype = str(spec.dtype).removeprefix("torch.")
            loader.index[name] = {"safetensors_file": str(Path(file)), "weight_name": name, "dtype": dtype}
            if name not in loader.all_keys:
                loader.all_keys.append(name)


def is_on_cpu(hooks: Mapping[str, AlignDevicesHook]) -> bool:
    """Whether every module runs on the CPU."""
    devices = [hook.execution_device for hook in hooks.values()]
    # accelerators are numbers too, and the first one is 0
    return all(d is None or (not isinstance(d, int) and torch.device(d).type == "cpu") for d in devices)


def where_it_runs(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its tensors, and for those that are on meta until they are used
    that of the hook which brings them in."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)
    for part in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if device.type == "meta" and isinstance(part, AlignDevicesHook) and part.execution_device is not None:
            return torch.device(part.execution_device)
    return device


def use_in_place(model: nn.Module, hooks: Mapping[str, AlignDevicesHook], copied: int = 0) -> None:
    """Make offloaded weights parameters that are pages of their files, and take accelerate's hooks away, where a model
    runs on the CPU as a whole. Elsewhere weights are brought to the device ahead of their use.

    A module whose weights have another dtype in the file than in the model keeps its hook: they are converted at each
    use, so that no copy of them stays in memory.

    Args:
        model: with hooks.
        hooks: of :func:`offload_hooks`.
        copied: bytes up to which a float tensor that does not begin at a cache line is copied, to begin at one.
    """
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    weights: dict[int, MappedWeights] = {}
    for hook in hooks.values():
        loader = hook.weights_map.dataset
        mapped = weights.setdefault(id(loader), MappedWeights(loader, ties))
        hook.weights_map = PrefixedDataset(mapped, hook.weights_map.prefix)
    if not is_on_cpu(hooks):
        return prefetch(model, hooks)
    kept = set()
    shared: dict[tuple[str, str], nn.Parameter] = {}
    for name, hook in hooks.items():
        if not _place(model.get_submodule(name), hook, shared, copied):
            kept.add(name)
    for name, module in model.named_modules():
        if name not in kept:
            remove_hook_from_module(module)
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                # accelerate leaves the method that the class has anyway, and some of these cannot be pickled
                del module.forward
    for verb in ("to", "cuda", "xpu", "npu", "mps"):
        if hasattr(model, verb):
            # what accelerate does while its hooks are there
            setattr(model, verb, partial(_stay, model, verb))


def _place(module: nn.Module, hook: AlignDevicesHook, shared: dict[tuple[str, str], nn.Parameter], copied: int) -> bool:
    """Make the tensors on meta of a module pages of files. False: a dtype does not fit, and nothing was changed."""
    prefix, mapped = hook.weights_map.prefix, hook.weights_map.dataset
    tensors = (
        {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if hook.place_submodules
        else {
            **{n: p for n, p in module._parameters.items() if p is not None},
            **{n: b for n, b in module._buffers.items() if b is not None},
        }
    )
    names = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if not all(mapped.is_in_place(prefix + name) for name in names):
        return False
    for name in names:
        owner, leaf = split_name(module, name)
        entry = mapped.entry(prefix + name)
        key = (entry["safetensors_file"], entry.get("weight_name", prefix + name))
        if leaf in owner._buffers:
            owner._buffers[leaf] = mapped[prefix + name]
            continue
        if key not in shared:
            # of the type of the empty one: nn.Parameter, or StoredParameter
            held: Any = type(tensors[name])
            tensor = mapped[prefix + name]
            if tensor.is_floating_point() and tensor.nbytes <= copied:
                tensor = aligned(tensor)
            shared[key] = held(tensor, requires_grad=tensors[name].requires_grad)
        owner._parameters[leaf] = shared[key]
    return True


def _stay(model: nn.Module, verb: str, *args: Any, **kwargs: Any) -> nn.Module:
    """``model.to`` and the like: what does not ask for another device goes on, everything else is refused."""
    device = torch._C._nn._parse_to(*args, **kwargs)[0] if verb == "to" else torch.device(verb)
    if device is not None and device.type != "cpu":
        raise RuntimeError(
            f"model.{verb}(...) would load weights that device_map left on disk to {device}; load the model again with "
            "another device_map, or without one"
        )
    moved: nn.Module = getattr(type(model), verb)(model, *args, **kwargs)
    return moved
