"""The shelf of a tenant's tasks, and the door through which a worker takes what is due."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, and_, case, func
from sqlalchemy.dialects.postgresql import insert

from billing.storage.shelf import Shelf, columns_of, later
from billing.storage.tables import tasks
from billing.tasks import LEASE, Queue, Task

FIELDS = ", ".join(column.name for column in columns_of(Task, tasks))
TAKE = f"SELECT {FIELDS} FROM app.take_tasks(%(queue)s, %(now)s, %(until)s, %(most)s)"
NEW = insert(tasks)
AGAIN = {"due_at": func.least(tasks.c.due_at, NEW.excluded.due_at), "revision": tasks.c.revision + 1}
KEY = [tasks.c.tenant_id, tasks.c.kind, tasks.c.id]
ADD = later(NEW.on_conflict_do_update(index_elements=KEY, set_=AGAIN))
ADD_MOVED = later(NEW.on_conflict_do_update(index_elements=KEY, set_=AGAIN | {"queue": NEW.excluded.queue}))


class Tasks(Shelf):
    """What is to be done for one tenant."""

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
        """Have the worker do something. One that was added already is done at the earlier of the two times.

        It stays in the queue it is in, unless it is `moved`.
        """
        values = {
            "tenant_id": self._tenant_id,
            "kind": kind,
            "id": id,
            "subject": subject,
            "queue": queue,
            "created_at": now,
            "due_at": due_at,
            "attempts": 0,
            "revision": 0,
        }
        self._connection.execute(ADD_MOVED if moved else ADD, values)

    def drop(self, kind: str, *, subject: str) -> None:
        """Have the worker leave it. One that is doing it at this moment will not do it again."""
        self._connection.execute(
            tasks.delete().where(self.mine(tasks), tasks.c.kind == kind, tasks.c.subject == subject)
        )

    def finish(self, task: Task) -> bool:
        """Done for good, unless it was asked for again meanwhile; False if it was, or was lost or dropped."""
        as_taken = and_(self._held(task), tasks.c.revision == task.revision)
        if self._connection.execute(tasks.delete().where(as_taken)).rowcount:
            return True
        self._release(task, task.created_at)
        return False

    def postpone(self, task: Task, due_at: datetime, *, queue: Queue | None = None) -> None:
        """Let go of it until then, or sooner if it was asked for again meanwhile; perhaps for another queue."""
        self._release(task, due_at, queue=queue or task.queue)

    def _release(self, task: Task, due_at: datetime, *, queue: Queue | None = None) -> None:
        is_as_taken = tasks.c.revision == task.revision
        self._connection.execute(
            tasks.update()
            .where(self._held(task))
            .values(
                leased_until=None,
                due_at=case((is_as_taken, due_at), else_=func.least(tasks.c.due_at, due_at)),
                queue=queue or task.queue,
            )
        )

    def _held(self, task: Task) -> ColumnElement[bool]:
        same = and_(tasks.c.kind == task.kind, tasks.c.id == task.id, tasks.c.attempts == task.attempts)
        # One that was dropped and added anew begins to count anew.
        return and_(self.mine(tasks), same, tasks.c.created_at == task.created_at)


def take_due(connection: Connection, queue: Queue, now: datetime, *, most: int) -> list[Task]:
    """Take what is due, of any tenant, for as long as the lease; what others hold is passed over."""
    parameters = {"queue": queue, "now": now, "until": now + LEASE, "most": most}
    return [Task(*row) for row in connection.exec_driver_sql(TAKE, parameters)]
