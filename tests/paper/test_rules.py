"""Each rule of the ledger on invented results: every verdict that it can come to appears."""

import json

import pytest

from paper import claims, collect, report, rules
from paper.shapes import STEPS_ROW

EMPTY = dict(runs=[], evals={}, surgery={}, benchmarks={})


def run(series, seed, curve=(), spike=None, caches=(), kv=100):
    best = min((loss for _, loss in curve), default=2.0)
    return dict(run=f"{series}_s{seed}", series=series, row=series, seed=seed, best_of_sweep=None, hardware="a CPU",
                identity=dict(sha256="data"), best_val_loss=best, last_val_loss=best, curve=[list(p) for p in curve],
                gradient_spike=spike, caches=dict(caches), kv_bytes_fp16=kv)


def verdict_of(rule, results=EMPTY, source="January 2026", **claim):
    claim = dict(claim, rule=rule, source=source)
    finding = rules.RULES[rule](claim, {**EMPTY, **results})
    claims.correct([finding])
    return claims.verdict(claim, finding), finding


def verdicts(rule, cases, source="January 2026", **claim):
    """{name: verdict} of cases {name: runs}."""
    return {name: verdict_of(rule, dict(runs=runs), source, **claim)[0] for name, runs in cases.items()}


EVERY = dict(yes="reproduced", no="not reproduced", mixed="undecided", one="undecided (n = 1)", none="not yet run")


def paired_cases(make):
    """Cases of runs of a and b by make(value) of a seed, against make(1.0): below, above, both, one seed, none."""
    cases = {}
    for name, values in dict(yes=(0.5, 0.51, 0.52), no=(1.5, 1.51, 1.52), mixed=(0.5, 1.6, 1.1), one=(0.5,),
                             none=()).items():
        cases[name] = [make("a", seed, value) for seed, value in enumerate(values)]
        cases[name] += [make("b", seed, 1.0) for seed in range(3)]
    return cases


# -----------------------------------------------------------------------------
# Paired by seed

def test_early_convergence_is_the_first_shared_evaluation():
    """Later ones, and those of one run alone, say the opposite."""
    cases = paired_cases(lambda name, seed, value: run(name, seed, [
        *([(1, 9.0)] if name == "a" else []), (10, 3.0 + value), (20, 3.0 - value)]))
    assert verdicts("early_below", cases, pairs=[["a", "b"]]) == EVERY


def test_data_efficiency_is_tokens_to_the_loss_that_both_reach():
    cases = paired_cases(lambda name, seed, value: run(name, seed, [
        (0, 4.0), (100 * value, 3.0), (200, 3.0 if name == "b" else 2.5)]))
    assert verdicts("data_efficiency", cases, pairs=[["a", "b"]]) == EVERY
    assert rules.tokens_to([[0, 4.0], [100, 3.0]], 3.5) == 50 and rules.tokens_to([[0, 4.0], [100, 3.0]], 2.5) is None


def test_steadier():
    cases = paired_cases(lambda name, seed, value: run(name, seed, spike=3 * value))
    assert verdicts("steadier", cases, pairs=[["a", "b"]]) == EVERY
    unlogged = [run(name, seed) for name in "ab" for seed in range(3)]
    assert verdicts("steadier", dict(none=unlogged), pairs=[["a", "b"]]) == dict(none="not yet run")


@pytest.mark.parametrize("rule, claim", (
    ("early_below", {}), ("ahead_throughout", {}), ("data_efficiency", {}), ("steadier", {}), ("below", {}),
    ("speed_ratio", dict(reported=0.5, tolerance=0.2, device="a CPU")), ("loss", dict(reported=2.0, tolerance=0.6)),
    ("overfits", {})))
