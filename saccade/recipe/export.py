"""Our weights under Llama's names and back: what `AutoModelForCausalLM` loads.

Run `python -m saccade.recipe.export --checkpoint FILE --out DIR` to export a checkpoint of the trainer.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from saccade.nn import Transformer
from saccade.reader.books import DATA
from saccade.recipe.model import Shape

# ours -> Llama's; the rest of a name stays as it is
NAMES = (
    ("embed.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".layer.", ".self_attn."),
    (".layer_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
)


def llama_name(name: str) -> str:
    """The name that Llama gives one of our weights.

    Example:
        >>> llama_name("blocks.3.layer.q_proj.weight"), llama_name("norm.weight")
        ('model.layers.3.self_attn.q_proj.weight', 'model.norm.weight')
    """
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return f"model.{name}" if name.startswith("norm.") else name


def config(shape: Shape) -> dict:
    """What `config.json` says of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.length,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def shape_of(folder: str | Path) -> Shape:
    """The shape that a folder's `config.json` describes."""
    said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return Shape(
        vocab=said["vocab_size"],
        width=said["hidden_size"],
        layers=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        kv_heads=said["num_key_value_heads"],
        head_dim=said["head_dim"],
        mlp_width=said["intermediate_size"],
        rope_base=said["rope_parameters"]["rope_theta"],
        length=said["max_position_embeddings"],
    )


def write(model: Transformer, shape: Shape, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write model.safetensors, config.json, generation_config.json and the bundled tokenizer's files.

    Args:
        model: weights to write.
        shape: its shape.
        folder: where to.
        dtype: of the weights in the file.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {
        llama_name(name): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    for name, content in (("config.json", config(shape)), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if folder.resolve() != DATA.resolve():
            shutil.copyfile(DATA / name, folder / name)


def read(folder: str | Path, device: str = "cpu") -> Transformer:
    """An exported folder as a `saccade.nn.Transformer`, float32."""
    from safetensors.torch import load_file

    model = shape_of(folder).build()
    weights = load_file(Path(folder) / "model.safetensors")
    ours = {name: weights[llama_name(name)].float() for name in model.state_dict() if name != "head.weight"}
    ours["head.weight"] = ours["embed.weight"]
    model.load_state_dict(ours)
    return model.to(device).eval()


@torch.no_grad()
def difference(folder: str | Path, length: int = 256) -> float:
    """The largest difference between the logits of our model and of `LlamaForCausalLM`, both float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    ours = read(folder)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()
    ids = torch.randint(3, ours.embed.num_embeddings, (2, length), generator=torch.Generator().manual_seed(0))
    return (ours(ids).y - theirs(ids).logits).abs().max().item()


def main() -> None:
    """Export a checkpoint of the trainer and compare it with transformers."""
    parser = argparse.ArgumentParser(description="export the reader")
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of the trainer")
    parser.add_argument("--out", default=str(DATA), help="folder to write to (the package data)")
    args = parser.parse_args()
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    shape = Shape(**saved["shape"])
    model = shape.build()
    model.load_state_dict(saved["model"])
    write(model, shape, args.out)
    print(f"logits differ from LlamaForCausalLM by at most {difference(args.out):.2e}")


if __name__ == "__main__":
    main()
