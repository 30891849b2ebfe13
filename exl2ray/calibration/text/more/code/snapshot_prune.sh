#!/bin/bash
# hoard-prune - thin out old snapshots
#
# Part of hoard, backups by rsync and hard links.
#
# Keeps all snapshots of the last KEEP_ALL hours, then the newest of each day,
# week and month as configured. Never touches the newest complete snapshot,
# whatever the clock says: a machine that comes up in 1970 must not cost you
# your backups.

set -euo pipefail
shopt -s nullglob

readonly PROG=${0##*/}
readonly CONF=${HOARD_CONF:-/etc/hoard/hoard.conf}

KEEP_ALL=48
KEEP_DAILY=14
KEEP_WEEKLY=8
KEEP_MONTHLY=24
dry_run=0
verbose=0

log()  { (( verbose )) && printf '%s\n' "$*" || :; }
die()  { printf '%s: %s\n' "$PROG" "$*" >&2; exit 1; }

usage() {
    cat <<END
Usage: $PROG [-nv] REPOSITORY
  -n   only say what would be removed
  -v   say what is kept and why
END
}

while getopts nvh opt; do
    case $opt in
        n) dry_run=1 ;;
        v) verbose=1 ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[[ $# -eq 1 ]] || { usage >&2; exit 2; }

repo=$(readlink -f -- "$1") || die "$1: no such directory"
[[ -f $repo/.hoard-repository ]] || die "$repo is not a hoard repository"

# shellcheck source=/dev/null
[[ -r $CONF ]] && . "$CONF"

exec 9>"$repo/.lock"
flock --nonblock 9 || die "a backup is running, try again later"

# Names are UTC, as in 2019-03-31T014500Z; a trailing .part marks one that was
# never finished.
snapshots=()
for dir in "$repo"/[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9][0-9][0-9][0-9][0-9]Z; do
    [[ -L $dir ]] || snapshots+=("${dir##*/}")
done
(( ${#snapshots[@]} )) || { log "nothing there"; exit 0; }

mapfile -t snapshots < <(printf '%s\n' "${snapshots[@]}" | sort -r)

seconds_of() {
    local n=$1
    date -u -d "${n:0:10} ${n:11:2}:${n:13:2}:${n:15:2}" +%s
}

declare -A reason=() used=()
reason[${snapshots[0]}]=newest
now=$(seconds_of "${snapshots[0]}")

keep_by() {     # keep_by LABEL FORMAT COUNT
    local label=$1 format=$2 left=$3 snap key
    for snap in "${snapshots[@]}"; do
        (( left > 0 )) || return 0
        key=$label/$(date -u -d "@$(seconds_of "$snap")" "+$format")
        [[ -n ${used[$key]-} ]] && continue
        used[$key]=1
        : "${reason[$snap]:=$label ${key#*/}}"
        (( left-- )) || :
    done
}

for snap in "${snapshots[@]}"; do
    (( now - $(seconds_of "$snap") <= KEEP_ALL * 3600 )) && : "${reason[$snap]:=recent}"
done
keep_by daily   %F    "$KEEP_DAILY"
keep_by weekly  %G-%V "$KEEP_WEEKLY"
keep_by monthly %Y-%m "$KEEP_MONTHLY"

failed=0
for snap in "${snapshots[@]}"; do
    if [[ -n ${reason[$snap]-} ]]; then
        log "keep    $snap  (${reason[$snap]})"
        continue
    fi
    if [[ -e $repo/$snap/.hoard-hold ]]; then
        log "keep    $snap  (held: $(head -n 1 "$repo/$snap/.hoard-hold"))"
        continue
    fi
    echo "remove  $snap"
    (( dry_run )) && continue

    # Rename first: should we be interrupted, what is left is not taken for a
    # complete snapshot.
    if ! mv -- "$repo/$snap" "$repo/$snap.part" ||
       ! chmod -R u+w -- "$repo/$snap.part" ||
       ! rm -rf --one-file-system -- "$repo/$snap.part"; then
        echo "$PROG: could not remove $snap entirely" >&2
        failed=1
    fi
done

exit "$failed"
