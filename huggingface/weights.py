"""Weights in Hugging Face's format: read into our GPT, and written back for transformers, vLLM and
everybody else.

    model = GPT.from_pretrained("path/to/Qwen2.5-Math-1.5B")      # a folder with config.json and
                                                                  *.safetensors; needs `safetensors`
    model.save_pretrained("out/mine")                             # the same format, tokenizer files
                                                                  copied along

The idea. Qwen2, Qwen2.5, Qwen3, Llama-3 and SmolLM2 are one transformer with a few switches
(model.py), and their files differ from ours in names alone: `NAMES` below is the whole map. Three
of their matrices are one of ours (q, k and v; gate and up), one under the other.

What our GPT cannot represent EXACTLY is refused, with the name of the field: other architectures,
sliding windows in use, quantised weights, other activations, biases we have not, scalings of RoPE
that we lack. A model that loads and is slightly wrong would train, and cost its user a week.

Letters: L layers, N query heads, K key/value heads, C head size, D width.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from model import GPT, ModelConfig, rope_tables
from runtime.flags import BadInput, check_fields, is_a, read_json, reading

NAMES = {  # ours: theirs, in the order in which they are stacked; {} is the layer
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
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)  # files that go along, where they exist


def library():
    """safetensors, or BadInput that says how to get it."""
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


def our_config(theirs, path="config.json"):
    """config.json as a dict -> ModelConfig. BadInput names what cannot be represented."""
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        refuse(
            path,
            "model_type",
            kind,
            f"only {', '.join(FAMILIES)} (SmolLM2 is a llama) are this transformer",
        )
    for field, allowed, reason in (
        ("hidden_act", "silu", "the MLP here is SwiGLU"),
        ("quantization_config", None, "weights must not be quantised"),
        ("use_sliding_window", False, "attention here reaches back to the first token"),
        ("attention_bias", False, "the output projection here has no bias"),
        ("mlp_bias", False, "the MLP here has no bias"),
    ):
        if theirs.get(field, allowed) != allowed and (theirs[field] is not None or allowed):
            refuse(path, field, theirs[field], reason)
    ends = ids_of(theirs, "eos_token_id", path)
    if len(ends) > 4:
        refuse(
            path,
            "eos_token_id",
            theirs["eos_token_id"],
            "the sampler knows at most 4 tokens that end a completion",
        )
    needed = dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ),
        int,
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
    given = {name: kind for name, kind in optional.items() if theirs.get(name) is not None}
    check_fields(theirs, needed | dict(rms_norm_eps=float) | given, path)
    if any(layer != "full_attention" for layer in theirs.get("layer_types") or ()):
        refuse(path, "layer_types", theirs["layer_types"], "every layer here attends to everything")
    width, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    if heads < 1 or ("head_dim" not in given and width % heads):
        refuse(
            path,
            "num_attention_heads",
            heads,
            f"without head_dim it must divide hidden_size = {width}",
        )
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
    """The token ids that a field names: one, a list of them, or none -> tuple."""
    found = theirs.get(field)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(is_a(number, int) and number >= 0 for number in ids):
        raise BadInput(f"{path}: {field} = {found!r:.60} is not a token id, or a list of them")
    return tuple(ids)


def rope_of(theirs, path):
    """-> theta, None or Llama-3's (factor, low frequency factor, high frequency factor, original
    context)."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = next(
        (
            theta
            for theta in (rope.get("rope_theta"), theirs.get("rope_theta"))
            if theta is not None
        ),
        10_000.0,
    )
    if not is_a(theta, float):
        raise BadInput(f"{path}: rope_theta = {theta!r:.60} is not a number")
    if rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)) not in (
        1,
        1.0,
        None,
    ):
        refuse(
            path,
            "partial_rotary_factor",
            rope.get("partial_rotary_factor"),
            "RoPE here turns whole heads",
        )
    if kind == "default":
        for name in rope.keys() - {"type", "rope_type", "rope_theta", "partial_rotary_factor"}:
            refuse(path, name, rope[name], "RoPE of the type default has no such field")
        return float(theta), None
    if kind != "llama3":
        refuse(path, "rope_type", kind, "of the scalings of RoPE only Llama-3's is known here")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    check_fields(rope, dict.fromkeys(names, float), f"{path}: RoPE's scaling")
    return float(theta), tuple(float(rope[name]) for name in names)


