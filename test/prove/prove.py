#!/usr/bin/env python3
"""prove.py - runs the claims of claims.c symbolically: for all values at once.

    python3 test/prove/prove.py [take read ...]    those that begin so; all

Needs gcc on x86-64 and angr (pip install angr 'bitstring<4.3' 'pycparser==3.0'). One line a claim; exit
code 1 when one can be broken, with values that break it.
"""
import logging
import multiprocessing
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
         "-fno-ipa-pure-const", "-fno-ipa-modref", "-fno-ipa-reference", "-no-pie",
         "-fsanitize=undefined", "-fno-sanitize=alignment", "-fsanitize-undefined-trap-on-error",
         "-include", os.path.join(HERE, "../fuzz/scalar.h")]
MAX_PATHS = 2000
MAX_STRINGS = 3             # of one pair: its key, and two of an array
SCRATCH = 0x10000000000     # where bytes of the file are taken from: nobody knows what stands there
LETTERS = 0x20000000000     # the same, where it does not matter


def number(state, at, n):
    return state.memory.load(at, n, endness="Iend_LE")


def new_file(state, size):
    """Where it lies does not matter: each has its own 2^47 bytes."""
    files = state.globals["files"]
    state.globals["files"] = files + (size,)
    return claripy.BVV((len(files) + 1) << 47, 64)


def is_outside(offset, size, n):
    return claripy.Or(claripy.UGT(offset, size), claripy.UGT(n, size - offset))


class Any(angr.SimProcedure):
    """any(): a number of which nothing is known."""

    def run(self):
        x = claripy.BVS("any", 64)
        self.state.globals["values"] += (x,)
        return x


class AnyFile(angr.SimProcedure):
    """any_file(size): an address behind which size bytes can be read."""

    def run(self, size):
        return new_file(self.state, size)


class IsReadable(angr.SimProcedure):
    """is_readable(p, n): whether n bytes at p, where take had them from, lie in the file."""

    def run(self, p, n):
        found = self.state.globals["proof"].file_of(self.state, p)
        return claripy.If(is_outside(*found, n), claripy.BVV(0, 64), claripy.BVV(1, 64))


class Sentence(angr.SimProcedure):
    """A sentence, which is written for people, and here is none: an empty one."""

    def run(self, text, n):
        if not text.concrete or text.concrete_value:
            self.state.memory.store(text, claripy.BVV(0, 8))
        return -1


class Shown(angr.SimProcedure):
    """claim_shown says that it reads its string and nothing else."""

    def run(self, to, text, n):
        proof = self.state.globals["proof"]
        found = proof.file_of(self.state, text)
        outside = is_outside(*found, n) if found else claripy.true()
        proof.never(self.state, claripy.And(n != 0, outside), "a name outside the file")
        return to


class Take(angr.SimProcedure):
    """take: what claim_take says of it, as one path where it fails and one where it does not. What it
    returns is a file of its own, of n bytes, and the cursor stands anywhere further on."""

    def run(self, c, n):
        at_p, at_left, at_failed = (c + offset for offset in self.state.globals["layout"][:3])
        left, failed = number(self.state, at_left, 8), number(self.state, at_failed, 4)
        fails = claripy.Or(failed != 0, claripy.UGT(n, left))
        end = claripy.BVV(1 << 47, 64) + self.state.globals["files"][0]
        self.inhibit_autoret = True
        for does_fail in True, False:
            state = self.state.copy()
            state.add_constraints(fails if does_fail else claripy.Not(fails))
            if not state.solver.satisfiable():
                continue
            result = claripy.BVV(0, 64)
            if does_fail:
                state.memory.store(at_failed, claripy.BVV(1, 32), endness="Iend_LE")
            else:
                result, now_left = new_file(state, n), claripy.BVS("left", 64)
                state.add_constraints(claripy.ULE(now_left, left - n))
                state.memory.store(at_p, end - now_left, endness="Iend_LE")
                state.memory.store(at_left, now_left, endness="Iend_LE")
            back = self.cc.teardown_callsite(state, result, self.prototype)
            self.successors.add_successor(state, back, claripy.true(), "Ijk_Ret")


class FindTensor(angr.SimProcedure):
    """find_tensor: there is none, or one with any type, shape and place. (Its name is not used.)"""

    def run(self, _, name, t):
        offset_type, offset_ne, offset = self.state.globals["layout"][3:]
        words = [(offset_type, 32), (offset, 64)] + [(offset_ne + 8 * k, 64) for k in range(4)]
        for at, bits in words:
            x = claripy.BVS("tensor", bits)
            self.state.globals["values"] += (x,)
            self.state.memory.store(t + at, x, endness="Iend_LE")
        found = claripy.BVS("found", 64)
        self.state.add_constraints(claripy.ULE(found, 1))
        return found


INSTEAD = {"any": Any, "any_file": AnyFile, "is_readable": IsReadable, "sentence": Sentence, "shown": Shown, "take": Take,
           "find_tensor": FindTensor}
