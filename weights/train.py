#!/usr/bin/env python3
"""Trains the model in this folder: a small Gemma 3 that tells folk tales.

    train.py data|tokenizer|float|qat|export|all --corpus folktales.txt --work DIR

data       corpus -> tales.json, heldout.txt: cleaned, cut into tales, 2 % of it held out
tokenizer  training tales -> tokenizer.model, tokens.npz
float      -> float.pt: trained in bfloat16 arithmetic with float32 weights
qat        -> qat.pt: Q4_0 in the forward pass, taught by the float model's probabilities
export     -> GGUF files and the loss curve

Every stage reads what the one before left in DIR, and goes on where it was interrupted.
README.md beside this file says what the corpus is and what came out.
"""
import argparse
import json
import math
import os
import re
import time
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SEED = 3

# ---- Corpus ----------------------------------------------------------------------------------

CAPS = r"(?=.{2,110}$)(?!\")[^a-z]*[A-Z]{2}[^a-z]*"     # A HEADING IN CAPITALS
TITLE = r"(?=.{3,62}$)[A-Z][^\"]*[A-Za-z).]"            # A Heading like This

# The books in the corpus's order: Gutenberg etext, the first paragraph kept, the first one after
# them that is not, what a heading looks like, headings of sections left out, and the kind.
# "tale": stories that stand alone, some held out. "fable": Aesop twice, none held out. "cycle":
# romances, sagas, heroic cycles, whose chapters share their figures and whose language is archaic;
# seen less.
BOOKS = [
    (5314, "1 The Frog-King, or Iron Henry", None,
     r"(\d+|Legend \d+) .{1,100}|(FIRST|SECOND|THIRD) STORY", None, "tale"),
    (2591, "THE GOLDEN BIRD", "The Brothers Grimm, Jacob", CAPS, None, "tale"),
    (34206, "INTRODUCTION.", "END OF THE FIRST VOLUME.", CAPS, r"NOTES", "cycle"),
    (7128, "The Lion and the Crane", "Notes and References", TITLE, None, "tale"),
    (7439, "TOM TIT TOT", "OYEZ-OYEZ-OYEZ", r"(?!BE BOLD)" + CAPS, None, "tale"),
    (22373, "THE FIEND.", "INDEX.", CAPS,
     r"FOOTNOTES|CHAPTER|MYTHOLOGICAL|MAGIC AND|GHOST STORIES|LEGENDS", "tale"),
    (503, "THE BRONZE RING", None, CAPS, None, "tale"),
    (640, "THE CAT AND THE MOUSE IN PARTNERSHIP", None, CAPS, None, "tale"),
    (39195, "THE GHOST OF WAHAULA TEMPLE", "APPENDIX", CAPS, None, "tale"),
    (12814, "Aponibolinayen and the Sun", "Pronunciation of Philippine Names", TITLE,
     r"Introduction", "tale"),
    (11339, "THE FOX AND THE GRAPES", "ILLUSTRATIONS", CAPS, None, "fable"),
    (28, "The Cock and the Pearl", "And this is the end", TITLE, None, "fable"),
    (3833, "1. DINEWAN THE EMU, AND", "APPENDIX", CAPS, None, "tale"),
    (29021, "Little Red Riding-Hood", "Uniform with this Volume", TITLE,
     r"The Moral|Another", "tale"),
    (17208, "CINDERELLA, OR THE LITTLE GLASS SLIPPER.", "NOTE.", CAPS, None, "tale"),
    (14465, "CHAPTER I. THE FIGHT WITH THE FIRBOLGS", "NOTES", CAPS, None, "cycle"),
    (14749, "The Story of the Children of Lir", "Notes on the Sources", CAPS, None, "cycle"),
    (5160, "THE LADY OF THE FOUNTAIN", "FOOTNOTES", CAPS, None, "cycle"),
    (18947, "GEFJUN'S PLOWING.", "NOTES.", CAPS, None, "cycle"),
    (1152, "CHAPTER I. Of Sigi, the Son of Odin.", "APPENDIX: EXCERPTS",
     r"CHAPTER .{1,120}", None, "cycle"),
    (1251, "CHAPTER I. First, How Uther", "GLOSSARY", r"(BOOK [IVX]+\.$|CHAPTER ).*", None,
     "cycle"),
    (42390, "CHAPTER III: ALGONQUIAN MYTHS AND LEGENDS", "BIBLIOGRAPHY",
     TITLE + r"|CHAPTER.*", r"CHAPTER|.*Analog", "cycle"),
]
RALSTON = 22373          # his essays stand between the tales: a tale ends where one begins
ESSAY = re.compile(r"[Ss]kazka|\bstor(y|ies)\b|\btales?\b|Afanasief|[Vv]ariant|Slav|mytholog")
PLAIN = str.maketrans({"Æ": "Ae", "æ": "ae", "œ": "oe", "ð": "d", "ß": "ss", "—": "--",
                       "“": '"', "”": '"', "‘": "'", "’": "'", "_": ""})
