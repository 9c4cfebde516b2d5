"""
Pretrained Llamas as models of train_dba.py.

A Llama is our standard attention, or gqa where query heads share keys, or bottleneck where its heads aren't as wide as
the model, with RMSNorm, SwiGLU, RoPE on halves and a tied embedding. load_llama() reads a .gguf file or a Hugging Face
folder (config.json, safetensors, tokenizer.json) into a GPT and its tokenizer, or says what in it our model can't hold.
It needs requirements-eval.txt.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from train_dba import DEFAULTS, GPT, Config, UserError, derived, out_of_range, width_problems

# Hugging Face's names of a layer's weights, and ours.
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attn.q.geo", "self_attn.k_proj": "attn.k.geo", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}
GGUF_LAYER = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


# -----------------------------------------------------------------------------
# Tokenizer

def token_bytes(hf):
    """The bytes of each token of a Hugging Face tokenizer, by id: byte-level BPE, or SentencePiece's with <0x..> for
    bytes. Tokens with a special meaning have none."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    decoder = json.loads(hf.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
    added = {i: "" if token.special else token.content for i, token in hf.added_tokens_decoder.items()}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def spell(i, token):
        if token is None or i in added:                    # None: an id that the tokenizer leaves out
            return added.get(i, "").encode()
        if "ByteLevel" in kinds:
            return bytes(byte_of[character] for character in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise UserError(f"its tokenizer decodes by {', '.join(sorted(kinds)) or 'nothing'}: neither byte-level BPE nor "
                        "SentencePiece with bytes")
    return [spell(i, token) for i, token in enumerate(hf.convert_ids_to_tokens(range(len(hf))))]


class LlamaTokenizer:
    """A pretrained model's tokenizer. vocab_size: rows of the model's embedding, maybe more than there are tokens; eot
    ends a document; prefix: the ids that the tokenizer puts before a text, which encode() leaves out; bos: what an
    empty text is continued from."""
    name = "llama"

    def __init__(self, hf, vocab_size):
        if hf.eos_token_id is None:
            raise UserError("its tokenizer has no token that ends a text")
        if len(hf) > vocab_size:
            raise UserError(f"its tokenizer has {len(hf)} tokens, its embedding {vocab_size} rows")
        self.hf, self.vocab_size, self.eot = hf, vocab_size, hf.eos_token_id
        self.bos = self.eot if hf.bos_token_id is None else hf.bos_token_id
        self.prefix = hf.encode("")
        if self.prefix not in ([], [hf.bos_token_id]):
            raise UserError(f"its tokenizer puts {self.prefix} around a text; at most a token before it is understood")
        self.bytes = token_bytes(hf)

    def encode(self, text):
        return np.array(self.hf.encode(text, add_special_tokens=False), dtype=np.uint32)

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids if i < len(self.bytes))


# -----------------------------------------------------------------------------
# Weights

def refusals(config, names):
    """What our model can't hold of a Llama, as words. config: of transformers; names: of its tensors."""
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None)
    return [words for bad, words in (
        (any(name.endswith(".bias") for name in names), "biases"),
        (rope["rope_type"] != "default", f"rope scaling ({rope['rope_type']})"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "RoPE on a part of each head"),
        (window is not None and window < config.max_position_embeddings, f"a sliding window of {window} tokens"),
        (config.hidden_act != "silu", f"{config.hidden_act} in its MLP"),
    ) if bad]


