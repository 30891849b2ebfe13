#!/usr/bin/awk -f
# auction_report.awk - evening report of a fish auction
#
# Input: the clock's log, one event a line, blank separated:
#
#	07:12:41 LOT 214 HADDOCK 3 40.0 ST.BRIDE		lot, species, grade, kg, boat
#	07:12:58 STOP 214 B17 2.35				buyer presses at this price per kg
#	07:13:02 TAKE 214 3					boxes taken at that price; the rest goes on
#	07:13:30 WITHDRAW 214					fell below the reserve
#	07:13:31 VOID 213					auctioneer takes a sale back
#
# A box is 40 kg unless the lot is smaller.  usage: auction_report.awk [-v top=5] clock.log

BEGIN {
	if (top == "") top = 5
	BOX = 40
	CONVFMT = "%.10g"
}

{ sub(/\r$/, "") }
/^[ \t]*(#|$)/ { next }

$1 !~ /^[0-2][0-9]:[0-5][0-9]:[0-5][0-9]$/ { complain("no time"); next }

{
	now = seconds($1)
	if (now < before && before - now < 43200)
		complain("clock runs backwards")
	before = now
}

$2 == "LOT" {
	if (NF < 7) { complain("short LOT"); next }
	lot = $3
	if (lot in species) { complain("lot " lot " twice"); next }
	species[lot] = $4; grade[lot] = $5; left[lot] = weight[lot] = $6 + 0
	boat[lot] = rest(7)
	opened[lot] = now
	order[++nlots] = lot
	next
}

$2 == "STOP" {
	if (!known($3)) next
	bidder[$3] = $4; price[$3] = $5 + 0
	next
}

$2 == "TAKE" {
	lot = $3
	if (!known(lot)) next
	if (!(lot in bidder)) { complain("TAKE without STOP"); next }
	kg = $4 * BOX
	if (kg > left[lot] || $4 == "ALL") kg = left[lot]
	left[lot] -= kg
	n = ++nsales
	s_lot[n] = lot; s_kg[n] = kg; s_price[n] = price[lot]; s_buyer[n] = bidder[lot]
	if (left[lot] < 0.05) closed[lot] = now
	delete bidder[lot]
	next
}

$2 == "WITHDRAW" { if (known($3)) { withdrawn[$3] = left[$3]; closed[$3] = now } next }

$2 == "VOID" {
	# only the latest sale of a lot can be taken back
	for (n = nsales; n > 0; n--)
		if (s_lot[n] == $3 && !s_void[n]) break
	if (n == 0) { complain("nothing to void in lot " $3); next }
	s_void[n] = 1
	left[$3] += s_kg[n]
	delete closed[$3]
	next
}

{ complain("unknown event " $2) }

function known(l) {
	if (l in species) return 1
	complain("lot " l " was never opened")
	return 0
}

function complain(what) {
	printf "line %d: %s: %s\n", FNR, what, $0 > "/dev/stderr"
	errors++
}

function seconds(t,   p) { split(t, p, ":"); return p[1] * 3600 + p[2] * 60 + p[3] }

function rest(from,   i, s) {
	for (i = from; i <= NF; i++) s = s (i > from ? " " : "") $i
	return s
}

# insertion sort of keys by val, largest first; fine for the few dozen names of a harbour
function ranked(val, keys,   k, n, i, j, t) {
	n = 0
	for (k in val) keys[++n] = k
	for (i = 2; i <= n; i++) {
		t = keys[i]
		for (j = i - 1; j > 0 && (val[keys[j]] < val[t] || (val[keys[j]] == val[t] && keys[j] > t)); j--)
			keys[j + 1] = keys[j]
		keys[j + 1] = t
	}
	return n
}

function rule(w,   s) { while (w-- > 0) s = s "-"; print s }

END {
	for (n = 1; n <= nsales; n++) {
		if (s_void[n]) { voids++; continue }
		v = s_kg[n] * s_price[n]
		sp = species[s_lot[n]]
		total += v; tonnes += s_kg[n] / 1000
		sp_kg[sp] += s_kg[n]; sp_val[sp] += v
		if (!(sp in low) || s_price[n] < low[sp]) low[sp] = s_price[n]
		if (s_price[n] > high[sp]) high[sp] = s_price[n]
		boat_val[boat[s_lot[n]]] += v
		buyer_val[s_buyer[n]] += v
		buyer_lots[s_buyer[n]] += !((s_buyer[n], s_lot[n]) in counted)
		counted[s_buyer[n], s_lot[n]]
	}

	printf "%-14s %9s %8s %8s %8s %11s\n", "species", "kg", "low", "mean", "high", "value"
	rule(63)
	m = ranked(sp_val, list)
	for (i = 1; i <= m; i++) {
		sp = list[i]
		printf "%-14s %9.1f %8.2f %8.2f %8.2f %11.2f\n", sp, sp_kg[sp], low[sp], sp_val[sp] / sp_kg[sp], high[sp], sp_val[sp]
	}
	rule(63)
	printf "%-14s %9.1f %26s %11.2f\n\n", "all", tonnes * 1000, "", total

	print "boats"
	delete list
	m = ranked(boat_val, list)
	for (i = 1; i <= m; i++) printf "  %-22s %11.2f\n", list[i], boat_val[list[i]]

	printf "\nlargest buyers\n"
	delete list
	m = ranked(buyer_val, list)
	for (i = 1; i <= m && i <= top; i++)
		printf "  %-6s %3d lots %11.2f  %4.1f %%\n", list[i], buyer_lots[list[i]], buyer_val[list[i]], 100 * buyer_val[list[i]] / total

	for (l in closed) { took += closed[l] - opened[l]; nclosed++ }
	if (nclosed) printf "\n%.0f seconds a lot, %d sales taken back\n", took / nclosed, voids

	for (i = 1; i <= nlots; i++) {
		l = order[i]
		if (l in withdrawn) printf "withdrawn: lot %s, %s %s, %.1f kg\n", l, species[l], grade[l], withdrawn[l]
		else if (!(l in closed)) printf "LEFT OPEN: lot %s, %.1f kg of %s\n", l, left[l], boat[l]
	}
	exit errors > 0
}
