"""
A trained model as a folder that transformers loads.

standard, gqa and bottleneck without null token, tied keys or temperatures, whose heads divide the stream, are Llamas,
and become one: config.json, model.safetensors, tokenizer.json, for whatever reads Llamas. The others become a folder
with modeling_dba.py in it, for trust_remote_code. mla isn't written as DeepSeek-V2, whose class fixes the epsilon of
the latent's norm at 1e-6.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from convert_dba import LAYER
from train_dba import BYTE_CHARS, EOS, UNK, Config, UserError, read_model, why_unwritten

MODELING = Path(__file__).with_name("modeling_dba.py")
DBA_FIELDS = [f.name for f in dataclasses.fields(Config) if f.metadata["group"] == "model" and f.name not in (
    "size", "exp")]


def no_llama(cfg: Config) -> list[str]:
    """What a model has that a Llama can't have, as flags; empty for a Llama."""
    reasons = {
        f"--attn-mode {cfg.attn_mode}": cfg.attn_mode in ("decoupled", "mla"),
        "--null-attn": cfg.null_attn, "--tie-qk": cfg.tie_qk, "--learned-temp": cfg.learned_temp,
        "--no-rope": not cfg.rope, f"--mlp {cfg.mlp}": cfg.mlp != "swiglu",
        "--embed-dim": cfg.embed_dim != cfg.d_model,
        f"--d-model {cfg.d_model} and --n-head {cfg.n_head}": cfg.d_model % cfg.n_head != 0,        # transformers' rule
    }
    return [flag for flag, holds in reasons.items() if holds]


def llama_folder(cfg: Config, weights: dict, vocab_size: int, bos: int, eot: int) -> tuple[dict, dict]:
    """(config.json, tensors) of a Llama."""
    shape = cfg.attention
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab_size, hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff, num_hidden_layers=cfg.layers, num_attention_heads=cfg.n_head,
        num_key_value_heads=shape.v_groups, head_dim=shape.v_width, hidden_act="silu", rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.block, rope_theta=cfg.rope_base, attention_bias=False, mlp_bias=False,
        tie_word_embeddings=True, bos_token_id=bos, eos_token_id=eot, torch_dtype="float32")
    tensors = {"model.embed_tokens.weight": weights["embed.weight"][:vocab_size], "model.norm.weight": weights[
        "norm.weight"]}
    for i in range(cfg.layers):
        for theirs, ours in LAYER.items():
            tensors[f"model.layers.{i}.{theirs}.weight"] = weights[f"blocks.{i}.{ours}.weight"]
    return config, tensors


def dba_folder(cfg: Config, weights: dict, vocab_size: int, bos: int, eot: int) -> tuple[dict, dict]:
    """(config.json, tensors) for modeling_dba.py."""
    settings = {name: getattr(cfg, name) for name in DBA_FIELDS}
    remote = {"AutoConfig": "modeling_dba.DBAConfig", "AutoModelForCausalLM": "modeling_dba.DBAForCausalLM"}
    config = dict(architectures=["DBAForCausalLM"], model_type="dba", auto_map=remote, vocab_size=vocab_size,
                  tie_word_embeddings=True, bos_token_id=bos, eos_token_id=eot, torch_dtype="float32", **settings)
    tied = [path.name for path in cfg.attention.paths if path.tied]
    tensors = {}
    for name, tensor in weights.items():
        if not any(name.endswith(f"attn.k.{path}.weight") for path in tied):
            tensors[name] = tensor
    tensors["embed.weight"] = weights["embed.weight"][:vocab_size]
    return config, tensors


def gpt2_pairs(tokenizer) -> tuple[dict, list]:
    """(vocabulary, merges) of GPT-2's tokens, in the characters of byte-level BPE. tiktoken keeps tokens and their
    ranks; the pair that makes a token is what merging by lower ranks leaves of it."""
    ranks = tokenizer.bpe._mergeable_ranks
    spell = {token: "".join(BYTE_CHARS[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell[parts[0]], spell[parts[1]]))
    return {spell[token]: rank for token, rank in ranks.items()}, merges


def byte_level(vocabulary: dict, merges: list, words: bool):
    """A tokenizer of the library tokenizers over bytes. words: cut text into GPT-2's words before merging."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    return made


def word_level(words: list[str]):
    """A tokenizer of the library tokenizers that has WikiText's words, <eos> between lines."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    made.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(r"\s*\n\s*"), f" {EOS} ")])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def to_tokenizers(tokenizer):
    """(tokenizer of the library tokenizers with the ids of ours, its end of text)."""
    from tokenizers import Tokenizer
    end = "<|endoftext|>"
    if tokenizer.name == "word":
        return word_level(tokenizer.words), EOS
    if tokenizer.name == "byte":
        made = byte_level({character: byte for byte, character in enumerate(BYTE_CHARS)}, [], words=False)
    elif tokenizer.name == "gpt2":
        made = byte_level(*gpt2_pairs(tokenizer), words=True)
    elif tokenizer.name == "bpe":
        merges = json.loads(tokenizer.encoder.to_str())["model"]["merges"]
        made = byte_level(tokenizer.encoder.get_vocab(), [tuple(pair) for pair in merges], words=True)
    else:                                                  # a Llama's, which is one
        return Tokenizer.from_buffer(tokenizer.words[0].encode()), tokenizer.hf.eos_token
    made.add_special_tokens([end])
    return made, end


def export(ckpt: str | Path, out: Path) -> list[str]:
    """Write what read_model() reads as a folder `out`, whole or not at all. Returns what keeps it from being a Llama,
    empty for one. Raises UserError for a checkpoint or a folder that won't do."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        from transformers import PreTrainedTokenizerFast
    except ImportError as e:
        raise UserError(f"no module {e.name}: pip install -r requirements-eval.txt") from None
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; name another --out-dir")
    model, tokenizer, _, _ = read_model(ckpt)
    made, end = to_tokenizers(tokenizer)
    if made.token_to_id(end) != tokenizer.eot:
        raise UserError(f"the exported tokenizer would end a text with {made.token_to_id(end)}, not {tokenizer.eot}")
    reasons = no_llama(model.cfg)
    weights = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    make = dba_folder if reasons else llama_folder
    bos = tokenizer.bos if tokenizer.name == "llama" else tokenizer.eot
    config, tensors = make(model.cfg, weights, model.vocab_size, bos, tokenizer.eot)
    special = dict(bos_token=made.id_to_token(bos), eos_token=end, **({"unk_token": UNK} if tokenizer.name == "word"
                                                                      else {}))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as whole:
            folder = Path(whole) / out.name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors",
                      metadata={"format": "pt"})
            PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=model.cfg.block,
                                    **special).save_pretrained(folder)
            if reasons:
                shutil.copy(MODELING, folder)
            folder.replace(out)                            # an empty folder gives way
    except (OSError, SafetensorError) as e:
        raise UserError(f"can't write {out} ({why_unwritten(e)}); nothing is left of it") from None
    return reasons