def llama_config(config):
    """Our Config of transformers' LlamaConfig. Raises UserError for widths that don't fit."""
    D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    attn_dim = H * (getattr(config, "head_dim", None) or D // H)
    mode = "gqa" if G < H else "standard" if attn_dim == D else "bottleneck"
    settings = dict(DEFAULTS, attn_mode=mode, d_model=D, layers=config.num_hidden_layers, n_head=H, attn_dim=attn_dim,
                    kv_head=G if mode == "gqa" else None, d_ff=config.intermediate_size, mlp="swiglu",
                    block=config.max_position_embeddings, norm_eps=config.rms_norm_eps,
                    rope_base=float(config.rope_parameters["rope_theta"]))
    cfg = Config(**derived(settings))
    if wrong := list(out_of_range(vars(cfg))) or list(width_problems(cfg)):
        raise UserError("; ".join(wrong))
    return cfg


def our_name(name):
    """Our name of a tensor of transformers' Llama. Raises UserError if we have none."""
    whole = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if name not in whole and not (layer and layer[2] in LAYER):
        raise UserError(f"it has a tensor {name}, which no Llama has")
    return whole[name] if name in whole else f"blocks.{layer[1]}.{LAYER[layer[2]]}.weight"


def map_weights(llama):
    """GPT of a LlamaForCausalLM: every tensor of the one is a tensor of the other, of the same shape."""
    tensors = llama.state_dict()
    embedding = tensors["model.embed_tokens.weight"]
    refused = refusals(llama.config, tensors)
    if not torch.equal(tensors.pop("lm_head.weight"), embedding):
        refused.append("an output embedding that isn't tied to the input's")
    if refused:
        raise UserError(f"our model can't hold {', '.join(refused)}")
    model = GPT(llama_config(llama.config), len(embedding))
    wanted = model.state_dict()
    weights = {our_name(name): tensor for name, tensor in tensors.items()}
    weights["embed.weight"] = torch.zeros_like(wanted["embed.weight"])          # rows up to a multiple of 64
    weights["embed.weight"][:len(embedding)] = embedding
    shapes = {name: tensor.shape for name, tensor in wanted.items() if not name.endswith("inv_freq")}
    assert len(weights) == len(tensors), "two tensors have one name"
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes, "names or shapes differ"
    model.load_state_dict({**wanted, **weights})
    return model.eval()


# -----------------------------------------------------------------------------
# Files

def check_gguf(path):
    """Raises UserError for what transformers would pass over in a GGUF file: RoPE's scaling, unknown tensors."""
    from gguf import GGUFReader
    reader = GGUFReader(path)

    def field(key):
        return reader.fields[key].contents() if key in reader.fields else None

    names = {tensor.name for tensor in reader.tensors}
    architecture = field("general.architecture")
    scaling = field(f"{architecture}.rope.scaling.type")
    if "rope_freqs.weight" in names or scaling not in (None, "none"):
        raise UserError(f"our model can't hold rope scaling ({scaling or 'rope_freqs.weight'})")
    known = {f"blk.{i}.{part}.weight" for i in range(field(f"{architecture}.block_count") or 0) for part in GGUF_LAYER}
    strange = {name for name in names if not name.endswith(".bias")} - known - {
        "token_embd.weight", "output_norm.weight", "output.weight"}
    if strange:
        raise UserError(f"it has a tensor {min(strange)}, which no Llama has")


def read_folder(folder, **gguf_file):
    """(LlamaForCausalLM in float32, tokenizer) of transformers from a folder, or the .gguf file of that name in it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **gguf_file)
    if config.model_type not in ("llama", "mistral"):
        raise UserError(f"it is a {config.model_type}; only llama and mistral fit our model")
    llama, report = AutoModelForCausalLM.from_pretrained(                       # no pickles: they might run code
        folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True,
        use_safetensors=True, **gguf_file)
    if strange := sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]):
        biases = "; our model can't hold biases" if any(name.endswith(".bias") for name in strange) else ""
        raise UserError(f"its tensors are not those that its settings promise ({strange[0]}){biases}")
    return llama, AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf_file)


def read_llama(path):
    """(LlamaForCausalLM in float32, tokenizer) of transformers, from a .gguf file or a Hugging Face folder."""
    if not path.is_file():
        return read_folder(path)
    check_gguf(path)
    with tempfile.TemporaryDirectory() as folder:          # alone: transformers prefers a tokenizer.json beside it
        Path(folder, path.name).symlink_to(path.resolve())
        return read_folder(folder, gguf_file=path.name)


def load_llama(path, device="cpu"):
    """(GPT in eval mode on a device, LlamaTokenizer) of a .gguf file or a Hugging Face folder. Raises UserError."""
    try:
        import gguf  # noqa: F401
        import accelerate  # noqa: F401
        import transformers
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
    except ModuleNotFoundError as e:
        raise UserError(f"{path} needs {e.name}: pip install -r requirements-eval.txt") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        llama, hf = read_llama(path)
        return map_weights(llama).to(device), LlamaTokenizer(hf, llama.config.vocab_size)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError, StrictDataclassError) as e:
        why = " ".join(str(e).split())[:200]
        raise UserError(f"{path} can't be read as a Llama ({type(e).__name__}: {why})") from None
