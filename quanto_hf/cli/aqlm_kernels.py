"""What ``quanto-hf kernels`` says about AQLM layouts: their ops, and their self-check."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from quanto_hf.ops.registry import Op
    from quanto_hf.schemes import Aqlm

Asked = tuple["Op", tuple[Any, ...]]


def aqlm_ops(scheme: "Aqlm", dtype: "torch.dtype", shape: tuple[int, int], count: int) -> list[Asked]:
    """The ops of a layout with arguments of which only shapes and dtypes are looked at.

    Args:
        dtype: of x, codebooks and scales.
        shape: of the weight.
        count: rows of x.
    """
    import torch

    from quanto_hf.ops import aqlm_dequantize_op, aqlm_linear_grad_input, aqlm_linear_op

    specs = scheme.tensors(shape, dtype)
    weight = tuple(torch.empty(specs[name].shape, dtype=specs[name].dtype) for name in scheme.names)
    x, grad = (torch.empty(count, width, dtype=dtype) for width in (shape[1], shape[0]))
    return [
        (aqlm_linear_op, (x, *weight, None)),
        (aqlm_dequantize_op, (*weight, dtype)),
        (aqlm_linear_grad_input, (grad, *weight)),
    ]


def check_aqlm_kernels(scheme: "Aqlm", dtype: "torch.dtype") -> dict[str, Any]:
    """The self-check of the native kernels of a layout, for few rows of x and for many."""
    import torch

    from quanto_hf.ops.cpu.aqlm import aqlm_errors, check_of, why_aqlm_wrong
    from quanto_hf.ops.cpu.library import NATIVE
    from quanto_hf.ops.cpu.selfcheck import TOLERANCE

    assert NATIVE is not None
    books = torch.empty(scheme.num_codebooks, 1 << scheme.nbits, scheme.out_group, scheme.in_group, dtype=dtype)
    key = (*check_of(books), dtype, scheme.out_group, scheme.in_group)
    said = [sentence for many in (False, True) if (sentence := why_aqlm_wrong(NATIVE.level(), *key, many))]
    (weight, few), (_, many_rows) = aqlm_errors(*key, False), aqlm_errors(*key, True)
    return {
        "weights": str(scheme),
        "passed": not said,
        "said": said,
        "dequantize_error": weight,
        "few_rows_error": few,
        "many_rows_error": many_rows,
        "int8_activations_error": None,
        "tolerance": TOLERANCE[dtype],
    }
