#!/usr/bin/env python3
"""Makes what test/conform.t compares from transformers with known mistakes patched into it, in
test/vectors. Needs torch, transformers, gguf and numpy, and the real model in weights/.

mistakes.f32: rows of float32 logits for the models in test/data; mistakes.txt has a line for each
mistake: its names (as in test/mistakes.c, separated by +), the model, and the positions whose rows follow
one another. bf16*.npy: every third position of tiny in bf16, without and with a mistake, as bf16.
f16-clamp.jsonl: the real model, its activations clamped to float16, as a server tells it.
"""
import functools
import json
import os
import sys

import numpy as np
import torch
from transformers.models.gemma3 import modeling_gemma3 as G

import make_fixtures as F

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vectors")
ROPE = {"global": "full_attention", "local": "sliding_attention"}


class Change:
    """What a mistake may change: the config before the model is made, the model, classes of
    transformers while it runs, ids, rows, and the bytes of quantised tensors."""

    def __init__(self):
        self.config, self.model, self.patches = [], [], []
        self.bos = self.late = 0
        self.blocks = None
        self.head = 1


def rope(kind, **values):
    return lambda m: m.config.append(lambda c: c.rope_parameters[ROPE[kind]].update(values))


def factor(kind, value):
    def change(c):
        c.rope_parameters[ROPE[kind]].pop("factor", None)
        c.rope_parameters[ROPE[kind]]["rope_type"] = "default" if value == 1 else "linear"
        if value != 1:
            c.rope_parameters[ROPE[kind]]["factor"] = float(value)
    return lambda m: m.config.append(change)


def config(f):
    return lambda m: m.config.append(f)


def window(f):
    def change(c):
        c.sliding_window = f(c.sliding_window)
    return config(change)


def pattern(late):
    def change(c):
        n = c.num_hidden_layers
        c.layer_types = [ROPE["global" if (l - late) % 6 == 5 else "local"] for l in range(n)]
    return config(change)


def all_layers(kind):
    def change(c):
        c.layer_types = [ROPE[kind]] * c.num_hidden_layers
    return config(change)


def scaling(f):
    def change(model):
        for layer in model.model.layers:
            layer.self_attn.scaling = f(model.config)
    return lambda m: m.model.append(change)


def norms(more):
    def change(model):
        for module in model.modules():
            if isinstance(module, G.Gemma3RMSNorm):
                module.weight.data = module.weight.data + more
    return lambda m: m.model.append(change)


def eps(value):
    def change(model):
        for module in model.modules():
            if isinstance(module, G.Gemma3RMSNorm):
                module.eps = value
    return lambda m: m.model.append(change)


def embedding(f):
    def change(model):
        e = model.model.embed_tokens
        e.embed_scale = f(e.embed_scale)
    return lambda m: m.model.append(change)