PROVEN_BY = {"claim_take": "take", "claim_shown": "shown"}


class Proof:
    def __init__(self, project, claim):
        self.project, self.claim = project, claim
        self.address = {name: project.loader.find_symbol(name).rebased_addr
                        for name in (*INSTEAD, claim, "broken", "impossible", "take_string", "layout")}
        for name, procedure in INSTEAD.items():
            if PROVEN_BY.get(claim) != name:
                project.hook(self.address[name], procedure())
        self.state = project.factory.call_state(self.address[claim], add_options={
            angr.options.SYMBOL_FILL_UNCONSTRAINED_MEMORY,
            angr.options.SYMBOL_FILL_UNCONSTRAINED_REGISTERS})
        layout = [number(self.state, self.address["layout"] + 8 * k, 8) for k in range(6)]
        known = {"values": (), "files": (), "proof": self, "n_strings": 0,
                 "layout": [self.state.solver.eval_one(x) for x in layout]}
        for name, value in known.items():
            self.state.globals[name] = value
        for k in range(4096 // 8):
            self.state.memory.store(LETTERS + 8 * k, b"a" * 8)
        self.faults, self.n_reads = [], 0
        self.state.inspect.b("mem_read", when=angr.BP_BEFORE, action=self.read)
        self.state.inspect.b("mem_write", when=angr.BP_BEFORE, action=self.write)

    def fault(self, state, what, extra=()):
        values = [state.solver.eval(x, extra_constraints=extra) for x in state.globals["values"]]
        self.faults.append(what + " with " + ", ".join(hex(v) for v in values))

    def never(self, state, what_may_not_be, what):
        if state.solver.satisfiable(extra_constraints=[what_may_not_be]):
            self.fault(state, what, [what_may_not_be])

    def file_of(self, state, address):
        """The file that an address is in: the address's offset there, and the file's size."""
        files = state.globals["files"]
        address = claripy.BVV(address, 64) if isinstance(address, int) else address
        if address.concrete:
            k = (address.concrete_value >> 47) - 1
        else:
            # only of any_file's, the first, addresses are made from its size: a cursor's
            k = 0 if files and not files[0].variables.isdisjoint(address.variables) else -1
        return (address - ((k + 1) << 47), files[k]) if 0 <= k < len(files) else None

    def read(self, state):
        found = self.file_of(state, state.inspect.mem_read_address)
        if not found:
            return
        n = state.inspect.mem_read_length
        n = n if isinstance(n, int) else state.solver.eval_one(n)
        self.never(state, is_outside(*found, n), f"a read of {n} bytes outside the file")
        self.n_reads += 1
        from_where = LETTERS if self.claim == "claim_shown" else SCRATCH + 64 * self.n_reads
        state.inspect.mem_read_address = claripy.BVV(from_where, 64)

    def write(self, state):
        if self.file_of(state, state.inspect.mem_write_address):
            self.fault(state, "a write to the file")

    def ends(self, state):
        """A path ends where a claim is broken, is not made, or has been seen often enough."""
        if state.addr == self.address["take_string"]:
            state.globals["n_strings"] += 1
        if state.addr == self.address["broken"]:
            self.fault(state, "broken")
        return (state.addr in (self.address["broken"], self.address["impossible"])
                or state.globals["n_strings"] > MAX_STRINGS)

    def run(self):
        manager = self.project.factory.simulation_manager(self.state)
        while manager.active:
            manager.step()
            manager.move("active", "ended", self.ends)
            if len(manager.active) > MAX_PATHS:
                self.faults.append("too many paths")
                break
        for e in manager.errored:
            self.fault(e.state, f"a trap: {e.error}")
        if manager.unconstrained:
            self.faults.append("a jump to anywhere")
        return sum(len(stash) for stash in manager.stashes.values())


project = None  # of the claims' program, which each process has from before it was forked


def prove(claim):
    begin = time.process_time()
    proof = Proof(project, claim)
    n_paths = proof.run()
    seconds = time.process_time() - begin
    print(f"{'not ' if proof.faults else ''}ok - {claim}: {n_paths} paths, {proof.n_reads} reads of "
          f"the file, {seconds:.0f} s", *("#   " + what for what in proof.faults[:5]), sep="\n", flush=True)
    return bool(proof.faults)


def main():
    global project
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        binary = os.path.join(folder, "claims")
        subprocess.run(["gcc", *FLAGS, "-o", binary, os.path.join(HERE, "claims.c"),
                        os.path.join(TOP, "tokenizer.c"), "-lm"], check=True)
        project = angr.Project(binary, auto_load_libs=False)
    wanted = tuple("claim_" + name for name in sys.argv[1:]) or ("claim_",)
    claims = sorted(s.name for s in project.loader.main_object.symbols if s.name.startswith(wanted))
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        broken = pool.map(prove, claims, chunksize=1)
    return any(broken)


if __name__ == "__main__":
    sys.exit(main())