def test_a_part_of_the_registered_seeds_decides_nothing(rule, claim):
    runs = []
    for seed, value in enumerate((0.5, 0.51, 0.52)):
        for name, factor in (("g/s/a", value), ("g/s/b", 1.0)):
            curve = [(0, 9.0 + factor), (100 * factor, 3.0 * factor), (200, 2.5 * factor)]
            runs.append(dict(run(name, seed, curve, spike=3 * factor), tokens_per_second=factor, hardware="a CPU"))
            runs[-1]["last_val_loss"] = runs[-1]["best_val_loss"] + 0.06 + 0.001 * seed
    claim = dict(claim, series="g/s/a", pairs=[["g/s/a", "g/s/b"]])
    said = [verdict_of(rule, dict(runs=runs, registered={"g/s": seeds}), **claim)[0] for seeds in (3, 4)]
    assert said[0] in ("reproduced", "not reproduced") and said[1] == rules.INTERIM


def test_pairs_of_two_sets_wait_for_the_smaller_one():
    runs = []
    for seed, better in enumerate((1.0, 1.001, 1.002)):
        runs += [run("g/more/a", seed, [(9, 3.0 - better)]), run("g/fewer/b", seed, [(9, 3.0)])]
    for fewer, said in ((3, "reproduced"), (4, rules.INTERIM)):
        results = dict(runs=runs, registered={"g/more": 9, "g/fewer": fewer})
        assert verdict_of("below", results, pairs=[["g/more/a", "g/fewer/b"]])[0] == said


def test_gradient_spikes_are_after_the_warm_up():
    log = [dict(step=step, grad_norm=norm) for step, norm in ((1, 90.0), (2, 1.0), (3, 1.0), (4, 3.0))]
    assert collect.gradient_spike(log, 1) == 3.0 and collect.gradient_spike(log, 0) == 45.0
    assert collect.gradient_spike([dict(step=5)], 1) is None


def test_ahead_throughout():
    def runs(*losses, seeds=2):
        curves = dict(a=[(i, loss) for i, loss in enumerate(losses)], b=[(0, 3.0), (1, 2.0)])
        return [run(name, seed, curve) for name, curve in curves.items() for seed in range(seeds)]
    cases = dict(yes=runs(2.9, 1.9), no=runs(2.9, 2.1), one=runs(2.9, 1.9, seeds=1), none=[])
    expected = {name: EVERY[name] for name in cases}
    assert verdicts("ahead_throughout", cases, pairs=[["a", "b"]]) == expected
    assert verdict_of("ahead_throughout", dict(runs=cases["no"]), pairs=[["a", "b"]])[1].value == 50


# -----------------------------------------------------------------------------
# Quantised caches

def quantised(deltas):
    return [run("m", seed, caches={name: dict(loss=2.0 + delta) for name, delta in dict(fp16=0.0, **of_seed).items()})
            for seed, of_seed in enumerate(deltas)]


def test_quality_of_a_cache_goes_by_runs_with_several_seeds():
    cases = dict(yes=(0.001, 0.0011, 0.0012), no=(0.02, 0.021, 0.022), mixed=(0.001, 0.03, 0.01))
    row = dict(run="c", policy="q4_0", rotate=False, tokens=9, delta_nll=0.5, standard_error=0.1)
    measured = dict(cache_quality=dict(rows=[row], env=dict(cpu="a CPU")))
    for name, deltas in cases.items():
        results = dict(runs=quantised([dict(q4_0=delta) for delta in deltas]), benchmarks=measured)
        claim = dict(series=["nobody", "m"], policy="q4_0", run="c", tolerance=0.01)
        assert verdict_of("cache_quality", results, **claim)[0] == EVERY[name]
    assert verdict_of("cache_quality", dict(benchmarks=measured), **claim)[0] == EVERY["one"]
    assert verdict_of("cache_quality", **claim)[0] == EVERY["none"]


@pytest.mark.parametrize("rule,settings", (("cache_quality", dict(policy="q4_0", run="c", tolerance=0.1)),
                                           ("cache_contrast", dict(weights=dict(q4_0=1, hetero=-2)))))
def test_caches_of_a_part_of_the_registered_seeds_decide_nothing(rule, settings):
    runs = quantised([dict(hetero=0.001, q4_0=0.05), dict(hetero=0.002, q4_0=0.053), dict(hetero=0.001, q4_0=0.056)])
    for entry in runs:
        entry["series"] = "g/set/m"
    for seeds, said in ((3, EVERY["yes"]), (4, rules.INTERIM)):
        results = dict(runs=runs, registered={"g/set": seeds})
        assert verdict_of(rule, results, series=["g/set/m"], **settings)[0] == said


