#!/usr/bin/env python3
"""Cuts a model's vocabulary to what a product needs: a board has no room for 262,144 rows.

    python3 weights/slice.py model.gguf small.gguf text.txt ...

Keeps control and byte tokens, every token that the texts need, and the pieces these are merged from.
A text made of kept tokens is cut into the same tokens as before, and the logits of rows that are kept do
not change by a bit; tokens are numbered anew, in the old order (small.gguf.ids: the old id of each, one a
line). Rows are copied as they are, whatever their format. Needs the gguf package and the program gemma3
(or GEMMA3=path), which knows how to cut text into tokens."""
import os
import subprocess
import sys

import gguf

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
TABLES = ("tokens", "scores", "token_type")
ARRAY = gguf.GGUFValueType.ARRAY


def merged_from(text, score):
    """The pieces that come up when text is put together, best pair first, as the tokenizer does."""
    parts, seen = list(text), set(text)
    while True:
        pairs = [(-score[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score]
        if not pairs:
            return seen
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        seen.add(parts[i])


def kept_ids(model, texts, tokens, scores, types):
    score, id_of = dict(zip(tokens, scores)), {t: i for i, t in enumerate(tokens)}
    keep = {i for i, t in enumerate(types) if t in (UNKNOWN, CONTROL, BYTE) and "unused" not in tokens[i]}
    for path in texts:
        command = [os.environ.get("GEMMA3", "./gemma3"), "-m", model, "--tokenize", "-f", path]
        keep |= {int(i) for i in subprocess.run(command, check=True, capture_output=True).stdout.split()}
    for i in sorted(keep):
        if types[i] == NORMAL:
            keep |= {id_of[p] for p in merged_from(tokens[i], score) if p in id_of}
    return sorted(keep)


def main(model, out, *texts):
    reader = gguf.GGUFReader(model)
    value = {key: field.contents() for key, field in reader.fields.items()}
    tokens, scores, types = (value["tokenizer.ggml." + t] for t in TABLES)
    keep = kept_ids(model, texts, tokens, scores, types)
    new_id = {old: new for new, old in enumerate(keep)}

    writer = gguf.GGUFWriter(out, value["general.architecture"])
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        v, name = value[key], key.removeprefix("tokenizer.ggml.")
        if name in TABLES:
            v = [v[i] for i in keep]
        elif key.endswith("_token_id"):
            v = new_id.get(v, 0)
        elif key.endswith("_token_ids"):
            v = [new_id[i] for i in v if i in new_id]
        elif key.endswith(".vocab_size"):
            v = len(keep)
        sub = field.types[-1] if field.types[0] == ARRAY else None
        writer.add_key_value(key, v, field.types[0], sub)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in ("token_embd.weight", "output.weight"):
            data = data[keep]
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(out + ".ids", "w") as f:
        f.writelines(f"{i}\n" for i in keep)
    print(f"{len(keep)} of {len(tokens)} tokens, {os.path.getsize(out)} of {os.path.getsize(model)} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
