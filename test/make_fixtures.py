#!/usr/bin/env python3
"""Makes the files in test/data. Only this script needs torch, transformers, gguf and numpy; the
tests read what it made. Everything random is seeded.

    make_fixtures.py models           tiny.gguf, tiny-62.gguf, tiny-mixed.gguf, and for each its
                                      .ids and .logits: what transformers computes, float32
    make_fixtures.py formats          formats.vec: blocks of every tensor type, dequantised by gguf
    make_fixtures.py arithmetic       arithmetic.vec: fma with fractions, functions by mpmath
    make_fixtures.py sampler          sampler.vec: choices of an independent simulation
    make_fixtures.py golden MODEL.gguf OUT.vec NAME.ids ...
                                      golden-270m.vec, golden-folktales.vec: what transformers
                                      computes with a trained model for texts given as ids
"""
import os
import re
import sys
from fractions import Fraction

import numpy as np

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
SPACE = "\u2581"

# ---- Models ---------------------------------------------------------------------------------------

TEXT = """once upon a time there was a little girl who lived in a house near the forest. the dog and
the cat were her best friends, and they would play together in the garden every day. one day the
little girl said to the dog, "let us go to the river and find the big fish." the dog was happy. they
went to the river, but the fish was not there. "where is the fish?" said the girl. "it went home,"
said the cat. and then they all went home and had a good supper, and they lived happily ever after.
"""


def merges(n):
    """The n best merges of TEXT, as byte-pair encoding finds them; ties by text."""
    words = [list(SPACE + w) for w in re.findall(r"[a-z]+", TEXT)]
    found = []
    while len(found) < n:
        count = {}
        for w in words:
            for a, b in zip(w, w[1:]):
                count[a, b] = count.get((a, b), 0) + 1
        a, b = max(count, key=lambda p: (count[p], p))
        found.append(a + b)
        for w in words:
            i = 0
            while i + 1 < len(w):
                if w[i] == a and w[i + 1] == b:
                    w[i:i + 2] = [a + b]
                i += 1
    return list(dict.fromkeys(found))


def vocabulary(full):
    """Lists of text, score and type, in the manner of llama.cpp's converter but with other ids
    than Gemma's. An odd number of tokens, so that the last rows of the head are a remainder."""
    normal, unknown, control, user, byte = 1, 2, 3, 4, 6
    v = [("<eos>", -1000, control), ("<pad>", -1000, control), ("<unk>", -1000, unknown),
         ("<bos>", -1000, control)]
    v += [("<0x%02X>" % b, -1000, byte) for b in range(256)]
    v += [("<start_of_turn>", -1000, control), ("<end_of_turn>", -1000, control)]
    if full:
        v += [("\n" * n, -1000, user) for n in range(1, 5)]
        v += [(" " * n, -1000, user) for n in range(2, 6)]
        v += [("\t", -1000, user), ("<unused0>", -1000, control), ("<table>", -1000, user)]
        pieces = merges(120)
        letters = SPACE + "abcdefghijklmnopqrstuvwxyzAHIOT0123456789.,!?'\"é你"
        for rank, text in enumerate(pieces + list(letters)):
            v.append((text, -float(rank), normal))
    while len(v) % 2 == 0 or len(v) % 16 in (0, 1, 15):
        v.append(("<unused%d>" % (100 + len(v)), -1000, control))
    text, score, kind = zip(*v)
    return list(text), [float(x) for x in score], list(kind)


def random_quantised(rng, name, rows, cols, std):
    """Random blocks of a tensor type that gguf cannot quantise to, with values of about std."""
    import gguf
    t = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[t]
    n = rows * cols // elements
    raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
    at_d = {"Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208, "IQ4_NL": 0}[name]
    mins = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}.get(name)  # dmin / d for a mean of zero

    def put_scale(d):
        raw[:, at_d:at_d + 2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)
        if mins:
            raw[:, at_d + 2:at_d + 4] = (mins * d).astype("<f2").view(np.uint8).reshape(-1, 2)

    put_scale(np.full(n, 1 / 64))
    unit = gguf.quants.dequantize(raw, t).std() * 64
    put_scale(std / unit * (1 + 0.3 * rng.standard_normal(n)))
    return raw.reshape(rows, -1), t


