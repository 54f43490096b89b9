"""Weights in Hugging Face's format: read into our GPT, and written for transformers and vLLM.

    model = load_model("path/to/Qwen2.5-Math-1.5B")      # config.json and *.safetensors
    save_model(model, "out/mine")                        # the same format, with tokenizer files

Both need the package safetensors. The idea. Qwen2, Qwen2.5, Qwen3, Llama-3 and SmolLM2 are one
transformer with a few switches (model.py). Their files differ from ours in names alone: `NAMES` is
the whole map. Three of their matrices are one of ours (q, k and v; gate and up), stacked by rows.

What our GPT cannot represent exactly is refused, with the name of the field: other architectures,
sliding windows in use, quantised weights, other activations, other biases, other scalings of RoPE.
A model that loads and is slightly wrong would train, and cost its user a week.

Letters: N query heads, K key/value heads, C head size, D width.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from model import GPT, ModelConfig, rope_tables
from runtime.flags import BadInput, check_fields, is_a, read_json, reading

NAMES = {  # ours: theirs, in the order in which they are stacked; {} is the block's number
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),  # unless tied
    "blocks.{}.norm1.weight": ("model.layers.{}.input_layernorm.weight",),
    "blocks.{}.qkv.weight": tuple(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "blocks.{}.qkv.bias": tuple(f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"),
    "blocks.{}.q_norm.weight": ("model.layers.{}.self_attn.q_norm.weight",),
    "blocks.{}.k_norm.weight": ("model.layers.{}.self_attn.k_norm.weight",),
    "blocks.{}.out.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "blocks.{}.norm2.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "blocks.{}.gate_up.weight": (
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    "blocks.{}.down.weight": ("model.layers.{}.mlp.down_proj.weight",),
}
# model_type: architecture
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
FILES = "a Hugging Face model is a folder with config.json and *.safetensors"
MAX_END_TOKENS = 4  # of the sampler
# Files that save_model copies from the model's source, where they exist.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def library():
    """-> the package safetensors. Raises BadInput with the remedy where it is not installed."""
    try:
        import safetensors.torch

        return safetensors
    except ImportError:
        raise BadInput(
            "Hugging Face weights need the package safetensors: pip install safetensors"
        ) from None


# ---- config --------------------------------------------------------------------------------------


def refuse(path, field, value, reason):
    raise BadInput(f"{path}: {field} = {value!r} cannot be represented exactly: {reason}")


def read_config(folder):
    """-> ModelConfig of a folder, without its weights."""
    path = Path(folder) / "config.json"
    with reading(path):
        return our_config(read_json(path, FILES), path)


def our_config(theirs, path="config.json"):
    """config.json as a dict -> ModelConfig. Raises BadInput that names what cannot be represented.

    A field that is missing means what transformers takes for it.
    """
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        known = f"only {', '.join(FAMILIES)} (SmolLM2 is a llama) are this transformer"
        refuse(path, "model_type", kind, known)
    # Weights would load under each of these, and the model would compute something else.
    for field, allowed, reason in (
        ("hidden_act", "silu", "the MLP here is SwiGLU"),
        ("quantization_config", None, "weights must not be quantised"),
        ("use_sliding_window", False, "attention here reaches back to the first token"),
        ("attention_bias", False, "the output projection here has no bias"),
        ("mlp_bias", False, "the MLP here has no bias"),
    ):
        # null means "off" for the switches, and nothing for hidden_act
        if theirs.get(field, allowed) != allowed and (theirs[field] is not None or allowed):
            refuse(path, field, theirs[field], reason)
    ends = ids_of(theirs, "eos_token_id", path)
    if len(ends) > MAX_END_TOKENS:
        reason = f"the sampler knows at most {MAX_END_TOKENS} tokens that end a completion"
        refuse(path, "eos_token_id", theirs["eos_token_id"], reason)
    # Sizes, for which there is no default.
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    )
    optional = dict(
        num_key_value_heads=int,
        head_dim=int,
        tie_word_embeddings=bool,
        rope_parameters=dict,
        rope_scaling=dict,
        rope_theta=float,
        layer_types=list,
    )
    # null means the same as a missing field.
    given = {name: kind for name, kind in optional.items() if theirs.get(name) is not None}
    check_fields(theirs, dict.fromkeys(needed, int) | dict(rms_norm_eps=float) | given, path)
    if any(layer != "full_attention" for layer in theirs.get("layer_types") or ()):
        refuse(path, "layer_types", theirs["layer_types"], "every layer here attends to everything")
    width, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    if heads < 1 or ("head_dim" not in given and width % heads):
        reason = f"without head_dim it must divide hidden_size = {width}"
        refuse(path, "num_attention_heads", heads, reason)
    theta, scaling = rope_of(theirs, path)
    return ModelConfig(
        theirs["vocab_size"],
        width,
        theirs["num_hidden_layers"],
        heads,
        theirs["num_key_value_heads"] if "num_key_value_heads" in given else heads,
        theirs["head_dim"] if "head_dim" in given else width // heads,
        theirs["intermediate_size"],
        theirs["max_position_embeddings"],
        theta,
        float(theirs["rms_norm_eps"]),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied=bool(theirs.get("tie_word_embeddings")),
        rope_scaling=scaling,
        end_tokens=ends,
    )


def ids_of(theirs, field, path):
    """-> tuple of the token ids that a field names: one, a list of them, or none."""
    value = theirs.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_a(number, int) and number >= 0 for number in ids):
        raise BadInput(f"{path}: {field} = {value!r:.60} is not a token id, or a list of them")
    return tuple(ids)


def rope_of(theirs, path):
    """-> theta, and None or Llama-3's scaling: (factor, low frequency factor, high frequency
    factor, original context)."""
    # Newer files have all of RoPE in rope_parameters, older ones rope_scaling and rope_theta.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    given = [rope.get("rope_theta"), theirs.get("rope_theta")]
    theta = next((theta for theta in given if theta is not None), 10_000.0)
    if not is_a(theta, float):
        raise BadInput(f"{path}: rope_theta = {theta!r:.60} is not a number")
    part = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    if part not in (1, 1.0, None):
        refuse(path, "partial_rotary_factor", part, "RoPE here turns whole heads")
    if kind == "default":
        for name in rope.keys() - {"type", "rope_type", "rope_theta", "partial_rotary_factor"}:
            refuse(path, name, rope[name], "RoPE of the type default has no such field")
        return float(theta), None
    if kind != "llama3":
        refuse(path, "rope_type", kind, "of the scalings of RoPE only Llama-3's is known here")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    check_fields(rope, dict.fromkeys(names, float), f"{path}: RoPE's scaling")
    return float(theta), tuple(float(rope[name]) for name in names)


def their_config(config, dtype):
    """ModelConfig -> config.json of the family with these switches. Raises BadInput where no family
    has them."""
    if config.qkv_bias and config.qk_norm:
        raise BadInput(
            "no family of models has both q/k/v biases and q/k norms, so this one cannot be "
            "written for others"
        )
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if kind == "qwen2" and config.head_size * config.heads != config.width:
        raise BadInput(
            f"heads of a qwen2 have size width / heads = {config.width // config.heads}, not "
            f"{config.head_size}: no family is like this model"
        )
    scaling = None
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        scaling = dict(
            rope_type="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=int(original),
        )
    ends = list(config.end_tokens)
    return dict(
        architectures=[FAMILIES[kind]],
        model_type=kind,
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        intermediate_size=config.hidden,
        max_position_embeddings=config.context,
        rope_theta=config.rope_theta,
        rope_scaling=scaling,
        rms_norm_eps=config.norm_eps,
        hidden_act="silu",
        attention_bias=False,
        use_sliding_window=False,
        tie_word_embeddings=config.tied,
        eos_token_id=ends if len(ends) > 1 else ends[0] if ends else None,
        torch_dtype=str(dtype).removeprefix("torch."),
    )


# ---- tensors -------------------------------------------------------------------------------------


def pieces(name):
    """Our parameter's name -> the names of theirs that are stacked in it."""
    part = name.split(".")
    if part[0] == "blocks":
        # blocks.3.qkv.weight -> the entry blocks.{}.qkv.weight, filled with 3.
        pattern = ".".join(["blocks", "{}", *part[2:]])
        return [theirs.format(part[1]) for theirs in NAMES[pattern]]
    return list(NAMES[name])


