"""The shelf of a tenant's tasks, and the query by which a worker takes those that are due."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, and_, bindparam, case, func
from sqlalchemy.dialects.postgresql import insert

from billing.storage.shelf import Shelf, columns_of, of_tenant
from billing.storage.tables import tasks
from billing.tasks import LEASE, Queue, Task

FIELDS = ", ".join(column.name for column in columns_of(Task, tasks))
TAKE = f"SELECT {FIELDS} FROM app.take_tasks(%(queue)s, %(now)s, %(until)s, %(most)s)"
NEW = insert(tasks)
AGAIN = {"due_at": func.least(tasks.c.due_at, NEW.excluded.due_at), "revision": tasks.c.revision + 1}
KEY = [tasks.c.tenant_id, tasks.c.kind, tasks.c.id]
ADD = NEW.on_conflict_do_update(index_elements=KEY, set_=AGAIN)
ADD_MOVED = NEW.on_conflict_do_update(index_elements=KEY, set_=AGAIN | {"queue": NEW.excluded.queue})
DROP = tasks.delete().where(
    of_tenant(tasks), tasks.c.kind == bindparam("task_kind"), tasks.c.subject == bindparam("subject")
)
HELD = and_(
    of_tenant(tasks),
    tasks.c.kind == bindparam("task_kind"),
    tasks.c.id == bindparam("task_id"),
    tasks.c.attempts == bindparam("taken"),
    # A task that was dropped and added anew counts its attempts anew.
    tasks.c.created_at == bindparam("added_at"),
)
AS_TAKEN = tasks.c.revision == bindparam("known")
UNTIL = bindparam("until", type_=tasks.c.due_at.type)
FINISH = tasks.delete().where(HELD, AS_TAKEN)
LET_GO = tasks.update().where(HELD, ~AS_TAKEN).values(leased_until=None)
POSTPONE = (
    tasks.update()
    .where(HELD)
    .values(
        leased_until=None,
        due_at=case((AS_TAKEN, UNTIL), else_=func.least(tasks.c.due_at, UNTIL)),
        queue=bindparam("next_queue"),
    )
)


class Tasks(Shelf):
    """The tasks of one tenant."""

    def add(
        self,
        kind: str,
        id: UUID,
        *,
        subject: str,
        due_at: datetime,
        now: datetime,
        queue: Queue = "general",
        moved: bool = False,
    ) -> None:
        """Queue a task for the worker. One that was added already is due at the earlier of the two times.

        It stays in the queue it is in, unless it is `moved`.
        """
        self.defer(
            ADD_MOVED if moved else ADD,
            tenant_id=self._tenant_id,
            kind=kind,
            id=id,
            subject=subject,
            queue=queue,
            created_at=now,
            due_at=due_at,
            attempts=0,
            revision=0,
        )

    def drop(self, kind: str, *, subject: str) -> None:
        """Delete the tasks of this kind and subject. A worker that is running one will not run it again."""
        self.run(DROP, task_kind=kind, subject=subject)

    def finish(self, task: Task) -> bool:
        """Delete the task, unless it was added again meanwhile; False if it was, or if it was lost or dropped."""
        if self.run(FINISH, **_held(task)).rowcount:
            return True
        self.defer(LET_GO, **_held(task))
        return False

    def postpone(self, task: Task, due_at: datetime, *, queue: Queue | None = None) -> None:
        """Release the task until then, or sooner if it was added again meanwhile; `queue`, if given, is its new one."""
        self.defer(POSTPONE, **_held(task), until=due_at, next_queue=queue or task.queue)


def _held(task: Task) -> dict[str, object]:
    """The parameters of `HELD` and `AS_TAKEN`, for a task as its worker took it."""
    return {
        "task_kind": task.kind,
        "task_id": task.id,
        "taken": task.attempts,
        "added_at": task.created_at,
        "known": task.revision,
    }


def take_due(connection: Connection, queue: Queue, now: datetime, *, most: int) -> list[Task]:
    """Lease due tasks of any tenant; those that another worker holds are skipped."""
    parameters = {"queue": queue, "now": now, "until": now + LEASE, "most": most}
    return [Task(*row) for row in connection.exec_driver_sql(TAKE, parameters)]
