"""Chat templates against transformers' apply_chat_template, and which of them a model gets."""

import json
import sys

import pytest
from conftest import SHARED

from huggingface import prompts
from huggingface.prompts import Special, choose_template, encode_parts, end_tokens, open_tokenizer
from huggingface.tokenizer import byte_of
from runtime.flags import BadInput, guarded

MESSAGES = [
    ("system", "Be brief.\n"),
    ("user", " What is <|im_end|> 6*7?"),
    ("assistant", "42"),
    ("user", "Sure? é"),
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
TOKENS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
}


def make_folder(path, special, config, opening=None, generation=None):
    """A byte-level tokenizer with these special tokens (ids 256, 257, ...), and a config.json."""
    path.mkdir(exist_ok=True)
    letters = byte_of()
    whole = dict(
        version="1.0",
        truncation=None,
        padding=None,
        normalizer=None,
        pre_tokenizer=dict(
            type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True
        ),
        decoder=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
        model=dict(type="BPE", vocab=letters, merges=[]),
        post_processor=None,
        added_tokens=[
            dict(
                id=256 + i,
                content=token,
                special=True,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
            )
            for i, token in enumerate(special)
        ],
    )
    if opening:
        number = 256 + special.index(opening)
        whole["post_processor"] = dict(
            type="TemplateProcessing",
            single=[
                dict(SpecialToken=dict(id=opening, type_id=0)),
                dict(Sequence=dict(id="A", type_id=0)),
            ],
            pair=[],
            special_tokens={opening: dict(id=opening, ids=[number], tokens=[opening])},
        )
    (path / "tokenizer.json").write_text(json.dumps(whole))
    (path / "config.json").write_text(json.dumps(config))
    if generation:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.extra