def write_model(name, seed, shape, vocab, type_of, keys, branch=1.0):
    """shape: layers, d_model, d_ff, heads, kv heads, head_dim. type_of(layer, tensor) -> a name.
    branch: what each half of a layer adds to the residual stream, which begins with 3."""
    import gguf
    G = gguf.GGMLQuantizationType
    layers, d, ff, heads, kv_heads, hd = shape
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(os.path.join(DATA, name + ".gguf"), "gemma3")
    w.add_name(name)
    for key, kind, value in keys:
        getattr(w, "add_" + kind)(key, value)
    text, score, kind = vocab
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([t.encode() for t in text])
    w.add_token_scores(score)
    w.add_token_types(kind)
    w.add_eos_token_id(0)
    w.add_pad_token_id(1)
    w.add_unk_token_id(2)
    w.add_bos_token_id(3)
    w.add_add_bos_token(True)
    w.add_add_space_prefix(False)

    def matrix(tensor, layer, rows, cols, std):
        t = type_of(layer, tensor)
        full = f"blk.{layer}.{tensor}.weight" if layer >= 0 else tensor + ".weight"
        if t in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"):
            raw, kind = random_quantised(rng, t, rows, cols, std)
            w.add_tensor(full, raw, raw_dtype=kind)
            return
        x = (std * rng.standard_normal((rows, cols))).astype(np.float32)
        if t in ("F32", "F16"):
            w.add_tensor(full, x.astype({"F32": "<f4", "F16": "<f2"}[t]))
        else:
            w.add_tensor(full, gguf.quants.quantize(x, G[t]), raw_dtype=G[t])

    def norm(tensor, layer, n, about):
        full = f"blk.{layer}.{tensor}.weight" if layer >= 0 else tensor + ".weight"
        w.add_tensor(full, (about * (1 + 0.3 * rng.standard_normal(n))).astype(np.float32))

    matrix("token_embd", -1, len(text), d, 3 / np.sqrt(d))
    for l in range(layers):
        norm("attn_norm", l, d, 1)
        matrix("attn_q", l, heads * hd, d, 1 / np.sqrt(d))
        matrix("attn_k", l, kv_heads * hd, d, 1 / np.sqrt(d))
        matrix("attn_v", l, kv_heads * hd, d, 1 / np.sqrt(d))
        norm("attn_q_norm", l, hd, 1.4)
        norm("attn_k_norm", l, hd, 1.4)
        matrix("attn_output", l, d, heads * hd, 1 / np.sqrt(heads * hd))
        norm("post_attention_norm", l, d, branch)
        norm("ffn_norm", l, d, 1)
        matrix("ffn_gate", l, ff, d, 1 / np.sqrt(d))
        matrix("ffn_up", l, ff, d, 1 / np.sqrt(d))
        matrix("ffn_down", l, d, ff, 1 / np.sqrt(ff))
        norm("post_ffw_norm", l, d, branch)
    norm("output_norm", -1, d, 1)
    if type_of(-1, "output"):
        matrix("output", -1, len(text), d, 3 / np.sqrt(d))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def load(path, dtype, prepare=None, nibbles=None):
    """A Gemma 3 GGUF as transformers' Gemma3ForCausalLM, its weights dequantised by gguf. prepare may
    change the configuration; nibbles, the bytes [blocks][16] of Q4_0."""
    import gguf
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    reader = gguf.GGUFReader(path)
    kv = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.")}
    T = {t.name: t for t in reader.tensors}

    def key(name, default=None):
        return kv.get("gemma3." + name, default)

    layers, d, heads = key("block_count"), key("embedding_length"), key("attention.head_count")
    head_dim = int(T["blk.0.attn_q.weight"].shape[1]) // heads
    kv_heads = int(T["blk.0.attn_k.weight"].shape[1]) // head_dim
    local = key("attention.sliding_window_pattern", [(l + 1) % 6 != 0 for l in range(layers)])
    rope = {"rope_type": "default", "rope_theta": float(key("rope.freq_base", 1e6))}
    if key("rope.scaling.factor", 1.0) != 1.0:
        rope.update(rope_type="linear", factor=float(key("rope.scaling.factor")))
    rope_local = {"rope_type": "default", "rope_theta": float(key("rope.freq_base_swa", 1e4))}
    config = Gemma3TextConfig(
        vocab_size=int(T["token_embd.weight"].shape[1]), hidden_size=d,
        intermediate_size=key("feed_forward_length"), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon", 1e-6),
        sliding_window=key("attention.sliding_window"),
        layer_types=["sliding_attention" if x else "full_attention" for x in local],
        query_pre_attn_scalar=head_dim if layers != 62 else d // heads,
        rope_parameters={"full_attention": rope, "sliding_attention": rope_local},
        tie_word_embeddings="output.weight" not in T,
        final_logit_softcapping=key("final_logit_softcapping"), attn_implementation="eager",
        bos_token_id=3, eos_token_id=0, pad_token_id=1)
    if prepare:
        prepare(config)
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)

    def weight(name):
        raw = T[name].data
        if nibbles and T[name].tensor_type == gguf.GGMLQuantizationType.Q4_0:
            blocks = raw.reshape(-1, 18)
            raw = np.hstack((blocks[:, :2], nibbles(blocks[:, 2:]))).reshape(raw.shape)
        x = gguf.quants.dequantize(raw, T[name].tensor_type).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)

    # GGUF stores norm weights with the 1 added that transformers adds itself.
    state = {"model.embed_tokens.weight": weight("token_embd.weight"),
             "model.norm.weight": weight("output_norm.weight") - 1}
    state["lm_head.weight"] = weight("output.weight") if "output.weight" in T else \
        state["model.embed_tokens.weight"]
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
             "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
             "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for l in range(layers):
        for ours, theirs in names.items():
            x = weight(f"blk.{l}.{ours}.weight")
            state[f"model.layers.{l}.{theirs}.weight"] = x - 1 if "norm" in ours else x
    model.load_state_dict(state, assign=True, strict=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.model.embed_tokens.embed_scale = torch.tensor(d ** 0.5, dtype=dtype)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def versions():
    import torch
    import transformers
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def logits_of(path, ids, dtype):
    import torch
    with torch.inference_mode():
        out = load(path, dtype)(torch.tensor([ids]), use_cache=False)
    return out.logits[0].numpy()


def mean_kl(want, got):
    want, got = want.astype(np.float64), got.astype(np.float64)
    p = want - np.logaddexp.reduce(want, -1)[:, None]
    q = got - np.logaddexp.reduce(got, -1)[:, None]
    return (np.exp(p) * (p - q)).sum(-1)


def store_logits(name, seed, n):
    import torch
    path = os.path.join(DATA, name + ".gguf")
    import gguf
    n_vocab = int(next(t for t in gguf.GGUFReader(path).tensors
                       if t.name == "token_embd.weight").shape[1])
    ids = [3] + [int(x) for x in np.random.default_rng(seed).integers(4, n_vocab, n - 1)]
    single = logits_of(path, ids, torch.float32)
    double = logits_of(path, ids, torch.float64)
    with open(os.path.join(DATA, name + ".ids"), "w") as f:
        f.write(" ".join(map(str, ids)) + "\n")
    single.astype("<f4").tofile(os.path.join(DATA, name + ".logits"))
    top = np.sort(single, -1)
    kl = mean_kl(double, single)
    print(f"{name}: {n} positions of {n_vocab}, std {single.std():.2f}, median gap of the first two "
          f"{np.median(top[:, -1] - top[:, -2]):.3f}, float32 against float64: mean KL "
          f"{kl.mean():.2g}, largest {kl.max():.2g}, file {os.path.getsize(path)} bytes")


def key_list(shape, window, context):
    layers, d, ff, heads, kv_heads, hd = shape
    u, f = "uint32", "float32"
    return [("gemma3.context_length", u, context), ("gemma3.embedding_length", u, d),
            ("gemma3.block_count", u, layers), ("gemma3.feed_forward_length", u, ff),
            ("gemma3.attention.head_count", u, heads),
            ("gemma3.attention.head_count_kv", u, kv_heads),
            ("gemma3.attention.key_length", u, hd), ("gemma3.attention.value_length", u, hd),
            ("gemma3.attention.layer_norm_rms_epsilon", f, 1e-6),
            ("gemma3.attention.sliding_window", u, window), ("gemma3.rope.freq_base", f, 1e6),
            ("gemma3.rope.freq_base_swa", f, 1e4), ("gemma3.rope.scaling.type", "string", "linear"),
            ("gemma3.rope.scaling.factor", f, 8.0)]


TEMPLATE = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}" \
           "<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