HELDOUT_SHARE = 0.02
HELDOUT_CHARS = (1500, 20000)   # shorter ones tell little, longer ones would fill the share
TWIN = 0.18                     # cosine above which two tales may be one story told twice: known
                                # twins have 0.24 (told anew) to 0.98 (another editor)


def clean(paragraph):
    """Takes out note marks and page numbers; letters lose their accents (Lane writes Ḳáfoor)."""
    p = re.sub(r"\[[^\]]{0,400}\]|\{[^}]*\}|\(\d+\)", "", paragraph).translate(PLAIN)
    p = "".join(c for c in unicodedata.normalize("NFD", p) if not unicodedata.combining(c))
    return re.sub(r"\s+", " ", p).strip()


def double_quotes(paragraph):
    """Speech in 'single' quotes to "double" ones, as in most of the books."""
    p = re.sub(r"(^|[\s(\-])'(?!(tis|twas|twill|em)\b)(?=\S)", r'\1"', paragraph)
    return re.sub(r"(?<=[.,!?;:\-])'(?=[\s\-)]|$)", '"', p)


def is_heading(p, pattern):
    if not re.fullmatch(pattern, p):
        return False
    words = p.split()
    return TITLE not in pattern or sum(w[0].isupper() for w in words) * 2 >= len(words)


def last_start(paragraphs, text):
    """Index of the last paragraph that is text, or else begins with it (contents come earlier)."""
    same = [i for i, p in enumerate(paragraphs) if p == text]
    return (same or [i for i, p in enumerate(paragraphs) if p.startswith(text)])[-1]


def cut_book(paragraphs, book):
    """The tales of one book, as (title, list of cleaned paragraphs)."""
    etext, first, stop, heading, left_out, _ = book
    begin = last_start(paragraphs, first)
    end = last_start(paragraphs, stop) if stop else len(paragraphs)
    single = sum(p[0] == "'" for p in paragraphs) > sum(p[0] == '"' for p in paragraphs)
    tales, skipping = [], False
    for p in paragraphs[begin:end]:
        if is_heading(p, heading) or not tales:
            above = tales.pop()[0] + ", " if tales and not tales[-1][1] and not skipping else ""
            skipping = bool(left_out and re.match(left_out, p))
            tales.append((above + clean(p), []))
            continue
        essay = etext == RALSTON and len(p) > 200 and p[0] != '"' and ESSAY.search(p)
        skipping = skipping or bool(essay)
        footnote = re.match(r"\(\d+\)|ENDNOTES|[IVX]+\.?$", p)
        p = clean(p)
        if p and not skipping and not footnote:
            tales[-1][1].append(double_quotes(p) if single else p)
    return tales


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def similarities(texts):
    """Cosines of the tales' tf-idf vectors; names and rare words weigh most."""
    vocabulary, rows = {}, []
    for text in texts:
        counts = {}
        for w in words_of(text):
            i = vocabulary.setdefault(w, len(vocabulary))
            counts[i] = counts.get(i, 0) + 1
        rows.append(counts)
    x = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, counts in zip(x, rows):
        row[list(counts)] = [1 + math.log(n) for n in counts.values()]
    x *= np.log(len(texts) / (x > 0).sum(0)) ** 1.5
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-9
    return x @ x.T


