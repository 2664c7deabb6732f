"""Rules for the history of simulated runs. They know the script, the faults and the calls, but nothing of the director's state.

`check` returns the broken rules, each with its name. docs/reliability.md says what is not promised.
"""

import re
from collections import Counter, defaultdict
from itertools import pairwise
from statistics import mean

from tests.chaos import model
from tests.chaos.model import SECONDS, STORAGE_FAULTS
from vidgen_ray.batch.director import BREAKER_FAILURES, BREAKER_SHOTS
from vidgen_ray.batch.run_options import GRACE_S
from vidgen_ray.engine.attempts import RECENT_CALLS, USUAL_SHARE
from vidgen_ray.engine.encoder import Encoder
from vidgen_ray.engine.engine import OBJECT_STORE_SHARE, object_store_bytes
from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.errors import SetupError

FATAL = ("poison", "refused", "unlike")
"""First words of the prompts of shots that must fail."""
STALL_S = 2400.0
"""Longest time without a call while lines are left, outages of the storage and stopped drivers not counted."""
ATTEMPTS, MOST_ATTEMPTS = 3, 6
"""Attempts of a call, and the most that are not explained by faults."""
WHOLE = ("run", "run_clip")
"""Methods of a worker that render a whole image or clip."""
IDLE_S, IDLE_CALLS, WAITED_S = 300.0, 5, 1.0
CHUNK_BYTES = 1 << 20
SECONDS_AFTER_BREAKER = 120.0
"""Seconds in which a run stops because nearly all shots fail."""
LEASE_POLL_S = 11.0
"""Seconds in which a director notices that its lease was deleted."""
REASONS = {
    "lost its lease": {"lease_lost", "driver_stop", *STORAGE_FAULTS},
    "no file could be written": {*STORAGE_FAULTS},
    "of the last .* failed": {"sick", "poison", "crash", "hang", "error", "slow_gpu"},
    "loads? its weights|did not start": {"crash_load", "hang_load", "freeze", "kill"},
}
"""Text of the error that ends a run -> faults of which one must have happened. Otherwise no node can hold the models."""
PROBE_S = 260.0
"""Seconds after which a director knows that the storage does not respond, or that it does again."""
FROZEN_S, FROZEN_LOAD_S = 150.0, 420.0
"""Seconds after which a process that does not respond is replaced. With pings each minute instead of each 10 s."""
SLOW_S, SLOW_FACTOR = 30.0, 3.0
"""A call is slow after SLOW_S seconds and SLOW_FACTOR times its usual seconds."""
LEFT_S = 200.0
"""Seconds in which the unfinished files of a shot are deleted that has ended or is written elsewhere."""
WRONG_CALLS = 20
"""Most calls of a GPU with wrong pixels, while two sound ones of its kind work."""
SICK_CALLS = 30
"""Most calls that a GPU fails, while a sound one works."""
MAX_GAP_S = 2.0
"""Longest time between two calls of a worker that has work: messages and inputs are on their way."""
BAD_END_CLIPS = 18
"""Longest time from the last good shot until the lines behind it have failed, in clips: six attempts each, in two windows."""
AFTER_SUSPENSION_S = 20.0
"""Seconds after a suspension within which a process that is lost may be lost because of it."""
NOT_OF_CALLS, NODE_FAULT_S = ("node", "partition", "kill", "freeze", "driver_stop", "driver_kill", "lease_lost", "stop"), 3000.0
"""Faults that end processes without a call, and seconds in which they may do so."""
OVERTAKEN = 8
"""Most calls of younger shots, or of earlier stages, that overtake a call."""


def check(world):
    """Return the broken rules as `(rule, what happened)`."""
    history = History(world)
    return [(rule.__name__.removeprefix("check_"), text) for rule in RULES for text in rule(world, history)]


def number_of(event):
    """Return the number of the run of an event."""
    return int(event.fields["run"].removeprefix("run-"))


