"""SDKs generated from the document, checked as strictly as their languages allow, and tried.

`python -m contract.sdks` writes them to `dist/sdk`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from billing.http.document import load
from contract.programs import BIN, DOCUMENT, ROOT, Place, environ_for, opened_place, program

DIST = ROOT / "dist/sdk"
FLOWS = ROOT / "contract/sdk_flows"
# The generators that are Python programs, and what their Python needs.
PYTHON_BIN = ROOT / ".venv-contract/bin"
# What the Java SDK needs and the JDK lacks, as Debian installs it.
JAKARTA = Path("/usr/share/java/jakarta-annotation-api.jar")
PATIENCE_SECONDS = 300
ES_MODULES = ["--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"]
INDEXED = "--noUncheckedIndexedAccess"
BROWSER = ["--lib", "es2022,dom,dom.iterable"]
LAST_WORD = "401 key-revoked"

Command = Sequence[str]


@dataclass(frozen=True)
class Sdk:
    """What one generator makes, and what checks it; commands run in the SDK's own directory."""

    name: str
    # A glob of the files that are counted.
    files: str
    generate: Callable[[], Command]
    judge: Callable[[Path], Command]
    judged_by: str
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return DIST / self.name

    def make(self) -> str:
        """Generate the SDK anew and check it; returns a summary."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        _must_pass(self.generate(), self.place, self.environ)
        count = len(list(self.place.glob(self.files)))
        assert count, f"nothing was generated in {self.place.relative_to(ROOT)}"
        _must_pass(self.judge(self.place), self.place, self.environ)
        return f"{count} files, {self.judged_by}"


def checks() -> list[tuple[str, Callable[[], str]]]:
    """The checks by name; each returns a summary or raises `AssertionError`."""
    return [
        *((f"sdk {sdk.name}", sdk.make) for sdk in SDKS),
        ("sdk names", names),
        ("sdk flow in Python, mypy --strict", python_flow),
        ("sdk flow in TypeScript, tsc --strict", typescript_flow),
    ]


# Generators and judges ---------------------------------------------------------------------------


def openapi_generator(language: str, *arguments: str, **properties: str) -> Callable[[], Command]:
    additional = ",".join(f"{name}={value}" for name, value in properties.items())

    def command() -> Command:
        generator = [
            _python_program("openapi-generator-cli"),
            "generate",
            "-i",
            str(DOCUMENT),
            "-g",
            language,
        ]
        return [*generator, "-o", ".", *arguments, f"--additional-properties={additional}"]

    return command


def openapi_python_client() -> Command:
    generator = [_python_program("openapi-python-client"), "generate", "--path", str(DOCUMENT)]
    configuration = str(FLOWS / "openapi-python-client.yaml")
    return [*generator, "--config", configuration, "--output-path", ".", "--overwrite", "--fail-on-warning"]


def openapi_typescript() -> Command:
    """Generate types in which members with a default are optional, which is not this generator's default."""
    defaults = ["--default-non-nullable", "false"]
    return [program("openapi-typescript"), str(DOCUMENT), "--output", "schema.d.ts", *defaults]


def hey_api() -> Command:
    return [program("openapi-ts"), "--input", str(DOCUMENT), "--output", ".", "--no-log-file"]


def mypy(*arguments: str) -> Callable[[Path], Command]:
    return lambda _place: [_python_program("mypy"), *arguments]


def tsc(*arguments: str) -> Callable[[Path], Command]:
    return lambda _place: [program("tsc"), "--noEmit", "--strict", *ES_MODULES, *arguments]


def javac(place: Path) -> Command:
    """Treat all warnings but deprecations as errors: the generator bundles a newer Jackson than its code is for."""
    assert JAKARTA.exists(), f"{JAKARTA} is missing: `make compilers` installs it on Debian"
    [jackson] = PYTHON_BIN.parent.glob("lib/*/site-packages/openapi_generator_cli/openapi-generator.jar")
    sources = map(str, (place / "src/main").rglob("*.java"))
    options = ["-Xlint:all,-deprecation", "-Werror", "-proc:none", "-d", "build/classes"]
    return ["javac", *options, "-classpath", f"{jackson}:{JAKARTA}", *sources]