def test_a_weighted_sum_of_what_formats_cost():
    """q4_0 less hetero against hetero less fp16."""
    cases = dict(yes=((0.001, 0.05), (0.002, 0.053), (0.001, 0.056)), no=((0.02, 0.03), (0.02, 0.029), (0.02, 0.031)),
                 mixed=((0.01, 0.05), (0.05, 0.06)), one=((0.001, 0.05),), none=())
    claim = dict(weights=dict(q4_0=1, hetero=-2), series=["m"])
    for name, pairs in cases.items():
        runs = quantised([dict(hetero=hetero, q4_0=q4) for hetero, q4 in pairs])
        verdict, finding = verdict_of("cache_contrast", dict(runs=runs), **claim)
        assert verdict == EVERY[name]
        if pairs:
            assert finding.value == pytest.approx(sum(q4 - 2 * hetero for hetero, q4 in pairs) / len(pairs))
    assert verdict_of("cache_contrast", dict(runs=quantised([dict(q4_0=0.1)] * 3)), **claim)[0] == EVERY["none"]


@pytest.mark.parametrize("ms, agrees", ((2.0, True), (5.0, False)))
def test_latency_against_bytes(ms, agrees):
    """2 times fewer bytes have to make it 2 times as fast; one pair of checkpoints decides nothing."""
    runs, evals = [], {}
    for name, size, time in (("a", 50, ms), ("b", 100, 4.0)):
        runs.append(dict(run(name, 1, caches=dict(fp16=dict(bytes_per_token=size))), run=name))
        row = dict(prompt=9, cache="fp16", ms_per_token=time, kernel="its kernel")
        evals[name] = {"latency": {"result": [row], "from": dict(hardware="where it was timed")}}
    claim = dict(field="ms_per_token", prompt=9, fast=["a", "fp16"], slow=["b", "fp16"])
    verdict, finding = verdict_of("latency_ratio", dict(runs=runs, evals=evals), **claim)
    assert verdict == EVERY["one"] and finding.agrees == agrees and finding.value == 4.0 / ms
    assert "where it was timed, its kernel" in finding.where
    assert verdict_of("latency_ratio", dict(runs=runs, evals=evals), **dict(claim, prompt=8))[0] == EVERY["none"]


# -----------------------------------------------------------------------------
# Other machines

def steps(case, rate, gib=10.0, spread=0.01, compiled=True, **more):
    return dict(case=case, micro=8, block=2048, compiled=compiled, dtype="bfloat16", params=1, tok_s=rate, gib=gib,
                slowest=rate * (1 - spread), fastest=rate * (1 + spread), **more)


def devices(block, rows, device="NVIDIA H200"):
    return dict(benchmarks=dict(devices=[dict(name="m/x", block=block, env=dict(device=device), rows=rows)]))


@pytest.mark.parametrize("device, rate, more, verdict", (
    ("NVIDIA A100", 130.0, {}, "reproduced"), ("NVIDIA A100", 105.0, {}, "not reproduced"),
    ("NVIDIA H200", 130.0, {}, "undecided"), ("NVIDIA H200", 105.0, {}, "undecided"),
    ("NVIDIA A100", 105.0, dict(unstated="batch"), "undecided"),
    ("NVIDIA A100", 130.0, dict(unstated="batch"), "reproduced")))
def test_a_ratio_of_steps_decides_on_its_own_card(device, rate, more, verdict):
    results = devices("train", [steps("b", 100.0), steps("a", rate), steps("a", 999.0, compiled=False)], device)
    claim = dict(case="a", against="b", field="tok_s", reported=1.32, tolerance=0.1, device="A100", **more)
    actual, finding = verdict_of("step_ratio", results, **claim)
    assert actual == verdict and finding.value == rate / 100 and "eager" not in finding.where
    assert device in finding.where and "8 x 2048" in finding.where and "steps not recorded" in finding.where
    assert verdict_of("step_ratio", **claim)[0] == "not yet run"


