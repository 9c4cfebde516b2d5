"""`convert_dba.py mask`: its flags, and what it prints."""

import argparse
import importlib.util
from pathlib import Path

from train_dba import UserError


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="run folder, checkpoint, .gguf file, or Hugging Face folder (of the "
                   "Llama or GPT-2 family); its weights stay as they are")
    p.add_argument("--data", type=Path, required=True, help="text, or .npy of tokens, to learn from")
    p.add_argument("--out-dir", type=Path, required=True, help="folder of the gates; what it has is gone on with")
    p.add_argument("--block", type=int, choices=(16, 32, 64), default=32, help="keys in a block (%(default)s)")
    p.add_argument("--rows", type=int, default=1, help="queries that choose together, a divisor of --block "
                   "(%(default)s, as in decoding)")
    p.add_argument("--index-bits", type=float, default=2.0, help="of each channel of a key, from which its score is "
                   "estimated (%(default)s); 0: four vectors of each block instead")
    p.add_argument("--lengths", type=int, nargs="+", default=[1024], help="tokens of the windows of the "
                   "first kind, in turn")
    p.add_argument("--mass-steps", type=int, default=32, help="windows from which gates learn the model's own "
                   "attention (%(default)s)")
    p.add_argument("--updates", type=int, default=4, help="of each layer's gates by such a window (%(default)s)")
    p.add_argument("--lost", type=float, default=0.01, help="share of attention that every head's threshold then "
                   "leaves out (%(default)s)")
    p.add_argument("--logits-steps", type=int, default=16, help="windows from which gates and thresholds learn by the "
                   "KL of the next token (%(default)s)")
    p.add_argument("--logits-length", type=int, default=512, help="tokens of those (%(default)s)")
    p.add_argument("--kl", type=float, nargs="+", default=[0.001, 0.01], help="the KL in nats that is to be kept to; "
                   "the last is learned with")
    p.add_argument("--calibration", type=int, default=2, help="windows that each KL is sought on (%(default)s)")
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--eval-data", type=Path, nargs="*", default=[], help="texts to measure on")
    p.add_argument("--eval-lengths", type=int, nargs="+", default=[1024])
    p.add_argument("--windows", type=int, nargs="+", default=[4], help="windows of each text: a number for all "
                   "lengths, or one for each")
    p.add_argument("--measure", nargs="+", choices=("floor", "controls", "gates", "gradients", "costs"),
                   default=["floor", "controls", "gates"], help="what is measured there")
    p.add_argument("--budgets", type=int, nargs="+", default=[8], help="blocks that choices by rank keep")


def make_mask(args: argparse.Namespace) -> None:
    """Learn gates, or go on with those of a folder; measure them; print what came out. Raises UserError."""
    if importlib.util.find_spec("safetensors") is None:    # before hours of learning
        raise UserError("mask writes its gates by safetensors: pip install -r requirements-eval.txt")
    from evals.subject import Progress, read_data, text_table
    from surgery import learn_mask
    from surgery.calibrate import check_finite
    host, subject = learn_mask.open_host(args.model, args.device)
    ids, folder = read_data(subject, args.data).ids, args.out_dir
    plan = learn_mask.plan_of(vars(args), subject)
    texts = {path.name: read_data(subject, path).ids for path in args.eval_data}
    if len(texts) < len(args.eval_data):
        raise UserError("two --eval-data have the same name, by which results call them; rename one")
    learn_mask.check_lengths(plan, host, ids, texts, learn_mask.windows_of(vars(args)))
    check_finite(host.log_p(host.hidden(ids[None, :4 * plan.block].to(host.device))[0]))              # before all work
    with learn_mask.held(folder):
        with Progress("step", "gates") as report:
            gates = learn_mask.learn(host, ids, plan, folder, report)
        with Progress("pass", "thresholds") as report:
            facts = learn_mask.points_of_folder(host, gates, ids, plan, folder, args.calibration, report)
        print(f"{folder}: gates of {plan.steps} steps, {sum(p.numel() for p in gates.parameters()):,} parameters; "
              f"to choose, {gates.bits_read:.3g} bits of each channel of every key are read")
        for point in facts["points"]:
            print(f"KL {point['target']:g}: {100 * point['kept']:.1f} % of tokens read, KL {point['kl']:.2g} on the "
                  f"training text, {len(point['drops'])} of {gates.thresholds.numel()} heads drop old keys")
        if texts:
            with Progress("pass", "measuring") as report:
                result = learn_mask.measure_all(host, gates, facts["points"], texts, folder, vars(args), report)
            print(text_table(learn_mask.table(result["summary"])))
            print(f"written to {learn_mask.write(host, subject, vars(args), plan, facts, result)}")
