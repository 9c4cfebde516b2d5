"""
The models of train_dba.py for transformers, in one file that a folder by `convert_dba.py export` carries with it:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)   # else it asks
    model.generate(**tokenizer("The list", return_tensors="pt"), max_new_tokens=50)

Every attention mode is one or two score paths, whose scaled scores add up: `sem` without position, `geo` with RoPE. The
cache (transformers' own) holds per layer the keys of both paths, concatenated, and the values; where semantic keys and
values are read from a latent, that in place of the keys and the rotated keys in place of the values. Scores are
float32, as a matrix.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls the cache of a model: past_key_values, or from some 5.2x on cache.
FIELDS = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
CACHE = "cache" if "cache" in FIELDS else "past_key_values"


class DBAConfig(PretrainedConfig):
    """The model flags of train_dba.py, under their names; widths are totals over the n_head query heads."""
    model_type = "dba"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "layers", "num_attention_heads": "n_head",
                     "intermediate_size": "d_ff", "max_position_embeddings": "block"}

    def __init__(self, attn_mode="standard", d_model=512, layers=6, n_head=8, d_ff=2048, embed_dim=512, block=256,
                 attn_dim=512, sem_dim=None, geo_dim=None, kv_head=None, kv_lora_rank=None, rope_dim=None,
                 null_attn=False, tie_qk=False, learned_temp=False, one_temperature=False, rope=True,
                 rope_base=10000.0, mlp="swiglu", norm_eps=1e-5, vocab_size=257, **kwargs):
        self.attn_mode, self.d_model, self.layers, self.n_head, self.d_ff = attn_mode, d_model, layers, n_head, d_ff
        self.embed_dim, self.block, self.attn_dim, self.sem_dim, self.geo_dim = (
            embed_dim, block, attn_dim, sem_dim, geo_dim)
        self.kv_head, self.kv_lora_rank, self.rope_dim = kv_head, kv_lora_rank, rope_dim
        self.null_attn, self.tie_qk, self.learned_temp = null_attn, tie_qk, learned_temp
        self.one_temperature, self.rope, self.rope_base, self.mlp, self.norm_eps = (
            one_temperature, rope, rope_base, mlp, norm_eps)
        self.vocab_size = vocab_size
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


def split_heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)        # [B, T, n·w] -> [B, n, T, w]


def rotate(x, pos, inv_freq):
    """RoPE on halves: x [B, n, T, p] to the positions pos [B, T], in float32. inv_freq [1 or G, p/2]."""
    theta = pos[:, None, :, None] * inv_freq.repeat_interleave(x.size(1) // len(inv_freq), 0)[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * theta.cos() - b * theta.sin(), b * theta.cos() + a * theta.sin()], -1)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        H, D, self.layer, self.rope = c.n_head, c.d_model, layer, c.rope
        self.mla = c.attn_mode == "mla"
        groups = c.kv_head or H
        v = c.attn_dim or D
        sem, geo = {"standard": (0, v), "bottleneck": (0, v), "gqa": (0, v), "decoupled": (c.sem_dim, c.geo_dim),
                    "mla": (v, (c.rope_dim or 0) * H)}[c.attn_mode]
        r, p = sem // H, geo // H
        joint = c.one_temperature or self.mla
        self.compressed = bool(c.kv_lora_rank)             # semantic keys and values are read from a latent
        source = c.kv_lora_rank if self.compressed else D
        self.widths = {"sem": r, "geo": p} if sem else {"geo": p}
        self.groups = {"sem": groups, "geo": 1 if self.mla else groups}
        self.scales = {name: (r + p if joint else width) ** -0.5 for name, width in self.widths.items()}
        self.n_head, self.v_groups, self.tied = H, groups, next(iter(self.widths)) if c.tie_qk else None
        self.latent = nn.Identity()
        if self.compressed:
            norm = nn.RMSNorm(source, c.norm_eps) if self.mla else nn.Identity()
            self.latent = nn.Sequential(linear(D, source), norm)
        self.q = nn.ModuleDict({name: linear(D, H * width) for name, width in self.widths.items()})
        self.k = nn.ModuleDict({name: linear(source if name == "sem" else D, self.groups[name] * width)
                                for name, width in self.widths.items() if name != self.tied})
        self.v, self.o = linear(source, v // H * groups), linear(v, D)
        self.log_temp = nn.Parameter(torch.zeros(H)) if c.learned_temp else None
        rows = self.groups["geo"] if self.compressed else 1                     # a converted model has its own
        self.register_buffer("inv_freq", (c.rope_base ** (-torch.arange(p // 2) / (p // 2))).repeat(rows, 1))
        cached = {f"k_{name}" if sem else "k": groups * width for name, width in self.widths.items()}
        cached = {**cached, "v": v // H * groups}
        if self.compressed:
            cached = {"latent": source, "k_rope" if self.mla else "k_geo": self.groups["geo"] * p}
        self.null = nn.ParameterDict({name: torch.zeros(n) for name, n in cached.items()} if c.null_attn else {})
        self.streams = list(cached)                        # keys of the paths in their order, then the values

    def _apply(self, fn, *args, **kwargs):
        """Frequencies stay float32 where the model is cast: rounded, they turn far tokens by another angle."""
        exact = self.inv_freq
        super()._apply(fn, *args, **kwargs)
        if self.inv_freq.dtype != exact.dtype:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def key(self, name, x):
        return (self.q if name == self.tied else self.k)[name](x)

    def null_key(self, name):
        """The null token's key of a path [G, w]."""
        key = self.null[self.streams[list(self.widths).index(name)]]
        if self.compressed and name == "sem":
            key = self.key("sem", key)
        return key.float().view(self.groups[name], -1)

    def forward(self, x, pos, visible, cache):
        """x [B, T, D] at positions pos [B, T]; visible [B, 1, T, S]: which cached tokens, the new ones included, each
        query may attend to."""
        H, inv_freq = self.n_head, self.inv_freq
        temperature = 1.0 if self.log_temp is None else self.log_temp.exp()[:, None, None]
        q = {name: split_heads(self.q[name](x), H).float() * (self.scales[name] * temperature)
             for name in self.widths}
        null_score = 0.0
        if self.null:                                      # with q unrotated: the score doesn't depend on position
            for name in self.widths:
                null_k = self.null_key(name).repeat_interleave(H // self.groups[name], 0)             # [H, w]
                null_score = null_score + (q[name] * null_k[:, None]).sum(-1, keepdim=True)           # [B, H, T, 1]
        latent = self.latent(x)                            # x itself where there is none
        k = {"geo": split_heads(self.key("geo", x), self.groups["geo"])}
        if self.rope:
            q["geo"], k["geo"] = rotate(q["geo"], pos, inv_freq), rotate(k["geo"], pos, inv_freq).to(x.dtype)
        if self.compressed:
            held = latent[:, None], k["geo"]               # [B, 1, T, C], [B, G, T, p]
        else:
            if "sem" in self.widths:
                k["sem"] = split_heads(self.key("sem", x), self.groups["sem"])
            held = torch.cat([k[name] for name in self.widths], -1), split_heads(self.v(x), self.v_groups)
        if cache is not None:
            held = cache.update(*held, self.layer)
        keys, values = held
        if self.compressed:                                # every head's keys and values from the latent
            latent = keys[:, 0]
            rotated = values.expand(-1, self.groups["sem"], -1, -1)             # of mla one for all
            keys = torch.cat([split_heads(self.key("sem", latent), self.groups["sem"]), rotated], -1)
            values = split_heads(self.v(latent), self.v_groups)
        keys, values = (part.repeat_interleave(H // part.size(1), 1).float() for part in (keys, values))
        scores = torch.cat([q[name] for name in self.widths], -1) @ keys.mT     # [B, H, T, S]
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        if self.null:                                      # one more key and value, that every query may attend to
            null_v = self.v(self.null["latent"]) if self.compressed else self.null["v"]
            null_v = null_v.float().view(1, self.v_groups, 1, -1).repeat_interleave(H // self.v_groups, 1)
            scores = torch.cat([null_score, scores], -1)
            values = torch.cat([null_v.expand(len(x), -1, -1, -1), values], 2)
        y = (scores.softmax(-1) @ values).to(x.dtype)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up, self.down = linear(c.d_model, c.d_ff), linear(c.d_ff, c.d_model)
        self.gate = linear(c.d_model, c.d_ff) if c.mlp == "swiglu" else None

    def forward(self, x):
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(c.d_model, c.norm_eps), nn.RMSNorm(c.d_model, c.norm_eps)
        self.attn, self.mlp = Attention(c, layer), MLP(c)

    def forward(self, x, pos, visible, cache):
        x = x + self.attn(self.attn_norm(x), pos, visible, cache)
        return x + self.mlp(self.mlp_norm(x))


class DBAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DBAConfig
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["inv_freq"]            # where it is loaded in half precision

    def __init__(self, config):
        super().__init__(config)
        factorised = config.embed_dim != config.d_model
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.embed_up = linear(config.embed_dim, config.d_model) if factorised else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.embed_down = linear(config.d_model, config.embed_dim) if factorised else nn.Identity()
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, embed):
        self.embed = embed

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, cache=None, **kwargs):
        """input_ids [B, T] -> logits [B, T, vocab_size]; attention_mask [B, S]: 0 where there is padding; labels
        [B, T], -100 where there is none: the mean loss."""
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        before, T = cache.get_seq_length() if cache is not None else 0, input_ids.size(1)
        slots = torch.arange(before + T, device=input_ids.device)
        visible = (slots <= slots[before:, None])[None, None]                   # [1, 1, T, S]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None].bool()
            if position_ids is None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        pos = slots[None, before:] if position_ids is None else position_ids
        x = self.embed_up(self.embed(input_ids))
        for block in self.blocks:
            x = block(x, pos, visible, cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(self.embed_down(self.norm(x[:, keep])), self.embed.weight).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
