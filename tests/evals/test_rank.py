"""eval_dba.py rank: the definitions, what is captured, what doesn't depend on the basis, the command."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

import reference
import train_dba as dba
from evals import rank
from evals.subject import load_subject
from helpers import assert_done, assert_error, make_text
from reference import MODES, close, config, randomize, settings, weights
from subjects import evaluate, write_checkpoint

CPU = torch.device("cpu")


def harmonic(n):
    return 1 / torch.arange(1, n + 1, dtype=torch.float64)


# --- definitions

def test_definitions_on_a_known_spectrum():
    """Eigenvalues 1/i, d = 64, where the figures are known."""
    ranks = {name: x.item() for name, x in rank.effective_ranks(harmonic(64)).items()}
    known = dict(stable_rank=4.74, participation_ratio=13.81, entropy_rank_lambda=29.12, entropy_rank_sigma=54.99)
    for name, value in known.items():
        assert ranks[name] == pytest.approx(value, abs=0.005), name
    held = [sum(1 / i for i in range(1, k + 1)) for k in range(1, 65)]
    for share in (90, 95, 99):
        assert ranks[f"k{share}"] == 1 + sum(x < share / 100 * held[-1] for x in held)
    assert ranks.keys() <= rank.DEFINITIONS.keys()


def test_definitions_on_the_extremes():
    """k equal eigenvalues have rank k by every entropy, one has rank 1; exact shares need no further eigenvalue."""
    flat = rank.effective_ranks(torch.tensor([3.0] * 10 + [0.0] * 6, dtype=torch.float64))
    assert [round(x.item(), 9) for x in flat.values()] == [10, 10, 10, 10, 9, 10, 10]
    ranks = rank.effective_ranks(torch.tensor([[2.0, 0.0], [5.0, 0.0]], dtype=torch.float64))
    assert all(x.tolist() == [1, 1] for x in ranks.values())


def test_product_spectrum_does_not_depend_on_the_basis():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(300, 8) * harmonic(8), normal(300, 8)
    a = torch.linalg.qr(normal(8, 8)).Q / harmonic(8)[:, None]
    before = (q, k), (q @ a, k @ torch.linalg.inv(a).T)
    close(before[1][0] @ before[1][1].T, q @ k.T, 1e-9, "scores")
    spectra = [rank.product_spectrum(q.T @ q, k.T @ k) for q, k in before]
    close(spectra[1], spectra[0], 1e-9, "product spectrum")
    alone = [rank.effective_ranks(rank.eigenvalues_of(q.T @ q)) for q, _ in before]
    assert alone[1]["entropy_rank_lambda"] > 2 * alone[0]["entropy_rank_lambda"]
    energy = (q @ k.T).square().sum()                      # over all pairs, as if queries and keys were independent
    close(spectra[0].square().sum(), energy, 1e-9, "score energy")


def test_shares_are_what_the_best_narrow_score_keeps():
    """The error of the best score of width r is the energy beyond the first r singular values."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(200, 6, generator=generator, dtype=torch.float64) * harmonic(6) for _ in range(2))
    s = rank.product_spectrum(q.T @ q, k.T @ k)
    u, t, v = torch.linalg.svd(q @ k.T)
    close(s, t[:6], 1e-9, "singular values of all scores")
    kept = (u[:, :2] * t[:2]) @ v[:2]
    close((q @ k.T - kept).square().sum(), s[2:].square().sum(), 1e-9, "what width 2 loses")


