"""
Models in and out: pretrained Llamas as models of train_dba.py, trained models as folders for transformers.

    python3 convert_dba.py show SmolLM2.gguf                                # what model it is, or why it can't be read
    python3 convert_dba.py export --ckpt runs/tiny --out-dir exported/tiny
    python3 convert_dba.py advise --model SmolLM2.gguf --cache-share 0.28 --data train.txt   # what to spend bytes on
    python3 convert_dba.py dba --model SmolLM2.gguf --cache-share 0.5 --data train.txt --out-dir runs/smol  # attention
    python3 convert_dba.py mask --model SmolLM2.gguf --data train.txt --out-dir runs/mask   # learned sparse attention

A Llama is our standard attention, or gqa where query heads share keys, or bottleneck where its heads aren't as wide as
the model, with RMSNorm, SwiGLU, RoPE on halves and a tied embedding. load_llama() reads a .gguf file or a Hugging Face
folder (config.json, safetensors, tokenizer.json) into a GPT and its tokenizer, or says what in it our model can't hold;
`eval_dba.py COMMAND --ckpt PATH` measures it. It needs requirements-eval.txt.
"""

import argparse
import json
import math
import mmap
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from train_dba import (
    BROKEN,
    DEFAULTS,
    GPT,
    Config,
    Parser,
    UserError,
    bytes_per_token,
    count_params,
    derived,
    exit_code,
    out_of_range,
    read_bytes,
    width_problems,
)

