#!/usr/bin/perl
# Race results of the pigeon clubs come as typewritten pages, scanned and read by an OCR program that has never seen
# a ring number. This puts them into one table. Reads *.txt, writes TSV on standard output, doubts on standard error.
use v5.26;
use strict;
use warnings;
use utf8;
use open qw(:std :encoding(UTF-8));
use List::Util qw(sum0 first max);
use Time::Local qw(timegm);

my %digit_for = (O => 0, o => 0, D => 0, Q => 0, l => 1, I => 1, '|' => 1, Z => 2, S => 5, s => 5, G => 6, T => 7, B => 8, g => 9);
my %doubts;
my ($race, @rows);

sub digits {
    my ($text) = @_;
    $text =~ s/([A-Za-z|])/$digit_for{$1} \/\/ $1/ge;
    return $text;
}

# Rings look like GB 19 X 40713 or IHU 18 S 2291: union, year, letter, number. Only the digits may be mended.
sub ring {
    my ($raw) = @_;
    my ($union, $year, $letter, $number) =
        $raw =~ m{^\s*(GB|IHU|NEHU|WHPU|SHU)[\s.-]*([\dOolISZ|]{2})[\s.-]*([A-Z])[\s.-]*([\w|]{3,6})\s*$} or return;
    ($year, $number) = (digits($year), digits($number));
    return unless "$year$number" =~ /^\d+$/;
    return "$union$year$letter$number";
}

sub clock {
    my ($text) = @_;
    my ($h, $m, $s) = map { digits($_) } $text =~ /^([\w|]{1,2})[.:,]([\w|]{2})[.:,]([\w|]{2})$/ or return;
    return if grep { !/^\d+$/ } $h, $m, $s;
    return if $h > 23 || $m > 59 || $s > 59;
    return 3600 * $h + 60 * $m + $s;
}

sub doubt {
    my ($what, $line) = @_;
    $doubts{$what}++;
    warn sprintf "%s:%d: %s: %s\n", $ARGV // '-', $., $what, $line =~ s/\s+/ /gr;
}

while (my $line = <>) {
    chomp $line;
    $line =~ tr/\x{2018}\x{2019}\x{2014}\x{00a0}/''- /;

    if ($line =~ /^\s*RACE\s+FROM\s+(?<place>[A-Z][A-Z .'-]+?)[,.]?\s+(?<d>\S{1,2})[.\/](?<m>\S{1,2})[.\/](?<y>\S{2,4})/) {
        my ($d, $m, $y) = map { digits($_) } @+{qw(d m y)};
        $y += $y < 50 ? 2000 : 1900 if $y < 100;
        $race = { place => join(' ', map { ucfirst lc } split / /, $+{place}), date => sprintf('%04d-%02d-%02d', $y, $m, $d) };
        next;
    }
    if ($race && $line =~ /LIBERATED\s+(?:AT\s+)?(\S+)/i) {
        my $t = $1 =~ tr/././r;
        $race->{off} = clock($t =~ /^\S+[.:,]\S+[.:,]/ ? $t : "$t.00") // doubt('time of liberation', $line);
        next;
    }
    next unless $race && $line =~ /\b(?:GB|IHU|NEHU|WHPU|SHU)\b/;

    # place, loft, ring, clock, yards, velocity: columns two or more blanks apart, or the machine's tab
    my @f = split /\s{2,}|\t/, $line =~ s/^\s+//r;
    if (@f < 5) { doubt('columns', $line); next }
    my ($loft) = $f[1] =~ /([A-Z][\w .&'-]+)/;
    my $ring = ring($f[2])  or do { doubt('ring', $line);  next };
    my $home = clock($f[3]) or do { doubt('clock', $line); next };
    my $yards = digits($f[4]) =~ tr/0-9//cdr;
    my $velocity;
    if (defined $race->{off} && $home > $race->{off}) {
        $velocity = $yards / (($home - $race->{off}) / 60);
        # The printed velocity is the check: three digits and three decimals, worked out by the club secretary.
        if (defined $f[5] && (my $printed = digits($f[5]) =~ tr/0-9.//cdr)) {
            doubt(sprintf('velocity %.3f, printed %s', $velocity, $printed), $line)
                if $printed =~ /^\d+\.\d+$/ && abs($printed - $velocity) > 0.5;
        }
        doubt('faster than the wind', $line) if $velocity > 2600;
    }
    push @rows, { %$race, loft => $loft // '?', ring => $ring, home => $home, yards => $yards, v => $velocity };
} continue {
    if (eof) { close ARGV; undef $race }
}

my %seen;
say join "\t", qw(date place loft ring home yards velocity);
for my $r (sort { $a->{date} cmp $b->{date} or ($b->{v} // 0) <=> ($a->{v} // 0) } @rows) {
    next if $seen{"$r->{date} $r->{ring}"}++;
    say join "\t", @$r{qw(date place loft ring)}, sprintf('%02d:%02d:%02d', $r->{home} / 3600, $r->{home} / 60 % 60, $r->{home} % 60),
        $r->{yards}, defined $r->{v} ? sprintf('%.3f', $r->{v}) : '';
}
printf STDERR "%d birds, %d doubts%s\n", scalar @rows, sum0(values %doubts),
    %doubts ? ', most often: ' . (sort { $doubts{$b} <=> $doubts{$a} } keys %doubts)[0] : '';
