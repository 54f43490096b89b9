"""Hugging Face weights, read and written: against transformers itself, on random tiny checkpoints
of every family."""

import json

import pytest
import torch

from huggingface import weights
from huggingface.weights import load_model, save_model
from model import GPT, ModelConfig
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.flags import BadInput
from sample import Sampler

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r requirements-extra.txt"
)
pytestmark = pytest.mark.extra
SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    eos_token_id=96,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {  # name: class of the model, what its config adds
    "qwen2": (
        "Qwen2",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0),
        ),
    ),
    "qwen2, untied": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True, head_dim=32)),
    "llama3": ("Llama", dict(tie_word_embeddings=False, rope_parameters=LLAMA3)),
    "smollm2": (
        "Llama",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=100_000.0),
        ),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request, tmp_path_factory):
    """-> (folder, model of transformers) with random weights; norms and biases too, which are ones
    and zeros when new."""
    name, more = FAMILIES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SHAPE, **more)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder, model


def logits_of(gpt, tokens):
    with torch.no_grad():
        return gpt(tokens) @ gpt.head.weight.T


def test_logits_are_theirs(theirs):
    """Catches a matrix in another's place, a bias or norm left out, another theta, RoPE unscaled:
    fp32 logits within 1e-4 of transformers', beyond the original context too."""
    folder, model = theirs
    gpt, tokens = (
        load_model(folder),
        torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        torch.testing.assert_close(logits_of(gpt, tokens), model(tokens).logits, atol=1e-4, rtol=0)
    assert gpt.config.end_tokens == (96,) and all(
        p.dtype == torch.float32 for p in gpt.parameters()
    )


def test_sampled_log_probabilities_are_theirs(theirs):
    """Catches the same in the cached path: what our sampler says of its tokens is what transformers
    says of them."""
    folder, model = theirs
    c = Sampler(load_model(folder)).generate([[1, 2, 3], [4, 5]], 3, 40, seed=0)
    for i, sampled in enumerate(c.sampled):
        prompt = c.prompts[i // c.n]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + sampled])).logits[0].log_softmax(-1)
        expected = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(sampled)[:, None])[:, 0]
        torch.testing.assert_close(c.logprobs[i, : len(sampled)], expected, atol=1e-4, rtol=0)


def test_saved_models_load_in_transformers(theirs, tmp_path):
    """Catches a file that only we can read: written by us, loaded by transformers, the logits are
    the first ones; tokenizer files come along."""
    folder, model = theirs
    gpt = load_model(folder)
    out = save_model(gpt, tmp_path / "mine", torch.float32)
    back = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)
    assert (
        type(back) is type(model)
        and (out / "tokenizer.json").exists()
        and {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}
    )
    torch.testing.assert_close(
        logits_of(load_model(out), tokens), logits_of(gpt, tokens), atol=0, rtol=0
    )


def test_sharded_files_and_checkpoints_give_the_same_logits(theirs, tmp_path):
    """Catches a reader of one file only, and a checkpoint of ours that forgets RoPE's scaling."""
    folder, model = theirs
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    whole, sharded = load_model(folder), load_model(tmp_path / "shards")
    save_checkpoint(tmp_path / "ours.pt", whole)
    tokens = torch.arange(90)[None]
    for other in (sharded, load_checkpoint(tmp_path / "ours.pt")[0]):
        assert torch.equal(logits_of(other, tokens), logits_of(whole, tokens))
    with pytest.raises(BadInput, match="several files"):
        save_model(whole, tmp_path / "shards")


def edited(theirs, tmp_path, **fields):
    """A copy of the folder whose config.json says something else."""
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in theirs[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(model_type="mamba"), "model_type = 'mamba'"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(rope_parameters=dict(rope_type="yarn")), "rope_type = 'yarn'"),
        (
            dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
            "partial_rotary_factor",
        ),
        (dict(hidden_size=32, head_dim=16), "config.json asks for"),
        (dict(num_hidden_layers=4), "is missing"),
        (dict(num_hidden_layers=2), "has no place"),
    ],
)
@pytest.mark.parametrize("theirs", ["smollm2"], indirect=True)
def test_configs_that_cannot_be_represented_are_refused(theirs, tmp_path, fields, says):
    """Catches a model that loads and is slightly wrong."""
    with pytest.raises(BadInput, match=says):
        load_model(edited(theirs, tmp_path, **fields))