def their_config(c, dtype):
    """ModelConfig -> config.json of the family that has these switches. BadInput where none has."""
    if c.qkv_bias and c.qk_norm:
        raise BadInput(
            "no family of models has both q/k/v biases and q/k norms, so this one cannot be "
            "written for others"
        )
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if kind == "qwen2" and c.head_size * c.heads != c.width:
        raise BadInput(
            f"heads of a qwen2 have size width / heads = {c.width // c.heads}, not {c.head_size}: "
            "no family is like this model"
        )
    scaling = dict(
        zip(
            ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            c.rope_scaling or (),
        )
    )
    if scaling:
        scaling |= dict(rope_type="llama3", original_max_position_embeddings=int(c.rope_scaling[3]))
    return dict(
        architectures=[FAMILIES[kind]],
        model_type=kind,
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_size,
        intermediate_size=c.hidden,
        max_position_embeddings=c.context,
        rope_theta=c.rope_theta,
        rope_scaling=scaling or None,
        rms_norm_eps=c.norm_eps,
        hidden_act="silu",
        attention_bias=False,
        use_sliding_window=False,
        tie_word_embeddings=c.tied,
        eos_token_id=(list(c.end_tokens) if len(c.end_tokens) > 1 else c.end_tokens[0])
        if c.end_tokens
        else None,
        torch_dtype=str(dtype).removeprefix("torch."),
    )


# ---- tensors -------------------------------------------------------------------------------------


def pieces(name):
    """Our parameter's name -> the names of theirs that are stacked in it."""
    part = name.split(".")
    layer, pattern = (
        (part[1], ".".join(["blocks", "{}", *part[2:]])) if part[0] == "blocks" else ("", name)
    )
    return [theirs.format(layer) for theirs in NAMES[pattern]]


def sizes(name, config):
    """How many rows each of the stacked pieces has; None for a single one."""
    if ".qkv." in name:
        return [
            config.heads * config.head_size,
            config.kv_heads * config.head_size,
            config.kv_heads * config.head_size,
        ]
    return [config.hidden, config.hidden] if ".gate_up." in name else None


class Shards:
    """The tensors of a folder, by name, whichever of its files they are in."""

    def __init__(self, folder):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            with reading(index):
                self.file_of = {
                    name: folder / file
                    for name, file in read_json(index, FILES)["weight_map"].items()
                }
        elif (folder / "model.safetensors").exists():
            self.file_of = dict.fromkeys(
                self.open(folder / "model.safetensors").keys(), folder / "model.safetensors"
            )
        else:
            raise BadInput(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json: only "
                "safetensors are read (other "
                "formats can run code); load it in transformers and save_pretrained it, which "
                "writes them"
            )
        self.folder = folder

    def open(self, path):
        try:
            return library().safe_open(path, "pt")
        except FileNotFoundError:
            raise BadInput(
                f"{path} is named in the index and not there: a shard is missing"
            ) from None
        except Exception as error:
            raise BadInput(f"{path} is damaged: {error}") from None

    def look(self, name, shape):
        """BadInput unless there is a tensor of this name, of floats, of this shape. Reads no
        numbers."""
        if name not in self.file_of:
            raise BadInput(f"{self.folder}: the tensor {name} is missing")
        file = self.open(self.file_of[name])
        if name not in file.keys():  # noqa: SIM118 - no dict
            raise BadInput(
                f"{self.file_of[name]}: the tensor {name} is missing, which the index says is there"
            )
        found = file.get_slice(name)
        if found.get_dtype() not in ("F32", "BF16", "F16"):
            raise BadInput(
                f"{self.file_of[name]}: {name} is of type {found.get_dtype()}; weights are F32, "
                "BF16 or F16 here"
            )
        if tuple(found.get_shape()) != tuple(shape):
            raise BadInput(
                f"{self.file_of[name]}: {name} has shape {tuple(found.get_shape())}, config.json "
                f"asks for {tuple(shape)}"
            )

    def get(self, name):
        """The tensor of a name. BadInput for one with numbers that are not finite."""
        found = self.open(self.file_of[name]).get_tensor(name)
        if not found.isfinite().all():
            raise BadInput(
                f"{self.file_of[name]}: {name} holds numbers that are not finite: the file is "
                "damaged, or its training diverged"
            )
        return found


