"""``save_pretrained`` of transformers models with quantized layers: it writes what ``from_pretrained`` can load, and
leaves the model that was in the folder alone until it is done."""

import functools
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.save.composite import described, is_described, is_ours, quantized_layers
from quanto_hf.hf.save.rescaled import scaled_back
from quanto_hf.io import save_whole
from quanto_hf.nn.saved_by import when_layers_are_made

# what save_pretrained has for arguments, by position
ARGUMENTS = ("save_directory", "is_main_process", "state_dict", "push_to_hub")
# the position of save_original_format among them
ORIGINAL_FORMAT = 8
MODELING = "transformers.modeling_utils"

# models that are written into a work folder, by id
_whole: ContextVar[frozenset[int]] = ContextVar("quanto_hf_whole", default=frozenset())
# the state dict that was given to save_pretrained
_given: ContextVar[Mapping[str, Any] | None] = ContextVar("quanto_hf_given", default=None)


def watch_saving() -> bool:
    """Let every model of transformers that holds quantized layers be saved with a config that describes them, and
    through :func:`save_whole`; others are saved as before.

    In the classes, not in the model: a model may be a part of another one, which is saved by its own class; and an
    attribute of a model that knows the model would keep it in memory until Python looks for circles. Classes with a
    ``save_pretrained`` of their own, which may write more files, are watched as well if they exist now; for others that
    of the base class is.

    Returns:
        Whether transformers' models have been imported, so that there is something to watch.
    """
    base: Any = getattr(sys.modules.get(MODELING), "PreTrainedModel", None)
    todo = [] if base is None else [base]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        save = vars(cls).get("save_pretrained")
        if callable(save) and not getattr(save, "saves_whole", False):
            cls.save_pretrained = _watched(save, cls is base)
        if "_upload_modified_files" in vars(cls) or cls is base:
            _complete_cards(cls)
    return base is not None


def _watched(save: Any, is_base: bool) -> Any:
    @functools.wraps(save)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_described(model):
            return save(model, *args, **kwargs)
        with described(model), scaled_back(model), _split(model):
            given = _argument("state_dict", args, kwargs) if is_base else None
            if given is None:
                return _save_whole(save, model, args, kwargs)
            _refuse_other_state(model, given)
            mark = _given.set(given)
            try:
                return _save_whole(save, model, args, kwargs)
            finally:
                _given.reset(mark)

    save_pretrained.saves_whole = True  # type: ignore[attr-defined]
    return save_pretrained


def _split(model: Any) -> AbstractContextManager[None]:
    from quanto_hf.hf.load.expert_names import split_on_saving

    return split_on_saving(model)


def given_state() -> dict[str, Any] | None:
    """The ``state_dict`` that was given to the ``save_pretrained`` that is running: transformers hands it to no
    quantizer."""
    given = _given.get()
    return None if given is None else dict(given)


def _save_whole(save: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    folder = _argument("save_directory", args, kwargs)
    main = _argument("is_main_process", args, kwargs, True)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    inner = id(model) in _whole.get()
    # other processes write the rest, or transformers says that this is a file
    if folder is None or inner or not main or several or os.path.isfile(folder):
        return save(model, *args, **kwargs)
    if is_ours(model) and not getattr(model, "_hf_peft_config_loaded", False) and len(args) <= ORIGINAL_FORMAT:
        from quanto_hf.hf.save.saved_names import choose_original_names

        asked = kwargs.get("save_original_format", True)
        if choose_original_names(model, asked) != asked:
            kwargs["save_original_format"] = False
    if _argument("push_to_hub", args, kwargs):
        # transformers would take the name of the folder that it is given
        kwargs.setdefault("repo_id", Path(folder).name)
    results = []

    def write(work: Path) -> None:
        if args:
            results.append(save(model, work, *args[1:], **kwargs))
        else:
            results.append(save(model, **{**kwargs, "save_directory": work}))
        if is_ours(model):
            from quanto_hf.hf.save.own_files import complete_files

            complete_files(work)

    mark = _whole.set(_whole.get() | {id(model)})
    try:
        save_whole(folder, write)
    finally:
        _whole.reset(mark)
    return results[0]


def _argument(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], default: Any = None) -> Any:
    position = ARGUMENTS.index(name)
    return args[position] if len(args) > position else kwargs.get(name, default)


def _refuse_other_state(model: Any, state: Mapping[str, Any]) -> None:
    """Raise ValueError for a state dict that is not one of these layers: its tensors would be taken for theirs."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return  # the adapter alone is saved
    for name, layer in quantized_layers(model).items():
        prefix = f"{name}." if name else ""
        floats = [slot.name for slot in layer.slots]
        names = layer.stored_names if layer.is_frozen else floats
        missing = [leaf for leaf in names if prefix + leaf not in state]
        # an empty one is no weight
        beside = [leaf for leaf in floats if (held := state.get(prefix + leaf)) is not None and 0 not in held.shape]
        if missing or (layer.is_frozen and beside):
            wrong = f"has no {prefix}{missing[0]}" if missing else f"has a float {prefix}{beside[0]}"
            raise ValueError(
                f"the state_dict given to save_pretrained {wrong}, but {name} is {layer.scheme}; give the one of the "
                f"quantized model, or none, or call quanto_hf.dequantize(model) before you save float weights"
            )


def _complete_cards(cls: Any) -> None:
    """Have the models of a class say in their cards that they are quantized: transformers makes a card last of all, and
    then uploads the folder."""
    upload = cls._upload_modified_files
    if getattr(upload, "completes_cards", False):
        return

    @functools.wraps(upload)
    def upload_modified_files(model: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), QuantoConfig):
            from quanto_hf.hf.save.card import complete_card

            complete_card(model, Path(working_dir))
        return upload(model, working_dir, *args, **kwargs)

    upload_modified_files.completes_cards = True  # type: ignore[attr-defined]
    cls._upload_modified_files = upload_modified_files


# also for layers that were unpickled, or made by requantize
when_layers_are_made(watch_saving)
