"""``quanto-hf plan``."""

import json
from typing import Annotated, Any

import typer

from quanto_hf.cli.options import DTYPES, WrongUsage, words
from quanto_hf.cli.quantize import parse_overrides
from quanto_hf.cli.show import console, size, table


def plan_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id, float or quantized; a config.json is enough.")],
    weights: Annotated[
        str | None, typer.Option(help="int8, int4, int2, float8 ... Default: int8, or what a quantized model has.")
    ] = None,
    max_memory: Annotated[
        list[str] | None,
        typer.Option(help="6GiB of one device, or 0=20GiB,cpu=64GiB; repeatable. Default: what this machine has."),
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens per sequence in the KV cache; 0 leaves it out.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    device_map: Annotated[
        str, typer.Option(help="As of from_pretrained: auto, balanced, balanced_low_0, sequential, cpu, cuda:0 ...")
    ] = "auto",
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; -1 is whole rows. Default: that of the type.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of modules that stay float; repeatable.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=TYPE: another type, or 'float', for some modules; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays float: auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where the hub is cached. Default: its own place.")] = None,
    subfolder: Annotated[str, typer.Option(help="Of the folder or hub id, in which the model is.")] = "",
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Ask nobody but the cache.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the checkpoint.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a model will take once it is loaded, and whether it fits; no weights are read.

    Exit code 1 means that it does not fit.

    Example: `quanto-hf plan path/to/model --weights int4 --max-memory 6GiB`
    """
    if dtype not in ("auto", *DTYPES):
        raise WrongUsage(f"--dtype {dtype} is not known; choose one of auto, {', '.join(DTYPES)}")
    limits = parse_limits(max_memory or [])
    from quanto_hf import QuantoConfig, plan

    config = None
    if weights or group_size is not None or exclude or override:
        config = QuantoConfig(
            weights=weights or "int8",
            group_size=group_size,
            modules_to_not_convert=exclude,
            overrides=parse_overrides(override or []),
        )
    found = plan(
        *(model, config, limits),
        device_map=device_map,
        context=context,
        batch=batch,
        dtype=dtype,
        revision=revision,
        cache_dir=cache_dir,
        subfolder=subfolder,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show(model, found)
    if not found.fits:
        raise typer.Exit(1)


def parse_limits(given: list[str]) -> Any:
    """What ``--max-memory`` says, as :func:`quanto_hf.plan` takes it.

    Example:
        >>> parse_limits(["6GiB"]), parse_limits(["0=20GiB,cpu=64GiB", "1=8GiB"])
        ('6GiB', {0: '20GiB', 'cpu': '64GiB', 1: '8GiB'})
    """
    items = [word.partition("=") for word in words(given)]
    if len(items) == 1 and not items[0][1]:
        return items[0][0]
    found: dict[int | str, str] = {}
    for device, sign, limit in items:
        if not sign or not device or not limit:
            raise WrongUsage(f"--max-memory {device}{sign}{limit} is not DEVICE=SIZE, such as 0=20GiB or cpu=64GiB")
        found[int(device) if device.isdecimal() else device] = limit
    return found or None


def _show(name: str, found: Any) -> None:
    out = console()
    how = "quantized" if found.quantized else "quantized on loading"
    title = f"{name}: {found.model}, {found.weights} ({how}), {found.dtype}"
    shown = table(title, ["device"], ["weights", "KV cache", "at load", "peak", "limit", "fits"])
    for device in found.devices:
        numbers = (device.weights, device.kv_cache, device.transient, device.peak)
        limit = "-" if device.limit is None else size(device.limit)
        label = f"device {device.device}" if isinstance(device.device, int) else device.device
        fits = "spilled" if device in found.left_over else "yes" if device.fits else "no"
        shown.add_row(label, *map(size, numbers), limit, fits)
    out.print(f"{found.report.packed}", markup=False)
    out.print(shown)
    left = table("left in float", ["reason", "dtype"], ["tensors", "bytes"], ["such as"])
    for reason, dtype, count, nbytes, example in found.left_in_float():
        left.add_row(reason, dtype, f"{count}", size(nbytes), example)
    out.print(left)
    cache, (layer, nbytes) = found.kv_cache, found.largest
    lines = [
        f"all weights: {size(found.nbytes)}; the parameters in {found.dtype}: {size(found.float_bytes)}",
        f"largest layer: {layer}, {size(nbytes)}",
        f"KV cache of {cache.batch} x {cache.context} tokens: {size(cache.nbytes)} ({cache.assumed})",
    ]
    if found.transient.nbytes:
        lines.append(
            f"on an accelerator, quantizing {found.transient.layer} takes {size(found.transient.nbytes)} for a moment"
        )
    if found.transient.cpu_nbytes:
        lines.append(
            f"on the CPU, quantizing {found.transient.cpu_layer} takes {size(found.transient.cpu_nbytes)} for a while"
        )
    lines += [f"with {weights}: {size(total)}" for weights, (total, _) in found.others.items()]
    for line in [*lines, *found.notes, found.verdict()]:
        out.print(line, markup=False)
