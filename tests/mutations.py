"""Changes the package one expression at a time and sees whether its tests notice; no test by itself.

    python tests/mutations.py                                      a sample of every module below: hours
    python tests/mutations.py llmfast/contract/checking.py -n 20   20 changes of a module, -n 0 all of them

A change that no test notices is printed, and is an error unless `docs/mutations.md` says why it may be. Each runs in a
process forked from this one, which has imported what is slow to import but nothing of the package. Tests that start
Python again see the unchanged module there.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parents[1]
EXPLAINED = ROOT / "docs" / "mutations.md"

# module -> its tests, without the slow ones
TESTS = {
    "llmfast/backends/derivatives.py": "backends_derivatives",
    "llmfast/backends/reference.py": "backends_reference",
    "llmfast/backends/pytorch.py": "contract backends_derivatives",
    "llmfast/contract/cases.py": "contract_cases verify",
    "llmfast/contract/checking.py": "verify contract_cases",
    "llmfast/contract/suite.py": "verify",
    "llmfast/inference/cache.py": "inference_cache",
    "llmfast/inference/sampling.py": "inference_sampling",
    "llmfast/inference/scoring.py": "inference_scoring",
    "llmfast/quantization/formats.py": "quantization_formats",
    "llmfast/quantization/modules.py": "quantized_linear quantization_formats",
    "llmfast/quantization/plan.py": "quantization_formats quantized_linear",
    "llmfast/tokenizers/bpe.py": "tokenizers",
    "llmfast/tokenizers/bpe_files.py": "tokenizers tokenizers_models",
    "llmfast/tokenizers/bpe_training.py": "tokenizers",
    "llmfast/tokenizers/byte_letters.py": "tokenizers",
    "llmfast/tokenizers/char.py": "tokenizers_vocabulary tokenizers",
    "llmfast/tokenizers/gpt2.py": "tokenizers",
    "llmfast/tokenizers/merge_tree.py": "tokenizers",
    "llmfast/tokenizers/protocol.py": "tokenizers tokenizers_vocabulary",
    "llmfast/tokenizers/splitting.py": "tokenizers",
    "llmfast/tokenizers/vocabulary.py": "tokenizers_vocabulary",
    "llmfast/tokenizers/word.py": "tokenizers_vocabulary tokenizers",
    "llmfast/tokenizers/wordpiece.py": "tokenizers_wordpiece",
    "llmfast/tokenizers/wordpiece_training.py": "tokenizers_wordpiece",
    "llmfast/training/optimizers.py": "training_trainer",
    "llmfast/training/schedules.py": "training_trainer",
}


@dataclass(frozen=True)
class Mutant:
    """One change of a module: the text from `start` to `end`, in bytes of its source, becomes `after`."""

    module: str
    function: str  # the innermost one around it
    start: int
    end: int
    after: str

    def source(self) -> bytes:
        whole = (ROOT / self.module).read_bytes()
        return whole[: self.start] + self.after.encode() + whole[self.end :]

    @property
    def row(self) -> str:
        """The row of `docs/mutations.md` that explains it begins so: with the changed lines."""
        source = self.source()
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.start + len(self.after.encode()))
        lines = " ".join(source[first:last].decode().split()).replace("|", "\\|")
        return f"| `{self.module}` | `{self.function}` | `{lines}` |"


# --- the changes ------------------------------------------------------------------------------------------------------

SWAPPED: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And], ast.Add: [ast.Sub], ast.Sub: [ast.Add],
    ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mod], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.LShift: [ast.RShift], ast.RShift: [ast.LShift],
}  # fmt: skip


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in SWAPPED[type(node.ops[0])]:
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        for other in SWAPPED[type(node.op)]:
            yield ast.BoolOp(other(), node.values)
    elif isinstance(node, ast.BinOp):
        for other in SWAPPED.get(type(node.op), []):
            yield ast.BinOp(node.left, other(), node.right)
    elif isinstance(node, ast.AugAssign):
        for other in SWAPPED.get(type(node.op), []):
            yield ast.AugAssign(node.target, other(), node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield ast.Call(node.func, node.args, [other for other in node.keywords if other is not keyword])
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, (ast.Raise, ast.Continue)):
        yield ast.Pass()
    elif isinstance(node, ast.Expr):
        yield from [] if isinstance(node.value, ast.Constant) else [ast.Pass()]  # a docstring stays
    if isinstance(node, (ast.Name, ast.Attribute, ast.Call)) and getattr(node, "decides", False):
        yield ast.UnaryOp(ast.Not(), node)


def mutants(module: str) -> list[Mutant]:
    """Every change of a module. Annotations, decorators and messages stay as they are."""
    source = (ROOT / module).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = node.name
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            node.test.decides = True  # type: ignore[attr-defined]
        for after in variants(node):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            text = ast.unparse(ast.fix_missing_locations(after))
            if isinstance(after, ast.expr) and not isinstance(after, (ast.Constant, ast.Call, ast.Name)):
                text = f"({text})"
            found.append(Mutant(module, function, start, end, text))
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "exc", "msg") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, function)

    visit(ast.parse(source), "the module")
    return found


# --- running them -----------------------------------------------------------------------------------------------------


class Mutated(SourceFileLoader):
    """Finds and loads one module of the package with a change."""

    def __init__(self, mutant: Mutant):
        super().__init__(mutant.module.removesuffix(".py").replace("/", "."), str(ROOT / mutant.module))
        self.mutant = mutant

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.mutant.source(), self.path, "exec", dont_inherit=True)


def run(module: str, mutant: Mutant | None, seconds: float) -> tuple[bool, float]:
    """Whether the module's tests pass with a change, or without one, and how long they took; too long is no pass."""
    before = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        if mutant is not None:
            sys.meta_path.insert(0, Mutated(mutant))  # type: ignore[arg-type]
        os.chdir(ROOT)
        files = [f"tests/test_{name}.py" for name in TESTS[module].split()]
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files])
        os._exit(int(code != 0))
    while (waited := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - before < seconds:
        time.sleep(0.05)
    took = time.monotonic() - before
    if waited[0] == 0:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False, took
    return waited[1] == 0, took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="module")
    parser.add_argument("-n", "--number", type=int, default=25, help="changes of each module; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="which changes are drawn")
    options = parser.parse_args()
    explained = EXPLAINED.read_text(encoding="utf-8") if EXPLAINED.exists() else ""
    unexplained = 0
    for module in options.modules:
        everything = mutants(module)
        chosen = everything
        if 0 < options.number < len(everything):
            chosen = sorted(random.Random(options.seed).sample(everything, options.number), key=lambda m: m.start)
        passed, took = run(module, None, 3600)
        if not passed:
            print(f"{module}: its tests fail without a change")
            return 2
        survivors = []
        for mutant in chosen:
            if run(module, mutant, 20 + 5 * took)[0]:
                survivors.append(mutant)
                known = mutant.row in explained
                unexplained += not known
                print(mutant.row, "explained" if known else "survived", flush=True)
        print(f"{module}: {len(chosen) - len(survivors)} of {len(chosen)} noticed, of {len(everything)}", flush=True)
    return int(unexplained > 0)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    sys.path.insert(0, str(ROOT))
    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401

    assert not any(re.match(r"llmfast\b", name) for name in sys.modules)
    sys.exit(main())
