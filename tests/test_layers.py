"""How pomex.py is built: standard library only, layers that hold, a pure half, and an import that does nothing."""
import ast
import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import pomex
from conftest import REPOSITORY

FILE = pathlib.Path(pomex.__file__)
TEXT = FILE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNERS = re.findall(r"^# === (\d+)\. (.+?) =+$", TEXT, re.MULTILINE)
LAYER_STARTS = [(TEXT.count("\n", 0, match.start()) + 1, int(match[1]))
                for match in re.finditer(r"^# === (\d+)\. ", TEXT, re.MULTILINE)]
LAST_PURE_LAYER = 7
PYENV = pathlib.Path.home() / ".pyenv" / "versions"         # seen before a test moves the home directory
WORLD = {"asyncio", "socket", "ssl", "sqlite3", "time", "secrets", "threading", "queue", "signal", "logging", "log",
         "pathlib", "open", "print", "input", "argparse", "subprocess", "random"}
OF_THE_WORLD = {"environ", "getenv", "urandom", "stat", "listdir", "getcwd", "expanduser"}      # os.…


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def layer_of(line):
    """The number of the layer a line lies on; 0 above the first."""
    return max((number for start, number in LAYER_STARTS if start <= line), default=0)


def test_only_the_standard_library_is_imported_and_not_inside_of_functions():
    late = {"compression"}          # of Python 3.14, asked for by name where it is there
    assert set(imported(TREE)) - sys.stdlib_module_names - late == set()
    functions = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [function.name for function in functions if any(imported(function))] == []


def test_the_layers_stand_in_order_each_once():
    numbers = [int(number) for number, _ in BANNERS]
    assert numbers == sorted(set(numbers)) and {1, 2, 3, 4, 5, 6, 7, 13} <= set(numbers)


def test_the_table_of_contents_names_the_layers_that_are_there():
    contents = re.findall(r"^ +(\d+)  (\S.*?)  ", ast.get_docstring(TREE, clean=False), re.MULTILINE)
    assert [number for number, _ in contents] == [number for number, _ in BANNERS]
    assert [title.split()[0].lower() for _, title in contents] == [title.split()[0].lower() for _, title in BANNERS]


def test_no_name_is_defined_twice():
    names = collections.Counter(
        name for node in TREE.body
        for name in ([node.name] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else
                     [target.id for target in getattr(node, "targets", [getattr(node, "target", None)])
                      if isinstance(target, ast.Name)]))
    assert [name for name, times in names.items() if times > 1] == []


# Of the file at ed367ec: what a redesign replaced does not come back, and nothing keeps both names.
GONE = """
    Answer CLAUDES ChatFrame Claude Close ConfigText FAULTS FAULT_RULES Fail Fault Fragment GEMINIS Inflater Kind Channel Manners
    MessagesBook MessagesTurns.lost_thought Open Reader._announce Reader._odd_chunk Reader._starve Relay Stop.incomplete Stop.last
    Surroundings THOUGHTS Thought ToolBook Translation Unwrapper Usage.broken Whole barred carried check_request checked claude
    compact detected dicts_in exactly explained fits_any flat_name input_estimate is_torn is_whole json_dict manners_of mend
    overridden plain_history plain_item quote said_in shown_only table_of trail unfit untraced whole_characters
""".split()


def definitions(body, prefix=""):
    """Qualified names of the classes, functions, methods, fields and constants of a module or class."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{prefix}{node.name}.")
        for target in getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else []):
            yield from (prefix + each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def test_what_was_replaced_is_gone():
    known = set(definitions(TREE.body))
    assert {"Sink", "Sink.text", "Usage.input", "WIRES"} <= known
    assert known & set(GONE) == set()


def test_a_definition_names_only_things_of_its_own_layer_or_of_those_before_it():
    shape = REPOSITORY.parent / "shared" / "tools" / "shape.py"
    if not shape.is_file():
        pytest.skip("shape.py does not lie beside this repository")
    done = subprocess.run([sys.executable, shape, "--layers", FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_layers_above_the_line_are_pure():
    found = []
    for node in ast.walk(TREE):
        line = getattr(node, "lineno", 0)
        if not 1 <= layer_of(line) <= LAST_PURE_LAYER:
            continue
        if isinstance(node, (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)):
            found.append((line, "async"))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in WORLD:
            found.append((line, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in OF_THE_WORLD and ast.unparse(node.value) in ("os", "os.path"):
            found.append((line, ast.unparse(node)))
    assert found == []


WATCH = """
import sys
kept = set(sys.modules)
done = []
def watch(event, arguments):
    if event == "open" and (arguments[2] or 0) & 3 or event.startswith(("socket.", "sqlite3.", "subprocess.")) \\
            or event in ("_thread.start_new_thread", "os.mkdir", "os.putenv", "os.chmod", "os.remove", "signal.signal"):
        done.append((event, arguments))
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so", ".pem", ".cnf", ".zip")):
        done.append((event, arguments))
import argparse, asyncio, base64, binascii, codecs, collections.abc, concurrent.futures, contextlib, dataclasses
import difflib, email.utils, errno, functools, hashlib, hmac, http, ipaddress, itertools, json, logging, math, os
import pathlib, queue, re, secrets, signal, socket, sqlite3, ssl, threading, time, tomllib, typing, urllib.parse, zlib
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import pomex
print(done, logging.root.handlers, pomex.log.handlers, pomex.log.level, threading.active_count())
"""


def test_no_line_of_the_core_is_longer_than_110():
    core = TEXT[:TEXT.index("\n# === 8. ")].split("\n")
    assert [number for number, line in enumerate(core, 1) if len(line) > 110] == []


def test_importing_does_nothing():
    environ = {**os.environ, "PYTHONPATH": str(FILE.parent)}
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, text=True, env=environ, cwd="/")
    assert (done.stdout.strip(), done.stderr) == ("[] [] [] 0 1", "")


def test_the_file_parses_with_the_grammar_of_python_3_8():
    # In a process of its own: what else happens in this one can make ast.parse fail with a SystemError (CPython gh-106905).
    parse = "import ast, pathlib, sys; ast.parse(pathlib.Path(sys.argv[1]).read_bytes(), feature_version=(3, 8))"
    done = subprocess.run([sys.executable, "-c", parse, FILE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def python(version):
    """An interpreter of this version that starts, or None."""
    built = sorted(map(str, PYENV.glob(f"{version}.*/bin/python")))
    candidates = [*built[-1:], *filter(None, [shutil.which(f"python{version}")])]
    works = (path for path in candidates if not subprocess.run([path, "-c", ""], capture_output=True).returncode)
    return next(works, None)


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_old_python_is_told_which_one_is_needed(version):
    found = python(version)
    if not found:
        pytest.skip(f"there is no Python {version} here")
    done = subprocess.run([found, FILE, "serve"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(rf"Pomex needs Python 3\.11 or newer; this is {re.escape(version)}\.\d+\S* at \S+\.\n", done.stderr)


def test_the_tests_own_starter_parses_on_python_3_6_too():
    ast.parse((REPOSITORY / "tests" / "__main__.py").read_text(encoding="utf-8"), feature_version=(3, 6))
