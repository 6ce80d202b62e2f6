#!/usr/bin/env python3
"""Writes the tensors inside a Gemma 3 checkpoint, as transformers computes them, for conform layers.
usage: dump_layers.py CHECKPOINT IDS DIR [float32|float64|bfloat16] [LABELS]

CHECKPOINT: a folder or name that transformers knows, or a GGUF file; IDS: a file of token ids; DIR gets
a .npy [tokens][width] for each, under llama.cpp's labels (l_out-7.npy). LABELS: as l_out,result_output, or
all. Needs torch, transformers and numpy, and gguf for a GGUF file.
"""
import os
import sys

import numpy as np
import torch

OUTPUTS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "Qcur_raw", "self_attn.k_proj": "Kcur_raw",
           "self_attn.v_proj": "Vcur", "self_attn.q_norm": "Qcur_normed", "self_attn.k_norm": "Kcur_normed",
           "self_attn": "attn_out", "post_attention_layernorm": "attn_post_norm",
           "pre_feedforward_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
           "mlp": "ffn_out", "post_feedforward_layernorm": "ffn_post_norm", "": "l_out"}
INPUTS = {"self_attn.o_proj": "kqv_out", "pre_feedforward_layernorm": "sa_out", "mlp.down_proj": "ffn_geglu"}


def load(path, dtype):
    if path.endswith(".gguf"):
        import make_fixtures
        return make_fixtures.load(path, dtype)
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def main(path, ids, folder, dtype="float32", labels=""):
    model = load(path, getattr(torch, dtype))
    text = next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))
    os.makedirs(folder, exist_ok=True)

    def save(label, x):
        x = x[0] if isinstance(x, tuple) else x
        if x.dim() == 4:  # heads come before positions
            x = x.transpose(1, 2)
        if not labels or label in labels.split(",") or label.split("-")[0] in labels.split(","):
            x = x.reshape(x.shape[0], -1, int(np.prod(x.shape[2:])))[0]
            np.save(os.path.join(folder, label + ".npy"), x.float().numpy())
    def after(m, label):
        m.register_forward_hook(lambda m, a, y: save(label, y))

    for l, layer in enumerate(text.layers):
        for name, label in OUTPUTS.items():
            after(layer.get_submodule(name), f"{label}-{l}")
        for name, label in INPUTS.items():
            layer.get_submodule(name).register_forward_pre_hook(
                lambda m, a, k=f"{label}-{l}": save(k, a[0]))
    after(text.embed_tokens, "inp_scaled")
    after(text.norm, "result_norm")
    with torch.inference_mode():
        out = model(torch.tensor([[int(x) for x in open(ids).read().split()]]), use_cache=False)
    save("result_output", out.logits)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else sys.exit(__doc__)
