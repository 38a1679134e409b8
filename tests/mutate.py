"""Do the tests notice? Change a module in every small way that could be a mistake, one at a time, and run its tests.

    python tests/mutate.py train.py [--jobs 2] [--only update] [--every 5] [--list]

Each mutant is written into a temporary copy of the project, never into the project itself, and the module's own fast
tests run on it in a forked process, up to the first failure. A mutant that no test notices has survived: either
a test is missing, or the change makes no difference, and then data/equivalent_mutants.json says why.
"""

import argparse
import ast
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # those of the reading path, what its random numbers are, and what a silent mistake in would do most harm
    "ppo.py": ["test_ppo.py", "test_convergence.py"],
    "model.py": ["test_model.py"],
    "generate.py": ["test_generate.py"],
    "train.py": ["test_train.py", "test_run.py", "test_optimum.py"],
    "randomness.py": ["test_randomness.py"],
    "dataset.py": ["test_dataset.py"],
    "prompts.py": ["test_prompts.py", "test_dataset.py"],
    "encoding.py": ["test_prompts.py", "test_chat.py"],
    "conversations.py": ["test_chat.py", "test_prompts.py"],
    "fitting.py": ["test_sft.py", "test_levers.py"],
    "reward.py": ["test_reward.py"],
    "reward_model.py": ["test_heads.py", "test_reward.py", "test_chat.py"],
    "report.py": ["test_report.py"],
    "evaluation.py": ["test_evaluation.py", "test_task_evaluate.py"],
    "hub.py": ["test_loading.py"],
    "push.py": ["test_push.py"],
    "adapters.py": ["test_adapters.py", "test_any_model.py"],
    "loading.py": ["test_loading.py", "test_adapters.py", "test_any_model.py"],
}
# Instead of the project's own options, which may start processes of their own.
OPTIONS = ["-o", "addopts=", "--torchtyping-patch-typeguard", "-x", "-q", "--assert=plain"]
OPTIONS += ["-p", "no:cacheprovider", "-m", "not slow and not browser"]
GUARDED = ("ppo.py", "model.py", "generate.py", "train.py")  # whose types are checked, as in pyproject.toml
TIMEOUT = 120  # seconds; only a mutant that loops for ever gets there

# (function, statement before, statement after): why no test can tell the two apart. They still count as survivors. What
# only says on which device a tensor is is not changed: the tests have one.
EQUIVALENT = {
    (function, before, after): why
    for function, before, after, why in json.loads((ROOT / "tests/data/equivalent_mutants.json").read_text())
}

# ------------------------------------------------------------------------------------------------------------------
# The changes
# ------------------------------------------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: [ast.Sub, ast.Mult],
    ast.Sub: [ast.Add, ast.Mult],
    ast.Mult: [ast.Div, ast.Add],
    ast.Div: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq, ast.GtE, ast.LtE],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
NAMES = {
    "maximum": ["minimum"],
    "minimum": ["maximum"],
    "max": ["min"],
    "min": ["max"],
    "any": ["all"],
    "all": ["any"],
    "sum": ["mean", "amax"],
    "cumsum": ["cumprod", "logcumsumexp"],
    "logsumexp": ["amax", "sum"],
    "softmax": ["log_softmax"],
    "exp": ["expm1"],
    "expm1": ["exp"],
    "rsqrt": ["sqrt"],
    "abs": ["neg"],
    "zeros_like": ["ones_like"],
    "ones_like": ["zeros_like"],
    "reversed": ["list"],
    "gamma": ["lam"],
    "lam": ["gamma"],
}


