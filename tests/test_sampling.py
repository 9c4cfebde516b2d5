"""The sampling flags of the KV cache: what the start line says, what is refused, what is generated."""

import importlib.util
import io
import math
import re
import shutil
import warnings

import pytest
import torch

import train_dba
from helpers import TRAIN, assert_done, assert_error, call, cli, make_text
from reference import QUANTISED, randomize
from test_cache import HETERO, cost
from train_dba import FORMATS, compare_bytes, make_config

SAMPLE = "--mode sample --ckpt {}/last.pt --device cpu --dtype float32 --max-new-tokens 8 --no-stop-at-eot --prompt ab"
TRAINED = {                                                # flags, channels of the streams; d_model 32, two heads of 16
    "standard": ("", dict(k=32, v=32)),
    "bottleneck": ("--attn-dim 36", dict(k=36, v=36)),
    "gqa": ("--kv-head 1 --null-attn", dict(k=16, v=16)),
    "decoupled": ("--sem-dim 34 --geo-dim 36 --tie-qk --null-attn", dict(k_sem=34, k_geo=36, v=70)),
    "decoupled-latent": ("--sem-dim 34 --geo-dim 36 --kv-lora-rank 45 --null-attn", dict(latent=45, k_geo=36)),
    "mla": ("--kv-lora-rank 40 --rope-dim 6", dict(latent=40, k_rope=6)),
}
LAYERS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run per attention mode, of one step, whose weights are then random ones of scores of order 1."""
    folder = tmp_path_factory.mktemp("trained")
    make_text(folder)
    for mode, (flags, _) in TRAINED.items():
        kind = mode.split("-")[0]
        assert_done(call(f"{TRAIN} --layers {LAYERS} --steps 1 --attn-mode {kind} {flags} --out-dir {mode}", folder))
        path = folder / mode / "last.pt"
        ckpt = torch.load(path, weights_only=True)
        model = randomize(train_dba.load_model(train_dba.load_checkpoint(path)))
        with torch.no_grad():
            model.embed.weight *= 0.05                     # what attention adds outweighs the token itself
        torch.save({**ckpt, "model": model.state_dict()}, path)
    return folder


def sample(folder, mode, flags=""):
    return call(f"{SAMPLE.format(mode)} {flags}", folder)


def bytes_of(formats, streams, layers=LAYERS):
    return layers * sum(cost(formats[name], C) for name, C in streams.items())


def ratios(total, k, v, d_model, heads, layers):
    """{what: ratio} that is to be printed: beside standard attention and GQA with an eighth of the key heads."""
    G, name = max(1, heads // 8), k if k == v else f"k {k} v {v}"
    full, few = dict(k=d_model, v=d_model), dict(k=d_model // heads * G, v=d_model // heads * G)
    return {"standard in fp16": total / bytes_of(dict(k="fp16", v="fp16"), full, layers),
            f"standard in {name}": total / bytes_of(dict(k=k, v=v), full, layers),
            f"gqa with {G} key head{'s' * (G > 1)} in {name}": total / bytes_of(dict(k=k, v=v), few, layers)}


def check_ratios(text, expected):
    ratios = re.findall(r"(\S+) x ([^,;\n]+)", text)
    said = {what: float(ratio) for ratio, what in ratios}
    assert len(said) == len(ratios), f"a ratio is said twice: {text}"
    assert said.keys() == expected.keys()
    for what, ratio in expected.items():
        assert abs(said[what] / ratio - 1) < 0.006, what   # three digits


@pytest.mark.parametrize("mode", TRAINED)
def test_start_line(trained, mode):
    streams = TRAINED[mode][1]
    last, v = list(streams)[-2 if "v" in streams else 1], "v" if "v" in streams else "latent"
    for flags, formats, residual in [
        *((f"--kv-cache {fmt}", dict.fromkeys(streams, fmt), 0) for fmt in FORMATS),
        ("", dict.fromkeys(streams, "fp16"), 0),
        (f"--kv-cache q4_0 --kv-cache-{v} q8_0", {**dict.fromkeys(streams, "q4_0"), v: "q8_0"}, 0),
        (f"--kv-cache nf4 --kv-residual 700 --prompt {'ab' * 600}", dict.fromkeys(streams, "nf4"), 700),
        *([("--kv-cache hetero --kv-residual 3", {name: HETERO[name] for name in streams}, 3)] if "k_geo" in streams
          else []),
    ]:
        result = sample(trained, mode, f"{flags} --max-new-tokens 3")
        assert_done(result)
        total, tokens = bytes_of(formats, streams), 1202 if "--prompt" in flags else 4
        line = result.stderr.splitlines()[1]
        assert ", ".join(f"{name} {fmt}" for name, fmt in formats.items()) in line
        assert f": {total:,} bytes per token," in line
        ring = min(residual, tokens)
        settled, slots = 512 * math.ceil((tokens - ring) / 512), 128 * math.ceil(ring / 128)
        in_ring = {name: "fp16" if fmt in QUANTISED else fmt for name, fmt in formats.items()}
        owned = settled * total + slots * bytes_of(in_ring, streams)
        assert f"; {owned:,} bytes allocated for {settled + ring:,} tokens" in line
        check_ratios(line, ratios(total, formats[last], formats[v], 32, 2, LAYERS))


@pytest.mark.parametrize("given, policy, bytes_, k, v", [
    (dict(exp="paper_decoupled_sem8"), "hetero", 1952, "q8_0", "q4_0"),
    (dict(exp="paper_decoupled_sem8"), "fp16", 5120, "fp16", "fp16"),
    (dict(exp="paper_baseline"), "q4_0", 2304, "q4_0", "q4_0"),
    (dict(exp="paper_gqa"), "q4_0", 288, "q4_0", "q4_0"),
    (dict(exp="paper_gqa"), "fp16", 1024, "fp16", "fp16"),
    (dict(exp="paper_mla"), "fp16", 1152, "fp16", "fp16"),
], ids=str)
def test_start_line_of_the_papers_models(given, policy, bytes_, k, v):
    cfg = make_config(data="none", **given)
    said = compare_bytes(cfg, train_dba.cache_formats(cfg, policy))
    assert said.startswith(f"{22 * bytes_:,} bytes per token, ")
    check_ratios(said, ratios(22 * bytes_, k, v, 2048, 32, 22))
    if policy == "hetero":                                 # 2048 channels: keys 2176 bytes, values 1152
        assert f"{1952 / (2176 + 1152):.3g} x standard in k q8_0 v q4_0" in said
        assert f"{1952 / (272 + 144):.3g} x gqa with 4 key heads" in said


@pytest.mark.parametrize("d_model", (100, 4))
def test_start_line_where_heads_do_not_divide_d_model(d_model):
    """As those of a decoupled model need not; standard attention of that width caches all of it."""
    cfg = make_config(data="none", attn_mode="decoupled", d_model=d_model, n_head=8, sem_dim=32, geo_dim=64, layers=1)
    said = compare_bytes(cfg, train_dba.cache_formats(cfg, "fp16"))
    assert f"{192 / (2 * d_model):.3g} x standard in fp16" in said


@pytest.mark.parametrize("mode, flags, words", [
    *((mode, "--kv-cache hetero", ["--kv-cache hetero", "decoupled"]) for mode in TRAINED if "decoupled" not in mode),
    ("standard", "--kv-cache-k-sem q4_0", ["--kv-cache-k-sem", "standard", "k, v"]),
    ("standard", "--kv-cache-latent q4_0", ["--kv-cache-latent", "k, v"]),
    ("decoupled", "--kv-cache-k q4_0", ["--kv-cache-k:", "k_sem, k_geo, v"]),
    ("mla", "--kv-cache-v q4_0", ["--kv-cache-v:", "latent, k_rope"]),
    ("decoupled-latent", "--kv-cache-k-sem q4_0", ["--kv-cache-k-sem:", "latent, k_geo"]),
    ("gqa", "--kv-residual 4", ["--kv-residual", "quantised"]),
    ("gqa", "--kv-residual 4 --kv-cache fp32", ["--kv-residual"]),
    ("gqa", "--kv-residual 4 --kv-cache q4_0 --kv-cache-k fp32 --kv-cache-v bf16", ["--kv-residual"]),
    ("standard", "--kv-residual -1 --kv-cache q4_0", ["--kv-residual -1"]),
    ("standard", "--max-new-tokens 99999999999999", ["--max-new-tokens"]),
], ids=str)
def test_refused(trained, mode, flags, words):
    result = sample(trained, mode, flags)
    assert_error(result, *words)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", ["--kv-cache q5_0", "--kv-cache-v hetero", "--kv-residual x", "--kernel cuda"])
def test_unknown_words(trained, flags):
    assert_error(sample(trained, "standard", flags), flags.split()[0], code=2)


@pytest.mark.parametrize("flags", ["", "--kv-residual 3", "--kv-rotate"], ids=str)
@pytest.mark.parametrize("mode", TRAINED)
def test_every_format_generates(trained, mode, flags):
    before = (trained / mode / "last.pt").read_bytes()
    for fmt in (*QUANTISED, *(["hetero"] if "decoupled" in mode else []), *([] if flags == "--kv-residual 3" else
                                                                            ["fp32", "bf16", "fp16"])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = sample(trained, mode, f"--kv-cache {fmt} {flags}")
        assert_done(result)
        assert result.stdout.startswith("ab") and len(result.stdout) > 4
    assert (trained / mode / "last.pt").read_bytes() == before


@pytest.mark.parametrize("mode", TRAINED)
def test_formats_reach_the_text(trained, mode):
    """Greedy text: rotation leaves that of fp32, a window longer than the text leaves that of fp16."""
    long = "--temperature 0 --max-new-tokens 120 --kernel torch --kv-cache"
    exact = sample(trained, mode, f"{long} fp32").stdout
    assert len(set(exact)) > 8, "too dull a text to tell"
    assert sample(trained, mode, f"{long} fp32 --kv-rotate").stdout == exact
    coarse = sample(trained, mode, f"{long} q4_0").stdout
    assert coarse != exact
    assert sample(trained, mode, f"{long} q4_0 --kv-rotate").stdout != coarse
    fp16 = sample(trained, mode, f"{long} fp16").stdout
    assert sample(trained, mode, f"{long} q4_0 --kv-residual 500").stdout == fp16
    assert sample(trained, mode, f"{long} q4_0 --kv-residual 4").stdout not in (fp16, coarse)


def test_a_checkpoint_older_than_these_flags(trained, tmp_path):
    shutil.copytree(trained / "standard", tmp_path / "standard")
    path = tmp_path / "standard/last.pt"
    ckpt = torch.load(path, weights_only=True)
    new = [name for name in ckpt["config"] if name.startswith(("kv_cache", "kv_r", "kernel"))]
    assert len(new) == 10
    for name in new:
        del ckpt["config"][name]
    torch.save(ckpt, path)
    assert_done(sample(tmp_path, "standard", "--kv-cache q4_0 --kv-residual 2"))


# --- Logits that are not finite

@pytest.fixture(scope="module")
def large(trained):
    """Checkpoints of runs whose keys of the first layer, or all weights of the second, are beyond what is finite."""
    for name, weight, factor in (("keys", "blocks.0.attn.k.geo.weight", 1e7), ("weights", "blocks.1.mlp.up.weight",
                                                                               math.inf)):
        ckpt = torch.load(trained / "standard/last.pt", weights_only=True)
        ckpt["model"][weight] *= factor
        (trained / name).mkdir()
        torch.save(ckpt, trained / name / "last.pt")
    return trained


@pytest.mark.parametrize("flags", ["--kv-cache fp16", "--kv-cache q8_0", "--kv-cache q4_0 --kv-residual 3",
                                   "--kv-cache fp32 --kv-cache-k fp16"])
@pytest.mark.parametrize("temperature", (0, 1))
def test_float16_overflow_names_the_format(large, flags, temperature):
    result = sample(large, "keys", f"{flags} --temperature {temperature}")
    fmt = flags.split()[-1] if "-k " in flags else flags.split()[1]
    assert_error(result, "token 3", "layer 0's k ", f"--kv-cache {fmt}", "fp32 or bf16")
    assert result.stdout == "ab"


def test_float32_and_bfloat16_caches_hold_what_float16_cannot(large):
    for fmt in ("fp32", "bf16"):
        assert_done(sample(large, "keys", f"--kv-cache {fmt}"))


def test_weights_that_are_to_blame(large):
    result = sample(large, "weights", "--kv-cache fp32")
    assert_error(result, "what is cached is", "--dtype float32")


# --- Which checkpoint

def test_weights_are_cast_once():
    """Under autocast each matrix becomes bfloat16 before the first token, and at no later one."""
    cfg = make_config(data="-", d_model=64, layers=2, n_head=2, d_ff=96, block=32)
    model = train_dba.GPT(cfg, 300).init_weights().eval()
    matrices, copies = sum(p.dim() == 2 for p in model.parameters()), []
    with train_dba.autocast(torch.device("cpu"), torch.bfloat16):
        tokens = train_dba.generate(model, torch.tensor([[1]]), 4, train_dba.KVCache(cfg, 1, 5, "fp16"))
        for _ in range(4):                                 # a step from the logits to the next hidden state
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                next(tokens)
            copies += [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    assert copies[0] - copies[1] == matrices and copies[1:3] == copies[2:]


def test_a_run_folder_means_its_best_checkpoint(tmp_path):
    make_text(tmp_path)
    assert_done(call(f"{TRAIN} --steps 2 --out-dir run", tmp_path))
    folder, file = (call(f"--mode sample --device cpu --dtype float32 --max-new-tokens 8 --ckpt {ckpt}", tmp_path)
                    for ckpt in ("run", "run/best.pt"))
    assert_done(folder)
    assert (folder.code, folder.stdout) == (file.code, file.stdout)
    (tmp_path / "run/best.pt").unlink()
    assert_error(call("--mode sample --ckpt run", tmp_path), "run/best.pt is not a file", "make checkpoints")


def test_what_a_llama_lacks_is_said(tmp_path):
    """Packages, where they aren't installed; else what is wrong with the file."""
    (tmp_path / "llama.gguf").write_bytes(b"GGUF")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text("{}")
    lacking = importlib.util.find_spec("accelerate") is None
    for name in ("llama.gguf", "hub"):
        result = call(f"--mode sample --ckpt {name}", tmp_path)
        assert_error(result, name, "requirements-eval.txt" if lacking else name)
    assert_error(call("--mode sample --ckpt gone.gguf", tmp_path), "gone.gguf", "make checkpoints")