class History:
    """Events of a world, by what the rules ask."""

    def __init__(self, world):
        events = defaultdict(list)
        for event in world.history:
            events[event.kind].append(event)
        self.faults, self.work, self.starts, self.raised, self.unhandled, self.disorder = (
            events[kind] for kind in ("fault", "work", "start", "raised", "unhandled", "disorder")
        )
        self.messages = [event.fields["text"] for event in events["message"]]
        self.runs, self.ended = ({event.fields["number"]: event.at for event in events[kind]} for kind in ("run", "ended"))
        self.sent, self.answers = (
            {event.fields["call"].number: event for event in events[kind]} for kind in ("send", "answer")
        )
        self.work_ends = {event.fields["call"].number: event.at for event in self.work}
        self.rows, self.commits = defaultdict(list), defaultdict(list)
        for event in events["row"]:
            self.rows[number_of(event)].append(event)
        for event in events["commit"]:
            self.commits[event.fields["shot"]].append(event)
        self.discarded = {number_of(event) for event in events["discard"]}
        self.hit = {number for event in self.faults if event.fields["own"] for number in event.fields["calls"]}
        """Calls that a fault has hit."""
        self.sick = {number for event in self.faults if event.fields["fault"] == "sick" for number in event.fields["calls"]}
        """Calls that a sick or slow GPU has failed."""
        self.sick |= {number for number, answer in self.answers.items() if answer.fields["slow"] and answer.fields["error"]}
        for event in self.faults:
            if event.fields["fault"] == "freeze":
                # Nothing shows yet that the process is frozen.
                process = event.fields["process"]
                calls = {n for n, send in self.sent.items() if send.fields["call"].process is process and send.at >= event.at}
                self.hit |= {n for n in calls if self.sent[n].at < process.frozen_until}
        self.shots = {plan.shot.id: plan for _, plan in world.script}
        self.drafts = events["draft"]
        self.pixels = [event for event in self.faults if event.fields["fault"] == "pixels"]
        self.can_hold = {event.fields["number"]: event.fields["can_hold"] for event in events["ended"]}
        self.suspended = [(event.at, event.fields["until"]) for event in self.faults if event.fields["fault"] == "suspend"]
        """Times in which all machines were suspended."""

    def awake_s(self, begin, end):
        """Return the seconds between two times in which the machines ran."""
        return end - begin - sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self.suspended)

    def lease_ends(self, driver):
        """Return when a director lost its lease."""
        lost = [event.at for event in self.faults if event.fields["fault"] == "lease_lost" and event.fields["driver"] == driver]
        return min([*lost, self.runs.get(driver + 1, float("inf"))])

    def is_hit(self, process, at):
        """Return whether a fault may have ended a process that was lost soon after `at`."""
        calls = {number for number, event in self.sent.items() if event.fields["call"].process is process}
        hit = calls & {number for event in self.faults for number in event.fields["calls"]}
        others = (event for event in self.faults if event.fields["fault"] in NOT_OF_CALLS)
        return (
            bool(hit) or process.frozen_until > 0 or any(at - NODE_FAULT_S < event.at < at + NODE_FAULT_S for event in others)
        )

    def calls(self, shot, run, numbers):
        """Return the calls of a shot in a run that are among these."""
        calls = (event.fields["call"] for number, event in self.sent.items() if number in numbers)
        return [call for call in calls if call.shot == shot and call.driver.number == run]

    def known_commits(self, driver):
        """Return when a director learned that a shot was committed."""
        calls = (event.fields["call"] for commits in self.commits.values() for event in commits)
        answers = (self.answers[call.number] for call in calls if call.driver is driver and call.number in self.answers)
        return sorted(event.at for event in answers if event.fields["error"] is None)

    def outages(self):
        """Yield the beginning and end of each outage of the storage."""
        begin = None
        for event in self.faults:
            if event.fields["fault"] in STORAGE_FAULTS:
                begin = event.at if begin is None else begin
            elif event.fields["fault"] == "storage over" and begin is not None:
                yield begin, event.at
                begin = None

    def busy(self):
        """Return process -> beginning and end of each of its calls."""
        times = defaultdict(list)
        for number, event in self.sent.items():
            answer = self.answers.get(number)
            times[event.fields["call"].process].append((event.at, answer.at if answer is not None else float("inf")))
        return times

    def end_of(self, call):
        """Return when a call has ended, or its process."""
        return min(self.work_ends.get(call.number, float("inf")), call.process.gone_at)

    def is_measured(self, call, at):
        """Return whether the seconds of the stages of a call were known, mainly from GPUs that are not slow."""
        known, engine = defaultdict(list), call.actor.args[0].name
        for event in self.answers.values():
            other, fails = event.fields["call"], event.fields["error"] or event.fields["failed"]
            if other.actor.args[0].name == engine and event.at < at and not fails:
                for stage in other.stages:
                    known[stage].append(event.fields["slow"])
        last = [known[stage][-RECENT_CALLS:] for stage in call.stages]
        return all(len(slow) > 2 and sum(slow) < (1 - USUAL_SHARE) * (len(slow) - 1) for slow in last)

    def quarantined(self, world):
        """Return the actors of which a message says that they were quarantined."""
        pids = {int(match[1]) for text in self.messages if (match := re.search(r":(\d+)\) is quarantined", text))}
        return {process.actor for process in world.processes if process.pid in pids}

    def failed_processes(self):
        """Return the processes whose calls a fault has hit."""
        hangs = {number for event in self.faults if event.fields["fault"] == "hang" for number in event.fields["calls"]}
        return {self.sent[n].fields["call"].process for n in self.hit | self.sick | hangs if n in self.sent}

    def chain(self, shot):
        """Yield the shots that a shot continues, directly or not."""
        while (shot := self.shots[shot].shot.continue_from) is not None:
            yield shot

    def flaw(self, shot):
        """Return the first word of the prompt of a shot, or of the shot at the start of its chain."""
        return self.shots[[shot, *self.chain(shot)][-1]].shot.prompt.split()[0]


