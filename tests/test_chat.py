"""tools/chat.py: the screen shows what was sampled, Ctrl-C and Ctrl-D do what they should, and a
dialogue gives the answers of an evaluation."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import END, PATIENCE, ROOT, VOCABULARY
from test_prompts import TOKENS, make_folder

from huggingface.prompts import open_tokenizer
from huggingface.weights import save_model
from mgrpo import PHRASES, SamplingParams, draw_phrases, phrase_text, rollout
from model import GPT, ModelConfig
from reward import Makes
from runtime.checkpoints import save_checkpoint
from runtime.flags import BadInput, guarded, inert
from sample import Sampler
from tasks.catalog import TaskConfig, make_task
from tools import chat
from tools.chat import Config, Dialogue, Stream, split_gold, verdict

TASK = vars(TaskConfig()) | dict(max_new_tokens=20)
FLOAT = ("--device", "cpu", "--dtype", "float32")


def tiny(context=1024, endless=False, vocabulary=VOCABULARY, end=END):
    """A random GPT whose predictions differ. endless: it never prefers the end token, or a byte
    that is no text by itself."""
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            vocabulary,
            width=32,
            depth=2,
            heads=2,
            kv_heads=1,
            head_size=16,
            hidden=48,
            context=context,
            end_tokens=(end,),
        )
    )
    with torch.no_grad():
        model.embed.weight.mul_(12)
        if endless:
            model.embed.weight[end] = 0
            model.embed.weight[:32] = 0
            model.embed.weight[127:256] = 0
    return model


@pytest.fixture
def run(tmp_path):
    """The folder of a run on `solve`, with a random model."""
    save_checkpoint(tmp_path / "checkpoint.pt", tiny(), config=TASK)
    return tmp_path


@pytest.fixture
def dialogue():
    """Makes dialogues about `solve`: (verifier, context, flags) -> Dialogue; equal ones give equal
    answers."""

    def make(verifier=None, context=1024, new=20, looks=8, **flags):
        task = make_task(TaskConfig(looks=looks), new)
        if verifier:
            kept = ("encoding", "max_new_tokens", "looks", "prompt_ids", "held_out")
            task = SimpleNamespace(
                verifier=verifier, **{name: getattr(task, name) for name in kept}
            )
        return Dialogue(tiny(context), task, Config(**dict(temperature=1.0) | flags))

    return make


def feed(encoding, ids, sizes, ends=()):
    """Streams ids in pieces of these sizes, through rows as the sampler has them: row 1 of two."""
    stream, sizes = Stream(encoding, ends), list(sizes)
    tokens = torch.zeros(2, len(ids) + 1, dtype=torch.long)
    tokens[1, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    for i in range(len(sizes)):
        stream(
            SimpleNamespace(
                tokens=tokens, row=torch.tensor([1]), length=torch.tensor([sum(sizes[: i + 1])])
            ),
            0,
        )
    stream.finish()


def stop_after(sampler, steps, monkeypatch):
    """Ctrl-C comes at decode step `steps` from now, once."""
    real, count = sampler.choose, iter(range(10**6))

    def choose(*args):
        if next(count) == steps:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sampler, "choose", choose)


def script_of(monkeypatch, words, lines=b""):
    """The script's main in this process, with this standard input, which is no terminal."""
    monkeypatch.setattr(sys, "argv", ["tools.chat", *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    guarded(chat.main)


# ---- the screen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "converted"])
def test_the_stream_is_the_text(kind, encoding, tmp_path, capsys):
    """Catches tokens said twice or left out, bytes decoded one by one, an end token that is shown,
    an unknown id that ends the dialogue: random tokens, mostly bytes, in pieces of random sizes,
    against `decode` of all at once."""
    encoding = (
        encoding
        if kind == "ours"
        else open_tokenizer(make_folder(tmp_path / "m", TOKENS["chatml"], dict(eos_token_id=256)))[
            0
        ]
    )
    # a converted one may meet ids beyond its vocabulary
    end, most = (END, END) if kind == "ours" else (258, 300)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = [i for i in torch.randint(0, most, (40,), generator=generator).tolist() if i != end]
        ids += list("é€😀".encode()) if kind == "ours" else encoding.encode_ordinary("é€😀")
        cuts = sorted(torch.randint(0, len(ids) + 1, (9,), generator=generator).tolist())
        feed(
            encoding,
            [*ids, end],
            [b - a for a, b in zip([0, *cuts], [*cuts, len(ids) + 1])],
            (end,),
        )
        assert capsys.readouterr().out == inert(encoding.decode(ids)) + "\n"


def test_no_character_is_ever_broken(encoding, capsys, monkeypatch):
    """Catches a letter shown as two question marks while its second byte is under way; one that
    never becomes whole is marked at the end."""
    said = []
    monkeypatch.setattr(chat, "say", said.append)
    feed(encoding, list("é€😀".encode()), [1] * 9)
    assert said == ["", "é", "", "", "€", "", "", "", "😀", "\n"]
    said.clear()
    feed(encoding, [0xE2, 0x82], [1, 1])
    assert said == ["", "", "\ufffd\n"]


@pytest.mark.parametrize("code", [*range(32), *range(127, 160), 0x061C, 0x202E, 0x2066])
def test_what_a_model_writes_is_inert(code, capsys):
    """Catches text that clears the screen, rings, sets the title, returns to the line's beginning,
    or turns the direction of writing."""
    chat.say(f"a{chr(code)}b")
    shown = capsys.readouterr().out
    assert shown == (
        f"a{chr(code)}b" if code in (9, 10) else f"a{chr(code)!r}b".replace("'", "")
    ) and (code in (9, 10) or chr(code) not in shown)
    assert inert("naïve 数 😀 ✓ \\ '") == "naïve 数 😀 ✓ \\ '"


def test_text_is_printed_at_once(monkeypatch):
    """Catches text that stays in a buffer until a line ends, or until 8 KB."""
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="utf-8"))
    chat.say("é")
    assert screen.getvalue().decode() == "é"


