"""Why a job waits, or what ended it: Slurm's reason in plain words, the numbers behind it, and what its user can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.cluster.observation import observe_jobs
from lora_jobs.cluster.parsers import is_job_id
from lora_jobs.cluster.partition import PartitionView, ask_partition
from lora_jobs.cluster.queue import count_gpus
from lora_jobs.cluster.reasons import Reason, explain_reason
from lora_jobs.cluster.reservations import ask_reservations
from lora_jobs.errors import RunError, RunNotFoundError
from lora_jobs.runs import explain_state, find_run, find_runs_root, find_sweep, is_ended
from lora_jobs.units import format_duration
from lora_jobs.workflows.evidence import find_sighting
from lora_jobs.workflows.looking import look_at_runs
from lora_jobs.workflows.observing import report_runs
from lora_jobs.workflows.priorities import FactorRow, list_factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.cluster.observation import Observation, Sighting
    from lora_jobs.cluster.parsers import SlurmJob
    from lora_jobs.cluster.queue import Place
    from lora_jobs.runs import Run
    from lora_jobs.workflows.observing import RunStatus

Row = tuple[str, str]


class Explanation(Struct, frozen=True):
    """The answer of `why`: the reason, rows of numbers (what, value), and what can be done, best first."""

    run: str | None
    job_id: str | None
    state: str
    reason: str | None
    meaning: str
    turn: str
    known: bool
    actions: tuple[str, ...]
    numbers: tuple[Row, ...] = ()
    priority: int | None = None
    rank: int | None = None
    pending_jobs: int | None = None
    expected_start: str | None = None
    factors: tuple[FactorRow, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        numbers = [{"what": what, "value": value} for what, value in self.numbers]
        return {**asdict(self), "numbers": numbers, "factors": [asdict(row) for row in self.factors]}


def explain_job(job: str | None) -> Explanation:
    """Why the run's newest job (or any job id of the queue) is where it is; of a sweep, its most telling task.

    Errors: RunNotFoundError when it is neither a run nor a job that Slurm knows; RunError when it was never submitted.
    """
    root = find_runs_root()
    sweep = find_sweep(job, root)
    try:
        runs = sweep.runs if sweep is not None else [find_run(job, root)]
    except RunNotFoundError:
        if job is None or not is_job_id(job):
            raise
        return _explain_stranger(job)
    look = look_at_runs(runs)
    report = report_runs(look)
    run, status = choose_task(runs, report.runs)
    if status.state == "NOT_SUBMITTED":
        raise RunError(f"{run.id} was never submitted", hint=f"lora-jobs resume {run.id} submits it")
    sighting = find_sighting(run, look.records[run.id].job, look.seen) if run.id in look.records else None
    if sighting is None or is_ended(sighting.job.state):
        return _explain_records(run, status, look.notes)
    return _explain_sighting(run, sighting, look.seen)


def choose_task(runs: Sequence[Run], statuses: Sequence[RunStatus]) -> tuple[Run, RunStatus]:
    """The run whose state says most: one that waits, else one that failed, else the first."""

    def place(pair: tuple[Run, RunStatus]) -> int:
        status = pair[1]
        return 0 if status.state == "PENDING" else 1 if not status.active and status.state != "COMPLETED" else 2

    return min(zip(runs, statuses, strict=True), key=place)


def _explain_stranger(job: str) -> Explanation:
    """A job of the queue that is no run of ours."""
    seen = observe_jobs([job])
    if (sighting := seen.jobs.get(job)) is not None:
        return _explain_sighting(None, sighting, seen)
    words = "; ".join(seen.notes)
    raise RunNotFoundError(f"neither a run nor a job that Slurm knows: {job}" + (f" ({words})" if words else ""))


def _explain_records(run: Run, status: RunStatus, notes: tuple[str, ...]) -> Explanation:
    """A run that is local, or whose job has ended."""
    known = explain_state(status.state)
    reason = explain_reason(status.reason) if status.reason else None
    meaning = status.explanation + (f" ({status.reason})" if status.reason else "")
    actions = [status.next_step or "", known.next_step if known else ""]
    actions += [reason.advice if reason and reason.known and not status.active else "", f"lora-jobs logs {run.id}"]
    return Explanation(
        run=run.id,
        job_id=status.job_id,
        state=status.state,
        reason=status.reason,
        meaning=meaning,
        turn="wait" if status.active else "you",
        known=known is not None,
        actions=tuple(action for action in dict.fromkeys(actions) if action),
        notes=notes,
    )


def _explain_sighting(run: Run | None, sighting: Sighting, seen: Observation) -> Explanation:
    job, place = sighting.job, sighting.place
    state = explain_state(job.state)
    notes = list(seen.notes)
    reason = explain_reason(job.reason)
    if not job.pending:
        meaning = state.meaning if state else f"in a state this version does not know: {job.state}"
        advice = state.next_step if state else f"`scontrol show job {job.job_id}` may say more"
        return Explanation(
            run.id if run else None, job.job_id, job.state, job.reason, meaning, "wait", state is not None, (advice,),
            tuple(_describe_request(job)), notes=tuple(notes),
        )  # fmt: skip
    partition = place.partition if place else (job.partition or "").split(",")[0]
    view = ask_partition(partition, notes)
    numbers = [*_describe_request(job), *_describe_tasks(sighting.tasks), *_describe_place(place)]
    numbers += [*_describe_partition(job, view), *_describe_reservations(reason, job, view, notes)]
    numbers += _find_limits(reason.code, job, partition, seen.config.get("ClusterName"), notes)
    return Explanation(
        run=run.id if run else None,
        job_id=job.job_id,
        state=job.state,
        reason=job.reason or "None",
        meaning=reason.meaning,
        turn=reason.turn,
        known=reason.known,
        actions=_list_actions(reason, job, run),
        numbers=tuple(numbers),
        priority=job.priority,
        rank=place.rank if place else None,
        pending_jobs=place.pending if place else None,
        expected_start=job.expected_start,
        factors=list_factors(job.factors, seen.config),
        notes=tuple(notes),
    )


def _list_actions(reason: Reason, job: SlurmJob, run: Run | None) -> tuple[str, ...]:
    """What can be done, with the job's own id in the commands."""
    advice = reason.advice.replace("JOBID", job.job_id.partition("[")[0].rstrip("_"))
    actions = [part.strip() for part in advice.split("; ")]
    if run is not None and reason.code in {"Priority", "Resources"}:
        actions.append(f"lora-jobs plan {run.spec_path} shows where it would end sooner")
    return tuple(dict.fromkeys(actions))