def check_ends(world, history):
    """A run ends, and the same command finishes the rest."""
    last = world.drivers[-1]
    if not last.completed:
        yield f"run {last.number} did not complete: error {last.error!r}, {last.left} left, ended {last.ended}"


def check_stopped(world, history):
    """A run stops only for a cause."""
    for driver in world.drivers:
        if driver.error is None or isinstance(driver.error, KeyboardInterrupt):
            continue
        if not isinstance(driver.error, SetupError):
            yield f"run {driver.number}: {driver.error!r}"
            continue
        faults = {event.fields["fault"] for event in history.faults} | {history.flaw(shot) for shot in history.shots}
        faults |= {"slow_gpu"} & {*world.kinds}
        causes = next((causes for text, causes in REASONS.items() if re.search(text, str(driver.error))), None)
        end = history.ended[driver.number]
        is_waiting = "no file could be written" in str(driver.error) and not driver.frozen
        # A stopped driver ends later, on other nodes.
        could_hold = history.can_hold[driver.number] and not driver.frozen
        if could_hold if causes is None else not causes & faults:
            yield f"run {driver.number} stopped without a cause: {driver.error}"
        if is_waiting and (known := history.known_commits(driver)) and known[-1] > end - world.wait_storage_s + PROBE_S:
            yield f"run {driver.number} stopped {end - known[-1]:.0f} s after it had written a shot: {driver.error}"


def check_one_row(world, history):
    """Each line has exactly one result in a run that completes, and at most one in another."""
    for driver in world.drivers:
        rows = Counter(event.fields["line"] for event in history.rows[driver.number])
        for line, _ in world.script:
            if rows[line.number] > 1 or (driver.completed and rows[line.number] != 1):
                yield f"run {driver.number}: line {line.number} has {rows[line.number]} rows"


def check_committed(world, history):
    """A line that is done has files."""
    for number, rows in history.rows.items():
        for event in rows:
            made = [commit for commit in history.commits[event.fields["shot"]] if commit.at <= event.at]
            if event.fields["status"] != "failed" and not made and event.fields["shot"] not in world.finished_before:
                yield f"run {number}: {event.fields['shot']} is {event.fields['status']} without files"


def check_commit_once(world, history):
    """A shot is not committed again once its director knows, or its run has found, that it is."""
    for shot, commits in history.commits.items():
        for n, second in enumerate(commits):
            sent, driver = history.sent[second.fields["call"].number].at, second.fields["call"].driver
            for first in commits[:n]:
                answer = history.answers.get(first.fields["call"].number)
                # A request that was delivered twice can be answered before its second commit.
                known = answer is not None and answer.fields["error"] is None and first.at <= answer.at < sent
                # If inputs were lost between them, the shot has started again, and knows nothing of its earlier calls.
                lost = any(
                    event.fields["fault"] == "inputs" and shot in event.fields["shots"] and first.at <= event.at < sent
                    for event in history.faults
                )
                if (known and not lost and first.fields["call"].driver is driver) or first.at < history.runs[driver.number]:
                    yield f"{shot} was committed at {first.at:.0f} s and again at {second.at:.0f} s"


