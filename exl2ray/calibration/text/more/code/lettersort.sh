#!/bin/sh
# lettersort - puts the scans of a letter collection into folders by year and correspondent.
#
#   lettersort [-n] [-i INDEX] SCANS TARGET
#
# The index is what the archivist typed:   signature|date|from|to|pages
# e.g.                                     K 14/203|1887-05-0?|Brandeis, Emma|unknown|3
# Scans are called K14_203_001.tif and so on. Plain POSIX sh: it also runs on the reading room's OpenBSD box.

set -eu
LC_ALL=C
export LC_ALL

dry=
index=./index.txt
usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 64; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

while getopts ni: opt; do
    case $opt in
        n) dry=yes ;;
        i) index=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -eq 2 ] || usage
scans=${1%/} target=${2%/}
[ -d "$scans" ] || die "no folder $scans"
[ -r "$index" ] || die "cannot read $index"
case $target/ in "$scans"/*) die "the target must not lie inside the scans" ;; esac

work=$(mktemp -d "${TMPDIR:-/tmp}/lettersort.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Folder names: letters, digits and hyphens. "Brandeis, Emma" becomes brandeis-emma.
slug() {
    printf '%s' "$1" | tr 'A-Z' 'a-z' | sed -e 's/[^a-z0-9][^a-z0-9]*/-/g' -e 's/^-//' -e 's/-$//'
}

do_() {
    if [ -n "$dry" ]; then
        printf '%s' '+'
        printf ' %s' "$@"
        printf '\n'
    else
        "$@"
    fi
}

lines=0 filed=0 missing=0
while IFS='|' read -r sig date from to pages rest || [ -n "$sig" ]; do
    lines=$((lines + 1))
    case $sig in ''|\#*) continue ;; esac
    [ -z "$rest" ] || { printf 'line %d: too many columns\n' "$lines" >&2; continue; }

    key=$(printf '%s' "$sig" | tr -d ' ' | tr / _)
    year=${date%%-*}
    case $year in
        [12][0-9][0-9][0-9]) ;;
        [12][0-9][0-9]\?)    year=${year%\?}0s ;;
        *)                   year=undated ;;
    esac
    who=$from
    case $who in ''|unknown|'?') who="to $to" ;; esac
    place=$target/$year/$(slug "$who")

    n=0
    for f in "$scans/$key"_[0-9][0-9][0-9].tif "$scans/$key"_[0-9][0-9][0-9].TIF; do
        [ -e "$f" ] || continue
        n=$((n + 1))
        printf '%s\n' "${f##*/}" >>"$work/used"
        [ -d "$place" ] || do_ mkdir -p "$place"
        base=${f##*/}
        new=$place/${base%.*}.tif
        if [ -e "$new" ]; then
            cmp -s "$f" "$new" || printf '%s: differs from what is already filed, left alone\n' "$base" >&2
            continue
        fi
        # A hard link costs nothing; across file systems it fails and a copy must do.
        do_ ln "$f" "$new" 2>/dev/null || do_ cp -p "$f" "$new"
        filed=$((filed + 1))
    done
    if [ "$n" -ne "${pages:-0}" ]; then
        printf '%s: %d scans, %s pages in the index\n' "$sig" "$n" "${pages:-?}" >&2
        missing=$((missing + 1))
    fi
done <"$index"

# Scans that no line of the index speaks of.
( cd "$scans" && ls | grep -i '\.tif$' | sort ) >"$work/all" || :
sort -u "$work/used" >"$work/known" 2>/dev/null || : >"$work/known"
comm -23 "$work/all" "$work/known" >"$work/stray"
if [ -s "$work/stray" ]; then
    printf '%d scans without an entry, the first ones:\n' "$(wc -l <"$work/stray")" >&2
    sed -n 1,5p "$work/stray" >&2
fi

printf '%d lines, %d files filed, %d letters to be looked at\n' "$lines" "$filed" "$missing"
[ "$missing" -eq 0 ]
