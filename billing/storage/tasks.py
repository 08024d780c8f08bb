"""The shelf of a tenant's tasks, and the door through which a worker takes what is due."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, and_
from sqlalchemy.dialects.postgresql import insert

from billing.storage.shelf import Shelf
from billing.storage.tables import tasks
from billing.tasks import LEASE, Task

TAKE = (
    "SELECT tenant_id, kind, id, subject, created_at, attempts "
    "FROM app.take_tasks(%(now)s, %(leased_until)s, %(most)s)"
)


class Tasks(Shelf):
    """What is to be done for one tenant."""

    def add(self, kind: str, id: UUID, *, subject: str, due_at: datetime, now: datetime) -> None:
        """Have the worker do something; one that was added already is due at the new time."""
        values = {"kind": kind, "id": id, "subject": subject, "created_at": now, "due_at": due_at}
        new = insert(tasks).values(tenant_id=self._tenant_id, attempts=0, **values)
        self._connection.execute(
            new.on_conflict_do_update(
                index_elements=[tasks.c.tenant_id, tasks.c.kind, tasks.c.id], set_={"due_at": due_at}
            )
        )

    def drop(self, kind: str, *, subject: str) -> None:
        """Have the worker leave it. One that is doing it at this moment will not do it again."""
        self._connection.execute(
            tasks.delete().where(self.mine(tasks), tasks.c.kind == kind, tasks.c.subject == subject)
        )

    def finish(self, task: Task) -> bool:
        """Done, for good; False if the lease was lost, or the task dropped."""
        return self._connection.execute(tasks.delete().where(self._held(task))).rowcount > 0

    def postpone(self, task: Task, due_at: datetime) -> bool:
        """Let go of it until then; False as with `finish`."""
        again = tasks.update().where(self._held(task)).values(due_at=due_at)
        return self._connection.execute(again).rowcount > 0

    def _held(self, task: Task) -> ColumnElement[bool]:
        # Whoever takes a task raises `attempts`: a worker that lost its lease changes nothing.
        same = and_(tasks.c.kind == task.kind, tasks.c.id == task.id, tasks.c.attempts == task.attempts)
        return and_(self.mine(tasks), same)


def take_due(connection: Connection, now: datetime, *, most: int) -> list[Task]:
    """Take what is due, of any tenant, for as long as the lease; what others hold is passed over."""
    parameters = {"now": now, "leased_until": now + LEASE, "most": most}
    return [Task(*row) for row in connection.exec_driver_sql(TAKE, parameters)]
