#!/usr/bin/env bash
#
# Changes tapes in a 24-slot autoloader by a plan, so that the weekend needs nobody in the cellar.
# Usage: backup_jukebox.bash [--dry-run] [--date YYYY-MM-DD] {tonight|status|eject-week}
#
# Slots 1-4 daily (Mon-Thu), 5-9 weekly (Friday of week 1..5), 10-21 monthly, 22 cleaning, 23-24 empty for the mail slot.

set -Eeuo pipefail
shopt -s inherit_errexit nullglob extglob

readonly CHANGER=/dev/tape/by-id/autoloader-changer
readonly DRIVE=/dev/tape/by-id/autoloader-drive-nst
readonly STATE=/var/lib/jukebox
readonly CLEAN_SLOT=22
declare -Ar DAILY=([1]=1 [2]=2 [3]=3 [4]=4)
declare -i dry_run=0
today=$(date +%F)

log()  { logger -t jukebox -- "$*"; [[ -t 2 ]] && printf '%s\n' "$*" >&2 || true; }
die()  { log "error: $*"; exit 1; }
trap 'die "line $LINENO: \`$BASH_COMMAND'"'"' gave $?"' ERR

run() {
    if ((dry_run)); then printf '+ %s\n' "${*@Q}"; else "$@"; fi
}

# slot_for DATE -> number of the slot whose tape gets tonight's backup
slot_for() {
    local day=$1 dow dom last_friday
    dow=$(date -d "$day" +%u) dom=$(date -d "$day" +%-d)
    case $dow in
        [1-4]) echo "${DAILY[$dow]}" ;;
        5)
            last_friday=$(date -d "$day +7 days" +%m)
            if [[ $last_friday != "$(date -d "$day" +%m)" ]]; then
                echo $((9 + $(date -d "$day" +%-m)))           # the last Friday is the monthly one
            else
                echo $((5 + (dom - 1) / 7))
            fi ;;
        *) return 1 ;;
    esac
}

declare -A barcode
loaded_slot=''
read_inventory() {
    local line
    barcode=() loaded_slot=''
    while IFS= read -r line; do
        if [[ $line =~ ^[[:space:]]*Storage\ Element\ ([0-9]+)(\ IMPORT/EXPORT)?:Full.*VolumeTag=([A-Z0-9]+) ]]; then
            barcode[${BASH_REMATCH[1]}]=${BASH_REMATCH[3]}
        elif [[ $line =~ Data\ Transfer\ Element\ 0:Full\ \(Storage\ Element\ ([0-9]+)\ Loaded\) ]]; then
            loaded_slot=${BASH_REMATCH[1]}
        fi
    done < <(timeout 300 mtx -f "$CHANGER" status)
    ((${#barcode[@]})) || [[ $loaded_slot ]] || die 'the autoloader says it is empty, which I do not believe'
}

unload() {
    [[ $loaded_slot ]] || return 0
    run mt -f "$DRIVE" offline
    run timeout 600 mtx -f "$CHANGER" unload "$loaded_slot" 0
    loaded_slot=''
}

load() {
    local -i slot=$1
    [[ $loaded_slot == "$slot" ]] && return
    unload
    [[ -v barcode[$slot] ]] || die "slot $slot is empty"
    run timeout 600 mtx -f "$CHANGER" load "$slot" 0
    local -i tries=0
    until ((dry_run)) || mt -f "$DRIVE" status 2>/dev/null | grep -q ONLINE; do
        ((++tries < 30)) || die "tape ${barcode[$slot]} never came online"
        sleep 10
    done
    loaded_slot=$slot
}

clean_if_asked() {
    local -i uses
    # TapeAlert flag 20 "clean now"; 21 "clean periodic" can wait for Sunday
    if sudo -n tapeinfo -f "$DRIVE" 2>/dev/null | grep -q '^TapeAlert\[20\]'; then
        uses=$(<"$STATE/cleanings" 2>/dev/null || echo 0)
        ((uses < 50)) || die 'the cleaning tape is used up, order a new one'
        log "drive wants to be cleaned (use $((uses + 1)) of 50)"
        load "$CLEAN_SLOT"
        ((dry_run)) || { sleep 180; echo $((uses + 1)) >"$STATE/cleanings"; }
        unload
    fi
}

tonight() {
    local slot
    slot=$(slot_for "$today") || { log "no backup on $(date -d "$today" +%A)s"; return 0; }
    read_inventory
    clean_if_asked
    load "$slot"
    # A tape that was written less than six days ago is in the wrong slot: somebody sorted them by colour again.
    local stamp=$STATE/written.${barcode[$slot]:-?}
    if [[ -e $stamp ]] && (( $(date -d "$today" +%s) - $(stat -c %Y "$stamp") < 6 * 86400 )); then
        die "slot $slot holds ${barcode[$slot]}, written on $(date -r "$stamp" +%F)"
    fi
    run mt -f "$DRIVE" rewind
    run /usr/local/sbin/nightly_backup --tape "$DRIVE" --label "${barcode[$slot]:-UNKNOWN}"
    ((dry_run)) || touch -- "$stamp"
    unload
}

while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --date)    today=$(date -d "${2:?--date needs a day}" +%F); shift ;;
        tonight)   exec 9>"$STATE/lock"; flock -n 9 || die 'already running'; tonight ;;
        status)    read_inventory; for s in $(printf '%s\n' "${!barcode[@]}" | sort -n); do printf '%2d  %s\n' "$s" "${barcode[$s]}"; done ;;
        eject-week)
            read_inventory
            for s in 5 6 7 8 9; do
                [[ -v barcode[$s] ]] && { run mtx -f "$CHANGER" transfer "$s" 23; log "${barcode[$s]} is in the mail slot"; break; }
            done ;;
        *) sed -n '3,6s/^# \?//p' "$0" >&2; exit 64 ;;
    esac
    shift
done
