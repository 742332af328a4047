"""The command line. Each command is a few lines around the module that does the work."""

import argparse
import json
import os
import sys
from pathlib import Path

from workbench import __version__
from workbench.errors import RequestError, WorkbenchError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where the doctor found something broken, or 2 where what was asked cannot be done."""
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    opens_lab = options.command == "lab" or options.command == "replay" and not options.text
    if extra and not opens_lab:
        parser.error(f"unrecognised arguments: {' '.join(extra)}")
    options.extra = extra
    try:
        return options.run(options)
    except WorkbenchError as error:
        print(f"workbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="Talk to a DeepSeek-V2 model and see inside it.")
    parser.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab; further arguments go to JupyterLab")
    lab.add_argument("--folder", type=Path, default=Path("workbench-notebooks"), help="where to copy them if need be")
    lab.set_defaults(run=_lab)

    chat = commands.add_parser("chat", help="talk in the terminal")
    _model(chat)
    chat.add_argument("--prompt", help="ask this, print the answer and end")
    chat.add_argument("--system", default="", help="what the model is told first")
    _sampling(chat)
    chat.add_argument("--json", action="store_true", help="with --prompt: text, tokens and timings as JSON")
    chat.set_defaults(run=_chat)

    trace = commands.add_parser("trace", help="record the answers to a file of prompts as one trace")
    trace.add_argument("prompts", type=Path, help='one a line; or .jsonl of {"prompt"} or {"messages"}, and "label"')
    trace.add_argument("--out", type=Path, required=True, help="where the trace goes, a parquet file")
    _model(trace)
    _sampling(trace)
    how = trace.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", default=True, help="a prompt is a user's message (the default)")
    how.add_argument(
        "--raw", action="store_false", dest="chat", help="a prompt is a text, to be continued as it stands"
    )
    trace.add_argument("--label", help="what the prompts are, such as a language; goes into the trace")
    trace.add_argument("--edit", action="append", default=[], metavar="JSON", help="repeatable; see workbench/edits.py")
    trace.add_argument("--scores", action="store_true", help="also every router probability")
    trace.add_argument("--slots", type=int, default=8, help="prompts answered at the same time")
    trace.add_argument("--force", action="store_true", help="replace --out")
    trace.add_argument("--json", action="store_true")
    trace.set_defaults(run=_trace)

    replay = commands.add_parser(
        "replay", help="open a saved trace, or two side by side; further arguments go to JupyterLab"
    )
    replay.add_argument("traces", type=Path, nargs="+", metavar="FILE", help="saved by `workbench trace` or trace.save")
    replay.add_argument("--folder", type=Path, default=Path("workbench-replays"), help="where the notebook goes")
    replay.add_argument("--text", action="store_true", help="only print what is in it")
    replay.set_defaults(run=_replay)

    doctor = commands.add_parser("doctor", help="what this machine has, what is missing, what will run fast")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    train = commands.add_parser("train", help="train the model that ships with the package")
    train.add_argument("what", choices=["pocket"])
    train.add_argument("--out", type=Path, default=Path("runs/pocket"), help="where the checkpoint goes")
    train.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="of 2,048 tokens; fewer make a worse model")
    train.add_argument("--rate", type=float, default=argparse.SUPPRESS, help="peak learning rate")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--start", type=Path, help="a checkpoint to go on from, with a fresh optimizer")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="the held-out questions of pocket")
    evaluate.add_argument("what", choices=["pocket"])
    _model(evaluate)
    evaluate.add_argument("--card", action="store_true", help="write README.md and exam.json beside the weights")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=_eval)

    bench = commands.add_parser(
        "bench", help="measure: this machine against transformers, what looking costs, what cache formats save and cost"
    )
    bench.add_argument("what", choices=["cpu", "probes", "cache", "schemes"])
    bench.add_argument("--checkpoint", type=Path, help="a directory in the Hugging Face layout; pocket if not given")
    bench.add_argument(
        "--shape", choices=["28m", "200m"], default=argparse.SUPPRESS, help="random weights of about this size instead"
    )
    bench.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    bench.add_argument("--threads", type=int, help="all cores if not given")
    bench.add_argument("--rounds", type=int, default=argparse.SUPPRESS, help="more settle what noise leaves open")
    bench.add_argument("--context", type=int, default=argparse.SUPPRESS, help="of probes: tokens in the cache")
    bench.add_argument("--formats", nargs="+", default=argparse.SUPPRESS, help='of cache: such as bf16 q6 "q6+128"')
    bench.add_argument(
        "--quick",
        action="store_true",
        default=argparse.SUPPRESS,
        help="of cache and schemes: less text, wider intervals",
    )
    bench.add_argument("--save", action="store_true", help="keep the result in kernels/results/")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=_bench)

    claims = commands.add_parser("claims", help="what is said of DeepSeek-V2, and what is true of it, with evidence")
    claims.add_argument("--json", action="store_true")
    claims.set_defaults(run=_claims)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help='"pocket", a checkpoint directory or a hub id')
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")


SAMPLING = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


def _sampling(parser: argparse.ArgumentParser) -> None:
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)


def _given(options: argparse.Namespace, *names: str) -> dict:
    """What was said, so that what was not has the default of the function that is called."""
    return {name: getattr(options, name) for name in names if name in options}


def _load(options: argparse.Namespace):
    from workbench.workbench import load

    return load(options.model, device=options.device, dtype=options.dtype)


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

    report = examine()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return int(report.state == FAIL)


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


# what each benchmark can be told beside --checkpoint, --dtype and --threads
BENCHES = {
    "cpu": ("shape", "rounds"),
    "probes": ("shape", "rounds", "context"),
    "cache": ("rounds", "formats", "quick"),
    "schemes": ("quick",),
}


def _bench(options: argparse.Namespace) -> int:
    from workbench.benchmarks import cache, cpu, probes, schemes

    measure = {"cpu": cpu.measure, "probes": probes.measure, "cache": cache.measure, "schemes": schemes.measure}
    told = _given(options, *dict.fromkeys(name for names in BENCHES.values() for name in names))
    wrong = [f"--{name}" for name in told if name not in BENCHES[options.what]]
    if wrong:
        raise RequestError(f"{', '.join(wrong)} is not of `workbench bench {options.what}`.")
    if options.what == "cache":
        told["progress"] = lambda stage: print(f"{stage} ...", file=sys.stderr)
    result = measure[options.what](options.checkpoint, dtype=options.dtype, threads=options.threads, **told)
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


if __name__ == "__main__":
    sys.exit(main())
