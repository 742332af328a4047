"""The words of the command line: every command and option, and what help says of them."""

import argparse
from pathlib import Path

from workbench import __version__

# what each benchmark can be told beside --checkpoint, --dtype and --threads
BENCHES = {
    "cpu": ("shape", "rounds", "llama"),
    "kernels": ("rounds", "device", "only"),
    "decode": ("shape", "rounds", "context", "device", "cache"),
    "prefill": ("shape", "rounds", "context", "device"),
    "batch": ("shape", "rounds", "context", "device", "cache"),
    "probes": ("shape", "rounds", "context"),
    "cache": ("rounds", "formats", "quick"),
    "schemes": ("quick",),
    "weights": ("quick", "recipes"),
    "offload": ("rounds", "context", "ram", "vram", "device", "cache", "prompt", "tokens", "llama", "gguf"),
}
SAMPLING = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="Talk to a DeepSeek-V2 model and see inside it.")
    parser.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab; further arguments go to JupyterLab")
    lab.add_argument("--folder", type=Path, default=Path("workbench-notebooks"), help="where to copy them if need be")

    chat = commands.add_parser("chat", help="talk in the terminal")
    _model(chat)
    chat.add_argument("--prompt", help="ask this, print the answer and end")
    chat.add_argument("--system", default="", help="what the model is told first")
    _sampling(chat)
    chat.add_argument("--json", action="store_true", help="with --prompt: text, tokens and timings as JSON")

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

    replay = commands.add_parser(
        "replay", help="open a saved trace, or two side by side; further arguments go to JupyterLab"
    )
    replay.add_argument("traces", type=Path, nargs="+", metavar="FILE", help="saved by `workbench trace` or trace.save")
    replay.add_argument("--folder", type=Path, default=Path("workbench-replays"), help="where the notebook goes")
    replay.add_argument("--text", action="store_true", help="only print what is in it")

    doctor = commands.add_parser("doctor", help="what this machine has, what is missing, what will run fast")
    doctor.add_argument(
        "--measure", action="store_true", help="first measure how fast memory, disk and GPU link are, and keep it"
    )
    doctor.add_argument("--folder", type=Path, help="with --measure: on the disk that is to be measured")
    doctor.add_argument("--json", action="store_true")

    plan = commands.add_parser("plan", help="what of a model fits where, and how fast that will be")
    plan.add_argument("what", help="v2, v2.5, v2-lite, pocket, or a checkpoint directory or its config.json")
    plan.add_argument("--recipe", default=argparse.SUPPRESS, help="how weights are packed (int4 if not packed already)")
    plan.add_argument("--device", choices=["cpu", "cuda"], default=argparse.SUPPRESS, help="cuda where --vram is given")
    plan.add_argument("--dtype", default=argparse.SUPPRESS)
    plan.add_argument("--cache", default=argparse.SUPPRESS, help="how the cache is stored")
    plan.add_argument("--batch", type=int, default=argparse.SUPPRESS, help="sequences of --context tokens each")
    _budget(plan)
    plan.add_argument("--json", action="store_true")

    pack = commands.add_parser("pack", help="write a checkpoint anew with packed weights; goes on after an interrupt")
    pack.add_argument("source", help='"pocket", a checkpoint directory or a hub id; with --verify a packed one')
    pack.add_argument("out", type=Path, nargs="?", help="where the packed one goes")
    pack.add_argument("--recipe", default="int4", help='bf16, fp8, int8, int6, int4, int3; "int4,lm_head.weight=bf16"')
    pack.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT",
        help="round by what matrices read of these texts, one a line",
    )
    pack.add_argument("--verify", action="store_true", help="read all of SOURCE and check every checksum")
    pack.add_argument("--force", action="store_true", help="drop what another recipe or source left in OUT")
    pack.add_argument("--json", action="store_true")

    synth = commands.add_parser("synth", help="write a checkpoint of a released shape with random packed weights")
    synth.add_argument("what", choices=["v2", "v2.5", "v2-lite", "pocket"])
    synth.add_argument("out", type=Path)
    synth.add_argument("--recipe", default="int4")
    synth.add_argument("--shared", action="store_true", help="one file of experts for all layers: little disk")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--json", action="store_true")

    train = commands.add_parser("train", help="train the model that ships with the package")
    train.add_argument("what", choices=["pocket"])
    train.add_argument("--out", type=Path, default=Path("runs/pocket"), help="where the checkpoint goes")
    train.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="of 2,048 tokens; fewer make a worse model")
    train.add_argument("--rate", type=float, default=argparse.SUPPRESS, help="peak learning rate")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--start", type=Path, help="a checkpoint to go on from, with a fresh optimizer")

    evaluate = commands.add_parser("eval", help="the held-out questions of pocket")
    evaluate.add_argument("what", choices=["pocket"])
    _model(evaluate)
    evaluate.add_argument("--card", action="store_true", help="write README.md and exam.json beside the weights")
    evaluate.add_argument("--json", action="store_true")

    bench = commands.add_parser(
        "bench", help="measure: speed beside limits and peers, what looking costs, what formats save and cost"
    )
    bench.add_argument("what", choices=BENCHES)
    bench.add_argument("--checkpoint", type=Path, help="a directory in the Hugging Face layout; pocket if not given")
    bench.add_argument(
        "--shape",
        choices=["28m", "200m", "v2-lite-slice", "v2-lite", "v2"],
        default=argparse.SUPPRESS,
        help="random weights of this shape instead; the slice has 4 layers of V2-Lite, the last two are made on a GPU",
    )
    bench.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    bench.add_argument("--threads", type=int, help="all cores if not given")
    bench.add_argument("--rounds", type=int, default=argparse.SUPPRESS, help="more settle what noise leaves open")
    bench.add_argument(
        "--context", type=int, default=argparse.SUPPRESS, help="tokens in the cache; of prefill: of the prompt"
    )
    bench.add_argument("--formats", nargs="+", default=argparse.SUPPRESS, help='of cache: such as bf16 q6 "q6+128"')
    bench.add_argument(
        "--quick",
        action="store_true",
        default=argparse.SUPPRESS,
        help="of cache and schemes: less text, wider intervals",
    )
    bench.add_argument("--recipes", nargs="+", default=argparse.SUPPRESS, help="of weights: int4 int4+compensated ...")
    bench.add_argument("--ram", default=argparse.SUPPRESS, help="of offload: the hard limit, 4GB if not given")
    bench.add_argument("--vram", default=argparse.SUPPRESS, help="of offload: a limit of GPU memory beside it")
    bench.add_argument("--device", choices=["cpu", "cuda"], default=argparse.SUPPRESS)
    bench.add_argument("--cache", default=argparse.SUPPRESS, help="how the cache is stored, such as q6")
    bench.add_argument("--only", nargs="+", default=argparse.SUPPRESS, help="of kernels: these files")
    bench.add_argument("--prompt", type=int, default=argparse.SUPPRESS, help="of offload: tokens of each prompt")
    bench.add_argument("--tokens", type=int, default=argparse.SUPPRESS, help="of offload: of each answer")
    bench.add_argument(
        "--llama", type=Path, default=argparse.SUPPRESS, help="of cpu and offload: a Python with llama-cpp-python"
    )
    bench.add_argument("--gguf", type=Path, default=argparse.SUPPRESS, help="of offload: the same shape for llama.cpp")
    bench.add_argument("--save", action="store_true", help="keep the result in kernels/results/")
    bench.add_argument("--json", action="store_true")

    claims = commands.add_parser("claims", help="what is said of DeepSeek-V2, and what is true of it, with evidence")
    claims.add_argument("--json", action="store_true")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help='"pocket", a checkpoint directory or a hub id')
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache", default="auto", help='how the cache is stored, such as bf16, q6 or "q6+128"')
    parser.add_argument("--recipe", default=argparse.SUPPRESS, help="pack plain weights while they are read: int4 ...")
    _budget(parser)


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vram", default=argparse.SUPPRESS, help="hard limit of GPU memory, such as 16GiB")
    parser.add_argument("--ram", default=argparse.SUPPRESS, help="hard limit of main memory, such as 4GB")
    parser.add_argument(
        "--context", type=int, default=argparse.SUPPRESS, help="tokens the caches have room for within the limits"
    )


def _sampling(parser: argparse.ArgumentParser) -> None:
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
