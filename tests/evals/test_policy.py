"""eval_dba.py policy: the choice, its figures, and --kv-cache auto, which reads it."""

import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from trained import BLOCK, EVALUATE, evaluate, result_of, validation

import train_dba
from evals import policy as policies
from evals import timing
from evals.subject import load_subject
from evals.timing import cache_bytes
from helpers import assert_done, assert_error, call, snapshot
from train_dba import KVCache, file_hash, load_checkpoint, load_model, rotate_cache, stream_bytes

POLICY = "--max-tokens 512 --batch-size 3 --kernel-tokens 100"


def sizes_and_figures(row):
    return row["bytes_per_token"], row["delta_nll"]


def passes(row, limits):
    return all(row[name] <= limit for name, limit in limits.items())


@pytest.mark.parametrize("mode", ("decoupled", "mla"))
def test_policy_is_the_best_of_the_table_within_the_budget(folder, mode):
    cfg = load_checkpoint(folder / mode / "best.pt")["config"]
    result = result_of(f"policy {EVALUATE} {mode} {POLICY} --max-delta-nll 0.002 --max-kl 0.01", folder,
                      f"{mode}/kv_policy.json")
    tried, limits = result["tried"], dict(delta_nll=0.002, kl=0.01)
    assert result["thresholds"] == limits and result["checkpoint_sha256"] == file_hash(folder / mode / "best.pt")
    assert result["formats"].keys() == cfg.attention.streams.keys()
    chosen, = [row for row in tried if all(row[name] == result[name] for name in ("formats", "rotate", "residual"))]
    allowed = [row for row in tried if passes(row, limits)]
    assert chosen in allowed and sizes_and_figures(chosen) == min(map(sizes_and_figures, allowed))
    assert result["bytes_per_token"] == sum(stream_bytes(result["formats"][name], C)
                                           for name, C in cfg.attention.streams.items())
    assert {row["rotate"] for row in tried} == {False, True} and {row["residual"] for row in tried} == {0, 32}
    assert not any(set(row["formats"].values()) == {"fp16"} for row in tried)
    if mode == "decoupled":
        for formats in (dict(k_sem="q4_0", k_geo="q8_0", v="q4_0"), dict(k_sem="q8_0", k_geo="q4_0", v="q4_0")):
            assert sum(row["formats"] == formats and row["residual"] == 0 for row in tried) == 2


@pytest.mark.parametrize("streams", (("k_sem", "k_geo", "v"), ("latent", "k_geo")))
def test_heteros_are_tried_with_the_paths_swapped_too(streams):
    alone = {}
    for policy in policies.single_streams(streams):        # other 4 bits do better, so that only hetero has q4_0
        alone[policy] = dict(kl=float("q4_0" in dict(policy.formats).values()))
    tried = [dict(policy.formats) for policy in policies.mixes(dict.fromkeys(streams, 32), alone)]
    semantic, others = streams[0], {name: "q4_0" for name in streams[2:]}
    assert {semantic: "q4_0", "k_geo": "q8_0", **others} in tried
    assert {semantic: "q8_0", "k_geo": "q4_0", **others} in tried