class Function(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.forward = f


def activation(f):
    def change(model):
        for layer in model.model.layers:
            layer.mlp.act_fn = Function(f)
    return lambda m: m.model.append(change)


def swap_gate(m):
    def change(model):
        for layer in model.model.layers:
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    m.model.append(change)


def no_qk_norm(m):
    def change(model):
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    m.model.append(change)


def norm_after_rope(m):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = G.apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = G.eager_attention_forward(self, self.q_norm(q), self.k_norm(k), v, attention_mask,
                                           scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None
    m.patches.append((G.Gemma3Attention, "forward", forward))


def interleaved(m):
    def turn(q, k, cos, sin, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        c, s = (x[..., :half].unsqueeze(unsqueeze_dim) for x in (cos, sin))

        def one(x):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        return one(q), one(k)
    m.patches.append((G, "apply_rotary_pos_emb", turn))


def mixed_heads(m):
    m.patches.append((G, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1)))


def post_norms(late):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        for pre, branch, post in (
                (self.input_layernorm, lambda h: self.self_attn(
                    hidden_states=h, position_embeddings=position_embeddings,
                    attention_mask=attention_mask, **kwargs)[0], self.post_attention_layernorm),
                (self.pre_feedforward_layernorm, self.mlp, self.post_feedforward_layernorm)):
            hidden_states = hidden_states + branch(pre(hidden_states))
            if late:
                hidden_states = post(hidden_states)
        return hidden_states
    return lambda m: m.patches.append((G.Gemma3DecoderLayer, "forward", forward))


def bos(more):
    def change(m):
        m.bos = more
    return change


def late(by):
    def change(m):
        m.late = by
    return change


def head(m):
    m.head = None  # times the embedding scale


def blocks(f):
    def change(m):
        m.blocks = f
    return change


def swapped(q):
    return (q << 4 | q >> 4).astype(np.uint8)


def in_turn(q):
    values = np.stack((q & 15, q >> 4), -1).reshape(len(q), -1)
    half = q.shape[1]
    return (values[:, :half] | values[:, half:] << 4).astype(np.uint8)


def f16_cache(m):
    def attention(module, query, key, value, mask, **kwargs):
        return whole(module, query, key.half().float(), value.half().float(), mask, **kwargs)
    whole = G.eager_attention_forward
    m.patches.append((G, "eager_attention_forward", attention))


def capped_scores(m):
    m.patches.append((G, "eager_attention_forward",
                      functools.partial(G.eager_attention_forward, softcap=50.0)))


def erf(x):
    return torch.nn.functional.gelu(x)


MISTAKES = {
    "rope-factor-missing": ("tiny", factor("global", 1)),
    "rope-factor-on-local": ("tiny", factor("local", 8)),
    "rope-local-base": ("tiny", rope("local", rope_theta=1e6)),
    "rope-global-base": ("tiny", rope("global", rope_theta=1e4)),
    "rope-interleaved": ("tiny", interleaved),
    "window-plus-1": ("tiny", window(lambda w: w + 1)),
    "window-minus-1": ("tiny", window(lambda w: w - 1)),
    "window-none": ("tiny", window(lambda w: 1 << 20)),
    "pattern-early": ("tiny", pattern(-1)),
    "pattern-late": ("tiny", pattern(1)),
    "all-local": ("tiny", all_layers("local")),
    "all-global": ("tiny", all_layers("global")),
    "query-scale-head-dim": ("tiny-62", scaling(lambda c: c.head_dim ** -0.5)),
    "query-scale-quotient": ("tiny", scaling(
        lambda c: (c.hidden_size // c.num_attention_heads) ** -0.5)),
    "query-scale-missing": ("tiny", scaling(lambda c: 1.0)),
    "query-scale-twice": ("tiny", scaling(lambda c: 1 / c.head_dim)),
    "norm-without-one": ("tiny", norms(-1)),
    "norm-with-two": ("tiny", norms(1)),
    "norm-eps": ("tiny", eps(1e-5)),
    "qk-norm-missing": ("tiny", no_qk_norm),
    "qk-norm-after-rope": ("tiny", norm_after_rope),
    "kv-heads-mixed": ("tiny", mixed_heads),
    "embedding-unscaled": ("tiny", embedding(torch.ones_like)),
    "embedding-scale-bf16": ("tiny-62", embedding(lambda x: x.bfloat16().float())),
    "embedding-scale-in-head": ("tiny", head),
    "gelu-erf": ("tiny", activation(erf)),
    "gelu-quick": ("tiny", activation(lambda x: x * torch.sigmoid(1.702 * x))),
    "silu": ("tiny", activation(torch.nn.functional.silu)),
    "relu": ("tiny", activation(torch.relu)),
    "gate-up-swapped": ("tiny", swap_gate),
    "post-norms-missing": ("tiny", post_norms(False)),
    "post-norms-late": ("tiny", post_norms(True)),
    "softcap-30": ("tiny", config(lambda c: setattr(c, "final_logit_softcapping", 30.0))),
    "softcap-missing": ("tiny-mixed", config(lambda c: setattr(c, "final_logit_softcapping", None))),
    "bos-missing": ("tiny", bos(-1)),
    "bos-doubled": ("tiny", bos(1)),
    "rows-late": ("tiny", late(1)),
    "rows-early": ("tiny", late(-1)),
    "nibbles-swapped": ("tiny", blocks(swapped)),
    "nibbles-in-turn": ("tiny", blocks(in_turn)),
    "kv-f16": ("tiny", f16_cache),
    "attention-softcap": ("tiny", capped_scores),
}
PAIRS = ["rope-factor-missing+window-plus-1", "rope-local-base+rope-global-base", "gelu-erf+norm-eps",
         "qk-norm-after-rope+rope-interleaved", "window-none+softcap-30", "silu+query-scale-twice",
         "pattern-late+gelu-erf", "norm-with-two+rope-factor-on-local", "bos-missing+window-minus-1",
         "kv-heads-mixed+rows-late", "kv-f16+window-minus-1", "nibbles-in-turn+gelu-quick"]


NOISY = ["", "gelu-quick", "rope-global-base", "softcap-30"]  # in bf16


def logits_with(model, changes, ids, dtype=torch.float32):
    change = Change()
    for c in changes:
        c(change)

    def prepare(c):
        for f in change.config:
            f(c)
    m = F.load(os.path.join(F.DATA, model + ".gguf"), dtype, prepare, change.blocks)
    for f in change.model:
        f(m)
    saved = [(where, name, getattr(where, name)) for where, name, _ in change.patches]
    for where, name, value in change.patches:
        setattr(where, name, value)
    run = ids[1:] if change.bos < 0 else ids[:1] * change.bos + ids
    with torch.inference_mode():
        x = m(torch.tensor([run]), use_cache=False).logits[0].float().numpy()
    for where, name, value in saved:
        setattr(where, name, value)
    if change.head is None:
        x = x * np.float32(m.config.hidden_size ** 0.5)
    return x, change.late - change.bos


def make_noisy():
    ids = [int(x) for x in open(os.path.join(F.DATA, "tiny.ids")).read().split()]
    for name in NOISY:
        x, _ = logits_with("tiny", [MISTAKES[name][1]] if name else [], ids, torch.bfloat16)
        bits = (np.ascontiguousarray(x[::3]).view(np.uint32) >> 16).astype("<u2")  # exact: x is bf16
        np.save(os.path.join(OUT, "bf16%s.npy" % (name and "-" + name)), bits.view("V2"))


def make_clamped():
    def clamp(x):
        return x.clamp(-65504, 65504)

    def forward(self, x, position_embeddings=None, attention_mask=None, **kwargs):
        h = self.self_attn(hidden_states=self.input_layernorm(x), position_embeddings=position_embeddings,
                           attention_mask=attention_mask, **kwargs)[0]
        x = clamp(x + clamp(self.post_attention_layernorm(h)))
        return clamp(x + clamp(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))))
    model = F.load(os.path.join(F.DATA, "../../weights/gemma-3-270m-q4_k_m.gguf"), torch.float32)
    saved, G.Gemma3DecoderLayer.forward = G.Gemma3DecoderLayer.forward, forward
    # <bos>The capital of France is Paris. The capital of Italy is
    ids = [2, 818, 5279, 529, 7001, 563, 9079, 236761, 669, 5279, 529, 11702, 563]
    with torch.inference_mode():
        x = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    G.Gemma3DecoderLayer.forward = saved
    with open(os.path.join(OUT, "f16-clamp.jsonl"), "w") as f:
        for row in x:
            top = [{"id": int(i), "logprob": float("%.7g" % p)} for p, i in zip(*row.topk(20))]
            f.write(json.dumps({"top_logprobs": top}) + "\n")


def main():
    os.makedirs(OUT, exist_ok=True)
    make_noisy()
    make_clamped()
    index, rows = [], []
    for names in list(MISTAKES) + PAIRS:
        parts = [MISTAKES[n] for n in names.split("+")]
        model = parts[0][0]
        ids = [int(x) for x in open(os.path.join(F.DATA, model + ".ids")).read().split()]
        x, moved = logits_with(model, [p[1] for p in parts], ids)
        positions = [len(ids) // 4 + 1, len(ids) * 5 // 8, len(ids) - 1 + min(moved, 0)]
        index.append(" ".join(map(str, [names, model] + positions)))
        rows += [x[p - moved].astype("<f4") for p in positions]
        assert np.isfinite(x).all(), names
    with open(os.path.join(OUT, "mistakes.txt"), "w") as f:
        f.write(f"# {F.versions()}, CPU, float32, eager; made by test/make_mistakes.py, which see\n")
        f.write("\n".join(index) + "\n")
    np.concatenate(rows).tofile(os.path.join(OUT, "mistakes.f32"))
    print(len(index), "mistakes", sum(r.nbytes for r in rows), "bytes")


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) == 1 else __doc__)