def piece_rows(name, config):
    """-> rows of each stacked piece: [N * C, K * C, K * C] of qkv; None for a parameter that is one
    piece."""
    if ".qkv." in name:
        kv_rows = config.kv_heads * config.head_size
        return [config.heads * config.head_size, kv_rows, kv_rows]
    return [config.hidden, config.hidden] if ".gate_up." in name else None


class Shards:
    """The tensors of a folder, by name, whichever of its files they are in."""

    def __init__(self, folder):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            with reading(index):
                files = read_json(index, FILES)["weight_map"]
                self.file_of = {name: folder / file for name, file in files.items()}
        elif single.exists():
            # Without an index all tensors are in the one file.
            self.file_of = dict.fromkeys(self.open(single).keys(), single)
        else:
            raise BadInput(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json: only "
                "safetensors are read (other formats can run code); load it in transformers and "
                "save_pretrained it, which writes them"
            )
        self.folder = folder

    def open(self, path):
        try:
            return library().safe_open(path, "pt")
        except FileNotFoundError:
            raise BadInput(
                f"{path} is named in the index and not there: a shard is missing"
            ) from None
        except Exception as error:  # safetensors raises types of its own
            raise BadInput(f"{path} is damaged: {error}") from None

    def check(self, name, shape):
        """Raises BadInput unless there is a tensor of this name, of floats, of this shape. Reads
        the file's header only."""
        if name not in self.file_of:
            raise BadInput(f"{self.folder}: the tensor {name} is missing")
        path = self.file_of[name]
        file = self.open(path)
        if name not in file.keys():  # noqa: SIM118 - no dict
            raise BadInput(f"{path}: the tensor {name} is missing, which the index says is there")
        header = file.get_slice(name)
        if header.get_dtype() not in ("F32", "BF16", "F16"):
            raise BadInput(
                f"{path}: {name} is of type {header.get_dtype()}; weights are F32, BF16 or F16 here"
            )
        if tuple(header.get_shape()) != tuple(shape):
            raise BadInput(
                f"{path}: {name} has shape {tuple(header.get_shape())}, config.json asks for "
                f"{tuple(shape)}"
            )

    def read(self, name):
        """-> the tensor of a name. Raises BadInput for one with numbers that are not finite."""
        tensor = self.open(self.file_of[name]).get_tensor(name)
        if not tensor.isfinite().all():
            raise BadInput(
                f"{self.file_of[name]}: {name} holds numbers that are not finite: the file is "
                "damaged, or its training diverged"
            )
        return tensor


