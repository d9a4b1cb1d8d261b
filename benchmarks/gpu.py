"""Run all tests and measurements for a machine with a GPU: `python -m benchmarks.gpu`, or `make gpu`.

It runs these stages. If one fails, the others still run. Every section is printed as soon as it is measured, and all of
them are written as one Markdown file. A stage has a share of --minutes, and what the stages before it left of theirs.
When that is over, no further section of it is begun, and the page says so:

* tests: `pytest -m gpu`, which also records the device, so that `auto` uses the kernels on it from then on;
* kernels: `benchmarks.gpu_kernels`;
* step: `benchmarks.gpu_step`;
* training: steps of ViT-S and GPT-2 small, bare, monitored, switching from LayerNorm, and switched;
* inference: LayerNorm, folded and the norm-free floor, eager, compiled and as CUDA graphs; time and memory;
* memcheck: the tests of the kernels under compute-sanitizer, if it is installed.

Args: --stages ..., --out FILE, --minutes N (default 10), --rounds N, --batches N ... (inference), --smoke (tiny, and on
a CPU).
"""

import argparse
import contextlib
import copy
import io
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_kernels, gpu_step, inference
from benchmarks.monitor_overhead import WIDTHS, ViT
from benchmarks.rounds import in_turn
from stabnorm import StabilityMonitor, convert_norms
from stabnorm.nn import PRepBN
from stabnorm.ops import use_kernels

STEPS = 4  # of a variant in a round
WARM_UP = 2
KERNEL_TESTS = ("rows", "moments", "observed", "blended", "standard")
Options = argparse.Namespace


def _run(command: Sequence[str], until: float) -> str:
    """Run a command, print its lines as they come, and return the last ones; end it at a time."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        # With the processes that it has started, which would keep the pipe open.
        ending = threading.Timer(max(0.0, until - time.monotonic()), os.killpg, (process.pid, signal.SIGKILL))
        ending.start()
        last: deque[str] = deque(maxlen=12)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
    ending.cancel()
    ended = process.returncode < 0 and time.monotonic() >= until
    code = f"`{' '.join(command[:4])} ...` did not end in time" if ended else f"exit code {process.returncode}"
    return f"{code}\n\n```\n{''.join(last).rstrip()}\n```"


def tests(options: Options) -> Iterator[str]:
    """Run the tests that need a GPU."""
    if options.smoke:
        yield "skipped"
    else:
        yield _run([sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "tests"], options.until)


def memcheck(options: Options) -> Iterator[str]:
    """Run the kernels under compute-sanitizer, without torch's memory pool, which would hide the ends of tensors."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.smoke or sanitizer is None:
        yield "skipped: no compute-sanitizer"
        return
    files = [f"tests/ops/test_triton_{name}.py" for name in KERNEL_TESTS]
    check = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    unpooled = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    yield _run([*unpooled, *check, sys.executable, "-m", "pytest", "-x", "--tb=short", *files], options.until)


def kernel_table(options: Options) -> Iterator[str]:
    """See `benchmarks.gpu_kernels`."""
    for rows, channels in gpu_kernels.SIZES if torch.cuda.is_available() else gpu_kernels.SMALL_SIZES:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            gpu_kernels.main(["--rounds", str(options.rounds), "--shapes", f"{rows}x{channels}"])
        yield printed.getvalue()


def step_table(options: Options) -> Iterator[str]:
    """See `benchmarks.gpu_step`."""
    gpu = torch.cuda.is_available()
    for size in gpu_step.SIZES if gpu else gpu_step.SMALL_SIZES:
        yield gpu_step.table([size], options.rounds, torch.device("cuda" if gpu else "cpu"))


# --- training ---


def _models(smoke: bool) -> dict[str, tuple[Callable[[], nn.Module], Callable[[torch.device], Tensor]]]:
    if smoke:
        return {"tiny": (lambda: ViT(24, 2), lambda device: torch.randn(2, 3, 224, 224, device=device))}
    return {
        "ViT-S, batch 128": (
            lambda: ViT(*WIDTHS["vit-small"]), lambda device: torch.randn(128, 3, 224, 224, device=device)
        ),
        "GPT-2 small, 16 x 1024": (
            inference.GPT, lambda device: torch.randint(50257, (16, 1024), device=device)
        ),
    }  # fmt: skip


class Training:
    """A model, its optimizer, and perhaps a monitor; `run` takes some steps."""

    def __init__(self, model: nn.Module, setting: str, monitored: bool, example: Tensor, fused: bool = False) -> None:
        self.model, self.setting, self.example = model.train(), setting, example
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.seconds: list[float] = []
        with use_kernels(setting):
            self.monitor = StabilityMonitor(model, flush_every=50, fused=fused) if monitored else None
            if self.monitor is not None:
                self.monitor.attach()

    def run(self) -> None:
        """Take steps in bfloat16 with autocast."""
        device = self.example.device
        with use_kernels(self.setting):
            for _ in range(STEPS):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = self.model(self.example).float().logsumexp(-1).mean()
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.monitor is not None:
                    self.monitor.step(loss=loss)


def _switched(model: nn.Module, lam: float) -> nn.Module:
    convert_norms(model, to="prepbn")
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.fill_(lam)
            module.leave_out_norm = lam == 0
    return model