def replacements(node: ast.AST, twins: dict[str, list[str]]) -> Iterator[ast.AST]:
    """What could stand in the place of `node`; `twins` are parameters of one type, easily taken for each other."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            yield from (ast.BinOp(left, other(), right) for other in OPERATORS.get(type(op), []))
            yield from (left, right)
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.BoolOp(op=op, values=values):
            yield from (ast.BoolOp(other(), values) for other in OPERATORS[type(op)])
            yield from values
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for i, op in enumerate(ops):
                for other in OPERATORS.get(type(op), []):
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(value=float() as value):
            yield from (ast.Constant(value * 1.1), ast.Constant(value + 1), ast.Constant(0.0))
        case ast.Constant(value=str() as value):
            yield ast.Constant(value + "_")
        case ast.Constant(value=None):
            yield ast.Constant(0)
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.If(test=test, body=body, orelse=orelse):
            yield from (ast.If(other, body, orelse) for other in (ast.UnaryOp(ast.Not(), test), ast.Constant(False)))
        case ast.Tuple(elts=[_, _, *_] as elements, ctx=ast.Load()):
            yield ast.Tuple(elements[::-1], ast.Load())
        case ast.Subscript(value=value, slice=index, ctx=context):
            if isinstance(context, ast.Load):
                yield value
            for i, part in enumerate(index.elts if isinstance(index, ast.Tuple) else []):
                for other in shifted(part):
                    elements = [*index.elts[:i], other, *index.elts[i + 1 :]]
                    yield ast.Subscript(value, ast.Tuple(elements, ast.Load()), context)
        case ast.Name(id=name, ctx=ast.Load()):
            yield from (ast.Name(other, ast.Load()) for other in NAMES.get(name, []))
            yield from (ast.Name(other, ast.Load()) for other in twins.get(name, []))
            if name == "mask":
                yield from (ast.UnaryOp(ast.Invert(), node), ast.parse("torch.ones_like(mask)", mode="eval").body)
        case ast.Attribute(value=value, attr=name, ctx=context):
            yield from (ast.Attribute(value, other, context) for other in NAMES.get(name, []))
        case ast.keyword(arg=name, value=value):
            yield from (ast.keyword(other, value) for other in NAMES.get(name, []))
        case ast.Call(func=func, args=args, keywords=keywords):
            match func:
                case ast.Attribute(value=ast.Name(id="torch")) | ast.Name():
                    yield from args  # where(mask, x, 0) becomes x, exp(x) becomes x
                case ast.Attribute(value=receiver, attr=name) if name != "to":
                    yield receiver  # x.clamp(a, b) becomes x
            symmetric = ast.unparse(func) in ("max", "min", "torch.maximum", "torch.minimum")
            for i, j in itertools.combinations(range(0 if symmetric else len(args)), 2):
                swapped = list(args)
                swapped[i], swapped[j] = args[j], args[i]
                yield ast.Call(func, swapped, keywords)
            for keyword in keywords:
                if keyword.arg != "device":
                    yield ast.Call(func, args, [other for other in keywords if other is not keyword])
            if isinstance(func, ast.Attribute) and func.attr == "where":
                yield ast.Call(func, [ast.UnaryOp(ast.Invert(), args[0]), *args[1:]], keywords)
        case ast.Assign(targets=[ast.Subscript()]) | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if name in twins:  # a parameter that is bound again
            yield ast.Pass()
        case ast.Return():
            yield from (ast.Return(ast.Name(name, ast.Load())) for name in list(twins)[:1])


def shifted(index: ast.expr) -> Iterator[ast.expr]:
    """The neighbours of one index of several."""
    if isinstance(index, ast.Name):
        yield from (ast.BinOp(index, operator(), ast.Constant(1)) for operator in (ast.Add, ast.Sub))
    if isinstance(index, ast.Slice):
        yield from (ast.Slice(ast.Constant(1), None), ast.Slice(None, ast.Constant(-1)))


# ------------------------------------------------------------------------------------------------------------------
# The mutants
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Mutant:
    line: int
    key: tuple[str, str, str]  # function, statement before, statement after: it stays true when lines move
    source: str


def mutants(source: str) -> list[Mutant]:
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for parent, field, index, statement, function in places(tree, tree.body[0], None):
        node = getattr(parent, field) if index is None else getattr(parent, field)[index]
        before = first_line(statement)
        for other in replacements(node, twins_of(function)):
            put(parent, field, index, ast.copy_location(other, node))
            text = ast.unparse(ast.fix_missing_locations(tree))
            after = first_line(other if node is statement else statement)
            put(parent, field, index, node)
            key = (function.name if function else "module", before, after)
            if text not in found and text != ast.unparse(tree):
                found[text] = Mutant(getattr(node, "lineno", statement.lineno), key, text)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def places(node: ast.AST, statement: ast.stmt, function: ast.FunctionDef | None) -> Iterator[tuple]:
    """Every place in the tree where something can be changed; not docstrings, imports, annotations or what is told in
    a formatted text, nor what only lends its shape or device, which it has in common with what could stand there.
    """
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Attribute) and node.attr in ("shape", "device")):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "ctx", "op", "ops"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            here = child if isinstance(child, ast.stmt) else statement
            inside = child if isinstance(child, ast.FunctionDef) else function
            yield node, field, index, here, inside
            yield from places(child, here, inside)


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def twins_of(function: ast.FunctionDef | None) -> dict[str, list[str]]:
    """Each parameter, with the others of exactly the same annotation."""
    arguments = function.args.args if function else []
    types = {argument.arg: ast.unparse(argument.annotation or ast.Constant(None)) for argument in arguments}
    return {name: [other for other in types if other != name and types[other] == types[name]] for name in types}


def first_line(statement: ast.stmt) -> str:
    """A simple statement, or the head of a compound one with its decorators."""
    lines = ast.unparse(ast.fix_missing_locations(statement)).splitlines()
    decorators = list(itertools.takewhile(lambda line: line.startswith("@"), lines))
    return " ".join(lines[: len(decorators) + 1])


# ------------------------------------------------------------------------------------------------------------------
# Running them
# ------------------------------------------------------------------------------------------------------------------


def copy_project(folder: Path) -> None:
    """What the tests of a module need, into an empty folder."""
    for file in [*ROOT.glob("*.py"), ROOT / "presets.yaml", ROOT / "pyproject.toml"]:
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def start(folder: Path, target: str, source: str) -> int:
    """Run the tests in a child process on a copy of the project with `source` as the target; return its pid.

    The exit status is pytest's: 0 if all tests passed, 1 if one failed, 2 if the mutant cannot even be imported.
    """
    copy_project(folder)
    (folder / target).write_text(source)
    pid = os.fork()
    if pid:
        return pid
    import pytest

    os.chdir(folder)
    os.dup2(os.open("log.txt", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.path.remove(str(ROOT / "tests"))  # put there by Python, as this script's folder
    tests = [f"tests/{name}" for name in TESTS[target]]
    guarded = [f"--typeguard-packages={Path(target).stem}"] if target in GUARDED else []
    os._exit(int(pytest.main([*OPTIONS, *guarded, *tests])))


def modules_without(target: str) -> list[str]:
    """The project's modules that do not import the target, themselves or through another: all mutants share them."""
    imports = {}
    for file in ROOT.glob("*.py"):
        imports[file.stem] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imports[file.stem] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imports[file.stem].add(node.module)
    tainted = {Path(target).stem}
    while more := {name for name in imports if imports[name] & tainted} - tainted:
        tainted |= more
    return sorted(imports.keys() - tainted)


