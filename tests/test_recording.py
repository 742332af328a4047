"""A file of prompts becomes one trace: what was asked is in it, and what cannot be recorded is refused first."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from workbench import recording
from workbench.__main__ import main
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.edits import Ablate
from workbench.engine import Engine
from workbench.errors import RequestError
from workbench.model import Model
from workbench.recording import Progress, check_target, read_edits, read_prompts
from workbench.sampling import Sampling
from workbench.trace import Trace
from workbench.workbench import load

SHORT = ["--max-tokens", "6", "--seed", "3", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary, tokenizer):
    """A model of random weights with a tokenizer, as a directory."""
    config = replace(
        Config.preset("pocket"),
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=3,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
    )
    path = tmp_path_factory.mktemp("recorded") / "small"
    save(Model(config, Random(config, seed=1, std=0.15)), path, files_from=vocabulary)
    return path


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="prompts.txt"):
        path = tmp_path / name
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
        return path

    return write


def test_every_prompt_is_a_sequence_of_the_trace(checkpoint, write, tmp_path, capsys):
    prompts, out = write("Hello", "", "What is this?", "One, two"), tmp_path / "said.parquet"
    arguments = ["trace", str(prompts), "--out", str(out), "--model", str(checkpoint), *SHORT]
    assert main([*arguments, "--label", "english", "--slots", "2", "--json"]) == 0
    said = capsys.readouterr()
    summary, trace = json.loads(said.out), Trace.load(out)
    sequences = trace.header["sequences"]
    assert [each["prompt"] for each in sequences] == ["Hello", "What is this?", "One, two"]
    assert {each["label"] for each in sequences} == {"english"} and {each["seed"] for each in sequences} == {3}
    assert summary["sequences"] == 3 and summary["bytes"] == out.stat().st_size
    assert summary["prompt_tokens"] + summary["generated_tokens"] == len(trace)
    assert summary["generated_tokens"] == (trace.tokens["phase"] == "decode").sum() <= 18
    assert summary["tokens_per_second"] == pytest.approx(len(trace) / summary["seconds"])
    assert said.err.splitlines()[-1].startswith(f"3 of 3 answers, {len(trace)} tokens")


def test_the_trace_is_that_of_the_same_prompt_alone(checkpoint, write, tmp_path):
    bench = load(str(checkpoint), device="cpu", dtype="fp32")
    texts = ["Hello", "What is this?", "One, two", "A cat"]
    prompts = write(*texts)
    sampling, asked = Sampling(max_tokens=6, seed=3), read_prompts(prompts, chat=False)
    recording.record(bench, prompts, asked, tmp_path / "a.parquet", sampling, slots=2)
    trace = Trace.load(tmp_path / "a.parquet")
    for number, text in enumerate(texts):
        alone = bench.generate(text, sampling).trace
        assert trace.sequence(number).tokens["id"].tolist() == alone.tokens["id"].tolist()
        assert (trace.sequence(number).experts == alone.experts).all()


def test_json_lines_bring_messages_and_labels_of_their_own(checkpoint, write, tmp_path, capsys):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bonjour"}]
    prompts = write({"prompt": "Hello"}, {"messages": talk, "label": "french"}, name="prompts.jsonl")
    out = tmp_path / "said.parquet"
    assert (
        main(["trace", str(prompts), "--out", str(out), "--model", str(checkpoint), *SHORT, "--label", "english"]) == 0
    )
    trace = Trace.load(out)
    assert [each["label"] for each in trace.header["sequences"]] == ["english", "french"]
    assert "Be brief." in "".join(trace.sequence(1).tokens["text"])
    assert f"{out}: 2 answers, {len(trace)} tokens" in capsys.readouterr().out


def test_raw_text_is_continued_and_a_chat_is_answered(write):
    path = write("Hello")
    assert [one.prompt for one in read_prompts(path, chat=False)] == ["Hello"]
    assert [one.prompt for one in read_prompts(path)] == [[{"role": "user", "content": "Hello"}]]


def test_edits_and_scores_are_recorded(checkpoint, write, tmp_path, capsys):
    out = tmp_path / "edited.parquet"
    edit = json.dumps({"kind": "Ablate", "layer": 2, "experts": [5, 7]})
    arguments = ["trace", str(write("Hello")), "--out", str(out), "--model", str(checkpoint), *SHORT]
    assert main([*arguments, "--edit", edit, "--scores"]) == 0
    trace = Trace.load(out)
    assert [each["kind"] for each in trace.header["edits"]] == ["Ablate"]
    column = trace.layers.index(2)
    assert not set(trace.experts[:, column].ravel().tolist()) & {5, 7}
    assert trace.scores.shape == (len(trace), 2, 32)


def test_an_edit_that_only_some_prompts_are_long_enough_for_is_carried_out(checkpoint, write, tmp_path):
    late = json.dumps({"kind": "Ablate", "layer": None, "experts": [1], "positions": [40, 400]})
    prompts = write("Hello", "Hello", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2)
    arguments = ["trace", str(prompts), "--model", str(checkpoint), *SHORT, "--slots", "1", "--edit", late]
    assert main([*arguments, "--out", str(tmp_path / "a.parquet")]) == 0
    never = late.replace("[40, 400]", "[1000, 1001]")
    assert main([*arguments[:-1], never, "--out", str(tmp_path / "b.parquet")]) == 2
    assert not (tmp_path / "b.parquet").exists()


@pytest.mark.parametrize(
    ("lines", "name", "said"),
    [
        ((), "p.txt", "no prompt"),
        (("", "  "), "p.txt", "no prompt"),
        (('{"prompt": "a"}', '{"prompt": '), "p.jsonl", "line 2: not JSON"),
        (('{"prompt": "a"}', "", '["b"]'), "p.jsonl", "line 3: must be"),
        (('{"prompt": "a", "messages": []}',), "p.jsonl", "line 1: must be"),
        (('{"prompt": " "}',), "p.jsonl", "line 1: prompt must be text"),
        (('{"messages": [{"role": "user"}]}',), "p.jsonl", "line 1: messages must be"),
        (('{"prompt": "a", "label": 3}',), "p.jsonl", "line 1: label must be text"),
        (('{"prompt": "a", "label": "x"}', '{"prompt": "b"}'), "p.jsonl", "line 2: no label"),
    ],
)
def test_a_bad_file_of_prompts_is_refused_and_the_line_named(write, lines, name, said):
    with pytest.raises(RequestError, match=said):
        read_prompts(write(*lines, name=name))


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "p.txt", tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(RequestError, match=path.name):
            read_prompts(path)


def test_a_prompt_the_model_cannot_be_asked_is_named_before_anything_runs(tokenizer, write, tmp_path):
    config = replace(Config.preset("pocket"), vocab_size=600, max_position_embeddings=16, rope_scaling=None)
    engine = Engine(Model(config, Random(config)), tokenizer, "fp32")
    prompts = write("Hello", "far too long a text for sixteen tokens, " * 4)
    with pytest.raises(RequestError, match="line 2: the prompt has"):
        recording.record(
            SimpleNamespace(engine=engine), prompts, read_prompts(prompts), tmp_path / "a.parquet", Sampling()
        )


def test_nothing_is_replaced_unasked(checkpoint, write, tmp_path, capsys):
    prompts, out = write("Hello"), tmp_path / "said.parquet"
    out.write_text("precious")
    arguments = ["trace", str(prompts), "--out", str(out), "--model", str(checkpoint), *SHORT]
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err and out.read_text() == "precious"
    assert main([*arguments, "--force"]) == 0
    assert len(Trace.load(out)) > 1


def test_a_place_where_it_could_not_be_saved_is_refused_first(write, tmp_path):
    prompts = write("Hello")
    for out, said in (
        (tmp_path / "no" / "a.parquet", "no folder"),
        (tmp_path, "is a folder"),
        (prompts, "file of prompts"),
    ):
        with pytest.raises(RequestError, match=said):
            check_target(out, prompts, force=True)


def test_edits_are_read_and_bad_ones_refused_with_their_text():
    assert read_edits(['{"kind": "Ablate", "layer": 1, "experts": [2]}']) == [Ablate(1, (2,))]
    for text in ("Ablate", '{"kind": "Melt"}', '{"kind": "Ablate", "layer": 1}'):
        with pytest.raises(RequestError, match="--edit"):
            read_edits([text])


def test_progress_is_one_line_on_a_terminal_and_a_few_elsewhere(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(recording.time, "monotonic", lambda: clock.now)
    for live, lines in ((True, 1), (False, 3)):
        written = []
        progress = Progress(30, written.append, live)
        for _ in range(30):
            clock.now += 1
            progress([0] * 5)
        text = "".join(written)
        assert text.count("\n") == lines and "30 of 30 answers, 150 tokens, 5 tokens/s" in text
        assert len(written) == (30 if live else 3)
