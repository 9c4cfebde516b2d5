"""The whole model against a float64 reference, parameter counts, loss, initialisation, optimiser and generation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import reference
import train_dba as dba
from reference import MODES, close, config, null_and_tie, randomize, settings, weights

VOCAB = 50                                                 # the embedding has 64 rows


def model_of(given, vocab_size=VOCAB, seed=0):
    return randomize(dba.GPT(config(given), vocab_size), seed).eval()


def tokens(B, T, seed=0, vocab_size=VOCAB):
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# --- The whole model

@pytest.mark.parametrize("mlp", ("swiglu", "gelu"))
@pytest.mark.parametrize("embed_dim", (None, 10))
@pytest.mark.parametrize("mode", MODES)
def test_logits_loss_and_gradients_match_the_reference(mode, embed_dim, mlp):
    given = settings(mode, null_attn=True, learned_temp=True, embed_dim=embed_dim, mlp=mlp)
    model, idx, targets = model_of(given), tokens(2, 13), tokens(2, 13, seed=1)
    w = weights(model)
    expected = reference.gpt(w, idx, given, VOCAB)
    close(model(idx), expected, 2e-5, "logits")

    nll = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    nll.backward()
    loss = model(idx, targets)
    loss.backward()
    close(loss, nll, 1e-5, "loss")
    for name, p in model.named_parameters():
        close(p.grad, w[name].grad, 5e-5, f"gradient of {name}")


# --- Parameters

def part_of(name):
    if "embed" in name:
        return "embedding"
    if ".null." in name:
        return "null"
    if name.split(".")[-2] in ("attn_norm", "mlp_norm", "norm"):
        return "norm"
    return "mlp" if ".mlp." in name else "attention"


@pytest.mark.parametrize("mode, null, tie", null_and_tie())
def test_parameters_by_formula_are_the_models(mode, null, tie):
    for temp, embed_dim, mlp in itertools.product((False, True), (None, 10), ("swiglu", "gelu")):
        cfg = config(settings(mode, null_attn=null, tie_qk=tie, learned_temp=temp, embed_dim=embed_dim, mlp=mlp))
        owned = dict.fromkeys(("embedding", "attention", "mlp", "norm", "null"), 0)
        for name, p in dba.GPT(cfg, 130).named_parameters():
            owned[part_of(name)] += p.numel()
        assert dba.count_params(cfg, 130) == {**owned, "total": sum(owned.values())}


def test_parameter_counts_by_hand():
    """Worked out apart from the code: d_model 512, 6 layers, SwiGLU 2048, 33,278 WikiText-2 types in 33,280 rows."""
    small = dict(size="small")
    assert dba.count_params(config(small), 33278) == dict(
        embedding=33280 * 512, attention=6 * 4 * 512 * 512, mlp=6 * 3 * 512 * 2048, norm=13 * 512, null=0,
        total=17_039_360 + 6_291_456 + 18_874_368 + 6_656)
    dba_96 = dba.count_params(config(dict(small, attn_mode="decoupled", null_attn=True)), 33278)
    assert dba_96["attention"] == 6 * 512 * (2 * 32 + 2 * 64 + 96 + 96) and dba_96["null"] == 6 * (32 + 64 + 96)
    tied = dba.count_params(config(dict(small, attn_mode="decoupled", tie_qk=True)), 33278)
    assert dba_96["attention"] - tied["attention"] == 6 * 512 * 32
    latent = dba.count_params(config(dict(small, attn_mode="decoupled", kv_lora_rank=100, null_attn=True)), 33278)
    assert latent["attention"] == 6 * (512 * (32 + 2 * 64 + 96 + 100) + 100 * (32 + 96)) and latent["null"] == 6 * 164
    mla = dba.count_params(config(dict(small, attn_mode="mla")), 33278)              # latent 128, rope 32, 64 per head
    assert mla["attention"] == 6 * (512 * (512 + 8 * 32) + 512 * (128 + 32) + 128 + 2 * 128 * 512 + 512 * 512)


def test_decoupled_values_default_to_both_key_widths():
    assert config(dict(attn_mode="decoupled")).attn_dim == 96
    cfg = config(dict(attn_mode="decoupled", sem_dim=16, geo_dim=48, d_model=256))
    assert cfg.attn_dim == 64 and dba.GPT(cfg, 64).blocks[0].attn.v.out_features == 64
    assert config(dict(attn_mode="decoupled", attn_dim=128)).attn_dim == 128


@pytest.mark.parametrize("mode", reference.UNGROUPED)
def test_tie_qk_ties_the_semantic_path_only(mode):
    for tie in (False, True):
        attn = dba.Attention(config(settings(mode, tie_qk=tie)))
        if mode == "decoupled":
            assert (attn.q["sem"] is attn.k["sem"]) == tie
            assert attn.q["geo"].weight is not attn.k["geo"].weight
        else:
            assert list(attn.q) == ["geo"] and (attn.q["geo"] is attn.k["geo"]) == tie


@pytest.mark.parametrize("mode", ("gqa", "decoupled_gqa", "decoupled_latent", "mla"))
def test_tie_qk_is_refused_where_keys_are_grouped(mode):
    with pytest.raises(dba.UserError, match="--tie-qk"):
        config(settings(mode, tie_qk=True))


@pytest.mark.parametrize("mode", ("standard", "decoupled", "mla"))
def test_no_heads_is_a_user_error(mode):
    with pytest.raises(dba.UserError, match="--n-head 0"):
        config(dict(attn_mode=mode, n_head=0))


@pytest.mark.parametrize("given", (dict(attn_mode="other"), dict(mode="other"), dict(exp="paper_gqa", size="other")),
                         ids=str)
def test_a_bad_choice_is_a_user_error(given):
    """The other scripts call make_config themselves, with no argparse before it."""
    with pytest.raises(dba.UserError, match="other must be one of"):
        config(given)


@pytest.mark.parametrize("vocab_size, rows", ((1, 64), (63, 64), (64, 64), (65, 128), (50257, 50304)))
def test_embedding_rows(vocab_size, rows):
    with torch.device("meta"):
        assert dba.GPT(config(settings("standard")), vocab_size).embed.weight.shape == (rows, 32)


def test_padded_rows_get_no_probability_and_no_gradient():
    model, idx = model_of(settings("decoupled")), tokens(2, 9)
    with torch.no_grad():
        model.embed.weight[VOCAB:] = 100.0                 # would win every argmax and any sum of exponentials
    logits = model(idx)
    assert logits.shape == (2, 9, VOCAB)
    targets = tokens(2, 9, seed=1)
    loss = model(idx, targets)
    close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), 1e-5)
    loss.backward()
    assert model.embed.weight.grad[VOCAB:].abs().max() == 0
    assert (model.embed.weight.grad[:VOCAB].abs().amax(1) > 0).all()


# --- Initialisation

@pytest.mark.parametrize("mode", MODES)
def test_init(mode):
    given = settings(mode, null_attn=True, learned_temp=True, embed_dim=64)
    given.update(d_model=192, layers=3, d_ff=256, block=8, norm_eps=1e-5)
    if "attn_dim" in given:
        given["attn_dim"] *= 12
    torch.manual_seed(0)
    model = dba.GPT(config(given), 200)
    for name, p in model.named_parameters():
        if p.dim() == 2 or ".null." in name:               # the others are right from the start
            p.data.fill_(torch.nan)
    assert model.init_weights() is model
    for name, p in model.named_parameters():
        if "norm" in name or "latent.1" in name:
            assert (p == 1).all(), name
        elif "log_temp" in name:
            assert (p == 0).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name


def test_init_gives_the_loss_of_a_uniform_guess():
    torch.manual_seed(0)
    model = dba.GPT(config(dict(size="tiny", block=16)), 1000).init_weights()
    loss = model(tokens(2, 16, vocab_size=1000), tokens(2, 16, 1, 1000)) / 32
    assert loss.item() == pytest.approx(math.log(1000), abs=0.3)


# --- Dropout

def test_dropout_acts_in_training_only():
    model, idx = model_of(settings("decoupled", dropout=0.5)), tokens(2, 9)
    plain = model_of(settings("decoupled"))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(idx), plain(idx))
    model.train(), plain.train()
    assert torch.equal(plain(idx), plain(idx))
    torch.manual_seed(0)
    first, second = model(idx), model(idx)
    assert (first - second).abs().max() > 0.1 and (first - plain(idx)).abs().max() > 0.1
    torch.manual_seed(0)
    assert torch.equal(model(idx), first)


@pytest.mark.parametrize("where", ("embedding", "attention", "mlp"))
def test_dropout_acts_on_each_summand_of_the_stream(where):
    """Half of a summand's entries become zero and the others twice as large; the other summands are switched off."""
    model = model_of(settings("standard", dropout=0.5))
    model.train()
    block = model.blocks[0]
    silent = dict(embedding=model.embed, attention=block.attn.o, mlp=block.mlp.down)
    source = silent.pop(where)
    with torch.no_grad():
        for module in silent.values():
            if module is not model.embed:
                module.weight.zero_()
    seen = []
    source.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    if where == "embedding":
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        model(tokens(4, 32))
        before, after = seen
    else:
        x = torch.randn(4, 32, 32)
        after = block(x) - x
        before, = seen
    kept = after.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    close(after[kept], 2 * before[kept], 1e-4)


