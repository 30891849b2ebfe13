#!/usr/bin/env tclsh
# clocktower.tcl -- desk for the four faces of the town hall clock
#
# Each face is driven by an impulse every half minute. The line controller listens on a serial port and
# understands "P n" (one impulse to face n) and "S" (status). Faces lose impulses when there is ice on the
# hands, so every one has its own displayed time, which the caretaker can correct from the ground.

package require Tcl 8.6
package require Tk

namespace eval clock_desk {
    variable faces {north east south west}
    variable shown          ;# face -> minutes*2 since 12 o'clock that the hands show, 0..1439
    variable held           ;# face -> 1 while stopped by hand
    variable port ""
    variable log_size 500
    array set shown {north 0 east 0 south 0 west 0}
    array set held  {north 0 east 0 south 0 west 0}
}

proc clock_desk::half_minutes_now {} {
    scan [clock format [clock seconds] -format {%I %M %S}] {%d %d %d} h m s
    return [expr {($h % 12) * 120 + $m * 2 + ($s >= 30)}]
}

# How many impulses a face needs. Hands only move forward: a face that is at most an hour fast
# is cheaper to hold than to send round eleven hours.
proc clock_desk::plan {face} {
    variable shown
    set behind [expr {([half_minutes_now] - $shown($face)) % 1440}]
    if {$behind == 0} {
        return {ok 0}
    } elseif {$behind > 1320} {
        return [list wait [expr {1440 - $behind}]]
    }
    return [list step $behind]
}

proc clock_desk::connect {device} {
    variable port
    set port [open $device r+]
    fconfigure $port -mode 9600,n,8,1 -buffering line -translation crlf -blocking 0
    fileevent $port readable [namespace code on_answer]
    say "connected to $device"
}

proc clock_desk::on_answer {} {
    variable port
    variable shown
    if {[gets $port line] < 0} {
        if {[eof $port]} {
            fileevent $port readable {}
            close $port
            set port ""
            say "line controller has gone away" alarm
        }
        return
    }
    switch -regexp -matchvar m -- $line {
        {^OK (\d)$} {
            set face [lindex $clock_desk::faces [lindex $m 1]]
            set shown($face) [expr {($shown($face) + 1) % 1440}]
            draw $face
        }
        {^OPEN (\d)$} {
            # no current flowed: coil or cable. Do not count it, do not try again on our own.
            set face [lindex $clock_desk::faces [lindex $m 1]]
            set clock_desk::held($face) 1
            say "$face: line is open, face held" alarm
        }
        {^ICE (-?\d+)$} {
            say "temperature on the gallery [lindex $m 1] degrees"
        }
        default {
            say "cannot read '$line'" alarm
        }
    }
}

proc clock_desk::impulse {face} {
    variable port
    variable faces
    if {$port eq ""} return
    puts $port "P [lsearch -exact $faces $face]"
}

# Catching up happens at one impulse per second and face, staggered, so the supply never
# drives two coils at once.
proc clock_desk::tick {} {
    variable faces
    variable held
    set offset 0
    foreach face $faces {
        if {!$held($face)} {
            lassign [plan $face] what n
            if {$what eq "step"} {
                after $offset [namespace code [list impulse $face]]
            }
            .f.$face.state configure -text [expr {
                $what eq "ok" ? "on time" : $what eq "wait" ? "holding, [expr {$n / 2}] min fast" : "$n impulses behind"
            }]
        } else {
            .f.$face.state configure -text "stopped"
        }
        incr offset 250
    }
    after 1000 [namespace code tick]
}

proc clock_desk::draw {face} {
    variable shown
    set c .f.$face.dial
    $c delete hand
    set pi 3.14159265358979
    set t $shown($face)
    foreach {len width turn} [list 34 5 [expr {$t / 1440.0}] 52 3 [expr {($t % 120) / 120.0}]] {
        set a [expr {2 * $pi * $turn}]
        $c create line 60 60 [expr {60 + $len * sin($a)}] [expr {60 - $len * cos($a)}] \
            -width $width -capstyle round -fill gold -tags hand
    }
}

proc clock_desk::ask_shown {face} {
    variable shown
    set w [toplevel .ask]
    wm title $w "What does the $face face show?"
    entry $w.t -width 6 -justify center -validate key -validatecommand {regexp {^\d{0,2}:?\d{0,2}$} %P}
    bind $w.t <Return> [namespace code [list take_shown $face $w]]
    pack $w.t -padx 20 -pady 12
    focus $w.t
}

proc clock_desk::take_shown {face w} {
    variable shown
    if {[scan [$w.t get] {%d:%d} h m] == 2 && $h >= 1 && $h <= 12 && $m < 60} {
        set shown($face) [expr {($h % 12) * 120 + $m * 2}]
        say "$face set to [$w.t get] by hand"
        draw $face
        destroy $w
    } else {
        $w.t configure -background #ffd0d0
    }
}

proc clock_desk::say {text {tag {}}} {
    variable log_size
    .log configure -state normal
    .log insert end "[clock format [clock seconds] -format %T]  $text\n" $tag
    .log delete 1.0 "end - $log_size lines"
    .log configure -state disabled
    .log see end
}

proc clock_desk::build {} {
    variable faces
    wm title . "Town hall clock"
    frame .f
    text .log -height 8 -width 64 -state disabled -font TkFixedFont
    .log tag configure alarm -foreground red3
    foreach face $faces {
        labelframe .f.$face -text [string totitle $face]
        canvas .f.$face.dial -width 120 -height 120 -background grey20 -highlightthickness 0
        for {set i 0} {$i < 12} {incr i} {
            set a [expr {$i * 3.14159265358979 / 6}]
            .f.$face.dial create text [expr {60 + 50 * sin($a)}] [expr {60 - 50 * cos($a)}] \
                -text [expr {$i ? $i : 12}] -fill white
        }
        label .f.$face.state -width 22
        checkbutton .f.$face.hold -text Stop -variable clock_desk::held($face)
        button .f.$face.set -text Correct... -command [namespace code [list ask_shown $face]]
        pack .f.$face.dial .f.$face.state .f.$face.hold .f.$face.set -side top -pady 2
        pack .f.$face -side left -padx 4 -pady 4
        draw $face
    }
    pack .f .log -side top -fill both
}

clock_desk::build
if {$argc == 1} {
    clock_desk::connect [lindex $argv 0]
} else {
    clock_desk::say "no port given: nothing will move"
}
clock_desk::tick
