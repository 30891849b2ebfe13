#!/bin/sh
#
# makedep - write Makefile dependencies for C sources, for compilers that
#           cannot do it themselves
#
# usage: makedep [-I dir]... [-o suffix] [-p prefix] file.c...
#
# Only #include "..." is followed; system headers are assumed not to change.
# Works with the Bourne shell of V7 descendants: no functions with local
# variables, no $(...), no test -e.

PATH=/bin:/usr/bin:/usr/ccs/bin
export PATH
IFS=' 	
'

progname=`basename $0`
dirs=
suffix=.o
prefix=
tmp=/tmp/mkd$$

trap 'rm -f $tmp.*' 0
trap 'exit 1' 1 2 13 15

while test $# -gt 0
do
	case $1 in
	-I)	dirs="$dirs $2"; shift ;;
	-I*)	dirs="$dirs `echo $1 | sed 's/^-I//'`" ;;
	-o)	suffix=$2; shift ;;
	-p)	prefix=$2; shift ;;
	--)	shift; break ;;
	-*)	echo "$progname: unknown option $1" >&2; exit 2 ;;
	*)	break ;;
	esac
	shift
done

if test $# -eq 0
then
	echo "usage: $progname [-I dir]... [-o suffix] [-p prefix] file.c..." >&2
	exit 2
fi

status=0
for src
do
	if test ! -r "$src"
	then
		echo "$progname: cannot read $src" >&2
		status=1
		continue
	fi

	echo "$src" >$tmp.todo
	: >$tmp.seen

	while test -s $tmp.todo
	do
		sort -u $tmp.todo | comm -23 - $tmp.seen >$tmp.now
		sort -u $tmp.now $tmp.seen >$tmp.new
		mv $tmp.new $tmp.seen
		: >$tmp.todo

		while read file
		do
			here=`expr "$file" : '\(.*\)/[^/]*$'`
			here=${here:-.}
			sed -n 's/^[ 	]*#[ 	]*include[ 	]*"\([^"]*\)".*/\1/p' $file |
			while read inc
			do
				for d in $here $dirs
				do
					if test -f $d/$inc
					then
						# ./foo.h and foo.h are the same file
						echo $d/$inc | sed 's:^\./::'
						continue 2
					fi
				done
				echo "$progname: $file: cannot find $inc" >&2
			done
		done <$tmp.now >>$tmp.todo
	done

	obj=$prefix`basename $src .c`$suffix
	# One long line upsets some makes; fold at about seventy columns.
	awk '
		BEGIN { line = "'$obj':"; }
		{
			if (length(line) + length($1) > 70) {
				print line " \\"; line = "\t" $1
			} else
				line = line " " $1
		}
		END { print line }
	' $tmp.seen
done

exit $status
