"""surgery/key_index.py: quantisers, bits, coordinates and the estimate itself, each beside one made another way."""

import itertools

import pytest
import torch

from surgery.key_index import QUANTISERS, RIDGE, Index, Survey, share_bits
from surgery.sparse_attention import Grid, block_log_mass

BLOCK = 16


def drawn(B=2, H=4, G=2, T=90, d=12, seed=0):
    """(q, k, grid): correlated float64 channels, keys off the origin, one key far larger than others."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, heads, T, d, generator=g, dtype=torch.float64) @ torch.randn(
        d, d, generator=g, dtype=torch.float64) for heads in (H, G))
    k[:, :, 40] *= 8
    return q, k + 2, Grid(B, T, T, BLOCK)


def fitted(q, k, grid, bits, scale=0.1):
    survey = Survey()
    survey.add(grid, q, k, scale)
    index = Index(q.size(1), k.size(1), k.size(-1), bits).double()
    index.fit(*survey.moments())
    return index


def padded(grid, q, k):
    return grid.pad_rows(q), grid.pad_keys(k)


@pytest.mark.parametrize("bits", range(1, 7))
def test_a_quantiser_is_the_best_uniform_one_of_a_normal_variable(bits):
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    density /= density.sum()

    def error(step):
        levels = (torch.arange(2**bits) - (2**bits - 1) / 2) * step
        nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        return (density * (x - nearest).square()).sum().item()

    step, said = QUANTISERS[bits]
    assert error(step) == pytest.approx(said, rel=3e-3)
    assert error(step) <= min(error(0.97 * step), error(1.03 * step))


@pytest.mark.parametrize("total", (0, 1, 5, 9))
def test_bits_are_those_of_least_error(total):
    importance = torch.tensor([4.0, 0.01, 1.0, 0.2])

    def error(bits):
        return sum(weight * QUANTISERS[each][1] for weight, each in zip(importance.tolist(), bits))

    bits = share_bits(importance, total)
    ways = (each for each in itertools.product(range(7), repeat=4) if sum(each) == total)
    assert bits.sum() == total and error(bits.tolist()) == pytest.approx(min(map(error, ways)))


def test_coordinates_are_uncorrelated_and_keep_products():
    q, k, grid = drawn()
    index = fitted(q, k, grid, 2)
    late = slice(BLOCK, None)
    for group in range(2):
        to_query, to_key = index.to_query[group], index.to_key[group]
        assert torch.allclose(to_query @ to_key.T, torch.eye(12).double(), atol=1e-8)
        keys = (k[:, group, late] - index.mean[group]).flatten(0, 1)
        covariance = keys.T @ keys / len(keys)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(12)
        assert keys.mean(0).abs().max() < 1e-10
        assert torch.allclose(to_key.T @ covariance @ to_key, torch.eye(12).double(), atol=1e-6)
        queries = (0.1 * q[:, 2 * group:2 * group + 2, late] @ to_query).flatten(0, 2)
        moments = queries.T @ queries
        assert torch.allclose(moments, moments.diagonal().diag(), atol=1e-6 * moments.max())
        assert index.bits[group].sum() == 24


def test_without_rounding_the_estimate_is_the_mass(monkeypatch):
    q, k, grid = drawn()
    index = fitted(q, k, grid, 2)
    q, k = padded(grid, q, k)
    monkeypatch.setattr(Index, "rounded", lambda self, k: (k - self.mean) @ self.to_key)
    torch.nn.init.zeros_(index.error)
    truth = block_log_mass(grid, q, k, 0.1)
    far = grid.far[:, None].repeat_interleave(BLOCK, 2).expand_as(truth)
    guess = index(grid, q, k, 0.1)
    assert torch.allclose(guess[far], truth[far], atol=1e-9) and (guess[~far] == -torch.inf).all()


def test_codes_reach_every_key_and_are_few():
    q, k, grid = drawn()
    index = fitted(q, k, grid, 2)
    coordinates, kept = (k - index.mean) @ index.to_key, index.rounded(k)
    for text, group, token in itertools.product(range(2), range(2), (0, 40, 89)):
        bits = index.bits[group].tolist()
        stretch = 1.0
        for value, each in zip(coordinates[text, group, token].tolist(), bits):
            if each:
                stretch = max(stretch, abs(value) / (2**each / 2 * QUANTISERS[each][0]))
        for channel, each in enumerate(bits):
            levels = [(i - (2**each - 1) / 2) * QUANTISERS[each][0] * stretch for i in range(2**each)] if each else [0]
            value = coordinates[text, group, token, channel].item()
            nearest = min(levels, key=lambda level: abs(level - value))
            assert kept[text, group, token, channel].item() == pytest.approx(nearest, rel=1e-5)


def test_an_estimate_is_what_it_says_for_every_head():
    """Block 2 of 6 for the last query, from codes, mean and errors of the head's own key head, by loops."""
    q, k, grid = drawn(H=6, T=96)
    index = fitted(q, k, grid, 1.5)
    assert not torch.equal(index.bits[0], index.bits[1])
    kept, guess = index.rounded(k), index(grid, q, k, 0.1)
    for head in range(6):
        group = head // 3
        query = 0.1 * q[1, head, 95] @ index.to_query[group]
        scores = kept[1, group, 32:48] @ query + 0.1 * q[1, head, 95] @ index.mean[group, 0]
        spread = sum(QUANTISERS[bits][1] * value**2 for bits, value in zip(index.bits[group].tolist(), query.tolist()))
        assert guess[1, head, 95, 2].item() == pytest.approx((scores + spread / 2).exp().sum().log().item(), abs=1e-5)


def test_more_bits_and_the_error_of_scores_bring_the_estimate_closer():
    """Of the log mass: its error as bits grow, and its bias with and without the term of the scores' error."""
    q, k, grid = drawn(T=192)
    truth = block_log_mass(grid, q, k, 0.03)
    far = grid.far[:, None].repeat_interleave(BLOCK, 2).expand_as(truth)
    errors = {}
    for bits in (1, 2, 4):
        index = fitted(q, k, grid, bits, 0.03)
        errors[bits] = (index(grid, q, k, 0.03) - truth)[far]
    sizes = {bits: error.abs().mean() for bits, error in errors.items()}
    assert 0 < sizes[4] < 0.5 * sizes[2] and sizes[2] < 0.5 * sizes[1]
    index = fitted(q, k, grid, 1, 0.03)
    torch.nn.init.zeros_(index.error)
    without = (index(grid, q, k, 0.03) - truth)[far]
    assert abs(errors[1].mean()) < 0.1 * abs(without.mean())


def test_keys_that_are_all_the_same_have_an_index():
    q, k, grid = drawn()
    index = fitted(q, torch.ones_like(k), grid, 2)
    q, k = padded(grid, q, torch.ones_like(k))
    far = grid.far[:, None].repeat_interleave(BLOCK, 2).expand(2, 4, -1, -1)
    assert torch.allclose(index(grid, q, k, 0.1)[far], block_log_mass(grid, q, k, 0.1)[far], atol=1e-3)
