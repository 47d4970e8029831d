"""What the server remembers: jobs in SQLite, written before anybody is told of them.

One process writes (a lock on the folder sees to that), so a job's row is always what was last said of it.
Jobs that are not finished are also kept in memory: their steps change too often to be written.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .waiting import Waiting

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED, EXPIRED = "completed", "failed", "cancelled", "expired"
STATUSES = (QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED, EXPIRED)
SCHEMA = """
create table if not exists jobs (
    number integer primary key autoincrement, id text unique not null, owner text not null,
    status text not null, created_at real not null, expires_at real, data text not null
);
create index if not exists jobs_by_owner on jobs (owner, number);
create index if not exists jobs_by_expiry on jobs (status, expires_at);
create table if not exists pictures (job text not null, sha256 text not null);
create index if not exists pictures_by_sha256 on pictures (sha256);
create index if not exists pictures_by_job on pictures (job);
create table if not exists repeats (
    owner text not null, key text not null, digest text not null, job text not null, created_at real not null,
    primary key (owner, key)
);
"""
COLUMNS = ("id", "owner", "status", "created_at", "expires_at")
FORMAT = 1
FORGOTTEN = 30 * 24 * 3600.0  # seconds after a job has expired


@dataclass(frozen=True)
class Job:
    """One POST: `samples` videos.

    id: as clients know it; owner: the name of the key that asked; bundle: its name; request: fields of
    runtime.Request as JSON, `concepts` as {"label", "sha256"} of pictures that were stored; digest: of all
    that was asked for; step of steps: over all samples; deaths: workers that died with it; error: code and
    message; warnings: one line each; seconds: of each stage; callback_url: who is told of the end; told:
    whether that is done with. Times are Unix's.
    """

    id: str
    owner: str
    bundle: str
    request: dict[str, Any]
    digest: str
    created_at: float
    status: str = QUEUED
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    step: int = 0
    steps: int = 0
    deaths: int = 0
    error: tuple[str, str] | None = None
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    callback_url: str | None = None
    told: bool = False

    @property
    def active(self) -> bool:
        """Whether it still has to be made."""
        return self.status in (QUEUED, IN_PROGRESS)

    @property
    def samples(self) -> int:
        """How many videos it is."""
        return int(self.request.get("samples", 1))

    @property
    def pictures(self) -> list[str]:
        """SHA-256 of each concept's picture."""
        return [concept["sha256"] for concept in self.request.get("concepts", ())]