def check_content(world, history):
    """The committed result is that of its key, and of the first try that is good enough."""
    for shot, commits in history.commits.items():
        tries = [history.shots[shot], *history.shots[shot].again]
        minimum = tries[0].shot.min_identity
        good = next((each.number for each in tries if minimum is None or world.likeness(each.shot) >= minimum), None)
        by_sick_gpu = {event.at for event in history.pixels if shot in event.fields["shots"]}
        for event in commits:
            if (event.fields["wrong"] and not by_sick_gpu) or event.fields["number"] != good:
                yield f"{shot}: wrong {event.fields['wrong']}, try {event.fields['number']} instead of {good}"


def check_lease(world, history):
    """A director commits nothing after it has lost its lease, and keeps no row unless it is killed before it notices."""
    for driver in world.drivers:
        lost = history.lease_ends(driver.number)
        for shot, commits in history.commits.items():
            late = [event.at for event in commits if event.fields["call"].driver is driver and event.at > lost]
            if late:
                yield f"run {driver.number} committed {shot} {late[0] - lost:.1f} s after it lost its lease"
        rows = [event for event in history.rows[driver.number] if event.at > lost + LEASE_POLL_S]
        if rows and driver.number not in history.discarded and not driver.killed:
            yield f"run {driver.number} kept {len(rows)} rows after it lost its lease"


def check_order(world, history):
    """Chunks arrive in order."""
    for event in history.disorder:
        yield f"{event.fields['shot']}: frames {event.fields['frames']} instead of {event.fields['expected']}"


def check_window(world, history):
    """Raw frames in the object store stay within the window."""
    largest = max(object_store_bytes(plan.shot, CHUNK_BYTES) for plan in history.shots.values())
    limit = max(OBJECT_STORE_SHARE * world.store_bytes, largest) + largest
    for driver in world.drivers:
        if driver.peak_bytes > limit:
            yield f"run {driver.number}: {driver.peak_bytes / 1e6:.1f} MB of objects, the limit is {limit / 1e6:.1f} MB"


def check_fine(world, history):
    """A fine shot fails only after ATTEMPTS faults, of which one is neither a sick worker nor a lost process or node.

    Or if two sick workers refuse it, if no healthy worker is left, or if the disk of the only encoder is sick in all attempts.
    """
    for driver in world.drivers:
        rows = history.rows[driver.number]
        # If nearly all shots crash their workers, nothing shows which worker is sick.
        for event in rows if driver.completed and "all_poison" not in world.kinds else ():
            shot = event.fields["shot"]
            if event.fields["status"] != "failed" or history.flaw(shot) in FATAL or not event.fields["healthy"]:
                continue
            if (source := re.match(r"continue_from: shot (\S+) failed", event.fields["error"])) is not None:
                causes = {row.fields["shot"] for row in rows if row.fields["status"] == "failed"} & {*history.chain(shot)}
                # A finished shot that is rendered again for its last frame has no other row.
                if source[1] not in causes | world.finished_before:
                    yield f"run {driver.number}: {shot} failed with {source[1]}, which has not failed"
                continue
            if history.flaw(shot) == "too_large" and not event.fields["large"]:
                continue
            plan = history.shots[shot]
            if plan.shot.min_identity is not None and not any(world.likeness(each.shot) >= 0.5 for each in (plan, *plan.again)):
                continue
            hit, sick = (history.calls(shot, driver.number, calls) for calls in (history.hit, history.sick))
            by_two_sick_workers = len({call.actor for call in sick if OUTPUT not in call.stages}) > 1
            encoders = {call.actor for call in sick if OUTPUT in call.stages}
            engines = [actor.args[0].name for actor in world.actors if actor.kind is Encoder]
            by_only_encoder = len(sick) >= ATTEMPTS and [engines.count(each.args[0].name) for each in encoders] == [1]
            if not by_two_sick_workers and not by_only_encoder and not (hit and len(hit) + len(sick) >= ATTEMPTS):
                counts = f"{len(hit)} faults, {len(sick)} attempts on a sick worker"
                yield f"run {driver.number}: {shot} failed after {counts}: {event.fields['error']}"


def check_wrong_lines_fail(world, history):
    """A shot that crashes every worker, or that every worker refuses, is not done."""
    for rows in history.rows.values():
        for event in rows:
            if event.fields["status"] != "failed" and history.flaw(event.fields["shot"]) in FATAL:
                yield f"{event.fields['shot']} is {event.fields['status']}: {history.shots[event.fields['shot']].shot.prompt}"


def check_rework(world, history):
    """Work that is done again is at most that of the shots that a fault could hit, and attempts for shots that must fail.

    Without canary checks, which repeat calls on purpose.
    """
    seconds, done = 0.0, set()
    work = [event for event in history.work if event.fields["call"].method != "compare"]
    for event in work:
        unit = event.fields["call"].unit
        if OUTPUT not in unit[1] and history.flaw(event.fields["call"].shot) not in FATAL:
            seconds += event.fields["seconds"] if unit in done else 0.0
            done.add(unit)
    hit = [(event.at, shot) for event in history.faults for shot in event.fields["shots"]]
    # A run that has lost its lease does not know it while the storage is down: another one renders the same shots.
    calls = ((event.at, event.fields["call"]) for event in work)
    hit += {(call.driver.number, call.shot) for at, call in calls if at > history.lease_ends(call.driver.number)}
    allowed = len(hit) * 2 * sum(SECONDS.values())
    # At the end of each run, the slowest calls run a second time.
    slowest_s = SECONDS["svd"] * (model.SLOW_FACTOR if "slow_gpu" in world.kinds else 1.0)
    allowed += len(world.drivers) * sum(len(node.gpus) for node in world.nodes) * slowest_s
    if seconds > allowed:
        yield f"{seconds:.0f} GPU seconds were done again, {allowed:.0f} are explained by faults"
    own = Counter((event.fields["call"].driver.number, event.fields["call"].unit) for event in work)
    for (run, unit), times in own.items():
        if times > MOST_ATTEMPTS + len(history.faults):
            yield f"run {run}: {unit} was done {times} times"


def check_stall(world, history):
    """While lines are left, calls are sent."""
    for driver in world.drivers:
        busy = [history.runs[driver.number]]
        busy += [event.at for event in history.sent.values() if event.fields["call"].driver is driver]
        busy += [event.at for event in history.rows[driver.number]]
        busy += [
            event.at for event in history.faults if event.fields["fault"].startswith(("storage", "disk", "driver", "suspend"))
        ]
        begin, end = history.runs[driver.number], history.ended.get(driver.number, 0.0)
        busy = sorted(at for at in busy if begin <= at <= end)
        for first, second in pairwise(busy):
            if second - first > STALL_S:
                yield f"run {driver.number}: no call between {first:.0f} and {second:.0f} s"


def check_idle(world, history):
    """A worker that has never failed gets calls while calls for its stages wait behind others.

    Not if it, its predecessor or several processes of its node were quarantined: it is on probation then. A call that has been
    on this worker, or on a predecessor, runs elsewhere.
    """
    busy, calls, intervals = defaultdict(list), defaultdict(list), history.busy()
    tried = defaultdict(set)
    for event in history.sent.values():
        tried[event.fields["call"].actor].add(event.fields["call"].unit)

    def could_run(process, call):
        return {*call.stages} <= {*process.actor.spec.stages} and call.unit not in tried[process.actor]

    for event in world.history:
        process = event.fields.get("process")
        if event.kind in ("loaded", "gone") or (event.kind == "start" and OUTPUT not in event.fields["call"].stages):
            busy[process].append(event.at)
        if event.kind == "answer" and event.fields["call"].process in busy:
            # A call whose inputs do not arrive never starts.
            busy[event.fields["call"].process].append(event.at)
        if event.kind == "start" and event.at > history.sent[event.fields["call"].number].at + WAITED_S:
            calls[event.fields["call"].driver].append((event.at, event.fields["call"]))
    failed, quarantined = history.failed_processes(), history.quarantined(world)
    sick_nodes = {match[1] for text in history.messages if (match := re.search(r"\((\S+):\d+\) is quarantined: several", text))}
    for process, times in busy.items():
        driver = process.actor.driver
        on_probation = process.life in sick_nodes or process.actor in quarantined
        if process in failed or process.frozen_until or not process.loaded or on_probation:
            continue
        for first, second in pairwise([*times, *([] if process.lost else [history.ended.get(driver.number, 0.0)])]):
            others = sum(first + 60 < at < second and could_run(process, call) for at, call in calls[driver])
            # A call on a slow GPU may take that long.
            runs = any(begin <= first and over >= second for begin, over in intervals[process])
            if second - first > IDLE_S and others > IDLE_CALLS and not runs:
                span = f"{first:.0f} to {second:.0f} s"
                yield f"run {driver.number}: process {process.pid} was idle from {span}, with {others} calls on others"


