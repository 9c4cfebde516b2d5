"""Tiny pretrained Llamas for the tests, as transformers and llama.cpp would save them."""

import json

import torch

import convert_dba

TEXT = "Water boils at 100 °C — naïve 日本語 <b> test.\n\n  Two lines, 🦙 and\ttabs. "
VOCAB = 300                                                # embedding rows; 256 bytes, some pairs, bos and eos


def byte_level():
    """A byte-level BPE tokenizer with 290 tokens or less."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<bos>", "<eos>"], show_progress=False)
    bpe.train_from_iterator([TEXT * 3], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


def sentencepiece():
    """A tokenizer as Llama 2 has it: pieces with ▁ for a space, bytes where no piece fits, <bos> before a text."""
    import transformers
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
    import transformers
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