# --- Loss

def loss_inputs(N=37, E=12, rows=64, vocab_size=50):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, E, generator=generator)
    weight = torch.randn(rows, E, generator=generator)
    targets = torch.randint(0, vocab_size, (N,), generator=generator)
    targets[::5] = -1
    return h.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("vocab_size", (50, 64))
@pytest.mark.parametrize("rows_at_once", (1, 7, 36, 37, 1000))
def test_linear_cross_entropy(rows_at_once, vocab_size, monkeypatch):
    monkeypatch.setattr(dba, "LOGIT_CHUNK", {"cpu": 64 * rows_at_once})
    h, weight, targets = loss_inputs(vocab_size=vocab_size)
    h_ref, weight_ref = (t.detach().double().requires_grad_() for t in (h, weight))
    expected = F.cross_entropy(h_ref @ weight_ref[:vocab_size].T, targets, ignore_index=-1, reduction="sum")
    (3 * expected).backward()
    actual = dba.LinearCrossEntropy.apply(h, weight, targets, vocab_size, dba.nll_and_grad, True)
    (3 * actual).backward()
    close(actual, expected, 1e-6)
    close(h.grad, h_ref.grad, 1e-5)
    close(weight.grad, weight_ref.grad, 1e-5)
    assert (h.grad[::5] == 0).all()


