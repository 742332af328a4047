"""The command line. Each command is a few lines around the module that does the work."""

import argparse
import json
import sys
from pathlib import Path

from workbench import __version__
from workbench.errors import WorkbenchError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where the doctor found something broken, or 2 where what was asked cannot be done."""
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    if extra and options.command != "lab":
        parser.error(f"unrecognised arguments: {' '.join(extra)}")
    options.extra = extra
    try:
        return options.run(options)
    except WorkbenchError as error:
        print(f"workbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
    for name, kind in (("temperature", float), ("top-p", float), ("max-tokens", int), ("seed", int)):
        chat.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    chat.add_argument("--json", action="store_true", help="with --prompt: text, tokens and timings as JSON")
    chat.set_defaults(run=_chat)

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

    bench = commands.add_parser("bench", help="measure this machine against transformers")
    bench.add_argument("what", choices=["cpu"])
    bench.add_argument("--checkpoint", type=Path, help="a directory in the Hugging Face layout; pocket if not given")
    bench.add_argument("--shape", choices=["28m", "200m"], help="random weights of about this size instead")
    bench.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    bench.add_argument("--threads", type=int, help="for both sides; all cores if not given")
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--save", action="store_true", help="keep the result in kernels/results/")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=_bench)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help='"pocket", a checkpoint directory or a hub id')
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")


def _load(options: argparse.Namespace):
    from workbench.workbench import load

    return load(options.model, device=options.device, dtype=options.dtype)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _lab(options: argparse.Namespace) -> int:
    from workbench.lab import serve

    return serve(options.folder, options.extra)


def _chat(options: argparse.Namespace) -> int:
    from workbench.sampling import Sampling
    from workbench.terminal import Terminal, once

    given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens", "seed") if name in options}
    sampling = Sampling(**given)
    bench = _load(options)
    if options.prompt is None:
        Terminal(bench, sampling, options.system, write=_write).run()
        return 0
    answer = once(bench, options.prompt, sampling, options.system, (lambda text: None) if options.json else _write)
    print(json.dumps(answer, ensure_ascii=False) if options.json else "")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from workbench.doctor import FAIL, examine

    report = examine()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return int(report.state == FAIL)


def _train(options: argparse.Namespace) -> int:
    from workbench.train.loop import Progress, Recipe
    from workbench.train.pocket import train_pocket

    given = {name: getattr(options, name) for name in ("steps", "rate") if name in options}
    recipe = Recipe(**given)

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
    from workbench.benchmarks import cpu

    result = cpu.measure(
        options.checkpoint, shape=options.shape, dtype=options.dtype, threads=options.threads, rounds=options.rounds
    )
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    if options.save:
        print(f"saved in {result.save()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