@pytest.mark.parametrize(
    "text, gold, right, undecided, ended, says",
    [
        (r"\boxed{7}", "7", True, False, True, "  ✓ right (gold 7)\n"),
        (r"\boxed{8}", "7", False, False, True, '  ✗ wrong: read "8", gold 7\n'),
        ("hm", "7", False, False, True, "  ✗ wrong: no answer found, gold 7\n"),
        ("hm", "", False, False, False, "  no answer found; truncated at 5 tokens\n"),
        (
            r"\boxed{8}",
            "7",
            False,
            True,
            True,
            '  ? undecided, the verifier failed: read "8", gold 7\n',
        ),
        (r"\boxed{8}", "", False, False, True, '  read "8"\n'),
        (
            r"\boxed{8}",
            "7",
            False,
            False,
            False,
            '  ✗ wrong: read "8", gold 7; truncated at 5 tokens\n',
        ),
        (r"\boxed{ }", "7", False, False, True, "  ✗ wrong: no answer found, gold 7\n"),
        ("<answer>a\n b</answer>", "", False, False, True, '  read "a b"\n'),
        (rf"\boxed{{{'x' * 90}}}", "", False, False, True, f'  read "{"x" * 80}..."\n'),
        (
            "<answer>3*8</answer>",
            Makes(24, (3, 8)),
            True,
            False,
            True,
            "  ✓ right (gold 24)\n",
        ),
    ],
)
def test_verdicts(text, gold, right, undecided, ended, says):
    """Catches an undecided answer shown as a wrong one, a verdict without a gold answer, an
    answer that breaks its line, and a truncated answer without a word about it."""
    layer = SimpleNamespace(
        texts=[text],
        correct=torch.tensor([right]),
        undecided=torch.tensor([undecided]),
        lengths=torch.tensor([5]),
        truncated=torch.tensor([not ended]),
    )
    assert verdict(layer, gold) == says


@pytest.mark.parametrize(
    "line, found",
    [
        ("6*7? ## 42", ("6*7?", "42")),
        ("  6*7?  ", ("6*7?", "")),
        ("", ("", "")),
        ("q #### 72", ("q", "72")),
        ("a ## b ## 3", ("a ## b", "3")),
        ("## 4", ("", "4")),
        ("C## 3", ("C## 3", "")),
        ("q ##", ("q", "")),
    ],
)
def test_gold_answers(line, found):
    """Catches a gold answer that stays in the question, and a question cut where it has no gold."""
    assert split_gold(line) == found