def test_linear_cross_entropy_with_nothing_to_predict():
    h, weight, targets = loss_inputs()
    loss = dba.LinearCrossEntropy.apply(h, weight, torch.full_like(targets, -1), 50, dba.nll_and_grad, True)
    loss.backward()
    assert loss == 0 and (h.grad == 0).all() and (weight.grad == 0).all()


def test_linear_cross_entropy_of_large_logits():
    """A sure answer costs 0 and a sure mistake its margin, without overflow."""
    h = torch.tensor([[300.0], [300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = dba.LinearCrossEntropy.apply(h, weight, torch.tensor([0, 1]), 3, dba.nll_and_grad, True)
    assert loss.item() == pytest.approx(600)
    loss.backward()
    assert h.grad.flatten().tolist() == pytest.approx([0, 2])


def test_loss_under_bfloat16_autocast():
    model, idx, targets = model_of(settings("decoupled", null_attn=True)), tokens(4, 32), tokens(4, 32, seed=1)
    targets[:, -3:] = -1
    expected = model(idx, targets)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    close(loss, expected, 5e-3)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        cosine = F.cosine_similarity(p.grad.flatten(), gradients[name].flatten(), 0)
        assert cosine > 0.995, f"{name}: cosine {cosine:.4f}"
        assert p.grad.norm() == pytest.approx(gradients[name].norm().item(), rel=0.05), name


@pytest.mark.parametrize("training", (False, True), ids=("evaluation", "training"))
def test_the_full_logits_are_never_allocated(training, monkeypatch):
    given = dict(attn_mode="decoupled", d_model=8, n_head=2, sem_dim=4, geo_dim=4, layers=1, d_ff=8)
    model, idx = model_of(given, vocab_size=1000), tokens(8, 32, vocab_size=1000)
    monkeypatch.setattr(dba, "LOGIT_CHUNK", {"cpu": 16 * 1024})  # 16 of 256 rows
    monkeypatch.setattr(dba, "COMPACT", None)
    with torch.set_grad_enabled(training), reference.Recorder() as ran:
        loss = model(idx, idx)
        if training:
            loss.backward()
    assert 16 * 1024 <= ran.largest <= 2 * 16 * 1024 < idx.numel() * 1000
    assert ran.names.count("aten::gather") == 16           # one for each chunk


@pytest.mark.skipif(dba.COMPACT is None, reason="F.linear_cross_entropy is younger than this PyTorch")
@pytest.mark.parametrize("vocab_size", (600, 640))         # 640 rows
def test_pytorchs_loss_equals_ours(vocab_size, monkeypatch):
    """In float32 on a CPU: over several chunks, without targets of -1 and rows that pad the vocabulary."""
    given = settings("decoupled", null_attn=True)
    model, idx, targets = model_of(given, vocab_size), tokens(60, 10), tokens(60, 10, seed=1, vocab_size=vocab_size)
    targets[:, ::3] = -1
    used = []
    original = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *args, **how: used.append(1) or original(*args, **how))
    loss = model(idx, targets)
    (3 * loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert used
    with torch.no_grad():                                  # an evaluation needs none of its gradients
        close(model(idx, targets), loss, 1e-6)
    model.zero_grad()
    monkeypatch.setattr(dba, "COMPACT", None)
    expected = model(idx, targets)
    (3 * expected).backward()
    assert len(used) == 1
    close(loss, expected, 1e-6)
    for name, p in model.named_parameters():
        close(gradients[name], p.grad, 1e-5, name)


@torch.no_grad()
def test_evaluation_makes_no_gradients():
    """Without autograd, one product per chunk: the two that make the gradients would treble the cost of the loss."""
    model, idx = model_of(settings("decoupled")), tokens(2, 9)
    with reference.Recorder() as whole:
        model(idx, idx)
    with reference.Recorder() as body:
        model.hidden(idx)
    assert whole.names.count("aten::mm") - body.names.count("aten::mm") == 1


# --- torch.compile

@pytest.mark.parametrize("mode", ("standard", "decoupled"))
def test_compiled_model_equals_eager(mode, monkeypatch):
    monkeypatch.setattr(dba, "COMPACT", None)              # PyTorch's loss isn't compiled
    given = settings(mode, null_attn=mode == "decoupled", learned_temp=mode == "decoupled", layers=1)
    eager, idx, targets = model_of(given), tokens(2, 16), tokens(2, 16, seed=1)
    compiled = dba.GPT(eager.cfg, VOCAB)
    compiled.load_state_dict(eager.state_dict())
    assert dba.compile_model(compiled) is compiled
    calls = []
    nll_and_grad = compiled.nll_and_grad
    compiled.nll_and_grad = lambda *args: calls.append(1) or nll_and_grad(*args)
    assert nll_and_grad is not dba.nll_and_grad and all(block._compiled_call_impl for block in compiled.blocks)
    eager.train(), compiled.train()
    expected, actual = eager(idx, targets), compiled(idx, targets)
    assert calls
    close(actual, expected, 1e-5)
    expected.backward(), actual.backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters()):
        close(q.grad, p.grad, 1e-4, name)


# --- Schedule and optimiser

def test_learning_rate_warms_up_and_stays():
    cfg = config(dict(lr=0.5, steps=100, warmup_steps=10))
    assert [dba.lr_at(step, cfg) for step in (1, 5, 10, 11, 60, 100)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5, 0.5])


def test_learning_rate_cosine():
    cfg = config(dict(lr=1.0, min_lr=0.2, steps=110, warmup_steps=10))
    steps = (1, 10, 35, 60, 85, 110)
    cosine = [0.1, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]
    assert [dba.lr_at(step, cfg) for step in steps] == pytest.approx(cosine)


def test_learning_rate_wsd():
    """Warm-up, stable, and over the last fifth a line to its end."""
    cfg = config(dict(lr=1.0, schedule="wsd", steps=100, warmup_steps=10))
    rates = [dba.lr_at(step, cfg) for step in (5, 10, 60, 80, 85, 90, 100)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.775, 0.55, 0.1])