def test_policy_figures_are_those_of_the_model(folder):
    result = result_of(f"policy {EVALUATE} decoupled {POLICY} --max-kv-bytes-per-token 100 --max-kl 9 --long "
                      "--long-factor 3", folder, "decoupled/kv_policy.json")
    tried, ids = result["tried"], validation(folder)
    within = [row for row in tried if row["bytes_per_token"] <= 100]
    assert result["short"]["delta_nll"] == min(row["delta_nll"] for row in within)
    model, rotated = (load_model(load_checkpoint(folder / "decoupled/best.pt")) for _ in range(2))
    rotate_cache(rotated)
    for length, last, row in [(BLOCK, BLOCK // 2, row) for row in tried[::9]] + [
            (3 * BLOCK, BLOCK, {**result, **result["long"]})]:
        starts = torch.linspace(0, len(ids) - length - 1, 512 // length).long()
        windows = torch.stack([ids[start:start + length + 1] for start in starts])
        expected, logits = measured = [], []
        for m, formats, residual, into in ((model, "fp16", 0, expected), (
                rotated if row["rotate"] else model, row["formats"], row["residual"], logits)):
            cache = KVCache(model.cfg, len(windows), length, formats, residual)
            with torch.inference_mode():
                for piece in windows[:, :-1].split(1 if residual else length, 1):  # a window: as decoding does
                    into.append(m(piece, cache=cache))
        expected, logits = (torch.cat(parts, 1)[:, -last:].double() for parts in measured)
        nll = [F.cross_entropy(x.flatten(0, 1), windows[:, -last:].flatten()).item() for x in (expected, logits)]
        assert row["delta_nll"] == pytest.approx(nll[1] - nll[0], abs=1e-6)
        kl = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
        assert row["kl"] == pytest.approx(kl.item() / expected[..., 0].numel(), abs=1e-6)
        assert row["max_delta_logit"] == pytest.approx((logits - expected).abs().max().item(), abs=1e-5)


def test_bytes_of_a_residual_window_count():
    cfg = train_dba.make_config(data="-", attn_mode="decoupled", sem_dim=32, geo_dim=64, n_head=4, layers=2, block=640)
    formats = (("k_sem", "q4_0"), ("k_geo", "q8_0"), ("v", "q4_0"))
    assert policies.Policy(formats).bytes_per_token(cfg, 640) == 2 * (18 + 68 + 54)
    with_window = policies.Policy(formats, residual=128)
    assert with_window.bytes_per_token(cfg, 640) == 2 * (0.8 * 140 + 0.2 * 384)
    assert with_window.bytes_per_token(cfg, 640) * 640 == cache_bytes(cfg, 1, 640, dict(formats), 128)
    assert with_window.bytes_per_token(cfg, 256) == 2 * (0.5 * 140 + 0.5 * 384)


def test_a_window_of_another_length(folder):
    """--block: the windows, their number, and the bytes that a residual window takes of them."""
    found = result_of(f"policy {EVALUATE} standard {POLICY} --max-delta-nll 9 --max-kl 9 --block 24", folder,
                      "standard/kv_policy.json")
    assert found["settings"]["block"] == 24 and found["short"]["tokens"] == 12 * (found["settings"]["tokens"] // 24)
    assert all(row["residual"] <= 24 // 4 for row in found["tried"])


@pytest.mark.parametrize("tokens, count", ((41, 4), (40, 3), (31, 3), (12, 1), (11, 1), (1000, 4)))
def test_windows_do_not_overlap_on_a_short_text(tokens, count):
    windows = policies.separate_windows(torch.arange(tokens), 4, 10)
    starts = windows[:, 0].tolist()
    assert windows.shape == (count, 11) and starts[0] == 0 and starts[-1] == (tokens - 11 if count > 1 else 0)
    assert all(second - first >= 10 for first, second in zip(starts, starts[1:]))


def test_a_short_text_has_fewer_windows_and_says_so(folder):
    (folder / "short.txt").write_text("What fits into it fits in side by side.")
    result = evaluate(f"policy {EVALUATE} standard {POLICY} --max-delta-nll 9 --max-kl 9 --block 12 --data short.txt",
                      folder)
    assert_done(result)
    assert "policies: 3 of 12 tokens fit into the text side by side, not 42" in result.stdout
    found = json.loads((folder / "standard/kv_policy.json").read_text())
    assert found["short"]["tokens"] == 3 * 12 // 2


def test_frontier_by_hand():
    tried = {name: dict(delta_nll=nll) for name, nll in dict(a=0.3, b=0.1, c=0.2, d=0.1, e=math.inf, f=-0.1).items()}
    assert policies.best_first(dict(a=10, b=20, c=20, d=30, e=5, f=40), tried) == ["a", "b", "f"]


def test_the_long_check_rejects(folder, monkeypatch):
    command = f"policy {EVALUATE} standard {POLICY} --max-delta-nll 1 --max-kl 9"
    first = result_of(command, folder, "standard/kv_policy.json")
    assert first["long"] is None
    measure = policies.measure_policies

    def worse(subject, rotated, tried, windows, *rest):
        losses = measure(subject, rotated, tried, windows, *rest)
        if windows.size(1) > BLOCK + 1:
            for policy, row in losses.items():
                row["delta_nll"] = 2.0 if any(fmt in str(policy) for fmt in ("nf4", "q4", "q3")) else 0.5
        return losses

    monkeypatch.setattr(policies, "measure_policies", worse)
    second = result_of(f"{command} --long --long-factor 2", folder, "standard/kv_policy.json")
    assert {*first["formats"].values()} <= {*policies.FOUR_BITS, "q3_0"}
    assert second["formats"] == dict(k="q8_0", v="q8_0")
    assert second["long"]["delta_nll"] == 0.5
    assert all(row["long"]["delta_nll"] == 2 for row in second["tried"]
               if row["bytes_per_token"] < second["bytes_per_token"])


def test_policy_is_deterministic_and_writes_nothing_if_nothing_passes(folder, monkeypatch):
    monkeypatch.setattr(policies, "kernel_times", lambda *_: {})               # the clock alone differs
    command = f"policy {EVALUATE} mla {POLICY} --max-delta-nll 1"
    assert_error(evaluate(f"{command} --max-delta-logit 0", folder), "none of", "policies passes", "bytes per token")
    assert_error(evaluate(f"policy {EVALUATE} mla {POLICY} --max-kv-bytes-per-token 3", folder), "none of")
    assert not (folder / "mla/kv_policy.json").exists()
    result_of(command, folder, "mla/kv_policy.json")
    before = snapshot(folder)
    table = evaluate(command, folder).stdout
    assert snapshot(folder) == before
    assert table.count("<- chosen") == 1 and "frontier" in table


def test_a_nan_fails():
    limits = dict(delta_nll=0.1, kl=0.1)
    measured = dict(delta_nll=math.nan, kl=0.0, max_delta_logit=9.0)
    assert policies.Budget(limits).failures(measured) == ["delta_nll"]


# --- --kv-cache auto

SAMPLE = "--mode sample --device cpu --dtype float32 --prompt-tokens 1,2,3 --max-new-tokens 20 --temperature 0"


@pytest.fixture
def found_policy(folder):
    """A run folder with a policy, and that policy."""
    digest = file_hash(folder / "decoupled/best.pt")
    policy = dict(checkpoint_sha256=digest, formats=dict(k_sem="nf4", k_geo="q8_0", v="q4_0"), rotate=True, residual=4)
    (folder / "decoupled/kv_policy.json").write_text(json.dumps(policy))
    return folder, policy


def test_auto_is_what_the_policy_says(found_policy):
    folder, _ = found_policy
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto", folder)
    same = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache q8_0 --kv-cache-k-sem nf4 --kv-cache-v q4_0 --kv-rotate "
                "--kv-residual 4", folder)
    assert_done(result)
    first, *rest = result.stderr.splitlines()
    assert result.stdout == same.stdout and rest[:-1] == same.stderr.splitlines()[:-1]              # but for the rate
    for word in ("auto", "kv_policy.json", "k_sem nf4", "k_geo q8_0", "v q4_0", "rotated", "residual 4"):
        assert word in first


def test_the_faster_kernel_is_the_policys(found_policy, monkeypatch):
    folder, policy = found_policy
    (folder / "decoupled/kv_policy.json").write_text(json.dumps(dict(policy, kernel="torch")))
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto", folder)
    assert_done(result)
    assert "kernel torch (asked for)" in result.stderr

    def slow(q, *rest):
        time.sleep(0.02)
        return train_dba.decode_attention(q, *rest)

    for auto, faster in ((slow, "torch"), (train_dba.decode_attention, "")):
        kernels = dict(auto=train_dba.Kernel("other" if faster else "torch", auto), torch=train_dba.TORCH)
        for module in (policies, timing):
            monkeypatch.setattr(module, "resolve_kernel", lambda name, *rest: (kernels[name], ""))
        subject = load_subject(folder / "decoupled", "cpu")
        times = policies.kernel_times(subject, policies.Policy(tuple(policy["formats"].items())), 100)
        assert min(times, key=times.get, default="") == faster and len(times) == 2 * bool(faster)


def test_auto_with_the_policy_that_was_searched(folder):
    assert_done(evaluate(f"policy {EVALUATE} mla/best.pt {POLICY} --max-delta-nll 0.5 --max-kl 9", folder))
    assert_done(call(f"{SAMPLE} --ckpt mla/best.pt --kv-cache auto", folder))


@pytest.mark.parametrize("change", (dict(formats=dict(k="q8_0", v="q8_0")), dict(formats="q8_0"), dict(rotate=None),
                                    dict(formats=dict(k_sem="q9", k_geo="q8_0", v="q4_0")), dict(residual=-1),
                                    dict(residual="4"), dict(kernel=3)))
def test_auto_refuses_a_damaged_policy(found_policy, change):
    folder, policy = found_policy
    (folder / "decoupled/kv_policy.json").write_text(json.dumps({**policy, **change}))
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto", folder)
    assert_error(result, "kv_policy.json is damaged", "eval_dba.py policy")
    assert result.stdout == ""


def test_auto_refuses_a_missing_torn_or_other_policy(found_policy):
    folder, _ = found_policy
    command = f"{SAMPLE} --ckpt decoupled/%s --kv-cache auto"
    assert_error(call(command % "last.pt", folder), "another checkpoint", "eval_dba.py policy")
    path = folder / "decoupled/kv_policy.json"
    for torn in (path.read_bytes()[:50], b"[]", b"\xff\xfe", b""):
        path.write_bytes(torn)
        assert_error(call(command % "best.pt", folder), "is damaged", "eval_dba.py policy")
    path.unlink()
    assert_error(call(command % "best.pt", folder), "is missing", "eval_dba.py policy")


@pytest.mark.parametrize("flag", ("--kv-rotate", "--kv-residual 0", "--kv-residual 8", "--kv-cache-v fp16",
                                  "--no-kv-rotate"))
def test_auto_contradicts_what_the_policy_says(found_policy, flag):
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto {flag}", found_policy[0])
    assert_error(result, "--kv-cache auto", flag.split()[0].replace("--no-", "--"))
