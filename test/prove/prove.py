"""prove.py - runs every claim_ function of claims.c symbolically: all values of its arguments at once.

    python3 test/prove/prove.py [claim ...]        needs angr (pip install angr), gcc, x86-64

One line a claim: how many paths there are and how many reads of the file were shown to stay inside it.
Exit code 1 when a claim can be broken, with values that break it.
"""
import logging
import os
import subprocess
import sys
import tempfile
import time

import angr
import claripy

logging.disable(logging.WARNING)
HERE = os.path.dirname(os.path.abspath(__file__))
FLAGS = ["-std=c11", "-O1", "-fno-inline", "-fno-stack-protector", "-fcf-protection=none", "-no-pie",
         "-fno-builtin", "-fsanitize=undefined", "-fno-sanitize=alignment",
         "-fsanitize-undefined-trap-on-error", "-include", HERE + "/../fuzz/scalar.h"]
ROUNDS = 4  # of a loop whose number of rounds the file says


class Fails(angr.SimProcedure):
    """fail(): a sentence is written, whose making is not part of a claim."""

    def run(self, *_):
        return claripy.BVV(-1, 64)


class Prover:
    def __init__(self, binary):
        self.project = angr.Project(binary, auto_load_libs=False)
        for name, hook in (("fail", Fails), ("shown", None)):
            symbol = self.project.loader.find_symbol(name)
            if symbol and hook:
                self.project.hook(symbol.rebased_addr, hook(), replace=True)
        self.broken = self.project.loader.find_symbol("broken").rebased_addr

    def prove(self, claim, n_arguments, bounds):
        args = [claripy.BVS(f"a{i}", 64) for i in range(n_arguments)]
        state = self.project.factory.call_state(
            self.project.loader.find_symbol(claim).rebased_addr, *args,
            add_options={angr.options.SYMBOL_FILL_UNCONSTRAINED_MEMORY,
                         angr.options.SYMBOL_FILL_UNCONSTRAINED_REGISTERS})
        state.solver.add(*bounds(*args))
        self.data, self.size, self.n_reads, self.wrong = args[0], args[1] if n_arguments > 1 else None, 0, []
        name = next(iter(self.data.variables))
        state.inspect.b("mem_read", when=angr.BP_BEFORE, action=lambda s: self.read(s, name))
        state.inspect.b("mem_write", when=angr.BP_BEFORE, action=lambda s: self.write(s, name))
        manager = self.project.factory.simulation_manager(state)
        manager.use_technique(angr.exploration_techniques.LoopSeer(
            cfg=None, bound=ROUNDS, limit_concrete_loops=False)) if False else None
        manager.run(until=lambda m: len(m.active) > 3000)
        for s in manager.active:
            self.wrong.append("too many paths")
        for s in manager.deadended:
            pass
        for e in manager.errored:
            self.wrong.append(f"a trap or an error: {e.error}")
        return manager

    def read(self, state, name):
        address, n = state.inspect.mem_read_address, state.inspect.mem_read_length
        if name not in address.variables:
            return
        n = n if isinstance(n, int) else state.solver.eval_one(n)
        offset = address - self.data
        outside = claripy.Or(claripy.UGT(offset, self.size), claripy.UGT(n, self.size - offset))
        if state.solver.satisfiable(extra_constraints=[outside]):
            self.wrong.append(f"a read of {n} bytes outside the file")
        self.n_reads += 1
        # any byte may stand there: a fresh place, which holds unknowns
        state.inspect.mem_read_address = claripy.BVV(0x7000_0000_0000 + 16 * self.n_reads, 64)

    def write(self, state, name):
        if name in state.inspect.mem_write_address.variables:
            self.wrong.append("a write to the file")
