"""``quanto-hf kernels``."""

import json
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from quanto_hf.cli.aqlm_kernels import Asked, aqlm_ops, check_aqlm_kernels
from quanto_hf.cli.machine import lines, machine
from quanto_hf.cli.options import WrongUsage, features, float_dtype, schemes, whole_numbers, words
from quanto_hf.cli.show import console, table

if TYPE_CHECKING:
    import torch

    from quanto_hf.qtypes import QType
    from quanto_hf.schemes import Aqlm, Grouped, Scheme

# not an op: a layer asks for it with activations="int8"
INT8_LINEAR = "linear, int8 x"
# columns that are two groups at least
TWO_GROUPS = 512
# the ops that rows of the input mean nothing to
WITHOUT_X = ("dequantize", "embedding", "aqlm_dequantize")


def kernels(
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Number types, and AQLM layouts such as aqlm-2x8, with commas or repeated. Default: all of them."
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; -1 is whole rows. Default: that of the type.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the input: float32, bfloat16 or float16.")] = "bfloat16",
    rows: Annotated[str, typer.Option(help="Rows of the input.")] = "1,128",
    size: Annotated[str, typer.Option("--features", help="Rows and columns of the weight, OUTxIN.")] = "4096x4096",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which kernel runs on this machine, and for every other one the sentence why not.

    Then each native kernel is compared with the reference, as it is before its first use; exit code 1 if one disagrees.

    Example: `quanto-hf kernels --weights int4`
    """
    kind, shape, counts = float_dtype(dtype), features(size), whole_numbers("--rows", [rows])
    asked = schemes(weights, group_size)
    if words(weights):
        for reason in filter(None, (scheme.refuses(shape) for scheme in asked)):
            raise WrongUsage(f"--features {size}: {reason}")
    asked = [scheme for scheme in asked if scheme.refuses(shape) is None]
    found = machine()
    choices = [row for scheme in asked for row in explain(scheme, kind, shape, counts)]
    checks: list[dict[str, Any]] = []
    if found["native"]:
        checks = [row for scheme in asked if (row := check(scheme, kind)) is not None]
    if as_json:
        print(json.dumps({"machine": found, "kernels": choices, "checks": checks}, indent=2))
    else:
        out = console()
        for line in lines(found):
            out.print(line, markup=False)
        out.print(choices_table(choices, f"x of {dtype}, a weight of {size}"))
        if checks:
            out.print(checks_table(checks, dtype))
        else:
            out.print("There are no native kernels to check.")
    if not all(row["passed"] for row in checks):
        raise typer.Exit(1)


def explain(scheme: "Scheme", dtype: "torch.dtype", shape: tuple[int, int], counts: list[int]) -> list[dict[str, Any]]:
    """A row for each op, and for linear layers with int8 activations, and for each number of rows of x if it makes a
    difference."""
    from quanto_hf.qtypes import qint8
    from quanto_hf.schemes import Grouped

    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
    for count in counts:
        asked = (
            grouped_ops(scheme, dtype, shape, count)
            if isinstance(scheme, Grouped)
            else aqlm_ops(cast("Aqlm", scheme), dtype, shape, count)
        )
        for op, arguments in asked:
            op.check(*arguments)
            found.setdefault((op.name, tuple(op.explain(*arguments))), []).append(count)
        if not isinstance(scheme, Grouped):
            continue
        reason = why_not_activations(scheme, shape, dtype, count, qint8)
        said = [("native_int8", reason or "runs")]
        said += [("rounding, linear", "runs" if reason else "a kernel before it runs")]
        found.setdefault((INT8_LINEAR, tuple(said)), []).append(count)
    # op by op, not row count by row count
    order = list(dict.fromkeys(name for name, _ in found))
    return [
        {
            "weights": str(scheme),
            "op": name,
            "rows": [] if name in WITHOUT_X else rows,
            "runs": next(kernel for kernel, said in said_of if said == "runs"),
            "others": {kernel: said for kernel, said in said_of if said != "runs"},
        }
        for (name, said_of), rows in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    ]


def grouped_ops(scheme: "Grouped", dtype: "torch.dtype", shape: tuple[int, int], count: int) -> list[Asked]:
    """The ops of a number type, as :func:`aqlm_ops` has those of a layout."""
    import torch

    from quanto_hf.ops import (
        dequantize,
        embedding_op,
        expert_linear_grad_input,
        expert_linear_op,
        linear_grad_input,
        linear_op,
    )

    def stored(shape: tuple[int, ...]) -> tuple["torch.Tensor | None", ...]:
        # only shapes and dtypes are looked at
        made = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in scheme.tensors(shape, dtype).items()}
        return made["packed"], made["scale"], made.get("zero")

    weight, weights = stored(shape), stored((2, *shape))
    rest = (scheme.qtype, scheme.group_size)
    x, grad = (torch.empty(count, width, dtype=dtype) for width in (shape[1], shape[0]))
    ids = torch.zeros(count, dtype=torch.int64)
    return [
        (linear_op, (x, *weight, None, *rest)),
        (dequantize, (*weight, *rest, shape[1], dtype)),
        (embedding_op, (ids, *weight, *rest, shape[1], dtype)),
        (linear_grad_input, (grad, *weight, *rest, shape[1])),
        (expert_linear_op, (x, ids, *weights, None, *rest)),
        (expert_linear_grad_input, (grad, ids, *weights, *rest, shape[1])),
    ]


def why_not_activations(
    scheme: "Grouped", shape: tuple[int, int], dtype: "torch.dtype", count: int, activations: "QType"
) -> str | None:
    """Why x is rounded on its own and then multiplied, or None: one native kernel does both."""
    from quanto_hf.ops.cpu.int8 import why_not_int8
    from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS

    weight = (scheme.qtype, scheme.group_size, not scheme.symmetric, scheme.scale_type.dtype)
    return why_not_int8(*weight, shape[1], dtype, count > GEMV_ROWS, activations.name)


def check(scheme: "Scheme", dtype: "torch.dtype") -> dict[str, Any] | None:
    """The self-check of the native kernels of a scheme: few rows of x, many, and int8 activations (None: no kernel).
    None if it has no native kernels."""
    from quanto_hf.schemes import Grouped

    if not isinstance(scheme, Grouped):
        return check_aqlm_kernels(cast("Aqlm", scheme), dtype)
    if not scheme.has_kernels:
        return None
    from quanto_hf.ops.cpu.int8 import int8_error, refuses_int8, why_int8_wrong
    from quanto_hf.ops.cpu.library import NATIVE
    from quanto_hf.ops.cpu.selfcheck import TOLERANCE, errors, why_experts_wrong, why_wrong

    assert NATIVE is not None
    key = (scheme.qtype, scheme.group_size, not scheme.symmetric, scheme.scale_type.dtype, dtype)
    said = [sentence for many in (False, True) if (sentence := why_wrong(NATIVE.level(), *key, many))]
    said += filter(None, [why_experts_wrong(NATIVE.level())])
    int8 = None
    if refuses_int8(*key[:3], TWO_GROUPS, "int8") is None:
        said += [sentence for many in (False, True) if (sentence := why_int8_wrong(NATIVE.level(), *key, many))]
        int8 = max(int8_error(*key, many) for many in (False, True))
    (weight, few), (_, many) = errors(*key, False), errors(*key, True)
    return {
        "weights": str(scheme),
        "passed": not said,
        "said": said,
        "dequantize_error": weight,
        "few_rows_error": few,
        "many_rows_error": many,
        "int8_activations_error": int8,
        "tolerance": TOLERANCE[dtype],
    }


def choices_table(choices: list[dict[str, Any]], title: str) -> Any:
    """What runs, and why nothing else."""
    made = table(title, ["weights", "op", "rows of x", "runs", "why not the others"], [])
    before = None
    for row in choices:
        if before not in (None, row["weights"]):
            made.add_section()
        by_sentence: dict[str, list[str]] = {}
        for kernel, said in row["others"].items():
            by_sentence.setdefault(said, []).append(kernel)
        others = "\n".join(f"{', '.join(names)}: {said}" for said, names in by_sentence.items())
        counts = ", ".join(map(str, row["rows"])) or "any"
        made.add_row("" if row["weights"] == before else row["weights"], row["op"], counts, row["runs"], others)
        before = row["weights"]
    return made


def checks_table(checks: list[dict[str, Any]], dtype: str) -> Any:
    """What the self-checks found."""
    from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS, WEIGHT_TOLERANCE

    allowed = f"allowed: {WEIGHT_TOLERANCE:.0e} and {checks[0]['tolerance']:.0e}"
    made = table(
        f"self-check of the native kernels, errors against the reference in {dtype}; {allowed}",
        ["weights"],
        ["dequantize", f"linear, to {GEMV_ROWS} rows", "linear, more rows", INT8_LINEAR],
        ["result"],
    )
    for row in checks:
        errors = (row["dequantize_error"], row["few_rows_error"], row["many_rows_error"], row["int8_activations_error"])
        made.add_row(
            row["weights"],
            *("" if error is None else f"{error:.1e}" for error in errors),
            "pass" if row["passed"] else "FAIL",
        )
    return made