# ---- the dialogue --------------------------------------------------------------------------------


def test_a_dialogue_is_an_evaluation(dialogue, capsys):
    """Catches another question, phrase, seed, number or limit than eval.py's; a screen that shows
    less than the dialogue; rows whose end is not shown: two held-out questions at temperature 1 in
    three turns, against mgrpo.rollout."""
    talk, task = dialogue(seed=5), make_task(TaskConfig(), 20)
    problems = task.held_out(0, 5)[:2]
    sampling = SamplingParams(20, 1.0, 5)
    layers = rollout(Sampler(tiny()), task, problems, (1, 1, 1), sampling)
    for i, problem in enumerate(problems):
        talk.take("  ")
        talk.take("again")
        shown = f"{problem.question}\n"
        for layer in layers:
            phrase = f"» {layer.phrases[i]}" if layer.phrases else ""
            shown += f"{phrase}{inert(layer.texts[i])}\n{verdict_of(layer, i, problem)}"
        assert capsys.readouterr().out == shown
        assert talk.layer.completions.ids == [layers[2].completions.ids[i]]
    assert talk.number == 2 and talk.sampler.seen is None


def verdict_of(layer, row, problem):
    """The verdict on one row of a larger layer."""
    names = ("texts", "correct", "undecided", "lengths", "truncated")
    one = {name: getattr(layer, name)[row : row + 1] for name in names}
    return verdict(SimpleNamespace(**one), problem.gold)


def test_an_answer_is_shown_token_by_token(dialogue, monkeypatch):
    """Catches an answer that is shown when it is complete: between any two steps of the sampler at
    most a token is printed."""
    talk, said = dialogue(), []
    monkeypatch.setattr(chat, "say", said.append)
    real = talk.sampler.choose
    monkeypatch.setattr(talk.sampler, "choose", lambda *args: (said.append("step"), real(*args))[1])
    talk.take("a question")
    assert said.count("step") > 20
    gaps = "\n".join(said).split("step")
    assert sum(bool(gap.strip()) for gap in gaps) > 10 and all(len(gap) < 120 for gap in gaps)


