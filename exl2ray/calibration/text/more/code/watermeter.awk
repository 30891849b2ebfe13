#!/usr/bin/awk -f
# Reads the files a meter reader's handheld makes, prints what each house has used, and finds leaks.
#
#   watermeter.awk [-v leak=4] [-v csv=1] readings_2025q4.txt readings_2026q1.txt ...
#
# Lines:   R 04417 2026-01-12 000318.442 mh      reading (cubic metres, initials)
#          X 04417 2025-11-30 000290.100 000000.012   meter changed: last reading of the old, first of the new
#          # remarks; H lines describe houses:   H 04417 "Mill Lane 9" 3

function days(iso,    y, m, d) {
    # Day number by the old trick of a year that begins in March.
    y = substr(iso, 1, 4) + 0; m = substr(iso, 6, 2) + 0; d = substr(iso, 9, 2) + 0
    if (m < 3) { m += 12; y-- }
    return 365 * y + int(y / 4) - int(y / 100) + int(y / 400) + int((153 * m - 457) / 5) + d
}

function complain(text) {
    printf "%s:%d: %s\n", FILENAME, FNR, text > "/dev/stderr"
    bad++
}

# A meter with five digits before the point starts again at nought after 99999.
function difference(new, old,    d) {
    d = new - old
    if (d < -50000) d += 100000
    return d
}

BEGIN {
    if (leak == "") leak = 4
    OFMT = "%.1f"
}

{ sub(/\r$/, "") }
/^[ \t]*(#|$)/ { next }

$1 == "H" {
    if (!match($0, /"[^"]*"/)) { complain("house without an address"); next }
    address[$2] = substr($0, RSTART + 1, RLENGTH - 2)
    people[$2] = $NF
    next
}

$1 == "R" || $1 == "X" {
    if ($3 !~ /^20[0-9][0-9]-[01][0-9]-[0-3][0-9]$/) { complain("date " $3); next }
    house = $2; day = days($3)
    if (!(house in seen)) order[++houses] = house
    seen[house] = 1

    if (house in last_day) {
        if (day <= last_day[house]) { complain(house " goes back in time"); next }
        used = difference($4, last[house])
        if (used < 0) {
            complain(sprintf("%s runs backwards: %.3f after %.3f", house, $4, last[house]))
            next
        }
        span = day - last_day[house]
        total[house] += used
        total_days[house] += span
        # Litres per head and day of this span, against what the house used before.
        rate = 1000 * used / span
        if (total_days[house] > span) {
            before = 1000 * (total[house] - used) / (total_days[house] - span)
            if (before > 5 && rate > leak * before)
                suspects[house] = sprintf("%.0f l a day since %s, %.0f before", rate, last_date[house], before)
        }
        month = substr($3, 1, 7)
        village[month] += used
    }
    last[house] = ($1 == "X") ? $5 : $4
    last_day[house] = day
    last_date[house] = $3
    next
}

{ complain("what is a line that begins with " $1 "?") }

END {
    sep = csv ? ";" : "  "
    fmt = csv ? "%s;%s;%.1f;%d;%s\n" : "%-6s  %-28s %9.1f m3  %4d days  %6s l/head\n"
    for (i = 1; i <= houses; i++) {
        h = order[i]
        head = (people[h] > 0 && total_days[h] > 0) ? sprintf("%.0f", 1000 * total[h] / total_days[h] / people[h]) : "?"
        printf fmt, h, (h in address ? address[h] : "(not in the list)"), total[h], total_days[h], head
    }
    for (h in suspects) printf "LEAK?%s%s%s%s\n", sep, (h in address ? address[h] : h), sep, suspects[h]
    if (!csv)
        for (m in village) printf "%s  %9.1f m3\n", m, village[m] | "sort"
    close("sort")
    exit bad ? 1 : 0
}