def check_breaker(world, history):
    """A run stops soon after nearly all of its last shots have failed on every worker, unless they had failed before."""
    before = set()
    # What a sick worker refuses does not count, nor a shot that fails with the one that it continues.
    for driver in world.drivers if not {"sick_worker", "sick_node"} & {*world.kinds} else ():
        rows = [row for row in history.rows[driver.number] if not row.fields.get("error", "").startswith("continue_from")]
        new = [row for row in rows if row.fields["status"] in ("done", "failed") and row.fields["shot"] not in before]
        # A shot that is refused, or whose likeness is too low, has not failed on every worker.
        fails = [row.fields["status"] == "failed" and history.flaw(row.fields["shot"]) == "poison" for row in new]
        for n in range(BREAKER_FAILURES, len(fails)):
            late = new[-1].at - new[n - 1].at > SECONDS_AFTER_BREAKER
            if late and sum(fails[max(0, n - BREAKER_SHOTS) : n]) >= BREAKER_FAILURES:
                yield f"run {driver.number} went on after {sum(fails[:n])} of {n} shots had failed"
                break
        before |= {row.fields["shot"] for row in rows if row.fields["status"] == "failed"}


def check_given_up(world, history):
    """A run stops when nothing could be written for too long."""
    for begin, end in history.outages():
        for driver in world.drivers:
            started, ended = history.runs[driver.number], history.ended.get(driver.number, float("inf"))
            is_stopped = driver.frozen or "suspend" in world.kinds
            # Writes that had begun may succeed.
            last = max(begin, started, *(at for at in history.known_commits(driver) if at < end))
            limit = last + world.wait_storage_s + PROBE_S + 2 * STALL_S * bool(is_stopped)
            if limit < min(end, ended):
                yield f"run {driver.number} waited from {last:.0f} to {min(end, ended):.0f} s for the storage"


def check_frozen(world, history):
    """A process that does not respond is replaced in time."""
    if {"driver_stop", "partition", "driver_kill", "suspend"} & {*world.kinds}:
        return
    for event in history.faults:
        process = event.fields.get("process")
        if event.fields["fault"] != "freeze" or process.actor in history.quarantined(world):
            continue
        limit = event.at + (FROZEN_S if process.loaded_at <= event.at else FROZEN_LOAD_S)
        ended = history.ended.get(process.actor.driver.number, float("inf"))
        if limit < min(process.frozen_until, process.gone_at, ended):
            yield f"process {process.pid} froze at {event.at:.0f} s and was there at {limit:.0f} s"


def check_leftovers(world, history):
    """An encoder deletes the unfinished files of a shot that has ended, or that another one writes."""
    opened = defaultdict(list)
    for event in history.drafts:
        opened[event.fields["call"].shot].append(event)
    for shot, drafts in opened.items():
        for n, event in enumerate(drafts):
            call, draft = event.fields["call"], event.fields["draft"]
            driver, process = call.driver, call.process
            ends = [row.at for row in history.rows[driver.number] if row.fields["shot"] == shot and row.at >= event.at]
            ends += [later.at for later in drafts[n + 1 :] if later.fields["call"].driver is driver]
            limit = min(ends, default=float("inf")) + LEFT_S + sum(end - begin for begin, end in history.outages())
            limit += process.frozen_until if process.frozen_until else 0.0
            is_hit = {"driver_stop", "partition", "suspend"} & {*world.kinds} or call.number in history.hit
            if not is_hit and limit < min(draft.closed_at, process.gone_at, history.ended.get(driver.number, float("inf"))):
                yield f"unfinished files of {shot} from {event.at:.0f} s were there at {limit:.0f} s"


def check_tail(world, history):
    """A slow call is repeated if a worker has nothing to do."""
    if {"driver_stop", "partition", "suspend"} & {*world.kinds}:
        return
    times, sends = history.busy(), defaultdict(list)
    for event in history.sent.values():
        sends[event.fields["call"].driver, event.fields["call"].unit].append(event.at)
    failed, quarantined = history.failed_processes(), history.quarantined(world)
    for event in history.starts:
        call, stages = event.fields["call"], {*event.fields["call"].stages}
        others = sends[call.driver, call.unit]
        if call.method not in WHOLE or min(others) < history.sent[call.number].at or not history.is_measured(call, event.at):
            continue
        late = event.at + max(SLOW_S, SLOW_FACTOR * 1.25 * sum(SECONDS[stage] for stage in stages))
        end = min(history.end_of(call), history.ended.get(call.driver.number, float("inf")))
        if late > end or any(history.sent[call.number].at < at <= late + 1 for at in others):
            continue
        for process in world.processes:
            could_run = process.actor.driver is call.driver and stages <= {*process.actor.spec.stages}
            is_up = process.loaded_at < event.at and process.gone_at > late and process.node.usable and not process.frozen_until
            is_sound = process not in failed and process.actor not in quarantined
            is_idle = not any(begin < late and over > event.at for begin, over in times[process])
            if could_run and is_up and is_sound and is_idle:
                span = f"{event.at:.0f} to {end:.0f} s"
                yield f"call {call.number} of {call.shot} ran from {span}, with process {process.pid} idle"
                break


def check_wrong_pixels(world, history):
    """A GPU that makes wrong images is found while two sound ones of its kind work."""
    calls = defaultdict(set)
    for event in history.pixels:
        call = history.sent[event.fields["calls"][0]].fields["call"] if event.fields["calls"][0] in history.sent else None
        if call is not None and event.fields["others"] > 1 and call.method in WHOLE:
            calls[call.driver.number, call.process].add(call.number)
    for (run, _), numbers in calls.items():
        if len(numbers) > WRONG_CALLS:
            yield f"run {run}: a process made wrong images in {len(numbers)} calls"


def check_sick(world, history):
    """A sick GPU gets few calls while a sound one works.

    A call that fails on a second sick GPU counts against its shot, not against either of them.
    """
    failed, calls = defaultdict(set), Counter()
    events = [event for event in history.faults if event.fields["fault"] == "sick"]
    sent = [(event, history.sent[event.fields["calls"][0]].fields["call"]) for event in events]
    for _, call in sent:
        failed[call.driver, call.unit].add(call.actor)
    for event, call in sent:
        is_confirmed = len(failed[call.driver, call.unit]) > 1
        if OUTPUT not in call.stages and event.fields["others"] and not is_confirmed:
            calls[call.driver.number, call.actor.gpu] += 1
    for (run, _), number in calls.items():
        if number > SICK_CALLS:
            yield f"run {run}: a sick GPU got {number} calls"


def check_overtaken(world, history):
    """A call is overtaken by few calls of younger shots and of earlier stages."""
    position = {stage: n for n, stage in enumerate(SECONDS)}
    touched = {shot for event in history.faults for shot in event.fields["shots"]}
    lines = {plan.shot.id: line.number for line, plan in world.script}
    last_answers, begun = {}, {}
    for event in history.sent.values():
        begun.setdefault((event.fields["call"].driver, event.fields["call"].shot), event.at)
    # Without a node, another layout may be needed: all shots start again.
    lost_nodes = [event.at for event in history.faults if event.fields["fault"] in ("node", "partition")]
    whole = [event for event in history.sent.values() if event.fields["call"].method in WHOLE]
    for event in whole:
        call, answer = event.fields["call"], history.answers.get(event.fields["call"].number)
        ready_at = last_answers.get((call.driver, call.shot))
        if answer is not None:
            last_answers[call.driver, call.shot] = answer.at
        if ready_at is None or call.shot in touched or history.flaw(call.shot) != "shot":
            continue
        if any(ready_at < at < event.at for at in lost_nodes):
            continue

        def overtakes(other, call=call):
            is_earlier = position[other.stages[0]] < position[call.stages[0]]
            # Shots of a script do not begin in its order: those with the same LoRAs follow each other.
            begins_later = begun[other.driver, other.shot] > begun[call.driver, call.shot]
            is_younger = other.stages == call.stages and lines[other.shot] > lines[call.shot] and begins_later
            could_run = other.driver is call.driver and {*call.stages} <= {*other.actor.spec.stages}
            return could_run and (is_earlier or is_younger)

        by = sum(ready_at + 1 < other.at < event.at and overtakes(other.fields["call"]) for other in whole)
        if by > OVERTAKEN:
            yield f"call {call.number} of {call.shot} was overtaken {by} times from {ready_at:.0f} to {event.at:.0f} s"