# --- What an encoding can't hold

def test_an_ascii_terminal(trained, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = cli(SAMPLE.format("standard").replace("--prompt ab", "--prompt mnö"), trained)
    assert_done(result)
    assert result.stdout.startswith("mn?") and "Traceback" not in result.stderr
    assert_done(cli("--help", trained))


# --- Prompts and ends

def test_prompts_from_files_and_standard_input(trained, monkeypatch):
    def reading(text, flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return call(flags, trained)

    (trained / "prompt.txt").write_bytes(b"\xef\xbb\xbfab")                       # with a byte-order mark
    greedy = f"{SAMPLE.format('gqa')} --temperature 0"
    expected = call(greedy, trained).stdout
    assert expected.startswith("ab") and len(expected) > 4
    without = greedy.replace("--prompt ab", "")
    assert call(f"{without} --prompt-file prompt.txt", trained).stdout == expected
    assert reading("ab", f"{without} --prompt -").stdout == expected
    both = reading("ab\nab\n", f"{without} --interactive")
    assert both.stdout == expected * 2 and both.stderr.count("tokens: the first after") == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\n\xff\nab\n"), "utf-8"))
    with_bytes = call(f"{without} --interactive", trained)  # one line of three isn't text
    assert with_bytes.stdout == expected * 2 and "line 2 of standard input is not UTF-8" in with_bytes.stderr
    assert_error(call(f"{without} --prompt-file none.txt", trained), "--prompt-file none.txt can't be read")
    assert_error(call(f"{without} --prompt x --interactive", trained), "--prompt and --interactive exclude each other")
    monkeypatch.setattr(train_dba, "LONGEST_PROMPT", 3)
    assert_error(reading("abcd", f"{without} --prompt -"), "standard input has more than 3 characters")
    monkeypatch.setattr("sys.stdin", None)
    for flags in ("--prompt -", "--interactive"):
        assert_error(call(f"{without} {flags}", trained), "standard input is closed")


def test_samples_count_seeds_up(trained):
    flags = SAMPLE.format("decoupled")
    two = call(f"{flags} --num-samples 2 --seed 7", trained)
    assert two.stdout == "".join(call(f"{flags} --seed {seed}", trained).stdout for seed in (7, 8))
    assert two.stderr.count("8 tokens: the first after") == 2


class Letters:
    """A tokenizer that spells ids as letters."""
    name, eot = "letters", 0

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids).encode()


def test_the_text_before_a_stop(capsys):
    """Neither it nor a beginning of it is shown; a beginning that comes to nothing is, at the end."""
    class Halves(Letters):
        def decode(self, ids):
            return b"ab \xe2\x80"

    printer = train_dba.Printer(Halves(), " ")
    assert printer.add([0])
    printer.end()
    assert capsys.readouterr().out == "ab\n"              # nor half of a character behind it
    for stop, shown in (("ef", "abcd"), ("bcd", "a"), ("gh", "abcdefg"), ("cx", "abcdefg")):
        printer = train_dba.Printer(Letters(), stop)
        for i in range(7):
            if printer.add([i]):
                break
        printer.end()
        assert capsys.readouterr().out == shown + "\n", stop


def test_the_end_of_a_document(trained, monkeypatch, capsys):
    model = train_dba.load_model(train_dba.load_checkpoint(trained / "gqa/last.pt"))
    cfg = make_config(mode="sample", ckpt="-", max_new_tokens=5)
    cache = train_dba.KVCache(model.cfg, 1, 8, "fp32")
    for eot, count in ((99, 5), (1, 2)):
        drawn = torch.tensor([2, 1, 2, 2, 2]).view(5, 1, 1)
        monkeypatch.setattr(train_dba, "generate", lambda *args: iter(drawn))
        tokenizer = Letters()
        tokenizer.eot = eot
        train_dba.continue_text(model, tokenizer, [3], cache, cfg, 0)
        said = capsys.readouterr()
        assert f"{count} tokens" in said.err and said.out == ("dcbccc\n" if eot == 99 else "dc\n")
