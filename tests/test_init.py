"""--init-from: training that begins with the weights of a run or of a Llama; and Llamas that the trainer samples."""

import json
import re
import shutil
import weakref

import numpy as np
import pytest
import torch

import train_dba as dba
from helpers import TRAIN, assert_done, assert_error, call, cli, make_text, snapshot, write_tokens
from train_dba import KVCache, load_checkpoint, read_model

STILL = "--lr 1e-12 --weight-decay 0"                      # a step that changes nothing worth speaking of
DATA = "--data text.txt --batch-size 4 --dtype float32 --device cpu --warmup-steps 0 --log-every 1"
SHAPES = {
    "decoupled": "--attn-mode decoupled --sem-dim 8 --geo-dim 8 --attn-dim 12 --null-attn --tie-qk --learned-temp",
    "gqa": "--attn-mode gqa --kv-head 1 --embed-dim 16 --mlp gelu --rope-base 500 --norm-eps 1e-3",
    "mla": "--attn-mode mla --kv-lora-rank 12 --rope-dim 4",
    "no RoPE": "--attn-mode bottleneck --attn-dim 12 --no-rope",
}


def read(folder, name="train.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def val_loss(folder):
    return [line["val_loss"] for line in read(folder) if line["type"] == "eval"][-1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with text.txt and a run of 12 steps of each shape."""
    folder = tmp_path_factory.mktemp("sources")
    make_text(folder)
    for name, shape in SHAPES.items():
        assert_done(call(f"{TRAIN} {shape} --lr 1e-2 --steps 12 --out-dir '{name}'", folder))
    return folder


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("what", ("", "/best.pt"), ids=("run", "checkpoint"))
def test_begins_with_the_weights_of_a_run(sources, tmp_path, name, what):
    """A step of next to no size leaves the source's loss and weights; shape and tokenizer are the source's."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    result = call(f"{DATA} {STILL} --seed 7 --steps 1 --init-from '{name}{what}' --out-dir new", tmp_path)
    assert_done(result)
    assert f"weights of {name}{what}; the optimiser begins afresh" in result.stdout
    assert val_loss(tmp_path / "new") == pytest.approx(val_loss(tmp_path / name), abs=1e-6)
    old, new = (load_checkpoint(tmp_path / run) for run in (name, "new"))
    for key, tensor in old["model"].items():
        torch.testing.assert_close(new["model"][key], tensor, rtol=0, atol=1e-6)
    for field in ("attn_mode", "d_model", "sem_dim", "geo_dim", "attn_dim", "kv_head", "mlp", "rope_base", "block"):
        assert getattr(new["config"], field) == getattr(old["config"], field)
    assert new["step"] == 1 and new["tokenizer"].name == "byte"
    state = torch.load(tmp_path / "new/last.pt", weights_only=True)["optimizer"]["state"]
    assert {one["step"].item() for one in state.values()} == {1.0}
    assert read(tmp_path / "new")[0]["config"]["init_from"] == f"{name}{what}"


def test_the_source_is_not_held_while_it_is_trained_on(sources, tmp_path, monkeypatch):
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    read, sample, held = dba.read_model, dba.sample_batch, []

    def reading(*args):
        model, *others = read(*args)
        held.append(weakref.ref(model))
        return model, *others

    def sampling(*args):
        assert held[0]() is None
        return sample(*args)
    monkeypatch.setattr(dba, "read_model", reading)
    monkeypatch.setattr(dba, "sample_batch", sampling)
    assert_done(call(f"{DATA} --steps 1 --init-from decoupled --out-dir new", tmp_path))
    assert len(held) == 1


@pytest.mark.parametrize("source", ("decoupled", "./decoupled/best.pt"))
def test_the_source_is_not_replaced(sources, tmp_path, source):
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    before = snapshot(tmp_path)
    for flags in ("", "--overwrite"):
        result = call(f"{DATA} --steps 1 --init-from {source} --out-dir decoupled {flags}", tmp_path)
        assert_error(result, "--out-dir decoupled is where", "is read from")
    assert snapshot(tmp_path) == before


def test_trains_on_and_resumes(sources, tmp_path):
    """Gone on with after its first step, it is the run that was never stopped; the context may be another."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    command = f"{DATA} --init-from decoupled --block 8 --lr 1e-2 --save-every 1"
    assert_done(call(f"{command} --steps 3 --out-dir whole", tmp_path))
    assert_done(call(f"{command} --steps 1 --out-dir parts", tmp_path))
    resumed = call(f"{command} --steps 3 --out-dir parts --init-from ./decoupled/", tmp_path)
    assert_done(resumed)
    assert "afresh" not in resumed.stdout                  # its optimiser goes on, from its own weights
    whole, parts = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "parts"))
    assert all(torch.equal(whole["model"][key], tensor) for key, tensor in parts["model"].items())
    assert whole["config"].block == 8
    first = load_checkpoint(tmp_path / "decoupled")["model"]
    assert any(not torch.equal(first[key], tensor) for key, tensor in whole["model"].items())


def test_a_large_vocabulary_ends_texts_by_its_own_id(tmp_path):
    """Of Llama 3, whose id is beyond 16 bits."""
    class Tokenizer(dba.ByteTokenizer):
        eot, vocab_size = 128_001, 128_256

        def encode(self, text):
            return super().encode(text).astype("uint32")

    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    paths = [tmp_path / "train.txt", tmp_path / "val.txt"]
    data = dba.load_texts(dba.make_config(data="-"), paths, Tokenizer())
    assert data.train.tolist() == [*b"train text", 128_001] and data.val[-1] == 128_001 and data.val_bytes == 8


@pytest.mark.parametrize("flags, words", [
    ("--d-model 64", ["--d-model"]), ("--attn-mode gqa --kv-head 1", ["--attn-mode", "--kv-head"]),
    ("--size tiny", ["--size"]), ("--exp paper_gqa", ["--exp"]), ("--no-tie-qk", ["--tie-qk"]),
    ("--tokenizer gpt2", ["--tokenizer gpt2", "byte"]), ("--data ids.npy", ["ids.npy", "word", "byte"]),
    ("--init-from nowhere", ["nowhere"]), ("--init-from text.txt", ["text.txt", "damaged"]),
])
def test_what_contradicts_it_is_refused(sources, tmp_path, flags, words):
    make_text(tmp_path)
    shutil.copytree(sources / "decoupled", tmp_path / "decoupled")
    dba.write_text(tmp_path / "ids.vocab.json", json.dumps(["<eos>", "<unk>", "a"]))
    write_tokens(tmp_path, "ids", np.arange(2000) % 3, tokenizer="word", vocab_size=3, vocab="ids.vocab.json")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = call(f"{DATA} --steps 1 --init-from decoupled --out-dir new {flags}", tmp_path)
    assert_error(result, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_sampling_does_not_read_it(sources):
    result = call("--mode sample --ckpt decoupled --prompt ab --init-from gqa", sources)
    assert_error(result, "--init-from", "--mode sample")


# --- Llamas

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with text.txt, a tiny Llama as a Hugging Face folder, and the same as a .gguf file."""
    for needed in ("accelerate", "gguf", "safetensors", "transformers"):
        pytest.importorskip(needed, reason="requirements-eval.txt")
    from llamas import byte_level, save_llama, write_gguf
    folder = tmp_path_factory.mktemp("llama")
    make_text(folder)
    write_gguf(folder / "llama.gguf", save_llama(folder / "llama"), byte_level())
    return folder


@pytest.mark.parametrize("source", ("llama", "llama.gguf"))
def test_begins_with_the_weights_of_a_llama(llama, tmp_path, source):
    """Trained for a step of no size it is the same model: in the checkpoint, sampled from, and exported."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    assert_done(call(f"{DATA} {STILL} --steps 1 --block 32 --init-from {source} --out-dir run", tmp_path))
    (old, before, *_), (new, after, *_) = (read_model(tmp_path / path) for path in (source, "run"))
    ids = torch.from_numpy(before.encode("Water boils — 日本 <b>\n").astype(np.int64))[None]
    torch.testing.assert_close(new(ids), old(ids), rtol=0, atol=1e-5)
    assert after.encode("Water boils").tolist() == before.encode("Water boils").tolist() and after.eot == before.eot
    assert [after.decode([i]) for i in range(300)] == [before.decode([i]) for i in range(300)]
    sample = "--mode sample --prompt Water --temperature 0 --max-new-tokens 9 --device cpu --dtype float32 --ckpt"
    said = [call(f"{sample} {path}", tmp_path) for path in (source, "run")]
    for result in said:
        assert_done(result)
    assert said[0].stdout == said[1].stdout and len(said[0].stdout) > len("Water\n")


def test_the_cache_that_was_found_for_a_llama(llama, tmp_path):
    """Its policy lies in its folder, where eval_dba.py writes it; of a file beside that."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    found = dict(formats=dict(k="q8_0", v="q4_0"), rotate=False, residual=0)
    for cwd, path, folder in ((tmp_path, "llama", "llama"), (tmp_path / "llama", ".", "llama"),
                              (tmp_path, "llama.gguf", ".")):
        sha256 = dba.file_hash(cwd / path)
        (tmp_path / folder / dba.POLICY_FILE).write_text(json.dumps(dict(found, checkpoint_sha256=sha256)))
        result = call(f"--mode sample --ckpt {path} --prompt a --max-new-tokens 2 --device cpu --kv-cache auto", cwd)
        assert_done(result)
        assert "KV cache (k q8_0, v q4_0)" in result.stderr


def test_a_llama_that_was_trained_on_is_exported_as_one(llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import convert_dba
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    assert_done(call(f"{DATA} --lr 1e-2 --steps 2 --block 32 --init-from llama.gguf --out-dir run", tmp_path))
    for source in ("run", "llama.gguf", "llama"):
        out = tmp_path / f"out_{source}"
        assert convert_dba.main(["export", "--ckpt", str(tmp_path / source), "--out-dir", str(out)]) == 0
        (ours, tokenizer, *_), theirs = read_model(tmp_path / source), AutoModelForCausalLM.from_pretrained(out).eval()
        assert type(theirs).__name__ == "LlamaForCausalLM"
        text = "Water boils at 100 °C — naïve 日本語 <b>\n\n  x"
        ids = AutoTokenizer.from_pretrained(out).encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text).tolist()
        with torch.no_grad():
            torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])), rtol=0, atol=1e-4)
        assert theirs.config.eos_token_id == tokenizer.eot and theirs.config.bos_token_id == tokenizer.bos


