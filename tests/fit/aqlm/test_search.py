"""Beam search: never farther than before, the best of all with a beam that keeps everything, native as in torch."""

import itertools

import pytest
import torch
from native_weights import needs_native

from quanto_hf.fit.aqlm.layout import decode
from quanto_hf.fit.aqlm.loops import loops_on
from quanto_hf.fit.aqlm.search import search as torch_search
from quanto_hf.ops.cpu.aqlm_loops import native_search
from quanto_hf.ops.cpu.library import NATIVE

search = loops_on(torch.device("cpu")).search

# groups, codebooks, vectors, values, beam
SHAPES = [
    (1, 1, 2, 1, 1), (77, 3, 4, 5, 4), (50, 1, 2, 3, 1), (33, 2, 2048, 8, 8), (16, 8, 16, 16, 64), (17, 2, 256, 8, 3),
    (0, 2, 4, 8, 4), (5, 1, 40, 64, 2),
]  # fmt: skip


def problem(groups, count, size, width, scale=1.0):
    targets, books = torch.randn(groups, width) * scale, torch.randn(count, size, width) * scale
    return targets, books, torch.randint(size, (groups, count), dtype=torch.int32)


def squares(targets, books, codes):
    return (targets - decode(codes, books)).double().square().sum(1)


@pytest.mark.parametrize("groups, count, size, width, beam", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_no_group_ends_farther_away(groups, count, size, width, beam, scale):
    targets, books, codes = problem(groups, count, size, width, scale)
    found = codes.clone()
    search(targets, books, found, beam)
    assert (squares(targets, books, found) <= squares(targets, books, codes) * (1 + 1e-5)).all()
    assert found.numel() == 0 or (found.min() >= 0 and found.max() < size)


def test_a_beam_that_keeps_everything_finds_the_best_of_all():
    targets, books, codes = problem(40, 3, 4, 5)
    best = torch.stack(
        [squares(targets, books, torch.tensor([c]).expand(40, 3)) for c in itertools.product(range(4), repeat=3)]
    )
    search(targets, books, codes, 64)
    assert torch.allclose(squares(targets, books, codes), best.min(0).values)


def test_one_codebook_gives_the_nearest_vector():
    targets, books, codes = problem(200, 1, 70, 6)
    search(targets, books, codes, 1)
    assert torch.equal(codes[:, 0].long(), torch.cdist(targets, books[0]).argmin(1))


@needs_native
@pytest.mark.parametrize("groups, count, size, width, beam", SHAPES)
def test_the_native_search_finds_what_torch_finds(groups, count, size, width, beam):
    targets, books, codes = problem(groups, count, size, width)
    found, native = codes.clone(), codes.clone()
    torch_search(targets, books, found, beam)
    native_search(targets, books, native, beam)
    assert torch.allclose(squares(targets, books, native), squares(targets, books, found), rtol=1e-4)
    assert (native == found).all(1).float().mean() > 0.98 or groups == 0


@needs_native
def test_every_level_and_number_of_threads_finds_the_same_codes():
    targets, books, codes = problem(1000, 2, 100, 8)
    level, found = NATIVE.level(), []
    try:
        for name, threads in itertools.product(NATIVE.levels(), (1, 3)):
            NATIVE.use_level(name)
            torch.set_num_threads(threads)
            found.append(codes.clone())
            native_search(targets, books, found[-1], 8)
    finally:
        NATIVE.use_level(level)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_native
def test_numbers_that_are_not_numbers_leave_codes_in_range():
    targets, books, codes = problem(20, 2, 16, 8)
    targets[3], targets[4] = torch.nan, torch.inf
    native_search(targets, books, codes, 4)
    assert codes.min() >= 0 and codes.max() < 16