@pytest.mark.parametrize("rates, verdict", (((140.0,), "holds"), ((110.0,), "does not hold"), ((131.0,), "undecided"),
                                            ((140.0, 110.0), "undecided"), ((), "not yet run")))
def test_a_bound_holds_by_the_extremes_of_the_steps(rates, verdict):
    rows = []
    for compiled, rate in zip((True, False), rates):
        rows += [steps("b", 100.0, compiled=compiled, steps=6), steps("a", rate, compiled=compiled, steps=6)]
    claim = dict(case="a", against="b", field="tok_s", bound=1.3, side="above")
    actual, finding = verdict_of("step_bound", devices("train", rows), "control", **claim)
    assert actual == verdict and (not rates or "6 steps" in finding.where)


@pytest.mark.parametrize("gib, verdict", ((7.0, "holds"), (9.0, "does not hold")))
def test_a_bound_on_memory(gib, verdict):
    rows = [steps("b", 100.0), steps("a", 100.0, gib=gib)]
    assert verdict_of("step_bound", devices("train", rows), "control", case="a", against="b", field="gib", bound=0.73,
                      side="below")[0] == verdict


def test_compiled_steps_are_the_first():
    rows = [steps(case, rate, compiled=compiled) for compiled in (False, True)
            for case, rate in (("b", 100.0), ("a", 120.0 if compiled else 150.0))]
    claim = dict(case="a", against="b", field="tok_s", reported=1.2, tolerance=0.01, device="H200")
    verdict, finding = verdict_of("step_ratio", devices("train", rows), **claim)
    assert verdict == "reproduced" and finding.value == 1.2
    assert finding.where.index("1.200") < finding.where.index("1.500")


def test_steps_that_ran_out_of_memory_are_no_pair():
    rows = [steps("b", 100.0), dict(steps("a", 1.0), tok_s=None)]
    assert verdict_of("step_ratio", devices("train", rows), case="a", against="b", field="tok_s")[0] == "not yet run"


@pytest.mark.parametrize("ms, verdict", ((1.0, "reproduced"), (1.5, "not reproduced")))
def test_attention_goes_by_the_back_end_that_gains_most(ms, verdict):
    rows = [dict(case=case, width=1, backend=backend, ms=time) for case, backend, time in (
        ("wide", "flash", 1.6), ("narrow", "flash", ms), ("wide", "other", 1.6), ("narrow", "other", 2.0),
        ("wide", "none", None), ("narrow", "none", 0.1))]
    claim = dict(case="narrow", against="wide", reported=1.6, tolerance=0.1)
    actual, finding = verdict_of("attention_ratio", devices("sdpa", rows), **claim)
    assert actual == verdict and finding.value == 1.6 / ms and "0.80 by other" in finding.where
    assert verdict_of("attention_ratio", **claim)[0] == "not yet run"


@pytest.mark.parametrize("gain, verdict", ((1.95, "reproduced"), (1.2, "undecided")))
def test_a_slow_kernel_refutes_nothing(gain, verdict):
    base = dict(batch=1, tokens=9, us=1.0)
    rows = [dict(base, case="standard", format="fp16", cache_mib=64.0),
            dict(base, case="dba", format="fp16", cache_mib=32.0, times_faster_than_sdpa=gain),
            dict(base, case="dba", format="fp16", cache_mib=1.0, times_faster_than_sdpa=9.0, tokens=8)]
    claim = dict(case="dba", format="fp16", batch=1, tokens=9)
    actual, finding = verdict_of("decode_ratio", devices("decode", rows), **claim)
    assert actual == verdict and finding.value == gain and "2.00 times fewer bytes" in finding.where
    assert verdict_of("decode_ratio", **claim)[0] == "not yet run"


