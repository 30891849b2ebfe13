from dataclasses import dataclass, field
from pathlib import Path
import hashlib
import os
import shlex
import struct
import subprocess
import threading

MAGIC = b"smithy.log.4\n"


@dataclass(eq=False)
class Node:
    path: str
    producer: "Edge | None" = None
    consumers: list["Edge"] = field(default_factory=list)
    mtime: int = -1
    dirty: bool = False

    def stat(self):
        try:
            self.mtime = os.stat(self.path).st_mtime_ns
        except FileNotFoundError:
            self.mtime = 0
        return self.mtime


@dataclass(eq=False)
class Edge:
    command: str
    inputs: list[Node]
    outputs: list[Node]
    implicit: list[Node] = field(default_factory=list)
    order_only: list[Node] = field(default_factory=list)
    depfile: str = ""
    restat: bool = False
    pool: str = ""
    waiting: int = 0

    @property
    def digest(self):
        return hashlib.blake2b(self.command.encode(), digest_size=8).digest()


class BuildLog:
    def __init__(self, path):
        self.path = Path(path)
        self.entries = {}
        if self.path.exists():
            self._read()
        self.file = open(self.path, "ab")
        if self.file.tell() == 0:
            self.file.write(MAGIC)

    def _read(self):
        data = self.path.read_bytes()
        if not data.startswith(MAGIC):
            self.path.unlink()
            return
        at = len(MAGIC)
        while at + 18 <= len(data):
            size, mtime, digest = struct.unpack_from("<HQ8s", data, at)
            at += 18
            name = data[at:at + size]
            if len(name) < size:
                break
            at += size
            self.entries[name.decode("utf-8", "surrogateescape")] = mtime, digest

    def record(self, node, digest):
        name = node.path.encode("utf-8", "surrogateescape")
        self.file.write(struct.pack("<HQ8s", len(name), node.mtime, digest) + name)
        self.file.flush()
        self.entries[node.path] = node.mtime, digest


class Graph:
    def __init__(self):
        self.nodes = {}
        self.edges = []

    def node(self, path):
        path = os.path.normpath(path)
        if path not in self.nodes:
            self.nodes[path] = Node(path)
        return self.nodes[path]

    def add(self, command, inputs, outputs, implicit=(), order_only=(), **kw):
        edge = Edge(
            command,
            [self.node(p) for p in inputs],
            [self.node(p) for p in outputs],
            [self.node(p) for p in implicit],
            [self.node(p) for p in order_only],
            **kw,
        )
        for out in edge.outputs:
            if out.producer:
                raise ValueError(f"two rules make {out.path}")
            out.producer = edge
        for node in edge.inputs + edge.implicit + edge.order_only:
            node.consumers.append(edge)
        self.edges.append(edge)
        return edge

    def load_depfile(self, edge):
        try:
            text = Path(edge.depfile).read_text()
        except FileNotFoundError:
            return False
        _, _, deps = text.replace("\\\n", " ").partition(":")
        for path in shlex.split(deps):
            node = self.node(path)
            if node not in edge.inputs and node not in edge.implicit:
                edge.implicit.append(node)
                node.consumers.append(edge)
        return True

    def plan(self, targets, log):
        done, stack, todo = set(), [], []

        def visit(node):
            if node.path in done:
                return
            if node.path in stack:
                loop = stack[stack.index(node.path):] + [node.path]
                raise ValueError("dependency cycle: " + " -> ".join(loop))
            node.stat()
            edge = node.producer
            if edge is None:
                if node.mtime == 0:
                    user = stack[-1] if stack else "the command line"
                    raise FileNotFoundError(f"{node.path}, needed by {user}, and no rule to make it")
                done.add(node.path)
                return
            stack.append(node.path)
            known = self.load_depfile(edge) if edge.depfile else True
            for dep in edge.inputs + edge.implicit + edge.order_only:
                visit(dep)
            stack.pop()

            newest = max((n.mtime for n in edge.inputs + edge.implicit), default=0)
            dirty = not known or any(n.dirty for n in edge.inputs + edge.implicit)
            for out in edge.outputs:
                done.add(out.path)
                out.stat()
                logged = log.entries.get(out.path)
                if out.mtime == 0 or logged is None or logged[1] != edge.digest:
                    dirty = True
                elif (logged[0] if edge.restat else out.mtime) < newest:
                    dirty = True
            if dirty:
                for out in edge.outputs:
                    out.dirty = True
                todo.append(edge)

        for target in targets:
            visit(self.node(target))
        return todo


class Runner:
    def __init__(self, log, jobs, show):
        self.log, self.jobs, self.show = log, jobs, show
        self.lock = threading.Condition()
        self.failed = []

    def run(self, plan):
        todo = set(plan)
        for edge in plan:
            deps = {n.producer for n in edge.inputs + edge.implicit + edge.order_only}
            edge.waiting = len(deps & todo)
        ready = [e for e in plan if e.waiting == 0]
        running = 0
        with self.lock:
            while (ready and not self.failed) or running:
                while ready and running < self.jobs and not self.failed:
                    threading.Thread(target=self._one, args=(ready.pop(0), ready, todo)).start()
                    running += 1
                before = len(todo)
                self.lock.wait_for(lambda: len(todo) < before)
                running -= before - len(todo)
        return not self.failed

    def _one(self, edge, ready, todo):
        for out in edge.outputs:
            os.makedirs(os.path.dirname(out.path) or ".", exist_ok=True)
        proc = subprocess.run(edge.command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with self.lock:
            todo.discard(edge)
            self.show(edge, proc.returncode, proc.stdout)
            if proc.returncode:
                self.failed.append(edge)
            else:
                for out in edge.outputs:
                    out.stat()
                    self.log.record(out, edge.digest)
                for other in {c for out in edge.outputs for c in out.consumers} & todo:
                    other.waiting -= 1
                    if other.waiting == 0:
                        ready.append(other)
            self.lock.notify_all()