SDKS = [
    Sdk(
        "python-openapi-python-client",
        files="billing_client/**/*.py",
        generate=openapi_python_client,
        judge=mypy("--strict", "billing_client"),
        judged_by="mypy --strict",
    ),
    Sdk(
        "python-openapi-generator",
        files="billing_client/**/*.py",
        generate=openapi_generator("python", packageName="billing_client"),
        # Its own settings, which are not strict: the generator leaves functions without types.
        judge=mypy("--package", "billing_client"),
        judged_by="mypy with its own settings",
    ),
    Sdk(
        "typescript-openapi-typescript",
        files="**/*.ts",
        generate=openapi_typescript,
        judge=tsc(INDEXED, "--exactOptionalPropertyTypes", "schema.d.ts"),
        judged_by="tsc --strict",
    ),
    Sdk(
        "typescript-hey-api",
        files="**/*.ts",
        generate=hey_api,
        judge=tsc(INDEXED, *BROWSER, "index.ts"),
        judged_by="tsc --strict",
    ),
    Sdk(
        "typescript-openapi-generator",
        files="**/*.ts",
        generate=openapi_generator("typescript-fetch"),
        # Without INDEXED, which the generator's own runtime does not pass.
        judge=tsc(*BROWSER, "index.ts"),
        judged_by="tsc --strict",
    ),
    Sdk(
        "java-openapi-generator",
        files="src/main/**/*.java",
        generate=openapi_generator(
            "java",
            library="native",
            openApiNullable="false",
            useJakartaEe="true",
            invokerPackage="com.example.billing",
            apiPackage="com.example.billing.api",
            modelPackage="com.example.billing.model",
        ),
        judge=javac,
        judged_by="javac -Xlint:all,-deprecation -Werror",
    ),
    Sdk(
        "go-openapi-generator",
        files="*.go",
        # Go's constants are not scoped by their type, and two enums have a LIVE.
        generate=openapi_generator("go", packageName="billing", enumClassPrefix="true"),
        judge=lambda _place: ["go", "vet", "."],
        judged_by="go vet",
        # It needs only the standard library, and downloads nothing.
        environ={"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local"},
    ),
]


# Names -------------------------------------------------------------------------------------------


def names() -> str:
    """Require that every model has the name of a component, and none an invented one, as `Keys200ResponseInner`."""
    models = DIST / "python-openapi-generator/billing_client/models"
    assert models.is_dir(), "the Python SDK of openapi-generator was not generated"
    found = re.findall(r"^class (\w+)\(", "\n".join(_texts(models)), re.MULTILINE)
    named = set(load(DOCUMENT)["components"]["schemas"])
    made_up = sorted(set(found) - named)
    assert found and not made_up, f"not in the document: {', '.join(made_up)}"
    return f"{len(found)} models, each named in the document"


# Flows -------------------------------------------------------------------------------------------


def python_flow() -> str:
    sdk = SDKS[0].place
    environ = {"PYTHONPATH": str(sdk), "MYPYPATH": str(sdk)}
    flow = str(FLOWS / "flow.py")
    _must_pass([_python_program("mypy"), "--strict", flow], ROOT, environ)
    with opened_place() as place:
        return _run_flow([_python_program("python"), flow], ROOT, environ, place)


def typescript_flow() -> str:
    """Run the flow as in an integrator's project: beside the types, with the packages in `node_modules`."""
    with tempfile.TemporaryDirectory(prefix="billing-flow-") as name:
        project = Path(name)
        for file in (
            FLOWS / "flow.mts",
            FLOWS / "tsconfig.json",
            DIST / "typescript-openapi-typescript/schema.d.ts",
        ):
            assert file.exists(), f"{file.relative_to(ROOT)} was not generated"
            shutil.copy(file, project)
        (project / "node_modules").symlink_to(BIN.parent)
        _must_pass([program("tsc"), "--project", "."], project)
        with opened_place() as place:
            return _run_flow(["node", "flow.mjs"], project, {}, place)


def _run_flow(command: Command, cwd: Path, environ: Mapping[str, str], place: Place) -> str:
    output = _must_pass([*command, place.url, place.receiver_url], cwd, environ)
    assert output.strip() == LAST_WORD, output
    assert len(place.receiver.received) == 1, "the test event did not arrive"
    return f"register to revoke, ends with {LAST_WORD}"


# Programs ----------------------------------------------------------------------------------------


def _must_pass(command: Command, cwd: Path, environ: Mapping[str, str] | None = None) -> str:
    """Run a command and return its stdout; raises `AssertionError` with the end of its output if it fails."""
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            # openapi-python-client looks for its formatter there.
            env=environ_for({"PATH": f"{PYTHON_BIN}{os.pathsep}{os.environ['PATH']}", **(environ or {})}),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise AssertionError(f"{command[0]} is missing: `make contract-tools` installs it") from error
    assert done.returncode == 0, f"{Path(command[0]).name}: {(done.stdout + done.stderr).strip()[-600:]}"
    return done.stdout


def _python_program(name: str) -> str:
    path = PYTHON_BIN / name
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: `make contract-tools` installs it"
    return str(path)


def _texts(place: Path) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(place.glob("*.py"))]


def main() -> int:
    """Write all SDKs; the exit code says whether each passed its judge."""
    failed = 0
    for sdk in SDKS:
        try:
            print(f"PASS {sdk.place.relative_to(ROOT)} – {sdk.make()}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"FAIL {sdk.place.relative_to(ROOT)} – {error}", flush=True)
    return os.EX_OK if not failed else 1


if __name__ == "__main__":
    sys.exit(main())
