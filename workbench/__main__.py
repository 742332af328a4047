"""The command line. Each command is a few lines around the module that does the work."""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from workbench.arguments import BENCHES, SAMPLING, parser
from workbench.errors import RequestError, WorkbenchError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where the doctor found something broken, or 2 where what was asked cannot be done."""
    words = parser()
    options, extra = words.parse_known_args(arguments)
    opens_lab = options.command == "lab" or options.command == "replay" and not options.text
    if extra and not opens_lab:
        words.error(f"unrecognised arguments: {' '.join(extra)}")
    options.extra = extra
    try:
        return COMMANDS[options.command](options)
    except WorkbenchError as error:
        print(f"workbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


BUDGET = ("vram", "ram", "context")


def _given(options: argparse.Namespace, *names: str) -> dict:
    """What was said, so that what was not has the default of the function that is called."""
    return {name: getattr(options, name) for name in names if name in options}


def _load(options: argparse.Namespace):
    from workbench.workbench import load

    limits = _given(options, "recipe", *BUDGET)
    return load(options.model, device=options.device, dtype=options.dtype, cache=options.cache, **limits)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _lab(options: argparse.Namespace) -> int:
    from workbench.lab import notebooks, serve

    return serve(notebooks(options.folder), options.extra)


def _chat(options: argparse.Namespace) -> int:
    from workbench.sampling import Sampling
    from workbench.terminal import Terminal, once

    sampling = Sampling(**_given(options, *SAMPLING))
    bench = _load(options)
    if options.prompt is None:
        Terminal(bench, sampling, options.system, write=_write).run()
        return 0
    answer = once(bench, options.prompt, sampling, options.system, (lambda text: None) if options.json else _write)
    print(json.dumps(answer, ensure_ascii=False) if options.json else "")
    return 0


def _trace(options: argparse.Namespace) -> int:
    from workbench.recording import Progress, check_target, read_edits, read_prompts, record
    from workbench.sampling import Sampling

    sampling, edits = Sampling(**_given(options, *SAMPLING)), read_edits(options.edit)
    asked = read_prompts(options.prompts, options.chat, options.label)
    check_target(options.out, options.prompts, options.force)
    progress = Progress(len(asked), sys.stderr.write, sys.stderr.isatty())
    summary = record(
        _load(options), options.prompts, asked, options.out, sampling,
        edits=edits, scores=options.scores, slots=options.slots, progress=progress,
    )  # fmt: skip
    print(json.dumps(summary.to_dict()) if options.json else summary)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from workbench.lab import serve
    from workbench.replaying import as_text, open_traces, write_notebook

    traces = open_traces(options.traces)
    if options.text:
        print(as_text(traces, options.traces))
        return 0
    notebook = write_notebook(options.folder, options.traces, traces)
    return serve(notebook.parent, options.extra, notebook.name)


def _doctor(options: argparse.Namespace) -> int:
    from workbench.doctor import FAIL, examine

    if options.measure:
        from workbench.bandwidth import measure

        measure(options.folder, progress=_note).save()
    report = examine()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return int(report.state == FAIL)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _plan(options: argparse.Namespace) -> int:
    from workbench.plan import Plan

    plan = Plan.of(options.what, **_given(options, "recipe", "device", "dtype", "cache", "batch", *BUDGET))
    print(json.dumps(plan.to_dict(), indent=2) if options.json else plan)
    return 0


def _calibrated(options: argparse.Namespace, moments: Path):
    from workbench.calibration import Calibration, texts_of, write
    from workbench.rounding import compensated
    from workbench.workbench import load

    bench = load(options.source)
    write(bench.model, texts_of(options.calibrate, bench.tokenizer), moments)
    return compensated(Calibration.open(moments))


def _pack(options: argparse.Namespace) -> int:
    from workbench.packing import pack, verify
    from workbench.progress import Bar
    from workbench.workbench import place

    bar = Bar(sys.stderr.write, sys.stderr.isatty())
    if options.verify:
        verify(place(options.source), bar)
        print(json.dumps({"verified": str(options.source)}) if options.json else f"{options.source}: all is as written")
        return 0
    if options.out is None:
        raise RequestError("say where the packed checkpoint goes: workbench pack SOURCE OUT.")
    source, how = place(options.source), {"progress": bar, "force": options.force}
    with ExitStack() as until:
        if options.calibrate is not None:
            # the moments are read while it packs, and may be larger than the result: on the same disk
            parent = options.out.absolute().parent
            parent.mkdir(parents=True, exist_ok=True)
            folder = until.enter_context(tempfile.TemporaryDirectory(prefix=".moments-", dir=parent))
            how["round"] = _calibrated(options, Path(folder) / "moments.safetensors")
        made = pack(source, options.out, options.recipe, **how)
    said = {"out": str(options.out), "recipe": made.recipe.name, "bytes": made.nbytes, "checksum": made.checksum}
    print(json.dumps(said) if options.json else f"{options.out}: {made.nbytes / 1e9:,.2f} GB, checksum {made.checksum}")
    return 0


def _synth(options: argparse.Namespace) -> int:
    from workbench.synth import Synth, disk_bytes

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done / 1e9:,.2f} of {total / 1e9:,.2f} GB\x1b[K", end="", file=sys.stderr, flush=True)

    synth = Synth.named(options.what, options.recipe, options.seed, options.shared)
    made = synth.write(options.out, progress)
    taken = disk_bytes(options.out)
    said = {"out": str(options.out), "bytes": made.nbytes, "on_disk": taken, "checksum": made.checksum}
    text = f"{options.out}: random weights, {made.nbytes / 1e9:,.2f} GB, {taken / 1e9:,.2f} GB on disk"
    print(json.dumps(said) if options.json else text)
    return 0


def _train(options: argparse.Namespace) -> int:
    from workbench.train.loop import Progress, Recipe
    from workbench.train.pocket import train_pocket

    recipe = Recipe(**_given(options, "steps", "rate"))

    def report(progress: Progress) -> None:
        if (progress.step + 1) % 25 == 0 or progress.step + 1 == recipe.steps:
            print(
                f"step {progress.step + 1} of {recipe.steps}: {progress.loss:.3f} nats, balance {progress.expert:.2f} "
                f"{progress.device:.2f} {progress.communication:.2f}, {progress.tokens:,} tokens, "
                f"{progress.seconds / 60:.1f} min",
                flush=True,
            )

    train_pocket(options.out, recipe, options.seed, options.start, report)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from workbench.evals.card import card
    from workbench.evals.exam import examine

    bench = _load(options)
    result = examine(bench)
    if options.card:
        stages = json.loads((bench.path / "training.json").read_text(encoding="utf-8"))
        (bench.path / "README.md").write_text(card(bench.config, stages, result), encoding="utf-8")
        (bench.path / "exam.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result.to_dict(), ensure_ascii=False, indent=2) if options.json else result)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from importlib import import_module

    measure = import_module(f"workbench.benchmarks.{options.what}").measure
    told = _given(options, *dict.fromkeys(name for names in BENCHES.values() for name in names))
    wrong = [f"--{name}" for name in told if name not in BENCHES[options.what]]
    if wrong:
        raise RequestError(f"{', '.join(wrong)} is not of `workbench bench {options.what}`.")
    if options.what in ("cache", "offload", "weights"):
        told["progress"] = lambda stage: _note(f"{stage} ...")
    result = measure(options.checkpoint, dtype=options.dtype, threads=options.threads, **told)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    if options.save:
        print(f"saved in {result.save()}", file=sys.stderr)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from workbench.claims import as_text, ledger

    found = ledger()
    print(
        json.dumps([one.to_dict() for one in found], ensure_ascii=False, indent=2) if options.json else as_text(found)
    )
    return 0


COMMANDS = {
    "lab": _lab, "chat": _chat, "trace": _trace, "replay": _replay, "doctor": _doctor, "plan": _plan, "pack": _pack,
    "synth": _synth, "train": _train, "eval": _eval, "bench": _bench, "claims": _claims,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
