"""Attention modes against an independent float64 reference, RoPE, null token, causality, the KV cache and its bytes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
import train_dba as dba
from reference import (
    MODES,
    UNGROUPED,
    VOCAB,
    cached_logits,
    close,
    config,
    model_of,
    null_and_tie,
    poisoned,
    randomize,
    settings,
    tokens,
    weights,
)

EXACT = 2e-5                                               # queries, rotated keys and cached values are float32


def compare_with_reference(given, T, B=2):
    attn = randomize(dba.Attention(config(given)).double())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, given["d_model"], dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.randn(B, T, given["d_model"], dtype=torch.float64, generator=generator)

    w, x_ref = weights(attn), x.detach().clone().requires_grad_()
    expected, scores = reference.attention(w, x_ref, given)
    if T > 1:
        assert 0.7 < scores.std() < 5, f"scores of order {scores.std():.2f} make this a weak test"
    (expected * upstream).sum().backward()

    actual = attn(x)
    (actual * upstream).sum().backward()
    close(actual, expected, EXACT, "output")
    close(x.grad, x_ref.grad, EXACT, "gradient of the input")
    for name, p in attn.named_parameters():
        assert T == 1 or w[name].grad.abs().max() > 1e-3, f"{name} takes no part"
        close(p.grad, w[name].grad, EXACT, f"gradient of {name}")


def combinations():
    """mode x null x tie x learned temperature x one temperature x RoPE, wherever make_config allows it."""
    for mode, null, tie, temp, one, rope in itertools.product(MODES, *[(False, True)] * 5):
        if (mode in UNGROUPED or not tie) and (mode.startswith("decoupled") or not one):
            flags = dict(null_attn=null, tie_qk=tie, learned_temp=temp, one_temperature=one, rope=rope)
            yield pytest.param(mode, flags, id="-".join([mode, *(name for name, on in flags.items() if on)]))


@pytest.mark.parametrize("mode, flags", list(combinations()))
def test_forward_and_gradients_match_the_reference(mode, flags):
    compare_with_reference(settings(mode, **flags), T=11)


@pytest.mark.parametrize("null", (False, True))
@pytest.mark.parametrize("widths", [
    dict(n_head=2, sem_dim=16, geo_dim=64),                        # 8, 32 and 40 per head, as in the papers
    dict(n_head=2, sem_dim=128, geo_dim=128, attn_dim=128),        # 64; the null channel goes past a multiple of 8
    dict(n_head=3, sem_dim=9, geo_dim=6, attn_dim=15),                       # 3, 2, 5
    dict(n_head=4, sem_dim=16, geo_dim=48, attn_dim=4),                      # 4, 12 and values narrower than the keys
    dict(n_head=4, sem_dim=8, geo_dim=8, attn_dim=80),                       # values wider than the keys
    dict(n_head=6, sem_dim=12, geo_dim=24, attn_dim=30, kv_head=1),          # one key for all heads
    dict(n_head=6, sem_dim=12, geo_dim=24, attn_dim=30, kv_head=3),
], ids=str)
def test_widths(widths, null):
    given = dict(attn_mode="decoupled", d_model=20, norm_eps=1e-2, rope_base=500.0, null_attn=null, **widths)
    compare_with_reference(given, T=37, B=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", (1, 2, 37))
def test_lengths_with_null(mode, T):
    compare_with_reference(settings(mode, null_attn=True, learned_temp=True), T, B=3)


def test_mla_default_shape():
    given = dict(attn_mode="mla", n_head=4, d_model=48, norm_eps=1e-2, rope_base=500.0, null_attn=True)
    shape = config(given).attention
    assert shape.streams == {"latent": 12, "k_rope": 6}
    compare_with_reference(given, T=9)


# --- RoPE

def rope_inputs(p, T=23, n=4):
    generator = torch.Generator().manual_seed(p)
    x = torch.randn(1, n, T, p, generator=generator, dtype=torch.float64)
    return x, torch.arange(T)[None], 500.0 ** (-torch.arange(0, p, 2, dtype=torch.float64)[None] / p)


@pytest.mark.parametrize("p", (2, 6, 8, 64))
def test_rope_is_a_complex_rotation_that_keeps_norms(p):
    x, pos, inv_freq = rope_inputs(p)
    y = dba.rope(x, pos, inv_freq)
    close(y, torch.stack([reference.rotate(head, 500.0) for head in x[0]])[None], 1e-5)
    close(y.norm(dim=-1), x.norm(dim=-1), 1e-5)
    assert (y[:, :, 5] - x[:, :, 5]).abs().max() > 0.1
    assert torch.equal(y[:, :, 0], x[:, :, 0].float())     # position 0 does not turn


def test_rope_scores_depend_on_distance_only():
    x, _, inv_freq = rope_inputs(8, T=1)
    q, k = x, x.roll(1, 1)
    at = [torch.tensor([[n]]) for n in (0, 3, 40, 43)]
    score = [[(dba.rope(q, a, inv_freq) * dba.rope(k, b, inv_freq)).sum(-1) for b in at] for a in at]
    close(score[1][0], score[3][2], 1e-5)                  # 3 apart
    close(score[2][0], score[3][1], 1e-5)                  # 40 apart
    assert (score[1][0] - score[0][1]).abs().max() > 0.1   # -3 is not 3
    assert (score[1][0] - score[2][0]).abs().max() > 0.1


def test_rope_takes_positions_per_sequence_and_frequencies_per_group():
    x, _, inv_freq = rope_inputs(6, T=5, n=4)
    x = x.repeat(2, 1, 1, 1)
    pos = torch.stack([torch.arange(5), torch.arange(7, 12)])
    per_group = torch.cat([inv_freq, inv_freq * 0.3])      # heads 0, 1 turn by the first row, heads 2, 3 by the second
    y = dba.rope(x, pos, per_group)
    for b, n in itertools.product(range(2), range(4)):
        alone = dba.rope(x[b:b + 1, n:n + 1], pos[b:b + 1], per_group[n // 2:n // 2 + 1])
        close(y[b, n], alone[0, 0], 1e-6)
    assert (y - dba.rope(x, pos, inv_freq)).abs().max() > 0.1


@pytest.mark.parametrize("mode", ("decoupled", "decoupled_gqa", "decoupled_latent"))
def test_attention_with_frequencies_per_group(mode):
    """Surgery brings a row of inverse frequencies per group: equal rows change nothing, others do, cached or not."""
    given = settings(mode)
    cfg = config(given)
    attn = randomize(dba.Attention(cfg))
    x = torch.randn(2, 9, cfg.d_model, generator=torch.Generator().manual_seed(0))
    before = attn(x)
    groups = cfg.kv_head or cfg.n_head
    attn.inv_freq = attn.inv_freq[:1].repeat(groups, 1)
    close(attn(x), before, 1e-6)
    attn.inv_freq = attn.inv_freq * (1 + torch.arange(groups))[:, None]
    changed = attn(x)
    assert (changed - before).abs().max() > 0.01
    cache = dba.KVCache(cfg, 2, 9, "fp32")
    close(attn(x, cache, 0, cache.begin(9)), changed, EXACT)


def test_a_checkpoint_carries_frequencies_per_group(tmp_path):
    """Those of a converted model, beside a latent."""
    model, idx, tokenizer = model_of(settings("decoupled_latent")), tokens(1, 9), dba.make_tokenizer("byte", None)
    model = dba.GPT(model.cfg, tokenizer.vocab_size).init_weights()
    for block in model.blocks:
        block.attn.inv_freq *= 1 + torch.arange(3)[:, None]
    dba.save_checkpoint(tmp_path / "best.pt", model.cfg, tokenizer, model, step=1)
    loaded = dba.load_model(dba.load_checkpoint(tmp_path))
    assert all(torch.equal(a.attn.inv_freq, b.attn.inv_freq) for a, b in zip(loaded.blocks, model.blocks))
    close(loaded(idx), model(idx), 1e-6)


# --- Null token

@pytest.mark.parametrize("cached", (False, True), ids=("forward", "cache"))
@pytest.mark.parametrize("mode", MODES)
def test_null_score_does_not_depend_on_position(mode, cached):
    """The same token everywhere, and keys and values of zero: the share of the null value tells its score exactly."""
    given = settings(mode, null_attn=True, learned_temp=True)
    cfg, T = config(given), 13
    attn = randomize(dba.Attention(cfg))
    with torch.no_grad():
        for key in attn.k.values() if not attn.shape.latent else [attn.k["geo"], attn.latent[0]]:
            key.weight.zero_()
        if not attn.shape.latent:
            attn.v.weight.zero_()
        attn.o.weight.copy_(torch.randn(attn.o.weight.shape))
    x = torch.randn(1, 1, cfg.d_model, generator=torch.Generator().manual_seed(3)).expand(1, T, -1)
    with torch.no_grad():                                  # merged heads, before W_o mixes them
        merged = []
        attn.o.register_forward_pre_hook(lambda module, args: merged.append(args[0]))
        cache = dba.KVCache(cfg, 1, T, "fp32")
        attn(x, cache, 0, cache.begin(T)) if cached else attn(x)
    null_v = attn.v(attn.null["latent"]) if attn.shape.latent else attn.null["v"]
    G = cfg.kv_head or cfg.n_head
    null_v = null_v.view(G, -1).repeat_interleave(cfg.n_head // G, 0)                # [H, v]
    share = merged[0][0].view(T, cfg.n_head, -1) / null_v                            # [T, H, v]: its probability
    p = share.mean(-1).double()
    close(share, p[..., None].expand_as(share), 1e-4)
    score = torch.log(p / (1 - p) * torch.arange(1, T + 1)[:, None])                 # against T keys of score 0
    assert score.abs().max() > 0.5
    close(score, score[:1].expand_as(score), 1e-4)


# --- Causality, fused kernel

@pytest.mark.parametrize("mode, null, tie", null_and_tie())
@torch.no_grad()
def test_no_logit_sees_a_later_token(mode, null, tie):
    model = model_of(settings(mode, null_attn=null, tie_qk=tie))
    idx = tokens(2, 37)
    other = idx.clone()
    other[:, 20] = (idx[:, 20] + 1) % VOCAB
    for logits in (model, lambda i: cached_logits(model, i, [7, 25, 5])):            # 20 lies amid a chunk
        a, b = logits(idx), logits(other)
        close(b[:, :20], a[:, :20], 1e-6)
        assert (b[:, 20] - a[:, 20]).abs().max() > 0.01 and (b[:, -1] - a[:, -1]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("null", (False, True))
@pytest.mark.parametrize("mode", MODES)
def test_the_fused_cpu_kernel_runs(mode, null, dtype):
    attn = randomize(dba.Attention(config(settings(mode, null_attn=null, learned_temp=null))))
    x = torch.randn(2, 37, attn.o.out_features, requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), reference.Recorder() as ran, \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        attn(x).float().square().sum().backward()
    assert x.grad.isfinite().all()
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [name for name in ran.names if "scaled_dot_product" in name] == [fused, fused + "_backward"]


@pytest.mark.parametrize("null", (False, True))
@pytest.mark.parametrize("mode", MODES)
def test_kernels_get_one_width_that_they_take(mode, null, monkeypatch):
    """CUDA's fused kernels need multiples of 8, which no CPU would tell."""
    fused, widths = F.scaled_dot_product_attention, []

    def spy(q, k, v, **how):
        widths.append({x.size(-1) for x in (q, k, v)})
        return fused(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    shape = config(settings(mode, null_attn=null)).attention
    dba.Attention(config(settings(mode, null_attn=null)))(torch.randn(1, 3, MODES[mode]["d_model"]))
    wanted = max(sum(path.width for path in shape.paths) + null, shape.v_width)
    assert widths == [{8 * len(range(0, wanted, 8))}]


@pytest.mark.parametrize("null", (False, True))
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_stays_near_the_reference(mode, null):
    given = settings(mode, null_attn=null)
    attn = randomize(dba.Attention(config(given)))
    x = torch.randn(2, 37, given["d_model"], generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        actual = attn(x)
    close(actual, reference.attention(weights(attn), x.double(), given)[0], 0.02)


# --- KV cache

SCHEDULES = {"at once": [37], "one by one": [1] * 37, "chunks": [5, 1, 16, 15]}


@pytest.mark.parametrize("mode, null, tie", null_and_tie())
def test_cached_logits_equal_uncached(mode, null, tie):
    model = model_of(settings(mode, null_attn=null, tie_qk=tie, learned_temp=True))
    idx = tokens(2, 37)
    expected = model(idx)
    for name, schedule in SCHEDULES.items():
        close(cached_logits(model, idx, schedule), expected, EXACT, name)


@pytest.mark.parametrize("fmt, tolerance", (("fp16", 5e-3), ("bf16", 4e-2)))         # about 8 units of the last place
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_caches(mode, fmt, tolerance):
    model = model_of(settings(mode, null_attn=True))
    idx = tokens(2, 37)
    expected, actual = model(idx), cached_logits(model, idx, [20] + [1] * 17, fmt)
    close(actual, expected, tolerance)
    assert (actual - expected).abs().max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("null", (False, True))
@torch.no_grad()
def test_decode_attention_keeps_to_float32_under_autocast(null):
    """Sampling runs inside autocast. Scores rounded to bfloat16 would be worse than those of training's fused kernel,
    which adds them up in float32, and an fp32 cache would be worth no more than a bf16 one."""
    shape = config(settings("decoupled")).attention
    generator = torch.Generator().manual_seed(0)
    cache = dba.KVCache(config(settings("decoupled")), 2, 128, "fp32")
    streams = cache.layers[0]
    for stream in streams.values():
        stream.codes.copy_(torch.randn(stream.codes.shape, generator=generator))
    cache.length = cache.settled = torch.tensor([100, 50])
    q, span = torch.randn(2, 4, 3, 12, generator=generator), cache.begin(3)
    null = (torch.randn(2, 4, 3, generator=generator), torch.randn(4, 12, generator=generator)) if null else None
    expected = dba.decode_attention(q, streams, shape, span, null)
    with torch.autocast("cpu", torch.bfloat16):
        actual = dba.decode_attention(q, streams, shape, span, null)
    assert actual.dtype == torch.float32
    close(actual, expected, 1e-6)


@pytest.mark.parametrize("null", (False, True))
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_online_softmax_over_several_chunks(mode, null, monkeypatch):
    """decode_attention walks the cache 64 tokens at a time."""
    widths = {"standard": dict(d_model=128), "bottleneck": dict(attn_dim=128), "gqa": dict(attn_dim=128, kv_head=8),
              "decoupled": dict(sem_dim=64, geo_dim=128), "decoupled_gqa": dict(sem_dim=64, geo_dim=128, kv_head=8),
              "decoupled_latent": dict(sem_dim=64, geo_dim=128, kv_head=2, kv_lora_rank=8),
              "mla": dict(attn_dim=64, kv_lora_rank=8, rope_dim=4)}
    given = {**dict(attn_mode=MODES[mode]["attn_mode"], n_head=64, d_model=16, null_attn=null), **widths[mode]}
    cfg = config(given)
    attn = randomize(dba.Attention(cfg))
    x = torch.randn(1, 530, cfg.d_model, generator=torch.Generator().manual_seed(1))
    reads, read = [], dba.CacheStream.read
    monkeypatch.setattr(dba.CacheStream, "read", lambda self, *where: reads.append(where) or read(self, *where))
    monkeypatch.setattr(dba, "CACHE_BLOCK", 64)
    monkeypatch.setattr(dba, "DECODE_CHUNK", 1)
    cache = poisoned(cfg, 1, 530)
    first = attn(x[:, :18], cache, 0, span := cache.begin(18))
    cache.advance(span)
    rest = attn(x[:, 18:], cache, 0, cache.begin(512))
    assert len(set(reads)) >= 5, f"only the chunks {sorted(set(reads))} were read"
    close(torch.cat([first, rest], 1), attn(x), EXACT)


@torch.no_grad()
def test_a_long_cache_is_never_copied_whole():
    """decode_attention walks the cache; the float32 copy of one chunk must not be as large as the cache itself."""
    cfg = config(dict(attn_mode="decoupled", n_head=2, d_model=8, sem_dim=256, geo_dim=256))
    cache = dba.KVCache(cfg, 1, 2**15, "fp16")
    for stream in cache.layers[0].values():
        stream.codes.zero_()
    attn = dba.Attention(cfg)
    with reference.Recorder() as ran:
        cache.length = cache.settled = torch.tensor([2**15 - 1])
        attn(torch.zeros(1, 1, 8), cache, 0, cache.begin(1))
    assert 0 < ran.largest <= 2**22, f"allocated {ran.largest:,} elements beside keys of {512 * 2**15:,}"


@pytest.mark.parametrize("null", (False, True))
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_rows_of_different_length(mode, null):
    model = model_of(settings(mode, null_attn=null))
    lengths, idx, more = (3, 17, 29), tokens(3, 29), tokens(3, 6, seed=1)
    cache = poisoned(model.cfg, 3, 40)
    model(idx, cache=cache)
    cache.truncate(torch.tensor(lengths))                  # forget a different number of tokens of each sequence
    actual = torch.cat([model(chunk, cache=cache) for chunk in more.split([1, 4, 1], 1)], 1)
    assert cache.length.tolist() == [n + 6 for n in lengths]
    for row, n in enumerate(lengths):
        alone = model(torch.cat([idx[row:row + 1, :n], more[row:row + 1]], 1))
        close(actual[row], alone[0, n:], EXACT, f"row {row}")


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_truncate_and_append_again(mode):
    model = model_of(settings(mode, null_attn=True))
    idx = tokens(2, 30)
    cache = poisoned(model.cfg, 2, 30)
    model(idx[:, :12], cache=cache)
    model(tokens(2, 10, seed=5), cache=cache)              # other tokens, to be forgotten
    cache.truncate(12)
    assert cache.length.tolist() == [12, 12]
    close(model(idx[:, 12:], cache=cache), model(idx)[:, 12:], EXACT)
    cache.truncate(99)                                     # longer than what is held: nothing to forget
    assert cache.length.tolist() == [30, 30]


def test_going_past_the_capacity_is_an_error():
    model = model_of(settings("decoupled"))
    cache = dba.KVCache(model.cfg, 1, 512, "fp32")
    assert cache.capacity == 512
    model(tokens(1, 511), cache=cache)
    with pytest.raises(ValueError, match="512"):
        model(tokens(1, 2), cache=cache)
    assert cache.length.tolist() == [511]
    model(tokens(1, 1), cache=cache)                       # what fits still does
    with pytest.raises(ValueError):
        model(tokens(1, 1), cache=cache)
    cache.truncate(0)
    model(tokens(1, 512), cache=cache)


@pytest.mark.parametrize("mode, streams", (("mla", dict(latent=12, k_rope=6)),
                                           ("decoupled_latent", dict(latent=14, k_geo=18))))
@torch.no_grad()
def test_decoding_from_a_latent(mode, streams):
    model = model_of(settings(mode))
    cache = dba.KVCache(model.cfg, 2, 37, "fp16")
    for layer in cache.layers:
        assert {name: stream.codes.shape[1] for name, stream in layer.items()} == streams
    assert cache.nbytes() == 2 * 2 * 512 * 2 * sum(streams.values())
    calls = []
    for block in model.blocks:
        for projection in (block.attn.k["sem"], block.attn.v):
            projection.register_forward_hook(lambda *args: calls.append(1))
    model(tokens(2, 5), cache=cache)
    model(tokens(2, 1), cache=cache)
    assert not calls                                       # no key or value was projected up
    model(tokens(2, 5))
    assert len(calls) == 4


# --- Bytes

@pytest.mark.parametrize("fmt", dba.FLOAT_FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_owned_bytes_are_the_predicted_ones(mode, fmt):
    cfg = config(settings(mode))
    for batch, length, capacity in ((1, 1, 512), (3, 512, 512), (2, 513, 1024)):
        cache = dba.KVCache(cfg, batch, length, fmt)
        assert cache.capacity == capacity
        assert cache.nbytes() == dba.kv_bytes_per_token(cfg)[fmt] * capacity * batch


def blocks(channels):
    """Scales of a token: one of two bytes for every 32 channels that have begun."""
    return 2 * len(range(0, channels, 32))


@pytest.mark.parametrize("total", (2, 6, 30, 34, 40, 62, 96, 100, 1026))
def test_bytes_of_odd_widths(total):
    """A bottleneck of one head: two streams of `total` channels, and of an odd number where RoPE is off."""
    for C in (total, total + 1):
        cfg = config(dict(attn_mode="bottleneck", n_head=1, attn_dim=C, layers=3, rope=False))
        got = dba.kv_bytes_per_token(cfg)
        four_bits = C // 2 + C % 2 + blocks(C)
        assert got == {"fp32": 3 * 8 * C, "bf16": 3 * 4 * C, "fp16": 3 * 4 * C, "q8_0": 3 * 2 * (C + blocks(C)),
                       "q4_0": 3 * 2 * four_bits, "q4_sym": 3 * 2 * four_bits, "nf4": 3 * 2 * four_bits,
                       "q3_0": 3 * 2 * (math.ceil(3 * C / 8) + blocks(C)),
                       "q2_0": 3 * 2 * (math.ceil(C / 4) + blocks(C)), "hetero": None}


ONE_B = dict(size="1b", layers=1)


@pytest.mark.parametrize("given, fmt, expected", [
    (dict(exp="paper_decoupled_sem8"), "fp16", 5120),
    (dict(exp="paper_decoupled_sem8"), "hetero", 1952),
    (dict(exp="paper_gqa"), "fp16", 1024),
    (dict(exp="paper_gqa"), "q4_0", 288),
    (dict(exp="paper_mla"), "fp16", 1152),
    (dict(exp="paper_baseline"), "q4_0", 2304),
    (dict(exp="paper_baseline"), "fp16", 2 * 2 * 2048),
    (dict(exp="paper_bottleneck"), "fp16", 2 * 2 * 48 * 32),
    (dict(exp="paper_decoupled"), "fp16", 2 * (512 + 1024 + 1536)),
    (dict(attn_mode="decoupled", sem_dim=512, geo_dim=1024, kv_head=4), "fp16", 2 * 4 * (16 + 32 + 48)),
    (dict(attn_mode="decoupled", sem_dim=512, geo_dim=1024, kv_head=4, kv_lora_rank=96), "hetero", 48 + 6 + 128 + 8),
    (dict(attn_mode="gqa", kv_head=1), "fp16", 2 * 2 * 64),
    # the claims ledger's corrected 128k figures, in bytes: 32 layers at d_model 4096
    (dict(attn_mode="decoupled", d_model=4096, n_head=32, sem_dim=32, geo_dim=64), "hetero", 18 + 68 + 54),
    (dict(attn_mode="bottleneck", d_model=4096, n_head=16, attn_dim=96), "q4_0", 2 * 54),
], ids=str)
def test_bytes_of_the_papers_models(given, fmt, expected):
    assert dba.kv_bytes_per_token(config({**ONE_B, **given}))[fmt] == expected


def test_bytes_count_every_layer():
    one, many = (dba.kv_bytes_per_token(config(dict(exp="paper_decoupled", layers=n))) for n in (1, 22))
    assert many == {fmt: 22 * n for fmt, n in one.items()}