# --- capture

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flags", ({}, dict(learned_temp=True, null_attn=True)))
def test_captured_queries_and_keys_give_the_scores_of_the_model(mode, flags):
    """Queries times keys, by the channels that each head reads, are the scores of a float64 reference."""
    given = settings(mode, **flags)
    model = randomize(dba.GPT(config(given), 50)).eval()
    idx = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    seen, inputs, vectors = [], [], []
    moments = rank.Moments(model.cfg, CPU)
    block = model.blocks[1]
    handle = block.attn.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    with torch.no_grad():
        expected = model(idx)
        inputs.clear()
        with rank.watch_projections(model, lambda *what: (seen.append(what), moments.see(*what))):
            close(model(idx), expected, 0, "watched logits")
    handle.remove()
    assert "project" not in vars(block.attn), "the watch is over"
    for side in (0, 1):
        parts = [rotated[side] for layer, _, _, rotated in seen if layer == 1]
        vectors.append(torch.cat([part.transpose(1, 2).flatten(2)[0] for part in parts], 1).double())     # [T, C]
        close(moments.matrix(1, side, True, False), vectors[side].T @ vectors[side] / 9, 1e-9, "second moment")
    q_ids, k_ids = rank.channels(model.cfg.attention, model.cfg.n_head)["total"]
    ours = torch.stack([vectors[0][:, a] @ vectors[1][:, b].T for a, b in zip(q_ids, k_ids)])             # [H, T, T]
    w = {name.removeprefix("blocks.1.attn."): p for name, p in weights(model).items() if "blocks.1.attn." in name}
    scores = reference.attention(w, inputs[0].double(), given)[1].view(model.cfg.n_head, -1)
    width = 10 if flags else 9                             # the reference has the null token in front
    mask = torch.ones(9, 9).tril().bool()
    if flags:
        whole = torch.cat([torch.ones(9, 1).bool(), mask], 1)
        rows = torch.full((model.cfg.n_head, 9, width), math.nan, dtype=torch.float64)
        rows[:, whole] = scores
        scores = rows[:, :, 1:][:, mask]
    close(ours[:, mask], scores, 1e-5, "scores")


@pytest.mark.parametrize("mode", MODES)
def test_before_and_after_rope(mode):
    """Rotation keeps lengths; semantic paths have one stage, rotated ones two; without RoPE there is one stage."""
    cfg = config(settings(mode, layers=1))
    model = randomize(dba.GPT(cfg, 50)).eval()
    moments = rank.Moments(cfg, CPU)
    with torch.no_grad(), rank.watch_projections(model, moments.see):
        model(torch.arange(48).view(2, 24))
    for side in (0, 1):
        plain, rotated = (moments.matrix(0, side, after, False) for after in (False, True))
        assert (plain - rotated).abs().max() > 0.01 * plain.abs().max()
        close(rotated.trace(), plain.trace(), 1e-5, "mean square length")
    records = list(rank.layer_ranks(moments, cfg, 0, False))
    stages = {(r["path"], r["rope"]) for r in records}
    both = {("total", "before"), ("total", "after")}
    two = {("sem", "none"), ("geo", "before"), ("geo", "after")}
    assert stages == (both | two if len(cfg.attention.paths) == 2 else both)
    for r in records:
        spectra = np.atleast_2d(r["spectrum"]).tolist() if "spectrum" in r else []
        assert len(spectra) == {"QK head": model.cfg.n_head, "Q head": 0, "K head": 0}.get(r["of"], 1)
        for spectrum in spectra:
            assert len(spectrum) == r["channels"] and sum(spectrum) == pytest.approx(1, abs=1e-4)
            assert spectrum == sorted(spectrum, reverse=True)
        if r["of"] == "QK head":
            beyond = [statistics.median(sum(energy[r:]) for energy in spectra) for r in range(1, len(spectra[0]))]
            assert r["left_out"] == pytest.approx(beyond, abs=1e-5)
        assert all(1 <= value <= r["channels"] * 1.0001 for value in r["ranks"].values())


def test_centred_moments_are_covariances():
    cfg = config(settings("bottleneck", layers=1))
    moments = rank.Moments(cfg, CPU)
    q = torch.randn(2, 4, 30, 4, generator=torch.Generator().manual_seed(0)) + 3
    moments.see(0, cfg.attention.paths[0], (q, q), (q, q))
    x = q.transpose(1, 2).reshape(60, 16).double()
    close(moments.matrix(0, 0, True, True), torch.cov(x.T, correction=0), 1e-9)
    close(moments.matrix(0, 0, True, False), x.T @ x / 60, 1e-9)