@pytest.mark.parametrize("theirs", ["qwen2"], indirect=True)
def test_missing_and_damaged_files_are_named(theirs, tmp_path):
    """Catches a traceback for a folder that is not there, a file cut short, other formats, and JSON
    that is damaged or of another shape."""
    with pytest.raises(BadInput, match=r"config\.json: there is no such file"):
        load_model(tmp_path / "nowhere")
    folder = edited(theirs, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(BadInput, match="is damaged"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="only safetensors"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadInput, match=r"index\.json is damaged"):
        load_model(folder)
    for text, says in (
        ("{", "is not JSON"),
        ("[]", r"config\.json"),
        ('{"model_type": "qwen2", "vocab_size": "wide"}', "vocab_size = 'wide' is not"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(BadInput, match=says):
            load_model(folder)


def test_models_of_no_family_are_not_saved(tmp_path):
    """Catches a checkpoint that transformers loads and computes otherwise."""
    for switches, says in (
        (dict(qkv_bias=True, qk_norm=True), "no family"),
        (dict(qkv_bias=True, head_size=8), "no family"),
    ):
        with pytest.raises(BadInput, match=says):
            config = ModelConfig(97, 64, 2, 4, 2, **dict(head_size=16, hidden=96) | switches)
            save_model(GPT(config), tmp_path / "x")
    assert weights.their_config(ModelConfig(97), torch.float32)["model_type"] == "llama"


@pytest.mark.parametrize("theirs", ["llama3"], indirect=True)
def test_a_tied_head_must_repeat_the_embeddings(theirs, tmp_path):
    """Catches a checkpoint that says "tied" and has another head: transformers would use it, so we
    must not drop it. A head that repeats the embeddings is fine."""
    from safetensors.torch import load_file, save_file

    folder = edited(theirs, tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    for factor in (1, 1.1):
        tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
        if factor == 1:
            assert load_model(folder).config.tied
    with pytest.raises(BadInput, match="tie_word_embeddings = True"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("model.norm.weight", lambda x: x.long(), "is of type I64"),
        ("model.norm.weight", lambda x: x.bool(), "is of type BOOL"),
        ("model.norm.weight", lambda x: x.to(torch.float8_e4m3fn), "is of type F8_E4M3"),
        ("model.norm.weight", lambda x: x.to(torch.complex64), "is of type C64"),
        ("model.norm.weight", lambda x: x.double(), "is of type F64"),
        ("model.norm.weight", lambda x: x * float("nan"), "not finite"),
        ("model.norm.weight", lambda x: x / 0, "not finite"),
        ("model.norm.weight", lambda x: x[0].clone(), "has shape ()"),
        ("model.norm.weight", lambda x: x[:-1].clone(), "has shape (63,)"),
        ("model.norm.weight", lambda x: x[None].clone(), "has shape (1, 64)"),
        (
            "model.layers.1.self_attn.k_proj.weight",
            lambda x: x[:, :-1].clone(),
            "has shape (32, 63)",
        ),
        ("model.layers.1.self_attn.k_proj.weight", lambda x: x[0].clone(), "has shape (64,)"),
        ("model.layers.1.self_attn.k_proj.weight", lambda x: x[0, 0].clone(), "has shape ()"),
        ("model.layers.2.mlp.up_proj.weight", lambda x: torch.cat([x, x]), "has shape (192, 64)"),
        ("model.embed_tokens.weight", lambda x: x.T.contiguous(), "has shape (64, 97)"),
    ],
)
@pytest.mark.parametrize("theirs", ["qwen2"], indirect=True)
def test_tensors_of_wrong_type_shape_or_value_are_refused(theirs, tmp_path, name, change, says):
    """Catches integers, booleans, complex and 8-bit numbers, NaN and infinity that load without a
    word, and a traceback for other shapes."""
    from safetensors.torch import load_file, save_file

    folder = edited(theirs, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name: change(tensors[name])},
        folder / "model.safetensors",
        metadata=dict(format="pt"),
    )
    with pytest.raises(BadInput) as error:
        load_model(folder)
    assert (
        says in str(error.value)
        and name in str(error.value)
        and "model.safetensors" in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("theirs", ["qwen2"], indirect=True)
def test_wrong_indices_of_shards_are_refused(theirs, tmp_path):
    """Catches a traceback for an index that is no index, names a tensor that its file lacks, or a
    file that is none."""
    theirs[1].save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    index = tmp_path / "shards/model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name, files = "model.norm.weight", sorted(set(whole["weight_map"].values()))
    elsewhere = next(file for file in files if file != whole["weight_map"][name])
    for content, says in (
        (dict(weight_map=[]), "index.json is damaged"),
        (dict(weight_map=dict.fromkeys(whole["weight_map"], 3)), "index.json is damaged"),
        (dict(weight_map=whole["weight_map"] | {name: elsewhere}), f"{name} is missing"),
        (dict(weight_map=whole["weight_map"] | {name: "nowhere"}), "a shard is missing"),
        (dict(weight_map=whole["weight_map"] | {name: "."}), "is damaged"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(BadInput, match=says):
            load_model(tmp_path / "shards")
