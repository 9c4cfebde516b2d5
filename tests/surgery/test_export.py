"""Exported models: transformers' logits, ids and generated tokens are ours, in every mode."""

import os

import pytest
import torch

import convert_dba
import train_dba
from small_models import LLAMAS, OTHERS, saved
from train_dba import GPT, KVCache, UserError, generate, make_tokenizer

for needed in ("safetensors", "transformers"):
    pytest.importorskip(needed, reason="requirements-eval.txt")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from surgery.export import export, no_llama  # noqa: E402

TEXT = "The list — naïve\n\n 日本 <b> & 3.14\tend  of it\n"


def exported(tmp_path, settings, **kwargs):
    """(our model, transformers', its tokenizer) of one checkpoint."""
    model = saved(tmp_path / "run", settings, **kwargs)
    assert export(tmp_path / "run", tmp_path / "hf") == no_llama(model.cfg)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0)          # ours doesn't stop at the end of a text
    return model, theirs, AutoTokenizer.from_pretrained(tmp_path / "hf")


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("settings", [*LLAMAS.values(), *OTHERS.values()], ids=[*LLAMAS, *OTHERS])
@torch.no_grad()
def test_logits_and_generation(tmp_path, settings):
    model, theirs, _ = exported(tmp_path, settings)
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-4)
    loss = theirs(ids, labels=ids).loss
    assert abs(loss.item() - model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).item() / (3 * 39)) < 1e-4

    cache = KVCache(model.cfg, 1, 40 + 20, "fp32")
    ours = [token.item() for token in generate(model, ids[:1], 20, cache, temperature=0)]
    generated = theirs.generate(ids[:1], max_new_tokens=20, do_sample=False)
    assert generated[0, 40:].tolist() == ours

    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], 1)           # padding on the left changes nothing
    mask = torch.cat([torch.zeros(3, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    again = theirs.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert again[0, 45:].tolist() == ours


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@torch.no_grad()
def test_half_precision_turns_far_tokens_by_the_same_angle(tmp_path, dtype):
    """Loaded in it, or cast to it: of logits at positions up to 63,000 only products' rounding shows."""
    model, theirs, _ = exported(tmp_path, OTHERS["decoupled"])
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    far = dict(position_ids=torch.arange(64)[None] * 1000)
    expected = theirs(ids, **far).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=dtype).eval()
    for half in (loaded, theirs.to(dtype)):
        assert half.embed.weight.dtype == dtype
        assert torch.equal(half.blocks[0].attn.inv_freq, model.blocks[0].attn.inv_freq)
        assert (half(ids, **far).logits - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize("make", ["byte_level", "sentencepiece"])
def test_a_converted_llama_goes_out_with_its_tokenizer(tmp_path, make):
    """What `convert_dba.py dba` made of a Hugging Face folder: in a checkpoint, and out again, its ids are the same."""
    pytest.importorskip("gguf", reason="requirements-eval.txt")
    import llamas
    llamas.save_llama(tmp_path / "llama", tokenizer=getattr(llamas, make))
    (tmp_path / "text.txt").write_text(llamas.TEXT * 60)
    flags = ["--window", "32", "--calibration", "4", "--val-windows", "2", "--cache-share", "0.6"]
    paths = {"--model": "llama", "--data": "text.txt", "--out-dir": "run"}
    flags += [part for flag, name in paths.items() for part in (flag, str(tmp_path / name))]
    assert convert_dba.main(["dba", *flags]) == 0
    _, before = convert_dba.load_llama(tmp_path / "llama")
    ckpt = train_dba.load_checkpoint(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (llamas.TEXT, "at  at\n", ""):
        ids = before.encode(text).tolist()
        assert ckpt["tokenizer"].encode(text).tolist() == again.encode(text, add_special_tokens=False) == ids
        assert ckpt["tokenizer"].decode(ids) == before.decode(ids)
    tokenizer, model = ckpt["tokenizer"], train_dba.load_model(ckpt)
    assert (tokenizer.eot, tokenizer.bos, tokenizer.prefix) == (before.eot, before.bos, before.prefix)
    assert not torch.equal(model.blocks[0].attn.inv_freq, GPT(model.cfg, 300).blocks[0].attn.inv_freq), "its own"
    ids = torch.arange(40)[None] * 7 % 290
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)


def test_a_llama_comes_back(tmp_path):
    """What was exported as a Llama is loaded as the same model by convert_dba.py."""
    pytest.importorskip("gguf", reason="requirements-eval.txt")
    model = saved(tmp_path / "run", LLAMAS["gqa"])
    export(tmp_path / "run", tmp_path / "hf")
    again, tokenizer = convert_dba.load_llama(tmp_path / "hf")
    ids = torch.arange(40)[None] * 7 % 256
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-5)
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())


def trained_bpe():
    """Pairs that occur in the text, and a pair of pairs."""
    e, space, t = ord("e"), ord(" "), ord("t")
    return make_tokenizer("bpe", [[ord("h"), e], [t, 256], [space, t], [space, ord("l")], [259, ord("i")]])


def word():
    return train_dba.WordTokenizer.build(train_dba.split_words("The list end of it <b> & the\n"))


@pytest.mark.parametrize("make", [trained_bpe, word, lambda: make_tokenizer("byte", None), pytest.param(
    lambda: make_tokenizer("gpt2", None), marks=pytest.mark.skipif(
        "TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR"))],
    ids=["bpe", "word", "byte", "gpt2"])
def test_ids_are_ours(tmp_path, make):
    tokenizer = make()
    _, theirs, hf = exported(tmp_path, dict(attn_mode="standard"), tokenizer=tokenizer)
    for text in (TEXT, "the the  li\n\n\n \nlist", "", "it's 1234567 ¡ÿ \u3000x"):
        assert hf.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    assert hf.eos_token_id == tokenizer.eot and theirs.config.vocab_size == tokenizer.vocab_size
    if tokenizer.name != "word":
        assert hf.decode(hf.encode(TEXT)) == TEXT


def test_refusals(tmp_path):
    saved(tmp_path / "run", LLAMAS["gqa"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder; name another --out-dir"):
        export(tmp_path / "run", tmp_path / "full")
    with pytest.raises(UserError, match="File name too long"):
        export(tmp_path / "run", tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="is not a file"):
        export(tmp_path / "none", tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and (tmp_path / "full/x").read_text() == "mine"


def test_command_line(tmp_path, capsys):
    saved(tmp_path / "run", OTHERS["decoupled, all"])
    (tmp_path / "hf").mkdir()
    assert convert_dba.main(["export", "--ckpt", str(tmp_path / "run"), "--out-dir", str(tmp_path / "hf")]) == 0
    assert "no Llama (--attn-mode decoupled, --null-attn, --tie-qk, --learned-temp)" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"config.json", "model.safetensors", "modeling_dba.py", "tokenizer.json", "tokenizer_config.json"}
    assert convert_dba.main(["export", "--ckpt", str(tmp_path / "run"), "--out-dir", str(tmp_path / "hf")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    saved(tmp_path / "run", LLAMAS["standard"])
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="disk full"):
        export(tmp_path / "run", tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []
