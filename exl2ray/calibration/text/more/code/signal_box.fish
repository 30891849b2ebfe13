# Functions for recording bird sound at night with four microphones on a long cable.
# ~/.config/fish/conf.d/signal_box.fish: `night start`, `night stop`, `night calls`, `night share`.

set -q NIGHT_DIR; or set -gx NIGHT_DIR ~/night
set -g __night_mics pond hedge roof quarry

function __night_die
    set_color red
    echo "night: $argv" >&2
    set_color normal
    return 1
end

function __night_sun --description 'UTC time of sunset or sunrise here, from a table made once a year'
    set -l kind $argv[1]
    set -l today (date +%m-%d)
    string match -rq "^$today\t(?<set>\d\d:\d\d)\t(?<rise>\d\d:\d\d)" <$NIGHT_DIR/sun.tsv
    or return
    test $kind = set; and echo $set; or echo $rise
end

function night --description 'Record, list and share night flight calls'
    argparse --name night --max-args 2 h/help 'g/gain=!_validate_int --min 0 --max 60' 'm/mic=+' n/dry-run -- $argv
    or return

    if set -q _flag_help
        echo 'night start [-g dB] [-m MIC]...   record until sunrise'
        echo 'night stop                        stop now'
        echo 'night calls [DATE]                what was heard'
        echo 'night share DATE                  copy the calls to the club server'
        return 0
    end

    set -l mics $__night_mics
    if set -q _flag_mic
        for m in $_flag_mic
            contains -- $m $__night_mics
            or __night_die "no microphone called $m (there are: "(string join ', ' $__night_mics)")"
            or return
        end
        set mics $_flag_mic
    end

    switch "$argv[1]"
        case start
            set -l until (__night_sun rise)
            or __night_die 'no line for today in sun.tsv; run the almanac script'
            or return
            set -l folder $NIGHT_DIR/(date +%Y-%m-%d)
            mkdir -p $folder
            # Four channels at 24 kHz are 690 MB an hour. June nights are short, December is not.
            set -l free (df -B1G --output=avail $NIGHT_DIR | tail -n1 | string trim)
            if test $free -lt 14
                __night_die "only $free GB left"
                return
            end
            for m in $mics
                set -l channel (contains -i -- $m $__night_mics)
                set -l cmd arecord -q -D plughw:CARD=Quad -f S24_3LE -r 24000 --max-file-time 3600 \
                    --channel $channel $folder/$m-%H%M.wav
                if set -q _flag_dry_run
                    echo $cmd
                    continue
                end
                $cmd &
                set -Ua __night_pids $last_pid
                disown
            end
            echo "Recording until $until UTC. Shut the gate, mind the cable."
        case stop
            for pid in $__night_pids
                kill -INT $pid 2>/dev/null
                or echo "recorder $pid had stopped by itself" >&2
            end
            set -eU __night_pids
        case calls
            set -l day (test -n "$argv[2]"; and echo $argv[2]; or date -d yesterday +%F)
            set -l lists $NIGHT_DIR/$day/*.labels
            if test (count $lists) -eq 0
                __night_die "nothing analysed on $day"
                return
            end
            # One line a call: start, end, species, score. The same bird on two microphones is one bird.
            sort -n $lists | awk -F'\t' '
                $4 < 0.6 { weak++; next }
                $3 == last && $1 - t < 20 { t = $1; next }
                { n[$3]++; last = $3; t = $1 }
                END { for (s in n) printf "%4d  %s\n", n[s], s; printf "%4d  too faint to say\n", weak }' | sort -rn
        case share
            test -d $NIGHT_DIR/$argv[2]; or __night_die "no night $argv[2]"; or return
            rsync -a --info=progress2 --include='*.labels' --include='*-clip*.flac' --exclude='*' \
                $NIGHT_DIR/$argv[2]/ club:incoming/$USER/$argv[2]/
        case ''
            night --help
        case '*'
            __night_die "what is “$argv[1]”?"
    end
end

complete -c night -f
complete -c night -n __fish_use_subcommand -a 'start stop calls share'
complete -c night -n '__fish_seen_subcommand_from calls share' -a '(path basename $NIGHT_DIR/20*/)'
complete -c night -s m -l mic -x -a '$__night_mics'
abbr -a lastnight night calls
