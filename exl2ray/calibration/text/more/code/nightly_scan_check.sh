#!/usr/bin/env bash
#
# Checks what the book scanner left in its drop folder overnight and moves complete volumes on.
# A volume is a directory  <shelfmark>.<yyyymmdd>/  with page images and a manifest of checksums.
#
#   nightly_scan_check.sh [-n] [-k DAYS] DROP ARCHIVE

set -euo pipefail
shopt -s nullglob

dry_run=
keep_days=14

usage() {
    sed -n '3,6s/^# \{0,1\}//p' "$0" >&2
    exit 64
}

while getopts :nk:h opt; do
    case $opt in
        n) dry_run=1 ;;
        k) keep_days=$OPTARG
           [[ $keep_days =~ ^[0-9]+$ ]] || usage ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
(( $# == 2 )) || usage
drop=$(realpath -e -- "$1")
archive=$(realpath -e -- "$2")

exec 9>"$drop/.lock"
if ! flock --nonblock 9; then
    echo "another check is running, leaving" >&2
    exit 75
fi

say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

do_it() {
    if [[ $dry_run ]]; then
        printf '    would run:'; printf ' %q' "$@"; echo
    else
        "$@"
    fi
}

# Prints the reasons why a volume is not fit to be moved, one a line; silence means fit.
complaints() {
    local dir=$1 pages page number previous=0

    [[ -f $dir/MANIFEST.sha256 ]] || { echo "no manifest"; return; }

    # still being written? the scanner touches a file at least every ten minutes
    if [[ -n $(find "$dir" -type f -mmin -10 -print -quit) ]]; then
        echo "in progress"
        return
    fi

    pages=("$dir"/p[0-9][0-9][0-9][0-9].tif)
    (( ${#pages[@]} )) || { echo "no pages"; return; }
    for page in "${pages[@]}"; do
        number=${page##*/p}
        number=$((10#${number%.tif}))
        if (( number != previous + 1 )); then
            echo "gap between page $previous and page $number"
        fi
        previous=$number
        # TIFF begins with II*\0 or MM\0*; a file of zeros means the card was full
        case $(head -c 4 "$page" | od -An -tx1 | tr -d ' \n') in
            49492a00 | 4d4d002a) ;;
            *) echo "${page##*/} is not a TIFF" ;;
        esac
    done

    ( cd "$dir" && sha256sum --check --quiet --strict MANIFEST.sha256 2>&1 ) | sed 's/^/checksum: /' || true

    local listed
    listed=$(grep -c '\.tif$' "$dir/MANIFEST.sha256" || true)
    (( listed == ${#pages[@]} )) || echo "manifest lists $listed pages, folder holds ${#pages[@]}"
}

moved=0 held=0
for dir in "$drop"/*.[12][0-9][0-9][0-9][01][0-9][0-3][0-9]/; do
    dir=${dir%/}
    volume=${dir##*/}
    mapfile -t reasons < <(complaints "$dir")

    if (( ${#reasons[@]} == 0 )); then
        target=$archive/${volume%.*}
        if [[ -e $target ]]; then
            say "HOLD  $volume: $target exists, rescans are moved by hand"
            held=$((held + 1))
            continue
        fi
        say "MOVE  $volume"
        # copy, compare, then delete: the archive is on another file system and mv would not compare
        do_it cp --archive --no-target-directory "$dir" "$target.partial"
        if [[ -z $dry_run ]]; then
            diff --recursive --brief "$dir" "$target.partial"
        fi
        do_it mv --no-clobber "$target.partial" "$target"
        do_it rm --recursive -- "$dir"
        moved=$((moved + 1))
    elif [[ ${reasons[0]} == "in progress" ]]; then
        say "WAIT  $volume"
    else
        say "HOLD  $volume"
        printf '        %s\n' "${reasons[@]}"
        held=$((held + 1))
    fi
done

while IFS= read -r -d '' old; do
    say "STALE ${old##*/}"
    do_it mv "$old" "$drop/.attic/"
done < <(find "$drop" -mindepth 1 -maxdepth 1 -type d -name '*.[12]*' -mtime "+$keep_days" -print0)

say "$moved moved, $held held"
(( held == 0 ))
