#!/usr/bin/env bash
#
# rotate_backups.sh - thin out dated snapshots: all of the last 7 days, then the newest of each
# ISO week for 8 weeks, then the newest of each month for a year. The rest goes.
#
# Snapshots are directories named YYYY-MM-DD_HHMM. Anything else in the folder is left alone.
#
# Usage: rotate_backups.sh [-n] FOLDER        (-n: only say what would be removed)

set -euo pipefail
shopt -s nullglob

usage() { sed -n '3,8s/^# \{0,1\}//p' "$0"; exit 64; }
die()   { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }

dry_run=false
while getopts ':nh' option; do
  case $option in
    n) dry_run=true ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ $# -eq 1 ]] || usage
folder=$1
[[ -d $folder ]] || die "$folder is not a directory" 66

# Two rotations at once would both believe that "the other" snapshot of a week survives.
exec 9>"$folder/.rotate.lock"
flock --nonblock 9 || die "another rotation is running" 75

# NOW can be set to replay a decision; cron never sets it.
now=$(date --date "${NOW:-now}" +%s)
declare -A keeper_of=()
keep=() drop=()

# Newest first, so the first snapshot seen in a period is the one that stays. The glob sorts
# ascending and the names sort like dates, hence walking the array backwards.
snapshots=("$folder"/[0-9][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]_[0-2][0-9][0-5][0-9])
for ((i = ${#snapshots[@]} - 1; i >= 0; i--)); do
  path=${snapshots[i]}
  [[ -d $path && ! -L $path ]] || continue
  name=${path##*/}
  day=${name%_*}
  if ! taken=$(date --date "$day ${name:11:2}:${name:13:2}" +%s 2>/dev/null); then
    printf 'skipping %s: not a date\n' "$name" >&2
    continue
  fi

  age=$(( (now - taken) / 86400 ))
  if   (( age <   7 )); then period=$name
  elif (( age <  63 )); then period=$(date --date "$day" +week-%G-%V)
  elif (( age < 428 )); then period=month-${day%-*}
  else period=
  fi

  if [[ -n $period && -z ${keeper_of[$period]:-} ]]; then
    keeper_of[$period]=$name
    keep+=("$path")
  else
    drop+=("$path")
  fi
done

# A clock that jumped a decade ahead makes every snapshot look ancient. Refuse to be that thorough.
if (( ${#drop[@]} > 0 && ${#keep[@]} == 0 )); then
  die "would remove all ${#drop[@]} snapshots; is the clock right?" 70
fi

for path in ${drop[@]+"${drop[@]}"}; do
  if $dry_run; then
    printf 'would remove %s\n' "$path"
  else
    # Rename first: an interrupted rm must not leave half a snapshot under a trustworthy name.
    mv -- "$path" "$path.expired"
    rm -rf -- "$path.expired"
  fi
done
printf 'kept %d, removed %d\n' "${#keep[@]}" "${#drop[@]}"
