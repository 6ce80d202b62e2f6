#!/usr/bin/env python3
"""prove.py - runs the claims of claims.c symbolically: for all values of their arguments at once.

    python3 test/prove/prove.py [CLAIM ...]

Needs gcc on x86-64 and angr (pip install angr 'bitstring<4.3' 'pycparser==3.0'). One line a claim; exit
code 1 when one can be broken, with values that break it.
"""
import logging
import os
import subprocess
import sys
import tempfile
import time

import angr
import claripy

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.join(HERE, "..", "..")
FLAGS = ["-std=c11", "-O1", "-fno-inline", "-fno-stack-protector", "-fcf-protection=none",
         "-no-pie", "-fsanitize=undefined", "-fno-sanitize=alignment",
         "-fsanitize-undefined-trap-on-error", "-include", os.path.join(HERE, "../fuzz/scalar.h")]
MAX_PATHS = 2000
SCRATCH = 0x700000000000  # where bytes of the file are taken from: nobody knows what stands there


def a_file(data, size, at, *_):
    """Any address that is one, any number of bytes there, any place among them."""
    return [claripy.UGE(data, 1 << 16), claripy.ULE(data, 1 << 46), claripy.ULE(size, 1 << 46),
            claripy.ULE(at, size)]


def a_file_and_flag(data, size, at, failed, *_):
    return a_file(data, size, at) + [claripy.ULE(failed, 1)]


def all_values(*_):
    return []


CLAIMS = {  # name: how many arguments, and what holds of them
    "claim_take": (5, a_file_and_flag),
    "claim_take_numbers": (4, a_file_and_flag),
    "claim_take_string": (4, a_file_and_flag),
    "claim_plus": (2, all_values),
    "claim_times": (2, lambda a, b: [claripy.ULT(b, 1 << 5)]),
    "claim_piece": (3, lambda used, size, n: [claripy.ULE(used, size), claripy.ULE(size, 1 << 46)]),
    "claim_encode_work": (1, all_values),
}


class Proof:
    def __init__(self, project, claim):
        n, bounds = CLAIMS[claim]
        self.project, self.broken = project, project.loader.find_symbol("broken").rebased_addr
        self.args = [claripy.BVS(f"argument{k}", 64) for k in range(n)]
        entry = project.loader.find_symbol(claim).rebased_addr
        self.state = project.factory.call_state(entry, *self.args, add_options={
            angr.options.SYMBOL_FILL_UNCONSTRAINED_MEMORY,
            angr.options.SYMBOL_FILL_UNCONSTRAINED_REGISTERS})
        self.state.solver.add(*bounds(*self.args))
        self.has_file = bounds in (a_file, a_file_and_flag)
        self.faults, self.n_reads = [], 0
        self.state.inspect.b("mem_read", when=angr.BP_BEFORE, action=self.read)
        self.state.inspect.b("mem_write", when=angr.BP_BEFORE, action=self.write)

    def fault(self, state, what, extra=()):
        values = [state.solver.eval(a, extra_constraints=extra) for a in self.args]
        self.faults.append(what + " with " + ", ".join(hex(v) for v in values))

    def in_file(self, address):
        return self.has_file and not self.args[0].variables.isdisjoint(address.variables)

    def read(self, state):
        address, n = state.inspect.mem_read_address, state.inspect.mem_read_length
        if isinstance(address, int) or not self.in_file(address):
            return
        n = n if isinstance(n, int) else state.solver.eval_one(n)
        offset, size = address - self.args[0], self.args[1]
        outside = claripy.Or(claripy.UGT(offset, size), claripy.UGT(n, size - offset))
        if state.solver.satisfiable(extra_constraints=[outside]):
            self.fault(state, f"a read of {n} bytes outside the file", [outside])
        self.n_reads += 1
        state.inspect.mem_read_address = claripy.BVV(SCRATCH + 64 * self.n_reads, 64)

    def write(self, state):
        address = state.inspect.mem_write_address
        if not isinstance(address, int) and self.in_file(address):
            self.fault(state, "a write to the file")

    def run(self):
        manager = self.project.factory.simulation_manager(self.state)
        while manager.active:
            manager.step()
            for s in manager.active:
                if s.addr == self.broken:
                    self.fault(s, "broken")
            manager.move("active", "done", lambda s: s.addr == self.broken)
            if len(manager.active) > MAX_PATHS:
                self.faults.append("too many paths")
                break
        n_paths = sum(len(stash) for stash in manager.stashes.values())
        for e in manager.errored:
            self.fault(e.state, f"a trap: {e.error}")
        if manager.unconstrained:
            self.faults.append("a jump to anywhere")
        return n_paths


def main():
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        binary = os.path.join(folder, "claims")
        subprocess.run(["gcc", *FLAGS, "-o", binary, os.path.join(HERE, "claims.c"),
                        os.path.join(TOP, "tokenizer.c"), "-lm"], check=True)
        project = angr.Project(binary, auto_load_libs=False)
    n_broken = 0
    for claim in sys.argv[1:] or CLAIMS:
        begin = time.time()
        proof = Proof(project, claim)
        n_paths = proof.run()
        seconds = time.time() - begin
        print(f"{'not ' if proof.faults else ''}ok - {claim}: {n_paths} paths, {proof.n_reads} reads of "
              f"the file, {seconds:.0f} s", flush=True)
        for what in proof.faults[:5]:
            print("#  ", what)
        n_broken += bool(proof.faults)
    return n_broken > 0


if __name__ == "__main__":
    sys.exit(main())
