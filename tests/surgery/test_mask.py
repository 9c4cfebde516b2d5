"""Learned sparse attention: gathered is masked, mass the naive one, gates learn, folders go on after a kill."""

import importlib.util
import json
import math
import signal
from pathlib import Path

import pytest
import torch

import convert_dba
import surgery.sparse_attention as sparse
from helpers import assert_done, assert_error, call, cli, make_text, snapshot
from small_models import OTHERS, D, saved
from surgery.key_index import Survey
from surgery.learn_mask import best_shift, dropped_bytes, point_of, save_to
from surgery.mask import (
    Gates,
    Host,
    Point,
    Soft,
    Sparse,
    equal_loss,
    learn_logits,
    learn_mass,
    near_rows,
    plain_attention,
)
from surgery.measure_mask import Measured, TokenWindow, oracle_mass, quest_top
from surgery.sparse_attention import Grid, block_log_mass, gathered_attention, near_log_mass
from train_dba import GPT, UserError, make_config, make_tokenizer, save_checkpoint, writing

# texts, query heads, key heads, queries, keys, channels of keys and of values, block
SHAPES = [(1, 4, 2, 70, 70, 8, 8, 16), (2, 6, 2, 37, 37, 5, 3, 16), (1, 3, 1, 1, 83, 8, 8, 16),
          (2, 2, 2, 19, 90, 6, 7, 16), (1, 2, 1, 9, 9, 4, 4, 16), (1, 4, 4, 128, 128, 8, 8, 32)]