def mark_heldout(tales):
    """Chooses tales that have no twin anywhere in the corpus, at random, up to the share."""
    cosine = similarities([t["text"] for t in tales])
    np.fill_diagonal(cosine, 0)
    size = np.array([len(t["text"]) for t in tales])
    order = np.random.default_rng(SEED).permutation(len(tales))
    budget = HELDOUT_SHARE * size.sum()
    for i in order:
        lo, hi = HELDOUT_CHARS
        t = tales[i]
        t["nearest"] = [float(cosine[i].max()), tales[int(cosine[i].argmax())]["title"]]
        t["heldout"] = bool(t["kind"] == "tale" and lo < size[i] < hi and budget > size[i]
                            and cosine[i].max() < TWIN)
        budget -= size[i] if t["heldout"] else 0


def stage_data(args):
    """corpus -> tales.json and heldout.txt"""
    text = args.corpus.read_text(encoding="utf-8")
    tales = []
    for book, body in zip(BOOKS, text.split("\n===\n"), strict=True):
        for title, paragraphs in cut_book(body.strip().split("\n\n"), book):
            story = "\n\n".join(paragraphs)
            if len(story) > 150:
                tales.append(dict(book=book[0], kind=book[-1], title=title, text=story))
    unique = {" ".join(words_of(t["text"])): t for t in tales}
    tales = list(unique.values())
    mark_heldout(tales)
    (args.work / "tales.json").write_text(json.dumps(tales, ensure_ascii=False, indent=0))
    held = [t["text"] for t in tales if t["heldout"]]
    (args.work / "heldout.txt").write_text("\n\n".join(held) + "\n")
    for kind in ("tale", "fable", "cycle"):
        part = [t for t in tales if t["kind"] == kind]
        print(kind, len(part), "texts,", sum(len(t["text"]) for t in part), "characters")
    print("held out:", len(held), "tales,", sum(map(len, held)), "characters")


# ---- Tokenizer -------------------------------------------------------------------------------

PAD, EOS, BOS = 0, 1, 2
CONTROL = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
RUNS = ["\n", "\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "\u2581\u2581\u2581\u2581"]


def stage_tokenizer(args):
    """training tales -> tokenizer.model (SentencePiece BPE) and tokens.npz"""
    import sentencepiece
    tales = json.loads((args.work / "tales.json").read_text())
    lines = [p for t in tales if not t["heldout"] for p in t["text"].split("\n\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(args.work / "tokenizer"),
        model_type="bpe", vocab_size=args.config.n_vocab, byte_fallback=True, split_digits=True,
        character_coverage=0.99995, max_sentence_length=1 << 20,
        # any text comes back byte for byte, as with Gemma's own tokenizer
        normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=PAD, eos_id=EOS, bos_id=BOS, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", control_symbols=CONTROL, user_defined_symbols=RUNS,
        minloglevel=1)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(args.work / "tokenizer.model"))
    ids = [[BOS] + sp.encode(t["text"]) + [EOS] for t in tales]
    kind = ["heldout" if t["heldout"] else t["kind"] for t in tales]
    heldout = sp.encode((args.work / "heldout.txt").read_text())
    np.savez(args.work / "tokens.npz", ids=np.concatenate(ids).astype(np.uint16),
             length=[len(i) for i in ids], kind=kind, heldout=np.array(heldout, np.uint16),
             n_bytes=[len(sp.id_to_piece(i).replace("\u2581", " ").encode())
                      if not sp.is_byte(i) else 1 for i in range(sp.vocab_size())])
    n_bytes = sum(len(t["text"].encode()) for t in tales)
    print(f"{sp.vocab_size()} pieces, {n_bytes / sum(map(len, ids)):.3f} bytes a token")


# ---- Model: Gemma 3 --------------------------------------------------------------------------

@dataclass
class Config:
    n_layers: int = 8
    d_model: int = 256
    d_ff: int = 704
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    n_vocab: int = 4096
    n_ctx: int = 512
    window: int = 64
    rope_base_local: float = 1e4
    rope_base_global: float = 1e6
    eps: float = 1e-6
    embedding_type: str = "Q8_0"    # of the quantised file

    def is_local(self, layer):
        return (layer + 1) % 6 != 0


def fake_q4_0(w):
    """The values that w has after GGUF's Q4_0: blocks of 32 along a row, one float16 scale each.

    The scale maps the element of largest magnitude to -8, and codes 0..15 stand for -8..7."""
    b = w.float().reshape(-1, 32)
    d = b.gather(1, b.abs().argmax(1, keepdim=True)) / -8      # the first, when two are largest
    inverse = torch.where(d == 0, 0, 1 / d)
    q = (b * inverse + 8.5).floor().clamp(0, 15) - 8
    return (q * d.half().float()).reshape(w.shape)


def fake_q8_0(w):
    """The same for Q8_0: the largest magnitude becomes 127."""
    b = w.float().reshape(-1, 32)
    d = b.abs().amax(1, keepdim=True) / 127
    q = b * torch.where(d == 0, 0, 1 / d)
    q = (q.abs() + 0.5).floor() * q.sign()      # halves away from zero
    return (q * d.half().float()).reshape(w.shape)


FAKE = {"Q4_0": fake_q4_0, "Q8_0": fake_q8_0}


class StraightThrough(torch.autograd.Function):
    """Quantised on the way forward, the identity on the way back."""
    @staticmethod
    def forward(ctx, w, kind):
        return FAKE[kind](w)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Norm(nn.Module):
    """RMSNorm with weight 1 + w, in float32."""
    def __init__(self, n, eps):
        super().__init__()
        self.w, self.eps = nn.Parameter(torch.zeros(n)), eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.w)


