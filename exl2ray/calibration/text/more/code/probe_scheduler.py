import asyncio
import contextlib
import logging
import random
import time

from vigil import metrics
from vigil.checks import CheckResult, Status, load_check
from vigil.notify import Dispatcher

logger = logging.getLogger("vigil.scheduler")


class Service(object):
    __slots__ = (
        "host", "name", "check", "interval", "retry_interval", "max_attempts",
        "attempt", "state", "state_type", "last_change", "flap_history", "parents",
    )

    def __init__(self, host, name, check, interval=300, retry_interval=60, max_attempts=3, parents=()):
        self.host = host
        self.name = name
        self.check = check
        self.interval = interval
        self.retry_interval = retry_interval
        self.max_attempts = max_attempts
        self.attempt = 1
        self.state = Status.PENDING
        self.state_type = "hard"
        self.last_change = time.time()
        self.flap_history = []
        self.parents = tuple(parents)

    def __repr__(self):
        return "<Service %s/%s %s(%s) %d/%d>" % (
            self.host, self.name, self.state.name, self.state_type, self.attempt, self.max_attempts)

    @property
    def is_flapping(self):
        recent = self.flap_history[-21:]
        if len(recent) < 21:
            return False
        # younger changes weigh more: from 0.8 for the oldest to 1.2
        total = 0.0
        for i in range(1, len(recent)):
            if recent[i] is not recent[i - 1]:
                total += 0.8 + 0.4 * (i - 1) / 19
        return total / 20 > 0.3

    def apply(self, result):
        """Take over a result. Returns True if people should hear of it."""
        previous, previous_type = self.state, self.state_type
        self.flap_history.append(result.status)
        del self.flap_history[:-21]

        if result.status is Status.OK:
            self.attempt = 1
            self.state, self.state_type = Status.OK, "hard"
            notify = previous not in (Status.OK, Status.PENDING) and previous_type == "hard"
        elif previous in (Status.OK, Status.PENDING):
            self.attempt = 1
            self.state = result.status
            self.state_type = "hard" if self.max_attempts == 1 else "soft"
            notify = self.state_type == "hard"
        else:
            self.state = result.status
            if previous_type == "soft":
                self.attempt += 1
                if self.attempt >= self.max_attempts:
                    self.state_type = "hard"
            notify = self.state_type == "hard" and (
                previous_type == "soft" or previous is not result.status)

        if previous is not self.state:
            self.last_change = time.time()
        return notify and not self.is_flapping

    def delay(self):
        if self.state_type == "soft":
            return self.retry_interval
        return self.interval


class Scheduler(object):

    def __init__(self, services, dispatcher=None, concurrency=64):
        self.services = list(services)
        self.dispatcher = dispatcher or Dispatcher()
        self.slots = asyncio.Semaphore(concurrency)
        self.by_key = {(s.host, s.name): s for s in self.services}
        self.running = True

    async def run(self):
        tasks = []
        for i, service in enumerate(self.services):
            # spread the first round over one interval
            offset = service.interval * i / max(1, len(self.services))
            tasks.append(asyncio.ensure_future(self.loop(service, offset)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def loop(self, service, offset):
        await asyncio.sleep(offset)
        while self.running:
            started = time.monotonic()
            try:
                await self.check_once(service)
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("check of %r blew up", service)
            used = time.monotonic() - started
            jitter = random.uniform(-0.02, 0.02) * service.interval
            await asyncio.sleep(max(1, service.delay() - used + jitter))

    async def check_once(self, service):
        if self.unreachable(service):
            logger.debug("%r: parent is down, not checked", service)
            return
        async with self.slots:
            with metrics.timer("check_seconds", host=service.host):
                result = await self.execute(service)
        if service.apply(result):
            await self.dispatcher.send(service, result)
        metrics.gauge("service_state", service.state.value, host=service.host, service=service.name)

    async def execute(self, service):
        check = load_check(service.check)
        try:
            return await asyncio.wait_for(check.run(service.host), timeout=check.timeout)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                check.kill()
            return CheckResult(Status.CRITICAL, "no answer within %d s" % check.timeout)
        except OSError as e:
            return CheckResult(Status.UNKNOWN, "cannot run %s: %s" % (check.name, e.strerror))

    def unreachable(self, service):
        parents = [self.by_key[p] for p in service.parents if p in self.by_key]
        if not parents:
            return False
        return all(p.state is Status.CRITICAL and p.state_type == "hard" for p in parents)

    def stop(self):
        self.running = False