def test_schedule_that_follows_from_flags():
    for given, schedule, end in ((dict(), "constant", 0.5), (dict(min_lr=0.1), "cosine", 0.1),
                                 (dict(schedule="cosine"), "cosine", 0.05), (dict(schedule="wsd"), "wsd", 0.05)):
        cfg = config(dict(lr=0.5, **given))
        assert (cfg.schedule, cfg.min_lr) == (schedule, pytest.approx(end)), given
    logged = {name: value for name, value in vars(config(dict(lr=0.5, min_lr=0.1))).items() if name != "schedule"}
    assert dba.config_of(logged).schedule == "cosine"      # of a log that is older than the flag
    assert dba.config_of({**logged, "min_lr": 0.5}).schedule == "constant"


@pytest.mark.parametrize("warmup", (0, 20))
def test_learning_rate_without_warm_up_or_with_nothing_else(warmup):
    cfg = config(dict(lr=1.0, min_lr=0.0, steps=20, warmup_steps=warmup))
    rates = [dba.lr_at(step, cfg) for step in range(1, 21)]
    assert rates[-1] == (1.0 if warmup else pytest.approx(0)) and max(rates) <= 1
    assert rates == sorted(rates, reverse=not warmup)


@pytest.mark.parametrize("mode, null, tie", null_and_tie())
def test_optimizer_decays_matrices_only_and_covers_everything_once(mode, null, tie):
    cfg = config(settings(mode, null_attn=null, tie_qk=tie, learned_temp=True, embed_dim=10, weight_decay=0.3, lr=1e-2))
    model = dba.GPT(cfg, VOCAB)
    groups = dba.make_optimizer(model, cfg).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        vector = "norm" in name or "null" in name or "log_temp" in name or "latent.1" in name
        assert decay[id(p)] == (0.0 if vector else 0.3), name
    assert all((group["lr"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.95), 1e-8) for group in groups)


