"""The architecture: imports point down its floors, and each library and language has its place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package named here is on its floor with all its modules. A new module fails until it has a floor.
FLOORS = (
    (5, "app billing.assembly billing.cli"),
    (4, "billing.handlers billing.security billing.http billing.stripe_connections billing.worker"),
    (4, "billing.deliveries billing.housekeeping billing.failed_logins billing.key_uses"),
    (3, "billing.storage billing.gateway billing.counters billing.shared_counters"),
    (2, "billing.tenants billing.users billing.tokens billing.keys billing.sessions billing.stripe_connect"),
    (2, "billing.webhooks.endpoints billing.webhooks.egress billing.webhooks.replay"),
    (2, "billing.idempotency"),
    (1, "billing.passwords billing.encryption billing.ports billing.actors billing.audit"),
    (1, "billing.webhooks.delivery billing.webhooks.events billing.webhooks.signing"),
    (1, "billing.outbound billing.post_client"),
    (0, "billing.errors billing.ids billing.clock billing.settings billing.keyrings billing.tasks"),
    (0, "billing.limits billing.threads billing.logs billing.metrics billing.tracing billing.crashes"),
)
FLOOR_OF = {name: floor for floor, names in FLOORS for name in names.split()}
# Packages without a floor: their `__init__.py` has a docstring and nothing else.
EMPTY_PACKAGES = {"billing", "billing.webhooks"}

# Which modules may import a library; no others do.
LIBRARIES = {
    "sqlalchemy": ("billing.storage",),
    "psycopg2": ("billing.storage",),
    "alembic": ("billing.storage",),
    "connexion": ("billing.http", "billing.cli", "app"),
    "starlette": ("billing.http", "billing.cli", "app"),
    "uvicorn": ("billing.http", "billing.cli"),
    "bcrypt": ("billing.passwords",),
    "zxcvbn": ("billing.passwords",),
    "jwt": ("billing.tokens",),
    "cryptography": ("billing.encryption",),
    "stripe": ("billing.gateway",),
    "requests": ("billing.outbound", "billing.cli.check"),
    "urllib3": ("billing.outbound", "billing.post_client"),
    "click": ("billing.cli",),
    "dotenv": ("billing.settings",),
    "redis": ("billing.shared_counters",),
    "slugify": ("billing.tenants",),
    "uuid_utils": ("billing.ids",),
    "prometheus_client": ("billing.metrics",),
    "opentelemetry": ("billing.tracing",),
    "sentry_sdk": ("billing.crashes",),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in [ROOT / "app.py", *sorted((ROOT / "billing").rglob("*.py"))]}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports_of(module: str) -> Iterator[str]:
    """Every module that a module imports, anywhere in it."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module or ""


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def floor_of(module: str) -> int | None:
    return next((floor for name, floor in FLOOR_OF.items() if is_within(module, name)), None)


def own_imports(module: str) -> set[str]:
    return {name for name in imports_of(module) if name in MODULES}


# Floors ------------------------------------------------------------------------------------------


def test_every_module_has_a_floor_and_every_floor_entry_exists() -> None:
    assert not [m for m in MODULES if m not in EMPTY_PACKAGES and floor_of(m) is None], "give these a floor"
    assert not [name for name in FLOOR_OF if name not in MODULES], "these are gone"


def floors_in_the_docs() -> Iterator[tuple[str, int]]:
    """Each line is a floor, or blank for the one above, then names two blanks apart, then what they do."""
    block = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    floor = -1
    for line in block.strip("\n").splitlines():
        floor = floor if line[0] == " " else int(line[0])
        for name in line[3:].partition("   ")[0].split():
            yield name if name == "app" else f"billing.{name}", floor


def test_the_floors_in_the_docs_are_the_same() -> None:
    assert sorted(floors_in_the_docs()) == sorted(FLOOR_OF.items())


@pytest.mark.parametrize("module", sorted(EMPTY_PACKAGES))
def test_an_empty_package_has_only_a_docstring(module: str) -> None:
    (only,) = tree_of(module).body
    assert isinstance(only, ast.Expr)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - EMPTY_PACKAGES))