def drawn(shape, seed=0, padding=False):
    """(q, k, v, visible, grid) in float64, of an odd shape; with padding on the left of each text but one."""
    B, H, G, T, S, d, u, block = shape
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(size, generator=g, dtype=torch.float64)
               for size in ((B, H, T, d), (B, G, S, d), (B, G, S, u)))
    visible = torch.ones(B, S, dtype=torch.bool)
    if padding:
        for text in range(B):
            visible[text, :(text + 1) * S // 3] = False
    return q, k, v, visible, Grid(B, T, S, block, visible)


def naive_scores(q, k, visible, scale):
    """[B, H, T, S] by loops over heads, -inf where a key isn't seen."""
    B, H, T, _ = q.shape
    S = k.size(2)
    scores = torch.full((B, H, T, S), -torch.inf, dtype=q.dtype)
    for text in range(B):
        for head in range(H):
            key = k[text, head // (H // k.size(1))]
            for i in range(T):
                for j in range(S - T + i + 1):
                    if visible[text, j]:
                        scores[text, head, i, j] = q[text, head, i] @ key[j] * scale
    return scores


def some_blocks(grid, heads, rows, seed=1):
    """A random choice [B, H, N', M] that keeps what is near."""
    g = torch.Generator().manual_seed(seed)
    near = near_rows(grid, rows)
    far = grid.far[:, None].repeat_interleave(grid.block // rows, 2)
    keep = torch.rand(near.size(0), heads, *near.shape[2:], generator=g) < 0.4
    return near | (keep & far)


def by_tokens(grid, kept):
    """[B, H, T, S]: whether a query may read a key, by looking each up."""
    B, H, groups, _ = kept.shape
    S = grid.start + grid.front + grid.queries
    table = torch.zeros(B, H, grid.queries, S, dtype=torch.bool)
    for i in range(grid.queries):
        for j in range(S):
            table[:, :, i, j] = kept[:, :, (grid.front + i) // (grid.rows // groups), j // grid.block]
    return table


def masked_dense(q, k, v, scores, table):
    """Attention by a matrix; zeros for a query that sees nothing."""
    a = scores.masked_fill(~table, -torch.inf).softmax(-1).nan_to_num(0)
    return a @ v.repeat_interleave(q.size(1) // v.size(1), 1)


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("rows", (1, 4, "block"))
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_is_masked_dense_attention(shape, rows, padding, monkeypatch):
    monkeypatch.setattr(sparse, "ELEMENTS", 900)           # chunks of few rows
    q, k, v, visible, grid = drawn(shape, padding=padding)
    kept = some_blocks(grid, q.size(1), shape[-1] if rows == "block" else rows)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    expected = masked_dense(q, k, v, naive_scores(q, k, visible, 0.3), by_tokens(grid, kept))
    padded = grid.pad_rows(q), grid.pad_keys(k), grid.pad_keys(v)
    got = grid.cut(gathered_attention(grid, *padded, 0.3, kept))
    bias = torch.where(kept, 0.0, -torch.inf)
    dense = grid.cut(sparse.dense_attention(grid, *padded, 0.3, bias))
    measured = Measured(lambda *_: kept, grid.block, 0)(0, q.detach(), k, v, 0.3, visible)
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(dense, expected, atol=1e-12)
    assert torch.allclose(measured, expected, atol=1e-12)
    if not padding:                                        # torch's softmax of nothing has no gradient
        wanted = torch.autograd.grad(expected.square().sum(), (q, k, v), retain_graph=True)
        for way in (got, dense):
            for a, b in zip(wanted, torch.autograd.grad(way.square().sum(), (q, k, v), retain_graph=True)):
                assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_block_mass_is_the_naive_one(shape, padding, monkeypatch):
    monkeypatch.setattr(sparse, "ROWS", 16)
    q, k, v, visible, grid = drawn(shape, padding=padding)
    scores = naive_scores(q, k, visible, 0.3)
    S = k.size(2)
    rows, keys = grid.pad_rows(q), grid.pad_keys(k)
    mass = grid.cut(block_log_mass(grid, rows, keys, 0.3))
    for block in range(grid.blocks):
        part = scores[..., block * grid.block:min((block + 1) * grid.block, S)].exp().sum(-1)
        assert torch.allclose(mass[..., block].exp(), part, atol=1e-12)
    near = grid.near.repeat_interleave(grid.block, 1)[:, grid.front:grid.front + grid.queries]
    expected = (mass.exp() * near[:, None]).sum(-1)
    assert torch.allclose(grid.cut(near_log_mass(grid, rows, keys, 0.3)[..., None])[..., 0].exp(), expected, atol=1e-12)


def test_near_blocks_are_the_sink_the_one_before_and_the_own():
    grid = Grid(2, 80, 80, 16, torch.arange(80)[None] >= torch.tensor([[0], [20]]))
    near = [[set(row.nonzero().flatten().tolist()) for row in text] for text in grid.near]
    assert near[0] == [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}]
    assert near[1] == [set(), {1}, {1, 2}, {1, 2, 3}, {1, 3, 4}]                # the first block is padding
    assert grid.far[0].nonzero().tolist() == [[3, 1], [4, 1], [4, 2]]
    assert grid.far[1].nonzero().tolist() == [[4, 2]]


def test_rules_keep_what_they_say():
    share = torch.tensor([0.05, 0.3, 0.2, 0.0, 0.05]).log().view(1, 1, 1, 5)    # the near blocks have 0.4
    near = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    near[..., 3] = True
    assert sparse.keep_mass(share, 0.65).flatten().tolist() == [False, True, False, False, False]
    assert sparse.keep_mass(share, 0.72).flatten().tolist() == [False, True, True, False, False]
    assert sparse.keep_mass(share, 0.3).sum() == 0
    assert sparse.keep_top(share, near, 3).flatten().tolist() == [False, True, True, False, False]
    assert sparse.keep_above(share, math.log(0.1)).flatten().tolist() == [False, True, True, False, False]


# -----------------------------------------------------------------------------
# Gates

BITS = (0.0, 2.0)                                          # four vectors a block, an index of each key


def tiny_gates(shape, rows=1, seed=2, bits=0.0):
    torch.manual_seed(seed)
    gates = Gates(1, shape[1], shape[2], shape[5], shape[-1], rows, bits).double()
    with torch.no_grad():
        for p in gates.layers.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gates


def test_an_untrained_gate_is_the_second_order_expansion():
    """Of keys that vary little, and in one channel, within a block it gives their mass up to a third cumulant."""
    g = torch.Generator().manual_seed(3)
    k, spread = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((1, 2, 5, 1, 8), (1, 2, 5, 16)))
    k = k.repeat(1, 1, 1, 16, 1)
    k[..., 0] += 0.05 * spread
    k, q = k.flatten(2, 3), torch.randn(1, 4, 80, 8, generator=g, dtype=torch.float64)
    grid, gate = Grid(1, 80, 80, 16), Gates(1, 4, 2, 8, 16, bits=0).double().layers[0]
    far = grid.far[:, None].repeat_interleave(16, 2).expand(1, 4, 80, 5)

    def error():
        return (gate(grid, q, k, 1.0) - block_log_mass(grid, q, k, 1.0))[far].abs().max().item()

    with_variance = error()
    torch.nn.init.zeros_(gate.variance)
    assert 0 < with_variance < 1e-3 < 2e-3 < error()


@pytest.mark.parametrize("rows", (1, 4))
@pytest.mark.parametrize("bits", BITS)
def test_an_equal_share_of_attention_is_a_share_of_one_at_any_length(bits, rows):
    """Of keys that are all the same, for the last query of each block, which sees whole blocks only; the mean of four
    queries that see 13 to 16 of the last block's 16 keys is a little more."""
    for blocks in (4, 9, 30):
        grid, gates = Grid(1, 16 * blocks, 16 * blocks, 16), Gates(1, 4, 2, 8, 16, rows, bits).double()
        q, k = torch.randn(1, 4, 16 * blocks, 8).double(), torch.ones(1, 2, 16 * blocks, 8).double()
        if bits:
            survey = Survey()
            survey.add(grid, q, k, 1.0)
            gates.layers[0].fit(*survey.moments())
        last = gates.share(0, grid, q, k, 1.0).exp()[:, :, 16 // rows - 1::16 // rows]
        far = last[last > 0]
        assert len(far) == 4 * (blocks - 2) * (blocks - 3) / 2
        assert torch.allclose(far, torch.ones_like(far), atol=1e-6 if rows == 1 else 0.05)


@pytest.mark.parametrize("bits", BITS)
def test_a_choice_sees_nothing_that_comes_later(bits):
    shape = SHAPES[0]
    q, k, v, visible, grid = drawn(shape)
    gates, cut = tiny_gates(shape, bits=bits), 53
    attention = Sparse(gates.requires_grad_(False), Point(1.0))
    whole = attention(0, q, k, v, 0.3, visible)
    part = attention(0, q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], 0.3, visible[:, :cut])
    assert torch.allclose(whole[:, :, :cut], part, atol=1e-12)
    last = attention(0, q[:, :, cut - 1:cut], k[:, :, :cut], v[:, :, :cut], 0.3, visible[:, :cut])
    assert torch.allclose(whole[:, :, cut - 1:cut], last, atol=1e-12)           # as in decoding


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_a_gate_are_those_of_differences(bits):
    """Through the soft mask, its share of blocks and the attention behind it."""
    shape = (1, 4, 2, 70, 70, 8, 8, 16)
    q, k, v, visible, _ = drawn(shape)
    gates = tiny_gates(shape, bits=bits)
    gate = gates.layers[0]

    def value():
        soft = Soft(gates, 0.7)
        y = soft(0, q, k, v, 0.3, visible)
        return y.square().sum() + 3 * soft.kept[0]

    value().backward()
    for p in (gates.thresholds, *((gate.weight, gate.error) if bits else (gate.most, gate.mean, gate.bias))):
        index = p.grad.abs().flatten().argmax()
        with torch.no_grad():
            sides = []
            for step in (1e-5, -1e-5):
                p.view(-1)[index] += step
                sides.append(value())
                p.view(-1)[index] -= step
        slope = (sides[0] - sides[1]) / 2e-5
        assert abs(slope) > 1e-6 and torch.isclose(p.grad.flatten()[index], slope, rtol=1e-4)


def ours(mode="standard", **settings):
    torch.manual_seed(5)
    model = GPT(make_config(**dict(D, block=128, **settings)), 257).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5) + (1.0 if "norm" in name else 0.0))
    return Host(model)


@pytest.mark.parametrize("name", OTHERS)
def test_every_mode_of_ours_attends_through_it(name):
    """All blocks kept: its own logits. None but the near ones: others. And its own attention again afterwards."""
    host = ours(**OTHERS[name])
    ids = torch.randint(257, (2, 100), generator=torch.Generator().manual_seed(0))
    gates = Gates(2, host.heads, host.groups, host.width, 16).requires_grad_(False)
    with torch.no_grad():
        own = host.hidden(ids)
        everything = host.hidden(ids, Sparse(gates, Point(-1e9)))
        nothing = host.hidden(ids, Sparse(gates, Point(1e9)))
        assert torch.allclose(own, everything, atol=1e-4) and not torch.allclose(own, nothing, atol=1e-2)
        assert torch.allclose(own[:, :31], nothing[:, :31], atol=1e-4)          # nothing is far there
        assert torch.equal(own, host.hidden(ids))


@pytest.mark.parametrize("bits,least", [*zip(BITS, (0.5, 0.9))])                # an index has little to learn
def test_learning_brings_gates_closer_and_leaves_the_model_alone(bits, least):
    host = ours(attn_mode="gqa", kv_head=2, attn_dim=32)
    before = {name: p.clone() for name, p in host.model.state_dict().items()}
    ids = torch.randint(257, (1, 128), generator=torch.Generator().manual_seed(0))
    gates = Gates(2, host.heads, host.groups, host.width, 16, bits=bits)
    optimizers = [torch.optim.Adam(gate.parameters(), lr=0.05) for gate in gates.layers]
    losses = [learn_mass(host, gates, ids, optimizers, 10) for _ in range(4)]
    assert losses[-1] < least * losses[0]
    kl, kept = learn_logits(host, gates, ids, 0.5, 1.0, 0.01)
    assert kl > 0 and 0 < kept < 1 and gates.thresholds.grad.abs().min() > 0
    assert all(torch.equal(p, before[name]) for name, p in host.model.state_dict().items())
    assert all(torch.isfinite(p.grad).all() for p in gates.parameters())


def test_learning_by_logits_is_the_same_of_a_model_that_was_trained_with_checkpointing():
    ids = torch.randint(257, (1, 128), generator=torch.Generator().manual_seed(0))
    gradients = []
    for again in (False, True):
        host = ours(attn_mode="gqa", kv_head=2, attn_dim=32, activation_checkpointing=again)
        gates = Gates(2, host.heads, host.groups, host.width, 16)
        learn_logits(host, gates, ids, 0.5, 1.0, 0.01)
        gradients.append(gates.thresholds.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_thresholds_leave_out_the_same_share_of_every_head():
    host = ours(attn_mode="gqa", kv_head=2, attn_dim=32)
    ids = torch.randint(257, (1, 128), generator=torch.Generator().manual_seed(0))
    gates, lost = Gates(2, host.heads, host.groups, host.width, 16).requires_grad_(False), {}
    equal_loss(host, gates, [ids[:, :112], ids], 0.05)

    def attention(layer, q, k, v, scale, visible):
        grid = Grid(1, 128, 128, 16)
        far = grid.far[:, None].repeat_interleave(16, 2)
        truth = naive_scores(q, k, torch.ones(1, 128).bool(), scale).softmax(-1).unflatten(-1, (8, 16)).sum(-1)
        for shift in (1e-6, -1e-3):
            kept = gates.keep(layer, grid, q, k, scale, Point(shift))
            lost.setdefault(shift, []).append((truth * (far & ~kept)).sum((2, 3)) / far.any(-1).sum())
        return plain_attention(q, k, v, scale)

    host.hidden(ids, attention)
    tight, less = (torch.cat(lost[shift]) for shift in (1e-6, -1e-3))
    assert (less <= tight).all() and (tight - 0.05).abs().max() < 0.03          # one of the two texts alone


def test_the_floor_is_the_model_in_bfloat16_all_but_its_positions():
    host = ours(**OTHERS["decoupled"])
    ids = torch.randint(257, (1, 128), generator=torch.Generator().manual_seed(0))
    rounded = host.rounded()
    with torch.no_grad():
        own, other = host.hidden(ids), rounded.hidden(ids)
    assert own.dtype == torch.float32 and other.dtype == torch.bfloat16
    assert torch.equal(host.model.blocks[0].attn.inv_freq, rounded.model.blocks[0].attn.inv_freq)
    difference = (own - other).square().mean() / own.square().mean()
    assert 1e-6 < difference < 0.02


def test_heads_that_drop_read_nothing_far():
    shape = SHAPES[0]
    q, k, v, visible, grid = drawn(shape)
    gates = tiny_gates(shape).requires_grad_(False)
    drops = torch.tensor([[True, True, False, False]])
    kept = gates.keep(0, grid, grid.pad_rows(q), grid.pad_keys(k), 0.3, Point(-1e9, drops))
    far = grid.far[:, None].repeat_interleave(16, 2).expand_as(kept)
    assert not kept[:, :2][far[:, :2]].any() and kept[:, 2:][far[:, 2:]].all()


# -----------------------------------------------------------------------------
# Edges

def test_texts_of_padding_alone_of_one_token_and_shorter_than_a_block():
    shape = (2, 4, 2, 70, 70, 8, 8, 16)
    q, k, v, visible, _ = drawn(shape)
    attention = Sparse(tiny_gates(shape).requires_grad_(False), Point(1.0))
    visible[1] = False
    y = attention(0, q, k, v, 0.3, visible)
    assert torch.isfinite(y).all() and (y[1] == 0).all() and (y[0] != 0).any()
    same = v[:, :, :1].expand_as(v)                        # every token the same: whatever is read, the mean is it
    y = attention(0, q, k[:, :, :1].expand_as(k), same, 0.3, None)
    assert torch.allclose(y, same.repeat_interleave(2, 1)[:, :, :70], atol=1e-12)
    for length in (1, 7, 15, 16, 17):
        part = q[:, :, :length], k[:, :, :length], v[:, :, :length]
        assert torch.allclose(attention(0, *part, 0.3, None), plain_attention(*part, 0.3), atol=1e-12)


def test_choices_and_measures_are_what_they_say():
    q, k, v, visible, grid = drawn(SHAPES[0])
    look = Measured(lambda *a: TokenWindow(10, 3), 16, 35)
    y = look(0, q, k, v, 0.3, visible)
    scores = naive_scores(q, k, visible, 0.3)
    distance = torch.arange(70)[:, None] - torch.arange(70)
    mask = (distance >= 0) & ((distance < 10) | (torch.arange(70) < 3))
    whole, part = scores.softmax(-1), scores.masked_fill(~mask, -torch.inf).softmax(-1)
    assert torch.allclose(y, part @ v.repeat_interleave(2, 1), atol=1e-12)
    late = slice(35, None)
    reach = (distance >= 0)[late].sum().item()
    got = look.result()
    assert got["kept"] == pytest.approx(mask[late].sum().item() / reach)
    assert got["mass"] == pytest.approx((whole * mask)[:, :, late].sum(-1).mean().item())
    assert got["mse"] == pytest.approx((whole - part)[:, :, late].square().sum().item() / (4 * reach))
    kept = oracle_mass(0.9, 0, grid, grid.pad_rows(q), grid.pad_keys(k), 0.3)
    held = (whole * by_tokens(grid, kept)).sum(-1)
    assert held.min() >= 0.9 - 1e-9
    assert quest_top(4, 0, grid, grid.pad_rows(q), grid.pad_keys(k), 0.3).sum(-1).max() == 4


# -----------------------------------------------------------------------------
# The command line

INSTALLED = all(map(importlib.util.find_spec, ("safetensors", "transformers")))
NEEDED = pytest.mark.skipif(not INSTALLED, reason="requirements-eval.txt")
FLAGS = ("--data text.txt --block 16 --lengths 96 --mass-steps 5 --updates 2 --logits-steps 4 --logits-length 96 "
         "--calibration 1 --device cpu --eval-data text.txt --eval-lengths 128 --windows 2 --budgets 4")


def save_gpt2(folder):
    import transformers

    from llamas import byte_level
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=160, n_embd=48, n_layer=2, n_head=4, bos_token_id=0,
                                     eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "ln_" in name and p.dim() == 1 else 0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return model


def save(kind, folder):
    from llamas import save_llama
    if kind == "Llama":
        save_llama(folder, max_position_embeddings=160)
    elif kind == "GPT-2":
        save_gpt2(folder)
    else:
        saved(folder, dict(block=160, **OTHERS["groups, one temperature"]))


def convert(args, cwd):
    return call(args, cwd, convert_dba.main)


@NEEDED
@pytest.mark.parametrize("kind", ("Llama", "GPT-2", "ours"))
def test_gates_of_every_family_by_the_command_line(tmp_path, kind):
    make_text(tmp_path)
    save(kind, tmp_path / "model")
    everything = "--measure floor controls gates gradients costs"
    result = convert(f"mask --model model {FLAGS} --out-dir out {everything}", tmp_path)
    assert_done(result)
    written = json.loads((tmp_path / "out" / "eval_mask.json").read_text())
    rows = {row["choice"]: row for row in written["summary"]}
    assert rows["oracle mass 0.99"]["mass"] >= 0.99 > rows["window 10"]["mass"]
    assert rows["oracle top 4"]["kept"] == rows["quest top 4"]["kept"] == rows["gates top 4"]["kept"]
    assert rows["oracle top 4"]["kl"] < rows["quest top 4"]["kl"]
    assert rows["gates KL 0.001"]["kept"] >= rows["gates KL 0.01"]["kept"]
    assert "gates KL 0.001, by block" in rows
    assert {row["windows"] for row in written["summary"]} == {2}
    assert {row["attention"] for row in written["costs"]} == {"eager", "sdpa", "gates KL 0.001", "gates KL 0.01"}
    assert all(-1 <= row["least"] <= row["median"] <= 1 + 1e-6 for row in written["gradients"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["mass"] * 5 + ["logits"] * 4
    again = convert(f"mask --model model {FLAGS} --out-dir out", tmp_path)
    assert_done(again)                                     # what is there isn't learned or measured again
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 9


@NEEDED
@pytest.mark.parametrize("kind", ("Llama", "GPT-2"))
def test_transformers_models_attend_through_it(tmp_path, kind):
    """All blocks kept are its own logits, padded or not, and generate() goes on token by token through a cache."""
    import transformers
    save(kind, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    host = Host(model)
    ids = torch.randint(2, 300, (2, 90), generator=torch.Generator().manual_seed(0))
    visible = torch.ones_like(ids).bool()
    visible[1, :40] = False
    gates = Gates(2, host.heads, host.groups, host.width, 16).requires_grad_(False)
    everything, nothing = Sparse(gates, Point(-1e9)), Sparse(gates, Point(1e9))
    with torch.no_grad():
        for mask in (None, visible):
            own, sparse_ = host.hidden(ids, None, mask), host.hidden(ids, everything, mask)
            seen = torch.ones_like(visible) if mask is None else visible
            assert torch.allclose(own[seen], sparse_[seen], atol=1e-4)
            assert not torch.allclose(own[seen], host.hidden(ids, nothing, mask)[seen], atol=1e-2)
        options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
        expected = model.generate(ids[:1], **options)
        with host.attending(everything):
            assert torch.equal(model.generate(ids[:1], **options), expected)
        with host.attending(Sparse(gates, Point(1.0))):
            written = model.generate(ids[:1], **options)
        whole = host.log_p(host.hidden(written[:, :-1], Sparse(gates, Point(1.0))))
        assert torch.equal(whole[0, 89:].argmax(-1), written[0, 90:])           # decoding reads as a prompt does


@NEEDED
def test_heads_that_drop_old_keys_need_not_hold_them(tmp_path):
    """Token by token through a cache that holds less, the same logits; its bytes are those of the formula."""
    import transformers

    from surgery.dropping_cache import dropping_cache
    from surgery.modeling_dba import CACHE
    save("Llama", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    host, ids = Host(model), torch.randint(2, 300, (2, 128), generator=torch.Generator().manual_seed(0))
    gates = Gates(2, host.heads, host.groups, host.width, 16).requires_grad_(False)
    record = dict(shift=1.0, drops=[[0, 0], [0, 1], [1, 2], [1, 3]])            # a key head in each layer
    point = point_of(gates, record)
    cache = dropping_cache(gates, point, host.groups)
    with torch.no_grad(), host.attending(Sparse(gates, point)):
        whole = model(ids, use_cache=False).logits
        for start, stop in ((0, 70), *((i, i + 1) for i in range(70, 128))):
            part = model(ids[:, start:stop], use_cache=True, **{CACHE: cache}).logits
            assert torch.allclose(part, whole[:, start:stop], atol=1e-4), start
    full = 2 * 2 * 2 * 128 * host.groups * host.width * 4  # layers, keys and values, texts, tokens, float32
    held = sum(layer.nbytes() for layer in cache.layers)
    assert held == full * dropped_bytes(gates, record, 128) - full // 2 * 16 // 128      # 128: the own block is empty


@NEEDED
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    make_text(tmp_path)
    save("ours", tmp_path / "model")
    flags = f"mask --model model {FLAGS}"
    assert_done(convert(f"{flags} --out-dir whole", tmp_path))
    for count in (1, 3, 7):
        program = [str(Path(__file__).parent / "kill_mask.py"), str(count)]
        result = cli(f"{flags} --out-dir killed", tmp_path, program=program)
        assert result.code == -signal.SIGKILL, result
    assert_done(convert(f"{flags} --out-dir killed", tmp_path))
    whole, killed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(killed["gates"][name], value) for name, value in whole["gates"].items())
    logs = []
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        logs.append([{key: value for key, value in line.items() if key != "seconds"} for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 9


def test_without_safetensors_nothing_is_begun(tmp_path, monkeypatch):
    make_text(tmp_path)
    save("ours", tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_error(convert(f"mask --model model {FLAGS} --out-dir out", tmp_path), "pip install -r requirements-eval.txt")
    assert not (tmp_path / "out").exists()


@NEEDED
@pytest.mark.parametrize("flags,words", (
    ("--rows 5", "--rows 5 doesn't divide --block 16"),
    ("--rows 0", "at least 1"),
    ("--index-bits 7", "to 6"),
    ("--index-bits nan", "to 6"),
    ("--windows 0", "at least 1"),
    ("--kl 0", "above 0"),
    ("--kl 0.01 nan", "finite"),
    ("--kl inf", "finite"),
    ("--lr nan", "finite"),
    ("--lr inf", "finite"),
    ("--eval-data text.txt model/../text.txt", "the same name"),
    ("--budgets 2", "3 blocks"),
    ("--lengths 1000", "to the 160"),
    ("--eval-lengths 30", "from 64"),
    ("--data missing.txt", "missing.txt"),
    ("--data short.txt", "fewer than a window"),
    ("--eval-data short.txt", "too few"),
    ("--model nowhere", "nowhere"),
    ("--model broken", "broken"),
    ("--model t5", "it is a t5"),
    ("--model numbers", "num_hidden_layers"),
    ("--model windows", "windows of its own"),
    ("--mass-steps 6", "learned with mass_steps 5, not 6"),
    ("--out-dir text.txt", "text.txt"),
))
def test_what_can_be_mended_is_said_in_a_line(tmp_path, flags, words):
    make_text(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    save("ours", tmp_path / "model")
    for name, content in (("broken", "{"), ("t5", '{"model_type": "t5"}'),
                          ("numbers", '{"model_type": "llama", "num_hidden_layers": "x"}'),
                          ("windows", '{"model_type": "mistral", "sliding_window": 32}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "out").mkdir()
    plan = dict(block=16, rows=1, index_bits=2.0, lengths=[96], mass_steps=5)
    torch.save(dict(plan=plan), tmp_path / "out" / "last.pt")
    assert_error(convert(f"mask --model model {FLAGS} --out-dir out {flags}", tmp_path), words)


QUICK = ("--data text.txt --block 16 --lengths 64 --mass-steps 1 --updates 1 --logits-steps 1 --logits-length 64 "
         "--calibration 1 --device cpu --eval-data text.txt --eval-lengths 64 --windows 1 --measure controls")


@NEEDED
@pytest.mark.parametrize("steps", ("--mass-steps 0", "--logits-steps 0", "--mass-steps 0 --logits-steps 0"))
def test_either_kind_of_step_can_be_left_out_and_the_same_command_goes_on(tmp_path, steps):
    make_text(tmp_path)
    save("ours", tmp_path / "model")
    for _ in range(2):
        assert_done(convert(f"mask --model model {QUICK} {steps} --out-dir out", tmp_path))


@NEEDED
def test_texts_are_known_by_their_ids(tmp_path):
    """Another text of the same name is measured, not taken for the one before."""
    make_text(tmp_path)
    save("ours", tmp_path / "model")
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        make_text(tmp_path / name, "new.txt", seed=seed)
    written = []
    for name in ("a", "b", "a"):
        assert_done(convert(f"mask --model model {QUICK} --out-dir out --eval-data {name}/new.txt", tmp_path))
        written.append(json.loads((tmp_path / "out" / "eval_mask.json").read_text())["records"])
    assert written[0] == written[2] and not any(record in written[0] for record in written[1])
    assert len((tmp_path / "out" / "eval.jsonl").read_text().splitlines()) == len(written[0]) + len(written[1])


@NEEDED
def test_a_damaged_folder_is_said_in_a_line(tmp_path):
    make_text(tmp_path)
    save("ours", tmp_path / "model")
    command = f"mask --model model {QUICK} --out-dir out"
    assert_done(convert(command, tmp_path))
    out, kept = tmp_path / "out", snapshot(tmp_path / "out")
    state = torch.load(out / "last.pt", weights_only=True)
    for change in (dict(gates={}), dict(optimizers=[]), dict(plan=3)):
        torch.save({**state, **change}, out / "last.pt")
        assert_error(convert(command, tmp_path), "last.pt can't be read", "--out-dir")
    for name, content in (("last.pt", b"garbage"), ("train.jsonl", b"garbage\n\n"), ("eval.jsonl", b"{}\n{}\n"),
                          ("train.jsonl", b'{"type": "meta"}\n')):
        (out / "last.pt").write_bytes(kept["last.pt"])
        before = (out / name).read_bytes()
        (out / name).write_bytes(content)
        assert_error(convert(command, tmp_path), name, "--out-dir")
        assert (out / name).read_bytes() == content        # whoever's it is
        (out / name).write_bytes(before)
    assert_error(convert(f"{command} --calibration 2", tmp_path), "on 1 windows, not --calibration 2")
    torn = kept["eval.jsonl"][:-9]                         # killed in the last line of its measurements
    (out / "eval.jsonl").write_bytes(torn)
    for _ in range(2):
        assert_done(convert(command, tmp_path))
        assert (out / "eval.jsonl").read_bytes() == kept["eval.jsonl"]


@NEEDED
def test_gates_that_are_not_finite_are_not_saved(tmp_path):
    make_text(tmp_path)
    save("ours", tmp_path / "model")
    assert_error(convert(f"mask --model model {QUICK} --out-dir out --kl 1e-300", tmp_path), "step 2", "aren't finite")
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 1


@NEEDED
def test_what_is_refused_before_all_work(tmp_path):
    """Logits that are no numbers, another run's folder, code that a folder brings, a tokenizer of no tokens."""
    make_text(tmp_path)
    model = saved(tmp_path / "model", dict(block=160, **OTHERS["groups, one temperature"]))
    kept = snapshot(tmp_path / "model")
    command = f"mask {QUICK} --model model --out-dir"
    assert_error(convert(f"{command} model", tmp_path), "best.pt of another run", "--out-dir")
    assert set(snapshot(tmp_path / "model")) == set(kept)
    assert_done(convert("export --ckpt model --out-dir brings_code", tmp_path))
    assert_error(convert(f"{command} out --model brings_code", tmp_path), "brings_code can't be read")
    save("Llama", tmp_path / "wordless")
    for path in (tmp_path / "wordless").glob("token*"):
        path.unlink()
    assert_error(convert(f"{command} out --model wordless", tmp_path), "wordless")
    for value in (math.nan, math.inf, 3e38):
        model.blocks[1].mlp.up.weight.data[:] = value
        save_checkpoint(tmp_path / "model/best.pt", model.cfg, make_tokenizer("byte", None), model, step=1)
        assert_error(convert(f"{command} out", tmp_path), "the model's own logits aren't finite")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_to_be_full(tmp_path):
    with pytest.raises(UserError, match="disk full"), writing(tmp_path / "last.pt"):
        save_to(dict(step=1), Path("/dev/full"))


@pytest.mark.parametrize("edge", (-7.3, -0.2, 0.9, 5.1))
def test_shifts_close_in_on_a_kl_wherever_it_is(edge):
    """KL rises with the shift and passes the target at `edge`; each try halves what is unknown, once it is bounded."""
    kls = {}
    for _ in range(12):
        best, shift = best_shift(0.01, kls)
        assert shift not in kls
        kls[shift] = 0.01 * 2 ** (shift - edge)
    best, _ = best_shift(0.01, kls)
    assert edge - 0.02 < best <= edge
    assert best_shift(1e-9, kls)[0] is None
    assert best_shift(0.01, {0.0: math.nan})[0] is None