def test_optimizer_leaves_frozen_parameters_alone():
    cfg = config(settings("decoupled"))
    model = dba.GPT(cfg, VOCAB)
    model.embed.weight.requires_grad_(False)
    covered = {id(p) for group in dba.make_optimizer(model, cfg).param_groups for p in group["params"]}
    assert covered == {id(p) for p in model.parameters()} - {id(model.embed.weight)}


# --- Generation

def generated(model, prompt, n, **how):
    cache = dba.KVCache(model.cfg, len(prompt), prompt.size(1) + n - 1, "fp32")
    return torch.cat(list(dba.generate(model, prompt, n, cache, **how)), 1)


@pytest.mark.parametrize("how", (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)), ids=str)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_greedy_text_is_the_argmax_of_uncached_logits(mode, how, monkeypatch):
    monkeypatch.setattr(dba, "PREFILL_CHUNK", 8)           # a prompt of three chunks, the last a short one
    model, text = model_of(settings(mode, null_attn=True)), tokens(2, 19)
    calls = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache=None: calls.append(idx.size(1)) or hidden(idx, cache))
    actual = generated(model, text, 12, **how)
    assert calls == [8, 8, 3] + [1] * 11                   # the last token is not fed back
    for _ in range(12):
        text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(actual, text[:, 19:])


