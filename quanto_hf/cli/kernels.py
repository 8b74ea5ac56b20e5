"""``quanto-hf kernels``."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quanto_hf.cli.machine import lines, machine
from quanto_hf.cli.options import WrongUsage, features, float_dtype, schemes, whole_numbers, words
from quanto_hf.cli.show import console, table

if TYPE_CHECKING:
    import torch

    from quanto_hf.ops.registry import Op
    from quanto_hf.schemes import Scheme

Asked = tuple["Op", tuple[Any, ...]]

# what a layer with activations="int8" asks for: the op linear_rounded
INT8_LINEAR = "linear, int8 x"
NAMES = {"linear_rounded": INT8_LINEAR}
# the ops that rows of the input mean nothing to
WITHOUT_X = ("dequantize", "embedding", "quantize")


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
        checks = [row for scheme in asked if (row := check(scheme, kind, shape)) is not None]
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
    """A row for each op, and for each number of rows of x if it makes a difference."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
    for count in counts:
        for op, arguments in ops_of(scheme, dtype, shape, count):
            op.check(*arguments)
            found.setdefault((op.name, tuple(op.explain(*arguments))), []).append(count)
    # op by op, not row count by row count
    order = list(dict.fromkeys(name for name, _ in found))
    return [
        {
            "weights": str(scheme),
            "op": NAMES.get(name, name),
            "rows": [] if name in WITHOUT_X else rows,
            "runs": next(kernel for kernel, said in said_of if said == "runs"),
            "others": {kernel: said for kernel, said in said_of if said != "runs"},
        }
        for (name, said_of), rows in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    ]


def ops_of(scheme: "Scheme", dtype: "torch.dtype", shape: tuple[int, int], count: int) -> list[Asked]:
    """The ops of a scheme with arguments of which only shapes and dtypes are looked at.

    Args:
        dtype: of x, and of the float weight.
        shape: of the weight.
        count: rows of x.
    """
    import torch

    from quanto_hf.ops import (
        GroupedWeight,
        dequantize_op,
        embedding_op,
        expert_linear_grad_input,
        expert_linear_op,
        linear_grad_input,
        linear_op,
        linear_rounded_op,
        quantize_op,
    )
    from quanto_hf.schemes import Grouped
    from quanto_hf.schemes.quantizing import recipe

    def stored(shape: tuple[int, ...]) -> Any:
        made = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in scheme.tensors(shape, dtype).items()}
        return scheme.weight(made, shape[-1])

    weight = stored(shape)
    if weight is None:
        return []
    x, grad = (torch.empty(count, width, dtype=dtype) for width in (shape[1], shape[0]))
    ids = torch.zeros(count, dtype=torch.int64)
    asked: list[Asked] = [
        (linear_op, (x, weight, None)),
        (linear_rounded_op, (x, weight, None, "int8", None)),
        (dequantize_op, (weight, dtype)),
        (embedding_op, (ids, weight, dtype)),
        (linear_grad_input, (grad, weight)),
    ]
    if isinstance(weight, GroupedWeight):
        experts = stored((2, *shape))
        asked += [(expert_linear_op, (x, ids, experts, None)), (expert_linear_grad_input, (grad, ids, experts))]
    if isinstance(scheme, Grouped):
        rows = torch.empty(shape, dtype=dtype)
        asked.append((quantize_op, (rows, weight, recipe(scheme, scheme.default_fit()))))
    return asked


def chosen_kernel(op: "Op", arguments: tuple[Any, ...]) -> str:
    """The name of the kernel that runs."""
    return next(kernel for kernel, said in op.explain(*arguments) if said == "runs")


def check(scheme: "Scheme", dtype: "torch.dtype", shape: tuple[int, int]) -> dict[str, Any] | None:
    """The self-checks of all kernels of a scheme that have one, for few rows of x and for many. Errors are None where
    there is no such kernel. None if there is none at all."""
    from quanto_hf.ops.selfcheck import FEW_ROWS, TOLERANCE, neutral_settings

    said: list[str] = []
    worst: dict[str, float | None] = dict.fromkeys(("dequantize", "few_rows", "many_rows", "int8_activations"))
    for count, rows in ((1, "few_rows"), (FEW_ROWS + 1, "many_rows")):
        columns = {"dequantize": "dequantize", "linear": rows, "linear_rounded": "int8_activations"}
        for op, arguments in ops_of(scheme, dtype, shape, count):
            for kernel in op.kernels_for(arguments[op.at]):
                if kernel.label is None or kernel.supports(*arguments) is not None:
                    continue
                case = op.case(*arguments)
                if (sentence := op.why_wrong(kernel, case)) is not None and sentence not in said:
                    said.append(sentence)
                if (name := columns.get(op.name)) is not None:
                    with neutral_settings():
                        worst[name] = max(worst[name] or 0.0, *(error for error, _ in op.errors(kernel.run, *case)))
    if not said and all(error is None for error in worst.values()):
        return None
    errors = {f"{name}_error": error for name, error in worst.items()}
    return {"weights": str(scheme), "passed": not said, "said": said, **errors, "tolerance": TOLERANCE[dtype]}


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
    from quanto_hf.ops.selfcheck import FEW_ROWS, WEIGHT_TOLERANCE

    allowed = f"allowed: {WEIGHT_TOLERANCE:.0e} and {checks[0]['tolerance']:.0e}"
    made = table(
        f"self-check of the native kernels, errors against the reference in {dtype}; {allowed}",
        ["weights"],
        ["dequantize", f"linear, to {FEW_ROWS} rows", "linear, more rows", INT8_LINEAR],
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