class Store:
    """All jobs. Methods raise sqlite3.Error where the disk fails."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Jobs that were being made when their server died are queued once more.

        Raises ValueError for a file of a later version, and for one that is damaged.
        """
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma journal_mode=wal")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > FORMAT:
            raise ValueError(f"it has format {version}, and this version reads up to {FORMAT}")
        if (found := self._db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(f"it is damaged ({found})")
        self._db.executescript(f"begin; {SCHEMA} pragma user_version={FORMAT}; commit;")
        self.waiting = Waiting()
        self._active: dict[str, Job] = {}
        self._numbers: dict[str, int] = {}  # of these, in the order in which they came
        self._counts: Counter[str] = Counter()  # of these, by bundle
        for number, row in self._db.execute(
            "select number, data from jobs where status in (?, ?) order by number", (QUEUED, IN_PROGRESS)
        ).fetchall():
            job = dataclasses.replace(_job(row), status=QUEUED, started_at=None, step=0)
            self._numbers[job.id] = number
            self._set(job.id, job)

    def close(self) -> None:
        """Nothing may be asked of it afterwards."""
        self._db.close()

    def add(self, job: Job, repeat: str | None = None) -> None:
        """Accepts a job: once this returns it is not lost. repeat: its Idempotency-Key."""
        self._db.execute("pragma synchronous=full")  # what was accepted outlives a power cut
        with self._transaction():
            number = self._db.execute(
                f"insert into jobs ({', '.join(COLUMNS)}, data) values (?, ?, ?, ?, ?, ?)",
                (*(getattr(job, name) for name in COLUMNS), _text(job)),
            ).lastrowid
            assert number is not None
            self._db.executemany(
                "insert into pictures values (?, ?)", [(job.id, digest) for digest in job.pictures]
            )
            if repeat is not None:
                self._db.execute(
                    "insert into repeats values (?, ?, ?, ?, ?)",
                    (job.owner, repeat, job.digest, job.id, job.created_at),
                )
        self._db.execute("pragma synchronous=normal")  # what became of it may have to be made again
        self._numbers[job.id] = number
        self._set(job.id, job)

    def repeated(self, owner: str, key: str) -> tuple[str, str] | None:
        """What was asked for under an Idempotency-Key before: its digest and the job's id."""
        found = self._db.execute(
            "select digest, job from repeats where owner = ? and key = ?", (owner, key)
        ).fetchone()
        return None if found is None else (found[0], found[1])

    def get(self, id: str) -> Job | None:
        """A job by its id, None where there is none (any more)."""
        if id in self._active:
            return self._active[id]
        found = self._db.execute("select data from jobs where id = ?", (id,)).fetchone()
        return None if found is None else _job(found[0])

    def active(self) -> list[Job]:
        """Those that are queued or being made, the oldest first."""
        return list(self._active.values())

    def active_in(self, bundle: str) -> int:
        """How many of a bundle are queued or being made."""
        return self._counts[bundle]

    def queued(self, id: str) -> Job | None:
        """A job that waits; None for any other."""
        job = self._active.get(id)
        return job if job is not None and job.status == QUEUED else None

    def number(self, job: Job) -> int | None:
        """Tells the order of jobs that still have to be made; None for any other."""
        return self._numbers.get(job.id)

    def change(self, id: str, **fields: Any) -> Job | None:
        """Changes a job and writes it; None where it is gone."""
        job = self.get(id)
        if job is None:
            return None
        job = dataclasses.replace(job, **fields)
        self._db.execute(
            "update jobs set status = ?, expires_at = ?, data = ? where id = ?",
            (job.status, job.expires_at, _text(job), id),
        )
        self._set(id, job if job.active else None)
        return job

    def note(self, id: str, **fields: Any) -> None:
        """How far a job is that still has to be made. In memory alone: after a restart it begins anew."""
        if (job := self._active.get(id)) is not None:
            self._set(id, dataclasses.replace(job, **fields))

    def _set(self, id: str, job: Job | None) -> None:
        """What is kept in memory of a job: None once it does not have to be made any more."""
        before = self._active.get(id)
        if before is not None and before.status == QUEUED and (job is None or job.status != QUEUED):
            self.waiting.remove(self._numbers[id], before)
        if job is not None and job.status == QUEUED and (before is None or before.status != QUEUED):
            self.waiting.add(self._numbers[id], job)
        if before is None and job is not None:
            self._counts[job.bundle] += 1
        if job is not None:
            self._active[id] = job  # where it stands, it stays
        elif before is not None:
            self._counts[before.bundle] -= 1
            del self._active[id], self._numbers[id]

    def page(
        self, owner: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> tuple[list[Job], bool] | None:
        """At most `limit` jobs of an owner, the newest first or the oldest, behind the job `after`, and
        whether there are more. None where `after` is none of theirs."""
        where, values = "owner = ?", [owner]
        if after is not None:
            found = self._db.execute(
                "select number from jobs where id = ? and owner = ?", (after, owner)
            ).fetchone()
            if found is None:
                return None
            where, values = f"{where} and number {'>' if ascending else '<'} ?", [*values, found[0]]
        order = "asc" if ascending else "desc"
        rows = self._db.execute(
            f"select id, data from jobs where {where} order by number {order} limit ?",
            (*values, limit + 1),
        ).fetchall()
        jobs = [self._active.get(id) or _job(data) for id, data in rows]
        return jobs[:limit], len(jobs) > limit

    def delete(self, id: str) -> list[str]:
        """Forgets a job; returns the pictures that no other job has."""
        with self._transaction():
            held = [row[0] for row in self._db.execute("select sha256 from pictures where job = ?", (id,))]
            self._db.execute("delete from pictures where job = ?", (id,))
            self._db.execute("delete from repeats where job = ?", (id,))
            self._db.execute("delete from jobs where id = ?", (id,))
        self._set(id, None)
        return self.unheld(held)

    def release(self, id: str) -> list[str]:
        """A finished job lets go of its pictures; returns those that no other job has."""
        with self._transaction():
            held = [row[0] for row in self._db.execute("select sha256 from pictures where job = ?", (id,))]
            self._db.execute("delete from pictures where job = ?", (id,))
        return self.unheld(held)

    def due(self, now: float) -> list[Job]:
        """Finished jobs whose files may go, and expired ones that may be forgotten."""
        rows = self._db.execute(
            "select data from jobs where status in (?, ?, ?) and expires_at <= ? "
            "or status = ? and expires_at <= ? limit 1000",
            (COMPLETED, FAILED, CANCELLED, now, EXPIRED, now - FORGOTTEN),
        )
        return [_job(row) for (row,) in rows.fetchall()]

    def unheld(self, pictures: Iterable[str]) -> list[str]:
        """Those that no job has."""
        held = "select 1 from pictures where sha256 = ?"
        return [p for p in dict.fromkeys(pictures) if self._db.execute(held, (p,)).fetchone() is None]

    def untold(self) -> list[Job]:
        """Finished jobs whose callback_url has not been told."""
        rows = self._db.execute(
            "select data from jobs where status not in (?, ?) and json_extract(data, '$.told') = 0 "
            "and json_extract(data, '$.callback_url') is not null",
            (QUEUED, IN_PROGRESS),
        )
        return [_job(row) for (row,) in rows.fetchall()]

    def known_pictures(self) -> set[str]:
        """SHA-256 of every picture that a job needs."""
        return {row[0] for row in self._db.execute("select distinct sha256 from pictures")}

    def known_jobs(self) -> set[str]:
        """Every job's id."""
        return {row[0] for row in self._db.execute("select id from jobs")}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")


def _text(job: Job) -> str:
    return json.dumps(dataclasses.asdict(job), ensure_ascii=False, separators=(",", ":"))


def _job(text: str) -> Job:
    """Raises ValueError for a row that another program wrote."""
    try:
        values = json.loads(text)
        error = None if values["error"] is None else tuple(values["error"])
        return Job(**{**values, "error": error, "warnings": tuple(values["warnings"])})
    except (ValueError, TypeError, KeyError):
        raise ValueError("it holds a job that is none of this version's") from None
