#!/usr/bin/env python
# Compare the staff list of the payroll office with an LDIF dump of the directory and mail the differences.
# Runs from cron on the old mail host (Python 2.3 there, so no decorators, no generator expressions, no sets module
# tricks). Kept working under newer interpreters too: nothing but print with one argument in brackets.
#
#   05 6 * * 1-5   /usr/local/sbin/ldifcheck_2005.py /var/spool/payroll/staff.txt /var/backups/slapd/today.ldif

import base64
import os
import re
import sys

MAXLINES = 400
IGNORE = re.compile(r'^(svc|test|print)[-_]', re.I)


def unfold(fp):
    """LDIF wraps long lines: a line that starts with one space belongs to the line before."""
    pending = None
    lines = []
    for line in fp:
        line = line.rstrip('\r\n')
        if line[:1] == ' ' and pending is not None:
            pending = pending + line[1:]
            continue
        if pending is not None:
            lines.append(pending)
        pending = line
    if pending is not None:
        lines.append(pending)
    return lines


def entries(lines):
    current = {}
    found = []
    for line in lines + ['']:
        if line[:1] == '#':
            continue
        if not line:
            if current:
                found.append(current)
            current = {}
            continue
        colon = line.find(':')
        if colon < 1:
            raise ValueError('not an attribute: %r' % (line,))
        name = line[:colon].lower()
        if line[colon + 1:colon + 2] == ':':
            value = base64.b64decode(line[colon + 2:].strip())
            if not isinstance(value, str):
                value = value.decode('utf-8')
        else:
            value = line[colon + 1:].strip()
        current.setdefault(name, []).append(value)
    return found


def payroll(path):
    """Fixed columns, as the AS/400 writes them: 1-6 number, 8-37 name, 39-46 leaving date or blanks."""
    people = {}
    fp = open(path)
    try:
        for number, line in enumerate(fp):
            if not line.strip():
                continue
            key = line[0:6]
            if not key.isdigit():
                sys.stderr.write('line %d of %s: no staff number\n' % (number + 1, path))
                continue
            people[key] = (line[7:37].strip(), line[38:46].strip())
    finally:
        fp.close()
    return people


def compare(people, directory, today):
    out = []
    seen = {}
    for e in directory:
        uid = e.get('uid', ['?'])[0]
        if 'person' not in [c.lower() for c in e.get('objectclass', [])] or IGNORE.match(uid):
            continue
        key = e.get('employeenumber', [''])[0].zfill(6)
        if seen.has_key(key) if hasattr(seen, 'has_key') else key in seen:
            out.append('TWICE    %s  %s and %s' % (key, seen[key], uid))
        seen[key] = uid
        if not key in people:
            out.append('UNKNOWN  %s  %s is in the directory only' % (key, uid))
            continue
        name, left = people[key]
        if left and left < today and e.get('loginshell', [''])[0] != '/bin/false':
            out.append('LEFT     %s  %s left on %s, account still open' % (key, uid, left))
        surname = e.get('sn', [''])[0]
        if surname.upper() not in name.upper():
            out.append('NAME     %s  payroll %s, directory %s' % (key, name, surname))
    for key in people.keys():
        if key not in seen and not people[key][1]:
            out.append('MISSING  %s  %s has no account' % (key, people[key][0]))
    out.sort()
    return out


def mail(lines, to):
    pipe = os.popen('/usr/lib/sendmail -t', 'w')
    pipe.write('To: %s\nSubject: directory check: %d differences\n\n' % (to, len(lines)))
    pipe.write('\n'.join(lines[:MAXLINES]))
    if len(lines) > MAXLINES:
        pipe.write('\n... and %d more. Something is very wrong.' % (len(lines) - MAXLINES))
    pipe.write('\n')
    return pipe.close()


if __name__ == '__main__':
    import time
    if len(sys.argv) != 3:
        print('usage: %s staff.txt dump.ldif' % sys.argv[0])
        sys.exit(2)
    differences = compare(payroll(sys.argv[1]), entries(unfold(open(sys.argv[2]))), time.strftime('%Y%m%d'))
    if differences:
        sys.exit(mail(differences, 'helpdesk') and 1 or 0)