# Hugging Face's names of a layer's weights, and ours.
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attn.q.geo", "self_attn.k_proj": "attn.k.geo", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}
GGUF_LAYER = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CONFIG_BYTES = 1 << 20                                     # the most that a config.json may have
TOKENIZER_BYTES = 1 << 28                                  # the same of a tokenizer.json
MOST = 1 << 24                                             # the largest number in a model's settings


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
        if len(hf) <= len(hf.all_special_ids):
            raise UserError("its tokenizer knows no text: are the files of one beside it?")
        if len(hf) > vocab_size:
            raise UserError(f"its tokenizer has {len(hf)} tokens, its embedding {vocab_size} rows")
        self.hf, self.vocab_size, self.eot = hf, vocab_size, hf.eos_token_id
        self.bos = self.eot if hf.bos_token_id is None else hf.bos_token_id
        self.prefix = hf.encode("")
        if self.prefix not in ([], [hf.bos_token_id]):
            raise UserError(f"its tokenizer puts {self.prefix} around a text; at most a token before it is understood")
        self.bytes = token_bytes(hf)
        self.words = [hf.backend_tokenizer.to_str(), hf.bos_token, hf.eos_token, vocab_size]      # for checkpoints

    @classmethod
    def of_words(cls, words):
        """The tokenizer of a checkpoint. Raises ValueError for words that are none."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
        text, bos, eos, vocab_size = words
        made = Tokenizer.from_buffer(text.encode())
        return cls(PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos), vocab_size)

    def encode(self, text):
        return np.array(self.hf.encode(text, add_special_tokens=False), dtype=np.uint32)

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids if i < len(self.bytes))


# How text is cut into words before byte pairs are merged, by the name in tokenizer.ggml.pre. llama.cpp holds the same
# table (src/llama-vocab.cpp); tests hold ours to its ids. Each pattern cuts the pieces that those before it left.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
DEFAULT_WORDS = (r"[\p{P}$+<=>^~|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
PRE_TOKENIZERS = {
    (r"\p{N}", GPT2_WORDS): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    (GPT2_WORDS,): "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat",
    (LLAMA3_WORDS,): ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe "
                      "chatglm-bpe glm4"),
    (QWEN2_WORDS,): "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan",
    DEFAULT_WORDS: "default",
}
WHOLE_WORDS = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2".split()     # a word that is a token
CONTROL, USER_DEFINED = 3, 4                               # of tokenizer.ggml.token_type


def gguf_tokenizer(fields):
    """A byte-level tokenizer of transformers from a GGUF file's fields, which says what llama.cpp reads in them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    name = fields.get("tokenizer.ggml.pre", "default")
    patterns = next((patterns for patterns, names in PRE_TOKENIZERS.items() if name in names.split()), None)
    if patterns is None:
        raise UserError(f"its pre-tokenizer is {name!r}; known are {' '.join(PRE_TOKENIZERS.values())}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise UserError("its tokenizer lists a token twice")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, bpe.add_special_tokens), (USER_DEFINED, bpe.add_tokens)):
        add([AddedToken(token, normalized=False) for token, its_kind in zip(tokens, types) if its_kind == kind])
    bos, eos = (tokens[fields[key]] if key in fields else None
                for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"))
    if fields.get("tokenizer.ggml.add_bos_token", name in WHOLE_WORDS):
        if bos is None:
            raise UserError("its tokenizer puts a token before a text, but doesn't say which")
        bpe.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", vocabulary[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)


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

GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


class GGUFHeader:
    """What a GGUF file says before its data. fields: {key: number, string or list}; tensors: {name: shape}. Every
    length is held against the file's size before it is used, so that readers that don't do so can be let loose on the
    file. Raises UserError, ValueError or struct.error for a damaged one."""

    def __init__(self, path):
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
            self.at = 0
            magic, version, tensors, fields = self.take("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise UserError("it is no GGUF file of version 2 or 3")
            self.fields = self.items(fields, lambda: self.value(*self.take("I")))
            infos = self.items(tensors, self.tensor)
            self.check_data(infos)
        self.tensors = {name: shape for name, (shape, _, _) in infos.items()}

    def take(self, codes):
        values = struct.unpack_from("<" + codes, self.data, self.at)
        self.at += struct.calcsize("<" + codes)
        return values

    def string(self):
        length, = self.take("Q")
        if length > len(self.data) - self.at:
            raise UserError("a text in its header is longer than the file")
        self.at += length
        return self.data[self.at - length:self.at].decode()

    def items(self, count, read):
        """{string: read()} of that many."""
        self.check_count(count)
        items = {}
        for _ in range(count):
            name = self.string()
            if name in items:
                raise UserError(f"its header says {name} twice")
            items[name] = read()
        return items

    def check_count(self, count):
        if 8 * count > len(self.data) - self.at:           # a string has 8 bytes at least
            raise UserError("a list in its header is longer than the file")

    def value(self, kind):
        if kind == GGUF_STRING:
            return self.string()
        if kind != GGUF_ARRAY:
            return self.take(GGUF_NUMBERS[kind])[0]
        kind, count = self.take("IQ")
        if kind == GGUF_STRING:
            self.check_count(count)
            return [self.string() for _ in range(count)]
        return list(self.take(f"{count}{GGUF_NUMBERS[kind]}"))

    def tensor(self):
        """(shape, type, offset in the data)"""
        dims, = self.take("I")
        if not 1 <= dims <= 4:
            raise UserError(f"a tensor of it has {dims} dimensions")
        return self.take(f"{dims}Q"), *self.take("IQ")

    def check_data(self, infos):
        """Every tensor lies within the file."""
        from gguf import GGML_QUANT_SIZES
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise UserError(f"its alignment is {alignment}")
        start = -(-self.at // alignment) * alignment
        for name, (shape, kind, offset) in infos.items():
            values, size = GGML_QUANT_SIZES[kind]
            if start + offset + math.prod(shape) // values * size > len(self.data):
                raise UserError(f"its tensor {name} goes past the end of the file")


# Of the keys that llama.cpp knows: those that are read, those that must have a value that changes nothing, those that
# change neither logits nor ids. Any other llama.* or tokenizer.* key is refused.
GGUF_READ = {"llama." + key: kind for key, kind in {
    "vocab_size": int, "context_length": int, "embedding_length": int, "block_count": int, "feed_forward_length": int,
    "attention.head_count": int, "attention.head_count_kv": int, "attention.key_length": int,
    "attention.value_length": int, "attention.layer_norm_rms_epsilon": float, "rope.dimension_count": int,
    "rope.freq_base": float}.items()} | {"tokenizer.ggml." + key: kind for key, kind in {
        "model": str, "pre": str, "tokens": list, "scores": list, "token_type": list, "merges": list,
        "bos_token_id": int, "eos_token_id": int, "unknown_token_id": int, "padding_token_id": int,
        "add_bos_token": bool, "add_space_prefix": bool}.items()}
GGUF_NEUTRAL = {
    "general.type": ("model",), "split.count": (0, 1),
    "llama.rope.scaling.type": ("none", "linear"), "llama.rope.scaling.factor": (0, 1),
    "llama.rope.scale_linear": (0, 1),
    "llama.rope.scaling.attn_factor": (1,), "llama.expert_count": (0,), "llama.expert_used_count": (0,),
    "llama.attention.causal": (True,), "llama.pooling_type": (0,), "tokenizer.ggml.add_eos_token": (False,),
    "tokenizer.ggml.add_sep_token": (False,), "tokenizer.ggml.remove_extra_whitespaces": (False,),
}
GGUF_IGNORED = re.compile(r"(?!llama\.|tokenizer\.).*|llama\.(rope\.scaling\.(original_context_length|finetuned)|"
                          r"tensor_data_layout)|tokenizer\.(chat_template.*|huggingface\.json|ggml\.("
                          r"(eot|eom|seperator|cls|mask|prefix|suffix|middle|fim_...)_token_id|token_type_count))")
GGUF_NEEDED = ("llama.context_length", "llama.embedding_length", "llama.block_count", "llama.feed_forward_length",
               "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.model",
               "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id")


def check_gguf_fields(fields):
    """Raises UserError for a key that is missing, of another type, or that asks for what our model can't hold.
    transformers passes over most of them."""
    if fields.get("general.architecture") != "llama":
        raise UserError(f"it is a {str(fields.get('general.architecture')):.40}; of GGUF files only llama fits our "
                        "model")
    if missing := [key for key in GGUF_NEEDED if key not in fields]:
        raise UserError(f"it lacks {missing[0]}")
    for key, value in fields.items():
        if key in GGUF_READ:
            if type(value) is not GGUF_READ[key]:
                raise UserError(f"its {key} is {str(value):.60}: no {GGUF_READ[key].__name__}")
            if type(value) is int and not 0 <= value <= MOST:
                raise UserError(f"its {key} is {value}")
        elif key in GGUF_NEUTRAL:
            if value not in GGUF_NEUTRAL[key]:
                scaling = "rope scaling: " if key.startswith("llama.rope.scal") else ""
                raise UserError(f"our model can't hold {scaling}{key} {str(value):.60}")
        elif not GGUF_IGNORED.fullmatch(key):
            raise UserError(f"it has a key {key:.80}, which might change ids or logits in a way that isn't known here")
    lists = {"tokens": str, "merges": str, "scores": float, "token_type": int}
    for name, kind in lists.items():
        values = fields.get(f"tokenizer.ggml.{name}", [])
        if not all(type(value) is kind for value in values):
            raise UserError(f"its tokenizer.ggml.{name} are no list of {kind.__name__}")
    if fields["tokenizer.ggml.model"] not in ("gpt2", "llama"):
        raise UserError(f"its tokenizer is {fields['tokenizer.ggml.model']:.40}; gpt2 (byte-level BPE) and llama "
                        "(SentencePiece) are known")


def check_gguf(path):
    """The fields of a GGUF file. Raises UserError for whatever in its header our model can't hold, for unknown tensors,
    and for settings that its tensors' shapes contradict."""
    header = GGUFHeader(path)
    fields, tensors = header.fields, header.tensors
    check_gguf_fields(fields)
    layers, D = fields["llama.block_count"], fields["llama.embedding_length"]
    heads = fields["llama.attention.head_count"]
    width = fields.get("llama.attention.key_length", D // max(heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(key, width) != width:
            raise UserError(f"our model can't hold heads of {width} channels with {key} {fields[key]}")
    if "rope_freqs.weight" in tensors:
        raise UserError("our model can't hold rope scaling (rope_freqs.weight)")
    if biases := sorted(name for name in tensors if name.endswith(".bias")):
        raise UserError(f"our model can't hold biases ({biases[0]})")
    if layers > len(tensors):
        raise UserError(f"it promises {layers} layers and has {len(tensors)} tensors")
    known = {f"blk.{i}.{part}.weight" for i in range(layers) for part in GGUF_LAYER}
    known |= {"token_embd.weight", "output_norm.weight"}
    if strange := sorted(tensors.keys() - known - {"output.weight"}):
        raise UserError(f"it has a tensor {strange[0]}, which no Llama has")
    if missing := sorted(known - tensors.keys()):
        raise UserError(f"it lacks the tensor {missing[0]}")
    if tensors["token_embd.weight"] != (D, fields.get("llama.vocab_size", len(fields["tokenizer.ggml.tokens"]))):
        raise UserError(f"its embedding has the shape {tensors['token_embd.weight']}, which isn't what its settings "
                        "say")
    return fields


def read_config(folder):
    """Raises UserError for a config.json that can't be a Llama's, before transformers builds what it asks for."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("it has no config.json: a Llama is a folder in Hugging Face's format, or a .gguf file")
    if path.stat().st_size > CONFIG_BYTES:
        raise UserError(f"its config.json has more than {CONFIG_BYTES} bytes")
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise UserError("its config.json is no object")
    if config.get("model_type") not in ("llama", "mistral"):
        raise UserError(f"it is a {str(config.get('model_type')):.40}; only llama and mistral fit our model")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = config.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= MOST):
            raise UserError(f"its config.json has {key} {str(value):.40}: no number from 1 to {MOST}")


def check_size(config, files):
    """Raises UserError if transformers would allocate far more for a config than its files can fill."""
    cfg = llama_config(config)
    asked, held = count_params(cfg, config.vocab_size)["total"], sum(path.stat().st_size for path in files)
    if asked > 8 * held:                                   # no format has less than a bit per weight
        raise UserError(f"its settings ask for {asked:,} weights, which {held:,} bytes can't hold")


def read_folder(folder, fields=None, **gguf_file):
    """(LlamaForCausalLM in float32, tokenizer) of transformers from a folder, or the .gguf file of that name in it,
    whose fields are given."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **gguf_file)
    check_size(config, [path for path in Path(folder).iterdir() if path.suffix in (".gguf", ".safetensors")])
    llama, report = AutoModelForCausalLM.from_pretrained(                       # no pickles: they might run code
        folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True,
        use_safetensors=True, **gguf_file)
    if strange := sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]):
        biases = "; our model can't hold biases" if any(name.endswith(".bias") for name in strange) else ""
        raise UserError(f"its tensors are not those that its settings promise ({strange[0]}){biases}")
    if fields and fields["tokenizer.ggml.model"] == "gpt2":
        return llama, gguf_tokenizer(fields)
    if (file := Path(folder, "tokenizer.json")).is_file():                      # or transformers' error has no class
        Tokenizer.from_buffer(read_bytes(file, TOKENIZER_BYTES))
    hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf_file)
    if fields and not fields.get("tokenizer.ggml.add_space_prefix", True):
        from tokenizers import pre_tokenizers
        hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return llama, hf


def read_llama(path):
    """(LlamaForCausalLM in float32, tokenizer) of transformers, from a .gguf file or a Hugging Face folder."""
    if path.is_dir():
        read_config(path)
        return read_folder(path)
    if not path.is_file():
        raise UserError("it is neither a file nor a folder")
    fields = check_gguf(path)
    with tempfile.TemporaryDirectory() as folder:          # alone: transformers prefers a tokenizer.json beside it
        Path(folder, "model.gguf").symlink_to(path.resolve())
        return read_folder(folder, fields, gguf_file="model.gguf")


def load_llama(path, device="cpu"):
    """(GPT in eval mode on a device, LlamaTokenizer) of a .gguf file or a Hugging Face folder. Raises UserError."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
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
    except (*BROKEN, OSError, LookupError, RuntimeError, ArithmeticError, MemoryError, AssertionError, struct.error,
            SafetensorError, StrictDataclassError) as e:
        why = " ".join(str(e).split())[:200]
        raise UserError(f"{path} can't be read as a Llama ({type(e).__name__}: {why})") from None


def show(path: Path) -> None:
    """Print what load_llama() makes of a pretrained model."""
    model, tokenizer = load_llama(path)
    cfg, params = model.cfg, count_params(model.cfg, model.vocab_size)["total"]
    print(f"{path}: {cfg.attn_mode} attention, {cfg.layers} layers, d_model {cfg.d_model}, {cfg.n_head} heads, block "
          f"{cfg.block:,}, {len(tokenizer.bytes):,} tokens, {params:,} parameters, KV "
          f"{bytes_per_token(cfg, 'fp16'):,} B/token in fp16")


def export_run(ckpt: Path, out: Path) -> None:
    """Write a model as a folder for transformers, and print how it is loaded."""
    from surgery.export import export
    reasons = export(ckpt, out)
    if not reasons:
        print(f"{out}: a Llama, AutoModelForCausalLM.from_pretrained({str(out)!r})")
    else:
        print(f"{out}: no Llama ({', '.join(reasons)}), but modeling_dba.py is in it, "
              f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


@exit_code()
def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("show", help="what a pretrained Llama is as a model of train_dba.py")
    p.add_argument("path", type=Path, help=".gguf file or Hugging Face folder")
    p = commands.add_parser("export", help="write a model as a folder for transformers")
    p.add_argument("--ckpt", type=Path, required=True, help="run folder, checkpoint, .gguf or Hugging Face folder")
    p.add_argument("--out-dir", type=Path, required=True, help="folder to make")
    from surgery import command, mask_command
    command.dba_flags(commands.add_parser("dba", help="give a pretrained model decoupled attention, MLA or GQA"))
    command.advise_flags(commands.add_parser("advise", help="what a share of a cache's bytes is best spent on"))
    mask_command.flags(commands.add_parser("mask", help="learned block-sparse attention on a frozen model"))
    args = parser.parse_args(argv)
    if args.command == "dba":
        return command.make_dba(args, sys.argv[1:] if argv is None else argv)
    elif args.command == "advise":
        command.advise(args)
    elif args.command == "mask":
        mask_command.make_mask(args)
    elif args.command == "show":
        show(args.path)
    else:
        export_run(args.ckpt, args.out_dir)


if __name__ == "__main__":
    sys.exit(main())