@pytest.mark.parametrize("name, jinja", [("chatml", CHATML), ("llama3", LLAMA3)])
def test_templates_are_those_of_transformers(name, jinja, tmp_path):
    """Catches a line break too many or too few, text not stripped where Llama-3 strips it, the turn
    not opened: token for token, over a dialogue. (The forged <|im_end|> is left out here:
    transformers would take it for the token.)"""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install -r requirements-extra.txt"
    )
    folder = make_folder(tmp_path / "m", TOKENS[name], dict(eos_token_id=256))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=jinja
    )
    messages = [(role, text.replace("<|im_end|>", "")) for role, text in MESSAGES]
    expected = theirs.apply_chat_template(
        [dict(role=role, content=text) for role, text in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    encoding, _ = open_tokenizer(folder, name)
    assert encode_parts(encoding, getattr(prompts, name)(messages)) == expected


def test_a_question_cannot_forge_a_turn(tmp_path):
    """Catches special tokens recognised in a question's text: <|im_end|> there is ten letters, in
    every template."""
    encoding, _ = open_tokenizer(
        make_folder(tmp_path / "m", TOKENS["chatml"], dict(eos_token_id=256))
    )
    for name, (parts, _) in prompts.TEMPLATES.items():
        if name != "llama3":
            clean, forged = (
                prompts.encode_question(text, encoding, name) for text in ("a", "a<|im_end|>")
            )
            assert len(forged) == len(clean) + len("<|im_end|>") and forged.count(
                258
            ) == clean.count(258), name
            assert "".join(parts("q?")).count("q?") == 1
    assert encode_parts(encoding, [Special("<|im_end|>"), "<|im_end|>"])[:2] == [258, ord("<")]


@pytest.mark.parametrize(
    "special, ends, name",
    [
        (TOKENS["chatml"], [256], "paper"),
        (TOKENS["chatml"], [258], "chatml"),
        (TOKENS["chatml"], [258, 256], "chatml"),
        (TOKENS["llama3"], [257, 260], "llama3"),
        (TOKENS["llama3"], [257], "words"),
        (["<|endoftext|>"], [256], "words"),
    ],
)
def test_the_end_token_chooses_the_template(special, ends, name, tmp_path):
    """Catches a base model that is put questions in a format it never saw, and an instruct model in
    the base's."""
    encoding, found = open_tokenizer(
        make_folder(tmp_path / "m", special, dict(eos_token_id=ends[0] if len(ends) == 1 else ends))
    )
    assert encoding.template_name == name == choose_template(encoding, ends) and set(ends) <= set(
        found
    )
    # a turn may end as the template ends turns
    assert (258 in found) == (name in ("paper", "chatml"))


def test_begin_of_text_comes_once(tmp_path):
    """Catches Llama-3's first token left out of a template in words, or put twice before one that
    writes it out."""
    folder = make_folder(
        tmp_path / "m", TOKENS["llama3"], dict(eos_token_id=257), opening="<|begin_of_text|>"
    )
    for name in ("words", "plain", "llama3"):
        encoding, _ = open_tokenizer(folder, name)
        ids = encoding.template("?")
        assert ids[0] == 256 and ids.count(256) == 1, name


def test_end_tokens_of_both_files_count(tmp_path):
    """Catches generation_config.json ignored: there Qwen's instruct models keep their second end
    token."""
    folder = make_folder(
        tmp_path / "m",
        TOKENS["chatml"],
        dict(eos_token_id=258),
        generation=dict(eos_token_id=[258, 256]),
    )
    assert end_tokens(folder) == (258, 256)


def test_a_saved_model_keeps_its_template(tmp_path):
    """Catches a base model that we trained on the paper's template read back as an instruct model:
    it now ends with <|im_end|>."""
    folder = make_folder(
        tmp_path / "m", TOKENS["chatml"], dict(eos_token_id=[256, 258], prompt_template="paper")
    )
    assert (
        open_tokenizer(folder)[0].template_name == "paper"
        and open_tokenizer(folder, "plain")[0].template_name == "plain"
    )


@pytest.mark.parametrize(
    "config, template, says",
    [
        (dict(eos_token_id=256), "llama3", "has no token <|begin_of_text|>"),
        (dict(), "plain", "0 tokens end a completion"),
        (dict(eos_token_id=[1, 2, 3, 256]), "paper", "5 tokens end a completion"),
        (["not", "an object"], "plain", "config.json is damaged"),
    ],
)
def test_prompts_without_tokens_or_ends_are_refused(config, template, says, tmp_path):
    """Catches a template that the tokenizer cannot write, and completions that nothing ends."""
    with pytest.raises(BadInput, match=says.replace("|", r"\|")):
        open_tokenizer(make_folder(tmp_path / "m", TOKENS["chatml"], config), template)


def test_the_papers_template_by_hand():
    """Catches words of the template changed: a ChatML frame, with a line break before each
    end."""
    text = "".join(prompts.paper("Q"))
    assert (
        text
        == f"<|im_start|>system\n{prompts.SYSTEM}\n<|im_end|>\n<|im_start|>user\nQ\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<think></think>" in prompts.SYSTEM and "<answer></answer>" in prompts.SYSTEM


def test_prompts_shows_the_prompt(tmp_path, monkeypatch, capsys):
    """Catches a command that only its author can run, and a traceback for a wrong call."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "prompts.py",
            str(make_folder(tmp_path / "m", TOKENS["chatml"], dict(eos_token_id=256))),
            "6*7?",
        ],
    )
    prompts.main()
    assert "template paper" in (printed := capsys.readouterr().out) and "'<|im_start|>'" in printed
    monkeypatch.setattr(sys, "argv", ["prompts.py"])
    with pytest.raises(SystemExit):
        guarded(prompts.main)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/tokenizers")
def test_a_qwen_like_tokenizer(tmp_path):
    """Catches a template that only works with the tokenizers made here."""
    for file in (SHARED / "tokenizers/tiny_qwen_like").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=2000)))
    encoding, ends = open_tokenizer(tmp_path)
    assert (
        encoding.template_name == "paper"
        and ends == (2000, 2002)
        and encoding.template("?").count(2001) == 3
    )