def _describe_request(job: SlurmJob) -> list[Row]:
    gpus = count_gpus(job.gpus)
    parts = [f"{job.nodes} node{'s' if job.nodes != 1 else ''}" if job.nodes else ""]
    parts += [f"{gpus} GPU{'s' if gpus != 1 else ''} each" if gpus else ""]
    parts += [format_duration(job.limit_seconds) if job.limit_seconds else ""]
    where = [f"partition {job.partition}", f"QOS {job.qos}" if job.qos else "", f"account {job.account}"]
    rows = [("asks for", ", ".join(part for part in [*parts, *where] if part))]
    rows += [("waits for", job.dependency)] if job.dependency else []
    rows += [("reservation", job.reservation)] if job.reservation else []
    return rows + ([("submitted", job.submitted)] if job.submitted else [])


def _describe_tasks(tasks: dict[str, int]) -> list[Row]:
    if sum(tasks.values()) <= 1:
        return []
    return [("tasks", ", ".join(f"{number} {state.lower()}" for state, number in sorted(tasks.items())))]


def _describe_place(place: Place | None) -> list[Row]:
    if place is None:
        return []
    rows = [("rank", f"{place.rank} of {place.pending} pending in {place.partition}")]
    if place.rank > 1:
        mine = f", {place.mine_ahead} of them yours" if place.mine_ahead else ""
        jobs, users = place.rank - 1, place.users_ahead
        ahead = f"{jobs} job{'s' if jobs > 1 else ''} of {users} user{'s' if users > 1 else ''}{mine}"
        rows.append(("ahead", f"{ahead}: {place.nodes_ahead} nodes, {place.gpus_ahead} GPUs, "
                     f"{place.gpu_hours_ahead:g} GPU-hours at most"))  # fmt: skip
    return rows


def _describe_partition(job: SlurmJob, view: PartitionView | None) -> list[Row]:
    if view is None:
        return []
    states = ", ".join(f"{number} {state}" for state, number in view.states.items())
    rows = [("nodes", f"{states} (of {view.nodes} in {view.name}, {view.available})")]
    rows += [("nodes away", text) for text in view.away]
    if view.limit_seconds is not None:
        over = (job.limit_seconds or 0) > view.limit_seconds
        asked = format_duration(job.limit_seconds) if job.limit_seconds else "no limit"
        words = f"{format_duration(view.limit_seconds)} allowed, {asked} asked for"
        rows.append(("time limit", words + (": too long" if over else "")))
    if view.max_nodes is not None and (job.nodes or 0) > view.max_nodes:
        rows.append(("node limit", f"{view.max_nodes} allowed, {job.nodes} asked for: too many"))
    return rows


def _describe_reservations(reason: Reason, job: SlurmJob, view: PartitionView | None, notes: list[str]) -> list[Row]:
    """Reservations of the partition's nodes, asked for only where one may be what the job waits for."""
    kept = {"reserved", "maint"} & set(view.states if view else ())
    if not (kept or job.reservation or reason.code.startswith(("ReqNodeNotAvail", "Reserv"))):
        return []
    found = ask_reservations(view.hosts if view else (), job.reservation, notes)
    return [("reserved", reservation.describe()) for reservation in found]


def _find_limits(code: str, job: SlurmJob, partition: str, cluster: str | None, notes: list[str]) -> list[Row]:
    """The limits of its QOS (a list from 24.11 on) and of the partition's own, or those of its account."""
    if not code.startswith(("QOS", "Max", "Assoc")):
        return []
    from lora_jobs.cluster import limits  # such a limit is seldom the reason

    if code.startswith("Assoc"):
        if not (job.account and job.user):
            return []
        found = limits.ask_association_limits(job.account, job.user, partition, cluster, code, notes)
        return [("account limit", f"{whose}: {text}") for whose, text in found]
    own = (job.qos or "").split(",") if job.qos else []
    of_partition = limits.ask_partition_qos(partition, notes) if partition else None
    asked = list(dict.fromkeys([*own, *([of_partition] if of_partition else [])]))
    found = limits.ask_qos_limits(asked, notes) if asked else []
    return [(f"QOS {name}", text + (", of the partition" if name == of_partition else "")) for name, text in found]
