"""docs/models.md: what is quantized of each family, from the results of the two walks."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import transformers

from .life import wrong

HEAD = """# Which models, and how much of them

Every family of models of transformers {version}, written by `python -m tests.zoo` from a walk through all of them.
"Packed" is the share of the numbers in matrices, convolutions included, that are stored in fewer bits, at the published
size of the family (the default config of transformers), with {columns}.
"Life" is that of a tiny random model with the same parts: it is quantized while it loads, runs, its footprint is what
`plan` says, and it is saved and reloaded with the same tensors and outputs, in int4, and in int8 with embeddings in
int8; "gen" means that it generates as well.

## Twelve published models

`python benchmarks/published_sizes.py`

{sizes}

## All families

| | families |
|---|---|
{summary}

## What stays float, and why

| why | families | largest share |
|---|---|---|
{reasons}

## The families

Of what stays float, kinds above half a percent are listed.

| family | class | parameters | {heads} | stays float | life |
|---|---|---|{dashes}|---|---|
{rows}
"""


def page(tiny: Path, published: Path, before: str = "") -> str:
    """The page.

    Args:
        tiny: what ``python -m tests.zoo tiny --out`` wrote.
        published: the same of ``published``.
        before: the page as it was, whose table of published models stays.
    """
    lives, plans = _read(tiny), _read(published)
    # the table of another command, which goes on from here
    sizes = re.search(r"published_sizes\.py`\n\n((\|.*\n)*)", before)
    kinds = list(dict.fromkeys(kind for plan in plans.values() for kind in plan["kinds"]))
    rows = [_row(name, lives.get(name, {}), plans.get(name, {}), kinds) for name in sorted({*lives, *plans})]
    return HEAD.format(
        sizes=sizes[1].strip() if sizes else "| |\n|---|",
        version=transformers.__version__,
        columns=" and with ".join(f"`{kind}`" for kind in kinds),
        summary="\n".join(_summary(lives, plans, kinds)),
        reasons="\n".join(_reasons(plans, kinds[-1])),
        heads=" | ".join(f"packed, {kind}" for kind in kinds),
        dashes="|".join("---" for _ in kinds),
        rows="\n".join(rows),
    )


def _read(file: Path) -> dict[str, Any]:
    return {(found := json.loads(line))["family"]: found for line in file.read_text().splitlines()}


def _summary(lives: dict[str, Any], plans: dict[str, Any], kinds: list[str]) -> list[str]:
    quantized = [x for x in lives.values() if x.get("kinds")]
    counts = {
        "all": len(lives),
        "quantized while loading, saved and reloaded": len(quantized),
        "run": sum(x["runs"] for x in quantized),
        "generate": sum(bool(x.get("generates")) for x in quantized),
        "where something fails": sum(bool(wrong(x)) for x in lives.values()),
        "planned at their published size": sum("error" not in x for x in plans.values()),
    }
    lines = [f"| {key} | {value} |" for key, value in counts.items()]
    for kind in kinds:
        shares = [plan["kinds"][kind]["share"] for plan in plans.values() if kind in plan["kinds"]]
        low = sum(share < 0.9 for share in shares)
        lines.append(f"| packed share with {kind}: median {median(shares):.1%}; below 90 % | {low} |")
    return lines


def _reasons(plans: dict[str, Any], kind: str) -> list[str]:
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, plan in plans.items():
        for what, reason, share in plan["kinds"].get(kind, {}).get("left", ()):
            if share >= 0.005:
                # of what it is tied to, only that
                reason = re.sub(r"tied to [\w.]+\w", "tied to another", reason)
                found[_cell(reason)].append((share, f"{name} ({what})"))
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [
        f"| {why} | {len({name for _, name in all_})} | {max(all_)[1]} {max(all_)[0]:.0%} |" for why, all_ in ordered
    ]


def _row(name: str, life: dict[str, Any], plan: dict[str, Any], kinds: list[str]) -> str:
    cls = life.get("class") or plan.get("class", "")
    shares = [f"{plan['kinds'][k]['share']:.1%}" if k in plan.get("kinds", {}) else "" for k in kinds]
    last = plan.get("kinds", {}).get(kinds[-1], {})
    size = f"{last['parameters'] / 1e6:,.0f} M" if last else ""
    left = [f"{what} {share:.1%}" for what, reason, share in last.get("left", ()) if share >= 0.005][:4]
    stays = ", ".join(left) or plan.get("error", "")
    return f"| {name} | {cls} | {size} | {' | '.join(shares)} | {_cell(stays)} | {_cell(_life(life))} |"


def _life(life: dict[str, Any]) -> str:
    if not life:
        return "not tried"
    if failed := wrong(life):
        return f"fails: {failed}"
    if not life["kinds"]:
        return f"no float model: {life['float']}"
    return "gen" if life.get("generates") else "runs" if life["runs"] else f"not run: {life['float']}"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) < 140 else f"{text[:137]}..."