MIXED = {  # rows of 256 elements in the first five columns, of 64 in the last two
    "columns": "attn_q ffn_gate ffn_up attn_k attn_v attn_output ffn_down",
    0: "Q2_K Q3_K Q4_K F32  Q4_0 Q4_0   Q4_1",
    1: "Q5_K Q6_K Q4_0 Q8_0 F16  Q5_0   Q5_1",
    2: "Q4_1 Q5_0 Q5_1 Q6_K Q2_K IQ4_NL Q8_0",
    3: "Q3_K IQ4_NL Q4_K BF16 Q5_K BF16 Q4_0",
    -1: "Q6_K Q4_K"}


def mixed_type(layer, tensor):
    """Every type at least once; K types only where a row has 256 elements."""
    columns = MIXED["columns"].split() if layer >= 0 else ["token_embd", "output"]
    return MIXED[layer].split()[columns.index(tensor)]


def make_models():
    # Grouped heads, heads * head_dim != d_model, window 8, factor 8: every rule of the larger sizes.
    shape = (8, 64, 96, 4, 2, 32)
    write_model("tiny", 1, shape, vocabulary(True),
                lambda l, t: "Q4_0" if l >= 0 else {"token_embd": "Q8_0"}.get(t),
                key_list(shape, 8, 512) + [("tokenizer.chat_template", "string", TEMPLATE)])
    store_logits("tiny", 11, 72)
    # 62 layers make the query scale 1/sqrt(d_model / n_heads) = 1/sqrt(8), not 1/sqrt(head_dim).
    shape = (62, 32, 32, 4, 1, 16)
    write_model("tiny-62", 2, shape, vocabulary(False),
                lambda l, t: "Q4_0" if l >= 0 else {"token_embd": "F16"}.get(t),
                key_list(shape, 8, 256), branch=0.35)
    store_logits("tiny-62", 12, 32)
    # All tensor types, a head of its own, softcap, the pattern as a list, few keys (as Ollama's).
    shape = (4, 256, 64, 2, 1, 32)
    keys = [k for k in key_list(shape, 16, 256)
            if not re.search(r"kv$|_length_|key_|value_|eps|rope", k[0])]
    keys += [("gemma3.attention.sliding_window_pattern", "array", [True, False, True, False]),
             ("gemma3.final_logit_softcapping", "float32", 10.0)]
    write_model("tiny-mixed", 3, shape, vocabulary(False), mixed_type, keys)
    store_logits("tiny-mixed", 13, 56)
    with open(os.path.join(DATA, "README"), "w") as f:
        f.write("Made by test/make_fixtures.py, which see. NAME.gguf: random weights; NAME.ids: a "
                "sequence; NAME.logits:\nits logits, little-endian float32 [positions][n_vocab], by "
                f"{versions()}, CPU, float32, eager.\n")