def test_blocks_of_a_machine_are_read_and_rehearsals_left_out(tmp_path):
    env = dict(device="NVIDIA H200", cpu="A CPU", threads=16, commit=None, dirty=None)
    document = dict(block="train", toy=False, env=env, rows=[steps("b", 100.0)])
    damaged = dict(document, rows=[dict(steps("b", 100.0), micro="8")])
    for name, content in dict(good=document, toy=dict(document, toy=True), other=dict(document, block="loss"),
                              bad=damaged).items():
        path = tmp_path / f"bench/h200/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    benchmarks, problems = collect.read_benchmarks(tmp_path / "bench")
    assert [document["name"] for document in benchmarks["devices"]] == ["h200/good"]
    assert len(problems) == 1 and "bad.json" in problems[0] and "\n" not in problems[0]
    assert {"case", "gib?"} <= STEPS_ROW.keys()
    text = "\n".join(report.device_lines(benchmarks))
    assert "| NVIDIA H200, `unknown` | b | 8 x 2,048 | compiled |" in text


def test_what_a_gpu_found_is_said_with_its_name():
    rows = [steps("paper_baseline", 100.0), steps("paper_decoupled_sem8", 107.0, gib=9.0)]
    results = {**EMPTY, **devices("train", rows)}
    results["claims"] = claims.ledger(results)
    sentence = report.find_steps(results)
    for words in ("1.07 times", "0.90 of its memory", "one NVIDIA H200", "1.32 and 0.73", "A100, which was not"):
        assert words in sentence
    assert report.find_steps({**EMPTY, "claims": claims.ledger(EMPTY)}) is None


# -----------------------------------------------------------------------------
# What needs no run

MLA = dict(attn_mode="mla", d_model=64, n_head=4, kv_lora_rank=16, rope_dim=8)


@pytest.mark.parametrize("rule, claim, value, verdict", (
    ("contradiction", dict(numbers=[23, 22]), 22, "contradicts itself"),
    ("contradiction", dict(numbers=[23, 23]), 23, "right by arithmetic"),
    ("confounded", dict(settings=dict(lr=[1, 2], heads=[8, 8])), 1, "not supported by its own counts"),
    ("confounded", dict(settings=dict(lr=[1, 1])), 0, "undecided"),
    ("tokens_seen", dict(run=[8, 10, 5], against=[8, 10, 10]), 50, "not supported by its own counts"),
    ("tokens_seen", dict(run=[4, 20, 10], against=[8, 10, 10]), 100, "undecided"),
    ("work_ratio", dict(config=dict(lr=1e-3), against=dict(lr=1e-4), vocab_size=64, reported=0.75), 1,
     "not supported by its own counts"),
    ("work_ratio", dict(config=dict(lr=1e-3), against=dict(lr=1e-4), vocab_size=64, reported=1.0), 1,
     "right by arithmetic"),
    ("quotients", dict(rows=[[64.0, 16.0, 4], [64.0, 3.0, 21]]), 100 * (64 / 63 - 1), "right by arithmetic"),
    ("quotients", dict(rows=[[64.0, 16.0, 4], [64.0, 3.0, 19]]), 100 * (64 / 57 - 1), "arithmetic error"),
    ("bytes_per_value", dict(format="q4_0", reported=0.5625), 18 / 32, "right by arithmetic"),
    ("bytes_per_value", dict(format="q8_0", reported=1.0), 34 / 32, "arithmetic error"),
    ("cache_percent_less", dict(reported=75, config=dict(attn_mode="gqa", kv_head=8, cache="fp16"),
                                against=dict(cache="fp16")), 75, "right by arithmetic"),
    ("cache_percent_less", dict(reported=50, config=dict(attn_mode="gqa", kv_head=8, cache="fp16"),
                                against=dict(cache="fp16")), 75, "arithmetic error"),
    ("cache_percent_less", dict(reported=50, config=dict(attn_mode="gqa", kv_head=8, cache="fp16"), unstated="model",
                                against=dict(cache="fp16")), 75, "undecided"),
    ("cache_ratio", dict(reported=4, config=dict(cache="fp16", bits=4), against=dict(cache="fp16")), 4,
     "right by arithmetic"),
    ("cache_ratio", dict(reported=4, config=dict(cache="q4_0"), against=dict(cache="fp16")), 32 / 9,
     "arithmetic error"),
    ("other_mixed_caches", dict(modes=dict(standard={}, mla={})), 2, "not reproduced"),
    ("other_mixed_caches", dict(modes={}), 0, "right by arithmetic"),
    ("absorbed_work", dict(config=MLA), 4 * (2 * 16 + 8) / (16 * 4 * (16 + 16) + 4 * (24 + 16)), "not reproduced"),
    ("perplexity", dict(loss=3.36, reported=28.9, rounding=0.005), 28.789, "right by arithmetic"),
    ("perplexity", dict(loss=3.36, reported=28.9), 28.789, "arithmetic error"),
    ("disjoint_mse", dict(tokens=1024, bound=1e-4), 4 / 1024**2, "not reproduced"),
    ("disjoint_mse", dict(tokens=100, bound=1e-4), 4e-4, "right by arithmetic")))