def test_a_cache_of_exactly_the_right_size_is_enough():
    model = model_of(settings("standard"))
    prompt = tokens(1, 100)
    cache = dba.KVCache(model.cfg, 1, 512, "fp32")
    assert len(list(dba.generate(model, prompt, 413, cache))) == 413
    assert cache.length.tolist() == [512]
    with pytest.raises(ValueError):
        list(dba.generate(model, prompt, 414, dba.KVCache(model.cfg, 1, 512, "fp32")))


def test_the_seed_decides_the_text():
    model, prompt = model_of(settings("decoupled")), tokens(2, 5)
    first, again, other = (generated(model, prompt, 20, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)                                   # the global generator plays no part
    assert torch.equal(first, again) and torch.equal(first, generated(model, prompt, 20, temperature=3.0, seed=1))
    assert not torch.equal(first, other) and first.max() < VOCAB


def drawn(p, draws=4000, temperature=1.0, top_k=None, top_p=None):
    """Share of each id among tokens drawn from the distribution p."""
    logits = torch.tensor(p).log().expand(draws, -1)
    ids = dba.pick_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert ids.shape == (draws, 1)
    return (torch.bincount(ids.flatten(), minlength=len(p)) / draws).tolist()


@pytest.mark.parametrize("how, expected", [
    (dict(), [0.1, 0.4, 0.2, 0.3]),
    (dict(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_k=9), [0.1, 0.4, 0.2, 0.3]),
    (dict(top_p=0.35), [0, 1, 0, 0]),
    (dict(top_p=0.45), [0, 4 / 7, 0, 3 / 7]),              # the token that crosses the limit is kept
    (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (dict(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
    (dict(top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7]),     # top-p counts within what top-k left: 7/9 >= 0.75
    (dict(temperature=2.0, top_k=1), [0, 1, 0, 0]),
], ids=str)
def test_pick_token_draws_from_the_right_set(how, expected):
    shares = drawn([0.1, 0.4, 0.2, 0.3], **how)
    for share, p in zip(shares, expected):
        assert share == 0 if p == 0 else abs(share - p) < 0.04


def test_pick_token_treats_rows_apart():
    logits = torch.tensor([[0.0, 9.0, 8.9], [9.0, 0.0, 0.0]])
    for how in (dict(temperature=0, top_k=None, top_p=None), dict(temperature=1.0, top_k=1, top_p=None)):
        assert dba.pick_token(logits, **how, generator=torch.Generator().manual_seed(0)).tolist() == [[1], [0]]


def test_a_blank_prompt_starts_a_document():
    """Words of a blank prompt are none at all, and the model needs one token to begin with."""
    words = dba.WordTokenizer(["a", "<eos>", "<unk>"])
    for prompt in (None, "", "  \n"):
        cfg = dba.make_config(mode="sample", ckpt="none", prompt=prompt)
        assert list(dba.prompts(cfg, words)) == [[words.eot]]


def test_a_checkpoint_older_than_a_flag_has_its_default(tmp_path):
    cfg = config(settings("decoupled"))
    model = dba.GPT(cfg, 257).init_weights()
    dba.save_checkpoint(tmp_path / "old.pt", cfg, dba.ByteTokenizer(), model, step=1)
    content = torch.load(tmp_path / "old.pt")
    del content["config"]["learned_temp"]
    torch.save(content, tmp_path / "old.pt")
    ckpt = dba.load_checkpoint(tmp_path / "old.pt")
    assert ckpt["config"] == cfg
    assert torch.equal(dba.load_model(ckpt)(tokens(1, 5)), model(tokens(1, 5)))
