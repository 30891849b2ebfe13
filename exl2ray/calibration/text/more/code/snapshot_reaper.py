#!/usr/bin/python3 -I
"""Thin out ZFS snapshots on the backup host.

Keeps everything of the last two days, one a day for five weeks, one a month for two years and one a year for ever.
Snapshots with a user reference ("zfs hold") are never touched, nor are those whose names it does not understand.

Written after the night of 3 February, when the previous script (37 lines of shell, mine) read an empty list from a
hung `zfs list` as "keep nothing".
"""
import argparse
import datetime as dt
import fcntl
import os
import re
import subprocess
import sys
import syslog
from collections import defaultdict

NAME = re.compile(r"(?P<fs>[\w./:-]+)@auto-(?P<when>\d{8}T\d{4})Z\Z")
LOCK = "/run/lock/snapshot-reaper"


class Refuse(Exception):
    pass


def run(*argv: str, timeout: int = 120) -> str:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    r = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout)
    if r.returncode:
        raise Refuse(f"{' '.join(argv[:3])} ended with {r.returncode}: {r.stderr.strip()}")
    return r.stdout


def snapshots(pool: str) -> dict[str, list[tuple[dt.datetime, str, int]]]:
    """File system -> its snapshots with time, name and holds, oldest first."""
    found = defaultdict(list)
    for line in run("zfs", "list", "-H", "-p", "-t", "snapshot", "-o", "name,userrefs", "-r", pool).splitlines():
        name, refs = line.split("\t")
        if m := NAME.match(name):
            when = dt.datetime.strptime(m["when"], "%Y%m%dT%H%M").replace(tzinfo=dt.timezone.utc)
            found[m["fs"]].append((when, name, int(refs)))
    for snaps in found.values():
        snaps.sort()
    return found


def doomed(snaps: list[tuple[dt.datetime, str, int]], now: dt.datetime) -> list[str]:
    keep: set[str] = set()
    daily, monthly, yearly = {}, {}, {}
    for when, name, refs in snaps:
        age = now - when
        if refs or age < dt.timedelta(days=2):
            keep.add(name)
        # setdefault: the first of each period stays, so that a snapshot once chosen is chosen every time
        if age < dt.timedelta(weeks=5):
            daily.setdefault(when.date(), name)
        if age < dt.timedelta(days=731):
            monthly.setdefault((when.year, when.month), name)
        yearly.setdefault(when.year, name)
    keep.update(daily.values(), monthly.values(), yearly.values())
    if snaps:
        keep.add(snaps[-1][1])
    return [name for _, name, _ in snaps if name not in keep]


def sanity(fs: str, snaps: list, victims: list[str], now: dt.datetime, force: bool) -> None:
    newest = snaps[-1][0]
    if newest > now + dt.timedelta(minutes=10):
        raise Refuse(f"{fs}: newest snapshot is from the future ({newest:%F %R}), is the clock right?")
    if now - newest > dt.timedelta(days=3) and not force:
        raise Refuse(f"{fs}: nothing new since {newest:%F}, old ones are now worth more than space")
    if len(victims) > max(60, len(snaps) // 3) and not force:
        raise Refuse(f"{fs}: {len(victims)} of {len(snaps)} would go, which is not a normal night; look, then --force")


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("pool")
    ap.add_argument("-n", "--dry-run", action="store_true")
    ap.add_argument("--force", action="store_true", help="skip the checks against large or stale deletions")
    args = ap.parse_args()

    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another reaper is at work", file=sys.stderr)
        return 75

    syslog.openlog("snapshot-reaper", syslog.LOG_PID, syslog.LOG_DAEMON)
    now = dt.datetime.now(dt.timezone.utc)
    status = 0
    found = snapshots(args.pool)
    if not found:
        raise Refuse(f"no snapshots at all in {args.pool}: not believed")
    for fs, snaps in sorted(found.items()):
        victims = doomed(snaps, now)
        try:
            sanity(fs, snaps, victims, now, args.force)
        except Refuse as e:
            syslog.syslog(syslog.LOG_WARNING, str(e))
            print(e, file=sys.stderr)
            status = 1
            continue
        for name in victims:
            assert "@" in name, name      # without it, destroy would take the file system
            if args.dry_run:
                print("would destroy", name)
                continue
            run("zfs", "destroy", name, timeout=900)
            syslog.syslog(syslog.LOG_INFO, f"destroyed {name}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Refuse, subprocess.TimeoutExpired) as e:
        print(f"snapshot-reaper: {e}", file=sys.stderr)
        sys.exit(1)