class Linear(nn.Module):
    """A matrix without bias; with kind set, its quantised values are used."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in) / math.sqrt(n_in))
        self.kind = None

    def forward(self, x):
        return F.linear(x, StraightThrough.apply(self.w, self.kind) if self.kind else self.w)


def rope(x, cos, sin):
    """Turns the pairs (i, i + head_dim / 2) of x [batch, heads, tokens, head_dim]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    def __init__(self, c, local):
        super().__init__()
        self.c, self.local = c, local
        d, q, kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.attn_norm, self.post_attention_norm = Norm(d, c.eps), Norm(d, c.eps)
        self.ffn_norm, self.post_ffw_norm = Norm(d, c.eps), Norm(d, c.eps)
        self.attn_q_norm, self.attn_k_norm = Norm(c.head_dim, c.eps), Norm(c.head_dim, c.eps)
        self.attn_q, self.attn_k, self.attn_v = Linear(d, q), Linear(d, kv), Linear(d, kv)
        self.attn_output = Linear(q, d)
        self.ffn_gate, self.ffn_up = Linear(d, c.d_ff), Linear(d, c.d_ff)
        self.ffn_down = Linear(c.d_ff, d)

    def attend(self, q, k, v, mask):
        """q [batch, heads, tokens, head_dim], k and v with n_kv_heads. In local layers blocks of
        window queries see their own block of keys and the one before: the rest is masked anyway."""
        b, h, t, d = q.shape
        kv, w = k.shape[1], self.c.window
        if not self.local:
            k, v = (y.repeat_interleave(h // kv, 1) for y in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        blocks = lambda y: y.reshape(b, kv, -1, t // w, w, d).transpose(2, 3)
        pair = lambda y: torch.cat((blocks(F.pad(y, (0, 0, w, 0))[:, :, :t]), blocks(y)), 4)
        q = blocks(q).reshape(b * kv * (t // w), -1, d)       # heads of a group share their keys
        k, v = (pair(y).reshape(b * kv * (t // w), 2 * w, d) for y in (k, v))
        scores = (q @ k.transpose(1, 2)).float().view(b, kv, t // w, h // kv, w, 2 * w)
        scores = (scores / math.sqrt(d)).masked_fill(~mask, -1e9)
        p = scores.softmax(-1).to(v.dtype).view(b * kv * (t // w), -1, 2 * w)
        return (p @ v).view(b, kv, t // w, h // kv, w, d).transpose(2, 3).reshape(b, h, t, d)

    def forward(self, x, tables, mask):
        c, (b, t, _) = self.c, x.shape
        cos, sin = tables[0 if self.local else 1]
        heads = lambda y, n: y.view(b, t, n, c.head_dim).transpose(1, 2)
        h = self.attn_norm(x)
        q = rope(self.attn_q_norm(heads(self.attn_q(h), c.n_heads)), cos, sin)
        k = rope(self.attn_k_norm(heads(self.attn_k(h), c.n_kv_heads)), cos, sin)
        v = heads(self.attn_v(h), c.n_kv_heads)
        o = self.attend(q.to(v.dtype), k.to(v.dtype), v, mask).transpose(1, 2).reshape(b, t, -1)
        x = x + self.post_attention_norm(self.attn_output(o))
        h = self.ffn_norm(x)
        h = F.gelu(self.ffn_gate(h), approximate="tanh") * self.ffn_up(h)
        return x + self.post_ffw_norm(self.ffn_down(h))


class Gemma3(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.token_embd = nn.Parameter(torch.randn(c.n_vocab, c.d_model) / math.sqrt(c.d_model))
        self.layers = nn.ModuleList(Layer(c, c.is_local(i)) for i in range(c.n_layers))
        self.output_norm = Norm(c.d_model, c.eps)
        self.quantised = False
        for base in (c.rope_base_local, c.rope_base_global):
            frequency = base ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
            angle = torch.arange(c.n_ctx)[:, None] * frequency
            for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
                self.register_buffer(f"{name}_{base:.0e}", table, persistent=False)

    def quantise(self):
        """From here on the forward pass uses the values of the quantised file."""
        self.quantised = True
        for m in self.modules():
            if isinstance(m, Linear):
                m.kind = "Q4_0"

    def forward(self, ids):
        """Final hidden states and the matrix that makes logits of them."""
        c, t = self.c, ids.shape[1]
        e = self.token_embd
        if self.quantised:
            e = StraightThrough.apply(e, c.embedding_type)
        tables = [[getattr(self, f"{n}_{base:.0e}")[:t] for n in ("cos", "sin")]
                  for base in (c.rope_base_local, c.rope_base_global)]
        # distance query - key inside a block of window queries and two of keys
        w = c.window
        distance = torch.arange(w)[:, None] - torch.arange(2 * w)[None] + w
        mask = ((distance >= 0) & (distance < w)).repeat(t // w, 1, 1, 1)
        mask[0, :, :, :w] = False        # nothing before the first block
        x = F.embedding(ids, e) * math.sqrt(c.d_model)
        for layer in self.layers:
            x = layer(x, tables, mask)
        return self.output_norm(x), e


# ---- Optimiser -------------------------------------------------------------------------------

def orthogonal(g):
    """The nearest matrices with equal singular values, by five Newton-Schulz steps (Muon)."""
    x = g.bfloat16() / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    wide = g.shape[-2] <= g.shape[-1]
    x = x if wide else x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide else x.mT).float()


class Optimiser:
    """Muon for the matrices, AdamW's rule for the embedding and the norms."""
    def __init__(self, model, args):
        self.args = args
        named = dict(model.named_parameters())
        self.matrices = {}                      # by shape: one batched product for many
        for name, p in named.items():
            if p.ndim == 2 and name != "token_embd":
                self.matrices.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {s: torch.zeros(len(ps), *s) for s, ps in self.matrices.items()}
        embedding = [named["token_embd"]]
        norms = [p for p in named.values() if p.ndim == 1]
        self.adam = torch.optim.AdamW([
            dict(params=embedding, scale=args.lr_embedding),
            dict(params=norms, scale=args.lr_norm)], betas=(0.9, 0.98), weight_decay=0)

    def step(self, factor):
        """factor: of the schedule, 0 .. 1."""
        lr = self.args.lr * factor
        for shape, ps in self.matrices.items():
            g, m = torch.stack([p.grad for p in ps]), self.momentum[shape]
            m.lerp_(g, 0.05)
            update = orthogonal(g.lerp(m, 0.95)) * max(1, shape[0] / shape[1]) ** 0.5
            for p, u in zip(ps, update):
                p.data.mul_(1 - lr * self.args.decay).sub_(u, alpha=lr)
        for group in self.adam.param_groups:
            group["lr"] = group["scale"] * factor
        self.adam.step()

    def state_dict(self):
        return dict(momentum=self.momentum, adam=self.adam.state_dict())

    def load_state_dict(self, d):
        self.momentum = d["momentum"]
        self.adam.load_state_dict(d["adam"])


# ---- Training --------------------------------------------------------------------------------

class Stream:
    """Tales in a new order every epoch, <bos> tale <eos> <bos> tale <eos> ..., cut into windows
    of n + 1 tokens. Window number i is always the same: a run that was stopped goes on exactly."""
    def __init__(self, tales, n, seed):
        self.tales, self.n, self.seed, self.epoch = tales, n, seed, -1
        self.per_epoch = (sum(map(len, tales)) - 1) // n

    def window(self, i):
        if self.epoch != i // self.per_epoch:
            self.epoch = i // self.per_epoch
            rng = np.random.default_rng([self.seed, self.epoch])
            self.tokens = np.concatenate([self.tales[k] for k in rng.permutation(len(self.tales))])
            self.order = rng.permutation(self.per_epoch)
        at = self.order[i % self.per_epoch] * self.n
        w = self.tokens[at:at + self.n + 1].astype(np.int64)
        w[0] = BOS           # as every text begins that the model is given later
        return w


class Data:
    """Batches: a fixed share of the windows are tales and fables, the rest cycles. (Tales alone at
    the end were tried: the model learned them by heart.)"""
    def __init__(self, args):
        z = np.load(args.work / "tokens.npz")
        ends = np.cumsum(z["length"])
        tales = {}
        for begin, end, kind in zip(ends - z["length"], ends, z["kind"]):
            tales.setdefault("cycle" if kind == "cycle" else
                             "heldout" if kind == "heldout" else "tale", []).append(
                                 z["ids"][begin:end])
        n = args.config.n_ctx
        self.tale, self.cycle = Stream(tales["tale"], n, SEED), Stream(tales["cycle"], n, SEED)
        self.heldout, self.n_bytes = z["heldout"].astype(np.int64), z["n_bytes"]
        self.args = args

    def batch(self, step):
        """Batch number step."""
        b = self.args.batch
        n = round(b * self.args.tale_share)
        return torch.from_numpy(np.stack(
            [self.tale.window(step * n + i) for i in range(n)] +
            [self.cycle.window(step * (b - n) + i) for i in range(b - n)]))


@torch.no_grad()
def evaluate(model, data):
    """Bits per byte and perplexity of the held-out tales as `gemma3 --perplexity` has them: chunks
    of n_ctx tokens after <bos>, the second half of each is scored."""
    n = model.c.n_ctx
    chunks = data.heldout[:len(data.heldout) // n * n].reshape(-1, n).copy()
    total, n_bytes = 0.0, 0
    for part in np.array_split(chunks, max(1, len(chunks) // 8)):
        ids = torch.from_numpy(part.copy())
        target = ids[:, n // 2 + 1:].clone()
        ids[:, 0] = BOS
        with torch.autocast("cpu", torch.bfloat16):
            h, e = model(ids)
            logits = F.linear(h[:, n // 2:-1], e)
        total += F.cross_entropy(logits.float().flatten(0, 1), target.flatten(),
                                 reduction="sum").item()
        n_bytes += data.n_bytes[target.numpy()].sum()
    scored = chunks.shape[0] * (n - 1 - n // 2)
    return total / math.log(2) / n_bytes, math.exp(total / scored)


def token_losses(model, ids, teacher=None):
    """Mean loss of predicting ids[:, 1:]: cross entropy, or with a teacher the divergence of the
    model's probabilities from the teacher's."""
    with torch.autocast("cpu", torch.bfloat16):
        h, e = model(ids[:, :-1])
        logits = F.linear(h, e)
        if teacher is not None:
            with torch.no_grad():
                wanted = F.linear(*teacher(ids[:, :-1]))
    if teacher is None:
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    return F.kl_div(logits.float().log_softmax(-1), wanted.float().log_softmax(-1),
                    reduction="sum", log_target=True) / ids[:, 1:].numel()


def save(path, **state):
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)      # a stop half-way leaves the old file whole


def train(args, model, path, steps, lr_scale, plateau, teacher=None):
    """The loop of both stages; path is the checkpoint, read first if it is there."""
    data, optimiser = Data(args), Optimiser(model, args)
    done, history = 0, []
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, history = state["step"], state["history"]
    losses = torch.compile(lambda ids: token_losses(model, ids, teacher)) if args.compile else \
        lambda ids: token_losses(model, ids, teacher)
    clock, recent = time.time(), []
    for step in range(done, steps):
        descent = (steps - step) / (steps * (1 - plateau))
        factor = min(1.0, (step + 1) / args.warmup, descent)
        for p in model.parameters():
            p.grad = None
        loss = losses(data.batch(step))
        loss.backward()
        optimiser.step(factor * lr_scale)
        recent.append(loss.item())
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            evaluated = (step + 1) % args.eval_every == 0 or step + 1 == steps
            bits, ppl = evaluate(model, data) if evaluated else (None, None)
            history.append((step + 1, float(np.mean(recent)), bits))
            rate = len(recent) * args.batch * args.config.n_ctx / (time.time() - clock)
            bar = "#" * (20 * (step + 1) // steps)
            print(f"\r[{bar:.<20}] {step + 1}/{steps} loss {history[-1][1]:.4f} {rate:.0f} tokens/s"
                  + (f", held-out {bits:.4f} bits a byte, ppl {ppl:.2f}" if evaluated else ""),
                  end="\n" if evaluated else "", flush=True)
            clock, recent = time.time(), []
            if evaluated:
                save(path, model=model.state_dict(), optimiser=optimiser.state_dict(),
                     step=step + 1, history=history, config=asdict(args.config))


def stage_float(args):
    """-> float.pt: warm-up, a plateau, then down to zero"""
    torch.manual_seed(SEED)
    train(args, Gemma3(args.config), args.work / "float.pt", args.steps, 1.0, args.plateau)


def load_model(path):
    state = torch.load(path, weights_only=False)
    model = Gemma3(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model, state


def stage_qat(args):
    """float.pt -> qat.pt: the same model rounded to Q4_0 in the forward pass, taught by float.pt"""
    teacher, _ = load_model(args.work / "float.pt")
    student, _ = load_model(args.work / "float.pt")
    student.quantise()
    train(args, student, args.work / "qat.pt", args.qat_steps, args.qat_lr, 0.0,
          teacher.requires_grad_(False))


# ---- GGUF ------------------------------------------------------------------------------------

def write_vocabulary(w, sp):
    """As llama.cpp's converter writes it: types 1 normal, 2 unknown, 3 control, 4 user-defined,
    6 byte; user-defined texts with real spaces; scores are -(rank of the merge)."""
    texts, scores, types = [], [], []
    for i in range(sp.vocab_size()):
        text, kind, score = sp.id_to_piece(i), 1, sp.get_score(i)
        if sp.is_unknown(i) or sp.is_control(i):
            kind, score = 3, -1000.0
        elif sp.is_byte(i):
            kind = 6
        elif text in RUNS:
            text, kind, score = text.replace("\u2581", " "), 4, -1000.0
        texts.append(text.encode())
        scores.append(score)
        types.append(kind)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(texts)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_unk_token_id(3)
    w.add_pad_token_id(PAD)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)


def export(model, sp, path, kind, embedding):
    """Writes a GGUF whose matrices are of type kind; norms are float32, with the 1 added."""
    import gguf
    c, types = model.c, gguf.GGMLQuantizationType
    w = gguf.GGUFWriter(path, "gemma3")
    w.add_type("model")
    w.add_name("Gemma 3 folk tales")
    w.add_license("MIT")
    w.add_file_type({"F32": 0, "Q4_0": 2, "Q8_0": 7}[kind])
    w.add_quantization_version(2)
    w.add_block_count(c.n_layers)
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.d_model)
    w.add_feed_forward_length(c.d_ff)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(c.n_kv_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_sliding_window(c.window)
    w.add_rope_freq_base(c.rope_base_global)
    w.add_rope_freq_base_swa(c.rope_base_local)
    write_vocabulary(w, sp)
    for name, p in model.named_parameters():
        x = p.detach().numpy()
        if x.ndim == 1:
            x, as_type = 1 + x, "F32"
        else:
            as_type = embedding if name == "token_embd" else kind
        data = gguf.quants.quantize(x, types[as_type])
        if as_type in FAKE:     # what training used is what the file says
            same = gguf.quants.dequantize(data, types[as_type]) == FAKE[as_type](p.detach()).numpy()
            assert same.all(), name
        name = re.sub(r"^layers\.", "blk.", name).removesuffix(".w") + ".weight"
        w.add_tensor(name, data, raw_dtype=types[as_type])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(path, Path(path).stat().st_size, "bytes")


def stage_export(args):
    """-> float-f32.gguf, float-q8_0.gguf, float-q4_0.gguf, the model itself, and loss.png"""
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=str(args.work / "tokenizer.model"))
    model, _ = load_model(args.work / "float.pt")
    for kind in ("F32", "Q8_0", "Q4_0"):
        export(model, sp, args.work / f"float-{kind.lower()}.gguf", kind,
               args.config.embedding_type if kind == "Q4_0" else kind)
    if (args.work / "qat.pt").exists():
        model, _ = load_model(args.work / "qat.pt")
        export(model, sp, args.work / "gemma3-folktales-q4_0.gguf", "Q4_0",
               args.config.embedding_type)
        draw_losses(args)


def draw_losses(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(2, 1), layout="constrained")
    for ax, name, unit in zip(axes, ("float", "qat"), ("cross entropy", "divergence")):
        history = load_model(args.work / f"{name}.pt")[1]["history"]
        ax.plot([h[0] for h in history], [h[1] for h in history], lw=1, color="tab:gray")
        ax.set(title=name, xlabel="step", ylabel=f"training: {unit}, nats")
        twin = ax.twinx()
        points = [(h[0], h[2]) for h in history if h[2]]
        twin.plot(*zip(*points), "o-", ms=3, lw=1, color="tab:red")
        twin.set_ylabel("held-out: bits a byte", color="tab:red")
    fig.savefig(args.work / "loss.png", dpi=90)


# ---- Command line ----------------------------------------------------------------------------

STAGES = dict(data=stage_data, tokenizer=stage_tokenizer, float=stage_float, qat=stage_qat,
              export=stage_export)


def main():
    a = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("stage", choices=[*STAGES, "all"])
    a.add_argument("--corpus", type=Path, default="folktales.txt")
    a.add_argument("--work", type=Path, required=True, help="folder for everything made")
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--no-compile", dest="compile", action="store_false")
    a.add_argument("--batch", type=int, default=8, help="windows of n_ctx tokens in a step")
    a.add_argument("--steps", type=int, default=2100)
    a.add_argument("--plateau", type=float, default=0.4, help="share of the steps at full rate")
    a.add_argument("--warmup", type=int, default=60)
    a.add_argument("--lr", type=float, default=0.025, help="of the matrices (Muon)")
    a.add_argument("--lr-embedding", type=float, default=0.006)
    a.add_argument("--lr-norm", type=float, default=0.006)
    a.add_argument("--decay", type=float, default=0.15, help="weight decay of the matrices")
    a.add_argument("--tale-share", type=float, default=0.75, help="the rest of a batch are cycles")
    a.add_argument("--qat-steps", type=int, default=360)
    a.add_argument("--qat-lr", type=float, default=0.1, help="times the rates above, at first")
    a.add_argument("--log-every", type=int, default=20)
    a.add_argument("--eval-every", type=int, default=100)
    a.add_argument("--set", nargs="*", default=[], metavar="NAME=N", help="of Config, for trials")
    args = a.parse_args()
    args.config = Config(**{k: int(v) for k, v in (s.split("=") for s in args.set)})
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage(args)


if __name__ == "__main__":
    main()