def run_all(todo: list[Mutant], target: str, jobs: int) -> dict[str, int]:
    """Exit status of the tests for every mutant's source; -1 where they took longer than TIMEOUT."""
    status: dict[str, int] = {}
    running: dict[int, tuple[Mutant, float, tempfile.TemporaryDirectory]] = {}
    waiting = iter(todo)
    while len(status) < len(todo):
        for mutant in itertools.islice(waiting, jobs - len(running)):
            folder = tempfile.TemporaryDirectory()
            running[start(Path(folder.name), target, mutant.source)] = mutant, time.monotonic(), folder
        for pid, (mutant, started, folder) in list(running.items()):
            done, code = os.waitpid(pid, os.WNOHANG)
            late = not done and time.monotonic() - started > TIMEOUT
            if late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if done or late:
                status[mutant.source] = -1 if late else os.waitstatus_to_exitcode(code)
                if status[mutant.source] not in (-1, 0, 1, 2):
                    sys.exit(f"pytest itself failed, see its exit status: {status[mutant.source]}")
                del running[pid]
                folder.cleanup()
                if mutant.line:  # 0 for the code as it is
                    report(mutant, status[mutant.source])
        time.sleep(0.02)
    return status


def report(mutant: Mutant, status: int) -> None:
    function, before, after = mutant.key
    outcome = {0: "survived", -1: "killed by the clock"}.get(status, "killed")
    print(f"{outcome}, line {mutant.line}, {function}\n    - {before}\n    + {after}", flush=True)
    if status == 0 and mutant.key in EQUIVALENT:
        print(f"    equivalent: {EQUIVALENT[mutant.key]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TESTS, help="the module to mutate")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="only mutants of functions whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th mutant, for a first look")
    parser.add_argument("--list", action="store_true", help="list the mutants without running them")
    args = parser.parse_args()

    os.environ["PYTHONDONTWRITEBYTECODE"] = os.environ["OMP_NUM_THREADS"] = "1"
    source = (ROOT / args.target).read_text()
    every = mutants(source)
    todo = [mutant for mutant in every if args.only in mutant.key[0]][:: args.every]
    if args.list:
        for mutant in todo:
            print(f"line {mutant.line}, {mutant.key[0]}\n    - {mutant.key[1]}\n    + {mutant.key[2]}")
        return

    import pytest  # noqa: F401  imported once here, as are the others, so that each child has them from the start
    import torch
    import torchtyping  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401

    sys.path.append(str(ROOT))
    for name in modules_without(args.target):
        importlib.import_module(name)
    torch.set_num_threads(1)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    unchanged = Mutant(0, ("none", "the code as it is", "the code as it is"), source)
    if run_all([unchanged], args.target, 1)[source] != 0:
        sys.exit("the tests fail on the code as it is")
    status = run_all(todo, args.target, args.jobs)
    survivors = [mutant for mutant in todo if status[mutant.source] == 0]
    excused = [mutant for mutant in survivors if mutant.key in EQUIVALENT]
    killed = len(todo) - len(survivors)
    print(f"{killed} of {len(todo)} mutants killed ({100 * killed / max(len(todo), 1):.1f} %)", end="; ")
    print(f"{len(survivors)} survived, {len(excused)} of them equivalent")
    if not args.only and args.every == 1:
        own = {mutant.key[0] for mutant in every}
        for key in {key for key in EQUIVALENT if key[0] in own} - {mutant.key for mutant in survivors}:
            print("no longer a survivor, remove it from EQUIVALENT:", *key, sep="\n    ")
    sys.exit(len(survivors) > len(excused))


if __name__ == "__main__":
    main()