def training_table(options: Options) -> Iterator[str]:
    """Measure interleaved: in each round, every variant takes some steps."""
    device = torch.device("cpu" if options.smoke else "cuda")
    for name, (build, make_example) in _models(options.smoke).items():
        torch.manual_seed(0)
        model, example = build().to(device), make_example(device)
        variants: dict[str, Training] = {"LayerNorm": Training(copy.deepcopy(model), "auto", False, example)}
        for label, setting, monitored, lam in (
            ("LayerNorm, monitored: kernels", "triton", True, None),
            ("LayerNorm, monitored: kernels, fused", "triton", True, None),
            ("LayerNorm, monitored: torch", "reference", True, None),
            ("switching, lam 0.5: kernels", "triton", False, 0.5),
            ("switching, lam 0.5: torch", "reference", False, 0.5),
            ("switched: kernels", "triton", False, 0.0),
        ):
            if setting == "triton" and options.smoke:
                setting = "auto"
            copied = copy.deepcopy(model)
            copied = copied if lam is None else _switched(copied, lam)
            variants[label] = Training(copied, setting, monitored, example, fused="fused" in label)
        memory = _rounds(variants, options.rounds, device)
        base = variants["LayerNorm"].seconds
        lines = [f"**{name}**, bfloat16 by autocast", "", "| | ms per step | x LayerNorm (quartiles) | peak MB |"]
        lines.append("|---|---:|---:|---:|")
        for label, variant in variants.items():
            ratios = [a / b for a, b in zip(variant.seconds, base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ms = 1e3 * statistics.median(variant.seconds) / STEPS
            lines.append(f"| {label} | {ms:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {memory[label]} |")
        yield "\n".join(lines)


def _rounds(variants: Mapping[str, Training], rounds: int, device: torch.device) -> dict[str, str]:
    names, memory = list(variants), dict.fromkeys(variants, "")

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for number in range(WARM_UP + rounds):
        for name in in_turn(names, number):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = now()
            variants[name].run()
            took = now() - start
            if number >= WARM_UP:
                variants[name].seconds.append(took)
            if device.type == "cuda":
                memory[name] = f"{(torch.cuda.max_memory_allocated() - held) / 2**20:.0f}"
    return memory


# --- inference ---


def graphed(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the forward of the model, captured once and replayed."""
    fixed = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            model(fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out: Tensor = model(fixed)

    def replay(x: Tensor) -> Tensor:
        fixed.copy_(x)
        graph.replay()
        return out

    return replay


def _memory(call: Callable[[Tensor], Tensor], example: Tensor) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        call(example)
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def inference_table(options: Options) -> Iterator[str]:
    """Measure LayerNorm, switched, folded and the floor."""
    device = torch.device("cpu" if options.smoke else "cuda")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    models = {"tiny": (lambda: ViT(24, 2), inference.MODELS["vit-tiny"][1])} if options.smoke else inference.MODELS
    for name, (build, example) in models.items():
        torch.manual_seed(0)
        four = inference.variants(build(), example(2, torch.device("cpu"), torch.float32))
        cast = {label: copy.deepcopy(model).to(device, dtype).eval() for label, model in four.items()}
        for batch in [1] if options.smoke else options.batches:
            inputs = [example(batch, device, dtype) for _ in range(3)]
            compiled = ("compiled",) if batch == options.batches[0] else ()  # a minute for each batch and model
            for mode in ("eager",) if options.smoke else ("eager", "CUDA graph", *compiled):
                torch.compiler.reset()
                ready: dict[str, Callable[[Tensor], Tensor]] = dict(cast)
                if mode == "compiled":
                    ready = {label: torch.compile(m, fullgraph=True, dynamic=False) for label, m in cast.items()}
                elif mode == "CUDA graph":
                    ready = {label: graphed(m, inputs[0]) for label, m in cast.items()}
                times = inference.time_table(ready, inputs, options.rounds)
                used = ""
                if mode == "eager" and device.type == "cuda":
                    used = ", ".join(f"{label} {_memory(m, inputs[0]):.1f}" for label, m in ready.items())
                    used = f"\n\nPeak MB of activations: {used}"
                yield f"**{name}**, {str(dtype)[6:]}, batch {batch}, {mode}\n\n{times}{used}"


STAGES: dict[str, Callable[[Options], Iterator[str]]] = {
    "tests": tests,
    "kernels": kernel_table,
    "step": step_table,
    "training": training_table,
    "inference": inference_table,
    "memcheck": memcheck,
}
# Of the minutes; together less than all, because a section that has begun is measured to its end.
SHARES = {"tests": 0.3, "kernels": 0.15, "step": 0.03, "training": 0.2, "inference": 0.18, "memcheck": 0.1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; return the number of failed stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was run. --smoke runs a tiny part on the CPU", file=sys.stderr)
        return 1
    name = "CPU, smoke run: figures mean nothing" if options.smoke else torch.cuda.get_device_name()
    page, failed = [f"# {name}, torch {torch.__version__}"], 0
    options.until = time.monotonic()

    def add(text: str) -> None:
        page.append(text)
        print(f"\n{text}", flush=True)
        options.out.write_text("\n\n".join(page) + "\n", encoding="utf-8")

    for stage in options.stages:
        start = time.monotonic()
        options.until += 60 * options.minutes * SHARES[stage]  # what is left of a share goes to the next stage
        add(f"## {stage}")
        try:
            for section in STAGES[stage](options):
                add(section.strip())
                failed += section.startswith(("exit code", "`")) and not section.startswith("exit code 0")
                if time.monotonic() > options.until:
                    add("The time is over: what would follow here was left out.")
                    break
        except Exception:  # the next stage may well run
            add(f"failed:\n\n```\n{traceback.format_exc()[-2000:]}\n```")
            failed += 1
        add(f"({stage} took {time.monotonic() - start:.0f} s.)")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
