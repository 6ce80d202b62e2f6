#!/usr/bin/env python3
"""transformers as an engine for conform check --other: all logits for a file of ids, raw float32.
usage: transformers_logits.py CHECKPOINT IDS OUT [float32|float64|bfloat16] [SOCKET]
       transformers_logits.py --serve SOCKET

CHECKPOINT: what dump_layers.py takes. With a SOCKET, a file that --serve makes and listens on until it is
stopped, that process does the work and keeps the model between one call and the next.
"""
import sys
from multiprocessing.connection import Client, Listener


def compute(kept, path, ids, out, dtype="float32"):
    import torch
    import dump_layers
    if kept.get("key") != (path, dtype):
        kept.update(key=(path, dtype), model=dump_layers.load(path, getattr(torch, dtype)))
    with torch.inference_mode():
        x = kept["model"](torch.tensor([[int(x) for x in open(ids).read().split()]]), use_cache=False)
    x.logits[0].float().numpy().astype("<f4").tofile(out)


def serve(address):
    kept = {}
    with Listener(address, "AF_UNIX") as listener:
        while True:
            with listener.accept() as asked:
                try:
                    compute(kept, *asked.recv())
                    asked.send("")
                except Exception as e:  # the caller's trouble: the next one may be well
                    kept.clear()
                    asked.send(f"{type(e).__name__}: {e}")


def ask(address, *job):
    with Client(address, "AF_UNIX") as server:
        server.send(job)
        return server.recv() or None


if __name__ == "__main__":
    args = sys.argv[1:]
    if len(args) == 2 and args[0] == "--serve":
        serve(args[1])
    elif len(args) in (3, 4):
        compute({}, *args)
    else:
        sys.exit(ask(args[4], *args[:4]) if len(args) == 5 else __doc__)