# ---- Tensor types ---------------------------------------------------------------------------------

def bits(values):
    x = np.asarray(values, np.float32).ravel().copy()
    b = x.view(np.uint32)
    b[np.isnan(x)] = 0x7FC00000
    return " ".join("%08x" % i for i in b)


def make_formats():
    import gguf
    rng = np.random.default_rng(4)
    scales = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
              "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
              "IQ4_NL": [0], "IQ4_XS": [0]}
    # f16: one, zeros, the smallest and largest subnormal, the largest, infinity, NaN
    extreme = [0x3C00, 0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0x7E00]
    with open(os.path.join(DATA, "formats.vec"), "w") as f:
        f.write("# gguf.quants.dequantize of the Python package gguf; made by "
                "test/make_fixtures.py formats\n"
                "# type: name, number, elements, bytes, blocks; then a block's bytes and its values\n")
        for name, at in scales.items():
            t = gguf.GGMLQuantizationType[name]
            elements, size = gguf.GGML_QUANT_SIZES[t]
            few = elements == 256
            blocks = []
            for fill in (0x00, 0xFF, 0x80):
                for s in [0x3C00] if few else [0x3C00, 0xB555]:
                    block = np.full(size, fill, np.uint8)
                    for a in at:
                        block[a:a + 2] = [s & 255, s >> 8]
                    blocks.append(block)
            for s in extreme[1::3] if few else extreme:
                block = rng.integers(0, 256, size, dtype=np.uint8)
                for a in at:
                    block[a:a + 2] = [s & 255, s >> 8]
                blocks.append(block)
            for _ in range(2 if few else 6):
                block = rng.integers(0, 256, size, dtype=np.uint8)
                for a in at:
                    d = np.float16(rng.standard_normal() / 30).view(np.uint16)
                    block[a:a + 2] = [d & 255, d >> 8]
                blocks.append(block)
            f.write(f"type {name} {int(t)} {elements} {size} {len(blocks)}\n")
            with np.errstate(all="ignore"):
                for block in blocks:
                    f.write(block.tobytes().hex() + "\n")
                    f.write(bits(gguf.quants.dequantize(block[None], t)) + "\n")