def load_model(folder, compute=torch.float32, device="cpu"):
    """-> GPT with the weights of a folder in Hugging Face's format, as fp32 masters.

    compute: dtype of activations. The model's `source` is the folder, for save_model. Raises
    BadInput for whatever is missing, damaged, of another shape, left over, or not representable.
    """
    library()  # is it installed? The answer comes before any work
    folder = Path(folder)
    config = read_config(folder)
    shards = Shards(folder)
    # On the meta device: no time for random weights, and no memory before the files are checked.
    with torch.device("meta"):
        model = GPT(config, compute)
    check_tensors(shards, model)
    model = model.to_empty(device=device)
    # to_empty leaves memory without contents. The tables are in no file, so they are computed
    # again.
    tables = rope_tables(config.context, config.head_size, config.rope_theta, config.rope_scaling)
    model.cos.copy_(tables[0])
    model.sin.copy_(tables[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # One parameter at a time, so there are never two copies of all weights. copy_ casts to
            # fp32.
            parameter.copy_(torch.cat([shards.read(piece) for piece in pieces(name)]))
    model.source = folder
    return model


def check_tensors(shards, model):
    """Raises BadInput unless the files hold exactly the tensors of the model."""
    used, config = set(), model.config
    for name, parameter in model.named_parameters():
        used |= set(pieces(name))
        for piece, rows in zip(pieces(name), piece_rows(name, config) or [len(parameter)]):
            shards.check(piece, (rows, *parameter.shape[1:]))
    # A tensor that is not used means another architecture. (inv_freq: RoPE's table in old files.)
    left = [name for name in shards.file_of if name not in used and not name.endswith("inv_freq")]
    if config.tied and "lm_head.weight" in left:
        left.remove("lm_head.weight")  # some files repeat the embeddings
        shards.check("lm_head.weight", model.head.weight.shape)
        head, embeddings = shards.read("lm_head.weight"), shards.read("model.embed_tokens.weight")
        if not torch.equal(head.float(), embeddings.float()):
            reason = "lm_head.weight is there and differs from the embeddings"
            refuse(shards.folder / "config.json", "tie_word_embeddings", True, reason)
    if left:
        raise BadInput(
            f"{shards.folder}: the tensor {left[0]} has no place in this transformer ({len(left)} "
            "such)"
        )


def save_model(model, folder, dtype=torch.bfloat16, weights=None):
    """Writes config.json and model.safetensors, and copies the tokenizer files of the model's
    source -> Path of the folder.

    dtype: of the weights on disk. weights: {name: full tensor} in place of the model's own, which
    FSDP may have sharded. Each file is moved into place when it is complete. Raises BadInput for a
    folder that holds a model in several files, because readers prefer those; OSError for a full
    disk.
    """
    folder, tensors = Path(folder), {}
    library()
    if (folder / "model.safetensors.index.json").exists():
        raise BadInput(
            f"{folder} holds a model in several files (model.safetensors.index.json): save to "
            "another folder"
        )
    for name, parameter in model.named_parameters():
        # One of our matrices is split into theirs by rows.
        stacked = (weights[name] if weights else parameter).detach().to("cpu", dtype)
        rows = piece_rows(name, model.config)
        parts = stacked.split(rows) if rows else [stacked]
        tensors |= {theirs: part.contiguous() for theirs, part in zip(pieces(name), parts)}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.tmp"
    try:
        library().torch.save_file(tensors, temporary, metadata=dict(format="pt"))
    except Exception as error:  # safetensors has a class of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{folder}/model.safetensors could not be written ({error}); the file that was there "
            "is intact"
        ) from None
    template = getattr(model, "prompt_template", None)  # prompts.open_tokenizer reads it again
    config = their_config(model.config, dtype) | dict(prompt_template=template)
    texts, source = {"config.json": config}, getattr(model, "source", None) or folder
    # generation_config.json overrules config.json's end tokens, so it must name the same ones.
    if (source / "generation_config.json").exists():
        theirs = read_json(source / "generation_config.json", FILES)
        texts["generation_config.json"] = theirs | dict(eos_token_id=config["eos_token_id"])
    copied = [name for name in COPIED if (source / name).exists()]
    # Saved into its own source, the tokenizer is there already.
    if source.resolve() == folder.resolve():
        copied = []
    for name in copied:
        shutil.copy(source / name, folder / f"{name}.tmp")
    for name, content in texts.items():
        (folder / f"{name}.tmp").write_text(json.dumps(content, indent=2) + "\n")
    # config.json comes last: a folder with it is a model.
    # Everything is written by now, so what is left is a few renames.
    for name in (*copied, *texts.keys() - {"config.json"}, "model.safetensors", "config.json"):
        os.replace(folder / f"{name}.tmp", folder / name)
    return folder