def test_logic_and_arithmetic(rule, claim, value, verdict):
    actual, finding = verdict_of(rule, **claim)
    assert actual == verdict and finding.value == pytest.approx(value, rel=1e-3)


def test_two_attentions_that_share_no_token():
    """As disjoint_mse has it by a formula."""
    n = 16
    a, b = [2 / n] * (n // 2) + [0] * (n // 2), [0] * (n // 2) + [2 / n] * (n // 2)
    measured = sum((x - y) ** 2 for x, y in zip(a, b)) / n
    assert rules.disjoint_mse(dict(tokens=n, bound=1), EMPTY).value == pytest.approx(measured)


# -----------------------------------------------------------------------------
# The ledger

def test_every_rule_decides_a_claim_and_every_claim_is_shown_once():
    ledger = claims.ledger(EMPTY)
    titled = [rule for of_section in report.SECTIONS.values() for rule in of_section]
    assert {row["rule"] for row in ledger} == rules.RULES.keys() and len({row["id"] for row in ledger}) == len(ledger)
    assert sorted(titled) == sorted(rules.RULES)
    text = "\n".join(report.ledger_lines(ledger))
    for row in ledger:
        assert text.count(f"- `{row['id']}`:") == 1, row["id"]


def test_the_first_page_holds_every_claim_under_its_verdict():
    ledger = claims.ledger(EMPTY)
    results = dict(EMPTY, series=[], claims=ledger, contrasts=[])
    lines = report.first_page(results)
    assert sum(line.startswith("- ") for line in lines) == len(ledger) + 1      # and what follows from all of them
    assert any(line.startswith("### Where the papers contradict themselves (") for line in lines)


# -----------------------------------------------------------------------------
# Learned masks

def masks(summary=(), gradients=(), costs=()):
    result = dict(summary=list(summary), gradients=list(gradients), costs=list(costs))
    return dict(evals=dict(r=dict(mask=dict(result=result))))


@pytest.mark.parametrize("side", ("below", "above"))
def test_masks_are_held_to_a_bound_by_intervals_over_windows(side):
    def rows(*cases, choice="gates"):
        return [dict(text="t", length=1024, windows=windows, choice=choice, kl=value, kl_half=half, kept=0.5)
                for value, half, windows in cases]
    sign = 1 if side == "below" else -1
    far = {name: 1.0 + sign * shift for name, shift in dict(good=-0.5, bad=0.5).items()}
    good, bad = (far["good"], 0.2, 3), (far["bad"], 0.2, 3)
    cases = dict(yes=rows(good, good), no=rows(good, bad), mixed=rows(good, (far["good"], 0.7, 3)), none=[])
    claim = dict(run="r", choice="gates", field="kl", side=side, bound=1.0, beside=["floor", "absent"])
    for name, summary in cases.items():
        assert verdict_of("mask_bound", masks(summary), **claim)[0] == EVERY[name]
    alone = rows((far["good"], None, 1))                   # one window has no interval
    assert verdict_of("mask_bound", masks(alone), **claim)[0] == EVERY["none"]
    assert verdict_of("mask_bound", masks(rows(good, choice="other")), **claim)[0] == EVERY["none"]
    finding = verdict_of("mask_bound", masks(cases["no"] + rows(good, choice="floor")), **claim)[1]
    assert finding.value == far["bad"] and f"; floor {far['good']:.3g}" in finding.where
    assert verdict_of("mask_bound", **claim)[0] == EVERY["none"]


def test_gradients_through_masks():
    cases = dict(yes=(0.96, 0.961, 0.962), no=(0.9, 0.901, 0.902), mixed=(0.9, 0.99, 0.96), one=(0.96,), none=())
    for name, values in cases.items():
        rows = [dict(choice="gates", length=512, least=value, median=0.99) for value in values]
        rows.append(dict(choice="other", length=512, least=0.1, median=0.99))
        assert verdict_of("mask_gradient", masks(gradients=rows), run="r", choice="gates", bound=0.95)[0] == EVERY[name]


@pytest.mark.parametrize("eager, sdpa, verdict", ((100, 100, "yes"), (50, 50, "mixed"), (100, 50, "mixed")))
def test_memory_of_masks_against_both_attentions(eager, sdpa, verdict):
    """As of a kernel's time: what this code takes refutes nothing."""
    held = dict(eager=eager, sdpa=sdpa, gates=60)
    rows = [dict(length=1024, attention=name, forward_bytes=value) for name, value in held.items()]
    rows += [dict(length=512, attention=name, forward_bytes=100) for name in held]
    claim = dict(run="r", choice="gates", bound=0.7)
    assert verdict_of("mask_memory", masks(costs=rows), **claim)[0] == EVERY[verdict]
    assert verdict_of("mask_memory", masks(costs=rows[3:]), **claim)[0] == EVERY["none"]


# -----------------------------------------------------------------------------
# Conversions

def converted(**rows):
    """Results of {row: {text: KL of its windows}}."""
    return dict(surgery=dict(r={row: dict(bytes=0.25, texts=texts) for row, texts in rows.items()}))


def test_a_conversion_for_which_no_measure_was_named_is_undecided():
    results = converted(first=dict(own=[0.1, 0.2], other=[0.3, 0.5]), second=dict(own=[0.7, 0.7]))
    verdict, finding = verdict_of("conversion", results, run="r", choices=["first", "absent", "second"])
    assert verdict == "undecided" and finding.value == pytest.approx(0.4) and finding.seeds == 2
    assert "first 0.15 on own, 0.4 on other; second 0.7 on own" in finding.where
    assert verdict_of("conversion", results, run="r", choices=["absent"])[0] == EVERY["none"]
    assert verdict_of("conversion", run="r", choices=["first"])[0] == EVERY["none"]


def test_conversions_are_compared_by_window_on_every_text():
    base = [1.0, 2.0, 3.0]
    near, far, either = ([x + shift for x, shift in zip(base, shifts)]
                         for shifts in ((-0.11, -0.1, -0.1), (0.1, 0.1, 0.1), (-1, 1, 0.1)))
    cases = dict(yes=(near, near), no=(near, far), mixed=(near, either), one=(near[:1], near[:1]))
    claim = dict(run="r", a="a", b="b")
    for name, (own, other) in cases.items():
        results = converted(a=dict(own=own, other=other), b=dict(own=base, other=base))
        verdict, finding = verdict_of("conversion_contrast", results, source="control", **claim)
        assert verdict == dict(yes="holds", no="does not hold", mixed="undecided", one="not yet run")[name]
    assert "a less b, 25.0 and 25.0 % of fp16's bytes" in verdict_of("conversion_contrast", converted(
        a=dict(own=near), b=dict(own=base)), **claim)[1].where
    finding = verdict_of("conversion_contrast", converted(a=dict(own=near, other=far), b=dict(own=base, other=base)),
                         **claim)[1]
    assert finding.value == pytest.approx(0.1)             # of the text where it is least so
    assert verdict_of("conversion_contrast", converted(a=dict(own=near)), **claim)[0] == EVERY["none"]
