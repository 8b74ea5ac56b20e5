"""How much memory it takes to make additive codebooks."""

import torch

from quanto_hf.fit.aqlm.books import GROUPS_PER_VECTOR
from quanto_hf.fit.aqlm.layout import Layout
from quanto_hf.fit.aqlm.quantize import BEAM
from quanto_hf.fit.aqlm.search import BLOCK_VALUES

# Numbers of float64 for each value of a codebook in conjugate gradients, which end after one step for one codebook.
BOOKS_ONE, BOOKS_MORE = 5, 7


def fit_bytes(
    shape: tuple[int, int], layout: Layout, dtype: torch.dtype, *, calibrated: bool = False, native: bool = False
) -> int:
    """Most bytes that are held at a time while a weight is quantized, besides the weight and its second moment.

    The largest of what the steps hold, as they are written: tensors of the size of the weight, of its groups, of the
    second moment and of the codebooks. Measured peaks are within 20 % of it (tests/fit/aqlm/test_memory.py).

    Args:
        shape: of the weight, (out_features, in_features).
        layout: of the groups.
        dtype: of the weight.
        calibrated: whether for given inputs.
        native: whether the loops are the native ones, which need next to nothing; else those in torch.

    Example:
        >>> bytes = fit_bytes((4096, 4096), Layout(2, 8), torch.bfloat16, native=True)
        >>> round(bytes / 4096**2, 1)  # for each weight
        21.0
    """
    rows, columns = layout.grid(shape)
    groups, count, books = rows * columns, layout.num_codebooks, layout.num_codebooks * layout.size * layout.width
    values, moment = groups * layout.width, 4 * shape[1] ** 2 if calibrated else 0
    codes = 4 * count * groups
    # the weight in float32, in the order of the inputs; its groups, which are a view of it where a group is in one row;
    # and the groups over their scales
    copied = calibrated or dtype != torch.float32
    held = 4 * values * (copied + (layout.out_group > 1) + 1)
    sample = min(groups, GROUPS_PER_VECTOR * layout.size)
    whole, solved = 4 * values, 8 * books * (BOOKS_ONE if count == 1 else BOOKS_MORE)
    steps = [
        # k-means: what is left of the groups; a sample of it, and numbers of each group; then what the codes stand for
        held + 2 * whole + 4 * layout.width * sample + 16 * groups + codes + 12 * books,
        # scales: what the codes stand for, its product with the moment, and new groups over new scales
        held + whole * (3 + calibrated) + codes + 2 * moment + 4 * books,
        # codebooks: what they stand for, and its product with the moment
        held + whole * (min(count, 2) + calibrated) + codes + 2 * moment + solved,
        # the metric: the moment in order, and two in float64
        whole * copied + 5 * moment,
    ]
    if not native:
        # sums of groups in float64: the groups, and the same with weights
        steps += [
            held + whole + 20 * layout.width * sample + 24 * groups + codes + 24 * books,
            held + whole * (5 + calibrated) + 8 * groups + codes + 2 * moment + solved,
            held + whole + 4 * layout.width * sample + _search_bytes(groups, layout, 1) + 16 * groups + codes,
            held + whole * calibrated + _search_bytes(groups, layout, BEAM) + codes + 2 * moment,
        ]
    return max(steps)


def _search_bytes(groups: int, layout: Layout, beam: int) -> int:
    """Most that the search in torch holds besides its arguments."""
    block, size = min(groups, max(1, BLOCK_VALUES // (beam * layout.size))), layout.size
    steps = 1 if beam == 1 else layout.num_codebooks
    if steps == 1:
        return 3 * 4 * block * size  # tables of distances
    kept, more = block * beam, steps > 2
    # the table of the codebook before; the kept codes, and where they came from
    before = 4 * (kept if more else block) * size + 8 * kept * (3 + steps)
    # what is left of the groups, and three tables; or what is left is made anew of two gathered tensors
    return before + 4 * kept * max(layout.width + 3 * size, layout.width * (3 + more))