# ---- Sampling -------------------------------------------------------------------------------------

F = np.float32


def nearest(x):
    """A Fraction as the nearest float32: round to odd in double first, then to float."""
    d = float(x)
    if Fraction(d) != x and int(np.float64(d).view(np.uint64)) & 1 == 0:
        d = float(np.nextafter(d, np.inf if Fraction(d) < x else -np.inf))
    return F(d)


def fma(a, b, c):
    return nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def exp32(x):
    """The contract's exp."""
    if x < -87:
        return F(0)
    magic = F(12582912)
    n = fma(x, F(float.fromhex("0x1.715476p+0")), magic) - magic
    r = fma(n, F(-float.fromhex("0x1.62e430p-1")), x)
    r = fma(n, F(float.fromhex("0x1.05c610p-29")), r)
    y = F(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        y = fma(y, r, F(c))
    return F(np.ldexp(y, int(n)))


def lanes(pairs):
    """Sum of value over (index, value) by rule 4."""
    lane = [F(0)] * 16
    for i, v in sorted(pairs):
        lane[i % 16] = F(lane[i % 16] + v)
    for step in (8, 4, 2, 1):
        lane = [F(lane[j] + lane[j + step]) for j in range(step)]
    return lane[0]


class Sampler:
    def __init__(self, seed, temperature, top_k, top_p, min_p, penalty):
        m = (1 << 64) - 1
        z = (seed + 0x9E3779B97F4A7C15) & m
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
        self.state = (z ^ (z >> 31)) or 1
        self.t, self.top_k, self.top_p = F(temperature), top_k, F(top_p)
        self.min_p, self.penalty, self.last = F(min_p), F(penalty), []

    def uniform(self):
        m = (1 << 64) - 1
        s = self.state
        s ^= s >> 12
        s ^= (s << 25) & m
        s ^= s >> 27
        self.state = s
        return F(((s * 0x2545F4914F6CDD1D & m) >> 40) * 2.0 ** -24)

    def choose(self, logits):
        l = logits.copy()
        for i in set(self.last[-64:]):
            l[i] = F(l[i] / self.penalty) if l[i] > 0 else F(l[i] * self.penalty)
        if self.t == 0:
            return int(np.argmax(l))
        order = sorted(range(len(l)), key=lambda i: (-l[i], i))
        if self.top_k:
            order = order[:self.top_k]
        e = {i: exp32(F(F(l[i] - l[order[0]]) / self.t)) for i in order}
        if self.top_p < 1:
            total, run, keep = lanes(e.items()), F(0), 0
            while keep < len(order):
                run = F(run + e[order[keep]])
                keep += 1
                if run >= F(self.top_p * total):
                    break
            order = order[:keep]
        order = [i for i in order if e[i] >= self.min_p]
        total = F(0)
        for i in order:
            total = F(total + e[i])
        limit, run = F(self.uniform() * total), F(0)
        for i in order:
            run = F(run + e[i])
            if run > limit:
                return i
        return order[-1]


def make_sampler():
    rng = np.random.default_rng(5)
    n_vocab, n_draws = 149, 40
    rows = [(s * rng.standard_normal(n_vocab)).astype(F) for s in (3, 1, 6)]
    rows[1][[7, 9, 30]] = rows[1].max() + F(0.5)  # ties at the top
    rows[2][::5] = rows[2][3]                     # ties everywhere
    cases = [(1, 1.0, 64, 0.95, 0, 1), (2, 1.0, 0, 1, 0, 1), (3, 0.7, 40, 0.9, 0.05, 1.1),
             (4, 2.5, 0, 0.99, 0, 1.3), (5, 0, 0, 1, 0, 1.2), (6, 0.3, 1, 1, 0, 1),
             (7, 1.3, 0, 1, 0.1, 1), (0, 1.0, 5, 0.5, 0, 1), (2 ** 64 - 1, 0.01, 0, 0.5, 0.5, 1)]
    with open(os.path.join(DATA, "sampler.vec"), "w") as f:
        f.write("# an independent simulation in Python with exact fma; made by "
                "test/make_fixtures.py sampler\n"
                "# logits: rows as float32 bit patterns; case: seed, temperature, top-k, top-p, min-p,"
                " penalty;\n# then the ids chosen from the rows in turn, each accepted\n")
        f.write(f"logits {len(rows)} {n_vocab}\n")
        for r in rows:
            f.write(bits(r) + "\n")
        for case in cases:
            s = Sampler(*case)
            ids = []
            for i in range(n_draws):
                ids.append(s.choose(rows[i % 3]))
                s.last.append(ids[-1])
            f.write("case %d %g %d %g %g %g %d\n" % (*case, n_draws))
            f.write(" ".join(map(str, ids)) + "\n")


# ---- Arithmetic -----------------------------------------------------------------------------------

def fma_cases(rng):
    """Ties, cancellation, subnormal and overflowing results, then anything."""
    f = float.fromhex
    cases = [(f("0x1.000002p0"), f("0x1.000002p0"), f("0x1p-48")),
             (f("0x1.000002p0"), f("0x1.fffffep-1"), -1), (f("0x1p-100"), f("0x1p-49"), f("0x1p-126")),
             (f("0x1p-75"), f("0x1p-75"), 0), (f("0x1.8p-75"), f("0x1p-75"), 0),
             (f("-0x1p-75"), f("0x1p-75"), 0), (f("0x1.fffffep127"), 2, f("-0x1.fffffep127")),
             (f("0x1.fffffep127"), 1, f("0x1p103")), (f("0x1.fffffep127"), 1, f("0x1.fffffep102")),
             (f("0x1p64"), f("0x1p64"), f("-0x1p127")), (f("0x1.fffffep127"), f("0x1.fffffep127"), 1)]
    for _ in range(300):
        a, b = (np.ldexp(F(1 + rng.integers(0, 2 ** 23) / 2 ** 23), int(rng.integers(-40, 40)))
                for _ in range(2))
        product = Fraction(float(a)) * Fraction(float(b))
        near = float(nearest(product))
        for c in (-near, near, near * f("0x1p24"), near * f("-0x1p24"), near * f("0x1p-25"),
                  near * f("0x1.8p-24"), near * f("-0x1p-30")):
            cases.append((float(a), float(b), float(F(c))))
        # c + a*b lies on a tie of c's last place, or next to it by less than a double shows
        half = f("0x1p-24")
        for tiny in (0, f("0x1p-90"), f("-0x1p-90")):
            cases.append((half, 1, 1 + 2 * half * int(rng.integers(0, 2 ** 20))) if not tiny else
                         (f("0x1.000002p0"), half * (1 - 2 * half), 1 + tiny))
    for _ in range(300):  # results among the subnormal numbers
        e = int(rng.integers(-90, -50))
        a, b = rng.integers(1, 2 ** 24, 2)
        cases.append((float(a) * 2.0 ** (e - 23), float(b) * 2.0 ** (-149 - e),
                      float(rng.integers(-2 ** 20, 2 ** 20)) * 2.0 ** -149))
    return [tuple(F(x) for x in c) for c in cases]


def double_bits(x):
    return "%016x" % int(np.float64(x).view(np.uint64))


def make_arithmetic():
    """Lines: fma a b c result; exp x bits-of-the-contract true(double); dexp, dlog x true (double);
    angle x cos sin; freq base exponent result (1 / base^exponent, the power rounded to float)."""
    import mpmath
    mpmath.mp.prec = 300
    rng = np.random.default_rng(6)
    # mpmath's numbers to double, then to float: 300 bits decide every case here
    d = lambda x: float(x)
    with open(os.path.join(DATA, "arithmetic.vec"), "w") as out, np.errstate(all="ignore"):
        out.write("# exact fractions and mpmath, 300 bits; made by test/make_fixtures.py arithmetic\n")
        out.write("# fma a b c result | exp x contract true | dexp, dlog x true | angle x cos sin | "
                  "freq base exponent result; floats in 8 digits, doubles in 16\n")
        for a, b, c in fma_cases(rng):
            out.write("fma " + bits([a, b, c, fma(a, b, c)]) + "\n")
        xs = list(np.linspace(-87, 88.7, 400)) + list(rng.standard_normal(200)) + \
            [0, -0.0, 1, -1, 1e-30, -1e-8, 0.34657359, -0.34657359, 0.3465736, -87, 88.7]
        for x in map(F, xs):
            if x <= F(88.7):
                out.write(f"exp {bits([x, exp32(x)])} {double_bits(d(mpmath.exp(mpmath.mpf(float(x)))))}\n")
        for x in list(np.linspace(-700, 700, 150)) + list(10 * rng.standard_normal(150)) + [0, 1, -744, 709.7]:
            out.write(f"dexp {double_bits(x)} {double_bits(d(mpmath.exp(mpmath.mpf(float(x)))))}\n")
        for x in list(10.0 ** rng.uniform(-300, 300, 100)) + list(rng.uniform(0.5, 2, 200)) + \
                [1, 2, 0.5, 10000, 1e6, 5e-324, 1.7e308, 1 + 2.0 ** -52, 1 - 2.0 ** -53]:
            out.write(f"dlog {double_bits(x)} {double_bits(d(mpmath.log(mpmath.mpf(float(x)))))}\n")
        angles = list(range(0, 60, 3)) + list(rng.uniform(0, 10, 100)) + list(rng.uniform(0, 131072, 200)) + \
            [131071, 1e-6, 2.0 ** -140] + [float(k * mpmath.pi / 4) for k in (1, 2, 3, 4, 5, 8, 100, 4001)] + \
            list(2.0 ** rng.uniform(17, 31, 300)) + [2.0 ** k for k in range(17, 31)] + \
            [float(k * mpmath.pi / 2) for k in rng.integers(2 ** 16, 2 ** 30, 80)] + [2.0 ** 31 - 128]
        for x in map(F, angles):
            m = mpmath.mpf(float(x))
            out.write(f"angle {bits([x, nearest(exact(mpmath.cos(m))), nearest(exact(mpmath.sin(m)))])}\n")
        for base in (1e4, 1e6):
            for j in range(128):
                p = nearest(exact(mpmath.power(mpmath.mpf(base), mpmath.mpf(2 * j) / 256)))
                out.write(f"freq {double_bits(base)} {double_bits(2 * j / 256)} {bits([F(1) / p])}\n")


def exact(x):
    """An mpmath number as a Fraction."""
    sign, mantissa, exponent, _ = x._mpf_
    return Fraction((-1) ** sign * int(mantissa)) * Fraction(2) ** exponent


# ---- Trained models --------------------------------------------------------------------------------

# Positions between top-16 lists, and between rows of samples.
GOLDEN_EVERY = {"capital": (1, 1), "chat": (1, 4), "code": (1, 16), "languages": (2, 32), "story": (8, 64)}


def write_golden(f, name, ids, logits):
    """Everything of a short text, samples of a long one; of a row every 1021st logit, or every 61st."""
    import torch
    n, vocab = logits.shape
    every_top, every_row = GOLDEN_EVERY.get(name, (4, 16))
    step = 1021 if vocab > 1 << 16 else 61
    lse = torch.logsumexp(logits.double(), -1)
    nll = lse[:-1] - logits[torch.arange(n - 1), torch.tensor(ids[1:])].double()
    top, top_id = logits.topk(16, -1)
    f.write(f"text {name} {n}\n")
    f.write("ids " + " ".join(map(str, ids)) + "\n")
    f.write("nll " + " ".join("%.9g" % x for x in nll) + "\n")
    f.write("lse " + " ".join("%.12g" % x for x in lse) + "\n")
    for i in [i for i in range(n) if i % every_top == 0 or i == n - 1]:
        f.write(f"top {i} " + " ".join(map(str, top_id[i].tolist())) + " " + bits(top[i].numpy()) + "\n")
    for i in [i for i in range(n) if i % every_row == 0 or i == n - 1]:
        x = logits[i, ::step].numpy()
        f.write(f"row {i} {step} {len(x)} " + bits(x) + "\n")
    print(f"{name}: {n} positions, mean nll {nll.mean():.6f}")


def make_golden(path, out, *texts):
    """The float32 logits of a trained model for texts given as files of ids, to DATA/out."""
    import torch
    model = load(path, torch.float32)
    with open(os.path.join(DATA, out), "w") as f:
        f.write(f"# {versions()}, CPU, float32, eager, weights dequantised by gguf; made by "
                "test/make_fixtures.py golden\n# logits are float32 bit patterns; nll and lse (log of "
                "the sum of exp) are decimal, natural log\n")
        for text in texts:
            ids = [int(x) for x in open(text).read().split()]
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            write_golden(f, os.path.basename(text)[:-4], ids, logits)


if __name__ == "__main__":
    job = {"models": make_models, "formats": make_formats, "arithmetic": make_arithmetic,
           "sampler": make_sampler, "golden": make_golden}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if not job:
        sys.exit(__doc__)
    os.makedirs(DATA, exist_ok=True)
    job(*sys.argv[2:])
