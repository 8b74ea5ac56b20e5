"""What was saved loads: the names in a saved model are tried before anything is written.

transformers gives tensors the names of the original checkpoint when it saves, by rules that were made for float
weights: a packed one may get a name that the rules for loading do not lead back to the layer.
"""

from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from quanto_hf.hf.load.checking import check_before_loading
from quanto_hf.hf.load.expert_names import packed_conversions
from quanto_hf.io import CheckpointError
from quanto_hf.schemes import TensorSpec


def choose_original_names(model: Any, asked: bool = True) -> bool:
    """Which names a model is to be saved with: those of the original checkpoint if they load, else those of the model.

    Args:
        model: quantized, with its weights anywhere.
        asked: ``save_original_format`` of ``save_pretrained``.

    Returns:
        The value of ``save_original_format`` to save with.

    Raises:
        CheckpointError: neither names load; all tensors that would be lost are named.
    """
    # it is being imported when it imports transformers' quantizers, and they this
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    state = remove_tied_weights_from_state_dict(state, model)
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    problem = _why_not_loaded(model, empty, asked)
    if problem is None:
        return asked
    if asked and _why_not_loaded(model, empty, False) is None:
        return False
    raise CheckpointError(
        f"{type(model).__name__} is not saved, because it could not be loaded again with the names that transformers "
        f"gives its tensors. Leave the modules that are named below in float (modules_to_not_convert): {problem}"
    )


def _why_not_loaded(model: Any, state: dict[str, torch.Tensor], original: bool) -> CheckpointError | None:
    try:
        saved = revert_weight_conversion(model, state) if original else state
    except Exception:
        # an operation that needs values; what becomes of it is seen when it is saved
        return None
    headers = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    try:
        conversions = get_model_conversion_mapping(model)
        conversions += packed_conversions(conversions, model)
        check_before_loading(model, headers, conversions, True, complete=True)
    except CheckpointError as problem:
        return problem
    return None