def test_imports_point_down(module: str) -> None:
    floor = floor_of(module)
    assert floor is not None
    assert not {name for name in own_imports(module) - EMPTY_PACKAGES if (floor_of(name) or 0) > floor}


def test_imports_are_not_circular() -> None:
    # A package's `__init__.py` runs before its modules, but importing them there is no circle.
    graph = {module: own_imports(module) - EMPTY_PACKAGES for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' → '.join(error.args[1])}") from None


def test_every_form_of_import_is_found() -> None:
    # What this file relies on: that it finds an import in every form of writing it.
    assert {"billing.keys", "billing.errors", "billing.key_uses"} <= own_imports("billing.security")
    assert {"billing.http.problems", "billing.http.pages"} <= own_imports("app")
    assert len(MODULES) > 50


# Libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_by_its_modules(library: str) -> None:
    offenders = {
        module
        for module in MODULES
        if any(is_within(name, library) for name in imports_of(module))
        and not any(is_within(module, home) for home in LIBRARIES[library])
    }
    assert not offenders


# Languages ---------------------------------------------------------------------------------------


ENVIRONMENT = ("environ", "environb", "getenv")


def reads_environment(module: str) -> bool:
    """Whether it uses `os.environ` or `os.getenv` for anything but to set variables."""
    nodes = list(ast.walk(tree_of(module)))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    written = {id(func.value) for func in calls if isinstance(func, ast.Attribute) and func.attr == "update"}
    read = [node for node in nodes if isinstance(node, ast.Attribute) and id(node) not in written]
    return any(node.attr in ENVIRONMENT for node in read) or any(
        isinstance(node, ast.alias) and node.name in ENVIRONMENT for node in nodes
    )


# The second passes the linker's search path on to PostgreSQL's programs, and decides nothing by it.
ENVIRONMENT_READERS = ("billing.settings", "billing.storage.binaries")


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ENVIRONMENT_READERS])
def test_only_settings_read_the_environment(module: str) -> None:
    assert reads_environment("billing.settings")
    assert not reads_environment(module)


def imports_settings(module: str) -> bool:
    """Whether it imports `Settings`, or all of their module."""
    nodes = list(ast.walk(tree_of(module)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return bool(names & {"billing.settings", "billing.settings.Settings"})


def test_below_the_top_floor_only_the_choice_of_the_database_knows_the_settings() -> None:
    # Anything else below is given what it needs of them: `billing/assembly.py` takes it out of them.
    top = max(FLOOR_OF.values())
    assert imports_settings("billing.assembly")
    found = [m for m in MODULES if m not in EMPTY_PACKAGES and floor_of(m) != top and imports_settings(m)]
    assert found == ["billing.storage.database"]


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, "billing.handlers")])
def test_handlers_have_no_try_statements(module: str) -> None:
    assert not [node.lineno for node in ast.walk(tree_of(module)) if isinstance(node, ast.Try | ast.TryStar)]


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, "billing.handlers")])
def test_handlers_have_no_global_state(module: str) -> None:
    """No globals: at module level there are only imports, constants and functions."""
    for node in tree_of(module).body:
        assert isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constant = isinstance(node.value, ast.Constant) and node.targets[0].id.isupper()
            assert constant or isinstance(node.value, ast.Subscript), f"line {node.lineno}"


def test_only_three_modules_swallow_all_exceptions() -> None:
    found = [
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ExceptHandler) and catches_everything(node) and not raises_again(node)
    ]
    # Whatever failed, a client needs an answer, and the server its pool: explained there, and both are reported. The
    # lanes raise a thread's error where it is awaited.
    assert found == ["app", "billing.http.edge", "billing.http.lanes"]


def catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return any(
        isinstance(n, ast.Name) and n.id in ("Exception", "BaseException") for n in ast.walk(handler.type)
    )


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


# Docstrings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_docstring_opens_with_one_sentence(module: str) -> None:
    lines = (ast.get_docstring(tree_of(module)) or "").splitlines()
    assert lines, "it has no docstring"
    assert re.search(r"[.?]$", lines[0]), "its first line is not a whole sentence"
    assert not re.search(r"[.?!] +[A-Z`]", lines[0]), "its first line is more than one sentence"
    assert lines[1:2] in ([], [""])