def test_a_process_of_its_own_loads_a_llama(llama):
    """train_dba.py as a script and as what convert_dba.py imports is one module: errors of a Llama's are its own."""
    result = cli("--mode sample --ckpt llama --prompt Water --max-new-tokens 3 --device cpu", llama)
    assert_done(result)
    assert "a Llama" in result.stderr and re.match("Water.", result.stdout)
    (llama / "broken.gguf").write_bytes((llama / "llama.gguf").read_bytes()[:3000])
    assert_error(cli("--mode sample --ckpt broken.gguf --prompt Water", llama), "broken.gguf")


def test_prompts_of_a_llama_begin_as_its_tokenizer_begins_texts(tmp_path):
    pytest.importorskip("transformers", reason="requirements-eval.txt")
    from llamas import save_llama, sentencepiece
    save_llama(tmp_path / "llama", tokenizer=sentencepiece, vocab_size=300)
    model, tokenizer, *_ = read_model(tmp_path / "llama")
    cfg = dba.Config(prompt="at")
    assert tokenizer.prefix == [1] and list(dba.prompts(cfg, tokenizer)) == [[1, *tokenizer.encode("at").tolist()]]
    cache = KVCache(model.cfg, 1, 4, "fp32")
    assert len(list(dba.generate(model, torch.tensor([[1, 5]]), 3, cache))) == 3