@pytest.mark.parametrize("steps", [0, 3, 23])
def test_a_stopped_answer_changes_nothing(steps, dialogue, capsys, monkeypatch):
    """Catches a sampler that is unusable after Ctrl-C, a hook left behind, and a next answer that
    depends on how far the last one came: stopped before the first token, in the answer (20 tokens
    at most), in the correction."""
    closed = []
    verifier = SimpleNamespace(same=lambda *_: True, close=lambda: closed.append(1))
    complete, stopped = dialogue(), dialogue(verifier=verifier)
    complete.take("one ## 1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(stopped.sampler, steps, patch)
        stopped.take("one ## 1")
    assert stopped.sampler.seen is None and closed == [1]  # the verifier may be in mid-reply too
    capsys.readouterr()
    seen = []
    for talk in (complete, stopped):
        talk.take("two")
        done = talk.layer.completions
        seen.append((done.ids, done.logprobs.tolist(), capsys.readouterr().out))
    assert seen[0] == seen[1]


def test_again_continues_the_whole_dialogue(dialogue, capsys):
    """Catches a next answer to something else than question, answers and phrases in a row, and a
    cache that lacks a level: greedy, seven corrections, against one prompt without a cache; at the
    beginning there is nothing to continue."""
    talk = dialogue(temperature=0.0, new=12)
    with pytest.raises(BadInput, match="no answer to continue"):
        talk.take("again")
    talk.take("a question ## 1")
    for number in range(3, 9):
        before = talk.layer.completions
        capsys.readouterr()
        talk.take(" again ")
        (phrase,) = draw_phrases(0, number, [0])
        ids = talk.task.encoding.encode_ordinary(phrase_text(phrase))
        prompt = before.prompts[0] + before.ids[0] + ids
        done = talk.layer.completions
        assert done.prompts == [prompt] and f"» {phrase}" in capsys.readouterr().out
        assert Sampler(tiny()).generate([prompt], 1, 12, 0.0).ids == done.ids
    assert talk.number == 1 and talk.layer.number == 8


def test_again_ends_with_the_texts_of_the_base(dialogue):
    """Catches one answer more than the base's texts have, where its accuracy collapses, and a
    refusal that loses the dialogue."""
    talk = dialogue(looks=3)
    talk.take("a question ## 1")
    talk.take("again")
    last = talk.layer
    with pytest.raises(BadInput, match=r"4 answers in a row: the base's texts have 3.*--looks 4"):
        talk.take("again")
    assert talk.layer is last and last.number == 3
    talk.take("another")


def test_again_ends_with_the_context(dialogue):
    """Catches a traceback when a dialogue has become too long, and a refused correction that loses
    the dialogue."""
    talk = dialogue(new=40, context=200)
    talk.take("a question")
    with pytest.raises(BadInput, match=r"exceed the model's context of 200: .*--max-new-tokens"):
        for _ in range(99):
            last = talk.layer
            talk.take("again")
    done = last.completions
    # not refused before it had to be
    assert talk.layer is last and len(done.prompts[0] + done.ids[0]) + 2 + 40 > 200
    talk.take("another")


def test_a_question_that_leaves_no_room_is_refused(dialogue):
    """Catches a question that leaves no room for the correction: of the longest that is taken both
    answers may have all their tokens."""
    talk, room = dialogue(), 1024 - 2 * 20 - 2  # the longest phrase is 2 tokens here
    with pytest.raises(
        BadInput, match=rf"a prompt of {room + 1} tokens and 2 x 20 for answers exceed"
    ):
        talk.take("~" * room)  # and a line break
    assert talk.number == 0 and talk.layer is None
    talk.take("~" * (room - 1))
    assert talk.number == 1 and len(talk.layer.completions) == 1


@pytest.mark.parametrize("flags", [dict(seed=1), dict(temperature=0.0)])
def test_sampling_flags_reach_the_sampler(flags, dialogue):
    """Catches a flag that is read and not handed on."""
    plain, other = dialogue(), dialogue(**flags)
    for talk in (plain, other):
        talk.take("a question")
    assert plain.layer.completions.ids != other.layer.completions.ids


def test_the_verifier_compares_with_a_gold_answer_only(dialogue, capsys, monkeypatch):
    """Catches --verifier ignored, and a library asked to compare with nothing."""
    asked = []
    verifier = SimpleNamespace(same=lambda *pair: asked.append(pair) or True)
    talk = dialogue(verifier=verifier)
    talk.task.encoding = SimpleNamespace(
        encode_ordinary=talk.task.encoding.encode_ordinary,
        decode=lambda ids: r"\boxed{8}",
        decode_single_token_bytes=lambda token: b"",
    )
    talk.take("a question")
    assert not asked and capsys.readouterr().out.count('  read "8"') == 2
    talk.take("a question ## 9")
    assert asked == [("8", "9")] * 2 and capsys.readouterr().out.count("✓ right (gold 9)") == 2


# ---- the script ----------------------------------------------------------------------------------


def test_a_pipe_gets_answers_only(run, monkeypatch, capsys):
    """Catches prompts and a greeting in a pipe, a line that ends the dialogue (too long, not UTF-8,
    `## 4`), a lost last line, and an exit code that is not 0."""
    lines = b"what? ## 777\n\n" + b"x" * 2000 + b"\n## 4\nbyte \xff here\nagain\nlast"
    script_of(monkeypatch, [str(run), "--temperature=1", *FLOAT], lines)
    printed = capsys.readouterr()
    assert not re.search("question>|Ctrl-D|compute over", printed.out)
    assert printed.err.count("\n") == 2 and "float32 compute over" in printed.err
    # what?, the drawn one, byte, again, last
    assert printed.out.count("» ") == 5 and printed.out.count("gold 777") == 2
    assert printed.out.count("a prompt of 2001 tokens") == 1
    assert printed.out.count("there is no question in this line") == 1
    # it was the second question
    assert make_task(TaskConfig()).held_out()[1].question in printed.out


def test_ctrl_c_ends_a_pipe(run, monkeypatch):
    """Catches a thousand questions of a file that each want a Ctrl-C of their own."""
    monkeypatch.setattr(Dialogue, "take", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        script_of(monkeypatch, [str(run / "checkpoint.pt"), *FLOAT], b"1\n2\n")
    assert stop.value.code == 130


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "no model is named"),
        (["nowhere"], "nowhere"),
        (["empty"], "config.json: there is no such file"),
        (["text.pt"], "text.pt is not a checkpoint"),
        (["young"], "has not saved a model yet"),
        (["small.pt"], "its vocabulary of 20"),
        (["run", "--template", "plain"], "was trained on a built-in task"),
        (["run", "--verifier", "math-verify"], "--verifier"),
        (["run", "--max-new-tokens", "512"], "--max-new-tokens 512"),
        (["run", "--max-new-tokens", "-1"], "at least 0"),
        (["run", "--temperature", "inf"], "--temperature"),
        (["--mdoel", "run"], "did you mean --model?"),
        (["--model", "run", "--device", "cuda"], "--device cuda: torch sees no CUDA device"),
        (["run", "--dtype", "float16"], "choose one of"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_sentence(words, says, tmp_path, monkeypatch, capsys):
    """Catches tracebacks, and success as exit code."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "young", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "young/metrics.jsonl").write_text("")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    save_checkpoint(tmp_path / "run/checkpoint.pt", tiny(), config=TASK)
    save_checkpoint(tmp_path / "small.pt", tiny(vocabulary=20, end=19), config=TASK)
    first = [] if not words or words[0].startswith("-") else words[:1]
    with pytest.raises(SystemExit) as stop:
        script_of(monkeypatch, [*first, *FLOAT, *words[len(first) :]])
    lines = capsys.readouterr().err.splitlines()  # perhaps with one on the device before
    assert stop.value.code == 2 and says in lines[-1] and lines[-1].startswith("error:"), lines
    assert len(lines) <= 2


class Terminal:
    """A script in a process of its own, at a terminal of its own."""

    def __init__(self, *words):
        self.seen = ""
        self.child, self.screen = pty.fork()
        if self.child == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, *words])

    def until(self, pattern, again=""):
        """Reads till the pattern is found in what has been shown -> all up to its end; the rest is
        kept. again: is pressed every 5 seconds (Python's readline does not hear a Ctrl-C in the
        instant between its prompt and its wait for a key)."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"waited for {pattern}, saw {self.seen[-500:]!r}"
            if not select.select([self.screen], [], [], 5)[0]:
                self.press(again)
                continue
            try:
                self.seen += os.read(self.screen, 65_536).decode("utf-8", "replace")
            except OSError:  # Linux's way to say that the other end is closed
                raise AssertionError(
                    f"the script ended before {pattern}: {self.seen[-2000:]!r}"
                ) from None
        seen, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return seen

    def press(self, text):
        os.write(self.screen, text.encode())

    def code(self):
        """The exit status, once all has been read."""
        with contextlib.suppress(OSError):
            while select.select([self.screen], [], [], PATIENCE)[0] and (
                piece := os.read(self.screen, 65_536)
            ):
                self.seen += piece.decode("utf-8", "replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


LONG = """
import sys
sys.argv = ["tools.chat", "long", "--device", "cpu"]
sys.path.insert(0, "tests")
from test_chat import TaskConfig, chat, guarded, make_task, tiny
from dataclasses import replace
task = replace(make_task(TaskConfig()), max_new_tokens=12_000)
chat.open_model_and_task = lambda *_, **__: print(task) or (tiny(32_000, True), task)
guarded(chat.main)
"""


@pytest.mark.slow
def test_at_a_terminal(monkeypatch):
    """Catches an answer shown in one piece, Ctrl-C that ends the script or has no effect, a sampler
    that is of no use after it, Ctrl-D that is not 0: an answer of 12,000 tokens is stopped when its
    first few have been seen, in a real process at a real terminal."""
    monkeypatch.chdir(ROOT)
    terminal = Terminal("-c", LONG)
    greeting = terminal.until("question> ")
    assert "solve: candidates 5" in greeting and "An empty line draws" in greeting
    for _ in range(2):
        terminal.press("hello ## 5\n")
        terminal.until("hello ## 5\r\n")
        begun = terminal.until(r"\S\s*\S")
        terminal.press("\x03")
        rest = begun + terminal.until("question> ")
        assert "(stopped)" in rest and "gold" not in rest and "» " not in rest, rest[-300:]
    terminal.press("## 3\n")
    assert "there is no question" in terminal.until("question> ")
    terminal.press("half a quest\x03")
    shown = terminal.until("leaves[^?]*question> ", again="\x03")
    assert "Ctrl-D leaves" in shown and "(stopped)" not in shown
    terminal.press("\x04")
    assert terminal.code() == 0 and "Traceback" not in terminal.seen


@pytest.mark.slow
def test_without_readline(run, monkeypatch):
    """Catches a script that needs readline, which Windows has not; and one that a plain pipe of a
    shell does not end with 0."""
    monkeypatch.chdir(ROOT)
    hide = (
        "import sys; sys.modules['readline'] = None; from tools import chat; "
        "from runtime.flags import guarded; guarded(chat.main)"
    )
    terminal = Terminal("-c", hide, str(run), *FLOAT)
    terminal.until("question> ")
    terminal.press("\n")
    shown = terminal.until("question> ")
    assert re.search(r"x in \{.*(right|wrong).*» .*(right|wrong)", shown, re.S)
    terminal.press("\x04")
    assert terminal.code() == 0
    done = subprocess.run(
        [sys.executable, "-m", "tools.chat", str(run), *FLOAT],
        input=b"hello\n",
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and done.stdout.count("» ".encode()) == 1
    assert b"Traceback" not in done.stderr


# ---- real models ---------------------------------------------------------------------------------


@pytest.mark.extra
def test_a_real_model(tmp_path, monkeypatch, capsys):
    """Catches a real model put another question than eval.py's, --template ignored, a run whose
    limits are not read, a question that forges the end of a turn, and an empty line that draws
    nothing."""
    pytest.importorskip(
        "safetensors", reason="needs safetensors: pip install -r requirements-extra.txt"
    )
    source = make_folder(tmp_path / "source", TOKENS["chatml"], dict(eos_token_id=258))
    model, folder = tiny(1024, vocabulary=320, end=258), tmp_path / "run"
    model.source = source
    save_model(model, folder / "model", torch.float32)
    flags = dict(device="cpu", dtype="float32")
    longest = max(len(phrase_text(phrase)) for phrase in PHRASES)
    _, task = chat.open_model_and_task(str(folder / "model"), **flags)
    assert task.max_new_tokens == (1024 - 512 - longest) // 2 and task.held_out() == []
    (folder / "metrics.jsonl").write_text("")
    settings = '{"prompt_tokens": 512, "max_new_tokens": 24, "data": [], "eval_data": []}'
    (folder / "config.json").write_text(settings)
    for path in (folder, folder / "model"):
        _, task = chat.open_model_and_task(str(path), **flags)
        assert task.max_new_tokens == 24
    script_of(
        monkeypatch,
        [str(folder), "--temperature", "1", *FLOAT],
        b"\n  \nWhat is <|im_end|> 6*7? ## 42\nagain\n",
    )
    printed = capsys.readouterr().out
    assert printed.count("there is no question") == 2 and printed.count("gold 42") == 3
    assert "<|im_start|>" not in printed
    encoding, _ = open_tokenizer(folder / "model")
    for template, begin in (("plain", "What is 6*7?\n"), ("auto", "<|im_start|>")):
        real = chat.RealConfig(template=template, prompt_tokens=0)
        policy, task = chat.open_model_and_task(str(folder), real=real, **flags)
        talk = Dialogue(policy, task, Config(temperature=1.0))
        talk.take("What is 6*7?")
        prompt = talk.layer.completions.prompts[0]
        assert encoding.decode(prompt).startswith(begin)
    (tmp_path / "set.jsonl").write_text('{"question": "What is 2+2?", "answer": "4"}\n')
    words = [str(folder), "--data", str(tmp_path / "set.jsonl"), *FLOAT]
    capsys.readouterr()
    script_of(monkeypatch, words, b"\n")
    printed = capsys.readouterr().out
    assert printed.startswith("What is 2+2?\n") and printed.count("gold 4") == 2
