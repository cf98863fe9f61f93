"""Tests of the house: every module imports from strictly lower shelves, and the equations import nothing but JAX."""

import ast
import pathlib

import pytest

import finemem_jax

PACKAGE = pathlib.Path(finemem_jax.__file__).parent

# From nouns to programs. `models` is one module here, whose files may import each other. `report` and `sweep` stand
# beside `train` because they lay out tables with `evaluate`, `plan` because it reads configs with `assembly`.
SHELVES = (
    ("episode", "credit", "grpo", "config", "optimizer", "writer", "report_page", "source_rules",
     "processes", "buckets", "compilation"),
    (
        "operations", "memory", "retrieval", "scoring", "prompts", "rules", "batching", "input_pipeline", "tokenizer",
        "models", "drawing", "report_plots", "workers", "prefixes",
        "endpoint", "published_results", "config_checks",
    ),
    (
        "environment", "reader", "embedding", "probes", "decoding", "learner", "advantages", "constraints", "interrupt",
        "answers", "store", "guards", "judges", "question_options", "proposals",
    ),
    ("engine", "slots", "asking", "checkpoint", "rewards", "records", "question_costs", "sources",
     "calls", "trained"),
    ("sampler", "backbone", "rollout", "likelihood", "question_report"),
    ("language_models", "questions", "evaluate", "methods"),
    ("answering", "scoreboard"),
    ("assembly", "metrics", "export_card"),
    ("precompile",),
    ("train", "report", "sweep", "plan", "question_run", "evaluation_run", "follow", "agent", "export"),
    ("plan_tables", "serve", "export_check"),
    ("main",),
)  # fmt: skip
SHELF = {name: number for number, names in enumerate(SHELVES) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module_of(path, package=PACKAGE):
    """The name in the table that a file of the package belongs to."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports_of(source, modules):
    """The package's modules that a source text imports, wherever in it, and the top-level packages of others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what a module depends on; write finemem_jax.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first != "finemem_jax":
                others.add(first)
            elif rest:
                own.add(rest[0])
    assert own <= modules, f"imports from finemem_jax what is no module: {own - modules}"
    return own, others


def wrong_imports(path, package=PACKAGE, shelf=SHELF):
    name = module_of(path, package)
    own, _ = imports_of(path.read_text(encoding="utf-8"), set(shelf))
    # Shelf 1 holds models as one module.
    allowed = {name} & {"models"}
    return sorted(other for other in own - allowed if shelf[other] >= shelf[name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    name = module_of(path)
    assert name in SHELF, f"give {name} a shelf in tests/layering_test.py"
    wrong = wrong_imports(path)
    assert not wrong, f"{name} (shelf {SHELF[name]}) imports {', '.join(f'{w} (shelf {SHELF[w]})' for w in wrong)}"


def test_the_table_lists_what_exists():
    assert {module_of(path) for path in FILES} == set(SHELF)
    assert len(SHELF) == sum(map(len, SHELVES)), "a module stands on two shelves"


@pytest.mark.parametrize("name", ["credit", "grpo"])
def test_the_equations_import_only_jax(name):
    own, others = imports_of((PACKAGE / f"{name}.py").read_text(encoding="utf-8"), set(SHELF))
    assert own == set()
    assert others <= {"jax", "numpy", "jaxtyping", "functools", "math", "dataclasses", "typing", "__future__"}


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("memory.py", "from finemem_jax import episode, grpo\nfrom finemem_jax.config import default", []),
        ("memory.py", "from finemem_jax import episode, operations", ["operations"]),
        ("memory.py", "def later():\n    import finemem_jax.train", ["train"]),
        ("memory.py", "from finemem_jax.models.decoder import Params", ["models"]),
        ("models/decoder.py", "from finemem_jax.models import attention", []),
        ("models/decoder.py", "from finemem_jax.tokenizer import Tokenizer", ["tokenizer"]),
    ],
)
def test_it_would_notice(tmp_path, file, source, wrong):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert wrong_imports(path, tmp_path) == wrong
