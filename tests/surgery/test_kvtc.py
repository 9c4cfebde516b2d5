"""benchmarks/kvtc.py: bits where they take most from the error, which is that of the quantiser; sinks stay."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from teachers import ids_of, layers_of, teacher_of

import train_dba as dba

sys.path.append(str(Path(dba.__file__).parent / "benchmarks"))
import kvtc  # noqa: E402  (benchmarks are no package)


def test_bits_are_those_of_the_least_error():
    """Beside all ways to share out so few."""
    variances = torch.tensor([9.0, 1.0, 0.3, 0.01], dtype=torch.float64)

    def error(shares):
        return sum(kvtc.ERRORS[b] * v for b, v in zip(shares, variances.tolist()))

    for bits in range(12):
        ways = [way for way in itertools.product(range(9), repeat=4) if sum(way) == bits]
        found = kvtc.shared_out(variances, bits)
        assert found.sum() == bits and error(found.tolist()) == pytest.approx(min(map(error, ways)))
    assert kvtc.shared_out(variances, 99).tolist() == [8, 8, 8, 8]


def test_the_error_of_gaussians_is_the_predicted_one():
    """Of inputs that are Gaussian, with a mean; the coder is made of their moments alone."""
    D, n, generator = 6, 5, torch.Generator().manual_seed(0)
    mix, mean, weight = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (
        (D, D), (D,), (n, D)))

    class layer:
        class moments:
            inputs = mix @ mix.T + torch.outer(mean, mean)
    layer.moments.mean = mean
    x = torch.randn(200_000, D, dtype=torch.float64, generator=generator) @ mix.T + mean
    y, before = (x @ weight.T).float(), float("inf")
    for share in (0.0, 0.1, 0.2, 0.3):
        coder = kvtc.Coder.of(weight, layer, share)
        predicted = (torch.tensor(kvtc.ERRORS)[coder.bits] * coder.sizes.square()).sum().item()
        found = (coder(y) - y).square().sum(-1).mean().item()
        assert found == pytest.approx(predicted, rel=0.02) and found < before
        assert coder.bits.sum() == int(share * 16 * n + 1e-9)
        before = found


def test_a_coded_model_reads_the_newest_and_the_first_as_they_are():
    teacher = teacher_of("gqa")
    layers, ids = layers_of(teacher), ids_of(2, 60, seed=7)
    model = kvtc.coded(teacher, layers, 0.1, newest=20)
    difference = (model(ids) - teacher(ids)).abs().amax((0, 2))
    far = kvtc.SINKS + 20                                  # the first query that reads a coded token
    assert difference[:far].max() < 1e-4 and difference[far:].min() > 1e-3
    fine = (kvtc.coded(teacher, layers, 0.5, newest=20)(ids) - teacher(ids)).abs().max()
    assert fine < 0.3 * difference.max()


def test_attention_reads_what_it_should():
    """Beside a loop over queries, whose keys and values are put together one by one."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 17, 6, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    q[1] = q[0]
    found = kvtc.attend_coded(5, q, k, v)
    for h in range(4):
        for t in range(17):
            rows = [0 if t - s < 5 or s < kvtc.SINKS else 1 for s in range(t + 1)]
            keys, values = (torch.stack([x[row, h // 2, s] for s, row in enumerate(rows)]) for x in (k, v))
            expected = (keys @ q[0, h, t]).softmax(0) @ values
            assert torch.allclose(found[0, h, t], expected) and torch.equal(found[0], found[1])
