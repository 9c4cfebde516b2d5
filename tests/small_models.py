"""Random models of every kind that goes out or gets a mask: settings by name, and a checkpoint of one."""

import torch

from train_dba import GPT, make_config, make_tokenizer, save_checkpoint

D = dict(data="-", d_model=48, layers=2, n_head=4, d_ff=64, block=64)
LLAMAS = {
    "standard": dict(attn_mode="standard"),
    "gqa": dict(attn_mode="gqa", kv_head=2, attn_dim=32),
    "bottleneck": dict(attn_mode="bottleneck", attn_dim=24, rope_base=500.0, norm_eps=0.1),
}
OTHERS = {
    "decoupled": dict(attn_mode="decoupled", sem_dim=12, geo_dim=24, attn_dim=40),
    "decoupled, all": dict(attn_mode="decoupled", sem_dim=12, geo_dim=24, null_attn=True, tie_qk=True,
                           learned_temp=True),
    "groups, one temperature": dict(attn_mode="decoupled", sem_dim=8, geo_dim=16, kv_head=2, one_temperature=True,
                                    null_attn=True),
    "latent": dict(attn_mode="decoupled", sem_dim=12, geo_dim=24, kv_head=2, kv_lora_rank=20),
    "latent, null": dict(attn_mode="decoupled", sem_dim=12, geo_dim=24, attn_dim=20, kv_lora_rank=9, null_attn=True,
                         learned_temp=True, one_temperature=True),
    "mla": dict(attn_mode="mla", kv_lora_rank=20, rope_dim=6, attn_dim=32),
    "mla, null": dict(attn_mode="mla", kv_lora_rank=20, rope_dim=6, null_attn=True, learned_temp=True),
    "heads don't divide the stream": dict(attn_mode="bottleneck", n_head=5, attn_dim=40),
    "standard, tied": dict(attn_mode="standard", tie_qk=True),
    "gqa, null": dict(attn_mode="gqa", kv_head=2, null_attn=True, mlp="gelu"),
    "no RoPE": dict(attn_mode="standard", rope=False, embed_dim=16),
}


def saved(path, settings, tokenizer=None, seed=0):
    """A checkpoint of a random model whose scores are of order 1, and that model."""
    tokenizer = tokenizer or make_tokenizer("byte", None)
    cfg = make_config(**dict(D, **settings))
    torch.manual_seed(seed)
    model = GPT(cfg, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5) + (1.0 if "norm" in name else 0.0))
    path.mkdir()
    save_checkpoint(path / "best.pt", cfg, tokenizer, model, step=1)
    return model