def test_windows_do_not_overlap_and_span_the_text():
    parts = rank.spread_windows(torch.arange(103), 40, 10)
    assert parts.shape == (4, 10) and parts[0, 0] == 0 and parts[-1, -1] == 102
    assert len(parts.unique()) == 40
    assert rank.spread_windows(torch.arange(103), 500, 10).numel() == 100
    assert rank.spread_windows(torch.arange(7), 7, 10).shape == (1, 7)


# --- the command

@pytest.mark.parametrize("mode, flags", [("decoupled", dict(null_attn=True, tie_qk=True)), ("gqa", {}), ("mla", {}),
                                         ("decoupled_gqa", dict(rope=False)), ("decoupled", dict(sem_dim=4))])
def test_rank_command(tmp_path, mode, flags):
    model = write_checkpoint(tmp_path / "run", mode, **flags)
    make_text(tmp_path)
    result = evaluate("rank --ckpt run --data text.txt --device cpu", tmp_path)
    assert_done(result)
    written = json.loads((tmp_path / "run" / "eval_rank.json").read_text())
    assert written["moment"] == "not centred" and written["tokens"] >= 10 * 48
    assert len(written["trained"]) == len(written["initial"])
    places = [[(r["layer"], r["path"], r["rope"], r["of"]) for r in written[key]] for key in ("trained", "initial")]
    assert places[0] == places[1] and len(set(places[0])) == len(places[0])
    for record in written["trained"]:
        assert record["ranks"].keys() <= written["definitions"].keys()
        if record["of"] == "QK head":
            shares = list(record["share"].values())
            assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
            assert len(record["left_out"]) == record["channels"] - 1
    spectra, layers = np.load(tmp_path / "run" / "eval_rank.npz"), model.cfg.layers
    of_qk = [r for r in written["trained"] if r["of"] == "QK head" and r["layer"] == 0]
    for record in of_qk:
        spectrum = spectra[f"trained/{record['path']}/{record['rope']}/QK head"]
        assert spectrum.shape == (layers, model.cfg.n_head, record["channels"])
    assert len(spectra.files) == 2 * 3 * len(of_qk) and (tmp_path / "run/eval_rank.json").stat().st_size < 300_000
    if flags.get("rope") is False:
        assert {r["rope"] for r in written["trained"]} == {"none"}
    assert "not centred" in result.stdout and "entropy sigma" in result.stdout


def test_control_is_the_model_before_its_first_step(tmp_path):
    write_checkpoint(tmp_path, "mla", seed=5)
    subject = load_subject(tmp_path, "cpu")
    first = dba.build(subject.cfg, subject.tokenizer.vocab_size, CPU)[0].state_dict()
    ours = rank.initial_model(subject).state_dict()
    assert first.keys() == ours.keys() and all(torch.equal(ours[name], first[name]) for name in first)


@pytest.mark.parametrize("args, words", [
    ("--data text.txt --max-tokens 300", ("300", "480")),
    ("--data short.txt", ("200 tokens", "480")),
    ("--data odd.txt --block 300", ("300", "--block")),
    ("--data gone.txt", ("gone.txt",)),
])
def test_what_cannot_be_measured_is_one_line(tmp_path, args, words):
    write_checkpoint(tmp_path / "run")                     # 4 heads of 4 + 8 channels: 480 tokens at least
    make_text(tmp_path)
    (tmp_path / "short.txt").write_text("a" * 200)
    (tmp_path / "odd.txt").write_text("ab" * 250)
    assert_error(evaluate(f"rank --ckpt run --device cpu {args}", tmp_path), *words)
    assert not (tmp_path / "run" / "eval_rank.json").exists()


def test_broken_weights_are_one_line(tmp_path):
    model = write_checkpoint(tmp_path)
    with torch.no_grad():
        model.blocks[1].attn.q["sem"].weight.fill_(math.nan)
    dba.save_checkpoint(tmp_path / "best.pt", model.cfg, dba.ByteTokenizer(), model, step=0)
    make_text(tmp_path)
    assert_error(evaluate(f"rank --ckpt {tmp_path} --data text.txt --device cpu", tmp_path), "layer 1", "queries")
