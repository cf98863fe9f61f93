"""Tests of the house: rooms import from earlier rooms only, no cycle inside a room, the equations import only JAX."""

import ast
import pathlib

import pytest

import finemem_jax

PACKAGE = pathlib.Path(finemem_jax.__file__).parent

# Lower to higher; a room is a folder or a file of the package. Rooms of one tuple do not import each other.
ROOMS = (
    ("types", "config"),
    ("runtime",),
    ("models",),
    ("memory",),
    ("input_pipeline", "sampling", "weights"),
    ("clients", "testing"),
    ("reading",),
    ("rl",),
    ("build",),
    ("evaluation", "planning", "questions"),
    ("serving", "training"),
    ("main", "serve"),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def modules(package):
    """{dotted name below the package: file} of all its modules; a room's own `__init__` goes by the room's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    del found["__init__"]
    return found


def imports_of(path, known):
    """Modules of the package that a file imports, wherever in it, and the top-level packages of others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what a module depends on; write finemem_jax.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first != "finemem_jax":
                others.add(first)
                continue
            # The longest beginning that is a module: the rest is a name in it.
            while rest and rest not in known:
                rest = rest.rpartition(".")[0]
            own.add(rest)
    return own - {""}, others


def upward_imports(package):
    """["importer -> imported"] where a room imports from its own rank or above."""
    known = modules(package)
    wrong = []
    for name, path in known.items():
        room = name.split(".")[0]
        for other in sorted(imports_of(path, known)[0]):
            imported = other.split(".")[0]
            if imported != room and RANK[imported] >= RANK[room]:
                wrong.append(f"{name} -> {other}")
    return wrong


def cycles(package):
    """["module -> module -> …"] of imports that lead back to where they began."""
    known = modules(package)
    graph = {name: imports_of(path, known)[0] for name, path in known.items()}
    found, done = [], set()

    def visit(name, trail):
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_rooms_import_from_earlier_rooms():
    assert not upward_imports(PACKAGE)


def test_no_cycles_inside_rooms():
    assert not cycles(PACKAGE)


def test_the_tuple_lists_what_exists():
    assert {name.split(".")[0] for name in modules(PACKAGE)} == set(RANK)
    assert len(RANK) == sum(map(len, ROOMS)), "a room stands in two tuples"


def test_rooms_are_empty_at_the_door():
    doors = [path for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "config"]
    assert not [str(path) for path in doors if path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ["rl.credit", "rl.grpo"])
def test_the_equations_import_only_jax(name):
    known = modules(PACKAGE)
    own, others = imports_of(known[name], known)
    assert own == set()
    assert others <= {"jax", "numpy", "jaxtyping", "functools", "math", "dataclasses", "typing", "__future__"}


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("memory/store.py", "from finemem_jax import types\nfrom finemem_jax.config import default", []),
        ("runtime/files.py", "from finemem_jax.memory import store", ["runtime.files -> memory.store"]),
        ("memory/store.py", "def later():\n    import finemem_jax.rl.grpo", ["memory.store -> rl.grpo"]),
        ("memory/store.py", "from finemem_jax.models.decoder import Params", []),
        ("models/decoder.py", "from finemem_jax.memory.store import Store", ["models.decoder -> memory.store"]),
    ],
)
def test_it_would_notice_upward_imports(tmp_path, file, source, wrong):
    for other in ("types", "config", "runtime/files", "rl/grpo", "models/decoder", "memory/store", "__init__"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / f"{other}.py").write_text("")
    (tmp_path / file).write_text(source)
    assert upward_imports(tmp_path) == wrong


def test_it_would_notice_cycles(tmp_path):
    for name, imported in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / "rl").mkdir(exist_ok=True)
        (tmp_path / "rl" / f"{name}.py").write_text(f"from finemem_jax.rl import {imported}")
    (tmp_path / "__init__.py").write_text("")
    assert cycles(tmp_path) == ["rl.b -> rl.c -> rl.b"]