def check_stop(world, history):
    """After a stop request, a run ends within its grace period."""
    for event in history.faults:
        driver = world.drivers[event.fields.get("driver", 1) - 1]
        end = history.ended.get(driver.number, float("inf"))
        took_s = history.awake_s(event.at, end)
        if event.fields["fault"] == "stop" and not driver.frozen and took_s > GRACE_S + 30:
            yield f"run {driver.number} ended {took_s:.0f} s after the stop request"


def check_errors(world, history):
    """Methods of actors raise nothing, nor do callbacks of an event loop."""
    for event in history.raised:
        yield f"{event.fields['call'].method}: {event.fields['error']}"
    for event in history.unhandled:
        yield f"run {event.fields['driver']}: {event.fields['error']} in a callback"


def check_end_of_script(world, history):
    """Lines at the end of a script that fail everywhere are tried side by side."""
    rows = history.rows[1] if world.kinds == [model.BAD_END] else []
    last_good = max((event.at for event in rows if event.fields["status"] != "failed"), default=0.0)
    clip_s = SECONDS["flux"] + SECONDS["svd"]
    if rows and rows[-1].at > last_good + BAD_END_CLIPS * clip_s:
        yield f"the last of {model.BAD_LINES} bad lines failed {rows[-1].at - last_good:.0f} s after the last good shot"


def check_suspended(world, history):
    """No process is killed because all were suspended."""
    for begin, end in history.suspended:
        for process in world.processes:
            driver = process.actor.driver
            is_killed = process.loaded_at < begin and end < process.gone_at < end + AFTER_SUSPENSION_S
            if (
                is_killed
                and process.gone_at < history.ended.get(driver.number, float("inf"))
                and not history.is_hit(process, end)
            ):
                yield f"process {process.pid} was gone {process.gone_at - end:.1f} s after a suspension"


RULES = [rule for name, rule in [*globals().items()] if name.startswith("check_")]


def printed(world):
    """Return the history as text, one event a line."""
    lines = []
    for event in world.history:
        fields = {name: value for name, value in event.fields.items() if name != "process"}
        call = fields.pop("call", None)
        where = (
            "" if call is None else f"{call.number} {call.method} {call.shot or ''} {call.unit[1:] if call.is_work else ''} "
        )
        where += "" if call is None or call.process is None else f"by {call.process.pid} on {call.process.life} "
        lines.append(f"{event.at:9.2f} {event.kind} {where}{fields or ''}"[:400])
    return "\n".join(lines)


def figures(world):
    """Return figures of a run without faults, each the smaller the better: LoRA loads per shot with LoRAs, face features per
    photo, seconds between two calls of a worker if they are few, transfers between nodes per shot, and the mean end of a shot.
    """
    history = History(world)
    calls = [event for event in history.work if event.fields["call"].method in (*WHOLE, "run_chunk")]
    shots = [plan.shot for plan in history.shots.values()]
    gaps, free = [], {}
    for event in calls:
        process = event.fields["process"]
        gaps.append(event.at - event.fields["seconds"] - free.get(process, 0.0))
        free[process] = event.at
    ends = [event.at for event in history.rows[1]]
    return {
        "loads": world.adapter_loads / max(1, sum(bool(shot.all_loras) for shot in shots)),
        "features": sum("instantid" in event.fields["call"].stages for event in calls)
        / len({shot.face_image for shot in shots if shot.face_image}),
        "gap_s": mean(gap for gap in gaps if gap < MAX_GAP_S),
        "transfers": world.transfers / len(shots),
        "end_s": mean(ends) - history.runs[1],
    }
