"""What the benchmarks share: --out, the environment beside the figures, and calls that are timed in turn."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_dba  # noqa: E402


def parser_of(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser


def write(out: Path | None, device: torch.device, **result) -> None:
    """The result as JSON, with the versions, device and commit that it was measured on."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(env=train_dba.provenance(device), **result), indent=1) + "\n"
    train_dba.write_text(out, text)


def seconds_of(call: Callable, device: torch.device, least: float = 0.0) -> float:
    """Seconds of one call, over as many as take `least` seconds."""
    train_dba.synchronize(device)
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < least:
        call()
        calls += 1
        train_dba.synchronize(device)
    return (time.perf_counter() - started) / calls


def medians(calls: dict[str, Callable], rounds: int, device: torch.device, least: float = 0.0,
            warm_up: int = 2) -> tuple[dict, dict]:
    """({name: median seconds}, {name: all seconds}) of calls that take turns, so that a change of the machine's speed
    meets all of them."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device, least))
    return {name: statistics.median(each) for name, each in seconds.items()}, seconds