def read_config(folder):
    """ModelConfig of a folder, without its weights."""
    path = Path(folder) / "config.json"
    with reading(path):
        return our_config(read_json(path, FILES), path)


def from_pretrained(folder, compute=torch.float32, device="cpu"):
    """-> GPT with the weights of a folder in Hugging Face's format, as fp32 masters; `source`
    remembers the folder.

    BadInput for whatever is missing, damaged, of another shape, left over, or not representable.
    """
    folder, _ = Path(folder), library()
    config = read_config(folder)
    shards = Shards(folder)
    # no time for random weights, and no memory before the files are looked at
    with torch.device("meta"):
        model = GPT(config, compute)
    used = set()
    for name, parameter in model.named_parameters():
        used |= set(pieces(name))
        for piece, rows in zip(pieces(name), sizes(name, config) or [len(parameter)]):
            shards.look(piece, (rows, *parameter.shape[1:]))
    left = [name for name in shards.file_of if name not in used and not name.endswith("inv_freq")]
    if config.tied and "lm_head.weight" in left:
        left.remove("lm_head.weight")  # some files repeat the embeddings
        shards.look("lm_head.weight", model.head.weight.shape)
        if not torch.equal(
            shards.get("lm_head.weight").float(), shards.get("model.embed_tokens.weight").float()
        ):
            refuse(
                folder / "config.json",
                "tie_word_embeddings",
                True,
                "lm_head.weight is there and differs from the embeddings",
            )
    if left:
        raise BadInput(
            f"{folder}: the tensor {left[0]} has no place in this transformer ({len(left)} such)"
        )
    model = model.to_empty(device=device)
    for mine, table in zip(
        (model.cos, model.sin),
        rope_tables(config.context, config.head_size, config.rope_theta, config.rope_scaling),
    ):
        mine.copy_(table)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([shards.get(piece) for piece in pieces(name)]))
    model.source = folder
    return model


def save_pretrained(model, folder, dtype=torch.bfloat16, weights=None):
    """Writes config.json and model.safetensors to `folder`, tokenizer files of the model's source
    beside them -> Path.

    dtype: of the weights on disk. weights: {name: tensor} in place of the model's own, which may be
    in slices. The files are complete or not there: each is moved into place when it is written.
    BadInput for a folder that holds a model in several files, which would be read in place of what
    is written.
    """
    library()
    folder, tensors = Path(folder), {}
    if (folder / "model.safetensors.index.json").exists():
        raise BadInput(
            f"{folder} holds a model in several files (model.safetensors.index.json): save to "
            "another folder"
        )
    for name, parameter in model.named_parameters():
        parts = (weights[name] if weights else parameter).detach().to("cpu", dtype)
        parts = parts.split(sizes(name, model.config)) if sizes(name, model.config) else [parts]
        tensors |= {theirs: part.contiguous() for theirs, part in zip(pieces(name), parts)}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        library().torch.save_file(
            tensors, folder / "model.safetensors.tmp", metadata=dict(format="pt")
        )
    except Exception as error:  # safetensors has a class of its own for a full disk
        (folder / "model.safetensors.tmp").unlink(missing_ok=True)
        raise OSError(
            f"{folder}/model.safetensors could not be written ({error}); what was there before is "
            "intact"
        ) from None
    config = their_config(model.config, dtype) | dict(
        prompt_template=getattr(model, "prompt_template", None)
    )
    texts, source = {"config.json": config}, getattr(model, "source", None) or folder
    # its end tokens come before config.json's where both are read
    if (source / "generation_config.json").exists():
        texts["generation_config.json"] = read_json(
            source / "generation_config.json", FILES
        ) | dict(eos_token_id=config["eos_token_id"])
    copied = [
        name for name in COPIED if source.resolve() != folder.resolve() and (source / name).exists()
    ]
    for name in copied:
        shutil.copy(source / name, folder / f"{name}.tmp")
    for name, content in texts.items():
        (folder / f"{name}.tmp").write_text(json.dumps(content, indent=2) + "\n")
    # with which a model is there
    for name in (*copied, *texts.keys() - {"config.json"}, "model.safetensors", "config.json"):
        os.replace(folder / f"{name}.tmp", folder / name)
    return folder
